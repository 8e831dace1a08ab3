"""Cross-entropy of a linear head, in the forms between which `models.backend` chooses.

All take hidden states x (T, d), the head's kernel (d, V), targets (T,) and weights (T,) float32,
and return the float32 sum over t of weights[t] * -log softmax(x[t] @ kernel)[targets[t]].
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


def logits(x: Array, kernel: Array, targets: Array, weights: Array) -> Array:
    """All logits at once; autodiff does the rest."""
    scores = jnp.dot(x, kernel, preferred_element_type=jnp.float32)
    return jnp.sum(weights * _nll(scores, targets))


def fused(x: Array, kernel: Array, targets: Array, weights: Array, *, chunk: int = 256) -> Array:
    """Head, loss and their gradients chunk by chunk: no more than `chunk` x V logits exist.

    When differentiated, the forward pass computes the gradients too, while a chunk's logits are in
    the cache; the backward pass only scales them. Memory is chunk V + d V + T d instead of T V.
    """
    size = targets.shape[0]
    if size % chunk and size > chunk:
        # Padding has weight zero, so neither loss nor gradient see it.
        pad = -size % chunk
        x, targets, weights = (
            jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1)) for a in (x, targets, weights)
        )
    return _fused(min(chunk, size), x, kernel, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(chunk: int, x: Array, kernel: Array, targets: Array, weights: Array) -> Array:
    def add(total, part):
        return total + logits(part[0], kernel, part[1], part[2]), None

    return jax.lax.scan(add, jnp.float32(0), _chunks(chunk, x, targets, weights))[0]


def _fused_forward(chunk, x, kernel, targets, weights):
    def add(carry, part):
        total, dkernel = carry
        xs, ts, ws = part
        scores = jnp.dot(xs, kernel, preferred_element_type=jnp.float32)
        top = jnp.max(scores, axis=-1, keepdims=True)
        exps = jnp.exp(scores - top)
        sums = jnp.sum(exps, axis=-1, keepdims=True)
        hit = jnp.arange(kernel.shape[1], dtype=ts.dtype) == ts[:, None]
        picked = jnp.sum(jnp.where(hit, scores, 0.0), axis=-1)
        nll = jnp.log(sums[:, 0]) + top[:, 0] - picked
        dscores = (exps * (ws[:, None] / sums) - jnp.where(hit, ws[:, None], 0.0)).astype(x.dtype)
        dx = jnp.dot(dscores, kernel.T)
        dkernel += jnp.dot(xs.T, dscores, preferred_element_type=jnp.float32)
        return (total + jnp.sum(ws * nll), dkernel), (dx, nll)

    start = (jnp.float32(0), jnp.zeros(kernel.shape, jnp.float32))
    (total, dkernel), (dx, nll) = jax.lax.scan(add, start, _chunks(chunk, x, targets, weights))
    if kernel.dtype != jnp.float16:
        dkernel = dkernel.astype(kernel.dtype)
    # (In float16 this sum over all tokens may overflow where their mean does not; the empty array
    # tells the dtype that the gradient has in the end.)
    dtype = jnp.zeros(0, kernel.dtype)
    return total, (dx.reshape(x.shape), dkernel, nll.reshape(-1), dtype)


def _fused_backward(chunk, residuals, cotangent):
    del chunk
    dx, dkernel, nll, dtype = residuals
    return (
        (dx * cotangent).astype(dx.dtype),
        (dkernel * cotangent).astype(dtype.dtype),
        None,
        nll * cotangent,
    )


_fused.defvjp(_fused_forward, _fused_backward)


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    return tuple(a.reshape(-1, chunk, *a.shape[1:]) for a in arrays)


def _nll(scores: Array, targets: Array) -> Array:
    """-log softmax(scores)[targets]; scores (T, V), targets (T,)."""
    # A comparison instead of a gather: its gradient is a fusion, a gather's is a scatter.
    hit = jnp.arange(scores.shape[-1], dtype=targets.dtype) == targets[:, None]
    picked = jnp.sum(jnp.where(hit, scores, 0.0), axis=-1)
    return jax.nn.logsumexp(scores, axis=-1) - picked


IMPLEMENTATIONS = {"logits": logits, "fused": fused}
