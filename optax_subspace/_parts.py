"""The parts of the parameters that a fused backward pass updates one by one, and their states."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_subspace._blocks import dequantize
from optax_subspace._projected import is_projected


def as_seen(tree: Any) -> Any:
    """Parameters or gradients as a transformation sees them: arrays, float32 in place of float16.

    (Second moments vanish in float16, in which optax would keep them.)
    """

    def widened(x: Any) -> Any:
        if getattr(x, "dtype", None) != jnp.float16:
            return x
        if is_projected(x):
            return dataclasses.replace(x, dtype=jnp.float32)
        return x.astype(jnp.float32)

    return jax.tree.map(widened, dequantize(tree), is_leaf=is_projected)


def init_part(tx: optax.GradientTransformation, part: Any) -> Any:
    """The state of one part."""
    with warnings.catch_warnings():
        # Rules for other parts match nothing here; the whole tree was looked at before.
        warnings.filterwarnings("ignore", "the rule .* (matches no|has no effect)", UserWarning)
        return tx.init(as_seen(part))
