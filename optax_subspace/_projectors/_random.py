"""Random orthonormal bases, which ask nothing of the gradient."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from optax_subspace._projectors._base import Projector, check_count


def random_projection(every: int = 200, orthonormal: bool = True) -> Projector:
    """A basis drawn uniformly from all orthonormal ones, anew every so many steps.

    Args:
      every: number of steps from one basis to the next.
      orthonormal: otherwise its entries are independent, normal and of variance ``1 / r``, such
        that the projection keeps the norm of a vector in the mean (Johnson and Lindenstrauss), as
        :func:`apollo` takes it. Lifting is no way back then: ``P P^T`` is too large by ``m / r``.

    Returns:
      A :class:`Projector` whose state is a random key.

    Raises:
      TypeError: an argument that is a count is no int.
      ValueError: ``every`` below one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> rule = random_projection()
      >>> state = rule.init(jax.random.key(0), 6, 4, 2)
      >>> basis, state = rule.update(jnp.ones((6, 4)), jnp.zeros((6, 2)), state)
      >>> bool(jnp.allclose(basis.T @ basis, jnp.eye(2), atol=1e-6))
      True
    """
    check_count("every", every)

    def update(gradient, basis, state):
        carried, key = jax.random.split(jax.random.wrap_key_data(state))
        new = jax.random.normal(key, basis.shape, gradient.dtype)
        new = jnp.linalg.qr(new)[0] if orthonormal else new / math.sqrt(basis.shape[1])
        return new, jax.random.key_data(carried)

    return Projector(
        init=lambda key, m, n, rank: jax.random.key_data(key),
        update=update,
        every=every,
        matrix_free=True,
        orthonormal=orthonormal,
    )
