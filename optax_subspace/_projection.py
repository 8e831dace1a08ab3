"""Projection into a leaf's subspace and back: pure functions on one leaf."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optax_subspace._blocks import dequantize
from optax_subspace._leaves import LeafPlan
from optax_subspace._varying import not_varying

# The name of `in_turn` in traced programs.
IN_TURN = "in_turn"


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of the arithmetic: float32, or float64 for float64 leaves."""
    return jnp.promote_types(dtype, jnp.float32)


def stored_as(update: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """An update in the gradient's dtype; in float16 within it, where a cast may give infinity."""
    if dtype == jnp.float16:
        update = jnp.clip(update, jnp.finfo(dtype).min, jnp.finfo(dtype).max)
    return update.astype(dtype)


def largest(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """The largest magnitude over ``axes``, which stay as ones; a scalar without.

    It is never zero: the squares of what is divided by it neither overflow nor vanish.
    """
    # (Of no numbers at all, as of a batch without tokens, it has an initial one.)
    found = jnp.max(jnp.abs(x), axis=axes, keepdims=axes is not None, initial=0)
    return jnp.maximum(found, jnp.finfo(x.dtype).tiny)


def to_matrices(leaf: jax.Array, plan: LeafPlan) -> jax.Array:
    """Reshapes a leaf to ``(*batch, m, n)``."""
    axes = plan.batch + plan.reduction + plan.output
    return leaf.transpose(axes).reshape(*plan.batch_shape, *plan.matrix_shape)


def from_matrices(matrices: jax.Array, plan: LeafPlan) -> jax.Array:
    """The inverse of :func:`to_matrices`: ``(*batch, m, n)`` back to the leaf's shape."""
    axes = plan.batch + plan.reduction + plan.output
    transposed = matrices.reshape([plan.shape[a] for a in axes])
    return transposed.transpose([axes.index(i) for i in range(len(axes))])


def project(matrices: jax.Array, bases: tuple[Any, ...], plan: LeafPlan) -> jax.Array:
    """Coordinates of ``(*batch, m, n)`` in the subspace: ``P^T G``, ``G Q`` or ``P^T G Q``.

    GaLore (Zhao et al., 2024), equation 4 and algorithm 2. Bases are arrays or
    :class:`Quantized`. The result has ``plan.low_shape``.
    """
    dtype = compute_dtype(matrices.dtype)
    low = matrices.astype(dtype)
    for side, basis in zip(plan.sides, bases, strict=True):
        if side == "left":
            low = jnp.einsum("...mr,...mn->...rn", dequantize(basis).astype(dtype), low)
        else:
            low = jnp.einsum("...mn,...nr->...mr", low, dequantize(basis).astype(dtype))
    return low


def lift(low: jax.Array, bases: tuple[Any, ...], plan: LeafPlan) -> jax.Array:
    """The way back to ``(*batch, m, n)``: ``P R``, ``R Q^T`` or ``P R Q^T``."""
    full = low
    for side, basis in zip(plan.sides, bases, strict=True):
        if side == "left":
            full = jnp.einsum("...mr,...rn->...mn", dequantize(basis).astype(low.dtype), full)
        else:
            full = jnp.einsum("...mr,...nr->...mn", full, dequantize(basis).astype(low.dtype))
    return full


@jax.jit
def in_turn(array: jax.Array, earlier: jax.Array) -> jax.Array:
    """``array``, in such a way that it can be used only when ``earlier`` is known.

    XLA:CPU would take all leaves through one operation before the next one, and so hold the
    updates of all of them in memory at once. It keeps to dependences of data alone (barriers are
    gone by the time it orders operations), so here is one, on which no finite number depends. (It
    is a function of its own in traced programs, by whose name it can be told from a real one.)
    """
    # (Within a shard_map it would differ between devices where `earlier` alone does.)
    if not earlier.size or not_varying(array, earlier):
        return array
    # (Not of a reshaped array: of one that is split over devices, all would be gathered.)
    first, largest = earlier[(0,) * earlier.ndim], jnp.finfo(array.dtype).max
    return jnp.where(first != first, jnp.clip(array, -largest, largest), array)
