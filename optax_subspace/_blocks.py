"""Arrays stored block-wise, in 8 or 4 bits a value."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from optax_subspace._codes import CODES, Code, code_of
from optax_subspace._projectors._base import check_count


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array is stored in blocks.

    Attributes:
      code: name of the code, see :func:`quantize_state`.
      signed: whether there are codes for negative numbers.
      block: number of values that share a scale, a power of two.
      shards: blocks keep to each of this many equal parts of every axis that it divides, and are
        shorter where a part is.
    """

    code: str = "dynamic"
    signed: bool = True
    block: int = 256
    shards: int = 1

    def __post_init__(self):
        code_of(self.code, self.signed)
        check_count("block", self.block, 2)
        if self.block & (self.block - 1):
            raise ValueError(f"block must be a power of two, got {self.block}")
        check_count("shards", self.shards)

    @property
    def codec(self) -> Code:
        return code_of(self.code, self.signed)


class Quantized:
    """An array stored as codes, with a scale for each block of consecutive values.

    The order is that of the rows (row-major); with ``shards`` the array is first cut into that many
    equal parts along each axis which it divides, and each part has blocks of its own.

    Attributes:
      codes: ``(*parts, blocks, block)``, of the code's dtype; with a code of 4 bits two values
        share a byte: ``(*parts, blocks, block / 2)``.
      scales: float32 ``(*parts, blocks)``: the block's entry of largest magnitude, *with its sign*,
        so that it is always the code of 1 and encoding what was decoded changes nothing.
      slice_shape, dtype: of the array that is stored.
      layout: code, block and parts.

    Where arrays were stored under ``jax.vmap``, ``codes`` and ``scales`` have its axes in front.
    """

    def __init__(
        self, codes: Any, scales: Any, slice_shape: tuple[int, ...], dtype: Any, layout: Layout
    ):
        self.codes, self.scales = codes, scales
        self.slice_shape, self.dtype, self.layout = slice_shape, dtype, layout

    @property
    def batch(self) -> int:
        """The number of axes that ``jax.vmap`` has put in front."""
        return self.scales.ndim - 1 - len(_cut(self.slice_shape, self.layout.shards))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is stored, the axes in front included."""
        return (*self.scales.shape[: self.batch], *self.slice_shape)

    def __repr__(self) -> str:
        return f"Quantized({self.layout.code}, {self.shape}, {self.dtype})"

    def __init_subclass__(cls):
        _register(cls)


def _register(cls: type[Quantized]) -> None:
    def flatten_with_keys(q):
        # Code and shape are part of the path under which a checkpoint keeps the codes, so that one
        # that was written with others does not fit: the codes' own shapes are those of blocks.
        sign = "" if q.layout.signed else "_unsigned"
        name = f"{q.layout.code}{sign}_{'x'.join(map(str, q.slice_shape))}"
        keys = (jax.tree_util.GetAttrKey(name), jax.tree_util.GetAttrKey("scales"))
        return tuple(zip(keys, (q.codes, q.scales), strict=True)), (
            q.slice_shape,
            q.dtype,
            q.layout,
        )

    jax.tree_util.register_pytree_with_keys(
        cls,
        flatten_with_keys,
        lambda static, children: cls(*children, *static),
        lambda q: ((q.codes, q.scales), (q.slice_shape, q.dtype, q.layout)),
    )


_register(Quantized)


def is_quantized(x: Any) -> bool:
    """Whether ``x`` is a :class:`Quantized` node, for ``is_leaf``."""
    return isinstance(x, Quantized)


def has_quantized(tree: Any) -> bool:
    """Whether a node of ``tree`` is a :class:`Quantized`."""
    return any(map(is_quantized, jax.tree.leaves(tree, is_leaf=is_quantized)))


def is_variable(x: Any) -> bool:
    """Whether ``x`` is a variable of NNX, told by what it can do, for ``is_leaf``."""
    return hasattr(x, "get_value") and hasattr(x, "get_metadata")


def is_box(x: Any) -> bool:
    """Whether ``x`` is an array of Flax Linen in a box with metadata, told by what it can do."""
    return hasattr(x, "unbox") and hasattr(x, "replace_boxed")


def without_variables(tree: Any) -> Any:
    """``tree`` with the arrays that NNX keeps in variables in their places."""
    return jax.tree.map(lambda x: x.get_value() if is_variable(x) else x, tree, is_leaf=is_variable)


def quantize(
    x: jax.Array, layout: Layout | str = "dynamic", key: jax.Array | None = None
) -> Quantized:
    """Stores a floating-point array in blocks.

    Args:
      x: the array.
      layout: a code's name, or code, block and parts.
      key: for stochastic rounding; without one, each value goes to its nearest code.

    Raises:
      TypeError: ``x`` is no array of real floating-point numbers.
      ValueError: the code is unknown, the block no power of two.

    Example:
      >>> import jax.numpy as jnp
      >>> stored = quantize(jnp.linspace(-1.0, 1.0, 512))
      >>> stored.codes.shape, stored.scales.tolist()
      ((2, 256), [-1.0, 1.0])
      >>> float(dequantize(stored)[0])
      -1.0
    """
    layout = Layout(layout) if isinstance(layout, str) else layout
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"only real floating-point arrays can be quantized, not {x.dtype}")
    return _encode(x, layout, key)


# Compiled on their own, so that outside of a jitted step they are not a hundred small programs.
@functools.partial(jax.jit, static_argnames="layout")
def _encode(x: jax.Array, layout: Layout, key: jax.Array | None) -> Quantized:
    codec = layout.codec
    blocks = _to_blocks(x.astype(jnp.float32), layout)
    if not layout.signed:
        blocks = jnp.maximum(blocks, 0)
    largest = jnp.max(blocks, axis=-1)
    if layout.signed:
        least = jnp.min(blocks, axis=-1)
        largest = jnp.where(largest >= -least, largest, least)
    # A block of zeros has the scale 0. Compilers divide by reciprocals: those must be normal.
    size = jnp.abs(largest)
    power = jnp.where(size > 2.0**100, 2.0**-32, jnp.where(size < 2.0**-90, 2.0**32, 1.0))
    divisor = jnp.where(largest == 0, 1, largest * power)
    scaled = blocks * power[..., None] / divisor[..., None]
    uniform = None if key is None else jax.random.uniform(key, blocks.shape)
    codes = codec.encode(scaled, uniform)
    if codec.bits == 4:
        first, second = jnp.split(codes, 2, axis=-1)
        codes = first | (second << 4)
    return Quantized(codes, largest, x.shape, x.dtype, layout)


def quantize_like(x: jax.Array, stored: Quantized, key: jax.Array | None = None) -> Quantized:
    """``x`` in the blocks and of the class, shape and dtype of ``stored``.

    Raises:
      ValueError: ``x`` has another shape.
    """
    if x.shape != stored.shape:
        raise ValueError(f"an array of shape {x.shape} for blocks of one of shape {stored.shape}")
    batch = stored.shape[: stored.batch]
    keys = None if key is None else jax.random.split(key, batch) if batch else key
    one = lambda x, key: _encode(x, stored.layout, key)
    for _ in batch:
        one = jax.vmap(one, in_axes=(0, None if key is None else 0))
    new = one(x, keys)
    return type(stored)(new.codes, new.scales, stored.slice_shape, stored.dtype, stored.layout)


def dequantize(tree: Any) -> Any:
    """``tree`` with an array, in its own shape and dtype, for each :class:`Quantized` node.

    Example:
      >>> import jax.numpy as jnp
      >>> dequantize({"w": quantize(jnp.arange(3.0), "linear"), "b": 0.5})
      {'b': 0.5, 'w': Array([0.      , 0.992126, 2.      ], dtype=float32)}
    """
    restore = lambda x: decoded(x) if is_quantized(x) else x
    return jax.tree.map(restore, tree, is_leaf=is_quantized)


@functools.partial(jax.jit, static_argnames="dtype")
def decoded(stored: Quantized, dtype: Any = None) -> jax.Array:
    """The array that is stored, in its own dtype or in another."""
    codes, codec = stored.codes, stored.layout.codec
    if codec.bits == 4:
        codes = jnp.concatenate([codes & 0xF, codes >> 4], axis=-1)
    blocks = codec.decode(codes) * stored.scales[..., None]
    restore = lambda b: _from_blocks(b, stored.slice_shape, stored.layout)
    for _ in range(stored.batch):
        restore = jax.vmap(restore)
    return restore(blocks).astype(stored.dtype if dtype is None else dtype)


def storage_of(dtype: Any) -> Any:
    """What a user's choice of storage means: a :class:`Layout` for a code, else a dtype or None.

    Raises:
      TypeError: neither a code nor a floating-point dtype.
    """
    if dtype is None:
        return None
    if isinstance(dtype, Layout):
        return dtype
    if isinstance(dtype, str) and dtype in CODES:
        return Layout(dtype)
    given = dtype
    try:
        dtype = jnp.dtype(dtype)
        if dtype.name not in CODES:
            jnp.promote_types(dtype, jnp.float32)  # raises for what JAX can't compute with
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"projector_dtype must be a floating-point dtype of at least 16 bits, one of "
            f"{', '.join(CODES)}, or a Layout, got {given!r}"
        )
    return Layout(dtype.name) if dtype.name in CODES else dtype


def zeros(shape: tuple[int, ...], storage: Any, batch: int = 0) -> Any:
    """Zeros in a dtype, or in blocks, each slice of the ``batch`` first axes in its own."""
    if not isinstance(storage, Layout):
        return jnp.zeros(shape, storage)
    one = jax.eval_shape(lambda: quantize(jnp.zeros(shape[batch:]), storage))
    zero = quantize(jnp.zeros(1), storage).codes[0, 0]
    codes = jnp.full((*shape[:batch], *one.codes.shape), zero)
    scales = jnp.zeros((*shape[:batch], *one.scales.shape))
    return Quantized(codes, scales, one.slice_shape, one.dtype, storage)


def parts_of(shape: tuple[int, ...], shards: int) -> tuple[int, ...]:
    """The number of parts of each axis."""
    return tuple(shards if size % shards == 0 else 1 for size in shape)


def _cut(shape: tuple[int, ...], shards: int) -> list[int]:
    """The parts of those axes that are cut."""
    return [parts for parts in parts_of(shape, shards) if parts > 1]


def _block(shape: tuple[int, ...], layout: Layout) -> int:
    """The values that share a scale: those of a whole part, where it has less than a block."""
    cut = _cut(shape, layout.shards)
    part = math.prod(shape) // math.prod(cut)
    return min(layout.block, max(2, 1 << (part - 1).bit_length())) if cut else layout.block


def _to_blocks(x: jax.Array, layout: Layout) -> jax.Array:
    """``(*shape)`` to ``(*parts, blocks, block)``; the last block is filled up with zeros."""
    parts, cut = parts_of(x.shape, layout.shards), _cut(x.shape, layout.shards)
    block = _block(x.shape, layout)
    if cut:
        halves = [size for k, n in zip(parts, x.shape, strict=True) for size in (k, n // k)]
        d = x.ndim
        x = x.reshape(halves).transpose(*range(0, 2 * d, 2), *range(1, 2 * d, 2))
    x = x.reshape(*cut, -1)
    missing = -x.shape[-1] % block
    if missing:
        x = jnp.pad(x, [(0, 0)] * len(cut) + [(0, missing)])
    return x.reshape(*cut, -1, block)


def _from_blocks(blocks: jax.Array, shape: tuple[int, ...], layout: Layout) -> jax.Array:
    """The inverse of :func:`_to_blocks`."""
    parts, cut = parts_of(shape, layout.shards), _cut(shape, layout.shards)
    flat = blocks.reshape(*cut, -1)[..., : math.prod(shape) // math.prod(cut)]
    if cut:
        d = len(shape)
        within = [n // k for k, n in zip(parts, shape, strict=True)]
        flat = flat.reshape(*parts, *within).transpose(*(a for i in range(d) for a in (i, d + i)))
    return flat.reshape(shape)
