"""Floating-point operations of a model, and what the devices could do at best."""

import re

from models.config import Frozen, LlamaConfig

# Dense bfloat16 FLOP/s of what JAX calls one device, by the makers' data sheets; the first pattern
# found in the device's kind counts. A TPU v2 or v3 chip is two devices.
_PEAKS = (
    (r"^TPU v2", 23e12),
    (r"^TPU v3", 61.5e12),
    (r"^TPU v4 lite", 138e12),
    (r"^TPU v4", 275e12),
    (r"^TPU v5 ?(lite|e)", 197e12),
    (r"^TPU v5", 459e12),
    (r"^TPU v6", 918e12),
    (r"\bB200\b", 2250e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\b(H100|H200|GH200)\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bA40\b", 150e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bRTX 4090\b", 165e12),
    (r"\bRTX 3090\b", 71e12),
)


def per_token(
    model: LlamaConfig, sequence_length: int, frozen: Frozen = "nothing", kernel_rank: int = 0
) -> int:
    """Model FLOPs of a token in training: forward and backward, nothing that is recomputed.

    A weight W takes part in 2 FLOPs forward and 4 backward, each position of a context of S in
    12 d per layer: 6 N + 12 L d S, causal attention counted in full (Chowdhery et al. 2022, PaLM,
    arXiv 2204.02311, appendix B). N leaves out the embedding, which is looked up; tied, it is the
    head and counts. Weights that are `frozen` have no gradient, and take 4 of the 6; adapters,
    which are small beside them, are not counted. Kernels that are products of factors of
    `kernel_rank` have the weights of these.

    >>> model = LlamaConfig(hidden_size=8, intermediate_size=16, num_heads=2, num_layers=3)
    >>> per_token(model, 5) - 6 * (model.num_params() - model.vocab_size * 8) == 12 * 3 * 8 * 5
    True
    """
    looked_up = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    shapes = model.kernel_shapes()
    kernels = model.num_layers * sum(m * n for m, n in shapes)
    rest = model.num_params() - kernels - looked_up
    if kernel_rank:
        kernels = model.num_layers * sum((m + n) * kernel_rank for m, n in shapes)
    weights = (6 if frozen == "nothing" else 4) * kernels + (4 if frozen == "all" else 6) * rest
    return weights + 12 * model.num_layers * model.hidden_size * sequence_length


def peak(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a device by `jax.Device.device_kind`, None if it is not in the table.

    >>> peak("NVIDIA H100 80GB HBM3"), peak("TPU v5 lite"), peak("cpu")
    (989000000000000.0, 197000000000000.0, None)
    """
    for pattern, value in _PEAKS:
        if re.search(pattern, device_kind):
            return value
    return None
