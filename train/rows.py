"""Documents as rows: one a row, truncated or padded to S tokens, with the padding masked.

The pipeline of GaLore's own runs (--data.layout documents). A document that is too long keeps its
first S - 1 tokens and the end after them, as the T5 tokenizer's truncation leaves it; what a
tokenizer's template sets before a text (`<s>` of LLaMA's, nothing of T5's) stands there. Of S
tokens all but the first are predicted. An example has a prompt and a completion, of which only the
completion and the end count; one that is too long loses the beginning of its prompt, down to one
token, and then the end of its completion.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from train.tokenizer import Tokenizer, encode_prompt, start_of


class Row(NamedTuple):
    """One document, cut to at most S tokens."""

    tokens: np.ndarray  # (n,) int32
    first: int  # position of the first token that counts, at least 1


class Arrays(NamedTuple):
    """Rows as a model takes them; see `train.batches.Batch`."""

    inputs: Any  # (..., S) int32
    targets: Any  # (..., S) int32
    mask: Any  # (..., S) float32


def encode(record: Mapping[str, bytes], tokenizer: Tokenizer, length: int) -> Row:
    """A record with `text`, or with `prompt` and `completion`, as a row of at most `length` tokens.

    >>> from train.tokenizer import Bytes
    >>> row = encode({"prompt": b"2+2=", "completion": b"4"}, Bytes(), 8)
    >>> row.tokens.tolist(), row.first
    ([50, 43, 50, 61, 52, 256], 4)
    >>> encode({"text": b"too long"}, Bytes(), 4).tokens.tolist()
    [116, 111, 111, 256]
    """
    start = np.array(start_of(tokenizer), np.int32)
    if "text" in record:
        tokens = np.append(start, tokenizer.encode(record["text"].decode()))
        if len(tokens) > length:
            tokens = np.append(tokens[: length - 1], tokens[-1:])
        return Row(tokens, max(len(start), 1))
    prompt, completion = record["prompt"].decode(), record["completion"].decode()
    context = encode_prompt(tokenizer, prompt)[:-1]
    # As one text, as it will be generated; a token across the border belongs to the completion.
    tokens = encode_prompt(tokenizer, prompt + completion)
    shared = min(len(context), len(tokens) - 1)
    differs = np.flatnonzero(context[:shared] != tokens[:shared])
    first = int(differs[0]) if len(differs) else shared
    if not first and not len(start):
        # Nothing would stand before the first token that counts.
        start = tokens[-1:]
    room, least = length - len(start), 0 if len(start) else 1
    cut = min(max(len(tokens) - room, 0), first - least)
    return Row(np.append(start, tokens[cut : cut + room]), len(start) + first - cut)


def padded(row: Row, length: int) -> Arrays:
    """Inputs, targets and mask of a row, (S,) each; what is padded is 0.

    The last position has no target, so that S - 1 tokens are predicted at most.

    >>> [x.tolist() for x in padded(Row(np.array([5, 6, 7, 1], np.int32), 2), 5)]
    [[5, 6, 7, 1, 0], [6, 7, 1, 0, 0], [0.0, 1.0, 1.0, 0.0, 0.0]]
    """
    count = len(row.tokens)
    tokens = np.zeros(length + 1, np.int32)
    tokens[:count] = row.tokens
    mask = np.zeros(length, np.float32)
    mask[row.first - 1 : max(count - 1, 0)] = 1
    return Arrays(tokens[:-1], tokens[1:], mask)
