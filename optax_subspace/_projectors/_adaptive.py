"""A refresh period that grows while the subspace stands still."""

from __future__ import annotations

from optax_subspace._projectors._base import (
    Projector,
    check_count,
    check_number,
    check_projector,
)


def adaptive_period(projector: Projector, *, cosine: float = 0.9, longest: int = 8) -> Projector:
    r"""Refreshes a matrix less often once its subspace has stopped moving.

    When a refresh finds that the new basis :math:`P'` still spans what the old one did,

    .. math::
      \sqrt{\lVert P'^\top P \rVert_F^2 / r} \ge \cos_{\min},

    the time to that matrix' next refresh doubles; otherwise it goes back to ``projector.every``.
    The left side is the root mean square cosine of the principal angles between the two, which
    does not depend on the order or the signs of their columns.

    Args:
      projector: a rule with a period, such as ``svd(every=200)``.
      cosine: the threshold, in ``(0, 1]``.
      longest: the longest period, in units of ``projector.every``.

    Returns:
      The same rule with an adaptive period; each slice of a stack has its own.

    Raises:
      TypeError: ``projector`` is no :class:`Projector`, ``cosine`` no number, ``longest`` no int.
      ValueError: ``projector`` has no period, ``cosine`` or ``longest`` is out of range.

    References:
      Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, section 3.2, where the
      cosine is that of single vectors.

    Example:
      >>> from optax_subspace import svd
      >>> adaptive_period(svd(every=200), longest=4).longest
      4
    """
    check_projector("adaptive_period: projector", projector)
    if projector.every is None:
        raise ValueError("adaptive_period: the projector has no period that could be adapted")
    check_number("adaptive_period: cosine", cosine)
    if not 0 < cosine <= 1:
        raise ValueError(f"adaptive_period: cosine must lie in (0, 1], got {cosine}")
    check_count("longest", longest)
    adapted = projector._replace(cosine=cosine, longest=longest)
    check_projector("adaptive_period: projector", adapted)
    return adapted
