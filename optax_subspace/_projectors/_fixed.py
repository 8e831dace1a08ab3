"""A basis that is given and stays."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optax_subspace._projectors._base import Projector


def fixed(basis: jax.Array) -> Projector:
    """A given basis, for the whole run.

    Args:
      basis: ``(m, r)``, for the side that is projected; its columns need not be orthonormal. Leaves
        of another shape need a rule of their own (:class:`MatrixSpec`).

    Returns:
      A :class:`Projector` without state.

    Raises:
      ValueError: ``basis`` is no matrix; at ``update``, it does not fit the leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = fixed(jnp.eye(6)[:, :2])
      >>> rule.update(jnp.ones((6, 4)), jnp.zeros((6, 2)), ())[0].shape
      (6, 2)
    """
    basis = jnp.asarray(basis)
    if basis.ndim != 2:
        raise ValueError(f"fixed: basis must have shape (m, r), got {basis.shape}")
    return Projector(
        init=lambda key, m, n, rank: (),
        update=lambda gradient, previous, state: (basis.astype(gradient.dtype), state),
        every=None,
    )
