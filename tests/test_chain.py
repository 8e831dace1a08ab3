"""``subspace_project`` and ``in_subspace`` as members of ``optax.chain``."""

import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_subspace as osub
from optax_subspace import _chaining
from tests import trees

RATE = optax.scale_by_learning_rate(1e-2)


def chained(rank=4, **kwargs):
    return optax.chain(
        osub.subspace_project(rank=rank, rules=trees.RULES, **kwargs), osub.scale_by_adam(), RATE
    )


def small_chain(rank=4):
    return optax.chain(osub.subspace_project(rank=rank), osub.scale_by_adam(), RATE)


def run(tx, params, steps=4, update=None):
    state, update = tx.init(params), update or jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(trees.grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    "rank", [*(pytest.param(r, marks=pytest.mark.slow) for r in (1, 15)), 4, 128]
)
def test_equals_the_pure_form_and_moments_have_subspace_shape(rank):
    params = trees.params()
    pure = optax.chain(
        osub.scale_by_subspace(optax.scale_by_adam(), rank=rank, rules=trees.RULES), RATE
    )
    ours, state = run(chained(rank), params)
    theirs, pure_state = run(pure, params)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)
    chex.assert_trees_all_equal(state[1].inner, pure_state[0].inner)
    plans = osub.plan(params, trees.RULES, rank=rank)
    for p in plans:
        assert state[1].inner.mu[p.path].shape == p.low_shape
        assert state[1].inner.nu[p.path].shape == p.low_shape
        assert p.projected == (rank < min(p.matrix_shape) if p.reduction else False)
    assert any(p.projected for p in plans) == (rank < 16)


def test_default_rank_projects_as_in_the_readme():
    tx = optax.chain(osub.subspace_project(rank=128), osub.scale_by_adam(), RATE)
    params = {"w": jnp.ones((256, 200)), "v": jnp.ones((100, 300))}
    state = jax.eval_shape(tx.init, params)
    assert state[1].inner.mu["w"].shape == (256, 128)
    assert state[1].inner.mu["v"].shape == (100, 300)


def test_one_compilation_over_many_steps():
    params = trees.params()
    tx = chained()
    grads = [trees.grads(params, step) for step in range(5)]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    with trees.counting_compilations() as compilations:
        for g in grads:
            params, state = step(params, state, g)
    assert len(compilations) == 1


def test_state_keeps_structure_shapes_and_dtypes():
    for dtype in (jnp.float32, jnp.bfloat16):
        params = trees.params(dtype)
        tx = chained(projector_dtype=jnp.bfloat16)
        before = jax.eval_shape(tx.init, params)
        params, state = run(tx, params, steps=2)
        chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
        assert params["tall"].dtype == dtype


def test_init_reads_shapes_alone():
    shapes = jax.eval_shape(trees.params)
    state = jax.eval_shape(chained().init, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, chained().init(trees.params()))
    # Without eval_shape around it, too.
    chex.assert_trees_all_equal_shapes_and_dtypes(state, chained().init(shapes))


def test_vmap_equals_a_loop():
    tx = small_chain()
    many = {"w": jax.random.normal(jax.random.key(0), (3, 20, 12)), "b": jnp.ones((3, 5))}
    state = jax.vmap(tx.init)(many)
    updates, state = jax.vmap(tx.update)(trees.grads(many), state, many)
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], many)
        expected, expected_state = tx.update(trees.grads(one), tx.init(one), one)
        ours = jax.tree.map(lambda x, i=i: x[i], updates)
        chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-7)
        got = jax.tree.map(lambda x, i=i: x[i], state)
        chex.assert_trees_all_close(got, expected_state, rtol=1e-5, atol=1e-6)


def test_train_state():
    params = {"dense": {"kernel": jnp.ones((20, 12)), "bias": jnp.zeros(12)}}
    apply = lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"]
    state = TrainState.create(apply_fn=apply, params=params, tx=small_chain())
    x = jax.random.normal(jax.random.key(0), (8, 20))
    loss = lambda p: jnp.mean(apply(p, x) ** 2)
    first = loss(state.params)
    for _ in range(5):
        state = state.apply_gradients(grads=jax.grad(loss)(state.params))
    assert loss(state.params) < first
    assert state.opt_state[1].inner.mu["dense"]["kernel"].shape == (20, 4)


def test_nnx_optimizer():
    model = nnx.Linear(20, 12, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, small_chain(), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (8, 20))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert optimizer.opt_state[1].inner.mu["kernel"][...].shape == (20, 4)


def wrappers():
    mask = lambda tree: {name: name != "wide" for name in tree}
    label = lambda tree: {name: "wide" if name == "wide" else "rest" for name in tree}
    rate = lambda learning_rate: optax.chain(
        osub.subspace_project(rank=4), osub.scale_by_adam(), optax.scale(-learning_rate)
    )
    return {
        "masked": optax.masked(small_chain(), mask),
        "multi_transform": optax.multi_transform(
            {"wide": optax.adam(1e-2), "rest": small_chain()}, label
        ),
        "two_chains": optax.multi_transform({"wide": small_chain(2), "rest": small_chain()}, label),
        "inject": optax.inject_hyperparams(rate)(learning_rate=1e-2),
        "multi_steps": optax.MultiSteps(small_chain(), 1).gradient_transformation(),
        "apply_if_finite": optax.apply_if_finite(small_chain(), 3),
        "nested": optax.chain(optax.clip(1e9), optax.chain(small_chain())),
        "named": optax.named_chain(
            ("a", osub.subspace_project(4)), ("b", osub.scale_by_adam()), ("c", RATE)
        ),
        "flatten_after": optax.chain(small_chain(), optax.flatten(optax.identity())),
        "lookahead_free": optax.contrib.schedule_free(small_chain(), 1e-2),
    }


TREE = {"tall": (20, 12), "wide": (12, 20), "bias": (12,)}


@pytest.mark.parametrize("name", wrappers())
def test_under_optax_wrappers(name):
    tx = wrappers()[name]
    params = {k: jnp.linspace(-1, 1, int(np.prod(s))).reshape(s) for k, s in TREE.items()}
    got, state = run(tx, params, steps=3)
    expected, _ = run(small_chain(), params, steps=3)
    leaves = set() if name == "lookahead_free" else {"tall", "bias"}
    if name in ("inject", "multi_steps", "apply_if_finite", "nested", "named", "flatten_after"):
        leaves.add("wide")
    for leaf in leaves:
        np.testing.assert_allclose(got[leaf], expected[leaf], rtol=1e-5, atol=1e-6)
    if name == "multi_transform":
        adam, _ = run(optax.adam(1e-2), params, steps=3)
        np.testing.assert_allclose(got["wide"], adam["wide"], rtol=1e-5)
    shapes = {x.shape for x in jax.tree.leaves(state)}
    assert (20, 4) in shapes, "the tall leaf's moments must have subspace shape"


def test_inject_hyperparams_changes_the_rate_without_compiling_again():
    tx = wrappers()["inject"]
    params = {"w": jnp.ones((20, 12))}
    state, update, grads = tx.init(params), jax.jit(tx.update), {"w": jnp.eye(20, 12)}
    updates, state = update(grads, state, params)
    state.hyperparams["learning_rate"] = jnp.float32(0.02)
    with trees.counting_compilations() as compilations:
        _, state = update(grads, state, params)
        state.hyperparams["learning_rate"] = jnp.float32(0.03)
        update(grads, state, params)
    assert len(compilations) <= 1  # of the first call's outputs as committed arguments


@pytest.mark.parametrize("member", [osub.scale_by_adam, osub.scale_by_lion])
def test_inject_hyperparams_takes_our_members_like_optax_own(member):
    params = trees.params()
    tx = optax.chain(osub.subspace_project(4), optax.inject_hyperparams(member)(b1=0.5))
    plain = optax.chain(osub.subspace_project(4), member(b1=0.5))
    grads = trees.grads(params)
    got, state = tx.update(grads, tx.init(params))
    expected, _ = plain.update(grads, plain.init(params))
    # Bias correction of a traced decay rate rounds in float32.
    chex.assert_trees_all_close(got, expected, rtol=1e-4)
    assert state[1].hyperparams["b1"] == 0.5


def test_donation_with_nothing_to_project():
    params = trees.params()
    labels = jax.tree.map(lambda _: "full", params)
    tx = optax.multi_transform({"low": osub.galore(0.1, rank=4), "full": optax.adam(0.1)}, labels)
    step = jax.jit(lambda p, s: tx.update(p, s, p), donate_argnums=(0, 1))
    chex.assert_tree_all_finite(step(params, tx.init(params)))


def test_inject_hyperparams_needs_a_static_rank():
    with pytest.raises(TypeError, match="static_args"):
        optax.inject_hyperparams(osub.galore)(learning_rate=1e-2).init({"w": jnp.ones((8, 8))})
    static = ("rank", "weight_decay")
    tx = optax.inject_hyperparams(osub.galore, static_args=static)(learning_rate=1e-2, rank=2)
    params, _ = run(tx, {"w": jnp.ones((8, 6))}, steps=2)
    assert not np.allclose(params["w"], 1)
    # A seed becomes an array.
    seeded = optax.inject_hyperparams(osub.galore, static_args=static)(1e-2, rank=2, seed=3)
    chex.assert_trees_all_equal(run(seeded, {"w": jnp.ones((8, 6))}, steps=2)[0], params)


def test_orbax_round_trip(tmp_path):
    params = trees.params()
    params, state = run(chained(), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(chained().init, params))
    chex.assert_trees_all_equal(state, restored)
    update = jax.jit(chained().update)
    a, _ = update(trees.grads(params, 9), state, params)
    b, _ = update(trees.grads(params, 9), restored, params)
    chex.assert_trees_all_equal(a, b)


def test_several_chains_on_the_same_parameters_in_any_order():
    params = trees.params()
    make = {
        "rank 2": lambda: chained(2),
        "rank 6": lambda: chained(6),
        "left": lambda: chained(4, side="left"),
        "plain": lambda: optax.chain(osub.scale_by_adam(), RATE),
        "bare": lambda: osub.subspace_project(rank=4, rules=trees.RULES),
    }
    shapes = {name: jax.eval_shape(f().init, params) for name, f in make.items()}
    names = list(make)
    for shift in range(len(names)):
        for order in (names[shift:] + names[:shift], (names[shift:] + names[:shift])[::-1]):
            for name in order:
                # As an array init: the identical leaves come again and again.
                state = make[name]().init(params)
                chex.assert_trees_all_equal_shapes_and_dtypes(state, shapes[name])
                del state
    chex.assert_trees_all_equal_shapes_and_dtypes(
        shapes["plain"][0], jax.eval_shape(optax.scale_by_adam().init, params)
    )


def test_the_slot_holds_no_array_and_no_stale_plan():
    params = {"w": jnp.ones((20, 12))}
    reference = weakref.ref(params["w"])
    osub.subspace_project(rank=4).init(params)  # nobody takes the plan, and the state is dropped
    plain = osub.scale_by_adam().init(params)
    assert plain.mu["w"].shape == (20, 12)
    osub.subspace_project(rank=4).init(params)
    del params, plain
    gc.collect()
    assert reference() is None
    assert small_chain().init({"w": jnp.ones((20, 12))})[1].inner.mu["w"].shape == (20, 4)
    assert _chaining._slot.offer is None


def test_a_failed_chain_leaves_nothing_behind():
    params = {"w": jnp.ones((20, 12))}
    bad = optax.chain(osub.subspace_project(rank=4), optax.scale(1.0))
    state = bad.init(params)
    with pytest.raises(TypeError):
        bad.update(params, state, params)
    assert osub.scale_by_adam().init(params).mu["w"].shape == (20, 12)
    del state


def test_without_projection_it_is_optax():
    params = trees.params()
    ours, our_state = run(osub.scale_by_adam(b1=0.8), params)
    theirs, their_state = run(optax.scale_by_adam(b1=0.8), params)
    chex.assert_trees_all_equal((ours, our_state), (theirs, their_state))


FOREIGN = {
    "scale_by_adam": optax.scale_by_adam(),
    "scale": optax.scale(0.5),
    "clip": optax.clip(1.0),
    "trace": optax.trace(0.9),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "scale_by_learning_rate": optax.scale_by_learning_rate(1e-2),
    "add_decayed_weights": optax.add_decayed_weights(0.1),
    "scale_by_rms": optax.scale_by_rms(),
    "zero_nans": optax.zero_nans(),
    "masked scale": optax.masked(optax.scale(0.5), {"w": True, "b": False}),
    "masked adam": optax.masked(optax.scale_by_adam(), {"w": True, "b": False}),
    "flatten": optax.flatten(optax.scale_by_adam()),
    "ema": optax.ema(0.9),
    "centralize": optax.centralize(),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("compiled", [False, True])
def test_any_other_member_raises_and_shows_the_line(name, compiled):
    tx = optax.chain(osub.subspace_project(rank=4), FOREIGN[name])
    params = {"w": jnp.ones((20, 12)), "b": jnp.ones(3)}
    state = tx.init(params)
    update = jax.jit(tx.update) if compiled else tx.update
    with pytest.raises(TypeError) as error:
        update(params, state, params)
    assert "optax.chain(subspace_project(rank=4), optax_subspace.scale_by_adam()" in str(
        error.value
    )
    assert "in_subspace(" in str(error.value)


def test_a_bare_projection_cannot_be_applied():
    tx = osub.subspace_project(rank=4)
    params = {"w": jnp.ones((20, 12))}
    state = tx.init(params)
    with pytest.raises(TypeError, match="in_subspace"):
        optax.apply_updates(params, tx.update(params, state)[0])
    with pytest.raises(TypeError, match="in_subspace"):
        jax.jit(tx.update)(params, state)


def test_masked_adam_after_a_projection_is_refused_at_init():
    tx = optax.chain(
        osub.subspace_project(rank=4),
        optax.masked(osub.scale_by_adam(), {"w": True, "b": False}),
    )
    with pytest.raises(ValueError, match="same mask"):
        tx.init({"w": jnp.ones((20, 12)), "b": jnp.ones(3)})


def test_parts_that_do_not_belong_together():
    params = {"w": jnp.ones((20, 12))}
    inner = osub.scale_by_adam()
    alone = inner.init(params)
    projection = osub.subspace_project(rank=4)
    state = projection.init(params)
    handed, _ = projection.update(params, state)
    with pytest.raises(ValueError, match="whole chain"):
        inner.update(handed, alone, params)
    (state, inner_state), _ = optax.chain(projection, inner).init(params), None
    with pytest.raises(ValueError, match="whole chain"):
        inner.update(params, inner_state, params)


def test_empty_tree_and_tree_map_params():
    tx = small_chain()
    state = tx.init({})
    updates, _ = tx.update({}, state, {})
    assert updates == {}
    params = trees.params()
    _, state = run(chained(), params)
    zeroed = optax.tree_map_params(chained(), jnp.zeros_like, state)
    assert not np.any(zeroed[1].inner.mu["tall"])
    chex.assert_trees_all_equal(zeroed[0], state[0])


def test_members_share_one_subspace_in_one_call():
    params = {"w": jnp.ones((20, 12))}
    both = optax.chain(optax.clip(0.1), optax.trace(0.9))
    tx = optax.chain(osub.subspace_project(rank=4), osub.in_subspace(both), RATE)
    pure = optax.chain(osub.scale_by_subspace(both, rank=4), RATE)
    chex.assert_trees_all_equal(run(tx, params)[0], run(pure, params)[0])


def test_lion_and_extra_args():
    params = {"w": jnp.linspace(-1, 1, 240).reshape(20, 12)}
    lion = optax.chain(osub.subspace_project(rank=4), osub.scale_by_lion(), RATE)
    pure = optax.chain(osub.scale_by_subspace(optax.scale_by_lion(), rank=4), RATE)
    chex.assert_trees_all_close(run(lion, params)[0], run(pure, params)[0], rtol=1e-6)

    seen = {}

    def spy(updates, state, params=None, *, value, **extra):
        seen.update(value=value, params=jax.tree.map(jnp.shape, params))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), spy)
    tx = optax.chain(osub.subspace_project(rank=4), osub.in_subspace(inner))
    tx.update(params, tx.init(params), params, value=3.0)
    assert seen == {"value": 3.0, "params": {"w": (20, 4)}}
