"""Bytes of weights and optimizer state for LLaMA's sizes, from shapes alone.

Nothing is allocated: every figure is that of `jax.eval_shape` on the optimizer's own `init`, with
weights in bfloat16 unless a row says otherwise. The papers' columns are those of GaLore
(arXiv 2403.03507), tables 1 and 2, in G as printed there.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_subspace as osub
from benchmarks import _timing
from models import llama
from models.config import PRESETS
from train.memory import tree_bytes
from train.step import kernels_in_int8

RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "3b": 512, "7b": 1024}
PUBLISHED = {  # weights and states: full-rank Adam, GaLore
    "60m": (0.36, 0.24),
    "130m": (0.76, 0.52),
    "350m": (2.06, 1.22),
    "1b": (7.80, 4.38),
}
PUBLISHED_7B = {"8-bit AdamW": 26.0, "8-bit GaLore": 18.0}
GIB = 2**30


class Bytes(NamedTuple):
    """What a method keeps between two steps."""

    weights: int
    state: int

    @property
    def total(self) -> int:
        return self.weights + self.state


def shapes(model: str) -> Any:
    """The parameters of a preset in bfloat16, as shapes."""
    make = lambda key: llama.init_params(PRESETS[model], key)
    params = jax.eval_shape(make, jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)


def of_optimizer(tx: optax.GradientTransformation, params: Any, weights: Any = None) -> Bytes:
    """Bytes under an optimizer; `weights` if they are kept in another form."""
    state = jax.eval_shape(tx.init, params)
    return Bytes(tree_bytes(params if weights is None else weights), tree_bytes(state))


def bf16_adam(inner: optax.GradientTransformation | None = None) -> optax.GradientTransformation:
    """Adam whose moments have the parameters' dtype, bfloat16, inside and outside a subspace."""
    cast = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), tree)
    adam = optax.scale_by_adam()
    return optax.GradientTransformation(lambda params: adam.init(cast(params)), adam.update)


def lora(params: Any, rank: int, tx: optax.GradientTransformation) -> Bytes:
    """Frozen kernels of the layers with two trained factors each; all else is trained."""
    layers = params["layers"]
    kernels = {name: part["kernel"] for name, part in layers.items() if "kernel" in part}
    factor = lambda a, b: jax.ShapeDtypeStruct((a, b), jnp.bfloat16)
    trained = {k: v for k, v in params.items() if k != "layers"}
    trained["norms"] = {k: v for k, v in layers.items() if "kernel" not in v}
    trained["factors"] = {
        name: [(factor(x.shape[1], rank), factor(rank, x.shape[2])) for _ in range(x.shape[0])]
        for name, x in kernels.items()
    }
    return Bytes(tree_bytes(trained) + tree_bytes(kernels), of_optimizer(tx, trained).state)


def methods(params: Any, rank: int) -> dict[str, Callable[[], Bytes]]:
    """Each method by its name."""
    rules = llama.subspace_rules()
    separate = jax.tree.map(lambda x: x, params)
    separate["layers"] = {
        name: {
            k: [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for _ in range(x.shape[0])]
            for k, x in part.items()
        }
        for name, part in params["layers"].items()
    }

    def contrib() -> Bytes:
        # It takes no stacked leaves; what it projects by default is the embedding and head too.
        label = jax.tree_util.tree_map_with_path(
            lambda path, _: "galore" if "kernel" in str(path) and "layers" in str(path) else "adam",
            separate,
        )
        tx = optax.multi_transform(
            {"galore": optax.contrib.galore(1e-2, rank), "adam": bf16_adam()}, label
        )
        return of_optimizer(tx, separate)

    galore16 = lambda **kw: osub.galore(
        1e-2, rank, inner=bf16_adam(), projector_dtype=jnp.bfloat16, rules=rules, **kw
    )
    galore8 = lambda **kw: osub.galore_adamw8bit(1e-2, rank, rules=rules, **kw)
    osd8 = lambda **kw: osub.online_subspace_adamw8bit(1e-2, rank, rules=rules, **kw)
    # As `--train.int8_weights` has it: embedding, head and norms stay in bfloat16.
    int8 = lambda: jax.eval_shape(kernels_in_int8, params)
    return {
        "AdamW": lambda: of_optimizer(bf16_adam(), params),
        "8-bit AdamW": lambda: of_optimizer(osub.adamw8bit(1e-3), params),
        "GaLore": lambda: of_optimizer(galore16(), params),
        "GaLore, auto": lambda: of_optimizer(galore16(side="auto"), params),
        "8-bit GaLore": lambda: of_optimizer(galore8(projector_dtype=jnp.bfloat16), params),
        "8-bit GaLore, 8-bit bases": lambda: of_optimizer(
            galore8(projector_dtype="linear"), params
        ),
        "8-bit GaLore, auto, 8-bit bases": lambda: of_optimizer(
            galore8(projector_dtype="linear", side="auto"), params
        ),
        "8-bit GaLore, auto, 4-bit bases": lambda: of_optimizer(
            galore8(projector_dtype="linear4", side="auto"), params
        ),
        "8-bit OSD": lambda: of_optimizer(osd8(projector_dtype=jnp.bfloat16), params),
        "8-bit OSD, 8-bit bases": lambda: of_optimizer(osd8(projector_dtype="linear"), params),
        "int8 kernels, 8-bit GaLore, auto, 4-bit bases": lambda: of_optimizer(
            galore8(projector_dtype="linear4", side="auto"), params, int8()
        ),
        "optax.contrib.galore": contrib,
        "LoRA, ReLoRA": lambda: lora(params, rank, bf16_adam()),
    }


def percentages(params: Any, rank: int, found: dict[str, Bytes]) -> str:
    """GaLore's four headline figures, published and ours."""
    adam, galore = found["AdamW"], found["GaLore"]
    eight, lora_bytes = found["8-bit GaLore, 8-bit bases"], found["LoRA, ReLoRA"].total
    less = lambda ours, base: f"{100 * (ours / base - 1):.1f} %"
    # As in the paper's introduction: 2 GB of activations, and with updates layer by layer the
    # gradient of the largest matrix alone.
    activations = 2e9
    largest = max(x.size // x.shape[0] if x.ndim == 3 else x.size for x in jax.tree.leaves(params))
    whole = adam.total + adam.weights + activations
    ours = found["8-bit GaLore"].total + 2 * largest + activations
    rows = [
        ["optimizer state, GaLore", "-65.5 %", less(galore.state, adam.state)],
        ["optimizer state, 8-bit GaLore, 8-bit bases", "-82.5 %", less(eight.state, adam.state)],
        ["weights, state, gradients and 2 GB", "-63.3 %", less(ours, whole)],
        ["weights and state against LoRA", "-30 %", less(galore.total, lora_bytes)],
        ["the same, `side='auto'`", "", less(found["GaLore, auto"].total, lora_bytes)],
    ]
    return _timing.table(["7b against bf16 Adam", "published, up to", "ours"], rows)


def main() -> None:
    """Prints a table per size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=RANKS, default=list(RANKS))
    args = parser.parse_args()
    print(f"from shapes alone; {_timing.versions('jax', 'optax')}")
    for model in args.models:
        params, rank = shapes(model), RANKS[model]
        found = {name: make() for name, make in methods(params, rank).items()}
        full, galore = PUBLISHED.get(model, (None, None))
        printed = {"AdamW": full, "GaLore": galore, **(PUBLISHED_7B if model == "7b" else {})}
        rows = []
        for name, size in found.items():
            paper = printed.get(name)
            rows.append(
                [
                    name,
                    f"{size.weights / GIB:.3f}",
                    f"{size.state / GIB:.3f}",
                    f"{size.total / GIB:.3f}",
                    f"{size.total / 1e9:.3f}",
                    "" if paper is None else f"{paper:.2f}",
                ]
            )
        print(f"\n{model}, rank {rank}")
        header = ["method", "weights GiB", "state GiB", "total GiB", "total GB", "paper's G"]
        print(_timing.table(header, rows), flush=True)
        if model == "7b":
            print("\n" + percentages(params, rank, found))


if __name__ == "__main__":
    main()
