"""How well the methods train: each at the best of its learning rates, with the spread over seeds.

    python -m benchmarks.convergence                      # the main question: methods, 3 seeds
    python -m benchmarks.convergence --questions all      # and the ablations, with one seed
    python -m benchmarks.convergence --setting gpu --data "--data.path 'c4-train.*.json.gz'"
                                                          # a 60m in bfloat16
    python -m benchmarks.convergence --report             # the tables of what is there, no runs

Each run is the trainer's own step on the trainer's own data: the same first weights, order of
documents and number of tokens for all methods of a seed. A line of JSON is written after each,
with the `python -m train` command that trains the same, and in the end scores all held-out
documents, of which here the first 65,536 tokens count. The command given again goes on where it was
stopped, one run at a time.
"""

import argparse
import collections
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
from benchmarks._methods import (
    FACTORS,
    FULL,
    METHODS,
    OTHERS,
    REPEATED,
    SETTINGS,
    Method,
    Setting,
    ablations,
    all_methods,
    words_of,
)
from train import batches, corpus
from train.cli import parse
from train.memory import tree_bytes
from train.optimizer import make
from train.relora import MergingSteps, jitted_merge
from train.step import init_state, make_eval_step, make_fused, make_train_step

RESULTS = Path(__file__).parent / "results"
SCORED = 65_536  # held-out tokens at the end


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


class Study:
    """The results' file, and what is still to be run."""

    def __init__(self, path: Path, setting: Setting):
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
            "versions": _timing.versions("jax", "optax", "flax", "optax-subspace"),
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
                found[rate] = [_loss(row) for row in rows if row is not None]
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


def run_all(study: Study, questions: Sequence[str], seeds: int) -> None:
    """What the questions need, seed by seed, so that early results are whole."""
    if "methods" in questions:
        for count in range(1, seeds + 1):
            for label, method in METHODS.items():
                study.sweep(label, method, count)
    if "others" in questions:
        for label, method in OTHERS.items():
            study.sweep(label, method, 1)
    for seed in range(seeds):
        for question, label, words, rate in planned(study):
            if question in questions and (seed == 0 or question in REPEATED):
                study.run(label, words, rate, seed)


def planned(study: Study) -> Iterator[tuple[str, str, str, float]]:
    """Question, label, words and rate of the ablations' runs with the first seed.

    The rate is the best one (of seed 0) of the method that they change.
    """
    for question, entries in ablations(study.setting).items():
        for label, (name, words) in entries.items():
            method = METHODS[name]
            if (best := study.best(method, 1)) is not None:
                for factor in FACTORS.get(question, (1.0,)):
                    whole = words_of(study.setting, method.words, words)
                    yield question, label, whole, best[0] * factor


def answers(study: Study) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of the ablations by question and label, of several rates that of the lowest loss.

    A row is that of seed 0, with `losses`, those of its seeds from 0 on as far as all of its rates
    have them, by whose mean the rate is chosen, and with the rates that were `tried`.
    """
    rates = collections.defaultdict(list)
    for question, label, words, rate in planned(study):
        seeds = (study.get(words, rate, seed) for seed in itertools.count())
        if rows := list(itertools.takewhile(bool, seeds)):
            rates[question, label].append(rows)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (question, label), runs in rates.items():
        count = min(map(len, runs))
        losses = [[_loss(row) for row in rows[:count]] for rows in runs]
        best = int(np.argmin(np.mean(losses, axis=1)))
        tried = [rows[0]["rate"] for rows in runs]
        row = {**runs[best][0], "losses": losses[best], "tried": tried}
        found.setdefault(question, {})[label] = row
    return found


def _loss(row: dict[str, Any]) -> float:
    return math.inf if row["loss"] is None else row["loss"]


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
    rows = []
    for label, (method, (rate, losses)) in methods.items():
        tried = study.by_rate(method, len(losses))
        at_end = len(tried) > 1 and rate in (min(tried), max(tried))
        mean = float(np.mean(losses))
        # (All at the best of their rates for the same seeds.)
        others = {name: study.best(METHODS[name], len(losses)) for name in ("GaLore", *FULL)}
        compared = _compared(label, losses, {k: best[1] for k, best in others.items() if best})
        row = study.get(words_of(study.setting, method.words), rate, 0)
        spread = f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
        rates = f"{rate:g} of {len(tried)}{' (at the end)' if at_end else ''}"
        state = f"{row['state_bytes'] / 2**20:.2f}" if row else ""
        cells = [label, rates, str(len(losses)), f"{mean:.4f}", spread, f"{math.exp(mean):.2f}"]
        rows.append([*cells, *compared, state])
    header = [
        *("", "best rate", "seeds", "held-out loss", "sd", "perplexity"),
        *("less GaLore's, by seed", "gap closed", "state, MiB"),
    ]
    text = [_timing.table(header, rows)]
    for question, lines in answers(study).items():
        cells, comparing = [], {"GaLore", *FULL} <= set(lines)
        for label, row in lines.items():
            losses, mean, spread = row["losses"], "", ""
            if len(losses) > 1:
                mean, spread = f"{np.mean(losses):.4f}", f"{np.std(losses, ddof=1):.4f}"
            at_end = len(row["tried"]) > 1 and row["rate"] in (min(row["tried"]), max(row["tried"]))
            rate = f"{row['rate']:g}{' (at the end)' if at_end else ''}"
            cells.append([label, rate, _shown(row), str(len(losses)), mean, spread])
            if comparing:
                same = {k: other["losses"][: len(losses)] for k, other in lines.items()}
                cells[-1] += _compared(label, losses, same)
        columns = ["", "rate", "loss, seed 0", "seeds", "mean", "sd"]
        if comparing:
            columns += ["less GaLore's, by seed", "gap closed"]
        elif all(len(row["losses"]) == 1 for row in lines.values()):
            columns, cells = columns[:3], [line[:3] for line in cells]
        text.append(f"### {question}\n\n" + _timing.table(columns, cells))
    return "\n\n".join(text)


def _compared(label: str, losses: list[float], others: dict[str, list[float]]) -> list[str]:
    """The difference from GaLore's losses, and the share of the gap to full rank that it is.

    Seeds differ by more than methods, and all methods share them: so differences are by seed.
    """
    if label == "GaLore" or "GaLore" not in others or len(others["GaLore"]) < len(losses):
        return ["", ""]
    away = np.subtract(losses, others["GaLore"])
    paired = f"{away.mean():+.4f}"
    if len(losses) > 1:
        paired += f" ± {away.std(ddof=1):.4f}"
    full = [np.mean(others[name]) for name in FULL if name in others]
    gap = np.mean(others["GaLore"]) - min(full) if full else 0.0
    # (A share of the gap, which has to be one.)
    return [paired, f"{-100 * away.mean() / gap:.0f} %" if gap > 0 else ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ("methods", "others", *ablations(SETTINGS["cpu"]))
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--data", metavar="WORDS", help="words of `python -m train` on the text")
    parser.add_argument("--questions", nargs="+", choices=[*known, "all"], default=["methods"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file of JSON lines")
    parser.add_argument("--report", action="store_true", help="print the tables, run nothing")
    args = parser.parse_args()
    setting = SETTINGS[args.setting]
    if args.data:
        setting = setting._replace(words=f"{setting.words} {args.data}")
    elif args.setting == "gpu":
        parser.error(
            "--setting gpu trains on 66 million tokens a run, which the embedded corpus has not: "
            "name a text, as in --data \"--data.path 'c4-train.*.json.gz'\""
        )
    study = Study(args.out or RESULTS / f"convergence-{args.setting}.jsonl", setting)
    if not args.report:
        run_all(study, known if "all" in args.questions else args.questions, args.seeds)
    print(tables(study, args.seeds))


if __name__ == "__main__":
    main()
