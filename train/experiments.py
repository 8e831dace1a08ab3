"""Recipes: each is a small delta on the configuration, chosen by `--experiment NAME`.

Further options on the command line change the result again:

    python -m train --model 9m --experiment quickstart --optimizer.rank 16

The recipes of the published runs are in `train.recipes`. One that is named for a size brings that
model; the others go with any `--model NAME`.
"""

import itertools
from collections.abc import Container

from train.config import Config
from train.errors import UsageError
from train.recipes import Experiment, change, published


def _quickstart(config: Config) -> Config:
    return change(
        config,
        optimizer={"name": "galore", "rank": 32, "every": 50},
        train={"steps": 350, "batch_size": 8, "sequence_length": 256},
    )


QUICKSTART = Experiment(
    summary="GaLore on the embedded corpus; a few minutes on two CPU cores",
    command="python -m train",
    memory="210 MiB in a step",
    result="validation perplexity about 102 where the unigram entropy of the same text gives 745; "
    "1.58 bits per byte; 2 to 4 minutes",
    delta=_quickstart,
)
EXPERIMENTS: dict[str, Experiment] = {"quickstart": QUICKSTART, **published()}


def header(name: str) -> str:
    """What an experiment is, its command, its memory and its result, in a few lines.

    >>> print(header("quickstart").splitlines()[1])
    Command: python -m train
    """
    entry = EXPERIMENTS[name]
    lines = [
        f"{name}: {entry.summary}.",
        f"Command: {entry.command}",
        f"Memory: {entry.memory}.",
        f"{'Published' if entry is not QUICKSTART else 'Result'}: {entry.result}.",
    ]
    return "\n".join(lines + ([f"{entry.notes}."] if entry.notes else []))


def listing() -> list[str]:
    """All experiments by family, in lines for `--help`."""
    lines = []
    width = max(map(len, EXPERIMENTS))
    for family, group in itertools.groupby(EXPERIMENTS, lambda name: EXPERIMENTS[name].family):
        lines.append(f"  {family}:")
        lines += [f"    {name:<{width}}  {EXPERIMENTS[name].summary}" for name in group]
    return lines


def model_of(name: str, default: str) -> str:
    """The model that an experiment is named for, or the default."""
    return EXPERIMENTS[name].model or default


def check_model(name: str, model: str, sizes: Container[str]) -> None:
    """Raises UsageError for another size than the one that an experiment is named for."""
    own = EXPERIMENTS[name].model
    # (A path is no size: weights of one's own may be trained by any recipe.)
    if own is None or model == own or model not in sizes:
        return
    family = name.removesuffix(own)
    sibling = f"choose --experiment {family}{model}" if family + model in EXPERIMENTS else ""
    raise UsageError(
        f"--model {model}: the experiment {name} is that of {own}; leave --model out"
        + (f", or {sibling}" if sibling else "")
    )


def check_text(name: str, config: Config) -> None:
    """Raises UsageError if the text or the tokenizer of a published run is not given.

    What is compiled alone reads neither.
    """
    if not EXPERIMENTS[name].on_c4 or config.compile_only:
        return
    if config.data.path is None:
        raise UsageError(
            f"--data.path: {name} trains on C4, which is not part of the trainer; get the "
            "c4-train.*.json.gz files of the dataset allenai/c4 (folder en) from the Hugging Face "
            "hub, and give their path"
        )
    if config.data.tokenizer is None:
        raise UsageError(
            f"--data.tokenizer: perplexities of {name} compare with the published ones under "
            "T5's tokenizer alone; give the path of t5-base's spiece.model, or of another one"
        )
