"""Runs side by side: what came out, what it took, and in what their configurations differ."""

import math
from collections.abc import Callable, Sequence

from train.memory import mebibytes
from train.recorded import Run, clean, curve, number

UNKNOWN = "-"
# Keys that say where a run is rather than what.
_PLACES = ("run_dir", "resume", "data.cache_dir")


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of cells, the first of each its name; one more cell for each run.

    A row that no run can fill is left out.
    """
    rows = [[name, *map(cell, runs)] for name, cell in _FIGURES]
    rows = [row for row in rows if set(row[1:]) != {UNKNOWN}]
    return [[clean(cell) for cell in row] for row in rows + differences(runs)]


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """The keys in which the configurations that could be read differ, with each run's value."""
    known = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in known for key in config if key not in _PLACES)
    missing = object()
    rows = []
    for key in keys:
        values = [config.get(key, missing) for config in known]
        if any(value != values[0] for value in values):
            rows.append([f"--{key}", *(str(run.config.get(key, UNKNOWN)) for run in runs)])
    return rows


def _state(run: Run) -> str:
    steps = run.config.get("train.steps", "?")
    return "finished" if run.of("final") else f"step {run.rows[-1]['step']} of {steps}"


def _last(kind: str, key: str, form: Callable[[float], str]) -> Callable[[Run], str]:
    """The last number under a key in the rows of a kind."""

    def cell(run: Run) -> str:
        rows = run.speeds if kind == "speed" else run.of(kind)
        found = [value for row in rows if (value := number(row, key)) is not None]
        return form(found[-1]) if found else UNKNOWN

    return cell


def _validation(form: Callable[[float], str]) -> Callable[[Run], str]:
    """Of the whole held-out split; of an unfinished run, of the part that was scored last."""

    def cell(run: Run) -> str:
        whole = _last("final", "validation_loss", form)(run)
        if whole != UNKNOWN:
            return whole
        part = _last("validation", "validation_loss", form)(run)
        return part if part == UNKNOWN else f"{part} (a part)"

    return cell


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 700 else "inf"


def _peak_rate(run: Run) -> str:
    rates = curve(run.of("train"), "step", "effective_learning_rate")[1]
    return f"{rates.max():.4g}" if len(rates) else UNKNOWN


def _skipped(run: Run) -> str:
    return str(sum(bool(row.get("skipped")) for row in run.of("train")))


def _device(run: Run) -> str:
    if not run.speeds or "device" not in run.speeds[-1]:
        return UNKNOWN
    last = run.speeds[-1]
    return f"{last.get('devices', 1)} x {last['device']}"


def _memory(part: str) -> Callable[[Run], str]:
    """A part of a step: as compiled, or as predicted where there is nothing else."""

    def cell(run: Run) -> str:
        for kind, note in (("compiled", ""), ("predicted", " (predicted)")):
            parts = run.memory.get(kind)
            found = number(parts, part) if isinstance(parts, dict) else None
            if found is not None:
                return mebibytes(int(found)) + note
        return UNKNOWN

    return cell


def _kept(run: Run) -> str:
    for kind, note in (("compiled", ""), ("predicted", " (predicted)")):
        parts = run.memory.get(kind)
        if isinstance(parts, dict):
            found = [number(parts, part) for part in ("weights", "optimizer_state")]
            if None not in found:  # (which type checkers do not follow)
                return mebibytes(int(sum(found))) + note  # type: ignore[arg-type]
    return UNKNOWN


_FIGURES: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("state", _state),
    ("tokens trained on", _last("train", "tokens", lambda n: f"{n:,.0f}")),
    ("validation loss (nats a token)", _validation(lambda loss: f"{loss:.4f}")),
    ("perplexity", _validation(_perplexity)),
    ("bits per byte", _last("final", "bits_per_byte", lambda n: f"{n:.4f}")),
    ("last training loss", _last("train", "loss", lambda n: f"{n:.4f}")),
    ("last gradient norm", _last("train", "grad_norm", lambda n: f"{n:.4g}")),
    ("captured energy, last", _last("subspace", "captured_energy", lambda n: f"{n:.1%}")),
    ("effective learning rate, peak", _peak_rate),
    ("skipped steps", _skipped),
    ("skipped gradients of leaves", _last("final", "skipped_gradients", lambda n: f"{n:.0f}")),
    ("tokens/s", _last("speed", "tokens_per_second", lambda n: f"{n:,.0f}")),
    ("tokens/s per device", _last("speed", "tokens_per_second_per_device", lambda n: f"{n:,.0f}")),
    ("model FLOP/s", _last("speed", "model_flops_per_second", lambda n: f"{n:.3g}")),
    ("utilisation of the peak", _last("speed", "utilisation", lambda n: f"{n:.1%}")),
    ("device", _device),
    ("memory: weights", _memory("weights")),
    ("memory: optimizer state", _memory("optimizer_state")),
    ("memory: weights and state", _kept),
    ("memory: temporaries", _memory("temporaries")),
    ("memory: peak of a step", _memory("total")),
    ("memory: peak on the device", _last("speed", "peak_bytes", lambda n: mebibytes(int(n)))),
)
