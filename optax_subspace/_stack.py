"""A stack of identical blocks: its forward pass, and one block's gradient at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_subspace._blocks import dequantize
from optax_subspace._dependence import flow


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

    def gradient(self, weights: Any, saved: Any, dy: Any) -> tuple[Any, Any]:
        """The cotangents of one block's weights and of its input.

        Args:
          weights: the layer's, as arrays.
          saved: its slice of what :meth:`forward` has kept.
          dy: cotangent of the block's output.
        """
        if self.remat:
            return jax.vjp(self.block, weights, saved)[1](dy)
        # The residuals that follow from weights are computed anew; those of this stand-in for the
        # input are replaced, and so never computed.
        x = jax.tree.map(jnp.zeros_like, dy)
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
