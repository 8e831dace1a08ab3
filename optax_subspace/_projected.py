"""Gradients that arrive low-rank, and what comes with them for the bases."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from optax_subspace._leaves import LeafPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projected:
    """A gradient that arrives in the subspace: a leaf of :func:`subspace_value_and_grad`'s tree.

    Attributes:
      low: ``P^T G``, ``G Q`` or ``P^T G Q``, in the arithmetic's dtype.
      shape: the parameter's.
      dtype: the parameter's, which the update takes on.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> gradient = Projected(jnp.ones((2, 4)), (8, 4), jnp.dtype("float32"))
      >>> jax.tree.map(lambda low: low / 2, gradient).low.shape, gradient.shape
      ((2, 4), (8, 4))
    """

    low: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})


class SourceBasis(NamedTuple):
    """What a backward pass has found for the basis of one parameter; batch axes in front.

    Attributes:
      products: ``G G^T P / ||G||_F^2`` of each side ``(*batch, m, r)``, for rules that follow, with
        an estimate of the norm.
      energies: the share of the gradient within the basis of each side ``(*batch,)``, by the same
        estimate; -1 without any gradient.
      bases: new bases, and ``rules`` the rule's states with them, where ``done``; empty if the pass
        refreshes none.
      done: boolean ``(*batch,)``.
      uses: float32 ``(*batch,)``, how often the kernel was used; a basis moves only if once.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_subspace import galore, subspace_value_and_grad
      >>> tx, params = galore(0.1, rank=2), {"w": jnp.eye(8, 4)}
      >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
      >>> grad = subspace_value_and_grad(loss, tx)
      >>> _, _, source = grad(params, tx.init(params), jnp.ones((16, 8)))
      >>> source["w"].bases[0].shape, bool(source["w"].done), float(source["w"].uses)
      ((4, 2), True, 1.0)
    """

    products: tuple[jax.Array, ...]
    energies: tuple[jax.Array, ...]
    bases: tuple[jax.Array, ...]
    rules: tuple[Any, ...]
    done: jax.Array
    uses: jax.Array


def is_projected(leaf: Any) -> bool:
    return isinstance(leaf, Projected)


def found_at_source(source: dict[str, SourceBasis] | None, plan: LeafPlan) -> SourceBasis:
    """What a backward pass has found for the leaf of a plan.

    Raises:
      ValueError: nothing, or the leaf isn't projected by this transformation.
    """
    if not plan.projected:
        raise ValueError(
            f"parameter {plan.path}: its gradient was projected at the source, and these settings "
            f"leave it alone ({plan.reason}): give subspace_value_and_grad the transformation that "
            "takes its gradients, and if another member of a chain projects it, have "
            "optax.multi_transform give each parameter to one of them"
        )
    if source is None or plan.path not in source:
        raise ValueError(
            f"parameter {plan.path}: its gradient was projected at the source, without which the "
            "basis can't be found: pass on what subspace_value_and_grad returns, "
            "tx.update(gradients, state, params, source=source)"
        )
    return source[plan.path]


def in_full_shape(tree: Any) -> Any:
    """``tree`` with the shape of its parameter in place of each :class:`Projected` leaf."""
    whole = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_projected(x) else x
    return jax.tree.map(whole, tree, is_leaf=is_projected)
