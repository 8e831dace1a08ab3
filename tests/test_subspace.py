"""``scale_by_subspace``: the rules that every transformation keeps, and the mathematics."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_subspace as osub
from optax_subspace._schedule import LOOK_EVERY
from tests import trees


def pure(rank=4, inner=None, **kwargs):
    kwargs.setdefault("rules", trees.RULES)
    return osub.scale_by_subspace(inner or optax.scale_by_adam(), rank=rank, **kwargs)


def tanh():
    """A stateless transformation that is not linear."""
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.tanh, updates))


@pytest.mark.parametrize("side", ["shorter", "longer", "left", "right", "both"])
def test_update_is_the_lifted_inner_update_of_the_projected_gradient(side):
    params = trees.params()
    tx = pure(side=side, scale=0.5, inner=tanh())
    grads = trees.grads(params)
    updates, state = tx.update(grads, tx.init(params), params)
    plans = {p.path: p for p in osub.plan(params, trees.RULES, rank=4, side=side)}
    for name, plan in plans.items():
        gradient = np.asarray(grads[name], np.float64)
        if not plan.projected:
            np.testing.assert_allclose(updates[name], np.tanh(gradient), rtol=1e-5)
            continue
        # The axes of this tree are in order, so that a reshape gives the matrices.
        matrices = gradient.reshape(-1, *plan.matrix_shape)
        got = np.asarray(updates[name]).reshape(matrices.shape)
        bases = dict(zip(plan.sides, state.projection.leaves[name].bases, strict=True))
        slices = {s: np.asarray(b, np.float64).reshape(-1, *b.shape[-2:]) for s, b in bases.items()}
        for i, matrix in enumerate(matrices):
            p = slices["left"][i] if "left" in bases else np.eye(len(matrix))
            q = slices["right"][i] if "right" in bases else np.eye(matrix.shape[1])
            expected = 0.5 * p @ np.tanh(p.T @ matrix @ q) @ q.T
            np.testing.assert_allclose(got[i], expected, rtol=1e-4, atol=1e-5)
            for basis in (b[i] for b in slices.values()):
                np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
    sides = {p.side for p in plans.values() if p.projected}
    assert sides == {"shorter": {"left", "right"}, "longer": {"left", "right"}}.get(side, {side})


def test_slices_of_a_stack_equal_leaves_of_their_own():
    stack = trees.params()["stack"]
    tx, single = pure(rules=trees.RULES[:1]), pure(rules=None)
    state = tx.init({"stack": stack})
    states = [single.init({"w": w}) for w in stack]
    for step in range(3):
        grads = trees.grads({"stack": stack}, step)
        updates, state = tx.update(grads, state)
        for i in range(len(stack)):
            one, states[i] = single.update({"w": grads["stack"][i]}, states[i])
            np.testing.assert_allclose(updates["stack"][i], one["w"], rtol=2e-5, atol=1e-6)


def test_bases_change_every_so_many_steps_and_not_between():
    params = {"w": trees.params()["tall"]}
    tx = pure(projector=osub.svd(every=3), rules=None)
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for step in range(7):
        _, state = update(trees.grads(params, step), state)
        seen.append(np.asarray(state.projection.leaves["w"].bases[0]))
    for step in range(1, 7):
        same = np.array_equal(seen[step], seen[step - 1])
        assert same == (step % 3 != 0)
    assert int(state.projection.steps) == 7


def test_a_gradient_that_is_not_finite_changes_nothing_of_its_leaf():
    params = trees.params()
    tx = pure(projector=osub.svd(every=2))
    update = jax.jit(tx.update)
    _, state = update(trees.grads(params, 0), tx.init(params))
    _, state = update(trees.grads(params, 1), state)
    grads = trees.grads(params, 2)  # the refresh is due
    bad = dict(grads)
    bad["tall"] = grads["tall"].at[3, 4].set(jnp.nan)
    bad["stack"] = grads["stack"].at[1, 0, 0].set(jnp.inf)
    bad["bias"] = grads["bias"].at[0].set(-jnp.inf)
    updates, new = update(bad, state)
    good_updates, good = update(grads, state)
    for name in params:
        skipped = name in ("tall", "stack", "bias")
        assert int(new.projection.skipped[name]) == skipped
        moments = lambda s, name=name: (s.inner.mu[name], s.inner.nu[name])
        if skipped:
            assert not np.any(updates[name])
            chex.assert_trees_all_equal(moments(new), moments(state))
        else:
            np.testing.assert_array_equal(updates[name], good_updates[name])
            chex.assert_trees_all_equal(moments(new), moments(good))
    for name in ("tall", "stack"):
        chex.assert_trees_all_equal(new.projection.leaves[name], state.projection.leaves[name])
    # The refresh that was missed is made up for with the next gradient.
    _, after = update(grads, new)
    np.testing.assert_allclose(
        after.projection.leaves["tall"].bases[0], good.projection.leaves["tall"].bases[0], atol=1e-6
    )


@pytest.mark.parametrize("shape", [(64, 96), (512, 96), (3, 64, 96)])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_gradient_of_many_entries_is_skipped_for_any_of_them(shape, bad):
    """Of sizes at which XLA vectorises what looks at all entries."""
    tx = osub.galore(0.1, 64 if shape == (64, 96) else 16, rules=[("w", osub.MatrixSpec(-2, -1))])
    params = {"w": jnp.cos(jnp.arange(float(np.prod(shape)))).reshape(shape)}
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params), params)
    for spoiled in (params["w"].at[..., 3, 5].set(bad), jnp.full(shape, bad)):
        updates, after = update({"w": spoiled}, state, params)
        assert not np.any(updates["w"])
        chex.assert_trees_all_equal(after[0].inner.mu, state[0].inner.mu)
        assert int(after[0].projection.skipped["w"]) == 1


def test_an_inner_update_of_many_entries_that_is_not_finite_keeps_the_state():
    inner = optax.chain(optax.trace(0.9), optax.stateless(lambda g, _: jax.tree.map(spoil, g)))
    tx = osub.scale_by_subspace(inner, rank=32)
    params = {"w": jnp.cos(jnp.arange(512.0 * 96)).reshape(512, 96)}
    update, state = jax.jit(tx.update), tx.init(params)
    updates, state = update(params, state)
    after = update({"w": 100 * params["w"]}, state)[1]
    assert np.all(np.isfinite(updates["w"])) and np.any(state.inner[0].trace["w"])
    np.testing.assert_array_equal(after.inner[0].trace["w"], state.inner[0].trace["w"])


def spoil(x):
    """One entry is no number where there are large ones."""
    return x.at[3, 5].set(jnp.where(jnp.sum(x**2) > 1e6, jnp.nan, x[3, 5]))


def test_a_counter_of_a_chain_as_long_as_the_parameters_belongs_to_no_leaf():
    """So that what one leaf skips, the other does not."""
    w, b = jnp.ones((12, 8)), jnp.ones(8)
    tx = osub.scale_by_subspace(optax.sgd(lambda t: 0.1 * (1 + t)), rank=2)
    results = []
    for tree in (lambda w, b: (w, b), lambda w, b: {"w": w, "x": b}):
        state = tx.init(tree(w, b))
        for bad in (b, b * jnp.nan, b):
            updates, state = tx.update(tree(w, bad), state, tree(w, b))
        results.append(jax.tree.leaves(updates))
    chex.assert_trees_all_close(*results, rtol=1e-6)


@pytest.mark.parametrize("name", ["schedule_free", "prodigy"])
def test_copies_of_weights_have_no_place_in_a_subspace(name):
    inner = {
        "schedule_free": optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
        "prodigy": optax.contrib.prodigy(),
    }[name]
    params = {"w": jnp.ones((12, 8))}
    told = "a copy of the weights in .*(z|params0)/w.*put it around"
    for tx in (osub.galore(0.1, 2, inner=inner), osub.scale_by_subspace(inner, rank=2)):
        with pytest.raises(TypeError, match=told):
            tx.init(params)
    with pytest.raises(TypeError, match=told):
        optax.chain(osub.subspace_project(2), osub.in_subspace(inner)).init(params)
    osub.scale_by_subspace(inner, rank=8).init(params)  # nothing is projected
    around = optax.contrib.schedule_free(osub.galore(0.1, 2), 0.1)
    updates, _ = around.update(params, around.init(params), params)
    assert jnp.all(jnp.isfinite(updates["w"]))


def test_the_buffer_of_micro_batches_keeps_its_dtype():
    with jax.enable_x64(True):
        tx = osub.scale_by_subspace(optax.scale_by_adam(), rank=2, accumulate=2)
        params = {"w": jnp.ones((12, 8), jnp.float32)}
        state = tx.init(params)
        _, after = tx.update({"w": jnp.ones((12, 8), jnp.float64)}, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_an_update_that_is_not_finite_in_some_entries_is_zero_there():
    """0 / 0 in a row of coordinates: the others move, and the state waits."""
    signs = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u / jnp.abs(u), updates))
    inner = optax.chain(optax.trace(0.5), signs)
    tx = pure(inner=inner, rules=None, side="right", projector=osub.random_projection(100))
    good = {"w": trees.params()["tall"], "b": jnp.ones(12)}
    bad = {"w": good["w"].at[3].set(0), "b": good["b"].at[5].set(0)}
    state = tx.init(good)
    updates, after = tx.update(bad, state, good)
    chex.assert_trees_all_equal(after.inner, state.inner)
    assert all(int(count) == 0 for count in after.projection.skipped.values())
    assert float(updates["b"][5]) == 0 and np.all(updates["b"][:5] == 1)
    assert not np.any(updates["w"][3]) and np.all(np.any(updates["w"][:3], axis=1))
    updates, after = tx.update(good, after, good)
    assert np.all(np.any(updates["w"], axis=1)) and np.any(after.inner[0].trace["w"])


@pytest.mark.parametrize("rule", [osub.history_pca, osub.online_pca, osub.oja])
def test_a_gradient_of_zeros_leaves_a_basis_that_follows_alone(rule):
    tx = osub.scale_by_subspace(optax.scale_by_adam(), rank=4, projector=rule())
    params = {"w": trees.params()["tall"]}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(3):
        _, state = update(trees.grads(params, step), state)
    before = state.projection.leaves["w"]
    _, state = update(jax.tree.map(jnp.zeros_like, params), state)
    np.testing.assert_array_equal(state.projection.leaves["w"].bases[0], before.bases[0])
    _, state = update(trees.grads(params, 3), state)
    assert int(state.projection.leaves["w"].refreshes) == 1
    # What has left the basis is found anew.
    outside = params["w"] - params["w"] @ (
        state.projection.leaves["w"].bases[0]
        @ np.linalg.pinv(state.projection.leaves["w"].bases[0])
    )
    found = []
    while int(state.projection.leaves["w"].refreshes) < 2 and len(found) < 20:
        found.append(int(state.projection.leaves["w"].age))
        _, state = update({"w": outside}, state)
    assert found == [*range(5, LOOK_EVERY + 1)]


def test_a_step_size_multiplies_the_updates():
    params = {"w": trees.params()["tall"], "b": jnp.ones(12)}
    gradients = trees.grads(params)
    rule = osub.random_projection(100)
    for tx in (
        pure(rules=None, projector=rule),
        osub.scale_by_subspace_norms(optax.scale_by_adam(), rank=4, projector=rule),
        osub.galore(0.1, rank=4, projector=rule),
        osub.galore(0.1, rank=4, projector=rule, weight_decay=1e-30),
    ):
        updates, _ = tx.update(gradients, tx.init(params), params, step_size=1)
        halves, _ = tx.update(gradients, tx.init(params), params, step_size=0.5)
        chex.assert_trees_all_close(halves, jax.tree.map(lambda u: u / 2, updates), rtol=1e-5)


def test_first_gradients_of_nan_and_of_zero():
    params = {"nan": trees.params()["tall"], "zero": trees.params()["wide"]}
    tx = pure(rules=None)
    update, state = jax.jit(tx.update), tx.init(params)
    first = {"nan": jnp.full((20, 12), jnp.nan), "zero": jnp.zeros((12, 20))}
    updates, state = update(first, state)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert [int(leaf.age) for leaf in state.projection.leaves.values()] == [0, 0]
    grads = trees.grads(params)
    updates, state = update(grads, state)
    assert [int(leaf.age) for leaf in state.projection.leaves.values()] == [1, 1]
    for name in params:
        basis = np.asarray(state.projection.leaves[name].bases[0])
        np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
        assert np.any(updates[name])


def test_zero_gradients_later_keep_the_basis():
    params = {"w": trees.params()["tall"]}
    tx = pure(rules=None, projector=osub.svd(every=1))
    _, state = tx.update(trees.grads(params), tx.init(params))
    updates, after = tx.update({"w": jnp.zeros((20, 12))}, state)
    np.testing.assert_array_equal(
        after.projection.leaves["w"].bases[0], state.projection.leaves["w"].bases[0]
    )
    chex.assert_tree_all_finite(updates)


def test_inner_sees_projected_parameters():
    params = {"w": trees.params()["tall"], "b": jnp.ones(12)}
    lows = {}

    def spy(updates, state, params=None):
        lows.update(params)
        return updates, state

    inner = optax.GradientTransformation(lambda p: optax.EmptyState(), spy)
    tx = pure(inner=inner, rules=None)
    _, state = tx.update(trees.grads(params), tx.init(params), params)
    q = state.projection.leaves["w"].bases[0]
    np.testing.assert_allclose(lows["w"], params["w"] @ q, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(lows["b"], params["b"])
    # And transformations that insist on parameters work.
    for inner in (optax.lamb(1e-2), optax.adamw(1e-2), optax.lars(1e-2)):
        tx = pure(inner=inner, rules=None)
        updates, _ = tx.update(trees.grads(params), tx.init(params), params)
        chex.assert_tree_all_finite(updates)


@pytest.mark.parametrize("inner", ["adam", "adafactor", "lion", "trace", "rmsprop", "mixed"])
def test_any_inner_transformation_keeps_its_state(inner):
    inner = {
        "adam": optax.scale_by_adam(mu_dtype=jnp.bfloat16),
        "adafactor": optax.scale_by_factored_rms(min_dim_size_to_factor=4),
        "lion": optax.scale_by_lion(),
        "trace": optax.trace(0.9),
        "rmsprop": optax.scale_by_rms(),
        "mixed": optax.multi_transform(
            {"a": optax.scale_by_adam(), "b": optax.trace(0.9)},
            lambda tree: {k: "a" if k == "w" else "b" for k in tree},
        ),
    }[inner]
    params = {"w": trees.params()["tall"], "b": jnp.ones(12)}
    tx = pure(inner=inner, rules=None)
    state = tx.init(params)
    bad = {"w": trees.grads(params)["w"].at[0, 0].set(jnp.nan), "b": jnp.ones(12)}
    _, once = tx.update(trees.grads(params), state, params)
    updates, twice = tx.update(bad, once, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, once)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, twice)
    assert not np.any(updates["w"]) and np.any(updates["b"])
    chex.assert_tree_all_finite(twice)


@pytest.mark.parametrize("bad", [0, 1])
def test_parameters_may_be_a_tuple_of_the_length_of_the_inner_chain(bad):
    """A chain's state is a tuple too: what belongs to a leaf is found all the same."""
    params = (trees.params()["tall"], trees.params()["wide"])
    tx = pure(rules=None, inner=optax.chain(optax.trace(0.9), optax.scale(1.0)))
    grads = trees.grads(params)
    _, once = tx.update(grads, tx.init(params))
    grads = tuple(g * jnp.nan if i == bad else g for i, g in enumerate(grads))
    updates, twice = tx.update(grads, once)
    before, after = once.inner[0].trace, twice.inner[0].trace
    np.testing.assert_array_equal(before[bad], after[bad])
    assert np.any(before[1 - bad] != after[1 - bad])
    assert not np.any(updates[bad]) and np.any(updates[1 - bad])


def test_scale_may_be_a_schedule_or_a_rule():
    params = {"w": trees.params()["tall"], "v": trees.params()["wide"]}
    grads = trees.grads(params)
    one = pure(rules=None)
    reference, _ = one.update(grads, one.init(params))
    rules = [("v", osub.MatrixSpec(scale=3.0))]
    tx = pure(scale=lambda count: 1.0 / (count + 2), rules=rules)
    updates, state = jax.jit(tx.update)(grads, tx.init(params))
    np.testing.assert_allclose(updates["w"], reference["w"] / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(updates["v"], reference["v"] * 3, rtol=1e-5, atol=1e-6)


def test_per_rule_rank_side_and_projector():
    params = {"w": trees.params()["tall"], "v": trees.params()["wide"]}
    rules = [("w", osub.MatrixSpec(rank=2, side="left", projector=osub.svd(every=1)))]
    tx = pure(rules=rules)
    state = tx.init(params)
    assert state.inner.mu["w"].shape == (2, 12) and state.inner.mu["v"].shape == (4, 20)
    _, one = tx.update(trees.grads(params, 0), state)
    _, two = tx.update(trees.grads(params, 1), one)
    changed = lambda n: np.any(
        np.asarray(one.projection.leaves[n].bases[0] != two.projection.leaves[n].bases[0])
    )
    assert changed("w") and not changed("v")


def test_updates_beyond_float16_are_its_largest_numbers():
    tx = osub.scale_by_subspace(optax.identity(), rank=2, scale=1.5)
    gradients = {"w": jnp.full((6, 5), 300, jnp.float16).at[0].set(60000)}
    gradients["b"] = jnp.ones(3, jnp.float16)
    updates, state = tx.update(gradients, tx.init(gradients))
    assert jnp.max(updates["w"]) == jnp.finfo(jnp.float16).max
    chex.assert_tree_all_finite(updates)
    assert not any(jax.tree.leaves(state.projection.skipped))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_leaves_are_updated_in_float32_arithmetic(dtype):
    params = {"w": trees.params(dtype)["tall"]}
    tx = pure(rules=None)
    state = tx.init(params)
    updates, state = tx.update(trees.grads(params), state, params)
    assert updates["w"].dtype == dtype
    assert state.inner.mu["w"].dtype == jnp.float32
    wide = {"w": trees.grads(params)["w"].astype(jnp.float32)}
    expected, _ = pure(rules=None).update(wide, pure(rules=None).init(wide))
    np.testing.assert_allclose(
        updates["w"].astype(jnp.float32), expected["w"].astype(dtype).astype(jnp.float32)
    )


def test_float64_stays_float64():
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(np.asarray(trees.params()["tall"], np.float64))}
        tx = pure(rules=None)
        updates, state = jax.jit(tx.update)(trees.grads(params), tx.init(params), params)
        assert updates["w"].dtype == state.inner.mu["w"].dtype == jnp.float64
        basis = state.projection.leaves["w"].bases[0]
        np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-12)


def test_deterministic():
    params = trees.params()
    a, b = (jax.jit(pure().update)(trees.grads(params), pure().init(params)) for _ in range(2))
    chex.assert_trees_all_equal(a, b)


def test_an_update_outside_of_a_program_compiles_once():
    params = {"a": jnp.ones((12, 8)), "b": jnp.ones((12, 8))}
    galore = osub.galore(0.1, 2, every=2, moments="project")
    for tx in (galore, osub.online_subspace_descent(0.1, 2)):
        state = tx.init(params)
        for step in range(6):
            with trees.counting_compilations() as compilations:
                _, state = tx.update(trees.grads(params, step), state, params)
        assert not compilations


def test_state_is_updated_in_place():
    """No second copy of the bases or the moments: the refresh is part of the same program."""
    params = {"w": jnp.zeros((8, 64, 96))}
    tx = pure(rank=16, rules=[("w", osub.MatrixSpec(1, 2))])
    state = tx.init(params)
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    memory = update.lower(params, state).compile().memory_analysis()
    arrays = jax.tree.leaves((params, state))
    total = sum(x.nbytes for x in arrays)
    assert memory.alias_size_in_bytes >= 0.99 * total
    low = 8 * 16 * 96 * 4
    slice_work = 20 * 64 * 96 * 4  # the decomposition of one slice
    assert memory.temp_size_in_bytes < 2 * low + slice_work


def test_galore_descends_and_decays_in_full_space():
    target = trees.params()["tall"]
    params = {"w": jnp.zeros_like(target)}
    loss = lambda p: jnp.mean((p["w"] - target) ** 2)
    tx = osub.galore(0.05, rank=4, every=10, scale=1.0)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(200):
        params, state = step(params, state)
    assert loss(params) < 0.01 * loss({"w": jnp.zeros_like(target)})

    decayed = osub.galore(0.1, rank=4, weight_decay=0.5, mask={"w": True, "b": False})
    params = {"w": jnp.ones((20, 12)), "b": jnp.ones(12)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decayed.update(zero, decayed.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.05)
    assert not np.any(updates["b"])


@pytest.mark.parametrize("accumulate", [None, 2])
def test_a_leaf_whose_gradient_is_not_finite_does_not_decay(accumulate):
    params = {"w": jnp.ones((20, 12)), "b": jnp.ones(12)}
    tx = osub.galore(0.1, rank=4, weight_decay=0.5, accumulate=accumulate)
    bad = {"w": params["w"].at[0, 0].set(jnp.nan), "b": jnp.zeros(12)}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(accumulate or 1):
        updates, state = update(bad, state, params)
    assert not np.any(updates["w"])
    np.testing.assert_allclose(updates["b"], -0.05)


def test_galore_stores_moments_and_bases_as_asked():
    params = {"w": jnp.ones((20, 12))}
    tx = osub.galore(
        0.1, rank=4, mu_dtype=jnp.bfloat16, nu_dtype=jnp.float16, projector_dtype=jnp.bfloat16
    )
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    inner, leaf = state[0].inner, state[0].projection.leaves["w"]
    assert inner.mu["w"].dtype == leaf.bases[0].dtype == jnp.bfloat16
    assert inner.nu["w"].dtype == jnp.float16


def test_errors_of_the_factory_and_of_foreign_states():
    adam = optax.scale_by_adam()
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        osub.scale_by_subspace(adam, rank=0)
    for seed in ("a", 1.5, jnp.float32(3), np.zeros(2, int)):
        with pytest.raises(TypeError, match="seed must be an int, got"):
            osub.galore(0.1, 2, seed=seed)
    for seed in (np.int32(3), np.array(3), jnp.array(3)):
        osub.galore(0.1, 2, seed=seed)
    with pytest.raises(TypeError, match=r"rank must be an int, got 2\.5"):
        osub.subspace_project(rank=2.5)
    with pytest.raises(TypeError, match="rank"):
        osub.subspace_project(rank=True)
    with pytest.raises(ValueError, match=r"side must be one of .* got 'short'"):
        osub.scale_by_subspace(adam, side="short")
    for make in (
        lambda: osub.galore(0.1, inner=optax.adam),
        lambda: osub.in_subspace("adam"),
        lambda: osub.quantize_state(optax.scale_by_adam),
        lambda: osub.online_pca("adam"),
    ):
        with pytest.raises(TypeError, match="must be an optax transformation such as .*, got"):
            make()
    for rule in (osub.online_pca, osub.history_pca, osub.oja):
        with pytest.raises(TypeError, match="first must be a Projector such as svd.*got 'svd'"):
            rule(first="svd")
    with pytest.raises(TypeError, match="projector must be a Projector"):
        osub.scale_by_subspace(adam, projector="svd")
    with pytest.raises(ValueError, match="projector: every must be at least 1, got 0"):
        osub.scale_by_subspace(adam, projector=osub.svd()._replace(every=0))
    with pytest.raises(ValueError, match="every or projector"):
        osub.galore(0.1, every=3, projector=osub.svd())
    with pytest.raises(ValueError, match="every must be at most 1073741824 steps, got 10000000000"):
        osub.galore(0.1, every=10**10)
    with pytest.raises(ValueError, match="every=1 .* follow is never called: give every=None"):
        osub.scale_by_subspace(adam, projector=osub.svd(1)._replace(follow=osub.oja().follow))
    with pytest.raises(TypeError, match="scale must be a number or a schedule, got 'x'"):
        osub.galore(0.1, scale="x")
    for value in ("x", None, 1j, {}, jnp.ones(2), True):
        with pytest.raises(TypeError, match="learning_rate must be a number or a schedule, got"):
            osub.galore(value)
        with pytest.raises(TypeError, match="scale must be a number or a schedule, got"):
            osub.galore(0.1, scale=value)
    with pytest.raises(TypeError, match="reduction_axis must be an axis or axes, got .0.0,."):
        osub.MatrixSpec((0.0,), (1.0,))
    for alias in (osub.galore, osub.online_subspace_descent, osub.lomo):
        with pytest.raises(TypeError, match="weight_decay must be a number or a schedule, got '1'"):
            alias(0.1, weight_decay="1")
    with pytest.raises(TypeError, match="stagger must be True or False, got 'no'"):
        osub.galore(0.1, stagger="no")
    for rule, argument in ((osub.oja, "step"), (osub.history_pca, "decay")):
        with pytest.raises(TypeError, match=f"{argument} must be a number, got <function"):
            rule(lambda step: 0.1)
    with pytest.raises(TypeError, match="adaptive_period: projector must be a Projector"):
        osub.adaptive_period(osub.svd)
    with pytest.raises(ValueError, match="tied_rate: peak must be positive, got 0"):
        osub.tied_rate(0.1, 0.0)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        osub.svd(every=0)
    with pytest.raises(ValueError, match="method must be one of"):
        osub.svd(method="exact")
    params = {"w": jnp.ones((20, 12))}
    state = pure(rank=4, rules=None).init(params)
    with pytest.raises(ValueError, match=r"parameter w: .*\(12, 4\).*\(12, 5\)"):
        pure(rank=5, rules=None).update(params, state)
    with pytest.raises(ValueError, match="has no w and v, which is not among them: initialise"):
        pure(rank=4, rules=None).update({"v": jnp.ones((20, 12))}, state)
    for decay in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"weight_decay must not be below 0, got {decay}"):
            osub.galore(0.1, rank=4, weight_decay=decay)
    twice = optax.chain(pure(rank=4, rules=None), pure(rank=2, rules=None))
    with pytest.raises(ValueError, match="parameter w is projected by two members"):
        osub.subspace_metrics(twice, twice.init(params), params)
    for rank, gradients in ((5, params), (4, {"v": params["w"]})):
        with pytest.raises(ValueError, match="parameter w.* the state "):
            osub.subspace_metrics(pure(rank=rank, rules=None), state, gradients)

    wrong = osub.Projector(lambda *a: (), lambda g, b, s: (b[:, :2], s))
    tx = pure(rules=None, projector=wrong)
    with pytest.raises(ValueError, match=r"basis of shape \(12, 2\) for w, expected \(12, 4\)"):
        tx.update(params, tx.init(params))


def test_without_decay_the_aliases_need_no_parameters():
    params = {"w": jnp.ones((8, 6))}
    for alias in (osub.galore, osub.online_subspace_descent, osub.galore_adamw8bit):
        for zero in (0.0, np.float32(0)):
            tx = alias(0.1, rank=2, weight_decay=zero)
            updates, _ = tx.update(params, tx.init(params))
            assert float(jnp.linalg.norm(updates["w"])) > 0
        with pytest.raises(ValueError, match="params"):
            decaying = alias(0.1, rank=2, weight_decay=0.1)
            decaying.update(params, decaying.init(params))


@pytest.mark.parametrize("alias", [osub.galore, osub.apollo, osub.fira])
def test_the_learning_rate_inside_the_subspace_is_that_of_a_chain(alias):
    params = {"w": trees.params()["tall"], "b": jnp.ones(12)}
    rate = optax.linear_schedule(0.1, 0.5, 4)
    accumulates = alias is osub.galore
    inside = alias(rate, rank=4, **({"accumulate": 2} if accumulates else {}))
    # (What decays by nearly nothing goes through the chain.)
    chained = alias(rate, rank=4, weight_decay=1e-30, **({"accumulate": 2} if accumulates else {}))
    state, expected = inside.init(params), chained.init(params)
    update, reference = jax.jit(inside.update), jax.jit(chained.update)
    for step in range(6):
        gradients = trees.grads(params, step)
        updates, state = update(gradients, state, params)
        other, expected = reference(gradients, expected, params)
        chex.assert_trees_all_close(updates, other, rtol=1e-5, atol=1e-7)
        assert np.any(updates["w"]) == np.any(updates["b"]) == (step % 2 == 1 or not accumulates)
    chex.assert_trees_all_close(jax.tree.leaves(state), jax.tree.leaves(expected), rtol=1e-5)


def test_without_decay_no_array_of_full_size_is_multiplied_by_the_learning_rate():
    params = {"w": jnp.ones((20, 12))}
    tx = osub.galore(0.1, rank=4, projector=osub.random_projection(every=1000))
    program = str(jax.make_jaxpr(tx.update)(params, tx.init(params)))
    assert "f32[20,4] = mul" in program
    assert "f32[20,12] = mul" not in program


def test_metrics_of_an_nnx_optimizer():
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    tx = osub.galore(1e-2, 2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradients = nnx.grad(lambda m: jnp.sum(m(jnp.ones((4, 16))) ** 2))(model)
    optimizer.update(model, gradients)
    found = osub.subspace_metrics(tx, optimizer.opt_state, gradients)["kernel"]
    assert float(found.captured_energy) == pytest.approx(1) and int(found.refreshes) == 1
