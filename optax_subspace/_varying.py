"""Arrays that differ between the devices of a ``shard_map``."""

from __future__ import annotations

from typing import Any

import jax


def varying_as(tree: Any, like: Any) -> Any:
    """``tree``, differing between the devices of a ``shard_map`` where ``like`` does.

    Branches and carries of loops have to agree in that.
    """

    def cast(x: Any) -> Any:
        axes = not_varying(x, like)
        return jax.lax.pcast(x, axes, to="varying") if axes else x

    return jax.tree.map(cast, tree)


def not_varying(x: Any, tree: Any) -> tuple[str, ...]:
    """The axes of a ``shard_map`` along which ``tree`` differs and ``x`` does not."""
    found = frozenset().union(*map(varying_axes, jax.tree.leaves(tree)))
    return tuple(sorted(found - varying_axes(x)))


def refuse_unchecked_axes() -> None:
    """Raises ValueError within a ``shard_map`` or ``pmap`` that does not track what varies."""
    mesh = jax.sharding.get_abstract_mesh()
    several = [name for name in mesh.manual_axes if mesh.shape[name] > 1]
    unchecked = [name for name in several if not varying_axes(jax.lax.axis_index(name))]
    if unchecked:
        raise ValueError(
            f"a gradient at the source over {unchecked[0]!r}, within a pmap or a shard_map with "
            "check_vma=False, where nothing tells which kernels the devices share: each would find "
            "bases of its own for such. Leave check_vma at True, or give jax.jit arrays that are "
            "split over the devices; models of their own can be run by jax.vmap"
        )


def varying_axes(x: Any) -> frozenset[str]:
    """The axes of a ``shard_map`` along which an array differs; none of what is only a shape."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return frozenset()
    kind = jax.typeof(x)
    # (JAX 0.9 has the axes at the type itself.)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
