"""Memory of training steps by the compiler's account: plain, and with the fused backward pass.

Nothing is allocated: shapes are compiled for a CPU, or with `--platform tpu` (the extra `aot`) for
a TPU chip that this machine need not have. XLA:CPU computes bfloat16 in float32, so its
rows are in float32 and tell what is held; bytes of a real run are those of the TPU compiler. `peak`
is the most that a device holds at once: arguments, and of the temporaries those alive together.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_subspace as osub
from benchmarks import _llama_shapes, _timing
from models import llama
from models.config import PRESETS, LlamaConfig
from train import placement, topology
from train.batches import Batch
from train.memory import tree_bytes
from train.optimizer import SLICE_SIZE
from train.step import kernels_in_int8, make_eval_step

# Published for LLaMA-7b at 8 x 512 tokens, activation checkpointing (LOMO, table 1): total GB.
PUBLISHED = {"AdamW": 102.20, "SGD": 51.99, "LOMO": 14.58}
RATE = 1e-3


def methods(
    rank: int, side: str = "shorter", bases: str = "bfloat16"
) -> dict[str, optax.GradientTransformation]:
    """The optimizers of the table; the side of the bases, and how they are stored."""
    rules = llama.subspace_rules()
    eight_bits: dict[str, Any] = {"rules": rules, "projector_dtype": bases, "side": side}
    eight_bits["storage"] = {"slice_size": SLICE_SIZE}
    return {
        "AdamW": optax.adamw(RATE),
        "SGD": osub.lomo(RATE),
        "AdaLomo": osub.adalomo(RATE),
        "GaLore-8bit": osub.galore_adamw8bit(
            RATE, rank, projector=osub.subspace_iteration(), **eight_bits
        ),
        "OSD-8bit": osub.online_subspace_adamw8bit(
            RATE,
            rank,
            # (An exact decomposition for the first basis would be most of the compilation.)
            projector=osub.history_pca(first=osub.subspace_iteration()),
            **eight_bits,
        ),
    }


def parts_of(config: LlamaConfig) -> tuple[Any, Any, Any]:
    parts = llama.pieces(config)
    return (
        lambda rest, windows: parts.embed(rest, windows[:, :-1]),
        parts.block,
        lambda rest, x, windows: parts.loss(rest, x, windows[:, 1:], None)[0],
    )


def evaluation(config: LlamaConfig) -> Callable[[Any, jax.Array], Any]:
    """The trainer's evaluation of windows (B, S + 1): int8 kernels become arrays one by one."""
    step = make_eval_step(config)
    return lambda params, windows: step(params, Batch(windows[:, :-1], windows[:, 1:]))


def plain_step(config: LlamaConfig, tx: Any) -> Callable[..., Any]:
    definition = llama.graphdef(config)

    def loss(weights, windows):
        return llama.merge(definition, weights).loss(windows[:, :-1], windows[:, 1:])[0]

    def step(params, state, windows):
        weights = osub.dequantize(params)
        value, gradients = jax.value_and_grad(loss)(weights, windows)
        updates, state = tx.update(gradients, state, weights)
        return osub.apply_updates(params, updates), state, value

    return step


def compile_row(name: str, function: Any, arguments: tuple[Any, ...], donate: Any) -> list[str]:
    """One row of the table; a program that does not fit says what it needs."""
    start = time.perf_counter()
    # What takes the place of an argument has its layout, too.
    results = (*(placement.formats(arguments[i]) for i in donate), None) if donate else None
    try:
        step = jax.jit(function, donate_argnums=donate, out_shardings=results)
        compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return [name, "", "", "", "", f"refused: {topology.why_refused(str(error))}", ""]
    memory = compiled.memory_analysis()
    sizes = [
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
    ]
    # XLA:CPU counts no temporaries in its peak, which then says nothing.
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    last = f"{peak / 2**30:.2f}" if peak > memory.argument_size_in_bytes + 2**20 else ""
    seconds = time.perf_counter() - start
    return [name, *(f"{size / 2**30:.2f}" for size in sizes), last, f"{seconds:.0f}"]


def main() -> None:
    """Prints a table per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["60m", "350m", "1b", "7b"])
    parser.add_argument("--methods", nargs="+", choices=methods(1), default=list(methods(1)))
    parser.add_argument("--platform", choices=("cpu", "tpu"), default="cpu")
    parser.add_argument("--topology", default="v5e:2x2", help="with --platform tpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--steps", nargs="+", choices=("plain", "fused"), default=["plain", "fused"]
    )
    parser.add_argument("--side", default="shorter", help="of GaLore's and OSD's bases")
    parser.add_argument("--bases", default="bfloat16", help="dtype or code of the bases")
    parser.add_argument("--int8", action="store_true", help="kernels in int8")
    parser.add_argument("--keep", action="store_true", help="keep residuals, compute nothing anew")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # where libtpu is installed and no TPU is
    on_tpu = args.platform == "tpu"
    device = topology.devices(args.topology)[0][0] if on_tpu else jax.devices()[0]
    place = jax.sharding.SingleDeviceSharding(device)
    where = f"TPU {args.topology}" if on_tpu else "CPU"
    print(f"{where}, {_timing.versions('jax', 'optax', 'libtpu')}")
    dtype = "bfloat16" if on_tpu else "float32"
    for model in args.models:
        config = dataclasses.replace(
            PRESETS[model],
            param_dtype=dtype,
            dtype=dtype,
            attention="blocked",
            loss="fused",
            unroll=1,
            remat=not args.keep,
        )
        rank = _llama_shapes.RANKS[model]
        put = lambda tree: placement.in_whole_layers(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
        )
        arrays = jax.eval_shape(lambda key, c=config: llama.init_params(c, key), jax.random.key(0))
        params = put(jax.eval_shape(kernels_in_int8, arrays) if args.int8 else arrays)
        windows = put(jax.ShapeDtypeStruct((args.batch, args.length + 1), jnp.int32))
        rows = [compile_row("forward only", evaluation(config), (params, windows), ())]
        found = methods(rank, args.side, args.bases)
        chosen = {name: tx for name, tx in found.items() if name in args.methods}
        for name, tx in chosen.items():
            if "plain" in args.steps:
                state = put(jax.eval_shape(tx.init, arrays))
                step = plain_step(config, tx)
                arguments = (params, state, windows)
                rows.append(compile_row(f"{name}, plain", step, arguments, (0, 1)))
            if "fused" in args.steps:
                fused = osub.fused_backward(*parts_of(config), tx, remat=not args.keep, seed=0)
                state = put(jax.eval_shape(fused.init, params))
                arguments = (params, state, windows)
                rows.append(compile_row(f"{name}, fused", fused.step, arguments, (0, 1)))
            print(rows[-1], flush=True)
        rest = [part for key, part in arrays.items() if key != "layers"]
        largest = max(map(tree_bytes, rest)) / 2**30
        tokens = args.batch * args.length
        inputs = config.num_layers * tokens * config.hidden_size * jnp.dtype(dtype).itemsize
        print(
            f"\n{model}, rank {rank}, {args.batch} x {args.length} tokens, {dtype}"
            f"{', kernels in int8' if args.int8 else ''}; GiB. Largest gradient {largest:.2f}, "
            f"inputs of the blocks {inputs / 2**30:.2f}"
        )
        header = ["step", "arguments", "outputs", "aliased", "temporaries", "peak", "compile s"]
        print(_timing.table(header, rows))
    if "7b" in args.models:
        published = ", ".join(f"{name} {size}" for name, size in PUBLISHED.items())
        print(f"\nPublished for 7b at 8 x 512 tokens, total GB: {published}")


if __name__ == "__main__":
    main()
