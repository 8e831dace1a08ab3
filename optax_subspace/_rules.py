"""Rules on the leaves of a parameter tree, as they are given, and what they may hold."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from optax_subspace._projectors import Projector
from optax_subspace._projectors._base import check_count, check_projector, is_number

SIDES = ("shorter", "longer", "left", "right", "both", "auto")


@runtime_checkable
class DimensionNumbers(Protocol):
    """Anything with optax's two axis fields, as ``optax.contrib.MuonDimensionNumbers`` has."""

    reduction_axis: Sequence[int] | int
    output_axis: Sequence[int] | int


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    """How one leaf is seen as a matrix (or a batch of matrices) and how it is projected.

    The axes have optax's names: ``reduction_axis`` becomes the rows (size ``m``),
    ``output_axis`` the columns (size ``n``); axes named in neither are batch axes, and each
    of their slices is projected on its own. Fields left at ``None`` take the value given to
    the transformation.

    Attributes:
      reduction_axis: axis or axes of the input of the linear map; None for the first of two. A leaf
        of more dimensions needs both named; a vector is left alone without.
      output_axis: axis or axes of its output; None for the second of two.
      rank: rank of this leaf's subspace.
      side: one of ``shorter``, ``longer``, ``left``, ``right``, ``both``, ``auto``.
      square_side: the side that ``shorter`` takes where ``m == n``: ``right`` as in GaLore's code,
        which has the output axis first, so that ``left`` is its choice for the same layer in Flax,
        whose kernels are (input, output).
      scale: factor on this leaf's lifted update, a number or a schedule.
      projector: rule that finds and follows this leaf's basis.
      batch_split: the number of devices that the batch axes are split over, in their order: an int
        for one, ``(1, 8)`` for a stack ``(L, E, ...)`` of experts whose ``E`` is split over eight.
        Projectors work on the slices of a leaf one after the other, and so on those of different
        devices at once, where they are. 1 for a batch that is not split.

    Raises:
      TypeError: an axis, ``rank``, ``scale`` or ``batch_split`` is no number, or ``projector`` no
        :class:`Projector`.
      ValueError: unknown ``side`` or ``square_side``, or ``rank`` below one.

    Example:
      >>> MatrixSpec(reduction_axis=1, output_axis=(2, 3)).output_axis  # (L, d, heads, head_dim)
      (2, 3)
    """

    reduction_axis: Sequence[int] | int | None = None
    output_axis: Sequence[int] | int | None = None
    rank: int | None = None
    side: str | None = None
    square_side: str = "right"
    scale: Any = None
    projector: Projector | None = None
    batch_split: Sequence[int] | int = 1

    def __post_init__(self):
        if self.projector is not None:
            check_projector("MatrixSpec: projector", self.projector)
        for field in ("reduction_axis", "output_axis"):
            axes = getattr(self, field)
            if axes is None:
                continue
            whole = isinstance(axes, Sequence) and not isinstance(axes, str)
            if not all(isinstance(a, int | np.integer) for a in (axes if whole else (axes,))):
                raise TypeError(f"MatrixSpec: {field} must be an axis or axes, got {axes!r}")
        if self.rank is not None:
            check_count("rank", self.rank)
        if self.side is not None:
            check_side(self.side)
        if self.square_side not in ("left", "right"):
            raise ValueError(
                f"MatrixSpec: square_side must be left or right, got {self.square_side!r}"
            )
        if self.scale is not None:
            check_scale("MatrixSpec: scale", self.scale)
        for devices in as_tuple(self.batch_split):
            check_count("batch_split", devices)


Rules = Sequence[tuple[str, "DimensionNumbers | None"]]


def check_scale(name: str, scale: Any) -> None:
    """Raises unless ``scale`` is a real number, which may be traced, or a schedule."""
    if not (is_number(scale) or callable(scale)):
        raise TypeError(f"{name} must be a number or a schedule, got {scale!r}")


def check_side(side: Any) -> None:
    """Raises unless ``side`` names a side policy."""
    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")


def rules_of(given: Any) -> tuple[Any, ...] | None:
    """The rules, which may be an iterator."""
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"rules must be a list of pairs (regex, spec), got {given!r}")
    return tuple(given)


def compile_rules(rules: Rules | None) -> list[tuple[re.Pattern[str], DimensionNumbers | None]]:
    compiled = []
    for rule in rules_of(rules) or ():
        if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) != 2:
            raise TypeError(f"a rule is a pair (regex, spec), got {rule!r}")
        pattern, spec = rule
        # (Of classes the axes, that the protocol asks for, are descriptors.)
        if isinstance(spec, type) or not isinstance(spec, DimensionNumbers | None):
            raise TypeError(
                f"the spec of rule {pattern!r} is {spec!r}: give MatrixSpec(reduction_axis=..., "
                "output_axis=...), one of optax's dimension numbers, or None"
            )
        compiled.append((compile_pattern(pattern), spec))
    return compiled


def compile_pattern(pattern: Any) -> re.Pattern[str]:
    """A rule's pattern; raises if it is no regular expression."""
    if not isinstance(pattern, str | re.Pattern):
        raise TypeError(f"a rule's pattern must be a regular expression, got {pattern!r}")
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ValueError(f"the rule's pattern {pattern!r} is no regular expression: {e}") from e


def as_tuple(value: Sequence[int] | int) -> tuple[int, ...]:
    return (int(value),) if isinstance(value, int | np.integer) else tuple(value)
