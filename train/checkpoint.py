"""Orbax checkpoints that are whole or absent, checked before use, and never of another run.

A checkpoint is saved under a temporary name, gets the checksums of its files, and is renamed last:
a killed process leaves no half of one under a step's name. It carries a fingerprint of the run,
which is compared before anything is restored, because Orbax casts silently to the target's dtypes
and drops what the target lacks.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from train import cache
from train.config import Config, flatten
from train.errors import UsageError, no_space, one_line
from train.memory import mebibytes
from train.step import State

_SAVING = ".saving-"
# Keys that change neither the parameters nor the metrics up to a given step
# (what the paths of the data lead to is in the corpus' key).
_FREE = (
    *("run_dir", "resume", "weights", "checkpoint.", "log.print_every", "log.tensorboard"),
    *("data.path", "data.validation_path", "data.tokenizer", "data.tfds_dir", "data.bad_shards"),
    "data.cache_dir",
)


def fingerprint(
    config: Config, corpus_key: str, state: State, weights_key: str | None = None
) -> dict[str, Any]:
    """What two runs must share for one to go on with the other's checkpoint, as JSON.

    `weights_key` tells the pretrained weights that a run began from; None is random ones.
    """
    keys = {key: value for key, value in flatten(config).items() if not key.startswith(_FREE)}
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): [str(leaf.dtype), *leaf.shape]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    return {"config": keys, "corpus": corpus_key, "weights": weights_key, "leaves": leaves}


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where they are.
      keep: how many of the newest are kept.
      identity: the run's `fingerprint`.
      say: is told, in a line, what had to be passed over.
    """

    def __init__(
        self, folder: Path, keep: int, identity: dict[str, Any], say: Callable[[str], None] = print
    ):
        # Orbax takes absolute paths only.
        self._folder = folder.absolute()
        self._shown = folder
        self._keep = keep
        self._identity = identity
        self._say = say
        self._orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, good or not, in order."""
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())

    def path(self, step: int) -> Path:
        """Where a step's checkpoint is, as it was spelled on the command line."""
        return self._shown / str(step)

    def save(self, step: int, state: State, data: Any) -> None:
        """Saves the state and the data iterator's position, then drops the oldest ones.

        Raises:
          UsageError: the disk is full; the checkpoints that were there still are.
        """
        target = self._folder / str(step)
        if target.exists():
            return
        temporary = self._folder / f"{_SAVING}{step}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._clear(temporary)
            self._orbax.save(
                temporary,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=grain.checkpoint.CheckpointSave(data),
                    meta=ocp.args.JsonSave(
                        {"step": step, "jax": jax.__version__, **self._identity}
                    ),
                ),
            )
            cache.write_checksums(temporary, temporary / cache.MANIFEST)
            temporary.rename(target)
        except Exception as error:
            self._clear(temporary)
            reason = no_space(error)
            if reason is None and not isinstance(error, OSError):
                raise
            free = shutil.disk_usage(_existing(self._folder)).free
            raise UsageError(
                f"couldn't save the checkpoint of step {step} in {self._shown}: "
                f"{reason or one_line(error)} ({mebibytes(free)} free); {self._remedy()}"
            ) from None
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self._folder / str(old), ignore_errors=True)

    def restore(self, shapes: State, data: Any) -> State | None:
        """The newest good checkpoint's state, with `data` moved to its position.

        Bad ones that are newer are moved to `damaged/` beside the folder, with a line about each.

        Returns:
          The state, or None if there never was a whole checkpoint.

        Raises:
          UsageError: the newest good checkpoint is of another run, or there are only bad ones.
        """
        for path in sorted(self._folder.glob(f"{_SAVING}*")):
            # Orbax writes under a temporary name of its own, which begins with the one given.
            name = path.name.removeprefix(_SAVING).partition(".")[0]
            self._say(f"the checkpoint of step {name} is half-written and was left out")
            shutil.rmtree(path)
        bad: list[int] = []
        for step in reversed(self.steps()):
            state, reason = self._try(step, shapes, data)
            if state is not None:
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

    def _try(self, step: int, shapes: State, data: Any) -> tuple[State | None, str]:
        folder = self._folder / str(step)
        if reason := cache.damage(folder, folder / cache.MANIFEST):
            return None, reason
        try:
            meta = self._orbax.restore(folder, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
            self._compare(step, meta["meta"])
            target = jax.tree.map(_on_device, shapes)
            restored = self._orbax.restore(
                folder,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target),
                    data=grain.checkpoint.CheckpointRestore(data),
                ),
            )
        except UsageError:
            raise
        except Exception as error:  # whatever Orbax, TensorStore or JSON find wrong with a file
            return None, f"{type(error).__name__}: {one_line(error)[:200]}"
        return restored["state"], ""

    def _compare(self, step: int, meta: dict[str, Any]) -> None:
        where = self.path(step)
        old, new = meta["config"], self._identity["config"]
        for key in [*new, *old]:
            if key not in old or key not in new:
                raise UsageError(
                    f"{where} was written by another version of the trainer (--{key} is "
                    f"{'unknown there' if key not in old else 'unknown here'}); "
                    "begin a new run in another --run_dir"
                )
            if old[key] != new[key]:
                raise UsageError(
                    f"{where} is of another configuration: --{key} is {old[key]} there and "
                    f"{new[key]} here; give the same value, or begin a new run in another --run_dir"
                )
        if meta["corpus"] != self._identity["corpus"]:
            raise UsageError(
                f"{where} was trained on another text or tokenizer than --data.path gives now; "
                "give that text, or begin a new run in another --run_dir"
            )
        if meta.get("weights") != self._identity["weights"]:
            raise UsageError(
                f"{where} began from other weights than --weights gives now; give those, or begin "
                "a new run in another --run_dir"
            )
        if meta["leaves"] != self._identity["leaves"]:
            theirs, ours = meta["leaves"], self._identity["leaves"]
            path = next(p for p in [*ours, *theirs] if theirs.get(p) != ours.get(p))
            raise UsageError(
                f"{where} holds {path} as {theirs.get(path)} where this program has "
                f"{ours.get(path)}; begin a new run in another --run_dir"
            )
        if meta["jax"] != jax.__version__:
            self._say(
                f"{where} was written under jax {meta['jax']} and goes on under "
                f"{jax.__version__}: the last bits may differ"
            )

    def _clear(self, temporary: Path) -> None:
        for path in self._folder.glob(f"{temporary.name}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _set_aside(self, step: int) -> None:
        aside = self._folder.parent / "damaged"
        aside.mkdir(exist_ok=True)
        target = aside / str(step)
        shutil.rmtree(target, ignore_errors=True)
        (self._folder / str(step)).rename(target)

    def _remedy(self) -> str:
        done = self.steps()
        kept = f"the checkpoint of step {done[-1]} is good; " if done else ""
        return f"{kept}free some space and run again with --resume"


def _on_device(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
