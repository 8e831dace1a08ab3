"""A run so small that a test can afford it, in this process or in one of its own."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from train.batches import Batch

ROOT = Path(__file__).resolve().parents[1]

# 40 steps; a checkpoint falls into the middle of a projector's ten steps.
TINY = [
    *["--model.num_layers", "1", "--model.hidden_size", "32", "--model.intermediate_size", "48"],
    *["--model.num_heads", "2", "--model.vocab_size", "320", "--data.vocab_size", "320"],
    *["--train.batch_size", "2", "--train.sequence_length", "16", "--train.steps", "40"],
    *["--train.eval_every", "15", "--train.eval_batches", "2", "--log.print_every", "10"],
    *["--optimizer.rank", "4", "--optimizer.every", "10", "--checkpoint.every", "7"],
]


def host_devices(count: int) -> str:
    """`XLA_FLAGS` of a process with so many devices, which compiles as shortly as the suite."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"


def on_eight_devices(program: str, *arguments: str, options: Sequence[str] = ()) -> Any:
    """What a program prints at its end, in JSON, in a process that has eight devices."""
    environment = {
        **os.environ,
        "XLA_FLAGS": host_devices(8),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, *options, "-c", program, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def pair(windows: jax.Array) -> Batch:
    """Windows (B, S + 1) of tokens as a batch."""
    return Batch(windows[:, :-1], windows[:, 1:])


def batch_shapes(batch_size: int, length: int) -> Batch:
    """The shapes of a batch of packed tokens."""
    tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    return Batch(tokens, tokens)


def write_text(folder: Path, documents: int = 12) -> Path:
    """A folder of small documents made of few words."""
    rng = random.Random(0)
    words = "the nation and its people hold that law work peace trade war land shall be"
    words = words.split()
    words += [a + b for a in ("re", "un", "con", "pro") for b in ("form", "duct", "serve", "tain")]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        sentences = [" ".join(rng.choices(words, k=9)).capitalize() + "." for _ in range(12)]
        (folder / f"{number:02}.txt").write_text("\n".join(sentences))
    return folder


def start(
    arguments: list[str], prologue: str = "", cwd: Path = ROOT, stdout: int = subprocess.PIPE
) -> subprocess.Popen:
    """`python -m train` in a process of its own; `prologue` is code that it runs first."""
    code = f"{prologue}\nimport runpy\nrunpy.run_module('train', run_name='__main__')"
    program = ["-c", code] if prologue else ["-m", "train"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=cwd,
        env=environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """Waits for the process, checks its exit code, and returns stdout and stderr."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, (process.returncode, out and out[-3000:], err[-3000:])
    return out, err


def signal_at(process: subprocess.Popen, metrics: Path, step: int, number: int) -> None:
    """Sends the signal as soon as the row of `step` is in the file."""
    deadline = time.monotonic() + 200
    while steps_in(metrics) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.003)
    process.send_signal(number)


def kill_at(process: subprocess.Popen, metrics: Path, step: int) -> str:
    """kill -9 as soon as the row of `step` is in the file; returns what was printed until then."""
    signal_at(process, metrics, step, signal.SIGKILL)
    return finish(process, -signal.SIGKILL)[0]


def events(folder: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of all TensorBoard files of a folder, as they stand there."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[12 + size + 4 :]
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return found


def steps_in(metrics: Path) -> int:
    """The last whole row's step, 0 without any."""
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0
