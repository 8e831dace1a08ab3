"""Folders that are built once, whole or not at all, and checked when they are used again.

A folder is built under a temporary name and renamed, so that a killed process leaves no half of
one. A list of checksums beside the contents finds what broke later.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

MANIFEST = "checksums.json"
_STALE_SECONDS = 24 * 3600


def digest(parts: Iterable[str | bytes]) -> str:
    """Hash of a sequence of texts; the boundaries between them count.

    >>> digest(["ab", "c"]) == digest(["a", "bc"])
    False
    """
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def built(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build` (which fills the empty folder that it is given) if need be."""
    if folder.is_dir():
        if damage(folder, folder / MANIFEST) is None:
            return folder
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        build(temporary)
        write_checksums(temporary, temporary / MANIFEST)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process was faster; what it built has the same contents by its name.
            if damage(folder, folder / MANIFEST) is not None:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def write_checksums(folder: Path, manifest: Path) -> None:
    """Writes size and SHA-256 of every file in `folder` to `manifest`, atomically and to disk."""
    entries = {
        path.relative_to(folder).as_posix(): _entry(path)
        for path in _files(folder)
        if path != manifest
    }
    write_atomically(manifest, json.dumps(entries, indent=0, sort_keys=True))


def damage(folder: Path, manifest: Path) -> str | None:
    """What is wrong with `folder` according to its checksums, in words; None if nothing is."""
    try:
        entries = json.loads(manifest.read_text())
        if not isinstance(entries, dict):
            raise ValueError(entries)
    except (OSError, ValueError):
        return f"its list of checksums {manifest.name} is missing or unreadable"
    present = {path.relative_to(folder).as_posix() for path in _files(folder)}
    for name, entry in entries.items():
        if name not in present:
            return f"the file {name} is missing"
        if _entry(folder / name) != entry:
            return f"the contents of {name} changed"
    return None


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that `path` holds all of it or what it held before, even after a crash."""
    temporary = beside(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """A name beside `path` that nobody else has: processes of two containers may share a number."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(path: Path) -> list[int | str]:
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _sweep(parent: Path) -> None:
    """Removes what killed builds left behind long ago."""
    for path in parent.glob(".building-*"):
        with_age = time.time() - path.stat().st_mtime
        if with_age > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
