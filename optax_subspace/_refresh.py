"""How a projector's rule is applied to the slices of one leaf: pure functions on arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_subspace._leaves import LeafPlan
from optax_subspace._projectors import Projector


class Refreshed(NamedTuple):
    """One side of a leaf after its rule was applied.

    Attributes:
      basis: ``(*batch, m, r)``.
      rule: the rule's state.
      done: boolean ``(*batch,)``, the slices that have a new basis.
      overlap: float32 ``(*batch,)``, mean squared cosine of the principal angles between the old
        and the new basis, where ``done``.
      rotation: ``P'^T P`` of shape ``(*batch, r, r)``, zero where not ``done``; None if not asked
        for.
    """

    basis: jax.Array
    rule: Any
    done: jax.Array
    overlap: jax.Array
    rotation: jax.Array | None


class Turn(NamedTuple):
    """A change of basis, as the moments see it.

    Attributes:
      done: boolean ``(*batch,)``, the slices whose basis changed.
      rotations: ``P'^T P`` of each side, ``(*batch, r, r)``; None to forget the moments.
    """

    done: jax.Array
    rotations: tuple[jax.Array, ...] | None

    def apply(self, moment: jax.Array, plan: LeafPlan, squared: bool) -> jax.Array:
        """A moment ``plan.low_shape`` in the new basis: ``P'^T P R``, squared weights for squares.

        With ``E[(sum_j c_j x_j)^2] = sum_j c_j^2 E[x_j^2]`` for coordinates that are uncorrelated,
        as those in singular vectors are, second moments take the squared weights.
        """
        if self.rotations is None:
            return jnp.where(self.done[..., None, None], 0, moment)
        rotations = self.rotations

        def turn_slice(i, moments):
            new = jax.lax.dynamic_index_in_dim(moments, i, keepdims=False)
            for side, rotation in zip(plan.sides, flat, strict=True):
                weights = jax.lax.dynamic_index_in_dim(rotation, i, keepdims=False)
                weights = weights**2 if squared else weights
                new = weights @ new if side == "left" else new @ weights.T
            return jax.lax.dynamic_update_index_in_dim(moments, new.astype(moments.dtype), i, 0)

        flat = [r.reshape(-1, *r.shape[-2:]) for r in rotations]
        stack = moment.reshape(-1, *moment.shape[-2:])
        return in_due_slices(self.done.reshape(-1), turn_slice, stack).reshape(moment.shape)


def in_due_slices(due: jax.Array, body: Any, carry: Any) -> Any:
    """Runs ``carry = body(i, carry)`` for each ``i`` with ``due[i]``.

    A loop over the due slices only: on most steps it has no turn, and its carried buffers are
    updated in place, where a branch would keep the old and the new stack.
    """
    order = jnp.argsort(~due, stable=True)
    turns = jnp.sum(due, dtype=jnp.int32)
    return jax.lax.fori_loop(0, turns, lambda i, c: body(order[i], c), carry)


def refresh(
    rule: Projector,
    due: jax.Array,
    matrices: jax.Array,
    side: str,
    basis: jax.Array,
    state: Any,
    rotate: bool,
) -> Refreshed:
    """Applies ``rule.update`` to those slices of ``(*batch, m, n)`` that are due."""
    batch = due.shape
    flat = lambda x: x.reshape(-1, *x.shape[len(batch) :])
    matrices, due = flat(matrices), due.reshape(-1)

    def refresh_slice(i, carry: Refreshed):
        take = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0)
        gradient, old = take(matrices), jax.tree.map(take, (carry.basis, carry.rule))
        gradient = gradient if side == "left" else gradient.T
        # Scaled, so that a rule's squares neither overflow nor vanish.
        tiny = jnp.finfo(gradient.dtype).tiny
        scaled = lambda: gradient / jnp.maximum(jnp.max(jnp.abs(gradient)), tiny)
        # The branch keeps XLA from computing, ahead of the loop and so on every step, whatever the
        # rule needs of a gradient that is the only slice of its leaf.
        new = jax.lax.cond(take(due), lambda: checked(rule.update, scaled(), *old), lambda: old)
        rotation, overlap = compare(new[0], old[0])
        return Refreshed(
            basis=put(carry.basis, new[0]),
            rule=jax.tree.map(put, carry.rule, new[1]),
            done=put(carry.done, True),
            overlap=put(carry.overlap, overlap),
            rotation=None if carry.rotation is None else put(carry.rotation, rotation),
        )

    return in_slices(due, refresh_slice, flat, basis, state, rotate, batch, matrices.dtype)


def follow(
    rule: Projector,
    moves: jax.Array,
    matrices: jax.Array,
    side: str,
    coordinates: jax.Array,
    basis: jax.Array,
    state: Any,
    rotate: bool,
) -> Refreshed:
    """One step of ``rule.follow`` in those slices of ``(*batch, m, n)`` that move.

    ``coordinates`` are the gradient's in ``basis``: ``P^T G`` ``(*batch, r, n)`` on the left side,
    ``G Q`` ``(*batch, m, r)`` on the right.
    """
    assert rule.follow is not None
    batch = moves.shape
    flat = lambda x: x.reshape(-1, *x.shape[len(batch) :])
    matrices, coordinates, moves = flat(matrices), flat(coordinates), moves.reshape(-1)

    def follow_slice(i, carry: Refreshed):
        take = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0)
        matrix, low, old = take(matrices), take(coordinates), take(carry.basis)
        state = jax.tree.map(take, carry.rule)
        # Scaled, so that squares neither overflow nor vanish.
        scale = jnp.maximum(jnp.max(jnp.abs(low)), jnp.finfo(matrix.dtype).tiny)
        squared = jnp.sum((matrix / scale) ** 2)
        low = low / scale
        product = matrix @ low.T if side == "left" else matrix.T @ low
        product = product / jnp.where(squared > 0, squared, 1) / scale
        new = checked(rule.follow, product, old, state)
        moved = squared > 0
        new = jax.tree.map(lambda n, o: jnp.where(moved, n, o), new, (old, state))
        rotation, overlap = compare(new[0], old)
        return Refreshed(
            basis=put(carry.basis, new[0]),
            rule=jax.tree.map(put, carry.rule, new[1]),
            done=put(carry.done, moved),
            overlap=put(carry.overlap, overlap),
            rotation=None if carry.rotation is None else put(carry.rotation, rotation),
        )

    return in_slices(moves, follow_slice, flat, basis, state, rotate, batch, matrices.dtype)


def in_slices(
    due: jax.Array,
    body: Any,
    flat: Any,
    basis: jax.Array,
    state: Any,
    rotate: bool,
    batch: tuple[int, ...],
    dtype: Any,
) -> Refreshed:
    """Runs ``body`` on the slices that are due, from bases that nothing has been done to.

    One slice after the other, for rules that follow too: batched, the LAPACK calls of several
    leaves wait for each other's threads on a CPU with few, and a rule's branches would all be
    taken.
    """
    rank = basis.shape[-1]
    none = Refreshed(
        basis=flat(basis),
        rule=jax.tree.map(flat, state),
        done=jnp.zeros(due.shape, bool),
        overlap=jnp.zeros(due.shape, jnp.float32),
        rotation=jnp.zeros((*due.shape, rank, rank), dtype) if rotate else None,
    )
    result = in_due_slices(due, body, none)
    return jax.tree.map(lambda x: x.reshape(batch + x.shape[1:]), result)


def compare(new: jax.Array, old: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``P'^T P`` and, as float32, the mean squared cosine of the principal angles of two bases.

    The latter is exact for orthonormal columns, at most 1, and zero if a basis is.
    """
    dtype = jnp.promote_types(new.dtype, jnp.float32)
    new, old = new.astype(dtype), old.astype(dtype)
    rotation = new.T @ old
    norms = jnp.sum(new**2) * jnp.sum(old**2)
    overlap = jnp.sum(rotation**2) * new.shape[1] / jnp.where(norms > 0, norms, 1)
    return rotation, jnp.minimum(overlap, 1).astype(jnp.float32)


def checked(rule: Any, array: jax.Array, basis: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    """Applies a rule's function in the arithmetic's dtype and stores in the state's."""
    new_basis, new_state = rule(array, basis.astype(array.dtype), state)
    if new_basis.shape != basis.shape:
        raise ValueError(
            f"the projector returned a basis of shape {new_basis.shape}, expected {basis.shape}"
        )
    store = lambda new, old: jnp.asarray(new, old.dtype)
    return store(new_basis, basis), jax.tree.map(store, new_state, state)
