"""Several processes end together, and begin only with the same configuration and data."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.test_train_mesh import free_port
from tests.train_helpers import ROOT, TINY, host_devices
from train import records

# Two processes without a model: each prints what it was told.
SMALL = """
import json
import jax
from train import mesh, processes
from train.config import Config
from train.errors import TrainError

processes.join()
me, told = jax.process_index(), []
stop = processes.Shared(mesh.make(Config().mesh))

class Stream:
    count = 0
    def __next__(self):
        if me == 1 and self.count == 3:
            raise OSError("no fourth batch")
        self.count += 1
        return self.count
    def get_state(self):
        return {"taken": self.count}

stream = processes.Together(Stream(), mesh.make(Config().mesh))
taken = []
try:
    while True:
        taken.append(next(stream))
        stop.update(0)  # in place of a step
except Exception as error:
    told.append([taken, stream.get_state(), str(error)])

def fails():
    if me == 1:
        raise ValueError("no such file here")

long = ["x" * 500] * 50
values = {"--a": 1, "--b": long}
processes.compare(values, "mend it")
for attempt in (
    lambda: processes.compare({**values, "--c": me}, "mend it"),
    lambda: processes.compare({**values, "--b": [*long, me]}, "mend it"),
    lambda: processes.compare(dict.fromkeys("ab"[: me + 1]), "mend it"),
    lambda: processes.in_all(fails),
):
    try:
        attempt()
    except Exception as error:
        told.append(str(error))
print("TOLD", json.dumps([told, processes.in_all(lambda: me)]))
"""


def two(commands, codes):
    """Two commands of Python as two processes: what each wrote to stdout and stderr."""
    port, running = free_port(), []
    for number, command in enumerate(commands):
        environment = {
            **os.environ,
            "XLA_FLAGS": host_devices(1),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(number),
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(
            subprocess.Popen([sys.executable, *command], env=environment, cwd=ROOT, **pipes)
        )
    try:
        found = [process.communicate(timeout=200) for process in running]
    finally:
        for process in running:
            process.kill()
    ended = [process.returncode for process in running]
    assert ended == codes if codes else all(ended), (ended, found)
    return found


def test_processes_agree_on_what_ends_them():
    found = two([["-c", SMALL]] * 2, [0, 0])
    texts = [out.partition("TOLD ")[2].splitlines()[0] for out, _ in found]
    (first, zero), (second, one) = map(json.loads, texts)
    assert (zero, one) == (0, 1)
    # Both have taken the three batches that both have, and stand behind the third.
    assert first[0] == [[1, 2, 3], {"taken": 3}, "process 1 can't go on, and tells why"]
    assert second[0] == [[1, 2, 3], {"taken": 3}, "no fourth batch"]
    assert first[1:] == ["process 1 can't go on, and tells why"] * 4
    assert second[1] == "--c is 0 in process 0 and 1 in process 1; mend it"
    assert second[2].startswith('--b is ["xxx') and "mend it" in second[2]
    assert second[3].startswith("the processes run other versions")
    assert second[4] == "no such file here"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Options of a small run on shards of which each process has its own copy."""
    folder = tmp_path_factory.mktemp("shards")
    for name in ("0", "1"):
        (folder / name).mkdir()
        for shard in "ab":
            rows = [{"text": f"the nation {shard} {i} and its law " * 4} for i in range(60)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{shard}.jsonl").write_text(text)
    start = TINY.index("--data.vocab_size")
    tiny = TINY[:start] + TINY[start + 2 :]
    return folder, [*tiny, "--data.tokenizer", "bytes"]


def commands_of(words, run_dir, *more):
    folder, options = words
    own = lambda n: ["--data.path", str(folder / n), "--data.cache_dir", str(folder / f"cache{n}")]
    return [
        [*options, *own(number), "--run_dir", str(run_dir), *extra]
        for number, extra in zip("01", more or ([], []), strict=True)
    ]


@pytest.mark.slow
def test_other_configurations_or_data_are_refused(words, tmp_path):
    seeds = commands_of(words, tmp_path / "run", ["--train.seed", "0"], ["--train.seed", "1"])
    (_, first), (_, second) = two([["-m", "train", *each] for each in seeds], [2, 2])
    assert "process 1 can't go on" in first
    assert "process 1: error: --train.seed is 0 in process 0 and 1 in process 1" in second
    folder, _ = words
    away = folder / "1" / "a.jsonl"
    shutil.move(away, tmp_path / "a.jsonl")
    commands = [["-m", "train", *each] for each in commands_of(words, tmp_path / "run")]
    (_, first), (_, second) = two(commands, [2, 2])
    shutil.move(tmp_path / "a.jsonl", away)
    assert "process 1 can't go on" in first and "the digest of --data.path" in second
    assert not (tmp_path / "run").exists()


FAILS = """
import os, sys
from train import shards
from train.errors import UsageError
read, taken = shards.Shards.__getitem__, []
def fails(self, number):
    taken.append(number)
    if os.environ["JAX_PROCESS_ID"] == "1" and len(taken) > 20:
        raise UsageError("--data.path: a.jsonl was changed or deleted while it was being read")
    return read(self, number)
shards.Shards.__getitem__ = fails
import runpy
runpy.run_module("train", run_name="__main__")
"""


@pytest.mark.slow
def test_a_shard_that_breaks_in_one_process_loses_nothing(words, tmp_path):
    folder = tmp_path / "run"
    commands = commands_of(words, folder, *[["--train.steps", "60"]] * 2)
    (_, first), (_, second) = two([["-c", FAILS, *each] for each in commands], [2, 2])
    step = records.read(folder / "metrics.jsonl")[-1]["step"]
    assert 1 < step < 60 and f"the checkpoint of step {step} is saved" in first
    assert "process 1 can't go on" in first and "a.jsonl was changed" in second
    two([["-m", "train", *each, "--resume"] for each in commands], [0, 0])
    other = commands_of(words, tmp_path / "whole", *[["--train.steps", "60"]] * 2)
    two([["-m", "train", *each] for each in other], [0, 0])
    files = [(path / "metrics.jsonl").read_bytes() for path in (folder, tmp_path / "whole")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_process_that_fails_by_itself_ends_the_others(words, tmp_path):
    """Where nothing can be agreed on any more."""
    breaks = """
import os
from train import loop
def fails(self, late):
    if late and late[0] == 5 and os.environ["JAX_PROCESS_ID"] == NUMBER:
        raise OSError(28, "No space left on device", "metrics.jsonl")
loop.Trainer._record = fails
import runpy
runpy.run_module("train", run_name="__main__")
"""
    for number in "01":
        commands = commands_of(words, tmp_path / number, *[["--train.steps", "4000"]] * 2)
        code = breaks.replace("NUMBER", repr(number))
        running = [["-c", code, *each] for each in commands]
        found = two(running, None)
        assert "no space left" in found[int(number)][1]
