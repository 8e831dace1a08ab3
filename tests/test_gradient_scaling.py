"""APOLLO and Fira: gradients scaled at full rank by what happens to them in a subspace."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_subspace as osub
from tests import trees

B1, B2, EPS = 0.9, 0.999, 1e-6
ORTHONORMAL = {
    m: np.linalg.qr(np.random.default_rng(m).normal(size=(m, 3)))[0].astype(np.float32)
    for m in (6, 8)
}
SHAPES = {"tall": (10, 6), "wide": (6, 10), "square": (8, 8)}


def gradients(shape, steps=6):
    rng = np.random.default_rng(sum(shape))
    return [rng.normal(size=shape).astype(np.float32) * (1 + 3 * (t == 3)) for t in range(steps)]


def published(found, basis, on_left, per, residual, alpha, growth):
    """The papers' algorithms on one matrix, in plain NumPy and double precision.

    As here, the limiter sees Adam's update with its bias correction; the public codes multiply by
    it after the limiter, which with `growth=np.inf` is the same.
    """
    mean = square = norm = None
    updates = []
    for t, gradient in enumerate(found, 1):
        g, p = gradient.astype(float), basis.astype(float)
        low = p.T @ g if on_left else g @ p
        mean = np.zeros_like(low) if mean is None else mean
        square = np.zeros_like(low) if square is None else square
        mean, square = B1 * mean + (1 - B1) * low, B2 * square + (1 - B2) * low**2
        adam = mean / (np.sqrt(square) + EPS) * np.sqrt(1 - B2**t) / (1 - B1**t)
        axes = (0, 1) if per == "tensor" else 0 if on_left else 1
        length = lambda x, axes=axes: np.sqrt(np.sum(x**2, axis=axes, keepdims=True))
        lifted = lambda x, p=p: p @ x if on_left else x @ p.T
        rest = g - lifted(low) if residual else g
        scaled = rest * length(adam) / length(low)
        now = np.linalg.norm(scaled)
        if norm is not None and now > growth * norm:
            scaled *= growth * norm / now
        norm = np.linalg.norm(scaled)
        updates.append(alpha * lifted(adam) + scaled if residual else alpha * scaled)
    return updates


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_steps_are_the_published_ones(per, residual):
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    tx = osub.scale_by_subspace_norms(
        osub.scale_by_hamiltonian_descent(
            osub.adam_kinetic(B1, B2, EPS, eps_before_correction=True)
        ),
        rank=3,
        projector=osub.fixed(*map(jnp.asarray, ORTHONORMAL.values())),
        per=per,
        residual=residual,
        scale=0.25,
    )
    state, update = tx.init(params), jax.jit(tx.update)
    series = {name: gradients(shape) for name, shape in SHAPES.items()}
    expected = {
        # (`shorter` puts the basis of a square matrix where it puts that of a wide one or not:
        # the plan tells.)
        p.path: published(
            series[p.path],
            ORTHONORMAL[min(SHAPES[p.path])],
            p.sides == ("left",),
            *(per, residual, 0.25, 1.01),
        )
        for p in osub.plan(params, rank=3)
    }
    limited = 0
    for t in range(6):
        updates, state = update({k: jnp.asarray(v[t]) for k, v in series.items()}, state, params)
        for name, found in updates.items():
            np.testing.assert_allclose(found, expected[name][t], rtol=1e-4, atol=1e-5)
    for name, shape in SHAPES.items():
        free = published(
            series[name],
            ORTHONORMAL[min(shape)],
            next(p for p in osub.plan(params, rank=3) if p.path == name).sides == ("left",),
            *(per, residual, 0.25, np.inf),
        )
        limited += not np.allclose(free[-1], expected[name][-1], rtol=1e-3)
    assert limited  # or the limiter had nothing to do


@pytest.mark.parametrize("residual", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_changes_no_norm_changes_nothing(residual):
    """With the identity inside, the update is the gradient itself, at full rank."""
    params = {k: v for k, v in trees.params().items() if k not in ("experts", "heads")}
    tx = osub.scale_by_subspace_norms(
        optax.identity(), rank=4, residual=residual, growth=None, rules=trees.RULES[:1]
    )
    given = trees.grads(params)
    updates, _ = tx.update(given, tx.init(params), params)
    chex.assert_trees_all_close(updates, given, rtol=1e-4, atol=1e-5)


def test_channels_keep_their_directions():
    gradient = jnp.asarray(gradients((6, 10))[0])
    tx = osub.apollo(1.0, rank=3)
    updates, _ = tx.update({"w": gradient}, tx.init({"w": gradient}))
    factors = -updates["w"] / gradient
    np.testing.assert_allclose(factors, jnp.broadcast_to(factors[:1], (6, 10)), rtol=1e-4)
    assert np.ptp(factors[0]) > 0.1 * np.max(factors)
    tx = osub.apollo_mini(1.0)
    updates, _ = tx.update({"w": gradient}, tx.init({"w": gradient}))
    factors = -updates["w"] / gradient
    np.testing.assert_allclose(factors, jnp.full((6, 10), factors[0, 0]), rtol=1e-4)


def test_a_stack_is_its_slices():
    given = [jnp.asarray(np.stack([g, 2 * g[::-1]])) for g in gradients((12, 20), 4)]
    make = lambda rules: osub.fira(0.1, rank=4, every=2, per="tensor", rules=rules)
    stacked = make([("w", osub.MatrixSpec(1, 2))])
    alone = make(None)
    state = stacked.init({"w": given[0]})
    states = [alone.init({"w": given[0][i]}) for i in range(2)]
    assert state[0].norms["w"].shape == (2,)
    for gradient in given:
        updates, state = stacked.update({"w": gradient}, state)
        for i in range(2):
            one, states[i] = alone.update({"w": gradient[i]}, states[i])
            np.testing.assert_allclose(updates["w"][i], one["w"], rtol=1e-4, atol=1e-6)


def test_the_norm_grows_slowly():
    params = {"w": jnp.zeros((6, 10))}
    tx = osub.scale_by_subspace_norms(optax.identity(), rank=3, growth=1.1)
    state, norms = tx.init(params), []
    for factor in (1.0, 100.0, 100.0, 0.01, 100.0):
        updates, state = tx.update({"w": jnp.full((6, 10), factor)}, state)
        norms.append(float(jnp.linalg.norm(updates["w"])))
    norms = np.array(norms) / norms[0]
    np.testing.assert_allclose(norms, [1, 1.1, 1.21, 0.01, 0.011], rtol=1e-4)


@pytest.mark.parametrize("make", [osub.apollo, osub.apollo_mini, osub.fira])
def test_bad_gradients_are_skipped(make):
    """Alone, counted, and without a trace in what comes after."""
    params = trees.params()
    tx = make(0.1, rules=trees.RULES, weight_decay=0.1)
    if make is not osub.apollo_mini:
        tx = make(0.1, rank=4, rules=trees.RULES, weight_decay=0.1)
    update, state = jax.jit(tx.update), tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(tx.init, params))
    given = [trees.grads(params, 0.3 * step) for step in range(3)]
    with trees.counting_compilations() as compilations:
        for gradient in given:
            updates, state = update(gradient, state, params)
    assert len(compilations) == 1
    assert all(np.any(u) for u in jax.tree.leaves(updates))  # all parameters move
    bad = trees.grads(params, 1.0)
    good, _ = update(bad, state, params)
    bad["stack"] = bad["stack"].at[0, 3, 3].set(jnp.nan)
    updates, after = update(bad, state, params)
    assert not np.any(updates.pop("stack"))
    good.pop("stack")
    chex.assert_trees_all_close(updates, good, rtol=1e-6)
    assert int(after[0].projection.skipped["stack"]) == 1
    np.testing.assert_array_equal(after[0].norms["stack"], state[0].norms["stack"])
    # No gradient is no division by zero, at the first step either.
    for begun in (tx.init(params), after):
        updates, _ = update(jax.tree.map(jnp.zeros_like, params), begun, params)
        chex.assert_tree_all_finite(updates)


@pytest.mark.parametrize("make", [osub.apollo, osub.apollo_mini, osub.fira])
def test_wrappers_of_optax_take_it(make):
    """`inject_hyperparams`, whose numbers are arrays, `tree_map_params`, `MultiSteps`, `masked`."""
    params = {"w": jnp.ones((8, 6)), "b": jnp.ones(6)}
    wave = lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    given = jax.tree.map(wave, params)
    settings = {} if make is osub.apollo_mini else {"rank": 2}
    plain = make(0.1, **settings)
    expected, state = plain.update(given, plain.init(params), params)
    known = inspect.signature(make).parameters
    static = [name for name in ("rank", "side", "per", "moments") if name in known]
    injected = optax.inject_hyperparams(make, static_args=static)(0.1, **settings)
    found, _ = injected.update(given, injected.init(params), params)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    optax.tree_map_params(plain, lambda x: x, state)
    wrapped = optax.MultiSteps(plain, 2)
    begun = wrapped.init(params)
    _, begun = wrapped.update(given, begun, params)
    found, _ = wrapped.update(given, begun, params)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    masked = optax.masked(plain, {"w": True, "b": False})
    found, _ = masked.update(given, masked.init(params), params)
    # (A leaf's random numbers depend on its place among those that are left.)
    assert np.any(found["w"]) and np.array_equal(found["b"], given["b"])


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_no_gradient_is_too_small_or_large(size):
    gradient = {"w": jnp.full((6, 10), size)}
    tx = osub.scale_by_subspace_norms(optax.identity(), rank=3)
    updates, _ = tx.update(gradient, tx.init(gradient))
    chex.assert_trees_all_close(updates, gradient, rtol=1e-4)


def test_updates_beyond_float16_are_its_largest_numbers():
    gradients = {"w": jnp.full((6, 5), 30000, jnp.float16), "b": jnp.full(3, 30000, jnp.float16)}
    tx = osub.scale_by_subspace_norms(optax.scale(4.0), rank=2)
    updates, _ = tx.update(gradients, tx.init(gradients))
    for update in updates.values():
        assert jnp.all(update == jnp.finfo(jnp.float16).max)


def test_layers_within_the_backward_pass():
    """`fused_backward` takes it: leaves are kept apart."""
    key = jax.random.key(0)
    params = {"layers": {"w": jax.random.normal(key, (3, 8, 8)) / 3}, "head": jnp.ones((8, 1))}
    rules = [("layers/w", osub.MatrixSpec(-2, -1)), (".*", None)]
    tx = osub.fira(1e-2, rank=2, every=2, rules=rules)
    block = lambda layer, x: jnp.tanh(x @ layer["w"])
    loss = lambda rest, x, batch: jnp.mean((x @ rest["head"] - 1) ** 2)
    fused = osub.fused_backward(lambda rest, batch: batch, block, loss, tx)
    batch = jax.random.normal(key, (4, 8))

    def whole(params):
        x = batch
        for i in range(3):
            x = block({"w": params["layers"]["w"][i]}, x)
        return loss(params, x, batch)

    ours, state, theirs, plain = params, fused.init(params), params, tx.init(params)
    for _ in range(4):
        ours, state, _ = fused.step(ours, state, batch)
        updates, plain = tx.update(jax.grad(whole)(theirs), plain, theirs)
        theirs = optax.apply_updates(theirs, updates)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_random_entries_keep_norms_in_the_mean():
    rule = osub.random_projection(3, orthonormal=False)
    state = rule.init(jax.random.key(0), 500, 40, 100)
    basis, state = rule.update(jnp.ones((500, 40)), jnp.zeros((500, 100)), state)
    assert abs(float(jnp.var(basis)) * 100 - 1) < 0.05
    x = jax.random.normal(jax.random.key(1), (500, 40))
    assert abs(float(jnp.linalg.norm(basis.T @ x) / jnp.linalg.norm(x)) - 1) < 0.05
    again, _ = rule.update(jnp.ones((500, 40)), basis, state)
    assert abs(float(jnp.mean(again * basis))) < 1e-3 and rule.every == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per": "row"}, "per must be one of channel, tensor, got 'row'"),
        ({"growth": 0.5}, "growth must be at least 1, or None for no limit, got 0.5"),
        ({"side": "both"}, "side='both' may leave no axis for channels"),
        ({"side": "auto"}, "side='auto' may leave no axis for channels"),
        ({"rank": 0}, "rank must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        osub.scale_by_subspace_norms(optax.scale_by_adam(), **arguments)


def test_what_cannot_be_scaled():
    params = {"w": jnp.ones((8, 8))}
    rules = [("w", osub.MatrixSpec(0, 1, side="both"))]
    with pytest.raises(ValueError, match="parameter w: is projected on both sides"):
        osub.apollo(0.1, rank=2, rules=rules).init(params)
    with pytest.raises(ValueError, match="parameter w: moments='project' turns moments"):
        osub.apollo(0.1, rank=2, moments="project").init(params)
    with pytest.raises(ValueError, match="apollo: give every or projector, not both"):
        osub.apollo(0.1, every=5, projector=osub.svd())
    with pytest.raises(TypeError, match="apollo_mini: got an unexpected keyword argument 'rank'"):
        osub.apollo_mini(0.1, rank=4)
    tx = osub.apollo(0.1, rank=2)
    low = osub.Projected(jnp.ones((2, 8)), (8, 8), jnp.dtype("float32"))
    with pytest.raises(ValueError, match="projected at the source"):
        tx.update({"w": low}, tx.init(params))
