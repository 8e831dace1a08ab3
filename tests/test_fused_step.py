"""The fused step on a model of a few numbers: dtypes, random numbers, states, inputs and errors."""

import collections

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_subspace as osub
from optax_subspace._fused_state import FusedState, next_scale


def embed(rest, batch):
    return batch @ rest["embed"]["w"]


def block(layer, x):
    return x + jnp.tanh(x @ layer["w"])


def loss(rest, x, batch):
    del batch
    return jnp.mean((x @ rest["head"]["w"]).astype(jnp.float32) ** 2)


MODEL = embed, block, loss


def params_in(dtype=jnp.float32, layers=3, width=6):
    keys = jax.random.split(jax.random.key(0), 3)
    tree = {
        "embed": {"w": jax.random.normal(keys[0], (4, width))},
        "layers": {"w": 0.3 * jax.random.normal(keys[1], (layers, width, width))},
        "head": {"w": jax.random.normal(keys[2], (width,))},
    }
    # (Of float16 in all of them, so that they begin at the same weights.)
    return jax.tree.map(lambda x: x.astype(jnp.float16).astype(dtype), tree)


def batch_in(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(3), (8, 4)).astype(dtype)


def run(tx, steps, dtype=jnp.float32, **options):
    """Parameters after some steps, the state before them, and the last metrics."""
    fused, params = osub.fused_backward(*MODEL, tx, **options), params_in(dtype)
    step, before = jax.jit(fused.step), fused.init(params)
    state = before
    for _ in range(steps):
        params, state, metrics = step(params, state, batch_in(dtype))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
    return params, before, metrics


RULES = [("layers", osub.MatrixSpec(-2, -1))]


@pytest.mark.parametrize(
    ("tx", "options"),
    [
        (optax.adam(0.02), {}),
        pytest.param(osub.adalomo(0.02), {}, marks=pytest.mark.slow),
        pytest.param(
            osub.galore(0.02, 2, rules=RULES), {"at_source": True}, marks=pytest.mark.slow
        ),
    ],
    ids=["adam", "adalomo", "at the source"],
)
def test_steps_in_float16_are_near_those_in_float32(tx, options):
    # A scale at which no gradient overflows, so that no step is left out.
    how = osub.LossScale(initial=64.0)
    ours, state, metrics = run(tx, 6, jnp.float16, loss_scale=how, **options)
    theirs, expected, _ = run(tx, 6, loss_scale=how, **options)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
    assert metrics.skipped == 0
    assert {x.dtype for x in jax.tree.leaves(ours)} == {jnp.dtype(jnp.float16)}
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), ours), theirs, rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_adalomos_means_fall_in_sixteen_bits(dtype):
    tx, weights = osub.adalomo(0.1), {"w": jnp.ones((4, 6), dtype), "b": jnp.ones(6, dtype)}
    large = jax.tree.map(lambda w: jnp.full_like(w, 1e-3), weights)
    _, state = tx.update(large, tx.init(weights), weights)
    late = optax.tree.set(state, count=jnp.int32(20_000))
    updates, after = tx.update(jax.tree.map(jnp.zeros_like, large), late, weights)
    means = lambda state: [state[0].v_row["w"], state[0].v_col["w"], state[0].v["b"]]
    for old, new in zip(means(late), means(after), strict=True):
        assert new.dtype == jnp.float32
        np.testing.assert_allclose(new, (1 - 20_001**-0.8) * old, rtol=1e-6)
        assert jnp.all(new < old)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


def keys_of(state):
    """The random keys of the layers and of the rest, as tuples of numbers."""
    found = [state.layers, *state.rest.values()]
    keys = [optax.tree.get(part, "rng_key") for part in found]
    words = [jax.random.key_data(k).reshape(-1, 2) for k in keys]
    return [tuple(row) for row in np.concatenate(words).tolist()]


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "raw"])
def test_random_keys_differ_from_part_to_part(key):
    tx = optax.add_noise(1.0, 0.5, jax.random.key(0))
    raw = optax.GradientTransformation(
        lambda params: tx.init(params)._replace(rng_key=key), tx.update
    )
    params = params_in()
    keys = keys_of(osub.fused_backward(*MODEL, raw).init(params))
    assert len(keys) == len(set(keys)) == 5
    # The library's own are those of the layer as before.
    own = osub.scale_by_subspace(raw, rank=2, rules=RULES, projector=osub.random_projection())
    stored = osub.quantize_state(own, stochastic_rounding=True)
    alone = osub.fused_backward(*MODEL, osub.quantize_state(own)).init(params)
    state = osub.fused_backward(*MODEL, stored).init(params)
    assert len(set(keys_of(state))) == 5
    rule = lambda state: jax.random.key_data(state.inner.projection.leaves["layers/w"].rule[0])
    np.testing.assert_array_equal(rule(state.layers), rule(alone.layers))
    assert len({tuple(k) for k in jax.random.key_data(state.layers.key).tolist()}) == 3


def test_noise_differs_from_layer_to_layer():
    fused = osub.fused_backward(*MODEL, optax.noisy_sgd(0.1, 1.0, 0.0, jax.random.key(0)))
    flat = jax.tree.map(jnp.zeros_like, params_in())
    step = jax.jit(fused.step, donate_argnums=(0, 1))
    after, _, _ = step(flat, fused.init(flat), batch_in())
    layers = after["layers"]["w"]
    assert jnp.all(layers[0] != layers[1]) and jnp.all(layers[1] != layers[2])


def shared_norm():
    """As a transformation of one's own would be written."""

    def init_fn(params):
        return optax.tree.norm(params)

    return optax.GradientTransformation(
        init_fn, lambda g, s, p=None: (jax.tree.map(lambda x: -x / s, g), s)
    )


def through_a_mutable_array():
    def update_fn(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        total = jax.new_ref(jnp.float32(0))
        total[...] = jnp.sum(leaves[0] ** 2)
        return structure.unflatten([-x * total[...] for x in leaves]), state

    return optax.GradientTransformation(lambda params: (), update_fn)


def divided_by_norm(updates, state, params=None):
    return jax.tree.map(lambda x: x / optax.tree.norm(updates), updates), state


DIVIDED = optax.GradientTransformation(lambda params: (), divided_by_norm)


@pytest.mark.parametrize(
    ("tx", "name"),
    [
        (shared_norm(), "shared_norm"),
        (shared_norm()._replace(init=optax.tree.norm), "the transformation"),
        (DIVIDED, "divided_by_norm"),
        (optax.chain(optax.trace(0.9), DIVIDED, optax.scale(0.1)), "divided_by_norm"),
        (
            optax.GradientTransformation(DIVIDED.init, lambda *a: divided_by_norm(*a)),
            "the transformation",
        ),
    ],
)
def test_leaves_that_are_mixed_at_the_beginning_are_found(tx, name):
    with pytest.raises(ValueError, match=f"^{name} mixes leaves: the update of embed/w"):
        osub.fused_backward(*MODEL, tx).init(params_in())


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.contrib.reduce_on_plateau(), "reduce_on_plateau needs 'value' .*plain step"),
        (optax.polyak_sgd(), "scale_by_polyak needs 'value'"),
        (optax.lbfgs(), "scale_by_zoom_linesearch needs 'value', 'grad'"),
        (optax.contrib.sophia(0.1), "weights alone .obj_fn must be provided .*use a plain step"),
        (optax.lookahead(optax.sgd(0.1), 5, 0.5), "plain gradients and weights .* a plain step"),
        (optax.monitor({"n": optax.tree.norm}), "another structure than its init.* a plain step"),
        (through_a_mutable_array(), "through_a_mutable_array mixes leaves: .* head/w depends"),
    ],
    ids=["plateau", "polyak", "lbfgs", "sophia", "lookahead", "monitor", "mutable"],
)
def test_what_a_fused_step_cannot_run_is_refused(tx, message):
    with pytest.raises(ValueError, match=message):
        osub.fused_backward(*MODEL, tx).init(params_in())


@pytest.mark.parametrize(
    "tx",
    [
        optax.inject_hyperparams(optax.sgd)(learning_rate=jnp.float32(0.1)),
        # Its state is the weights.
        optax.GradientTransformation(lambda params: params, lambda g, s, p=None: (g, s)),
    ],
    ids=["user's", "weights"],
)
def test_states_can_be_donated_whatever_arrays_they_were_made_of(tx):
    fused, params = osub.fused_backward(*MODEL, tx), params_in()
    step = jax.jit(fused.step, donate_argnums=(0, 1))
    step(params, fused.init(params), batch_in())
    # The user's arrays are still there.
    fused.init(params_in())


def all_but_head():
    return {"embed": {"w": True}, "layers": {"w": True}, "head": {"w": False}}


@pytest.mark.parametrize(
    "optimizer",
    [osub.lomo, osub.adalomo, osub.galore, osub.apollo, osub.adamw8bit],
    ids=lambda alias: alias.__name__,
)
def test_masks_that_are_trees_serve_parts_too(optimizer):
    tx, params = optimizer(0.1, weight_decay=0.1, mask=all_but_head()), params_in()
    jax.eval_shape(osub.fused_backward(*MODEL, tx).init, params)
    if optimizer is osub.lomo:
        for key, part in params.items():
            updates, _ = tx.update(
                jax.tree.map(jnp.zeros_like, {key: part}), tx.init({key: part}), {key: part}
            )
            assert bool(jnp.any(updates[key]["w"] != 0)) == (key != "head")
        unknown = optimizer(0.1, weight_decay=0.1, mask={**all_but_head(), "hed": False})
        with pytest.raises(ValueError, match="key"):
            unknown.init(params)


@pytest.mark.parametrize(
    "tx",
    [
        optax.masked(optax.sgd(0.1), all_but_head()),
        optax.adamw(0.1, mask=lambda _: all_but_head()),
        optax.multi_transform({True: optax.sgd(0.1), False: optax.adam(0.1)}, all_but_head()),
        optax.masked(optax.sgd(0.1), lambda params: {k: k != "head" for k in [*params, "head"]}),
    ],
)
def test_masks_of_the_whole_tree_are_refused_with_the_remedy(tx):
    with pytest.raises(ValueError, match=r"not on \{'layers': ...\} alone.*mask=lambda params:"):
        osub.fused_backward(*MODEL, tx).init(params_in())


def test_parameters_in_other_containers_are_refused_by_name():
    init, params = osub.fused_backward(*MODEL, optax.sgd(0.1)).init, params_in()
    with pytest.raises(ValueError, match=r"type FrozenDict.*flax\.core\.unfreeze\(params\)"):
        init(flax.core.freeze(params))
    with pytest.raises(ValueError, match=r"type State.*nnx\.to_pure_dict\(params\)"):
        init(nnx.State(params))
    with pytest.raises(ValueError, match=r"type OrderedDict.*dict\(params\)"):
        init(collections.OrderedDict(params))
    for several in (list, tuple):
        layers = several([{"w": jnp.eye(6)}, {"w": jnp.eye(6)}])
        with pytest.raises(ValueError, match=rf"{several.__name__} under 'layers': .*jnp\.stack"):
            init({**params, "layers": layers})
    with pytest.raises(ValueError, match="apply_every keeps a whole gradient tree"):
        osub.fused_backward(*MODEL, optax.apply_every(2)).init(params)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_finite_gradients_whose_squares_overflow_are_no_overflow(clip_norm):
    large = lambda *args: 1e20 * loss(*args)
    fused = osub.fused_backward(
        embed, block, large, optax.sgd(1e-21), loss_scale=osub.LossScale(1.0), clip_norm=clip_norm
    )
    params = params_in()
    after, state, metrics = jax.jit(fused.step)(params, fused.init(params), batch_in())
    assert metrics.skipped == state.skipped == 0 and np.isinf(metrics.grad_norm)
    if clip_norm is None:
        assert jnp.any(after["layers"]["w"] != params["layers"]["w"])
    chex.assert_tree_all_finite(after)


@pytest.mark.parametrize("name", ["clip_norm", "clip_layer_norm", "clip_value"])
def test_numbers_to_clip_to_are_positive(name):
    for value in (0, -1.0, 1e-45, np.float32(0), float("nan"), jnp.float32(-1), np.zeros([])):
        with pytest.raises(ValueError, match=f"{name} must be positive in float32, got {value}: l"):
            osub.fused_backward(*MODEL, optax.sgd(0.1), **{name: value})
    osub.fused_backward(*MODEL, optax.sgd(0.1), **{name: jnp.float32(1)})


def test_what_a_step_is_given_wrong_is_told():
    for seed in ("a", 0.5, True, jax.random.key(0)):
        with pytest.raises(TypeError, match="fused_backward: seed must be an int, got"):
            osub.fused_backward(*MODEL, optax.sgd(0.1), seed=seed)
    params, batch = params_in(), batch_in()
    half = lambda rest, batch: embed(rest, batch).astype(jnp.bfloat16)
    fused = osub.fused_backward(half, block, loss, optax.sgd(0.1))
    with pytest.raises(TypeError) as error:
        jax.eval_shape(fused.step, params, fused.init(params), batch)
    assert any("block hands on what it is given" in note for note in error.value.__notes__)
    fused = osub.fused_backward(*MODEL, optax.sgd(0.1))
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (jax.P(), jax.P(), jax.P("data")), "out_specs": jax.P()}
    with pytest.raises(ValueError, match=r"the loss differs between .* over \['data'\]: leave"):
        jax.eval_shape(
            jax.shard_map(fused.step, mesh=mesh, **specs), params, fused.init(params), batch
        )


def with_more(random):
    """A model whose blocks hand on the rows' numbers, which of them count, and a random key."""

    def first(rest, batch):
        rows = jnp.arange(len(batch))
        h = {"x": embed(rest, batch), "row": rows, "counts": rows < 5}
        return {**h, "key": jax.random.key(0)} if random else h

    def middle(layer, h):
        kept, more = h["counts"][:, None], {}
        if random:
            key, draw = jax.random.split(h["key"])
            kept &= jax.random.bernoulli(draw, 0.8, h["x"].shape)
            more = {"key": key}
        y = block(layer, h["x"]) * jnp.cos(h["row"])[:, None]
        return {**h, **more, "x": jnp.where(kept, y, h["x"]), "row": h["row"] + 1}

    return first, middle, lambda rest, h, batch: loss(rest, h["x"], batch)


@pytest.mark.parametrize(
    ("random", "remat"),
    [(False, False), *(pytest.param(True, x, marks=pytest.mark.slow) for x in (True, False))],
)
def test_blocks_may_hand_on_integers_masks_and_keys(random, remat):
    first, middle, last = with_more(random)

    def total(params):
        h, _ = jax.lax.scan(
            lambda h, layer: (middle(layer, h), None), first(params, batch_in()), params["layers"]
        )
        return last(params, h, batch_in())

    params = params_in()
    value, gradients = jax.jit(jax.value_and_grad(total))(params)
    fused = osub.fused_backward(first, middle, last, optax.sgd(1.0), remat=remat)
    after, _, metrics = jax.jit(fused.step)(params, fused.init(params), batch_in())
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    chex.assert_trees_all_close(
        after, jax.tree.map(lambda p, g: p - g, params, gradients), rtol=1e-4, atol=1e-5
    )


def test_a_loss_scale_stays_finite_and_falls_after_an_overflow():
    how = osub.LossScale(2.0**126, period=1)
    state = FusedState(jnp.int32(0), (), {}, jnp.float32(2.0**127), jnp.int32(0), jnp.int32(0))
    assert next_scale(how, state, jnp.array(True)) == (2.0**127, 0)
    assert next_scale(how, state, jnp.array(False)) == (2.0**126, 0)
    small = state._replace(scale=jnp.float32(0.5))
    assert next_scale(how, small, jnp.array(False)) == (0.5, 0)


@pytest.mark.parametrize(
    ("loss_scale", "said"),
    [
        (1024.0, "must be a LossScale, got 1024"),
        (osub.LossScale(float("nan")), "initial must be finite and above 0 in float32, got nan"),
        (osub.LossScale(1e39), "initial must be finite and above 0 in float32, got 1e[+]39"),
        (osub.LossScale(1e-50), "initial must be finite and above 0"),
        (osub.LossScale(factor=1.0), "factor must be finite and above 1"),
        (osub.LossScale(period=0), "period must be at least 1"),
    ],
)
def test_loss_scales_that_cannot_serve_are_refused(loss_scale, said):
    with pytest.raises((TypeError, ValueError), match=said):
        osub.fused_backward(embed, block, loss, optax.sgd(0.1), loss_scale=loss_scale)


def test_float32_views_need_shapes_alone():
    shapes = {"w": jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)}
    means = jax.tree.leaves(osub.adalomo(0.1).init(shapes))
    assert {x.dtype.name for x in means} <= {"float32", "int32"}
    with pytest.raises(TypeError, match="in_float32: tx must be an optax transformation"):
        osub.in_float32(None)


@jax.custom_vjp
def overflowing(x):
    return x


overflowing.defvjp(lambda x: (x, None), lambda _, g: (jnp.full_like(g, jnp.inf),))


@pytest.mark.parametrize("part", ["embed", "layers", "head"])
@pytest.mark.parametrize("clip_value", [None, 1.0])
def test_an_overflow_in_one_part_alone_skips_the_step(part, clip_value):
    spoiled = lambda tree, key: {**tree, "w": overflowing(tree["w"])} if key == part else tree
    fused = osub.fused_backward(
        lambda rest, batch: embed({**rest, "embed": spoiled(rest["embed"], "embed")}, batch),
        lambda layer, x: block(spoiled(layer, "layers"), x),
        lambda rest, x, _: loss({**rest, "head": spoiled(rest["head"], "head")}, x, None),
        optax.adam(0.1),
        loss_scale=osub.LossScale(8.0),
        clip_value=clip_value,
    )
    params = params_in()
    state = fused.init(params)._replace(good=jnp.int32(5))
    after, new, metrics = jax.jit(fused.step)(params, state, batch_in())
    assert metrics.skipped == new.skipped == 1
    assert new.scale == 4 and new.good == 0
    chex.assert_trees_all_equal(after, params)
    chex.assert_trees_all_equal((new.layers, new.rest), (state.layers, state.rest))


@pytest.mark.parametrize("clip", ["clip_norm", "clip_layer_norm", "clip_value"])
def test_clips_are_those_of_gradients_without_their_scale(clip):
    limit = 0.01 if clip == "clip_value" else 0.1
    scaled, _, found = run(optax.sgd(1.0), 1, loss_scale=osub.LossScale(64.0), **{clip: limit})
    plain, _, expected = run(optax.sgd(1.0), 1, grad_norm=True, **{clip: limit})
    whole, _, _ = run(optax.sgd(1.0), 1)
    chex.assert_trees_all_close(scaled, plain, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.grad_norm, expected.grad_norm, rtol=1e-6)
    assert jnp.any(jnp.abs(whole["layers"]["w"] - plain["layers"]["w"]) > 1e-3), "it does clip"


def test_a_loss_scale_that_the_loss_rounds():
    half = lambda *args: loss(*args).astype(jnp.bfloat16)
    params, found = params_in(), []
    for scale in (None, osub.LossScale(10045.0)):
        fused = osub.fused_backward(embed, block, half, osub.lomo(1.0), loss_scale=scale)
        found.append(jax.jit(fused.step)(params, fused.init(params), batch_in())[0])
    chex.assert_trees_all_close(*found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"clip_norm": 0.1}, {"grad_norm": True}])
def test_norms_of_parts_in_other_dtypes(options):
    with jax.enable_x64():
        params, expected = params_in(), run(optax.sgd(1.0), 1, **options)
        params["layers"] = jax.tree.map(lambda x: x.astype(jnp.float64), params["layers"])
        wide = lambda layer, x: block(layer, x).astype(jnp.float32)
        fused = osub.fused_backward(embed, wide, loss, optax.sgd(1.0), **options)
        after, _, metrics = jax.jit(fused.step)(params, fused.init(params), batch_in(jnp.float32))
    chex.assert_trees_all_close(after, expected[0], rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(metrics.grad_norm, expected[2].grad_norm, rtol=1e-6)
    assert metrics.grad_norm.dtype == jnp.float32


def test_steps_without_overflow_are_counted_until_the_scale_grows():
    fused = osub.fused_backward(*MODEL, optax.sgd(0.1), loss_scale=osub.LossScale(8.0, period=3))
    params, step, seen = params_in(), jax.jit(fused.step), []
    state = fused.init(params)
    for _ in range(4):
        params, state, _ = step(params, state, batch_in())
        seen.append((float(state.scale), int(state.good)))
    assert seen == [(8, 1), (8, 2), (16, 0), (16, 1)]


def test_what_neither_end_reads_decays_all_the_same():
    fused = osub.fused_backward(*MODEL, osub.lomo(0.1, weight_decay=0.5))
    params = {**params_in(), "other": jnp.ones(3)}
    after, _, _ = jax.jit(fused.step)(params, fused.init(params), batch_in())
    np.testing.assert_allclose(after["other"], 0.95, rtol=1e-6)


def test_stochastic_rounding_draws_anew_for_each_layer_and_step():
    """All weights are one and all updates the same, a fraction of what bfloat16 can tell."""
    tx = optax.stateless(lambda g, _: jax.tree.map(lambda x: jnp.full_like(x, 1e-3), g))
    fused = osub.fused_backward(*MODEL, tx, seed=0)
    params = jax.tree.map(jnp.ones_like, params_in(jnp.bfloat16, width=16))
    step, before, found = jax.jit(fused.step), fused.init(params), []
    for count in (0, 1):
        after, _, _ = step(params, before._replace(step=jnp.int32(count)), batch_in(jnp.bfloat16))
        found += [np.asarray(w != 1) for w in after["layers"]["w"]]
    assert all(0.05 < rounded_up.mean() < 0.3 for rounded_up in found)
    for i, one in enumerate(found):
        assert all(np.any(one != other) for other in found[:i])


def test_projections_of_the_rest_differ_from_part_to_part():
    tx = osub.scale_by_subspace(
        optax.scale_by_adam(),
        rank=2,
        projector=osub.random_projection(),
        rules=[("(layers|up|down)", osub.MatrixSpec(-2, -1))],
    )
    stored = osub.quantize_state(tx, stochastic_rounding=True)
    params = {**params_in(), "up": {"w": jnp.ones((6, 6))}, "down": {"w": jnp.ones((6, 6))}}
    rest = osub.fused_backward(*MODEL, stored).init(params).rest
    keys = [np.asarray(jax.random.key_data(rest[k].key)) for k in ("up", "down")]
    rules = [rest[k].inner.projection.leaves[f"{k}/w"].rule[0] for k in ("up", "down")]
    assert np.any(keys[0] != keys[1]) and np.any(rules[0] != rules[1])


def test_parameters_and_losses_that_have_no_gradient_are_refused():
    params = params_in()
    counted = {**params, "layers": {**params["layers"], "count": jnp.zeros(3, jnp.int32)}}
    with pytest.raises(TypeError, match="parameter layers/count has dtype int32: only real"):
        osub.fused_backward(*MODEL, optax.sgd(0.1)).init(counted)
    for dtype in ("complex64", "float8_e4m3fn"):
        with pytest.raises(TypeError, match=f"parameter other has dtype {dtype}: .* 16 bits learn"):
            osub.fused_backward(*MODEL, optax.sgd(0.1)).init(
                {**params, "other": jnp.ones(3, dtype)}
            )
    for wrong, said in (
        (lambda *a: (loss(*a), {"aux": jnp.ones(2)}), r"float32\[\].*float32\[2\]"),
        (lambda *a: loss(*a)[None], r"float32\[1\]"),
        (lambda *a: loss(*a) + 0j, r"complex64\[\]"),
    ):
        fused = osub.fused_backward(embed, block, wrong, optax.sgd(0.1))
        with pytest.raises(
            TypeError,
            match="loss must return one real number, the mean as a JAX array, got.*" + said,
        ):
            fused.step(params, fused.init(params), batch_in())
    for value in ("1", True, jnp.ones(2), jnp.array(True), 1j):
        with pytest.raises(TypeError, match="clip_norm must be a number, got "):
            osub.fused_backward(*MODEL, optax.sgd(0.1), clip_norm=value)
