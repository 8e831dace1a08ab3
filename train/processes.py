"""Several processes that train together: how they find each other, and what one alone does.

All of them compute; the first one writes files and prints.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.errors import TrainError, UsageError


def is_first() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(error: BaseException | None) -> None:
    """Raises an error of this process, and in all processes if one of them has one."""
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.int32(error is not None))
        if error is None and failed.any():
            raise Elsewhere(f"process {int(np.argmax(failed))} could not go on")
    if error is not None:
        raise error


class Elsewhere(TrainError):
    """Another process tells why the run ends."""
