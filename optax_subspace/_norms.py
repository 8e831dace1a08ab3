"""Norms of matrices as kinetic energies, and their gradients: pure functions on one leaf.

Matrices are the last two axes of a leaf; a leaf of one or no axis is one vector. ``mu`` smooths: it
is the least magnitude of an entry (of a singular value), or the temperature of a largest one.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def matrix_axes(s: jax.Array) -> tuple[int, ...]:
    return tuple(range(-min(s.ndim, 2), 0))


def magnitude(s: jax.Array, mu: float) -> jax.Array:
    return jnp.sqrt(s**2 + mu**2) if mu else jnp.abs(s)


def _scaled(s: jax.Array, mu: float) -> tuple[jax.Array, jax.Array]:
    """Magnitudes over the largest of their matrix, and that one: powers neither vanish nor grow."""
    size = magnitude(s, mu)
    largest = jnp.max(size, axis=matrix_axes(s), keepdims=True)
    return size / jnp.where(largest > 0, largest, 1), largest


def p_norm(s: jax.Array, p: float, mu: float) -> jax.Array:
    size, largest = _scaled(s, mu)
    at_zero = mu * _entries(s) ** (1 / p)
    norms = jnp.sum(size**p, axis=matrix_axes(s), keepdims=True) ** (1 / p) * largest
    return norms - at_zero


def p_slope(s: jax.Array, p: float, mu: float) -> jax.Array:
    size, largest = _scaled(s, mu)
    norms = jnp.sum(size**p, axis=matrix_axes(s), keepdims=True) ** (1 / p)
    # Zero where the matrix is.
    slope = (size / jnp.where(norms > 0, norms, 1)) ** (p - 1)
    return slope * (s / magnitude(s, mu) if mu else jnp.sign(s))


def _entries(s: jax.Array) -> int:
    return math.prod(s.shape[axis] for axis in matrix_axes(s))


def largest_entry(s: jax.Array, mu: float) -> jax.Array:
    axes = matrix_axes(s)
    if not mu:
        return jnp.max(jnp.abs(s), axis=axes)
    both = jnp.stack([s, -s]) / mu
    above = jax.nn.logsumexp(both, axis=(0, *axes))
    return mu * (above - jnp.log(2.0 * _entries(s)))


def share_of_largest(s: jax.Array, mu: float) -> jax.Array:
    axes = matrix_axes(s)
    if mu:
        shares = jax.nn.softmax(jnp.stack([s, -s]) / mu, axis=(0, *axes))
        return shares[0] - shares[1]
    size = jnp.abs(s)
    # Not `==`: XLA may compute an entry twice, and the two differ in their last bits.
    least = (1 - 4 * jnp.finfo(size.dtype).eps) * jnp.max(size, axis=axes, keepdims=True)
    largest = (size >= least) & (size > 0)
    count = jnp.sum(largest, axis=axes, keepdims=True)
    return jnp.where(largest, jnp.sign(s), 0) / jnp.maximum(count, 1)


def _as_matrix(s: jax.Array) -> jax.Array:
    return s if s.ndim >= 2 else s.reshape(1, -1)


def nuclear_norm(s: jax.Array, mu: float) -> jax.Array:
    matrices = _as_matrix(s)
    slices = matrices.reshape(-1, *matrices.shape[-2:])
    # (One after the other, see ``_refresh.in_slices``.)
    values = jax.lax.map(lambda m: jnp.linalg.svd(m, compute_uv=False), slices)
    return jnp.sum(magnitude(values, mu) - mu)


def orthogonalized(
    s: jax.Array,
    mu: float,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float | jax.Array,
) -> jax.Array:
    """``S (S^T S + mu^2)^(-1/2)`` by Newton-Schulz, for the last two axes."""
    x = _as_matrix(s)
    rows, columns = x.shape[-2:]
    if rows > columns:
        x = x.mT
    if mu:
        # The polar factor of (S, mu I) has the one of S, smoothed, in its first columns.
        side = jnp.broadcast_to(
            mu * jnp.eye(x.shape[-2], dtype=x.dtype), (*x.shape[:-1], x.shape[-2])
        )
        x = jnp.concatenate([x, side], axis=-1)
    tiny = jnp.finfo(x.dtype).tiny
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True), tiny)
    x = x / largest
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + eps / largest
    x = x / jnp.maximum(norm, tiny)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    if mu:
        x = x[..., : max(rows, columns)]
    return (x.mT if rows > columns else x).reshape(s.shape)
