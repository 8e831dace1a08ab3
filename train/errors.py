"""How a run ends other than well: every case is one line on stderr and an exit code."""

import errno
import os
import signal
import sys
import warnings
from typing import Any


class TrainError(Exception):
    """Ends the run with one line that names the thing and the remedy."""

    exit_code = 2


class UsageError(TrainError):
    """The command, its data or its checkpoints can't be used as they are."""


class DivergedError(TrainError):
    """The loss or the gradient stopped being a number."""

    exit_code = 1


class Interrupted(TrainError):
    """Ctrl-C or a signal; the exit code is the shell's convention, 128 + the signal's number."""

    def __init__(self, message: str, signum: int = signal.SIGINT):
        super().__init__(message)
        self.exit_code = 128 + signum


_FULL = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
}


def no_space(error: BaseException) -> str | None:
    """Why `error` or one of its causes means that nothing more fits on the disk; else None.

    >>> no_space(OSError(errno.ENOSPC, "No space left on device"))
    'no space left on the device'
    >>> no_space(ValueError("something else"))
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return _FULL[seen.errno]
        # TensorStore's C++ errors carry the system's words only.
        text = str(seen).lower()
        if "no space left" in text or "enospc" in text:
            return _FULL[errno.ENOSPC]
        if "quota exceeded" in text:
            return _FULL[errno.EDQUOT]
        if "file too large" in text:
            return _FULL[errno.EFBIG]
        seen = seen.__cause__ or seen.__context__
    return None


def silence_stdout() -> int:
    """Sends stdout nowhere, as nobody reads it any more; returns the exit code of such an end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def one_line(text: object) -> str:
    """Any message on one line.

    >>> one_line("first\\n   second")
    'first second'
    """
    return " ".join(str(text).split())


def quiet_late_writers() -> None:
    """Keeps the remains of a failed save off stderr.

    When one file of a checkpoint can't be written, Orbax ends its event loop while TensorStore
    still writes others. Each of those then reports that the loop is closed, as an error that nobody
    can catch, around the one line that says what happened, or was not begun, as a warning.
    """
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            report(unraisable)

    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
