"""What the study of convergence compares: settings, methods with their rates, and ablations.

Words are those of `python -m train`, in which RANK and MERGE stand for numbers of the setting.
"""

import itertools
import shlex
from collections.abc import Sequence
from typing import NamedTuple

Rates = Sequence[float]


class Setting(NamedTuple):
    """Model, data and length of all runs."""

    words: str
    rank: int  # a quarter of the model's width
    steps: int
    batch_size: int
    length: int  # tokens in a sequence

    @property
    def all_words(self) -> str:
        """Of `python -m train`."""
        return (
            f"{self.words} --train.batch_size {self.batch_size} "
            f"--train.sequence_length {self.length} --train.steps {self.steps}"
        )


_TINY = (
    "--model tiny --model.num_layers 2 --model.hidden_size 64 --model.intermediate_size 176 "
    "--model.vocab_size 1024 --data.vocab_size 1024"
)
# Weights and so all moments in float32: optax keeps moments in the weights' dtype, in which
# bfloat16 squares do not decay, and this library does not.
_60M = "--model 60m --model.vocab_size 4096 --model.dtype bfloat16"
# The first reads 0.3 M tokens a run, of the embedded corpus' 3.8 M; the second 66 M, of a text that
# it is given, lest it read each document dozens of times.
SETTINGS = {"cpu": Setting(_TINY, 16, 300, 8, 128), "gpu": Setting(_60M, 128, 2000, 128, 256)}


class Method(NamedTuple):
    """Words of `python -m train`, and the learning rates that are searched."""

    words: str
    rates: Rates


def doubling(first: float, count: int = 5) -> Rates:
    """
    >>> doubling(0.001, 3)
    (0.001, 0.002, 0.004)
    """
    return tuple(first * 2**i for i in range(count))


def named(name: str) -> str:
    """The words of an optimizer."""
    return f"--optimizer.name {name}"


PROJECTED = doubling(0.004)
GALORE = f"{named('galore')} --optimizer.rank RANK"
OSD = f"{named('online_subspace_descent')} --optimizer.rank RANK"
ONLINE_PCA = f"{OSD} --optimizer.projector online_pca"
LORA = f"{named('adamw')} --lora.rank RANK --lora.freeze kernels"
# With every learning rate and three seeds.
METHODS = {
    "AdamW, full rank": Method(named("adamw"), doubling(0.002)),
    # The methods in a subspace give kernels a quarter of the rate that all else has: so does this.
    "AdamW, kernels at 0.25": Method(f"{named('adamw')} --optimizer.scale 0.25", PROJECTED),
    "GaLore": Method(GALORE, PROJECTED),
    "OSD, online PCA": Method(ONLINE_PCA, PROJECTED),
    "OSD, history PCA": Method(OSD, PROJECTED),
    "LoRA": Method(LORA, doubling(0.002)),
    "ReLoRA": Method(f"{LORA} --lora.merge_every MERGE --lora.rewarm_steps 10", doubling(0.002)),
    "low-rank factors": Method(
        f"{named('adamw')} --lora.rank RANK --lora.factorize", doubling(0.002)
    ),
    "APOLLO": Method(f"{named('apollo')} --optimizer.rank RANK", doubling(0.002)),
}
FULL = ("AdamW, full rank", "AdamW, kernels at 0.25")  # the better of which is the yardstick
# With every learning rate and one seed.
OTHERS = {
    "AdamW, 8 bits": Method(named("adamw8bit"), doubling(0.001)),
    "Adafactor": Method(named("adafactor"), doubling(0.001)),
    "Lion": Method(named("lion"), doubling(0.0002, 7)),
    "SGD with momentum": Method(named("sgd"), doubling(0.05)),
    "Muon": Method(named("muon"), doubling(0.002)),
    "optax.contrib.galore": Method(f"{named('contrib_galore')} --optimizer.rank RANK", PROJECTED),
    "APOLLO-Mini": Method(named("apollo_mini"), doubling(0.002)),
    "Fira": Method(f"{named('fira')} --optimizer.rank RANK", doubling(0.002)),
}


# Multiples of the best rate, of which the best counts, where it may have moved.
FACTORS = {"three times the steps": (2.0, 1.0, 0.5, 0.25, 0.125)}
# Ablations with as many seeds as the methods have.
REPEATED = ("refresh period", "side", "moments", "three times the steps")


def ablations(setting: Setting) -> dict[str, dict[str, tuple[str, str]]]:
    """Questions whose runs differ from a method's in few words, at its best rate.

    By question and label: the method, and the words that are added.
    """
    galore, online, history = "GaLore", "OSD, online PCA", "OSD, history PCA"
    three = ((galore, "GaLore"), (online, "online PCA"), (history, "history PCA"))
    rank, steps, tokens = setting.rank, setting.steps, setting.batch_size * setting.length
    few = (rank // 4, rank // 2, rank, rank * 2)
    lengths = (setting.length // 4, setting.length, setting.length * 4)
    periods = (1, 10, 50, steps // 2, steps)
    rules = ("svd", "subspace_iteration", "random_projection", "oja", "history_pca")
    optimizers = ("online_pca", "online_pca_lion", "online_pca_sgd")
    eight = "galore_adamw8bit", "online_subspace_adamw8bit"
    return {
        "rank": {
            f"{label}, rank {r}": (method, f"--optimizer.rank {r}")
            for (method, label), r in itertools.product(three, few)
        },
        "refresh period": {
            f"GaLore, every {n}": (galore, f"--optimizer.every {n}") for n in periods
        },
        "projector rule": {
            f"GaLore with {rule}": (galore, f"--optimizer.projector {rule}")
            for rule in (*rules, *optimizers)
        },
        "side": {
            f"{label}, {side}": (method, f"--optimizer.side {side}")
            for (method, label) in (three[0], three[2])
            for side in ("shorter", "longer", "left", "right", "both")
        },
        "moments": {
            **{
                f"GaLore, every 10, moments {m}": (
                    galore,
                    f"--optimizer.every 10 --optimizer.moments {m}",
                )
                for m in ("keep", "project", "reset")
            },
            **{
                f"OSD, {label}, moments {m}": (method, f"--optimizer.moments {m}")
                for (method, label), m in itertools.product(three[1:], ("keep", "project"))
            },
        },
        "8 bits": {
            "GaLore": (galore, ""),
            "GaLore, 8 bits": (galore, named(eight[0])),
            "GaLore, 8 bits and 4-bit bases": (
                galore,
                f"{named(eight[0])} --optimizer.projector_dtype linear4",
            ),
            "OSD, history PCA": (history, ""),
            "OSD, history PCA, 8 bits": (history, named(eight[1])),
        },
        # The same tokens in a step.
        "sequence length": {
            f"{label}, {length} tokens": (
                method,
                f"--train.sequence_length {length} --train.batch_size {tokens // length}",
            )
            for (method, label), length in itertools.product(
                ((FULL[0], "AdamW"), (FULL[1], FULL[1]), three[0], three[2]), lengths
            )
        },
        # A long run wants a lower rate.
        "three times the steps": {name: (name, f"--train.steps {steps * 3}") for name in METHODS},
        "fused backward": {
            f"{label}{how}": (method, f"--optimizer.clip_norm None{words}")
            for (method, label), (how, words) in itertools.product(
                (("AdamW, full rank", "AdamW"), (galore, "GaLore")),
                (("", ""), (", fused", " --train.fused_backward")),
            )
        },
    }


def all_methods() -> dict[str, Method]:
    """Those with three seeds, then those with one."""
    return {**METHODS, **OTHERS}


def words_of(setting: Setting, *parts: str) -> str:
    """The words of a run: those that come later count.

    >>> words_of(SETTINGS["cpu"], GALORE, "--optimizer.rank 8").split()[-4:]
    ['--optimizer.name', 'galore', '--optimizer.rank', '8']
    """
    text = " ".join((setting.all_words, *parts)).replace("RANK", str(setting.rank))
    found: dict[str, str] = {}
    for word in shlex.split(text.replace("MERGE", str(setting.steps // 4))):
        if word.startswith("--"):
            found.pop(last := word, None)
            found[word] = ""  # a flag, until a value comes
        else:
            found[last] = word
    return " ".join(f"{key} {shlex.quote(value)}" if value else key for key, value in found.items())
