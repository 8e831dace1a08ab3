"""What the subspaces are doing: pure functions of a state and a gradient."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_subspace._blocks import dequantize, without_variables
from optax_subspace._describe import planned
from optax_subspace._leaves import LeafPlan, leaf_names
from optax_subspace._projected import in_full_shape, is_projected
from optax_subspace._projection import compute_dtype, largest, project, to_matrices
from optax_subspace._projection_state import LeafBasis, ProjectionState, plan_of


class SubspaceMetrics(NamedTuple):
    """One leaf's subspace, with the leaf's batch axes in front.

    Attributes:
      captured_energy: float32 ``(*batch,)``, the part of the gradient's squared Frobenius norm
        within the span of the basis, in [0, 1]; 0 for a gradient of zeros or without a basis, NaN
        for one that is :class:`Projected`, of which no more is known.
      drift: float32 ``(*batch,)``, one minus the mean squared cosine of the principal angles
        between the last two bases; 0 if the subspace stood still. (That of a rule that follows is
        measured at every tenth gradient of a leaf, unless moments are turned.)
      refreshes: int32 ``(*batch,)``, how often the projector's ``update`` gave a basis.
      skipped: int32 scalar, how often the leaf's gradient was not finite.
    """

    captured_energy: jax.Array
    drift: jax.Array
    refreshes: jax.Array
    skipped: jax.Array


def subspace_metrics(
    tx: optax.GradientTransformation, state: optax.OptState, updates: optax.Updates
) -> dict[str, SubspaceMetrics]:
    """Measures every projected leaf: how much of a gradient its basis captures, and how it moves.

    A pure function of ``state`` and ``updates``, which may be traced. It costs a QR of each basis
    and one projection, so call it at evaluations rather than at every step.

    Args:
      tx: the transformation that ``state`` is of; chains, masks and wrappers are looked into.
      state: its state; also a ``flax.training.TrainState``, or the ``opt_state`` of an NNX
        optimizer.
      updates: gradients of the parameters' shapes, or those of :func:`subspace_value_and_grad`.

    Returns:
      The metrics by the leaf's path.

    Raises:
      ValueError: the state is of another transformation, or of other parameters; or two members
        of a chain project one leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_subspace import galore, subspace_metrics
      >>> tx, params = galore(1e-2, rank=2), {"w": jnp.ones((8, 4))}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> metrics = subspace_metrics(tx, state, params)["w"]
      >>> round(float(metrics.captured_energy), 4), int(metrics.refreshes)
      (1.0, 1)
    """
    updates, state = without_variables((updates, state))
    leaves = jax.tree.leaves(updates, is_leaf=is_projected)
    full = in_full_shape(updates)
    plans, _ = planned(tx, full)
    gradients = dict(zip(leaf_names(full), leaves, strict=True))
    is_projection = lambda x: isinstance(x, ProjectionState)
    found = {}
    for node in jax.tree.leaves(state, is_leaf=is_projection):
        if not is_projection(node) or not isinstance(node.leaves, dict):
            continue
        for name, leaf in node.leaves.items():
            if name not in gradients:
                raise ValueError(
                    f"the state has a basis of parameter {name}, and there is no such gradient: "
                    "give the gradients of the parameters that the state is of"
                )
            if name in found:
                raise ValueError(
                    f"parameter {name} is projected by two members of the transformation, and one "
                    "of them is not given its gradient: measure each alone, with its own state"
                )
            gradient, plan = gradients[name], plan_of(plans, name, leaf)
            # (An array of NaN is made for those alone: it ends a search for NaNs.)
            found[name] = SubspaceMetrics(
                jnp.full(plan.batch_shape, jnp.nan, jnp.float32)
                if is_projected(gradient)
                else captured_energy(gradient, leaf, plan),
                leaf.drift,
                leaf.refreshes,
                node.skipped[name],
            )
    return found


def captured_energy(gradient: jax.Array, leaf: LeafBasis, plan: LeafPlan) -> jax.Array:
    """``||Q^T G||_F^2 / ||G||_F^2`` per slice, ``Q`` an orthonormal basis of the basis' span."""
    matrices = to_matrices(gradient.astype(compute_dtype(gradient.dtype)), plan)
    matrices = matrices / largest(matrices, (-2, -1))
    started = leaf.refreshes > 0
    spans = tuple(_spans(dequantize(b).astype(matrices.dtype)) for b in leaf.bases)
    inside = jnp.sum(project(matrices, spans, plan) ** 2, axis=(-2, -1))
    total = jnp.sum(matrices**2, axis=(-2, -1))
    share = jnp.minimum(inside / jnp.where(total > 0, total, 1), 1)
    return jnp.where(started & jnp.isfinite(share), share, 0).astype(jnp.float32)


def _spans(bases: jax.Array) -> jax.Array:
    """Orthonormal bases of the same spans, one after the other (see ``_refresh.in_slices``).

    Columns of zeros where a basis has fewer directions than columns.
    """

    def span(basis):
        q, r = jnp.linalg.qr(basis)
        within, sizes, _ = jnp.linalg.svd(r)
        least = jnp.finfo(basis.dtype).eps * max(basis.shape) * sizes[0]
        return jnp.where(sizes > least, q @ within, 0)

    stack = bases.reshape(-1, *bases.shape[-2:])
    return jax.lax.map(span, stack).reshape(bases.shape)
