"""State on several devices: its shardings, and what the compiled step moves between them."""

import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_subspace as osub
from optax_subspace._varying import varying_axes
from tests.train_helpers import on_eight_devices

PROGRAM = r"""
import json, re, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import optax_subspace as osub

mesh = Mesh(np.array(jax.devices()).reshape(8), ("x",))
spec = osub.MatrixSpec
CASES = {
    "left by columns": ((64, 128), P(None, "x"), "left", spec()),
    "right by rows": ((64, 128), P("x", None), "right", spec()),
    "left by rows": ((64, 128), P("x", None), "left", spec()),
    "stack by columns": ((3, 64, 128), P(None, None, "x"), "left", spec(1, 2)),
    "heads": ((64, 8, 16), P(None, "x", None), "left", spec(0, (1, 2))),
    "both by columns": ((64, 128), P(None, "x"), "both", spec()),
    "experts": ((2, 16, 32, 64), P(None, "x"), "left", spec(2, 3, batch_split=(1, 8))),
    "layers": ((8, 64, 32), P("x"), "right", spec(1, 2, batch_split=8)),
}
RULES = {
    "svd": osub.svd(), "iteration": osub.subspace_iteration(),
    "history": osub.history_pca(), "online": osub.online_pca(),
    "history after iteration": osub.history_pca(first=osub.subspace_iteration()),
    "history, moments turned": osub.history_pca(), "oja": osub.oja(),
    "history, micro-batches": osub.history_pca(),
}
SETTINGS = {
    "history, moments turned": {"moments": "project"},
    "history, micro-batches": {"moments": "project", "accumulate": 2},
}
STORED = {"left by columns": 8, "right by rows": 1, "experts": 8}  # shards
MOVED = r"\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute|all-reduce)\("
found = {}
if sys.argv[1:] == ["all"]:
    runs = [(case, rule, 0) for case in CASES for rule in RULES]
else:  # each case once, and each rule where it could need what another does not
    runs = [(case, "svd", 0) for case in CASES]
    runs += [(case, "iteration", 0) for case in ("right by rows", "left by rows")]
    runs += [("left by rows", "history after iteration", 0)]
    runs += [(case, rule, 0) for case in ("experts", "heads") for rule in ("history", "online")]
    runs += [(case, "history, moments turned", 0) for case in ("left by columns", "layers")]
    runs += [("stack by columns", "history, micro-batches", 0)]
runs += [(case, "svd", shards) for case, shards in STORED.items()]
for case, rule, shards in runs:
    (shape, axes, side, matrix), projector = CASES[case], RULES[rule]
    value = jax.random.normal(jax.random.key(0), shape)
    w = {"w": jax.device_put(value, NamedSharding(mesh, axes))}
    # With a larger epsilon Adam does not blow rounding up to steps of full size.
    make = osub.galore
    if shards:
        storage = {"shards": shards, "block": 16, "min_size": 0}
        make = lambda *a, **kw: osub.galore_adamw8bit(*a, storage=storage, **kw)
    settings = {"side": side, "rules": [("w", matrix)], **SETTINGS.get(rule, {})}
    tx = make(1e-2, 4, eps=1e-3, projector=projector, **settings)
    shardings = osub.state_shardings(tx, w)
    state = jax.jit(tx.init, out_shardings=shardings)(w)
    own = {"w": w["w"].sharding}

    def step(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(
        step, in_shardings=(own, shardings, own), out_shardings=(own, shardings)
    ).lower(w, state, w).compile()
    sizes = [
        int(np.prod([int(n) for n in dims.split(",") if n]))
        for dims in re.findall(MOVED, compiled.as_text())
    ]
    new, expected, other = w, {"w": value}, tx.init({"w": value})
    for _ in range(2):
        new, state = compiled(new, state, new)
        expected, other = step(expected, other, expected)
    inner = state[0].inner
    mu = inner.inner.mu["w"].codes if shards else inner.mu["w"]
    found[f"{case}/{rule}" + "/8 bits" * bool(shards)] = {
        "largest": max(sizes, default=0),
        "full": 64 * 128 if matrix.batch_split == 1 else 64 * 32,  # of one matrix
        "error": float(jnp.max(jnp.abs(np.asarray(new["w"]) - np.asarray(expected["w"])))),
        "basis": str(state[0].projection.leaves["w"].bases[0].sharding.spec),
        "moments": str(mu.sharding.spec),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    return on_eight_devices(PROGRAM)


@pytest.mark.slow
def test_no_projector_gathers_a_full_weight():
    everything = on_eight_devices(PROGRAM, "all")
    assert len(everything) == 67
    check_moves(everything)
    assert max(result["error"] for result in everything.values()) < 1e-5


def test_no_full_weight_is_gathered(found):
    check_moves(found)


def check_moves(found):
    for case, result in found.items():
        # An exact SVD of a matrix that is split along its shorter side needs all of it.
        needs_all = "by rows" in case and "iteration" not in case
        assert (result["largest"] >= result["full"]) == needs_all, (case, result)


def test_the_sharded_step_equals_the_step_on_one_device(found):
    for case, result in found.items():
        assert result["error"] < 1e-5, (case, result)


@pytest.mark.parametrize(
    ("case", "codes"),
    [
        ("left by columns", "P('x',)"),  # (parts of n, blocks, block)
        ("right by rows", "P('x',)"),  # (blocks, block): rows are consecutive
        ("experts", "P('x',)"),  # (parts of E, parts of n, blocks, block)
    ],
)
def test_blocks_of_moments_are_split_as_the_moments(found, case, codes):
    result = found[f"{case}/svd/8 bits"]
    assert result["moments"].replace("PartitionSpec", "P") == codes
    assert result["largest"] == found[f"{case}/svd"]["largest"]  # that of the projector alone


@pytest.mark.parametrize(
    ("case", "basis", "moments"),
    [
        ("left by columns", "P()", "P(None, 'x')"),
        ("right by rows", "P()", "P('x',)"),
        ("left by rows", "P('x',)", "P()"),
        ("stack by columns", "P()", "P(None, None, 'x')"),
        ("heads", "P()", "P(None, 'x')"),
        ("both by columns", "P()", "P()"),
        ("experts", "P(None, 'x')", "P(None, 'x')"),
        ("layers", "P('x',)", "P('x',)"),
    ],
)
def test_moments_follow_the_other_axis_and_bases_the_projected_one(found, case, basis, moments):
    clean = lambda text: text.replace("PartitionSpec", "P")
    assert clean(found[f"{case}/svd"]["basis"]) == basis
    assert clean(found[f"{case}/svd"]["moments"]) == moments


def test_parameters_without_a_mesh_are_refused():
    with pytest.raises(ValueError, match=r"parameter w has the sharding .*NamedSharding first"):
        osub.state_shardings(osub.galore(0.1), {"w": jnp.ones((8, 4))})
    int8 = osub.quantize_weights({"w": jnp.ones((64, 64))})
    with pytest.raises(ValueError, match="as it was before quantize_weights"):
        osub.state_shardings(osub.galore(0.1), int8)


def two_devices():
    # (What axes are by default differs between versions of JAX.)
    return jax.sharding.AbstractMesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def test_a_split_batch_axis_without_batch_split_is_warned_of():
    mesh = two_devices()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"w": jax.ShapeDtypeStruct((4, 16, 8), jnp.float32, sharding=sharding)}
    make = lambda split: osub.galore(
        0.1, 2, rules=[("w", osub.MatrixSpec(1, 2, batch_split=split))]
    )
    with pytest.warns(UserWarning, match=r"w is split along its batch axes \(0,\).*split=\(2,\)"):
        osub.state_shardings(make(1), params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        osub.state_shardings(make(2), params)


def test_blocks_that_would_straddle_shards_are_warned_of():
    mesh = two_devices()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    params = {"w": jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=sharding)}
    make = lambda shards: osub.adamw8bit(0.1, storage={"shards": shards})
    with pytest.warns(UserWarning, match=r"shape \(64, 128\) is split .*shards="):
        osub.state_shardings(make(1), params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = osub.state_shardings(make(2), params)
    assert found[0].inner.mu["w"].codes.spec == jax.sharding.PartitionSpec(None, "x")


def test_explicit_axes_and_interleaved_splits_are_told():
    explicit = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = lambda mesh, *spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    shape = lambda dims, sharding: {"w": jax.ShapeDtypeStruct(dims, jnp.float32, sharding=sharding)}
    with pytest.raises(ValueError, match=r"explicit axes \('x',\).*AxisType.Auto"):
        osub.state_shardings(osub.galore(0.1, 2), shape((16, 8), place(explicit, "x")))
    tx = osub.galore(0.1, 2)
    replicated = jax.device_put(jnp.ones((16, 8)), place(explicit))
    split = jax.device_put(replicated, place(explicit, None, "x"))
    with pytest.raises(ValueError, match=r"parameter w is split, and the mesh has explicit axes"):
        tx.init({"w": split})
    state = tx.init({"w": replicated})
    jax.eval_shape(tx.update, {"w": replicated}, state)
    with pytest.raises(ValueError, match=r"parameter w is split, and the mesh has explicit axes"):
        jax.eval_shape(tx.update, {"w": split}, state)
    mesh = two_devices()
    tx = osub.galore(0.1, 2, rules=[("w", osub.MatrixSpec((0, 1, 2), 3))])
    convolution = shape((3, 3, 16, 32), place(mesh, None, None, "x"))
    with pytest.warns(UserWarning, match=r"one of the axes \(0, 1, 2\).*first of them, 0"):
        osub.state_shardings(tx, convolution)


@pytest.mark.parametrize(
    "tx",
    [
        osub.galore(0.1, 3, every=2, moments="project", rules=[("s", osub.MatrixSpec(1, 2))]),
        osub.online_subspace_descent(0.1, 3, rules=[("s", osub.MatrixSpec(1, 2))]),
        osub.galore(0.1, 3, accumulate=2, rules=[("s", osub.MatrixSpec(1, 2))]),
        pytest.param(
            osub.online_subspace_descent(
                0.1,
                3,
                projector=osub.oja(first=osub.subspace_iteration()),
                rules=[("s", osub.MatrixSpec(1, 2))],
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["svd", "history_pca", "accumulate", "oja"],
)
def test_gradients_of_a_devices_own_within_shard_map(tx):
    """As of experts' or local steps; a mesh of one device has the same types as a larger one."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    normal = lambda i, shape: jax.random.normal(jax.random.key(i), (1, *shape))
    gradients = {"w": normal(0, (12, 8)), "s": normal(1, (2, 12, 8)), "b": normal(2, (8,))}

    def local(gradients):
        one = jax.tree.map(lambda g: g[0], gradients)
        params = jax.tree.map(jnp.ones_like, one)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(one, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=3)
        return jax.tree.map(lambda x: x[None], params)

    axes = jax.sharding.PartitionSpec("x")
    shared = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=axes, out_specs=axes))(gradients)
    alone = jax.jit(local)(gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), shared, alone)


def test_a_leaf_of_each_device_before_one_of_all_within_shard_map():
    """What devices share stays shared, whatever leaves come before it."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = osub.online_subspace_descent(1e-2, 2, rules=[(".*", osub.MatrixSpec())])
    axes = {"experts": jax.sharding.PartitionSpec("x"), "out": jax.sharding.PartitionSpec()}
    params = {"experts": jnp.eye(6, 4)[None], "out": jnp.eye(6, 4)}

    @jax.jit
    @lambda f: jax.shard_map(f, mesh=mesh, in_specs=(axes,), out_specs=axes)
    def steps(params):
        params |= {"experts": params["experts"][0]}

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=2)
        return params | {"experts": params["experts"][None]}

    after = steps(params)
    np.testing.assert_allclose(after["experts"][0], after["out"], rtol=1e-6)
    assert jnp.any(after["out"] != params["out"])


ONE_AFTER_THE_OTHER = r"""
import json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import optax_subspace as osub

mesh = Mesh(np.array(jax.devices()), ("x",))
found = {}
for name, tx, shape, axes in (
    ("columns", osub.galore(1e-2, 4), (32, 512), P(None, "x")),
    (
        "stack",
        osub.online_subspace_descent(
            1e-2, 4, side="left", rules=[(".*", osub.MatrixSpec(1, 2))],
            projector=osub.history_pca(first=osub.subspace_iteration()),
        ),
        (2, 32, 64), P(None, None, "x"),
    ),
):
    place = NamedSharding(mesh, axes)
    params = {f"w{i}": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for i in range(3)}
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params), osub.state_shardings(tx, params),
    )
    text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    lines = [line for line in text.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    found[name] = [line for line in lines if "in_turn" in line]
print(json.dumps(found))
"""


def test_the_order_of_leaves_gathers_nothing():
    """One leaf waits for another's low-rank gradient or basis: for a number of it alone."""
    assert on_eight_devices(ONE_AFTER_THE_OTHER) == {"columns": [], "stack": []}


def test_axes_of_a_shard_map_in_older_releases_of_jax(monkeypatch):
    """Where an array's type has them itself."""
    monkeypatch.setattr(jax, "typeof", lambda x: types.SimpleNamespace(vma=frozenset({"x"})))
    assert varying_axes(jnp.ones(2)) == {"x"}
    assert not varying_axes(jax.ShapeDtypeStruct((2,), jnp.float32))
