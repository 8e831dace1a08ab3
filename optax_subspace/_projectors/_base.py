"""The interface of a projector: a pure rule for one matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Projector(NamedTuple):
    """A rule that finds the basis of one matrix' gradient.

    A rule sees one matrix ``G`` of shape ``(m, n)`` in float32, turned such that the basis
    ``P`` of shape ``(m, r)`` stands on its left; batches, the other side, the schedule and
    gradients that are not finite are the caller's work. The rule's state holds arrays only.

    Attributes:
      init: ``(key, m, n, rank) -> state``.
      update: ``(gradient, basis, state) -> (basis, state)``. For the very first basis of a
        leaf, ``basis`` is all zeros.
      every: the rule is applied at a leaf's first step and then every so many steps, always
        before the gradient is projected.

    Example:
      A rule of one's own: the rows of the gradient with the largest norm.

      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_subspace import scale_by_subspace
      >>> def largest_rows(gradient, basis, state):
      ...     rows = jnp.argsort(-jnp.linalg.norm(gradient, axis=1))[: basis.shape[1]]
      ...     return jax.nn.one_hot(rows, gradient.shape[0]).T, state
      >>> rule = Projector(init=lambda key, m, n, rank: (), update=largest_rows, every=10)
      >>> tx = scale_by_subspace(optax.scale_by_adam(), rank=2, projector=rule)
      >>> params = {"w": jnp.ones((8, 16))}
      >>> tx.init(params).inner.mu["w"].shape
      (2, 16)
    """

    init: Callable[[jax.Array, int, int, int], Any]
    update: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
    every: int = 1
