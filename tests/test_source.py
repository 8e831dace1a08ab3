"""Projection at the source equals projecting afterwards, and forms no gradient."""

import doctest
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_subspace as osub
from optax_subspace import MatrixSpec
from optax_subspace._source import AtSource
from tests.trees import assert_close, kernels

RULES = [("layers/", MatrixSpec(-2, -1)), ("experts", MatrixSpec(-2, -1)), ("in|out", None)]
PROJECTORS = {
    "svd": lambda: osub.svd(every=7),
    "lapack": lambda: osub.svd(every=7, method="lapack"),
    "subspace_iteration": lambda: osub.subspace_iteration(every=5, oversample=2),
    "online_pca": osub.online_pca,
    "history_pca": osub.history_pca,
    "oja": osub.oja,
    "random": lambda: osub.random_projection(every=4),
    "adaptive": lambda: osub.adaptive_period(osub.svd(every=3)),
    "from_iteration": lambda: osub.history_pca(first=osub.subspace_iteration()),
}


def make_params(layers=3, width=12, hidden=20):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape) / shape[-2] ** 0.5
    return {
        "in": normal(6, width),
        "layers": {"up": normal(layers, width, hidden), "down": normal(layers, hidden, width)},
        "experts": normal(2, width, width),
        "out": normal(width, 3),
    }


def loss_fn(params, x, y, remat=False):
    """Stacked layers in a scan, experts under vmap, and kernels at full rank around them."""

    def block(x, layer):
        return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None

    x = x @ params["in"]
    x, _ = jax.lax.scan(jax.checkpoint(block) if remat else block, x, params["layers"])
    halves = jnp.stack([x, jnp.tanh(x)])
    x = x + jnp.sum(jax.vmap(lambda x, kernel: x @ kernel)(halves, params["experts"]), axis=0)
    return jnp.mean((x @ params["out"] - y) ** 2)


def data(step, rows=16):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (rows, 5, 6))
    return x, jnp.sin(3 * x[..., :3])


def run(tx, steps, at_source, params=None, remat=False):
    """Losses and the last parameters and state."""
    params = make_params() if params is None else params
    fun = functools.partial(loss_fn, remat=remat)

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(params, state, x, y, refresh=True):
        if at_source:
            grad = osub.subspace_value_and_grad(fun, tx, refresh=refresh)
            value, gradients, source = grad(params, state, x, y)
            updates, state = tx.update(gradients, state, params, source=source)
        else:
            value, gradients = jax.value_and_grad(fun)(params, x, y)
            updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses, left = tx.init(params), [], 0
    for i in range(steps):
        refresh = left == 0
        params, state, value = step(params, state, *data(i), refresh=refresh if at_source else True)
        left = int(osub.steps_to_refresh(state)) if refresh else left - 1
        losses.append(float(value))
    return losses, params, state


FAST = {
    ("svd", "left"),
    ("subspace_iteration", "right"),
    ("online_pca", "both"),
    ("from_iteration", "left"),
}


@pytest.mark.parametrize(
    ("name", "side"),
    [
        pytest.param(name, side, marks=() if (name, side) in FAST else pytest.mark.slow)
        for name in PROJECTORS
        for side in ("left", "right", "both")
    ],
)
def test_equals_projecting_afterwards(name, side):
    tx = osub.scale_by_subspace(
        optax.trace(0.9), rank=3, projector=PROJECTORS[name](), side=side, rules=RULES
    )
    tx = optax.chain(tx, optax.scale_by_learning_rate(0.005))
    remat = name == "online_pca"
    losses, params, state = run(tx, 50, at_source=True, remat=remat)
    expected, there, other = run(tx, 50, at_source=False)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_close(params, there)
    assert losses[-1] < 0.9 * losses[0]
    ours, theirs = state[0].projection, other[0].projection
    for path, leaf in ours.leaves.items():
        for field in ("age", "due", "period", "refreshes"):
            np.testing.assert_array_equal(getattr(leaf, field), getattr(theirs.leaves[path], field))
        # (Between singular values that are near each other rounding turns a basis.)
        np.testing.assert_allclose(leaf.drift, theirs.leaves[path].drift, atol=5e-4)


def stepper(tx, fun, at_source):
    """A jitted step: updates and state."""

    @jax.jit
    def step(params, state, *args):
        if not at_source:
            return tx.update(jax.grad(fun)(params, *args), state, params)
        _, gradients, source = osub.subspace_value_and_grad(fun, tx)(params, state, *args)
        return tx.update(gradients, state, params, source=source)

    return step


def both_ways(tx, fun, params, *args):
    """Updates at the source and afterwards, of two steps."""
    found = []
    for at_source in (True, False):
        step, state = stepper(tx, fun, at_source), jax.jit(tx.init)(params)
        for _ in range(2):
            updates, state = step(params, state, *args)
        found.append(updates)
    return found


def test_attention_of_nnx():
    """Its projections, with several output axes and several reduction axes."""
    of = lambda which: {
        f"{which}_dot_general": osub.source_dot_general,
        f"{which}_promote_dtype": osub.source_promote_dtype,
    }
    layer = nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0), **of("qkv"), **of("out"))
    definition, weights = nnx.split(layer)
    weights = nnx.to_pure_dict(weights)
    axes = [("out/kernel", MatrixSpec((0, 1), 2)), ("kernel", MatrixSpec(0, (1, 2)))]
    tx = osub.galore(1e-2, 4, rules=[*axes, ("bias", None)])
    loss = lambda weights, x: jnp.mean(nnx.merge(definition, weights)(x) ** 2)
    x, state = jax.random.normal(jax.random.key(0), (2, 5, 16)), tx.init(weights)
    _, gradients, source = osub.subspace_value_and_grad(loss, tx)(weights, state, x)
    ours, state = tx.update(gradients, state, weights, source=source)
    theirs, _ = tx.update(jax.grad(loss)(weights, x), tx.init(weights), weights)
    assert_close(ours, theirs, tolerance=1e-4)
    metrics = osub.subspace_metrics(tx, state, gradients)
    assert len(metrics) == 4
    assert all(m.refreshes == 1 and jnp.isnan(m.captured_energy) for m in metrics.values())


def test_layers_of_flax():
    """Through `dot_general` of Linen's and NNX's layers; kernels of several axes too."""
    x = jax.random.normal(jax.random.key(0), (4, 6, 10))
    give = {"dot_general": osub.source_dot_general, "promote_dtype": osub.source_promote_dtype}

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            heads = nn.DenseGeneral((3, 8), name="heads", **give)(x)
            x = nn.DenseGeneral(10, axis=(-2, -1), name="merge", **give)(jnp.tanh(heads))
            return nn.Dense(12, name="out", **give)(x)

    model = Model()
    params = jax.tree.map(lambda p: p, model.init(jax.random.key(1), x)["params"])
    rules = [("heads/kernel", MatrixSpec(0, (1, 2))), ("merge/kernel", MatrixSpec((0, 1), 2))]
    tx = osub.scale_by_subspace(optax.identity(), rank=4, rules=rules)
    fun = lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)
    assert_close(*both_ways(tx, fun, params, x))

    definition, state = nnx.split(nnx.Linear(10, 12, rngs=nnx.Rngs(0), **give))
    fun = lambda state, x: jnp.mean(jnp.sin(nnx.merge(definition, state)(x)))
    tx = osub.scale_by_subspace(optax.identity(), rank=4)
    assert_close(*both_ways(tx, fun, nnx.to_pure_dict(state), x))


def test_the_chain_and_the_optimizers_take_it():
    params = kernels(a=(12, 20), b=(20, 3))
    fun = lambda p, x: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"]) ** 2)
    x = jax.random.normal(jax.random.key(0), (32, 12))
    for tx in (
        optax.chain(
            osub.subspace_project(rank=2), osub.scale_by_adam(), optax.scale_by_learning_rate(0.1)
        ),
        optax.chain(optax.scale(2.0), osub.galore(0.1, 2, weight_decay=0.1)),
        osub.online_subspace_descent(0.1, 2),
        osub.galore(0.1, 2, projector_dtype="linear"),
        optax.masked(osub.galore(0.1, 2), {"a": True, "b": False}),
    ):
        assert_close(*both_ways(tx, fun, params, x), tolerance=1e-4)


@pytest.mark.parametrize("remat", [False, True])
def test_no_gradient_is_formed(remat):
    """No array of a stack's size is made between refreshes, nor one of a layer's gradient."""
    layers, width, hidden = 5, 24, 56
    params = make_params(layers, width, hidden)
    tx = osub.scale_by_subspace(optax.trace(0.9), rank=4, projector=osub.svd(9), rules=RULES)
    fun = functools.partial(loss_fn, remat=remat)

    def program(refresh):
        grad = osub.subspace_value_and_grad(fun, tx, refresh=refresh)
        lowered = jax.jit(lambda p, s, *b: grad(p, s, *b)[1]).lower(
            params, tx.init(params), *data(0)
        )
        return lowered.compile().as_text()

    # A product whose shape ends so is a weight's gradient, or those of several.
    shapes = tuple(f"{m},{n}]" for m, n in ((width, hidden), (hidden, width), (width, width)))

    def results(text):
        made = [line.split(" = ")[1] for line in text.splitlines() if " dot(" in line]
        shaped = [shape.partition("{")[0].partition(" ")[0] for shape in made]
        return {shape for shape in shaped if shape.endswith(shapes)}

    assert not results(program(False))
    # One gradient at a time, of layers in a scan and of experts under vmap.
    assert results(program(True)) == {f"f32[{shape}" for shape in shapes}


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("svd", "left"),
        ("subspace_iteration", "right"),
        pytest.param("history_pca", "both", marks=pytest.mark.slow),
    ],
)
def test_examples_one_by_one_are_a_batch(name, side):
    """Under `vmap` one kernel finds one basis, by all examples."""
    params = kernels(a=(12, 20), b=(20, 6))
    one = lambda p, x: jnp.sum((jnp.tanh(x @ p["a"]) @ p["b"]) ** 2)
    x = jax.random.normal(jax.random.key(0), (8, 4, 12))
    tx = osub.scale_by_subspace(optax.trace(0.9), rank=3, side=side, projector=PROJECTORS[name]())
    nested = lambda p, x: jnp.mean(jax.vmap(jax.vmap(one, (None, 0)), (None, 0))(p, x))
    assert_close(*both_ways(tx, nested, params, x))
    # Through a layer for all examples, and experts with examples each.
    experts = kernels(e=(3, 12, 12))
    mixed = lambda p, x: jnp.mean(
        jax.vmap(lambda x: jax.vmap(lambda k: jnp.tanh(x @ k))(p["e"]))(x) ** 2
    )
    rules = [("e", MatrixSpec(-2, -1))]
    rule = PROJECTORS[name]()
    tx = osub.scale_by_subspace(optax.identity(), rank=3, side=side, projector=rule, rules=rules)
    assert_close(*both_ways(tx, mixed, experts, x))


def test_kernels_that_share_an_input_share_it_in_the_backward_pass():
    """Under `vmap` over kernels alone their input is not copied for each of them."""
    params, x = kernels(e=(5, 12, 20)), jax.random.normal(jax.random.key(0), (32, 12))
    fun = lambda p, x: jnp.sum(jnp.tanh(jax.vmap(lambda k: x @ k)(p["e"])) ** 2)
    rules = [("e", MatrixSpec(-2, -1))]
    tx = osub.scale_by_subspace(optax.identity(), rank=3, side="right", rules=rules)
    assert_close(*both_ways(tx, fun, params, x))
    step = jax.jit(osub.subspace_value_and_grad(fun, tx, refresh=False))
    program = step.lower(params, tx.init(params), x).compile().as_text()
    assert "f32[5,32,20]" in program  # the cotangents, and never
    assert "f32[5,32,12]" not in program


def test_less_of_the_activations_is_kept():
    """With the basis on the input side `x P` is kept in place of `x`."""
    tx = osub.scale_by_subspace(optax.identity(), rank=2, side="left")
    params = kernels(a=(64, 64), b=(64, 64))
    # (A square of what comes out of the first kernel needs that alone.)
    fun = lambda p, x: jnp.sum(((x @ p["a"]) ** 2) @ p["b"])
    x = jax.random.normal(jax.random.key(0), (512, 64))

    def kept(refresh):
        at_source = AtSource(tx, params, tx.init(params), refresh)
        run = lambda probes: fun(at_source.merge(probes, {}), x)
        saved = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(run, p)[1], at_source.probes))
        return sum(leaf.size for leaf in saved if leaf.shape[:1] == (512,))

    # The first kernel's output for its square's slope, and two or one of (512, 64) besides.
    assert kept(True) == 512 * 64 * 3
    assert kept(False) == 512 * (64 + 2 + 2)


def test_micro_batches_add_up_in_the_subspace():
    params = kernels(a=(12, 20))
    fun = lambda p, x: jnp.mean(jnp.sin(x @ p["a"]))
    x = jax.random.normal(jax.random.key(0), (4, 8, 12))
    tx = osub.galore(0.1, 3, accumulate=4)
    found = []
    for at_source in (True, False):
        step, state, now = stepper(tx, fun, at_source), tx.init(params), params
        for i in range(8):
            updates, state = step(now, state, x[i % 4])
            now = optax.apply_updates(now, updates)
        found.append(now)
    assert_close(*found)
    assert float(jnp.max(jnp.abs(found[0]["a"] - params["a"]))) > 0


def test_bfloat16_and_float64():
    params = kernels(a=(24, 40), b=(40, 8))
    fun = lambda p, x: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"]) ** 2)
    x = jax.random.normal(jax.random.key(0), (64, 24))
    tx = osub.scale_by_subspace(optax.identity(), rank=4)
    cast = lambda tree, dtype: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    ours, theirs = both_ways(tx, fun, cast(params, jnp.bfloat16), x.astype(jnp.bfloat16))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(ours))
    assert_close(cast(ours, jnp.float32), cast(theirs, jnp.float32), 0.03)
    with jax.enable_x64(True):
        assert_close(*both_ways(tx, fun, cast(params, jnp.float64), x.astype(jnp.float64)), 1e-12)


def test_gradients_that_are_not_finite_or_zero_leave_their_leaf_alone():
    params, tx = kernels(a=(12, 20), b=(12, 20)), osub.galore(0.1, 3)
    fun = lambda p, x, y: jnp.sum(jnp.sin(x @ p["a"])) + jnp.sum(jnp.sin(y @ p["b"]))
    x, grad = jax.random.normal(jax.random.key(0), (8, 12)), osub.subspace_value_and_grad(fun, tx)
    state = tx.init(params)
    for bad in (jnp.full_like(x, jnp.nan), jnp.zeros_like(x)):
        _, gradients, source = grad(params, state, x, bad)
        updates, after = tx.update(gradients, state, params, source=source)
        assert float(jnp.max(jnp.abs(updates["a"]))) > 0
        assert not jnp.any(updates["b"])
        leaf = after[0].projection.leaves["b"]
        assert int(leaf.refreshes) == int(leaf.age) == 0 and not jnp.any(leaf.bases[0])
    assert int(osub.steps_to_refresh(after)) == 0  # that of b is still due


def test_a_kernel_that_is_used_twice_is_skipped_and_counted():
    """Its uses would each find a basis of their own."""
    params, tx = kernels(a=(12, 12)), osub.galore(0.1, 3)
    fun = lambda p, x: jnp.sum(jnp.sin(jnp.sin(x @ p["a"]) @ p["a"]))
    grad = osub.subspace_value_and_grad(fun, tx)
    state = tx.init(params)
    _, gradients, source = grad(params, state, jnp.ones((8, 12)))
    updates, state = tx.update(gradients, state, params, source=source)
    assert float(source["a"].uses) == 2
    assert not jnp.any(updates["a"]) and int(state[0].projection.skipped["a"]) == 1


@pytest.mark.parametrize("rule", [osub.history_pca(), osub.online_pca(), osub.oja()])
def test_a_basis_that_has_lost_its_gradient_is_found_anew(rule):
    """At the same step as afterwards, with a step that does not refresh in between."""
    tx = osub.scale_by_subspace(optax.identity(), rank=2, projector=rule, side="left")
    params = {"w": jax.random.normal(jax.random.key(0), (16, 12))}
    fun = lambda p, x: jnp.mean(jnp.sin(x @ p["w"]))
    steps = {r: jax.jit(osub.subspace_value_and_grad(fun, tx, refresh=r)) for r in (True, False)}
    update, gradient = jax.jit(tx.update), jax.jit(jax.grad(fun))
    ours, theirs, left, refreshed = tx.init(params), tx.init(params), 0, []
    for i in range(24):
        # Inputs, and with them gradients, move to other directions.
        x = jax.random.normal(jax.random.key(i), (32, 16)).at[:, 8:].set(0)
        x = x if i < 14 else jnp.roll(x, 8, axis=1)
        _, gradients, source = steps[left == 0](params, ours, x)
        a, ours = update(gradients, ours, params, source=source)
        b, theirs = update(gradient(params, x), theirs, params)
        left = left - 1 if left else int(osub.steps_to_refresh(ours))
        assert_close(a, b, 1e-4)
        refreshed.append(int(ours.projection.leaves["w"].refreshes))
    assert refreshed == [1] * 20 + [2] * 4
    assert int(theirs.projection.leaves["w"].refreshes) == 2


def test_aux_and_steps_to_refresh():
    params, tx = kernels(a=(12, 20)), osub.galore(0.1, 3, every=5)
    fun = lambda p, x: (jnp.sum(x @ p["a"]), (x.shape, p))
    grad = osub.subspace_value_and_grad(fun, tx, has_aux=True)
    state, left = tx.init(params), []
    for _ in range(7):
        left.append(int(osub.steps_to_refresh(state)))
        (_, aux), gradients, source = grad(params, state, jnp.ones((8, 12)))
        _, state = tx.update(gradients, state, params, source=source)
    assert left == [0, 4, 3, 2, 1, 0, 4] and aux[0] == (8, 12)
    np.testing.assert_array_equal(aux[1]["a"], params["a"])
    assert int(osub.steps_to_refresh(optax.sgd(0.1).init(params))) == np.iinfo(np.int32).max


@pytest.mark.parametrize("name", ["svd", "history_pca"])
def test_fused_steps_at_the_source(name):
    rules = [("layers/", MatrixSpec(-2, -1)), (".*", None)]
    tx = osub.galore(0.05, 3, projector=PROJECTORS[name](), rules=rules)
    params = {k: v for k, v in make_params().items() if k != "experts"}
    parts = (
        lambda rest, batch: batch[0] @ rest["in"],
        lambda layer, x: x + jnp.tanh(x @ layer["up"]) @ layer["down"],
        lambda rest, x, batch: jnp.mean((x @ rest["out"] - batch[1]) ** 2),
    )
    found = []
    for at_source in (True, False):
        fused = osub.fused_backward(*parts, tx, at_source=at_source)
        step, now, state = jax.jit(fused.step), params, fused.init(params)
        for i in range(10):
            now, state, metrics = step(now, state, data(i))
        found.append(now)
    assert_close(*found)
    assert float(metrics.skipped) == 0
    if name == "svd":
        other = lambda layer, x: x + jnp.tanh(jnp.dot(x, layer["up"])) @ layer["down"]
        fused = osub.fused_backward(parts[0], other, parts[2], tx, at_source=True)
        with pytest.raises(TypeError, match="uses one of layers/.* in another way"):
            jax.eval_shape(fused.step, params, fused.init(params), data(0))
    with pytest.raises(ValueError, match="at_source=True .*remat=False"):
        osub.fused_backward(*parts, tx, at_source=True, remat=False)


def test_a_batch_without_a_gradient_leaves_a_basis_that_follows_alone():
    tx = osub.online_subspace_descent(0.1, rank=2)
    params = {"w": jax.random.normal(jax.random.key(0), (8, 12))}
    loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    grad = osub.subspace_value_and_grad(loss, tx)

    @jax.jit
    def step(state, x):
        _, gradients, source = grad(params, state, x)
        return tx.update(gradients, state, params, source=source)[1]

    state = tx.init(params)
    for scale in (1, 2, 0, 3, 4):
        state = step(state, scale * jax.random.normal(jax.random.key(scale), (16, 8)))
    assert int(state[0].projection.leaves["w"].refreshes) == 1


@pytest.mark.parametrize("rule", [osub.history_pca(), osub.svd(4)])
def test_a_kernel_that_a_step_does_not_use_keeps_its_basis(rule):
    """As a layer that is dropped, or the other branch of a `cond`."""
    params = kernels(a=(12, 20))
    tx = osub.scale_by_subspace(optax.identity(), rank=3, projector=rule, side="left")

    def loss(params, x, skip):
        out = jax.lax.cond(skip, lambda x: jnp.zeros((16, 20)), lambda x: x @ params["a"], x)
        return jnp.mean((jnp.sin(out) - 1) ** 2)

    @jax.jit
    def at_source(state, x, skip):
        _, gradients, source = osub.subspace_value_and_grad(loss, tx)(params, state, x, skip)
        return tx.update(gradients, state, params, source=source)

    @jax.jit
    def afterwards(state, x, skip):
        return tx.update(jax.grad(loss)(params, x, skip), state, params)

    ours = theirs = tx.init(params)
    for i in range(13):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (16, 12))
        update, ours = at_source(ours, x, i in (3, 4, 5))
        expected, theirs = afterwards(theirs, x, i in (3, 4, 5))
        assert_close(update, expected)
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: jnp.allclose(a, b, atol=1e-4),
            ours.projection.leaves["a"]._asdict(),
            theirs.projection.leaves["a"]._asdict(),
        )
    )


def test_dtypes_of_the_input():
    """Integers, booleans and shorter floats are as exact as afterwards; complex ones refused."""
    params = kernels(a=(8, 12))
    fun = lambda p, x: jnp.mean(jnp.tanh(x @ p["a"]))
    tx = osub.scale_by_subspace(optax.identity(), rank=3, side="left")
    x = jax.random.normal(jax.random.key(0), (16, 8))
    grad, after = (osub.subspace_value_and_grad(fun, tx, refresh=r) for r in (True, False))
    update = jax.jit(tx.update)
    for given in (x > 0, (4 * x).astype(jnp.int32), x.astype(jnp.bfloat16)):
        _, gradients, source = jax.jit(grad)(params, tx.init(params), given)
        _, state = update(gradients, tx.init(params), params, source=source)
        _, gradients, source = jax.jit(after)(params, state, given)
        expected = update(jax.grad(fun)(params, given), state, params)[0]
        assert_close(update(gradients, state, params, source=source)[0], expected)
        assert jnp.any(expected["a"])
    for without_tokens in (after, grad):
        assert without_tokens(params, state, x[:0])[1]["a"].low.shape == (3, 12)
    with pytest.raises(TypeError, match="not for a product with complex64 numbers"):
        after(params, state, x + 1j)


def in_context(x, kernel):
    with jax.default_matmul_precision("highest"):
        return x @ kernel


@pytest.mark.parametrize(
    "layer",
    [lambda x, k: osub.source_dot_general(x, k, (((1,), (0,)), ((), ())), "highest"), in_context],
)
def test_the_low_rank_products_have_the_precision_of_their_layer(layer):
    params, tx = kernels(a=(8, 12)), osub.galore(0.1, 3, side="left")
    grad = osub.subspace_value_and_grad(lambda p, x: jnp.sum(layer(x, p["a"])), tx, refresh=False)
    program = jax.jit(grad).lower(params, tx.init(params), jnp.ones((4, 8))).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) >= 3 and all("precision = [HIGHEST" in line for line in products)


def test_vmap_around_the_gradient_gives_each_example_its_own():
    params, tx = kernels(a=(8, 12)), osub.scale_by_subspace(optax.identity(), rank=3)
    fun = lambda p, x: jnp.mean(jnp.sin(x @ p["a"]))
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    state = stepper(tx, fun, True)(params, tx.init(params), x[0, 0])[1]
    for refresh in (True, False):
        now = tx.init(params) if refresh else state
        grad = osub.subspace_value_and_grad(fun, tx, refresh=refresh)
        low = lambda x, now=now, grad=grad: grad(params, now, x)[1]["a"].low
        alone = jax.jit(low)
        loop = jnp.stack([jnp.stack([alone(one) for one in some]) for some in x])
        along = jax.vmap(jax.vmap(grad, (None, None, 0)), (None, None, 0))
        _, gradients, source = jax.jit(along)(params, now, x)
        assert_close(gradients["a"].low, loop)
        np.testing.assert_array_equal(source["a"].uses, np.ones((2, 3)))
    # An array from outside of the arguments: the gradients would be added up.
    outside = lambda x: osub.subspace_value_and_grad(lambda p: fun(p, x), tx)(params, state)
    with pytest.raises(TypeError, match="not have as an argument: make it one"):
        jax.vmap(outside)(x[0])


def test_keyword_arguments_and_a_first_step_without_a_refresh():
    params, tx = kernels(a=(8, 12)), osub.galore(0.1, 3)
    fun = lambda p, *, x, by: by * jnp.mean(jnp.sin(x @ p["a"]))
    state = tx.init(params)
    step = jax.jit(osub.subspace_value_and_grad(fun, tx, refresh=False))
    _, gradients, source = step(params, state, x=jnp.ones((4, 8)), by=2.0)
    _, state = tx.update(gradients, state, params, source=source)
    assert int(state[0].projection.skipped["a"]) == 1  # there is no basis to project by


def test_transformations_by_name_in_any_order():
    """Trees sort names; the order of the transformations is that of their dictionary."""
    params = {"one": jnp.eye(8, 6), "two": jnp.eye(8, 6)}
    parts = {"z": osub.galore(1e-2, rank=4), "a": osub.galore(1e-2, rank=2)}
    tx = optax.multi_transform(parts, {"one": "a", "two": "z"})
    loss = lambda params, x: jnp.mean(jnp.sin(x @ params["one"]) + jnp.cos(x @ params["two"]))
    x = jax.random.normal(jax.random.key(0), (16, 8))
    _, gradients, source = osub.subspace_value_and_grad(loss, tx)(params, tx.init(params), x)
    assert (gradients["one"].low.shape, gradients["two"].low.shape) == ((8, 2), (8, 4))
    ours, _ = tx.update(gradients, tx.init(params), params, source=source)
    theirs, _ = tx.update(jax.grad(loss)(params, x), tx.init(params), params)
    assert_close(ours, theirs)


@pytest.mark.parametrize("rule", [osub.online_pca(), osub.svd()])
@pytest.mark.parametrize("large", ["inputs", "cotangents"])
def test_thin_products_of_float16_that_it_does_not_hold(rule, large):
    """The layer and its gradient are finite, and so is what is made of them."""
    spread = lambda i, shape: jax.random.uniform(jax.random.key(i), shape, minval=-1)
    x, d = spread(0, (16, 8)), spread(1, (16, 64))
    x, d = (x * 3e4, d / 64) if large == "inputs" else (x / 64, d * 3e4)
    x, d = x.astype(jnp.float16), d.astype(jnp.float16)
    params = {"w": jnp.zeros((8, 64), jnp.float16)}
    loss = lambda params, x: jnp.sum((x @ params["w"]).astype(jnp.float32) * d)
    tx = osub.scale_by_subspace(optax.identity(), rank=2, projector=rule)
    state = tx.init(params)
    assert jnp.all(jnp.isfinite(jax.grad(loss)(params, x)["w"]))
    for _ in range(3):
        _, gradients, source = osub.subspace_value_and_grad(loss, tx)(params, state, x)
        ours, after = tx.update(gradients, state, params, source=source)
        theirs, state = tx.update(jax.grad(loss)(params, x), state, params)
        assert all(jnp.all(e > 0) for e in source["w"].energies)
        assert_close(ours["w"].astype(jnp.float32), theirs["w"].astype(jnp.float32), tolerance=5e-3)
        # (Adam of online PCA takes steps of full size where rounding is all that there is.)
        bases = (s.projection.leaves["w"].bases[0] for s in (after, state))
        ours, theirs = (jnp.linalg.qr(basis)[0] for basis in bases)
        assert jnp.linalg.svd(ours.T @ theirs, compute_uv=False).min() > 0.99


def test_states_of_a_rule_are_brought_out_exactly():
    """Whole numbers of any size and random keys, through cotangents, which are floats."""

    def init(key, m, n, rank):
        return jnp.int32(-3), jnp.uint8(255), jnp.uint32(2**32 - 1), jnp.bool_(True), key

    def update(gradient, basis, state):
        signed, byte, word, flag, key = state
        new = jnp.linalg.qr(jax.random.normal(key, basis.shape))[0]
        return new, (signed - 1, byte - 1, word - 1, ~flag, jax.random.split(key)[0])

    tx = osub.galore(1e-2, 2, projector=osub.Projector(init=init, update=update, every=1))
    params, x = {"w": jnp.eye(8, 6)}, jax.random.normal(jax.random.key(0), (4, 8))
    loss = lambda params, x: jnp.mean(jnp.sin(x @ params["w"]))
    ours = theirs = tx.init(params)
    for _ in range(2):
        _, gradients, source = osub.subspace_value_and_grad(loss, tx)(params, ours, x)
        _, ours = tx.update(gradients, ours, params, source=source)
        _, theirs = tx.update(jax.grad(loss)(params, x), theirs, params)
    ours, theirs = (s[0].projection.leaves["w"].rule[0] for s in (ours, theirs))
    assert [int(x) for x in ours[:4]] == [-5, 253, 2**32 - 3, 1]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and jnp.all(a == b)


def test_the_benchmarks_count_of_operations():
    pytest.importorskip("matplotlib")
    from benchmarks import train_step

    names = {**vars(train_step), "operations": train_step.operations}
    parsed = doctest.DocTestFinder().find(train_step.operations, globs=names)
    results = [doctest.DocTestRunner().run(one) for one in parsed]
    assert results and results[0].attempted == 2 and not results[0].failed
