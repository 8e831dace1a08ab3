"""Weights of few bits: stochastic rounding and the int8 format."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_subspace as osub
from optax_subspace._rounding import stochastic_round


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("value", [1.001, -3.3, 1e-3, 0.0, 6e-8, 65000.0])
def test_rounding_is_to_a_neighbour_and_keeps_the_mean(dtype, value):
    count = 200_000
    x = jnp.full(count, value, jnp.float32)
    drawn = np.asarray(jax.jit(lambda k: stochastic_round(x, dtype, k))(jax.random.key(1)))
    wide = drawn.astype(np.float64)
    exact = float(x[0])
    neighbours = np.unique(wide)
    assert len(neighbours) <= 2 and neighbours[0] <= exact <= neighbours[-1]
    if len(neighbours) == 2:
        gap = neighbours[1] - neighbours[0]
        share = (exact - neighbours[0]) / gap
        # Four standard deviations of a mean of `count` draws.
        deviation = gap * np.sqrt(share * (1 - share) / count)
        assert abs(wide.mean() - exact) < 4 * deviation
        np.testing.assert_array_equal(
            np.sort(neighbours.astype(np.float32)),
            np.unique(np.asarray(jnp.asarray(neighbours).astype(dtype)).astype(np.float32)),
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_is_not_finite_stays_so(dtype):
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 1.0, -0.0])
    drawn = stochastic_round(x, dtype, jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(drawn, np.float32), np.asarray(x))


def test_small_steps_count_in_the_mean_only():
    """A thousand steps of a hundredth of the distance between two bfloat16."""
    params = {"w": jnp.ones(512, jnp.bfloat16), "b": jnp.ones(3)}
    updates = {"w": jnp.full(512, 2.0**-7 / 100), "b": jnp.full(3, 0.5)}

    def walk(key):
        def step(params, key):
            return osub.apply_updates(params, updates, key=key), None

        keys = None if key is None else jax.random.split(key, 1000)
        return jax.lax.scan(step, params, keys, length=1000)[0]

    stuck, moved = walk(None), walk(jax.random.key(0))
    assert float(stuck["w"].astype(jnp.float32).mean()) == 1
    mean = float(moved["w"].astype(jnp.float32).mean())
    assert abs(mean - (1 + 1000 * 2.0**-7 / 100)) < 0.01
    np.testing.assert_array_equal(moved["b"], 501)
    assert moved["w"].dtype == jnp.bfloat16


def test_without_a_key_it_is_optax_apart_from_the_float32_sum():
    params = {"w": jax.random.normal(jax.random.key(0), (8, 8)), "none": None}
    updates = {"w": jnp.full((8, 8), 0.1), "none": None}
    chex.assert_trees_all_equal(
        osub.apply_updates(params, updates), optax.apply_updates(params, updates)
    )
    with jax.enable_x64(True):
        wide = jnp.ones(3, jnp.float64)
        moved = osub.apply_updates(wide, jnp.full(3, 1e-12), key=jax.random.key(0))
        assert moved.dtype == jnp.float64 and float(moved[0]) > 1


def test_the_same_key_gives_the_same_weights_and_leaves_differ():
    params = {k: jnp.ones(4096, jnp.bfloat16) for k in "ab"}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 3e-3), params)
    one = osub.apply_updates(params, updates, key=jax.random.key(3))
    again = osub.apply_updates(params, updates, key=jax.random.key(3))
    chex.assert_trees_all_equal(one, again)
    assert not np.array_equal(one["a"], one["b"])


def test_int8_weights_train_in_place():
    """A linear model whose steps are smaller than the distance of two codes."""
    teacher = jax.random.normal(jax.random.key(0), (64, 64)) / 8
    inputs = jax.random.normal(jax.random.key(1), (256, 64))
    loss = lambda p: jnp.mean((inputs @ p["w"] + p["b"] - inputs @ teacher) ** 2)
    start = {"w": jax.random.normal(jax.random.key(2), (64, 64)) / 8, "b": jnp.zeros(64)}
    tx = osub.galore(3e-4, 16, scale=1.0)

    def train(params, stochastic):
        state = tx.init(osub.dequantize(params))

        @jax.jit
        def step(params, state, key):
            weights = osub.dequantize(params)
            updates, state = tx.update(jax.grad(loss)(weights), state, weights)
            return osub.apply_updates(params, updates, key=key if stochastic else None), state

        for i in range(200):
            params, state = step(params, state, jax.random.key(i))
        return params

    int8 = osub.quantize_weights(start)
    assert isinstance(int8["w"], osub.QuantizedWeight) and int8["w"].codes.dtype == jnp.int8
    assert int8["b"].dtype == jnp.float32  # too small
    exact = float(loss(train(start, False)))
    drawn, nearest = train(int8, True), train(int8, False)
    assert isinstance(drawn["w"], osub.QuantizedWeight)
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, int8)
    first = float(loss(start))
    gain = lambda params: (first - float(loss(osub.dequantize(params)))) / (first - exact)
    assert gain(drawn) > 0.9
    # To the nearest code most steps are lost.
    assert gain(nearest) < gain(drawn) - 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_int8_weights_of_any_dtype_keep_what_is_not_moved(dtype):
    """Codes are sums of float32: one of bfloat16 would be off by a quarter of their distance."""
    weight = (0.02 * jax.random.normal(jax.random.key(0), (64, 256))).astype(dtype)
    start = params = osub.quantize_weights({"w": weight})
    update = {"w": jnp.zeros(weight.shape).at[0, 0].set(1e-9)}
    step = jax.jit(lambda p, key: osub.apply_updates(p, update, key=key))
    for i in range(200):
        params = step(params, jax.random.key(i))
    assert jnp.mean(params["w"].codes != start["w"].codes) < 2e-3
    # And small moves of all weights are kept in the mean.
    away = jax.random.normal(jax.random.key(1), weight.shape)
    distance = jnp.abs(start["w"].scales)[:, None] / 127
    moves = {"w": 0.05 * away * distance.reshape(weight.shape[0], -1)}
    move = jax.jit(lambda p, key: osub.apply_updates(p, moves, key=key))
    params = start
    for i in range(100):
        params = move(params, jax.random.key(i))
    value = lambda p: (p["w"].codes * p["w"].scales[..., None] / 127).reshape(weight.shape)
    gained = (value(params) - value(start)) / distance
    assert abs(float(jnp.vdot(gained, away) / jnp.vdot(away, away)) - 5) < 0.1


def test_int8_weights_update_in_place_by_the_compilers_account():
    params = osub.quantize_weights({"w": jnp.ones((256, 512))})
    step = jax.jit(lambda p, u, k: osub.apply_updates(p, u, key=k), donate_argnums=0)
    shape = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32)}
    memory = step.lower(params, shape, jax.random.key(0)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 256 * 512 + 4 * 256 * 512 // 256


def test_int8_weights_of_several_axes_dtypes_and_options(tmp_path):
    params = {
        "stack": jnp.ones((3, 32, 64), jnp.bfloat16),
        "odd": jnp.ones((7, 11)),
        "v": jnp.ones(9000),
    }
    stored = osub.quantize_weights(params, min_size=0, block=64, shards=1)
    assert stored["v"].dtype == jnp.float32 and not isinstance(stored["v"], osub.Quantized)
    back = osub.dequantize(stored)
    chex.assert_trees_all_equal(back, params)
    moved = osub.apply_updates(stored, jax.tree.map(lambda p: -0.5 * p, params))
    half = osub.dequantize(moved)
    assert half["stack"].dtype == jnp.bfloat16 and float(half["odd"][0, 0]) == 0.5
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "weights", stored)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "weights", jax.eval_shape(lambda: stored))
    assert isinstance(restored["odd"], osub.QuantizedWeight)
    chex.assert_trees_all_equal(restored, stored)


def test_weights_that_cannot_be_kept_in_int8_are_named():
    table = {"layer": {"table": jnp.ones((64, 64), jnp.int32)}}
    with pytest.raises(TypeError, match="layer/table has dtype int32.*leave it out with a rule"):
        osub.quantize_weights(table)


def test_rules_choose_the_weights_that_are_kept_in_int8():
    shapes = {"kernel": (2, 8, 16), "scale": (2, 8), "embedding": (50, 8), "one_row": (1, 90)}
    params = {k: jnp.ones(v) for k, v in shapes.items()}
    stored = osub.quantize_weights(
        params, [("kernel", osub.MatrixSpec(1, 2)), ("scale", None)], min_size=0
    )
    assert {k for k, v in stored.items() if isinstance(v, osub.QuantizedWeight)} == {"kernel"}


def test_a_block_of_weights_that_overflows_keeps_to_itself():
    params = osub.quantize_weights({"w": jnp.ones((16, 256))})
    updates = {"w": jnp.zeros((16, 256)).at[3, 5].set(jnp.nan)}
    found = osub.dequantize(osub.apply_updates(params, updates, key=jax.random.key(0)))["w"]
    keep = np.arange(16) != 3
    assert np.isfinite(found[keep]).all()


def test_stacked_weights_keep_their_structure_through_a_scan():
    stack = {"w": jax.random.normal(jax.random.key(0), (3, 10, 30))}
    stored = jax.vmap(lambda p: osub.quantize_weights(p, min_size=0))(stack)
    updates = {"w": jnp.full((3, 10, 30), 1e-3)}

    def step(params, key):
        return osub.apply_updates(params, updates, key=key), None

    moved, _ = jax.lax.scan(step, stored, jax.random.split(jax.random.key(1), 5))
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, stored)
    mean = jnp.mean(osub.dequantize(moved)["w"] - stack["w"])
    assert abs(float(mean) - 5e-3) < 2e-3


def test_other_leaves_move_as_with_optax():
    params = {"count": jnp.array(2**24, jnp.int32), "x": jnp.ones(2)}
    params["small"] = jnp.ones(2, jnp.float8_e5m2)
    updates = {"count": jnp.array(1, jnp.int32), "x": 0.5, "small": jnp.ones(2)}
    for key in (None, jax.random.key(0)):
        moved = osub.apply_updates(params, updates, key=key)
        assert int(moved["count"]) == 2**24 + 1 and moved["count"].dtype == jnp.int32
        assert moved["x"].tolist() == [1.5, 1.5] and moved["small"].tolist() == [2, 2]


def test_updates_of_another_shape_are_refused():
    params = {"a": osub.quantize_weights({"w": jnp.ones((64, 64))}), "b": jnp.ones((1, 3))}
    good = {"a": {"w": jnp.ones((64, 64))}, "b": jnp.ones((1, 3))}
    osub.apply_updates(params, good)
    for bad, message in (
        (good | {"a": {"w": jnp.ones((5, 64, 64))}}, r"update of a/w has shape \(5, 64, 64\)"),
        (good | {"b": jnp.ones((5, 3))}, r"update of b has shape \(5, 3\), the parameter \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            osub.apply_updates(params, bad)


def test_weights_that_do_not_move_do_not_drift():
    params = osub.quantize_weights({"w": jax.random.normal(jax.random.key(0), (256, 64))})
    step = jax.jit(lambda p, key: osub.apply_updates(p, {"w": jnp.zeros((256, 64))}, key=key))
    moved = params
    for i in range(50):
        moved = step(moved, jax.random.key(i))
    chex.assert_trees_all_equal(moved, params)
