"""The slices of a leaf: the due ones in a loop, those on different devices at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_subspace._leaves import LeafPlan


def compiled_alone(method: Any) -> Any:
    """Compiles ``method(self, plan, ...)`` once where it is called outside of any program.

    Loops and branches of fresh functions would be compiled at each such call. Within a program it
    is as if it were written there. An object that remembers what it has ``called`` is compiled at
    the second call: one that serves for a single update, as ``optax.inject_hyperparams`` makes at
    each, would be compiled in vain and kept with its program.
    """
    alone = jax.jit(method, static_argnums=(0, 1))

    @functools.wraps(method)
    def call(self: Any, plan: LeafPlan, *arguments: Any) -> Any:
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments))
        if traced:
            return method(self, plan, *arguments)
        # One program for all leaves of a shape; an error is raised again, with the leaf's path.
        alike = dataclasses.replace(plan, path="", reason="", scale=None)
        if _is_hashable(alike):
            called = getattr(self, "called", None)
            if called is None or (method.__name__, alike) in called:
                with contextlib.suppress(ValueError):
                    return alone(self, alike, *arguments)
            else:
                called.add((method.__name__, alike))
        return method(self, plan, *arguments)

    return call


def _is_hashable(plan: LeafPlan) -> bool:
    """Whether the functions of a rule that the plan has are, if any: objects may not be."""
    try:
        hash(plan)
    except TypeError:
        return False
    return True


def over_slices(function: Any, plan: LeafPlan, *arrays: Any) -> Any:
    """Calls a function of arrays whose first axis counts the slices of a leaf.

    ``arrays`` and what is returned have the leaf's batch axes instead. Slices on different devices
    (``batch_split``) are worked on at once, each where it is.
    """
    devices = plan.batch_split
    alone = [size // d for size, d in zip(plan.batch_shape, devices, strict=True)]
    k = len(devices)

    def group(x):  # to (d1, d2, s1 s2, ...)
        return parts_in_front(x, devices).reshape(*devices, -1, *x.shape[k:])

    def ungroup(x):
        return parts_in_place(x.reshape(*devices, *alone, *x.shape[k + 1 :]), k)

    if math.prod(devices) == 1:
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[k:]), arrays)
        result = function(*flat)
        return jax.tree.map(lambda x: x.reshape(*plan.batch_shape, *x.shape[1:]), result)
    for _ in devices:
        function = jax.vmap(function)
    return jax.tree.map(ungroup, function(*jax.tree.map(group, arrays)))


def parts_in_front(x: jax.Array, parts: Sequence[int]) -> jax.Array:
    """``(d1 s1, d2 s2, ...)`` to ``(d1, d2, s1, s2, ...)``, with ``parts`` d of the first axes."""
    k = len(parts)
    sizes = [n for d, size in zip(parts, x.shape, strict=False) for n in (d, size // d)]
    x = x.reshape(*sizes, *x.shape[k:])
    return x.transpose(*range(0, 2 * k, 2), *range(1, 2 * k, 2), *range(2 * k, x.ndim))


def parts_in_place(x: jax.Array, k: int) -> jax.Array:
    """The inverse of :func:`parts_in_front`: ``(d1, ..., dk, s1, ..., sk, ...)`` back again."""
    sizes = [x.shape[i] * x.shape[k + i] for i in range(k)]
    x = x.transpose(*(i + j for i in range(k) for j in (0, k)), *range(2 * k, x.ndim))
    return x.reshape(*sizes, *x.shape[2 * k :])


def in_due_slices(due: jax.Array, body: Any, carry: Any) -> Any:
    """Runs ``carry = body(i, carry)`` for each ``i`` with ``due[i]``.

    A loop over the due slices only: on most steps it has no turn, and its carried buffers are
    updated in place, where a branch would keep the old and the new stack.
    """
    order = jnp.argsort(~due, stable=True)
    turns = jnp.sum(due, dtype=jnp.int32)
    return jax.lax.fori_loop(0, turns, lambda i, c: body(order[i], c), carry)
