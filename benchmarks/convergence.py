"""How well the methods train: each at the best of its learning rates, with the spread over seeds.

    python -m benchmarks.convergence                      # the main question: methods, 3 seeds
    python -m benchmarks.convergence --questions all      # and the ablations, with one seed
    python -m benchmarks.convergence --setting gpu        # a 60m in bfloat16
    python -m benchmarks.convergence --report             # the tables of what is there, no runs

Each run is the trainer's own step on the trainer's own data: the same first weights, order of
documents and number of tokens for all methods of a seed. A line of JSON is written after each,
with the `python -m train` command that trains the same, and in the end scores all held-out
documents, of which here the first 65,536 tokens count. The command given again goes on where it was
stopped, one run at a time.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _timing
from train import batches, corpus
from train.cli import parse
from train.memory import tree_bytes
from train.optimizer import make
from train.relora import MergingSteps, jitted_merge
from train.step import init_state, make_eval_step, make_fused, make_train_step

RESULTS = Path(__file__).parent / "results"
Rates = Sequence[float]


class Setting(NamedTuple):
    """Model, data and length of all runs."""

    words: str
    rank: int  # a quarter of the model's width
    steps: int
    batch_size: int
    length: int  # tokens in a sequence

    @property
    def all_words(self) -> str:
        """Of `python -m train`."""
        return (
            f"{self.words} --train.batch_size {self.batch_size} "
            f"--train.sequence_length {self.length} --train.steps {self.steps}"
        )


_TINY = (
    "--model tiny --model.num_layers 2 --model.hidden_size 64 --model.intermediate_size 176 "
    "--model.vocab_size 1024 --data.vocab_size 1024"
)
# Weights and so all moments in float32: optax keeps moments in the weights' dtype, in which
# bfloat16 squares do not decay, and this library does not.
_60M = "--model 60m --model.vocab_size 4096 --model.dtype bfloat16"
SETTINGS = {"cpu": Setting(_TINY, 16, 300, 8, 128), "gpu": Setting(_60M, 128, 2000, 128, 256)}
SCORED = 65_536  # held-out tokens at the end


class Method(NamedTuple):
    """Words of `python -m train`, and the learning rates that are searched."""

    words: str
    rates: Rates


def doubling(first: float, count: int = 5) -> Rates:
    """
    >>> doubling(0.001, 3)
    (0.001, 0.002, 0.004)
    """
    return tuple(first * 2**i for i in range(count))


def named(name: str) -> str:
    """The words of an optimizer."""
    return f"--optimizer.name {name}"


PROJECTED = doubling(0.004)
GALORE = f"{named('galore')} --optimizer.rank RANK"
OSD = f"{named('online_subspace_descent')} --optimizer.rank RANK"
ONLINE_PCA = f"{OSD} --optimizer.projector online_pca"
LORA = f"{named('adamw')} --lora.rank RANK --lora.freeze kernels"
# With every learning rate and three seeds.
METHODS = {
    "AdamW, full rank": Method(named("adamw"), doubling(0.002)),
    # The methods in a subspace give kernels a quarter of the rate that all else has: so does this.
    "AdamW, kernels at 0.25": Method(f"{named('adamw')} --optimizer.scale 0.25", PROJECTED),
    "GaLore": Method(GALORE, PROJECTED),
    "OSD, online PCA": Method(ONLINE_PCA, PROJECTED),
    "OSD, history PCA": Method(OSD, PROJECTED),
    "LoRA": Method(LORA, doubling(0.002)),
    "ReLoRA": Method(f"{LORA} --lora.merge_every MERGE --lora.rewarm_steps 10", doubling(0.002)),
    "low-rank factors": Method(
        f"{named('adamw')} --lora.rank RANK --lora.factorize", doubling(0.002)
    ),
    "APOLLO": Method(f"{named('apollo')} --optimizer.rank RANK", doubling(0.002)),
}
FULL = ("AdamW, full rank", "AdamW, kernels at 0.25")  # the better of which is the yardstick
# With every learning rate and one seed.
OTHERS = {
    "AdamW, 8 bits": Method(named("adamw8bit"), doubling(0.001)),
    "Adafactor": Method(named("adafactor"), doubling(0.001)),
    "Lion": Method(named("lion"), doubling(0.0002)),
    "SGD with momentum": Method(named("sgd"), doubling(0.05)),
    "Muon": Method(named("muon"), doubling(0.002)),
    "optax.contrib.galore": Method(f"{named('contrib_galore')} --optimizer.rank RANK", PROJECTED),
    "APOLLO-Mini": Method(named("apollo_mini"), doubling(0.002)),
    "Fira": Method(f"{named('fira')} --optimizer.rank RANK", doubling(0.002)),
}


# Multiples of the best rate, of which the best counts, where it may have moved.
FACTORS = {"three times the steps": (1.0, 0.5, 0.25)}


def ablations(setting: Setting) -> dict[str, dict[str, tuple[str, str]]]:
    """Questions whose runs differ from a method's in few words, at its best rate, with one seed.

    By question and label: the method, and the words that are added.
    """
    galore, online, history = "GaLore", "OSD, online PCA", "OSD, history PCA"
    three = ((galore, "GaLore"), (online, "online PCA"), (history, "history PCA"))
    rank, steps, tokens = setting.rank, setting.steps, setting.batch_size * setting.length
    few = (rank // 4, rank // 2, rank, rank * 2)
    lengths = (setting.length // 4, setting.length, setting.length * 4)
    periods = (1, 10, 50, steps // 2, steps)
    rules = ("svd", "subspace_iteration", "random_projection", "oja", "history_pca")
    optimizers = ("online_pca", "online_pca_lion", "online_pca_sgd")
    eight = "galore_adamw8bit", "online_subspace_adamw8bit"
    return {
        "rank": {
            f"{label}, rank {r}": (method, f"--optimizer.rank {r}")
            for (method, label), r in itertools.product(three, few)
        },
        "refresh period": {
            f"GaLore, every {n}": (galore, f"--optimizer.every {n}") for n in periods
        },
        "projector rule": {
            f"GaLore with {rule}": (galore, f"--optimizer.projector {rule}")
            for rule in (*rules, *optimizers)
        },
        "side": {
            f"{label}, {side}": (method, f"--optimizer.side {side}")
            for (method, label) in (three[0], three[2])
            for side in ("shorter", "longer", "left", "right", "both")
        },
        "moments": {
            **{
                f"GaLore, every 10, moments {m}": (
                    galore,
                    f"--optimizer.every 10 --optimizer.moments {m}",
                )
                for m in ("keep", "project", "reset")
            },
            **{
                f"OSD, {label}, moments {m}": (method, f"--optimizer.moments {m}")
                for (method, label), m in itertools.product(three[1:], ("keep", "project"))
            },
        },
        "8 bits": {
            "GaLore": (galore, ""),
            "GaLore, 8 bits": (galore, named(eight[0])),
            "GaLore, 8 bits and 4-bit bases": (
                galore,
                f"{named(eight[0])} --optimizer.projector_dtype linear4",
            ),
            "OSD, history PCA": (history, ""),
            "OSD, history PCA, 8 bits": (history, named(eight[1])),
        },
        # The same tokens in a step.
        "sequence length": {
            f"{label}, {length} tokens": (
                method,
                f"--train.sequence_length {length} --train.batch_size {tokens // length}",
            )
            for (method, label), length in itertools.product(
                (("AdamW, full rank", "AdamW"), (galore, "GaLore"), (history, "history PCA")),
                lengths,
            )
        },
        # A long run wants a lower rate.
        "three times the steps": {name: (name, f"--train.steps {steps * 3}") for name in METHODS},
        "fused backward": {
            f"{label}{how}": (method, f"--optimizer.clip_norm None{words}")
            for (method, label), (how, words) in itertools.product(
                (("AdamW, full rank", "AdamW"), (galore, "GaLore")),
                (("", ""), (", fused", " --train.fused_backward")),
            )
        },
    }


class Run(NamedTuple):
    """One run: its words without rate and seed, these two, and which rates the words have."""

    words: str
    rate: float
    seed: int

    @property
    def arguments(self) -> str:
        """All words of `python -m train`."""
        keys = ["optimizer.learning_rate"]
        if "--lora.freeze" in self.words:
            keys.append("lora.learning_rate")
        rates = " ".join(f"--{key} {self.rate:g}" for key in keys)
        return f"{self.words} {rates} --train.seed {self.seed}"


class Runner:
    """Runs of the same words: one compilation serves all rates and seeds."""

    def __init__(self, words: str):
        self.config = parse(shlex.split(words)).config
        self.data = _corpus(self.config.data)
        train = self.config.train
        self.held_out = batches.held_out(self.data, train.sequence_length)
        self.evaluate = make_eval_step(self.config.model)
        self.step = jax.jit(self._step, donate_argnums=0)

    def _parts(self, rate: Any, seed: Any) -> tuple[Any, Any, Any]:
        """The optimizer, the fused step and the seed of rounding; both may be traced."""
        config = self.config
        optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
        adapters = dataclasses.replace(config.lora, learning_rate=rate)
        found = make(optimizer, config.train.steps, config.train.fused_backward, adapters)
        seed = seed if config.train.stochastic_rounding else None
        fused = make_fused(config.model, found, seed) if config.train.fused_backward else None
        return found, fused, seed

    def _step(self, state: Any, batch: Any, rate: Any, seed: Any) -> tuple[Any, Any]:
        optimizer, fused, seed = self._parts(rate, seed)
        return make_train_step(self.config.model, optimizer, seed, fused)(state, batch)

    def __call__(self, rate: float, seed: int) -> dict[str, Any]:
        """The losses of a run, in nats a token; None from where they are no numbers."""
        train = self.config.train
        optimizer, fused, _ = self._parts(rate, seed)
        key, int8 = jax.random.key(seed), train.int8_weights
        state = jax.jit(lambda key: init_state(self.config.model, optimizer, key, int8, fused))(key)
        stream = batches.training(self.data, train.batch_size, train.sequence_length, seed)
        losses, curve, every = [], [], max(1, train.steps // 10)
        advance: Any = functools.partial(self.step, rate=rate, seed=seed)
        if merge_every := self.config.lora.merge_every:
            seeded = dataclasses.replace(train, seed=seed)
            merge = jitted_merge(dataclasses.replace(self.config, train=seeded))
            advance = MergingSteps(advance, merge, merge_every)
        for step in range(1, train.steps + 1):
            state, metrics = advance(state, next(stream))
            losses.append(metrics.loss)
            if step % every == 0 and step < train.steps:
                if not math.isfinite(float(losses[-1])):
                    break
                curve.append([step, self._score(state.params, SCORED // 16)])
        stream.close()
        final = self._score(state.params, SCORED)
        whole = np.asarray(jnp.stack(losses), float)
        return {
            "loss": final if math.isfinite(final) and np.all(np.isfinite(whole)) else None,
            "curve": [[s, x] for s, x in curve if math.isfinite(x)],
            # Means of ten steps, which a figure can hold.
            "train": [
                round(float(x.mean()), 4) for x in np.array_split(whole, max(1, train.steps // 10))
            ],
            "state_bytes": tree_bytes(state.opt_state),
            "trained": int(sum(x.size for x in jax.tree.leaves(state.params))),
        }

    def _score(self, params: Any, tokens: int) -> float:
        train = self.config.train
        total = count = 0.0
        most = max(1, tokens // (train.batch_size * train.sequence_length))
        for batch in self.held_out.batches(train.batch_size, train.sequence_length, most):
            nats, tokens = self.evaluate(params, batch)
            total, count = total + float(nats), count + float(tokens)
        return total / count


@functools.cache
def _corpus(data: Any) -> Any:
    return corpus.load(data)


def words_of(setting: str, *parts: str) -> str:
    """The words of a run: those that come later count.

    >>> words_of("cpu", GALORE, "--optimizer.rank 8").split()[-4:]
    ['--optimizer.name', 'galore', '--optimizer.rank', '8']
    """
    base = SETTINGS[setting]
    text = " ".join((base.all_words, *parts)).replace("RANK", str(base.rank))
    found: dict[str, str] = {}
    for word in shlex.split(text.replace("MERGE", str(base.steps // 4))):
        if word.startswith("--"):
            found.pop(last := word, None)
            found[word] = ""  # a flag, until a value comes
        else:
            found[last] = word
    return " ".join(f"{key} {value}".rstrip() for key, value in found.items())


class Study:
    """The results' file, and what is still to be run."""

    def __init__(self, path: Path, setting: str):
        self.path, self.setting = path, setting
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows = {_key(row): row for row in map(json.loads, lines)}
        self.runners: dict[str, Runner] = {}

    def get(self, words: str, rate: float, seed: int) -> dict[str, Any] | None:
        """The result of a run, if it is there."""
        return self.rows.get((words, float(f"{rate:g}"), seed))

    def run(self, label: str, words: str, rate: float, seed: int) -> dict[str, Any]:
        """The result of a run, which is carried out if it is not there."""
        run = Run(words, float(f"{rate:g}"), seed)
        if (found := self.rows.get(tuple(run))) is not None:
            return found
        if words not in self.runners:
            # (One at a time: their programs and states take memory.)
            self.runners = {words: Runner(words)}
        began = time.perf_counter()
        result = self.runners[words](run.rate, seed)
        row = {
            **run._asdict(),
            **result,
            "seconds": round(time.perf_counter() - began, 1),
            "command": f"python -m train {run.arguments}",
            "device": jax.devices()[0].device_kind,
            "versions": _timing.versions("jax", "optax", "flax"),
            "date": datetime.date.today().isoformat(),
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[_key(row)] = row
        print(
            f"{label}, rate {run.rate:g}, seed {seed}: {_shown(row)} ({row['seconds']} s)",
            flush=True,
        )
        return row

    def by_rate(self, method: Method, seeds: int) -> dict[float, list[float]]:
        """The losses of each rate of which all seeds are there; infinite if one diverged."""
        words, found = words_of(self.setting, method.words), {}
        rates = {rate for other, rate, _ in self.rows if other == words}
        for rate in sorted(rates):
            rows = [self.get(words, rate, seed) for seed in range(seeds)]
            if all(row is not None for row in rows):
                losses = [row["loss"] for row in rows if row is not None]
                found[rate] = [math.inf if x is None else x for x in losses]
        return found

    def best(self, method: Method, seeds: int) -> tuple[float, list[float]] | None:
        """The rate with the lowest mean loss, and the losses by seed."""
        found = self.by_rate(method, seeds)
        return min(found.items(), key=lambda item: np.mean(item[1])) if found else None

    def sweep(self, label: str, method: Method, seeds: int) -> None:
        """All rates of a method, and more of them while the best one is the last at an end."""
        words, rates = words_of(self.setting, method.words), list(method.rates)
        for rate in rates:
            for seed in range(seeds):
                self.run(label, words, rate, seed)
        for _ in range(3):
            best = self.best(method, seeds)
            if best is None or not best[1] or math.isinf(np.mean(best[1])):
                more = min(rates) / 2
            elif best[0] == float(f"{max(rates):g}"):
                more = max(rates) * 2
            elif best[0] == float(f"{min(rates):g}"):
                more = min(rates) / 2
            else:
                return
            rates.append(more)
            for seed in range(seeds):
                self.run(label, words, more, seed)


def _key(row: dict[str, Any]) -> tuple[str, float, int]:
    return row["words"], row["rate"], row["seed"]


def all_methods() -> dict[str, Method]:
    """Those with three seeds, then those with one."""
    return {**METHODS, **OTHERS}


def run_all(study: Study, questions: Sequence[str], seeds: int) -> None:
    """What the questions need, seed by seed, so that early results are whole."""
    if "methods" in questions:
        for count in range(1, seeds + 1):
            for label, method in METHODS.items():
                study.sweep(label, method, count)
    if "others" in questions:
        for label, method in OTHERS.items():
            study.sweep(label, method, 1)
    for question, label, words, rate in planned(study):
        if question in questions:
            study.run(label, words, rate, 0)


def planned(study: Study) -> Iterator[tuple[str, str, str, float]]:
    """The runs of the ablations, at the best rate (of seed 0) of the method that they change."""
    for question, entries in ablations(SETTINGS[study.setting]).items():
        for label, (name, words) in entries.items():
            method = METHODS[name]
            if (best := study.best(method, 1)) is not None:
                for factor in FACTORS.get(question, (1.0,)):
                    whole = words_of(study.setting, method.words, words)
                    yield question, label, whole, best[0] * factor


def answers(study: Study) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of the ablations by question and label; of several rates that of the lowest loss."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    loss = lambda row: math.inf if row["loss"] is None else row["loss"]
    for question, label, words, rate in planned(study):
        row, rows = study.get(words, rate, 0), found.setdefault(question, {})
        if row is not None and (label not in rows or loss(row) < loss(rows[label])):
            rows[label] = row
    return {question: rows for question, rows in found.items() if rows}


def _shown(row: dict[str, Any]) -> str:
    return "diverged" if row["loss"] is None else f"{row['loss']:.4f}"


def tables(study: Study, seeds: int) -> str:
    """All tables of what is there, in Markdown."""
    methods = {}
    for label, method in all_methods().items():
        count = seeds if label in METHODS else 1
        while count and (best := study.best(method, count)) is None:
            count -= 1
        if count:
            methods[label] = (method, best)
    full = [np.mean(methods[name][1][1]) for name in FULL if name in methods]
    galore = methods.get("GaLore")
    gap = np.mean(galore[1][1]) - min(full) if full and galore else 0.0
    rows = []
    for label, (method, (rate, losses)) in methods.items():
        tried = study.by_rate(method, len(losses))
        at_end = len(tried) > 1 and rate in (min(tried), max(tried))
        mean = float(np.mean(losses))
        closed = paired = ""
        if galore and label != "GaLore":
            # Seeds differ by more than methods, and all methods share them.
            away = np.subtract(losses, galore[1][1][: len(losses)])
            paired = f"{away.mean():+.4f}"
            if len(losses) > 1:
                paired += f" ± {away.std(ddof=1):.4f}"
            # (A share of the gap to full rank, which has to be one.)
            closed = f"{-100 * away.mean() / gap:.0f} %" if gap > 0 else ""
        row = study.get(words_of(study.setting, method.words), rate, 0)
        spread = f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
        rates = f"{rate:g} of {len(tried)}{' (at the end)' if at_end else ''}"
        state = f"{row['state_bytes'] / 2**20:.2f}" if row else ""
        cells = [label, rates, str(len(losses)), f"{mean:.4f}", spread, f"{math.exp(mean):.2f}"]
        rows.append([*cells, paired, closed, state])
    header = [
        *("", "best rate", "seeds", "held-out loss", "sd", "perplexity"),
        *("less GaLore's, by seed", "gap closed", "state, MiB"),
    ]
    text = [_timing.table(header, rows)]
    for question, lines in answers(study).items():
        cells = [[label, f"{row['rate']:g}", _shown(row)] for label, row in lines.items()]
        text.append(f"### {question}\n\n" + _timing.table(["", "rate", "held-out loss"], cells))
    return "\n\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ("methods", "others", *ablations(SETTINGS["cpu"]))
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--questions", nargs="+", choices=[*known, "all"], default=["methods"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file of JSON lines")
    parser.add_argument("--report", action="store_true", help="print the tables, run nothing")
    args = parser.parse_args()
    study = Study(args.out or RESULTS / f"convergence-{args.setting}.jsonl", args.setting)
    if not args.report:
        run_all(study, known if "all" in args.questions else args.questions, args.seeds)
    print(tables(study, args.seeds))


if __name__ == "__main__":
    main()
