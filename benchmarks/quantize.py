"""Encode and decode of 16 M values in blocks of 256: ours beside other ways, in turns.

Each contestant takes float32 values to 8 bits with a scale for each block and back. The yardsticks
are a copy of the same bytes, a search in the sorted table and a lookup, and bitsandbytes' CPU
kernels where torch and bitsandbytes are installed. Then the plain step of GaLore with moments in 8
bits beside that in 32 bits.
"""

import argparse
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import optax_subspace as osub
from benchmarks import _llama_shapes, _timing
from benchmarks.optimizer_step import LAYERS, Step

BLOCK = 256


def table(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The dynamic code's values and the midpoints between them."""
    code = osub.quantize(jnp.zeros(BLOCK)).layout.codec
    levels = np.asarray(code.decode(jnp.arange(256, dtype=jnp.uint8)))
    return jnp.asarray(levels), jnp.asarray((levels[1:] + levels[:-1]) / 2)


def contestants(x: jax.Array) -> dict[str, tuple[Callable, Callable]]:
    """Encoder and decoder by name, compiled."""
    levels, middle = table(x)

    def search(x):
        blocks = x.reshape(-1, BLOCK)
        scales = jnp.max(jnp.abs(blocks), axis=-1)
        codes = jnp.searchsorted(middle, blocks / scales[:, None])
        return codes.astype(jnp.uint8), scales

    look_up = lambda stored: levels[stored[0].astype(jnp.int32)] * stored[1][:, None]
    copy = lambda x: x + 1  # reads and writes every byte once
    found: dict[str, tuple[Callable, Callable]] = {
        "copy": (jax.jit(copy), jax.jit(copy)),
        "searchsorted, gather": (jax.jit(search), jax.jit(look_up)),
    }
    for code in ("dynamic", "linear", "float8_e4m3fn", "float8_e5m2", "dynamic4", "linear4"):
        encode = jax.jit(lambda x, code=code: osub.quantize(x, code))
        found[code] = encode, jax.jit(osub.dequantize)
    return found


def bitsandbytes(x: jax.Array) -> tuple[Callable, Callable] | None:
    """Its CPU kernels, or None where they are not installed."""
    try:
        import torch
        from bitsandbytes import functional
    except ImportError:
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    tensor = torch.from_numpy(np.array(x))
    encode = lambda _: functional.quantize_blockwise(tensor, blocksize=BLOCK)
    return encode, lambda stored: functional.dequantize_blockwise(*stored)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=int, default=2**24)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--step", default="60m", choices=LAYERS, help="of the step")
    args = parser.parse_args()
    print(f"{jax.default_backend()}, {os.cpu_count()} cores, {_timing.versions('jax', 'optax')}")

    x = jax.random.normal(jax.random.key(0), (args.values // BLOCK, BLOCK))
    found = contestants(x)
    peer = bitsandbytes(x)
    if peer is not None:
        found["bitsandbytes"] = peer
    stored = {name: encode(x) for name, (encode, _) in found.items()}
    calls, errors = {}, {}
    for name, (encode, decode) in found.items():
        wait = jax.block_until_ready if name != "bitsandbytes" else lambda y: y
        calls[name, "encode"] = lambda e=encode, w=wait: w(e(x))
        calls[name, "decode"] = lambda d=decode, s=stored[name], w=wait: w(d(s))
        back = jnp.asarray(np.asarray(decode(stored[name]))).reshape(x.shape)
        errors[name] = float(jnp.linalg.norm(back - x) / jnp.linalg.norm(x))
    timings = _timing.alternate(calls, rounds=args.rounds, warmup=1)
    both = {n: timings[n, "encode"].median + timings[n, "decode"].median for n in found}
    rows = [
        [
            name,
            f"{timings[name, 'encode'].median * 1e3:.1f}",
            f"{timings[name, 'decode'].median * 1e3:.1f}",
            f"{both[name] * 1e3:.1f}",
            f"{both['searchsorted, gather'] / both[name]:.1f}",
            f"{both['bitsandbytes'] / both[name]:.2f}" if peer else "",
            "" if name == "copy" else f"{errors[name]:.4f}",
        ]
        for name in found
    ]
    header = [
        "",
        "encode ms",
        "decode ms",
        "both ms",
        "x search",
        "x bitsandbytes",
        "error, N(0, 1)",
    ]
    print(f"\n{args.values:,} values\n{_timing.table(header, rows)}", flush=True)

    rank = _llama_shapes.RANKS[args.step]
    gradients = _llama_shapes.separate(args.step, LAYERS[args.step])
    steps = {
        "galore, 32 bits": Step(osub.galore(1e-2, rank), gradients),
        "galore_adamw8bit": Step(osub.galore_adamw8bit(1e-2, rank), gradients),
    }
    timings = _timing.alternate(steps, rounds=args.rounds, warmup=2)
    base = timings["galore, 32 bits"].median
    rows = [
        [
            name,
            f"{timing.median * 1e3:.1f}",
            f"{timing.median / base:.2f}",
            f"{steps[name].state_bytes / 2**20:.1f}",
        ]
        for name, timing in timings.items()
    ]
    header = [f"plain step, {args.step}", "ms", "/ 32 bits", "state MiB"]
    print("\n" + _timing.table(header, rows))


if __name__ == "__main__":
    main()
