"""Rows of JSON, one a line, that survive a killed process.

`metrics.jsonl` holds only what is a function of the configuration, so that a run which was killed
and resumed leaves the same bytes as one that was not.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.cache import write_atomically

Row = dict[str, Any]


class Records:
    """A file of rows, opened at a step: rows of later steps, which will be written again, go.

    Args:
      path: the file.
      step: steps that are done; 0 begins an empty file.
      keep_later: leaves the rows of later steps in place.
      mirror: is given every row, those that stand first.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        *,
        keep_later: bool = False,
        mirror: Callable[[Row], None] | None = None,
    ):
        _truncate(path, step, keep_later)
        self._mirror = mirror
        if mirror is not None:
            for row in latest(read(path)):
                if row["step"] <= step:
                    mirror(row)
        # Open for the whole run; `close` ends it.
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, row: Row) -> None:
        """Appends a row; a killed process loses none that were written."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._mirror is not None:
            self._mirror(row)

    def sync(self) -> None:
        """Waits until the rows are on the disk: a checkpoint must not be ahead of them."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class NoRecords(Records):
    """What a process has that leaves the files to another one."""

    def __init__(self) -> None:
        pass

    def write(self, row: Row) -> None:
        """Nothing is kept."""

    def sync(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""


def read(path: Path) -> list[Row]:
    """The whole rows of a file; what follows a torn line is left out."""
    return scan(path)[0]


def scan(path: Path) -> tuple[list[Row], int | None]:
    """The whole rows of a file up to a line that is none, and the number of that line.

    A last line without an end is none that is damaged: it is being written, or its writer was
    killed.
    """
    rows: list[Row] = []
    if not path.exists():
        return rows, None
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return rows, number
        if not _is_row(row):
            return rows, number
        rows.append(row)
    return rows, None


def latest(rows: list[Row]) -> list[Row]:
    """One row for each kind and step, the last one written, in order of the steps.

    >>> latest([{"kind": "speed", "step": 2}, {"kind": "speed", "step": 2, "new": True}])
    [{'kind': 'speed', 'step': 2, 'new': True}]
    """
    found = {(row["kind"], row["step"]): row for row in rows}
    return sorted(found.values(), key=lambda row: row["step"])


def _is_row(row: object) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("step"), int)
        and isinstance(row.get("kind"), str)
    )


def _truncate(path: Path, step: int, keep_later: bool) -> None:
    rows = read(path) if step else []
    kept = [row for row in rows if row["step"] <= step and row["kind"] != "final"]
    text = "".join(json.dumps(row) + "\n" for row in (rows if keep_later else kept))
    if not path.exists() or path.read_text(errors="replace") != text:
        write_atomically(path, text)
