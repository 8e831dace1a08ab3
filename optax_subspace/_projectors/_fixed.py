"""A basis that is given and stays."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optax_subspace._projectors._base import Projector


def fixed(*bases: jax.Array) -> Projector:
    """Given bases, for the whole run.

    Args:
      *bases: each ``(m, r)``, for sides with ``m`` entries; columns need not be orthonormal. One
        serves leaves of one shape, all slices of a stack alike, two a matrix that is projected on
        both sides (a square one has the same on both); leaves of other shapes need a rule of their
        own (:class:`MatrixSpec`).

    Returns:
      A :class:`Projector` without state.

    Raises:
      ValueError: a basis is no matrix, or two have the same length; at ``init``, none has the shape
        that a leaf's side and rank ask for.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> rule = fixed(jnp.eye(6)[:, :2], jnp.eye(4)[:, 2:])
      >>> state = rule.init(jax.random.key(0), 4, 6, 2)
      >>> rule.update(jnp.ones((4, 6)), jnp.zeros((4, 2)), state)[0].tolist()
      [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """
    shapes = [jnp.shape(b) for b in bases]
    if not bases or any(len(s) != 2 for s in shapes) or len({s[0] for s in shapes}) < len(shapes):
        raise ValueError(
            f"fixed: give bases of shape (m, r), no two with the same m, got {shapes or 'none'}"
        )
    by_length = {s[0]: jnp.asarray(b) for s, b in zip(shapes, bases, strict=True)}

    def init(key, m, n, rank):
        if (m, rank) not in shapes:
            raise ValueError(
                f"fixed: a leaf asks for a basis of shape {(m, rank)}, given are {shapes}: give "
                "one that fits, or the leaf a rule with a projector of its own"
            )
        return ()

    def update(gradient, previous, state):
        return by_length[gradient.shape[0]].astype(gradient.dtype), state

    return Projector(init=init, update=update, every=None, matrix_free=True)
