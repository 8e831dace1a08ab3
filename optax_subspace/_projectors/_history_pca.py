"""History PCA: a basis that remembers past gradients in ``r`` numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optax_subspace._projectors._base import (
    Projector,
    basis_of,
    check_number,
    check_projector,
    check_relative_to,
    directions,
    squared_norm,
)
from optax_subspace._projectors._svd import svd


def history_pca(
    decay: float = 0.8, *, first: Projector | None = None, relative_to: str = "estimate"
) -> Projector:
    r"""Decayed power iteration: a memory of past gradients in ``r`` numbers, and one QR a step.

    .. math::
      Q R = \mathrm{qr}\bigl(\gamma P \,\mathrm{diag}(d) + (1 - \gamma) G G^\top P
          / \lVert G \rVert_F^2\bigr), \qquad P' = Q, \quad d' = |\mathrm{diag} R|

    with the signs of ``Q`` such that the diagonal of ``R`` is positive. It has no learning rate,
    stays orthonormal, and is online PCA in the sense of the convergence theorem.

    Args:
      decay: :math:`\gamma`, the weight of the past; 0.5 follows a jump of the subspace in half the
        steps and averages over fewer gradients.
      first: rule whose ``update`` gives the first basis, :func:`svd` by default;
        :func:`subspace_iteration` compiles faster for TPUs, and gathers no gradient that is split
        over devices.
      relative_to: ``estimate`` takes the gradient's norm from a few random directions, which is
        possible at the source too (:func:`subspace_value_and_grad`), ``gradient`` exactly.

    Returns:
      A :class:`Projector` whose state is ``d`` of shape ``(r,)``.

    Raises:
      TypeError: ``decay`` is no number, or ``first`` no :class:`Projector`.
      ValueError: ``decay`` outside of ``[0, 1)``, or unknown ``relative_to``.

    References:
      Yang, Hsieh and Wang, `History PCA <https://arxiv.org/abs/1802.05447>`_, 2018, algorithm 2.

    Example:
      >>> import jax.numpy as jnp
      >>> history_pca().follow(jnp.eye(3)[:, :1], jnp.eye(3)[:, :1], jnp.ones(1))[1].tolist()
      [1.0]
    """
    check_number("history_pca: decay", decay)
    if not 0 <= decay < 1:
        raise ValueError(f"history_pca: decay must lie in [0, 1), got {decay}")

    begin = svd() if first is None else first
    check_projector("history_pca: first", begin)

    def update(gradient, basis, state):
        basis = basis_of(begin, gradient, basis)
        low = (gradient.T @ basis).T
        if relative_to == "gradient":
            squared = jnp.sum(gradient**2)
        else:
            seen_by = directions(gradient.shape[1], gradient.dtype)
            squared = squared_norm(low, gradient @ seen_by, basis, seen_by)
        return basis, jnp.sum(low**2, axis=1) / squared

    def follow(product, basis, state):
        return positive_qr(decay * basis * state[None] + (1 - decay) * product)

    return Projector(
        init=lambda key, m, n, rank: jnp.zeros(rank, jnp.float32),
        update=update,
        every=None,
        follow=follow,
        relative_to=check_relative_to("history_pca", relative_to),
        matrix_free=begin.matrix_free and relative_to == "estimate",
    )


def positive_qr(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The orthonormal factor ``(m, r)`` with signs that make R's diagonal positive, and that."""
    q, r = jnp.linalg.qr(matrix)
    diagonal = jnp.diagonal(r)
    return q * jnp.where(diagonal < 0, -1, 1)[None], jnp.abs(diagonal)
