"""Oja's rule with retraction."""

from __future__ import annotations

import math

from optax_subspace._projectors._base import (
    Projector,
    basis_of,
    check_number,
    check_projector,
    check_relative_to,
)
from optax_subspace._projectors._history_pca import positive_qr
from optax_subspace._projectors._svd import svd


def oja(
    step: float = 10.0, *, first: Projector | None = None, relative_to: str = "estimate"
) -> Projector:
    r"""Oja's rule with retraction.

    .. math::
      P' = \mathrm{qr}\bigl(P + \eta\, G G^\top P / \lVert G \rVert_F^2\bigr)

    Args:
      step: :math:`\eta`, free of the gradient's scale.
      first: rule whose ``update`` gives the first basis, :func:`svd` by default;
        :func:`subspace_iteration` compiles faster for TPUs, and gathers no gradient that is split
        over devices.
      relative_to: ``estimate`` takes the gradient's norm from a few random directions, which is
        possible at the source too (:func:`subspace_value_and_grad`), ``gradient`` exactly.

    Returns:
      A :class:`Projector` without state.

    Raises:
      TypeError: ``step`` is no number, or ``first`` no :class:`Projector`.
      ValueError: ``step`` is not positive and finite, or unknown ``relative_to``.

    References:
      Oja, Simplified neuron model as a principal component analyzer, 1982, equation 3.

    Example:
      >>> import jax.numpy as jnp
      >>> basis, _ = oja().follow(jnp.eye(3)[:, 1:2], jnp.eye(3)[:, :1], ())
      >>> [round(float(x), 2) for x in basis[:, 0]]
      [0.1, 1.0, 0.0]
    """
    check_number("oja: step", step)
    if not 0 < step < math.inf:
        raise ValueError(f"oja: step must be positive and finite, got {step}")

    def follow(product, basis, state):
        return positive_qr(basis + step * product)[0], state

    begin = svd() if first is None else first
    check_projector("oja: first", begin)
    return Projector(
        init=lambda key, m, n, rank: (),
        update=lambda gradient, basis, state: (basis_of(begin, gradient, basis), state),
        every=None,
        follow=follow,
        relative_to=check_relative_to("oja", relative_to),
        matrix_free=begin.matrix_free,
    )
