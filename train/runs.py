"""A finished or unfinished run, or a pretrained model, as a model that can be used."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from models import llama
from models.config import LlamaConfig
from optax_subspace import dequantize
from train import cache, weights
from train.config import LoraConfig
from train.errors import UsageError, one_line
from train.fingerprint import leaves_of
from train.step import kernels_in_int8, with_adapters, without_adapters
from train.tokenizer import BYTES, Tokenizer, open_tokenizer, start_of


class Loaded(NamedTuple):
    """A model with all that its use takes."""

    name: str
    config: LlamaConfig
    params: Any  # plain arrays: adapters merged, factors multiplied, int8 weights dequantised
    tokenizer: Tokenizer
    context: int  # the longest sequence that it was made for, in tokens
    start: tuple[int, ...]  # what stands before a text


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return (path / "checkpoints").is_dir()


def load(path: str, step: int | None = None) -> Loaded:
    """The model of a run's folder, a Hugging Face folder or a .gguf file.

    Args:
      path: of any of the three.
      step: of a run, the checkpoint; None is the newest good one.

    Raises:
      UsageError: nothing is there, it is damaged, or it has no tokenizer.
    """
    place = Path(path)
    if is_run(place):
        return _of_run(place, step)
    if step is not None:
        raise UsageError(f"--step {step}: {path} is no run, which alone has steps; leave it out")
    header = weights.header(path, "")
    tokenizer = weights.tokenizer(path)
    if tokenizer is None:
        raise UsageError(
            f"{path}: has no {' or '.join(weights.TOKENIZERS)}; put the model's own beside it"
        )
    params = weights.read(path, header.config, "")
    name = weights.name(path)
    return Loaded(name, header.config, params, tokenizer, header.context, start_of(tokenizer))


def read_checkpoint(run: Path, step: int | None) -> tuple[int, dict[str, Any], Any]:
    """Step, fingerprint and parameters (as they were trained) of a run's checkpoint.

    Raises:
      UsageError: there is no such checkpoint, or it is damaged.
    """
    folder = run / "checkpoints"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    if step is not None and step not in steps:
        there = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
        raise UsageError(f"--step {step}: {run} has no checkpoint of that step; {there}")
    reason = "it has no checkpoint"
    for number in [step] if step is not None else steps[::-1]:
        place = (folder / str(number)).absolute()
        damage = cache.damage(place, place / cache.MANIFEST)
        if damage is None:
            try:
                found = _restore(place)
                if step is None and number < steps[-1]:
                    print(f"warning: {run}: {reason}; taking step {number}", file=sys.stderr)
                return number, *found
            except Exception as error:  # whatever Orbax, TensorStore or JSON find wrong
                damage = one_line(error)[:200]
        reason = f"its checkpoint of step {number} can't be used: {damage}"
    raise UsageError(f"{run}: {reason}; give another run, or train it further")


def _restore(place: Path) -> tuple[dict[str, Any], Any]:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        meta = reader.restore(place, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    config = meta["config"]
    shapes = jax.eval_shape(lambda: _params(config, meta.get("shards", 1)))
    for name, leaf in leaves_of({"params": shapes}).items():
        # Orbax would cast to other dtypes without a word.
        if meta["leaves"].get(name) != leaf:
            raise ValueError(
                f"it holds {name} as {meta['leaves'].get(name)} where this program has {leaf}"
            )
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_device),
        shapes,
    )
    # The optimizer's state, which is larger, is left where it is.
    args = ocp.args.PyTreeRestore(
        item={"params": target},
        restore_args=ocp.checkpoint_utils.construct_restore_args({"params": target}),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return meta, reader.restore(place / "state", args=args)["params"]


def _params(config: dict[str, Any], shards: int) -> Any:
    """Parameters of the shapes of a run with this flat configuration, on so many devices."""
    key = jax.random.key(0)
    params = llama.init_params(model_of(config), key)
    # (Runs from before there were factors say nothing of them.)
    factorize = config.get("lora.factorize", False)
    adapters = LoraConfig(config["lora.rank"], config["lora.alpha"], factorize=factorize)
    params = with_adapters(params, adapters, key)
    return kernels_in_int8(params, shards) if config["train.int8_weights"] else params


def model_of(config: dict[str, Any]) -> LlamaConfig:
    """The model's part of a flat configuration.

    >>> model_of({"model.hidden_size": 8, "model.num_heads": 2, "train.steps": 7}).head_dim
    4
    """
    return LlamaConfig(
        **{
            key.removeprefix("model."): value
            for key, value in config.items()
            if key.startswith("model.")
        }
    )


def _of_run(run: Path, step: int | None) -> Loaded:
    number, meta, params = read_checkpoint(run, step)
    config = meta["config"]
    params = jax.jit(lambda params: without_adapters(dequantize(params)))(params)
    name = f"{run.name or run.resolve().name}, step {number}"
    tokenizer = _tokenizer(run)
    # Packed documents follow the end of others, rows of one document what their tokenizer sets.
    packed = config.get("data.layout", "packed") == "packed"
    start = (tokenizer.end,) if packed else start_of(tokenizer)
    return Loaded(name, model_of(config), params, tokenizer, _context(run), start)


def _context(run: Path) -> int:
    about = run / weights.ABOUT
    length = _json(about).get("model_max_length")
    if not isinstance(length, int):
        raise UsageError(
            f'{about}: lacks "model_max_length"; give it there, the run\'s --train.sequence_length '
            "or more"
        )
    return length


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(f"{path}: is missing or damaged; copy it there again") from None
    return found if isinstance(found, dict) else {}


def _tokenizer(run: Path) -> Tokenizer:
    if _json(run / "config.json").get("data.tokenizer") == BYTES:
        return open_tokenizer(BYTES)
    for name in weights.TOKENIZERS:
        if (run / name).is_file():
            return open_tokenizer(str(run / name))
    raise UsageError(
        f"{run}: its tokenizer is missing ({' or '.join(weights.TOKENIZERS)}); copy it there"
    )
