"""The configuration: one tree of frozen dataclasses.

The field descriptions below are what `python -m train --help` shows.
"""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from models.config import Frozen, LlamaConfig

Side = Literal["shorter", "longer", "left", "right", "both", "auto"]
Code = Literal["dynamic", "linear", "float8_e4m3fn", "float8_e5m2", "dynamic4", "linear4"]
Storage = Literal["float32", "bfloat16"] | Code
Periodic = Literal["svd", "subspace_iteration", "random_projection"]
Following = Literal["history_pca", "online_pca", "online_pca_lion", "online_pca_sgd", "oja"]


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
        "apollo",
        "apollo_mini",
        "fira",
        "adafactor",
        "lion",
        "sgd",
        "muon",
        "contrib_galore",
    ] = "galore"
    """galore: Adam in a low-rank subspace of each gradient; online_subspace_descent: in one that
    follows every gradient; adamw: the full-rank baseline; 8bit: with moments in 8 bits; lomo:
    gradient descent; adalomo: with factored second moments, in the fused backward pass alone;
    apollo, apollo_mini, fira: gradients scaled at full rank by what Adam does in a subspace; and
    optax's own adafactor, lion, sgd with momentum, muon, and contrib_galore, layer by layer"""
    learning_rate: float | None = None
    """Peak of the schedule; None is the optimizer's own: 0.01 in a subspace, 0.003 for adamw, 0.5
    for lomo and sgd, 0.01 for adalomo, adafactor and muon, 0.001 for lion"""
    kinetic: Literal["adam", "heavy_ball", "nesterov", "lion"] = "adam"
    """galore, online_subspace_descent: the momentum method within the subspace, as a Hamiltonian
    descent; b1 and b2 are those of its peer in optax, of which the balls read b1 alone"""
    rank: int = 32
    """In a subspace: its dimension"""
    projector: Periodic | Following | None = None
    """In a subspace: the rule that finds the bases; online_pca_lion and online_pca_sgd move them by
    these instead of Adam. None is the optimizer's own: svd, online_subspace_descent: history_pca,
    apollo: random_projection of independent entries"""
    moments: Literal["keep", "project", "reset"] | None = None
    """In a subspace: what becomes of the moments when a basis changes; None keeps them"""
    every: int = 50
    """In a subspace, unless the projector follows every gradient: steps from one basis to the
    next"""
    scale: float | None = None
    """In a subspace: factor on the lifted update (apollo: on all of it); learning_rate x scale is
    the effective rate. None is the published one: 0.25, apollo 1, apollo_mini the root of 128.
    adamw: factor on the updates of the same kernels, before decay; None is 1"""
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
    b1: float | None = None
    """Decay of the first moment, and of sgd's, muon's and adafactor's momentum; None is 0.9, for
    muon 0.95"""
    b2: float | None = None
    """Decay of the second moment; None is 0.999, for lion 0.99"""
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
APOLLO = ("apollo", "apollo_mini")  # whose own random bases are not orthonormal
SCALED = (*APOLLO, "fira")  # gradients at full rank, by norms in a subspace
PROJECTED = (*SUBSPACE, *SCALED)
BASELINES = ("adafactor", "lion", "sgd", "muon", "contrib_galore")
FIRST_MOMENTS_ALONE = ("linear", "float8_e4m3fn", "dynamic4", "linear4")  # else Adam diverges
EIGHT_BIT = ("galore_adamw8bit", "online_subspace_adamw8bit", "adamw8bit")

# Fields that some optimizers alone read: giving them to another one is refused.
READ_BY = {
    "rank": (*SUBSPACE, "apollo", "fira", "contrib_galore"),
    "scale": (*PROJECTED, "contrib_galore", "adamw"),
    **dict.fromkeys(("side", "projector_dtype", "projector", "moments"), PROJECTED),
    "every": (*PROJECTED, "contrib_galore"),
    "code": EIGHT_BIT,
    **dict.fromkeys(("kinetic", "moment_dtype"), ("galore", "online_subspace_descent")),
    "b1": (*MOMENTA, *SCALED, *BASELINES),
    "b2": (*MOMENTA, *SCALED, "lion", "muon", "contrib_galore"),
    "eps": (*MOMENTA, *SCALED, "contrib_galore"),
}

DEFAULT_LEARNING_RATE = {
    **dict.fromkeys((*PROJECTED, "contrib_galore"), 0.01),
    **dict.fromkeys(ADAMW, 0.003),
    **dict.fromkeys(("lomo", "sgd"), 0.5),
    **dict.fromkeys(("adalomo", "adafactor", "muon"), 0.01),
    "lion": 0.001,
}


def follows_every_gradient(config: OptimizerConfig) -> bool:
    """Whether the bases have no period."""
    if config.projector is not None:
        return config.projector in get_args(Following)
    return config.name in SUBSPACE and config.name not in GALORE


DEFAULT_SCALE = {**dict.fromkeys((*ADAMW, "apollo"), 1.0), "apollo_mini": 128**0.5}  # else 0.25
DEFAULT_B1 = {"muon": 0.95}  # else 0.9
DEFAULT_B2 = {"lion": 0.99}  # else 0.999


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the kernels of the layers, trained by AdamW, or factors in their
    place."""

    rank: int = 0
    """Dimension of the adapters or factors; 0 is none"""
    alpha: float = 16.0
    """Their product is scaled by alpha / rank"""
    learning_rate: float = 0.001
    """Peak of their own schedule"""
    freeze: Frozen = "nothing"
    """What is not trained: nothing, the kernels that have adapters (as in pre-training by LoRA and
    ReLoRA: embedding, norms and head are trained by the optimizer), or all but the adapters"""
    merge_every: int = 0
    """ReLoRA: after so many steps the kernels take up the adapters' products and the adapters begin
    anew, with moments of zero; 0 is never"""
    rewarm_steps: int | None = None
    """ReLoRA: steps after each of these in which all learning rates rise again, linearly, to the
    cosine; None is a tenth of merge_every"""
    factorize: bool = False
    """Each kernel is the product of two factors of this rank, without a part of full rank and
    without adapters; the optimizer trains them. They begin as the best approximation of that rank
    to the kernel that would be there"""

    @property
    def adapts(self) -> bool:
        """Whether there are adapters."""
        return self.rank > 0 and not self.factorize


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, its split and the tokenizer."""

    path: str | None = None
    """A .txt file (documents: paragraphs between blank lines) or a folder of .txt files
    (documents: files); JSON lines with text, or with prompt and completion (.jsonl, .ndjson, .json,
    or these with .gz: a file, folder, glob, or glob under gs:// or hf://); tfds:c4/en, as
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
    >>> kind_of_path("a.ndjson"), kind_of_path("A.JSONL")
    ('shards', 'shards')
    """
    if path is None:
        return "text"
    if path.startswith("tfds:"):
        return "tfds"
    lines = (".jsonl", ".ndjson", ".json", ".gz")
    if "://" in path or "*" in path or path.lower().endswith(lines):
        return "shards"
    place = Path(path)
    if place.is_dir() and any(p.name.lower().endswith(lines) for p in place.rglob("*")):
        return "shards"
    return "text"


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
    name = config.optimizer.name
    own = {
        "learning_rate": DEFAULT_LEARNING_RATE[name],
        "scale": DEFAULT_SCALE.get(name, 0.25),
        "b1": DEFAULT_B1.get(name, 0.9),
        "b2": DEFAULT_B2.get(name, 0.999),
    }
    missing = {k: v for k, v in own.items() if getattr(config.optimizer, k) is None}
    optimizer = dataclasses.replace(config.optimizer, **missing)
    adapters = config.lora
    if adapters.merge_every and adapters.rewarm_steps is None:
        rewarm = max(1, adapters.merge_every // 10)
        adapters = dataclasses.replace(adapters, rewarm_steps=rewarm)
    return dataclasses.replace(config, optimizer=optimizer, lora=adapters)


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
