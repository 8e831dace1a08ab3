"""Hamiltonian descent: equal to optax where they coincide, and measured in every composition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_subspace as osub
from tests import trees

CONVERGING = (1.875, -1.25, 0.375)
PEERS = {
    "heavy_ball": (osub.heavy_ball(0.8), optax.trace(0.8)),
    "nesterov": (osub.nesterov(0.8), optax.trace(0.8, nesterov=True)),
    "adam": (osub.adam_kinetic(), optax.scale_by_adam()),
    "lion": (osub.lion_kinetic(0.8, 0.95), optax.scale_by_lion(0.8, 0.95)),
}


def matrices(dtype=jnp.float32):
    return {name: trees.params(dtype)[name] for name in ("tall", "wide", "square")}


def trajectory(tx, params, steps=6):
    """The updates of some steps under one jitted update, and the last state."""
    update, state, out = jax.jit(tx.update), tx.init(params), []
    for step in range(steps):
        updates, state = update(trees.grads(params, 0.7 * step), state, params)
        out.append(updates)
    return out, state


def assert_close(got, expected, rtol=1e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("adam", "full in float64"),
        *((name, "subspace") for name in PEERS),
        *(pytest.param(name, "full", marks=pytest.mark.slow) for name in PEERS),
    ],
)
def test_equals_optax(name, where):
    kinetic, peer = PEERS[name]
    ours = osub.scale_by_hamiltonian_descent(kinetic)
    if where == "subspace":
        wrap = lambda tx: osub.scale_by_subspace(tx, rank=4, projector=osub.svd(3))
        ours, peer = wrap(ours), wrap(peer)
    dtype = jnp.float64 if "64" in where else jnp.float32
    with jax.enable_x64(dtype == jnp.float64):
        params = matrices(dtype) | {"bias": trees.params(dtype)["bias"]}
        assert_close(trajectory(ours, params)[0], trajectory(peer, params)[0])


def test_equals_muon():
    with jax.enable_x64(True):  # in float32 the products' rounding is above 1e-6
        equals_muon(matrices(jnp.float64))


def equals_muon(params):
    dimensions = jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)
    for nesterov, b1 in ((True, 0.95**2), (False, 0.95)):
        peer = optax.contrib.scale_by_muon(nesterov=nesterov, weight_dimension_numbers=dimensions)
        kinetic = osub.lion_k("nuclear", b1, 0.95, eps=1e-8, bias_correction=True)
        ours = osub.scale_by_hamiltonian_descent(kinetic)
        for size in (1.0, 1e-4, 1e-9):
            small = lambda updates, state, params, tx, size=size: tx.update(
                jax.tree.map(lambda g: size * g, updates), state, params
            )
            results = [
                trajectory(tx._replace(update=functools.partial(small, tx=tx)), params)[0]
                for tx in (ours, peer)
            ]
            assert_close(*results)
    # The whole optimizer, which scales wide matrices besides.
    square = {"square": params["square"]}
    ours = optax.chain(
        osub.scale_by_hamiltonian_descent(
            osub.lion_k("nuclear", 0.9, 0.9, eps=1e-8, bias_correction=True)
        ),
        optax.scale(-1),
    )
    peer = optax.contrib.muon(1.0, beta=0.9, nesterov=False)
    assert_close(trajectory(ours, square)[0], trajectory(peer, square)[0])


SMOOTH = {
    "heavy_ball": osub.heavy_ball(),
    "lion": osub.lion_kinetic(smoothing=0.1),
    "l1.5": osub.lion_k(1.5, smoothing=0.1),
    "l3": osub.lion_k(3, smoothing=0.1),
    "linf": osub.lion_k("linf", smoothing=0.1),
    "frobenius": osub.lion_k("frobenius", smoothing=0.1),
    "nuclear": osub.lion_k("nuclear", smoothing=0.1, coefficients=CONVERGING, steps=25),
}
SHARP = {
    "lion": osub.lion_kinetic(),
    "l1.5": osub.lion_k(1.5),
    "l3": osub.lion_k(3),
    "linf": osub.lion_k(np.inf),
    "frobenius": osub.lion_k("l2"),
    "nuclear": osub.lion_k("nuclear", coefficients=CONVERGING, steps=40),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(
    "shape", [(2, 3, 5), (6,), *(pytest.param(s, marks=pytest.mark.slow) for s in ((4, 3), ()))]
)
def test_the_gradient_is_that_of_the_energy(name, shape):
    for kinetic in (SMOOTH[name], SHARP.get(name, SMOOTH[name])):
        with jax.enable_x64(True):
            s = jnp.asarray(np.random.default_rng(1).normal(size=shape))
            expected = jax.grad(kinetic.energy)(s, None, None)
            got = kinetic.gradient(s, None, None)
            assert got.shape == shape and got.dtype == s.dtype
            np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-8)
            # Least at zero, and convex between any two momenta.
            zero = jnp.zeros_like(s)
            assert abs(float(kinetic.energy(zero, None, None))) < 1e-12
            np.testing.assert_allclose(kinetic.gradient(zero, None, None), zero, atol=1e-12)
            other = jnp.asarray(np.random.default_rng(2).normal(size=shape))
            middle = kinetic.energy((s + other) / 2, None, None)
            ends = kinetic.energy(s, None, None) + kinetic.energy(other, None, None)
            assert float(middle) <= float(ends) / 2 + 1e-12


@pytest.mark.parametrize("name", SHARP)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norms_neither_overflow_nor_vanish(name, size):
    s = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
    at_one = SHARP[name].gradient(s, None, None)
    np.testing.assert_allclose(SHARP[name].gradient(size * s, None, None), at_one, atol=2e-5)


def test_without_any_memory():
    """Decays of zero, as optax takes them."""
    params = matrices()
    square = {"square": params["square"]}
    pairs = [
        (osub.heavy_ball(0.0), optax.trace(0.0), params),
        (osub.adam_kinetic(0.0, 0.0), optax.scale_by_adam(0.0, 0.0), params),
        (osub.lion_kinetic(0.0, 0.0), optax.scale_by_lion(0.0, 0.0), params),
        (
            osub.lion_k("nuclear", 0.0, 0.0, eps=1e-8, bias_correction=True),
            optax.contrib.scale_by_muon(
                beta=0.0,
                weight_dimension_numbers={"square": optax.contrib.MuonDimensionNumbers()},
            ),
            square,
        ),
    ]
    for kinetic, peer, leaves in pairs:
        ours = osub.scale_by_hamiltonian_descent(kinetic)
        got, expected = (trajectory(tx, leaves, 3)[0] for tx in (ours, peer))
        assert_close(got, expected, 2e-5 if leaves is square else 1e-6)


def test_the_momentum_is_kept_in_the_dtype_asked_for():
    tx = osub.scale_by_hamiltonian_descent(
        osub.adam_kinetic(), mu_dtype=jnp.bfloat16, nu_dtype=jnp.float16
    )
    params = {"w": jnp.ones((4, 3))}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state)
    assert (state.mu["w"].dtype, state.nu["w"].dtype) == (jnp.bfloat16, jnp.float16)
    assert updates["w"].dtype == jnp.float32


def test_a_kinetic_energy_without_a_gradient():
    given = osub.heavy_ball(0.5)
    derived = given._replace(gradient=None)
    params = matrices()
    transform = osub.scale_by_hamiltonian_descent
    assert_close(trajectory(transform(derived), params)[0], trajectory(transform(given), params)[0])


def test_the_damping_can_be_given():
    params = matrices()
    tx = osub.scale_by_hamiltonian_descent(osub.lion_k("l2"), damping=0.5)
    _, state = trajectory(tx, params, 1)
    assert_close(state.mu, jax.tree.map(lambda g: 0.5 * g, trees.grads(params)))


def expected_energy(mu, factors, kinetic, rate):
    c = kinetic.damping if kinetic.lookahead is None else kinetic.lookahead
    total = sum(factors[k] * float(kinetic.energy(m, None, None)) for k, m in mu.items())
    return rate * (1 - c) / kinetic.damping * total


@pytest.mark.parametrize("spelling", ["pure", "chain", "masked", "jit"])
def test_the_hamiltonian_is_the_sum_over_the_leaves(spelling):
    kinetic = osub.lion_k("frobenius", 0.7, 0.9)
    momentum = osub.scale_by_hamiltonian_descent(kinetic)
    rules = [("wide", osub.MatrixSpec(scale=0.5))]
    rules += [("square", None)] if spelling != "masked" else []
    schedule = lambda step: 1.0 + step
    settings = {"rank": 4, "rules": rules, "scale": schedule}
    if spelling == "chain":
        tx = optax.chain(osub.subspace_project(**settings), osub.in_subspace(momentum))
    else:
        tx = osub.scale_by_subspace(momentum, **settings)
    if spelling == "masked":
        tx = optax.masked(tx, {"tall": True, "wide": True, "square": False})
    tx = optax.chain(tx, optax.scale(-0.1))
    params = matrices()
    _, state = trajectory(tx, params, 3)
    mu = next(
        n.mu
        for n in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, osub.HamiltonianState))
        if isinstance(n, osub.HamiltonianState)
    )
    measure = lambda loss, state: osub.hamiltonian(loss, state, tx, params, 0.1)
    found = (jax.jit(measure) if spelling == "jit" else measure)(2.0, state)
    # The third step, counted from zero as optax does, has the scale 3.
    factors = {"tall": 3.0, "wide": 0.5, "square": 1.0}
    inside = {k: m for k, m in mu.items() if hasattr(m, "shape")}
    energy = expected_energy(inside, factors, kinetic, 0.1)
    np.testing.assert_allclose(found.kinetic, energy, rtol=1e-6)
    np.testing.assert_allclose(found.total, 2.0 + energy, rtol=1e-6)
    assert float(found.potential) == 2.0 and np.isnan(found.dissipation)
    assert all(x.shape == () and x.dtype == jnp.float32 for x in found)


def test_the_hamiltonian_of_an_nnx_optimizer():
    tx = osub.scale_by_subspace(osub.scale_by_hamiltonian_descent(osub.heavy_ball()), rank=2)
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, gradients)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params))[1]
    expected = osub.hamiltonian(1.0, state, tx, params, 0.1)
    got = osub.hamiltonian(1.0, optimizer.opt_state, tx, params, 0.1)
    np.testing.assert_allclose(got.total, expected.total, rtol=1e-6)
    assert float(got.kinetic) > 0


@pytest.mark.parametrize("storage", ["8 bits", "float16"])
def test_squares_that_storage_has_lost_do_not_blow_the_energy_up(storage):
    kinetic = osub.adam_kinetic()
    noise = jax.random.normal(jax.random.key(0), (96, 64))
    params = {"w": noise * jnp.exp(2 * noise) * (1e-3 if storage == "float16" else 1)}
    exact = osub.scale_by_hamiltonian_descent(kinetic)
    stored = (
        osub.quantize_state(exact)
        if storage == "8 bits"
        else osub.scale_by_hamiltonian_descent(kinetic, nu_dtype=jnp.float16)
    )
    energies = []
    for tx in (exact, stored):
        update, state = jax.jit(tx.update), tx.init(params)
        for step in range(4):
            _, state = update(jax.tree.map(lambda p, s=step: p * jnp.cos(0.7 * s), params), state)
        energies.append(float(osub.hamiltonian(0.0, state, tx, params, 1.0).kinetic))
    assert energies[1] == pytest.approx(energies[0], rel=0.2)


def test_squares_that_nothing_has_lost_are_taken_as_they_are():
    """Turned moments are means of no one gradient, whose squares would bound them."""
    kinetic = osub.adam_kinetic()
    inner = osub.scale_by_hamiltonian_descent(kinetic)
    random = osub.random_projection(2)
    tx = osub.scale_by_subspace(inner, rank=4, projector=random, moments="project")
    params = {"tall": matrices()["tall"]}
    _, state = trajectory(tx, params, 9)
    mu, nu = (getattr(state.inner, name)["tall"] for name in ("mu", "nu"))
    weights = (1 - 0.9**9, 1 - 0.999**9)
    expected = 9 * float(kinetic.energy(mu, nu, weights))  # (1 - 0.1) / 0.1
    found = osub.hamiltonian(0.0, state, tx, params, 1.0)
    np.testing.assert_allclose(found.kinetic, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "nesterov", "lion"])
def test_in_eight_bits_the_energy_is_nearly_the_same(name):
    kinetic, _ = PEERS[name]
    inner = osub.scale_by_hamiltonian_descent(kinetic)
    params = {"w": jax.random.normal(jax.random.key(0), (96, 64))}
    results = []
    for tx in (inner, osub.quantize_state(inner, min_size=64)):
        tx = osub.scale_by_subspace(tx, rank=16)
        before = tx.init(params)
        updates, state = trajectory(tx, params, 4)
        assert jax.tree.structure(before) == jax.tree.structure(state)
        results.append((updates[-1]["w"], osub.hamiltonian(0.0, state, tx, params, 0.1)))
    assert "uint8" in {str(x.dtype) for x in jax.tree.leaves(state)}
    (exact, energy), (stored, found) = results
    error = np.linalg.norm(stored - exact) / np.linalg.norm(exact)
    # (A sign is another one where the momentum is about zero.)
    assert 0 < error < (0.3 if name == "lion" else 0.05)
    np.testing.assert_allclose(found.kinetic, energy.kinetic, rtol=0.05)
    np.testing.assert_allclose(found.predicted, energy.predicted, rtol=0.05)


@pytest.mark.parametrize(
    "name",
    [
        "adam",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("nuclear", "lion", "nesterov", "frobenius")
        ),
    ],
)
def test_in_the_fused_step(name):
    kinetic = PEERS[name][0] if name in PEERS else osub.lion_k(name, 0.9, 0.9)
    rules = [("layers", osub.MatrixSpec(-2, -1)), (".*", None)]
    tx = optax.chain(
        osub.scale_by_subspace(
            osub.scale_by_hamiltonian_descent(kinetic), rank=3, rules=rules, scale=0.5
        ),
        optax.scale(-0.01),
    )
    key = jax.random.key(0)
    params = {
        "embed": jnp.eye(6, 8),
        "layers": {"w": jax.random.normal(key, (3, 8, 8)) / 3},
        "head": jnp.ones((8, 1)),
    }
    embed = lambda rest, batch: batch @ rest["embed"]
    block = lambda layer, x: jnp.tanh(x @ layer["w"])
    loss = lambda rest, x, batch: jnp.mean((x @ rest["head"] - 1) ** 2)
    fused = osub.fused_backward(embed, block, loss, tx)

    def whole(params, batch):
        x = embed(params, batch)
        for i in range(3):
            x = block(jax.tree.map(lambda a, i=i: a[i], params["layers"]), x)
        return loss(params, x, batch)

    batch = jax.random.normal(key, (5, 6))
    step, plain, fused_params = jax.jit(fused.step), jax.jit(jax.value_and_grad(whole)), params
    state, fused_state = tx.init(params), fused.init(params)
    for _ in range(3):
        value, gradients = plain(params, batch)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        fused_params, fused_state, metrics = step(fused_params, fused_state, batch)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    # (Adam divides by roots of small squares: rounding of either is a few 1e-5 of a parameter.)
    assert_close(fused_params, params, 5e-5)
    measure = jax.jit(lambda state: osub.hamiltonian(value, state, tx, params, 0.01))
    got, expected = measure(fused_state), measure(state)
    np.testing.assert_allclose(got[1:4], expected[1:4], rtol=1e-4)
    assert float(got.kinetic) > 0


def test_optax_states_are_measured_with_a_given_energy():
    kinetic, peer = PEERS["adam"]
    params = matrices()
    ours = osub.scale_by_subspace(osub.scale_by_hamiltonian_descent(kinetic), rank=4)
    theirs = osub.scale_by_subspace(peer, rank=4)
    expected = osub.hamiltonian(1.0, trajectory(ours, params)[1], ours, params, 0.1)
    state = trajectory(theirs, params)[1]
    got = osub.hamiltonian(1.0, state, theirs, params, 0.1, kinetic=kinetic)
    np.testing.assert_allclose(got[:4], expected[:4], rtol=1e-5)
    with pytest.raises(ValueError, match="kinetic=adam_kinetic"):
        osub.hamiltonian(1.0, state, theirs, params, 0.1)


@pytest.mark.parametrize("alias", ["galore", "online_subspace_descent", "galore_adamw8bit"])
def test_the_aliases_can_be_measured(alias):
    tx = getattr(osub, alias)(0.01, rank=4, rules=[("tall", None)])
    params = matrices()
    state = tx.init(params)
    assert float(osub.hamiltonian(3.0, state, tx, params, 0.01).total) == 3.0
    _, state = tx.update(params, state, params)
    found = osub.hamiltonian(3.0, state, tx, params, 0.01)
    assert np.isfinite(found[:4]).all() and float(found.kinetic) > 0


def test_errors_tell_what_to_do():
    params = matrices()
    with pytest.raises(TypeError, match=r"heavy_ball\(0.9\), got 0.9"):
        osub.scale_by_hamiltonian_descent(0.9)
    with pytest.raises(ValueError, match=r"damping must be a number within \(0, 1\], got 0"):
        osub.scale_by_hamiltonian_descent(osub.heavy_ball(), damping=0)
    with pytest.raises(ValueError, match=r"heavy_ball: decay must be within \[0, 1\), got 1"):
        osub.heavy_ball(1)
    with pytest.raises(ValueError, match="adam_kinetic: eps must be positive"):
        osub.adam_kinetic(eps=0.0)
    with pytest.raises(ValueError, match="unknown norm 'spectral': give a number"):
        osub.lion_k("spectral")
    with pytest.raises(ValueError, match="unknown norm 0.5"):
        osub.lion_k(0.5)
    with pytest.raises(ValueError, match="smoothing must be a number of at least 0"):
        osub.lion_kinetic(smoothing=-1)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        osub.lion_k("nuclear", steps=0)
    tx = optax.scale(1.0)
    with pytest.raises(ValueError, match="no scale_by_hamiltonian_descent"):
        osub.hamiltonian(1.0, tx.init(params), tx, params, 0.1)
    with pytest.raises(ValueError, match="holds no momentum"):
        osub.hamiltonian(1.0, tx.init(params), tx, params, 0.1, kinetic=osub.heavy_ball())
    for alias in (osub.apollo, osub.fira):
        tx = alias(0.1, rank=2)
        with pytest.raises(ValueError, match="APOLLO and Fira move weights by the gradient"):
            osub.hamiltonian(1.0, tx.init(params), tx, params, 0.1)
    one = osub.scale_by_hamiltonian_descent(osub.heavy_ball())
    twice = optax.chain(one, one)
    with pytest.raises(ValueError, match="square has two momenta"):
        osub.hamiltonian(1.0, twice.init(params), twice, params, 0.1)
    other = osub.scale_by_hamiltonian_descent(osub.lion_kinetic())
    labels = {"tall": "a", "wide": "a", "square": "b"}
    parts = optax.multi_transform({"a": one, "b": other}, labels)
    with pytest.raises(ValueError, match="2 different kinetic energies"):
        osub.hamiltonian(1.0, parts.init(params), parts, params, 0.1)
    parts = optax.multi_transform({"a": one, "b": optax.scale_by_adam()}, labels)
    mixed = parts.init(params)
    for given in (None, osub.heavy_ball()):
        with pytest.raises(ValueError, match="a ScaleByAdamState beside a HamiltonianState"):
            osub.hamiltonian(1.0, mixed, parts, params, 0.1, kinetic=given)
    muon = optax.contrib.muon(0.1)
    leaves = {"matrix": params["tall"], "vector": jnp.ones(3)}
    with pytest.raises(ValueError, match="beside a .*, momenta of different transformations"):
        osub.hamiltonian(
            1.0, muon.init(leaves), muon, leaves, 0.1, kinetic=osub.lion_k("nuclear", 0.95, 0.95)
        )
    inside = osub.scale_by_subspace(one, rank=2)
    for state, tx, there in ((one, inside, "tx"), (inside, one, "the state")):
        with pytest.raises(ValueError, match=f"square is projected by {there} and not by"):
            osub.hamiltonian(1.0, state.init(params), tx, params, 0.1, kinetic=osub.heavy_ball())
    adam = optax.scale_by_adam().init(params)
    with pytest.raises(ValueError, match="holds a ScaleByAdamState, tx the momentum of a"):
        osub.hamiltonian(1.0, adam, one, params, 0.1)
    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(3,\)"):
        osub.hamiltonian(jnp.ones(3), one.init(params), one, params, 0.1)
    with pytest.raises(TypeError, match="got a schedule: give its value"):
        osub.hamiltonian(1.0, one.init(params), one, params, optax.constant_schedule(0.1))
    with pytest.raises(TypeError, match="previous must be what hamiltonian returned, got 3.0"):
        osub.hamiltonian(1.0, one.init(params), one, params, 0.1, previous=3.0)
    with pytest.raises(ValueError, match="damping must be a number within"):
        osub.scale_by_hamiltonian_descent(osub.heavy_ball(), damping=optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="damping=1 keeps nothing of the momentum"):
        osub.scale_by_hamiltonian_descent(osub.lion_k(2, bias_correction=True), damping=1.0)
    with pytest.raises(TypeError, match="mu_dtype must be a floating-point dtype, got int8"):
        osub.scale_by_hamiltonian_descent(osub.heavy_ball(), mu_dtype=jnp.int8)
    with pytest.raises(TypeError, match=r"static_args=\('norm', ...\)"):
        osub.lion_k(jnp.float32(2))
    with pytest.raises(ValueError, match="means of squares"):
        osub.hamiltonian(1.0, one.init(params), one, params, 0.1, kinetic=osub.adam_kinetic())
    with pytest.raises(TypeError, match="kinetic must be a Kinetic"):
        osub.hamiltonian(1.0, one.init(params), one, params, 0.1, kinetic=osub.adam_kinetic)
    with pytest.raises(TypeError, match="parameter w has dtype complex64"):
        one.init({"w": jnp.ones(3, jnp.complex64)})
    with pytest.raises(TypeError, match="smoothing must be a Python number"):
        osub.lion_kinetic(smoothing=jnp.float32(0.1))
    injected = optax.inject_hyperparams(osub.scale_by_hamiltonian_descent)(
        osub.heavy_ball(), damping=0.2
    )
    _, state = injected.update(params, injected.init(params))
    with pytest.raises(ValueError, match="with the numbers that it has, as kinetic="):
        osub.hamiltonian(1.0, state, injected, params, 0.1)
    kinetic = osub.heavy_ball()._replace(damping=0.2)
    found = osub.hamiltonian(1.0, state, injected, params, 0.1, kinetic=kinetic)
    assert float(found.kinetic) > 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (osub.heavy_ball(), osub.heavy_ball(decay=0.9)),
        (osub.heavy_ball(np.float64(0.9)), osub.heavy_ball(0.9)),
        (osub.adam_kinetic(0.9), osub.adam_kinetic(b1=0.9, b2=0.999)),
        (osub.lion_kinetic(), osub.lion_k(1)),
        (osub.lion_k("l2"), osub.lion_k("frobenius", b1=0.9)),
        tuple(osub.lion_k("nuclear", coefficients=kind(CONVERGING)) for kind in (list, tuple)),
    ],
)
def test_the_same_numbers_are_the_same_energy(one, other):
    assert one == other
    transform = osub.scale_by_hamiltonian_descent
    labels = {"tall": "a", "wide": "a", "square": "b"}
    parts = optax.multi_transform({"a": transform(one), "b": transform(other)}, labels)
    params = matrices()
    osub.hamiltonian(1.0, parts.init(params), parts, params, 0.1)


@pytest.mark.parametrize("name", SHARP)
def test_odd_leaves(name):
    """Without any value, scalars, and numbers that are no arrays yet."""
    tx = osub.scale_by_hamiltonian_descent(SHARP[name])
    params = {"none": jnp.zeros((0, 4)), "scalar": jnp.float32(2), "number": 1.0}
    updates, state = tx.update(params, tx.init(params))
    assert updates["none"].shape == (0, 4)
    np.testing.assert_allclose([updates["scalar"], updates["number"]], 1, rtol=1e-5)
    assert float(osub.hamiltonian(0.0, state, tx, params, 1.0).kinetic) > 0


def test_between_micro_batches_the_energy_stands_still():
    momentum = osub.scale_by_hamiltonian_descent(osub.heavy_ball())
    tx = osub.scale_by_subspace(momentum, rank=2, scale=lambda step: 1.0 + step, accumulate=3)
    params = {"w": trees.params()["tall"]}
    state, found = tx.init(params), []
    for _ in range(6):
        _, state = tx.update(params, state)
        found.append(float(osub.hamiltonian(0.0, state, tx, params, 1.0).kinetic))
    assert found[0] == found[1] == 0 < found[2] == found[3] == found[4] < found[5]
