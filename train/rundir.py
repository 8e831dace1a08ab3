"""The folder of a run: which one, whether it is free, and what is in it.

- `config.json`: the configuration, every key
- `metrics.jsonl`: what is a function of the configuration alone
- `throughput.jsonl`: what depends on the clock
- `checkpoints/STEP/`: Orbax checkpoints, `damaged/STEP/` those that could not be used
- `memory.json`: memory of a step by part, predicted and as compiled
- `tensorboard/`: event files, if asked for
- `loss.png`: the figure
"""

import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from train import processes
from train.cache import write_atomically
from train.cli import Command
from train.config import flatten
from train.errors import UsageError

ROOT = Path("runs")


class RunDir(NamedTuple):
    """A run's folder, and whether an earlier run is to go on in it.

    `base` is what a new run without a folder of its own is named and numbered by, else empty.
    """

    path: Path
    resumes: bool
    base: str = ""

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def throughput(self) -> Path:
        return self.path / "throughput.jsonl"

    @property
    def memory(self) -> Path:
        return self.path / "memory.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def figure(self) -> Path:
        return self.path / "loss.png"

    def open(self, command: Command) -> "tuple[RunDir, Any]":
        """Makes the folder and takes its lock, which ends with the process; keep the lock.

        Of two runs that begin at once, one takes the next number. Of several processes the first
        one does it for all.

        Raises:
          UsageError: the folder can't be made, another process is training in it, or a run has
            come into it since it was chosen.
        """
        locks = []

        def take() -> list[Any]:
            place, lock = self._take(command)
            locks.append(lock)
            return place._as_json()

        place = RunDir._from_json(processes.from_first(take))
        # (The caller closes either.)
        return place, locks[0] if locks else open(os.devnull)  # noqa: SIM115

    def _as_json(self) -> list[Any]:
        return [str(self.path), self.resumes, self.base]

    @classmethod
    def _from_json(cls, fields: list[Any]) -> "RunDir":
        return cls(Path(fields[0]), *fields[1:])

    def _take(self, command: Command) -> "tuple[RunDir, Any]":
        try:
            self.path.mkdir(parents=True, exist_ok=not self.base)
        except FileExistsError:
            if self.path.is_dir():
                return self._replace(path=_numbered(self.base, _newest(self.base) + 1))._take(
                    command
                )
        except OSError:
            pass  # told below
        try:
            # The caller keeps it open: the lock ends with the file.
            lock = open(self.path / ".lock", "w")  # noqa: SIM115
        except OSError as error:
            raise UsageError(
                f"--run_dir {self.path}: can't be made ({error.strerror}); give another folder"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"--run_dir {self.path}: another process is training in it; wait for it, or give "
                "another folder"
            ) from None
        if not self.resumes and _occupied(self.path):
            lock.close()
            raise UsageError(
                f"--run_dir {self.path}: another run has just begun in it; give another folder"
            )
        if not self.resumes or not (self.path / "config.json").exists():
            self.describe(command)
        return self, lock

    def describe(self, command: Command) -> None:
        """Writes the configuration, that of an earlier run over."""
        text = json.dumps(flatten(command.config), indent=2)
        write_atomically(self.path / "config.json", text + "\n")


def choose(command: Command) -> RunDir:
    """The folder that the command means; nothing is made yet.

    A folder that is named must be free unless the run is resumed. Without a name a new run takes
    the next free number, and `--resume` the newest run of this experiment, model and optimizer.
    """
    return RunDir._from_json(processes.from_first(lambda: _choose(command)._as_json()))


def _choose(command: Command) -> RunDir:
    config = command.config
    if config.run_dir is not None:
        path = Path(config.run_dir)
        if path.exists() and not path.is_dir():
            raise UsageError(f"--run_dir {path}: is a file; give a folder")
        if _occupied(path) and not config.resume:
            raise UsageError(
                f"--run_dir {path}: holds a run already; add --resume to go on with it, or give "
                "another folder"
            )
        return RunDir(path, config.resume and _occupied(path))
    base = f"{command.experiment}-{command.model}-{config.optimizer.name}"
    newest = _newest(base)
    if config.resume:
        number = max(newest, 1)
        return RunDir(_numbered(base, number), newest > 0)
    return RunDir(_numbered(base, newest + 1), False, base)


def _occupied(path: Path) -> bool:
    # A run that ended before its first step leaves these alone.
    early = (".lock", "config.json", "memory.json")
    return path.is_dir() and any(p.name not in early for p in path.iterdir())


def _numbered(base: str, number: int) -> Path:
    return ROOT / (base if number == 1 else f"{base}-{number}")


def _newest(base: str) -> int:
    pattern = re.compile(re.escape(base) + r"(?:-(\d+))?")
    names = [path.name for path in ROOT.iterdir()] if ROOT.is_dir() else []
    matches = [match for name in names if (match := pattern.fullmatch(name))]
    return max((int(match[1] or 1) for match in matches), default=0)
