"""Projection at the source over several devices: what crosses, and what stays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_subspace as osub
from tests.train_helpers import on_eight_devices
from tests.trees import kernels

PARALLEL = r"""
import functools, json, math, pathlib, re, tempfile
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import optax_subspace as osub

mesh = Mesh(np.array(jax.devices()).reshape(8), ("data",))
put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
rules = [("layers/", osub.MatrixSpec(-2, -1)), ("head", None)]
# (Adam would blow up the rounding of directions that these gradients do not have.)
tx = osub.galore(
    1e-3, 8, projector=osub.subspace_iteration(), rules=rules, side="left", inner=optax.trace(0.9)
)
keys = jax.random.split(jax.random.key(0), 4)
params = {
    "layers": {
        "up": jax.random.normal(keys[0], (3, 64, 96)) / 8,
        "down": jax.random.normal(keys[1], (3, 96, 64)) / 10,
    },
    "head": jax.random.normal(keys[2], (64, 16)),
}
def loss(params, x):
    def block(x, layer):
        return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None
    x, _ = jax.lax.scan(block, x, params["layers"])
    return jnp.mean((x @ params["head"]) ** 2)
@functools.cache
def make(refresh, tx=tx):
    grad = osub.subspace_value_and_grad(loss, tx, refresh=refresh)
    def step(params, state, x):
        value, gradients, source = grad(params, state, x)
        updates, state = tx.update(gradients, state, params, source=source)
        return optax.apply_updates(params, updates), state, value
    return jax.jit(step)
x = jax.random.normal(keys[3], (6, 32, 64))
found = []
for split in (True, False):
    place = (lambda t, s: put(t, s)) if split else (lambda t, s: t)
    now, batches = place(params, P()), [place(part, P("data")) for part in x]
    state, values = place(tx.init(params), P()), []
    for i, batch in enumerate(batches):
        now, state, value = make(i == 0)(now, state, batch)
        values.append(float(value))
    found.append(values)
SIZES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
def after(rule):
    def step(params, state, x):
        updates, state = rule.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state
    return jax.jit(step)
def crossed(step, rule, dtype):
    # Bytes of all-reduces, and other collectives.
    now = jax.tree.map(lambda w: w.astype(dtype), params)
    placed = put(now, P()), put(rule.init(now), P()), put(x[0].astype(dtype), P("data"))
    with tempfile.TemporaryDirectory() as folder:
        # (As the partitioner leaves it: XLA:CPU reduces bfloat16 in float32.)
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd.*"}
        step.lower(*placed).compile(compiler_options=options)
        [path] = pathlib.Path(folder).glob("*after_spmd-partitioning*.txt")
        text = path.read_text()
    lines = [l for l in text.splitlines() if re.search(r" all-reduce(-start)?\(", l)]
    results = [line.split(" = ")[1].split(" all-reduce")[0] for line in lines]
    shapes = [shape for one in results for shape in re.findall(r"(\w+)\[([\d,]*)\]", one)]
    size = lambda dims: math.prod(int(n) for n in dims.split(",") if n)
    total = sum(SIZES[kind] * size(dims) for kind, dims in shapes)
    others = ("all-gather(", "all-to-all(", "collective-permute(", "reduce-scatter(")
    return total, [kind for kind in others if kind in text]
follows = osub.online_subspace_descent(1e-3, 8, rules=rules, side="left", moments="keep")
moved, others = {}, []
for dtype in ("float32", "bfloat16"):
    for name, step, rule in (
        ("source", make(False), tx), ("afterwards", after(tx), tx),
        *([("follows", make(False, follows), follows)] if dtype == "float32" else []),
    ):
        moved[f"{name} {dtype}"], more = crossed(step, rule, dtype)
        others += more if name != "afterwards" else []
print(json.dumps({"values": found, "moved": moved, "others": others}))
"""


SPLIT = r"""
import json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import optax_subspace as osub

mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "seq"))
at = lambda shape, *axes: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes))
)
def gathered(tx, loss, params, x):
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params), osub.state_shardings(tx, params),
    )
    def step(params, state, x):
        _, gradients, source = osub.subspace_value_and_grad(loss, tx)(params, state, x)
        return tx.update(gradients, state, params, source=source)
    text = jax.jit(step).lower(params, state, x).compile().as_text()
    moved = re.findall(r"\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", text)
    return [shape for shape in moved if int(np.prod([int(n) for n in shape.split(",") if n])) > 8]
dense = lambda p, x: jnp.mean(jnp.tanh(x @ p["w"]) ** 2)
experts = lambda p, x: jnp.mean(jax.vmap(lambda x, w: jnp.tanh(x @ w))(x, p["w"]) ** 2)
stack = lambda p, x: jnp.mean(
    jax.vmap(lambda w: jax.vmap(lambda x, w: jnp.tanh(x @ w), (0, 0))(x, w))(p["w"]) ** 2
)
spec = osub.MatrixSpec(-2, -1, batch_split=8)
rows, both = (osub.MatrixSpec(-2, -1, batch_split=split) for split in ((1, 4), (2, 4)))
one = osub.subspace_iteration()
found = {
    "time first": gathered(
        osub.galore(1e-2, 4, projector=one), dense, {"w": at((16, 24))},
        at((8, 64, 16), None, ("data", "seq")),
    ),
    "both": gathered(
        osub.online_subspace_descent(1e-2, 4, projector=osub.history_pca(first=one)), dense,
        {"w": at((16, 24))}, at((8, 64, 16), "data", "seq"),
    ),
    "experts": gathered(
        osub.galore(1e-2, 4, rules=[("w", spec)]), experts,
        {"w": at((16, 8, 12), ("data", "seq"))}, at((16, 32, 8), ("data", "seq")),
    ),
    "as many layers": gathered(
        osub.galore(1e-2, 4, projector=one, rules=[("w", rows)]), stack,
        {"w": at((4, 4, 8, 12), None, "seq")}, at((4, 32, 8), "seq"),
    ),
    "both split": gathered(
        osub.galore(1e-2, 4, projector=one, rules=[("w", both)]), stack,
        {"w": at((4, 8, 8, 12), "data", "seq")}, at((8, 32, 8), "seq"),
    ),
}
print(json.dumps(found))
"""


def test_split_tokens_and_split_experts_stay_where_they_are():
    """Also where the axis that is split isn't the first, and on a step that finds bases."""
    found = on_eight_devices(SPLIT)
    assert found == dict.fromkeys(
        ("time first", "both", "experts", "as many layers", "both split"), []
    )


def test_only_low_rank_gradients_cross_devices():
    """Eight devices: the losses of one; all-reduces, in bytes, of R and of what isn't projected."""
    found = on_eight_devices(PARALLEL)
    np.testing.assert_allclose(*found["values"], rtol=1e-5)
    assert not found["others"]
    # (Of the scan's body, which runs three times, one layer's are counted.)
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        moved, full = (found["moved"][f"{name} {dtype}"] for name in ("source", "afterwards"))
        head, kernels = 64 * 16 * size, 2 * 64 * 96 * size
        scalars = 16  # the loss
        assert kernels + head <= full <= kernels + head + scalars
        # 8 rows in place of 64 or 96.
        assert moved - head - scalars <= 1.1 * (8 / 64) * (full - head)
        assert moved - head >= 8 * (96 + 64) * size
    # Rules that follow have G R^T as well, and the gradient in eight directions for its norm.
    following = found["moved"]["follows float32"] - found["moved"]["source float32"]
    assert following <= 4 * (2 * (64 * 8 + 96 * 8) + 64)


WITHIN = r"""
import json
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, PartitionSpec as P
import optax_subspace as osub

mesh = Mesh(np.array(jax.devices()).reshape(8), ("data",))
keys = jax.random.split(jax.random.key(0), 2)
x = jax.random.normal(keys[0], (32, 64))
# Tokens spread over a shard_map's axis are tokens of one kernel; kernels of their own are apart.
sine = lambda p, x: jnp.mean(jnp.sin(x @ p["a"]))
small = {"a": jax.random.normal(keys[1], (64, 96)) / 8}
local = osub.scale_by_subspace(
    optax.identity(), rank=8, side="left", projector=osub.subspace_iteration()
)
within = jax.shard_map(
    lambda p, x: jax.lax.pmean(sine(p, x), "data"),
    mesh=mesh, in_specs=(P(), P("data")), out_specs=P(),
)
def one(p, state, x, fun, at_source):
    total = jax.tree.map(jnp.zeros_like, p)
    for refresh in (True, False):  # the second step has none
        gradients, more = jax.grad(fun)(p, x), {}
        if at_source:
            grad = osub.subspace_value_and_grad(fun, local, refresh=refresh)
            _, gradients, more["source"] = grad(p, state, x)
        updates, state = local.update(gradients, state, p, **more)
        total = jax.tree.map(jnp.add, total, updates)
    return total
def apart(p, state, x, at_source):
    p, state = jax.tree.map(lambda a: a[0], (p, state))
    return jax.tree.map(lambda a: a[None], one(p, state, x, sine, at_source))
stack = {"a": jnp.stack([small["a"]] * 8)}
errors = []
for run, args in (
    (lambda s: lambda *a: one(*a, within, s), (small, local.init(small), x)),
    (
        lambda s: jax.shard_map(
            lambda *a: apart(*a, s), mesh=mesh, in_specs=(P("data"),) * 3, out_specs=P("data")
        ),
        (stack, jax.vmap(local.init)(stack), x),
    ),
):
    ours, theirs = (jax.jit(run(s))(*args)["a"] for s in (True, False))
    errors.append(float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)))
print(json.dumps(errors))
"""


@pytest.mark.slow
def test_within_shard_map_gradients_are_those_that_are_projected_afterwards():
    assert max(on_eight_devices(WITHIN)) < 1e-5


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("rule", [osub.svd(), osub.online_pca()])
def test_devices_may_have_kernels_of_their_own(rule, refresh):
    """Around a ``shard_map``, whose axis is one of experts; in a slow test the numbers."""
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rules = [("e", osub.MatrixSpec(-2, -1))]
    tx = osub.scale_by_subspace(optax.identity(), rank=3, rules=rules, projector=rule)
    local = lambda p, x: jax.lax.pmean(
        jnp.mean(jnp.sin(jax.vmap(lambda x, k: x @ k)(x, p["e"]))), "data"
    )
    specs = {"in_specs": (jax.P("data"), jax.P("data")), "out_specs": jax.P()}
    loss = jax.shard_map(local, mesh=mesh, **specs)
    params = kernels(e=(4, 12, 8))
    grad = osub.subspace_value_and_grad(loss, tx, refresh=refresh)
    _, found, _ = jax.eval_shape(grad, params, tx.init(params), jnp.ones((4, 6, 12)))
    assert found["e"].low.shape == (4, 12, 3)
