"""Ctrl-C, SIGTERM and the end of the terminal (SIGHUP) during training."""

import signal
from collections.abc import Callable
from typing import Any

from train.errors import Interrupted


class Signals:
    """Notes the first Ctrl-C, SIGTERM or SIGHUP inside the block, which then saves and ends.

    A second one, by an impatient hand or by a shell that signals twice, changes nothing; a third
    one ends the run at once, with what `story` tells.
    """

    def __init__(self, story: Callable[[], str]) -> None:
        self.received = 0
        self._count, self._story = 0, story
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # (Under nohup a run goes on without its terminal.)
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: Any) -> None:
        self._count += 1
        self.received = self.received or number
        if self._count > 2:
            self._restore()
            raise Interrupted(self._story(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
