"""States in few bits on another number of devices: blocks of values keep to the part of a device.

What was saved on one split is read in its own blocks, and encoded again in those of the other.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from models import sharding
from optax_subspace import Quantized, dequantize, quantize
from train.step import State


def _is_stored(x: Any) -> bool:
    """Whether `x` is a node of blocks."""
    return isinstance(x, Quantized)


def beside(saved: State, ours: State) -> State:
    """The shapes `saved` on the devices of `ours`: arrays of other shapes are split where they can
    be."""
    pairs = zip(jax.tree.leaves(saved), jax.tree.leaves(ours), strict=True)
    return jax.tree.unflatten(jax.tree.structure(saved), [_beside(x, y) for x, y in pairs])


def _beside(saved: Any, ours: Any) -> jax.ShapeDtypeStruct:
    where = ours.sharding
    if saved.shape != ours.shape and isinstance(where, NamedSharding):
        devices = where.mesh.shape[sharding.FSDP]
        axis = next((i for i, size in enumerate(saved.shape) if size % devices == 0), None)
        spec = () if axis is None else (None,) * axis + (sharding.FSDP,)
        where = NamedSharding(where.mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=where)


def encoded_as(state: State, ours: State) -> State:
    """The values of `state` in the blocks of the shapes `ours`, one leaf after the other."""
    nodes = lambda tree: jax.tree.leaves(tree, is_leaf=_is_stored)
    structure = jax.tree.structure(ours, is_leaf=_is_stored)
    pairs = zip(nodes(state), nodes(ours), strict=True)
    return jax.tree.unflatten(structure, [_encoded_as(x, y) for x, y in pairs])


def _encoded_as(saved: Any, ours: Any) -> Any:
    if not _is_stored(ours) or saved.layout == ours.layout:
        return saved

    def again(codes: jax.Array, scales: jax.Array) -> Any:
        # (In float32: of weights in bfloat16 the decoded values would be rounded.)
        values = dequantize(Quantized(codes, scales, saved.slice_shape, jnp.float32, saved.layout))
        encode = lambda x: quantize(x, ours.layout)
        for _ in range(ours.batch):
            encode = jax.vmap(encode)
        found = encode(values)
        return type(ours)(found.codes, found.scales, ours.slice_shape, ours.dtype, ours.layout)

    places = jax.tree.map(lambda x: x.sharding, ours)
    return jax.jit(again, out_shardings=places)(saved.codes, saved.scales)
