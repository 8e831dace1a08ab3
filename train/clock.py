"""The time that training takes, for tokens/s and the time left."""

import time


class Clock:
    """Seconds spent on training steps alone."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self._began = time.perf_counter()
        self._steps = 0

    def count(self) -> None:
        """Another step is done."""
        self._steps += 1

    def seconds(self) -> float:
        """Since the start, without pauses."""
        return time.perf_counter() - self._began

    def speed(self) -> float:
        """Tokens a second."""
        return self._steps * self.tokens_per_step / self.seconds() if self._steps else 0.0

    def left(self, steps: int) -> float:
        """Seconds that `steps` more steps will take."""
        return self.seconds() / self._steps * steps if self._steps else 0.0

    def paused(self) -> "_Pause":
        """A block whose time doesn't count."""
        return _Pause(self)


class _Pause:
    def __init__(self, clock: Clock):
        self._clock = clock

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._clock._began += time.perf_counter() - self._start
