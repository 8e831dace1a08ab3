"""Input of a run: made ahead, divided among processes, and told of when it breaks."""

import dataclasses
import json
import random
import time

import jax
import numpy as np
import pytest

from tests.train_helpers import TINY
from train import batches, cli, corpus, records, shards
from train.config import DataConfig
from train.errors import UsageError

WORDS = ["nation", "people", "hold", "that", "law", "work", "peace", "trade", "war", "land"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("shards"), random.Random(0)
    for name in "ab":
        found = [{"text": " ".join(rng.choices(WORDS, k=5))} for _ in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))
    return folder


@pytest.fixture
def data(path, tmp_path):
    return corpus.load(DataConfig(path=str(path), tokenizer="bytes", cache_dir=str(tmp_path)))


@pytest.mark.parametrize("layout", ["packed", "documents"])
def test_processes_have_equal_parts_of_one_batch_and_one_position(data, layout):
    data = data._replace(options=DataConfig(layout=layout, segments=layout == "packed"))
    streams = {
        count: [batches.training(data, 12, 32, 0, i, count) for i in range(count)]
        for count in (1, 2, 4)
    }
    for _ in range(5):
        whole = next(streams[1][0])
        for count in (2, 4):
            parts = [next(stream) for stream in streams[count]]
            assert parts[0].inputs.shape == (12 // count, 32)
            joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
            jax.tree.map(np.testing.assert_array_equal, joined, whole)
    positions = {json.dumps(s.get_state()) for group in streams.values() for s in group}
    assert len(positions) == 1
    # The very next rows, on another number of processes.
    expected = next(streams[1][0])
    for i in range(3):
        other = batches.training(data, 12, 32, 0, i, 3)
        other.set_state(json.loads(*positions))
        np.testing.assert_array_equal(next(other).targets, expected.targets[4 * i :][:4])
        other.close()
    for stream in [s for group in streams.values() for s in group]:
        stream.close()
    with pytest.raises(UsageError, match="--train.batch_size 12: 5 processes"):
        batches.training(data, 12, 32, 0, 0, 5)
    with pytest.raises(UsageError, match="row takes 476,837.2 GiB, this machine"):
        batches.training(data, 2_000_000_000_000, 32, 0)


def test_batches_are_made_ahead_and_the_position_is_that_of_the_last_one_taken(data):
    stream = batches.training(data, 4, 64, 0)
    first, position = next(stream), stream.get_state()
    deadline = time.monotonic() + 60
    while stream._buffer.qsize() < batches._AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stream._buffer.qsize() == batches._AHEAD  # and no more, while nobody takes them
    assert stream.get_state() == position
    again = batches.training(data, 4, 64, 0)
    assert not np.array_equal(next(again).inputs, next(stream).inputs)
    again.set_state(json.loads(json.dumps(position)))
    second = next(again)
    assert not np.array_equal(second.inputs, first.inputs)
    for iterator in (stream, again):
        iterator.close()
    reference = batches.training(data, 4, 64, 0)
    next(reference)
    np.testing.assert_array_equal(next(reference).inputs, second.inputs)
    reference.close()


@pytest.mark.parametrize("layout", ["packed", "documents"])
def test_threads_change_nothing(data, layout, monkeypatch):
    data = data._replace(options=DataConfig(layout=layout))
    found = {}
    for threads in (0, 1):
        monkeypatch.setattr(batches, "_THREADS", threads)
        stream = batches.training(data, 12, 32, 0)
        found[threads] = [(next(stream), json.dumps(stream.get_state())) for _ in range(8)]
        stream.close()
        again = batches.training(data, 12, 32, 0)
        again.set_state(json.loads(found[0][3][1]))
        np.testing.assert_array_equal(next(again).inputs, found[0][4][0].inputs)
        again.close()
    for (ours, state), (theirs, expected) in zip(found[1], found[0], strict=True):
        np.testing.assert_array_equal(ours.inputs, theirs.inputs)
        assert state == expected


def run(tmp_path, name, *arguments):
    words = [*TINY, "--data.cache_dir", str(tmp_path / "cache"), "--run_dir", str(tmp_path / name)]
    words = [word for word in words if word != "--data.vocab_size"]
    words.remove("320")  # its value
    return cli.main([*words, "--data.tokenizer", "bytes", "--train.steps", "20", *arguments])


def rows_of(tmp_path, name, file="metrics.jsonl"):
    return records.read(tmp_path / name / file)


@pytest.mark.parametrize("resumes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_shard_that_breaks_in_a_run_loses_nothing(path, tmp_path, monkeypatch, capsys, resumes):
    arguments = ["--data.path", str(path), "--data.segments"]
    read, taken = shards.Shards.__getitem__, []

    def fails(self, number):
        taken.append(number)
        if len(taken) > 32:
            raise UsageError("--data.path: a.jsonl was changed or deleted while it was being read")
        return read(self, number)

    monkeypatch.setattr(shards.Shards, "__getitem__", fails)
    assert run(tmp_path, "broken", *arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a.jsonl was changed or deleted" in message and "--resume" in message
    done = rows_of(tmp_path, "broken")[-1]["step"]
    assert 10 <= done < 20 and f"the checkpoint of step {done} is saved" in message
    speed = rows_of(tmp_path, "broken", "throughput.jsonl")
    assert speed and all(0 <= row["input_wait_seconds"] <= row["seconds"] + 1 for row in speed)
    if not resumes:
        return
    monkeypatch.setattr(shards.Shards, "__getitem__", read)
    assert run(tmp_path, "broken", *arguments, "--resume") == 0
    assert run(tmp_path, "whole", *arguments) == 0
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "broken")]
    assert files[0] == files[1]


def test_what_is_read_is_told_by_its_contents(data, path, tmp_path):
    """Data may be moved between a run and its resume, and not be others."""
    (tmp_path / "moved").mkdir()
    for file in path.glob("*.jsonl"):
        (tmp_path / "moved" / file.name).write_bytes(file.read_bytes())
    moved = dataclasses.replace(data.options, path=str(tmp_path / "moved"))
    assert corpus.load(moved).key == data.key
    with open(tmp_path / "moved" / "a.jsonl", "a") as file:
        file.write('{"text": "other"}\n')
    assert corpus.load(moved).key != data.key


def test_examples_train_on_their_completions(tmp_path):
    examples = [{"prompt": f"say {w}: ", "completion": w} for w in WORDS for _ in range(3)]
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in examples))
    arguments = ["--data.path", str(file), "--data.layout", "documents"]
    assert run(tmp_path, "run", *arguments, "--train.fused_backward") == 0
    final = rows_of(tmp_path, "run")[-1]
    assert final["kind"] == "final" and final["bits_per_byte"] is None
    held = batches.held_out(
        corpus.load(
            DataConfig(
                path=str(file), tokenizer="bytes", layout="documents", cache_dir=str(tmp_path / "c")
            )
        ),
        16,
    )
    assert final["scored"] == len(held.targets) and final["tokens"] == 20 * 2 * 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.segments", "--data.layout", "documents"], "--data.segments"),
        (["--data.validation_tokens", "0"], "--data.validation_tokens 0: give a whole number"),
        (["--data.tfds_dir", "x"], "--data.tfds_dir: no path begins with tfds:"),
        (["--data.bad_shards", "skip"], "--data.bad_shards: there are no JSON lines"),
        (["--data.tokenizer", "bytes", "--data.vocab_size", "300"], "has pieces of its own"),
        (["--data.path", "tfds:c4/en", "--data.split_seed", "1"], "held-out documents are given"),
        (["--data.layout", "rows"], "--data.layout"),
    ],
)
def test_keys_that_nothing_reads_are_refused(arguments, words):
    with pytest.raises(UsageError) as caught:
        cli.parse(arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_vocabulary_that_does_not_fit_is_refused(path, tmp_path, capsys):
    code = run(tmp_path, "run", "--data.path", str(path), "--model.vocab_size", "256")
    error = capsys.readouterr().err
    assert code == 2 and "has 257 ids, more than the 256 embeddings" in error
    assert "give --model.vocab_size 257" in error and not (tmp_path / "run").exists()
