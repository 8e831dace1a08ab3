"""Whole runs of the trainer, most in processes of their own: kill, signals, resume, figures."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.train_helpers import (
    ROOT,
    TINY,
    events,
    finish,
    kill_at,
    signal_at,
    start,
    steps_in,
    write_text,
)
from train import loop, records, source
from train.cli import main
from train.errors import Interrupted

LAST = 40


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Options of the small run: its text and a shared cache."""
    folder = tmp_path_factory.mktemp("text")
    return [
        *TINY,
        *["--log.hamiltonian", "--log.tensorboard"],
        *["--data.path", str(write_text(folder / "text"))],
        *["--data.cache_dir", str(folder / "cache")],
    ]


@pytest.fixture(scope="module")
def reference(words, tmp_path_factory):
    """A run that nothing disturbs: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    out, _ = finish(start([*words, "--run_dir", str(folder)]))
    return folder, out


def parameters(folder: Path, step: int = LAST):
    """All arrays of a checkpoint, by path."""
    path = (folder / "checkpoints" / str(step) / "state").absolute()
    tree = ocp.StandardCheckpointer().restore(path)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def metric_events(folder: Path):
    """TensorBoard's events of the rows that depend on no clock."""
    return [event for event in events(folder / "tensorboard") if "speed/" not in event[1]]


def assert_same_run(folder: Path, reference: Path):
    mine, theirs = parameters(folder), parameters(reference)
    assert mine.keys() == theirs.keys()
    for path in theirs:
        np.testing.assert_array_equal(mine[path], theirs[path], err_msg=path)
        assert mine[path].dtype == theirs[path].dtype
    assert (folder / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()


def test_a_run_says_and_leaves_what_it_should(reference):
    folder, out = reference
    for part in (
        "What is projected:",
        "layers/q/kernel",
        "AdamW's would be",
        "temporaries",
        "step 40 of 40",
        "perplexity",
        "bits per byte",
        "unigram entropy",
        "tokens/s",
        str(folder / "checkpoints" / str(LAST)),
        str(folder / "metrics.jsonl"),
        str(folder / "loss.png"),
    ):
        assert part in out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, LAST + 1))
    assert train[-1]["loss"] < train[0]["loss"] - 0.5
    assert all(row["effective_learning_rate"] == row["learning_rate"] * 0.25 for row in train)
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [15, 30]
    subspaces = [row for row in rows if row["kind"] == "subspace"]
    # Seven matrices of one layer, a basis at steps 1, 11, 21.
    assert [(row["step"], row["refreshes"]) for row in subspaces] == [(15, 14), (30, 21)]
    for row in subspaces:
        assert 0 < row["captured_energy"] <= 1 and 0 < row["drift"] <= 1 and row["skipped"] == 0
    assert "of the gradient in the subspaces" in out
    energies = [row for row in rows if row["kind"] == "hamiltonian"]
    assert [row["step"] for row in energies] == [15, 30]
    for row in energies:
        assert row["total"] == pytest.approx(row["potential"] + row["kinetic"])
        assert row["kinetic"] > 0 and row["predicted"] > 0
    lost = (energies[0]["total"] - energies[1]["total"]) / 15
    assert energies[0]["dissipation"] is None
    assert energies[1]["dissipation"] == pytest.approx(lost)
    assert f"Hamiltonian {energies[1]['total']:.3f}" in out
    final = rows[-1]
    assert final["kind"] == "final" and final["tokens"] == LAST * 32
    assert final["validation_perplexity"] == pytest.approx(np.exp(final["validation_loss"]))
    assert final["skipped_gradients"] == 0
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["35", "40"]
    config = json.loads((folder / "config.json").read_text())
    assert config["optimizer.learning_rate"] == 0.01 and config["train.steps"] == LAST
    table = json.loads((folder / "memory.json").read_text())
    for part in table["predicted"], table["compiled"]:
        assert part["total"] > part["weights"] > 0 and part["optimizer_state"] > 0
    speeds = [json.loads(line) for line in (folder / "throughput.jsonl").read_text().splitlines()]
    assert [(row["step"], row["after"]) for row in speeds] == [(n, 0) for n in (10, 20, 30, 40)]
    for row in speeds:
        assert row["model_flops_per_second"] > 0 and row["utilisation"] is None
    # One event for each number of a row, and no other.
    numbers = lambda row: [k for k, v in row.items() if k != "step" and isinstance(v, int | float)]
    expected = [(row["step"], f"{row['kind']}/{k}", row[k]) for row in rows for k in numbers(row)]
    assert sorted(metric_events(folder)) == [
        (step, tag, np.float32(value)) for step, tag, value in sorted(expected)
    ]
    tags = {tag for _, tag, _ in events(folder / "tensorboard")}
    assert {"train/grad_norm", "subspace/captured_energy", "speed/tokens_per_second"} <= tags


def test_killed_runs_end_bit_equal(words, reference, tmp_path):
    """Killed while the first checkpoint is written, and again in the middle of a period."""
    folder = tmp_path / "run"
    command = [*words, "--run_dir", str(folder)]
    die_while_saving = (
        "import os, signal\n"
        "from train import cache\n"
        "real = cache.write_checksums\n"
        "def write(folder, manifest):\n"
        "    if folder.name.endswith('saving-7'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(folder, manifest)\n"
        "cache.write_checksums = write"
    )
    finish(start(command, die_while_saving), -signal.SIGKILL)
    assert steps_in(folder / "metrics.jsonl") >= 7  # it goes on while the checkpoint is written
    out = kill_at(start([*command, "--resume"]), folder / "metrics.jsonl", 31)
    assert "step 7 is half-written" in out and "beginning at the first step" in out
    # From step 28 as a rule: its basis is of step 20, the next one comes with step 30.
    out, _ = finish(start([*command, "--resume"]))
    assert re.search("after step (21|28|35)", out)
    assert_same_run(folder, reference[0])
    assert metric_events(folder) == metric_events(reference[0])


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_sigterm_saves_and_the_printed_command_resumes(words, reference, tmp_path, number):
    folder = tmp_path / "run"
    process = start([*words, "--run_dir", str(folder)])
    signal_at(process, folder / "metrics.jsonl", 3, number)
    asked = time.monotonic()
    _, err = finish(process, 128 + number)
    assert time.monotonic() - asked < 10
    assert err.count("\n") == 1
    command = shlex.split(err.split("go on with: ")[1])
    assert command[1:3] == ["-m", "train"] and (ROOT / command[0]).samefile(sys.executable)
    out, _ = finish(start(command[3:]))
    assert "after step" in out
    assert_same_run(folder, reference[0])


@pytest.mark.slow
def test_a_signal_in_an_evaluation_ends_it_and_the_next_run_repeats_it(
    words, reference, tmp_path, capsys, monkeypatch
):
    real, scored = loop.make_eval_step, []

    def make_eval_step(*arguments):
        step = real(*arguments)

        def evaluate(*arguments):
            scored.append(1)
            if len(scored) == 1:
                signal.raise_signal(signal.SIGTERM)
            return step(*arguments)

        return evaluate

    monkeypatch.setattr(loop, "make_eval_step", make_eval_step)
    folder = tmp_path / "run"
    command = [*words, "--run_dir", str(folder), "--checkpoint.keep_best", "1", "--resume"]
    # What a run leaves that was killed before its first checkpoint, and was another one.
    folder.mkdir()
    for name in ("metrics.jsonl", "config.json", "tokenizer.json"):
        (folder / name).write_text('{"train.steps": 4000}')
    assert main(command) == 128 + signal.SIGTERM
    assert json.loads((folder / "config.json").read_text())["train.steps"] == LAST
    assert (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists()
    err = capsys.readouterr().err
    assert "the checkpoint of step 15 is saved" in err and err.count("\n") == 1
    assert len(scored) == 1  # of two batches
    kinds = [row["kind"] for row in records.read(folder / "metrics.jsonl")]
    assert kinds == ["train"] * 15 + ["subspace"]
    assert main(command) == 0
    # Its score is noted, so that it is kept or goes as in a run that nothing disturbs.
    rows = records.read(folder / "metrics.jsonl")
    losses = {r["step"]: r["validation_loss"] for r in rows if r["kind"] == "validation"}
    best = str(min(losses, key=losses.get))
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == [best, "35", "40"]
    assert_same_run(folder, reference[0])


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["pipe", "terminal"])
def test_a_run_that_nobody_watches_any_more_saves_and_ends(words, tmp_path, closed):
    """As with `| head`, or when a connection is lost."""
    folder = tmp_path / "run"
    reader, writer = os.openpty() if closed == "terminal" else os.pipe()
    process = start([*words, "--run_dir", str(folder)], stdout=writer)
    os.close(writer)
    shown = b""
    while b"of 40" not in shown:
        shown += os.read(reader, 4096)
    os.close(reader)
    _, err = finish(process, 128 + signal.SIGTERM)
    assert "is saved; go on with: " in err and err.count("\n") == 1
    assert any((folder / "checkpoints").iterdir())


def test_ctrl_c_twice_and_resuming_a_finished_run(words, reference, tmp_path, capsys):
    """In this process: the handlers are put back, and a finished run may be resumed."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    folder = reference[0]
    metrics = (folder / "metrics.jsonl").read_bytes()
    assert main([*words, "--run_dir", str(folder), "--resume"]) == 0
    assert "no step was left to train" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    # Rows that others have lost or damaged are missed aloud.
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "metrics.jsonl").write_text(metrics.decode().replace("{", "?", 3))
    for what in ("is damaged at line 1", "is missing or empty"):
        assert main([*words, "--run_dir", str(copy), "--resume"]) == 0
        out = capsys.readouterr().out
        assert f"warning: {copy / 'metrics.jsonl'} {what}" in " ".join(out.split())
        (copy / "metrics.jsonl").unlink()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with loop.Signals(lambda: "the story") as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGINT
        with pytest.raises(Interrupted, match="the story"):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_twice_saves_all_the_same(words, tmp_path):
    folder = tmp_path / "run"
    process = start([*words, "--run_dir", str(folder)])
    signal_at(process, folder / "metrics.jsonl", 3, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, 128 + signal.SIGINT)
    assert err.count("\n") == 1 and "is saved; go on with: " in err
    assert len(list((folder / "checkpoints").iterdir())) >= 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_is_one_line(words, tmp_path, number):
    process = start([*words, "--run_dir", str(tmp_path / "run")])
    time.sleep(1.5)  # somewhere in the imports, the tokenizer or the compilation
    process.send_signal(number)
    _, err = finish(process, 128 + number)
    assert err.startswith("stopped: interrupted") and err.count("\n") == 1


def test_parameters_that_are_no_numbers_are_never_saved(words, tmp_path, capsys):
    """The loss of the step that spoils them is still finite."""
    folder = tmp_path / "run"
    command = [*words, "--run_dir", str(folder), "--checkpoint.every", "1"]
    assert main([*command, "--optimizer.learning_rate", "1e38", "--optimizer.scale", "1e6"]) == 1
    err = capsys.readouterr().err
    assert "is not finite at step 1; no checkpoint had been saved yet" in err
    assert err.count("\n") == 1 and not (folder / "checkpoints").exists()


def test_a_run_that_diverges_to_a_finite_loss_still_reports(words, tmp_path, capsys):
    folder = tmp_path / "run"
    run = [word for word in words if word != "--log.hamiltonian"]  # of which 3 steps have none
    run += ["--run_dir", str(folder), "--train.steps", "3"]
    assert main([*run, "--optimizer.learning_rate", "3000"]) == 0
    assert re.search(r"perplexity +inf", capsys.readouterr().out)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["validation_loss"] > 700 and rows[-1]["validation_perplexity"] is None


def test_adamw_takes_the_same_way(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = [*words, "--train.steps", "16", "--optimizer.name", "adamw"]
    # The keys that galore alone reads are refused with adamw.
    assert main(run) == 2
    assert "--optimizer.every: the optimizer adamw doesn't read it" in capsys.readouterr().err
    for key in ("--optimizer.rank", "--optimizer.every"):
        at = run.index(key)
        del run[at : at + 2]
    assert main(run) == 0
    out = capsys.readouterr().out
    assert "Nothing is projected" in out and "this is 100.0%" in out
    folder = tmp_path / "runs" / "quickstart-tiny-adamw"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kind"] == "final"
    assert [row["kinetic"] > 0 for row in rows if row["kind"] == "hamiltonian"] == [True]
    assert rows[0]["effective_learning_rate"] == rows[0]["learning_rate"]
    # --resume finds the run by its name; another configuration is refused with the key's name.
    assert main([*run, "--resume", "--train.seed", "5"]) == 2
    err = capsys.readouterr().err
    assert "--train.seed is 0 there and 5 here" in err and err.count("\n") == 1


@pytest.mark.slow
def test_few_bits_resume_bit_equal_and_another_code_is_refused(words, tmp_path, capsys):
    """8-bit moments, 4-bit bases and int8 weights with stochastic rounding, from the middle on, all
    updated within the backward pass, and adapters beside."""
    folder = tmp_path / "run"
    run = [word for word in words if word != "--log.hamiltonian"]  # adapters have their own rate
    run += ["--run_dir", str(folder), "--train.steps", "12"]
    run += ["--optimizer.name", "galore_adamw8bit", "--optimizer.projector_dtype", "linear4"]
    run += ["--train.int8_weights", "--optimizer.code", "dynamic", "--checkpoint.keep", "3"]
    run += ["--train.fused_backward", "--lora.rank", "2"]
    assert main(run) == 0
    whole = parameters(folder, 12)
    assert any("scales" in path for path in whole)
    rows = (folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoints" / "12")
    capsys.readouterr()
    assert main([*run, "--resume"]) == 0
    assert "after step 7" in capsys.readouterr().out
    again = parameters(folder, 12)
    assert whole.keys() == again.keys()
    for path, value in whole.items():
        np.testing.assert_array_equal(value, again[path])
    assert (folder / "metrics.jsonl").read_bytes() == rows
    other = [word if word != "dynamic" else "linear" for word in run]
    assert main([*other, "--resume"]) == 2
    err = capsys.readouterr().err
    assert "--optimizer.code is dynamic there and linear here" in err and err.count("\n") == 1


def test_a_loss_that_is_no_number_stops_the_run(words, tmp_path, capsys, monkeypatch):
    real = source.make_train_step

    class Poisoned:
        """The compiled step, with the loss of step 10 replaced."""

        def __init__(self, compiled):
            self.compiled, self.steps = compiled, 0

        def memory_analysis(self):
            return self.compiled.memory_analysis()

        def __call__(self, state, batch):
            self.steps += 1
            state, metrics = self.compiled(state, batch)
            bad = metrics.loss * float("nan")
            return state, metrics._replace(loss=bad) if self.steps == 10 else metrics

    class Lowered:
        def __init__(self, *arguments):
            self.step = real(*arguments)

        def lower(self, *arguments):
            self.lowered = self.step.lower(*arguments)
            return self

        def compile(self):
            return Poisoned(self.lowered.compile())

    monkeypatch.setattr(source, "make_train_step", Lowered)
    folder = tmp_path / "run"
    assert main([*words, "--run_dir", str(folder)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: the loss is nan at step 10;") and err.count("\n") == 1
    assert "checkpoints/7" in err
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["7"]
    assert steps_in(folder / "metrics.jsonl") == 9


def test_the_step_is_compiled_once(words, tmp_path, monkeypatch):
    """By a count of traces, and by JAX's own event for each back-end compilation."""
    events, traces, seen = [], [], {}
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: events.append(name) if "backend_compile" in name else None
    )
    real = source.make_train_step
    record = loop.Trainer._record

    def counted(model, optimizer, *rest):
        # The schedule is called while the step is traced, and never otherwise.
        def schedule(step):
            traces.append(step)
            return optimizer.schedule(step)

        return real(model, optimizer._replace(schedule=schedule), *rest)

    def watched(self, late):
        record(self, late)
        if late is not None:
            seen[late[0]] = len(events)

    monkeypatch.setattr(source, "make_train_step", counted)
    monkeypatch.setattr(loop.Trainer, "_record", watched)
    often = ["--train.steps", "24", "--train.eval_every", "3", "--checkpoint.every", "4"]
    assert main([*words, *often, "--run_dir", str(tmp_path / "run")]) == 0
    assert len(traces) == 1
    # Evaluation and saving compile at their first time; nothing does from then on, though bases
    # are renewed, evaluations and checkpoints follow.
    assert seen[5] > 0
    assert {step: seen[step] for step in range(6, 25)} == dict.fromkeys(range(6, 25), seen[5])


@pytest.mark.slow
def test_twenty_kills_at_random_moments_end_bit_equal(words, reference, tmp_path):
    """A checkpoint at each step, so that many of them are hit while they are written.

    Two of three kills come just after a step, the others whenever: while a run starts, compiles,
    restores or trains.
    """
    rng, folder = np.random.default_rng(0), tmp_path / "run"
    command = [*words, "--run_dir", str(folder), "--checkpoint.every", "1"]
    metrics, seen, durations = folder / "metrics.jsonl", [], []
    for kill in range(20):
        process, begun = start([*command, "--resume"]), time.monotonic()
        done = steps_in(metrics)
        seen.append(done)
        after_a_step = kill % 3 < 2
        longest = 200 if after_a_step else 1.1 * float(rng.uniform(0, min(durations)))
        # Rows of steps after the checkpoint are cut off, and written again.
        before = metrics.stat().st_mtime_ns if done else 0
        while process.poll() is None and time.monotonic() < begun + longest:
            changed = metrics.exists() and metrics.stat().st_mtime_ns != before
            if after_a_step and changed and steps_in(metrics) > done:
                durations.append(time.monotonic() - begun)
                break
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.05)))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    assert len(set(seen)) > 8, "kills all over the run"
    out, _ = finish(start([*command, "--resume"]))
    assert_same_run(folder, reference[0])


@pytest.mark.slow
def test_text_and_cache_may_go_while_a_run_goes_on(words, tmp_path, capsys):
    """A run has what it reads; one that goes on says what is missing, and loses nothing."""
    text, cache_dir = tmp_path / "text", tmp_path / "cache"
    write_text(text)
    short = [word for word in words if word != "--log.hamiltonian"]
    short += ["--data.path", str(text), "--data.cache_dir", str(cache_dir)]
    short += ["--train.steps", "9", "--run_dir", str(tmp_path / "run"), "--checkpoint.every", "4"]
    real = loop.Trainer._record

    def record(self, late):
        real(self, late)
        if late is not None and late[0] == 5:
            text.rename(tmp_path / "away")
            shutil.rmtree(cache_dir)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_record", record)
        assert main(short) == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "9")
    assert main([*short, "--resume"]) == 2
    err = capsys.readouterr().err
    assert "--data.path" in err and "no such file" in err and err.count("\n") == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["8"]
    (tmp_path / "away").rename(text)
    assert main([*short, "--resume"]) == 0
    assert "after step 8" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == rows


@pytest.fixture
def read_only_disk(tmp_path):
    """A folder, and a function that makes it read-only; root is stopped by a mount alone."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = lambda *options: (
        subprocess.run(["mount", *options, str(disk)], check=False, capture_output=True).returncode
    )
    mounted = os.geteuid() == 0 and not mount("-t", "tmpfs", "tmpfs")
    if os.geteuid() == 0 and not mounted:
        pytest.skip("root may write everywhere, and nothing can be mounted here")
    yield disk, lambda: mount("-o", "remount,ro") if mounted else disk.chmod(0o500)
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)
    else:
        disk.chmod(0o700)


def test_a_read_only_directory_is_told(read_only_disk, words, capsys):
    disk, close = read_only_disk
    close()
    assert main([*words, "--run_dir", str(disk / "run")]) == 2
    err = capsys.readouterr().err
    assert f"--run_dir {disk / 'run'}: can't be made" in err and err.count("\n") == 1
