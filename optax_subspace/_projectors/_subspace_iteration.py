"""Randomized subspace iteration, warm-started from the basis before."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optax_subspace._projectors._base import Projector, check_count
from optax_subspace._projectors._svd import align_signs

# Without a basis to start from, one power step is not enough on a slowly falling spectrum.
_EXTRA_POWER_AT_FIRST = 2
_STIR = 1e-3  # length of the random part of a warm start, the basis having 1


def subspace_iteration(every: int = 200, power: int = 1, oversample: int = 0) -> Projector:
    r"""Multiplies the last basis by :math:`G G^\top` and orthonormalises, every so many steps.

    .. math::
      P' = \mathrm{qr}\bigl((G G^\top)^{q} [P, \Omega]\bigr)

    with :math:`q` = ``power`` and ``oversample`` random columns :math:`\Omega`, after which the
    leading ``r`` directions are kept. The first basis starts from random columns alone and takes
    two power steps more. A refresh costs ``4 q m n r`` operations and one QR of ``(m, r)``, which
    is an order of magnitude below an SVD.

    Args:
      every: number of steps from one basis to the next.
      power: multiplications by ``G G^T`` at a refresh.
      oversample: random directions that are tried besides the last basis.

    Returns:
      A :class:`Projector` whose state is a random key.

    Raises:
      TypeError: an argument that is a count is no int.
      ValueError: ``every`` or ``power`` below one, or a negative ``oversample``.

    References:
      Halko, Martinsson and Tropp, `Finding structure with randomness
      <https://arxiv.org/abs/0909.4061>`_, 2011, algorithm 4.4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> rule = subspace_iteration(every=200)
      >>> state = rule.init(jax.random.key(0), 3, 3, 1)
      >>> gradient = jnp.diag(jnp.array([9.0, 1.0, 1.0]))
      >>> basis, _ = rule.update(gradient, jnp.zeros((3, 1)), state)
      >>> jnp.abs(basis).round(3).tolist()
      [[1.0], [0.0], [0.0]]
    """
    check_count("every", every)
    check_count("power", power)
    check_count("oversample", oversample, least=0)

    def update(gradient, basis, state):
        m, rank = basis.shape
        carried, key = jax.random.split(jax.random.wrap_key_data(state))
        columns = min(m, gradient.shape[1], rank + oversample)
        first = jnp.all(basis == 0)
        draw = lambda width: jax.random.normal(key, (m, width), gradient.dtype)
        # A little of all directions: a gradient orthogonal to the basis would never be found.
        begin = lambda: _pad(basis, columns) + _STIR / jnp.sqrt(m) * draw(columns)
        start = jax.lax.cond(first, lambda: draw(columns), begin)

        def iterate(_, q):
            return jnp.linalg.qr(gradient @ (gradient.T @ q))[0]

        steps = jnp.where(first, power + _EXTRA_POWER_AT_FIRST, power)
        new = jax.lax.fori_loop(0, steps, iterate, start)
        if columns > rank:
            # The leading directions within the span (Rayleigh and Ritz).
            inside = new.T @ gradient
            new = new @ jnp.linalg.eigh(inside @ inside.T)[1][:, ::-1][:, :rank]
        return align_signs(new, basis), jax.random.key_data(carried)

    return Projector(
        lambda key, m, n, rank: jax.random.key_data(key), update, every, matrix_free=True
    )


def _pad(basis: jax.Array, columns: int) -> jax.Array:
    return jnp.pad(basis, [(0, 0), (0, columns - basis.shape[1])])
