"""Gradients scaled at full rank by what an optimizer does to them in a subspace: APOLLO, Fira."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_subspace._bases import Subspace
from optax_subspace._handover import LowRankUpdate
from optax_subspace._leaves import LeafPlan
from optax_subspace._projected import is_projected
from optax_subspace._projection import from_matrices, largest, lift, stored_as, to_matrices
from optax_subspace._projection_state import ProjectionState
from optax_subspace._projectors import Projector, random_projection, svd
from optax_subspace._projectors._base import transformation
from optax_subspace._rules import Rules
from optax_subspace._subspace import init_inner, inner_low_update

PER = ("channel", "tensor")


class GradientScalingState(NamedTuple):
    """State of :func:`scale_by_subspace_norms`.

    Attributes:
      projection: the bases.
      inner: the inner transformation's, whose arrays have subspace shape for projected leaves.
      norms: float32 ``(*batch,)`` by path of each projected leaf: the norm of what was last scaled,
        which the next may exceed by the factor ``growth``; zero before the first.
    """

    projection: ProjectionState
    inner: optax.OptState
    norms: dict[str, jax.Array]


def scale_by_subspace_norms(
    inner: optax.GradientTransformation,
    *,
    rank: int = 128,
    projector: Projector | None = None,
    per: str = "channel",
    residual: bool = False,
    growth: float | None = 1.01,
    side: str = "shorter",
    scale: optax.ScalarOrSchedule = 1.0,
    rules: Rules | None = None,
    projector_dtype: Any = None,
    stagger: bool = False,
    moments: str = "keep",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each gradient, at full rank, by what ``inner`` does to its norms in a subspace.

    With :math:`R = P^\top G` and :math:`N = \mathrm{inner}(R)`, of which column :math:`j` stands
    for a channel (for bases on the right, row :math:`i`),

    .. math::
      s_j = \frac{\lVert N_{:,j} \rVert}{\lVert R_{:,j} \rVert}, \qquad
      U = \alpha \, \mathrm{limit}(G \, \mathrm{diag}(s)) \quad\text{or}\quad
      U = \alpha P N + \mathrm{limit}\bigl((G - P R) \, \mathrm{diag}(s)\bigr)

    the second with ``residual``. The state of ``inner`` has the subspace's shape, but the update
    has full rank. The limiter keeps the norm of a matrix from growing by more than the factor
    ``growth`` from one step to the next.

    Leaves left alone go through ``inner`` at their full shape. A leaf whose gradient is not finite
    is skipped and counted, as in :func:`scale_by_subspace`. There is no ``accumulate``, since sums
    of micro-batches are needed at full rank (``optax.MultiSteps`` keeps them), and gradients can't
    be projected at the source.

    Args:
      inner: any optax transformation that keeps leaves apart.
      rank: dimension of the subspace, of which 1 will do for ``per="tensor"``.
      projector: ``random_projection(orthonormal=False)`` by default, with ``residual``
        ``svd(every=200)``.
      per: ``channel``, a factor for each row or column along the axis that is not projected, or
        ``tensor``, one factor for each matrix.
      residual: lift ``inner``'s update, and scale only what the subspace leaves of the gradient.
      growth: limit on the growth of the norm; None for none.
      side: ``shorter``, ``longer``, ``left`` or ``right``; see :func:`plan`.
      scale: factor :math:`\alpha`, a number or a schedule; with ``residual`` that of the lifted
        part alone, as in the published code.
      rules, projector_dtype, stagger, moments, seed: see :func:`scale_by_subspace`.

    Returns:
      A transformation with state :class:`GradientScalingState`.

    Raises:
      TypeError: what :func:`scale_by_subspace` raises.
      ValueError: the same, and ``per`` unknown, ``growth`` below one, ``side`` ``both`` or
        ``auto``; at ``update``, a gradient that was projected at the source.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = scale_by_subspace_norms(optax.scale_by_adam(), rank=1, per="tensor")
      >>> params = {"w": jnp.ones((16, 8))}
      >>> state = tx.init(params)
      >>> state.inner.mu["w"].shape
      (16, 1)
      >>> updates, state = tx.update({"w": jnp.ones((16, 8))}, state, params)
      >>> updates["w"].shape
      (16, 8)

    References:
      Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024, algorithm 1.
      Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, sections 4.2 and 4.3.
    """
    if per not in PER:
        raise ValueError(f"per must be one of {', '.join(PER)}, got {per!r}")
    # (Under `optax.inject_hyperparams` it is an array.)
    if isinstance(growth, int | float) and not growth >= 1:
        raise ValueError(f"growth must be at least 1, or None for no limit, got {growth}")
    if side in ("both", "auto"):
        raise ValueError(
            f"side={side!r} may leave no axis for channels: use 'shorter', 'longer', 'left' or "
            "'right'"
        )
    if projector is None:
        projector = svd() if residual else random_projection(orthonormal=False)
    inner = transformation("inner", inner)
    subspace = Subspace(
        rank, projector, side, scale, rules, projector_dtype, stagger, moments, 1, seed, inner
    )

    def init_fn(params):
        projection, plans = subspace.init(params)
        for plan in plans:
            if len(plan.sides) > 1:
                raise ValueError(
                    f"parameter {plan.path}: is projected on both sides, which leaves no axis for "
                    "channels: give its rule another side"
                )
        norms: Any = {p.path: jnp.zeros(p.batch_shape, jnp.float32) for p in plans if p.projected}
        if not plans:  # see `Subspace.init`
            norms = jnp.zeros([], jnp.float32)
        return GradientScalingState(projection, init_inner(inner, params, plans), norms)

    def update_fn(updates, state, params=None, *, step_size=None, **extra_args):
        structure: Any
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_projected)
        if any(map(is_projected, leaves)):
            raise ValueError(
                "scale_by_subspace_norms scales gradients at full rank, and here is one that was "
                "projected at the source: take it by jax.value_and_grad"
            )
        handed, projection = subspace.project(updates, state.projection)
        lows, used, inner_state = inner_low_update(
            inner, handed, structure, state.inner, params, extra_args
        )
        step_size = 1.0 if step_size is None else step_size
        found, norms = [], dict(state.norms) if handed else state.norms
        for gradient, leaf, low, ok in zip(leaves, handed, lows, used, strict=True):
            path, gradient = leaf.plan.path, jnp.asarray(gradient)
            if not leaf.plan.projected:
                found.append(stored_as(jnp.where(ok, low, 0) * step_size, leaf.dtype_out))
                continue
            # (The gradient itself is not finite where it is skipped.)
            matrices = jnp.where(ok, to_matrices(gradient.astype(low.dtype), leaf.plan), 0)
            update, norm = _scaled(
                matrices, jnp.where(ok, low, 0), leaf, per, residual, growth, norms[path]
            )
            norms[path] = jnp.where(ok, norm.astype(jnp.float32), norms[path])
            update = from_matrices(update * step_size, leaf.plan)
            found.append(stored_as(update, leaf.dtype_out))
        return structure.unflatten(found), GradientScalingState(projection, inner_state, norms)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scaled(
    matrices: jax.Array,
    low: jax.Array,
    leaf: LowRankUpdate,
    per: str,
    residual: bool,
    growth: float | None,
    last: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The update ``(*batch, m, n)`` of one leaf, and the norm ``(*batch,)`` of its scaled part."""
    axes = (-2, -1) if per == "tensor" else (_subspace_axis(leaf.plan),)
    before, after = _norm(leaf.low, axes), _norm(low, axes)
    factor = jnp.where(before > 0, after / jnp.where(before > 0, before, 1), 0)
    if residual:
        matrices = matrices - lift(leaf.low, leaf.bases, leaf.plan)
    scaled = matrices * factor
    size = _norm(scaled, (-2, -1))[..., 0, 0]
    if growth is not None:
        limited = jnp.where(last > 0, jnp.minimum(size, growth * last), size)
        scaled *= jnp.where(size > 0, limited / jnp.where(size > 0, size, 1), 1)[..., None, None]
        size = limited
    if residual:
        return lift(low * leaf.factor, leaf.bases, leaf.plan) + scaled, size
    return scaled * leaf.factor, size


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Norms over ``axes``, which stay as ones."""
    unit = largest(x, axes)
    return unit * jnp.sqrt(jnp.sum((x / unit) ** 2, axis=axes, keepdims=True))


def _subspace_axis(plan: LeafPlan) -> int:
    """The axis of the low-rank matrices that the basis made."""
    return -2 if plan.sides == ("left",) else -1
