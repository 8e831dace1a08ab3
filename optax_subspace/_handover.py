"""The leaf that ``subspace_project`` hands to ``in_subspace``, and to nobody else."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import jax

from optax_subspace._leaves import LeafPlan
from optax_subspace._refresh import Turn


@dataclasses.dataclass(eq=False, repr=False)
class LowRankUpdate:
    """One leaf between projection and lift: its low-rank gradient and the way back.

    Other optax transformations would compute with the wrong space, or with the basis itself, so
    this leaf refuses arithmetic, array attributes and flattening alike.

    Attributes:
      low: gradient of shape ``plan.low_shape``, zero if it was not finite.
      used: boolean scalar; where false, the leaf's update is zero and its inner state is kept.
      ready: boolean scalar, whether micro-batches are complete; None without accumulation.
      plan: the leaf's static plan.
      factor: factor on the lifted update, a Python number or a scalar array.
      dtype_out: dtype of the incoming gradient, which the update takes on again.
      rank: the rank given to the projection, for its error message.
      bases: the basis of each of ``plan.sides``.
      before, after: changes of basis that the moments go through before and after this update.
    """

    low: jax.Array
    used: jax.Array
    ready: jax.Array | None
    plan: LeafPlan
    factor: Any
    dtype_out: Any
    rank: int
    bases: tuple[jax.Array, ...] = ()
    before: Turn | None = None
    after: Turn | None = None


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    leaf = next((a for a in args if isinstance(a, LowRankUpdate)), None)
    where = f" of parameter {leaf.plan.path}" if leaf is not None else ""
    project = f"subspace_project(rank={leaf.rank if leaf is not None else '...'})"
    raise TypeError(
        f"the low-rank gradient{where} came from subspace_project to a transformation that works "
        f"in full space. Write optax.chain({project}, optax_subspace.scale_by_adam(), "
        f"optax.scale_by_learning_rate(1e-2)), or, for any other member X, optax.chain({project}, "
        "in_subspace(X), ...). Clipping of the whole gradient goes before subspace_project, "
        "learning rate and weight decay after the member in the subspace."
    )


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_OTHER = ("neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "len", "iter", "getitem")
_CONVERSIONS = ("array", "jax_array", "float", "int", "bool")
for _name in (*_BINARY, *(f"r{b}" for b in _BINARY), *_OTHER, *_CONVERSIONS):
    setattr(LowRankUpdate, f"__{_name}__", _refuse)
for _name in ("shape", "dtype", "ndim", "size", "T", "astype", "reshape", "sum", "mean"):
    setattr(LowRankUpdate, _name, property(_refuse))

jax.tree_util.register_pytree_node(LowRankUpdate, _refuse, _refuse)
