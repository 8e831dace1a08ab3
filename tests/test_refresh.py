"""When bases change, what becomes of the moments, and gradients of many micro-batches."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_subspace as osub
from optax_subspace._schedule import LOOK_EVERY
from tests import trees

STACK = [("stack", osub.MatrixSpec(1, 2))]


def leaves(*names):
    return {k: v for k, v in trees.params().items() if k in names}


def refreshes(state):
    return {k: np.asarray(v.refreshes) for k, v in state.projection.leaves.items()}


def test_stagger_spreads_leaves_and_slices_over_the_period():
    params = leaves("tall", "wide", "stack")
    tx = osub.scale_by_subspace(
        optax.scale_by_adam(), rank=4, projector=osub.svd(every=10), rules=STACK, stagger=True
    )
    state, update = tx.init(params), jax.jit(tx.update)
    counts = []
    for step in range(31):
        _, state = update(trees.grads(params, 0.1 * step), state)
        counts.append(np.concatenate([c.ravel() for c in refreshes(state).values()]))
    changes = np.diff(np.stack(counts), axis=0)
    assert np.all(counts[0] == 1), "every slice takes its first basis from the first gradient"
    assert changes.sum(axis=1).max() == 1, "no step refreshes two of the five slices"
    # Each slice once in any ten steps, after a first period that may be shorter.
    for start in range(21):
        np.testing.assert_array_equal(changes[start : start + 10].sum(axis=0), 1)


def test_a_run_that_goes_on_with_a_shorter_period_stays_staggered():
    params = leaves("tall", "wide", "stack")
    make = lambda every: osub.scale_by_subspace(
        optax.scale_by_adam(), rank=4, projector=osub.svd(every), rules=STACK, stagger=True
    )
    state, counts = make(1000).init(params), []
    for tx, steps in ((make(1000), 2), (make(10), 25)):
        update = jax.jit(tx.update)
        for step in range(steps):
            _, state = update(trees.grads(params, 0.1 * step), state)
            counts.append(np.concatenate([c.ravel() for c in refreshes(state).values()]))
    changes = np.diff(np.stack(counts), axis=0)
    assert changes.sum(axis=1).max() == 1, "no step refreshes two of the five slices"
    assert np.all(changes.sum(axis=0) >= 2)


@pytest.mark.parametrize("stagger", [False, True])
def test_a_run_that_goes_on_without_an_adaptive_period_has_its_own(stagger):
    params = leaves("tall", "wide", "stack")
    make = lambda rule: osub.scale_by_subspace(
        optax.scale_by_adam(), rank=4, projector=rule, rules=STACK, stagger=stagger
    )
    tx = make(osub.adaptive_period(osub.svd(5), longest=8, cosine=0.1))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(21):
        _, state = update(params, state)
    assert all(np.all(leaf.period > 1) for leaf in state.projection.leaves.values())
    update, counts = jax.jit(make(osub.svd(5)).update), []
    for _ in range(26):
        _, state = update(params, state)
        counts.append(np.concatenate([c.ravel() for c in refreshes(state).values()]))
    times = [np.flatnonzero(change) for change in np.diff(np.stack(counts), axis=0).T]
    assert all(len(found) >= 4 and np.all(np.diff(found) == 5) for found in times)


def test_without_stagger_all_refresh_at_once():
    params = leaves("tall", "stack")
    tx = osub.scale_by_subspace(
        optax.scale_by_adam(), rank=4, projector=osub.svd(every=3), rules=STACK
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(7):
        _, state = update(trees.grads(params, 0.1 * step), state)
        for count in refreshes(state).values():
            assert np.all(count == step // 3 + 1)


def moved(moments, side, inner=None, rule=None):
    """State before and after one refresh, and the gradient of the step between."""
    params = {"w": trees.params()["tall"]}
    inner = inner or optax.scale_by_adam(b1=0.9, b2=0.9)
    tx = osub.scale_by_subspace(
        inner, rank=4, side=side, projector=rule or osub.svd(every=2), moments=moments
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(2):
        _, state = update(trees.grads(params, step), state)
    grads = trees.grads(params, 2.0)
    _, after = update(grads, state)
    return state, after, np.asarray(grads["w"], np.float64)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("moments", ["keep", "project", "reset"])
def test_moments_across_a_refresh(moments, side):
    before, after, gradient = moved(moments, side)
    old, new = before.projection.leaves["w"].bases, after.projection.leaves["w"].bases
    turns = [
        np.asarray(n, np.float64).T @ np.asarray(o, np.float64)
        for n, o in zip(new, old, strict=True)
    ]
    p = np.asarray(new[0]) if side != "right" else np.eye(20)
    q = np.asarray(new[-1]) if side != "left" else np.eye(12)
    low = p.T @ gradient @ q

    def carried(moment, squared):
        moment = np.asarray(moment, np.float64)
        if moments == "reset":
            return np.zeros_like(moment)
        if moments == "keep":
            return moment
        # Of what is new in a vector, second moments take the one in whose place it is.
        known = lambda t: (t**2).sum(1, keepdims=True)
        rest = lambda t: np.diag(np.maximum(1 - known(t)[:, 0], 0))
        shares = lambda t: t**2 / np.maximum(known(t), 1) + rest(t)
        weights = [shares(t) if squared else t for t in turns]
        if side != "right":
            moment = weights[0] @ moment
        if side != "left":
            moment = moment @ weights[-1].T
        return moment

    mu = 0.9 * carried(before.inner.mu["w"], False) + 0.1 * low
    nu = 0.9 * carried(before.inner.nu["w"], True) + 0.1 * low**2
    np.testing.assert_allclose(after.inner.mu["w"], mu, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(after.inner.nu["w"], nu, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("rule", "side", "storage"),
    [
        (osub.history_pca(), "left", None),
        (osub.history_pca(), "both", "linear4"),
        (osub.svd(5), "left", None),
    ],
)
def test_second_moments_that_are_turned_neither_fade_nor_grow(rule, side, storage):
    """With gradients of one distribution Adam's steps are about as large as without turning."""
    params = {"w": jnp.zeros((20, 24))}
    signal = jnp.outer(jnp.sin(jnp.arange(20.0)), jnp.cos(jnp.arange(24.0))) / 15

    def size(moments):
        inner = optax.scale_by_adam(b2=0.99)
        settings = dict(side=side, moments=moments, projector_dtype=storage)
        tx = osub.scale_by_subspace(inner, rank=4, projector=rule, **settings)

        def step(state, key):
            noise = 0.3 * jax.random.normal(key, (20, 24))
            updates, state = tx.update({"w": signal + noise}, state)
            return state, optax.tree.norm(updates)

        keys = jax.random.split(jax.random.key(0), 300)
        return jax.jit(lambda: jax.lax.scan(step, tx.init(params), keys)[1])()[250:].mean()

    # (What was momentum outside of the new span is gone, and steps with it a little smaller.)
    assert 0.7 < size("project") / size("keep") < 1.25


def test_projected_momentum_keeps_what_both_subspaces_share():
    """With a basis of the same span, re-projection changes coordinates and not the momentum."""
    params = {"w": trees.params()["wide"]}
    span = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 4)))[0]
    mix = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]
    turned = jnp.asarray(span @ mix, jnp.float32)
    first = jnp.asarray(span, jnp.float32)

    def update(gradient, basis, state):
        return jnp.where(jnp.all(basis == 0), first, turned), state

    rule = osub.Projector(lambda *_: (), update, every=2)
    tx = osub.scale_by_subspace(optax.trace(0.9), rank=4, projector=rule, moments="project")
    state = tx.init(params)
    fixed = osub.scale_by_subspace(optax.trace(0.9), rank=4, projector=osub.fixed(first))
    still = fixed.init(params)
    for step in range(3):
        grads = trees.grads(params, step)
        got, state = tx.update(grads, state)
        expected, still = fixed.update(grads, still)
    np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [osub.history_pca(), osub.online_pca()])
def test_moments_follow_a_basis_that_follows(rule):
    before, after, gradient = moved("project", "left", optax.trace(0.9), rule)
    bases = (state.projection.leaves["w"].bases[0] for state in (before, after))
    old, new = (np.asarray(basis, np.float64) for basis in bases)
    trace = 0.9 * np.asarray(before.inner.trace["w"], np.float64) + old.T @ gradient
    # The coordinates belong to P (P^T P)^-1, of whose inverse there are the first two terms.
    turned = new.T @ old @ (2 * np.eye(old.shape[1]) - old.T @ old) @ trace
    np.testing.assert_allclose(after.inner.trace["w"], turned, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"parameter w: moments='reset' with a projector"):
        moved("reset", "left", rule=rule)


def test_adaptive_period_skips_refreshes_of_a_still_subspace_only():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (16, 24))
    still = u @ np.diag(np.linspace(5, 1, 16)) @ v[:16]
    params = {"stack": jnp.asarray(np.stack([still, still]), jnp.float32)}
    tx = osub.scale_by_subspace(
        optax.scale_by_adam(),
        rank=3,
        rules=STACK,
        projector=osub.adaptive_period(osub.svd(every=2), cosine=0.9, longest=4),
    )
    state, update, counts = tx.init(params), jax.jit(tx.update), []
    for _ in range(30):
        moving = np.linalg.qr(rng.standard_normal((16, 16)))[0] @ still
        grads = {"stack": jnp.asarray(np.stack([still, moving]), jnp.float32)}
        _, state = update(grads, state)
        counts.append(refreshes(state)["stack"])
    leaf = state.projection.leaves["stack"]
    # Still: at 0, 2, then after 4, 8, 8, ... steps. Moving: every second step.
    np.testing.assert_array_equal(leaf.refreshes, [5, 15])
    np.testing.assert_array_equal(leaf.period, [4, 1])
    assert [int(c[0]) for c in counts[:16]] == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4]
    assert leaf.drift[0] < 1e-5 and leaf.drift[1] > 0.3
    for call in (
        lambda: osub.adaptive_period(osub.history_pca()),
        lambda: osub.adaptive_period(osub.svd(), cosine=0.0),
        lambda: osub.adaptive_period(osub.svd(), longest=0),
    ):
        with pytest.raises(ValueError, match="adaptive_period|longest"):
            call()


@pytest.mark.parametrize("rule", [osub.random_projection, osub.svd, osub.subspace_iteration])
@pytest.mark.parametrize("form", ["pure", "chain"])
def test_accumulation_equals_one_big_batch(form, rule):
    """Four steps of four micro-batches, which part where no basis depends on the first of them."""
    params = leaves("tall", "stack", "bias")
    apart = [0.1, 0.1, 0.1, 0.1] if rule is osub.random_projection else [0, 0.1, 0, 0.1]
    rule = rule(every=2)

    def make(accumulate):
        settings = {"rank": 4, "projector": rule, "rules": STACK, "accumulate": accumulate}
        inner = optax.scale_by_adam()
        if form == "pure":
            return osub.scale_by_subspace(inner, **settings)
        return optax.chain(osub.subspace_project(**settings), osub.in_subspace(inner))

    many, one = make(4), make(1)
    state, big = many.init(params), one.init(params)
    projection = lambda s: s[0] if form == "chain" else s.projection
    assert {k: v.shape for k, v in projection(state).accumulated.items()} == {
        "tall": (20, 4),
        "stack": (3, 4, 20),
        "bias": (12,),
    }
    update = jax.jit(many.update)
    for step, spread in enumerate(apart):
        parts = [trees.grads(params, step + spread * i) for i in range(4)]
        for part in parts:
            got, state = update(part, state)
            if part is not parts[-1]:
                assert all(not np.any(x) for x in jax.tree.leaves(got))
        mean = jax.tree.map(lambda *x: sum(x) / 4, *parts)
        expected, big = one.update(mean, big)
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)
    for name, leaf in projection(big).leaves.items():
        np.testing.assert_array_equal(leaf.refreshes, projection(state).leaves[name].refreshes)


def test_accumulation_in_an_alias_decays_and_schedules_once_a_step():
    params = leaves("wide", "bias")
    rates = lambda step: 0.1 / (step + 1)
    settings = {"rank": 4, "projector": osub.random_projection(every=2), "weight_decay": 0.1}
    many, one = osub.galore(rates, accumulate=3, **settings), osub.galore(rates, **settings)
    state, big, p, q = many.init(params), one.init(params), params, params
    for step in range(3):
        for _ in range(3):
            updates, state = many.update(trees.grads(params, step), state, p)
            p = optax.apply_updates(p, updates)
        updates, big = one.update(trees.grads(params, step), big, q)
        q = optax.apply_updates(q, updates)
    chex.assert_trees_all_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moments", ["keep", "project"])
def test_the_drift_of_a_rule_that_follows(moments):
    """That between the last two bases; at every tenth step where nothing else needs it."""
    params = leaves("tall")
    tx = osub.scale_by_subspace(
        optax.scale_by_adam(), rank=4, projector=osub.oja(), moments=moments
    )
    state, update, before, held = tx.init(params), jax.jit(tx.update), None, 0.0
    for step in range(1, 22):
        _, state = update(trees.grads(params, 0.3 * step), state)
        leaf = state.projection.leaves["tall"]
        now = np.asarray(leaf.bases[0], np.float64)
        if step > 1 and (moments == "project" or step % LOOK_EVERY == 0):
            held = 1 - np.sum((now.T @ before) ** 2) / 4
            assert held > 1e-4
        np.testing.assert_allclose(leaf.drift, held, rtol=1e-3, atol=1e-5)
        before = now


@pytest.mark.parametrize("alias", [osub.galore, osub.online_subspace_descent])
def test_micro_batches_of_another_dtype_than_the_weights_decay_too(alias):
    params = {"w": trees.params()["tall"], "b": jnp.ones(12)}
    tx = alias(0.1, rank=4, accumulate=2, weight_decay=0.1)
    update, both = jax.jit(tx.update), []
    for dtype in ("float32", "bfloat16"):
        state = tx.init(params)
        for step in range(4):
            gradients = jax.tree.map(lambda g: g.astype("bfloat16"), trees.grads(params, step))
            gradients = jax.tree.map(lambda g, dtype=dtype: g.astype(dtype), gradients)
            updates, state = update(gradients, state, params)
        both.append(updates)
    chex.assert_trees_all_close(*both, rtol=1e-2, atol=1e-4)
    assert np.any(both[0]["w"])


def test_a_bad_micro_batch_skips_its_leaf_for_the_step():
    params = leaves("tall", "wide")
    tx = osub.scale_by_subspace(optax.scale_by_adam(), rank=4, accumulate=2)
    state = tx.init(params)
    good = trees.grads(params)
    bad = {**good, "tall": good["tall"].at[0, 0].set(jnp.inf)}
    for grads in (good, good, bad, good):
        updates, state = tx.update(grads, state)
    assert not np.any(updates["tall"]) and np.any(updates["wide"])
    assert state.projection.skipped == {"tall": 1, "wide": 0}
    updates, state = tx.update(good, state)
    updates, state = tx.update(good, state)
    assert np.any(updates["tall"])
    chex.assert_tree_all_finite(state)
    with pytest.raises(ValueError, match="accumulate=1: initialise"):
        osub.scale_by_subspace(optax.scale_by_adam(), rank=4).update(good, state)


def test_multi_steps_refreshes_once_per_real_step():
    params = leaves("tall")
    tx = optax.MultiSteps(
        osub.scale_by_subspace(optax.scale_by_adam(), rank=4, projector=osub.svd(every=1)), 4
    )
    state = tx.init(params)
    for step in range(8):
        _, state = tx.update(trees.grads(params, step), state, params)
    assert int(state.inner_opt_state.projection.leaves["tall"].refreshes) == 2


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize(
    "rule", [osub.svd(1), osub.subspace_iteration(1), osub.history_pca(), osub.online_pca()]
)
def test_bases_do_not_depend_on_the_gradients_scale(rule, scale):
    params = {"w": trees.params()["tall"]}
    tx = osub.scale_by_subspace(optax.identity(), rank=4, projector=rule)
    one, other, update = tx.init(params), tx.init(params), jax.jit(tx.update)
    for step in range(3):
        grads = trees.grads(params, 0.1 * step)
        _, one = update(grads, one)
        _, other = update(jax.tree.map(lambda g: scale * g, grads), other)
    basis = lambda state: state.projection.leaves["w"].bases[0]
    np.testing.assert_allclose(basis(one), basis(other), atol=2e-3)


@pytest.mark.parametrize("rule", [osub.subspace_iteration(3), osub.history_pca()])
def test_batch_split_changes_the_order_of_work_alone(rule):
    """Over two batch axes, with staggered refreshes, turned moments and a slice of zeros."""
    gradients = jax.random.normal(jax.random.key(0), (6, 2, 6, 10, 8)).at[:, 1, 4].set(0)
    final = []
    for split in (1, (2, 3)):
        spec = osub.MatrixSpec(2, 3, batch_split=split)
        tx = osub.scale_by_subspace(
            optax.scale_by_adam(eps=1e-3),
            rank=3,
            projector=rule,
            rules=[("w", spec)],
            stagger=True,
            moments="project",
        )
        state, total, update = tx.init({"w": gradients[0]}), 0, jax.jit(tx.update)
        for gradient in gradients:
            updates, state = update({"w": gradient}, state)
            total += updates["w"]
        final.append((total, state))
    chex.assert_trees_all_close(*final, atol=1e-3)


def dict_rms():
    """A transformation with its squares in a dict, under a name of its own."""
    square = lambda g, n: 0.9 * n + 0.1 * g**2
    scale = lambda g, n: g / (jnp.sqrt(n) + 1e-8)

    def update(grads, state, params=None):
        squares = jax.tree.map(square, grads, state["mine"])
        return jax.tree.map(scale, grads, squares), {"mine": squares}

    return optax.GradientTransformation(
        lambda params: {"mine": jax.tree.map(jnp.zeros_like, params)}, update
    )


@pytest.mark.parametrize(
    "inner",
    [optax.scale_by_adan(), optax.scale_by_adadelta(), optax.scale_by_amsgrad(), dict_rms()],
    ids=["adan", "adadelta", "amsgrad", "dict"],
)
def test_squares_of_any_name_stay_squares_when_moments_are_turned(inner):
    """Turned like first moments some would be negative, and their roots no numbers."""
    params = {"w": jax.random.normal(jax.random.key(0), (12, 20))}
    tx = osub.online_subspace_descent(1e-2, 4, inner=inner)
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(30):
        gradient = {"w": jax.random.normal(jax.random.key(i), (12, 20))}
        updates, state = update(gradient, state, params)
        assert jnp.any(updates["w"] != 0)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in floats)


def test_a_rule_that_returns_other_shapes_is_told_with_the_parameter():
    narrow = osub.Projector(
        init=lambda key, m, n, rank: (), update=lambda g, p, s: (p[:, :1], s), every=2
    )
    grows = osub.Projector(
        init=lambda *_: jnp.zeros(1), update=lambda g, p, s: (p, jnp.zeros(2)), every=2
    )
    params = {"layer": {"w": jnp.ones((12, 20))}}
    for rule, told in (
        (narrow, r"a basis of shape \(12, 1\) for layer/w, expected \(12, 4\)"),
        (grows, r"a state of .*\(2,\).* for layer/w, where its init gave .*\(1,\)"),
    ):
        tx = osub.scale_by_subspace(optax.identity(), rank=4, projector=rule)
        with pytest.raises(ValueError, match=told):
            tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="parameter layer/w: fixed: a leaf asks for a basis"):
        osub.galore(0.1, 4, projector=osub.fixed(jnp.eye(9)[:, :4])).init(params)


def test_a_leaf_whose_first_micro_batches_are_zero_begins_with_the_next():
    params = {"w": jnp.ones((12, 20))}
    tx = osub.scale_by_subspace(optax.identity(), rank=4, accumulate=3)
    state, gradient = tx.init(params), {"w": trees.grads({"w": params["w"]}, 0)["w"]}
    for micro in ({"w": jnp.zeros((12, 20))}, gradient, gradient):
        updates, state = tx.update(micro, state)
    alone = osub.scale_by_subspace(optax.identity(), rank=4)
    expected, _ = alone.update(gradient, alone.init(params))
    np.testing.assert_allclose(updates["w"], 2 / 3 * expected["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [osub.subspace_iteration(1), osub.history_pca(), osub.oja(), osub.online_pca()],
    ids=["iteration", "history", "oja", "online"],
)
def test_a_gradient_that_leaves_the_basis_is_found_again(rule):
    """First in some rows, then in others: no product with the old basis tells of the new ones."""
    block = jax.random.normal(jax.random.key(0), (4, 24))
    first = jnp.zeros((2, 16, 24)).at[:, :4].set(block)
    then = first.at[1].set(jnp.zeros((16, 24)).at[8:12].set(block))  # of the second slice alone
    rules = [("w", osub.MatrixSpec(1, 2))]
    tx = osub.scale_by_subspace(optax.identity(), rank=4, projector=rule, rules=rules)
    state, update = tx.init({"w": first}), jax.jit(tx.update)
    for _ in range(2):
        _, state = update({"w": first}, state)
    for _ in range(LOOK_EVERY - 1):
        updates, state = update({"w": then}, state)
    kept = jnp.sum(updates["w"] ** 2, axis=(1, 2)) / jnp.sum(then**2, axis=(1, 2))
    assert (kept > 0.9).all()


@pytest.mark.parametrize("every", [3, 2 * LOOK_EVERY])
def test_a_rule_with_a_period_that_has_lost_its_gradient_waits_for_its_end(every):
    """Not for a look, and no shorter, as `steps_to_refresh` has told."""
    rule = osub.svd(every)._replace(follow=osub.oja().follow)
    tx = osub.scale_by_subspace(optax.identity(), rank=2, side="left", projector=rule)
    block = jax.random.normal(jax.random.key(0), (4, 16))
    first, then = (jnp.zeros((8, 16)).at[i : i + 4].set(block) for i in (0, 4))
    state, update = tx.init({"w": first}), jax.jit(tx.update)
    refreshes = []
    for gradient in [first] + [then] * every:
        assert int(osub.steps_to_refresh(state)) == -len(refreshes) % every
        _, state = update({"w": gradient}, state)
        refreshes.append(int(state.projection.leaves["w"].refreshes))
    assert refreshes == [1] * every + [2]


@pytest.mark.parametrize("rule", ["online", "periodic"])
def test_no_rule_follows_at_the_step_that_found_its_basis_over_micro_batches(rule):
    """Of one gradient given k times, which is that of one batch."""
    rules = {
        "online": osub.online_pca(),
        "periodic": osub.svd(4)._replace(
            follow=osub.online_pca().follow, init=osub.online_pca().init
        ),
    }
    whole, parts = (
        osub.scale_by_subspace(optax.scale_by_adam(), rank=2, projector=rules[rule], accumulate=k)
        for k in (1, 2)
    )
    states = [tx.init({"w": jnp.zeros((12, 10))}) for tx in (whole, parts)]
    updates = [jax.jit(tx.update) for tx in (whole, parts)]
    for step in range(LOOK_EVERY + 4):
        draw = jax.random.normal(jax.random.key(step), (12, 5))
        at = 0 if step < 6 else 5  # where none was before
        gradient = {"w": jnp.zeros((12, 10)).at[:, at : at + 5].set(draw)}
        one, states[0] = updates[0](gradient, states[0])
        _, states[1] = updates[1](gradient, states[1])
        assert int(osub.steps_to_refresh(states[1])) >= 0
        two, states[1] = updates[1](gradient, states[1])
        np.testing.assert_allclose(one["w"], two["w"], atol=1e-5)
    one, two = (state.projection.leaves["w"] for state in states)
    assert int(one.refreshes) > 1
    for key in ("age", "due", "refreshes"):
        assert int(getattr(one, key)) == int(getattr(two, key))


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_followers_are_free_of_the_scale_where_nothing_is_in_the_basis(scale):
    """Rows that come alive: on one side the coordinates are zero, and the norm must not be NaN."""
    tx = osub.scale_by_subspace(
        optax.scale_by_adam(), rank=2, side="both", projector=osub.history_pca(), moments="project"
    )
    first, then = (
        jnp.zeros((12, 8)).at[i : i + 6].set(jax.random.normal(jax.random.key(i), (6, 8)))
        for i in (0, 6)
    )
    states = [tx.init({"w": first}) for _ in range(2)]
    update = jax.jit(tx.update)
    for gradient in (first, first, then, then):
        for i, by in enumerate((1.0, scale)):
            _, states[i] = update({"w": by * gradient}, states[i])
    one, other = (state.projection.leaves["w"] for state in states)
    assert float(other.drift) > 1e-3
    for a, b in zip(*(jax.tree.leaves(leaf) for leaf in (one, other)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_rule_that_fails_leaves_its_leaf_as_it_was():
    fails = lambda gradient, basis, state: (
        jnp.where(state > 0, jnp.nan, jnp.eye(*basis.shape)),
        state + 1,
    )
    rule = osub.Projector(lambda *_: jnp.zeros([]), fails, every=1)
    tx = osub.scale_by_subspace(optax.identity(), rank=2, projector=rule)
    gradient = {"w": jnp.ones((8, 12))}
    state = tx.init(gradient)
    for _ in range(3):
        updates, state = tx.update(gradient, state)
        assert jnp.isfinite(updates["w"]).all() and jnp.any(updates["w"] != 0)
    np.testing.assert_array_equal(state.projection.leaves["w"].bases[0], jnp.eye(8, 2))


@pytest.mark.parametrize("follows", [False, True])
def test_a_rule_whose_state_is_nan_once_goes_on(follows):
    """With the NaN in its state every later basis would be NaN, and the leaf stand still."""

    def fails(array, basis, state):
        moved = jnp.linalg.qr(basis + 0.1 * array[:, : basis.shape[1]] / (1 + state["steps"]))[0]
        trace = jnp.where(jnp.any(array[1:]), 0.5 * state["trace"] + 1, jnp.nan)
        return moved + 0 * state["trace"], state | {"trace": trace, "steps": state["steps"] + 1}

    init = lambda *_: {"trace": jnp.zeros([]), "steps": jnp.zeros([]), "best": jnp.inf}
    first = lambda array, basis, state: (jnp.eye(*basis.shape), state)
    if follows:
        rule = osub.Projector(init, first, follow=fails, every=None)
    else:
        rule = osub.Projector(init, fails, every=1)
    tx = osub.scale_by_subspace(optax.identity(), rank=2, projector=rule)
    draw = lambda step: {"w": jax.random.normal(jax.random.key(step), (8, 12))}
    state, steps, moved = tx.init(draw(0)), [], []
    for step in range(5):
        gradient = {"w": jnp.zeros((8, 12)).at[0, 0].set(1.0)} if step == 2 else draw(step)
        before = state.projection.leaves["w"].bases[0]
        _, state = tx.update(gradient, state)
        leaf = state.projection.leaves["w"]
        steps.append(int(leaf.rule[0]["steps"]))
        moved.append(bool(jnp.any(leaf.bases[0] != before)))
        assert jnp.isfinite(leaf.rule[0]["trace"]) and jnp.isinf(leaf.rule[0]["best"])
    assert moved == [True, True, False, True, True]
    assert steps == ([0, 1, 1, 2, 3] if follows else [1, 2, 2, 3, 4])


def test_moments_turn_with_the_side_that_moved_where_the_other_failed():
    """They are those in the new basis: a lift of a turned moment keeps what both bases span."""
    turned = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (5, 5)))[0]
    turned = jnp.eye(6).at[:5, :5].set(turned)

    def step(product, basis, state):
        return (turned @ basis if len(basis) == 6 else basis * jnp.nan), state

    first = lambda gradient, basis, state: (jnp.eye(*basis.shape), state)
    rule = osub.Projector(lambda *_: (), first, follow=step, every=None)
    tx = osub.scale_by_subspace(
        optax.trace(0.9), rank=5, projector=rule, side="both", moments="project"
    )
    gradient = {"w": jnp.zeros((8, 6)).at[:5, :5].set(jax.random.normal(jax.random.key(1), (5, 5)))}
    state = tx.init(gradient)
    for _ in range(2):  # the first finds the bases, the second moves them
        _, state = tx.update(gradient, state)
    left, right = state.projection.leaves["w"].bases
    np.testing.assert_array_equal(left, jnp.eye(8, 5))
    np.testing.assert_allclose(right, turned[:, :5], atol=1e-6)
    lifted = left @ state.inner.trace["w"] @ right.T
    np.testing.assert_allclose(lifted, 1.9 * gradient["w"], atol=1e-5)


@pytest.mark.parametrize("side", ["left", "both"])
@pytest.mark.parametrize("at_source", [False, True])
def test_a_first_basis_that_fails_is_found_with_the_next_gradient(side, at_source):
    """Of one matrix, and of one slice of a stack; on one of two sides it fails for both."""

    def fails(gradient, basis, state):
        found = jnp.linalg.svd(gradient, full_matrices=False)[0][:, : basis.shape[1]]
        return jnp.where((gradient[0, 0] > 0.9) & (len(gradient) == 8), jnp.nan, found), state

    rule = osub.Projector(lambda *_: (), fails, every=2)
    rules = [("v", osub.MatrixSpec(1, 2)), ("w", osub.MatrixSpec())]
    tx = osub.scale_by_subspace(
        optax.scale_by_adam(), rank=2, projector=rule, side=side, rules=rules
    )
    params = {"v": jnp.zeros((3, 8, 6)), "w": jnp.zeros((8, 6))}
    state = tx.init(params)
    for step in range(4):
        draw = lambda x, step=step: jax.random.normal(jax.random.key(step), x.shape)
        gradients = jax.tree.map(draw, params)
        corner = 100.0 if step == 0 else -1.0
        gradients = {
            "v": gradients["v"].at[1, 0, 0].set(corner),
            "w": gradients["w"].at[0, 0].set(corner),
        }
        source = None
        if at_source:
            # x @ kernel of an identity, whose cotangent is the kernel's gradient.
            def loss(p, gradients=gradients):
                each = jax.vmap(lambda w: jnp.eye(8) @ w)(p["v"])
                found = jnp.sum(each * gradients["v"])
                return found + jnp.sum((jnp.eye(8) @ p["w"]) * gradients["w"])

            _, gradients, source = osub.subspace_value_and_grad(loss, tx)(params, state)
        updates, state = tx.update(gradients, state, source=source)
        moved = [bool(jnp.any(u)) for u in (*updates["v"], updates["w"])]
        assert moved == ([True, False, True, False] if step == 0 else [True] * 4)
        leaves = state.projection.leaves
        if step == 0:
            assert not any(jnp.any(b[1]) for b in leaves["v"].bases)
            assert not any(jnp.any(b) for b in leaves["w"].bases)
    assert leaves["v"].refreshes.tolist() == [2, 2, 2] and int(leaves["w"].refreshes) == 2
    assert leaves["v"].age.tolist() == [4, 3, 4]


@pytest.mark.parametrize("rule", [osub.history_pca(), osub.oja()])
def test_moments_of_a_follower_that_begins_anew_turn_too(rule):
    """Old and new basis are orthogonal here, so that nothing is left of the old moments."""
    tx = osub.scale_by_subspace(
        optax.scale_by_adam(), rank=2, side="left", projector=rule, moments="project"
    )
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (4, 16))
    upper = {"w": jnp.zeros((8, 16)).at[:4].set(draw(0))}
    lower = {"w": jnp.zeros((8, 16)).at[4:].set(draw(1))}
    update, state = jax.jit(tx.update), tx.init(upper)
    for gradient in [upper] * (LOOK_EVERY - 1) + [lower] * 2:
        _, state = update(gradient, state)
    leaf = state.projection.leaves["w"]
    assert int(leaf.refreshes) == 2
    inside = np.linalg.qr(np.asarray(leaf.bases[0]))[0].T @ np.asarray(
        lower["w"]
    )  # (the basis of the next step, which is nearly this one)
    norm = np.linalg.norm(state.inner.mu["w"])
    np.testing.assert_allclose(norm, 0.1 * np.linalg.norm(inside), rtol=0.1)


@pytest.mark.parametrize("moments", [pytest.param("keep", marks=pytest.mark.slow), "project"])
def test_gradients_of_another_dtype_than_the_parameters(moments):
    with jax.enable_x64(True):
        for weight, gradient in (("float64", "float32"), ("float32", "float64")):
            params = {"w": jnp.ones((8, 6), weight)}
            for rule in (osub.svd(2), osub.history_pca()):
                tx = osub.scale_by_subspace(
                    optax.scale_by_adam(), rank=2, projector=rule, moments=moments
                )
                state = tx.init(params)
                for _ in range(3):
                    updates, state = tx.update({"w": jnp.ones((8, 6), gradient)}, state)
                assert updates["w"].dtype == gradient
                assert state.inner.mu["w"].dtype == weight


@pytest.mark.parametrize("rank", [1, 3])
def test_a_state_of_the_other_side_is_told(rank):
    """The bases of a square matrix have one shape on both sides; of one column, moments that are
    added to a gradient of one row would become a matrix."""
    params = {"w": jnp.eye(6)}
    made = lambda side, inner, **kw: osub.scale_by_subspace(inner, rank=rank, side=side, **kw)
    few_bits = osub.quantize_state(optax.trace(0.9), min_size=0)
    cases = (optax.scale_by_adam(), "mu/w"), (optax.trace(0.9), "trace/w"), (few_bits, "trace/w")
    for inner, of in cases:
        state = made("left", inner).init(params)
        with pytest.raises(ValueError, match=rf"{of} of shape \({rank}, 6\), these settings need"):
            made("right", inner).update(params, state)
    left, right = (made(side, optax.identity(), accumulate=2) for side in ("left", "right"))
    with pytest.raises(ValueError, match="parameter w: the state holds a sum of low-rank gradien"):
        right.update(params, left.init(params))


def test_an_inner_transformation_that_changes_or_reads_what_it_keeps():
    keeps = lambda update: optax.GradientTransformation(lambda _: jnp.zeros(()), update)
    grows = keeps(lambda updates, state, params=None: (updates, state[None]))
    params = {"w": jnp.eye(6)}
    tx = osub.scale_by_subspace(grows, rank=2)
    with pytest.raises(ValueError, match=r"of shape \(1,\) of \(root\) of shape \(\): states keep"):
        tx.update(params, tx.init(params))

    def fails(updates, state, params=None):
        raise ValueError("its own words")

    reads = lambda params: jnp.float32(float(jnp.sum(params["w"])))
    tx = osub.scale_by_subspace(optax.GradientTransformation(reads, fails), rank=2)
    with pytest.raises(ValueError, match="its own words"):
        tx.update(params, tx.init(params))


def test_a_rule_of_objects_that_have_no_hash():
    @dataclasses.dataclass
    class Columns:
        first: int = 0

        def __call__(self, gradient, basis, state):
            return jnp.linalg.qr(gradient[:, self.first : basis.shape[1]])[0], state

    rule = osub.Projector(init=lambda *_: (), update=Columns())
    tx = osub.scale_by_subspace(
        optax.identity(), rank=2, rules=[("w", osub.MatrixSpec(projector=rule))]
    )
    params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
    apart, together = (f(params, tx.init(params))[0] for f in (tx.update, jax.jit(tx.update)))
    np.testing.assert_allclose(apart["w"], together["w"], atol=1e-6)


def test_a_state_of_another_rule_is_told_or_keeps_to_the_new_period():
    params = leaves("tall")
    tx = lambda rule, **kw: osub.scale_by_subspace(optax.identity(), rank=4, projector=rule, **kw)
    for rule, other in (
        (osub.oja(), osub.subspace_iteration()),
        (osub.history_pca(), osub.oja()),
        (osub.online_pca(), osub.history_pca()),
    ):
        with pytest.raises(ValueError, match="parameter tall: .* another projector or projector_d"):
            tx(other).update(params, tx(rule).init(params))
    with pytest.raises(ValueError, match="holds bases in bfloat16, these settings need bases in f"):
        tx(osub.svd()).update(params, tx(osub.svd(), projector_dtype="bfloat16").init(params))
    update = jax.jit(tx(osub.svd(5)).update)
    for before in (osub.oja(), osub.svd(200)):  # without a state of their own, as `svd`
        _, state = jax.jit(tx(before).update)(params, tx(before).init(params))
        for _ in range(6):
            _, state = update(params, state)
        assert int(state.projection.leaves["tall"].refreshes) == 2
