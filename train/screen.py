"""What the user sees while a run goes on: tables, lines, and a progress bar on a terminal."""

import contextlib
import errno
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from train.errors import silence_stdout

# A pipe or a file has no width of its own; tables and paths shall not be folded there.
_PLAIN_WIDTH = 160


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leaves the error to the caller; rich would end the program, and save nothing."""
        raise  # (called where the error is handled)


class Screen:
    """Prints to a terminal with a bar, elsewhere as plain lines.

    When nobody reads any more (a closed pipe or terminal) it falls silent and raises SIGTERM, by
    which a run saves and ends.

    Args:
      file: where to; stdout at the time of the call if not given.
    """

    def __init__(self, file: TextIO | None = None):
        file = sys.stdout if file is None else file
        self._live = file.isatty()
        self._console = _Console(file=file, width=None if self._live else _PLAIN_WIDTH)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def say(self, text: str) -> None:
        """One line, or a text laid out already."""
        with self._reader():
            self._console.print(escape(text), soft_wrap=True, highlight=False)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is left-aligned, the others are right-aligned."""
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for number, name in enumerate(header):
            table.add_column(escape(name), justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        with self._reader():
            self._console.print(table, highlight=False)

    def start(self, steps: int, done: int) -> None:
        """Begins the training's progress display."""
        if self._live:
            self._bar = Progress(
                TextColumn("step {task.completed:,} of {task.total:,}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}"),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=steps, completed=done, status="")
            self._bar.start()

    def progress(self, step: int, steps: int, status: str, milestone: bool) -> None:
        """A step is done; without a bar only milestones are printed."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif milestone:
            self.say(f"step {step:,} of {steps:,}  {status}")

    def stop(self) -> None:
        """Ends the progress display; may be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @contextlib.contextmanager
    def _reader(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self._console.quiet = True
            silence_stdout()
            signal.raise_signal(signal.SIGTERM)


def duration(seconds: float) -> str:
    """
    >>> duration(9), duration(75), duration(7500)
    ('9 s', '1 min 15 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
