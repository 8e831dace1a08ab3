"""What the smaller commands beside `python -m train` share: reading words, and ending well.

Every mistake is one line on stderr and an exit code.
"""

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from train.cli import unbox
from train.errors import TrainError, UsageError, no_space, one_line, silence_stdout

T = TypeVar("T")


def main(
    module: str, kind: type[T], do: Callable[[T], Any], words: Sequence[str] | None = None
) -> int:
    """Reads a command line onto a dataclass, does what it says and returns the exit code.

    Args:
      module: its name, as in `python -m train.sample`.
      kind: a dataclass whose docstrings `--help` shows.
      do: takes one of it.
      words: of the command line; None are the program's own.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        do(read(module, kind, words))
        return 0
    except TrainError as error:
        return _fail(error, error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        return silence_stdout()
    except OSError as error:
        what = error.filename or "a file"
        return _fail(f"{what}: {no_space(error) or error.strerror}; give another place", 2)


def read(module: str, kind: type[T], words: Sequence[str] | None = None) -> T:
    """The command line as the dataclass.

    Raises:
      UsageError: anything unknown or impossible.
    """
    words, captured = list(sys.argv[1:] if words is None else words), io.StringIO()
    program = f"python -m {module}"
    wants_help = any(word in ("-h", "--help") for word in words)
    try:
        with contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(captured):
            return tyro.cli(kind, prog=program, args=words, use_underscores=True)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(unbox(captured.getvalue(), program)) from None


def _fail(message: object, code: int) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    return code
