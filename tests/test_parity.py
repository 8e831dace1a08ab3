"""Trajectories of GaLore: the published PyTorch code and ``optax.contrib.galore``.

An SVD leaves the sign of each singular vector open, and moments outlive a refresh in the
coordinates of those vectors. So that several refreshes can be compared, the tests let our
projector find the subspace and turn its vectors along the reference's (``follow_signs``); with one
basis for the whole run the update does not depend on the signs and none are followed.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_subspace as osub
from optax_subspace._projectors._svd import align_signs

GOLDEN = pathlib.Path(__file__).parent / "golden" / "galore_adamw.npz"
METHODS = ["gram", "lapack"]


def follow_signs(every, references, method):
    """``svd`` whose k-th basis is turned along ``references[k]`` of shape (m, r)."""
    rule, references = osub.svd(every, method=method), jnp.asarray(references)

    def update(gradient, basis, refresh):
        basis, _ = rule.update(gradient, basis, ())
        return align_signs(basis, references[refresh]), refresh + 1

    return osub.Projector(lambda key, m, n, rank: jnp.zeros([], jnp.int32), update, every)


def relative(ours, theirs):
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "tag, side",
    [
        ("std_gap5_wd0.0", "shorter"),
        ("std_gap5_wd0.1", "shorter"),
        ("std_gap1000_wd0.0", "shorter"),
        ("reverse_std_gap1000_wd0.0", "longer"),
        ("right_gap1000_wd0.0", "right"),
    ],
)
def test_equals_the_published_galore_adamw(golden, tag, side, method):
    every = 5 if "gap5" in tag else 1000
    decay = 0.1 if "wd0.1" in tag else 0.0
    params = {f"w{i}": jnp.asarray(golden[f"init{i}"]) for i in range(3)}
    rules = None
    if every == 5:
        plans = osub.plan(params, rank=4, side=side)
        rules = []
        for i, p in enumerate(plans):
            proj = golden[f"{tag}/proj{i}"][::every]
            columns = proj if p.side == "left" else proj.transpose(0, 2, 1)
            rule = follow_signs(every, columns, method)
            rules.append((p.path, osub.MatrixSpec(projector=rule)))
    tx = osub.galore(
        learning_rate=0.01,
        rank=4,
        projector=osub.svd(every, method=method),
        side=side,
        rules=rules,
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(12):
        grads = {f"w{i}": golden[f"grads{i}"][step] for i in range(3)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        # The published code decays the updated weights; optax decays those before the update.
        params = jax.tree.map(lambda p: p * (1 - 0.01 * decay), params)
        for i in range(3):
            assert relative(params[f"w{i}"], golden[f"{tag}/params{i}"][step]) < 1e-5
            moments = state[0].inner
            mu, nu = np.abs(moments.mu[f"w{i}"]), moments.nu[f"w{i}"]
            assert relative(mu, np.abs(golden[f"{tag}/exp_avg{i}"][step])) < 1e-5
            assert relative(nu, golden[f"{tag}/exp_avg_sq{i}"][step]) < 1e-5


def test_a_flax_kernel_is_the_torch_weight_transposed(golden):
    # Also where it is square: of (inputs, outputs) the inputs, GaLore's side of (outputs, inputs).
    tag = "std_gap1000_wd0.0"
    rules = [("", osub.MatrixSpec(square_side="left"))]
    params = {f"w{i}": jnp.asarray(golden[f"init{i}"].T) for i in range(3)}
    assert [p.side for p in osub.plan(params, rules, rank=4)] == ["right", "left", "left"]
    tx = osub.galore(learning_rate=0.01, rank=4, projector=osub.svd(1000), rules=rules)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(12):
        grads = {f"w{i}": golden[f"grads{i}"][step].T for i in range(3)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for i in range(3):
            assert relative(params[f"w{i}"], golden[f"{tag}/params{i}"][step].T) < 1e-5


SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}


def noisy_gradients(step):
    """Gradients of other singular vectors at each step, with singular values well apart.

    (Where two are close, rounding alone turns their vectors, by more on some machines.)
    """
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), step), len(SHAPES))

    def gradient(key, shape):
        u, v = (jnp.linalg.qr(jax.random.normal(key, (n, min(shape))))[0] for n in shape)
        return (u * 0.85 ** jnp.arange(min(shape))) @ v.T

    return {
        name: gradient(key, shape) for (name, shape), key in zip(SHAPES.items(), keys, strict=True)
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("every", [4, 1000])
def test_equals_optax_contrib_galore(every, method):
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    theirs = optax.contrib.scale_by_galore(rank=8, update_proj_gap=every)
    their_update, their_state = jax.jit(theirs.update), theirs.init(params)
    their_updates, bases = [], []
    for step in range(12):
        u, their_state = their_update(noisy_gradients(step), their_state)
        their_updates.append(u)
        if step % every == 0:
            bases.append(their_state.projector)

    rules = [
        (name, osub.MatrixSpec(projector=follow_signs(every, [b[name] for b in bases], method)))
        for name in SHAPES
    ]
    ours = osub.scale_by_subspace(
        optax.scale_by_adam(),
        rank=8,
        side="longer",
        projector=osub.svd(every, method=method),
        rules=rules if every < 12 else None,
    )
    update, state = jax.jit(ours.update), ours.init(params)
    for step in range(12):
        u, state = update(noisy_gradients(step), state)
        for name in SHAPES:
            assert relative(u[name], their_updates[step][name]) < 1e-5, (step, name)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_equals_the_published_lomo(name, weight_decay):
    with np.load(GOLDEN.with_name("lomo.npz")) as file:
        golden = dict(file)
    tag = f"{name}_wd{weight_decay:g}"
    start = {k.removeprefix("init/"): v for k, v in golden.items() if k.startswith("init/")}
    tx = getattr(osub, name)(0.05, weight_decay=weight_decay)
    params = jax.tree.map(jnp.asarray, start)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(8):
        x, y = golden["X"][step], golden["Y"][step]
        loss, gradients = jax.value_and_grad(lomo_loss)(params, x, y)
        np.testing.assert_allclose(loss, golden[f"{tag}/loss"][step], rtol=1e-5)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for k, value in params.items():
            assert relative(value, golden[f"{tag}/params/{k}"][step]) < 1e-5, (step, k)


def lomo_loss(params, x, y):
    hidden = jnp.tanh(x @ params["0.weight"].T + params["0.bias"])
    return jnp.mean((hidden @ params["2.weight"].T + params["2.bias"] - y) ** 2)


@pytest.mark.parametrize(
    ("tag", "options"),
    [
        ("lomo_clipnorm0.5", {"clip_norm": 0.5}),
        ("lomo_clipval0.05", {"clip_value": 0.05}),
        ("adalomo_clipnorm0.5", {"clip_norm": 0.5}),
    ],
)
def test_fused_clipping_equals_the_published_lomo(tag, options):
    """The first layer as the embedding, the second one as the head, and nothing between."""
    with np.load(GOLDEN.with_name("lomo.npz")) as file:
        golden = dict(file)
    tx = getattr(osub, tag.split("_")[0])(0.05)
    fused = osub.fused_backward(
        lambda rest, batch: jnp.tanh(batch[0] @ rest["0"]["weight"].T + rest["0"]["bias"]),
        lambda layer, x: x + 0 * jnp.sum(layer),
        lambda rest, x, batch: jnp.mean(
            (x @ rest["2"]["weight"].T + rest["2"]["bias"] - batch[1]) ** 2
        ),
        tx,
        **options,
    )
    of = lambda name: {k: jnp.asarray(golden[f"init/{name}.{k}"]) for k in KINDS}
    params = {"0": of("0"), "2": of("2"), "layers": jnp.ones((1, 2))}
    state, step = fused.init(params), jax.jit(fused.step)
    for i in range(8):
        params, state, metrics = step(params, state, (golden["X"][i], golden["Y"][i]))
        np.testing.assert_allclose(metrics.loss, golden[f"{tag}/loss"][i], rtol=1e-5)
        if "clip_norm" in options:
            coefficient = min(1, 0.5 / float(metrics.grad_norm))
            np.testing.assert_allclose(coefficient, golden[f"{tag}/clip_coef"][i], rtol=1e-5)
        for name in ("0", "2"):
            for kind in KINDS:
                expected = golden[f"{tag}/params/{name}.{kind}"][i]
                assert relative(params[name][kind], expected) < 1e-5


KINDS = ("weight", "bias")
