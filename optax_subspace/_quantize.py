"""The state of any transformation, stored in 8 or 4 bits."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_subspace._blocks import (
    Layout,
    dequantize,
    is_quantized,
    is_variable,
    quantize,
    quantize_like,
)
from optax_subspace._codes import code_of
from optax_subspace._handover import LowRankUpdate
from optax_subspace._inner_state import holds_squares, holds_weights
from optax_subspace._leaves import leaf_names, path_name
from optax_subspace._projected import is_projected
from optax_subspace._projection import compute_dtype
from optax_subspace._projection_state import ProjectionState
from optax_subspace._projectors._base import check_count, key_of, transformation
from optax_subspace._rules import compile_pattern
from optax_subspace._slices import count_slices, in_slices


class QuantizedState(NamedTuple):
    """State of :func:`quantize_state`.

    Attributes:
      inner: the inner transformation's state, with :class:`Quantized` nodes for its large arrays.
      key: for stochastic rounding; None without.
    """

    inner: optax.OptState
    key: jax.Array | None


def quantize_state(
    inner: optax.GradientTransformation,
    code: str = "dynamic",
    *,
    rules: Sequence[tuple[str, str | Layout | None]] | None = None,
    block: int = 256,
    min_size: int = 4096,
    shards: int = 1,
    slice_size: int | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Stores the arrays of ``inner``'s state in 8 or 4 bits between its updates.

    At each update the arrays are decoded to float32, ``inner`` is updated, and they are encoded
    again. Real floating-point arrays of ``min_size`` values or more are stored so. Counters, random
    keys, copies of the weights (``z`` of schedule-free, ``params0`` of Prodigy) and the whole state
    of a projection stay as they are: its bases have a ``projector_dtype`` of their own.

    Args:
      inner: any optax transformation, :func:`scale_by_subspace` or a member of a chain after
        :func:`subspace_project` among them (whose ``side="auto"`` does not know of the codes then;
        inside of :func:`scale_by_subspace` it does).
      code: ``dynamic`` (the non-linear map of 8-bit Adam), ``linear``, ``float8_e4m3fn``,
        ``float8_e5m2``, or with 4 bits ``dynamic4``, ``linear4``. Second moments, which are told
        by the names that optax gives them (``nu``, ``sum_of_squares``, ...), take its unsigned
        form. Of these ``linear``, ``linear4``, ``dynamic4`` and, where a block spans more than
        five decades, ``float8_e4m3fn`` round small second moments to zero, after which the steps
        grow without bound: they serve for first moments, with
        ``rules=[("^nu/", "dynamic")]``. ``dynamic`` does so below 1e-7 of a block's largest: an
        entry whose gradient stays away then takes one step of ``mu / eps``, which is why ``eps``
        should not be smaller than 1e-8, and 1e-6 is better.
      rules: ``(regex, code)`` pairs on the paths of the state, first match wins; None as a code
        leaves the array as it is, a :class:`Layout` says whether it is signed.
      block: number of values that share a float32 scale, a power of two.
      min_size: smaller arrays stay as they are.
      shards: number of devices that an axis may be split over; blocks keep to the parts.
      slice_size: update leaves of more than four times so many values in slices of their first
        axis, of so many values at most, where ``inner`` treats each entry for itself as Adam and
        Lion do: no more than a slice exists in float32 then, where on a TPU there would be several
        arrays of the leaf's size. For leaves that are not split over devices, which would be
        gathered.
      stochastic_rounding: draw between the two nearest codes such that the mean is kept (but for
        what lies below the least code: the signed dynamic codes have no -1). Under ``jax.vmap`` of
        ``init`` all slices draw the same.
      seed: seed of these draws.

    Returns:
      A transformation with state :class:`QuantizedState`.

    Raises:
      ValueError: the code is unknown, ``block`` no power of two, a pattern no regular expression.
      TypeError: at ``init``, a rule gives a code to arrays of integers or keys alone.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = quantize_state(optax.scale_by_adam())
      >>> state = tx.init({"w": jnp.ones((64, 128))})
      >>> state.inner.mu["w"].codes.shape, state.inner.mu["w"].codes.dtype.name
      ((32, 256), 'uint8')

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2021, sections 2.1 and 2.2.
    """
    inner = transformation("quantize_state: inner", inner)
    default = Layout(code, True, block, shards)
    compiled = [(compile_pattern(pattern), rule) for pattern, rule in rules or ()]
    for _, rule in compiled:
        if isinstance(rule, str):
            code_of(rule)
    check_count("min_size", min_size, 0)
    if slice_size is not None:
        check_count("slice_size", slice_size)

    def init_fn(params):
        state = inner.init(params)
        matched: dict[str, bool] = {}

        def store(path, x):
            # A variable of NNX gives way to its blocks: NNX would take them for a part of the tree.
            value = x.get_value() if is_variable(x) else x
            layout = _layout(path, value, state, default, compiled, min_size, matched)
            if layout is None:
                return x
            # (Not folded: XLA would compute the codes of so many zeros while it compiles.)
            wide = value.astype(compute_dtype(value.dtype))
            return quantize(jax.lax.optimization_barrier(wide), layout)

        whole = lambda node: _is_own(node) or is_variable(node)
        stored = jax.tree_util.tree_map_with_path(store, state, is_leaf=whole)
        _check_rules(compiled, matched, state, bool(jax.tree.leaves(params)))
        key = key_of(seed, " ".join(leaf_names(params))) if stochastic_rounding else None
        return QuantizedState(stored, key)

    def update_fn(updates, state, params=None, **extra_args):
        def step(updates, stored, params, key):
            decode = lambda x: dequantize(x) if is_quantized(x) else x
            decoded = jax.tree.map(decode, stored, is_leaf=_is_own)
            updates, new = inner.update(updates, decoded, params, **extra_args)
            keys = iter(())
            if key is not None:
                count = sum(map(is_quantized, jax.tree.leaves(stored, is_leaf=_is_own)))
                keys = iter(jax.random.split(key, max(count, 1)))

            def store(old, x):
                return quantize_like(x, old, next(keys, None)) if is_quantized(old) else x

            return updates, jax.tree.map(store, stored, new, is_leaf=_is_own)

        key, draw = (None, None) if state.key is None else jax.random.split(state.key)
        handed = jax.tree.leaves(updates, is_leaf=_is_no_array)
        # (Extra arguments may be trees of all leaves.)
        slices = {}
        if slice_size is not None and not extra_args and not any(map(_is_no_array, handed)):
            slices = count_slices(inner, updates, state.inner, params, slice_size)
        if slices:
            updates, stored = in_slices(step, slices, updates, state.inner, params, draw)
        else:
            updates, stored = step(updates, state.inner, params, draw)
        return updates, QuantizedState(stored, key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_own(node: Any) -> bool:
    """Whether a node of the state is one that this wrapper encodes, or leaves as it is whole."""
    return is_quantized(node) or isinstance(node, ProjectionState | QuantizedState)


def _is_no_array(leaf: Any) -> bool:
    """Whether a leaf is one of this library's own, projected or on its way to a subspace."""
    return isinstance(leaf, LowRankUpdate) or is_projected(leaf)


def _check_rules(
    rules: Sequence[tuple[re.Pattern[str], str | Layout | None]],
    matched: dict[str, bool],
    state: Any,
    has_params: bool,
) -> None:
    """Tells of patterns that match nothing, or nothing that a code could be given to."""
    paths = leaf_names(state)
    for pattern, code in rules:
        if matched.get(pattern.pattern):
            continue
        if pattern.pattern in matched and code is not None:
            found = next(path for path in paths if pattern.search(path))
            raise TypeError(
                f"quantize_state: the rule {pattern.pattern!r} gives a code to {found}, which "
                "holds no real floating-point numbers: only such arrays can be quantized"
            )
        if pattern.pattern not in matched and has_params:
            warnings.warn(
                f"quantize_state: the rule {pattern.pattern!r} matches no array of the state, "
                f"whose paths are like {paths[-1] if paths else ''!r}",
                UserWarning,
                stacklevel=4,
            )


def _layout(
    path: Any,
    x: Any,
    state: Any,
    default: Layout,
    rules: Sequence[tuple[re.Pattern[str], str | Layout | None]],
    min_size: int,
    matched: dict[str, bool],
) -> Layout | None:
    """How an array ``x`` of the state is stored; None if it stays as it is."""
    name = path_name(path)
    fits = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
    found = [(pattern.pattern, code) for pattern, code in rules if pattern.search(name)]
    for pattern, _ in found:
        matched[pattern] = matched.get(pattern, False) or fits
    code = found[0][1] if found else None if holds_weights(path, state) else default.code
    if code is None or not fits or x.size < min_size:
        return None
    if isinstance(code, Layout):
        return code
    return dataclasses.replace(default, code=code, signed=not holds_squares(path, state))
