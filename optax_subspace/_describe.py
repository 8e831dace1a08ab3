"""What an optimizer does with every leaf: the table, and the warnings about missing rules."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax

from optax_subspace._inner_state import tree_bytes
from optax_subspace._leaves import BY_NAME, LeafPlan, is_own_name, suggested_axes
from optax_subspace._rules import Rules, compile_rules


class Description(NamedTuple):
    """The plan of every leaf that a transformation's projections saw; ``str()`` is the table.

    Attributes:
      leaves: one :class:`LeafPlan` per leaf and projection.
      state_bytes: bytes of the optimizer state, all parts.
      adam_bytes: bytes of full-rank Adam's state for the same parameters, in their dtypes.
    """

    leaves: list[LeafPlan]
    state_bytes: int
    adam_bytes: int

    def __str__(self) -> str:
        rows = [("parameter", "shape", "side", "rank", "in the subspace", "why")]
        for p in self.leaves:
            low = _times(p.low_shape) if p.projected else "-"
            rank = str(p.rank) if p.projected else "-"
            rows.append((p.path, _times(p.shape), p.side or "-", rank, low, p.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                [*(c.ljust(w) for c, w in zip(row[:5], widths, strict=True)), row[5]]
            ).rstrip()
            for row in rows
        ]
        total = sum(math.prod(p.shape) for p in self.leaves)
        inside = sum(math.prod(p.shape) for p in self.leaves if p.projected)
        share = 100 * inside / total if total else 0.0
        lines.append(
            f"{inside:,} of {total:,} parameters projected ({share:.1f} %); optimizer state "
            f"{self.state_bytes:,} bytes, full-rank Adam's {self.adam_bytes:,}"
        )
        wanting = [p for p in self.leaves if p.wants_rule]
        lines += [f"{p.path} would be projected by {suggested_rule(p)}" for p in wanting]
        return "\n".join(lines)


def describe(params: optax.Params, tx: optax.GradientTransformation) -> Description:
    """Tells what ``tx`` does with every leaf of ``params``; nothing is computed or allocated.

    Args:
      params: tree of arrays or ``jax.ShapeDtypeStruct``.
      tx: any transformation that holds projections of this library, chained, masked or wrapped.

    Returns:
      A :class:`Description`: print it, or read its ``leaves``.

    Raises:
      TypeError, ValueError: what ``tx.init`` raises for these parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_subspace import galore
      >>> params = {"embed": jnp.zeros((100, 8)), "w": jnp.zeros((16, 8))}
      >>> print(describe(params, galore(1e-2, rank=2)))
      parameter  shape    side   rank  in the subspace  why
      embed      100 x 8  -      -     -                embedding or output head by its name
      w          16 x 8   right  2     16 x 2           matrix
      128 of 928 parameters projected (13.8 %); optimizer state 6,756 bytes, full-rank Adam's 7,428
    """
    plans, state = planned(tx, params)
    # A scale that `inject_hyperparams` traced is none outside.
    traced = lambda p: isinstance(p.scale, jax.core.Tracer)
    plans = [dataclasses.replace(p, scale=None) if traced(p) else p for p in plans]
    adam = jax.eval_shape(optax.scale_by_adam().init, params)
    return Description(plans, tree_bytes(state), tree_bytes(adam))


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def unmatched_patterns(plans: Iterable[LeafPlan], rules: Rules | None) -> list[str]:
    """The patterns of ``rules`` that match no leaf of the plan."""
    paths = [p.path for p in plans]
    return [r.pattern for r, _ in compile_rules(rules) if not any(r.search(p) for p in paths)]


def shadowed_patterns(plans: Iterable[LeafPlan], rules: Rules | None) -> list[str]:
    """The patterns with a spec that match leaves, all of which earlier rules have taken."""
    compiled = compile_rules(rules)
    matched, first = set(), set()
    for leaf in plans:
        numbers = [i for i, (pattern, _) in enumerate(compiled) if pattern.search(leaf.path)]
        matched.update(numbers)
        first.update(numbers[:1])
    return [compiled[i][0].pattern for i in sorted(matched - first) if compiled[i][1] is not None]


def warn_about_rules(plans: Sequence[LeafPlan], rules: Rules | None) -> None:
    """Warns of a pattern that matches nothing or comes too late, and of parameters without one."""
    for pattern in unmatched_patterns(plans, rules) if plans else ():
        warnings.warn(
            f"the rule {pattern!r} matches no parameter; paths look like {plans[0].path!r}",
            UserWarning,
            stacklevel=4,
        )
    for pattern in shadowed_patterns(plans, rules):
        warnings.warn(
            f"the rule {pattern!r} has no effect: earlier rules match all of its parameters, and "
            "the first match counts; put it before them",
            UserWarning,
            stacklevel=4,
        )
    total = sum(math.prod(p.shape) for p in plans)
    by_name = [p for p in plans if p.reason == BY_NAME and not is_own_name(p.path)]
    if sum(math.prod(p.shape) for p in by_name) * 10 > total:
        largest = max(by_name, key=lambda p: math.prod(p.shape))
        warnings.warn(
            f"{largest.path} {largest.shape} and others are taken for parts of an embedding or an "
            "output head by a name further up, and not projected. If they are none, give a rule: "
            f"{suggested_rule(largest)}",
            UserWarning,
            stacklevel=4,
        )
    wanting = [p for p in plans if p.wants_rule]
    left = sum(math.prod(p.shape) for p in wanting)
    tried = [p for p in plans if p.reason.startswith("rank ")]
    if tried and not any(p.projected for p in plans) and left * 10 <= total:
        largest = max(tried, key=lambda p: math.prod(p.shape))
        warnings.warn(
            f"no parameter is projected: {largest.path} {largest.shape} is left alone for "
            f"{largest.reason}. Give a smaller rank.",
            UserWarning,
            stacklevel=4,
        )
    if left * 10 > total:
        largest = max(wanting, key=lambda p: math.prod(p.shape))
        warnings.warn(
            f"{100 * left / total:.0f} % of the parameters are not projected for want of a rule, "
            f"the largest being {largest.path} {largest.shape}. Pass {suggested_rule(largest)}, or "
            f"rules=[({own_pattern(largest)!r}, None)] to leave it at full rank.",
            UserWarning,
            stacklevel=4,
        )


def suggested_rule(leaf: LeafPlan) -> str:
    """A rule, as Python source, that would project ``leaf`` on its last two axes."""
    return f"rules=[({own_pattern(leaf)!r}, MatrixSpec({suggested_axes(leaf.shape)}))]"


def own_pattern(leaf: LeafPlan) -> str:
    """A pattern for a leaf that others do not match whose paths begin with its own."""
    return re.escape(leaf.path) + "$"


_local = threading.local()


def record(facts: Sequence[Any]) -> None:
    """Adds to the innermost open recording of this thread, if there is one."""
    recordings = getattr(_local, "recordings", None)
    if recordings:
        recordings[-1].extend(facts)


def recorded(tx: optax.GradientTransformation, params: Any) -> tuple[list[Any], Any]:
    """What the parts of ``tx`` record as they are initialised, and the shapes of its state."""
    with recording() as facts:
        # A function of its own each time: JAX would not run one that it has traced before.
        state = jax.eval_shape(lambda p: tx.init(p), params)
    return list(facts), state


def planned(tx: optax.GradientTransformation, params: Any) -> tuple[list[LeafPlan], Any]:
    """The plans of all projections in ``tx`` for ``params``, and the shapes of its state."""
    facts, state = recorded(tx, params)
    return [fact for fact in facts if isinstance(fact, LeafPlan)], state


@contextlib.contextmanager
def recording() -> Iterator[list[Any]]:
    """Collects what :func:`record` is given within the block."""
    recordings = _local.__dict__.setdefault("recordings", [])
    recordings.append([])
    try:
        yield recordings[-1]
    finally:
        recordings.pop()
