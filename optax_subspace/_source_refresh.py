"""New bases at the source: what a backward pass finds for kernels that are due."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_subspace._each_slice import in_due_slices, parts_in_front, parts_in_place
from optax_subspace._projection import largest
from optax_subspace._projectors import Projector
from optax_subspace._refresh import checked
from optax_subspace._source_gradient import Gradient, Over
from optax_subspace._varying import varying_as


class How(NamedTuple):
    """The static side of a kernel's gradient.

    Attributes:
      path: the parameter's.
      sides: ``("left",)``, ``("right",)`` or both.
      reduction, output: axes of one slice of the kernel.
      rule: the projector.
      refresh: whether slices that are due get a new basis in this backward pass.
      split: of the kernel's batch axes that are split over devices, sizes and parts.
    """

    path: str
    sides: tuple[str, ...]
    reduction: tuple[int, ...]
    output: tuple[int, ...]
    rule: Projector
    refresh: bool
    split: tuple[tuple[int, int], ...]


def _renewed(how: How, gradient: Gradient, bases: Any, rules: Any) -> Any:
    """New bases and states of the rule, and whether there are any: not of a useless gradient."""
    matrix: Any = gradient.scaled() if how.rule.matrix_free else gradient.dense()
    if how.rule.matrix_free:
        # A product with one random vector tells whether there is any gradient.
        some = matrix @ jax.random.normal(jax.random.key(0), (matrix.shape[1], 1))
    else:
        some = matrix
        matrix = matrix / largest(matrix)
    usable = jnp.all(jnp.isfinite(some)) & jnp.any(some != 0)
    old = bases, rules
    sides = [
        checked(
            how.rule.update,
            matrix if side == "left" else matrix.T,
            basis,
            state,
            name=how.path,
        )
        for side, basis, state in zip(how.sides, bases, rules, strict=True)
    ]
    bases, rules, finite = zip(*sides, strict=True)
    usable = functools.reduce(jnp.logical_and, finite, usable)
    keep = lambda n, o: jnp.where(usable, n, o)
    return *jax.tree.map(keep, (bases, rules), old), usable


def _varying_as_found(gradient: Gradient, *aux: Any) -> Any:
    """(Of the factors those axes aside that their products are added up over.)"""
    like = (gradient @ jnp.zeros((gradient.shape[1], 1)), aux)
    return lambda found: varying_as(found, like)


def refreshed(how: How, gradient: Gradient, bases: Any, rules: Any, due: jax.Array) -> Any:
    """Bases and states of the rule after a refresh, and whether there was one."""
    varying = _varying_as_found(gradient, bases, rules, due)
    renew = lambda: varying(_renewed(how, gradient, bases, rules))
    return jax.lax.cond(due, renew, lambda: varying((bases, rules, jnp.zeros([], bool))))


def renewed_in(
    how: How, precision: Any, sizes: tuple[int, ...], kept: Any, dy: Any, aux: Any, low: jax.Array
) -> Any:
    """Of several kernels, along axes of ``sizes`` in front: as ``refreshed``, one due kernel after
    another, those on different devices at once. ``low`` is as in ``Over.of``.

    Where two axes have one size, either may be the one that is split: both are taken for it.
    """
    split = dict(how.split)
    devices = [split.get(size, 1) for size in sizes]
    alone = [size // parts for size, parts in zip(sizes, devices, strict=True)]
    k = len(sizes)

    def group(x: jax.Array) -> jax.Array:
        parts = [1 if size == 1 else d for size, d in zip(x.shape, devices, strict=False)]
        return parts_in_front(x, parts)

    def renew_all(kept: jax.Array, dy: jax.Array, aux: Any, low: jax.Array) -> Any:
        def gradient(i: Any) -> Gradient:
            place = jnp.unravel_index(i, alone)

            def take(x: jax.Array) -> jax.Array:
                for j in place:
                    j = jnp.minimum(j, x.shape[0] - 1)
                    x = jax.lax.dynamic_index_in_dim(x, j, keepdims=False)
                return x

            x, d, like = jax.tree.map(take, (kept, dy, low))
            return Gradient(x, d, Over.of(precision, like, (x, d)))

        def renew(i: Any, carry: Any) -> Any:
            old = jax.tree.map(lambda x: x[i], carry[:2])
            new = _renewed(how, gradient(i), *old)
            return jax.tree.map(lambda x, n: x.at[i].set(n), carry, new)

        bases, rules, due = jax.tree.map(lambda x: x.reshape(-1, *x.shape[k:]), aux)
        varying = _varying_as_found(gradient(0), bases, rules, due)
        start = varying((bases, rules, jnp.zeros(due.shape, bool)))
        found = in_due_slices(due, renew, start)
        return jax.tree.map(lambda x: x.reshape(*alone, *x.shape[1:]), found)

    aux = jax.tree.map(lambda x: jnp.broadcast_to(x, (*sizes, *x.shape[k:])), aux)
    arguments = jax.tree.map(group, (kept, dy, aux, low))
    return jax.tree.map(lambda x: parts_in_place(x, k), over_kernels(renew_all, k, *arguments))


def over_kernels(function: Any, axes: int, *arguments: Any) -> Any:
    """``function`` under ``vmap`` along so many axes in front, but where they are 1."""
    if not axes:
        return function(*arguments)
    shared = jax.tree.map(lambda x: x.shape[0] == 1, arguments)
    arguments = jax.tree.map(lambda x, same: x[0] if same else x, arguments, shared)
    inner = functools.partial(over_kernels, function, axes - 1)
    if all(jax.tree.leaves(shared)):
        return jax.tree.map(lambda x: x[None], inner(*arguments))
    return jax.vmap(inner, jax.tree.map(lambda same: None if same else 0, shared))(*arguments)


def as_floats(tree: Any) -> Any:
    """A rule's state as floats, exactly: of whole numbers of 32 bits and more 16 bits each, along
    an axis of their own.

    Cotangents are floats, and a refresh within the backward pass has the rule's state to bring out.
    """

    def split(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if x.dtype.itemsize > 2:
            x = jax.lax.bitcast_convert_type(x, jnp.uint16)
        return x.astype(jnp.float32)

    return jax.tree.map(split, tree)


def from_floats(tree: Any, like: Any) -> Any:
    """The inverse of :func:`as_floats`, in the dtypes of ``like``."""

    def join(x: jax.Array, parts: jax.Array) -> jax.Array:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        dtype = jax.random.key_data(x).dtype if is_key else x.dtype
        if jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize <= 2:
            return parts.astype(dtype)
        found = jax.lax.bitcast_convert_type(parts.astype(jnp.uint16), dtype)
        return jax.random.wrap_key_data(found, impl=jax.random.key_impl(x)) if is_key else found

    return jax.tree.map(join, like, tree)
