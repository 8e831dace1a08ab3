"""The trainer's step with the fused backward pass, and with adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import llama, lora
from models.config import LlamaConfig
from optax_subspace import FusedState, LossScale, QuantizedWeight, dequantize
from tests.train_helpers import batch_shapes, pair
from train import gradient, memory, step
from train.config import Config, LoraConfig, OptimizerConfig, resolve
from train.optimizer import make

MODEL = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_heads=2, num_layers=2)
NONE = LoraConfig()
WINDOWS = jax.random.randint(jax.random.key(1), (6, 4, 17), 0, 96)


def train(name, fused, adapters=NONE, model=MODEL, int8=False, steps=6):
    """State before and after some steps, the last step's metrics, and the optimizer."""
    options = resolve(Config(optimizer=OptimizerConfig(name=name, rank=8, every=3))).optimizer
    optimizer = make(options, 20, fused, adapters)
    layerwise = step.make_fused(model, optimizer, 0) if fused else None
    before = step.init_state(model, optimizer, jax.random.key(0), int8, layerwise)
    run = step.make_train_step(model, optimizer, 0, layerwise)
    state = jax.tree.map(jnp.copy, before)
    for windows in WINDOWS[:steps]:
        state, metrics = run(state, pair(windows))
    return before, state, metrics, optimizer


def test_an_evaluation_makes_arrays_of_int8_kernels_layer_by_layer():
    model = dataclasses.replace(MODEL, hidden_size=64, intermediate_size=172, num_layers=8)
    stored = step.kernels_in_int8(llama.init_params(model, jax.random.key(0)))
    run, batch, weights = step.make_eval_step(model), pair(WINDOWS[0]), dequantize(stored)
    np.testing.assert_allclose(run(stored, batch), run(weights, batch), rtol=1e-6)
    temporaries = run.lower(stored, batch).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 0.5 * memory.tree_bytes(weights["layers"])


def largest_difference(a, b):
    away = jax.tree.map(lambda x, y: float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)), a, b)
    return max(jax.tree.leaves(away))


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("lomo", True),
        ("galore", False),
        pytest.param("online_subspace_descent", True, marks=pytest.mark.slow),
    ],
)
def test_fused_steps_equal_plain_ones(name, remat):
    model = dataclasses.replace(MODEL, remat=remat)
    _, ours, found, fused = train(name, True, model=model)
    _, theirs, expected, plain = train(name, False, model=model)
    assert largest_difference(ours.params, theirs.params) < 1e-5
    assert int(ours.step) == 6 and float(found.skipped) == 0
    for field in ("loss", "grad_norm", "learning_rate"):
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), rtol=1e-5)
    if name != "lomo":  # which has no momentum
        energies = [
            step.make_hamiltonian_step(optimizer)(state, jnp.float32(2))
            for optimizer, state in ((fused, ours), (plain, theirs))
        ]
        np.testing.assert_allclose(energies[0][:4], energies[1][:4], rtol=1e-5)
        assert float(energies[0].kinetic) > 0


@pytest.mark.slow
def test_the_rate_that_is_logged_is_that_of_the_update_after_overflows(monkeypatch):
    monkeypatch.setattr(step, "LossScale", lambda: LossScale(initial=2.0**40, factor=2.0**12))
    model = dataclasses.replace(MODEL, dtype="float16")
    _, state, metrics, optimizer = train("lomo", True, model=model)
    skipped = int(state.opt_state.skipped)
    assert 0 < skipped < 6 and metrics.skipped == 0
    assert step.updates_done(state) == 6 - skipped
    counts = optax.tree.get_all_with_path(state.opt_state.layers, "count")
    assert all(np.all(count == 6 - skipped) for _, count in counts)
    assert float(metrics.learning_rate) == float(optimizer.schedule(6 - skipped - 1))


def test_updates_done_are_the_steps_that_did_not_overflow():
    at = lambda skipped: FusedState(jnp.int32(20), (), {}, jnp.ones([]), jnp.zeros([]), skipped)
    state = lambda opt_state: step.State(jnp.int32(10), {}, opt_state)
    assert step.updates_done(state(at(3))) == 7
    assert step.updates_done(state(at(3)), 2) == 8
    assert step.updates_done(state(())) == 10


@pytest.mark.parametrize(
    "name", ["galore_adamw8bit", pytest.param("adalomo", marks=pytest.mark.slow)]
)
def test_int8_weights_of_every_layer_move(name):
    before, after, metrics, _ = train(name, True, int8=True)
    kernels = before.params["layers"]["gate"]["kernel"], after.params["layers"]["gate"]["kernel"]
    assert all(isinstance(kernel, QuantizedWeight) for kernel in kernels)
    assert np.all(np.any(np.asarray(kernels[0].codes) != np.asarray(kernels[1].codes), (1, 2)))
    assert np.isfinite(metrics.loss)


def is_adapter(path):
    return path[-1].name in ("lora_a", "lora_b") if hasattr(path[-1], "name") else False


@pytest.mark.parametrize("freeze", [pytest.param("nothing", marks=pytest.mark.slow), "all"])
def test_adapters_train_with_the_base_and_alone(freeze):
    adapters, only = LoraConfig(rank=4, freeze=freeze), freeze == "all"
    results = [train("lomo", fused, adapters) for fused in (True, False)]
    (before, ours, found, _), (_, theirs, expected, _) = results
    assert largest_difference(ours.params, theirs.params) < 1e-4
    np.testing.assert_allclose(found.grad_norm, expected.grad_norm, rtol=1e-5)
    # The rate that is logged is that of what is trained: 6 of 20 steps, 2 of them warm-up.
    assert (float(found.learning_rate) < 0.001) == only
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before.params, ours.params)
    for path, value in jax.tree_util.tree_leaves_with_path(moved):
        assert value == (is_adapter(path) or not only), path


def test_a_model_with_new_adapters_is_the_model_itself_and_merging_keeps_it():
    params = llama.init_params(MODEL, jax.random.key(0))
    adapted = lora.add(params, 4, 16.0, jax.random.key(1))
    run = jax.jit(lambda p: llama.merge(llama.graphdef(MODEL), p)(WINDOWS[0]))
    np.testing.assert_array_equal(run(adapted), run(params))
    grown = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.05 if is_adapter(path) else x, adapted
    )
    merged = lora.merge(grown)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert float(jnp.max(jnp.abs(run(grown) - run(params)))) > 1e-3
    np.testing.assert_allclose(run(merged), run(grown), rtol=1e-4, atol=1e-5)


def test_predicted_memory_of_a_fused_step():
    model = dataclasses.replace(MODEL, num_layers=8, remat=True, hidden_size=64)
    batch = batch_shapes(8, 64)
    options = resolve(Config(optimizer=OptimizerConfig(name="lomo", clip_norm=None))).optimizer
    found, compiled = {}, {}
    for fused in (True, False):
        optimizer = make(options, 20, fused)
        layerwise = step.make_fused(model, optimizer) if fused else None
        state = jax.eval_shape(
            lambda key, o=optimizer, f=layerwise: step.init_state(model, o, key, fused=f),
            jax.random.key(0),
        )
        parts = llama.pieces(model) if fused else None
        loss = gradient.make_loss(model, optimizer)
        found[fused] = memory.predict(state, batch, loss, parts, remat=True)
        program = step.make_train_step(model, optimizer, None, layerwise)
        compiled[fused] = memory.measure(program.lower(state, batch).compile(), state)
    # The embedding's is the largest gradient here, or a layer's.
    layer = 4 * (4 * 64 * 64 + 3 * 64 * 48 + 2 * 64)
    assert found[True].gradients == max(layer, 4 * 96 * 64)
    assert found[True].gradients < found[False].gradients / 8
    assert compiled[True].temporaries < compiled[False].temporaries
    inputs = 8 * 8 * 64 * 64 * 4
    assert inputs < found[True].activations < compiled[True].temporaries


@pytest.mark.parametrize("fused", [False, True])
def test_frozen_weights_have_no_gradients_in_the_prediction(fused):
    batch = batch_shapes(2, 16)
    options = resolve(Config(optimizer=OptimizerConfig(name="lomo"))).optimizer
    optimizer = make(options, 20, fused, LoraConfig(rank=4, freeze="all"))
    layerwise = step.make_fused(MODEL, optimizer) if fused else None
    state = jax.eval_shape(
        lambda key: step.init_state(MODEL, optimizer, key, fused=layerwise), jax.random.key(0)
    )
    loss, parts = gradient.make_loss(MODEL, optimizer), llama.pieces(MODEL) if fused else None
    found = memory.predict(state, batch, loss, parts, False, "all")
    # (32 -> 32 four times, 32 -> 48 twice and back, each through 4, in two layers.)
    adapters = 4 * 4 * (4 * (32 + 32) + 3 * (32 + 48))
    assert found.gradients == (adapters if fused else 2 * adapters)
