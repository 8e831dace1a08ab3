"""The time, state and temporaries of an optimizer step on a LLaMA's matrices, side by side.

Ours, `optax.contrib.galore` and `optax.adam` take turns; the gradients are random, the steps plain
(no refresh) unless a row says otherwise. The floor is what no method that projects a gradient can
go below: the products that project and lift, and Adam on the low-rank arrays.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_subspace as osub
from benchmarks import _llama_shapes, _timing
from models.config import PRESETS

FLOOR, PEER = "project + Adam + lift", "optax.contrib.galore"
LAYERS = {"60m": 8, "350m": 2, "1b": 1}


class Step:
    """A compiled update of one optimizer, its state carried from call to call."""

    def __init__(self, tx: optax.GradientTransformation, gradients: Any, whole: Any = None):
        self.gradients = gradients
        state = jax.jit(tx.init)(gradients)
        update = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=1)
        start = time.perf_counter()
        self.update = update.lower(gradients, state, gradients).compile()
        self.compile_seconds = time.perf_counter() - start
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        self.temporaries = 0 if whole is None else temporaries(tx, whole)
        self.state = state

    def __call__(self) -> None:
        updates, self.state = self.update(self.gradients, self.state, self.gradients)
        jax.block_until_ready(updates)


def temporaries(tx: optax.GradientTransformation, params: Any) -> int:
    """Bytes that a step needs beside weights, gradients and state; only shapes are read."""

    def apply(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(apply, donate_argnums=(0, 1)).lower(params, state, params).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def floor(gradients: Any, rank: int) -> Callable[[], None]:
    """The products and the arithmetic on low-rank arrays alone, basis on the longer side."""
    keys = jax.random.split(jax.random.key(0), len(gradients))
    bases = {
        k: jnp.linalg.qr(jax.random.normal(key, (max(g.shape), rank)))[0]
        for key, (k, g) in zip(keys, gradients.items(), strict=True)
    }
    adam = optax.scale_by_adam()
    project = lambda p, g: p.T @ g if len(p) == len(g) else g @ p
    lift = lambda p, r, g: p @ r if len(p) == len(g) else r @ p.T
    state = adam.init(jax.tree.map(project, bases, gradients))

    def step(gradients, state):
        low = jax.tree.map(project, bases, gradients)
        low, state = adam.update(low, state)
        return jax.tree.map(lift, bases, low, gradients), state

    compiled = jax.jit(step, donate_argnums=1)

    def call():
        nonlocal state
        updates, state = compiled(gradients, state)
        jax.block_until_ready(updates)

    return call


def main() -> None:
    """Prints a table per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--every", type=int, default=200, help="period of the refreshing row")
    parser.add_argument(
        "--refresh", action="store_true", help="time a whole period, and the peer's"
    )
    args = parser.parse_args()
    print(f"{jax.default_backend()}, {os.cpu_count()} cores, {_timing.versions('jax', 'optax')}")
    for model in args.models:
        compare(model, LAYERS[model], _llama_shapes.RANKS[model], args)


def compare(model: str, layers: int, rank: int, args: argparse.Namespace) -> None:
    flat, stacked = _llama_shapes.separate(model, layers), _llama_shapes.stacked(model, layers)
    every = PRESETS[model].num_layers
    all_flat = jax.eval_shape(lambda: _llama_shapes.separate(model, every))
    all_stacked = jax.eval_shape(lambda: _llama_shapes.stacked(model, every))
    ours = lambda **kw: osub.galore(1e-2, rank, **kw)
    steps = {
        "optax.adam": Step(optax.adam(1e-2), flat, all_flat),
        PEER: Step(optax.contrib.galore(1e-2, rank), flat, all_flat),
        "galore(side='longer')": Step(ours(side="longer"), flat, all_flat),
        "galore()": Step(ours(), flat, all_flat),
        "galore(side='auto')": Step(ours(side="auto"), flat, all_flat),
        "galore_adamw8bit(side='longer')": Step(
            osub.galore_adamw8bit(1e-2, rank, side="longer"), flat, all_flat
        ),
        "galore(side='longer'), stacked": Step(
            ours(side="longer", rules=_llama_shapes.STACKED), stacked, all_stacked
        ),
    }
    calls: dict[str, Callable[[], None]] = {FLOOR: floor(flat, rank), **steps}
    timings = _timing.alternate(calls, rounds=args.rounds, warmup=2)
    base, peer = timings[FLOOR].median, timings[PEER].median
    rows = []
    for name, timing in timings.items():
        step = steps.get(name)
        memory = ["", "", ""]
        if step:
            share = step.state_bytes / steps[PEER].state_bytes
            megabytes = step.temporaries / 2**20
            memory = [f"{share:.3f}", f"{megabytes:.1f}", f"{step.compile_seconds:.1f}"]
        rows.append(
            [
                name,
                f"{timing.median * 1e3:.1f}",
                f"{timing.spread:.2f}",
                f"{timing.median / base:.2f}",
                f"{timing.median / peer:.2f}",
                *memory,
            ]
        )
    count = sum(x.size for x in flat.values())
    print(
        f"\n{model}, {layers} layers (temporaries: those of all {every}): {count:,} values, "
        f"rank {rank}; state of {PEER}: ",
        end="",
    )
    print(f"{steps[PEER].state_bytes / steps['optax.adam'].state_bytes:.3f} of Adam's")
    header = ["plain step", "ms", "spread", "/ floor", "/ peer"]
    print(_timing.table([*header, "state / peer", "MiB of temporaries", "compile s"], rows))
    if args.refresh:
        print(refreshing(flat, rank, args.every))


def refreshing(flat: Any, rank: int, every: int) -> str:
    """Mean and worst step over one period after the first step, beside plain steps in turn."""
    rule = osub.subspace_iteration
    ours = lambda projector, **kw: osub.galore(1e-2, rank, side="longer", projector=projector, **kw)
    steps = {
        "plain steps in turn": Step(ours(rule(10 * every)), flat),
        f"subspace_iteration({every}, stagger=True)": Step(ours(rule(every), stagger=True), flat),
        f"subspace_iteration({every})": Step(ours(rule(every)), flat),
    }
    timings = _timing.alternate(steps, rounds=every, warmup=1)
    plain = statistics.fmean(timings["plain steps in turn"].seconds)
    rows = []
    for name, timing in timings.items():
        mean, worst = statistics.fmean(timing.seconds), max(timing.seconds)
        # The worst of so many steps is the machine's worst too, as the plain steps' tells.
        high = statistics.quantiles(timing.seconds, n=100)[97]
        figures = [f"{1e3 * mean:.1f}", f"{mean / plain:.3f}", f"{timing.median * 1e3:.1f}"]
        rows.append([name, *figures, f"{worst / mean:.2f}", f"{high / mean:.2f}"])
    peer = Step(optax.contrib.galore(1e-2, rank, update_proj_gap=1), flat)
    peer()
    start = time.perf_counter()
    peer()
    note = f"a refresh step of {PEER}: {time.perf_counter() - start:.2f} s"
    header = ["over a period", "mean ms", "/ plain", "median ms", "worst / mean", "98 % / mean"]
    return "\n" + _timing.table(header, rows) + "\n" + note


if __name__ == "__main__":
    main()
