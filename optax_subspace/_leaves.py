"""Which leaves of a parameter tree are matrices, and how each one is projected.

A leaf's plan is a static function of the rules and of the shapes. Nothing of it is
stored in an optimizer's state, so a plan can be printed, tested and compared without
running anything.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_subspace._blocks import is_box, is_variable
from optax_subspace._projectors import Projector
from optax_subspace._rules import MatrixSpec, as_tuple

# Tables indexed by token ids get sparse gradients whose rows are not mixed by a matrix
# product, and the output head is their mirror image: GaLore leaves both at full rank.
EMBEDDING_OR_HEAD = re.compile(
    r"(^|/)(\w*embed\w*|wte|wpe|lm_head|head|output_head)(/|$)", re.IGNORECASE
)
BY_NAME = "embedding or output head by its name"


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What happens to one leaf.

    Attributes:
      path: the leaf's path, keys joined by ``/``.
      shape: the leaf's shape.
      dtype: the leaf's dtype.
      reason: why the leaf is projected as it is, or left alone.
      sides: ``("left",)``, ``("right",)``, ``("left", "right")``, or ``()`` if left alone.
      rank: the rank of the subspace, 0 if left alone.
      batch, reduction, output: axes of the leaf.
      scale: factor on the lifted update, a number or a schedule; of :func:`plan` alone, which knows
        no factor for all leaves, a rule's own or ``None``.
      projector: override by a rule, ``None`` for the transformation's own.
      batch_split: the devices that each batch axis is split over.
      wants_rule: the leaf could be projected, and is not for want of a rule.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    reason: str
    sides: tuple[str, ...] = ()
    rank: int = 0
    batch: tuple[int, ...] = ()
    reduction: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    scale: Any = None
    projector: Projector | None = None
    batch_split: tuple[int, ...] = ()
    wants_rule: bool = False

    @property
    def projected(self) -> bool:
        return bool(self.sides)

    @property
    def side(self) -> str | None:
        """``left``, ``right``, ``both``, or None if the leaf is left alone."""
        return "both" if len(self.sides) == 2 else self.sides[0] if self.sides else None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.batch)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(m, n)``: rows (reduction) and columns (output) of each slice."""
        m = math.prod(self.shape[a] for a in self.reduction)
        return m, math.prod(self.shape[a] for a in self.output)

    @property
    def low_shape(self) -> tuple[int, ...]:
        """Shape of the low-rank gradient and moments; the leaf's own if it is left alone."""
        if not self.projected:
            return self.shape
        m, n = self.matrix_shape
        rows = self.rank if "left" in self.sides else m
        columns = self.rank if "right" in self.sides else n
        return (*self.batch_shape, rows, columns)

    @property
    def basis_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of the basis on each side: ``(*batch, m, r)`` left, ``(*batch, n, r)`` right."""
        length = dict(zip(("left", "right"), self.matrix_shape, strict=True))
        return tuple((*self.batch_shape, length[s], self.rank) for s in self.sides)


def is_own_name(path: str) -> bool:
    """Whether an embedding's or head's name is the leaf's own or its module's.

    Example:
      >>> is_own_name("decoder/lm_head/kernel"), is_own_name("embedder/layer_0/mlp/kernel")
      (True, False)
    """
    return EMBEDDING_OR_HEAD.search("/".join(path.split("/")[-2:])) is not None


def path_name(path: Sequence[Any]) -> str:
    """Joins the keys of a tree path by ``/``; a tree that is one bare array has ``(root)``.

    Example:
      >>> import jax
      >>> path_name(jax.tree_util.tree_flatten_with_path({"a": [1.0]})[0][0][0])
      'a/0'
    """
    return "/".join(map(_key_name, path)) or "(root)"


def leaf_names(tree: Any) -> list[str]:
    """The names of a tree's leaves, in order; one in a variable of NNX, or in a box of Linen's
    (``nn.with_partitioning``), has that of the variable or box.

    Example:
      >>> leaf_names({"a": [1.0, 2.0], "b": 3.0})
      ['a/0', 'a/1', 'b']
    """
    boxed = lambda x: is_variable(x) or is_box(x)
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=boxed)
    return [path_name(path) for path, node in nodes for _ in jax.tree.leaves(node)]


def _key_name(key: Any) -> str:
    for field in ("key", "idx", "name"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def can_learn(dtype: Any) -> bool:
    """Whether parameters of it can: real floating-point numbers of at least 16 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16


def plan_leaf(path, leaf, rules, rank, side) -> LeafPlan:
    """The plan of one leaf; under ``auto`` its ``sides`` are ``("auto",)``, yet to be decided."""
    shape = tuple(jnp.shape(leaf))
    dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
    if not can_learn(dtype):
        raise TypeError(
            f"parameter {path} has dtype {dtype}: only real floating-point leaves of at least 16 "
            "bits can be optimized. Leave it out with optax.masked or optax.multi_transform."
        )
    dtype = jnp.result_type(dtype)  # that of a NumPy array may be wider than JAX's
    leave = lambda reason, **kw: LeafPlan(path, shape, dtype, reason, **kw)
    for pattern, spec in rules:
        if pattern.search(path):
            if spec is None:
                return leave(f"left alone by rule {pattern.pattern!r}")
            return _plan_matrix(path, shape, dtype, spec, rank, side, f"rule {pattern.pattern!r}")
    if EMBEDDING_OR_HEAD.search(path):
        return leave(BY_NAME)
    if len(shape) < 2 or sorted(shape)[-2] == 1:
        return leave("not a matrix")
    if len(shape) > 2:
        return leave(f"{len(shape)} dimensions and no rule", wants_rule=True)
    return _plan_matrix(path, shape, dtype, MatrixSpec(), rank, side, "matrix")


def _plan_matrix(path, shape, dtype, spec, rank, side, reason) -> LeafPlan:
    if spec.reduction_axis is None and len(shape) < 2:
        return LeafPlan(path, shape, dtype, "not a matrix")
    reduction, output = _axes(path, shape, spec)
    batch = tuple(a for a in range(len(shape)) if a not in reduction + output)
    override = spec if isinstance(spec, MatrixSpec) else MatrixSpec()
    split = _batch_split(path, tuple(shape[a] for a in batch), override.batch_split)
    rank = override.rank or rank
    m = math.prod(shape[a] for a in reduction)
    n = math.prod(shape[a] for a in output)
    if math.prod(shape) == 0:
        return LeafPlan(path, shape, dtype, "empty")
    sides = _sides(override.side or side, m, n, override.square_side)
    if rank >= min(m, n):
        reason = f"rank {rank} >= min({m}, {n})"
        if sides != ("auto",):
            return LeafPlan(path, shape, dtype, reason)
        rank = min(m, n)
    return LeafPlan(
        path,
        shape,
        dtype,
        reason,
        sides=sides,
        rank=int(rank),
        batch=batch,
        reduction=reduction,
        output=output,
        scale=override.scale,
        projector=override.projector,
        batch_split=split,
    )


def suggested_axes(shape: Sequence[int]) -> str:
    """The last two axes, as arguments of :class:`MatrixSpec`."""
    return f"reduction_axis={len(shape) - 2}, output_axis={len(shape) - 1}"


def _batch_split(path, batch_shape, split) -> tuple[int, ...]:
    """The devices of each batch axis."""
    devices = as_tuple(split)
    if all(d == 1 for d in devices):
        return (1,) * len(batch_shape)
    if len(devices) != len(batch_shape) or any(
        size % d for size, d in zip(batch_shape, devices, strict=True)
    ):
        raise ValueError(
            f"parameter {path} has batch axes of sizes {batch_shape}: batch_split={split} of its "
            "rule must give for each of them a number that divides it"
        )
    return devices


def _sides(side: str, m: int, n: int, square_side: str) -> tuple[str, ...]:
    # Ties are those of the references: optax.contrib.galore takes the left side of a square matrix.
    if side == "shorter":
        return (square_side,) if m == n else ("right",) if m > n else ("left",)
    if side == "longer":
        return ("left",) if m >= n else ("right",)
    return ("left", "right") if side == "both" else (side,)


def _axes(path, shape, spec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    given = spec.reduction_axis, spec.output_axis
    if None in given:
        if given != (None, None) or len(shape) != 2:
            raise ValueError(
                f"parameter {path} has shape {shape}: its rule must name both axes, such as "
                f"{suggested_axes(shape)}, or be None to leave it at full rank"
            )
        return (0,), (1,)

    def normalize(axis):
        axes = as_tuple(axis)
        for a in axes:
            if not -len(shape) <= a < len(shape):
                raise ValueError(
                    f"parameter {path} of shape {shape} has no axis {a}: correct "
                    f"reduction_axis={spec.reduction_axis}, output_axis={spec.output_axis} of its "
                    "rule"
                )
        return tuple(a % len(shape) for a in axes)

    reduction, output = normalize(spec.reduction_axis), normalize(spec.output_axis)
    both = reduction + output
    if not reduction or not output or len(set(both)) != len(both):
        raise ValueError(
            f"parameter {path} of shape {shape}: reduction_axis={spec.reduction_axis} and "
            f"output_axis={spec.output_axis} must each name an axis and share none"
        )
    return reduction, output
