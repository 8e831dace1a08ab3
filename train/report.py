"""Before training: what is projected, and memory by part. After it: the result and the figure.

`python -m train.report RUN [RUN ...] [--out FILE.html]` compares finished and unfinished runs in a
table and in a page of HTML.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from optax_subspace import describe
from train.cache import write_atomically
from train.errors import UsageError, one_line
from train.memory import Measured, Predicted, mebibytes
from train.optimizer import Optimizer
from train.recorded import clean
from train.records import Row
from train.screen import Screen


def print_projection(screen: Screen, optimizer: Optimizer, params: Any) -> None:
    """The table of parameters: path, shape, side and rank."""
    if not optimizer.projects:
        trained = {
            "nothing": "the optimizer is none of this library's that project",
            "kernels": "adapters are trained, and all else but the kernels that have them",
            "all": "the adapters alone are trained",
        }
        rest = trained[optimizer.adapters.freeze]
        if optimizer.adapters.factorize:
            rest = "the optimizer trains the factors of the kernels, and all else"
        screen.say(f"Nothing is projected: {rest}.")
        return
    screen.say("What is projected:")
    screen.say(str(describe(params, optimizer.tx)))


def print_memory(
    screen: Screen,
    predicted: Predicted,
    measured: Measured | None,
    gradients: str = "one full tree",
) -> None:
    """The table of memory, predicted and as compiled, with what there is of gradients."""
    share = predicted.optimizer_state / predicted.adamw_state

    def row(part: str, name: str, note: str = "") -> list[str]:
        compiled = getattr(measured, name, None)
        return [
            part,
            mebibytes(getattr(predicted, name)),
            "" if compiled is None else mebibytes(compiled),
            note,
        ]

    rows = [
        row("weights", "weights"),
        row(
            "optimizer state",
            "optimizer_state",
            f"AdamW's would be {mebibytes(predicted.adamw_state)} (this is {share:.1%})",
        ),
        row("batch and counter", "batch"),
        row("gradients", "gradients", gradients),
        row("activations", "activations", "kept for the backward pass"),
        row("temporaries", "temporaries", "gradients, activations and, compiled, all other work"),
        row("= peak of a step", "total"),
    ]
    screen.say("")
    screen.table("Memory of a step:", ["part", "predicted", "compiled", ""], rows)
    screen.say("")


def save_memory(path: Path, predicted: Predicted, measured: Measured | None) -> None:
    """The same in bytes, as JSON."""
    whole = lambda part: part._asdict() | {"total": part.total}
    table = {
        "predicted": whole(predicted) | {"temporaries": predicted.temporaries},
        "compiled": None if measured is None else whole(measured),
    }
    write_atomically(path, json.dumps(table, indent=2) + "\n")


def print_result(screen: Screen, final: Row, speed: Row, paths: dict[str, Path]) -> None:
    """The last table; `speed` is the row of `train.throughput` for the last step."""
    loss, unigram = final["validation_loss"], final["unigram_loss"]
    ours, yardstick = perplexity(loss), final["unigram_perplexity"]
    rows = [
        ["validation loss", f"{loss:.4f} nats a token"],
        ["perplexity", f"{ours:.2f}"],
        *([["bits per byte", f"{final['bits_per_byte']:.4f}"]] if final["bits_per_byte"] else []),
        [
            "unigram entropy of the same text",
            f"{unigram:.4f} nats (perplexity {yardstick:.2f}; ours is {ours / yardstick:.3f} "
            "of it)",
        ],
        ["tokens trained on", f"{final['tokens']:,}"],
        *_speed_lines(speed),
        *([name, str(path)] for name, path in paths.items()),
    ]
    screen.say("")
    screen.say("Result on the whole held-out split:")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        screen.say(f"{name.ljust(width)}  {value}")


def _speed_lines(speed: Row) -> list[list[str]]:
    total, devices = speed["tokens_per_second"], speed["devices"]
    if not total:
        return [["tokens/s", "no step was left to train"]]
    each = f" ({speed['tokens_per_second_per_device']:,.0f} on each of {devices} devices)"
    share = speed["utilisation"]
    of_peak = "" if share is None else f" ({share:.1%} of the peak of {speed['device']})"
    lines = [
        ["tokens/s", f"{total:,.0f}{each if devices > 1 else ''}"],
        ["model FLOP/s", f"{speed['model_flops_per_second']:.3g}{of_peak}"],
    ]
    if speed["peak_bytes"] is not None:
        lines.append(["peak memory of a device", mebibytes(speed["peak_bytes"])])
    return lines


HIGHEST = 700.0  # nats whose exponential is still a number


def perplexity(loss: float) -> float:
    """e to the loss, or infinity where that is too large for a number."""
    return math.exp(loss) if loss < HIGHEST else math.inf


def draw(rows: list[Row], path: Path) -> None:
    """Loss against steps, with the held-out split and the unigram yardstick, as PNG."""
    train = [row for row in rows if row["kind"] == "train"]
    parts = [row for row in rows if row["kind"] == "validation"]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = [row["step"] for row in train]
    top.plot(steps, [row["loss"] for row in train], lw=0.8, color="tab:blue", label="training")
    if parts:
        losses = [row["validation_loss"] for row in parts]
        where = [row["step"] for row in parts]
        top.plot(where, losses, "o-", ms=4, color="tab:orange", label="held out, a part")
    energies = [row for row in rows if row["kind"] == "hamiltonian"]
    if energies:
        totals = [row["total"] for row in energies]
        where = [row["step"] for row in energies]
        top.plot(where, totals, "s--", ms=3, color="tab:purple", label="Hamiltonian")
    for row in rows:
        if row["kind"] == "final":
            place = [row["step"]], [row["validation_loss"]]
            top.plot(*place, "D", color="tab:red", label="held out, all of it")
            top.axhline(row["unigram_loss"], ls=":", color="gray", label="its unigram entropy")
    top.set_ylabel("loss (nats a token)")
    top.legend()
    bottom.plot(steps, [row["learning_rate"] for row in train], color="tab:green")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)


def compare(folders: Sequence[str], out: Path) -> None:
    """Prints the table of some runs and writes the page; runs that can't be read are named.

    Raises:
      UsageError: none of the runs can be read, or the page can't be written.
    """
    from train import page, recorded
    from train.compare import table

    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise UsageError(f"--out {out}: is no page; give a file that ends in .html")
    screen, found, notes = Screen(), [], []
    for folder, name in _names(folders).items():
        try:
            run = recorded.read(Path(folder), name)
        except UsageError as error:
            notes.append(clean(error))
            continue
        found.append(run)
        notes += [clean(f"{name}: {note}") for note in run.notes]
    if not found:
        raise UsageError(f"there is nothing to compare: {'; '.join(notes)}")
    rows = table(found)
    screen.table("Runs:", ["", *(run.name for run in found)], rows)
    for note in notes:
        screen.say(f"note: {note}")
    try:
        write_atomically(out, page.write(found, rows, notes))
    except OSError as error:
        raise UsageError(f"--out {out}: can't be written ({error.strerror})") from None
    screen.say(f"The figures are in {out}.")


def _names(folders: Sequence[str]) -> dict[str, str]:
    """A name for each folder, each once: its last part, or all of it where two have that."""
    paths = {folder: Path(folder) for folder in dict.fromkeys(folders)}
    last = [path.resolve().name for path in paths.values()]
    names = {}
    for folder, path in paths.items():
        name = path.resolve().name
        name = name if last.count(name) == 1 else str(path)
        names[folder] = clean(name)
    return names


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message}; {self.prog} --help shows what it takes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `python -m train.report` and returns its exit code."""
    parser = _Parser(prog="python -m train.report", description="Compares training runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, e.g. runs/NAME")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        help="page to write, with the figures (default: report.html)",
    )
    try:
        args = parser.parse_args(arguments)
        compare(args.runs, args.out)
    except UsageError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
