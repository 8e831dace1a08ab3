"""Rows of JSON, one a line, that survive a killed process.

`metrics.jsonl` holds only what is a function of the configuration, so that a run which was killed
and resumed leaves the same bytes as one that was not.
"""

import json
import os
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
    """

    def __init__(self, path: Path, step: int, *, keep_later: bool = False):
        if not keep_later or not step:
            _truncate(path, step)
        # Open for the whole run; `close` ends it.
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, row: Row) -> None:
        """Appends a row; a killed process loses none that were written."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

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
        self._file = open(os.devnull, "a", encoding="utf-8")  # noqa: SIM115

    def sync(self) -> None:
        """Nothing is kept."""


def read(path: Path) -> list[Row]:
    """The whole rows of a file; what follows a torn line is left out."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not _is_row(row):
                break
            rows.append(row)
    return rows


def _is_row(row: object) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("step"), int)
        and isinstance(row.get("kind"), str)
    )


def _truncate(path: Path, step: int) -> None:
    kept = [row for row in read(path) if row["step"] <= step and row["kind"] != "final"]
    text = "".join(json.dumps(row) + "\n" for row in kept if step)
    if not path.exists() or path.read_text(errors="replace") != text:
        write_atomically(path, text)
