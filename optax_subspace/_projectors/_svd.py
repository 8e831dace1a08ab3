"""The exact projector: the leading singular vectors of the gradient (GaLore)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optax_subspace._projectors._base import Projector, check_count

METHODS = ("gram", "lapack")


def svd(every: int = 200, method: str = "gram") -> Projector:
    """The ``r`` leading left singular vectors of the gradient, every so many steps.

    An SVD leaves the sign of each vector open, and the moments that outlive a refresh are
    coordinates in these vectors, so the sign matters. It is fixed here: each new vector points
    along the old vector of the same index (their inner product is not negative); in a leaf's
    first basis the entry of largest magnitude of each vector is positive.

    Args:
      every: number of steps from one basis to the next (GaLore's ``update_proj_gap``).
      method: ``gram`` takes the eigenvectors of the smaller of ``G G^T`` and ``G^T G``, about
        five times faster than an SVD; directions whose singular value is below about 3e-4 of the
        largest are then no better than noise in float32. ``lapack`` is
        the literal ``jnp.linalg.svd``.

    Returns:
      A :class:`Projector` without state.

    Raises:
      TypeError: ``every`` is no int.
      ValueError: ``every`` below one, or an unknown method.

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, section 4.1, algorithm 2.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = svd(every=200)
      >>> gradient = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
      >>> basis, _ = rule.update(gradient, jnp.zeros((3, 2)), ())
      >>> basis.round(3).tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    check_count("every", every)
    if method not in METHODS:
        raise ValueError(f"svd: method must be one of {', '.join(METHODS)}, got {method!r}")
    leading = _leading_by_gram if method == "gram" else _leading_by_lapack

    def update(gradient, basis, state):
        return align_signs(leading(gradient, basis.shape[1]), basis), state

    return Projector(init=lambda key, m, n, rank: (), update=update, every=every)


def align_signs(basis: jax.Array, previous: jax.Array) -> jax.Array:
    """Turns each column of ``basis`` ``(m, r)`` along the same column of ``previous``.

    Where the two are orthogonal, as with a ``previous`` of zeros, the column's entry of largest
    magnitude is made positive.
    """
    along = jnp.sum(basis * previous, axis=0)
    largest = jnp.take_along_axis(basis, jnp.argmax(jnp.abs(basis), axis=0)[None], axis=0)[0]
    return basis * jnp.where(jnp.where(along != 0, along, largest) < 0, -1, 1)[None]


def _leading_by_lapack(gradient: jax.Array, rank: int) -> jax.Array:
    return jnp.linalg.svd(gradient, full_matrices=False)[0][:, :rank]


def _leading_by_gram(gradient: jax.Array, rank: int) -> jax.Array:
    m, n = gradient.shape
    with jax.default_matmul_precision("highest"):
        wide = gradient if m <= n else gradient.T
        _, vectors = jnp.linalg.eigh(wide @ wide.T, symmetrize_input=False)
        vectors = vectors[:, ::-1][:, :rank]  # which are in ascending order
        if m <= n:
            return vectors
        # G V = U diag(sigma). QR gives U up to signs, and stays orthonormal where sigma vanishes.
        return jnp.linalg.qr(gradient @ vectors)[0]
