"""Every projector: its mathematics, its schedule, and the published online PCA."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_subspace as osub
from benchmarks.tracking import track
from tests import trees

RULES = {
    "svd": osub.svd(every=2),
    "lapack": osub.svd(every=2, method="lapack"),
    "subspace_iteration": osub.subspace_iteration(every=2),
    "oversampled": osub.subspace_iteration(every=2, oversample=2),
    "random_projection": osub.random_projection(every=2),
    "online_pca": osub.online_pca(),
    "online_pca_lion": osub.online_pca(optax.lion(0.01)),
    "online_pca_sgd": osub.online_pca(optax.sgd(0.1, momentum=0.9), relative=False),
    "online_pca_adam8bit": osub.online_pca(
        osub.quantize_state(optax.adam(0.03, eps=1e-7), block=16, min_size=0)
    ),
    "online_pca_adafactor": osub.online_pca(
        optax.adafactor(0.03, min_dim_size_to_factor=4, multiply_by_parameter_scale=False)
    ),
    "history_pca": osub.history_pca(),
    "oja": osub.oja(),
}
RETRACTED = {name for name in RULES if not name.startswith("online_pca")}


@pytest.mark.parametrize("name", RULES)
def test_bases_are_orthonormal_capture_energy_and_move(name):
    leaves = ("tall", "wide", "stack")
    params = {k: v for k, v in trees.params().items() if k in leaves}
    tx = osub.scale_by_subspace(
        optax.scale_by_adam(), rank=4, projector=RULES[name], rules=trees.RULES[:1]
    )
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for step in range(4):
        updates, state = update(trees.grads(params, 0.1 * step), state, params)
        bases = {k: leaf.bases for k, leaf in state.projection.leaves.items()}
        seen.append(jax.tree.map(np.asarray, bases))
    for leaf in leaves:
        basis = seen[-1][leaf][0]
        gram = np.swapaxes(basis, -1, -2) @ basis
        tolerance = 1e-5 if name in RETRACTED else 0.2
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(4), gram.shape), atol=tolerance)
        assert np.any(updates[leaf]), leaf
        assert not np.array_equal(seen[0][leaf][0], seen[-1][leaf][0])
        refreshed = RULES[name].follow is None
        same = np.array_equal(seen[0][leaf][0], seen[1][leaf][0])
        assert same == refreshed, "refreshing rules move every second step, following ones each"


@pytest.mark.parametrize("name", sorted(set(RULES) - {"random_projection"}))
def test_a_constant_gradient_is_found(name):
    """On one gradient with a gap, every rule that looks at it ends at the leading directions."""
    u = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 24)))[0]
    v = np.linalg.qr(np.random.default_rng(1).standard_normal((40, 40)))[0]
    sigma = np.array([5.0, 4.0, 3.0] + [0.3] * 21)
    gradient = jnp.asarray(u @ (sigma[:, None] * v[:24]), jnp.float32)
    tx = osub.scale_by_subspace(optax.identity(), rank=3, projector=RULES[name])
    state, update = tx.init({"w": gradient}), jax.jit(tx.update)
    for _ in range(6):
        updates, state = update({"w": gradient}, state)
    captured = np.sum(np.square(updates["w"])) / np.sum(np.square(gradient))
    assert captured > 0.97 * np.sum(sigma[:3] ** 2) / np.sum(sigma**2)


def test_svd_is_the_best_basis_of_its_rank():
    gradient = trees.params()["tall"]
    sigma = np.linalg.svd(np.asarray(gradient), compute_uv=False)
    for method in ("gram", "lapack"):
        basis, _ = osub.svd(method=method).update(gradient, jnp.zeros((20, 4)), ())
        error = np.linalg.norm(gradient - basis @ (basis.T @ gradient)) ** 2
        np.testing.assert_allclose(error, np.sum(sigma[4:] ** 2), rtol=1e-5)


def test_fixed_basis_stays():
    params = {"w": trees.params()["wide"]}
    basis = jnp.eye(12)[:, 3:6]
    tx = osub.scale_by_subspace(optax.identity(), rank=3, projector=osub.fixed(basis))
    state = tx.init(params)
    for step in range(3):
        grads = trees.grads(params, step)
        updates, state = tx.update(grads, state)
        np.testing.assert_array_equal(updates["w"][3:6], grads["w"][3:6])
        assert not np.any(updates["w"][:3])


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: osub.subspace_iteration(power=0), "power"),
        (lambda: osub.subspace_iteration(oversample=-1), "oversample"),
        (lambda: osub.random_projection(every=0), "every"),
        (lambda: osub.fixed(jnp.ones(3)), r"\(m, r\)"),
        (lambda: osub.online_pca(orthogonality=-1), "orthogonality"),
        (lambda: osub.online_pca(orthogonality=float("nan")), "orthogonality"),
        (lambda: osub.online_pca(orthogonality="x"), "orthogonality must be a number, got 'x'"),
        (lambda: osub.tied_rate(0.1, "x"), "peak must be a number, got 'x'"),
        (lambda: osub.adaptive_period(osub.svd(5), cosine="x"), "cosine must be a number"),
        (lambda: osub.history_pca(decay=1.0), "decay"),
        (lambda: osub.oja(step=0), "step"),
        (lambda: osub.oja(step=float("inf")), "step must be positive and finite"),
        (lambda: osub.online_pca(orthogonality=float("inf")), "must be finite and not negative"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises((TypeError, ValueError), match=match):
        call()


@pytest.mark.parametrize(
    "tag",
    [
        "continuous_gap200_wd0.0",
        "continuous_gap5_wd0.0",
        "continuous_gap5_wd0.1",
        "continuous_sgd_gap5_wd0.0",
    ],
)
def test_online_pca_equals_the_published_online_subspace_descent(tag):
    """Weights and bases over 12 steps. The first basis comes from an SVD, whose signs follow the
    reference's; from then on none are open."""
    with np.load(pathlib.Path(__file__).parent / "golden" / "osd.npz") as file:
        golden = dict(file)
    gap = 5 if "gap5" in tag else 200
    params = {f"w{i}": jnp.asarray(golden[f"init{i}"]) for i in range(3)}
    decay = float(tag.rpartition("wd")[2])
    rate = osub.tied_rate(lambda step: 0.01, peak=0.01, every=gap)
    follower = optax.sgd(rate) if "sgd" in tag else optax.adamw(rate, weight_decay=0.01)
    published = osub.online_pca(follower, orthogonality=0.0, relative=False, relative_to="gradient")
    rules, columns = [], {}
    for p in osub.plan(params, rank=4):
        proj = golden[f"{tag}/proj{p.path[1]}"]
        columns[p.path] = proj if p.side == "left" else proj.transpose(0, 2, 1)
        first = columns[p.path][0]

        def update(gradient, basis, state, first=first):
            basis, state = published.update(gradient, basis, state)
            return basis * jnp.sign(jnp.sum(basis * first, axis=0)), state

        rules.append((p.path, osub.MatrixSpec(projector=published._replace(update=update))))
    tx = osub.galore(0.01, rank=4, projector=published, rules=rules)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(12):
        grads = {f"w{i}": golden[f"grads{i}"][step] for i in range(3)}
        updates, state = update(grads, state, params)
        # The reference decays the weights that it has just updated.
        params = jax.tree.map(lambda w, u: (w + u) * (1 - 0.01 * decay), params, updates)
        for name, value in params.items():
            ours = state[0].projection.leaves[name].bases[0]
            theirs = golden[f"{tag}/params{name[1]}"][step]
            np.testing.assert_allclose(ours, columns[name][step], rtol=1e-4, atol=1e-4)
            assert np.linalg.norm(value - theirs) < 1e-4 * np.linalg.norm(theirs)


def test_auto_says_why_a_leaf_has_a_basis_of_all_directions():
    """Four moments on the short side of a slim matrix, and a basis, have fewer bytes than whole."""
    params = {"w": jnp.cos(jnp.arange(240.0)).reshape(40, 6)}
    make = lambda count: osub.galore(
        0.1, 6, side="auto", inner=optax.chain(*[optax.trace(0.9)] * count)
    )
    assert osub.describe(params, make(1)).leaves[0].side is None
    (plan,) = osub.describe(params, make(4)).leaves
    assert plan.side == "left" and plan.rank == 6 and plan.scale == 0.25
    assert plan.reason == "rank 6 >= min(40, 6), the fewest bytes all the same"
    # All of the gradient that it was made of.
    updates, _ = make(4).update(params, make(4).init(params))
    np.testing.assert_allclose(updates["w"], -0.025 * params["w"], rtol=1e-4, atol=1e-6)


def test_auto_takes_the_side_that_a_given_basis_fits():
    params = {"w": jnp.ones((20, 12))}
    for rows, side in ((20, "left"), (12, "right")):
        tx = osub.galore(0.1, 4, side="auto", projector=osub.fixed(jnp.eye(rows)[:, :4]))
        assert osub.describe(params, tx).leaves[0].side == side
    with pytest.raises(ValueError, match="asks for a basis of shape"):
        osub.galore(0.1, 4, side="auto", projector=osub.fixed(jnp.eye(7)[:, :4])).init(params)


@pytest.mark.parametrize("rank", [4, 16])
def test_online_pca_keeps_its_scale_at_any_rank(rank):
    """Through a jump of the whole subspace, where each column is pulled at most."""
    found = track(osub.online_pca(), 64, 64, rank, 80, 30, 2e-3, "float32", 0.0)
    assert found.skew.max() < 0.05


@pytest.mark.parametrize("rule", [osub.history_pca, osub.online_pca, osub.oja])
def test_another_first_basis(rule):
    """The best one, and one that is given."""
    gradient = {"w": trees.params()["tall"]}
    bases = []
    for first in (None, osub.subspace_iteration(power=8), osub.fixed(jnp.eye(20)[:, :4])):
        tx = osub.scale_by_subspace(
            optax.identity(), rank=4, side="left", projector=rule(first=first)
        )
        _, state = tx.update(gradient, tx.init(gradient))
        bases.append(np.asarray(state.projection.leaves["w"].bases[0]))
    best, iterated, given = bases
    assert np.linalg.norm(best.T @ iterated) ** 2 > 3.99
    np.testing.assert_array_equal(given, np.eye(20)[:, :4])
