"""The bases of a parameter tree: their state, how they begin, are refreshed, and project."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_subspace import _leaves
from optax_subspace._describe import record, warn_about_rules
from optax_subspace._handover import LowRankUpdate
from optax_subspace._leaves import LeafPlan, Rules
from optax_subspace._projection import compute_dtype, project, to_matrices
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
      steps: int32 scalar, the steps taken.
      leaves: the basis of each projected leaf by its path.
      skipped: int32 scalar by path: how often a leaf's gradient was not finite.
    """

    steps: jax.Array
    leaves: dict[str, LeafBasis]
    skipped: dict[str, jax.Array]


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
            raise TypeError(
                f"projector must be a Projector such as svd(every=200), got {projector!r}"
            )
        self.rank, self.side, self.scale, self.rules = rank, side, scale, rules
        self.projector, self.seed = projector, seed
        self.projector_dtype = None if projector_dtype is None else jnp.dtype(projector_dtype)

    def plan(self, tree: Any) -> list[LeafPlan]:
        return _leaves.plan(tree, self.rules, rank=self.rank, side=self.side)

    def init(self, params: optax.Params) -> tuple[ProjectionState, list[LeafPlan]]:
        """Bases of zeros: the first gradient gives the first basis. Only shapes are read."""
        plans = self.plan(params)
        warn_about_rules(plans, self.rules)
        record(plans)
        zero = jnp.zeros([], jnp.int32)
        if not plans:
            # optax.tree_map_params initialises on a tree without leaves and wants each field to
            # be a prefix of the real state's.
            nothing: Any = zero
            return ProjectionState(zero, nothing, nothing), plans
        _check_unique(plans)
        leaves = {p.path: self._init_leaf(i, p) for i, p in enumerate(plans) if p.projected}
        skipped = {p.path: jnp.zeros([], jnp.int32) for p in plans}
        return ProjectionState(zero, leaves, skipped), plans

    def _init_leaf(self, index: int, plan: LeafPlan) -> LeafBasis:
        rule = plan.projector or self.projector
        key = jax.random.fold_in(jax.random.key(self.seed), index)
        slices = int(np.prod(plan.batch_shape, dtype=int))
        states = []
        for number, side in enumerate(plan.sides):
            m, n = plan.matrix_shape if side == "left" else plan.matrix_shape[::-1]
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
        steps = optax.safe_increment(state.steps)
        if not plans:
            return [], state._replace(steps=steps)
        _check_state(plans, state)
        leaves, skipped, handed = {}, {}, []
        for plan, leaf in zip(plans, jax.tree.leaves(updates), strict=True):
            low = leaf.astype(compute_dtype(leaf.dtype))
            bases: tuple[jax.Array, ...] = ()
            if plan.projected:
                low, bases, leaves[plan.path] = self._project_leaf(
                    low, plan, state.leaves[plan.path]
                )
            finite = jnp.all(jnp.isfinite(low))
            skipped[plan.path] = state.skipped[plan.path] + (1 - finite.astype(jnp.int32))
            factor = self._factor(plan, state.steps)
            low = jnp.where(finite, low, 0)
            handed.append(LowRankUpdate(low, finite, bases, plan, factor, leaf.dtype, self.rank))
        return handed, ProjectionState(steps, leaves, skipped)

    def _project_leaf(
        self, leaf: jax.Array, plan: LeafPlan, old: LeafBasis
    ) -> tuple[jax.Array, tuple[jax.Array, ...], LeafBasis]:
        """The low-rank gradient, the bases it was made with, and those of the next step."""
        rule = plan.projector or self.projector
        matrices = to_matrices(leaf, plan)
        due = old.age == 0 if rule.every is None else old.age % rule.every == 0
        # The whole leaf is skipped if any of it is not finite. On other steps the low-rank gradient
        # tells, and the full one need not be read again.
        due &= jax.lax.cond(
            jnp.any(due), lambda: jnp.all(jnp.isfinite(matrices)), lambda: jnp.array(False)
        )
        refreshed = [
            _refresh(rule, due, matrices, side, basis, state)
            for side, basis, state in zip(plan.sides, old.bases, old.rule, strict=True)
        ]
        bases, states = zip(*refreshed, strict=True)
        low = project(matrices, bases, plan)
        finite = jnp.all(jnp.isfinite(low))
        # A slice without any gradient yet has no basis yet.
        started = (old.age > 0) | jnp.any(low != 0, axis=(-2, -1))
        new = LeafBasis(bases, states, old.age + (started & finite).astype(jnp.int32))
        if rule.follow is not None:
            followed = [
                _follow(rule, started & finite & ~due, matrices, side, basis, state)
                for side, basis, state in zip(plan.sides, bases, states, strict=True)
            ]
            next_bases, states = zip(*followed, strict=True)
            new = new._replace(bases=next_bases, rule=states)
        return low, bases, new

    def _factor(self, plan: LeafPlan, step: jax.Array) -> Any:
        if plan.scale is not None:
            return plan.scale
        return self.scale(step) if callable(self.scale) else self.scale


def _refresh(
    rule: Projector, due: jax.Array, matrices: jax.Array, side: str, basis: jax.Array, state: Any
) -> tuple[jax.Array, Any]:
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
        put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, slice_, 0)
        gradient, old = take(matrices), jax.tree.map(take, carry)
        gradient = gradient if side == "left" else gradient.T
        new = jax.lax.cond(
            jnp.any(gradient != 0), lambda: _checked(rule.update, gradient, *old), lambda: old
        )
        return jax.tree.map(put, carry, new)

    carry = jax.tree.map(flat, (basis, state))
    basis, state = jax.lax.fori_loop(0, jnp.sum(due, dtype=jnp.int32), refresh_slice, carry)
    return jax.tree.map(lambda x: x.reshape(batch + x.shape[1:]), (basis, state))


def _follow(
    rule: Projector, moves: jax.Array, matrices: jax.Array, side: str, basis: jax.Array, state: Any
) -> tuple[jax.Array, Any]:
    """One step of ``rule.follow`` in those slices of ``(*batch, m, n)`` that move."""

    def follow_slice(moves, matrix, basis, state):
        gradient = matrix if side == "left" else matrix.T
        squared = jnp.maximum(jnp.sum(gradient**2), jnp.finfo(gradient.dtype).tiny)
        product = gradient @ (gradient.T @ basis.astype(gradient.dtype)) / squared
        new = _checked(rule.follow, product, basis, state)
        return jax.tree.map(lambda n, o: jnp.where(moves, n, o), new, (basis, state))

    for _ in moves.shape:
        follow_slice = jax.vmap(follow_slice)
    return follow_slice(moves, matrices, basis, state)


def _checked(rule: Any, array: jax.Array, basis: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    """Applies a rule's function in the arithmetic's dtype and stores in the state's."""
    new_basis, new_state = rule(array, basis.astype(array.dtype), state)
    if new_basis.shape != basis.shape:
        raise ValueError(
            f"the projector returned a basis of shape {new_basis.shape}, expected {basis.shape}"
        )
    store = lambda new, old: jnp.asarray(new, old.dtype)
    return store(new_basis, basis), jax.tree.map(store, new_state, state)


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
