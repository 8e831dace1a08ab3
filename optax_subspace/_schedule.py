"""When the next basis of each slice is due."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_subspace._leaves import LeafPlan
from optax_subspace._projectors import Projector
from optax_subspace._projectors._base import NO_GRADIENT

NEVER = np.iinfo(np.int32).max
# Of rules that follow: due only if the gradient leaves the basis altogether,
UNLESS_LOST = NEVER - 1
# and then at the next age that this divides. (So a step for which no basis is ever due, which is
# cheaper at the source, can be taken between these.)
LOOK_EVERY = 10
# Of the share r / m that a random basis holds: below that part the gradient has left the basis.
LOST = 0.1


def offsets(plans: Sequence[LeafPlan]) -> dict[str, np.ndarray]:
    """For each slice the part of a period, in [0, 1), by which its refreshes come early.

    Slices take turns in the order of the leaves; between two the time is in proportion to the
    work, which for all rules grows with the size of the slice.
    """
    sizes = {p.path: (p.batch_shape, math.prod(p.matrix_shape)) for p in plans if p.projected}
    total = sum(math.prod(batch) * size for batch, size in sizes.values())
    found, before = {}, 0
    for path, (batch, size) in sizes.items():
        slices = math.prod(batch)
        found[path] = ((before + size * np.arange(slices)) / total).reshape(batch)
        before += size * slices
    return found


def steps_early(rule: Projector, offset: np.ndarray | None) -> np.ndarray | None:
    """The steps by which the first period of each slice is shorter."""
    if offset is None or rule.every is None:
        return None
    return np.floor(offset * rule.every).astype(np.int32)


def next_period(
    rule: Projector, period: jax.Array, initial: jax.Array, overlap: jax.Array
) -> jax.Array:
    """The period after a new basis, in units of ``rule.every``: see :func:`adaptive_period`."""
    if rule.cosine is None:
        return jnp.ones_like(period)  # which that of a state from an adaptive run need not be
    still = ~initial & (overlap >= rule.cosine**2)
    return jnp.where(still, jnp.minimum(2 * period, rule.longest), 1)


def next_due(
    rule: Projector,
    age: jax.Array,
    due: jax.Array,
    done: jax.Array,
    initial: jax.Array,
    period: jax.Array,
    early: np.ndarray | None,
) -> jax.Array:
    """The age at which a basis is due next: of a period from now on where one was just ``done``,
    which is shorter by ``early`` after the first."""
    if rule.every is None:
        after = jnp.full_like(due, NEVER if rule.follow is None else UNLESS_LOST)
        return jnp.where(done, after, due)
    sooner: Any = 0 if early is None else early
    after = age + rule.every * period - jnp.where(initial, sooner, 0)
    # A state may be of a run with a longer period, or of a rule without any.
    latest = age + rule.every * rule.longest
    return jnp.where(done, after, jnp.where(due > latest, latest - sooner, due))


def due_if_lost(
    age: jax.Array, due: jax.Array, energies: Sequence[jax.Array], shapes: Sequence[tuple[int, ...]]
) -> jax.Array:
    """``due``, or before long where the gradient has left the basis of a rule that follows.

    A rule with a period waits for its end: the steps until then may be of a program at the source
    that finds no bases.

    Args:
      age, due: int32 ``(*batch,)``.
      energies: of each side, the share of the gradient within the basis ``(*batch,)``, or
        ``NO_GRADIENT``: a gradient of zeros has not left.
      shapes: of each side's basis, ``(*batch, m, r)``.
    """
    lost = jnp.zeros(jnp.shape(age), bool)
    for energy, shape in zip(energies, shapes, strict=True):
        lost |= (energy < LOST * shape[-1] / shape[-2]) & (energy != NO_GRADIENT)
    return jnp.where(lost & (due == UNLESS_LOST), -(-age // LOOK_EVERY) * LOOK_EVERY, due)


def found_before(due: jax.Array) -> jax.Array:
    """Of ``due`` between micro-batches, the slices with a basis of an earlier one of this step.

    They stand for the age ``~due`` until the last: no rule is to follow a gradient at the step at
    which it found a basis.
    """
    return due < 0


def age_due(due: jax.Array) -> jax.Array:
    """The age at which a basis is due, between micro-batches too: see :func:`found_before`."""
    return jnp.where(due < 0, ~due, due)
