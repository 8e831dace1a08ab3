"""What a fused step keeps and reports, and its loss scale."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class LossScale(NamedTuple):
    """Dynamic loss scaling, for float16.

    Attributes:
      initial: the first scale, above zero.
      factor: what it is divided by after an overflow, and multiplied with after a period without;
        above one.
      period: steps without overflow before it grows, at least one.
    """

    initial: float = 2.0**15
    factor: float = 2.0
    period: int = 2000


class FusedState(NamedTuple):
    """State of a fused step.

    Attributes:
      step: int32 scalar, the steps done; those that overflowed count too.
      layers: the transformation's state for one layer, all arrays with the layers' axis in front.
      rest: its state by key of the parameters outside of the layers.
      scale: float32 scalar, the loss scale; 1 without one.
      good: int32 scalar, steps since the scale has changed.
      skipped: int32 scalar, the steps that overflowed: the transformation has seen the others, and
        its schedules count them alone.
    """

    step: jax.Array
    layers: Any
    rest: dict[str, Any]
    scale: jax.Array
    good: jax.Array
    skipped: jax.Array


class FusedMetrics(NamedTuple):
    """What a fused step reports, float32 scalars.

    Attributes:
      loss: before the update.
      grad_norm: global norm of the gradients, before they are clipped by a norm; NaN if neither
        needed nor asked for, and infinite where squares of finite gradients overflow, which a clip
        by the norm makes zero.
      skipped: 1 if a gradient was not finite under a loss scale, so that the step changed nothing.
    """

    loss: jax.Array
    grad_norm: jax.Array
    skipped: jax.Array


def all_finite(gradients: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradients)]))


def next_scale(
    how: LossScale | None, state: FusedState, good_step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss scale of the next step, and the steps since it changed."""
    if how is None:
        return state.scale, state.good
    good = jnp.where(good_step, state.good + 1, 0)
    grows = good >= how.period
    larger = state.scale * how.factor
    # Where no gradient overflows, as in bfloat16, it would be infinite one day, and stay so.
    scale = jnp.where(grows & jnp.isfinite(larger), larger, state.scale)
    smaller = jnp.minimum(state.scale, jnp.maximum(state.scale / how.factor, 1.0))
    scale = jnp.where(good_step, scale, smaller)
    return scale, jnp.where(grows, 0, good)
