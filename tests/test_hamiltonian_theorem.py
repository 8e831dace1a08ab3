"""The theorem of Online Subspace Descent, measured: the Hamiltonian falls on any path of bases.

For ``S' = (1 - a) S + a P^T G``, ``U = grad K((1 - c) S + c P^T G)`` with ``c >= a``, and
``W' = W - lr P U``, convexity of ``K`` alone gives
``-<P^T G, U> + (1 - c) / a (K(S') - K(S)) <= 0``: what is left of a step's change of ``H`` is the
curvature of the loss along it, which is at most ``(L / 2) |lr P U|^2`` with ``L`` the smoothness of
the loss. If the gradient of ``K`` is ``l``-Lipschitz, the first part is even ``<= -|U|^2 / l``, so
that ``H`` never grows for ``lr <= 2 / (l L |P|^2)``.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_subspace as osub

SHAPE = (6, 5)


class Problem(NamedTuple):
    loss: object  # of the weights
    start: np.ndarray
    smoothness: float  # the largest eigenvalue of the loss' Hessian, wherever H <= H(start)


def quadratic():
    rng = np.random.default_rng(0)
    a = np.linalg.qr(rng.normal(size=(6, 6)))[0] * np.linspace(0.6, 1.0, 6)
    target = rng.normal(size=SHAPE)
    loss = lambda w: jnp.sum((a @ (w - target)) ** 2) / 2
    return Problem(loss, np.zeros(SHAPE), 1.0)


def logistic():
    """Five regressions at once, with a ridge that makes their Hessian at least 0.02."""
    rng = np.random.default_rng(1)
    x, ridge = rng.normal(size=(40, 6)), 0.02
    signs = np.where(x @ rng.normal(size=SHAPE) + rng.normal(size=(40, 5)) > 0, 1.0, -1.0)
    loss = lambda w: (
        jnp.sum(jnp.mean(jnp.logaddexp(0, -signs * (x @ w)), axis=0)) + ridge * jnp.sum(w**2) / 2
    )
    largest = np.linalg.eigvalsh(x.T @ x / 40)[-1] / 4 + ridge
    return Problem(loss, np.zeros(SHAPE), largest)


def network():
    """tanh(x A) B, with A of the first three columns of the weights and B of the last two.

    It is not convex; its smoothness is the largest eigenvalue of the Hessian at points all over the
    ball that the trajectories keep to (asserted there), and a tenth more.
    """
    rng = np.random.default_rng(2)
    x = rng.normal(size=(30, 6)) / 2
    goal = np.tanh(x @ rng.normal(size=(6, 3))) @ rng.normal(size=(3, 4)) / 2
    loss = lambda w: (
        jnp.mean(jnp.sum((jnp.tanh(x @ w[:, :3]) @ w[:, 3:].reshape(3, 4) - goal) ** 2, axis=1)) / 2
    )
    start = rng.normal(size=SHAPE) / 2
    away = rng.normal(size=(400, *SHAPE))
    lengths = RADIUS * np.linspace(0, 1, 400)[:, None, None]
    away *= lengths / np.linalg.norm(away, axis=(1, 2), keepdims=True)
    flat = lambda v: loss(v.reshape(SHAPE))
    with jax.enable_x64(True):
        hessians = jax.jit(jax.vmap(jax.hessian(flat)))((start + away).reshape(400, -1))
    return Problem(loss, start, 1.1 * np.abs(np.linalg.eigvalsh(np.asarray(hessians))).max())


RADIUS = 6.0  # of the ball around the network's start
PROBLEMS = {f.__name__: functools.cache(f) for f in (quadratic, logistic, network)}

CONVERGING = (1.875, -1.25, 0.375)
MU = 0.1  # smoothing, and Adam's epsilon
# Each kinetic energy and the Lipschitz constant of its gradient (an upper bound for p above 2).
KINETICS = {
    "heavy_ball": (osub.heavy_ball(0.9), 1 / 0.1),
    "nesterov": (osub.nesterov(0.9), 1 / 0.1),
    "adam": (osub.adam_kinetic(0.9, 0.99, MU, bias_correction=False), 1 / MU),
    "lion": (osub.lion_kinetic(smoothing=MU), 1 / MU),
    "l3": (osub.lion_k(3, smoothing=MU), 3 / MU),
    "linf": (osub.lion_k("linf", smoothing=MU), 1 / MU),
    "frobenius": (osub.lion_k("frobenius", smoothing=MU), 1 / MU),
    "nuclear": (
        osub.lion_k("nuclear", smoothing=MU, coefficients=CONVERGING, steps=20),
        1 / MU,
    ),
}
SHARP = {
    "sign": osub.lion_kinetic(),
    "l1.5": osub.lion_k(1.5),
    "linf": osub.lion_k("linf"),
    "frobenius": osub.lion_k("frobenius"),
    "nuclear": osub.lion_k("nuclear", coefficients=CONVERGING, steps=30),
}


def worst(gradient, basis, state):
    """The basis of this rank that captures least of this very gradient."""
    return jnp.linalg.eigh(gradient @ gradient.T)[1][:, : basis.shape[1]], state


PROJECTORS = {
    "fixed": osub.fixed(np.linalg.qr(np.random.default_rng(3).normal(size=(6, 2)))[0]),
    "svd": osub.svd(7),
    "online_pca": osub.online_pca(),
    "random": osub.random_projection(1),
    "adversarial": osub.Projector(lambda key, m, n, rank: (), worst, every=1),
}


class Path(NamedTuple):
    """What was measured at each step of a run, all float64 (steps,)."""

    change: np.ndarray  # of H
    change_at_half: np.ndarray  # of H by a step from the same state with half the learning rate
    first_order: np.ndarray  # the part of it that is linear in the learning rate, over it
    predicted: np.ndarray
    curvature: np.ndarray  # of the loss along the step, what is not linear
    step: np.ndarray  # |W' - W|^2
    gradient: np.ndarray  # norm
    inside: np.ndarray  # norm of what the basis sees of it
    away: np.ndarray  # distance from the start
    basis: np.ndarray  # largest singular value


@functools.cache
def run(problem, kinetic, projector, rate, steps=150):
    loss, start, _ = PROBLEMS[problem]()
    tx = osub.scale_by_subspace(
        osub.scale_by_hamiltonian_descent(kinetic), rank=2, projector=projector, side="left"
    )

    def step(carry, _):
        w, state = carry
        old = w["w"]
        value, g = jax.value_and_grad(loss)(w["w"])
        before = osub.hamiltonian(value, state, tx, w, rate)
        updates, new = tx.update({"w": g}, state, w)
        u = updates["w"]
        after = osub.hamiltonian(loss(old - rate * u), new, tx, w, rate, previous=before)
        half_before = osub.hamiltonian(value, state, tx, w, rate / 2)
        half_loss = loss(old - rate / 2 * u)
        half = osub.hamiltonian(half_loss, new, tx, w, rate / 2, previous=half_before)
        state = new
        slope = (after.kinetic - before.kinetic) / rate - jnp.sum(g * u)
        (basis,) = state.projection.leaves["w"].bases
        w = {"w": old - rate * u}
        return (w, state), Path(
            -after.dissipation,
            -half.dissipation,
            slope,
            after.predicted,
            after.potential - value + rate * jnp.sum(g * u),
            jnp.sum((rate * u) ** 2),
            jnp.linalg.norm(g),
            jnp.linalg.norm(basis.T @ g),
            jnp.linalg.norm(w["w"] - start),
            jnp.linalg.norm(basis, 2),
        )

    with jax.enable_x64(True):
        w = {"w": jnp.asarray(start)}
        go = jax.jit(lambda w, state: jax.lax.scan(step, (w, state), None, length=steps)[1])
        path = go(w, tx.init(w))
    assert all(x.dtype == jnp.float64 for x in path)
    return Path(*map(np.asarray, path))


def check_order(path, smoothness):
    """``H(t+1) - H(t) <= C lr^2``, with ``C`` derived and the order shown."""
    scale = np.abs(path.change).max()
    assert np.all(path.first_order <= 1e-9 * scale)
    assert np.all(path.curvature <= smoothness / 2 * path.step + 1e-12)
    assert np.all(path.change <= smoothness / 2 * path.step + 1e-9 * scale)
    # What two halves of a step miss of the whole is of second order: half of the curvature.
    second = path.change - 2 * path.change_at_half
    seen = np.abs(path.curvature) > max(1e-12, 1e-3 * np.abs(path.curvature).max())
    assert seen.sum() > 5
    assert np.median(second[seen] / path.curvature[seen]) == pytest.approx(0.5, abs=0.04)


def check_descent(path):
    """``H`` does not grow, and falls in all."""
    assert np.all(path.change <= 1e-12)
    assert path.change.sum() < -1e-3


def largest_step(kinetic, lipschitz, smoothness, basis=1.0):
    """Below it no step lets ``H`` grow."""
    bound = 2 / (lipschitz * smoothness * basis**2)
    if kinetic.squares is not None:
        # Adam's K grows by 1 / sqrt(b2) - 1 at most as its squares decay: so much less is left.
        b1, b2 = 1 - kinetic.damping, kinetic.squares
        bound *= 1 - b1 / (1 - b1) * (b2**-0.5 - 1) / 2
    return bound


# Of all combinations each kinetic energy, projector and problem several times; the others if slow.
ALL = itertools.product(enumerate(PROBLEMS), enumerate(KINETICS), enumerate(PROJECTORS))
CASES = [
    pytest.param(
        problem, kinetic, projector, marks=[] if (i + j + k) % 5 == 0 else [pytest.mark.slow]
    )
    for (i, problem), (j, kinetic), (k, projector) in ALL
]


@pytest.mark.parametrize(("problem", "kinetic", "projector"), CASES)
def test_the_hamiltonian_falls(problem, kinetic, projector):
    energy, lipschitz = KINETICS[kinetic]
    smoothness = PROBLEMS[problem]().smoothness
    # (The columns of online PCA are far from orthonormal at so small a size.)
    allowed = 1.25 if projector == "online_pca" else 1.0
    rate = 0.99 * largest_step(energy, lipschitz, smoothness, allowed)
    path = run(problem, energy, PROJECTORS[projector], rate)
    assert path.basis.max() <= allowed + 1e-6  # (`fixed` was given in float32)
    assert problem != "network" or path.away.max() < RADIUS
    check_order(path, smoothness)
    check_descent(path)
    if energy.lookahead is None and energy.squares is None:
        # Here the theorem's own dissipation bounds the change from above.
        scale = np.abs(path.change).max()
        assert np.all(path.change + path.predicted <= path.curvature + 1e-9 * scale)
        assert np.all(path.predicted >= 0)


@pytest.mark.parametrize("kinetic", SHARP)
@pytest.mark.parametrize(
    "projector", ["random", pytest.param("online_pca", marks=pytest.mark.slow)]
)
def test_the_order_needs_no_smooth_kinetic_energy(kinetic, projector):
    """Of a norm, whose gradient jumps: the change of first order is a matter of convexity alone."""
    path = run("quadratic", SHARP[kinetic], PROJECTORS[projector], 0.02)
    check_order(path, PROBLEMS["quadratic"]().smoothness)


def growth(kinetic, projector, rate):
    """The most that ``H`` grows by in a step, once the method is where it ends."""
    return run("quadratic", kinetic, PROJECTORS[projector], rate, 4000).change[-1000:].max()


@pytest.mark.parametrize(
    ("kinetic", "projector"),
    [("sign", "random"), pytest.param("nuclear", "random", marks=pytest.mark.slow)],
)
def test_halving_the_learning_rate_quarters_what_the_energy_grows_by(kinetic, projector):
    grown = [growth(SHARP[kinetic], projector, rate) for rate in (0.02, 0.01, 0.005)]
    assert all(g > 0 for g in grown)
    assert 3 < grown[0] / grown[1] < 5.3
    assert 3 < grown[1] / grown[2] < 5.3


def test_without_convexity_it_only_halves():
    """The jump between two constant slopes, the wrong way round: of first order."""
    wrong = osub.Kinetic(lambda s, *_: -jnp.sum(jnp.abs(s)), lambda s, *_: -jnp.sign(s))
    first = [
        run("quadratic", wrong, PROJECTORS["random"], r, 20).change.max() for r in (4e-4, 2e-4)
    ]
    assert first[0] / first[1] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    ("kinetic", "projector"),
    [("sign", "random"), pytest.param("frobenius", "svd", marks=pytest.mark.slow)],
)
def test_a_norm_ends_within_the_order_of_the_learning_rate(kinetic, projector):
    tails = [
        run("quadratic", SHARP[kinetic], PROJECTORS[projector], rate, 4000).gradient[-500:].mean()
        for rate in (0.02, 0.01, 0.005)
    ]
    assert 1.5 < tails[0] / tails[1] < 2.5
    assert 1.5 < tails[1] / tails[2] < 2.5


# Those whose bases come to see all that is left of the gradient.
@pytest.mark.parametrize("projector", ["svd", "online_pca", "random"])
@pytest.mark.parametrize(
    ("problem", "kinetic"),
    [
        ("quadratic", "heavy_ball"),
        pytest.param("quadratic", "adam", marks=pytest.mark.slow),
        pytest.param("quadratic", "nuclear", marks=pytest.mark.slow),
        pytest.param("logistic", "nesterov", marks=pytest.mark.slow),
        ("logistic", "lion"),
    ],
)
def test_the_gradient_vanishes_where_the_span_is_exciting(problem, kinetic, projector):
    energy, lipschitz = KINETICS[kinetic]
    rate = 0.5 * largest_step(energy, lipschitz, PROBLEMS[problem]().smoothness, 1.25)
    path = run(problem, energy, PROJECTORS[projector], rate, 4000)
    check_descent(path)
    assert path.gradient[-50:].max() < 1e-3 * path.gradient[0]


@pytest.mark.slow
@pytest.mark.parametrize(("projector", "limit"), [("svd", 1e-3), ("random", 1e-2)])
def test_the_networks_gradient_vanishes_too(projector, limit):
    """It is not convex, and flat near its minimum: what is left falls as the steps go on."""
    energy, lipschitz = KINETICS["nesterov"]
    rate = 0.5 * largest_step(energy, lipschitz, PROBLEMS["network"]().smoothness)
    path = run("network", energy, PROJECTORS[projector], rate, 40_000)
    assert path.away.max() < RADIUS
    check_descent(path)
    norms = path.gradient / path.gradient[0]
    assert norms[-50:].max() < limit
    assert norms[-50:].mean() < norms[20_000:20_050].mean() / 2


def test_a_fixed_span_leaves_the_rest_of_the_gradient():
    energy, lipschitz = KINETICS["heavy_ball"]
    rate = 0.5 * largest_step(energy, lipschitz, PROBLEMS["quadratic"]().smoothness)
    path = run("quadratic", energy, PROJECTORS["fixed"], rate, 2000)
    check_descent(path)
    assert path.inside[-1] < 1e-6 * path.inside[0]
    assert path.gradient[-1] > 0.1 * path.gradient[0]


exact = functools.partial(osub.lion_k, "nuclear", coefficients=CONVERGING, steps=30)
# A method, what it is by the theory, and a learning rate.
DEPARTURES = {
    # Newton-Schulz of Muon's coefficients takes less of a singular value than the norm tells.
    "muon": (
        osub.lion_k("nuclear", 0.95, 0.95, bias_correction=True),
        exact(0.95, 0.95),
        1e-3,
    ),
    "muon with look-ahead": (
        osub.lion_k("nuclear", 0.95**2, 0.95, bias_correction=True),
        exact(0.95**2, 0.95),
        1e-3,
    ),
    # A look-ahead whose parts are corrected is no point between the momenta and the gradient.
    "corrected look-ahead": (
        osub.lion_k(1, 0.95**2, 0.95, smoothing=1.0, bias_correction=True),
        osub.lion_k(1, 0.95**2, 0.95, smoothing=1.0),
        0.1,
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "muon with look-ahead"))
        for name in DEPARTURES
    ],
)
def test_where_a_method_departs_the_energy_grows_a_little(name):
    """As the docs say: in the first steps, with the worst bases; in all it falls nevertheless."""
    departing, ideal, rate = DEPARTURES[name]
    smoothness = PROBLEMS["quadratic"]().smoothness
    worst = run("quadratic", departing, PROJECTORS["adversarial"], rate)
    assert worst.first_order.max() > 1e-2
    for path in (worst, run("quadratic", departing, PROJECTORS["random"], rate)):
        assert np.all(path.first_order[20:] <= 0)
        assert path.change.sum() < 0
    check_order(run("quadratic", ideal, PROJECTORS["adversarial"], rate), smoothness)


COUNTER_EXAMPLES = {
    "wrong sign": osub.Kinetic(lambda s, *_: -jnp.sum(s**2) / 2),
    "not convex": osub.Kinetic(lambda s, *_: jnp.sum(1 - jnp.cos(3 * s)) / 9),
    "not the gradient of the energy": osub.heavy_ball(0.9)._replace(
        gradient=lambda s, *_: s[::-1] / 0.1
    ),
}


@pytest.mark.parametrize("name", COUNTER_EXAMPLES)
def test_what_is_no_hamiltonian_descent_fails(name):
    path = run("quadratic", COUNTER_EXAMPLES[name], PROJECTORS["svd"], 0.01)
    with pytest.raises(AssertionError):
        check_order(path, PROBLEMS["quadratic"]().smoothness)
    with pytest.raises(AssertionError):
        check_descent(path)
