"""Entry point of `python -m train`."""

import os
import signal
import sys


def _end(number: int, _: object) -> None:
    """Ends the process at once: outside of the training loop there is nothing to save.

    An exception would be lost where a library calls back, and a tidy exit waits for, or trips over,
    the threads of the libraries that are just starting.
    """
    os.write(2, b"stopped: interrupted outside of training; nothing had to be saved\n")
    os._exit(128 + number)


if __name__ == "__main__":
    # LAPACK's threads, which find bases, would go on spinning beside XLA's.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Before the imports, which take seconds.
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _end)
    from train.cli import main
    from train.errors import quiet_late_writers

    quiet_late_writers()
    sys.exit(main())
