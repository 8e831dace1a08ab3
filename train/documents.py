"""What a document is to the trainer: a record of bytes, its hash, its line of JSON."""

import hashlib
import json
from collections.abc import Iterator

from train.errors import one_line

# {"text"} or {"prompt", "completion"}, in UTF-8.
Record = dict[str, bytes]


class DocumentError(Exception):
    """A line holds no document; the message says why."""


class Source:
    """Documents by number."""

    block = 1  # neighbouring documents that are read together, where random access is dear

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, number: int) -> Record | None:
        """A document, or None if it is to be left out."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Record]:
        """All that are not left out."""
        for number in range(len(self)):
            record = self[number]
            if record is not None:
                yield record


def hash_of(record: Record) -> int:
    """64 bits of a document's text, or of an example's prompt and completion.

    >>> hash_of({"text": b"a"}) == hash_of({"text": b"b"})
    False
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in record.values():
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def parse(line: bytes) -> Record | None:
    """The document of a line; None if there is no text to learn in it.

    >>> parse(b'{"text": "a", "url": "b"}'), parse(b'{"prompt": "a", "completion": ""}')
    ({'text': b'a'}, None)

    Raises:
      DocumentError: it is no object with `text`, or with `prompt` and `completion`, all strings.
    """
    try:
        found = json.loads(line)
    except UnicodeDecodeError as error:
        raise DocumentError(f"is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"is not JSON ({one_line(error)[:80]})") from None
    if not isinstance(found, dict):
        raise DocumentError("is no JSON object")
    names = ("text",) if "text" in found else ("prompt", "completion")
    try:
        record = {name: found[name].encode() for name in names}
    except KeyError:
        raise DocumentError("has neither text nor prompt and completion") from None
    except AttributeError:
        raise DocumentError(f"has a {' or '.join(names)} that is no string") from None
    except UnicodeEncodeError:
        raise DocumentError("has half of a surrogate pair in its text") from None
    return record if record[names[-1]].strip() else None
