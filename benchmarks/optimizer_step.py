"""The time, state and temporaries of an optimizer step on a LLaMA's matrices, side by side.

Ours, `optax.contrib.galore` and `optax.adam` take turns; the gradients are random, the steps plain
(no refresh) unless a row says otherwise. The floor of a side is what no method that projects a
gradient on it can go below: the products that project and lift, and Adam on the low-rank arrays.
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
from optax_subspace import _projection

PEER = "optax.contrib.galore"
# The sides of the bases by row; the floor of each is the products and Adam on its low-rank arrays.
SIDES = {
    PEER: "longer",
    "galore(side='longer')": "longer",
    "galore()": "shorter",
    "galore(side='auto')": "both",
    "galore_adamw8bit(side='longer')": "longer",
    "galore(side='longer'), stacked": "longer",
}
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


def floor(gradients: Any, rank: int, side: str) -> Callable[[], None]:
    """The products and the arithmetic on low-rank arrays alone, with bases on that side."""
    plans = {p.path: p for p in osub.plan(gradients, rank=rank, side=side)}
    keys = jax.random.split(jax.random.key(0), len(gradients))
    bases = {
        k: tuple(
            jnp.linalg.qr(jax.random.normal(jax.random.fold_in(key, i), shape))[0]
            for i, shape in enumerate(plans[k].basis_shapes)
        )
        for key, k in zip(keys, gradients, strict=True)
    }
    adam = optax.scale_by_adam()

    def project(gradients, bases):
        return {k: _projection.project(g, bases[k], plans[k]) for k, g in gradients.items()}

    state = adam.init(project(gradients, bases))

    def step(gradients, bases, state):
        low, state = adam.update(project(gradients, bases), state)
        return {k: _projection.lift(r, bases[k], plans[k]) for k, r in low.items()}, state

    compiled = jax.jit(step, donate_argnums=2)

    def call():
        nonlocal state
        updates, state = compiled(gradients, bases, state)
        jax.block_until_ready(updates)

    return call


def main() -> None:
    """Prints a table per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--every", type=int, default=200, help="period of the refreshing row")
    parser.add_argument("--periods", type=int, default=3, help="periods of the refreshing row")
    parser.add_argument("--refresh", action="store_true", help="time whole periods, and the peer's")
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
    floors: dict[str, Callable[[], None]] = {
        f"floor, {side}": floor(flat, rank, side) for side in ("longer", "shorter", "both")
    }
    timings = _timing.alternate({**floors, **steps}, rounds=args.rounds, warmup=2)
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
                f"{timing.over(timings[f'floor, {SIDES[name]}']):.2f}" if name in SIDES else "",
                f"{timing.over(timings[PEER]):.2f}",
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
        print(refreshing(flat, rank, args.every, args.periods))


def refreshing(flat: Any, rank: int, every: int, periods: int) -> str:
    """Mean and worst step of a period after the first step, beside plain steps in turn.

    A step of the period counts with its median over `periods`: what comes back with the period is
    the optimizer's, what does not is the machine's.
    """
    rule = osub.subspace_iteration
    ours = lambda projector, **kw: osub.galore(1e-2, rank, side="longer", projector=projector, **kw)
    steps = {
        "plain steps in turn": Step(ours(rule(10 * every * periods)), flat),
        f"subspace_iteration({every}, stagger=True)": Step(ours(rule(every), stagger=True), flat),
        f"subspace_iteration({every})": Step(ours(rule(every)), flat),
    }
    timings = _timing.alternate(steps, rounds=every * periods, warmup=1)
    plain = statistics.fmean(timings["plain steps in turn"].seconds)
    rows = []
    for name, timing in timings.items():
        mean = statistics.fmean(timing.seconds)
        steps_of_period = [statistics.median(timing.seconds[i::every]) for i in range(every)]
        worst, once = max(steps_of_period), max(timing.seconds)
        figures = [f"{1e3 * mean:.1f}", f"{mean / plain:.3f}", f"{timing.median * 1e3:.1f}"]
        rows.append([name, *figures, f"{worst / mean:.2f}", f"{once / mean:.2f}"])
    peer = Step(optax.contrib.galore(1e-2, rank, update_proj_gap=1), flat)
    peer()
    start = time.perf_counter()
    peer()
    note = f"a refresh step of {PEER}: {time.perf_counter() - start:.2f} s"
    header = [
        f"over {periods} periods",
        "mean ms",
        "/ plain",
        "median ms",
        "worst / mean",
        "worst once",
    ]
    return "\n" + _timing.table(header, rows) + "\n" + note


if __name__ == "__main__":
    main()
