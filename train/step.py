"""One training step, one evaluation step, and the state between steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from models import llama, lora
from models.config import LlamaConfig
from optax_subspace import (
    FusedStep,
    Hamiltonian,
    LossScale,
    apply_updates,
    dequantize,
    fused_backward,
    hamiltonian,
    quantize_weights,
    subspace_metrics,
)
from train.batches import Batch
from train.optimizer import Optimizer


class State(NamedTuple):
    """All that a step changes; arrays only, of fixed shapes and dtypes."""

    step: jax.Array  # () int32, steps done
    params: Any  # nested dicts; kernels may be QuantizedWeight nodes
    opt_state: Any


class Metrics(NamedTuple):
    """What a step reports, () float32 each."""

    loss: jax.Array  # before the update
    grad_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    skipped: jax.Array  # 1 if float16 overflowed, so that the step changed nothing


def init_state(
    model: LlamaConfig,
    optimizer: Optimizer,
    key: jax.Array,
    int8_weights: bool = False,
    fused: FusedStep | None = None,
    params: Any = None,
) -> State:
    """The state before the first step; under `jax.eval_shape` nothing is allocated.

    Pretrained `params` take the place of random ones.
    """
    params = llama.init_params(model, key) if params is None else params
    if optimizer.adapters.rank:
        of_adapters = jax.random.fold_in(key, 1)
        params = lora.add(params, optimizer.adapters.rank, optimizer.adapters.alpha, of_adapters)
    opt_state = (fused or optimizer.tx).init(params)
    if int8_weights:
        params = kernels_in_int8(params)
    return State(jnp.zeros([], jnp.int32), params, opt_state)


def kernels_in_int8(params: Any) -> Any:
    """The layers' kernels in int8, layer by layer, so that each can be taken out of the stack."""
    rules = llama.subspace_rules()
    store = lambda layer: quantize_weights({"layers": layer}, rules, min_size=0)["layers"]
    return {**params, "layers": jax.vmap(store)(params["layers"])}


def make_fused(model: LlamaConfig, optimizer: Optimizer, seed: int | None = None) -> FusedStep:
    """The model's parts and the optimizer in a fused backward pass."""
    parts, trained = llama.pieces(model), _trained(optimizer)
    return fused_backward(
        lambda rest, batch: block_input(parts, trained(rest), batch),
        lambda layer, x: run_block(parts, trained(layer), x),
        lambda rest, x, batch: parts.loss(trained(rest), x[0], batch.targets, batch.mask)[0],
        optimizer.tx,
        clip_norm=optimizer.clip_norm,
        grad_norm=True,
        remat=model.remat,
        loss_scale=LossScale() if model.dtype == "float16" else None,
        seed=seed,
    )


def block_input(parts: llama.Pieces, rest: Any, batch: Batch) -> tuple[jax.Array, ...]:
    """What the blocks hand on: x (B, S, d), and a batch's segments (B, S), if it has any.

    As float32, since the walk takes the cotangent of all that is handed on.
    """
    segments = () if batch.segments is None else (batch.segments.astype(jnp.float32),)
    return parts.embed(rest, batch.inputs), *segments


def run_block(parts: llama.Pieces, layer: Any, x: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """One block of what `block_input` begins."""
    return parts.block(layer, *x), *x[1:]


def make_loss(model: LlamaConfig, optimizer: Optimizer) -> Callable[[Any, Batch], jax.Array]:
    """A function of parameters and a batch: mean nats a token, ()."""
    definition, trained = llama.graphdef(model), _trained(optimizer)
    return lambda params, batch: llama.merge(definition, trained(params)).loss(
        batch.inputs, batch.targets, batch.mask, batch.segments
    )[0]


def _trained(optimizer: Optimizer) -> Callable[[Any], Any]:
    """What stops the gradients of weights that are not trained."""
    return lora.freeze if optimizer.adapters.only else lambda params: params


def make_train_step(
    model: LlamaConfig,
    optimizer: Optimizer,
    seed: int | None = None,
    fused: FusedStep | None = None,
) -> Any:
    """A jitted function of the state, which is donated, and of a `Batch`.

    With a `seed` weights of few bits are rounded stochastically; a `fused` step has its own.
    """
    loss_fn = make_loss(model, optimizer)

    def fused_train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        assert fused is not None
        params, opt_state, found = fused.step(state.params, state.opt_state, batch)
        rate = optimizer.schedule(state.step)
        metrics = Metrics(found.loss, found.grad_norm, rate, found.skipped)
        return State(state.step + 1, params, opt_state), metrics

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        weights = dequantize(state.params)
        loss, gradients = jax.value_and_grad(loss_fn)(weights, batch)
        updates, opt_state = optimizer.tx.update(gradients, state.opt_state, weights)
        # A function of the step alone, so that a resumed run draws the same.
        key = None if seed is None else jax.random.fold_in(jax.random.key(seed), state.step)
        params = apply_updates(state.params, updates, key=key)
        rate, norm = optimizer.schedule(state.step), optax.tree.norm(gradients)
        metrics = Metrics(loss, norm, rate, jnp.zeros([]))
        return State(state.step + 1, params, opt_state), metrics

    return jax.jit(fused_train_step if fused else train_step, donate_argnums=0)


class SubspaceSummary(NamedTuple):
    """The subspaces of all projected matrices at once, () each."""

    captured_energy: jax.Array  # mean share of a gradient within its basis
    drift: jax.Array  # mean drift between the last two bases
    refreshes: jax.Array  # bases found so far, all slices counted
    skipped: jax.Array  # gradients that were not finite, of projected matrices


def make_subspace_step(model: LlamaConfig, optimizer: Optimizer) -> Any:
    """A jitted function of the state and of a batch, whose gradient is measured."""
    loss_fn = make_loss(model, optimizer)

    def subspace_step(state: State, batch: Batch) -> SubspaceSummary:
        gradients = jax.grad(loss_fn)(dequantize(state.params), batch)
        found = subspace_metrics(optimizer.tx, state.opt_state, gradients).values()
        if not found:
            return SubspaceSummary(*jnp.zeros(4))
        join = lambda name: jnp.concatenate([jnp.ravel(getattr(m, name)) for m in found])
        return SubspaceSummary(
            jnp.mean(join("captured_energy")),
            jnp.mean(join("drift")),
            jnp.sum(join("refreshes")),
            jnp.sum(join("skipped")),
        )

    return jax.jit(subspace_step)


def make_hamiltonian_step(optimizer: Optimizer) -> Any:
    """A jitted function of the state after a step and of the loss there: its energy."""

    def hamiltonian_step(state: State, loss: jax.Array) -> Hamiltonian:
        rate = optimizer.schedule(state.step - 1)
        params, tx, kinetic = dequantize(state.params), optimizer.tx, optimizer.kinetic
        return hamiltonian(loss, state.opt_state, tx, params, rate, kinetic=kinetic)

    return jax.jit(hamiltonian_step)


def make_eval_step(model: LlamaConfig) -> Any:
    """A jitted function of parameters and a batch: total nats, tokens."""
    definition = llama.graphdef(model)

    def eval_step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = llama.merge(definition, dequantize(params))
        loss, count = model.loss(batch.inputs, batch.targets, batch.mask, batch.segments)
        return loss * count, count

    return jax.jit(eval_step)


def all_finite(state: State) -> jax.Array:
    """Whether all floating-point numbers of a state are finite, () bool."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))
