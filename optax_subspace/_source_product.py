"""The dense product whose backward pass gives the projected gradient of its kernel."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from optax_subspace._blocks import dequantize
from optax_subspace._each_slice import in_due_slices
from optax_subspace._projection import compute_dtype, largest
from optax_subspace._projectors import Projector
from optax_subspace._projectors._base import NO_GRADIENT, directions, squared_norm
from optax_subspace._refresh import checked
from optax_subspace._varying import not_varying, varying_as

# What a kernel is called in the program of a loss where it is used as it may be.
AT_SOURCE = "optax_subspace/at_source"


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
    split: tuple[tuple[int, int], ...] = ()


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
    # (Not in `_forward`, where what policies of rematerialisation keep goes by names.)
    return _dot(settings, x, checkpoint_name(weight, AT_SOURCE))


def _dot(settings: Settings, x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.dot(
        x, weight, precision=settings.precision, preferred_element_type=settings.preferred
    )


def _forward(settings, x, weight, aux, probe):
    out = _dot(settings, x, weight)
    if settings.keeps_coordinates:
        left = aux[0][settings.how.sides.index("left")]
        kept = _narrow(x, left, Over(settings.precision, ()))
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
        f"the loss holds a derivative (a gradient penalty, say) that depends on {paths}, projected "
        "at the source, where the gradient is that of x @ kernel alone: leave it at full rank by a "
        "rule of None, or project afterwards"
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
            renewed = _renewed_in(settings, sizes, *arguments)
        return _over_kernels(functools.partial(_found, settings), axes, *arguments, renewed)

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


def _over_kernels(function: Any, axes: int, *arguments: Any) -> Any:
    """``function`` under ``vmap`` along so many axes in front, but where they are 1."""
    if not axes:
        return function(*arguments)
    shared = jax.tree.map(lambda x: x.shape[0] == 1, arguments)
    arguments = jax.tree.map(lambda x, same: x[0] if same else x, arguments, shared)
    inner = functools.partial(_over_kernels, function, axes - 1)
    if all(jax.tree.leaves(shared)):
        return jax.tree.map(lambda x: x[None], inner(*arguments))
    return jax.vmap(inner, jax.tree.map(lambda same: None if same else 0, shared))(*arguments)


class Over(NamedTuple):
    """How products over the tokens are made.

    Attributes:
      precision: the layer's.
      axes: those of a ``shard_map`` that the tokens are spread over: the kernel, which they share,
        has the gradient of all.
    """

    precision: Any
    axes: tuple[str, ...]


def _found(
    settings: Settings, kept: jax.Array, dy: jax.Array, aux: Any, probe: Probe, renewed: Any = None
) -> Probe:
    """What the backward pass of one product finds: the cotangent of its probe.

    ``renewed`` are bases, states of the rule and whether they are new, where that is known.
    """
    how = settings.how
    over = _over(settings, kept, dy, probe)
    bases, rules, due = aux
    done = jnp.zeros([], bool)
    if renewed is not None:
        bases, rules, done = renewed
    elif how.refresh:
        bases, rules, done = _refreshed(how, Gradient(kept, dy, over), bases, rules, due)
    if settings.keeps_coordinates:
        right = _narrow(dy, bases[1], over) if len(how.sides) == 2 else dy
        low = _contract(kept, right, over)
    else:
        ends = {"left": kept, "right": dy}
        for side, basis in zip(how.sides, bases, strict=True):
            ends[side] = _narrow(ends[side], basis, over)
        low = _contract(ends["left"], ends["right"], over)
    followed: list[tuple[jax.Array, jax.Array]] = []
    if how.rule.follow is not None:
        followed = [
            _followed(kept, dy, side, basis, low if how.sides == (side,) else None, over)
            for side, basis in zip(how.sides, bases, strict=True)
        ]
    as_probe = lambda x, p: x.reshape(p.shape).astype(p.dtype)
    refreshed = how.refresh
    return Probe(
        low=as_probe(low, probe.low),
        products=tuple(as_probe(f[0], p) for f, p in zip(followed, probe.products, strict=True)),
        energies=tuple(as_probe(f[1], p) for f, p in zip(followed, probe.energies, strict=True)),
        bases=tuple(as_probe(dequantize(b), p) for b, p in zip(bases, probe.bases, strict=True))
        if refreshed
        else (),
        rules=jax.tree.map(as_probe, as_floats(rules), probe.rules) if refreshed else (),
        done=as_probe(done, probe.done),
        uses=jnp.ones_like(probe.uses),
    )


def _over(settings: Settings, kept: jax.Array, dy: jax.Array, probe: Probe) -> Over:
    return Over(settings.precision, not_varying(probe.low, (kept, dy)))


def _narrow(x: jax.Array, basis: Any, over: Over) -> jax.Array:
    """``x P``, ``(*tokens, r)`` in the dtype of ``x``; of float16, which may not hold it, wider."""
    wide = compute_dtype(x.dtype)
    dtype = wide if x.dtype == jnp.float16 else x.dtype
    basis = dequantize(basis).astype(dtype)
    return jnp.dot(x, basis, precision=over.precision, preferred_element_type=wide).astype(dtype)


def _contract(x: jax.Array, y: jax.Array, over: Over) -> jax.Array:
    """``x^T y`` over the tokens, ``(*tokens, m)`` and ``(*tokens, n)`` to ``(m, n)``.

    Over a mesh it is what devices add up, in the dtype that the full gradient would have: bfloat16
    stays that. (Float16 does not, where sums over tokens overflow.)
    """
    wide = compute_dtype(jnp.promote_types(x.dtype, y.dtype))
    summed = x.dtype if x.dtype == y.dtype == jnp.bfloat16 else wide
    tokens = tuple(range(x.ndim - 1))
    x, y = (a.astype(jnp.promote_types(x.dtype, y.dtype)) for a in (x, y))
    # XLA:CPU copies the first factor of a sum over several axes, so that is the narrower.
    turned = x.shape[-1] > y.shape[-1]
    first, second = (y, x) if turned else (x, y)
    found = jax.lax.dot_general(
        first, second, ((tokens, tokens), ((), ())), over.precision, preferred_element_type=summed
    )
    found = found.T if turned else found
    return (jax.lax.psum(found, over.axes) if over.axes else found).astype(wide)


def _followed(
    x: jax.Array, dy: jax.Array, side: str, basis: Any, low: Any, over: Over
) -> tuple[jax.Array, jax.Array]:
    """``G G^T P / ||G||_F^2`` of one side, ``(m, r)``, and the energy within its basis."""
    if side == "right":
        x, dy = dy, x
    if low is None:
        low = _contract(_narrow(x, basis, over), dy, over)
    elif side == "right":
        low = low.T
    scale = largest(low)
    low = low / scale
    seen_by = directions(dy.shape[-1], low.dtype)
    seen = _contract(x, _narrow(dy, seen_by, over), over) / scale
    squared = squared_norm(low, seen, dequantize(basis).astype(low.dtype), seen_by)
    some = squared > 0
    product = _contract(x, _narrow(dy, low.T, over), over)
    product = product / jnp.where(some, squared, 1) / scale
    energy = jnp.where(some, jnp.sum(low**2) / jnp.where(some, squared, 1), -1.0)
    nothing = jnp.all(low == 0) & jnp.all(seen == 0)
    return product, jnp.where(nothing, NO_GRADIENT, energy)


class Gradient:
    """``G = x^T d`` of shape ``(m, n)``, known by its products: what a rule without need of the
    matrix itself (``Projector.matrix_free``) is given at the source."""

    def __init__(self, x: jax.Array, d: jax.Array, over: Over):
        self.x, self.d, self.over = x, d, over
        self.shape, self.ndim = (x.shape[-1], d.shape[-1]), 2
        self.dtype = compute_dtype(jnp.promote_types(x.dtype, d.dtype))

    @property
    def T(self) -> Gradient:
        return Gradient(self.d, self.x, self.over)

    def __matmul__(self, other: jax.Array) -> jax.Array:
        """``G A``, ``(m, k)``."""
        return _contract(self.x, _narrow(self.d, other, self.over), self.over)

    def __rmatmul__(self, other: jax.Array) -> jax.Array:
        """``A G``, ``(k, n)``."""
        return (self.T @ other.T).T

    def dense(self) -> jax.Array:
        """The matrix."""
        return _contract(self.x, self.d, self.over)

    def scaled(self) -> Gradient:
        """Neither squares of its factors nor their products overflow or vanish."""
        axes = self.over.axes
        of_all = lambda x: jax.lax.pmax(x, axes) if axes else x
        shrunk = lambda x: x / of_all(largest(x))
        return Gradient(shrunk(self.x), shrunk(self.d), self.over)


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
    sides = [
        checked(how.rule.update, matrix if side == "left" else matrix.T, basis, state)
        for side, basis, state in zip(how.sides, bases, rules, strict=True)
    ]
    new = tuple(b for b, _ in sides), tuple(s for _, s in sides)
    keep = lambda n, o: jnp.where(usable, n, o)
    return *jax.tree.map(keep, new, (bases, rules)), usable


def _varying_as_found(gradient: Gradient, *aux: Any) -> Any:
    """(Of the factors those axes aside that their products are added up over.)"""
    like = (gradient @ jnp.zeros((gradient.shape[1], 1)), aux)
    return lambda found: varying_as(found, like)


def _refreshed(how: How, gradient: Gradient, bases: Any, rules: Any, due: jax.Array) -> Any:
    """Bases and states of the rule after a refresh, and whether there was one."""
    varying = _varying_as_found(gradient, bases, rules, due)
    renew = lambda: varying(_renewed(how, gradient, bases, rules))
    return jax.lax.cond(due, renew, lambda: varying((bases, rules, jnp.zeros([], bool))))


def _renewed_in(
    settings: Settings, sizes: tuple[int, ...], kept: Any, dy: Any, aux: Any, probe: Probe
) -> Any:
    """Of several kernels, along axes of ``sizes`` in front: as ``_refreshed``, one due kernel after
    another, those on different devices at once.

    Where two axes have one size, either may be the one that is split: both are taken for it.
    """
    split = dict(settings.how.split)
    devices = [split.get(size, 1) for size in sizes]
    apart = [size // parts for size, parts in zip(sizes, devices, strict=True)]
    k = len(sizes)

    def group(x: jax.Array) -> jax.Array:  # (d1 s1, d2 s2, ...) to (d1, d2, s1, s2, ...)
        pairs = zip(x.shape, devices, apart, strict=False)
        parts = [(1, 1) if size == 1 else (d, s) for size, d, s in pairs]
        x = x.reshape(*(size for pair in parts for size in pair), *x.shape[k:])
        return x.transpose(*range(0, 2 * k, 2), *range(1, 2 * k, 2), *range(2 * k, x.ndim))

    def ungroup(x: jax.Array) -> jax.Array:
        x = x.transpose(*(i + j for i in range(k) for j in (0, k)), *range(2 * k, x.ndim))
        return x.reshape(*sizes, *x.shape[2 * k :])

    def renew_all(kept: jax.Array, dy: jax.Array, aux: Any, probe: Probe) -> Any:
        def gradient(i: Any) -> Gradient:
            place = jnp.unravel_index(i, apart)

            def take(x: jax.Array) -> jax.Array:
                for j in place:
                    j = jnp.minimum(j, x.shape[0] - 1)
                    x = jax.lax.dynamic_index_in_dim(x, j, keepdims=False)
                return x

            x, d, p = jax.tree.map(take, (kept, dy, probe))
            return Gradient(x, d, _over(settings, x, d, p))

        def renew(i: Any, carry: Any) -> Any:
            old = jax.tree.map(lambda x: x[i], carry[:2])
            new = _renewed(settings.how, gradient(i), *old)
            return jax.tree.map(lambda x, n: x.at[i].set(n), carry, new)

        bases, rules, due = jax.tree.map(lambda x: x.reshape(-1, *x.shape[k:]), aux)
        varying = _varying_as_found(gradient(0), bases, rules, due)
        start = varying((bases, rules, jnp.zeros(due.shape, bool)))
        found = in_due_slices(due, renew, start)
        return jax.tree.map(lambda x: x.reshape(*apart, *x.shape[1:]), found)

    aux = jax.tree.map(lambda x: jnp.broadcast_to(x, (*sizes, *x.shape[k:])), aux)
    arguments = jax.tree.map(group, (kept, dy, aux, probe))
    return jax.tree.map(ungroup, _over_kernels(renew_all, k, *arguments))


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
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            bits = jax.lax.bitcast_convert_type(parts.astype(jnp.uint16), jnp.uint32)
            return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(x))
        if jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize <= 2:
            return parts.astype(x.dtype)
        return jax.lax.bitcast_convert_type(parts.astype(jnp.uint16), x.dtype)

    return jax.tree.map(join, like, tree)
