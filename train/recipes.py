"""The published runs as experiments: GaLore's C4 pre-training and its baselines, and LOMO's.

Sources: GaLore (arXiv 2403.03507: tables 2 and 3, appendix C, and the public scripts), Online
Subspace Descent (2408.12857: tables 1 and 3), Q-GaLore (2407.08296), APOLLO (2412.05270, and its
public scripts), LOMO (2306.09782: tables 1 and 2, and the public configuration). A table below has
a row for each size, a function for each family has all that its sizes share.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from train.config import Config


class Experiment(NamedTuple):
    """A recipe, and what its header says."""

    summary: str  # one line for --help
    command: str  # that runs it, as in a shell
    memory: str
    result: str  # the published one, or the one to expect
    delta: Callable[[Config], Config]
    notes: str = ""
    family: str = "First steps"
    model: str | None = None  # the size that it is named for
    on_c4: bool = False  # its text has to be given, by --data.path


def change(config: Config, **groups: Mapping[str, Any]) -> Config:
    """`config` with the given fields of the given groups replaced.

    >>> change(Config(), train={"steps": 5}).train.steps
    5
    """
    parts = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in groups.items()
    }
    return dataclasses.replace(config, **parts)


class Size(NamedTuple):
    """What a size brings to the C4 recipe."""

    rank: int
    steps: int
    micro_batch: int  # sequences whose gradients are computed at once
    full_rate: float  # learning rate of full-rank Adam
    every: int = 200
    rate: float = 0.01
    clip_norm: float | None = None
    remat: bool = False


SIZES = {
    "60m": Size(128, 10_000, 128, 0.001),
    "130m": Size(256, 20_000, 64, 0.001),
    "350m": Size(256, 60_000, 32, 0.001),
    "1b": Size(512, 100_000, 16, 0.0005),
    "7b": Size(1024, 150_000, 16, 0.0005, 500, 0.005, 1.0, True),
}

# GiB of weights and optimizer state, of the trainer's own shapes.
GIB = {
    **{"galore-60m": 0.26, "galore-130m": 0.57, "galore-350m": 1.29, "galore-1b": 4.44},
    **{"galore-7b": 21.31, "galore8bit-1b": 3.64, "galore8bit-7b": 17.86},
    **{"galore8bit-7b-24gb": 10.62, "galore8bit-7b-batch1": 17.86, "apollo-mini-7b-12gb": 8.58},
    **{"osd-60m": 0.27, "osd-130m": 0.60, "osd-350m": 1.38, "osd-1b": 4.76},
    **{"osd-7b": 23.06, "osd8bit-7b": 17.86},
    **{"full-60m": 0.32, "full-130m": 0.75, "full-350m": 2.06, "full-1b": 7.48},
    **{"full-7b": 37.65, "full8bit-1b": 5.03, "full8bit-7b": 25.30},
    **{"lomo-7b": 12.55, "lomo-7b-sgd": 12.55, "lomo-7b-adamw": 37.65},
    **{"lomo-13b": 24.24, "lomo-30b": 60.59, "lomo-65b": 121.6},
}

# Perplexities on C4, by GaLore's paper and by that of Online Subspace Descent.
GALORE = {"60m": "34.88", "130m": "25.36", "350m": "18.95", "1b": "15.64"}
FULL = {"60m": "34.06", "130m": "25.08", "350m": "18.80", "1b": "15.56"}
ONLINE = {
    "60m": ("56.12", "57.03"),
    "350m": ("43.67", "44.34"),
    "1b": ("31.30", "35.52"),
    "7b": ("43.72", "51.21"),
}
LATER = "validation perplexity {}, {}, {} and {} after 40K, 80K, 120K and 150K steps"
GALORE_7B = LATER.format(17.94, 15.39, 14.95, 14.65) + ", with 8-bit moments"
FULL_7B = LATER.format(18.09, 15.47, 14.83, 14.61) + ", with 8-bit moments"
# Weights and states, all in bfloat16, as the paper estimates them in G.
GALORE_G = {"60m": "0.24 G", "130m": "0.52 G", "350m": "1.22 G", "1b": "4.38 G"}
FULL_G = {"60m": "0.36 G", "130m": "0.76 G", "350m": "2.06 G", "1b": "7.80 G"}

Entries = Iterator[tuple[str, Experiment]]
Settings = dict[str, Any]


def published() -> dict[str, Experiment]:
    """All experiments of this file by name, family after family.

    >>> published()["galore-60m"].delta(Config()).optimizer.rank
    128
    """
    return dict(itertools.chain(_galore(), _online(), _full(), _one_card(), _lomo()))


def _galore() -> Entries:
    family = "GaLore on C4"
    for name, size in SIZES.items():
        result = f"validation perplexity {GALORE[name]}" if name in GALORE else GALORE_7B
        estimate = GALORE_G.get(name, "")
        summary = f"GaLore at rank {size.rank}"
        half = {"moment_dtype": "bfloat16", "projector_dtype": "bfloat16"}
        settings = _galore_settings(size, **half)
        yield _on_c4("galore", name, family, summary, estimate, result, settings)

    eight = {"name": "galore_adamw8bit", "projector_dtype": "bfloat16"}
    summary = "the same with moments in 8 bits"
    result = "17 % fewer tokens/s than 8-bit Adam (full8bit-1b)"
    settings = _galore_settings(SIZES["1b"], **eight)
    yield _on_c4("galore8bit", "1b", family, summary, "", result, settings)
    settings = _galore_settings(SIZES["7b"], **eight)
    yield _on_c4("galore8bit", "7b", family, summary, "18 G", GALORE_7B, settings)

    few = {"name": "galore_adamw8bit", "projector_dtype": "linear4"}
    summary = "the same on one card of 24 GB: updates layer by layer"
    estimate = (
        "in a step of 16 sequences, which the public scripts do not add up to 512, 22.8 G; with "
        "kernels in int8 and bases in 4 bits, as here, Q-GaLore's 15.26 G"
    )
    # (Of micro-batches in the fused step no norm is known in time. In the public layer-wise mode
    # clipping does nothing either.)
    settings = _galore_settings(SIZES["7b"], **few) | {"clip_norm": None}
    yield _on_c4(
        *("galore8bit", "7b", family, summary, estimate, GALORE_7B, settings),
        train={"fused_backward": True, "int8_weights": True},
        suffix="-24gb",
        notes="The sums of the micro-batches' gradients take 7 GiB more, and one micro-batch 2.3",
    )


def _online() -> Entries:
    family = "Online Subspace Descent on C4"
    notes = (
        "The recipe is GaLore's, so that it compares with galore-{0} and full-{0}; the published "
        "figure is of 10K steps at rank 512, from another pipeline"
    )
    for name, size in SIZES.items():
        result = "perplexity below GaLore's at every size that was tried"
        if name in ONLINE:
            result = "perplexity {} where GaLore has {} (arXiv 2408.12857)".format(*ONLINE[name])
        summary = f"a basis that follows every gradient, rank {size.rank}"
        # The bases stay in float32: in bfloat16 the small steps of other rules than the default
        # vanish, as they do in the public code.
        settings = _subspace(size, "online_subspace_descent", moment_dtype="bfloat16")
        remark = notes.format(name)
        yield _on_c4("osd", name, family, summary, "", result, settings, notes=remark)
    settings = _subspace(SIZES["7b"], "online_subspace_adamw8bit", projector_dtype="bfloat16")
    result = "perplexity {} where GaLore has {} (arXiv 2408.12857)".format(*ONLINE["7b"])
    summary, remark = "the same with moments in 8 bits", notes.format("7b")
    yield _on_c4("osd8bit", "7b", family, summary, "", result, settings, notes=remark)


def _full() -> Entries:
    family = "Full-rank Adam on C4, the baseline"
    notes = "The paper tuned the rate for each size and says no more than `at most 0.001`: sweep it"
    for name, size in SIZES.items():
        result = f"validation perplexity {FULL[name]}" if name in FULL else FULL_7B
        estimate = FULL_G.get(name, "")
        settings = {"name": "adamw", "learning_rate": size.full_rate, "eps": 1e-8}
        yield _on_c4("full", name, family, "AdamW", estimate, result, settings, notes=notes)
    for name, estimate in (("1b", ""), ("7b", "26 G")):
        settings = {"name": "adamw8bit", "learning_rate": SIZES[name].full_rate, "eps": 1e-8}
        result = FULL_7B if name == "7b" else "the yardstick of galore8bit-1b's tokens/s"
        summary = "the same with moments in 8 bits"
        yield _on_c4("full8bit", name, family, summary, estimate, result, settings, notes=notes)


def _one_card() -> Entries:
    """The public scripts that step at every sequence, on the gradient of one layer at a time."""
    family = "C4 on one card, a step at every sequence"
    single = {"batch_size": 1, "micro_batch_size": None, "fused_backward": True}
    notes = (
        "A step is 256 tokens, where the published perplexities are of 131,072: for its memory, "
        "or with a rate swept for such steps"
    )
    eight = {"name": "galore_adamw8bit", "projector_dtype": "bfloat16"}
    settings = _galore_settings(SIZES["7b"], **eight) | {"clip_norm": None}
    result = "fits one card of 24 GB without activation checkpointing"
    summary = f"GaLore at rank {SIZES['7b'].rank}, moments in 8 bits"
    yield _on_c4(
        *("galore8bit", "7b", family, summary, "22.72 G in a step", result, settings),
        train=single,
        remat=False,
        suffix="-batch1",
        notes=notes,
    )
    mini = {"name": "apollo_mini", "learning_rate": 0.01, "every": 200, "clip_norm": None}
    result = "fits one card of 12 GB (Q-APOLLO-Mini)"
    summary = "APOLLO-Mini, kernels in int8"
    yield _on_c4(
        *("apollo-mini", "7b", family, summary, "less than 12 G in a step", result, mini),
        train=single | {"int8_weights": True},
        suffix="-12gb",
        notes=notes,
    )


def _galore_settings(size: Size, name: str = "galore", **more: object) -> Settings:
    return _subspace(size, name, every=size.every, **more)


def _subspace(size: Size, name: str, **more: object) -> Settings:
    settings = {"name": name, "learning_rate": size.rate, "rank": size.rank, "scale": 0.25}
    return settings | more


def _on_c4(
    prefix: str,
    size: str,
    family: str,
    summary: str,
    estimate: str,
    result: str,
    optimizer: Settings,
    train: Settings | None = None,
    remat: bool | None = None,
    suffix: str = "",
    notes: str = "",
) -> tuple[str, Experiment]:
    """An experiment of the C4 recipe: 512 documents a step, each cut or padded to 256 tokens."""
    name, row = f"{prefix}-{size}{suffix}", SIZES[size]
    half = {"param_dtype": "bfloat16", "dtype": "bfloat16"}

    def delta(config: Config) -> Config:
        data = {"layout": "documents", "validation_tokens": 10_000_000}
        micro = {"micro_batch_size": row.micro_batch}
        return change(
            config,
            model=half | {"remat": row.remat if remat is None else remat},
            optimizer=SCHEDULE | {"clip_norm": row.clip_norm} | optimizer,
            data=data,
            train=ROWS | {"steps": row.steps} | micro | (train or {}),
            checkpoint={"every": 1000},
            log={"every": 10, "print_every": 100},
        )

    text = (
        "--data.path 'c4-train.*.json.gz' --data.validation_path 'c4-validation.*.json.gz' "
        "--data.tokenizer spiece.model"
    )
    return name, Experiment(
        summary=f"{summary}, {row.steps:,} steps",
        command=f"python -m train --experiment {name} {text}",
        memory=_memory(name, estimate),
        result=result,
        delta=delta,
        notes=notes,
        family=family,
        model=size,
        on_c4=True,
    )


SCHEDULE = {"weight_decay": 0.0, "warmup_fraction": 0.1, "final_fraction": 0.1}
ROWS = {"batch_size": 512, "sequence_length": 256, "eval_every": 1000}


def _lomo() -> Entries:
    cards = {"7b": "one card", "13b": "2 cards", "30b": "4 cards", "65b": "8 cards"}
    for size, count in cards.items():
        result = f"trained on {count} of 24 GB"
        if size == "7b":
            result = "14.58 GB in a step: parameters 12.55, gradients 0.24, activations 1.79"
        if size == "65b":
            result += ", 4.93 tokens/s on each"
        yield _fine_tuning(f"lomo-{size}", size, "updates in the backward pass", result, fused=True)
    yield _fine_tuning("lomo-7b-sgd", "7b", "plain gradient descent", "51.99 GB in a step")
    adamw = {"name": "adamw", "learning_rate": 2e-5, "eps": 1e-8}
    yield _fine_tuning("lomo-7b-adamw", "7b", "AdamW, the baseline", "102.20 GB in a step", adamw)


def _fine_tuning(
    name: str,
    size: str,
    summary: str,
    result: str,
    optimizer: Settings | None = None,
    fused: bool = False,
) -> tuple[str, Experiment]:
    """An experiment of LOMO's recipe: 8 sequences of 512 tokens, ten times 1,000 examples."""
    # Rate, warm-up and norm of the public configuration, whose decay is linear.
    lomo = {"name": "lomo", "learning_rate": 0.03, "clip_norm": 1.0}
    schedule = {"weight_decay": 0.0, "warmup_fraction": 0.1, "final_fraction": 0.0}

    def delta(config: Config) -> Config:
        return change(
            config,
            model={"param_dtype": "bfloat16", "dtype": "bfloat16", "remat": True},
            optimizer=schedule | lomo | (optimizer or {}),
            data={"layout": "documents"},
            train={
                "steps": 1250,
                "batch_size": 8,
                "sequence_length": 512,
                "eval_every": 125,
                "fused_backward": fused,
            },
            checkpoint={"every": 125},
        )

    return name, Experiment(
        summary=f"{summary}, 1,250 steps of 8 x 512 tokens",
        command=f"python -m train --experiment {name} --model PATH --data.path examples.jsonl",
        memory=_memory(name),
        result=result,
        delta=delta,
        notes="PATH is the folder of the weights to begin with",
        family="LOMO, fine-tuning",
        model=size,
    )


def _memory(name: str, estimate: str = "") -> str:
    published = f" (published: {estimate})" if estimate else ""
    return f"{GIB[name]:.2f} GiB of weights and optimizer state{published}"
