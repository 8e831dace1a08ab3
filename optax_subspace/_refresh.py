"""How a projector's rule is applied to the slices of one leaf: pure functions on arrays."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_subspace._blocks import dequantize, is_quantized, quantize_like
from optax_subspace._each_slice import compiled_alone, in_due_slices, over_slices
from optax_subspace._leaves import LeafPlan
from optax_subspace._projection import largest
from optax_subspace._projectors import Projector
from optax_subspace._projectors._base import NO_GRADIENT, directions, squared_norm
from optax_subspace._varying import varying_as


class Refreshed(NamedTuple):
    """One side of a leaf after its rule was applied.

    Attributes:
      basis: ``(*batch, m, r)``.
      rule: the rule's state.
      done: boolean ``(*batch,)``, the slices that have a new basis.
      overlap: float32 ``(*batch,)``, mean squared cosine of the principal angles between the old
        and the new basis, where ``done`` and measured.
      energy: float32 ``(*batch,)``, the share of the gradient within the old basis, where a rule
        that follows has moved it; ``NO_GRADIENT`` for one of zeros.
      rotation: ``P'^T P`` of shape ``(*batch, r, r)``, what the coordinates of the old basis are
        multiplied with, zero where not ``done``; None if not asked for.
    """

    basis: Any
    rule: Any
    done: jax.Array
    overlap: jax.Array
    energy: jax.Array
    rotation: jax.Array | None


class Turn(NamedTuple):
    """A change of basis, as the moments see it.

    Attributes:
      done: boolean ``(*batch,)``, the slices whose basis changed.
      rotations: ``P'^T P`` of each side, ``(*batch, r, r)``; None to forget the moments.
    """

    done: jax.Array
    rotations: tuple[jax.Array, ...] | None


@compiled_alone
def turned(squared: bool | None, plan: LeafPlan, moment: jax.Array, turn: Turn) -> jax.Array:
    """A moment ``plan.low_shape`` in the new basis: ``P'^T P R``, squared weights for squares.

    Whether it holds squares is told by the numbers themselves if ``squared`` is None.

    With ``E[(sum_j c_j x_j)^2] = sum_j c_j^2 E[x_j^2]`` for coordinates that are uncorrelated, as
    those in singular vectors are, second moments take the squared weights. These add up to less
    than one for a vector that is not of the old span: for the rest it takes over the second moment
    of the vector in whose place it is. With nothing for it, second moments would fade from turn to
    turn, and Adam's steps grow, since its correction for moments that begin at zero is over. With
    more than one, from bases in few bits, they would grow.
    """
    if turn.rotations is None:
        return jnp.where(turn.done[..., None, None], 0, moment)

    def turn_all(done, rotations, moment):
        def turn_slice(i, moments):
            new = jax.lax.dynamic_index_in_dim(moments, i, keepdims=False)
            squares = jnp.all(new >= 0) if squared is None else squared
            for side, rotation in zip(plan.sides, rotations, strict=True):
                weights = jax.lax.dynamic_index_in_dim(rotation, i, keepdims=False)
                shares = weights**2
                known = jnp.sum(shares, axis=1, keepdims=True)
                shares = shares / jnp.maximum(known, 1) + jnp.diag(jnp.maximum(1 - known[:, 0], 0))
                weights = jnp.where(squares, shares, weights)
                new = weights @ new if side == "left" else new @ weights.T
            return jax.lax.dynamic_update_index_in_dim(moments, new.astype(moments.dtype), i, 0)

        return in_due_slices(done, turn_slice, varying_as(moment, (done, rotations)))

    return over_slices(turn_all, plan, turn.done, turn.rotations, moment)


def together(sides: Sequence[Refreshed], bases: Any, rules: Any) -> list[Refreshed]:
    """The sides after a refresh; where a rule failed on one side, as both were before."""
    if len(sides) == 1:
        return list(sides)
    done = functools.reduce(jnp.logical_and, [s.done for s in sides])
    wide = lambda x: done.reshape(done.shape + (1,) * (x.ndim - done.ndim))
    keep = lambda new, old: jnp.where(wide(new), new, old)
    return [
        side._replace(
            basis=jax.tree.map(keep, side.basis, basis),
            rule=jax.tree.map(keep, side.rule, rule),
            done=done,
        )
        for side, basis, rule in zip(sides, bases, rules, strict=True)
    ]


def joined(sides: Sequence[Refreshed]) -> tuple[jax.Array, jax.Array, Turn]:
    """Of the sides of a leaf: the slices done, the least overlap, and the moments' turn.

    Where only one side moved, the other's rotation is that of a basis to itself.
    """
    done = functools.reduce(jnp.logical_or, [s.done for s in sides])
    rotations = tuple(s.rotation for s in sides if s.rotation is not None)
    overlap = jnp.min(jnp.stack([s.overlap for s in sides]), axis=0)
    return done, overlap, Turn(done, rotations or None)


def refresh(
    rule: Projector,
    plan: LeafPlan,
    due: jax.Array,
    matrices: jax.Array,
    side: str,
    basis: Any,
    state: Any,
    rotate: bool,
) -> Refreshed:
    """Applies ``rule.update`` to those slices of ``(*batch, m, n)`` that are due."""

    def update(arrays, old):
        due, matrix = arrays

        def scaled():
            return (matrix if side == "left" else matrix.T) / largest(matrix)

        # The branch keeps XLA from computing, ahead of the loop and so on every step, whatever the
        # rule needs of a gradient that is the only slice of its leaf.
        new = lambda: checked(rule.update, scaled(), *old, name=plan.path)
        none = lambda: (*old, varying_as(jnp.zeros([], bool), (arrays, old)))
        *after, done = jax.lax.cond(due, new, none)
        return tuple(after), done, 1.0, True

    return in_slices(plan, due, update, (due, matrices), (basis, state), rotate)


def follow(
    rule: Projector,
    plan: LeafPlan,
    moves: jax.Array,
    matrices: jax.Array,
    side: str,
    coordinates: jax.Array,
    basis: Any,
    state: Any,
    rotate: bool,
    measured: jax.Array,
) -> Refreshed:
    """One step of ``rule.follow`` in those slices of ``(*batch, m, n)`` that move, and how far they
    did where that is ``measured`` (*batch,).

    ``coordinates`` are the gradient's in ``basis``: ``P^T G`` ``(*batch, r, n)`` on the left side,
    ``G Q`` ``(*batch, m, r)`` on the right.
    """
    assert rule.follow is not None
    step = rule.follow
    turn = lambda x: x if side == "left" else x.mT
    # Of all slices at once, which measured a tenth faster on a CPU than within the loop.
    scales = largest(coordinates, (-2, -1))
    coordinates = coordinates / scales
    if rule.relative_to == "gradient":
        norms = jnp.sum((matrices / scales) ** 2, axis=(-2, -1))
    else:
        seen_by = directions(turn(matrices).shape[-1], matrices.dtype)
        bases = dequantize(basis).astype(matrices.dtype)
        # (Divided afterwards: of coordinates that are all zero the scale is tiny, and what is seen
        # beside them infinite, which the sum of infinite terms would not be.)
        seen = turn(matrices) @ seen_by / scales
        norms = squared_norm(turn(coordinates), seen, bases, seen_by)

    def move(arrays, old):
        measure, matrix, low, scale, squared = arrays
        matrix, low = turn(matrix), turn(low)
        product = matrix @ low.T / jnp.where(squared > 0, squared, 1) / scale
        basis, rule_state, finite = checked(step, product, *old, name=plan.path)
        some = squared > 0
        new, moved = (basis, rule_state), finite & some
        energy = jnp.sum(low**2) / jnp.where(some, squared, 1)
        # Only a gradient without coordinates has to be looked at whole.
        look = lambda: jnp.all(matrix == 0)
        unseen = lambda: varying_as(jnp.zeros([], bool), matrix)
        nothing = jax.lax.cond(jnp.all(low == 0), look, unseen)
        energy = jnp.where(nothing, NO_GRADIENT, energy)
        new = jax.tree.map(lambda n, o: jnp.where(moved, n, o), new, old)
        return new, moved, energy, measure

    arrays = measured, matrices, coordinates, scales, norms
    return in_slices(plan, moves, move, arrays, (basis, state), rotate)


def follow_product(
    rule: Projector,
    plan: LeafPlan,
    moves: jax.Array,
    product: jax.Array,
    energy: jax.Array,
    basis: Any,
    state: Any,
    rotate: bool,
    measured: jax.Array,
) -> Refreshed:
    """As :func:`follow`, with the ``product`` ``(*batch, m, r)`` and the share of the gradient
    within the basis that the source gave; the latter is negative where none is in the basis."""
    assert rule.follow is not None
    step = rule.follow

    def move(arrays, old):
        measure, energy, product = arrays
        basis, rule_state, finite = checked(step, product, *old, name=plan.path)
        new, moved = (basis, rule_state), finite & (energy >= 0)
        new = jax.tree.map(lambda n, o: jnp.where(moved, n, o), new, old)
        return new, moved, energy, measure

    return in_slices(plan, moves, move, (measured, energy, product), (basis, state), rotate)


def adopt(
    plan: LeafPlan,
    done: jax.Array,
    found: jax.Array,
    found_state: Any,
    basis: Any,
    state: Any,
    rotate: bool,
) -> Refreshed:
    """The basis ``found`` in a backward pass, and the rule's state with it, where ``done``."""

    def take(arrays, old):
        state, basis = arrays
        *after, done = checked(lambda new, *_: (new, state), basis, *old)
        return tuple(after), done, 1.0, True

    return in_slices(plan, done, take, (found_state, found), (basis, state), rotate)


def in_slices(
    plan: LeafPlan, due: jax.Array, rule: Any, arrays: Any, old: Any, rotate: bool
) -> Refreshed:
    """Applies a rule to the slices that are due; all arrays have the leaf's batch axes.

    One slice after the other, for rules that follow too: batched, the LAPACK calls of several
    leaves wait for each other's threads on a CPU with few, and a rule's branches would all be
    taken.

    Args:
      plan: the leaf's.
      due: boolean ``(*batch,)``.
      rule: ``(arrays, (basis, state)) -> ((basis, state), done, energy, measure)`` of one slice;
        the last tells whether the overlap is wanted, which comes with rotations in any case.
      arrays: what the rule reads.
      old: basis and rule state before.
      rotate: whether the rotations are wanted.
    """

    def apply_rule(due, arrays, old):
        basis, state = old
        rank, dtype = basis.shape[-1], jax.tree.leaves(arrays)[-1].dtype

        def body(i, carry: Refreshed):
            take = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
            put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0)
            before = jax.tree.map(take, (carry.basis, carry.rule))
            after, done, energy, measure = rule(jax.tree.map(take, arrays), before)
            energy = jnp.asarray(energy, jnp.float32)
            bases = dequantize(after[0]), dequantize(before[0])
            turned = None
            if rotate:
                rotation, overlap = compare(*bases)
                turned = rotation.astype(dtype)
            else:
                unknown = lambda *bases: varying_as(jnp.zeros([], jnp.float32), bases)
                overlap = jax.lax.cond(measure, lambda *b: compare(*b)[1], unknown, *bases)
            new = Refreshed(after[0], after[1], done, overlap, energy, turned)
            return jax.tree.map(put, carry, new)

        none = Refreshed(
            basis=basis,
            rule=state,
            done=jnp.zeros(due.shape, bool),
            overlap=jnp.zeros(due.shape, jnp.float32),
            energy=jnp.ones(due.shape, jnp.float32),
            rotation=jnp.zeros((*due.shape, rank, rank), dtype) if rotate else None,
        )
        return in_due_slices(due, body, varying_as(none, (due, arrays, old)))

    return over_slices(apply_rule, plan, due, arrays, old)


def compare(new: jax.Array, old: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``P'^T P`` and, as float32, the mean squared cosine of the principal angles of two bases.

    The latter is exact for orthonormal columns, at most 1, and zero if a basis is. Of a basis that
    is not quite orthonormal, as that of online PCA, the coordinates ``P^T G`` belong to
    ``P (P^T P)^-1``: without the inverse (here its first two terms) moments that are turned at
    every step would grow or fade with the lengths of the columns.
    """
    dtype = jnp.promote_types(new.dtype, jnp.float32)
    new, old = new.astype(dtype), old.astype(dtype)
    rotation = new.T @ old
    norms = jnp.sum(new**2) * jnp.sum(old**2)
    overlap = jnp.sum(rotation**2) * new.shape[1] / jnp.where(norms > 0, norms, 1)
    rotation = 2 * rotation - rotation @ (old.T @ old)
    return rotation, jnp.minimum(overlap, 1).astype(jnp.float32)


def checked(
    rule: Any, array: jax.Array, basis: Any, state: Any, *, name: str = "a matrix"
) -> tuple[Any, Any, jax.Array]:
    """Applies a rule's function in the arithmetic's dtype and stores in the state's.

    Returns:
      The basis and the rule's state, and whether the basis is finite and no number of the state
      became NaN; else they are those before.

    Raises:
      ValueError: what it returns for the parameter ``name`` has other shapes than before.
    """
    new_basis, new_state = rule(array, dequantize(basis).astype(array.dtype), state)
    if new_basis.shape != basis.shape:
        raise ValueError(
            f"the projector returned a basis of shape {new_basis.shape} for {name}, expected "
            f"{basis.shape}"
        )
    kind = lambda tree: (jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)])
    if kind(new_state) != kind(state):
        raise ValueError(
            f"the projector returned a state of {kind(new_state)} for {name}, where its init gave "
            f"{kind(state)}"
        )
    as_before = lambda new, old: jnp.asarray(new, old.dtype)
    new_state = jax.tree.map(as_before, new_state, state)
    if is_quantized(basis):
        new_basis = quantize_like(new_basis, basis)
    else:
        new_basis = as_before(new_basis, basis)
    # A rule that fails leaves its leaf as it was, and due. (Infinite numbers in a state may be
    # meant, as the best loss so far; from NaN a rule rarely comes back.)
    finite = jnp.all(jnp.isfinite(dequantize(new_basis)))
    for new, old in zip(jax.tree.leaves(new_state), jax.tree.leaves(state), strict=True):
        if jnp.issubdtype(new.dtype, jnp.inexact):
            finite &= ~jnp.any(jnp.isnan(new) & ~jnp.isnan(old))
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    return keep(new_basis, basis), keep(new_state, state), finite
