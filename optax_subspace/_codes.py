"""Codes of 8 and 4 bits for numbers in ``[-1, 1]``, by arithmetic alone.

A code has levels ``0 = l_0 < l_1 < ... < l_top = 1``, the same for both signs, and stands for a
number by the index of its level. Encoding finds two neighbouring levels from the number, computes
both, and takes the nearer one. No table is read: lookups and searches are slow on vector units, a
TPU's above all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_F32 = np.float32

CODES = ("dynamic", "linear", "float8_e4m3fn", "float8_e5m2", "dynamic4", "linear4")


@dataclasses.dataclass(frozen=True)
class Code:
    """How numbers in ``[-1, 1]`` are stored; those beyond count as -1 and 1.

    Attributes:
      name: of the code, as the user gives it.
      signed: whether negative numbers have codes; where not, they count as 0.
      bits: of one stored number, 8 or 4.
      dtype: of the array of stored numbers.
      encode: float32 numbers to stored ones: to the nearest, or with numbers drawn from ``[0, 1)``
        as second argument to one of the two neighbours, such that the mean of what is decoded is
        the number.
      decode: stored numbers to float32.
    """

    name: str
    signed: bool
    bits: int
    dtype: Any
    encode: Callable[..., jax.Array]
    decode: Callable[[jax.Array], jax.Array]


class Levels(NamedTuple):
    """A code's levels, by index.

    Attributes:
      top: index of level 1.
      lowest: index of the level of the most negative number; 0 for an unsigned code.
      offset: what is added to an index, negative for a negative number, when it is stored.
      below: estimates from ``x`` in ``[0, 1]`` an index ``i`` such that the two levels next to
        ``x`` are ``i`` and ``i + 1``, up to a thousandth of their distance.
      level: the float32 value of a level by its int32 index.
    """

    top: int
    lowest: int
    offset: int
    below: Callable[[jax.Array], jax.Array]
    level: Callable[[jax.Array], jax.Array]

    def choose(self, x: jax.Array, uniform: jax.Array | None) -> jax.Array:
        """The index of the nearest level to ``x`` in ``[0, 1]``, or of a neighbour drawn."""
        index = jnp.clip(self.below(x).astype(jnp.int32), 0, self.top - 1)
        if uniform is not None:
            # Exactly: the estimate may be one too low, and then nothing would be drawn.
            index = jnp.minimum(index + (self.level(index + 1) <= x), self.top - 1)
        low, high = self.level(index), self.level(index + 1)
        if uniform is None:
            # 2 x against low + high, whose rounding error is `lost` (Knuth's two-sum).
            total = low + high
            part = total - low
            lost = (low - (total - part)) + (high - part)
            up = (2 * x - total) - lost > 0
        else:
            up = x - low > uniform * (high - low)
        return index + up.astype(jnp.int32)

    def code(self, name: str, bits: int) -> Code:
        """The code whose stored numbers are indices."""
        signed = self.lowest > 0
        dtype = jnp.dtype(jnp.int8 if signed and not self.offset else jnp.uint8)

        def encode(x, uniform=None):
            index = self.choose(jnp.clip(jnp.abs(x) if signed else x, 0, 1), uniform)
            if signed:
                index = jnp.where(x < 0, -jnp.minimum(index, self.lowest), index)
            return (index + self.offset).astype(dtype)

        def decode(stored):
            index = stored.astype(jnp.int32) - self.offset
            return jnp.sign(index).astype(_F32) * self.level(jnp.abs(index))

        return Code(name, signed, bits, dtype, encode, decode)


def _linear(bits: int, signed: bool) -> Levels:
    """Equal steps; the same on both sides of zero."""
    top = 2 ** (bits - signed) - 1
    return Levels(
        top=top,
        lowest=top if signed else 0,
        offset=top if signed and bits == 4 else 0,
        below=lambda x: jnp.floor(x * top - 1e-3),
        level=lambda index: index.astype(_F32) / top,
    )


def _float8(name: str) -> Code:
    """A floating-point format, times a power of two, so that scaling rounds nothing."""
    dtype = jnp.dtype(name)
    largest = 2.0 ** np.floor(np.log2(float(jnp.finfo(dtype).max)))
    magnitude = lambda index: jax.lax.bitcast_convert_type(index.astype(jnp.uint8), dtype)
    level = lambda index: magnitude(index).astype(_F32) / largest

    def below(x):
        rounded = (x * largest).astype(dtype)
        index = jax.lax.bitcast_convert_type(rounded, jnp.uint8).astype(jnp.int32)
        return index - (level(index) > x)

    top = int(np.asarray(largest, dtype).view(np.uint8))
    levels = Levels(top, top, 0, below, level)

    def encode(x, uniform=None):
        if uniform is None:
            return (jnp.clip(x, -1, 1) * largest).astype(dtype)
        drawn = magnitude(levels.choose(jnp.minimum(jnp.abs(x), 1), uniform))
        return jnp.where(x < 0, -drawn, drawn)

    return Code(name, True, 8, dtype, encode, lambda stored: stored.astype(_F32) / largest)


def _dynamic(bits: int, signed: bool) -> Levels:
    """Decades of 1, 2, 4, ... levels (twice as many unsigned), equally spaced within each.

    The levels are those of bitsandbytes, bit for bit: in a decade of ``n`` levels the means of
    neighbours among ``n + 1`` points from 0.1 to 1, times a power of ten. The largest is 1, which
    has no negative.
    """
    decades = bits - 1
    # Counted from 1 (2 unsigned), the levels of a decade are n ... 2 n - 1 for a power n of two.
    shift = 0 if signed else 1
    sizes = [2 ** (i + shift) for i in range(decades)]
    factors = [10.0 ** (i - decades + 1) for i in range(decades)]
    top = 2 * sizes[-1] - shift

    def of_decade(is_in: Callable[[int], jax.Array], values: list[Any]) -> jax.Array:
        chosen = values[0]
        for i in range(1, decades):
            chosen = jnp.where(is_in(i), values[i], chosen)
        return chosen

    def below(x):
        # Anywhere between the last level of a decade and the first of the next.
        from_decade = [x >= _F32(f * (0.1 + 0.2 / n)) for f, n in zip(factors, sizes, strict=True)]
        choose = lambda values: of_decade(lambda i: from_decade[i], [_F32(v) for v in values])
        n = choose(sizes)
        slope = choose([m / (0.9 * f) for m, f in zip(sizes, factors, strict=True)])
        place = jnp.floor(x * slope + (n * _F32(8 / 9) - _F32(0.501)))
        return jnp.clip(place, n - 1, 2 * n - 1) - shift

    # The points are 0.1 + 0.9 t, and 1 - 0.9 (1 - t) in the upper half, rounded once. Here in two
    # parts whose products and sums are exact, so that it does not matter whether a compiler fuses
    # a product with a sum.
    tenth, rest = _F32(0.1), _F32(1) - _F32(0.1)
    other_tenth = 1 - float(rest)
    coarse = lambda value: np.round(float(value) * 2**14) / 2**14
    start, slope = coarse(tenth), coarse(rest)
    fine_start = _F32(float(tenth) - start), _F32(other_tenth - start)
    fine_slope = _F32(float(rest) - slope)

    def point(t):
        fine = jnp.where(t < 0.5, *fine_start) + fine_slope * t
        return (_F32(start) + _F32(slope) * t) + fine

    def level(index):
        count = index + shift
        bits = jax.lax.bitcast_convert_type(count.astype(_F32), jnp.int32)
        as_float = lambda b: jax.lax.bitcast_convert_type(b, jnp.float32)
        # count = n (1 + t): t is the mantissa, n the exponent.
        t = as_float((bits & 0x7FFFFF) | 0x3F800000) - 1
        one_in_n = as_float(0x7F000000 - (bits & 0x7F800000))
        middle = (point(t) + point(t + one_in_n)) * _F32(0.5)
        factor = of_decade(lambda i: count >= sizes[i], [_F32(f) for f in factors])
        # The minimum also keeps the product from being fused with a sum that follows.
        value = jnp.minimum(middle * factor, 1)
        return jnp.where(index == 0, 0, jnp.where(index == top, 1, value)).astype(_F32)

    lowest = top - 1 if signed else 0
    return Levels(top, lowest, lowest, below, level)


@functools.cache
def code_of(name: str, signed: bool = True) -> Code:
    """The code of that name, for numbers in ``[-1, 1]`` or ``[0, 1]``.

    Raises:
      ValueError: the name is unknown.

    Example:
      >>> code = code_of("linear")
      >>> code.decode(code.encode(jnp.array([0.0, 0.5, -1.0]))).tolist()
      [0.0, 0.4960629940032959, -1.0]
    """
    if name not in CODES:
        raise ValueError(f"code must be one of {', '.join(CODES)}, got {name!r}")
    if name.startswith("float8"):
        return _float8(name)
    bits = 4 if name.endswith("4") else 8
    levels = _dynamic if name.startswith("dynamic") else _linear
    return levels(bits, signed).code(name, bits)
