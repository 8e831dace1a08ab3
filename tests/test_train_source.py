"""The trainer's steps that project at the source."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import LlamaConfig
from optax_subspace import steps_to_refresh
from optax_subspace._schedule import LOOK_EVERY
from tests.train_helpers import TINY, batch_shapes, pair, write_text
from train import gradient, memory, records, source, step
from train.cli import main, parse
from train.config import Config, OptimizerConfig, resolve
from train.errors import Interrupted, UsageError
from train.mesh import Work
from train.optimizer import make

MODEL = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_heads=2, num_layers=2)
WINDOWS = jax.random.randint(jax.random.key(1), (8, 4, 17), 0, 96)


def train(name, at_source, size=None):
    """Metrics of eight steps and the parameters after them."""
    options = OptimizerConfig(name=name, rank=8, every=3, clip_norm=None)
    options = resolve(Config(optimizer=options)).optimizer
    work = Work(micro_batch_size=size)
    optimizer = make(options, 20, accumulate=2 if size and at_source else 1)
    state = step.init_state(MODEL, optimizer, jax.random.key(0))
    if at_source:
        steps = [
            source.make_source_step(MODEL, optimizer, 0, work, refresh=refresh)
            for refresh in (True, False)
        ]
        run = source.SourceSteps(*steps)
    else:
        run = step.make_train_step(MODEL, optimizer, 0, work=work)
    found = []
    for windows in WINDOWS:
        state, metrics = run(state, pair(windows))
        found.append(metrics)
    return found, state


@pytest.mark.parametrize(
    "name",
    [
        "galore",
        pytest.param("online_subspace_descent", marks=pytest.mark.slow),
        pytest.param("galore_adamw8bit", marks=pytest.mark.slow),
    ],
)
def test_steps_equal_those_that_project_afterwards(name):
    ours, state = train(name, True)
    theirs, other = train(name, False)
    losses = [[float(m.loss) for m in found] for found in (ours, theirs)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    away = jax.tree.map(
        lambda x, y: float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)), state.params, other.params
    )
    assert max(jax.tree.leaves(away)) < 2e-5
    # The norm is that of the low-rank gradients.
    assert all(
        0 < float(a.grad_norm) < float(b.grad_norm) for a, b in zip(ours, theirs, strict=True)
    )
    left = int(steps_to_refresh(state.opt_state))
    assert left == (1 if name.startswith("galore") else -len(WINDOWS) % LOOK_EVERY)


def test_predicted_memory_has_no_full_gradients():
    options = resolve(Config(optimizer=OptimizerConfig(rank=8, every=3, clip_norm=None))).optimizer
    optimizer = make(options, 20)
    state = jax.eval_shape(lambda: step.init_state(MODEL, optimizer, jax.random.key(0)))
    loss, batch = gradient.make_loss(MODEL, optimizer), batch_shapes(4, 16)
    full = memory.predict(state, batch, loss).gradients
    found = source.found(MODEL, optimizer, state, batch)
    low = memory.predict(state, batch, loss, found=found).gradients
    kernels = [x for x in jax.tree.leaves(state.params["layers"]) if x.ndim == 3]
    whole = sum(memory.tree_bytes(x) for x in kernels)
    # Of each kernel (L, m, n) there is R, (L, r, n), and the new basis, (L, m, r); the seed and
    # some numbers of each slice come with them.
    low_rank = sum(4 * x.shape[0] * 8 * sum(x.shape[1:]) for x in kernels)
    assert low_rank <= low - (full - whole) < 1.05 * low_rank < 0.6 * whole


@pytest.mark.slow
def test_micro_batches_add_up_in_the_subspace():
    whole, after = train("galore", True)
    parts, state = train("galore", True, size=2)
    losses = [[float(m.loss) for m in found] for found in (whole, parts)]
    # (The first basis is that of the first micro-batch.)
    np.testing.assert_allclose(*losses, rtol=0.02)
    assert int(state.step) == int(after.step) == 8
    assert int(steps_to_refresh(state.opt_state)) == int(steps_to_refresh(after.opt_state))


@pytest.mark.slow
def test_a_run_at_the_source_and_its_resumption(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    words = [*TINY, "--data.path", "text", "--train.project_at_source"]
    assert main([*words, "--run_dir", "whole"]) == 0
    whole = records.read(tmp_path / "whole" / "metrics.jsonl")
    capsys.readouterr()

    real, seen = source.SourceSteps.__call__, []

    def stops(self, state, batch):
        seen.append(1)
        if len(seen) == 25:
            raise Interrupted("here")
        return real(self, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(source.SourceSteps, "__call__", stops)
        assert main([*words, "--run_dir", "part"]) == 130
    assert main([*words, "--run_dir", "part", "--resume"]) == 0
    assert records.read(tmp_path / "part" / "metrics.jsonl") == whole
    assert not any(row["kind"] == "subspace" for row in whole)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer.name", "adamw"], "adamw needs whole gradients"),
        (["--lora.rank", "4"], "adapters"),
        (["--train.fused_backward"], "add --model.remat"),
        (["--model.dtype", "float16"], "loss scale"),
        (["--train.micro_batch_size", "4"], "add --optimizer.clip_norm None"),
    ],
)
def test_what_does_not_go_together_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        parse(["--train.project_at_source", *words])
