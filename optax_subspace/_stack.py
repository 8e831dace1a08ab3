"""A stack of identical blocks among parameters, its forward pass, and one block's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from optax_subspace._blocks import dequantize, is_quantized
from optax_subspace._dependence import flow
from optax_subspace._leaves import path_name


class Stack:
    """The passes through ``x = block(layer, x)`` for each layer.

    Args:
      block: ``(layer, x) -> x``.
      remat: keep the blocks' inputs alone; otherwise all that their gradients need of the forward
        pass, but for what follows from the weights.
    """

    def __init__(self, block: Callable[[Any, Any], Any], remat: bool):
        self.block, self.remat = block, remat

    def forward(self, layers: Any, x: Any) -> tuple[Any, Any]:
        """All layers, whose arrays have the layers' axis in front.

        Returns:
          The last block's output and what :meth:`gradient` needs, the layers' axis in front.
        """
        kept = [] if self.remat else self._kept(layers, x)

        def one(x, layer):
            weights = dequantize(layer)
            if self.remat:
                return self.block(weights, x), x
            y, vjp = jax.vjp(self.block, weights, x)
            residuals = jax.tree.leaves(vjp)
            return y, [residuals[indices[0]] for indices in kept]

        return jax.lax.scan(one, x, layers)

    def gradient(self, weights: Any, saved: Any, dy: Any, like: Any) -> tuple[Any, Any]:
        """The cotangents of one block's weights and of its input.

        Args:
          weights: the layer's, as arrays.
          saved: its slice of what :meth:`forward` has kept.
          dy: cotangent of the block's output.
          like: arrays of the shapes and dtypes of the block's input, which those of ``dy`` are not
            where there are integers among them.
        """
        if self.remat:
            return jax.vjp(self.block, weights, saved)[1](dy)
        # The residuals that follow from weights are computed anew; those of this stand-in for the
        # input are replaced, and so never computed.
        x = jax.tree.map(jnp.zeros_like, like)
        residuals, structure = jax.tree.flatten(jax.vjp(self.block, weights, x)[1])
        for value, indices in zip(saved, self._kept_of_one(weights, x), strict=True):
            for i in indices:
                residuals[i] = value
        return jax.tree.unflatten(structure, residuals)(dy)

    def _kept(self, layers: Any, x: Any) -> list[list[int]]:
        one = jax.eval_shape(lambda s: dequantize(jax.tree.map(lambda a: a[0], s)), layers)
        return self._kept_of_one(one, x)

    def _kept_of_one(self, weights: Any, x: Any) -> list[list[int]]:
        """Which residuals depend on the input: their indices, those of equal ones together."""
        residuals = lambda w, x: jax.tree.leaves(jax.vjp(self.block, w, x)[1])
        traced = jax.make_jaxpr(residuals)(weights, x).jaxpr
        number = len(jax.tree.leaves(weights))
        of_input = [frozenset([0] if i >= number else []) for i in range(len(traced.invars))]
        groups: dict[Any, list[int]] = {}
        for i, (var, found) in enumerate(
            zip(traced.outvars, flow(traced, of_input, []), strict=True)
        ):
            if found:
                groups.setdefault(var, []).append(i)
        return list(groups.values())


def parts_of_tree(params: Any, layers: str) -> tuple[Any, dict[str, Any]]:
    """The stack and the rest."""
    if type(params) is not dict:
        raise ValueError(
            f"fused_backward: the parameters are of type {type(params).__name__}, which it can't "
            "take apart: give a plain dict, such as flax.core.unfreeze(params), "
            "nnx.to_pure_dict(params) or dict(params)"
        )
    if layers not in params:
        raise ValueError(
            f"fused_backward: the parameters have no key {layers!r}, but "
            f"{', '.join(map(repr, params))}: name the key of the stack by layers="
        )
    if type(params[layers]) in (list, tuple):
        raise ValueError(
            f"fused_backward: the parameters have a {type(params[layers]).__name__} under "
            f"{layers!r}: stack the layers, jax.tree.map(lambda *x: jnp.stack(x), *layers)"
        )
    return params[layers], {key: part for key, part in params.items() if key != layers}


def count_layers(stack: Any, layers: str) -> int:
    """The length of the first axis, which all arrays of a stack share."""
    count, first = None, ""
    for path, leaf in jax.tree_util.tree_leaves_with_path(stack, is_leaf=is_quantized):
        name = path_name([jax.tree_util.DictKey(layers), *path])
        if is_quantized(leaf) and leaf.batch != 1:
            raise ValueError(
                f"parameter {name} is stored in {leaf.layout.code} as a whole: store it layer by "
                "layer, jax.vmap(quantize_weights)(params[...])"
            )
        length = leaf.shape[0] if leaf.shape else None
        if length is None or count not in (None, length):
            raise ValueError(
                f"parameter {name} has shape {leaf.shape}: the arrays of a stack need the layers' "
                f"axis in front, of {count or 'equal'} entries" + (f" as {first}" if first else "")
            )
        count, first = length, first or name
    if not count:
        raise ValueError(f"fused_backward: the stack {layers!r} has no layers")
    return count


def keys_read(
    embed: Any, loss: Any, rest: dict[str, Any], batch: Any
) -> tuple[list[str], list[str]]:
    """The keys of the rest that the embedding and the loss read."""
    x = jax.eval_shape(embed, rest, batch)

    def reads(function: Any, *arguments: Any) -> list[str]:
        traced = jax.make_jaxpr(function)(rest, *arguments).jaxpr
        used = {v for eqn in traced.eqns for v in eqn.invars if not isinstance(v, Literal)}
        used |= {v for v in traced.outvars if not isinstance(v, Literal)}
        counts = {key: len(jax.tree.leaves(part)) for key, part in sorted(rest.items())}
        inputs = iter(traced.invars)
        found = {key: [next(inputs) for _ in range(n)] for key, n in counts.items()}
        return [key for key, variables in found.items() if used & set(variables)]

    return reads(embed, batch), reads(loss, x, batch)


def slice_of(tree: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def put_slice(tree: Any, part: Any, i: Any) -> Any:
    put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0)
    return jax.tree.map(put, tree, part)
