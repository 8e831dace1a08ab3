"""Hyper-parameters of a LLaMA, the sizes of the GaLore scripts and those of LLaMA-1."""

import dataclasses
from typing import Literal, get_args

Attention = Literal["auto", "dot_product", "einsum", "blocked"]
Loss = Literal["auto", "logits", "fused"]
# Which weights are not trained: none, the kernels that have adapters, or all but the adapters.
Frozen = Literal["nothing", "kernels", "all"]

FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and numerics of a LLaMA.

    Dtypes are strings, so that a command line and a JSON file can hold a configuration as it is.
    Parameters are stored in `param_dtype` and cast to `dtype` where they are used; norms, the
    softmax of attention, logits and loss are float32 always.

    Attributes:
      vocab_size: number of tokens V.
      hidden_size: width d of the residual stream.
      intermediate_size: width f of the SwiGLU layer.
      num_heads: number of query heads H; the head size is d / H and must be even (RoPE).
      num_kv_heads: number of key and value heads; `None` is `num_heads`, fewer is grouped-query
        attention.
      num_layers: number of blocks L.
      rms_norm_eps: added to the mean square in RMSNorm.
      rope_theta: base of the rotary frequencies.
      tie_embeddings: the output head is the transposed embedding.
      param_dtype: dtype of the parameters.
      dtype: dtype of the computation.
      remat: recompute each block in the backward pass instead of keeping its activations.
      initializer_range: standard deviation of the initial kernels and embedding.
      attention: implementation of attention; `auto` chooses by back end (`models.backend`).
      loss: implementation of the cross-entropy; `auto` chooses by back end.
      loss_chunk: tokens whose logits exist at once in the fused cross-entropy, which `auto` is if
        this is given; `None` chooses by back end.
      unroll: blocks per iteration of the scan over layers; `num_layers` or more is no scan at all;
        `auto` chooses by back end.

    Raises:
      ValueError: a field's value is impossible; the message names field, value and remedy.

    >>> LlamaConfig(hidden_size=64, num_heads=4).head_dim
    16
    >>> LlamaConfig(hidden_size=66, num_heads=4)
    Traceback (most recent call last):
    ValueError: hidden_size=66 is not a multiple of num_heads=4; choose a multiple, e.g. 64
    """

    vocab_size: int = 32000
    hidden_size: int = 128
    intermediate_size: int = 352
    num_heads: int = 4
    num_kv_heads: int | None = None
    num_layers: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_embeddings: bool = False
    param_dtype: str = "float32"
    dtype: str = "float32"
    remat: bool = False
    initializer_range: float = 0.02
    attention: Attention = "auto"
    loss: Loss = "auto"
    loss_chunk: int | None = None
    unroll: int | Literal["auto"] = "auto"

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_layers"):
            _check_count(name, getattr(self, name))
        if self.num_kv_heads is not None:
            _check_count("num_kv_heads", self.num_kv_heads)
        if self.loss_chunk is not None:
            _check_count("loss_chunk", self.loss_chunk, "or None")
            if self.loss == "logits":
                raise ValueError(
                    f"loss_chunk={self.loss_chunk} has no meaning with loss='logits', which has "
                    "all logits at once; choose loss='fused' or 'auto'"
                )
        if self.unroll != "auto":
            _check_count("unroll", self.unroll, "or 'auto'")
        if self.hidden_size % self.num_heads:
            nearest = max(1, self.hidden_size // self.num_heads) * self.num_heads
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; "
                f"choose a multiple, e.g. {nearest}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} over num_heads={self.num_heads} is an odd head "
                f"size {self.head_dim}; RoPE rotates pairs, choose an even one"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                "choose a divisor, or None for plain multi-head attention"
            )
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value!r} must be positive and finite")
        for name in ("param_dtype", "dtype"):
            _check_choice(name, getattr(self, name), FLOATS)
        _check_choice("attention", self.attention, get_args(Attention))
        _check_choice("loss", self.loss, get_args(Loss))

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, `num_kv_heads` resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def num_params(self) -> int:
        """Number of parameters.

        >>> PRESETS["7b"].num_params()
        6738415616
        """
        d = self.hidden_size
        block = sum(m * n for m, n in self.kernel_shapes()) + 2 * d
        embeddings = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        return self.num_layers * block + embeddings + d

    def kernel_shapes(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the seven kernels of a layer: q, k, v, o, gate, up, down."""
        d, f, kv = self.hidden_size, self.intermediate_size, self.kv_heads * self.head_dim
        return [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]


def _check_count(name: str, value: object, alternative: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        remedy = f"must be a positive whole number {alternative}".rstrip()
        raise ValueError(f"{name}={value!r} {remedy}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")


def _preset(hidden, intermediate, heads, layers, vocab=32000) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_layers=layers,
    )


PRESETS: dict[str, LlamaConfig] = {
    # The default run: 9m with a vocabulary that suits a small corpus.
    "tiny": _preset(128, 352, 4, 4, vocab=4096),
    # The thirteen sizes of the GaLore scripts (arXiv 2403.03507).
    "9m": _preset(128, 352, 4, 4),
    "20m": _preset(256, 688, 4, 4),
    "35m": _preset(384, 1024, 8, 6),
    "40m": _preset(416, 1024, 8, 8),
    "60m": _preset(512, 1376, 8, 8),
    "71m": _preset(512, 1368, 8, 12),
    "100m": _preset(640, 1708, 10, 12, vocab=32100),
    "130m": _preset(768, 2048, 12, 12),
    "250m": _preset(768, 2560, 16, 24),
    "350m": _preset(1024, 2736, 16, 24),
    "1b": _preset(2048, 5461, 32, 24),
    "3b": _preset(2560, 6848, 32, 32),
    "7b": _preset(4096, 11008, 32, 32),
    # The larger LLaMA-1 (Touvron et al. 2023, arXiv 2302.13971, table 2), as in LOMO's tables.
    "13b": _preset(5120, 13824, 40, 40),
    "30b": _preset(6656, 17920, 52, 60),
    "65b": _preset(8192, 22016, 64, 80),
}
