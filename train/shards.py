"""Shards of JSON lines, plain or gzip, as documents that are read by number.

C4's own form: `c4-train.00000-of-01024.json.gz`, an object a line with `text`; also objects with
`prompt` and `completion`. Each shard is read once, whole, and checked; what was found, the index,
is kept beside it: where each document begins in the decompressed stream, a hash of its text, and
points from which decompression can start. An index counts for the file's size and time of change
alone, and is written under another name first, so that a process that was killed goes on with the
shard that it had not finished.
"""

import array
import concurrent.futures
import contextlib
import errno
import functools
import gzip
import io
import multiprocessing
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import indexed_gzip
import numpy as np

from train import cache
from train.documents import DocumentError, Record, Source, hash_of, parse
from train.errors import UsageError, one_line

_KINDS = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*_KINDS, *(f"{kind}.gz" for kind in _KINDS))  # in capitals too
INDEX = ".index.npz"
_VERSION = 1
# Decompressed bytes from one point to the next; each keeps 32 KiB of what came before it.
_SPACING = 4 << 20
# Beyond so many bytes shards are indexed by several processes (a core does about 50 MB/s).
_MANY_BYTES = 1 << 30
# Documents that are read together, and how many such blocks and open shards are remembered.
BLOCK = 256
_BLOCKS, _OPEN = 32, 16


class Shard(NamedTuple):
    """A shard and what its index says; the arrays stay on the disk until they are needed."""

    name: str  # as the user knows it
    path: Path
    notes: Path  # its index
    documents: int
    empty: int  # lines left out: no text, or no completion
    examples: bool  # prompts and completions
    key: str  # hash of its documents
    why: str  # what is wrong with it, or nothing


def open_shard(name: str, path: Path, spare: Path, say: Callable[[str], None]) -> Shard:
    """The shard by its index, which is built if there is none that fits.

    Args:
      name: the shard as the user knows it, which tells too whether it is compressed.
      path: where it is on this machine.
      spare: folder for the index if that of the shard can't be written.
      say: is told if the shard isn't what it was when it was indexed.

    Raises:
      OSError: the shard can't be read, or there is no space for its index.
    """
    places = index_places(path, spare)
    stamp = _stamp(path)
    for place in places:
        found = _read_index(name, path, place, stamp)
        if found is not None:
            return found
    if any(place.exists() for place in places):
        say(f"{name} changed since it was indexed, and is indexed anew")
    contents = _scan(name, path)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _write_index(place, stamp, contents)
        except (PermissionError, NotADirectoryError, FileExistsError):
            continue
        except OSError as error:
            if error.errno == errno.EROFS:
                continue
            raise
        found = _read_index(name, path, place, stamp)
        if found is not None:
            return found
    raise UsageError(
        f"--data.cache_dir: the index of {name} can't be written beside it nor to {places[-1]}; "
        "give a folder of yours"
    )


def index_places(path: Path, spare: Path) -> list[Path]:
    """Where a shard's index may be, the best place first."""
    folder = cache.digest([str(path.absolute().parent)])[:16]
    return [path.with_name(path.name + INDEX), spare / folder / (path.name + INDEX)]


def orphans(folder: Path, spare: Path) -> list[str]:
    """Names of the shards that were in a folder when they were indexed and are no more."""
    places = {place.parent for place in index_places(folder / "any", spare)}
    names = [p.name.removesuffix(INDEX) for place in places for p in place.glob(f"*{INDEX}")]
    return sorted({name for name in names if not (folder / name).exists()})


def _stamp(path: Path) -> np.ndarray:
    found = path.stat()
    return np.array([_VERSION, found.st_size, found.st_mtime_ns], np.int64)


def _read_index(name: str, path: Path, place: Path, stamp: np.ndarray) -> Shard | None:
    try:
        with np.load(place, allow_pickle=False) as found:
            if not np.array_equal(found["stamp"], stamp):
                return None
            count, empty, examples = (int(number) for number in found["counts"])
            key, why = (str(found[part]) for part in ("key", "why"))
    except Exception:  # missing, half of a file, or none of ours: built anew
        return None
    return Shard(name, path, place, count, empty, bool(examples), key, why)


def _write_index(place: Path, stamp: np.ndarray, contents: dict[str, Any]) -> None:
    temporary = cache.beside(place)
    try:
        with open(temporary, "wb") as file:
            np.savez(file, stamp=stamp, **contents)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def _scan(name: str, path: Path) -> dict[str, Any]:
    """Reads a whole shard; the contents of its index."""
    starts, hashes = array.array("q"), array.array("Q")
    kinds: set[bool] = set()
    place, number, empty, why = 0, 0, 0, ""
    points = io.BytesIO()
    try:
        # Not indexed_gzip, which takes a file that was cut off for a shorter one.
        with gzip.open(path) if _compressed(name) else open(path, "rb") as file:
            for line in file:
                number += 1
                record = parse(line) if line.strip() else None
                empty += bool(line.strip()) and record is None
                if record is not None:
                    starts.append(place)
                    hashes.append(hash_of(record))
                    kinds.add("text" not in record)
                    if len(kinds) > 1:
                        raise DocumentError("has a text where others have a prompt, or the reverse")
                place += len(line)
        if _compressed(name):
            with _open(name, path) as file:
                file.build_full_index()
                file.export_index(fileobj=points)
    except DocumentError as error:
        why = f"line {number} {error}"
    except (EOFError, gzip.BadGzipFile, zlib.error, indexed_gzip.ZranError) as error:
        why = f"after line {number} the compressed data are damaged ({one_line(error)[:80]})"
    if why:
        starts, hashes = array.array("q"), array.array("Q")
    found = np.array(hashes, np.uint64)
    return {
        "starts": np.array([*starts, place], np.int64),
        "hashes": found,
        "points": np.frombuffer(points.getvalue(), np.uint8),
        "counts": np.array([len(found), empty, True in kinds]),
        "key": np.array(cache.digest([found.tobytes()])),
        "why": np.array(why),
    }


def _compressed(name: str) -> bool:
    return name.lower().endswith(".gz")


def _open(name: str, path: Path) -> Any:
    if _compressed(name):
        return indexed_gzip.IndexedGzipFile(str(path), spacing=_SPACING)
    return open(path, "rb")


class Shards(Source):
    """The documents of some shards by number, as records of bytes.

    Random access is dear where they are compressed and more than what is remembered.
    """

    def __init__(self, shards: Sequence[Shard]):
        self._shards = shards
        self._ends = np.cumsum([shard.documents for shard in shards])
        compressed = any(_together(shard) > 1 for shard in shards)
        self.block = BLOCK if compressed and self._ends[-1] > BLOCK * _BLOCKS else 1
        # One thread at a time; and each block and each open file is remembered for a while.
        self._lock = threading.Lock()
        self._block = functools.lru_cache(maxsize=_BLOCKS)(self._read)
        self._file = functools.lru_cache(maxsize=_OPEN)(_reader)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Record:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        number -= int(self._ends[shard]) - self._shards[shard].documents
        block, offset = divmod(number, _together(self._shards[shard]))
        with self._lock:
            line = self._block(shard, block)[offset]
        try:
            record = parse(line)
            if record is None:  # the index has no such line
                raise DocumentError("is empty")
        except DocumentError as error:
            raise _changed(self._shards[shard], error) from None
        return record

    def hashes(self) -> np.ndarray:
        """Hashes of all texts, (N,) uint64."""
        found = []
        for shard in self._shards:
            with np.load(shard.notes, allow_pickle=False) as index:
                found.append(index["hashes"])
        return np.concatenate(found)

    def _read(self, number: int, block: int) -> list[bytes]:
        """The lines of a block of documents."""
        shard = self._shards[number]
        try:
            file, starts = self._file(shard)
            count = _together(shard)
            bounds = starts[block * count :][: count + 1]
            file.seek(int(bounds[0]))
            data = file.read(int(bounds[-1] - bounds[0]))
            if len(data) != bounds[-1] - bounds[0]:
                raise EOFError("it ends early")
        except Exception as error:
            raise _changed(shard, error) from None
        edges = (bounds - bounds[0]).tolist()
        # What follows a document's line, up to the next one, was left out.
        pairs = zip(edges[:-1], edges[1:], strict=True)
        return [data[start:stop].split(b"\n", 1)[0] for start, stop in pairs]


def _changed(shard: Shard, error: Exception) -> UsageError:
    return UsageError(
        f"--data.path: {shard.name} was changed or deleted while it was being read "
        f"({one_line(error)[:120]}); put it back, and run again with --resume"
    )


def _together(shard: Shard) -> int:
    """Documents of a shard that are read at once."""
    return BLOCK if _compressed(shard.name) else 1


def _reader(shard: Shard) -> tuple[Any, np.ndarray]:
    """An open shard, and where its documents begin."""
    with np.load(shard.notes, allow_pickle=False) as index:
        if not np.array_equal(index["stamp"], _stamp(shard.path)):
            raise OSError("its size or time of change is another one")
        starts, points = index["starts"], index["points"]
    file = _open(shard.name, shard.path)
    if len(points):
        file.import_index(fileobj=io.BytesIO(points.tobytes()))
    return file, starts


def _index_together(files: Sequence[tuple[str, Path]], spare: Path) -> None:
    """Builds the indexes that are missing, if they are many; what fails is left to the reader."""
    missing = [
        (name, path, spare)
        for name, path in files
        if path.is_file() and not any(place.exists() for place in index_places(path, spare))
    ]
    cores = os.cpu_count() or 1
    if cores == 1 or sum(path.stat().st_size for _, path, _ in missing) < _MANY_BYTES:
        return
    # Spawned: what JAX and grain have started doesn't survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(cores, len(missing)), context) as pool:
        list(pool.map(_index_one, missing))


def _index_one(job: tuple[str, Path, Path]) -> None:
    # The reader comes upon the same error, and says it.
    with contextlib.suppress(OSError, UsageError):
        open_shard(*job, say=lambda line: None)


def load(
    files: Sequence[tuple[str, Path]],
    spare: Path,
    refuse: bool,
    say: Callable[[str], None],
    key: str = "--data.path",
) -> list[Shard]:
    """All good shards that have documents, in order.

    Args:
      files: name and place of each.
      spare: folder for indexes that can't be kept beside their shards.
      refuse: raise for the first bad one; otherwise it is left out, with a line about it.
      say: is told what is left out.
      key: the option that gave the files.

    Raises:
      UsageError: a bad shard is refused, or nothing is left.
    """
    _index_together(files, spare)
    good = []
    for name, path in files:
        try:
            shard = open_shard(name, path, spare, say)
            why = shard.why
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            why = f"can't be read ({error.strerror})"
        if not why:
            good.append(shard)
        elif refuse:
            raise UsageError(
                f"{key}: {name}: {why}; replace it, or leave out bad shards with "
                "--data.bad_shards skip"
            )
        else:
            say(f"warning: {name} is left out: {why}")
    empty = sum(shard.empty for shard in good)
    if empty:
        say(f"{empty:,} lines without a text or a completion to learn are left out")
    without = [shard.name for shard in good if not shard.documents]
    good = [shard for shard in good if shard.documents]
    if not good:
        raise UsageError(f"{key}: no documents are left; give other files")
    if without:
        more = f" and {len(without) - 3:,} more" if len(without) > 3 else ""
        say(f"no documents in {', '.join(without[:3])}{more}")
    if len({shard.examples for shard in good}) > 1:
        odd = next(shard for shard in good if shard.examples != good[0].examples)
        raise UsageError(
            f"{key}: {good[0].name} and {odd.name}: one has text, the other prompts and "
            "completions; give files of one kind"
        )
    return good
