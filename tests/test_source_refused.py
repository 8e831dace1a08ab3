"""What would lose its gradient at the source is refused, and says why."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_subspace as osub
from optax_subspace import MatrixSpec
from tests.trees import assert_close, kernels


def test_what_would_lose_its_gradient_is_refused():
    params, x = kernels(a=(12, 20)), jnp.ones((8, 12))
    tx = osub.galore(0.1, 3)
    state = tx.init(params)
    kernel, stack = kernels(h=(3, 8, 10)), kernels(e=(2, 12, 20))
    heads = osub.galore(0.1, 3, rules=[("h", MatrixSpec((0, 1), 2))])
    experts = osub.galore(0.1, 3, rules=[("e", MatrixSpec(-2, -1))])
    run = lambda fun, tx=tx, **more: osub.subspace_value_and_grad(fun, tx)(
        params, tx.init(params), x
    )
    for fun in (
        lambda p, x: jnp.sum(x @ p["a"].reshape(12, 20)),
        lambda p, x: jnp.sum(p["a"].T @ x.T),
        lambda p, x: jnp.sum(x[:, :6] @ p["a"][:6]),
        lambda p, x: jnp.sum(
            osub.source_dot_general(x, p["a"], (((0,), (1,)), ((), ())))  # the other axis
        ),
    ):
        with pytest.raises(TypeError, match=r"parameter a of shape \(12, 20\).*rule of None"):
            run(fun)
    for fun in (
        lambda p, x: jnp.sum(jnp.sin(p["a"])),
        lambda p, x: jnp.sum(jnp.dot(x, p["a"])),
        lambda p, x: jnp.sum(p["a"] * 2),
    ):
        with pytest.raises(TypeError, match="the loss uses one of a in another way.*SourceKernel"):
            run(fun)
    for fun in (
        lambda p, x: jnp.sum(x @ p["a"]) + optax.tree.norm(p, squared=True),
        lambda p, x: jnp.sum(x @ p["a"]) + sum(jnp.sum(w**2) for w in jax.tree.leaves(p)),
        lambda p, x: jnp.sum(x @ jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)["a"]),
    ):
        with pytest.raises(TypeError, match="leaves of all parameters.*and a are projected"):
            run(fun)
    slope = lambda p, x: jax.grad(lambda x: jnp.sum(jnp.sin(x @ p["a"])))(x)
    with pytest.raises(TypeError, match="a derivative .* that depends on a"):
        run(lambda p, x: jnp.sum(slope(p, x) ** 2))
    with pytest.raises(TypeError, match="a derivative .* that depends on a"):
        run(lambda p, x: jnp.sum(jax.jvp(lambda x: x @ p["a"], (x,), (x,))[1]))
    swapped = (((1, 2), (0, 1)), ((), ()))
    with pytest.raises(TypeError, match=r"an array of shape \(4, 8, 3\) contracted over"):
        osub.subspace_value_and_grad(
            lambda p, x: jnp.sum(osub.source_dot_general(x, p["h"], swapped)), heads
        )(kernel, heads.init(kernel), jnp.ones((4, 8, 3)))
    with pytest.raises(TypeError, match=r"not for all slices at once: jax.vmap"):
        osub.subspace_value_and_grad(lambda p, x: jnp.sum(x @ p["e"]), experts)(
            stack, experts.init(stack), jnp.ones((2, 4, 12))
        )
    fun = lambda p, x: jnp.sum(x @ p["a"])
    _, gradients, source = run(fun)
    with pytest.raises(ValueError, match="parameter a: .*source=source"):
        tx.update(gradients, state, params)
    other = osub.galore(0.1, 3, rules=[("a", None)])
    with pytest.raises(ValueError, match="parameter a: .*left alone by rule"):
        other.update(gradients, other.init(params), params, source=source)
    with pytest.raises(ValueError, match=r"relative_to='estimate'"):
        run(fun, osub.online_subspace_descent(0.1, 3, projector=osub.oja(relative_to="gradient")))
    with pytest.raises(ValueError, match="the state holds 1 projections and the transf.* makes 0"):
        osub.subspace_value_and_grad(fun, optax.sgd(0.1))(params, state, x)


def test_filters_of_leaves_do_not_take_a_kernel_for_numbers():
    """Its arrays have shapes and dtypes that a filter lets through."""
    params, x = {**kernels(a=(8, 12), e=(2, 12, 12)), "b": jnp.ones(12)}, jnp.ones((4, 8))
    rules = [("e", MatrixSpec(-2, -1))]
    tx = osub.scale_by_subspace(optax.identity(), rank=3, rules=rules)

    def fun(p, x):
        x, _ = jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x @ p["a"] + p["b"], p["e"])
        return jnp.sum(x)

    leaves = jax.tree.leaves
    matrices = lambda w: w.ndim > 1
    floating = lambda w: jnp.issubdtype(w.dtype, jnp.floating)
    on = lambda keep, f: lambda p: jax.tree.map(lambda w: f(w) if keep(w) else w, p)
    half = lambda w: w.astype(jnp.bfloat16)
    in_scan = lambda p: jax.lax.scan(lambda c, k: (c + jnp.sum(leaves(k)[0]), None), 0.0, p["e"])[0]
    looped = lambda w: jax.lax.while_loop(
        lambda c: jnp.sum(c[1]) < 0, lambda c: (c[0] + 1, c[1]), (0, w)
    )[0]
    for bad in (
        lambda p, x: fun(p, x) + sum(jnp.sum(w**2) for w in leaves(p) if matrices(w)),
        lambda p, x: fun(p, x) + sum(jnp.sum(w**2) for w in leaves(p) if floating(w)),
        lambda p, x: fun(on(floating, half)(p), x),
        lambda p, x: fun(on(matrices, lambda w: w * 0.5)(p), x),
        lambda p, x: fun(p, x) + in_scan(p),
        lambda p, x: fun(p, x) + jax.checkpoint(lambda p: jnp.sum(leaves(p["e"])[0]))(p),
        lambda p, x: fun(p, x) + jax.lax.cond(x[0, 0] > 0, in_scan, lambda p: 0.0, p),
        lambda p, x: fun(p, x) + looped(leaves(p["e"])[0]),
        lambda p, x: fun(p, x) + leaves(p["a"])[0][0, 0],
        lambda p, x: jnp.sum(leaves(p["a"])[0] @ p["e"][0]),
    ):
        with pytest.raises(TypeError, match="the loss goes through the leaves.* projected at"):
            jax.eval_shape(osub.subspace_value_and_grad(bad, tx), params, tx.init(params), x)

    def moved(p, x):  # as layers in a Python loop are, one of them in a branch
        layer = lambda i: jax.tree.map(lambda w: w[i], p["e"])
        x = jnp.tanh(x @ p["a"].astype(jnp.bfloat16)).astype(jnp.float32) + p["b"]
        x = x @ layer(0)
        return jnp.sum(jax.lax.cond(x[0, 0] > 0, lambda x, k: x @ k, lambda x, k: x, x, layer(1)))

    jax.eval_shape(osub.subspace_value_and_grad(moved, tx), params, tx.init(params), x)


def test_what_the_source_cannot_tell_apart_is_refused():
    twice = optax.chain(
        osub.scale_by_subspace(optax.identity(), rank=4),
        osub.scale_by_subspace(optax.scale_by_adam(), rank=4),
    )
    params, x = {"w": jnp.eye(8, 6)}, jnp.ones((2, 8))
    loss = lambda params, x: jnp.mean(x @ params["w"])
    with pytest.raises(ValueError, match="parameter w is projected by two members"):
        osub.subspace_value_and_grad(loss, twice)(params, twice.init(params), x)
    last = osub.galore(1e-2, 2, rules=[("w", MatrixSpec(0, 1))])
    params = {"w": jnp.ones((8, 6, 3))}
    with pytest.raises(ValueError, match=r"parameter w of .*: its batch axes \(2,\) are not in fr"):
        osub.subspace_value_and_grad(loss, last)(params, last.init(params), x)


def test_a_kernel_that_an_earlier_member_leaves_alone_is_refused():
    """It would do to the low-rank gradient what it does to a leaf at full rank."""
    first = osub.scale_by_subspace(optax.scale_by_adam(), rank=3, rules=[("b", None)])
    second = osub.scale_by_subspace(optax.scale_by_adam(), rank=2, rules=[("a", None)])
    tx, params = optax.chain(first, second), kernels(a=(8, 12), b=(12, 6))
    loss = lambda p, x: jnp.mean(jnp.sin(x @ p["a"]) @ p["b"])
    grad = osub.subspace_value_and_grad(loss, tx)
    _, gradients, source = grad(params, tx.init(params), jnp.ones((4, 8)))
    with pytest.raises(ValueError, match=r"parameter b: .* have optax\.multi_transform give each"):
        tx.update(gradients, tx.init(params), params, source=source)


def test_errors_that_a_kernel_is_the_cause_of_say_so():
    tx, params, x = osub.galore(0.1, 3), kernels(a=(8, 12)), jnp.ones((4, 8))
    run = lambda fun: osub.subspace_value_and_grad(fun, tx)(params, tx.init(params), x)
    dense = jax.custom_jvp(lambda x, w: x @ w)
    dense.defjvp(lambda at, by: (at[0] @ at[1], by[0] @ at[1] + at[0] @ by[1]))
    with pytest.raises(TypeError, match="puts a derivative rule .* around a, .* block with a rule"):
        run(lambda p, x: jnp.sum(dense(x, p["a"])))
    chosen = lambda p: (
        lambda x: jax.lax.cond(x[0] > 0, lambda x: jnp.sum(x @ p["a"]), lambda x: jnp.sum(x), x)
    )
    with pytest.raises(TypeError, match="chooses between arrays of a, as a jax.lax.cond does und"):
        run(lambda p, x: jnp.sum(jax.vmap(chosen(p))(x)))
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("model",))
    split = jax.NamedSharding(mesh, jax.P(None, "model"))
    columns = lambda p, x: jnp.sum(jax.vmap(lambda w: x @ w, in_axes=1)(p["a"]))
    rows = lambda p, x: jax.lax.scan(lambda c, w: (c + jnp.sum(w), None), 0.0, p["a"])[0]
    constrained = lambda p, x: jnp.sum(x @ jax.lax.with_sharding_constraint(p["a"], split))
    for fun in (columns, rows, constrained):
        with pytest.raises((ValueError, IndexError)) as error:
            run(fun)
        assert any("about a, projected at the source" in note for note in error.value.__notes__)
    with pytest.raises(TypeError, match=r"add does not accept dtypes key<fry>"):
        run(lambda p, x: jnp.sum(x @ p["a"]) + (jax.random.key(0) + 1))
    with pytest.raises(ValueError, match="my own") as error:

        def failing(p, x):
            raise ValueError("my own")

        run(failing)
    assert not any("about a" in note for note in getattr(error.value, "__notes__", ()))


def test_a_loss_can_be_debugged():
    tx, params, x = osub.galore(0.1, 3), kernels(a=(8, 12)), jnp.ones((4, 8))
    grad = osub.subspace_value_and_grad(lambda p, x: jnp.mean(jnp.sin(x @ p["a"])), tx)
    expected, _, _ = grad(params, tx.init(params), x)
    with jax.disable_jit(), jax.debug_nans(True), jax.check_tracer_leaks():
        value, gradients, _ = grad(params, tx.init(params), x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert gradients["a"].low.shape == (3, 12)


def test_layers_that_are_moved_are_not_refused():
    tx = osub.scale_by_subspace(optax.identity(), rank=3, rules=[("e", MatrixSpec(-2, -1))])
    params, x = kernels(e=(3, 8, 8)), jax.random.normal(jax.random.key(0), (4, 8))
    step = lambda x, w: (jnp.tanh(x @ w), None)
    for order in (lambda w: w[::-1], lambda w: jnp.stack(jnp.unstack(w)[1:])):
        loss = lambda p, x, order=order: jnp.mean(
            jnp.sin(jax.lax.scan(step, x, jax.tree.map(order, p["e"]))[0])
        )
        state = tx.init(params)
        _, gradients, source = osub.subspace_value_and_grad(loss, tx)(params, state, x)
        ours, _ = tx.update(gradients, state, params, source=source)
        assert_close(ours, tx.update(jax.grad(loss)(params, x), state, params)[0])


def test_a_stack_is_indexed_along_its_batch_axes():
    """By the kernel's own index, and by one of each example or of each layer's turn."""
    tx = osub.scale_by_subspace(optax.identity(), rank=3, rules=[("e", MatrixSpec(-2, -1))])
    params, x = kernels(e=(4, 8, 8)), jax.random.normal(jax.random.key(0), (4, 5, 8))
    order, layer = jnp.array([2, 0, 3, 1]), lambda e, i: jax.tree.map(lambda w: w[i], e)
    each = lambda f: lambda p, x: jnp.mean(jnp.sin(jax.vmap(lambda x, i: f(p, x, i))(x, order)))
    in_turn = lambda at: (
        lambda p, x: jnp.mean(
            jnp.sin(functools.reduce(lambda x, i: jnp.tanh(x @ at(p["e"], i)), range(4), x))
        )
    )
    for loss in (
        in_turn(lambda e, i: e[i]),
        in_turn(lambda e, i: e[-1 - i, ...]),
        in_turn(lambda e, i: e[1:][i - 1] if i else e[order][1]),
        in_turn(lambda e, i: e[jnp.asarray(i)]),
        in_turn(lambda e, i: e[len(e) - 1 - i]),
        in_turn(lambda e, i: [*e][i]),
        in_turn(lambda e, i: e[np.array([3, 1, 2, 0])][i]),
        each(lambda p, x, i: x @ p["e"][i]),
        each(lambda p, x, i: x @ layer(p["e"], i)),
    ):
        state = tx.init(params)
        _, gradients, source = osub.subspace_value_and_grad(loss, tx)(params, state, x)
        ours, _ = tx.update(gradients, state, params, source=source)
        assert_close(ours, tx.update(jax.grad(loss)(params, x), state, params)[0])
    for index in (np.s_[:, 0], np.s_[None], order > 1, np.s_[..., 0], 0.0):
        run = osub.subspace_value_and_grad(lambda p, x, i=index: jnp.sum(x[0] @ p["e"][i]), tx)
        with pytest.raises(TypeError, match="parameter e .*not for its part kernel.*along batch"):
            jax.eval_shape(run, params, tx.init(params), x)


def own_rule(rule):
    """The identity with a derivative of its own."""
    same = jax.custom_vjp(lambda w: w)
    same.defvjp(lambda w: (w, None), lambda _, g: (rule(g),))
    return same


def test_derivative_rules_around_a_kernel_are_refused():
    """They would scale, clip or turn the basis that was found, too."""
    tx, params, x = osub.galore(0.1, 3), kernels(a=(8, 12)), jnp.ones((4, 8))
    fun = lambda p, x: jnp.mean(jnp.sin(x @ p["a"]))
    half = own_rule(lambda g: g / 2)
    forward = jax.custom_jvp(lambda w: w)
    forward.defjvp(lambda at, by: (at[0], -by[0]))
    floating = lambda w: forward(w) if jnp.issubdtype(w.dtype, jnp.floating) else w
    turned = own_rule(lambda g: jax.tree.map(jnp.negative, g))
    for rule in (lambda p: jax.tree.map(half, p), lambda p: jax.tree.map(floating, p), turned):
        run = osub.subspace_value_and_grad(lambda p, x, rule=rule: fun(rule(p), x), tx)
        with pytest.raises(TypeError, match="puts a derivative rule .* around a, projected at"):
            jax.eval_shape(run, params, tx.init(params), x)


@pytest.mark.parametrize("rule", [lambda g: g, lambda g: g / 2, lambda g: g * (g.ndim > 1)])
def test_a_block_with_a_rule_of_its_own_is_refused(rule):
    """Nothing tells what the rule hands on of what was found, and what it adds."""
    layer = lambda x, w: jnp.tanh(x @ w)
    block = jax.custom_vjp(layer)
    is_number = lambda g: g.dtype != jax.dtypes.float0
    block.defvjp(
        lambda x, w: (layer(x, w), (x, w)),
        lambda saved, dy: jax.tree.map(
            lambda g: rule(g) if is_number(g) else g, jax.vjp(layer, *saved)[1](dy)
        ),
    )
    tx = osub.scale_by_subspace(optax.identity(), rank=3, rules=[("e", MatrixSpec(-2, -1))])
    params, x = kernels(a=(8, 12), e=(3, 12, 12)), jax.random.normal(jax.random.key(0), (16, 8))
    stop = jax.lax.stop_gradient

    def loss(p, x):
        scan = lambda x, w: (block(x, w), None)
        return jnp.mean((jax.lax.scan(scan, jnp.tanh(x @ p["a"]), p["e"])[0] - 1) ** 2)

    with pytest.raises(TypeError, match="derivative rule .* around e, .*block .* at full rank"):
        run = osub.subspace_value_and_grad(loss, tx)
        jax.eval_shape(run, params, tx.init(params), x)
    # Of what is not differentiated there is nothing to find.
    teacher = lambda p, x: jnp.mean((jnp.tanh(x @ p["a"]) - block(x, stop(p["a"]))) ** 2)
    _, gradients, _ = osub.subspace_value_and_grad(teacher, tx)(params, tx.init(params), x)
    assert not np.any(gradients["e"].low)


def test_a_derivative_with_respect_to_the_input_takes_kernels_that_are_stopped():
    """As steps against an adversary, or of Langevin dynamics, do."""
    tx = osub.scale_by_subspace(optax.identity(), rank=3)
    params, x = kernels(a=(8, 12)), jax.random.normal(jax.random.key(0), (16, 8))
    fun = lambda p, x: jnp.mean((jnp.tanh(x @ p["a"]) - 1) ** 2)
    worse = lambda p, x: x + 0.1 * jnp.sign(jax.grad(fun, 1)(p, x))
    stop = jax.lax.stop_gradient
    loss = lambda p, x: fun(p, worse(stop(p), x))
    state = tx.init(params)
    value, gradients, source = osub.subspace_value_and_grad(loss, tx)(params, state, x)
    ours, _ = tx.update(gradients, state, params, source=source)
    expected, full = jax.value_and_grad(loss)(params, x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert_close(ours, tx.update(full, state, params)[0])
    for loss in (lambda p, x: fun(p, stop(worse(p, x))), lambda p, x: fun(p, worse(p, x))):
        with pytest.raises(TypeError, match=r"depends on a, .*take it at jax.lax.stop_gradient"):
            jax.eval_shape(osub.subspace_value_and_grad(loss, tx), params, state, x)
    penalty = lambda p, x: optax.global_norm(jax.grad(fun)(p, x))
    for derivative in (penalty, lambda p, x: jnp.sum(jax.jacfwd(lambda x: x @ p["a"])(x[0]))):
        loss = lambda p, x, d=derivative: fun(p, x) + d(stop(p), x)
        with pytest.raises(TypeError, match=r"the loss holds a derivative .* depends on a"):
            jax.eval_shape(osub.subspace_value_and_grad(loss, tx), params, state, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda p: jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), p),
        lambda p: optax.tree.cast(p, jnp.bfloat16),
        lambda p: jnp.concatenate([w.ravel() for w in jax.tree.leaves(p)]),
        lambda p: optax.tree.vdot(p, p),
    ],
    ids=["asarray", "cast", "ravel", "vdot"],
)
def test_functions_of_all_leaves_are_told_with_the_parameter(function):
    """By whichever error JAX has for an array that is not of numbers."""
    tx = osub.scale_by_subspace(optax.identity(), rank=3)
    params, x = kernels(a=(8, 12)), jnp.ones((4, 8))

    def loss(p, x):
        found = function(p)
        return jnp.mean(x @ (found if isinstance(found, dict) else p)["a"])

    with pytest.raises(TypeError, match="goes through the leaves of all parameters.* and a are"):
        jax.eval_shape(osub.subspace_value_and_grad(loss, tx), params, tx.init(params), x)


def test_what_is_done_to_some_of_a_kernels_arrays_is_refused():
    """By filters that see their shapes, sizes and dtypes."""
    tx = osub.scale_by_subspace(optax.identity(), rank=3, rules=[("e", MatrixSpec(-2, -1))])
    params, x = kernels(e=(3, 8, 8)), jnp.ones((4, 8))
    fun = lambda e, x: jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, e)[0])
    stop = jax.lax.stop_gradient
    either = lambda w, *branches: jax.lax.cond(x[0, 0] > 0, *branches, w)
    for moved in (
        lambda w: w[::-1] if w.ndim > 2 else w,
        lambda w: w[:2] if w.ndim > 2 else w[1:],
        lambda w: either(w, stop, lambda w: w) if w.size > 100 else w,
        lambda w: either(w, lambda w: w, stop) if w.size > 100 else w,
        lambda w: either(w, lambda w: w, lambda w: w * 0) if w.shape == (3, 8, 8) else w,
        lambda w: w[jnp.array([2, 0, 1])] if w.ndim > 2 else w,
        lambda w: jnp.roll(w, 1, axis=0) if w.shape == (3, 8, 8) else w,
        lambda w: stop(w) if w.size > 100 else w,
        lambda w: jnp.zeros_like(w) if w.shape == (3, 8, 8) else w,
    ):
        loss = lambda p, x, moved=moved: fun(jax.tree.map(moved, p["e"]), x)
        match = "freezes or replaces some of the arrays that e cons|goes through the leaves"
        with pytest.raises(TypeError, match=match):
            jax.eval_shape(osub.subspace_value_and_grad(loss, tx), params, tx.init(params), x)
    whole = lambda w: jnp.swapaxes(w, -1, -2) if w.shape == (3, 8, 8) else w
    with pytest.raises(TypeError, match=r"by transpose.* e are projected at the source"):
        loss = lambda p, x: fun(jax.tree.map(whole, p["e"]), x)
        jax.eval_shape(osub.subspace_value_and_grad(loss, tx), params, tx.init(params), x)
    with pytest.raises(TypeError, match="parameter e .*not for a cast to int8"):
        loss = lambda p, x: jnp.mean(x @ p["e"][0].astype(jnp.int8))
        jax.eval_shape(osub.subspace_value_and_grad(loss, tx), params, tx.init(params), x)
    # (All of them, of which random keys have no derivative to stop.)
    frozen = lambda p, x: fun(jax.tree.map(jax.lax.stop_gradient, p["e"]), x)
    jax.eval_shape(osub.subspace_value_and_grad(frozen, tx), params, tx.init(params), x)


def test_slices_whose_rows_or_columns_are_moved_are_refused():
    """The bases, of another shape, were moved along with them."""
    tx = osub.scale_by_subspace(optax.identity(), rank=3, rules=[("e", MatrixSpec(-2, -1))])
    params, x = kernels(e=(3, 8, 8)), jnp.ones((4, 8))
    step, order = lambda x, w: (jnp.tanh(x @ w), None), np.arange(8)[::-1]
    for moved in (
        lambda w: w[..., ::-1],
        lambda w: w[:, ::-1] if w.ndim > 2 else w,
        lambda w: w[..., order] if w.ndim > 2 else w,
        lambda w: jnp.swapaxes(w, -1, -2) if w.ndim > 2 else w,
        lambda w: jnp.concatenate([w[:, :3], w[:, 3:]], axis=1) if w.ndim > 2 else w,
    ):
        loss = lambda p, x, moved=moved: jnp.mean(
            jnp.sin(jax.lax.scan(step, x, jax.tree.map(moved, p["e"]))[0])
        )
        with pytest.raises((TypeError, ValueError)):
            jax.eval_shape(osub.subspace_value_and_grad(loss, tx), params, tx.init(params), x)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_branch_may_freeze_a_whole_kernel(frozen):
    tx = osub.scale_by_subspace(optax.identity(), rank=3)
    params, x = kernels(a=(8, 12)), jax.random.normal(jax.random.key(0), (16, 8))
    stop = lambda tree: jax.tree.map(jax.lax.stop_gradient, tree)

    def loss(p, x, frozen):
        kernel = jax.lax.cond(frozen, stop, lambda tree: tree, p["a"])
        return jnp.mean((x @ kernel - 1) ** 2)

    state = tx.init(params)
    given = params, x, jnp.bool_(frozen)
    _, gradients, source = osub.subspace_value_and_grad(loss, tx)(params, state, *given[1:])
    ours, _ = tx.update(gradients, state, params, source=source)
    assert np.any(ours["a"]) != frozen
    assert_close(ours, tx.update(jax.grad(loss)(*given), state, params)[0])


def test_what_is_a_tree_within_the_loss_is_told():
    tx, x = osub.scale_by_subspace(optax.identity(), rank=3), jnp.ones((4, 8))
    run = lambda fun, params: osub.subspace_value_and_grad(fun, tx)(params, tx.init(params), x)
    freeze = lambda path, w: jax.lax.stop_gradient(w) if path[-1].key == "bias" else w
    by_name = lambda p, x: jnp.mean(x @ jax.tree_util.tree_map_with_path(freeze, p)["a"])
    with pytest.raises(AttributeError) as error:
        run(by_name, kernels(a=(8, 12)))
    assert "names of leaves go on below" in "".join(error.value.__notes__)
    stacked = lambda p, x: jnp.mean(x @ jax.tree.map(lambda *w: jnp.stack(w), *p["layers"])[0])
    with pytest.raises(ValueError, match="pytree") as error:
        run(stacked, {"layers": [*kernels(a=(8, 8), b=(8, 8)).values()]})
    assert "cannot be stacked" in "".join(error.value.__notes__)
    by_value = lambda p, x: jnp.mean(x @ p["a"]) if jnp.any(x @ p["a"]) else 0.0
    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        run(by_value, kernels(a=(8, 12)))
    assert "traced to see what it does to a, projected" in "".join(error.value.__notes__)

    def alone(p, x):
        with jax.disable_jit():
            return jnp.mean(jnp.sin(x @ p["a"]))

    assert np.any(run(alone, kernels(a=(8, 12)))[1]["a"].low)


def test_gradients_within_an_unchecked_shard_map_are_refused():
    """Averaged over devices each of which found a basis of its own they would mean nothing."""
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx, params = osub.galore(0.1, 3), kernels(a=(8, 12))
    grad = osub.subspace_value_and_grad(lambda p, x: jnp.mean(jnp.sin(x @ p["a"])), tx)
    local = lambda p, s, x: jax.lax.pmean(grad(p, s, x)[1], "data")
    specs = {"in_specs": (jax.P(), jax.P(), jax.P("data")), "out_specs": jax.P()}
    arguments = params, tx.init(params), jnp.ones((4, 8))
    unchecked = jax.shard_map(local, mesh=mesh, check_vma=False, **specs)
    with pytest.raises(ValueError, match="over 'data', within a pmap or a shard_map with"):
        jax.eval_shape(unchecked, *arguments)
    alone = jax.tree.map(lambda a: a[None], arguments)
    jax.eval_shape(jax.pmap(local, axis_name="data"), *alone)  # one device shares nothing


def test_explicit_axes_are_refused():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    params, tx = kernels(a=(8, 12)), osub.galore(0.1, 3)
    put = lambda t: jax.device_put(t, jax.NamedSharding(mesh, jax.P()))
    fun = lambda p, x: jnp.mean(jnp.sin(x @ p["a"]))
    grad = osub.subspace_value_and_grad(fun, tx)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="the mesh has explicit axes"):
        jax.eval_shape(grad, put(params), put(tx.init(params)), put(jnp.ones((4, 8))))
