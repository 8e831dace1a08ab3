"""Low-rank adapters (LoRA) on the seven kernels of each layer.

Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1: y = x W + (alpha / r) (x A) B, where A
begins random and B as zeros, so that the model begins as it is.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Params = dict[str, Any]

_KERNELS = ("q", "k", "v", "o", "gate", "up", "down")
_ADAPTERS = ("lora_a", "lora_b")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraKernel:
    """A kernel with its adapter, which stands in for the array in a tree of parameters.

    Attributes:
      base: (..., inputs, outputs).
      lora_a: (..., inputs, r).
      lora_b: (..., r, outputs).
      scale: alpha / r.
    """

    base: Any
    lora_a: Array
    lora_b: Array
    scale: float = dataclasses.field(metadata={"static": True})

    def astype(self, dtype: Any) -> "LoraKernel":
        """All three in another dtype, for the product."""
        cast = lambda x: x.astype(dtype)
        return LoraKernel(cast(self.base), cast(self.lora_a), cast(self.lora_b), self.scale)

    def __rmatmul__(self, x: Array) -> Array:
        """(..., inputs) -> (..., outputs)."""
        return x @ self.base + ((x @ self.lora_a) @ self.lora_b) * self.scale


def add(params: Params, rank: int, alpha: float, key: Array) -> Params:
    """Parameters with an adapter on each kernel of the layers.

    Args:
      params: as from `models.llama.init_params`, the layers' kernels (L, inputs, outputs).
      rank: r.
      alpha: the adapters' product is scaled by alpha / r.
      key: of the first values of A, uniform within 1 / sqrt(inputs).

    >>> layers = {name: {"kernel": jnp.ones((2, 8, 4))} for name in _KERNELS}
    >>> kernel = add({"layers": layers}, 2, 4.0, jax.random.key(0))["layers"]["q"]["kernel"]
    >>> kernel.lora_a.shape, kernel.lora_b.shape, kernel.scale
    ((2, 8, 2), (2, 2, 4), 2.0)
    """

    def adapted(name: str, kernel: Array) -> LoraKernel:
        *batch, inputs, outputs = kernel.shape
        bound = 1 / math.sqrt(inputs)
        draw = jax.random.fold_in(key, _KERNELS.index(name))
        a = jax.random.uniform(draw, (*batch, inputs, rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*batch, rank, outputs), kernel.dtype)
        return LoraKernel(kernel, a.astype(kernel.dtype), b, alpha / rank)

    layers = {
        name: {**part, "kernel": adapted(name, part["kernel"])} if name in _KERNELS else part
        for name, part in params["layers"].items()
    }
    return {**params, "layers": layers}


def labels(params: Any) -> Any:
    """`adapter` for the adapters' leaves and `base` for all others, for `optax.multi_transform`."""
    label = lambda path, _: "adapter" if _is_adapter(path) else "base"
    return jax.tree_util.tree_map_with_path(label, params)


def adapters(params: Any) -> list[Array]:
    """The adapters' arrays or shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [leaf for path, leaf in leaves if _is_adapter(path)]


def freeze(params: Any) -> Any:
    """The same values, where all but the adapters have no gradient."""
    stop = lambda path, x: x if _is_adapter(path) else jax.lax.stop_gradient(x)
    return jax.tree_util.tree_map_with_path(stop, params)


def merge(params: Params) -> Params:
    """Parameters in which each adapter is added to its kernel."""
    is_kernel = lambda x: isinstance(x, LoraKernel)
    join = lambda k: k.base + (k.lora_a @ k.lora_b * k.scale).astype(k.base.dtype)
    return jax.tree.map(lambda x: join(x) if is_kernel(x) else x, params, is_leaf=is_kernel)


def _is_adapter(path: Any) -> bool:
    return getattr(path[-1], "name", None) in _ADAPTERS
