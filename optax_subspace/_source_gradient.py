"""A kernel's gradient at the source: two factors, and products with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_subspace._blocks import dequantize
from optax_subspace._projection import compute_dtype, largest
from optax_subspace._varying import not_varying


class Over(NamedTuple):
    """How products over the tokens are made.

    Attributes:
      precision: the layer's.
      axes: those of a ``shard_map`` that the tokens are spread over: the kernel, which they share,
        has the gradient of all.
    """

    precision: Any
    axes: tuple[str, ...]

    @classmethod
    def of(cls, precision: Any, low: jax.Array, factors: Any) -> Over:
        """Of the factors of a gradient whose projection is shaped, and varies, as ``low``."""
        return cls(precision, not_varying(low, factors))


def narrow(x: jax.Array, basis: Any, over: Over) -> jax.Array:
    """``x P``, ``(*tokens, r)`` in the dtype of ``x``; of float16, which may not hold it, wider."""
    wide = compute_dtype(x.dtype)
    dtype = wide if x.dtype == jnp.float16 else x.dtype
    basis = dequantize(basis).astype(dtype)
    return jnp.dot(x, basis, precision=over.precision, preferred_element_type=wide).astype(dtype)


def contract(x: jax.Array, y: jax.Array, over: Over) -> jax.Array:
    """``x^T y`` over the tokens, ``(*tokens, m)`` and ``(*tokens, n)`` to ``(m, n)``.

    Over a mesh it is what devices add up, in the dtype that the full gradient would have: bfloat16
    stays that. (Float16 does not, where sums over tokens overflow.)
    """
    wide = compute_dtype(jnp.promote_types(x.dtype, y.dtype))
    summed = x.dtype if x.dtype == y.dtype == jnp.bfloat16 else wide
    tokens = tuple(range(x.ndim - 1))
    x, y = (a.astype(jnp.promote_types(x.dtype, y.dtype)) for a in (x, y))
    # XLA:CPU copies the first factor of a sum over several axes, so that is the narrower.
    turned = x.shape[-1] > y.shape[-1]
    first, second = (y, x) if turned else (x, y)
    found = jax.lax.dot_general(
        first, second, ((tokens, tokens), ((), ())), over.precision, preferred_element_type=summed
    )
    found = found.T if turned else found
    return (jax.lax.psum(found, over.axes) if over.axes else found).astype(wide)


class Gradient:
    """``G = x^T d`` of shape ``(m, n)``, known by its products: what a rule without need of the
    matrix itself (``Projector.matrix_free``) is given at the source."""

    def __init__(self, x: jax.Array, d: jax.Array, over: Over):
        self.x, self.d, self.over = x, d, over
        self.shape, self.ndim = (x.shape[-1], d.shape[-1]), 2
        self.dtype = compute_dtype(jnp.promote_types(x.dtype, d.dtype))

    @property
    def T(self) -> Gradient:
        return Gradient(self.d, self.x, self.over)

    def __matmul__(self, other: jax.Array) -> jax.Array:
        """``G A``, ``(m, k)``."""
        return contract(self.x, narrow(self.d, other, self.over), self.over)

    def __rmatmul__(self, other: jax.Array) -> jax.Array:
        """``A G``, ``(k, n)``."""
        return (self.T @ other.T).T

    def dense(self) -> jax.Array:
        """The matrix."""
        return contract(self.x, self.d, self.over)

    def scaled(self) -> Gradient:
        """Neither squares of its factors nor their products overflow or vanish."""
        axes = self.over.axes
        of_all = lambda x: jax.lax.pmax(x, axes) if axes else x
        shrunk = lambda x: x / of_all(largest(x))
        return Gradient(shrunk(self.x), shrunk(self.d), self.over)
