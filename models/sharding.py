"""How a LLaMA's parameters are split over devices, and the products of kernels that are split.

One table says along which axis each parameter is split over the mesh axis `fsdp`; along the mesh
axis `data` all parameters are the same. A device that computes with a kernel gathers it from the
others, layer by layer, and lets it go again: backward passes gather it anew, and each device keeps
the sum of its own part of the gradient (Rajbhandari et al. 2020, arXiv 1910.02054, stage 3).
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Array = jax.Array

FSDP = "fsdp"

# (regex on the path, axes counted from the end): split along the first of them that can be. Of each
# kernel (None) it is the longer side, the outputs of square ones: the projection of the shorter
# side (`llama.subspace_rules`) then needs no exchange, and moments are split as their weights.
RULES: tuple[tuple[str, tuple[int, ...] | None], ...] = (
    (r"^layers/(q|k|v|o|gate|up|down)/kernel(/base)?$", None),
    (r"^layers/\w+/kernel/(lora_a|left)$", (-2,)),
    (r"^layers/\w+/kernel/(lora_b|right)$", (-1,)),
    (r"^(embed/embedding|head/kernel)$", (-1, -2)),
    (r"^(norm|layers/(attention|mlp)_norm)/scale$", ()),
)


def specs(params: Any, parts: int, prefix: str = "") -> Any:
    """How each parameter is split over `parts` devices of the mesh axis `fsdp`.

    Args:
      params: a tree of arrays or shapes, all of the model's or some.
      parts: number of devices along the axis; an axis is split if they divide it.
      prefix: path of `params` in the model's tree, such as `layers/`.

    Returns:
      A tree of `PartitionSpec`.

    Raises:
      ValueError: no rule knows a parameter.

    >>> kernel = {"layers": {"gate": {"kernel": jnp.ones((2, 8, 12))}}}
    >>> specs(kernel, 4)["layers"]["gate"]["kernel"]
    P(None, None, 'fsdp')
    >>> specs(kernel, 8)["layers"]["gate"]["kernel"]  # 12 columns can't be split in 8
    P(None, 'fsdp')
    """

    def of_leaf(path: Any, leaf: Any) -> PartitionSpec:
        name = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, axes in RULES:
            if re.search(pattern, name):
                if axes is None:
                    axes = (-2, -1) if leaf.shape[-2] > leaf.shape[-1] else (-1, -2)
                able = [a for a in axes if parts > 1 and leaf.shape[a] % parts == 0]
                return PartitionSpec(*[None] * (len(leaf.shape) + able[0]), FSDP) if able else NONE
        raise ValueError(f"parameter {name} has no rule in models.sharding.RULES: add one")

    return jax.tree_util.tree_map_with_path(of_leaf, params)


NONE = PartitionSpec()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitKernel:
    """A device's part of a kernel, which stands in for all of it in a tree of parameters.

    Attributes:
      part: (..., inputs / n, outputs) or (..., inputs, outputs / n).
      axis: -2 or -1, which of the two is split.
    """

    part: Array
    axis: int = dataclasses.field(metadata={"static": True})

    def astype(self, dtype: Any) -> "SplitKernel":
        """Itself: the product takes the dtype of what it is multiplied with."""
        del dtype
        return self

    def __rmatmul__(self, x: Array) -> Array:
        """(..., inputs) -> (..., outputs)."""
        return _product(self.axis, x, self.part)


def whole(params: Any, specs: Any, prefix: str = "") -> Any:
    """Parameters to compute with, from a device's parts; within `jax.shard_map`.

    Kernels of layers are gathered where they are used, all others here.
    """

    def of_leaf(path: Any, part: Array, spec: PartitionSpec) -> Any:
        if FSDP not in tuple(spec):
            return part
        name = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
        axis = tuple(spec).index(FSDP) - part.ndim
        return SplitKernel(part, axis) if name.startswith("layers/") else _gather(part, axis)

    return jax.tree_util.tree_map_with_path(of_leaf, params, specs)


# (A product of its own, because differentiation would keep each gathered kernel.)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(axis: int, x: Array, part: Array) -> Array:
    return x @ _gather(part.astype(x.dtype), axis)


def _product_forward(axis, x, part):
    return _product(axis, x, part), (x, part)


def _product_backward(axis, residuals, dy):
    x, part = residuals
    dx = dy @ _gather(part.astype(x.dtype), axis).T
    gradient = jnp.einsum("...i,...o->io", x, dy)
    return dx.astype(x.dtype), _scatter(gradient, axis % 2, part.shape).astype(part.dtype)


_product.defvjp(_product_forward, _product_backward)


def _scatter(gradient: Array, axis: int, shape: tuple[int, ...]) -> Array:
    """A device's part, of this shape, of the sum of all devices' gradients."""
    parts = gradient.reshape(*gradient.shape[:axis], -1, *shape[axis:])
    # The devices' axis goes to the front: XLA:TPU sums the whole where it lies within.
    return jax.lax.psum_scatter(jnp.moveaxis(parts, axis, 0), FSDP, scatter_dimension=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(part: Array, axis: int) -> Array:
    return jax.lax.all_gather(part, FSDP, axis=axis % part.ndim, tiled=True)


def _gather_backward(axis, part, gradient):
    return (_scatter(gradient, axis % part.ndim, part.shape),)


_gather.defvjp(lambda part, axis: (_gather(part, axis), part), _gather_backward)
