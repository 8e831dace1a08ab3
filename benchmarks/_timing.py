"""Side-by-side timing.

Machines differ and drift, so figures of two runs do not compare: the contestants take turns within
one run, and what is reported is the ratio of their medians, or the median of the rounds' ratios.
"""

import dataclasses
import importlib.metadata
import operator
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each round of one contestant.

    >>> Timing((3.0, 1.0, 2.0)).median
    2.0
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle round, which a busy neighbour does not move."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median: above 0.1 the machine was not quiet."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def over(self, other: "Timing") -> float:
        """The middle one of the rounds' ratios: what slows down a whole round does not move it.

        >>> Timing((1.0, 9.0, 3.0)).over(Timing((2.0, 3.0, 2.0)))
        1.5
        """
        return statistics.median(map(operator.truediv, self.seconds, other.seconds))


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 10,
    repeat: int | Mapping[str, int] = 1,
    warmup: int = 2,
    rest: float = 0.0,
) -> dict[str, Timing]:
    """Times callables in turns.

    Args:
      contestants: what to time; each call must wait for its own result.
      rounds: turns of each.
      repeat: calls per turn, of which the mean counts; by name where a short contestant would be
        timed in the wake of a long one's threads.
      warmup: calls of each beforehand, not timed (compilation, caches).
      rest: seconds before each turn, in which the threads of the one before stop spinning: those of
        LAPACK slow down whatever comes next.

    Returns:
      A `Timing` per name, in the given order.

    >>> timings = alternate({"a": lambda: None, "b": lambda: None}, rounds=3)
    >>> list(timings), len(timings["a"].seconds)
    (['a', 'b'], 3)
    """
    for call in contestants.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        # Every other turn runs backwards, so that nobody always follows the same neighbour.
        order = list(contestants.items())[:: -1 if turn % 2 else 1]
        for name, call in order:
            times = repeat if isinstance(repeat, int) else repeat.get(name, 1)
            time.sleep(rest)
            start = time.perf_counter()
            for _ in range(times):
                call()
            seconds[name].append((time.perf_counter() - start) / times)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def versions(*packages: str) -> str:
    """Versions of Python and of the installed ones of `packages`, on one line."""
    parts = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table, the first column left-aligned, the others right-aligned.

    >>> print(table(["step", "ms"], [["ours", "1.50"], ["theirs", "12.00"]]))
    step       ms
    ours     1.50
    theirs  12.00
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
