"""Kernels as products of two low-rank factors, of which no full-rank part is kept.

Source: Kamalakara et al. 2022 (arXiv 2209.13569): W = A B, both trained, with spectral
initialisation: A B is the best approximation of rank r to the kernel that would be there, by its
singular value decomposition, and each factor has the roots of the singular values.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models.lora import KERNELS

Array = jax.Array
Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredKernel:
    """A product that stands in for a kernel in a tree of parameters.

    Attributes:
      left: (..., inputs, r).
      right: (..., r, outputs).
    """

    left: Array
    right: Array

    def astype(self, dtype: Any) -> "FactoredKernel":
        """Both in another dtype, for the product."""
        return FactoredKernel(self.left.astype(dtype), self.right.astype(dtype))

    def __rmatmul__(self, x: Array) -> Array:
        """(..., inputs) -> (..., outputs)."""
        return (x @ self.left) @ self.right


def factorize(params: Params, rank: int) -> Params:
    """Parameters whose layers have factors in place of their kernels.

    Args:
      params: as from `models.llama.init_params`, the layers' kernels (L, inputs, outputs).
      rank: r, at most the shorter side of each kernel.

    >>> kernels = jnp.arange(64.0).reshape(2, 8, 4)  # of rank two
    >>> layers = {name: {"kernel": kernels} for name in KERNELS}
    >>> kernel = factorize({"layers": layers}, 2)["layers"]["q"]["kernel"]
    >>> kernel.left.shape, kernel.right.shape
    ((2, 8, 2), (2, 2, 4))
    >>> bool(jnp.allclose(kernel.left @ kernel.right, kernels, atol=1e-4))
    True
    """
    layers, before = dict(params["layers"]), jnp.float32(0)
    for name in KERNELS:
        # LAPACK's threads and those of XLA:CPU can wait for each other where several calls run at
        # once: each kernel waits for the one before, by a dependence on which no finite number
        # depends (barriers are gone by the time that operations are ordered).
        kernel = layers[name]["kernel"]
        kernel = jnp.where(jnp.isnan(before), jnp.zeros_like(kernel), kernel)
        factors = jax.lax.map(lambda w: _split(w, rank), kernel)
        before = factors.right.ravel()[-1].astype(jnp.float32)
        layers[name] = {**layers[name], "kernel": factors}
    return {**params, "layers": layers}


def _split(kernel: Array, rank: int) -> FactoredKernel:
    """(m, n) -> (m, r), (r, n)."""
    u, s, vt = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    left, right = u[:, :rank] * root, root[:, None] * vt[:rank]
    return FactoredKernel(left.astype(kernel.dtype), right.astype(kernel.dtype))


def merge(params: Params) -> Params:
    """Parameters in which each pair of factors is multiplied out."""
    is_kernel = lambda x: isinstance(x, FactoredKernel)
    join = lambda x: x.left @ x.right if is_kernel(x) else x
    return jax.tree.map(join, params, is_leaf=is_kernel)
