"""Which rule keeps most of a LLaMA's real gradients: captured energy and loss while it trains.

The model `tiny` on the embedded corpus, with the same batches, schedule, scale and inner Adam; the
gradients are those of each run's own weights, after clipping. Captured energy is the mean over all
projected matrices of the share of the gradient that the basis holds which projected it.
"""

import argparse
import dataclasses

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


def run(rule: osub.Projector, config: Config, data: corpus.Corpus, steps: int) -> list[float]:
    """Mean captured energy over the second half, mean drift, training and held-out loss."""
    options, model = config.optimizer, PRESETS["tiny"]
    assert options.learning_rate is not None
    schedule = warmup_cosine(options.learning_rate, steps, 0.1, 0.1)
    tx = osub.online_subspace_descent(
        schedule, options.rank, projector=rule, scale=options.scale, rules=subspace_rules()
    )
    clip = optax.clip_by_global_norm(options.clip_norm)
    params = llama.init_params(model, jax.random.key(0))
    definition, state = llama.graphdef(model), tx.init(params)

    def loss_of(params, windows):
        return llama.merge(definition, params).loss(windows[:, :-1], windows[:, 1:])[0]

    @jax.jit
    def step(params, state, windows):
        loss, gradients = jax.value_and_grad(loss_of)(params, windows)
        gradients, _ = clip.update(gradients, clip.init(params))
        metrics = osub.subspace_metrics(tx, state, gradients).values()
        mean = lambda field: jnp.mean(jnp.stack([jnp.mean(getattr(m, field)) for m in metrics]))
        updates, state = tx.update(gradients, state, params)
        watched = jnp.stack([mean("captured_energy"), mean("drift"), loss])
        return optax.apply_updates(params, updates), state, watched

    windows = batches.training(data, config.train.batch_size, config.train.sequence_length, 0)
    rows = []
    for _ in range(steps):
        params, state, watched = step(params, state, jnp.asarray(next(windows)))
        rows.append(np.asarray(watched))
    held_out = batches.held_out(data)
    score = jax.jit(lambda p, *b: llama.merge(definition, p).loss(*b))
    losses = [
        score(params, *batch)[0]
        for batch in held_out.batches(config.train.batch_size, config.train.sequence_length, 20)
    ]
    second = np.stack(rows[steps // 2 :])
    return [*(float(x) for x in second.mean(axis=0)), float(np.mean(losses))]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    args = parser.parse_args()
    config = resolve(Config())
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=args.steps))
    data = corpus.load(config.data)
    print(f"{jax.default_backend()}, {_timing.versions('jax', 'optax', 'flax')}")
    print(f"tiny, rank {config.optimizer.rank}, {args.steps} steps; means over the second half")
    rows = []
    for name in args.rules:
        energy, drift, loss, held_out = run(RULES[name], config, data, args.steps)
        rows.append([name, f"{energy:.4f}", f"{drift:.4f}", f"{loss:.4f}", f"{held_out:.4f}"])
        print(" ".join(rows[-1]), flush=True)
    header = ["rule", "captured energy", "drift", "training loss", "held-out loss"]
    print("\n" + _timing.table(header, rows))


if __name__ == "__main__":
    main()
