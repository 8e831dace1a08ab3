"""The bases of a parameter tree: their state, how they begin, are refreshed, and project."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_subspace._blocks import dequantize, storage_of, zeros
from optax_subspace._describe import record, warn_about_rules
from optax_subspace._each_slice import compiled_alone
from optax_subspace._handover import LowRankUpdate
from optax_subspace._leaves import LeafPlan
from optax_subspace._plan import plan as plan_tree
from optax_subspace._projected import SourceBasis, found_at_source, in_full_shape, is_projected
from optax_subspace._projection import compute_dtype, in_turn, project, to_matrices
from optax_subspace._projection_state import (
    LeafBasis,
    ProjectionState,
    check_state,
    check_unique,
)
from optax_subspace._projectors import Projector, svd
from optax_subspace._projectors._base import check_count, check_projector, check_seed, key_of
from optax_subspace._refresh import (
    Refreshed,
    Turn,
    adopt,
    follow,
    follow_product,
    joined,
    refresh,
    together,
)
from optax_subspace._rules import Rules, check_scale, check_side, compile_rules, rules_of
from optax_subspace._schedule import (
    LOOK_EVERY,
    age_due,
    due_if_lost,
    found_before,
    next_due,
    next_period,
    offsets,
    steps_early,
)
from optax_subspace._sharding import refuse_explicit_split
from optax_subspace._varying import varying_as

MOMENTS = ("keep", "project", "reset")


class Initialised(NamedTuple):
    """A projection and the plans that it was initialised with, as recorded for the source."""

    subspace: Subspace
    plans: list[LeafPlan]


class Subspace:
    """The settings of one projection and the pure functions that they define."""

    def __init__(
        self,
        rank: int,
        projector: Projector | None,
        side: str,
        scale: optax.ScalarOrSchedule,
        rules: Rules | None,
        projector_dtype: Any,
        stagger: bool,
        moments: str,
        accumulate: int,
        seed: int,
        inner: optax.GradientTransformation | None = None,
    ):
        check_count("rank", rank)
        check_side(side)
        projector = svd() if projector is None else projector
        check_projector("projector", projector)
        if moments not in MOMENTS:
            raise ValueError(f"moments must be one of {', '.join(MOMENTS)}, got {moments!r}")
        check_count("accumulate", accumulate)
        check_scale("scale", scale)
        if not isinstance(stagger, bool | np.bool_):
            raise TypeError(f"stagger must be True or False, got {stagger!r}")
        self.rank, self.side, self.scale = rank, side, scale
        self.rules = rules_of(rules)
        compile_rules(self.rules)  # raises for what are none
        self.projector, self.inner = projector, inner
        self.stagger, self.moments, self.accumulate, self.seed = stagger, moments, accumulate, seed
        check_seed("seed", seed)
        self.projector_dtype = projector_dtype
        self.called: set[Any] = set()  # see `compiled_alone`
        storage_of(projector_dtype)  # raises for what is none

    def plan(self, tree: Any) -> list[LeafPlan]:
        """The plan of each leaf, with the scale that it has."""
        plans = plan_tree(
            tree,
            self.rules,
            rank=self.rank,
            side=self.side,
            projector=self.projector,
            inner=self.inner,
            projector_dtype=self.projector_dtype,
            accumulate=self.accumulate,
        )
        scale = lambda p: self.scale if p.scale is None else p.scale
        return [dataclasses.replace(p, scale=scale(p)) for p in plans]

    def init(self, params: optax.Params) -> tuple[ProjectionState, list[LeafPlan]]:
        """Bases of zeros: the first gradient gives the first basis. Only shapes are read."""
        plans = self.plan(params)
        warn_about_rules(plans, self.rules)
        record([Initialised(self, plans), *plans])
        zero = jnp.zeros([], jnp.int32)
        if not plans:
            # optax.tree_map_params initialises on a tree without leaves and wants each field to
            # be a prefix of the real state's.
            # (An array each: one buffer can't be donated twice.)
            nothing: Any = [jnp.zeros([], jnp.int32) for _ in range(3)]
            return ProjectionState(zero, *nothing), plans
        check_unique(plans)
        # Within `shard_map` a state differs between devices where its parameter does.
        like = dict(zip((p.path for p in plans), jax.tree.leaves(params), strict=True))
        for plan in plans:
            if plan.projected and isinstance(like[plan.path], jax.Array):
                refuse_explicit_split(like[plan.path], plan.path)
        leaf = lambda p: varying_as(self.init_leaf(p), like[p.path])
        leaves = {p.path: leaf(p) for p in plans if p.projected}
        skipped = {p.path: varying_as(jnp.zeros([], jnp.int32), like[p.path]) for p in plans}
        accumulated = {}
        if self.accumulate > 1:
            low = lambda p: jnp.zeros(p.low_shape, compute_dtype(p.dtype))
            accumulated = {p.path: varying_as(low(p), like[p.path]) for p in plans}
        return ProjectionState(zero, leaves, skipped, accumulated), plans

    def init_leaf(self, plan: LeafPlan) -> LeafBasis:
        """The state of a leaf without a basis yet."""
        rule = plan.projector or self.projector
        if rule.follow is not None and self.moments == "reset":
            raise ValueError(
                f"parameter {plan.path}: moments='reset' with a projector that follows every "
                "gradient would forget the moments at every step: use 'keep' or 'project'"
            )
        if not rule.orthonormal and self.moments == "project":
            raise ValueError(
                f"parameter {plan.path}: moments='project' turns moments from one orthonormal "
                "basis to another, which those of this projector are not: use 'keep' or 'reset', "
                "or random_projection()"
            )
        key = key_of(self.seed, plan.path)
        slices = int(np.prod(plan.batch_shape, dtype=int))
        states = []
        for number, side in enumerate(plan.sides):
            m, n = plan.matrix_shape if side == "left" else plan.matrix_shape[::-1]
            keys = jax.random.split(jax.random.fold_in(key, number), slices)
            try:
                state = jax.vmap(lambda k, m=m, n=n: rule.init(k, m, n, plan.rank))(keys)
            except ValueError as error:
                raise ValueError(f"parameter {plan.path}: {error}") from error
            states.append(jax.tree.map(lambda x: x.reshape(plan.batch_shape + x.shape[1:]), state))
        storage = storage_of(self.projector_dtype) or compute_dtype(plan.dtype)
        batch = len(plan.batch)
        per_slice = lambda value, dtype: jnp.full(plan.batch_shape, value, dtype)
        return LeafBasis(
            bases=tuple(zeros(shape, storage, batch) for shape in plan.basis_shapes),
            rule=tuple(states),
            age=per_slice(0, jnp.int32),
            due=per_slice(0, jnp.int32),
            period=per_slice(1, jnp.int32),
            refreshes=per_slice(0, jnp.int32),
            drift=per_slice(0, jnp.float32),
        )

    def project(
        self, updates: optax.Updates, state: ProjectionState, source: Any = None
    ) -> tuple[list[LowRankUpdate], ProjectionState]:
        """Refreshes the bases that are due and projects every leaf, in the order of the leaves.

        Leaves may be :class:`Projected`, with what the backward pass found for their bases in
        ``source``, by path.
        """
        structure: Any
        leaves_in, structure = jax.tree.flatten(updates, is_leaf=is_projected)
        plans = self.plan(in_full_shape(updates))
        steps = optax.safe_increment(state.steps)
        if not plans:
            return [], state._replace(steps=steps)
        check_state(plans, state, self.accumulate, self.init_leaf)
        turns = offsets(plans) if self.stagger else {}
        first, last = None, None
        if self.accumulate > 1:
            first = state.steps % self.accumulate == 0
            last = state.steps % self.accumulate == self.accumulate - 1
        step = state.steps // self.accumulate
        leaves, skipped, accumulated, handed = {}, {}, {}, []
        low_before = None
        for plan, leaf in zip(plans, leaves_in, strict=True):
            old, rule = state.leaves.get(plan.path), plan.projector or self.projector
            early = steps_early(rule, turns.get(plan.path))
            found = matrices = None
            if is_projected(leaf):
                found = found_at_source(source, plan)
                assert old is not None  # check_state has seen to it
                # Several uses, or no basis yet where none could be found, tell nothing; nor does
                # what a derivative rule of the loss has scaled, as it has all that was found.
                lost = jnp.any((found.uses != 0) & (found.uses != 1))
                if not found.bases:
                    lost |= jnp.all(old.refreshes == 0) & jnp.any(found.uses > 0)
                low = jnp.where(lost, jnp.nan, leaf.low)
                basis, before = self._adopt_leaf(plan, old, found, low, early)
                bases = tuple(dequantize(b) for b in basis.bases)
            else:
                leaf = jnp.asarray(leaf)
                low = leaf.astype(compute_dtype(leaf.dtype))
            if old is not None and found is None:
                refuse_explicit_split(low, plan.path)
                matrices = to_matrices(low, plan)
                basis, before = self._refresh_leaf(plan, matrices, old, early, first)
                bases = tuple(dequantize(b) for b in basis.bases)
                if low_before is not None:
                    bases = tuple(in_turn(b, low_before) for b in bases)
                low = project(matrices, bases, plan)
            projected = low
            if old is not None:
                low_before = low
            if last is not None:
                # A gradient that is not finite makes the sum so, which skips all of it.
                total = state.accumulated[plan.path] + low
                total = total.astype(state.accumulated[plan.path].dtype)
                accumulated[plan.path] = jnp.where(last, 0, total)
                low = total / self.accumulate
            finite = jnp.all(jnp.isfinite(low))
            used = finite if last is None else finite & last
            ended = True if last is None else last
            skipped[plan.path] = state.skipped[plan.path] + (ended & ~finite).astype(jnp.int32)
            handed_on = LowRankUpdate(
                low=jnp.where(finite, low, 0),
                used=used,
                ready=last,
                plan=plan,
                factor=plan.scale(step) if callable(plan.scale) else plan.scale,
                dtype_out=leaf.dtype,
                rank=self.rank,
            )
            if old is not None:
                handed_on.bases, handed_on.before = basis.bases, before
                # A slice without any gradient yet has no basis yet.
                begun = used & ((old.age > 0) | jnp.any(low != 0, axis=(-2, -1)))
                basis = basis._replace(age=old.age + begun.astype(jnp.int32))
                fresh = basis.refreshes != old.refreshes
                if last is not None:
                    fresh |= found_before(old.due)
                    due = age_due(basis.due)
                    basis = basis._replace(due=jnp.where(fresh & ~last, ~due, due))
                moves = begun & (old.age > 0) & ~fresh
                leaves[plan.path], handed_on.after = self._follow_leaf(
                    plan,
                    basis,
                    moves,
                    list(zip(found.products, found.energies, strict=True)) if found else None,
                    matrices,
                    projected,
                )
                if rule.follow is not None:
                    # What the rule needs of the gradient ends before the update begins.
                    followed = dequantize(leaves[plan.path].bases[0])
                    handed_on.low = in_turn(handed_on.low, followed)
            handed.append(handed_on)
        return handed, ProjectionState(steps, leaves, skipped, accumulated)

    @compiled_alone
    def _refresh_leaf(
        self,
        plan: LeafPlan,
        matrices: jax.Array,
        old: LeafBasis,
        early: np.ndarray | None,
        first: jax.Array | None,
    ) -> tuple[LeafBasis, Turn | None]:
        """New bases for the slices that are due, and what that means for the moments."""
        rule = plan.projector or self.projector
        due = old.age >= age_due(old.due)
        if first is not None:
            # A leaf without a basis takes its first from whichever micro-batch has a gradient.
            due &= first | (old.refreshes == 0)
        # The whole leaf is skipped if any of it is not finite; slices of zeros keep their bases.
        # On other steps the low-rank gradient tells, and the full one need not be read again.
        due &= jax.lax.cond(
            jnp.any(due),
            lambda: jnp.all(jnp.isfinite(matrices)) & jnp.any(matrices != 0, axis=(-2, -1)),
            lambda: varying_as(jnp.zeros_like(due), matrices),
        )
        sides = [
            refresh(rule, plan, due, matrices, side, basis, state, self.moments == "project")
            for side, basis, state in zip(plan.sides, old.bases, old.rule, strict=True)
        ]
        sides = together(sides, old.bases, old.rule)
        return self._scheduled(plan, old, sides, early)

    @compiled_alone
    def _adopt_leaf(
        self,
        plan: LeafPlan,
        old: LeafBasis,
        found: SourceBasis,
        low: jax.Array,
        early: np.ndarray | None,
    ) -> tuple[LeafBasis, Turn | None]:
        """As ``_refresh_leaf``, with what a backward pass has found."""
        done = found.done & jnp.all(jnp.isfinite(low))
        if not found.bases:
            found = found._replace(bases=old.bases, rules=old.rule)
            done = jnp.zeros_like(done)
        rotate = self.moments == "project"
        sides = [
            adopt(plan, done, dequantize(new), new_state, basis, state, rotate)
            for new, new_state, basis, state in zip(
                found.bases, found.rules, old.bases, old.rule, strict=True
            )
        ]
        return self._scheduled(plan, old, sides, early)

    def _scheduled(
        self, plan: LeafPlan, old: LeafBasis, sides: list[Refreshed], early: np.ndarray | None
    ) -> tuple[LeafBasis, Turn | None]:
        """The sides after a refresh, when the next one is due, and the moments' turn."""
        rule = plan.projector or self.projector
        done, overlap, turn = joined(sides)
        initial = old.refreshes == 0
        period = next_period(rule, old.period, initial, overlap)
        new = LeafBasis(
            bases=tuple(s.basis for s in sides),
            rule=tuple(s.rule for s in sides),
            age=old.age,
            due=next_due(rule, old.age, old.due, done, initial, period, early),
            period=jnp.where(done, period, old.period),
            refreshes=old.refreshes + done.astype(jnp.int32),
            drift=jnp.where(done & ~initial, 1 - overlap, old.drift),
        )
        return new, turn if self.moments != "keep" else None

    @compiled_alone
    def _follow_leaf(
        self,
        plan: LeafPlan,
        basis: LeafBasis,
        moves: jax.Array,
        products: list[tuple[jax.Array, jax.Array]] | None,
        matrices: Any,
        low: jax.Array,
    ) -> tuple[LeafBasis, Turn | None]:
        """The bases of the next step, for a rule that follows the gradient.

        It is given by ``products`` and energies, or by ``matrices`` and their coordinates ``low``.
        """
        rule = plan.projector or self.projector
        if rule.follow is None:
            return basis, None
        rotate, sides = self.moments == "project", []
        # A product of its own, but for moments that are turned by it.
        measured = jnp.full_like(moves, True) if rotate else basis.age % LOOK_EVERY == 0
        for i, (side, old, state) in enumerate(
            zip(plan.sides, basis.bases, basis.rule, strict=True)
        ):
            if products is not None:
                product, energy = products[i]
                sides.append(
                    follow_product(rule, plan, moves, product, energy, old, state, rotate, measured)
                )
                continue
            alone = dataclasses.replace(plan, sides=(side,))
            coordinates = low if plan.sides == (side,) else project(matrices, (old,), alone)
            sides.append(
                follow(rule, plan, moves, matrices, side, coordinates, old, state, rotate, measured)
            )
        done, overlap, turn = joined(sides)
        # A rule that sees the gradient through its basis alone can't find one that has left it:
        # such a leaf begins anew before long. (One of zeros has not left.)
        followed = basis._replace(
            bases=tuple(s.basis for s in sides),
            rule=tuple(s.rule for s in sides),
            due=due_if_lost(basis.age, basis.due, [s.energy for s in sides], plan.basis_shapes),
            drift=jnp.where(done & measured, 1 - overlap, basis.drift),
        )
        return followed, turn if rotate else None
