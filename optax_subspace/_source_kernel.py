"""The kernel that stands in for an array where its gradient is projected at the source."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl

from optax_subspace._sharding import refuse_explicit_axes
from optax_subspace._source_product import Probe, Settings, product
from optax_subspace._source_refresh import How

# What a product with a kernel is called in the program of a loss that is checked.
AT_SOURCE = "optax_subspace_at_source"
# What errors of JAX call the dtype of a mark.
MARK_DTYPE = "key<at_source>"


def _no_numbers(*arguments: Any) -> Any:
    del arguments
    raise TypeError(f"{MARK_DTYPE} is no random key")


_MARKS = define_prng_impl(
    key_shape=(1,),
    seed=_no_numbers,
    split=_no_numbers,
    random_bits=_no_numbers,
    fold_in=_no_numbers,
    name=AT_SOURCE,
    tag="at_source",
)


def mark(shape: tuple[int, ...]) -> jax.Array:
    """Random keys, with which no function computes that takes all leaves of a tree for numbers.

    (A stand-in has to be a tree of arrays, for ``scan`` and ``vmap``. A norm of all leaves would
    take its bases into the loss, and lose its gradient.)
    """
    return jax.random.wrap_key_data(jnp.zeros((*shape, 1), jnp.uint32), impl=_MARKS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceKernel:
    """A kernel that stands in for the array in a tree of parameters while it is differentiated.

    It knows ``x @ kernel``, ``kernel.astype``, :func:`source_dot_general`, and indices along its
    batch axes; anything else, which would lose its gradient, raises.

    Attributes:
      weight: the kernel itself, ``(*batch, ...)``.
      bases: of each side, as stored.
      rules: the rule's state of each side.
      due: boolean ``(*batch,)``, the slices whose basis is found anew.
      probe: see :class:`Probe`.
      mark: see :func:`mark`.
      how: see :class:`How`.
      checked: whether products are named ``AT_SOURCE``, for :func:`first_misuse`.
    """

    # NumPy arrays leave x @ kernel to it.
    __array_ufunc__ = None

    weight: jax.Array
    bases: tuple[Any, ...]
    rules: tuple[Any, ...]
    due: jax.Array
    probe: Probe
    mark: jax.Array
    how: How = dataclasses.field(metadata={"static": True})
    checked: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def ndim(self) -> int:
        return self.weight.ndim

    @property
    def size(self) -> int:
        return self.weight.size

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def astype(self, dtype: Any) -> SourceKernel:
        """The kernel in another dtype, for the product."""
        if not jnp.issubdtype(dtype, jnp.floating):
            raise self._unknown(f"a cast to {jnp.dtype(dtype)}")
        return dataclasses.replace(self, weight=self.weight.astype(dtype))

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """``x @ kernel``, ``(..., m) -> (..., n)``."""
        x = jnp.asarray(x)
        if self.how.reduction != (0,) or self.how.output != (1,):
            raise self._unknown("x @ kernel, whose reduction axis is 0 and output axis 1")
        return source_dot_general(x, self, (((x.ndim - 1,), (0,)), ((), ())))

    def __getitem__(self, index: Any) -> SourceKernel:
        """Of a stack ``kernel[i]`` and the like, along batch axes in front; and ``kernel[...]``, as
        NNX reads its variables. Other parts have no gradient here."""
        if index is Ellipsis:
            return self
        given = index if isinstance(index, tuple) else (index,)
        is_place = lambda i: isinstance(i, slice) or jnp.issubdtype(jnp.result_type(i), jnp.integer)
        if given and given[-1] is Ellipsis:
            given = given[:-1]
        if len(given) > self.due.ndim or not all(map(is_place, given)):
            raise self._unknown(f"its part kernel[{index!r}], which is not along batch axes")
        return jax.tree.map(lambda x: x[given], self)

    def __len__(self) -> int:
        if not self.due.ndim:
            raise self._unknown("a number of rows")
        return self.shape[0]

    def __iter__(self) -> Iterator[SourceKernel]:
        # (By indices alone there would be no end to it: those beyond the last are the last.)
        return (self[i] for i in range(len(self)))

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
      TypeError: the product contracts other axes of the kernel than its reduction axes, or is of
        complex numbers.
      ValueError: the arrays are on a mesh with explicit axes.

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
    # As for arrays: integers times a kernel are floats, and so is what their gradient is made of.
    lhs = jnp.asarray(lhs)
    lhs = lhs.astype(jnp.promote_types(lhs.dtype, rhs.dtype))
    if jnp.issubdtype(lhs.dtype, jnp.complexfloating):
        raise rhs._unknown(f"a product with {lhs.dtype} numbers")
    for x in (lhs, rhs.weight):
        refuse_explicit_axes(jax.typeof(x).sharding.mesh)
    if rhs.ndim != len(rhs.how.reduction) + len(rhs.how.output):
        raise rhs._unknown("all slices at once: jax.vmap or jax.lax.scan take them one by one")
    (left, right), (left_batch, right_batch) = dimension_numbers
    left, right = tuple(a % lhs.ndim for a in left), tuple(a % rhs.ndim for a in right)
    how = rhs.how
    given = [name for name, value in options.items() if value is not None]
    if left_batch or right_batch or set(right) != set(how.reduction) or given:
        raise rhs._unknown(f"dot_general over its axes {right} with batch axes {right_batch}")
    if [lhs.shape[a] for a in left] != [rhs.shape[a] for a in right]:
        raise rhs._unknown(
            f"an array of shape {lhs.shape} contracted over its axes {left} with the axes {right}"
        )
    multiply = functools.partial(
        _multiply, left=left, right=right, precision=precision, preferred=preferred_element_type
    )
    if rhs.checked:
        multiply.__name__ = AT_SOURCE  # type: ignore[attr-defined]  # which partial objects take
        with jax.disable_jit(False):
            return jax.jit(multiply)(lhs, rhs)
    return multiply(lhs, rhs)


def _multiply(
    lhs: jax.Array,
    rhs: SourceKernel,
    left: tuple[int, ...],
    right: tuple[int, ...],
    precision: Any,
    preferred: Any,
) -> jax.Array:
    """The product over axes ``left`` and ``right``, those of the kernel in any order."""
    how = rhs.how
    # (..., m), with the contracted axes in the order of the kernel's reduction axes. The others
    # stay apart: made one, those that are split over devices would be gathered, but the first.
    free = [a for a in range(lhs.ndim) if a not in left]
    contracted = [left[right.index(a)] for a in how.reduction]
    tokens = [lhs.shape[a] for a in free]
    sizes = [rhs.shape[a] for a in how.output]
    m = math.prod(lhs.shape[a] for a in contracted)
    x = lhs.transpose(*free, *contracted).reshape(*tokens, m)
    matrix = rhs.weight.transpose(*how.reduction, *how.output).reshape(m, -1)
    if precision is None:
        # That of the context, which has ended when the backward pass is traced. (Type checkers know
        # no options of the configuration.)
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    settings = Settings(how, precision, preferred)
    out = product(settings, x, matrix, (rhs.bases, rhs.rules, rhs.due), rhs.probe)
    out = out.reshape(*tokens, *sizes)
    # dot_general has the kernel's free axes in ascending order.
    order = sorted(range(len(sizes)), key=lambda i: how.output[i])
    return out.transpose(*range(len(free)), *(len(free) + i for i in order))


def source_promote_dtype(*args: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """Flax's ``promote_dtype`` that also takes a kernel that is projected at the source.

    Args:
      *args: arrays, kernels and None, one by one as Linen gives them, or as one tuple as NNX does.
      dtype: what they are cast to; by default the dtype that they have in common.
      inexact: make integers floating-point.

    Returns:
      What was given in one dtype, None for None; a kernel stays a kernel.

    Raises:
      TypeError: there is no dtype that all of them promote to.

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
