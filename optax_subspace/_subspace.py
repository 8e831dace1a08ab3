"""``scale_by_subspace``: any optax transformation, run inside each weight's gradient subspace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_subspace._bases import Subspace
from optax_subspace._handover import LowRankUpdate
from optax_subspace._inner_state import (
    check_shapes,
    holds_weights,
    keep_skipped,
    refused_if_other,
    turn_moments,
)
from optax_subspace._leaves import LeafPlan, path_name
from optax_subspace._projected import is_projected
from optax_subspace._projection import (
    compute_dtype,
    from_matrices,
    lift,
    project,
    stored_as,
    to_matrices,
)
from optax_subspace._projection_state import ProjectionState
from optax_subspace._projectors import Projector
from optax_subspace._projectors._base import transformation
from optax_subspace._rules import Rules
from optax_subspace._varying import varying_as


class SubspaceState(NamedTuple):
    """State of :func:`scale_by_subspace`: the projection's, and that of the inner
    transformation, whose arrays have subspace shape for projected leaves."""

    projection: ProjectionState
    inner: optax.OptState


def init_inner(inner: optax.GradientTransformation, params: Any, plans: Sequence[LeafPlan]) -> Any:
    """The inner state, in subspace shape for projected leaves.

    Raises:
      TypeError: it keeps copies of projected weights, which have no coordinates before there is a
        basis, and others in each basis.
    """
    # (Only shapes are read: there is no basis yet.)
    zeros = lambda plan: jnp.zeros(plan.low_shape, compute_dtype(plan.dtype))
    leaves = zip(plans, jax.tree.leaves(params), strict=True)
    low = [varying_as(zeros(plan), x) for plan, x in leaves]
    state = inner.init(jax.tree.unflatten(jax.tree.structure(params), low))
    if any(plan.projected for plan in plans):
        for path, _ in jax.tree_util.tree_leaves_with_path(state):
            if holds_weights(path, state):
                raise TypeError(
                    f"the inner transformation keeps a copy of the weights in {path_name(path)}, "
                    "whose coordinates change with the basis: put it around the projected one, as "
                    "in optax.contrib.schedule_free(galore(...)), or mask it"
                )
    return state


def inner_update(
    inner: optax.GradientTransformationExtraArgs,
    handed: Sequence[LowRankUpdate],
    structure: Any,
    state: optax.OptState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
    step_size: jax.Array | None = None,
) -> tuple[list[jax.Array], optax.OptState]:
    """Runs ``inner`` on the low-rank leaves of a tree of ``structure`` and lifts what it returns.

    Returns:
      Updates in full shape and the gradients' dtypes, times ``step_size`` if given, zero where a
      leaf's gradient was not finite; and the inner state, unchanged for those leaves.
    """
    lows, _, new_state = inner_low_update(inner, handed, structure, state, params, extra_args)
    if step_size is not None:
        lows = [u * jnp.asarray(step_size, u.dtype) for u in lows]
    return [_full_update(u, x) for x, u in zip(handed, lows, strict=True)], new_state


def inner_low_update(
    inner: optax.GradientTransformationExtraArgs,
    handed: Sequence[LowRankUpdate],
    structure: Any,
    state: optax.OptState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[list[jax.Array], list[jax.Array], optax.OptState]:
    """Runs ``inner`` on the low-rank leaves of a tree of ``structure``.

    Returns:
      Updates in subspace shape, zero for leaves without a usable gradient and where they are not
      finite themselves; whether each is finite and used, () bool; and the inner state, unchanged
      for those leaves that aren't.
    """
    low_params = None
    if params is not None:
        weights = zip(handed, structure.flatten_up_to(params), strict=True)
        low_params = structure.unflatten([_low_weight(w, x) for x, w in weights])
    gradients = structure.unflatten([x.low for x in handed])
    plans = [x.plan for x in handed]
    state = turn_moments(state, structure, plans, [x.before for x in handed])

    with refused_if_other(inner, gradients, state):
        updates, new_state = inner.update(gradients, state, low_params, **extra_args)
        check_shapes(new_state, state)
    ready = handed[0].ready if handed else None
    lows = structure.flatten_up_to(updates)
    # Where an update overflows inside, that part of the state is kept. That the state thus depends
    # on the update also has XLA finish the update first and change the moments in place, where it
    # would copy all of them to leave the order open. (The update itself is told entry by entry:
    # for one answer to all XLA would pass over it once more.)
    used = [x.used & jnp.all(jnp.isfinite(u)) for x, u in zip(handed, lows, strict=True)]
    lows = [jnp.where(x.used & jnp.isfinite(u), u, 0) for x, u in zip(handed, lows, strict=True)]
    new_state = keep_skipped(new_state, state, structure, used, ready)
    new_state = turn_moments(new_state, structure, plans, [x.after for x in handed])
    return lows, used, new_state


def _low_weight(weight: jax.Array, leaf: LowRankUpdate) -> jax.Array:
    if leaf.plan.projected:
        return project(to_matrices(weight, leaf.plan), leaf.bases, leaf.plan)
    return jnp.asarray(weight, leaf.low.dtype)


def _full_update(update: jax.Array, leaf: LowRankUpdate) -> jax.Array:
    def to_full(update):
        if leaf.plan.projected:
            update = from_matrices(lift(update * leaf.factor, leaf.bases, leaf.plan), leaf.plan)
        return stored_as(update, leaf.dtype_out)

    if leaf.ready is None:
        return to_full(update)
    zeros = lambda low: varying_as(jnp.zeros(leaf.plan.shape, leaf.dtype_out), (low, leaf.bases))
    return jax.lax.cond(leaf.ready, to_full, zeros, update)


def scale_by_subspace(
    inner: optax.GradientTransformation,
    *,
    rank: int = 128,
    projector: Projector | None = None,
    side: str = "shorter",
    scale: optax.ScalarOrSchedule = 1.0,
    rules: Rules | None = None,
    projector_dtype: Any = None,
    stagger: bool = False,
    moments: str = "keep",
    accumulate: int = 1,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` on each weight's gradient projected into a low-rank subspace.

    For a matrix' gradient :math:`G_t` of shape ``(m, n)`` and its basis :math:`P_t` of shape
    ``(m, r)``:

    .. math::
      R_t = P_t^\top G_t, \qquad N_t = \mathrm{inner}(R_t), \qquad U_t = \alpha P_t N_t

    so that the state of ``inner`` has shape ``(r, n)``. Leaves left alone (see :func:`plan`) go
    through ``inner`` at their full shape. Where ``inner`` asks for parameters it is given
    :math:`P_t^\top W_t`; weight decay belongs in full space, after this transformation.

    A leaf whose gradient is not finite gets a zero update, keeps its basis and its part of the
    inner state, and is counted in the state. Where the update that ``inner`` makes of a finite
    gradient is not finite, it is zero, and the leaf's part of the inner state is kept. The
    arithmetic is float32 (float64 for float64 leaves), and updates have the dtype of the incoming
    gradients, in float16 up to its largest numbers.

    Args:
      inner: any optax transformation.
      rank: dimension ``r`` of the subspace; leaves with ``r >= min(m, n)`` are left alone.
      projector: rule that finds the basis, ``svd(every=200)`` by default.
      side: ``shorter``, ``longer``, ``left``, ``right``, ``both`` or ``auto``; see :func:`plan`.
      scale: factor :math:`\alpha` on the lifted update, a number or a schedule.
      rules: ``(regex, spec)`` pairs on the parameters' paths; see :func:`plan`.
      projector_dtype: how bases are stored: a dtype, that of the arithmetic by default, or a code
        of :func:`quantize_state` such as ``linear`` (8 bits) or ``linear4``. They are encoded when
        they change; a rule that follows every gradient changes them at every step, and
        :func:`online_pca`, whose steps are small, stands still in 4 bits.
      stagger: spread the refreshes of leaves, and of the slices of a stack, evenly over the
        projector's period, so that no step is much longer than another. All first bases come with
        the first gradient.
      moments: what becomes of the moments when a basis changes: ``keep`` leaves their numbers as
        they are (GaLore), ``project`` turns them into the new basis (:math:`P'^\top P M`; second
        moments with the squared weights, and for what is not of the old span with those of the
        vector replaced), ``reset`` sets them to zero, after which Adam's steps are up to
        :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}` times too long, since its count of steps goes on.
        Arrays of the inner state that do not have the subspace's shape are always kept.
      accumulate: number of micro-batches whose gradients make one step. Their low-rank gradients
        are averaged in a buffer of subspace shape; all updates but those of the last are zero.
        Bases change on the first micro-batch of a step (and follow the last), the projector's
        periods count whole steps. Members of a chain that come after see every micro-batch: put
        decay and schedules into ``optax.transforms.conditionally_mask``, as the aliases do.
      seed: seed of rules that draw random numbers.

    Returns:
      A transformation with state :class:`SubspaceState`, whose structure, shapes and dtypes never
      change. Its ``update`` takes ``source``, see :func:`subspace_value_and_grad`, and
      ``step_size``, a scalar that multiplies the updates before they are lifted, which takes no
      pass over arrays of full size; both are kept from ``inner``.

    Raises:
      TypeError: ``rank`` is no int, ``projector`` no :class:`Projector`; at ``init``, a complex or
        integer leaf.
      ValueError: unknown ``side`` or ``moments``, ``rank`` or ``accumulate`` below one; at
        ``init``, a rule that does not fit; at ``update``, a state that was made with other
        settings, as far as shapes tell.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = scale_by_subspace(optax.scale_by_adam(), rank=2)
      >>> params = {"w": jnp.ones((16, 8))}
      >>> state = tx.init(params)
      >>> state.inner.mu["w"].shape
      (16, 2)
      >>> updates, state = tx.update({"w": jnp.ones((16, 8))}, state, params)
      >>> updates["w"].shape
      (16, 8)

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, algorithm 2.
      Liang et al., `Online Subspace Descent <https://arxiv.org/abs/2408.12857>`_, 2024.
    """
    inner = transformation("inner", inner)
    subspace = Subspace(
        rank,
        projector,
        side,
        scale,
        rules,
        projector_dtype,
        stagger,
        moments,
        accumulate,
        seed,
        inner,
    )

    def init_fn(params):
        projection, plans = subspace.init(params)
        return SubspaceState(projection, init_inner(inner, params, plans))

    def update_fn(updates, state, params=None, *, source=None, step_size=None, **extra_args):
        handed, projection = subspace.project(updates, state.projection, source)
        structure: Any = jax.tree.structure(updates, is_leaf=is_projected)
        full, inner_state = inner_update(
            inner, handed, structure, state.inner, params, extra_args, step_size
        )
        return structure.unflatten(full), SubspaceState(projection, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
