"""``scale_by_subspace``: any optax transformation, run inside each weight's gradient subspace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_subspace import _leaves, _recording
from optax_subspace._handover import LowRankUpdate
from optax_subspace._leaves import LeafPlan, Rules
from optax_subspace._projection import compute_dtype, from_matrices, lift, project, to_matrices
from optax_subspace._projectors import Projector, svd


class LeafBasis(NamedTuple):
    """The subspace of one projected leaf.

    Attributes:
      bases: one basis per side: ``(*batch, m, r)`` left, ``(*batch, n, r)`` right.
      rule: the projector's own state per side, with the batch axes in front.
      age: int32 ``(*batch,)``, gradients used since the first basis; zero before it.
    """

    bases: tuple[jax.Array, ...]
    rule: tuple[Any, ...]
    age: jax.Array


class ProjectionState(NamedTuple):
    """State of the projection of a whole tree.

    Attributes:
      count: int32 scalar, the steps taken.
      leaves: the basis of each projected leaf by its path.
      skipped: int32 scalar by path: how often a leaf's gradient was not finite.
    """

    count: jax.Array
    leaves: dict[str, LeafBasis] | jax.Array
    skipped: dict[str, jax.Array] | jax.Array


class SubspaceState(NamedTuple):
    """State of :func:`scale_by_subspace`: the projection's, and that of the inner
    transformation, whose arrays have subspace shape for projected leaves."""

    projection: ProjectionState
    inner: optax.OptState


class Subspace:
    """The settings of one projection and the pure functions that they define."""

    def __init__(
        self,
        rank: int = 128,
        projector: Projector | None = None,
        side: str = "shorter",
        scale: optax.ScalarOrSchedule = 1.0,
        rules: Rules | None = None,
        projector_dtype: Any = None,
        seed: int = 0,
    ):
        _leaves.check_rank(rank)
        _leaves.check_side(side)
        projector = svd() if projector is None else projector
        if not isinstance(projector, Projector):
            raise TypeError(f"projector must be a Projector such as svd(every=200), got {projector!r}")
        self.rank, self.side, self.scale, self.rules = rank, side, scale, rules
        self.projector, self.seed = projector, seed
        self.projector_dtype = None if projector_dtype is None else jnp.dtype(projector_dtype)

    def plan(self, tree: Any) -> list[LeafPlan]:
        return _leaves.plan(tree, self.rules, rank=self.rank, side=self.side)

    def init(self, params: optax.Params) -> tuple[ProjectionState, list[LeafPlan]]:
        """Bases of zeros: the first gradient gives the first basis. Only shapes are read."""
        plans = self.plan(params)
        _leaves.warn_about_rules(plans, self.rules)
        _recording.record(plans)
        count = jnp.zeros([], jnp.int32)
        if not plans:
            # optax.tree_map_params initialises on a tree without leaves and wants each field to
            # be a prefix of the real state's.
            return ProjectionState(count, count, count), plans
        _check_unique(plans)
        leaves = {p.path: self._init_leaf(i, p) for i, p in enumerate(plans) if p.projected}
        skipped = {p.path: jnp.zeros([], jnp.int32) for p in plans}
        return ProjectionState(count, leaves, skipped), plans

    def _init_leaf(self, index: int, plan: LeafPlan) -> LeafBasis:
        rule = plan.projector or self.projector
        key = jax.random.fold_in(jax.random.key(self.seed), index)
        slices = int(np.prod(plan.batch_shape, dtype=int))
        states = []
        for number, shape in enumerate(plan.basis_shapes):
            m, n = plan.matrix_shape if plan.sides[number] == "left" else plan.matrix_shape[::-1]
            keys = jax.random.split(jax.random.fold_in(key, number), slices)
            state = jax.vmap(lambda k, m=m, n=n: rule.init(k, m, n, plan.rank))(keys)
            states.append(jax.tree.map(lambda x: x.reshape(plan.batch_shape + x.shape[1:]), state))
        dtype = self.projector_dtype or compute_dtype(plan.dtype)
        return LeafBasis(
            bases=tuple(jnp.zeros(shape, dtype) for shape in plan.basis_shapes),
            rule=tuple(states),
            age=jnp.zeros(plan.batch_shape, jnp.int32),
        )

    def project(
        self, updates: optax.Updates, state: ProjectionState
    ) -> tuple[list[LowRankUpdate], ProjectionState]:
        """Refreshes the bases that are due and projects every leaf, in the order of the leaves."""
        plans = self.plan(updates)
        count = optax.safe_increment(state.count)
        if not plans:
            return [], state._replace(count=count)
        _check_state(plans, state)
        leaves, skipped, handed = {}, {}, []
        for plan, leaf in zip(plans, jax.tree.leaves(updates), strict=True):
            low, bases = leaf.astype(compute_dtype(leaf.dtype)), ()
            if plan.projected:
                low, leaves[plan.path] = self._project_leaf(low, plan, state.leaves[plan.path])
                bases = leaves[plan.path].bases
            finite = jnp.all(jnp.isfinite(low))
            skipped[plan.path] = state.skipped[plan.path] + (1 - finite.astype(jnp.int32))
            factor = self._factor(plan, state.count)
            low = jnp.where(finite, low, 0)
            handed.append(LowRankUpdate(low, finite, bases, plan, factor, leaf.dtype, self.rank))
        return handed, ProjectionState(count, leaves, skipped)

    def _project_leaf(self, leaf: jax.Array, plan: LeafPlan, old: LeafBasis):
        rule = plan.projector or self.projector
        matrices = to_matrices(leaf, plan)
        due = old.age % rule.every == 0
        # The whole leaf is skipped if any of it is not finite. On other steps the low-rank gradient
        # tells, and the full one need not be read again.
        due &= jax.lax.cond(
            jnp.any(due), lambda: jnp.all(jnp.isfinite(matrices)), lambda: jnp.array(False)
        )
        bases, states = [], []
        for side, basis, state in zip(plan.sides, old.bases, old.rule, strict=True):
            facing = matrices if side == "left" else jnp.swapaxes(matrices, -1, -2)
            basis, state = _refresh(rule, due, facing, basis, state)
            bases.append(basis)
            states.append(state)
        low = project(matrices, tuple(bases), plan)
        # A slice without any gradient yet has no basis yet.
        started = (old.age > 0) | jnp.any(low != 0, axis=(-2, -1))
        ages = old.age + (started & jnp.all(jnp.isfinite(low))).astype(jnp.int32)
        return low, LeafBasis(tuple(bases), tuple(states), ages)

    def _factor(self, plan: LeafPlan, count: jax.Array) -> Any:
        if plan.scale is not None:
            return plan.scale
        return self.scale(count) if callable(self.scale) else self.scale


def _refresh(rule: Projector, due: jax.Array, matrices: jax.Array, basis: jax.Array, state: Any):
    """Applies ``rule`` to those slices of ``(*batch, m, n)`` that are due.

    A loop over the due slices only: on most steps it has no turn, and its carried buffers are
    updated in place, where a branch would keep the old and the new stack of bases.
    """
    batch = due.shape
    flat = lambda x: x.reshape(-1, *x.shape[len(batch) :])
    matrices, due = flat(matrices), due.reshape(-1)
    order = jnp.argsort(~due, stable=True)

    def refresh_slice(i, carry):
        slice_ = order[i]
        take = lambda x: jax.lax.dynamic_index_in_dim(x, slice_, keepdims=False)
        put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), slice_, 0)
        gradient, old = take(matrices), jax.tree.map(take, carry)
        new = jax.lax.cond(
            jnp.any(gradient != 0), lambda: _apply(rule, gradient, *old), lambda: old
        )
        return jax.tree.map(put, carry, new)

    carry = jax.tree.map(flat, (basis, state))
    basis, state = jax.lax.fori_loop(0, jnp.sum(due, dtype=jnp.int32), refresh_slice, carry)
    return jax.tree.map(lambda x: x.reshape(batch + x.shape[1:]), (basis, state))


def _apply(rule: Projector, gradient: jax.Array, basis: jax.Array, state: Any):
    new_basis, new_state = rule.update(gradient, basis.astype(gradient.dtype), state)
    if new_basis.shape != basis.shape:
        raise ValueError(
            f"the projector's update returned a basis of shape {new_basis.shape}, expected {basis.shape}"
        )
    return new_basis.astype(basis.dtype), jax.tree.map(
        lambda new, old: new.astype(old.dtype), new_state, state
    )


def low_rank_tree(tree: Any, plans: Sequence[LeafPlan]) -> Any:
    """The tree that the inner transformation is initialised on: only shapes are read."""
    leaves, treedef = jax.tree.flatten(tree)
    low = [jnp.zeros(p.low_shape, compute_dtype(p.dtype)) for p, _ in zip(plans, leaves, strict=True)]
    return jax.tree.unflatten(treedef, low)


def inner_update(
    inner: optax.GradientTransformationExtraArgs,
    handed: Sequence[LowRankUpdate],
    structure: Any,
    state: optax.OptState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[list[jax.Array], optax.OptState]:
    """Runs ``inner`` on the low-rank leaves of a tree of ``structure`` and lifts what it returns.

    Returns:
      Updates in full shape and the gradients' dtypes, zero where a leaf's gradient was not finite;
      and the inner state, unchanged for those leaves.
    """
    low_params = None
    if params is not None:
        weights = zip(handed, structure.flatten_up_to(params), strict=True)
        low_params = structure.unflatten([_low_weight(w, x) for x, w in weights])
    lows = structure.unflatten([x.low for x in handed])
    updates, new_state = inner.update(lows, state, low_params, **extra_args)
    new_state = _keep_skipped(new_state, state, structure, [x.finite for x in handed])
    full = zip(handed, structure.flatten_up_to(updates), strict=True)
    return [_full_update(u, x) for x, u in full], new_state


def _low_weight(weight: jax.Array, leaf: LowRankUpdate) -> jax.Array:
    if leaf.plan.projected:
        return project(to_matrices(weight, leaf.plan), leaf.bases, leaf.plan)
    return weight.astype(leaf.low.dtype)


def _full_update(update: jax.Array, leaf: LowRankUpdate) -> jax.Array:
    update = jnp.where(leaf.finite, update, 0)
    if leaf.plan.projected:
        update = from_matrices(lift(update * leaf.factor, leaf.bases, leaf.plan), leaf.plan)
    return update.astype(leaf.dtype_out)


def _keep_skipped(new, old, structure, finites):
    """Takes the old state of the leaves whose gradient was not finite, and keeps every dtype.

    The parts of the state that belong to a leaf are those under a subtree shaped like the
    parameters; counters and the like advance as usual.
    """

    def like_params(node):
        try:
            structure.flatten_up_to(node)
        except (ValueError, TypeError):
            return False
        return True

    def keep(new_part, old_part):
        if not like_params(new_part):
            return new_part.astype(old_part.dtype)
        parts = zip(
            finites, structure.flatten_up_to(new_part), structure.flatten_up_to(old_part), strict=True
        )
        return structure.unflatten(
            [
                jax.tree.map(lambda n, o, ok=ok: jnp.where(ok, n, o).astype(o.dtype), a, b)
                for ok, a, b in parts
            ]
        )

    return jax.tree.map(keep, new, old, is_leaf=like_params)


def scale_by_subspace(
    inner: optax.GradientTransformation,
    *,
    rank: int = 128,
    projector: Projector | None = None,
    side: str = "shorter",
    scale: optax.ScalarOrSchedule = 1.0,
    rules: Rules | None = None,
    projector_dtype: Any = None,
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
    inner state, and is counted in the state. The arithmetic is float32 (float64 for float64
    leaves), and updates have the dtype of the incoming gradients.

    Args:
      inner: any optax transformation.
      rank: dimension ``r`` of the subspace; leaves with ``r >= min(m, n)`` are left alone.
      projector: rule that finds the basis, ``svd(every=200)`` by default.
      side: ``shorter``, ``longer``, ``left``, ``right`` or ``both``; see :func:`plan`.
      scale: factor :math:`\alpha` on the lifted update, a number or a schedule.
      rules: ``(regex, spec)`` pairs on the parameters' paths; see :func:`plan`.
      projector_dtype: dtype in which bases are stored; that of the arithmetic by default.
      seed: seed of rules that draw random numbers.

    Returns:
      A transformation with state :class:`SubspaceState`, whose structure, shapes and dtypes never
      change.

    Raises:
      TypeError: ``rank`` is no int, ``projector`` no :class:`Projector`; at ``init``, a complex or
        integer leaf.
      ValueError: unknown ``side``, ``rank`` below one; at ``init``, a rule that does not fit; at
        ``update``, a state that was made with other settings.

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
    inner = optax.with_extra_args_support(inner)
    subspace = Subspace(rank, projector, side, scale, rules, projector_dtype, seed)

    def init_fn(params):
        projection, plans = subspace.init(params)
        return SubspaceState(projection, inner.init(low_rank_tree(params, plans)))

    def update_fn(updates, state, params=None, **extra_args):
        handed, projection = subspace.project(updates, state.projection)
        structure = jax.tree.structure(updates)
        full, inner_state = inner_update(inner, handed, structure, state.inner, params, extra_args)
        return structure.unflatten(full), SubspaceState(projection, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_unique(plans: Sequence[LeafPlan]) -> None:
    seen: set[str] = set()
    for p in plans:
        if p.path in seen:
            raise ValueError(f"two parameters have the path {p.path}: rename one of them")
        seen.add(p.path)


def _check_state(plans: Sequence[LeafPlan], state: ProjectionState) -> None:
    """Raises if the state was made for other leaves, ranks, sides or axes."""
    remedy = "initialise the state with the same transformation and parameters"
    if not isinstance(state.leaves, dict) or set(state.skipped) != {p.path for p in plans}:
        raise ValueError(f"the state belongs to other parameters than the gradient: {remedy}")
    for p in plans:
        leaf = state.leaves.get(p.path)
        found = None if leaf is None else tuple(b.shape for b in leaf.bases)
        expected = p.basis_shapes if p.projected else None
        if found != expected:
            raise ValueError(
                f"parameter {p.path}: the state holds bases of shapes {found}, these settings need "
                f"{expected}: {remedy}"
            )
