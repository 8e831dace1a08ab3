"""LLaMA in Flax NNX: RMSNorm, rotary positions, SwiGLU, grouped-query attention, stacked layers.

The model comes apart into `embed`, identical blocks and head, so that a training step may walk the
layers one by one (`pieces`) with the code that the whole model runs. Outside of the modules
parameters are plain nested dicts:

    embed/embedding                        (V, d)
    layers/attention_norm|mlp_norm/scale   (L, d)
    layers/q|k|v|o|gate|up|down/kernel     (L, inputs, outputs)
    norm/scale                             (d,)
    head/kernel                            (d, V), absent with tied embeddings

Sources: Touvron et al. 2023 (arXiv 2302.13971); Su et al. 2021 (2104.09864) for the rotary
positions, in the rotate-half convention of Hugging Face; Ainslie et al. 2023 (2305.13245) for
grouped queries.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import attention, backend, losses
from models.config import LlamaConfig

Array = jax.Array
Params = dict[str, Any]


class Embed(nnx.Module):
    """Token embedding."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(_normal(config, rngs, shape))

    def __call__(self, tokens: Array) -> Array:
        """(B, S) int32 -> (B, S, d)."""
        return jnp.take(self.embedding.get_value(), tokens, axis=0).astype(self.config.dtype)


class Linear(nnx.Module):
    """x @ kernel, without a bias."""

    def __init__(self, config: LlamaConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.config = config
        self.kernel = nnx.Param(_normal(config, rngs, (inputs, outputs)))

    def __call__(self, x: Array) -> Array:
        """(..., inputs) -> (..., outputs)."""
        # Spelled with `astype` and `@` alone, so that an object with these two can stand in for the
        # array (a kernel whose product has a gradient of its own).
        return x @ self.kernel.get_value().astype(self.config.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, in float32."""

    def __init__(self, config: LlamaConfig):
        self.config = config
        self.scale = nnx.Param(jnp.ones((config.hidden_size,), config.param_dtype))

    def __call__(self, x: Array) -> Array:
        """(..., d) -> (..., d)."""
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(
            jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.config.rms_norm_eps
        )
        return (x32 * inverse).astype(x.dtype) * self.scale.get_value().astype(x.dtype)


class Block(nnx.Module):
    """Attention and SwiGLU, each with its norm before and its residual around."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        d, f, kv = config.hidden_size, config.intermediate_size, config.kv_heads * config.head_dim
        self.config = config
        self.attention_norm = RMSNorm(config)
        self.q = Linear(config, d, d, rngs=rngs)
        self.k = Linear(config, d, kv, rngs=rngs)
        self.v = Linear(config, d, kv, rngs=rngs)
        self.o = Linear(config, d, d, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.gate = Linear(config, d, f, rngs=rngs)
        self.up = Linear(config, d, f, rngs=rngs)
        self.down = Linear(config, f, d, rngs=rngs)

    def __call__(self, x: Array, segments: Array | None = None) -> Array:
        """(B, S, d), and the positions' segments (B, S) if there are any -> (B, S, d)."""
        x = x + self.attend(self.attention_norm(x), segments)
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))

    def attend(self, x: Array, segments: Array | None = None) -> Array:
        """Causal self-attention, within segments if given: (B, S, d) -> (B, S, d)."""
        config = self.config
        batch, length, _ = x.shape
        heads = (batch, length, -1, config.head_dim)
        cos, sin = rope_table(length, config.head_dim, config.rope_theta)
        q = rotate(self.q(x).reshape(heads), cos, sin)
        k = rotate(self.k(x).reshape(heads), cos, sin)
        v = self.v(x).reshape(heads)
        attend = attention.IMPLEMENTATIONS[backend.choose(config).attention]
        return self.o(attend(q, k, v, segments).reshape(batch, length, -1))


class Llama(nnx.Module):
    """A LLaMA language model.

    Args:
      config: shape and numerics.
      rngs: key source of the initial values; `nnx.Rngs(0)` if not given.

    >>> model = Llama(LlamaConfig(vocab_size=32, hidden_size=8, num_heads=2, num_layers=2))
    >>> model(jnp.zeros((1, 5), jnp.int32)).shape
    (1, 5, 32)
    """

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs | None = None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.config = config
        self.embed = Embed(config, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs):
            return Block(config, rngs=rngs)

        self.layers = stacked(rngs)
        self.norm = RMSNorm(config)
        if not config.tie_embeddings:
            self.head = Linear(config, config.hidden_size, config.vocab_size, rngs=rngs)

    def __call__(self, tokens: Array, segments: Array | None = None) -> Array:
        """Next-token logits: (B, S) int32 -> (B, S, V) float32.

        With `segments` (B, S), tokens of one number are a sequence of their own.
        """
        x = self.hidden(tokens, segments)
        return jnp.dot(x, self.head_kernel(), preferred_element_type=jnp.float32)

    def hidden(self, tokens: Array, segments: Array | None = None) -> Array:
        """What the head reads: (B, S) int32 -> (B, S, d)."""
        return self.norm(self.stack(self.embed(tokens), segments))

    def loss(
        self,
        inputs: Array,
        targets: Array,
        mask: Array | None = None,
        segments: Array | None = None,
    ) -> tuple[Array, Array]:
        """Mean cross-entropy of `targets` given `inputs`.

        Args:
          inputs: (B, S) int32 tokens.
          targets: (B, S) int32 tokens, already shifted by the caller.
          mask: (B, S) bool or 0/1; `None` counts every position.
          segments: (B, S) numbers; tokens of one number are a sequence of their own.

        Returns:
          The float32 mean over unmasked positions (zero if there are none) and their number.
        """
        x = self.hidden(inputs, segments)
        return head_loss(self.config, self.head_kernel(), x, targets, mask)

    def stack(self, x: Array, segments: Array | None = None) -> Array:
        """All blocks: (B, S, d), and segments (B, S) -> (B, S, d)."""
        count, unroll = self.config.num_layers, backend.choose(self.config).unroll
        graphdef, layers = nnx.split(self.layers)

        def block(x, layer):
            return nnx.merge(graphdef, layer)(x, segments)

        if self.config.remat:
            # Inside a scan XLA cannot merge the two computations, outside it would.
            block = jax.checkpoint(block, prevent_cse=unroll >= count)
        if unroll >= count:
            for layer in _unstack(layers, count):
                x = block(x, layer)
            return x
        return jax.lax.scan(lambda x, layer: (block(x, layer), None), x, layers, unroll=unroll)[0]

    def head_kernel(self) -> Array:
        """The output projection (d, V) in the compute dtype."""
        tied = self.config.tie_embeddings
        kernel = self.embed.embedding.get_value().T if tied else self.head.kernel.get_value()
        return kernel.astype(self.config.dtype)


def head_loss(
    config: LlamaConfig, kernel: Array, x: Array, targets: Array, mask: Array | None
) -> tuple[Array, Array]:
    """Mean cross-entropy of x (B, S, d) @ kernel (d, V) and the number of tokens in it."""
    weights = jnp.ones(targets.shape, bool) if mask is None else mask
    weights = weights.astype(jnp.float32)
    count = jnp.sum(weights)
    choice = backend.choose(config)
    total = losses.logits
    if choice.loss == "fused":
        total = functools.partial(losses.fused, chunk=choice.loss_chunk)
    flat = x.reshape(-1, x.shape[-1]), kernel, targets.reshape(-1), weights.reshape(-1)
    return total(*flat) / jnp.maximum(count, 1.0), count


@functools.lru_cache(maxsize=32)
def rope_table(length: int, size: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of position times frequency, each (S, 1, D / 2) float32."""
    frequency = theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    angle = np.arange(length)[:, None, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: Array, cos: np.ndarray, sin: np.ndarray) -> Array:
    """Rotates the pairs (i, i + D/2) of x (B, S, H, D) by the angles of `rope_table`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


@functools.lru_cache(maxsize=64)
def graphdef(config: LlamaConfig) -> nnx.GraphDef:
    """The static half of `Llama(config)`; nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: Llama(config)))[0]


def init_params(config: LlamaConfig, key: Array) -> Params:
    """Initial parameters as plain nested dicts.

    Works under `jax.jit` and `jax.eval_shape`:

    >>> from models.config import PRESETS
    >>> shapes = jax.eval_shape(lambda key: init_params(PRESETS["7b"], key), jax.random.key(0))
    >>> shapes["layers"]["down"]["kernel"].shape
    (32, 11008, 4096)
    """
    return split(Llama(config, nnx.Rngs(key)))[1]


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Takes a model apart into its static half and plain nested dicts of arrays."""
    definition, state = nnx.split(model)
    return definition, nnx.to_pure_dict(state)


def merge(definition: nnx.GraphDef, params: Params) -> Any:
    """The model of `definition` with these parameters; inverse of `split`."""
    return nnx.merge(definition, params)


class Pieces(NamedTuple):
    """The model in parts, as pure functions of plain dicts.

    `rest` is the parameters without `layers`, `layer` one slice of `params["layers"]`.
    """

    embed: Callable[[Params, Array], Array]  # (rest, tokens (B, S)) -> x (B, S, d)
    block: Callable[..., Array]  # (layer, x, segments (B, S) or None by default) -> x
    head: Callable[[Params, Array], Array]  # (rest, x) -> logits (B, S, V) float32
    # (rest, x, targets (B, S), mask (B, S) or None) -> (mean loss, number of tokens)
    loss: Callable[[Params, Array, Array, Array | None], tuple[Array, Array]]


@functools.lru_cache(maxsize=64)
def pieces(config: LlamaConfig) -> Pieces:
    """The model of `config` in parts, for a step that walks the layers itself.

    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, num_heads=2, num_layers=2)
    >>> params, parts = init_params(config, jax.random.key(0)), pieces(config)
    >>> x = parts.embed(params, jnp.zeros((1, 5), jnp.int32))
    >>> for i in range(config.num_layers):
    ...     x = parts.block(jax.tree.map(lambda leaf: leaf[i], params["layers"]), x)
    >>> parts.head(params, x).shape
    (1, 5, 32)
    """

    def definition(make):
        return nnx.split(nnx.eval_shape(make))[0]

    embed_def = definition(lambda: Embed(config, rngs=nnx.Rngs(0)))
    block_def = definition(lambda: Block(config, rngs=nnx.Rngs(0)))
    norm_def = definition(lambda: RMSNorm(config))

    def embed(rest, tokens):
        return nnx.merge(embed_def, rest["embed"])(tokens)

    def block(layer, x, segments=None):
        return nnx.merge(block_def, layer)(x, segments)

    def ends(rest, x):
        tied = config.tie_embeddings
        kernel = rest["embed"]["embedding"].T if tied else rest["head"]["kernel"]
        return nnx.merge(norm_def, rest["norm"])(x), kernel.astype(config.dtype)

    def head(rest, x):
        return jnp.dot(*ends(rest, x), preferred_element_type=jnp.float32)

    def loss(rest, x, targets, mask=None):
        x, kernel = ends(rest, x)
        return head_loss(config, kernel, x, targets, mask)

    return Pieces(embed, block, head, loss)


def subspace_rules() -> tuple[tuple[str, Any], ...]:
    """Rules for `optax_subspace`: the seven stacked kernels are matrices, all else is left alone.

    Input features are the reduction axis, on which a square kernel has its basis: GaLore's runs
    have it on the right of torch's weights, which are (output, input). Axes are counted from the
    end, so that the rules serve the stack, whose axis 0 is the layer, one layer of it, and a list
    of layers. Of a kernel with an adapter (`models.lora`) they take the base.
    """
    from optax_subspace import MatrixSpec

    kernel = MatrixSpec(reduction_axis=-2, output_axis=-1, square_side="left")
    return (r"layers/(\d+/)?(q|k|v|o|gate|up|down)/kernel(/base)?$", kernel), (r".*", None)


def _normal(config: LlamaConfig, rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
    init = jax.nn.initializers.normal(config.initializer_range)
    # Drawn in float32, so that the values are those of the seed in every dtype.
    return init(rngs.params(), shape, jnp.float32).astype(config.param_dtype)


def _unstack(tree: Any, count: int) -> list[Any]:
    """Slices of the leading axis. `lax.split`, because its transpose is one concatenation, where
    that of `count` index operations is `count` padded copies and their sum."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [
        [part.squeeze(0) for part in jax.lax.split(leaf, (1,) * count, axis=0)] for leaf in leaves
    ]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)]
