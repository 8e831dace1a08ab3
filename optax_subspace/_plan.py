"""The plan of a whole tree: each leaf's rule, and the side where bytes decide it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import optax

from optax_subspace._blocks import storage_of, zeros
from optax_subspace._inner_state import bytes_by_leaf, tree_bytes
from optax_subspace._leaves import LeafPlan, leaf_names, plan_leaf
from optax_subspace._projection import compute_dtype
from optax_subspace._projection_state import BYTES_OF_SCHEDULE
from optax_subspace._projectors import Projector
from optax_subspace._projectors._base import check_count
from optax_subspace._rules import Rules, check_side, compile_rules


def plan(
    params: Any,
    rules: Rules | None = None,
    *,
    rank: int = 128,
    side: str = "shorter",
    projector: Projector | None = None,
    inner: optax.GradientTransformation | None = None,
    projector_dtype: Any = None,
    accumulate: int = 1,
) -> list[LeafPlan]:
    """Decides for every leaf whether and how it is projected.

    Each leaf takes the spec of the first rule whose pattern is found in its path
    (``re.search``); a spec of ``None`` leaves the leaf alone. A leaf that no rule matches is
    projected if it has two dimensions and is not an embedding or an output head by its name.
    Leaves with ``rank >= min(m, n)`` are left alone, where only a basis on a side that is more than
    twice the other could save anything; ``auto`` takes that one, which holds all of the gradient
    that it was made of, and a part of later ones as any basis.

    Args:
      params: tree of arrays or ``jax.ShapeDtypeStruct``.
      rules: ``(regex, spec)`` pairs; a spec is a :class:`MatrixSpec`, one of optax's
        dimension numbers, or None.
      rank: rank where the rule names none.
      side: side where the rule names none: ``shorter`` puts the basis on the shorter side
        (GaLore's ``std``: right for ``m >= n``), ``longer`` on the longer one
        (``optax.contrib.galore``: left for ``m >= n``), ``left`` gives ``P^T G``, ``right``
        ``G Q``, ``both`` ``P^T G Q``, and ``auto`` is that of ``left``, ``right`` and ``both``
        whose state has the fewest bytes. That is often ``both``, which keeps less of the
        gradient than one side alone. Of these ``longer`` has the fewer bytes with Adam's two
        moments in the dtype of the bases.
      projector, inner, projector_dtype: what ``auto`` counts the bytes of: the rule's own state,
        that of the transformation in the subspace (``optax.scale_by_adam()`` by default), and the
        bases in this dtype or code (the arithmetic's dtype by default).
      accumulate: micro-batches of a step, for ``auto`` too: a buffer if there are several.

    Returns:
      One :class:`LeafPlan` per leaf, in the order of ``jax.tree.leaves(params)``.

    Raises:
      TypeError: a leaf is complex or an integer, or a rule's spec has no axes.
      ValueError: unknown side, rank below one, or axes that do not fit a leaf's shape.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.zeros((64, 32)), "b": jnp.zeros(32)}
      >>> [(p.path, p.side, p.low_shape) for p in plan(params, rank=4)]
      [('b', None, (32,)), ('w', 'right', (64, 4))]
    """
    check_count("rank", rank)
    check_side(side)
    compiled = compile_rules(rules)
    leaves, structure = jax.tree.flatten(params)
    named = zip(leaf_names(params), leaves, strict=True)
    plans = [plan_leaf(name, leaf, compiled, rank, side) for name, leaf in named]
    if any(p.sides == ("auto",) for p in plans):
        inner = optax.scale_by_adam() if inner is None else inner
        plans = _with_fewest_bytes(plans, structure, projector, inner, projector_dtype, accumulate)
    return plans


def _with_fewest_bytes(
    plans: list[LeafPlan],
    structure: Any,
    projector: Projector | None,
    inner: optax.GradientTransformation,
    projector_dtype: Any,
    accumulate: int,
) -> list[LeafPlan]:
    """Decides the leaves whose sides are ``("auto",)``; the first of equals is kept.

    One whose rank is that of its matrix may be left alone, and is if that takes no more.
    """
    candidates, storage = [], projector_dtype
    buffer = lambda low: tree_bytes(low) if accumulate > 1 else 0
    for sides in (("right",), ("left",), ("left", "right"), ()):
        decide = lambda p, s=sides: _decided(p, s) if p.sides == ("auto",) else p
        decided = [decide(p) for p in plans]
        low = [jax.ShapeDtypeStruct(p.low_shape, compute_dtype(p.dtype)) for p in decided]
        state = jax.eval_shape(inner.init, structure.unflatten(low))
        inner_bytes = bytes_by_leaf(state, structure)
        row = []
        for count, x, p, asked in zip(inner_bytes, low, decided, plans, strict=True):
            if asked.projected and not sides and asked.rank < min(asked.matrix_shape):
                row.append((math.inf, asked))
                continue
            try:
                own: float = _projection_bytes(p, p.projector or projector, storage)
            except ValueError:  # the rule has no basis of that shape, as `fixed` may not
                own = math.inf
            row.append((count + buffer(x) + own, p))
        candidates.append(row)
    fewest = lambda pair: (pair[0], pair[1].projected)
    return [min(of_leaf, key=fewest)[1] for of_leaf in zip(*candidates, strict=True)]


def _decided(plan: LeafPlan, sides: tuple[str, ...]) -> LeafPlan:
    if sides:
        whole = plan.rank == min(plan.matrix_shape)
        reason = f"{plan.reason}, the fewest bytes all the same" if whole else plan.reason
        return dataclasses.replace(plan, sides=sides, reason=reason)
    return LeafPlan(plan.path, plan.shape, plan.dtype, plan.reason)


def _projection_bytes(plan: LeafPlan, projector: Projector | None, dtype: Any) -> int:
    """Bytes of a leaf's bases and of its projector's own state."""
    storage = storage_of(dtype) or compute_dtype(plan.dtype)
    total = BYTES_OF_SCHEDULE * math.prod(plan.batch_shape) if plan.projected else 0
    for side, shape in zip(plan.sides, plan.basis_shapes, strict=True):
        basis = lambda shape=shape: zeros(shape, storage, len(plan.batch))
        total += tree_bytes(jax.eval_shape(basis))
        if projector is not None:
            m, n = plan.matrix_shape if side == "left" else plan.matrix_shape[::-1]
            one = lambda key, m=m, n=n: projector.init(key, m, n, plan.rank)
            state = jax.eval_shape(one, jax.eval_shape(lambda: jax.random.key(0)))
            total += math.prod(plan.batch_shape) * tree_bytes(state)
    return total
