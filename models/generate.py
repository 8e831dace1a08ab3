"""Text from a model, token by token, with the keys and values of earlier tokens kept.

The prompts are walked through once; then each new token costs one token's work. Rows of different
lengths stand side by side: each has positions of its own, and what pads a prompt is never seen,
since a row's next tokens are written over it before they look there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import attention, backend
from models.config import LlamaConfig
from models.llama import Block, Params, pieces, rope_table, rotate

Array = jax.Array


class Cache(NamedTuple):
    """Keys and values of T positions."""

    keys: Array  # (L, B, T, K, D)
    values: Array  # (L, B, T, K, D)


class Sampling(NamedTuple):
    """How a token is drawn; traced, so that another value compiles nothing."""

    temperature: Array  # () float32; 0 takes the likeliest token
    top_k: Array  # () int32: only so many of the likeliest; the vocabulary's size for all
    top_p: Array  # () float32: only the likeliest that together have this probability
    known: Array  # () int32: only ids below it


def generate(
    config: LlamaConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    max_tokens: int,
    *,
    context: int,
    end: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    known: int | None = None,
) -> list[np.ndarray]:
    """Continues prompts.

    Args:
      config: of the model.
      params: plain arrays.
      prompts: ids of each, one or more.
      max_tokens: the most new tokens of each.
      context: the most tokens of a prompt and its continuation together.
      end: the token that ends a text; None never stops early.
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: draws from so many of the likeliest tokens; None from all.
      top_p: draws from the likeliest tokens that together have this probability.
      seed: of the draws.
      known: only ids below it are drawn, of a model with more of them than its tokenizer; None
        draws all.

    Returns:
      The new ids of each prompt, without `end`.

    Raises:
      ValueError: a prompt is empty, holds an unknown id or is too long, or a number is impossible.

    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, num_heads=2, num_layers=2)
    >>> from models.llama import init_params
    >>> params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    >>> out = generate(config, params, [np.array([3]), np.array([4, 5])], 6, context=16)
    >>> [len(ids) for ids in out]
    [6, 6]
    """
    _check(config, prompts, max_tokens, context, temperature, top_k, top_p)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    # A few lengths only, so that a few programs serve all prompts.
    padded = max(16, 1 << int(lengths.max() - 1).bit_length())
    tokens = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    sampling = Sampling(
        jnp.float32(temperature),
        jnp.int32(config.vocab_size if top_k is None else min(top_k, config.vocab_size)),
        jnp.float32(top_p),
        jnp.int32(config.vocab_size if known is None else known),
    )
    stop = jnp.int32(-1 if end is None else end)
    key = jax.random.key(seed)
    new, counts = _generate(config, max_tokens, params, tokens, lengths, stop, sampling, key)
    return [row[:count] for row, count in zip(np.asarray(new), np.asarray(counts), strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    config: LlamaConfig,
    max_tokens: int,
    params: Params,
    tokens: Array,
    lengths: Array,
    end: Array,
    sampling: Sampling,
    key: Array,
) -> tuple[Array, Array]:
    """tokens (B, S), lengths (B,) -> new tokens (B, max_tokens), and how many count (B,)."""
    rows = jnp.arange(tokens.shape[0])
    logits, cache = prefill(config, params, tokens, lengths, tokens.shape[1] + max_tokens)

    def going(carry):
        count, done = carry[0], carry[-1]
        return (count < max_tokens) & ~jnp.all(done)

    def one(carry):
        count, logits, cache, out, counts, done = carry
        token = draw(logits, sampling, jax.random.fold_in(key, count))
        done = done | (token == end)
        out = out.at[rows, count].set(token)
        counts = counts + ~done
        logits, cache = decode(config, params, token, lengths + count, cache)
        return count + 1, logits, cache, out, counts, done

    out = jnp.zeros((tokens.shape[0], max_tokens), jnp.int32)
    start = (jnp.int32(0), logits, cache, out, jnp.zeros_like(lengths), jnp.zeros(len(rows), bool))
    *_, out, counts, _ = jax.lax.while_loop(going, one, start)
    return out, counts


def prefill(
    config: LlamaConfig, params: Params, tokens: Array, lengths: Array, size: int
) -> tuple[Array, Cache]:
    """Reads the prompts.

    Args:
      config: of the model.
      params: plain arrays.
      tokens: (B, S) int32, each row padded after its end.
      lengths: (B,) int32, tokens of each row that count.
      size: positions in the cache, S or more.

    Returns:
      The logits (B, V) float32 after each row's last token, and the cache.
    """
    whole = attention.IMPLEMENTATIONS[backend.choose(config).attention]
    batch, length = tokens.shape
    angles = rope_table(length, config.head_dim, config.rope_theta)
    empty = jnp.zeros(
        (config.num_layers, batch, size, config.kv_heads, config.head_dim), config.dtype
    )

    def attend(q, k, v, cache, layer):
        keys = cache.keys.at[layer, :, :length].set(k)
        values = cache.values.at[layer, :, :length].set(v)
        return whole(q, k, v), Cache(keys, values)

    x, cache = _walk(config, params, tokens, angles, attend, Cache(empty, empty))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return pieces(config).head(params, last)[:, 0], cache


def decode(
    config: LlamaConfig, params: Params, tokens: Array, positions: Array, cache: Cache
) -> tuple[Array, Cache]:
    """Reads one more token (B,) of each row at its position (B,); logits (B, V) and the cache."""
    rows = jnp.arange(tokens.shape[0])
    table = rope_table(cache.keys.shape[2], config.head_dim, config.rope_theta)
    cos, sin = (jnp.asarray(part)[positions][:, None] for part in table)

    def attend(q, k, v, cache, layer):
        keys = cache.keys.at[layer, rows, positions].set(k[:, 0])
        values = cache.values.at[layer, rows, positions].set(v[:, 0])
        return _attend(q, keys[layer], values[layer], positions), Cache(keys, values)

    x, cache = _walk(config, params, tokens[:, None], (cos, sin), attend, cache)
    return pieces(config).head(params, x)[:, 0], cache


def draw(logits: Array, sampling: Sampling, key: Array) -> Array:
    """One token (B,) int32 from logits (B, V) float32.

    >>> greedy = Sampling(jnp.float32(0), jnp.int32(3), jnp.float32(1), jnp.int32(3))
    >>> draw(jnp.array([[0.0, 2.0, 1.0, 4.0]]), greedy, jax.random.key(0)).tolist()
    [1]
    """
    logits = jnp.where(jnp.arange(logits.shape[-1]) < sampling.known, logits, -jnp.inf)
    likeliest = jnp.argmax(logits, axis=-1)
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)
    order = jnp.argsort(-scaled, axis=-1)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    ranked = jnp.where(jnp.arange(ranked.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
    shares = jax.nn.softmax(ranked, axis=-1)
    # The likeliest counts always, the others while those before them have less than top_p.
    before = jnp.cumsum(shares, axis=-1) - shares
    ranked = jnp.where((before < sampling.top_p) | (before == 0), ranked, -jnp.inf)
    rank = jax.random.categorical(key, ranked, axis=-1)
    drawn = jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]
    return jnp.where(sampling.temperature > 0, drawn, likeliest).astype(jnp.int32)


def _walk(
    config: LlamaConfig,
    params: Params,
    tokens: Array,
    angles: tuple[Any, Any],
    attend: Callable[[Array, Array, Array, Cache, Array], tuple[Array, Cache]],
    cache: Cache,
) -> tuple[Array, Cache]:
    """All blocks with a cache: tokens (B, S) -> x (B, S, d), and the cache with what they add.

    `attend` takes q, k, v, the cache and the layer's number, and gives what attention gives and the
    new cache.
    """
    definition = _block(config)

    # The cache is carried, not stacked anew, so that a token is written in place.
    def block(carry, of_layer):
        x, cache = carry
        layer, number = of_layer
        part = nnx.merge(definition, layer)
        y = part.attention_norm(x)
        heads = (*x.shape[:2], -1, config.head_dim)
        q = rotate(part.q(y).reshape(heads), *angles)
        k = rotate(part.k(y).reshape(heads), *angles)
        seen, cache = attend(q, k, part.v(y).reshape(heads), cache, number)
        x = x + part.o(seen.reshape(*x.shape[:2], -1))
        y = part.mlp_norm(x)
        return (x + part.down(jax.nn.silu(part.gate(y)) * part.up(y)), cache), None

    x = pieces(config).embed(params, tokens)
    layers = (params["layers"], jnp.arange(config.num_layers))
    return jax.lax.scan(block, (x, cache), layers)[0]


def _attend(q: Array, keys: Array, values: Array, positions: Array) -> Array:
    """q (B, 1, H, D) over the cache (B, T, K, D), of which each row sees its positions so far."""
    batch, _, heads, size = q.shape
    grouped = q.reshape(batch, keys.shape[2], -1, size)
    scores = jnp.einsum("bkgd,btkd->bkgt", grouped, keys, preferred_element_type=jnp.float32)
    seen = jnp.arange(keys.shape[1]) <= positions[:, None]
    scores = jnp.where(seen[:, None, None], scores / np.sqrt(size), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgt,btkd->bkgd", weights, values).reshape(batch, 1, heads, size)


@functools.lru_cache(maxsize=64)
def _block(config: LlamaConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))[0]


def _check(
    config: LlamaConfig,
    prompts: Sequence[np.ndarray],
    max_tokens: int,
    context: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> None:
    if not prompts:
        raise ValueError("there is no prompt; give one")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be at least 0; 0 takes the likeliest")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise ValueError(f"prompt {number} has no token; give a longer one")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(
                f"prompt {number} holds an id outside of the vocabulary of {config.vocab_size}; "
                "give the tokenizer of this model"
            )
        if len(prompt) + max_tokens > context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, which with max_tokens={max_tokens} are "
                f"more than the context of {context}; give a shorter one, or fewer new tokens"
            )
