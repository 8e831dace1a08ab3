"""The exact projector: the leading singular vectors of the gradient (GaLore)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optax_subspace._projectors._base import Projector, check_count

METHODS = ("gram", "lapack")
_LEAST_BLOCK = 128  # rows; below it a product of blocks is not worth its calls


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
        _, vectors = jnp.linalg.eigh(gram(wide), symmetrize_input=False)  # ascending
        vectors = vectors[:, ::-1][:, :rank]
        if m <= n:
            return vectors
        # G V = U diag(sigma). QR gives U up to signs, and stays orthonormal where sigma vanishes.
        return jnp.linalg.qr(gradient @ vectors)[0]


def gram(x: jax.Array) -> jax.Array:
    """``X X^T`` for ``X`` of shape ``(m, n)``: of large ones by blocks of rows, each times those up
    to it, and the other half by symmetry, which is 5/8 of the operations."""
    m = x.shape[0]
    if m < 4 * _LEAST_BLOCK:
        return x @ x.T
    ends = [m * i // 4 for i in range(5)]
    rows = [
        jnp.pad(x[start:end] @ x[:end].T, ((0, 0), (0, m - end)))
        for start, end in zip(ends, ends[1:], strict=False)
    ]
    lower = jnp.tril(jnp.concatenate(rows))
    return lower + jnp.tril(lower, -1).T
