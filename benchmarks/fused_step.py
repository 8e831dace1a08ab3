"""Time of a training step: plain with rematerialised blocks, and with the fused backward pass.

Both compute each block twice and run the same code for it; they take turns on the same batch.
"""

import argparse
import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_subspace as osub
from benchmarks import _timing
from benchmarks.fused_memory import parts_of, plain_step
from models import llama
from models.config import PRESETS


class Run:
    """A compiled step with its state, which is donated from call to call."""

    def __init__(self, step: Any, params: Any, state: Any, windows: jax.Array):
        self.carry, self.windows = (jax.tree.map(jnp.copy, params), state), windows
        jitted = jax.jit(step, donate_argnums=(0, 1))
        self.step = jitted.lower(*self.carry, windows).compile()

    def __call__(self) -> None:
        *carry, _ = self.step(*self.carry, self.windows)
        self.carry = tuple(jax.block_until_ready(carry))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PRESETS, default="20m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"{jax.default_backend()}, {os.cpu_count()} cores, {_timing.versions('jax', 'optax')}")
    config = dataclasses.replace(PRESETS[args.model], vocab_size=4096, remat=True)
    params = llama.init_params(config, jax.random.key(0))
    shape = (args.batch, args.length + 1)
    windows = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
    rules = llama.subspace_rules()
    optimizers = {
        "SGD": osub.lomo(1e-3),
        "AdamW": optax.adamw(1e-3),
        "AdaLomo": osub.adalomo(1e-3),
        "GaLore": osub.galore(1e-3, 64, rules=rules),
    }
    runs: dict[str, Run] = {}
    for name, tx in optimizers.items():
        fused = osub.fused_backward(*parts_of(config), tx)
        runs[f"{name}, plain"] = Run(plain_step(config, tx), params, tx.init(params), windows)
        runs[f"{name}, fused"] = Run(fused.step, params, jax.jit(fused.init)(params), windows)
        clipped = osub.fused_backward(*parts_of(config), tx, clip_norm=1.0)
        state = jax.jit(clipped.init)(params)
        runs[f"{name}, fused, global norm"] = Run(clipped.step, params, state, windows)
    timings = _timing.alternate(runs, rounds=args.rounds)
    rows = []
    for name, timing in timings.items():
        ratio = timing.median / timings[f"{name.partition(',')[0]}, plain"].median
        rows.append([name, f"{timing.median * 1e3:.1f}", f"{timing.spread:.2f}", f"{ratio:.3f}"])
    print(f"\n{args.model}, vocabulary 4096, {args.batch} x {args.length} tokens, float32")
    print(_timing.table(["step", "ms", "spread", "/ plain"], rows))


if __name__ == "__main__":
    main()
