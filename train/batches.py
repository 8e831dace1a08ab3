"""Token batches: an endless training stream and the held-out split, whole.

Training documents are tokenised on the fly and packed: END follows each, and the stream is cut
into windows of S + 1 tokens (inputs are the first S, targets the last S). Several lanes walk
through the shuffled documents side by side, so that the rows of a batch come from different
documents. The stream is a function of the seed, its position is a small JSON tree.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import numpy as np

from train.corpus import Corpus
from train.tokenizer import END, Tokenizer

# Documents that are read side by side.
LANES = 8


class Batch(NamedTuple):
    """B sequences of S tokens; arrays, tracers or shapes."""

    inputs: Any  # (B, S) int32
    targets: Any  # (B, S) int32: the next token of each
    mask: Any = None  # (B, S) float32: 0 where a target doesn't count; None counts all
    segments: Any = None  # (B, S) int32: tokens see those of their own number alone; None sees all


def training(corpus: Corpus, batch_size: int, sequence_length: int, seed: int) -> Any:
    """An endless grain iterator of `Batch`, with `get_state` and `set_state`."""
    tokenizer = corpus.tokenizer
    order = grain.MapDataset.source(corpus.train).seed(seed).shuffle().repeat()
    tokens = order.map(lambda record: tokenizer.encode(record["text"].decode()))
    # No threads: a step takes its 2,000 tokens in a millisecond or two.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    lanes = [
        Windows(
            tokens.slice(slice(lane, None, LANES)).to_iter_dataset(options), sequence_length + 1
        )
        for lane in range(LANES)
    ]
    rows = grain.IterDataset.mix(lanes).batch(batch_size)
    return iter(rows.map(lambda windows: Batch(windows[:, :-1], windows[:, 1:])))


class Windows(grain.IterDataset):
    """Arrays of any length joined end to end, and cut into windows of one length.

    grain's own `ConcatThenSplitIterDataset` restores a position wrongly once it went through
    JSON (0.2.18: an empty remainder is the tuple (0, 0) to it, and comes back as a list), so that
    a lane that hadn't begun, or stood at the end of a document, repeated or lost text.
    """

    def __init__(self, parent: grain.IterDataset, length: int):
        super().__init__(parent)
        self._length = length

    def __iter__(self) -> "_WindowsIterator":
        return _WindowsIterator(iter(self._parent), self._length)


class _WindowsIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, length: int):
        super().__init__(parent)
        self._length = length
        self._before: dict[str, Any] = parent.get_state()  # before the current array
        self._current = np.zeros(0, np.int32)
        self._used = 0  # of the current array; 0 with no current array

    def __next__(self) -> np.ndarray:
        parts, missing = [], self._length
        while missing:
            if self._used == len(self._current):
                self._take()
            part = self._current[self._used : self._used + missing]
            self._used += len(part)
            missing -= len(part)
            parts.append(part)
        return np.concatenate(parts)

    def _take(self) -> None:
        self._before = self._parent.get_state()
        self._current, self._used = next(self._parent), 0

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._before, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._current, self._used = np.zeros(0, np.int32), 0
        if state["used"]:
            self._take()
            self._used = state["used"]


class HeldOut(NamedTuple):
    """The held-out split as one stream.

    END stands first and after each document; every token but that first END is predicted exactly
    once, from at most S tokens before it.
    """

    tokens: np.ndarray  # (N + 1,) int32
    text_bytes: int  # UTF-8 bytes of the documents
    vocab_size: int

    @property
    def targets(self) -> np.ndarray:
        """The N tokens that are predicted."""
        return self.tokens[1:]

    def batches(
        self, batch_size: int, sequence_length: int, most: int | None = None
    ) -> Iterator[Batch]:
        """All of it in order, or `most` batches spread over it; padding has mask 0."""
        rows = -(-len(self.targets) // sequence_length)
        rows = -(-rows // batch_size) * batch_size
        size = rows * sequence_length

        def cut(values: np.ndarray, dtype: Any) -> np.ndarray:
            padded = np.zeros(size, dtype)
            padded[: len(values)] = values
            return padded.reshape(-1, batch_size, sequence_length)

        parts = (
            cut(self.tokens[:-1], np.int32),
            cut(self.targets, np.int32),
            cut(np.ones(len(self.targets)), np.float32),
        )
        count = len(parts[0])
        wanted = count if most is None else min(most, count)
        chosen = np.arange(wanted) * count // wanted
        for index in chosen:
            yield Batch(*(part[index] for part in parts))


def held_out(corpus: Corpus) -> HeldOut:
    """Tokenises the held-out split."""
    return stream([record["text"].decode() for record in corpus.validation], corpus.tokenizer)


def stream(texts: list[str], tokenizer: Tokenizer) -> HeldOut:
    """Documents as one held-out stream."""
    tokens = np.concatenate([np.array([END], np.int32), *map(tokenizer.encode, texts)])
    text_bytes = sum(len(text.encode()) for text in texts)
    return HeldOut(tokens, text_bytes, tokenizer.vocab_size)


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the tokens' own frequencies.

    No model that ignores the context scores lower on these tokens, since its probabilities would
    have to come from elsewhere: the yardstick that uses the same split is the strict one.

    >>> round(float(np.exp(unigram_entropy(np.array([5, 7, 5, 7])))), 6)
    2.0
    """
    counts = np.unique(tokens, return_counts=True)[1].astype(np.float64)
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Total cross-entropy in nats over the text's bytes, in bits.

    >>> bits_per_byte(np.log(2) * 12, 6)
    2.0
    """
    return float(nats / np.log(2) / text_bytes)
