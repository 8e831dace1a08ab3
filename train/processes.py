"""Several processes that train together: how they find each other, and what one alone does.

All of them compute; the first one writes files and prints. They are told apart by the variables
`JAX_COORDINATOR_ADDRESS` (host:port of the first one), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or
by what Slurm, Open MPI and TPU pods set.
"""

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from train.devices import has_tpu
from train.errors import Interrupted, TrainError, UsageError, one_line
from train.mesh import Mesh

_OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Numbers of processes that launchers set, each together with what JAX reads there.
_LAUNCHERS = {
    "SLURM_NTASKS": "SLURM_STEP_NODELIST",
    "OMPI_COMM_WORLD_SIZE": "OMPI_MCA_orte_hnp_uri",
}
_LONGEST = 1 << 14  # bytes of a message
# Of a process that fails by itself. The others can't meet it any more, and are ended then.
_SHUTDOWN_SECONDS = 60

_SHOWN = 64  # characters of a value
T = TypeVar("T")


def join() -> None:
    """Joins the other processes, if this one was started as one of several; call it first.

    Raises:
      UsageError: the variables are incomplete, or the others can't be reached.
    """
    given = [name for name in _OWN if name in os.environ]
    settings: dict[str, Any] = {}
    if given:
        missing = [name for name in _OWN if name not in os.environ]
        if missing:
            raise UsageError(f"{missing[0]} is not set, but {given[0]} is; give all of {_OWN}")
        address, count, number = (os.environ[name] for name in _OWN)
        if not (count.isdigit() and number.isdigit() and int(number) < int(count)):
            raise UsageError(
                f"JAX_PROCESS_ID {number} of JAX_NUM_PROCESSES {count}: give whole numbers, the "
                "first from 0 up to one less than the second"
            )
        settings = {"num_processes": int(count), "process_id": int(number)}
        settings |= {"coordinator_address": address, "cluster_detection_method": "deactivate"}
    launched = any(
        os.environ.get(name, "1") != "1" and other in os.environ
        for name, other in _LAUNCHERS.items()
    )
    if not (given or launched or has_tpu()):
        return
    try:
        jax.distributed.initialize(shutdown_timeout_seconds=_SHUTDOWN_SECONDS, **settings)
    except Exception as error:
        if not (given or launched):
            return  # a TPU machine that belongs to no pod
        raise UsageError(
            f"couldn't join the other processes: {one_line(error)[:300]}; check "
            "JAX_COORDINATOR_ADDRESS and that all processes were started"
        ) from None


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
            raise Elsewhere(f"process {int(np.argmax(failed))} can't go on, and tells why")
    if error is not None:
        raise error


def in_all(function: Callable[[], T]) -> T:
    """What `function` returns here; where it fails in one process, all of them end."""
    found, error = None, None
    try:
        found = function()
    except Exception as failure:
        error = failure
    agree(error)
    return cast(T, found)


def compare(values: dict[str, Any], remedy: str) -> None:
    """Ends all processes where one has other values (of JSON) than the first one.

    Raises:
      UsageError: in that process, with what differs first.
    """
    if jax.process_count() == 1:
        return
    names = sorted(values)
    short = [_shown(values[name]) for name in names]
    whole = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    theirs, digest = from_first(lambda: (short, whole))
    differs = [
        f"{name} is {there} in process 0 and {here} in process {jax.process_index()}"
        for name, here, there in zip(names, short, theirs, strict=len(short) == len(theirs))
        if here != there
    ]
    error = None
    if digest != whole:
        what = "; ".join(differs) or "the processes run other versions of the trainer"
        error = UsageError(f"{what}; {remedy}")
    agree(error)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    # (All of them go into one message.)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}... ({digest[:16]})"


def from_first(function: Callable[[], Any]) -> Any:
    """What `function` returns in the first process, a JSON value; its errors end all of them."""
    if jax.process_count() == 1:
        return function()
    text, error = b"", None
    if is_first():
        try:
            text = json.dumps(function()).encode()
        except Exception as failure:
            error = failure
    agree(error)
    padded = np.frombuffer(text.ljust(_LONGEST), np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))


class Shared:
    """A number that any process may raise, as all of them see it: one call late.

    So nobody waits for a device, and all act at the same step.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._late: jax.Array | None = None
        self._largest = jax.jit(jnp.max, out_shardings=mesh.everywhere)

    def update(self, value: int) -> int:
        """The largest value that a process gave in the last call; alone, this one."""
        if jax.process_count() == 1:
            return value
        shape, late = (self._mesh.size,), self._late
        one = np.full(shape, value, np.int32)
        values = jax.make_array_from_callback(shape, self._mesh.rows, lambda i: one[i])
        self._late = self._largest(values)
        return 0 if late is None else int(late)


class Together:
    """Batches of several processes, which end in all of them where one of them has no next.

    Reads one batch ahead: how that went is told a call early, so that nobody waits for a device,
    and all of them stop after the same batch.
    """

    def __init__(self, stream: Any, mesh: Mesh):
        self._stream, self._failed = stream, Shared(mesh)
        self._position = stream.get_state()
        self._next: tuple[Any, Any, Exception | None] | None = None

    def __next__(self) -> Any:
        if self._next is None:
            self._read()
        assert self._next is not None
        batch, position, error = self._next
        if error is None:
            self._read()
        failed = self._failed.update(jax.process_index() + 1 if self._next[2] else 0)
        if failed and error is None:
            raise Elsewhere(f"process {failed - 1} can't go on, and tells why")
        if error is not None:
            raise error
        self._position = position
        return batch

    def get_state(self) -> Any:
        """The position after the last batch that was taken, not after the one read ahead."""
        return self._position

    def _read(self) -> None:
        try:
            self._next = next(self._stream), self._stream.get_state(), None
        except Interrupted:
            raise
        except Exception as error:
            self._next = None, None, error


class Elsewhere(TrainError):
    """Another process tells why the run ends."""
