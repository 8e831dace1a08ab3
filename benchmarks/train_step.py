"""A whole training step, side by side: full-rank, projected afterwards, projected at the source.

Forward, backward and update on one batch, the contestants in turns. The mean step counts refreshes
in: one of `--every` steps. `--platform tpu` (the extra `aot`) compiles for a TPU that this machine
need not have and prints the operations that its compiler counts, `--curve` the arithmetic behind
them over rank and tokens.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_subspace as osub
from benchmarks import _llama_shapes, _timing
from models import llama
from models.config import PRESETS, LlamaConfig
from train import topology

PEERS = ("AdamW", "optax.contrib.galore")
RATE = 1e-3
FIGURE = Path(__file__).parent / "results" / "source_flops.png"


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer, and how its gradients are made."""

    tx: optax.GradientTransformation
    counted: str  # among `operations`
    at_source: bool = False
    stacked: bool = True  # layers as one leaf per matrix, or each on its own
    refreshes: bool = False


def methods(rank: int, every: int) -> dict[str, Method]:
    """The contestants; `optax.contrib.galore` knows no stacks."""
    rules = llama.subspace_rules()
    galore = osub.galore(RATE, rank, projector=osub.subspace_iteration(every), rules=rules)
    follow = lambda rule: osub.online_subspace_descent(
        RATE, rank, projector=rule(first=osub.subspace_iteration()), rules=rules, moments="keep"
    )
    peer = optax.contrib.galore(
        RATE, rank, update_proj_gap=every, weight_dimension_numbers=_kernels_alone
    )
    return {
        "AdamW": Method(optax.adamw(RATE), "AdamW", stacked=False),
        "AdamW, stacked": Method(optax.adamw(RATE), "AdamW"),
        "optax.contrib.galore": Method(peer, "afterwards", stacked=False, refreshes=True),
        "GaLore, afterwards": Method(galore, "afterwards", refreshes=True),
        "GaLore, at the source": Method(galore, "GaLore", at_source=True, refreshes=True),
        "OSD (history PCA), at the source": Method(follow(osub.history_pca), "OSD", at_source=True),
        "OSD (online PCA), at the source": Method(follow(osub.online_pca), "OSD", at_source=True),
    }


def _kernels_alone(params: Any) -> Any:
    numbers = optax.contrib.GaLoreDimensionNumbers()
    label = lambda path, _: (
        numbers if str(path[0]) == "['layers']" and "kernel" in str(path) else None
    )
    return jax.tree_util.tree_map_with_path(label, params)


def loss_of(config: LlamaConfig, stacked: bool) -> Callable[[Any, Any, Any], jax.Array]:
    """Mean nats a token of parameters, inputs and targets (B, S)."""
    if stacked:
        definition = llama.graphdef(config)
        return lambda params, *batch: llama.merge(definition, params).loss(*batch)[0]
    parts = llama.pieces(config)

    def loss(params, inputs, targets):
        x = parts.embed(params, inputs)
        for name in sorted(params["layers"]):
            x = parts.block(params["layers"][name], x)
        return parts.loss(params, x, targets, None)[0]

    return loss


def apart(params: Any) -> Any:
    """The same parameters with each layer on its own."""
    count = len(jax.tree.leaves(params["layers"])[0])
    layer = lambda i: jax.tree.map(lambda x: x[i], params["layers"])
    return {**params, "layers": {f"{i:02}": layer(i) for i in range(count)}}


def step_of(config: LlamaConfig, method: Method, refresh: bool) -> Callable[..., Any]:
    """`(params, state, inputs, targets) -> (params, state)`."""
    loss, tx = loss_of(config, method.stacked), method.tx

    def step(params, state, *batch):
        more = {}
        if method.at_source:
            grad = osub.subspace_value_and_grad(loss, tx, refresh=refresh)
            _, gradients, more["source"] = grad(params, state, *batch)
        else:
            gradients = jax.grad(loss)(params, *batch)
        updates, state = tx.update(gradients, state, params, **more)
        return optax.apply_updates(params, updates), state

    return step


class Run:
    """The compiled steps of one contestant and its state, which is donated from call to call."""

    def __init__(self, config: LlamaConfig, method: Method, params: Any, batch: Any):
        self.method, self.batch = method, batch
        params = params if method.stacked else apart(params)
        self.params = jax.tree.map(jnp.copy, params)
        self.state = jax.jit(method.tx.init)(self.params)

        def compiled(refresh: bool) -> Any:
            jitted = jax.jit(step_of(config, method, refresh), donate_argnums=(0, 1))
            return jitted.lower(self.params, self.state, *batch).compile()

        self.plain = compiled(False)
        self.refresh = compiled(True) if method.at_source else self.plain
        self.first()

    def first(self) -> None:
        """The step that finds the bases, from a fresh state."""
        self.state = jax.block_until_ready(jax.jit(self.method.tx.init)(self.params))
        self._run(self.refresh)

    def __call__(self) -> None:
        self._run(self.plain)

    def _run(self, step: Any) -> None:
        self.params, self.state = jax.block_until_ready(step(self.params, self.state, *self.batch))


def compare(model: str, args: argparse.Namespace) -> None:
    """Times one model and prints its table."""
    config = config_of(model, args)
    rank = args.rank or _llama_shapes.RANKS.get(model, config.hidden_size // 4)
    params = llama.init_params(config, jax.random.key(0))
    tokens = jax.random.randint(
        jax.random.key(1), (args.batch, args.length + 1), 0, config.vocab_size
    )
    batch = tokens[:, :-1], tokens[:, 1:]
    chosen = {n: m for n, m in methods(rank, args.every).items() if n in args.methods}
    runs = {name: Run(config, method, params, batch) for name, method in chosen.items()}
    plain = _timing.alternate(runs, rounds=args.rounds, warmup=1)
    renewing = {name: run.first for name, run in runs.items() if run.method.refreshes}
    renewed = _timing.alternate(renewing, rounds=2, warmup=0)
    mean = {}
    for name, timing in plain.items():
        longer = renewed[name].median - timing.median if name in renewed else 0.0
        mean[name] = timing.median + max(longer, 0.0) / args.every
    rows = []
    counted = operations(config, rank, args.batch * args.length, args.length)
    for name, run in runs.items():
        ratios = [f"{mean[p] / mean[name]:.3f}" if p in mean else "" for p in PEERS]
        memory = run.plain.memory_analysis()
        rows.append(
            [
                name,
                f"{args.batch * args.length / mean[name]:,.0f}",
                f"{mean[name] * 1e3:,.0f}",
                f"{plain[name].spread:.2f}",
                f"{renewed[name].median * 1e3:,.0f}" if name in renewed else "",
                *ratios,
                f"{counted[run.method.counted] / 1e9:,.0f}",
                f"{memory.temp_size_in_bytes / 2**20:,.0f}",
            ]
        )
    dtype = config.dtype
    print(
        f"\n{model}, vocabulary {config.vocab_size}, rank {rank}, {args.batch} x {args.length} "
        f"tokens, {dtype}; a refresh in {args.every} steps"
    )
    header = ["step", "tokens/s", "mean ms", "spread", "refresh ms"]
    header += [f"x {peer}" for peer in PEERS] + ["GFLOP", "temporaries MiB"]
    print(_timing.table(header, rows), flush=True)


def config_of(model: str, args: argparse.Namespace) -> LlamaConfig:
    on_cpu = jax.default_backend() == "cpu" and args.platform != "tpu"
    dtype = "float32" if on_cpu else "bfloat16"
    vocabulary = args.vocab or (4096 if on_cpu else 32000)
    return dataclasses.replace(
        PRESETS[model], vocab_size=vocabulary, param_dtype=dtype, dtype=dtype, remat=args.remat
    )


def compiled_cost(model: str, args: argparse.Namespace) -> None:
    """Operations of a step by the TPU compiler: those of one layer times the layers, and the rest.

    (XLA counts the body of a loop once, so models of one and of two layers without a loop tell.)
    """
    place = jax.sharding.SingleDeviceSharding(topology.devices(args.topology)[0][0])
    whole = config_of(model, args)
    rank = args.rank or _llama_shapes.RANKS[model]
    put = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )
    tokens = put(jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32))
    flops = {}
    for name, method in methods(rank, args.every).items():
        if name not in args.methods or not method.stacked:
            continue
        counts = []
        for layers in (1, 2):
            config = dataclasses.replace(
                whole, num_layers=layers, unroll=layers, attention="einsum", loss="logits"
            )
            make = lambda key, c=config: llama.init_params(c, key)
            params = put(jax.eval_shape(make, jax.random.key(0)))
            state = put(jax.eval_shape(method.tx.init, params))
            step = jax.jit(step_of(config, method, False), donate_argnums=(0, 1))
            compiled = step.lower(params, state, tokens, tokens).compile()
            counts.append(compiled.cost_analysis()["flops"])
        layer = counts[1] - counts[0]
        flops[name] = counts[0] + (whole.num_layers - 1) * layer
        print(
            f"{name}: one layer {layer / 1e12:.3f} TFLOP, step {flops[name] / 1e12:.2f}", flush=True
        )
    first = flops.get("AdamW, stacked")
    rows = [
        [name, f"{count / 1e12:.2f}", f"{count / first:.3f}" if first else ""]
        for name, count in flops.items()
    ]
    print(
        f"\n{model}, vocabulary {whole.vocab_size}, rank {rank}, {args.batch} x {args.length} "
        f"tokens, TPU {args.topology}, steps without a refresh"
    )
    print(_timing.table(["step", "TFLOP", "/ AdamW"], rows))


def operations(config: LlamaConfig, rank: int, tokens: int, length: int = 256) -> dict[str, float]:
    """Operations of a step without a refresh by arithmetic: matrix products alone.

    (XLA's count takes the body of a loop once, of attention over rows and of a loss over chunks.)

    >>> one = operations(PRESETS["1b"], 512, 16384)
    >>> round(one["GaLore"] / one["AdamW"], 2), round(one["OSD"] / one["AdamW"], 2)
    (0.82, 0.95)
    """
    d, f, t = config.hidden_size, config.intermediate_size, tokens
    matrices = [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]
    products = sum(m * n for m, n in matrices)
    narrow = sum(rank * (m + n) for m, n in matrices)
    lift = sum(2 * m * n * rank for m, n in matrices)
    attention = 3 * 2 * 2 * t * length * d
    others = 3 * 2 * t * config.vocab_size * d
    full = config.num_layers * (6 * t * products + attention) + others
    saved = config.num_layers * (2 * t * (products - narrow) - lift)
    # G R^T, and the step of online PCA: four products of (m, r) with (r, r), m the compressed side.
    step = sum(8 * min(m, n) * rank**2 for m, n in matrices)
    follow = config.num_layers * (2 * t * narrow + step)
    after = full + config.num_layers * 2 * lift  # projection and lift
    return {
        "AdamW": full,
        "afterwards": after,
        "GaLore": full - saved,
        "OSD": full - saved + follow,
    }


def curve(path: Path) -> None:
    """Draws the share of AdamW's operations over rank and tokens for the model of 1b."""
    config = PRESETS["1b"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    ranks, tokens = np.arange(32, 1537, 32), 2.0 ** np.arange(8, 20)
    share = lambda key, r, t: (lambda o: o[key] / o["AdamW"])(operations(config, int(r), int(t)))
    for key, line in (("GaLore", "-"), ("OSD", "--")):
        left.plot(ranks, [share(key, r, 16384) for r in ranks], line, color="black", label=key)
        right.plot(tokens, [share(key, 512, t) for t in tokens], line, color="black", label=key)
    left.set_xlabel("rank, at 16,384 tokens a step")
    right.set_xlabel("tokens a step, at rank 512")
    right.set_xscale("log", base=2)
    left.set_ylabel("operations / AdamW's")
    for axes in (left, right):
        axes.axhline(1, color="gray", lw=0.8)
        axes.grid(alpha=0.3)
        axes.set_ylim(0.6, 1.4)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints a table per model."""
    names = list(methods(1, 200))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=PRESETS, default=["9m", "20m", "60m"])
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--rank", type=int, help="by default the papers', or a quarter of the width"
    )
    parser.add_argument("--vocab", type=int, help="by default 4096 on a CPU, else 32000")
    parser.add_argument("--every", type=int, default=200, help="steps from refresh to refresh")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--remat", action="store_true", help="compute blocks anew")
    parser.add_argument("--platform", choices=("here", "tpu"), default="here")
    parser.add_argument("--topology", default="v5p:2x2x1", help="with --platform tpu")
    parser.add_argument("--curve", action="store_true", help="draw the arithmetic and end")
    args = parser.parse_args()
    if args.curve:
        curve(FIGURE)
        return
    if args.platform == "tpu":
        jax.config.update("jax_platforms", "cpu")
    print(f"{jax.default_backend()}, {os.cpu_count()} cores, {_timing.versions('jax', 'optax')}")
    for model in args.models:
        (compiled_cost if args.platform == "tpu" else compare)(model, args)


if __name__ == "__main__":
    main()
