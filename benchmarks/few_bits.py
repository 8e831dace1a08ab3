"""What 8-bit moments and weights of few bits cost in convergence, paired by seed.

The trainer's own steps on the model `tiny` and the embedded corpus. Each variant differs from the
one that it is compared with in storage alone: first weights, batches and rates are those of the
seed. Written is the mean over seeds of the difference in final held-out loss, relative to the loss.
"""

import argparse
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import _timing
from models.config import PRESETS
from train import batches, corpus
from train.config import Config, resolve
from train.optimizer import make
from train.step import init_state, make_eval_step, make_train_step


class Variant(NamedTuple):
    """A way to keep state and weights, and the one that it is compared with."""

    optimizer: str
    train: dict[str, Any]
    param_dtype: str
    against: str | None


VARIANTS = {
    "galore": Variant("galore", {}, "float32", None),
    "galore_adamw8bit": Variant("galore_adamw8bit", {}, "float32", "galore"),
    "online_subspace_descent": Variant("online_subspace_descent", {}, "float32", None),
    "online_subspace_adamw8bit": Variant(
        "online_subspace_adamw8bit", {}, "float32", "online_subspace_descent"
    ),
    "bfloat16 weights, stochastic": Variant("galore", {}, "bfloat16", "galore"),
    "bfloat16 weights, to nearest": Variant(
        "galore", {"stochastic_rounding": False}, "bfloat16", "galore"
    ),
    "int8 weights, stochastic": Variant("galore", {"int8_weights": True}, "float32", "galore"),
    "int8 weights, to nearest": Variant(
        "galore", {"int8_weights": True, "stochastic_rounding": False}, "float32", "galore"
    ),
    "bfloat16, kernels in int8": Variant("galore", {"int8_weights": True}, "bfloat16", "galore"),
}


def run(variant: Variant, steps: int, seed: int) -> float:
    """The held-out loss after training, in nats a token."""
    config = Config(model=dataclasses.replace(PRESETS["tiny"], param_dtype=variant.param_dtype))
    config = resolve(
        dataclasses.replace(
            config,
            optimizer=dataclasses.replace(config.optimizer, name=variant.optimizer),
            train=dataclasses.replace(config.train, steps=steps, seed=seed, **variant.train),
        )
    )
    data = corpus.load(config.data)
    optimizer, train = make(config.optimizer, steps), config.train
    state = init_state(config.model, optimizer, jax.random.key(seed), train.int8_weights)
    step = make_train_step(config.model, optimizer, seed if train.stochastic_rounding else None)
    stream = batches.training(data, train.batch_size, train.sequence_length, seed)
    for _ in range(steps):
        state, _ = step(state, next(stream))
    evaluate, total, count = make_eval_step(config.model), 0.0, 0.0
    held_out = batches.held_out(data, train.sequence_length)
    for batch in held_out.batches(train.batch_size, train.sequence_length, 40):
        nats, tokens = evaluate(state.params, batch)
        total, count = total + float(nats), count + float(tokens)
    return total / count


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    print(f"{jax.default_backend()}, {_timing.versions('jax', 'optax', 'flax')}")
    print(f"tiny, rank 32, {args.steps} steps, {args.seeds} seeds")
    losses: dict[str, np.ndarray] = {}
    rows = []
    for name in args.variants:
        variant = VARIANTS[name]
        found = []
        for seed in range(args.seeds):
            found.append(run(variant, args.steps, seed))
            print(f"{name}, seed {seed}: {found[-1]:.4f}", flush=True)
        losses[name] = np.array(found)
        row = [name, f"{np.mean(found):.4f}", " ".join(f"{x:.4f}" for x in found), "", ""]
        if variant.against in losses:
            away = losses[name] / losses[variant.against] - 1
            row[3:] = [f"{100 * away.mean():+.2f} %", " ".join(f"{100 * x:+.2f}" for x in away)]
        rows.append(row)
    header = ["", "held-out loss", "by seed", "paired difference", "by seed, %"]
    print("\n" + _timing.table(header, rows))


if __name__ == "__main__":
    main()
