"""Updates inside of the backward pass equal those after it, and the gradient tree never exists."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_subspace as osub
from models import llama
from models.config import LlamaConfig
from tests.train_helpers import on_eight_devices

CONFIG = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_heads=2, num_layers=3)
KERNELS = (
    (r"layers/(q|k|v|o|gate|up|down)/kernel", osub.MatrixSpec(-2, -1)),
    (".*", None),
)


def model(**changes):
    """Embedding, block and loss of a tiny LLaMA, and its parameters."""
    config = LlamaConfig(**{**vars(CONFIG), **changes})
    parts = llama.pieces(config)
    embed = lambda rest, windows: parts.embed(rest, windows[:, :-1])
    loss = lambda rest, x, windows: parts.loss(rest, x, windows[:, 1:], None)[0]
    return (embed, parts.block, loss), llama.init_params(config, jax.random.key(0))


def batches(count, size=4):
    return jax.random.randint(jax.random.key(1), (count, size, 17), 0, CONFIG.vocab_size)


def plain_step(functions, tx):
    embed, block, loss = functions

    def total(params, batch):
        x, again = embed(params, batch), jax.checkpoint(block)
        x, _ = jax.lax.scan(lambda x, layer: (again(layer, x), None), x, params["layers"])
        return loss(params, x, batch)

    def step(params, state, batch):
        value, gradients = jax.value_and_grad(total)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value, optax.tree.norm(gradients)

    return jax.jit(step)


def relative(ours, theirs):
    return jax.tree.map(
        lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)), ours, theirs
    )


def run_both(functions, params, tx, plain_tx=None, steps=10, **options):
    """Parameters after some fused steps, and after as many plain ones."""
    fused = osub.fused_backward(*functions, tx, **options)
    step = jax.jit(fused.step)
    plain_tx = plain_tx or tx
    plain = plain_step(functions, plain_tx)
    ours, state = params, jax.jit(fused.init)(params)
    theirs, plain_state = params, plain_tx.init(params)
    before = state
    for batch in batches(steps):
        ours, state, metrics = step(ours, state, batch)
        theirs, plain_state, value, norm = plain(theirs, plain_state, batch)
        np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
    for path, moved in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: bool(jnp.any(a != b)), ours, params)
    ):
        assert moved, path
    return ours, theirs, metrics, norm


OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "lion": optax.lion(1e-3),
    "galore": osub.galore(1e-2, 8, every=3, rules=KERNELS, weight_decay=0.1),
    "osd": osub.online_subspace_descent(1e-2, 8, rules=KERNELS),
    # (Both keep the norms' scales in float32 and everything else in blocks of one layer.)
    "8bit": osub.quantize_state(optax.lion(1e-3), min_size=1024),
    "galore8bit": osub.galore_adamw8bit(
        1e-2, 16, every=3, rules=KERNELS, storage={"min_size": 512}
    ),
}


@pytest.mark.parametrize(
    ("remat", "tied"),
    [
        *((True, False), (False, True)),
        *(pytest.param(x, x, marks=pytest.mark.slow) for x in (True, False)),
    ],
)
def test_sgd_is_bit_equal_to_the_plain_step(remat, tied):
    functions, params = model(tie_embeddings=tied)
    ours, theirs, metrics, norm = run_both(
        functions, params, osub.lomo(0.1), remat=remat, grad_norm=True
    )
    chex.assert_trees_all_equal(ours, theirs)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (n in ("lion", "osd", "8bit", "galore")))
        for n in OPTIMIZERS
    ],
)
def test_any_optimizer_equals_the_plain_step(name):
    functions, params = model()
    ours, theirs, *_ = run_both(functions, params, OPTIMIZERS[name], remat=name != "galore")
    away = relative(ours, theirs)
    assert max(jax.tree.leaves(away)) < 1e-5, away


@pytest.mark.parametrize(
    ("options", "clip"),
    [
        ({"clip_norm": 0.5}, optax.clip_by_global_norm(0.5)),
        pytest.param({"clip_value": 0.01}, optax.clip(0.01), marks=pytest.mark.slow),
        pytest.param({"clip_norm": 100.0}, optax.identity(), marks=pytest.mark.slow),
        (
            {"clip_value": 0.01, "clip_norm": 0.3},
            optax.chain(optax.clip(0.01), optax.clip_by_global_norm(0.3)),
        ),
    ],
)
def test_clipping_equals_optax_before_the_optimizer(options, clip):
    functions, params = model(tie_embeddings="clip_norm" in options)
    tx = optax.sgd(0.3)
    ours, theirs, *_ = run_both(functions, params, tx, optax.chain(clip, tx), steps=4, **options)
    assert max(jax.tree.leaves(relative(ours, theirs))) < 1e-5


def test_each_layer_clipped_by_its_own_norm():
    (embed, block, loss), params = model()
    fused = osub.fused_backward(embed, block, loss, optax.sgd(1.0), clip_layer_norm=0.01)
    after, _, metrics = jax.jit(fused.step)(params, fused.init(params), batches(1)[0])
    steps = jax.tree.map(lambda a, b: a - b, after, params)
    for i in range(CONFIG.num_layers):
        norm = optax.tree.norm(jax.tree.map(lambda x, i=i: x[i], steps["layers"]))
        np.testing.assert_allclose(norm, 0.01, rtol=1e-3)
    np.testing.assert_allclose(optax.tree.norm(steps["head"]), 0.01, rtol=1e-3)
    assert np.isnan(metrics.grad_norm)


@pytest.mark.slow
def test_micro_batches_accumulate_in_the_subspace():
    functions, params = model()
    tx = osub.galore(1e-2, 8, every=2, rules=KERNELS, weight_decay=0.1, accumulate=2)
    ours, theirs, *_ = run_both(functions, params, tx, steps=8)
    assert max(jax.tree.leaves(relative(ours, theirs))) < 1e-5


@pytest.mark.slow
def test_random_rules_differ_from_layer_to_layer():
    functions, params = model()
    tx = osub.galore(1e-2, 8, rules=KERNELS, projector=osub.random_projection())
    fused = osub.fused_backward(*functions, tx)
    _, state, _ = jax.jit(fused.step)(params, fused.init(params), batches(1)[0])
    bases = state.layers[0].projection.leaves["layers/q/kernel"].bases[0]
    assert bases.shape == (3, 32, 8)
    assert float(jnp.max(jnp.abs(bases[0].T @ bases[1]))) < 0.9


MIXING = {
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "apply_if_finite": optax.apply_if_finite(optax.sgd(0.1), 3),
    "prodigy": optax.contrib.prodigy(0.1),
    "normalize_by_update_norm": optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", MIXING)
def test_transformations_that_mix_leaves_are_refused_by_name(name):
    functions, params = model()
    tx = optax.chain(osub.scale_by_subspace(optax.scale_by_adam(), rules=KERNELS), MIXING[name])
    with pytest.raises(ValueError, match=f"{name} mixes leaves: the update of .*clip_norm="):
        osub.fused_backward(*functions, tx).init(params)


def test_a_state_that_carries_another_leafs_gradient_is_found_out():
    """The first update keeps leaves apart, those after it do not."""

    def update(updates, state, params=None):
        del params
        leaves, structure = jax.tree.flatten(updates)
        new = structure.unflatten([g * state for g in leaves])
        return new, jnp.float32(jnp.sum(leaves[0]))

    def carries_norm():
        return optax.GradientTransformation(lambda p: jnp.float32(1), update)

    tx = carries_norm()
    functions, params = model()
    with pytest.raises(ValueError, match="mixes leaves"):
        osub.fused_backward(*functions, tx).init(params)
    with pytest.raises(ValueError, match="dadapt_adamw mixes leaves"):
        osub.fused_backward(*functions, optax.contrib.dadapt_adamw(0.1)).init(params)


def test_transformations_that_keep_leaves_apart_are_accepted():
    functions, params = model()
    schedule = optax.cosine_decay_schedule(0.1, 10)
    accepted = [
        optax.adafactor(0.1),
        optax.lamb(schedule),
        optax.contrib.muon(0.1),
        optax.inject_hyperparams(optax.sgd)(schedule),
        optax.multi_transform(
            {"a": optax.sgd(0.1), "b": optax.adam(0.1)}, lambda p: jax.tree.map(lambda _: "a", p)
        ),
        osub.galore(0.1, 4, rules=KERNELS, accumulate=2, stagger=True, weight_decay=0.1),
        osub.online_subspace_adamw8bit(schedule, 4, rules=KERNELS),
        osub.adalomo(schedule, weight_decay=0.1),
    ]
    for tx in accepted:
        jax.eval_shape(osub.fused_backward(*functions, tx).init, params)


def test_errors_name_the_parameter_and_the_remedy():
    functions, params = model()
    init = lambda tree, tx=None, **kw: osub.fused_backward(
        *functions, tx or osub.lomo(0.1), **kw
    ).init(tree)
    with pytest.raises(ValueError, match=r"MultiSteps .*accumulate=k"):
        init(params, optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation())
    with pytest.raises(ValueError, match=r"no key 'blocks', but .*'layers'"):
        init(params, layers="blocks")
    odd = {**params, "layers": {**params["layers"], "odd": jnp.ones((2, 4))}}
    with pytest.raises(ValueError, match=r"layers/odd has shape \(2, 4\).* of 3 entries"):
        init(odd)
    with pytest.raises(ValueError, match="no layers"):
        init({**params, "layers": {}})
    whole = {**params, "layers": osub.quantize_weights(params["layers"], KERNELS, min_size=0)}
    whole["layers"]["q"] = osub.quantize_weights(params["layers"]["q"], min_size=0)
    with pytest.raises(ValueError, match=r"layers/q/kernel .* layer by layer"):
        init(whole)


@pytest.mark.slow
def test_adam_in_eight_bits_is_near_the_plain_step():
    """Its last bits differ, which takes a moment now and then to another code."""
    functions, params = model()
    tx = osub.quantize_state(optax.adam(1e-2, eps=1e-6), min_size=1024)
    ours, theirs, *_ = run_both(functions, params, tx)
    assert max(jax.tree.leaves(relative(ours, theirs))) < 1e-2


def test_int8_weights_are_updated_in_place_with_stochastic_rounding():
    functions, params = model()
    store = lambda layer: osub.quantize_weights({"layers": layer}, KERNELS, min_size=0)["layers"]
    stored = {**params, "layers": jax.vmap(store)(params["layers"])}
    assert isinstance(stored["layers"]["q"]["kernel"], osub.QuantizedWeight)
    assert stored["layers"]["mlp_norm"]["scale"].dtype == jnp.float32
    arrays = osub.dequantize(stored)
    tx = optax.sgd(0.02)
    ends = {}
    for seed in (None, 0, 1):
        fused = osub.fused_backward(*functions, tx, seed=seed)
        with warnings.catch_warnings(record=True) as caught:
            step, state, now = jax.jit(fused.step), fused.init(stored), stored
        told = [str(w.message) for w in caught if "seed=" in str(w.message)]
        assert len(told) == (seed is None)
        for batch in batches(3):
            now, state, _ = step(now, state, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(now, stored)
        ends[seed] = now
    codes = lambda tree: np.asarray(tree["layers"]["q"]["kernel"].codes, int)
    # Steps far below the distance of two codes move a few weights of every layer if they are
    # rounded stochastically, and none that way without.
    moved = np.abs(codes(ends[0]) - codes(stored))
    assert moved.max() == 1 and np.all(np.any(moved, axis=(1, 2)))
    assert np.any(codes(ends[0]) != codes(ends[1]))
    # The first step is that of the dequantized weights, rounded.
    tx = optax.sgd(1.0)
    fused = osub.fused_backward(*functions, tx)
    now, _, _ = jax.jit(fused.step)(stored, fused.init(stored), batches(1)[0])
    exact, *_ = plain_step(functions, tx)(arrays, tx.init(arrays), batches(1)[0])
    found = osub.dequantize(now)["layers"]["q"]["kernel"]
    expected = exact["layers"]["q"]["kernel"]
    code = jnp.max(jnp.abs(expected)) / 127
    assert float(jnp.max(jnp.abs(found - expected))) < 0.51 * code
    chex.assert_trees_all_close(now["embed"], exact["embed"], rtol=1e-5, atol=1e-6)


def test_float16_with_a_loss_scale():
    functions, params = model(dtype="float16", param_dtype="float16")
    how = osub.LossScale(initial=2.0**40, factor=16.0, period=3)
    fused = osub.fused_backward(*functions, optax.sgd(0.1, momentum=0.9), loss_scale=how)
    step, state, now = jax.jit(fused.step), fused.init(params), params
    scales, skipped = [], []
    for batch in batches(16):
        before = now, state
        now, state, metrics = step(now, state, batch)
        scales.append(float(state.scale))
        skipped.append(float(metrics.skipped))
        if skipped[-1]:
            chex.assert_trees_all_equal(now, before[0])
            chex.assert_trees_all_equal(state.layers, before[1].layers)
            chex.assert_trees_all_equal(state.rest, before[1].rest)
    assert skipped[0] == 1 and scales[0] == 2.0**36
    used = skipped.index(0)
    assert 0 < used < 12 and scales[used] == scales[used - 1]
    assert max(scales[used:]) > scales[used]  # grown after three good steps
    assert now["layers"]["q"]["kernel"].dtype == jnp.float16
    assert int(state.step) == 16 and int(state.skipped) == sum(skipped)
    chex.assert_tree_all_finite(now)


def test_bfloat16_weights_keep_the_states_dtypes():
    functions, params = model(dtype="bfloat16", param_dtype="bfloat16")
    fused = osub.fused_backward(*functions, optax.adam(1e-3), seed=0)
    state = fused.init(params)
    assert state.layers[0].mu["layers"]["q"]["kernel"].dtype == jnp.bfloat16
    _, after, _ = jax.jit(fused.step)(params, state, batches(1)[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def mlp(layers=24, width=128):
    """Wide layers and few tokens: what a step holds is weights and state."""
    params = {
        "embed": {"w": jnp.eye(4, width)},
        "layers": {"w": jnp.ones((layers, width, width)) / width},
        "head": {"w": jnp.ones(width)},
    }
    functions = (
        lambda rest, batch: batch @ rest["embed"]["w"],
        lambda layer, x: jnp.tanh(x @ layer["w"]),
        lambda rest, x, batch: jnp.mean(x @ rest["head"]["w"]),
    )
    return functions, params


@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize(
    "tx",
    [
        osub.lomo(0.1),
        optax.adam(1e-3),
        osub.galore_adamw8bit(
            1e-3, 16, rules=[("layers", osub.MatrixSpec(-2, -1))], storage={"min_size": 0}
        ),
    ],
    ids=["lomo", "adam", "galore8bit"],
)
def test_neither_gradients_nor_copies_of_the_stack_are_held(tx, remat):
    functions, params = mlp()
    fused = osub.fused_backward(*functions, tx, remat=remat)
    state = jax.eval_shape(fused.init, params)
    batch = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    compiled = jax.jit(fused.step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    memory = compiled.memory_analysis()
    layer = 128 * 128 * 4
    # A few arrays of one layer, where a gradient tree would be of 24.
    assert memory.temp_size_in_bytes < 8 * layer
    held = jax.tree.leaves((params, state))
    assert memory.alias_size_in_bytes >= 0.99 * sum(x.size * x.dtype.itemsize for x in held)


EIGHT_DEVICES = r"""
import json, re
import jax, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import optax_subspace as osub
from tests import test_layerwise as t

functions, params = t.model(attention="einsum", loss="logits", tie_embeddings=True)
tx = osub.galore(1e-2, 8, every=2, rules=t.KERNELS, weight_decay=0.1, accumulate=2)
fused = osub.fused_backward(*functions, tx, clip_norm=0.5)
mesh = Mesh(np.array(jax.devices()).reshape(8), ("data",))
everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
step = jax.jit(
    fused.step, donate_argnums=(0, 1), in_shardings=(everywhere, everywhere, split),
    out_shardings=everywhere,
)
plain_tx = optax.chain(optax.clip_by_global_norm(0.5), tx)
plain = t.plain_step(functions, plain_tx)
theirs, plain_state = params, plain_tx.init(params)
params = jax.device_get(params)  # apart from what is donated
ours = jax.device_put(params, everywhere)
state = jax.device_put(fused.init(params), everywhere)
text = step.lower(ours, state, t.batches(1, 16)[0]).compile().as_text()
for batch in t.batches(8, 16):
    ours, state, metrics = step(ours, state, jax.device_put(batch, split))
    theirs, plain_state, loss, norm = plain(theirs, plain_state, batch)
whole = sum(x.size for x in jax.tree.leaves(params["layers"]))
computation, reduced = "", {}
for line in text.splitlines():
    if line and not line.startswith(" "):
        computation = line.split(" ")[0] if not line.startswith("ENTRY") else "ENTRY"
    if re.search(r" all-reduce(-start)?\(", line):
        result = line.split(" all-reduce")[0]
        size = sum(
            int(np.prod([int(n) for n in dims.split(",") if n]))
            for dims in re.findall(r"f32\[([\d,]*)\]", result)
        )
        reduced[computation] = reduced.get(computation, 0) + size
print(json.dumps({
    "away": max(jax.tree.leaves(t.relative(jax.device_get(ours), jax.device_get(theirs)))),
    "loss": float(abs(metrics.loss - loss)),
    "norm": float(abs(metrics.grad_norm / norm - 1)),
    "reduced": reduced,
    "layer": whole // 3,
}))
"""


@pytest.mark.slow
def test_clipped_accumulated_and_parallel_at_once_equals_the_plain_step():
    """Fused, with micro-batches, a global norm, a tied embedding and eight devices."""
    found = on_eight_devices(EIGHT_DEVICES)
    assert found["away"] < 1e-5 and found["loss"] < 1e-5 and found["norm"] < 1e-5
    # Gradients are reduced layer by layer, within the loops: no reduction is of several layers.
    in_loops = [size for where, size in found["reduced"].items() if where != "ENTRY"]
    assert in_loops and max(in_loops) <= 1.1 * found["layer"]
    assert found["reduced"].get("ENTRY", 0) < 2 * found["layer"]
