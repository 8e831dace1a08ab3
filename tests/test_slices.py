"""Elementwise updates of large leaves, slice by slice: equal to those of the whole."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_subspace as osub
from optax_subspace import _slices

ELEMENTWISE = {
    "adam": optax.scale_by_adam(),
    "amsgrad": optax.scale_by_amsgrad(),
    "lion": optax.scale_by_lion(),
    "trace": optax.trace(0.9, nesterov=True),
    "rmsprop": optax.scale_by_rms(),
    "decaying": optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)),
    "galore": osub.scale_by_hamiltonian_descent(
        osub.adam_kinetic(eps=1e-6, eps_before_correction=True)
    ),
    "scheduled": optax.adam(optax.linear_schedule(0.1, 0.2, 10)),
}
MIXING = {
    "lamb": optax.lamb(0.1),
    "muon": osub.scale_by_hamiltonian_descent(osub.lion_k("nuclear")),
    "noisy": optax.chain(optax.scale_by_adam(), optax.add_noise(0.1, 0.5, 0)),
    "clipped": optax.chain(optax.clip_by_block_rms(1.0), optax.scale_by_adam()),
    "counting": optax.chain(
        optax.scale_by_adam(),
        optax.GradientTransformation(
            lambda p: jnp.zeros([]), lambda u, s, p=None: (u, s + optax.tree.norm(u))
        ),
    ),
    "in a subspace": osub.scale_by_subspace(optax.scale_by_adam(), rank=4),
}
PARAMS = {"w": (12, 4, 64), "b": (64,), "small": (8, 8), "v": (6, 512), "n": ()}


def tree(shift=0.0):
    return {k: jnp.sin(jnp.arange(np.prod(s)) + shift).reshape(s) for k, s in PARAMS.items()}


SIZE = 512


def run(tx, params, steps=3):
    state, update = tx.init(params), jax.jit(lambda g, s, p: tx.update(g, s, p))
    for step in range(steps):
        updates, state = update(tree(step), state, params)
    return updates, state


def sliced(inner, params, **storage):
    """The number of slices of each leaf that is taken apart."""
    tx = osub.quantize_state(inner, **{"block": 64, "min_size": 64} | storage)
    inner = optax.with_extra_args_support(inner)
    return _slices.count_slices(inner, params, tx.init(params).inner, params, SIZE)


@pytest.mark.parametrize(
    ("name", "code"), [("adam", "dynamic4"), *((name, "linear") for name in ELEMENTWISE)]
)
def test_slices_equal_the_whole(name, code):
    rules = [("^(0/)?nu", "dynamic")]
    with pytest.warns() if name in ("lion", "trace") else np.errstate():
        storage = {"rules": rules, "block": 64, "min_size": 64}
        expected = run(osub.quantize_state(ELEMENTWISE[name], code, **storage), tree())
        # In the order of the keys: v and w.
        assert sliced(ELEMENTWISE[name], tree(), code=code, rules=rules) == {3: 6, 4: 6}
        tx = osub.quantize_state(ELEMENTWISE[name], code, slice_size=SIZE, **storage)
        updates, state = run(tx, tree())
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected[1])
    chex.assert_trees_all_close(updates, expected[0], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        osub.dequantize(state), osub.dequantize(expected[1]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_entries_sees_the_whole(name):
    assert sliced(MIXING[name], tree()) == {}


def test_leaves_that_cannot_be_cut_are_updated_whole():
    adam = optax.scale_by_adam()
    w, v = (tree()[key] for key in ("w", "v"))
    assert sliced(adam, {"w": w}) == {0: 6}
    # No slice is made of whole blocks; too small; a lone array is no tree; the devices' own parts.
    assert sliced(adam, {"w": w}, block=2048) == {}
    assert sliced(adam, {"v": v[:2]}) == {}
    assert sliced(adam, w) == {}
    assert sliced(adam, {"w": w}, shards=2) == {}


def test_slices_draw_numbers_of_their_own():
    storage = {"block": 64, "min_size": 64, "slice_size": SIZE}
    tx = osub.quantize_state(
        optax.scale_by_adam(), "linear", **storage, stochastic_rounding=True, seed=3
    )
    params = {"w": jnp.ones((12, 4, 64)), "b": jnp.ones(64)}
    gradients = jax.tree.map(lambda x: x.at[..., 0].set(10.0), params)
    _, state = tx.update(gradients, tx.init(params), params)
    mu = np.asarray(osub.dequantize(state.inner.mu["w"])).reshape(12, 4, 64)
    assert len({row.tobytes() for row in mu.reshape(48, 64)}) > 40
    np.testing.assert_allclose(mu[..., 1:].mean(), 0.1, rtol=0.02)
    _, again = tx.update(gradients, tx.init(params), params)
    chex.assert_trees_all_equal(state.inner, again.inner)


def test_memory_of_an_update_is_that_of_slices():
    params = {"w": jax.ShapeDtypeStruct((64, 64, 256), jnp.float32)}

    def temporaries(slice_size):
        tx = osub.quantize_state(optax.scale_by_adam(), slice_size=slice_size)
        step = jax.jit(lambda g, s: tx.update(g, s), donate_argnums=(0, 1))
        lowered = step.lower(params, jax.eval_shape(tx.init, params))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    size = 4 * 2**20
    assert temporaries(None) > 2 * size
    assert temporaries(2**14) < size / 2


def test_leaves_that_mix_or_change_their_dtype_are_updated_whole():
    """A scalar made of another leaf, and updates of another dtype than the gradients'."""

    def by_bias(updates, params):
        norm = jnp.linalg.norm(updates["b"])
        return jax.tree.map(lambda u: u / norm, updates)

    params = {"w": tree()["w"], "b": jnp.ones(64)}
    assert sliced(optax.chain(optax.stateless(by_bias), optax.trace(0.9)), params) == {}
    halves = jax.tree.map(lambda x: x.astype(jnp.float16), params)
    assert sliced(ELEMENTWISE["galore"], halves) == {1: 6}
    assert sliced(optax.scale_by_adam(), halves) == {}
    with pytest.raises(ValueError, match="slice_size must be at least 1, got 0"):
        osub.quantize_state(optax.trace(0.9), slice_size=0)
