"""Low-rank adapters (LoRA) on the seven kernels of each layer, which may begin anew (ReLoRA).

Sources: Hu et al. 2021 (arXiv 2106.09685), section 4.1: y = x W + (alpha / r) (x A) B, where A
begins random and B as zeros, so that the model begins as it is. Lialin et al. 2023 (2307.05695),
section 3: W takes the product up from time to time, so that the sum of updates has a higher rank.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from models.config import Frozen

Array = jax.Array
Params = dict[str, Any]

KERNELS = ("q", "k", "v", "o", "gate", "up", "down")
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

    >>> layers = {name: {"kernel": jnp.ones((2, 8, 4))} for name in KERNELS}
    >>> kernel = add({"layers": layers}, 2, 4.0, jax.random.key(0))["layers"]["q"]["kernel"]
    >>> kernel.lora_a.shape, kernel.lora_b.shape, kernel.scale
    ((2, 8, 2), (2, 2, 4), 2.0)
    """

    def adapted(name: str, kernel: Array) -> LoraKernel:
        *batch, inputs, outputs = kernel.shape
        a = _first_a(name, (*batch, inputs, rank), kernel.dtype, key)
        return LoraKernel(kernel, a, jnp.zeros((*batch, rank, outputs), kernel.dtype), alpha / rank)

    layers = {
        name: {**part, "kernel": adapted(name, part["kernel"])} if name in KERNELS else part
        for name, part in params["layers"].items()
    }
    return {**params, "layers": layers}


def restart(params: Params, key: Array, rounding: Array | None = None) -> Params:
    """Adapters that begin anew: kernels take up their products, A is drawn, B is zeros.

    Args:
      params: as from `add`; kernels may be `optax_subspace.QuantizedWeight`, layer by layer.
      key: of the new values of A; use another each time.
      rounding: key by which kernels of few bits are rounded stochastically; None rounds to the
        nearest, by which products that are small beside their kernels are lost.
    """
    layers = {
        name: {**part, "kernel": _restarted(name, part["kernel"], key, rounding)}
        if isinstance(part.get("kernel"), LoraKernel)
        else part
        for name, part in params["layers"].items()
    }
    return {**params, "layers": layers}


def _restarted(name: str, kernel: LoraKernel, key: Array, rounding: Array | None) -> LoraKernel:
    from optax_subspace import apply_updates

    a, b = kernel.lora_a, kernel.lora_b
    own = None if rounding is None else jax.random.fold_in(rounding, KERNELS.index(name))

    def add_product(i: Array, base: Any) -> Any:
        """One layer at a time, so that no more than one product exists."""
        take = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        left, right = (take(x).astype(jnp.float32) for x in (a, b))
        product = jnp.matmul(left, right, precision="highest") * kernel.scale
        drawn = None if own is None else jax.random.fold_in(own, i)
        new = apply_updates(jax.tree.map(take, base), product, key=drawn)
        put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0)
        return jax.tree.map(put, base, new)

    base = jax.lax.fori_loop(0, a.shape[0], add_product, kernel.base)
    return LoraKernel(base, _first_a(name, a.shape, a.dtype, key), jnp.zeros_like(b), kernel.scale)


def _first_a(name: str, shape: tuple[int, ...], dtype: Any, key: Array) -> Array:
    bound = 1 / math.sqrt(shape[-2])
    own = jax.random.fold_in(key, KERNELS.index(name))
    return jax.random.uniform(own, shape, jnp.float32, -bound, bound).astype(dtype)


def labels(params: Any, frozen: Frozen = "nothing") -> Any:
    """What each leaf is, for `optax.multi_transform`: `adapter`, `frozen`, or `base` if neither."""

    def label(path: Any, _: Any) -> str:
        if _is_adapter(path):
            return "adapter"
        return "frozen" if _is_frozen(path, frozen) else "base"

    return jax.tree_util.tree_map_with_path(label, params)


def adapters(params: Any) -> list[Array]:
    """The adapters' arrays or shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [leaf for path, leaf in leaves if _is_adapter(path)]


def trained(params: Any, frozen: Frozen) -> list[Array]:
    """The arrays or shapes of what is not frozen."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [leaf for path, leaf in leaves if not _is_frozen(path, frozen)]


def freeze(params: Any, frozen: Frozen) -> Any:
    """The same values, where what is frozen has no gradient."""
    stop = lambda path, x: jax.lax.stop_gradient(x) if _is_frozen(path, frozen) else x
    return jax.tree_util.tree_map_with_path(stop, params)


def merge(params: Params) -> Params:
    """Parameters in which each adapter is added to its kernel."""
    is_kernel = lambda x: isinstance(x, LoraKernel)
    join = lambda k: k.base + (k.lora_a @ k.lora_b * k.scale).astype(k.base.dtype)
    return jax.tree.map(lambda x: join(x) if is_kernel(x) else x, params, is_leaf=is_kernel)


def _is_adapter(path: Any) -> bool:
    return getattr(path[-1], "name", None) in _ADAPTERS


def _is_frozen(path: Any, frozen: Frozen) -> bool:
    if frozen == "kernels":
        return getattr(path[-1], "name", None) == "base"
    return frozen == "all" and not _is_adapter(path)
