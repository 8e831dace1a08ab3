"""Shardings of an optimizer's state, derived from the parameters' own."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_subspace._blocks import Quantized, has_quantized, is_quantized, parts_of
from optax_subspace._describe import planned
from optax_subspace._inner_state import map_leaves
from optax_subspace._leaves import LeafPlan, leaf_names
from optax_subspace._projection_state import LeafBasis, ProjectionState, plan_of

_Axes = tuple[str, ...] | None  # mesh axes that one axis of an array is split over


def refuse_explicit_axes(mesh: Any, where: str = "") -> None:
    """Raises ValueError for a mesh, an abstract one too, with explicit axes."""
    if any(kind == AxisType.Explicit for kind in mesh.axis_types):
        raise ValueError(
            f"{where}the mesh has explicit axes {mesh.axis_names}, for which JAX asks shardings of "
            "products: make it with jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) "
            f"* {len(mesh.axis_names)}), or give jax.sharding.Mesh"
        )


def refuse_explicit_split(x: Any, path: str) -> None:
    """Raises ValueError for an array that is split over explicit axes of a mesh."""
    sharding = jax.typeof(x).sharding
    if any(sharding.spec):
        refuse_explicit_axes(sharding.mesh, f"parameter {path} is split, and ")


def state_shardings(tx: optax.GradientTransformation, params: optax.Params) -> Any:
    """The shardings that keep ``tx``'s state beside the parameters that it belongs to.

    Bases are split along the projected axis as the weight is, moments along the other one, batch
    axes as the weight's, and the rank axis never. So each device projects and lifts its own part;
    a step moves at most a low-rank gradient between devices, and no full weight or gradient. (One
    exception: ``svd`` of a gradient that is split along its shorter side, and
    ``svd(method="lapack")`` of any that is split, gather that one matrix at its refresh. ``svd`` is
    the default of ``galore``, and finds the first basis of rules that follow:
    ``subspace_iteration()`` and ``history_pca(first=subspace_iteration())`` gather nothing.) A leaf
    that is split along a batch axis needs ``batch_split`` in its rule, or it is gathered at each
    step, of which a warning tells. (Where the longer side is split, ``svd`` adds up its Gram matrix
    over the devices at a refresh, the shorter side squared: as much as a square matrix itself.)
    What belongs to no parameter, such as a counter, is on every device.

    Args:
      tx: any transformation, with or without projections of this library in it.
      params: tree of arrays, or of ``jax.ShapeDtypeStruct`` with a ``sharding``, all of them
        ``NamedSharding`` of one mesh.

    Returns:
      A tree of ``NamedSharding`` in the structure of ``tx.init(params)``, for ``jax.jit``.

    Raises:
      ValueError: a parameter has no ``NamedSharding`` or is a :class:`QuantizedWeight`, or its
        mesh has explicit axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
      >>> from optax_subspace import galore, state_shardings
      >>> tx, mesh = galore(1e-2, rank=2), Mesh(jax.devices()[:1], ("model",))
      >>> by_columns = NamedSharding(mesh, PartitionSpec(None, "model"))
      >>> params = {"w": jax.device_put(jnp.ones((8, 16)), by_columns)}
      >>> shardings = state_shardings(tx, params)
      >>> shardings[0].inner.mu["w"].spec, shardings[0].projection.leaves["w"].bases[0].spec
      (P(None, 'model'), P())
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
    """
    if has_quantized(params):
        raise ValueError(
            "some parameters are QuantizedWeight nodes, the state belongs to their arrays: give "
            "the tree as it was before quantize_weights, or shapes of it with its shardings"
        )
    flat, structure = jax.tree.flatten(params)
    names = leaf_names(params)
    specs, mesh = {}, None
    for name, leaf in zip(names, flat, strict=True):
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"parameter {name} has the sharding {sharding}: place the parameters "
                "with jax.sharding.NamedSharding first"
            )
        mesh = sharding.mesh
        specs[name] = _axes_of(sharding.spec, len(leaf.shape))
    if mesh is None:
        return jax.tree.map(lambda _: None, jax.eval_shape(tx.init, params))
    refuse_explicit_axes(mesh)
    plans, state = planned(tx, params)
    for plan in plans:
        batch = _batch_axes(plan, specs[plan.path])
        devices = tuple(math.prod(mesh.shape[name] for name in axes or ()) for axes in batch)
        if plan.projected and any(s % d for s, d in zip(plan.batch_split, devices, strict=True)):
            warnings.warn(
                f"parameter {plan.path} is split along its batch axes {plan.batch}, over which "
                "projectors loop: each step gathers its gradient. Give its rule "
                f"MatrixSpec(..., batch_split={devices})",
                UserWarning,
                stacklevel=2,
            )
        for group in (plan.reduction, plan.output) if plan.projected else ():
            spec = specs[plan.path]
            major = _major(plan, group)
            if any(spec[axis] for axis in group if axis != major):
                warnings.warn(
                    f"parameter {plan.path} is split along one of the axes {group}, which the "
                    f"projection joins, but not along the first of them, {major}: each step "
                    "gathers its gradient. Split that one, or an axis of the other side",
                    UserWarning,
                    stacklevel=2,
                )
    full_shapes = {name: leaf.shape for name, leaf in zip(names, flat, strict=True)}

    def named(axes: tuple[_Axes, ...] = ()) -> NamedSharding:
        while axes and axes[-1] is None:
            axes = axes[:-1]
        entries = [a[0] if a is not None and len(a) == 1 else a for a in axes]
        return NamedSharding(mesh, PartitionSpec(*entries))

    def of_stored(x: Any, axes: tuple[_Axes, ...]) -> Any:
        """An array that is split so, or the blocks of one."""
        if not is_quantized(x):
            return named(axes)
        count = lambda a: math.prod(mesh.shape[name] for name in a or ())
        whole = _block_axes(x, axes, count)
        if whole is None:
            parts = math.lcm(*map(count, axes))
            warnings.warn(
                f"an array of shape {x.shape} is split over {axes}, and its blocks are not: each "
                f"device keeps all of it. Give quantize_state(..., shards={parts}), or another "
                "multiple of it that divides the lengths of these axes",
                UserWarning,
                stacklevel=2,
            )
            whole = ()
        codes, scales = named(whole), named(whole[: x.scales.ndim])
        return type(x)(codes, scales, x.slice_shape, x.dtype, x.layout)

    def of_array(name: str, x: Any) -> Any:
        """An array that belongs to a parameter: of its shape, of its subspace's, or of another."""
        for plan in plans:
            if plan.path == name and plan.projected and x.shape == plan.low_shape:
                rows, columns = _matrix_axes(plan, specs[name])
                rows = None if "left" in plan.sides else rows
                columns = None if "right" in plan.sides else columns
                return of_stored(x, (*_batch_axes(plan, specs[name]), rows, columns))
        return of_stored(x, specs[name] if x.shape == full_shapes[name] else ())

    def of_basis(plan: LeafPlan, leaf: LeafBasis) -> LeafBasis:
        batch = _batch_axes(plan, specs[plan.path])
        sides = dict(zip(("left", "right"), _matrix_axes(plan, specs[plan.path]), strict=True))

        def of_rule(state: Any, basis: Any, side: str) -> Any:
            of_basis_shape = lambda x: x.shape == basis.shape
            like_basis = named((*batch, sides[side], None))
            return jax.tree.map(lambda x: like_basis if of_basis_shape(x) else named(batch), state)

        bases = tuple(
            of_stored(b, (*batch, sides[s], None))
            for b, s in zip(leaf.bases, plan.sides, strict=True)
        )
        rule = tuple(map(of_rule, leaf.rule, leaf.bases, plan.sides))
        rest = jax.tree.map(lambda _: named(batch), leaf._replace(bases=(), rule=()))
        return rest._replace(bases=bases, rule=rule)

    def of_projection(node: ProjectionState) -> Any:
        leaves = {n: of_basis(plan_of(plans, n, leaf), leaf) for n, leaf in node.leaves.items()}
        shardings: Any = {
            "steps": named(),
            "leaves": leaves,
            "skipped": jax.tree.map(lambda _: named(), node.skipped),
            "accumulated": {name: of_array(name, x) for name, x in node.accumulated.items()},
        }
        return ProjectionState(**shardings)

    def of_part(name: str | None, part: Any) -> Any:
        if isinstance(part, _Boxed):
            return of_projection(part.node)
        one = lambda x: of_stored(x, ()) if name is None else of_array(name, x)
        return jax.tree.map(one, part, is_leaf=is_quantized)

    # A projection's state is no inner state: kept out of the search for parts like the parameters.
    is_projection = lambda x: isinstance(x, ProjectionState)
    boxed = jax.tree.map(
        lambda x: _Boxed(x) if is_projection(x) else x, state, is_leaf=is_projection
    )
    return map_leaves(
        lambda index, path, part: of_part(names[index], part),
        lambda part: of_part(None, part),
        structure,
        boxed,
    )


@dataclasses.dataclass
class _Boxed:
    """A node that tree functions take for a leaf."""

    node: ProjectionState


def _block_axes(
    x: Quantized, axes: tuple[_Axes, ...], devices: Callable[[_Axes], int]
) -> tuple[_Axes, ...] | None:
    """How codes and scales are split if the array is split over ``axes``; None if they can't be."""
    axes = axes + (None,) * (len(x.shape) - len(axes))
    batch, own = axes[: x.batch], axes[x.batch :]
    parts = parts_of(x.slice_shape, x.layout.shards)
    if all(k % devices(a) == 0 for k, a in zip(parts, own, strict=True)):
        return (*batch, *(a for k, a in zip(parts, own, strict=True) if k > 1))
    # Rows are consecutive, so that parts of them are blocks.
    rows_alone = all(k == 1 for k in parts) and not any(own[1:])
    if rows_alone and math.prod(x.slice_shape) % (devices(own[0]) * x.layout.block) == 0:
        return (*batch, own[0])
    return None


def _axes_of(spec: PartitionSpec, ndim: int) -> tuple[_Axes, ...]:
    entries = [None if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return tuple(entries) + (None,) * (ndim - len(entries))


def _batch_axes(plan: LeafPlan, spec: tuple[_Axes, ...]) -> tuple[_Axes, ...]:
    return tuple(spec[a] for a in plan.batch)


def _matrix_axes(plan: LeafPlan, spec: tuple[_Axes, ...]) -> tuple[_Axes, _Axes]:
    """The mesh axes of a matrix' rows and columns.

    Where several axes of the leaf make one of the matrix, a split of the first one larger than 1
    stays a split of it; one of a later axis alone would interleave, and is given up.
    """

    return spec[_major(plan, plan.reduction)], spec[_major(plan, plan.output)]


def _major(plan: LeafPlan, axes: tuple[int, ...]) -> int:
    """The first of the joined axes whose split is one of the whole."""
    return next((a for a in axes if plan.shape[a] > 1), axes[0])
