"""Training steps whose gradients of projected kernels are low-rank from the start."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from models import llama
from models.config import LlamaConfig
from optax_subspace import (
    FusedStep,
    apply_updates,
    dequantize,
    steps_to_refresh,
    subspace_value_and_grad,
)
from train.batches import Batch
from train.config import Config
from train.errors import UsageError
from train.gradient import Weighted, micro_batches, over_rows_mean, trained_by
from train.mesh import ALONE, Mesh, Work
from train.optimizer import Optimizer
from train.step import Metrics, State, everywhere, make_train_step


def check(config: Config, mesh: Mesh) -> None:
    """Raises UsageError for a division of the work that gradients at the source don't know."""
    if not config.train.project_at_source or mesh.size == 1:
        return
    if mesh.fsdp > 1:
        raise UsageError(
            f"--mesh.fsdp {mesh.fsdp}: kernels that are split over devices have products of their "
            "own; leave out --train.project_at_source, or give --mesh.fsdp 1"
        )
    if config.train.fused_backward:
        raise UsageError(
            f"--train.project_at_source: together with --train.fused_backward it runs on one "
            f"device, and here are {mesh.size}; leave one of the two out"
        )


def jitted_steps(
    config: Config, optimizer: Optimizer, fused: FusedStep | None, work: Work, formats: State
) -> list[Any]:
    """The configuration's training step; at the source one that refreshes and one that does not."""
    seed = config.train.seed if config.train.stochastic_rounding else None
    if config.train.project_at_source and fused is None:
        make = functools.partial(make_source_step, config.model, optimizer, seed, work, formats)
        return [make(refresh) for refresh in (True, False)]
    return [make_train_step(config.model, optimizer, seed, fused, work, formats)]


def make_source_step(
    model: LlamaConfig,
    optimizer: Optimizer,
    seed: int | None = None,
    work: Work = ALONE,
    formats: State | None = None,
    refresh: bool = True,
) -> Any:
    """As `train.step.make_train_step`, with `optax_subspace.subspace_value_and_grad`.

    A step that does not `refresh` is for between refreshes: it keeps less of the activations.
    """
    split = work.mesh is not None and work.mesh.size > 1
    if split and model.attention == "auto" and jax.default_backend() == "cpu":
        # The form that is fastest on a CPU goes through the rows one by one, wherever they are.
        model = dataclasses.replace(model, attention="einsum")
    loss_fn, tx = _make_loss(model, optimizer, work), optimizer.tx
    weighted = lambda params, part: loss_fn(params, part.batch) * part.weight
    gradient = subspace_value_and_grad(weighted, tx, refresh=refresh)

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        # A function of the step alone, so that a resumed run draws the same.
        key = None if seed is None else jax.random.fold_in(jax.random.key(seed), state.step)

        def one(carry: Any, part: Weighted) -> tuple[Any, Any]:
            params, opt_state = carry
            weights = dequantize(params)
            loss, gradients, source = gradient(weights, opt_state, part)
            updates, opt_state = tx.update(gradients, opt_state, weights, source=source)
            carry = apply_updates(params, updates, key=key), opt_state
            return carry, (loss, optax.tree.norm(gradients, squared=True))

        parts = micro_batches(batch, work.micro_batch_size)
        start = state.params, state.opt_state
        if parts.weight.shape[0] == 1:
            carry, (loss, squared) = one(start, jax.tree.map(lambda x: x[0], parts))
        else:
            carry, found = jax.lax.scan(one, start, parts)
            loss, squared = jax.tree.map(jnp.mean, found)
        rate = optimizer.schedule(state.step)
        metrics = Metrics(loss, jnp.sqrt(squared), rate, jnp.zeros([]))
        return State(state.step + 1, *carry), metrics

    out = None if formats is None else (formats, everywhere(work))
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def found(model: LlamaConfig, optimizer: Optimizer, state: State, batch: Batch) -> Any:
    """Shapes of the gradients of a refreshing step, and of what comes with them for the bases."""
    gradient = subspace_value_and_grad(_make_loss(model, optimizer, ALONE), optimizer.tx)
    weights = jax.eval_shape(dequantize, state.params)
    return jax.eval_shape(gradient, weights, state.opt_state, batch)[1:]


def _make_loss(
    model: LlamaConfig, optimizer: Optimizer, work: Work
) -> Callable[[Any, Batch], jax.Array]:
    """As `train.gradient.make_loss`, whose gradients the compiler adds up over the devices.

    The head's loss alone is each device's own, by its rows: going through all tokens chunk by
    chunk, it would gather them.
    """
    definition, trained = llama.graphdef(model), trained_by(optimizer)

    def head(rest: Any, x: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return llama.head_loss(model, rest["head"]["kernel"], x, batch.targets, batch.mask)

    mean = over_rows_mean(work.mesh, head)

    def loss(params: Any, batch: Batch) -> jax.Array:
        merged = llama.merge(definition, trained(params))
        x = merged.hidden(batch.inputs, batch.segments)
        return mean({"head": {"kernel": merged.head_kernel()}}, x, batch)[0]

    return loss


class SourceSteps:
    """A compiled step that finds the bases that are due, and a cheaper one for all others."""

    def __init__(self, refresh: Any, between: Any):
        self._refresh, self._between = refresh, between
        self._left: int | None = None  # steps until a basis can be due

    def __call__(self, state: State, batch: Any) -> tuple[State, Metrics]:
        """One step of training."""
        if self._left is None:
            self._left = int(steps_to_refresh(state.opt_state))
        if self._left:
            self._left -= 1
            return self._between(state, batch)
        state, metrics = self._refresh(state, batch)
        # Read from the device at refreshes alone.
        self._left = int(steps_to_refresh(state.opt_state))
        return state, metrics

    def memory_analysis(self) -> Any:
        """Of the step that takes more."""
        return self._refresh.memory_analysis()
