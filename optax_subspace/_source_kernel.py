"""A dense product whose backward pass gives the projected gradient of its kernel."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_subspace._blocks import dequantize
from optax_subspace._projection import compute_dtype
from optax_subspace._projectors import Projector
from optax_subspace._projectors._base import directions, squared_norm
from optax_subspace._refresh import checked


class How(NamedTuple):
    """The static side of a kernel's gradient.

    Attributes:
      path: the parameter's.
      sides: ``("left",)``, ``("right",)`` or both.
      reduction, output: axes of one slice of the kernel.
      rule: the projector.
      refresh: whether slices that are due get a new basis in this backward pass.
    """

    path: str
    sides: tuple[str, ...]
    reduction: tuple[int, ...]
    output: tuple[int, ...]
    rule: Projector
    refresh: bool


class Probe(NamedTuple):
    """Zeros whose cotangents bring out what a backward pass has found; batch axes in front.

    Attributes:
      low: the projected gradient, ``plan.low_shape``.
      products: ``G G^T P / ||G||_F^2`` of each side, ``(m, r)``, for rules that follow; the norm
        is the estimate of ``squared_norm``.
      energies: ``||P^T G||_F^2 / ||G||_F^2`` of each side; -1 without any gradient.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceKernel:
    """A kernel that stands in for the array in a tree of parameters while it is differentiated.

    It knows ``x @ kernel``, ``kernel.astype``, and :func:`source_dot_general`; anything else, which
    would lose its gradient, raises.

    Attributes:
      weight: the kernel itself, ``(*batch, ...)``.
      bases: of each side, as stored.
      rules: the rule's state of each side.
      due: boolean ``(*batch,)``, the slices whose basis is found anew.
      probe: see :class:`Probe`.
      how: see :class:`How`.
    """

    weight: jax.Array
    bases: tuple[Any, ...]
    rules: tuple[Any, ...]
    due: jax.Array
    probe: Probe
    how: How = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def ndim(self) -> int:
        return self.weight.ndim

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def astype(self, dtype: Any) -> SourceKernel:
        """The kernel in another dtype, for the product."""
        return dataclasses.replace(self, weight=self.weight.astype(dtype))

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """``x @ kernel``, ``(..., m) -> (..., n)``."""
        if self.how.reduction != (0,) or self.how.output != (1,):
            raise self._unknown("x @ kernel, whose reduction axis is 0 and output axis 1")
        return source_dot_general(x, self, (((x.ndim - 1,), (0,)), ((), ())))

    def __getitem__(self, index: Any) -> SourceKernel:
        """``kernel[...]``, as NNX reads its variables; any other part has no gradient here."""
        if index is not Ellipsis:
            raise self._unknown(f"its part kernel[{index!r}]")
        return self

    def _unknown(self, what: str) -> TypeError:
        return TypeError(
            f"parameter {self.how.path} of shape {self.shape} (reduction axes "
            f"{self.how.reduction}, output axes {self.how.output}) is projected at the source, "
            f"where its gradient is known for x @ kernel and source_dot_general over the reduction "
            f"axes alone, not for {what}: change the layer, or leave the parameter at full rank "
            "by a rule of None"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._unknown(f"the array's {name}")


def source_dot_general(
    lhs: jax.Array,
    rhs: Any,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> jax.Array:
    """``jax.lax.dot_general`` that also takes a kernel that is projected at the source.

    For layers with a ``dot_general`` argument, together with :func:`source_promote_dtype`:
    ``nnx.Linear(m, n, dot_general=source_dot_general, promote_dtype=source_promote_dtype,
    rngs=rngs)``, and the same of ``nn.Dense``, ``nnx.LinearGeneral`` and ``nn.DenseGeneral``.

    Args:
      lhs: activations.
      rhs: an array, for which this is ``jax.lax.dot_general``, or the kernel that
        :func:`subspace_value_and_grad` puts in its place.
      dimension_numbers, precision, preferred_element_type, **options: those of
        ``jax.lax.dot_general``; over a kernel's reduction axes alone, without batch axes.

    Raises:
      TypeError: the product contracts other axes of the kernel than its reduction axes.

    Example:
      >>> import jax.numpy as jnp
      >>> x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
      >>> source_dot_general(x, kernel, (((1,), (0,)), ((), ()))).shape
      (2, 4)
    """
    if not isinstance(rhs, SourceKernel):
        return jax.lax.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, **options
        )
    (left, right), (left_batch, right_batch) = dimension_numbers
    left, right = tuple(a % lhs.ndim for a in left), tuple(a % rhs.ndim for a in right)
    how = rhs.how
    given = [name for name, value in options.items() if value is not None]
    if left_batch or right_batch or set(right) != set(how.reduction) or given:
        raise rhs._unknown(f"dot_general over its axes {right} with batch axes {right_batch}")
    # (..., m), with the contracted axes in the order of the kernel's reduction axes.
    free = [a for a in range(lhs.ndim) if a not in left]
    contracted = [left[right.index(a)] for a in how.reduction]
    x = lhs.transpose(*free, *contracted)
    sizes = [rhs.shape[a] for a in how.output]
    m = x[(0,) * len(free)].size if x.size else 0
    rows = x.reshape(-1, m) if x.size else x.reshape(0, 1)
    matrix = rhs.weight.transpose(*how.reduction, *how.output).reshape(m, -1)
    settings = _Settings(how, precision, preferred_element_type)
    out = _product(settings, rows, matrix, (rhs.bases, rhs.rules, rhs.due), rhs.probe)
    out = out.reshape(*(lhs.shape[a] for a in free), *sizes)
    # dot_general has the kernel's free axes in ascending order.
    order = sorted(range(len(sizes)), key=lambda i: how.output[i])
    return out.transpose(*range(len(free)), *(len(free) + i for i in order))


def source_promote_dtype(*args: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """Flax's ``promote_dtype`` that also takes a kernel that is projected at the source.

    Args:
      *args: arrays, kernels and None, one by one as Linen gives them, or as one tuple as NNX does.
      dtype: what they are cast to; by default the dtype that they have in common.
      inexact: make integers floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> [x.dtype.name for x in source_promote_dtype(jnp.ones(2), jnp.ones(2, jnp.bfloat16))]
      ['float32', 'float32']
    """
    if len(args) == 1 and isinstance(args[0], tuple | list):
        args = tuple(args[0])
    if dtype is None:
        dtype = jnp.result_type(*(x.dtype for x in args if x is not None))
        if inexact and not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(dtype, jnp.float32)
    is_kernel = lambda x: isinstance(x, SourceKernel)
    cast = lambda x: x.astype(dtype) if is_kernel(x) else jnp.asarray(x, dtype)
    return [None if x is None else cast(x) for x in args]


class _Settings(NamedTuple):
    how: How
    precision: Any
    preferred: Any

    @property
    def keeps_coordinates(self) -> bool:
        """Whether ``x P`` is all that the backward pass needs of ``x``."""
        how = self.how
        return "left" in how.sides and not how.refresh and how.rule.follow is None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(settings: _Settings, x: Any, weight: Any, aux: Any, probe: Probe) -> jax.Array:
    """``x (t, m) @ weight (m, n)``."""
    del aux, probe
    return jnp.dot(
        x, weight, precision=settings.precision, preferred_element_type=settings.preferred
    )


def _forward(settings, x, weight, aux, probe):
    out = _product(settings, x, weight, aux, probe)
    if settings.keeps_coordinates:
        left = aux[0][settings.how.sides.index("left")]
        kept = _narrow(x, left)
    else:
        kept = x
    # (Of the probe nothing but its shapes is read.)
    return out, (kept, weight, aux, probe)


def _backward(settings, saved, dy):
    kept, weight, aux, probe = saved
    dx = jnp.dot(
        dy, weight.T, precision=settings.precision, preferred_element_type=settings.preferred
    )
    found = _found(settings, kept, dy, aux, probe)
    x_dtype = weight.dtype if settings.keeps_coordinates else kept.dtype
    return dx.astype(x_dtype), None, None, found


_product.defvjp(_forward, _backward)


def _found(settings: _Settings, kept: jax.Array, dy: jax.Array, aux: Any, probe: Probe) -> Probe:
    """What the backward pass of one product finds: the cotangent of its probe."""
    how = settings.how
    bases, rules, due = aux
    done = jnp.zeros([], bool)
    if how.refresh:
        gradient = Gradient(kept, dy)
        bases, rules, done = _refreshed(how, gradient, bases, rules, due)
    if settings.keeps_coordinates:
        low = _contract(kept, _narrow(dy, bases[1]) if len(how.sides) == 2 else dy)
    else:
        ends = {"left": kept, "right": dy}
        for side, basis in zip(how.sides, bases, strict=True):
            ends[side] = _narrow(ends[side], basis)
        low = _contract(ends["left"], ends["right"])
    followed: list[tuple[jax.Array, jax.Array]] = []
    if how.rule.follow is not None:
        followed = [
            _followed(kept, dy, side, basis, low if how.sides == (side,) else None)
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


def _narrow(x: jax.Array, basis: Any) -> jax.Array:
    """``x P``, ``(t, r)`` in the dtype of ``x``."""
    basis = dequantize(basis).astype(x.dtype)
    return jnp.dot(x, basis, preferred_element_type=compute_dtype(x.dtype)).astype(x.dtype)


def _contract(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x^T y`` over the tokens."""
    return jnp.dot(x.T, y, preferred_element_type=compute_dtype(x.dtype))


def _followed(
    x: jax.Array, dy: jax.Array, side: str, basis: Any, low: Any
) -> tuple[jax.Array, jax.Array]:
    """``G G^T P / ||G||_F^2`` of one side, ``(m, r)``, and the energy within its basis."""
    if side == "right":
        x, dy = dy, x
    if low is None:
        low = _contract(_narrow(x, basis), dy)
    elif side == "right":
        low = low.T
    # Scaled, so that squares neither overflow nor vanish.
    scale = jnp.maximum(jnp.max(jnp.abs(low)), jnp.finfo(low.dtype).tiny)
    low = low / scale
    seen_by = directions(dy.shape[1], low.dtype)
    seen = _contract(x, _narrow(dy, seen_by)) / scale
    squared = squared_norm(low, seen, dequantize(basis).astype(low.dtype), seen_by)
    some = squared > 0
    product = _contract(x, _narrow(dy, low.T)) / jnp.where(some, squared, 1) / scale
    return product, jnp.where(some, jnp.sum(low**2) / jnp.where(some, squared, 1), -1.0)


class Gradient:
    """``G = x^T d`` of shape ``(m, n)``, known by its products: what a rule without need of the
    matrix itself (``Projector.matrix_free``) is given at the source."""

    def __init__(self, x: jax.Array, d: jax.Array):
        self.x, self.d = x, d
        self.shape, self.ndim = (x.shape[1], d.shape[1]), 2
        self.dtype = compute_dtype(jnp.promote_types(x.dtype, d.dtype))

    @property
    def T(self) -> Gradient:
        return Gradient(self.d, self.x)

    def __matmul__(self, other: jax.Array) -> jax.Array:
        """``G A``, ``(m, k)``."""
        return _contract(self.x, _narrow(self.d, other))

    def __rmatmul__(self, other: jax.Array) -> jax.Array:
        """``A G``, ``(k, n)``."""
        return (self.T @ other.T).T

    def dense(self) -> jax.Array:
        """The matrix."""
        return _contract(self.x, self.d)

    def scaled(self) -> Gradient:
        """Neither squares of its factors nor their products overflow or vanish."""
        one = lambda a: a / jnp.maximum(jnp.max(jnp.abs(a)), jnp.finfo(a.dtype).tiny)
        return Gradient(one(self.x), one(self.d))


def _refreshed(how: How, gradient: Gradient, bases: Any, rules: Any, due: jax.Array) -> Any:
    """Bases and states of the rule after a refresh, and whether there was one."""

    def renew():
        matrix: Any = gradient.scaled() if how.rule.matrix_free else gradient.dense()
        if how.rule.matrix_free:
            # A product with one random vector tells whether there is any gradient.
            some = matrix @ jax.random.normal(jax.random.key(0), (matrix.shape[1], 1))
        else:
            some = matrix
            matrix = matrix / jnp.maximum(jnp.max(jnp.abs(matrix)), jnp.finfo(matrix.dtype).tiny)
        usable = jnp.all(jnp.isfinite(some)) & jnp.any(some != 0)
        sides = [
            checked(how.rule.update, matrix if side == "left" else matrix.T, basis, state)
            for side, basis, state in zip(how.sides, bases, rules, strict=True)
        ]
        new = tuple(b for b, _ in sides), tuple(s for _, s in sides)
        keep = lambda n, o: jnp.where(usable, n, o)
        return (*jax.tree.map(keep, new, (bases, rules)), usable)

    return jax.lax.cond(due, renew, lambda: (bases, rules, jnp.zeros([], bool)))


def as_floats(tree: Any) -> Any:
    """A rule's state as floats, exactly: whole numbers become two of 16 bits each.

    Cotangents are floats, and a refresh within the backward pass has the rule's state to bring out.
    """

    def split(x: jax.Array) -> Any:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return x
        bits = x.astype(jnp.uint32) if x.dtype != jnp.int32 else x.view(jnp.uint32)
        return (bits >> 16).astype(jnp.float32), (bits & 0xFFFF).astype(jnp.float32)

    return jax.tree.map(split, tree)


def from_floats(tree: Any, like: Any) -> Any:
    """The inverse of :func:`as_floats`, in the dtypes of ``like``."""

    def join(x: jax.Array, parts: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return parts
        high, low = (p.astype(jnp.uint32) for p in parts)
        bits = (high << 16) | low
        return bits.view(jnp.int32) if x.dtype == jnp.int32 else bits.astype(x.dtype)

    return jax.tree.map(join, like, tree)
