"""The one place where a back end decides how the model is computed.

Every choice gives the same numbers up to rounding (`tests/test_llama.py` holds them together); what
is fastest differs. `auto` in a `LlamaConfig` field resolves here, when a function is traced.
"""

import dataclasses

import jax

from models.config import LlamaConfig

# Beyond this many blocks a program without a scan compiles too long for what it gains.
_MAX_UNROLLED_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class Choice:
    """Implementations in use: names of `models.attention` and `models.losses`, blocks per scan
    iteration, and tokens whose logits the fused loss has at once."""

    attention: str
    loss: str
    unroll: int
    loss_chunk: int = 256


def choose(config: LlamaConfig, backend: str | None = None) -> Choice:
    """Resolves the `auto` fields of `config` for a back end.

    Args:
      config: the model's configuration.
      backend: `cpu`, `gpu` or `tpu`; `None` is the one that jax computes on.

    Returns:
      A `Choice` without any `auto`.

    >>> choose(LlamaConfig(num_layers=24), backend="gpu")
    Choice(attention='dot_product', loss='logits', unroll=1, loss_chunk=256)
    >>> choose(LlamaConfig(attention="einsum"), backend="cpu").attention
    'einsum'
    """
    backend = jax.default_backend() if backend is None else backend
    if backend == "cpu":
        small = config.num_layers <= _MAX_UNROLLED_LAYERS
        auto = Choice("blocked", "fused", config.num_layers if small else 1)
    else:
        # Flash attention (cuDNN) where the dtype allows it; XLA's fusions do the rest.
        auto = Choice("dot_product", "logits", 1)
    loss: str = config.loss
    if loss == "auto":
        loss = auto.loss if config.loss_chunk is None else "fused"
    return Choice(
        attention=auto.attention if config.attention == "auto" else config.attention,
        loss=loss,
        unroll=auto.unroll if config.unroll == "auto" else config.unroll,
        loss_chunk=auto.loss_chunk if config.loss_chunk is None else config.loss_chunk,
    )
