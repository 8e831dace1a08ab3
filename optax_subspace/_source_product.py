"""The dense product whose backward pass gives the projected gradient of its kernel."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_subspace._blocks import dequantize
from optax_subspace._projection import largest
from optax_subspace._projectors._base import NO_GRADIENT, directions, squared_norm
from optax_subspace._source_gradient import Gradient, Over, contract, narrow
from optax_subspace._source_refresh import How, as_floats, over_kernels, refreshed, renewed_in
from optax_subspace._varying import not_varying, varying_as


class Probe(NamedTuple):
    """Zeros whose cotangents bring out what a backward pass has found; batch axes in front.

    Attributes:
      low: the projected gradient, ``plan.low_shape``.
      products: ``G G^T P / ||G||_F^2`` of each side, ``(m, r)``, for rules that follow; the norm
        is the estimate of ``squared_norm``.
      energies: ``||P^T G||_F^2 / ||G||_F^2`` of each side; -1 without any gradient within the
        basis, ``NO_GRADIENT`` without any.
      bases: the bases that this pass has projected with, if it refreshes.
      rules: the rules' states after it, as floats, if it refreshes.
      done: 1 where there is a new basis.
      uses: how often the kernel was used.
    """

    low: jax.Array
    products: tuple[jax.Array, ...]
    energies: tuple[jax.Array, ...]
    bases: tuple[jax.Array, ...]
    rules: Any
    done: jax.Array
    uses: jax.Array


class Settings(NamedTuple):
    how: How
    precision: Any
    preferred: Any

    @property
    def keeps_coordinates(self) -> bool:
        """Whether ``x P`` is all that the backward pass needs of ``x``."""
        how = self.how
        return "left" in how.sides and not how.refresh and how.rule.follow is None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(settings: Settings, x: Any, weight: Any, aux: Any, probe: Probe) -> jax.Array:
    """``x (*tokens, m) @ weight (m, n)``."""
    del aux, probe
    return _dot(settings, x, weight)


def _dot(settings: Settings, x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.dot(
        x, weight, precision=settings.precision, preferred_element_type=settings.preferred
    )


def _forward(settings, x, weight, aux, probe):
    out = _dot(settings, x, weight)
    if settings.keeps_coordinates:
        left = aux[0][settings.how.sides.index("left")]
        kept = narrow(x, left, Over(settings.precision, ()))
    else:
        kept = x
    # (Of the probe nothing but its shapes is read. No number of `x` tells its dtype.)
    return out, (kept, weight, aux, probe, varying_as(jnp.zeros((0,), x.dtype), x))


def _backward(settings, saved, dy):
    kept, weight, aux, probe, like = saved
    dx = _dot(settings, dy, weight.T)
    axes = not_varying(like, dx)
    dx = jax.lax.psum(dx, axes) if axes else dx
    dx = _once(settings.how, dx.astype(like.dtype), probe.uses)
    return dx, None, None, _finder(settings)(kept, dy, aux, probe)


product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _once(how: How, dx: jax.Array, uses: jax.Array) -> jax.Array:
    """``dx``, which depends on the kernel: that dependence would go unnoticed."""
    del how, uses
    return dx


def differentiated_twice(paths: str) -> TypeError:
    return TypeError(
        "the loss holds a derivative (a gradient penalty, say, or the rule of a jax.custom_jvp) "
        f"that depends on {paths}, projected at the source, where the gradient is that of "
        "x @ kernel alone: take it at jax.lax.stop_gradient(params) if no gradient is to go "
        "through it, leave the parameter at full rank by a rule of None, or project afterwards"
    )


def _refuse(how, *arguments):
    del arguments
    raise differentiated_twice(how.path)


# (Called where a backward pass is itself differentiated.)
_once.defvjp(_refuse, _refuse)


def _finder(settings: Settings, axes: int = 0) -> Any:
    """``_found`` of arrays with so many axes of kernels in front, with rules of its own under
    ``vmap``; such an axis is 1 of what kernels share.

    Examples that go through one kernel one by one are more tokens of it: each alone would find
    another basis. Several kernels are worked on at once, but for new bases, which are found one by
    one, so that no more than one gradient is formed: on each device one of its own where the
    kernels are split.
    """

    @jax.custom_batching.custom_vmap
    def find(*arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments)
        sizes = tuple(max(x.shape[i] for x in leaves) for i in range(axes))
        renewed = None
        if settings.how.refresh and math.prod(sizes) > 1:
            kept, dy, aux, probe = arguments
            how, precision = settings.how, settings.precision
            renewed = renewed_in(how, precision, sizes, kept, dy, aux, probe.low)
        return over_kernels(functools.partial(_found, settings), axes, *arguments, renewed)

    @find.def_vmap
    def _(size: int, batched: Any, *arguments: Any) -> Any:
        several = any(jax.tree.leaves(batched[2:]))
        if several:
            in_front = lambda x, b: x if b else x[None]
            arguments = jax.tree.map(in_front, arguments, tuple(batched))
            found = _finder(settings, axes + 1)(*arguments)
        else:
            whole = lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape))
            ends = jax.tree.map(whole, arguments[:2], tuple(batched[:2]))
            found = find(*(jnp.moveaxis(x, 0, axes) for x in ends), *arguments[2:])
        return found, jax.tree.map(lambda _: several, found)

    return find


def _found(
    settings: Settings, kept: jax.Array, dy: jax.Array, aux: Any, probe: Probe, renewed: Any = None
) -> Probe:
    """What the backward pass of one product finds: the cotangent of its probe.

    ``renewed`` are bases, states of the rule and whether they are new, where that is known.
    """
    how = settings.how
    over = Over.of(settings.precision, probe.low, (kept, dy))
    bases, rules, due = aux
    done = varying_as(jnp.zeros([], bool), probe.done)
    if renewed is not None:
        bases, rules, done = renewed
    elif how.refresh:
        bases, rules, done = refreshed(how, Gradient(kept, dy, over), bases, rules, due)
    if settings.keeps_coordinates:
        right = narrow(dy, bases[1], over) if len(how.sides) == 2 else dy
        low = contract(kept, right, over)
    else:
        ends = {"left": kept, "right": dy}
        for side, basis in zip(how.sides, bases, strict=True):
            ends[side] = narrow(ends[side], basis, over)
        low = contract(ends["left"], ends["right"], over)
    followed: list[tuple[jax.Array, jax.Array]] = []
    if how.rule.follow is not None:
        followed = [
            _followed(kept, dy, side, basis, low if how.sides == (side,) else None, over)
            for side, basis in zip(how.sides, bases, strict=True)
        ]
    as_probe = lambda x, p: x.reshape(p.shape).astype(p.dtype)
    return Probe(
        low=as_probe(low, probe.low),
        products=tuple(as_probe(f[0], p) for f, p in zip(followed, probe.products, strict=True)),
        energies=tuple(as_probe(f[1], p) for f, p in zip(followed, probe.energies, strict=True)),
        bases=tuple(as_probe(dequantize(b), p) for b, p in zip(bases, probe.bases, strict=True))
        if how.refresh
        else (),
        rules=jax.tree.map(as_probe, as_floats(rules), probe.rules) if how.refresh else (),
        done=as_probe(done, probe.done),
        uses=jnp.ones_like(probe.uses),
    )


def _followed(
    x: jax.Array, dy: jax.Array, side: str, basis: Any, low: Any, over: Over
) -> tuple[jax.Array, jax.Array]:
    """``G G^T P / ||G||_F^2`` of one side, ``(m, r)``, and the energy within its basis."""
    if side == "right":
        x, dy = dy, x
    if low is None:
        low = contract(narrow(x, basis, over), dy, over)
    elif side == "right":
        low = low.T
    scale = largest(low)
    low = low / scale
    seen_by = directions(dy.shape[-1], low.dtype)
    seen = contract(x, narrow(dy, seen_by, over), over) / scale
    squared = squared_norm(low, seen, dequantize(basis).astype(low.dtype), seen_by)
    some = squared > 0
    product = contract(x, narrow(dy, low.T, over), over)
    product = product / jnp.where(some, squared, 1) / scale
    energy = jnp.where(some, jnp.sum(low**2) / jnp.where(some, squared, 1), -1.0)
    nothing = jnp.all(low == 0) & jnp.all(seen == 0)
    return product, jnp.where(nothing, NO_GRADIENT, energy)
