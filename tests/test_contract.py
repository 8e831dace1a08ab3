"""Every projector x side x inner transformation on one tree: what all of them must keep to."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import optax_subspace as osub
from tests import trees

PROJECTORS = {
    "svd": osub.svd(2),
    "subspace_iteration": osub.subspace_iteration(2),
    "random_projection": osub.random_projection(2),
    "online_pca": osub.online_pca(),
    "history_pca": osub.history_pca(),
    "oja": osub.oja(),
    "adaptive": osub.adaptive_period(osub.svd(1)),
    "fixed": osub.fixed(
        *(jnp.linalg.qr(jnp.sin(jnp.arange(4.0 * m).reshape(m, 4) ** 1.3))[0] for m in (20, 12))
    ),
}
# Those that look at the gradient.
SEEING = {k: v for k, v in PROJECTORS.items() if k not in ("random_projection", "fixed")}
INNER = {
    "adam": optax.scale_by_adam(),
    "lion": optax.scale_by_lion(),
    "trace": optax.trace(0.9, nesterov=True),
    "adafactor": optax.scale_by_factored_rms(min_dim_size_to_factor=4),
    "lamb": optax.lamb(0.1),
}
SIDES = ["shorter", "longer", "left", "right", "both", "auto"]


# Each projector with Adam and each inner transformation with `svd` by default, all pairs if slow.
PAIRS = [
    pytest.param(p, i, marks=[] if "adam" in (i, p) or p == "svd" else [pytest.mark.slow])
    for p in PROJECTORS
    for i in INNER
]


@pytest.mark.parametrize(("projector", "inner"), PAIRS)
@jax.numpy_rank_promotion("raise")
def test_the_contract(projector, inner):
    """All sides within one case, as rules: one compilation serves them."""
    tall, stack = (trees.params()[k] for k in ("tall", "stack"))
    params = {k: trees.params()[k] for k in ("bias", "experts")}
    rules = [("experts", osub.MatrixSpec(2, 3))]
    for side in SIDES:
        params |= {f"{side}_tall": tall, f"{side}_stack": stack}
        rules.append((f"{side}_stack", osub.MatrixSpec(1, 2, side=side)))
        rules.append((f"{side}_", osub.MatrixSpec(side=side)))
    tx = osub.scale_by_subspace(
        INNER[inner], rank=4, projector=PROJECTORS[projector], rules=rules, stagger=True
    )
    options = {"inner": INNER[inner], "projector": PROJECTORS[projector]}
    plans = {p.path: p for p in osub.plan(params, rules, rank=4, **options)}
    assert sum(p.projected for p in plans.values()) == 13
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(tx.init, params))
    update, before = jax.jit(tx.update), state
    gradients = [trees.grads(params, 0.3 * step) for step in range(3)]
    with trees.counting_compilations() as compilations:
        for step in range(3):
            updates, state = update(gradients[step], state, params)
    assert len(compilations) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_tree_all_finite((updates, state))
    for name, plan in plans.items():
        assert np.any(updates[name]), name
        if not plan.projected:
            continue
        leaf = state.projection.leaves[name]
        assert tuple(b.shape for b in leaf.bases) == plan.basis_shapes
        got = np.asarray(updates[name]).reshape(-1, *plan.matrix_shape)
        assert all(np.linalg.matrix_rank(g, tol=1e-3 * np.abs(g).max()) <= 4 for g in got), name
    # Nothing but itself moves a leaf: a bad gradient in one changes no other.
    bad = trees.grads(params, 1.0)
    good_updates, _ = update(bad, state, params)
    bad["left_tall"] = bad["left_tall"].at[3, 3].set(jnp.nan)
    updates, after = update(bad, state, params)
    assert not np.any(updates.pop("left_tall"))
    good_updates.pop("left_tall")
    chex.assert_trees_all_close(updates, good_updates, rtol=1e-6)
    assert int(after.projection.skipped["left_tall"]) == 1
    chex.assert_trees_all_equal(
        after.projection.leaves["left_tall"].bases, state.projection.leaves["left_tall"].bases
    )


@pytest.mark.filterwarnings("ignore:no parameter is projected")
@settings(max_examples=16, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    batch=st.integers(0, 2),
    rank=st.integers(1, 10),
    side=st.sampled_from(SIDES),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
    name=st.sampled_from([k for k in PROJECTORS if k not in ("adaptive", "fixed")]),
)
def test_any_shape_rank_and_dtype(dtype, **example):
    with jax.enable_x64(dtype == "float64"):
        check_projection(dtype=dtype, **example)


def check_projection(rows, columns, batch, rank, side, dtype, name):
    shape = (batch, rows, columns) if batch else (rows, columns)
    rules = [("w", osub.MatrixSpec(len(shape) - 2, len(shape) - 1))]
    gradient = jax.random.normal(jax.random.key(rows), shape).astype(dtype)
    inner, projector = optax.identity(), PROJECTORS[name]
    tx = osub.scale_by_subspace(inner, rank=rank, side=side, projector=projector, rules=rules)
    _, state = tx.update({"w": gradient}, tx.init({"w": gradient}))
    updates, _ = tx.update({"w": gradient}, state)  # the rules' period is two steps
    assert updates["w"].dtype == dtype and updates["w"].shape == shape
    (plan,) = osub.plan(
        {"w": gradient}, rules, rank=rank, side=side, inner=inner, projector=projector
    )
    if not plan.projected:
        assert rank >= min(rows, columns)
        np.testing.assert_array_equal(updates["w"], gradient)
        return
    # The update is the gradient's part in the span of the basis that there was before the step.
    update, expected = (np.asarray(x, np.float64) for x in (updates["w"], gradient))
    whole = np.linalg.norm(expected)
    for axis, basis in zip(plan.sides, state.projection.leaves["w"].bases, strict=True):
        p = np.asarray(basis, np.float64)
        projection = p @ np.swapaxes(p, -1, -2)
        expected = projection @ expected if axis == "left" else expected @ projection
        if name != "online_pca":
            np.testing.assert_allclose(projection @ projection, projection, atol=1e-4)
    tolerance = 4 * float(jnp.finfo(dtype).eps) + 1e-5
    np.testing.assert_allclose(update, expected, rtol=tolerance, atol=tolerance * whole)
    captured = np.sum(update**2) / whole**2
    assert captured <= 1.05
    if name in SEEING and len(plan.sides) == 1:  # all begin with singular vectors
        assert captured > 0.9 * plan.rank / min(rows, columns)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_projecting_twice_is_projecting_once(rank):
    gradient = trees.params()["tall"]
    tx = osub.scale_by_subspace(optax.identity(), rank=rank, projector=osub.svd(100))
    once, state = tx.update({"w": gradient}, tx.init({"w": gradient}))
    twice, _ = tx.update(once, state)
    np.testing.assert_allclose(twice["w"], once["w"], rtol=1e-4, atol=1e-5)


def test_gradients_of_lower_rank_than_the_basis():
    """The basis stays orthonormal and captures all of the gradient."""
    u = jnp.outer(jnp.arange(1.0, 21.0), jnp.ones(12))
    for rule in PROJECTORS.values():
        tx = osub.scale_by_subspace(optax.identity(), rank=4, projector=rule)
        state = tx.init({"w": u})
        for _ in range(3):
            updates, state = tx.update({"w": u}, state)
        basis = np.asarray(state.projection.leaves["w"].bases[0])
        assert np.all(np.isfinite(basis))
        np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=0.2)
        if rule in SEEING.values():
            # Online PCA's slope is zero here but for rounding, which Adam turns into full steps.
            tolerance = 0.25 if rule is PROJECTORS["online_pca"] else 1e-3
            np.testing.assert_allclose(updates["w"], u, rtol=tolerance, atol=1e-3)


@pytest.mark.slow
def test_online_pca_keeps_its_scale_where_gradients_have_a_lower_rank():
    """Columns that no gradient pulls at are held by the orthogonality term alone."""
    u, v = (jax.random.normal(jax.random.key(i), (n, 4)) for i, n in enumerate((64, 40)))
    tx = osub.scale_by_subspace(optax.identity(), rank=16, projector=osub.online_pca())

    def step(state, key):
        gradient = {"w": u @ (v + 0.3 * jax.random.normal(key, v.shape)).T}
        _, state = tx.update(gradient, state)
        basis = state.projection.leaves["w"].bases[0]
        return state, jnp.max(jnp.abs(basis.T @ basis - jnp.eye(16)))

    state = tx.init({"w": jnp.zeros((64, 40))})
    skew = jax.lax.scan(step, state, jax.random.split(jax.random.key(2), 200))[1]
    assert jnp.max(skew) < 0.07 and skew[-1] < 0.02


def test_no_rule_captures_less_than_a_random_basis():
    """On a gradient with a falling spectrum that turns a little at each step."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (24, 32))
    gradient = u @ (np.arange(1, 25)[:, None] ** -0.7 * v[:24])
    captured = {}
    for name, rule in {**SEEING, "random": osub.random_projection(2)}.items():
        tx = osub.scale_by_subspace(optax.identity(), rank=4, projector=rule)
        state, update = tx.init({"w": jnp.asarray(gradient, jnp.float32)}), jax.jit(tx.update)
        measure = jax.jit(lambda s, g, tx=tx: osub.subspace_metrics(tx, s, g)["w"])
        rng, total = np.random.default_rng(1), []
        for _ in range(12):
            noise = 0.05 * rng.standard_normal(gradient.shape)
            grads = {"w": jnp.asarray(gradient + noise, jnp.float32)}
            _, state = update(grads, state)
            total.append(float(measure(state, grads).captured_energy))
        captured[name] = np.mean(total)
    worst = captured.pop("random")
    assert all(energy > 2 * worst for energy in captured.values()), (captured, worst)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("projector", [osub.svd(), osub.online_pca()])
@pytest.mark.parametrize(
    "inner", [optax.scale_by_adam(), optax.trace(0.9), optax.scale_by_adam(mu_dtype="bfloat16")]
)
def test_auto_takes_the_fewest_bytes_of_all_sides(inner, projector, dtype):
    params = {k: v for k, v in trees.params().items() if k in ("tall", "wide", "square", "stack")}
    params["slim"] = jnp.ones((40, 6))
    settings = {"rank": 5, "projector": projector, "projector_dtype": dtype}
    settings["rules"] = trees.RULES[:1]

    def described(side):
        return osub.describe(params, osub.scale_by_subspace(inner, side=side, **settings))

    auto = described("auto")
    for side in ("shorter", "longer", "left", "right", "both"):
        assert auto.state_bytes <= described(side).state_bytes
    assert {p.side for p in auto.leaves} <= {"left", "right", "both"}
    # Decided leaf by leaf: of `slim` two bases and a 5 x 5 core are more than a basis of one side.
    assert {p.path: p.side for p in auto.leaves}["slim"] != "both"


def test_metrics():
    params = {k: v for k, v in trees.params().items() if k in ("tall", "stack", "bias")}
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(
            osub.galore(0.1, 4, every=2, rules=trees.RULES[:1]),
            {"tall": True, "stack": True, "bias": False},
        ),
    )
    state = tx.init(params)
    metrics = jax.jit(lambda s, g: osub.subspace_metrics(tx, s, g))
    fresh = metrics(state, params)
    assert set(fresh) == {"tall", "stack"}
    assert not np.any(fresh["tall"].captured_energy) and not np.any(fresh["stack"].refreshes)
    update = jax.jit(tx.update)
    for step in range(3):
        grads = trees.grads(params, step)
        _, state = update(grads, state, params)
    found = metrics(state, grads)
    assert found["stack"].captured_energy.shape == (3,)
    np.testing.assert_array_equal(found["stack"].refreshes, [2, 2, 2])
    # At a refresh the basis is that of this very gradient.
    sigma = np.linalg.svd(np.asarray(grads["tall"]), compute_uv=False)
    best = np.sum(sigma[:4] ** 2) / np.sum(sigma**2)
    np.testing.assert_allclose(found["tall"].captured_energy, best, rtol=1e-5)
    assert 0 < found["tall"].drift < 1
    assert not np.any(metrics(state, jax.tree.map(jnp.zeros_like, grads))["tall"].captured_energy)
    # Of a basis that is not orthonormal, the span counts.
    skewed = osub.scale_by_subspace(
        optax.identity(), rank=2, projector=osub.fixed(jnp.array([[3.0, 3], [0, 1], [0, 0]]))
    )
    gradient = {"w": jnp.ones((3, 5))}
    _, state = skewed.update(gradient, skewed.init(gradient))
    energy = osub.subspace_metrics(skewed, state, gradient)["w"].captured_energy
    np.testing.assert_allclose(energy, 2 / 3, rtol=1e-5)


def test_the_energy_of_a_basis_with_fewer_directions_than_columns():
    columns = jnp.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]], jnp.float32)
    tx = osub.scale_by_subspace(
        optax.identity(), rank=3, side="left", projector=osub.fixed(columns)
    )
    gradient = {"w": jnp.ones((4, 5))}
    _, state = tx.update(gradient, tx.init(gradient))
    energy = osub.subspace_metrics(tx, state, gradient)["w"].captured_energy
    assert float(energy) == pytest.approx(2 / 4)
