"""One training step, one evaluation step, and the state between steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from models import factored, llama, lora
from models.config import LlamaConfig
from optax_subspace import (
    FusedState,
    FusedStep,
    Hamiltonian,
    LossScale,
    QuantizedWeight,
    apply_updates,
    dequantize,
    fused_backward,
    hamiltonian,
    quantize_weights,
    subspace_metrics,
)
from train.batches import Batch
from train.config import LoraConfig
from train.gradient import (
    Weighted,
    is_divided,
    make_gradient,
    make_mean,
    micro_batches,
    trained_by,
    walk,
)
from train.mesh import ALONE, Work
from train.optimizer import Optimizer


class State(NamedTuple):
    """All that a step changes; arrays only, of fixed shapes and dtypes."""

    step: jax.Array  # () int32, steps done
    params: Any  # nested dicts; kernels may be QuantizedWeight nodes
    opt_state: Any


class Metrics(NamedTuple):
    """What a step reports, () float32 each."""

    loss: jax.Array  # before the update
    # Before clipping; of micro-batches in a fused step, which has no sum, the root mean square.
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array  # 1 if float16 overflowed, so that the step changed nothing


def init_state(
    model: LlamaConfig,
    optimizer: Optimizer,
    key: jax.Array,
    int8_weights: bool = False,
    fused: FusedStep | None = None,
    params: Any = None,
    shards: int = 1,
) -> State:
    """The state before the first step; under `jax.eval_shape` nothing is allocated.

    Pretrained `params` take the place of random ones. Blocks of int8 weights keep to each of
    `shards` parts of an axis.
    """
    params = llama.init_params(model, key) if params is None else params
    params = with_adapters(params, optimizer.adapters, key)
    opt_state = (fused or optimizer.tx).init(params)
    if int8_weights:
        params = kernels_in_int8(params, shards)
    return State(jnp.zeros([], jnp.int32), params, opt_state)


def with_adapters(params: Any, config: LoraConfig, key: jax.Array) -> Any:
    """A model's parameters with the adapters of a configuration, or factors in their place."""
    if config.factorize:
        return factored.factorize(params, config.rank)
    if config.rank:
        return lora.add(params, config.rank, config.alpha, jax.random.fold_in(key, 1))
    return params


def without_adapters(params: Any) -> Any:
    """The model that these parameters are, with plain kernels."""
    return factored.merge(lora.merge(params))


def kernels_in_int8(params: Any, shards: int = 1) -> Any:
    """The layers' kernels in int8, layer by layer, so that each can be taken out of the stack."""
    rules = llama.subspace_rules()
    whole = lambda layer: quantize_weights({"layers": layer}, rules, min_size=0, shards=shards)
    store = lambda layer: whole(layer)["layers"]
    return {**params, "layers": jax.vmap(store)(params["layers"])}


def are_in_int8(params: Any) -> bool:
    """Whether the layers' kernels are kept in int8."""
    is_stored = lambda x: isinstance(x, QuantizedWeight)
    return any(map(is_stored, jax.tree.leaves(params, is_leaf=is_stored)))


def make_fused(
    model: LlamaConfig,
    optimizer: Optimizer,
    seed: int | None = None,
    work: Work = ALONE,
    at_source: bool = False,
) -> FusedStep:
    """The model's parts and the optimizer in a fused backward pass over `Batch` or `Weighted`."""
    trained, parts = trained_by(optimizer), walk(model, work)
    of_batch = lambda batch: batch.batch if isinstance(batch, Weighted) else batch

    def loss(rest: Any, x: Any, batch: Any) -> jax.Array:
        value = parts.mean(trained(rest), x, of_batch(batch))[0]
        return value * batch.weight if isinstance(batch, Weighted) else value

    return fused_backward(
        lambda rest, batch: parts.embed(trained(rest), of_batch(batch)),
        lambda layer, x: parts.block(trained(layer), x),
        loss,
        optimizer.tx,
        clip_norm=optimizer.clip_norm,
        grad_norm=True,
        at_source=at_source,
        remat=model.remat,
        loss_scale=LossScale() if model.dtype == "float16" else None,
        seed=seed,
    )


def make_train_step(
    model: LlamaConfig,
    optimizer: Optimizer,
    seed: int | None = None,
    fused: FusedStep | None = None,
    work: Work = ALONE,
    formats: State | None = None,
) -> Any:
    """A jitted function of the state, which is donated, and of a `Batch`.

    With a `seed` weights of few bits are rounded stochastically; a `fused` step has its own. The
    new state has the `formats`, or those that the compiler chooses.
    """
    gradient = make_gradient(model, optimizer, work)

    def fused_train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        assert fused is not None
        step: Any = fused.step
        carry, count = (state.params, state.opt_state), 1
        if is_divided(batch, work.micro_batch_size):

            def one(carry: Any, part: Weighted) -> tuple[Any, Any]:
                params, opt_state, found = step(carry[0], carry[1], part)
                return (params, opt_state), found

            parts = micro_batches(batch, work.micro_batch_size)
            count = parts.weight.shape[0]
            carry, each = jax.lax.scan(one, carry, parts)
            mean = jax.tree.map(lambda x: jnp.mean(x), each._replace(grad_norm=each.grad_norm**2))
            found = mean._replace(grad_norm=jnp.sqrt(mean.grad_norm))
        else:
            params, opt_state, found = step(*carry, batch)
            carry = params, opt_state
        rate = optimizer.schedule(updates_done(state, count))
        metrics = Metrics(found.loss, found.grad_norm, rate, found.skipped)
        return State(state.step + 1, *carry), metrics

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        weights = dequantize(state.params)
        loss, gradients = gradient(weights, batch)
        updates, opt_state = optimizer.tx.update(gradients, state.opt_state, weights)
        # A function of the step alone, so that a resumed run draws the same.
        key = None if seed is None else jax.random.fold_in(jax.random.key(seed), state.step)
        params = apply_updates(state.params, updates, key=key)
        rate, norm = optimizer.schedule(state.step), optax.tree.norm(gradients)
        metrics = Metrics(loss, norm, rate, jnp.zeros([]))
        return State(state.step + 1, params, opt_state), metrics

    out = None if formats is None else (formats, everywhere(work))
    step = fused_train_step if fused else train_step
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def updates_done(state: State, micro_batches: int = 1) -> jax.Array:
    """The updates so far, which schedules count: the steps, without those that overflowed."""
    if not isinstance(state.opt_state, FusedState):
        return state.step
    return (state.step * micro_batches - state.opt_state.skipped) // micro_batches


def everywhere(work: Work) -> Any:
    """The sharding of what a step reports: processes read it, so each device has it."""
    return None if work.mesh is None else work.mesh.everywhere


class SubspaceSummary(NamedTuple):
    """The subspaces of all projected matrices at once, () each."""

    captured_energy: jax.Array  # mean share of a gradient within its basis
    drift: jax.Array  # mean drift between the last two bases
    refreshes: jax.Array  # bases found so far, all slices counted
    skipped: jax.Array  # gradients that were not finite, of projected matrices


def make_subspace_step(model: LlamaConfig, optimizer: Optimizer, work: Work = ALONE) -> Any:
    """A jitted function of the state and of a batch, whose gradient is measured."""
    gradient = make_gradient(model, optimizer, work)

    def subspace_step(state: State, batch: Batch) -> SubspaceSummary:
        _, gradients = gradient(dequantize(state.params), batch)
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

    return jax.jit(subspace_step, out_shardings=everywhere(work))


def make_hamiltonian_step(optimizer: Optimizer, work: Work = ALONE) -> Any:
    """A jitted function of the state after a step and of the loss there: its energy."""

    def hamiltonian_step(state: State, loss: jax.Array) -> Hamiltonian:
        rate = optimizer.schedule(updates_done(state) - 1)
        params, tx, kinetic = dequantize(state.params), optimizer.tx, optimizer.kinetic
        return hamiltonian(loss, state.opt_state, tx, params, rate, kinetic=kinetic)

    return jax.jit(hamiltonian_step, out_shardings=everywhere(work))


def make_eval_step(model: LlamaConfig, work: Work = ALONE) -> Any:
    """A jitted function of parameters and a batch: total nats, tokens."""
    whole, size = make_mean(model, work), work.micro_batch_size
    parts = walk(model, work)

    def mean(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        if not are_in_int8(params):
            return whole(params, batch)
        # Kernels in int8 become arrays layer by layer, as they do in the fused step.
        one = lambda x, layer: (parts.block(dequantize(layer), x), None)
        x, _ = jax.lax.scan(one, parts.embed(params, batch), params["layers"])
        return parts.mean(params, x, batch)

    def eval_step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        if not is_divided(batch, size):
            loss, count = mean(params, batch)
            return loss * count, count
        parts = micro_batches(batch, size).batch
        losses, counts = jax.lax.map(lambda part: mean(params, part), parts)
        return jnp.sum(losses * counts), jnp.sum(counts)

    return jax.jit(eval_step, out_shardings=everywhere(work))


def all_finite(state: State) -> jax.Array:
    """Whether all floating-point numbers of a state are finite, () bool."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))
