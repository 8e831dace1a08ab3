"""The plain AdamW training step of the LLaMA here against Hugging Face transformers + torch.

    python -m benchmarks.model [--preset tiny] [--batch 8] [--length 256] [--rounds 10]

Both run forward, backward and AdamW in float32 on the same shapes and the same number of threads,
in turns. The torch row appears where torch and transformers are installed.
"""

import argparse
import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable

import jax
import numpy as np
import optax

from benchmarks import _timing
from models import backend
from models.config import PRESETS, LlamaConfig
from models.llama import graphdef, init_params, merge

PEER = "transformers + torch fused AdamW"


def jax_step(config: LlamaConfig, tokens: np.ndarray) -> tuple[Callable[[], float], float, int]:
    """Our step on `tokens` (B, S + 1).

    Returns:
      A callable that makes one step and returns the loss, the seconds that compilation took, and
      the bytes of temporaries in the compiled step.
    """
    definition, tx = graphdef(config), optax.adamw(1e-3)
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    state = jax.jit(tx.init)(params)

    def loss_fn(params, tokens):
        return merge(definition, params).loss(tokens[:, :-1], tokens[:, 1:])[0]

    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    batch = jax.numpy.asarray(tokens)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    carry = [params, state]

    def call() -> float:
        carry[0], carry[1], loss = compiled(*carry, batch)
        return float(loss)

    return call, seconds, getattr(memory, "temp_size_in_bytes", 0)


def torch_step(config: LlamaConfig, tokens: np.ndarray, threads: int) -> Callable[[], float]:
    """The same step by Hugging Face's LLaMA and torch's fused AdamW."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            num_hidden_layers=config.num_layers,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=tokens.shape[1],
            use_cache=False,
        )
    ).float()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    inputs = torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])).long()
    targets = torch.from_numpy(np.ascontiguousarray(tokens[:, 1:])).long()

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        scores = model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return call


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", choices=PRESETS, default="tiny", help="tiny is 9m at vocab 4096"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    for name in ("attention", "loss"):
        parser.add_argument(f"--{name}", default="auto", help="implementation in models.backend")
    parser.add_argument("--unroll", default="auto")
    args = parser.parse_args()
    unroll = args.unroll if args.unroll == "auto" else int(args.unroll)
    config = dataclasses.replace(
        PRESETS[args.preset], attention=args.attention, loss=args.loss, unroll=unroll
    )
    tokens = np.random.default_rng(0).integers(
        0, config.vocab_size, (args.batch, args.length + 1), dtype=np.int32
    )
    ours, compile_seconds, temporaries = jax_step(config, tokens)
    contestants = {"optax-subspace + optax.adamw": ours}
    missing = [p for p in ("torch", "transformers") if importlib.util.find_spec(p) is None]
    if not missing:
        contestants[PEER] = torch_step(config, tokens, args.threads)
    timings = _timing.alternate(contestants, rounds=args.rounds, warmup=3)

    print(f"{args.preset}: {config.num_params():,} parameters, {args.batch} x {args.length} tokens")
    print(f"{backend.choose(config)} on {jax.default_backend()}, {os.cpu_count()} cores")
    print(_timing.versions("jax", "flax", "optax", "torch", "transformers"))
    print(f"compiled in {compile_seconds:.1f} s, {temporaries / 2**20:.0f} MiB of temporaries\n")
    peer = timings.get(PEER)
    rows = []
    for name, timing in timings.items():
        rate = args.batch * args.length / timing.median
        ratio = f"{peer.median / timing.median:.2f}" if peer else "-"
        rows.append(
            [name, f"{timing.median * 1e3:.1f}", f"{timing.spread:.2f}", f"{rate:,.0f}", ratio]
        )
    header = ["step", "ms", "spread", "tokens/s", "tokens/s over torch's"]
    print(_timing.table(header, rows))
    if missing:
        print(f"\nFor the row of the peer: pip install {' '.join(missing)}")


if __name__ == "__main__":
    main()
