"""The matrices of a LLaMA's layers, as leaves of their own or stacked over the layers."""

import jax
import jax.numpy as jnp

from models.config import PRESETS
from optax_subspace import MatrixSpec

# Ranks of the GaLore scripts.
RANKS = {"60m": 128, "350m": 256, "1b": 512, "7b": 1024}
STACKED = [(".*", MatrixSpec(1, 2))]


def shapes(preset: str) -> dict[str, tuple[int, int]]:
    """Rows and columns of the seven matrices of a layer, kernels being (inputs, outputs)."""
    config = PRESETS[preset]
    d, wide = config.hidden_size, config.intermediate_size
    square = dict.fromkeys(("query", "key", "value", "output"), (d, d))
    return {**square, "gate": (d, wide), "up": (d, wide), "down": (wide, d)}


def separate(preset: str, layers: int) -> dict[str, jax.Array]:
    """One leaf per layer and matrix, of standard normal values."""
    tree = {}
    for layer in range(layers):
        for number, (name, shape) in enumerate(shapes(preset).items()):
            key = jax.random.fold_in(jax.random.key(layer), number)
            tree[f"{layer}/{name}"] = jax.random.normal(key, shape, jnp.float32)
    return tree


def stacked(preset: str, layers: int) -> dict[str, jax.Array]:
    """The same values as one leaf (layers, rows, columns) per matrix."""
    flat = separate(preset, layers)
    return {
        name: jnp.stack([flat[f"{layer}/{name}"] for layer in range(layers)])
        for name in shapes(preset)
    }
