"""Lets ``describe`` see the plans that a transformation makes while it is initialised."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_local = threading.local()


def record(plans: list[Any]) -> None:
    """Adds plans to the innermost open recording of this thread, if there is one."""
    recordings = getattr(_local, "recordings", None)
    if recordings:
        recordings[-1].extend(plans)


@contextlib.contextmanager
def recording() -> Iterator[list[Any]]:
    """Collects what :func:`record` is given within the block."""
    recordings = _local.__dict__.setdefault("recordings", [])
    recordings.append([])
    try:
        yield recordings[-1]
    finally:
        recordings.pop()
