"""Which rule keeps most of a LLaMA's real gradients: captured energy and loss while it trains.

The model `tiny` on the embedded corpus, with the same schedule, scale and inner Adam, and for each
seed the same first weights and batches; the gradients are those of each run's own weights, after
clipping. Captured energy is the mean over all projected matrices of the share of the gradient that
the basis holds which projected it.
"""

import argparse
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_subspace as osub
from benchmarks import _timing
from models import llama
from models.config import PRESETS
from models.llama import subspace_rules
from train import batches, corpus
from train.config import Config, resolve
from train.optimizer import warmup_cosine

RULES = {
    "svd(50)": osub.svd(50),
    "svd(200)": osub.svd(200),
    "subspace_iteration(200)": osub.subspace_iteration(200),
    "history_pca()": osub.history_pca(),
    "online_pca()": osub.online_pca(),
    "oja()": osub.oja(),
    "random_projection(200)": osub.random_projection(200),
}


def run(
    rule: osub.Projector, moments: str, config: Config, data: corpus.Corpus, seed: int
) -> list[float]:
    """Mean captured energy over the second half, mean drift, training and held-out loss."""
    steps = config.train.steps
    options, model = config.optimizer, PRESETS["tiny"]
    assert options.learning_rate is not None
    schedule = warmup_cosine(options.learning_rate, steps, 0.1, 0.1)
    tx = osub.online_subspace_descent(
        schedule,
        options.rank,
        projector=rule,
        scale=options.scale,
        rules=subspace_rules(),
        moments=moments,
    )
    clip = optax.clip_by_global_norm(options.clip_norm)
    params = llama.init_params(model, jax.random.key(seed))
    definition, state = llama.graphdef(model), tx.init(params)

    def loss_of(params, batch):
        return llama.merge(definition, params).loss(batch.inputs, batch.targets)[0]

    @jax.jit
    def step(params, state, batch):
        loss, gradients = jax.value_and_grad(loss_of)(params, batch)
        gradients, _ = clip.update(gradients, clip.init(params))
        metrics = osub.subspace_metrics(tx, state, gradients).values()
        mean = lambda field: jnp.mean(jnp.stack([jnp.mean(getattr(m, field)) for m in metrics]))
        updates, state = tx.update(gradients, state, params)
        watched = jnp.stack([mean("captured_energy"), mean("drift"), loss])
        return optax.apply_updates(params, updates), state, watched

    stream = batches.training(data, config.train.batch_size, config.train.sequence_length, seed)
    rows = []
    for _ in range(steps):
        params, state, watched = step(params, state, next(stream))
        rows.append(np.asarray(watched))
    held_out = batches.held_out(data, config.train.sequence_length)
    score = jax.jit(lambda p, *b: llama.merge(definition, p).loss(*b))
    losses = [
        score(params, *batch[:3])[0]
        for batch in held_out.batches(config.train.batch_size, config.train.sequence_length, 20)
    ]
    second = np.stack(rows[steps // 2 :])
    return [*(float(x) for x in second.mean(axis=0)), float(np.mean(losses))]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--moments", nargs="+", choices=("keep", "project"), default=["keep"])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    config = resolve(Config())
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=args.steps))
    data = corpus.load(config.data)
    print(f"{jax.default_backend()}, {_timing.versions('jax', 'optax', 'flax')}")
    print(
        f"tiny, rank {config.optimizer.rank}, {args.steps} steps, {args.seeds} seeds; mean and "
        "standard deviation over the seeds, of means over the second half"
    )
    rows = []
    for name, moments in itertools.product(args.rules, args.moments):
        found = []
        for seed in range(args.seeds):
            found.append(run(RULES[name], moments, config, data, seed))
            print(name, moments, seed, *(f"{x:.4f}" for x in found[-1]), flush=True)
        means, spreads = np.mean(found, axis=0), np.std(found, axis=0, ddof=min(1, args.seeds - 1))
        figures = [f"{m:.4f} ({s:.4f})" for m, s in zip(means, spreads, strict=True)]
        rows.append([name, moments, *figures])
    header = ["rule", "moments", "captured energy", "drift", "training loss", "held-out loss"]
    print("\n" + _timing.table(header, rows))


if __name__ == "__main__":
    main()
