"""The configuration: one tree of frozen dataclasses, and the checks on it.

The field descriptions below are what `python -m train --help` shows.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from models.config import LlamaConfig
from train.errors import UsageError

Side = Literal["shorter", "longer", "left", "right", "both", "auto"]
Code = Literal["dynamic", "linear", "float8_e4m3fn", "float8_e5m2", "dynamic4", "linear4"]
Storage = Literal["float32", "bfloat16"] | Code


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal[
        "galore",
        "galore_adamw8bit",
        "online_subspace_descent",
        "online_subspace_adamw8bit",
        "adamw",
        "adamw8bit",
        "lomo",
        "adalomo",
    ] = "galore"
    """galore: Adam in a low-rank subspace of each gradient; online_subspace_descent: in one that
    follows every gradient; adamw: the full-rank baseline; 8bit: with moments in 8 bits; lomo:
    gradient descent; adalomo: with factored second moments, in the fused backward pass alone"""
    learning_rate: float | None = None
    """Peak of the schedule; None is the optimizer's own: 0.01 in a subspace, 0.003 for adamw, 0.5
    for lomo, 0.01 for adalomo"""
    kinetic: Literal["adam", "heavy_ball", "nesterov", "lion"] = "adam"
    """galore, online_subspace_descent: the momentum method within the subspace, as a Hamiltonian
    descent; b1 and b2 are those of its peer in optax, of which the balls read b1 alone"""
    rank: int = 32
    """In a subspace: its dimension"""
    every: int = 50
    """galore: steps from one projector to the next"""
    scale: float = 0.25
    """In a subspace: factor on the lifted update; learning_rate x scale is the effective rate"""
    side: Side = "shorter"
    """In a subspace: side of each matrix that is projected"""
    projector_dtype: Storage = "float32"
    """In a subspace: how the bases are stored; 4 and 8 bits have a scale for each 256 values"""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """galore, online_subspace_descent: how the moments are stored; those of adamw have the dtype of
    the parameters"""
    code: Code = "dynamic"
    """8bit: how the moments are stored; of linear, float8_e4m3fn and the 4-bit codes, which lose
    small squares, the first moments alone, and the second ones in dynamic"""
    b1: float = 0.9
    """Decay of the first moment"""
    b2: float = 0.999
    """Decay of the second moment"""
    eps: float = 1e-6
    """Added to the root of the second moment"""
    weight_decay: float = 0.0
    """Decoupled weight decay, on all parameters"""
    clip_norm: float | None = 1.0
    """Global norm to which gradients are clipped; None does not clip, which saves the fused
    backward pass its first walk"""
    warmup_fraction: float = 0.1
    """Share of the steps in which the learning rate rises linearly"""
    final_fraction: float = 0.1
    """Learning rate at the end of the cosine, as a share of the peak"""


GALORE = ("galore", "galore_adamw8bit")
SUBSPACE = (*GALORE, "online_subspace_descent", "online_subspace_adamw8bit")
ADAMW = ("adamw", "adamw8bit")
MOMENTA = (*SUBSPACE, *ADAMW)
FIRST_MOMENTS_ALONE = ("linear", "float8_e4m3fn", "dynamic4", "linear4")  # else Adam diverges
EIGHT_BIT = ("galore_adamw8bit", "online_subspace_adamw8bit", "adamw8bit")

# Fields that some optimizers alone read: giving them to another one is refused.
READ_BY = {
    **dict.fromkeys(("rank", "scale", "side", "projector_dtype"), SUBSPACE),
    "every": GALORE,
    "code": EIGHT_BIT,
    **dict.fromkeys(("kinetic", "moment_dtype"), ("galore", "online_subspace_descent")),
    **dict.fromkeys(("b1", "b2", "eps"), MOMENTA),
}

DEFAULT_LEARNING_RATE = {
    **dict.fromkeys(SUBSPACE, 0.01),
    **dict.fromkeys(ADAMW, 0.003),
    "lomo": 0.5,
    "adalomo": 0.01,
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the kernels of the layers, trained by AdamW."""

    rank: int = 0
    """Dimension of the adapters; 0 is none"""
    alpha: float = 16.0
    """Their product is scaled by alpha / rank"""
    learning_rate: float = 0.001
    """Peak of their own schedule"""
    only: bool = False
    """Train the adapters alone; otherwise all other weights too, by the optimizer"""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, its split and the tokenizer."""

    path: str | None = None
    """A .txt file (documents: paragraphs between blank lines) or a folder of .txt files
    (documents: files); JSON lines with text, or with prompt and completion (.jsonl, .json, or
    either with .gz: a file, folder, glob, or glob under gs:// or hf://); tfds:c4/en, as
    tensorflow-datasets prepared it; None is the embedded corpus, addresses of American presidents
    (State of the Union)"""
    tfds_dir: str | None = None
    """tfds: folder of the prepared data sets; None is tensorflow-datasets' own"""
    validation_path: str | None = None
    """Held-out documents of their own, in any of these forms; documents of path with the same text
    are left out of training. None is the split validation of tfds, else a part of path"""
    validation_fraction: float = 0.1
    """Without validation_path: share of the documents that is held out"""
    split_seed: int = 0
    """Without validation_path: chooses which documents are held out"""
    validation_tokens: int | None = None
    """Tokens after which no more held-out documents are scored (papers: 10M); None scores all"""
    bad_shards: Literal["refuse", "skip"] = "refuse"
    """What becomes of a file of JSON lines that is truncated, corrupt or gone: end with a message,
    or leave it out with a warning"""
    tokenizer: str | None = None
    """A SentencePiece .model, a Hugging Face tokenizer.json, a folder with one, or `bytes`; None
    trains SentencePiece once on the training split"""
    vocab_size: int = 4096
    """Without tokenizer: pieces that are trained"""
    layout: Literal["packed", "documents"] = "packed"
    """packed: documents joined end to end and cut into sequences; documents: one a sequence, cut or
    padded, the padding masked in the loss and counted in the tokens of a step (GaLore's own
    pipeline); examples of prompt and completion take it, and their completions alone are scored"""
    segments: bool = False
    """packed: tokens attend within their own document only"""
    cache_dir: str = ".cache/optax-subspace"
    """Where the tokenizer, records, indexes and remote files are kept for the next run"""


def kind_of_path(path: str | None) -> Literal["text", "tfds", "shards"]:
    """What `--data.path` names, by its spelling and by what lies there.

    >>> kind_of_path("tfds:c4/en"), kind_of_path("c4/c4-train.*.json.gz"), kind_of_path("a.txt")
    ('tfds', 'shards', 'text')
    """
    if path is None:
        return "text"
    if path.startswith("tfds:"):
        return "tfds"
    lines = (".jsonl", ".json", ".gz")
    if "://" in path or "*" in path or path.endswith(lines):
        return "shards"
    place = Path(path)
    if place.is_dir() and any(p.name.endswith(lines) for p in place.rglob("*")):
        return "shards"
    return "text"


def unread_data_keys(data: DataConfig) -> dict[str, str]:
    """Fields of the data's configuration that nothing reads beside the others, and why.

    >>> sorted(unread_data_keys(DataConfig(tokenizer="bytes")))
    ['bad_shards', 'tfds_dir', 'vocab_size']
    """
    unread = {}
    kinds = {kind_of_path(data.path)}
    if data.validation_path is not None:
        kinds.add(kind_of_path(data.validation_path))
    if "tfds" not in kinds:
        unread["tfds_dir"] = "no path begins with tfds:"
    if "shards" not in kinds:
        unread["bad_shards"] = "there are no JSON lines to read"
    if data.tokenizer is not None:
        unread["vocab_size"] = "--data.tokenizer has pieces of its own"
    if data.validation_path is not None or data.path is not None and data.path.startswith("tfds:"):
        unread |= dict.fromkeys(
            ("validation_fraction", "split_seed"), "the held-out documents are given"
        )
    return unread


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of the run, batches and evaluation."""

    steps: int = 350
    """Optimizer steps"""
    batch_size: int = 8
    """Sequences in a step, on all devices together"""
    micro_batch_size: int | None = None
    """Sequences that are computed at a time, on all devices together: a step adds up the gradients
    of as many parts as it takes; None is all at once"""
    sequence_length: int = 256
    """Tokens in a sequence"""
    seed: int = 0
    """Initial weights and order of the documents"""
    eval_every: int = 50
    """Steps between evaluations on a part of the held-out split; the end uses all of it"""
    eval_batches: int = 8
    """Batches in such an evaluation"""
    int8_weights: bool = False
    """Keep the kernels of the layers in int8, with a scale for each 256 values"""
    fused_backward: bool = False
    """Update each layer within the backward pass, so that the gradient tree never exists (nor can
    the energy in its subspaces be logged); with --model.remat each block is computed anew there"""
    project_at_source: bool = False
    """In a subspace: make the projected gradients from the layers' inputs and output cotangents,
    and never form full ones, which takes fewer operations and less memory; the logged norm, and the
    one to clip by, are then those of the low-rank gradients"""
    stochastic_rounding: bool = True
    """Round new weights of bfloat16, float16 or int8 such that small steps count in the mean"""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Saving the run."""

    every: int = 100
    """Steps between checkpoints; the last step always has one"""
    keep: int = 2
    """Newest checkpoints that are kept"""
    keep_best: int = 0
    """Checkpoints that are kept beside them: those of the lowest validation loss among the
    evaluations on a part of the held-out split, each of which is saved if it is among them"""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work: all of them split the sequences of a step."""

    data: int | None = None
    """Groups of devices that each hold all of the model; None is what --mesh.fsdp leaves"""
    fsdp: int | None = None
    """Devices that split the weights and the optimizer state; None is what --mesh.data leaves, and
    1 if that is not given either (with --compile_only: all)"""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written and printed on the way."""

    every: int = 1
    """Steps between rows of metrics.jsonl"""
    print_every: int = 25
    """Steps between printed lines (where there is no progress bar) and rows of throughput.jsonl"""
    tensorboard: bool = False
    """Write event files for TensorBoard beside, into the run's folder tensorboard"""
    hamiltonian: bool = False
    """At each evaluation, the energy of the optimizer as a system with friction: the validation
    loss, which stands in for the loss that is descended, and the momenta's kinetic energy"""


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    model: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    weights: str | None = None
    """Hugging Face folder or .gguf file that the first weights come from, and the tokenizer unless
    one is named; --model PATH gives it along with the model's configuration"""
    run_dir: str | None = None
    """Folder of this run; None is a new one, runs/EXPERIMENT-MODEL-OPTIMIZER[-N]"""
    resume: bool = False
    """Go on from the newest good checkpoint of the run"""
    compile_only: bool = False
    """Compile the step and print its memory and its traffic between devices; no data is read"""
    topology: str | None = None
    """The TPU slice to compile for, which this machine need not have, e.g. v5e:4x4 (needs the extra
    aot); None is this machine's own devices"""


def resolve(config: Config) -> Config:
    """Fills in the defaults that depend on other fields."""
    optimizer = config.optimizer
    if optimizer.learning_rate is None and optimizer.name in DEFAULT_LEARNING_RATE:
        rate = DEFAULT_LEARNING_RATE[optimizer.name]
        optimizer = dataclasses.replace(optimizer, learning_rate=rate)
    return dataclasses.replace(config, optimizer=optimizer)


def validate(config: Config) -> None:
    """Raises UsageError for the first value that can't work; nothing is allocated before."""
    for key, fewest in _WHOLE_NUMBERS.items():
        value = get(config, key)
        if value is None and key in _OPTIONAL:
            continue
        if not fewest <= value <= _INT32_MAX:
            limit = "" if value < fewest else f" and at most {_INT32_MAX}"
            raise UsageError(f"--{key} {value}: give a whole number of at least {fewest}{limit}")
    for key, (low, high, closed) in _RANGES.items():
        number = get(config, key)
        if number is None and key == "optimizer.clip_norm":
            continue
        least = low if closed else max(low, _FLOAT32_TINY)
        if number is None or not least <= number <= high:
            words = f"at least {low:g}" if closed else f"above {low:g}"
            if number is not None and low < number < least:
                words = f"of at least {least:g}"
            limit = f" and at most {high:g}" if high < _FLOAT32_MAX or (number or 0) > high else ""
            raise UsageError(f"--{key} {number}: give a number {words}{limit}")
    for key in ("optimizer.b1", "optimizer.b2"):
        if get(config, key) >= 1:
            raise UsageError(f"--{key} {get(config, key)}: give a number below 1, e.g. 0.9")
    if config.optimizer.name == "adalomo" and not config.train.fused_backward:
        raise UsageError(
            "--optimizer.name adalomo: takes each layer's matrices one by one, which only the "
            "fused backward pass does here; add --train.fused_backward"
        )
    if config.log.hamiltonian and (config.optimizer.name not in MOMENTA or config.lora.rank):
        what = (
            "adapters have a learning rate of their own"
            if config.lora.rank
            else (f"{config.optimizer.name} has no momentum, and so no kinetic energy")
        )
        raise UsageError(f"--log.hamiltonian: {what}; leave it out")
    if config.log.hamiltonian and config.train.eval_every >= config.train.steps:
        raise UsageError(
            f"--log.hamiltonian: is measured at evaluations on a part of the held-out split, of "
            f"which --train.eval_every {config.train.eval_every} leaves none; give fewer than the "
            f"{config.train.steps} steps of the run"
        )
    _validate_source(config)
    _validate_micro_batches(config)
    if config.topology is not None and not config.compile_only:
        raise UsageError(f"--topology {config.topology}: is compiled for alone; add --compile_only")
    if config.lora.only and not config.lora.rank:
        raise UsageError("--lora.only: there are no adapters to train; give --lora.rank, e.g. 8")
    if config.data.segments and config.data.layout != "packed":
        raise UsageError(
            "--data.segments: with --data.layout documents each sequence is one document; leave it "
            "out"
        )
    most = config.data.validation_tokens
    if most is not None and most < 1:
        raise UsageError(f"--data.validation_tokens {most}: give a whole number of at least 1")
    if config.data.validation_fraction >= 1:
        raise UsageError(
            f"--data.validation_fraction {config.data.validation_fraction}: leaves nothing to "
            "train on; give a number below 1, e.g. 0.1"
        )
    if config.data.tokenizer is None and config.data.vocab_size > config.model.vocab_size:
        raise UsageError(
            f"--data.vocab_size {config.data.vocab_size}: the tokenizer would have more pieces "
            f"than the model has embeddings; give at most --model.vocab_size "
            f"{config.model.vocab_size}"
        )


def _validate_source(config: Config) -> None:
    if not config.train.project_at_source:
        return
    key = "--train.project_at_source"
    if config.optimizer.name not in SUBSPACE:
        raise UsageError(
            f"{key}: {config.optimizer.name} projects nothing; leave it out, or choose "
            f"--optimizer.name {SUBSPACE[0]}"
        )
    if config.lora.rank:
        raise UsageError(
            f"{key}: kernels with adapters are no plain products; leave one of them out"
        )
    if config.train.fused_backward and not config.model.remat:
        raise UsageError(
            f"{key}: in the fused backward pass blocks are computed anew; add --model.remat"
        )
    if config.model.dtype == "float16" and not config.train.fused_backward:
        raise UsageError(
            f"{key}: small gradients of float16 need the loss scale of --train.fused_backward; "
            "add it, or give --model.dtype bfloat16"
        )


def _validate_micro_batches(config: Config) -> None:
    size, rows = config.train.micro_batch_size, config.train.batch_size
    if size is None:
        return
    key = f"--train.micro_batch_size {size}"
    if rows % size:
        divisors = [n for n in range(1, rows + 1) if rows % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - size))
        raise UsageError(
            f"{key}: does not divide --train.batch_size {rows}; give a divisor, e.g. {nearest}"
        )
    one_pass = "fused_backward" if config.train.fused_backward else "project_at_source"
    if size == rows or not getattr(config.train, one_pass):
        return
    # What is added up in such a pass is what the optimizer keeps of a gradient.
    if config.optimizer.name not in SUBSPACE or config.lora.rank:
        what = "adapters" if config.lora.rank else config.optimizer.name
        raise UsageError(
            f"{key}: {what} would need the whole gradient tree, which --train.{one_pass} never "
            f"has; leave one of the two out, or train without adapters by one of "
            f"{', '.join(SUBSPACE)}"
        )
    if config.optimizer.clip_norm is not None:
        raise UsageError(
            f"{key}: the gradient's norm is not known before the last micro-batch, by which "
            f"--train.{one_pass} has let go of the first; add --optimizer.clip_norm None"
        )
    if config.model.dtype == "float16":
        raise UsageError(
            f"{key}: a micro-batch that overflows would be left out of its step; with "
            f"--train.{one_pass} give --model.dtype bfloat16"
        )


# Every byte is a piece, so that no text is lost; the rest is for what the corpus repeats.
LEAST_PIECES = 260
_INT32_MAX = 2**31 - 1
# Beyond these the arithmetic, which is float32, has infinity or zero.
_FLOAT32_MAX, _FLOAT32_TINY = 3.4028234e38, 1.1754944e-38

_WHOLE_NUMBERS = {
    "optimizer.rank": 1,
    "optimizer.every": 1,
    "lora.rank": 0,
    "data.vocab_size": LEAST_PIECES,
    "data.split_seed": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.micro_batch_size": 1,
    "train.sequence_length": 2,
    "train.seed": 0,
    "train.eval_every": 1,
    "train.eval_batches": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "checkpoint.keep_best": 0,
    "mesh.data": 1,
    "mesh.fsdp": 1,
    "log.every": 1,
    "log.print_every": 1,
}

_OPTIONAL = ("train.micro_batch_size", "mesh.data", "mesh.fsdp")

# key: lowest, highest, whether the lowest itself is allowed.
_RANGES = {
    "optimizer.learning_rate": (0.0, _FLOAT32_MAX, False),
    "optimizer.scale": (0.0, _FLOAT32_MAX, False),
    "optimizer.b1": (0.0, 1.0, True),
    "optimizer.b2": (0.0, 1.0, True),
    "optimizer.eps": (0.0, _FLOAT32_MAX, False),
    "optimizer.weight_decay": (0.0, _FLOAT32_MAX, True),
    "optimizer.clip_norm": (0.0, _FLOAT32_MAX, False),
    "optimizer.warmup_fraction": (0.0, 1.0, True),
    "optimizer.final_fraction": (0.0, 1.0, True),
    "lora.alpha": (0.0, _FLOAT32_MAX, False),
    "lora.learning_rate": (0.0, _FLOAT32_MAX, False),
    "data.validation_fraction": (0.0, 1.0, False),
}


def get(config: Config, key: str):
    """The value of a dotted key.

    >>> get(Config(), "train.steps")
    350
    """
    value = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def flatten(config: Config) -> dict[str, object]:
    """All values by dotted key, as JSON can hold them.

    >>> flatten(Config())["optimizer.rank"]
    32
    """
    flat: dict[str, object] = {}

    def walk(prefix: str, node) -> None:
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                walk(f"{prefix}{field.name}.", value)
            else:
                flat[prefix + field.name] = value

    walk("", config)
    return flat
