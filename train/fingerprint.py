"""What two runs must share for one to go on with the other's checkpoint."""

from pathlib import Path
from typing import Any

import jax

from train.config import Config, flatten
from train.errors import UsageError
from train.step import State

# Keys that change neither the parameters nor the metrics up to a given step, or, as another number
# of devices does, no more than the order of sums (what the paths of the data lead to is in the
# corpus' key).
_FREE: tuple[str, ...] = (
    *("run_dir", "resume", "compile_only", "topology", "mesh.", "weights", "checkpoint."),
    *("log.print_every", "log.tensorboard", "data.path", "data.validation_path"),
    *("data.tokenizer", "data.tfds_dir", "data.bad_shards", "data.cache_dir"),
)


def fingerprint(
    config: Config,
    corpus_key: str,
    state: State,
    weights_key: str | None = None,
    shards: int = 1,
) -> dict[str, Any]:
    """What two runs must share for one to go on with the other's checkpoint, as JSON.

    `weights_key` tells the pretrained weights that a run began from; None is random ones. Blocks of
    few bits keep to each of `shards` parts: where these differ, `leaves` may.
    """
    # (In a fused step what micro-batches add up to is part of the state.)
    free = _FREE if config.train.fused_backward else (*_FREE, "train.micro_batch_size")
    keys = {key: value for key, value in flatten(config).items() if not key.startswith(free)}
    found = {"config": keys, "corpus": corpus_key, "weights": weights_key}
    return {**found, "leaves": leaves_of(state), "shards": shards}


def leaves_of(state: Any) -> dict[str, list[Any]]:
    """Dtype and shape of each array by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [str(leaf.dtype), *leaf.shape]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def check(where: Path, meta: dict[str, Any], identity: dict[str, Any]) -> None:
    """Compares all but the leaves of a checkpoint's fingerprint with this run's.

    Raises:
      UsageError: naming the checkpoint, what differs, and the remedy.
    """
    old, new = meta["config"], identity["config"]
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
    if meta["corpus"] != identity["corpus"]:
        raise UsageError(
            f"{where} was trained on another text or tokenizer than --data.path gives now; "
            "give that text, or begin a new run in another --run_dir"
        )
    if meta.get("weights") != identity["weights"]:
        raise UsageError(
            f"{where} began from other weights than --weights gives now; give those, or begin "
            "a new run in another --run_dir"
        )
