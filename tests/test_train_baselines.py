"""Other people's optimizers in the trainer, and the choices within a subspace."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import llama
from models.config import PRESETS
from tests.train_helpers import pair
from train.cli import parse
from train.config import BASELINES, Config, OptimizerConfig, resolve
from train.errors import UsageError
from train.optimizer import make
from train.step import init_state, make_fused, make_train_step

MODEL = dataclasses.replace(
    PRESETS["tiny"], num_layers=2, hidden_size=32, intermediate_size=48, num_heads=2, vocab_size=64
)
BATCH = pair(jax.random.randint(jax.random.key(1), (2, 9), 0, 64))


def optimizer(name, fused=False, **fields):
    defaults = {"clip_norm": None, "warmup_fraction": 0.0, "rank": 4, "learning_rate": 0.01}
    config = OptimizerConfig(name=name, **(defaults | fields))
    return make(resolve(Config(optimizer=config)).optimizer, steps=10, fused=fused)


@functools.cache
def params():
    return llama.init_params(MODEL, jax.random.key(0))


@functools.cache
def gradients():
    leaves, structure = jax.tree.flatten(params())
    keys = jax.random.split(jax.random.key(2), len(leaves))
    draw = lambda key, x: jax.random.normal(key, x.shape)
    return jax.tree.unflatten(structure, map(draw, keys, leaves))


def first_update(found):
    updates, _ = jax.jit(found.tx.update)(gradients(), found.tx.init(params()), params())
    return updates


SLOW = [
    pytest.param(n, marks=pytest.mark.slow) for n in ("adafactor", "fira", "lion", "muon", "sgd")
]


@pytest.mark.parametrize("name", ["contrib_galore", *SLOW])
def test_steps_within_the_backward_pass_are_the_same(name):
    """All parameters move, and a fused step moves them as a plain one does."""
    plain, within = optimizer(name), optimizer(name, fused=True)
    fused = make_fused(MODEL, within)
    ours = init_state(MODEL, within, jax.random.key(0), fused=fused)
    theirs = init_state(MODEL, plain, jax.random.key(0))
    ours_step, step = make_train_step(MODEL, within, fused=fused), make_train_step(MODEL, plain)
    for _ in range(3):
        ours, _ = ours_step(ours, BATCH)
        theirs, _ = step(theirs, BATCH)
    chex.assert_trees_all_close(ours.params, theirs.params, rtol=1e-3, atol=1e-4)
    for before, after in zip(
        jax.tree.leaves(params()), jax.tree.leaves(theirs.params), strict=True
    ):
        assert np.any(before != after)


@pytest.mark.slow
def test_layers_are_taken_one_by_one():
    """Whether optax's transformation knows stacks or not: a layer's update is that of it alone."""
    for name in ("adafactor", "contrib_galore", "muon"):
        whole = first_update(optimizer(name, weight_decay=0.1))
        alone = optimizer(name, fused=True, weight_decay=0.1)
        part = lambda tree: {"layers": jax.tree.map(lambda x: x[1], tree["layers"])}
        updates, _ = jax.jit(alone.tx.update)(
            part(gradients()), alone.tx.init(part(params())), part(params())
        )
        chex.assert_trees_all_close(updates, part(whole), rtol=1e-3, atol=1e-6)


def test_contrib_galore_projects_the_kernels_alone():
    updates = first_update(optimizer("contrib_galore"))
    for name, part in updates["layers"].items():
        if "kernel" in part:
            for update in part["kernel"]:
                assert np.linalg.matrix_rank(update, tol=1e-6) == 4, name
    assert np.linalg.matrix_rank(updates["embed"]["embedding"], tol=1e-6) == 32


def test_muon_makes_the_kernels_orthogonal_and_nothing_else():
    updates = first_update(optimizer("muon"))
    values = np.linalg.svd(updates["layers"]["q"]["kernel"][0])[1]
    assert values.max() < 2 * values.min()
    values = np.linalg.svd(updates["embed"]["embedding"])[1]
    assert values.max() > 2 * values.min()


def test_adamw_with_a_rate_of_its_own_for_the_kernels():
    """Of what Adam makes of the gradients; decay is the same for all."""
    plain, scaled = (first_update(optimizer("adamw", scale=s)) for s in (None, 0.25))
    quarter = lambda path, x: x / 4 if "kernel" in str(path) and "layers" in str(path) else x
    quartered = jax.tree_util.tree_map_with_path(quarter, plain)
    chex.assert_trees_all_close(scaled, quartered, rtol=1e-6)
    decayed = first_update(optimizer("adamw", scale=0.25, weight_decay=0.1))
    with_decay = jax.tree.map(lambda u, w: u - 0.01 * 0.1 * w, quartered, params())
    chex.assert_trees_all_close(decayed, with_decay, rtol=1e-5, atol=1e-8)
    peer = optax.adamw(0.01, eps=1e-6, weight_decay=0.1)
    expected, _ = peer.update(gradients(), peer.init(params()), params())
    ours = first_update(optimizer("adamw", weight_decay=0.1))
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-8)
    assert optimizer("adamw").scale == 1.0 and optimizer("adamw", scale=0.25).scale == 0.25


@pytest.mark.parametrize("name", ["galore", "fira", "online_subspace_adamw8bit"])
def test_the_projector_and_the_moments_can_be_chosen(name):
    found = optimizer(name, projector="online_pca", moments="project")
    state = found.tx.init(params())
    leaf = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "skipped"))[0].leaves[
        "layers/q/kernel"
    ]
    # The state of the optimizer that moves the basis.
    assert [x.shape for x in jax.tree.leaves(leaf.rule)].count((2, 32, 4)) == 2
    random = optimizer(name, projector="random_projection", every=7)
    state = random.tx.init(params())
    projection = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "skipped"))[0]
    _, state = jax.jit(random.tx.update)(gradients(), state, params())
    after = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "skipped"))[0]
    path = "layers/q/kernel"
    assert projection.leaves[path].bases[0].shape == (2, 32, 4)
    np.testing.assert_array_equal(after.leaves[path].due, [7, 7])
    basis = after.leaves[path].bases[0][0]
    np.testing.assert_allclose(basis.T @ basis, jnp.eye(4), atol=1e-5)


def test_defaults_are_the_optimizers_own():
    of = lambda name: parse(["--optimizer.name", name]).config.optimizer
    assert (of("muon").b1, of("lion").b1, of("lion").b2, of("adamw").b2) == (0.95, 0.9, 0.99, 0.999)
    assert (of("galore").scale, of("apollo").scale, of("adamw").scale) == (0.25, 1.0, 1.0)
    assert round(of("apollo_mini").scale ** 2) == 128
    assert all(of(name).learning_rate for name in BASELINES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optimizer.name muon --optimizer.rank 4", "the optimizer muon doesn't read it"),
        ("--optimizer.name apollo_mini --optimizer.rank 4", "apollo_mini doesn't read it"),
        ("--optimizer.name sgd --optimizer.b2 0.9", "the optimizer sgd doesn't read it"),
        ("--optimizer.name lion --optimizer.scale 0.5", "the optimizer lion doesn't read it"),
        ("--optimizer.projector oja --optimizer.every 5", "follows every gradient; leave it out"),
        ("--optimizer.projector oja --optimizer.moments reset", "forgotten at every step"),
        ("--optimizer.name fira --optimizer.side both", "scales along the axis"),
        (
            "--optimizer.name fira --train.project_at_source",
            "fira needs whole gradients",
        ),
        ("--optimizer.name apollo --log.hamiltonian", "has no kinetic energy"),
        ("--optimizer.name adamw --optimizer.scale 0.5 --log.hamiltonian", "a rate of their own"),
        (
            "--optimizer.name muon --train.fused_backward --train.micro_batch_size 4",
            "muon would need the whole gradient tree",
        ),
        (
            "--optimizer.name contrib_galore --lora.rank 2 --lora.freeze kernels",
            "is for the gradients of kernels",
        ),
        ("--optimizer.name muon --lora.rank 2 --lora.factorize", "is for the gradients of kernels"),
        (
            "--optimizer.name adamw --optimizer.scale 0.5 --lora.rank 2 --lora.factorize",
            "is for the gradients of kernels",
        ),
        ("--optimizer.name apollo --optimizer.moments project", "not orthonormal"),
    ],
)
def test_what_does_not_go_together(words, message):
    with pytest.raises(UsageError, match=message):
        parse(words.split())


def test_a_baseline_with_clipping_sees_clipped_gradients():
    found = optimizer("sgd", clip_norm=1e-3, learning_rate=1.0)
    norm = float(optax.tree.norm(first_update(found)))
    assert abs(norm - 1e-3) < 1e-5
