"""Weights of few bits: stochastic rounding to bfloat16, and an int8 format."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_subspace._blocks import (
    Layout,
    Quantized,
    decoded,
    is_quantized,
    quantize,
    quantize_like,
)
from optax_subspace._leaves import leaf_names, path_name
from optax_subspace._plan import plan
from optax_subspace._rules import Rules


class QuantizedWeight(Quantized):
    """A weight kept in int8: blocks of values with a float32 scale, see :class:`Quantized`.

    It takes the place of an array in a tree of parameters. The forward pass runs on
    :func:`dequantize` of the tree, gradients are those of its arrays, and
    :func:`apply_updates` writes the new weight by stochastic rounding, so that steps smaller than
    the distance of two codes are kept in the mean.

    References:
      Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, section 3.4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_subspace import dequantize
      >>> params = quantize_weights({"w": jnp.linspace(-1, 1, 4096).reshape(64, 64)})
      >>> params["w"].codes.dtype.name, params["w"].shape
      ('int8', (64, 64))
      >>> gradient = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(dequantize(params))
      >>> updates = jax.tree.map(lambda g: -0.001 * g, gradient)
      >>> params = apply_updates(params, updates, key=jax.random.key(0))
    """


def quantize_weights(
    params: optax.Params,
    rules: Rules | None = None,
    *,
    block: int = 256,
    min_size: int = 4096,
    shards: int = 1,
) -> optax.Params:
    """Keeps matrices of at least ``min_size`` values in int8.

    Without rules every array of two or more axes is one, embeddings and output heads too.

    Args:
      params: tree of floating-point arrays.
      rules: those of a projection, see :func:`plan`: the leaves that it would project at rank 1 are
        the matrices, and all else stays as it is.
      block: values that share a scale, a power of two.
      min_size: smaller arrays stay as they are, and so do vectors.
      shards: number of devices that an axis may be split over.

    Returns:
      The tree with :class:`QuantizedWeight` nodes in place of arrays.

    Raises:
      TypeError: a matrix holds integers or complex numbers.
    """
    layout = Layout("linear", True, block, shards)
    leaves, structure = jax.tree.flatten(params)
    if rules is None:
        matrices = [jnp.ndim(x) > 1 for x in leaves]
    else:
        matrices = [p.projected for p in plan(params, rules, rank=1)]

    def store(name, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"quantize_weights: parameter {name} has dtype {x.dtype}: only real "
                "floating-point matrices can be kept in int8; leave it out with a rule "
                "(pattern, None)"
            )
        return _weight(quantize(x, layout))

    stored = [
        store(name, x) if is_matrix and x.size >= min_size else x
        for name, x, is_matrix in zip(leaf_names(params), leaves, matrices, strict=True)
    ]
    return jax.tree.unflatten(structure, stored)


def apply_updates(
    params: optax.Params, updates: optax.Updates, *, key: jax.Array | None = None
) -> optax.Params:
    """Adds updates to parameters, with stochastic rounding where parameters have few bits.

    The sum is taken in float32 (float64 for such parameters). With a ``key`` it is rounded to one
    of its two neighbours in bfloat16 or float16, or among the codes of a :class:`QuantizedWeight`,
    such that the mean is the sum: steps too small for the format are kept in the mean, where
    rounding to the nearest loses them all. Without one it is rounded to the nearest.

    Args:
      params: tree of arrays or :class:`QuantizedWeight` nodes.
      updates: tree of arrays of the parameters' shapes.
      key: random key; use another at each step.

    Returns:
      Parameters of the same structure and dtypes. Those whose update is zero throughout are the
      same to the bit.

    Raises:
      ValueError: an update neither has its parameter's shape nor broadcasts to it.

    References:
      Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, section 3.4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params, updates = jnp.ones(1000, jnp.bfloat16), jnp.full(1000, 1e-3)
      >>> float(apply_updates(params, updates).mean())  # the next bfloat16 is 1.0078125
      1.0
      >>> rounded = apply_updates(params, updates, key=jax.random.key(0))
      >>> sorted(set(rounded.tolist()))
      [1.0, 1.0078125]
    """
    with_paths, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    structure: Any = jax.tree.structure(params, is_leaf=is_quantized)
    leaves, steps = [leaf for _, leaf in with_paths], structure.flatten_up_to(updates)
    for (path, leaf), step in zip(with_paths, steps, strict=True):
        shape = jnp.shape(leaf)
        if step is not None and not _fits(jnp.shape(step), shape):
            raise ValueError(
                f"apply_updates: the update of {path_name(path)} has shape {jnp.shape(step)}, the "
                f"parameter {shape}: give updates of the parameters' shapes"
            )
    keys = [None] * len(leaves) if key is None else list(jax.random.split(key, len(leaves)))
    return structure.unflatten(
        [_apply(p, u, k) for p, u, k in zip(leaves, steps, keys, strict=True)]
    )


def _fits(update: tuple[int, ...], param: tuple[int, ...]) -> bool:
    ends = zip(reversed(update), reversed(param), strict=False)
    return len(update) <= len(param) and all(u in (1, p) for u, p in ends)


def _apply(param: Any, update: Any, key: jax.Array | None) -> Any:
    if update is None:
        return param
    if is_quantized(param):
        # (Not as arrays of the weight's own dtype: bfloat16 would round away a good part of the
        # distance of two codes, at every step.)
        total = decoded(param, jnp.float32) + jnp.asarray(update, jnp.float32)
        # Decoded values lie between codes by their last bits, from which a frozen weight would
        # drift by whole codes, now and then.
        moves = jnp.any(update != 0)
        choose = lambda new, old: jnp.where(moves, new, old)
        return jax.tree.map(choose, quantize_like(total, param, key), param)
    param = jnp.asarray(param)
    if not jnp.issubdtype(param.dtype, jnp.floating):
        return (param + update).astype(param.dtype)
    wide = jnp.float64 if param.dtype == jnp.float64 else jnp.float32
    total = param.astype(wide) + jnp.asarray(update, wide)
    if key is None or param.dtype not in (jnp.bfloat16, jnp.float16):
        return total.astype(param.dtype)
    return stochastic_round(total, param.dtype, key)


def stochastic_round(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """Rounds float32 to one of the two neighbours in bfloat16 or float16, in the mean exactly.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> stochastic_round(jnp.array([1.0, jnp.inf]), jnp.bfloat16, jax.random.key(0)).tolist()
      [1.0, inf]
    """
    nearest = x.astype(dtype)
    if dtype == jnp.bfloat16:
        # bfloat16 is the upper half of float32: the sum carries with the lower half's probability.
        noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
        upper = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
        return jnp.where(jnp.isfinite(x), upper.astype(dtype), nearest)
    above = jnp.where(x > nearest, jnp.inf, -jnp.inf).astype(dtype)
    other = jnp.nextafter(nearest, above)
    gap = other.astype(x.dtype) - nearest.astype(x.dtype)
    share = (x - nearest.astype(x.dtype)) / gap
    drawn = jnp.where(jax.random.uniform(key, x.shape) < share, other, nearest)
    return jnp.where(jnp.isfinite(nearest), drawn, nearest)


def _weight(stored: Quantized) -> QuantizedWeight:
    return QuantizedWeight(
        stored.codes, stored.scales, stored.slice_shape, stored.dtype, stored.layout
    )
