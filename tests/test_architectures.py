"""Real blocks of other kinds of models: a vision transformer and a U-Net, in linen and NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import optax_subspace as osub


class ViT(linen.Module):
    """Patches by convolution, one attention block, a classifier."""

    @linen.compact
    def __call__(self, images):
        x = linen.Conv(32, (4, 4), strides=(4, 4), name="patches")(images)
        x = x.reshape(x.shape[0], -1, 32)
        x = x + self.param("position_embed", linen.initializers.normal(0.02), (1, x.shape[1], 32))
        x = x + linen.MultiHeadDotProductAttention(4, name="attention")(linen.LayerNorm()(x))
        y = linen.gelu(linen.Dense(64, name="up")(linen.LayerNorm()(x)))
        x = x + linen.Dense(32, name="down")(y)
        return linen.Dense(5, name="head")(x.mean(axis=1))


VIT_RULES = [
    ("patches/kernel", osub.MatrixSpec((0, 1, 2), 3)),
    ("attention/(query|key|value)/kernel", osub.MatrixSpec(0, (1, 2))),
    ("attention/out/kernel", osub.MatrixSpec((0, 1), 2)),
    ("bias|embed", None),
]


class UNetBlock(nnx.Module):
    """Down, up and a skip connection."""

    def __init__(self, rngs):
        self.enter = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.down = nnx.Conv(16, 24, (3, 3), strides=(2, 2), rngs=rngs)
        self.middle = nnx.Conv(24, 24, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(24, 16, (2, 2), strides=(2, 2), rngs=rngs)
        self.leave = nnx.Conv(32, 3, (1, 1), rngs=rngs)

    def __call__(self, images):
        skip = nnx.silu(self.enter(images))
        x = nnx.silu(self.middle(nnx.silu(self.down(skip))))
        return self.leave(jnp.concatenate([nnx.silu(self.up(x)), skip], axis=-1))


CONV_RULES = [("kernel", osub.MatrixSpec((0, 1, 2), 3))]


def descend(loss, params, tx, steps=40):
    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, first = tx.init(params), loss(params)
    start = params
    for _ in range(steps):
        params, state, value = step(params, state)
    assert value < 0.7 * first
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(params), strict=True
    ):
        assert np.any(a != b), f"{jax.tree_util.keystr(path)} did not move"
    return state


@pytest.mark.filterwarnings("error")
def test_a_vision_transformer_in_linen():
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    labels = jnp.arange(8) % 5
    model = ViT()
    params = model.init(jax.random.key(1), images)["params"]
    tx = osub.galore(0.02, 4, scale=1.0, every=10, rules=VIT_RULES)
    plans = {p.path: p for p in osub.describe(params, tx).leaves}
    assert plans["patches/kernel"].matrix_shape == (48, 32)
    assert plans["attention/query/kernel"].matrix_shape == (32, 32)
    assert plans["attention/out/kernel"].matrix_shape == (32, 32)
    assert not plans["head/kernel"].projected and not plans["position_embed"].projected
    assert sum(p.projected for p in plans.values()) == 7

    def loss(params):
        logits = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    state = descend(loss, params, tx)
    assert state[0].inner.mu["attention"]["query"]["kernel"].shape == (32, 4)


@pytest.mark.filterwarnings("error")
def test_a_unet_block_in_nnx():
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    graph, params = nnx.split(UNetBlock(nnx.Rngs(0)))
    tx = osub.online_subspace_descent(0.01, 6, scale=1.0, rules=CONV_RULES)
    plans = {p.path: p for p in osub.describe(params, tx).leaves}
    assert plans["middle/kernel"].matrix_shape == (216, 24)
    assert plans["up/kernel"].matrix_shape == (96, 16)
    # One by one, (1, 1, 32, 3): three columns are fewer than the rank.
    assert not plans["leave/kernel"].projected
    assert sum(p.projected for p in plans.values()) == 4

    def loss(params):
        return jnp.mean((nnx.merge(graph, params)(images) - jnp.sin(3 * images)) ** 2)

    state = descend(loss, params, tx)
    shapes = [leaf.bases[0].shape for leaf in state[0].projection.leaves.values()]
    assert sorted(shapes) == [(16, 6), (16, 6), (24, 6), (24, 6)]
