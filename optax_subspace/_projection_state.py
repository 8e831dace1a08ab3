"""The state of a projection: its structure, and whether it fits a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from optax_subspace._blocks import is_quantized, without_variables
from optax_subspace._leaves import LeafPlan


class LeafBasis(NamedTuple):
    """The subspace of one projected leaf. Every field has the leaf's batch axes in front.

    Attributes:
      bases: one basis per side: ``(*batch, m, r)`` left, ``(*batch, n, r)`` right; an array, or a
        :class:`Quantized` node if ``projector_dtype`` is a code.
      rule: the projector's own state per side.
      age: int32 ``(*batch,)``, gradients used since the first basis; zero before it.
      due: int32 ``(*batch,)``, the age at which the projector's ``update`` comes next; ``NEVER``,
        or ``UNLESS_LOST`` for a rule that follows; between micro-batches see ``found_before``.
      period: int32 ``(*batch,)``, steps between updates in units of the projector's ``every``.
      refreshes: int32 ``(*batch,)``, how often ``update`` has given a new basis.
      drift: float32 ``(*batch,)``, one minus the mean squared cosine of the principal angles
        between the last two bases; zero before there are two. That of a rule that follows is
        measured at ages that ten divides, unless moments are turned.
    """

    bases: tuple[Any, ...]
    rule: tuple[Any, ...]
    age: jax.Array
    due: jax.Array
    period: jax.Array
    refreshes: jax.Array
    drift: jax.Array


# Of one slice, for `age` and what comes after it.
BYTES_OF_SCHEDULE = 5 * 4


class ProjectionState(NamedTuple):
    """State of the projection of a whole tree.

    Attributes:
      steps: int32 scalar, the gradients seen, micro-batches counted one by one.
      leaves: the basis of each projected leaf by its path.
      skipped: int32 scalar by path: how often a leaf's gradient was not finite.
      accumulated: sum of the low-rank gradients of the micro-batches so far, by path; empty
        without accumulation.
    """

    steps: jax.Array
    leaves: dict[str, LeafBasis]
    skipped: dict[str, jax.Array]
    accumulated: dict[str, jax.Array]


def plan_of(plans: Sequence[LeafPlan], path: str, leaf: LeafBasis) -> LeafPlan:
    """The plan that a leaf's bases were made with, of those that several projections made."""
    shapes = tuple(b.shape for b in leaf.bases)
    for plan in plans:
        if plan.path == path and plan.basis_shapes == shapes:
            return plan
    made = [p.basis_shapes for p in plans if p.path == path]
    raise ValueError(
        f"parameter {path}: the state holds bases of shapes {shapes}, the transformation makes "
        f"{made or 'none'}: give the transformation and the parameters that the state is of"
    )


def check_unique(plans: Sequence[LeafPlan]) -> None:
    seen: set[str] = set()
    for p in plans:
        if p.path in seen:
            raise ValueError(f"two parameters have the path {p.path}: rename one of them")
        seen.add(p.path)


def check_state(
    plans: Sequence[LeafPlan],
    state: ProjectionState,
    accumulate: int,
    made: Callable[[LeafPlan], LeafBasis],
) -> None:
    """Raises if the state was made for other leaves, ranks, sides, axes, rules or accumulation.

    ``made`` gives the basis that a plan begins with; its shapes alone count.
    """
    remedy = "initialise the state with the same transformation and parameters"
    known = set(state.skipped) if isinstance(state.leaves, dict) else set()
    if known != (paths := {p.path for p in plans}):
        only = [f"no {path}" for path in sorted(known - paths)]
        only += [f"{path}, which is not among them" for path in sorted(paths - known)]
        raise ValueError(
            "the state belongs to other parameters than the gradient, which has "
            f"{' and '.join(only[:3])}: {remedy}, and give a gradient for each"
        )
    if bool(state.accumulated) != (accumulate > 1):
        has = "has" if state.accumulated else "has no"
        raise ValueError(
            f"the state {has} accumulated gradients, accumulate={accumulate}: {remedy}"
        )
    for p in plans:
        leaf = state.leaves.get(p.path)
        found = None if leaf is None else tuple(b.shape for b in leaf.bases)
        expected = p.basis_shapes if p.projected else None
        if found != expected:
            raise ValueError(
                f"parameter {p.path}: the state holds bases of shapes {found}, these settings need "
                f"{expected}: {remedy}"
            )
        total = state.accumulated[p.path].shape if accumulate > 1 else p.low_shape
        if total != p.low_shape:
            raise ValueError(
                f"parameter {p.path}: the state holds a sum of low-rank gradients of shape "
                f"{total}, these settings need {p.low_shape}: {remedy}"
            )
        if leaf is None:
            continue
        new = jax.eval_shape(lambda p=p: made(p))
        has, needs = _kind(leaf), _kind(new)
        if has != needs:
            raise ValueError(
                f"parameter {p.path}: the state was made with another projector or projector_dtype "
                f"(it holds {has}, these settings need {needs}): {remedy}"
            )


def _kind(leaf: LeafBasis) -> str:
    """How the bases are stored, and what the rule keeps."""
    leaf = without_variables(leaf)
    # (float64 counts as float32: gradients may be of another precision than the parameters.)
    few_bits = lambda b: b.dtype if b.dtype.itemsize < 4 else "float32"
    name = lambda b: b.layout.code if is_quantized(b) else str(few_bits(b))
    parts, _ = jax.tree_util.tree_flatten_with_path(leaf.rule)
    kept = [f"{jax.tree_util.keystr(path)} of shape {x.shape}" for path, x in parts]
    bases = ", ".join(map(name, leaf.bases))
    return f"bases in {bases}" + (f" and {', '.join(kept)} of the rule" if kept else "")
