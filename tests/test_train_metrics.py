"""What a run measures on the way: speed, FLOPs, memory, skipped gradients, TensorBoard's events."""

import json
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from models import llama
from models.config import PRESETS, LlamaConfig
from optax_subspace import random_projection, scale_by_subspace
from tests.train_helpers import events
from train import flops, records, report, tensorboard, throughput
from train.cli import main, parse
from train.clock import Clock
from train.optimizer import skipped_gradients
from train.screen import Screen


def test_model_flops_are_those_of_the_products():
    """Counted one by one, forward, and three times that with the backward pass."""
    c = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_heads=4, num_kv_heads=2
    )
    d, f, kv, length = 64, 80, 32, 24
    products = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
    block = sum(2 * m * n for m, n in products) + 2 * 2 * length * d  # scores, and their values
    forward = c.num_layers * block + 2 * d * c.vocab_size
    norms = 6 * (2 * c.num_layers * d + d)  # which N counts too
    assert flops.per_token(c, length) - norms == 3 * forward
    tied = LlamaConfig(vocab_size=96, hidden_size=64, num_heads=4, tie_embeddings=True)
    untied = LlamaConfig(vocab_size=96, hidden_size=64, num_heads=4)
    assert flops.per_token(tied, 8) == flops.per_token(untied, 8)
    # Frozen weights have no gradient of their own, but hand on that of their inputs.
    attention = 12 * c.num_layers * d * length
    ratio = (flops.per_token(c, length, frozen="all") - attention) * 3
    assert ratio == 2 * (flops.per_token(c, length) - attention)


def test_model_flops_match_the_compilers_count():
    c = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_heads=2, num_layers=2,
        attention="einsum", loss="logits", unroll=2,
    )  # fmt: skip
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    params = jax.eval_shape(lambda k: llama.init_params(c, k), jax.random.key(0))
    definition = llama.graphdef(c)
    loss = lambda p, x: llama.merge(definition, p).loss(x, x)[0]
    counted = jax.jit(jax.grad(loss)).lower(params, tokens).cost_analysis()["flops"]
    # Norms, softmax and the like are counted too.
    assert 1 < counted / (flops.per_token(c, 64) * 128) < 1.1


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v2", 23),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA A1000 Laptop GPU", None),
        ("cpu", None),
    ],
)
def test_peaks_by_the_kind_of_device(kind, tera):
    assert flops.peak(kind) == (None if tera is None else tera * 1e12)


class Device:
    """One of two devices of a kind."""

    device_kind = "NVIDIA H100 80GB HBM3"

    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_a_row_of_speed(monkeypatch):
    devices = [Device({"peak_bytes_in_use": 5}), Device({"peak_bytes_in_use": 7})]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    config = parse(["--model", "7b"]).config
    clock = Clock(tokens_per_step=20_000)
    for _ in range(3):
        clock.count()
    monkeypatch.setattr(clock, "seconds", lambda: 2.5)
    row = throughput.row(10, 7, clock, config)
    assert row["tokens_per_second"] == 24_000 and row["tokens_per_second_per_device"] == 12_000
    cost = flops.per_token(PRESETS["7b"], 256)
    assert row["model_flops_per_second"] == pytest.approx(24_000 * cost, rel=1e-3)
    assert row["utilisation"] == pytest.approx(24_000 * cost / (2 * 989e12), abs=1e-4)
    assert (row["step"], row["after"], row["seconds"], row["devices"]) == (10, 7, 2.5, 2)
    assert row["peak_bytes"] == 7
    # JSON has no infinity or NaN.
    json.dumps(row, allow_nan=False)
    assert throughput.peak_bytes([Device(None), Device({})]) is None


def test_skipped_gradients_are_counted_leaf_by_leaf():
    projector = random_projection(every=5)
    tx = optax.chain(scale_by_subspace(optax.identity(), rank=2, projector=projector))
    params = {"a": jnp.ones((6, 4)), "b": jnp.ones(3)}
    state = tx.init(params)
    assert skipped_gradients(state) == 0
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    update = jax.jit(lambda state, gradients: tx.update(gradients, state, params)[1])
    for gradients in (bad, params, {**params, "b": bad["b"]}):
        state = update(state, gradients)
    assert skipped_gradients(state) == 3
    # A fused step has a count for each layer.
    assert skipped_gradients({"layers": jax.tree.map(lambda x: jnp.stack([x, x]), state)}) == 6
    assert skipped_gradients(optax.adamw(1e-3).init(params)) == 0


def test_the_last_table_tells_the_speed(capsys):
    final = {"validation_loss": 2.0, "unigram_loss": 4.0, "unigram_perplexity": 54.6}
    final |= {"bits_per_byte": 1.0, "tokens": 5}
    speed = {"tokens_per_second": 2e4, "tokens_per_second_per_device": 1e4, "devices": 2}
    speed |= {"model_flops_per_second": 1.5e14, "utilisation": 0.25, "device": "TPU v4"}
    report.print_result(Screen(), final, speed | {"peak_bytes": 2**30}, {})
    out = " ".join(capsys.readouterr().out.split())
    assert "tokens/s 20,000 (10,000 on each of 2 devices)" in out
    assert "model FLOP/s 1.5e+14 (25.0% of the peak of TPU v4)" in out
    assert "peak memory of a device 1,024.00 MiB" in out
    speed |= {"devices": 1, "utilisation": None, "peak_bytes": None}
    report.print_result(Screen(), final, speed, {})
    out = capsys.readouterr().out
    assert "device" not in out and "peak" not in out


def test_events_are_the_rows_that_stand(tmp_path):
    path, folder = tmp_path / "throughput.jsonl", tmp_path / "board"
    row = lambda step, speed, **more: {"kind": "speed", "step": step, "speed": speed, **more}

    def write(done, *rows):
        board = tensorboard.Board(folder)
        file = records.Records(path, done, keep_later=True, mirror=board.write)
        for each in rows:
            file.write(each)
        file.close()
        board.close()

    write(0, row(5, 1.5, device="cpu", utilisation=None), row(10, 2.0), row(15, 2.5))
    assert events(folder) == [
        (5, "speed/speed", 1.5),
        (10, "speed/speed", 2),
        (15, "speed/speed", 2.5),
    ]
    # Killed with half a row written, and resumed after step 7; step 10 is done again.
    with open(path, "a") as file:
        file.write('{"kind": "speed", "st')
    write(7, row(10, 3.0))
    assert [row["step"] for row in records.read(path)] == [5, 10, 15, 10]
    assert events(folder) == [(5, "speed/speed", 1.5), (10, "speed/speed", 3)]
    write(12)
    assert events(folder) == [(5, "speed/speed", 1.5), (10, "speed/speed", 3)]
    assert "tensorflow" not in sys.modules and "torch" not in sys.modules


def test_without_the_writer_it_says_so_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    assert main(["--log.tensorboard", "--run_dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --log.tensorboard:") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_row_that_is_damaged_is_told_from_one_that_is_being_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = [{"kind": "train", "step": n} for n in (1, 2)]
    lines = [json.dumps(row) for row in good]
    path.write_text("\n".join(lines) + "\n" + lines[0][:9])
    assert records.scan(path) == (good, None)
    for bad in ("{", "[]", '{"kind": "train"}', "\x00\x00"):
        path.write_text("\n".join([lines[0], bad, lines[1]]) + "\n")
        assert records.scan(path) == (good[:1], 2)
    assert records.scan(tmp_path / "none") == ([], None)
