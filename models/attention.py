"""Causal attention, in the forms between which `models.backend` chooses.

All take q (B, S, H, D), k and v (B, S, K, D) with H a multiple of K (grouped-query attention: H / K
consecutive query heads share a key head), and return (B, S, H, D) in q's dtype. The softmax is
float32. With `segments` (B, S), of any dtype, a position sees those of its own number alone, and
of them the ones before it and itself. Inside, one sequence is q (K, G, S, D), k and v (K, S, D)
with G = H / K.
"""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp

Array = jax.Array

# Added to masked scores. Finite, so that no row gives NaN; exp() of it is exactly zero.
_MASKED = -1e30


def dot_product(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    """`jax.nn.dot_product_attention`: cuDNN's flash attention where it can be, else XLA's."""
    # cuDNN refuses float32 and head sizes that are not a multiple of 8 up to 128.
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    cudnn = fits and "cuda" in jax.extend.backend.get_backend().platform_version
    same = None if segments is None else (segments[:, :, None] == segments[:, None])[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=same, is_causal=True, implementation="cudnn" if cudnn else "xla"
    )


def einsum(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    """Two products around one full masked softmax, differentiated by JAX."""
    q, k, v = _by_head(q, k, v)
    scores = jax.vmap(lambda q, k, segments: _scores(q, k, segments, 0, q.shape[2]))
    weights = jax.nn.softmax(scores(q, k, segments), axis=-1)
    return _by_position(jnp.einsum("bkgrt,bktd->bkgrd", weights.astype(v.dtype), v))


def blocked(
    q: Array, k: Array, v: Array, segments: Array | None = None, *, block: int = 256
) -> Array:
    """Sequence by sequence, in blocks of queries that see the keys up to their own end only.

    One block's scores fit in a CPU's cache, none of them is kept for the backward pass, which
    computes them again from the logarithms of the softmax's denominators (Dao et al. 2022,
    arXiv 2205.14135, without the blocks of keys).

    Args:
      q: (B, S, H, D) queries.
      k: (B, S, K, D) keys.
      v: (B, S, K, D) values.
      segments: (B, S) numbers, or None.
      block: queries per block; a short last block is fine.

    Returns:
      (B, S, H, D) in q's dtype.
    """
    return _by_position(_blocked(block, *_by_head(q, k, v), segments))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(block: int, q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    return jax.lax.map(lambda each: _forward(block, *each)[0], (q, k, v, segments))


def _blocked_forward(block, q, k, v, segments):
    out, log_sums = jax.lax.map(lambda each: _forward(block, *each), (q, k, v, segments))
    return out, (q, k, v, segments, out, log_sums)


def _blocked_backward(block, residuals, dout):
    # (None: nothing follows from a change of the segments.)
    return *jax.lax.map(lambda each: _backward(block, *each), (*residuals, dout)), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _forward(
    block: int, q: Array, k: Array, v: Array, segments: Array | None
) -> tuple[Array, Array]:
    """One sequence's output (K, G, S, D) and log sum of exponentials (K, G, S, 1)."""
    outs, log_sums = [], []
    for start, stop in _ranges(q.shape[2], block):
        scores = _scores(q, k, segments, start, stop)
        top = jnp.max(scores, axis=-1, keepdims=True)
        exps = jnp.exp(scores - top)
        sums = jnp.sum(exps, axis=-1, keepdims=True)
        out = _product("kgrt,ktd->kgrd", exps.astype(v.dtype), v[:, :stop]) / sums
        outs.append(out.astype(q.dtype))
        log_sums.append(top + jnp.log(sums))
    return jnp.concatenate(outs, axis=2), jnp.concatenate(log_sums, axis=2)


def _backward(
    block: int,
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    out: Array,
    log_sums: Array,
    dout: Array,
) -> tuple[Array, Array, Array]:
    """One sequence's gradients of q, k and v."""
    # sum_t w_t dw_t of the softmax's gradient, without the weights: w @ v is the output.
    inner = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1, keepdims=True)
    dqs = []
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for start, stop in _ranges(q.shape[2], block):
        rows = slice(start, stop)
        weights = jnp.exp(_scores(q, k, segments, start, stop) - log_sums[:, :, rows])
        dweights = _product("kgrd,ktd->kgrt", dout[:, :, rows], v[:, :stop])
        dscores = (weights * (dweights - inner[:, :, rows])).astype(q.dtype)
        dqs.append(_product("kgrt,ktd->kgrd", dscores, k[:, :stop]).astype(q.dtype))
        dk = _added(dk, _product("kgrt,kgrd->ktd", dscores, q[:, :, rows]))
        weights = weights.astype(v.dtype)
        dv = _added(dv, _product("kgrt,kgrd->ktd", weights, dout[:, :, rows]))
    return jnp.concatenate(dqs, axis=2), dk.astype(k.dtype), dv.astype(v.dtype)


def _added(total: Array, part: Array) -> Array:
    """`part` (K, t, D) added to the first positions of `total` (K, S, D).

    (As `.at[:, :t].add` would, whose empty array of indices, where t is S, takes XLA:CPU of jaxlib
    0.11 down in a loop over several devices.)
    """
    first = total[:, : part.shape[1]] + part
    return jax.lax.dynamic_update_slice_in_dim(total, first, 0, axis=1)


def _scores(q: Array, k: Array, segments: Array | None, start: int, stop: int) -> Array:
    """Masked scores (K, G, stop - start, stop) of the queries start..stop, float32."""
    scores = _product("kgrd,ktd->kgrt", q[:, :, start:stop], k[:, :stop])
    seen = jnp.arange(stop) <= jnp.arange(start, stop)[:, None]
    if segments is not None:
        seen &= segments[:stop] == segments[start:stop, None]
    return scores + jnp.where(seen, 0.0, _MASKED)


def _ranges(length: int, block: int) -> list[tuple[int, int]]:
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _by_head(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """q scaled to (B, K, G, S, D), k and v to (B, K, S, D)."""
    batch, length, _, size = q.shape
    # Scaling q is cheaper than scaling the scores.
    q = (q * (1 / math.sqrt(size))).astype(q.dtype)
    q = q.reshape(batch, length, k.shape[2], -1, size).transpose(0, 2, 3, 1, 4)
    return q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _by_position(out: Array) -> Array:
    """(B, K, G, S, D) -> (B, S, H, D)."""
    batch, _, _, length, size = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, size)


IMPLEMENTATIONS = {"dot_product": dot_product, "einsum": einsum, "blocked": blocked}
