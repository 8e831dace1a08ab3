"""Token batches: an endless training stream.

Training documents are tokenised on the fly. Packed, the end follows each, and the stream is cut
into windows of S + 1 tokens (inputs are the first S, targets the last S); otherwise each is a row
(`train.rows`). Several lanes walk through the shuffled documents side by side, so that the rows of
a batch come from different documents; where random access is dear, what is shuffled is blocks of
neighbouring documents. The stream is a function of the seed, its position is a small JSON tree.
"""

import atexit
import functools
import os
import sys
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from train import rows
from train.config import DataConfig
from train.corpus import Corpus
from train.documents import Source
from train.errors import UsageError

# Documents that are read side by side.
LANES = 8
# Batches that wait, tokenised by a thread while the device computes.
_AHEAD = 4
# Threads of a lane, which read and tokenise the documents that it comes to next: where there are
# cores enough. One thread alone makes about 800,000 tokens/s.
_THREADS = 1 if (os.cpu_count() or 1) >= LANES else 0
# A thread in the midst of a tokenizer's C++ would abort the process at its end.
_open: weakref.WeakSet = weakref.WeakSet()
atexit.register(lambda: [stream.close() for stream in list(_open)])


class Batch(NamedTuple):
    """B sequences of S tokens; arrays, tracers or shapes."""

    inputs: Any  # (B, S) int32
    targets: Any  # (B, S) int32: the next token of each
    mask: Any = None  # (B, S) float32: 0 where a target doesn't count; None counts all
    segments: Any = None  # (B, S) int32: tokens see those of their own number alone; None sees all


def training(
    corpus: Corpus,
    batch_size: int,
    sequence_length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Any:
    """An endless grain iterator of `Batch`, with `get_state` and `set_state`.

    Batches are made ahead by a thread; the state is that after the batch that was taken last.

    Args:
      corpus: the documents, how they become rows, and their tokenizer.
      batch_size: rows of a batch, of all processes together.
      sequence_length: S.
      seed: of the order of the documents.
      process_index: which process this is: it gets an equal part of consecutive rows of each
        batch. The order and the state are the same in all processes, and for any number of them.
      process_count: number of processes.

    Raises:
      UsageError: the rows can't be divided equally, or no batch fits into this machine's memory.
    """
    if batch_size % process_count:
        raise UsageError(
            f"--train.batch_size {batch_size}: {process_count} processes can't have equal parts; "
            f"give a multiple of {process_count}"
        )
    # (Inputs and targets, of 4 bytes a token.)
    needed = 8 * batch_size * sequence_length / 2**30
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if needed > memory:
        raise UsageError(
            f"--train.batch_size {batch_size}: a batch of {sequence_length} tokens a row takes "
            f"{needed:,.1f} GiB, this machine has {memory:,.1f}; give fewer rows, or shorter ones"
        )
    source, tokenizer, options = corpus.train, corpus.tokenizer, corpus.options
    count = -(-len(source) // source.block)
    order = grain.MapDataset.source(range(count)).seed(seed).shuffle().repeat()

    def encode(record: Any) -> Any:
        if options.layout == "documents":
            return rows.padded(rows.encode(record, tokenizer, sequence_length), sequence_length)
        return tokenizer.encode(record["text"].decode())

    read = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=2 * _THREADS)
    lanes: list[grain.IterDataset] = [
        _Documents(order.slice(slice(lane, None, LANES)), source).map(encode).to_iter_dataset(read)
        for lane in range(LANES)
    ]
    if options.layout == "packed":
        lanes = [Windows(lane, sequence_length + 1) for lane in lanes]

    def make(stacked: Any) -> Batch:
        if options.layout == "documents":
            return Batch(*stacked)
        return _packed(stacked, tokenizer.end if options.segments else None)

    share = batch_size // process_count
    own = slice(process_index * share, (process_index + 1) * share)
    batches = grain.IterDataset.mix(lanes).batch(batch_size).map(make)
    if process_count > 1:
        batches = batches.map(lambda batch: jax.tree.map(lambda x: x[own], batch))
    ahead = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_AHEAD)
    stream = iter(ahead)
    _open.add(stream)
    return stream


def shapes(options: DataConfig, batch_size: int, sequence_length: int) -> Batch:
    """Shapes of the batches of `training`.

    >>> shapes(DataConfig(segments=True), 2, 16).segments.shape
    (2, 16)
    """

    def array(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, sequence_length), dtype)

    tokens = array(np.int32)
    mask = array(np.float32) if options.layout == "documents" else None
    return Batch(tokens, tokens, mask, tokens if options.segments else None)


def _packed(windows: np.ndarray, end: int | None) -> Batch:
    """Windows (B, S + 1) as a batch, with segments if `end` is given."""
    inputs = windows[:, :-1]
    return Batch(inputs, windows[:, 1:], None, None if end is None else segments(inputs, end))


def segments(inputs: np.ndarray, end: int) -> np.ndarray:
    """Numbers of the documents in each row: (..., S) -> (..., S) int32.

    The end of one document is the beginning of the next, from which its first token is predicted.

    >>> segments(np.array([[5, 6, 1, 7, 1]]), 1)
    array([[0, 0, 1, 1, 2]], dtype=int32)
    """
    return np.cumsum(inputs == end, axis=-1, dtype=np.int32)


class _Documents(grain.MapDataset):
    """The records of a source in the order of its blocks; None where one is left out."""

    def __init__(self, blocks: grain.MapDataset, source: Source):
        super().__init__(blocks)
        self._source = source
        # Remembered, since one number of the shuffle takes grain 40 ms where there are few blocks.
        self._block = functools.lru_cache(maxsize=2)(blocks.__getitem__)

    def __len__(self) -> int:
        return min(len(self._parent) * self._source.block, sys.maxsize)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        block, offset = divmod(index, self._source.block)
        number = self._block(block) * self._source.block + offset
        return self._source[number] if number < len(self._source) else None


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
    text_bytes: int | None  # UTF-8 bytes of the documents
    vocab_size: int
    end: int | None = None  # with it, tokens see those of their own document alone

    @property
    def targets(self) -> np.ndarray:
        """The N tokens that are predicted."""
        return self.tokens[1:]

    def batches(
        self, batch_size: int, sequence_length: int, most: int | None = None
    ) -> Iterator[Batch]:
        """All of it in order, or `most` batches spread over it; padding has mask 0."""
        count = -(-len(self.targets) // (batch_size * sequence_length))
        for index in _spread(count, most):
            part = slice(index * batch_size * sequence_length, None)

            def cut(values: np.ndarray, dtype: Any, part: slice = part) -> np.ndarray:
                padded = np.zeros(batch_size * sequence_length, dtype)
                values = values[part][: len(padded)]
                padded[: len(values)] = values
                return padded.reshape(batch_size, sequence_length)

            inputs = cut(self.tokens[:-1], np.int32)
            yield Batch(
                inputs,
                cut(self.targets, np.int32),
                cut(np.ones(len(self.targets)), np.float32),
                None if self.end is None else segments(inputs, self.end),
            )


class HeldOutRows(NamedTuple):
    """The held-out split, one document a row (`train.rows`)."""

    rows: list[rows.Row]
    text_bytes: None = None  # of what is cut off a document the bytes can't be told

    @property
    def targets(self) -> np.ndarray:
        """The tokens that count."""
        return np.concatenate([row.tokens[row.first :] for row in self.rows])

    def batches(
        self, batch_size: int, sequence_length: int, most: int | None = None
    ) -> Iterator[Batch]:
        """All of it in order, or `most` batches spread over it; padding has mask 0."""
        for index in _spread(-(-len(self.rows) // batch_size), most):
            found = self.rows[index * batch_size :][:batch_size]
            found = found + [rows.Row(np.zeros(0, np.int32), 1)] * (batch_size - len(found))
            arrays = [rows.padded(row, sequence_length) for row in found]
            yield Batch(*(np.stack(parts) for parts in zip(*arrays, strict=True)))


def _spread(count: int, most: int | None) -> np.ndarray:
    wanted = count if most is None else min(most, count)
    return np.arange(wanted) * count // wanted


def held_out(corpus: Corpus, sequence_length: int) -> HeldOut | HeldOutRows:
    """Tokenises the held-out split, or the first of it up to --data.validation_tokens.

    The document that reaches that number is the last, whole; rows of S are cut as in training.

    Raises:
      UsageError: nothing is left to predict.
    """
    options, tokenizer = corpus.options, corpus.tokenizer
    limit = sys.maxsize if options.validation_tokens is None else options.validation_tokens
    found: list[rows.Row] = []
    count, text_bytes = 0, 0
    for record in corpus.validation:
        if options.layout == "documents":
            row = rows.encode(record, tokenizer, sequence_length)
            if len(row.tokens) <= row.first:
                continue  # the tokenizer leaves nothing of it but the end
        else:
            row = rows.Row(tokenizer.encode(record["text"].decode()), 0)
            text_bytes += len(record["text"])
        found.append(row)
        count += len(row.tokens)
        if count >= limit:
            break
    if not found:
        raise UsageError(
            f"--data.validation_path {options.validation_path}: the held-out documents have no "
            "text, or the tokenizer leaves nothing of it to predict; give others"
        )
    if options.layout == "documents":
        return HeldOutRows(found)
    tokens = np.concatenate([np.array([tokenizer.end], np.int32), *(row.tokens for row in found)])
    end = tokenizer.end if options.segments else None
    return HeldOut(tokens, text_bytes, tokenizer.vocab_size, end)


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
