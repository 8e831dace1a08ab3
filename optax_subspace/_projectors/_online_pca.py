"""Online PCA: one optimizer step a training step on the gradient's reconstruction error."""

from __future__ import annotations

import math

import jax.numpy as jnp
import optax

from optax_subspace._projectors._base import (
    Projector,
    basis_of,
    check_count,
    check_number,
    check_projector,
    check_relative_to,
    transformation,
)
from optax_subspace._projectors._svd import svd


def online_pca(
    optimizer: optax.GradientTransformation | None = None,
    *,
    orthogonality: float | None = None,
    relative: bool = True,
    first: Projector | None = None,
    relative_to: str = "estimate",
) -> Projector:
    r"""One step of an optimizer per training step on the reconstruction error of the gradient.

    .. math::
      L_t(P) = \frac{\lVert G_t - P P^\top G_t \rVert_F^2}{\lVert G_t \rVert_F^2}
          + \lambda \lVert P^\top P - I \rVert_F^2

    The first basis is that of :func:`svd`; each later gradient moves it for the next step. With
    :math:`B = G G^\top P / \lVert G \rVert_F^2` the loss' gradient is
    :math:`2 [P (P^\top B) + B (P^\top P) - 2 B] + 4 \lambda P (P^\top P - I)`, in which no
    ``m x m`` matrix is formed.

    Args:
      optimizer: any optax optimizer on ``P``, ``optax.adam(0.06, eps=1e-7)`` by default; its state
        has the shape of ``P``. Its learning rate may be a constant, a schedule of the basis'
        steps, or tied to that of the weights by :func:`tied_rate`.
      orthogonality: weight :math:`\lambda`; zero in the published code, 0.1 in the paper. By
        default ``max(0.1, 6.4 / r)``: a column's share of the gradient's energy grows as ``1 / r``,
        and with it what pulls at the column's length.
      relative: divide the optimizer's steps by ``sqrt(m)``, the size of a basis' entries being
        ``1 / sqrt(m)``, so that one learning rate serves every ``m`` under sign-like optimizers
        such as Adam and Lion.
      first: rule whose ``update`` gives the first basis, :func:`svd` by default;
        :func:`subspace_iteration` compiles faster for TPUs, and gathers no gradient that is split
        over devices.
      relative_to: ``estimate`` takes the gradient's norm from a few random directions, which is
        possible at the source too (:func:`subspace_value_and_grad`), ``gradient`` exactly.

    Returns:
      A :class:`Projector` whose state is that of ``optimizer``.

    Raises:
      TypeError: ``orthogonality`` is no number, ``optimizer`` no transformation, or ``first`` no
        :class:`Projector`.
      ValueError: negative or infinite ``orthogonality``, or unknown ``relative_to``.

    References:
      Liang et al., `Online Subspace Descent <https://arxiv.org/abs/2408.12857>`_, 2024.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> published = online_pca(
      ...     optax.adamw(1 / 200, weight_decay=0.01),
      ...     orthogonality=0.0,
      ...     relative=False,
      ...     relative_to="gradient",
      ... )
      >>> state = published.init(jax.random.key(0), 6, 4, 2)
      >>> jax.tree.map(jnp.shape, state[0].mu)
      (6, 2)
    """
    if orthogonality is not None:
        check_number("online_pca: orthogonality", orthogonality)
        if not 0 <= orthogonality < math.inf:
            raise ValueError(
                f"online_pca: orthogonality must be finite and not negative, got {orthogonality}"
            )
    optimizer = optax.adam(0.06, eps=1e-7) if optimizer is None else optimizer
    transformation("online_pca: optimizer", optimizer)

    begin = svd() if first is None else first
    check_projector("online_pca: first", begin)

    def follow(product, basis, state):
        gram = basis.T @ basis
        excess = gram - jnp.eye(gram.shape[0], dtype=gram.dtype)
        weight = max(0.1, 6.4 / basis.shape[1]) if orthogonality is None else orthogonality
        inside = 2 * basis.T @ product + 4 * weight * excess
        slope = basis @ inside + 2 * product @ (gram - 2 * jnp.eye(gram.shape[0]))
        step, state = optimizer.update(slope, state, basis)
        step = step / jnp.sqrt(basis.shape[0]).astype(basis.dtype) if relative else step
        return basis + step, state

    return Projector(
        init=lambda key, m, n, rank: optimizer.init(jnp.zeros((m, rank), jnp.float32)),
        update=lambda gradient, basis, state: (basis_of(begin, gradient, basis), state),
        every=None,
        follow=follow,
        relative_to=check_relative_to("online_pca", relative_to),
        matrix_free=begin.matrix_free,
    )


def tied_rate(
    learning_rate: optax.ScalarOrSchedule, peak: float, every: int = 200
) -> optax.ScalarOrSchedule:
    r"""A learning rate for the basis that follows the weights' one.

    .. math::
      \eta_P(t) = \frac{1}{T} \, \frac{\eta(t)}{\eta_{\max}}

    Args:
      learning_rate: :math:`\eta`, the weights' own, a number or a schedule.
      peak: :math:`\eta_{\max}`, its highest value.
      every: :math:`T`, called the gap in the published code.

    Returns:
      A number or a schedule for the optimizer of :func:`online_pca`. The basis takes its first step
      with the second step of the weights. It counts the gradients that a leaf, or a slice of it,
      has used: where some were zero or not finite, it is behind the weights' schedule by as many.

    Raises:
      TypeError: ``peak`` is no number, or ``every`` no int.
      ValueError: ``peak`` is not positive, or ``every`` below one.

    References:
      Liang et al., `Online Subspace Descent <https://arxiv.org/abs/2408.12857>`_, 2024, and its
      public code.

    Example:
      >>> import optax
      >>> schedule = optax.linear_schedule(0.0, 0.01, 10)
      >>> rule = online_pca(optax.adam(tied_rate(schedule, peak=0.01)))
      >>> round(float(tied_rate(schedule, peak=0.01)(4)), 6)  # 1 / 200 * 5 / 10
      0.0025
    """
    check_number("tied_rate: peak", peak)
    if not peak > 0:
        raise ValueError(f"tied_rate: peak must be positive, got {peak}")
    check_count("tied_rate: every", every)
    if callable(learning_rate):
        return lambda step: learning_rate(step + 1) / (peak * every)
    return learning_rate / (peak * every)
