"""Orbax checkpoints that are whole or absent, checked before use, and never of another run.

A checkpoint is written while training goes on: under a temporary name, then it gets the checksums
of its files, and is renamed last, so that a killed process leaves no half of one under a step's
name. It carries a fingerprint of the run, which is compared before anything is restored, because
Orbax casts silently to the target's dtypes and drops what the target lacks.
"""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from train import cache, processes, reblock
from train.errors import UsageError, no_space, one_line
from train.fingerprint import check, leaves_of
from train.memory import mebibytes
from train.step import State

_SAVING = ".saving-"
_SCORE = "validation.json"
_MOST_CLEARINGS, _BETWEEN_CLEARINGS = 50, 0.1  # times, seconds


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where they are.
      keep: how many of the newest are kept.
      identity: the run's `fingerprint`.
      say: is told, in a line, what had to be passed over.
      keep_best: how many are kept beside them, those of the lowest scores.
      with_shards: the shapes of the run's state where blocks of few bits keep to so many parts.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        identity: dict[str, Any],
        say: Callable[[str], None] = print,
        keep_best: int = 0,
        with_shards: Callable[[int], State] | None = None,
    ):
        # Orbax takes absolute paths only.
        self._folder = folder.absolute()
        self._shown = folder
        self._keep, self._keep_best = keep, keep_best
        self._identity = identity
        self._say, self._with_shards = say, with_shards
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, good or not, in order."""
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())

    def path(self, step: int) -> Path:
        """Where a step's checkpoint is, as it was spelled on the command line."""
        return self._shown / str(step)

    def is_among_best(self, score: float) -> bool:
        """Whether a checkpoint of this validation loss would be kept for it.

        As the first process finds the folder, here and in `save`: others may see it late, and all
        save or none does.
        """

        def among_best() -> bool:
            better = [other for other in self._scores().values() if other <= score]
            return len(better) < self._keep_best

        return bool(processes.from_first(among_best))

    def save(self, step: int, state: State, data: Any, score: float | None = None) -> None:
        """Begins to save the state, which may be donated then, and the data's position.

        When all is written, checkpoints that are neither new nor of a low score go.

        Args:
          step: steps done.
          state: on the devices.
          data: an iterator with `get_state`, which returns what JSON can hold.
          score: the validation loss of this state, if it is known.

        Raises:
          UsageError: the disk is full, now or at the checkpoint before; those that were there
            still are.
        """
        self.wait()
        if processes.from_first((self._folder / str(step)).exists):
            return
        temporary = self._folder / f"{_SAVING}{step}"
        try:
            if processes.is_first():
                self._folder.mkdir(parents=True, exist_ok=True)
                self._clear(temporary)
            processes.meet("save")
            meta = {"step": step, "jax": jax.__version__, **self._identity}
            self._orbax.save(
                temporary,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_copied(state)),
                    data=ocp.args.JsonSave({"position": json.dumps(data.get_state())}),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
        except Exception as error:
            raise self._explain(step, temporary, error) from None
        self._saving = self._thread.submit(self._complete, step, temporary, score)

    def rate(self, step: int, score: float) -> None:
        """Notes the validation loss of a checkpoint that was saved before it was known.

        One that it has is among its checksums, and stays.
        """
        folder = self._folder / str(step)
        if processes.is_first() and folder.is_dir() and not (folder / _SCORE).exists():
            _write_score(folder, step, score)

    def poll(self) -> None:
        """Raises what `wait` would, if the saving that was begun last has failed by now.

        Of several processes none: they must all wait at the same step, and end their parts at
        different ones. They are told with the next saving.
        """
        if jax.process_count() == 1 and self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Returns when what was begun is saved.

        Raises:
          UsageError: the disk is full; the checkpoints that were there still are.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            # In all processes at once, or one of them would go on alone.
            processes.agree(saving.exception())

    def close(self) -> None:
        """Waits for what was begun, with a line about what fails: something else has before.

        Other processes are not waited for, which may have ended.
        """
        saving, self._saving = self._saving, None
        if saving is not None and (error := saving.exception()):
            self._say(one_line(error))
        self._thread.shutdown()
        self._orbax.close()

    def _complete(self, step: int, temporary: Path, score: float | None) -> None:
        try:
            self._orbax.wait_until_finished()
            if not processes.is_first():
                return
            if score is not None:
                _write_score(temporary, step, score)
            cache.write_checksums(temporary, temporary / cache.MANIFEST)
            temporary.rename(self._folder / str(step))
        except Exception as error:
            raise self._explain(step, temporary, error) from None
        scores = self._scores()
        best = sorted(scores, key=lambda step: (scores[step], step))[: self._keep_best]
        for old in self.steps()[: -self._keep]:
            if old not in best:
                shutil.rmtree(self._folder / str(old), ignore_errors=True)

    def _scores(self) -> dict[int, float]:
        """The validation loss of each checkpoint that has one."""
        found = {}
        for step in self.steps():
            try:
                found[step] = float(
                    json.loads((self._folder / str(step) / _SCORE).read_text())["loss"]
                )
            except (OSError, ValueError, TypeError, KeyError):
                continue  # saved between evaluations, or damaged
        return found

    def _explain(self, step: int, temporary: Path, error: Exception) -> Exception:
        """The error of a failed saving in words, where it is one of files; half-written ones go."""
        self._clear(temporary, late=True)
        reason = no_space(error)
        if reason is None and not isinstance(error, OSError):
            return error
        free = shutil.disk_usage(_existing(self._folder)).free
        return UsageError(
            f"couldn't save the checkpoint of step {step} in {self._shown}: "
            f"{reason or one_line(error)} ({mebibytes(free)} free); "
            f"{self._remedy(full=reason is not None)}"
        )

    def restore(self, shapes: State, data: Any) -> State | None:
        """The newest good checkpoint's state, with `data` moved to its position.

        Bad ones that are newer are moved to `damaged/` beside the folder, with a line about each.
        Values in few bits whose blocks were those of another number of devices are encoded again.

        Returns:
          The state, or None if there never was a whole checkpoint.

        Raises:
          UsageError: the newest good checkpoint is of another run, or there are only bad ones.
        """
        if processes.is_first():
            self._sweep()
        processes.meet("restore")
        places = jax.tree.map(_on_device, shapes)
        bad: list[int] = []
        for step in reversed(self.steps()):
            state, reason = self._try(step, places, data)
            if state is not None:
                state = jax.tree.map(_laid_out, state, shapes)
                if processes.is_first():
                    for number in bad:
                        self._set_aside(number)
                return state
            self._say(f"the checkpoint of step {step} can't be used: {reason}")
            bad.append(step)
        if bad:
            raise UsageError(
                f"no good checkpoint in {self._shown} (damaged: steps "
                f"{', '.join(map(str, reversed(bad)))}); begin again in another --run_dir"
            )
        return None

    def _sweep(self) -> None:
        for path in sorted(self._folder.glob(f"{_SAVING}*")):
            # Orbax writes under a temporary name of its own, which begins with the one given.
            name = path.name.removeprefix(_SAVING).partition(".")[0]
            self._say(f"the checkpoint of step {name} is half-written and was left out")
            shutil.rmtree(path)

    def _try(self, step: int, shapes: State, data: Any) -> tuple[State | None, str]:
        folder = self._folder / str(step)
        if reason := cache.damage(folder, folder / cache.MANIFEST):
            return None, reason
        try:
            small = ocp.args.Composite(meta=ocp.args.JsonRestore(), data=ocp.args.JsonRestore())
            found = self._orbax.restore(folder, args=small)
            meta = found["meta"]
            check(self.path(step), meta, self._identity)
            if meta["jax"] != jax.__version__:
                self._say(
                    f"{self.path(step)} was written under jax {meta['jax']} and goes on under "
                    f"{jax.__version__}: the last bits may differ"
                )
            saved = self._as_saved(step, meta, shapes)
            restored = self._orbax.restore(
                folder, args=ocp.args.Composite(state=ocp.args.StandardRestore(saved))
            )
            data.set_state(json.loads(found["data"]["position"]))
        except UsageError:
            raise
        except Exception as error:  # whatever Orbax, TensorStore or JSON find wrong with a file
            return None, f"{type(error).__name__}: {one_line(error)[:200]}"
        state = restored["state"]
        return state if saved is shapes else reblock.encoded_as(state, shapes), ""

    def _as_saved(self, step: int, meta: dict[str, Any], shapes: State) -> State:
        """The shapes of the checkpoint's state, on this run's devices."""
        theirs, ours = meta["leaves"], self._identity["leaves"]
        if theirs == ours:
            return shapes
        shards, saved = meta.get("shards"), shapes
        if self._with_shards and shards not in (None, self._identity["shards"]):
            saved = reblock.beside(self._with_shards(shards), shapes)
            ours = leaves_of(saved)
        if theirs != ours:
            path = next(p for p in [*ours, *theirs] if theirs.get(p) != ours.get(p))
            raise UsageError(
                f"{self.path(step)} holds {path} as {theirs.get(path)} where this program has "
                f"{ours.get(path)}; begin a new run in another --run_dir"
            )
        return saved

    def _clear(self, temporary: Path, *, late: bool = False) -> None:
        """Removes what was written; `late` where other threads may be writing still.

        Orbax tells of the first write that fails, and does not wait for those beside it, which make
        files and folders anew: it is over when nothing came back for a while.
        """
        for _ in range(_MOST_CLEARINGS):
            paths = list(self._folder.glob(f"{temporary.name}*"))
            for path in paths:
                shutil.rmtree(path, ignore_errors=True)
            if not (paths and late):
                return
            time.sleep(_BETWEEN_CLEARINGS)

    def _set_aside(self, step: int) -> None:
        aside = self._folder.parent / "damaged"
        aside.mkdir(exist_ok=True)
        target = aside / str(step)
        shutil.rmtree(target, ignore_errors=True)
        (self._folder / str(step)).rename(target)

    def _remedy(self, full: bool) -> str:
        done = self.steps()
        kept = f"the checkpoint of step {done[-1]} is good; " if done else ""
        what = "free some space" if full else "mend that"
        return f"{kept}{what} and run again with --resume"


def _write_score(folder: Path, step: int, score: float) -> None:
    cache.write_atomically(folder / _SCORE, json.dumps({"step": step, "loss": score}) + "\n")


def _copied(state: State) -> State:
    """The state, safe from donation: Orbax writes from the CPU device's own memory."""
    if jax.default_backend() != "cpu":
        return state
    return jax.tree.map(lambda x: x.copy(), state)


def _on_device(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _laid_out(array: jax.Array, shape: Any) -> jax.Array:
    """The array in the shape's layout, of which Orbax knows nothing."""
    if shape.format.layout is None:
        return array
    return jax.device_put(array, shape.format, donate=True)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
