"""Data sets that tensorflow-datasets has prepared as array_record, read without TensorFlow."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from train.documents import Record, Source, hash_of
from train.errors import UsageError, one_line

# Documents, from all over a split, by whose contents it is told from others.
_SAMPLE = 4096
# Classes of features that are made.
_OWN = "tensorflow_datasets."


class Prepared(Source):
    """The `text` of a split that tensorflow-datasets has prepared."""

    def __init__(self, records: Any):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> Record | None:
        try:
            text = self._records[number]["text"]
        except Exception as error:  # whatever array_record says of a file
            raise UsageError(
                f"--data.path: a file of the data set was changed or deleted while it was being "
                f"read ({one_line(error)[:200]}); put it back, and run again with --resume"
            ) from None
        return {"text": text} if text.strip() else None


def stamp(split: Any, told: str) -> list[str]:
    """Changes when a file of a split is written anew: their places, sizes and times of change.

    Raises:
      UsageError: one of them is gone.
    """
    try:
        files = [(os.fspath(path), os.stat(path)) for path in split.filepaths]
    except OSError as error:
        raise UsageError(
            f"{told}: {error.filename} can't be read ({error.strerror}); put it back, or prepare "
            "the data set anew"
        ) from None
    return [f"{name} {found.st_size} {found.st_mtime_ns}" for name, found in files]


def sample(source: Source) -> np.ndarray:
    """Hashes of documents at even distances, of all if they are few: C4 has 365 million."""
    count = min(_SAMPLE, len(source))
    found = [source[number] for number in (np.arange(count) * len(source) // count).tolist()]
    return np.array([0 if record is None else hash_of(record) for record in found], np.uint64)


def builder_of(name: str, folder: str | None, told: str) -> Any:
    """The builder of a data set that was prepared as array_record, without TensorFlow.

    Args:
      name: `c4/en`, or with its version `c4/en:3.1.0`.
      folder: where it was prepared, `data_dir` of tensorflow-datasets; None is its own default.
      told: begins the error's line.

    Raises:
      UsageError: it isn't there, it is in another format, or it asks for code of its own.
    """
    root = Path(folder or tfds.core.constants.DATA_DIR).expanduser()
    plain, _, version = name.partition(":")
    place = root / plain
    versions = [p.parent for p in place.glob(f"{version or '*'}/dataset_info.json")]
    if not versions:
        others = sorted(str(p.parent.relative_to(root)) for p in root.glob("**/dataset_info.json"))
        there = f"there are {', '.join(others[:5])}" if others else "there are none"
        raise UsageError(
            f"{told}: {place / (version or 'VERSION') / 'dataset_info.json'} is missing; give the "
            f"folder of prepared data sets by --data.tfds_dir ({there})"
        )
    newest = max(versions, key=lambda p: [int(n) if n.isdigit() else 0 for n in p.name.split(".")])
    _check_classes(newest / "features.json", told)
    try:
        builder = tfds.builder_from_directory(newest)
        form = builder.info.file_format
        records = form is not None and form.value == "array_record"
    except Exception as error:
        raise UsageError(
            f"{told}: {newest} can't be opened ({one_line(error)[:200]}); prepare it anew"
        ) from None
    if not records:
        raise UsageError(
            f"{told}: {newest} is stored as {form.value if form else 'nothing known'}, which has "
            "no random access; prepare it with file_format='array_record'"
        )
    return builder


def _check_classes(file: Path, told: str) -> None:
    """Refuses features whose classes are not of tensorflow-datasets, which imports any module that
    the file names."""
    try:
        names = list(_classes(json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError):
        return  # without it, or where it is damaged, nothing is imported either
    except RecursionError:
        raise UsageError(f"{told}: {file} is nested too deeply; prepare it anew") from None
    for name in names:
        if not name.startswith(_OWN):
            raise UsageError(
                f"{told}: {file} asks for the class {one_line(name)[:100]}, which is not of "
                "tensorflow-datasets, and code that comes with data is not run; prepare it with "
                "features of tensorflow-datasets"
            )


def _classes(value: Any) -> Iterator[str]:
    """Names of all classes in a features.json, in its newer and its older form."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        # Features of some kinds are a text that is JSON again.
        try:
            value = json.loads(value)
        except ValueError:
            return
    if isinstance(value, dict):
        names = ("pythonClassName", "python_class_name", *(["type"] if "content" in value else []))
        for key, part in value.items():
            if key in names and isinstance(part, str):
                yield part
            else:
                yield from _classes(part)
    elif isinstance(value, list):
        for part in value:
            yield from _classes(part)
