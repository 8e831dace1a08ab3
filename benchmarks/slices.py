"""The smallest TPU slice on which a training step fits, by the compiler's account.

For each model and method slices are compiled from the smallest on that holds weights and optimizer
state, until one fits; nothing runs and no TPU is needed (extra `aot`). Weights are bfloat16, blocks
are recomputed in the backward pass, all chips split the weights, and each has one sequence.
"""

import argparse
import dataclasses
import math
import time
from typing import Any

import jax

from benchmarks import _timing
from models.config import PRESETS
from train import launch, mesh, placement, topology
from train.cli import parse
from train.config import Config

SIZES = ("13b", "30b", "65b")
SLICES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
GIB = 15.75  # of a v5e chip, that a program may use
METHODS = {
    "LOMO": ["--optimizer.name", "lomo", "--train.fused_backward"],
    "SGD": ["--optimizer.name", "lomo"],
    "AdamW": ["--optimizer.name", "adamw"],
}


def configuration(size: str, method: str, rows: int, length: int) -> Config:
    """A run's configuration, as the command line would give it."""
    words = ["--train.batch_size", str(rows), "--train.sequence_length", str(length)]
    words += [*METHODS[method], "--optimizer.clip_norm", "None"]
    config = parse(words).config
    few_bits = {"param_dtype": "bfloat16", "dtype": "bfloat16"}
    model = dataclasses.replace(PRESETS[size], **few_bits, remat=True)
    return dataclasses.replace(config, model=topology.for_platform(model, "tpu"))


def held(config: Config, grid: mesh.Mesh) -> float:
    """GiB of weights and optimizer state on a chip."""
    optimizer, _, begin = launch.prepare(config, mesh.Work(grid))
    shapes: Any = jax.eval_shape(begin, jax.random.key(0))
    return mesh.local_bytes(placement.place(shapes, optimizer, grid)) / 2**30


def search(size: str, method: str, length: int, kind: str) -> list[list[str]]:
    """A row for each slice that was compiled; the last one fits, if any does."""
    rows = []
    for chips in SLICES:
        count = math.prod(map(int, chips.split("x")))
        config = configuration(size, method, count, length)
        where = topology.devices(f"{kind}:{chips}")[0]
        grid = mesh.make(config.mesh, where, "fsdp")
        own = held(config, grid)
        if own > GIB:
            continue
        start = time.perf_counter()
        found = topology.compile_step(config, grid)
        seconds = f"{time.perf_counter() - start:.0f}"
        row = [size, method, chips, str(count), f"{own:.2f}"]
        if isinstance(found, topology.Refused):
            rows.append([*row, "", "", f"no: {found.reason}", seconds])
            print(rows[-1], flush=True)
            continue
        moved = sum(found.traffic.values()) / 2**30
        rows.append([*row, f"{found.peak / 2**30:.2f}", f"{moved:.1f}", "yes", seconds])
        print(rows[-1], flush=True)
        break
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--kind", default="v5e")
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    print(f"TPU {args.kind}, {_timing.versions('jax', 'optax', 'libtpu')}")
    rows = []
    for size in args.models:
        for method in args.methods:
            rows += search(size, method, args.length, args.kind)
    header = ["model", "method", "slice", "chips", "held", "peak", "moved", "fits", "compile s"]
    print(_timing.table(header, rows))


if __name__ == "__main__":
    main()
