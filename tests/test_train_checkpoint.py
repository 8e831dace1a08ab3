"""Checkpoints: bit-equal, whole or absent, never of another run, and the files beside them."""

import _pickle
import dataclasses
import errno
import os
import pickle
import subprocess
import sys
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import llama
from models.config import PRESETS
from optax_subspace import Layout, QuantizedWeight, dequantize, quantize
from tests.train_helpers import ROOT, TINY, batch_shapes, finish, pair, start, write_text
from train import cache, gradient, memory, optimizer, processes, records, step
from train.checkpoint import Checkpoints
from train.config import DEFAULT_LEARNING_RATE, Config, MeshConfig, OptimizerConfig, resolve
from train.errors import UsageError, no_space
from train.fingerprint import fingerprint

CONFIG = resolve(Config(model=PRESETS["tiny"]))


class Position:
    """A data iterator's stand-in: a number."""

    def __init__(self, value=0):
        self.value = value

    def get_state(self):
        return {"value": self.value}

    def set_state(self, state):
        self.value = state["value"]


def make_state(number):
    params = {"w": jnp.full((64, 8), number, jnp.bfloat16), "b": jnp.arange(5.0) * number}
    return step.State(jnp.int32(number), params, optax.adam(0.1).init(params))


SHAPES = jax.eval_shape(lambda: make_state(1))


@pytest.fixture
def said():
    return []


def make(tmp_path, said, config=CONFIG, corpus="c", shapes=SHAPES, keep=2, keep_best=0):
    identity = fingerprint(config, corpus, shapes)
    return Checkpoints(tmp_path / "checkpoints", keep, identity, said.append, keep_best)


@pytest.fixture
def saved(tmp_path, said):
    """Checkpoints of the steps 10, 20 and 30, of which two are kept."""
    checkpoints = make(tmp_path, said)
    for number in (10, 20, 30):
        checkpoints.save(number, make_state(number), Position(number))
    checkpoints.wait()
    return checkpoints


def assert_restores(checkpoints, number):
    position = Position()
    state = checkpoints.restore(SHAPES, position)
    expected = make_state(number)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    assert position.value == number


def test_the_newest_is_restored_and_old_ones_go(saved, said):
    assert saved.steps() == [20, 30]
    assert_restores(saved, 30)
    assert said == []


def test_a_score_that_is_known_already_stays(tmp_path, said):
    """A resumed run on other devices may score a checkpoint again, to other last bits."""
    checkpoints = make(tmp_path, said)
    for number, known in ((10, 2.0), (20, None)):
        checkpoints.save(number, make_state(number), Position(number), known)
        checkpoints.wait()
        for score in (2.0, 2.0 + 1e-9):
            checkpoints.rate(number, score)
    assert checkpoints._scores() == {10: 2.0, 20: 2.0}
    for number in (10, 20):
        folder = checkpoints.path(number)
        assert cache.damage(folder, folder / cache.MANIFEST) is None


def test_the_best_are_kept_beside_the_newest(tmp_path, said):
    checkpoints = make(tmp_path, said, keep=1, keep_best=2)
    for number, score in ((10, 3.0), (20, 1.0), (30, None), (40, 2.0), (50, 2.5), (60, None)):
        if score is not None:
            assert checkpoints.is_among_best(score) == (score != 2.5)
        checkpoints.save(number, make_state(number), Position(number), score)
        checkpoints.wait()
    assert checkpoints.steps() == [20, 40, 60]
    assert not make(tmp_path, said, keep=1).is_among_best(0.5)  # which keeps none of them
    # A tie is no better, and what has no readable score is none of the best.
    assert not checkpoints.is_among_best(2.0) and checkpoints.is_among_best(1.5)
    (tmp_path / "checkpoints" / "20" / "validation.json").write_text("{")
    assert checkpoints.is_among_best(99.0)


def test_all_processes_save_what_the_first_would(tmp_path, said, monkeypatch):
    """Another may see the folder late; if it did not save, the others would wait for it."""
    checkpoints = make(tmp_path, said, keep=1, keep_best=1)
    monkeypatch.setattr(processes, "from_first", lambda function: not function())
    assert not checkpoints.is_among_best(1.0)
    monkeypatch.setattr(processes, "from_first", lambda function: True)
    checkpoints.save(5, make_state(5), Position(5))  # which the first has already
    checkpoints.wait()
    assert checkpoints.steps() == []


def state_in_blocks(shards):
    """Weights in int8, layer by layer, and moments in 8 bits; blocks keep to the parts."""
    linear, dynamic = Layout("linear", shards=shards), Layout("dynamic", shards=shards)

    def layer(key):
        stored = quantize(jax.random.normal(key, (16, 24)), linear)
        return QuantizedWeight(
            stored.codes, stored.scales, stored.slice_shape, jnp.bfloat16, linear
        )

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"layers": jax.vmap(layer)(keys), "b": jnp.arange(5.0)}
    moments = {"w": quantize(jax.random.normal(keys[0], (64, 48)), dynamic), "b": jnp.ones(3)}
    return step.State(jnp.int32(7), params, moments)


def test_blocks_of_few_bits_go_to_another_number_of_devices(tmp_path, said):
    shapes = lambda shards: jax.eval_shape(lambda: state_in_blocks(shards))

    def checkpoints(shards):
        identity = fingerprint(CONFIG, "c", shapes(shards), shards=shards)
        folder = tmp_path / "checkpoints"
        return Checkpoints(folder, 2, identity, said.append, with_shards=shapes)

    saved = state_in_blocks(4)
    one = checkpoints(4)
    one.save(10, saved, Position(10))
    one.wait()
    for shards in (1, 2, 4):
        found = checkpoints(shards).restore(shapes(shards), Position())
        assert jax.tree.structure(found) == jax.tree.structure(shapes(shards))
        assert said == []
        pairs = zip(*(jax.tree.leaves(dequantize(s)) for s in (found, saved)), strict=True)
        for ours, theirs in pairs:
            assert ours.dtype == theirs.dtype
            # A value lies no further from its code than half of the widest distance of two.
            limit = 0 if shards == 4 or ours.ndim == 1 else 0.02 * float(jnp.max(jnp.abs(theirs)))
            assert float(jnp.max(jnp.abs(ours - theirs))) <= limit
    # What differs otherwise is named all the same.
    broken = lambda shards: shapes(shards)._replace(step=jax.ShapeDtypeStruct((3,), jnp.int32))
    identity = fingerprint(CONFIG, "c", broken(2), shards=2)
    strict = Checkpoints(tmp_path / "checkpoints", 2, identity, said.append, with_shards=broken)
    with pytest.raises(UsageError, match=r"holds step as \['int32'\] where .*\['int32', 3\]"):
        strict.restore(broken(2), Position())


def test_training_goes_on_while_a_checkpoint_is_written(saved, tmp_path, monkeypatch):
    """And what is written is the state as it was, though its memory is used again."""
    written, real = threading.Event(), cache.write_checksums

    def slow(folder, manifest):
        assert written.wait(30)
        real(folder, manifest)

    monkeypatch.setattr(cache, "write_checksums", slow)
    state = jax.tree.map(jnp.copy, make_state(40))
    position = Position(40)
    saved.save(40, state, position)
    step_on = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    step_on(state)
    position.value = 41
    assert saved.steps() == [20, 30]
    saved.poll()  # which waits for nothing
    assert saved.steps() == [20, 30]
    written.set()
    saved.wait()
    assert saved.steps() == [30, 40]
    assert_restores(saved, 40)


def test_a_failed_saving_is_told_at_the_next_step(saved, said, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "write_checksums", full)
    saved.save(40, make_state(40), Position(40))
    deadline = time.monotonic() + 30
    while not saved._saving.done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Of several processes one would wait here for the others, which are not done yet.
    with monkeypatch.context() as several:
        several.setattr(jax, "process_count", lambda: 2)
        saved.poll()
    with pytest.raises(UsageError, match="step 40.*no space left"):
        while time.monotonic() < deadline:
            saved.poll()
            time.sleep(0.01)
    saved.wait()  # it was told
    saved.save(50, make_state(50), Position(50))
    saved.close()  # where another error is on its way, it is a line
    assert len(said) == 1 and "step 50" in said[0]


def test_without_any_there_is_none(tmp_path, said):
    assert make(tmp_path, said).restore(SHAPES, Position()) is None


def files_of(tmp_path, number):
    folder = tmp_path / "checkpoints" / str(number)
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed", "emptied"])
def test_any_damaged_file_makes_the_older_one_serve(saved, tmp_path, said, damage):
    names = [path.relative_to(tmp_path / "checkpoints" / "30") for path in files_of(tmp_path, 30)]
    assert len(names) > 8
    for name in names:
        path = tmp_path / "checkpoints" / "30" / name
        data = path.read_bytes()
        if damage == "truncated":
            path.write_bytes(data[:-1])
        elif damage == "flipped":
            middle = len(data) // 2
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        elif damage == "removed":
            path.unlink()
        else:
            path.write_bytes(b"")
        said.clear()
        assert_restores(saved, 20)
        assert len(said) == 1 and "step 30 can't be used" in said[0] and "\n" not in said[0]
        assert name.name in said[0] or name.name == cache.MANIFEST
        # It was moved aside, so that step 30 can be saved again.
        assert saved.steps() == [20]
        (tmp_path / "damaged" / "30").rename(tmp_path / "checkpoints" / "30")
        path.write_bytes(data)
    said.clear()
    assert_restores(saved, 30)


@pytest.mark.parametrize("by_orbax", [False, True])
def test_a_half_written_one_is_left_out(saved, tmp_path, said, by_orbax):
    half = ".saving-30.orbax-checkpoint-tmp" if by_orbax else ".saving-30"
    (tmp_path / "checkpoints" / "30").rename(tmp_path / "checkpoints" / half)
    assert_restores(saved, 20)
    assert said == ["the checkpoint of step 30 is half-written and was left out"]
    saved.save(30, make_state(30), Position(30))
    saved.wait()
    assert_restores(saved, 30)


@pytest.mark.parametrize("text", ["[]", "3", '[["a"]]', "null"])
def test_a_list_of_checksums_of_another_form_is_damage(saved, tmp_path, said, text):
    (tmp_path / "checkpoints" / "30" / cache.MANIFEST).write_text(text)
    assert_restores(saved, 20)
    assert cache.MANIFEST in said[0]


def test_only_damaged_ones_are_an_error(saved, tmp_path, said):
    for number in (20, 30):
        files_of(tmp_path, number)[-1].write_bytes(b"?")
    with pytest.raises(UsageError, match=r"no good checkpoint in .* \(damaged: steps 20, 30\)"):
        saved.restore(SHAPES, Position())
    assert saved.steps() == [20, 30]


def test_another_configuration_is_refused_by_name(saved, tmp_path, said):
    rank = dataclasses.replace(CONFIG.optimizer, rank=5)
    other = make(tmp_path, said, dataclasses.replace(CONFIG, optimizer=rank))
    with pytest.raises(UsageError, match=r"--optimizer.rank is 32 there and 5 here"):
        other.restore(SHAPES, Position())
    with pytest.raises(UsageError, match="another text or tokenizer"):
        make(tmp_path, said, corpus="d").restore(SHAPES, Position())
    # What Orbax would cast or drop without a word.
    wide = {**SHAPES.params, "w": jax.ShapeDtypeStruct((64, 8), jnp.float32)}
    widened = SHAPES._replace(params=wide)
    with pytest.raises(UsageError, match=r"holds .*bfloat16.* has .*float32"):
        make(tmp_path, said, shapes=widened).restore(widened, Position())
    fewer = SHAPES._replace(opt_state=())
    with pytest.raises(UsageError, match="opt_state"):
        make(tmp_path, said, shapes=fewer).restore(fewer, Position())
    # Keys that change neither parameters nor metrics may differ.
    free = dataclasses.replace(
        CONFIG,
        run_dir="elsewhere",
        checkpoint=dataclasses.replace(CONFIG.checkpoint, every=7, keep=9, keep_best=1),
        mesh=MeshConfig(data=1, fsdp=1),
        data=dataclasses.replace(CONFIG.data, cache_dir="elsewhere"),
        log=dataclasses.replace(CONFIG.log, print_every=3),
    )
    assert_restores(make(tmp_path, said, free), 30)


def test_another_version_of_jax_is_mentioned(saved, said, monkeypatch):
    monkeypatch.setattr(jax, "__version__", "99.0")
    assert_restores(saved, 30)
    assert len(said) == 1 and "under jax" in said[0]


def test_a_full_disk_while_saving(saved, tmp_path, said, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_checksums", full)
        with pytest.raises(UsageError, match=r"step 40.*no space left.*step 30 is good; free some"):
            saved.save(40, make_state(40), Position(40))
            saved.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["20", "30"]
    assert_restores(saved, 30)
    saved.save(40, make_state(40), Position(40))
    saved.wait()
    assert_restores(saved, 40)


def test_a_write_that_goes_on_beside_the_one_that_failed(saved, tmp_path, monkeypatch):
    """Orbax tells of the first failure at once; other leaves' files may still be coming."""
    writers = []

    def full(folder, *_):
        def go_on():
            for number in range(4):
                time.sleep(0.05)
                (folder / "state").mkdir(parents=True, exist_ok=True)
                (folder / "state" / str(number)).write_text("late")

        writers.append(threading.Thread(target=go_on))
        writers[-1].start()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "write_checksums", full)
    with pytest.raises(UsageError, match="no space left"):
        saved.save(40, make_state(40), Position(40))
        saved.wait()
    writers[0].join()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["20", "30"]


def test_a_run_on_a_disk_that_fills_up(tmp_path):
    """A real small disk where the rights allow one, else a limit on the size of files."""
    words = [*TINY, "--data.path", str(write_text(tmp_path / "text"))]
    words += ["--data.cache_dir", str(tmp_path / "cache")]
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for two checkpoints, not for three.
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)],
            check=False,
            capture_output=True,
        ).returncode
    )
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    try:
        run = ["--run_dir", str(disk / "run"), "--checkpoint.keep", "9"]
        _, err = finish(start([*words, *run], "" if mounted else limit), 2)
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert "free some space and run again with --resume" in err
        if mounted:
            assert "no space left on the device" in err
            folder = disk / "run" / "checkpoints"
            assert not list(folder.glob(".*"))
            whole = sorted(int(path.name) for path in folder.iterdir())
            # (Training goes on meanwhile, and the log may be what meets the full disk first.)
            assert whole and (f"step {whole[-1]} is good" in err or "a file of the run" in err)
            for number in whole:
                path = folder / str(number)
                assert cache.damage(path, path / cache.MANIFEST) is None
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def test_nothing_that_is_loaded_runs_code(saved, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a checkpoint was unpickled")

    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(module, name, refuse)
    assert_restores(saved, 30)
    with pytest.raises(AssertionError, match="unpickled"):  # (the guard works)
        pickle.loads(b"")


def test_reasons_for_no_space():
    inner = ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")
    outer = RuntimeError("saving failed")
    outer.__cause__ = inner
    assert no_space(outer) == "no space left on the device"
    assert no_space(OSError(errno.EDQUOT, "")) == "the disk quota is used up"
    assert no_space(ValueError("other")) is None


def test_rows_survive_a_torn_end_and_go_back_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = records.Records(path, 0)
    for number in range(1, 6):
        file.write({"kind": "train", "step": number, "loss": 1 / number})
    file.write({"kind": "final", "step": 5})
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "tra')
    assert len(records.read(path)) == 6
    records.Records(path, 5).close()
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:5])
    later = records.Records(path, 3)
    later.write({"kind": "train", "step": 4, "loss": 1 / 4})
    later.close()
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    with pytest.raises(ValueError, match="JSON"):
        records.Records(path, 4).write({"kind": "train", "step": 5, "loss": float("nan")})
    path.write_bytes(whole + b'{"kind": "train"}\n' + b'{"step": 9}\n')
    assert len(records.read(path)) == 6
    records.Records(path, 0).close()
    assert path.read_bytes() == b""


def state_shapes(name, **model):
    config = dataclasses.replace(PRESETS["tiny"], **model)
    options = resolve(Config(optimizer=OptimizerConfig(name=name, rank=8))).optimizer
    tx = optimizer.make(options, 10)
    make_state = lambda key: step.init_state(config, tx, key)
    return config, tx, jax.eval_shape(make_state, jax.random.key(0))


def test_memory_by_hand():
    size = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    size["vocab_size"] = 100
    config, tx, shapes = state_shapes("galore", **size)
    batch = batch_shapes(4, 16)
    predicted = memory.predict(shapes, batch, gradient.make_loss(config, tx))
    d, f, v, layers, r = 32, 48, 100, 2, 8
    kernels = layers * (4 * d * d + 3 * d * f)
    others = 2 * v * d + layers * 2 * d + d
    assert predicted.weights == predicted.gradients == 4 * (kernels + others)
    # Two moments of each parameter and a counter each for Adam and the schedule.
    assert predicted.adamw_state == 8 * (kernels + others) + 8
    # Bases on the shorter side d, moments r x (the other side).
    bases = layers * (4 * d * r + 3 * d * r)
    low = layers * (4 * d * r + 3 * f * r)
    exact = 4 * bases + 8 * (low + others)
    assert 0 <= predicted.optimizer_state - exact < 400  # counters
    assert predicted.batch == 2 * 4 * 16 * 4 + 4
    compiled = step.make_train_step(config, tx).lower(shapes, batch).compile()
    measured = memory.measure(compiled, shapes)
    assert measured.weights == predicted.weights
    assert measured.optimizer_state == pytest.approx(predicted.optimizer_state, rel=0.02)
    assert measured.batch == pytest.approx(predicted.batch, abs=64)
    assert measured.arguments == pytest.approx(predicted.arguments, rel=0.02)
    # The state is donated: all of it is updated in place.
    state_bytes = predicted.arguments - 2 * 4 * 16 * 4
    assert measured.shared == pytest.approx(state_bytes, rel=0.02)
    assert measured.temporaries > 0 and measured.total < 10 * predicted.arguments


def test_activations_by_hand():
    """Two products and a tanh keep the input of each product and the tanh's own output."""
    params = {"a": jax.ShapeDtypeStruct((5, 7), jnp.float32)}
    params["b"] = jax.ShapeDtypeStruct((7, 3), jnp.float32)
    inputs = jax.ShapeDtypeStruct((11, 5), jnp.float32)
    state = step.State(jax.ShapeDtypeStruct([], jnp.int32), params, ())
    loss = lambda params, x: jnp.sum(jnp.tanh(x @ params["a"]) @ params["b"])
    found = memory.predict(state, inputs, loss).activations
    # tanh's output y (11, 7), and its derivative's factors in the same shape.
    assert 11 * 7 * 4 <= found <= 3 * 11 * 7 * 4


def test_predicted_temporaries_are_near_the_compilers():
    """At a size where activations are most of them; recomputing blocks keeps fewer."""
    config, tx, shapes = state_shapes("galore", num_layers=3)
    batch = batch_shapes(8, 128)
    predicted = memory.predict(shapes, batch, gradient.make_loss(config, tx))
    compiled = step.make_train_step(config, tx).lower(shapes, batch).compile()
    measured = memory.measure(compiled, shapes)
    assert predicted.temporaries == pytest.approx(measured.temporaries, rel=0.15)
    rematerialised = gradient.make_loss(dataclasses.replace(config, remat=True), tx)
    fewer = memory.predict(shapes, batch, rematerialised)
    assert fewer.activations < predicted.activations / 4


def test_memory_of_adamw_is_adamws():
    config, tx, shapes = state_shapes("adamw", num_layers=1)
    batch = batch_shapes(1, 2)
    predicted = memory.predict(shapes, batch, gradient.make_loss(config, tx))
    assert predicted.optimizer_state == predicted.adamw_state


def test_schedule_by_hand():
    rate = optimizer.warmup_cosine(2.0, 100, 0.1, 0.1)
    values = np.array([float(rate(t)) for t in range(100)])
    np.testing.assert_allclose(values[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    assert values[0] > 0 and values.argmax() == 9
    np.testing.assert_allclose(values[99], 0.2, rtol=1e-6)
    assert (np.diff(values[9:]) < 0).all()
    middle = optimizer.warmup_cosine(1.0, 21, 0.0, 0.0)
    np.testing.assert_allclose([float(middle(t)) for t in (0, 10, 20)], [1, 0.5, 0], atol=1e-6)
    assert float(optimizer.warmup_cosine(1.0, 1, 0.1, 0.1)(0)) == 1.0


@pytest.mark.parametrize(
    ("name", "few_bits"),
    [
        *((n, "") for n in ("galore", "lomo")),
        pytest.param("galore_adamw8bit", "bfloat16", marks=pytest.mark.slow),
        pytest.param("galore_adamw8bit", "int8", marks=pytest.mark.slow),
        *(pytest.param(n, "", marks=pytest.mark.slow) for n in DEFAULT_LEARNING_RATE),
        pytest.param("adamw", "int8", marks=pytest.mark.slow),
    ],
)
def test_every_parameter_moves(name, few_bits):
    """Also what is not projected: embeddings, norms, head; and the norm of a step is clipped."""
    size = {"num_layers": 1, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2}
    size["vocab_size"] = 96
    if few_bits == "bfloat16":
        size["param_dtype"] = few_bits
    config, tx, _ = state_shapes(name, **size)
    if few_bits == "int8":
        state = step.init_state(config, tx, jax.random.key(0), int8_weights=True)
        assert state.params["layers"]["q"]["kernel"].codes.dtype == jnp.int8
        assert state.params["layers"]["mlp_norm"]["scale"].dtype == jnp.float32
    else:
        state = step.init_state(config, tx, jax.random.key(0))
    if name.endswith("8bit"):
        assert any(x.dtype == jnp.uint8 for x in jax.tree.leaves(state.opt_state))
    before = jax.tree.map(np.asarray, dequantize(state.params))
    train_step = step.make_train_step(config, tx, seed=0)
    windows = jax.random.randint(jax.random.key(1), (2, 9), 0, 50)
    losses = []
    for _ in range(10):
        state, metrics = train_step(state, pair(windows))
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] and int(state.step) == 10
    after = dequantize(state.params)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), before, after)
    assert all(jax.tree.leaves(moved)), (name, moved)


def test_initial_values_are_the_same_in_every_dtype():
    wide, _, _ = state_shapes("adamw", num_layers=1)
    narrow = dataclasses.replace(wide, param_dtype="bfloat16")
    first, second = (llama.init_params(c, jax.random.key(0)) for c in (wide, narrow))
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), first)
    chex.assert_trees_all_equal(cast, second)


def test_help_does_not_wait_for_data_libraries():
    """A wrong key shall be told at once."""
    code = (
        "import sys; import train.cli\n"
        "heavy = {'tensorflow_datasets', 'orbax', 'grain', 'matplotlib'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    program = [sys.executable, "-c", code]
    out = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
