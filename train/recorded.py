"""A run's folder as it was left, finished or not, whole or damaged."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.errors import UsageError
from train.records import Row, latest, scan


class Run(NamedTuple):
    """What a folder holds, and what it lacks."""

    name: str
    config: dict[str, Any]  # by dotted key; empty if it can't be read
    rows: list[Row]  # of metrics.jsonl
    speeds: list[Row]  # of throughput.jsonl, as written: steps that were done again come twice
    memory: dict[str, Any]  # predicted and compiled bytes by part
    notes: list[str]  # what a reader should know

    def of(self, kind: str) -> list[Row]:
        """The rows of a kind."""
        return [row for row in self.rows if row["kind"] == kind]


def read(path: Path, name: str) -> Run:
    """Reads a folder.

    Raises:
      UsageError: there is nothing to show; the message begins with the name.
    """
    try:
        if not path.is_dir():
            what = "is a file; give the run's folder" if path.exists() else "no such folder"
            raise UsageError(f"{name}: {what}")
        notes: list[str] = []
        config = _table(path / "config.json", notes)
        rows, speeds = (_rows(path / f"{kind}.jsonl", notes) for kind in ("metrics", "throughput"))
        memory = _table(path / "memory.json", notes)
    except OSError as error:
        raise UsageError(f"{name}: {error.filename}: {error.strerror}") from None
    if not any(row["kind"] == "train" for row in rows):
        why = f" ({'; '.join(notes)})" if notes else ""
        raise UsageError(f"{name}: holds no step of a run{why}")
    run = Run(name, config, rows, speeds, memory, notes)
    if not run.of("final"):
        steps = config.get("train.steps", "an unknown number")
        notes.insert(0, f"unfinished: step {rows[-1]['step']} of {steps}")
    return run


def _table(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
        return {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        notes.append(f"{path.name} is damaged")
        return {}
    return found


def _rows(path: Path, notes: list[str]) -> list[Row]:
    rows, damaged = scan(path)
    if not path.exists():
        notes.append(f"{path.name} is missing")
    elif damaged is not None:
        notes.append(f"{path.name} is damaged: line {damaged} and what follows is left out")
    elif not rows:
        notes.append(f"{path.name} is empty")
    return rows


def clean(text: object) -> str:
    """A text of one line without control characters, which a terminal would obey.

    >>> clean("a\\x1b[2Jb")
    'a?[2Jb'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def number(row: dict[str, Any], key: str) -> float | None:
    """A finite number of a row, None for anything else.

    >>> number({"loss": 2}, "loss"), number({"loss": "2"}, "loss"), number({}, "loss")
    (2.0, None, None)
    """
    value = row.get(key)
    if not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond all floats
        return None


def curve(rows: list[Row], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of two keys where both are numbers, in order of x."""
    pairs = [(number(row, x), number(row, y)) for row in latest(rows)]
    whole = [pair for pair in pairs if None not in pair]
    found = np.array(whole, np.float64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def timeline(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the seconds of training until then, over all processes of the run.

    What was done again counts once: a process goes on at the time of the step that it began after.
    Where no row tells that time, the process' own speed does.
    """
    steps, seconds = [0.0], [0.0]
    begun, start = -1.0, 0.0
    for row in run.speeds:
        step, spent = number(row, "step"), number(row, "seconds")
        after = number(row, "after") or 0.0
        if step is None or spent is None or step <= after:
            continue
        if after != begun or step <= steps[-1]:
            gap = max(0.0, after - steps[-1])
            start = float(np.interp(after, steps, seconds)) + gap * spent / (step - after)
            kept = sum(at < after for at in steps)
            begun, steps, seconds = after, steps[:kept], seconds[:kept]
            steps.append(after)
            seconds.append(start)
        steps.append(step)
        seconds.append(start + spent)
    return np.array(steps), np.array(seconds)
