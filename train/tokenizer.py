"""Tokenizers: SentencePiece, Hugging Face's `tokenizer.json`, bytes, and pieces trained here.

Without `--data.tokenizer` pieces are trained once on the training split and kept: byte-pair pieces
without any normalisation, and a piece for every byte, so that text comes back as it was (the one
exception: U+2581, SentencePiece's sign for a space, comes back as a space).
"""

import contextlib
import functools
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers

from train import cache
from train.checks import LEAST_PIECES
from train.errors import UsageError, one_line

BYTES = "bytes"  # --data.tokenizer's word for no pieces at all
UNKNOWN, END = 0, 1  # ids of the pieces that are trained here
# What ends a text in models whose files don't say it, the commonest first.
_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "unk_id": UNKNOWN,
    "eos_id": END,
    "bos_id": -1,
    "pad_id": -1,
    # One thread: the pieces are a function of the text alone.
    "num_threads": 1,
    "max_sentence_length": 1 << 24,
    "minloglevel": 4,
}


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""

    @property
    def end(self) -> int:
        """The id that stands before the first document and after each."""

    @property
    def start(self) -> tuple[int, ...]:
        """Ids that its users set before each text, as `<s>`; nothing for most."""

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of a document, with `end` after it."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, without `end`."""


class Pieces:
    """A SentencePiece model.

    Args:
      model: the serialised model.
      starts: whether its piece that starts a text, if there is one, does so.

    Raises:
      ValueError: that is no such model, or it has no piece that ends a text.
    """

    def __init__(self, model: bytes, starts: bool = True):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"is no SentencePiece model ({one_line(error)})") from None
        first = self._processor.bos_id()
        self.start: tuple[int, ...] = (first,) if starts and first >= 0 else ()
        self.key = cache.digest([model, *map(str, self.start)])
        self.vocab_size: int = self._processor.vocab_size()
        self.end: int = self._processor.eos_id()
        if self.end < 0:
            raise ValueError("has no piece that ends a text (eos, usually </s>)")

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of a document, with `end` after it."""
        return np.asarray([*self._processor.encode(text), self.end], np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, without `end`."""
        return self._processor.decode([int(i) for i in ids if i != self.end])


class HuggingFace:
    """A `tokenizer.json`, as `transformers` would read it, without what its template adds, of
    which `start` is known.

    Args:
      text: contents of the file.
      end: the token that ends a text; None takes the first of `</s>`, `<|endoftext|>`,
        `<|end_of_text|>` and `<eos>` that it has.

    Raises:
      ValueError: the text is no such file, or the token isn't in it.
    """

    def __init__(self, text: str, end: str | None = None):
        try:
            self._tokenizer = _without_lengths(text)
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"is no tokenizer.json ({one_line(error)[:200]})") from None
        # A </s> that is written in a document is text, and not its end.
        self._tokenizer.encode_special_tokens = True
        self._text = text
        names = _ENDS if end is None else (end,)
        ids = [self._tokenizer.token_to_id(name) for name in names]
        found = [number for number in ids if number is not None]
        if not found:
            raise ValueError(f"has no token that ends a text (looked for {', '.join(names)})")
        self.end: int = found[0]
        # Not `get_vocab_size()`: ids may have gaps.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.start = _before_a_text(self._tokenizer)
        self.key = cache.digest([text, str(self.end), "documents are plain"])

    @functools.cached_property
    def _prompts(self) -> tokenizers.Tokenizer:
        # Another one, since a thread may be encoding documents with the first.
        return _without_lengths(self._text)

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of a document, with `end` after it."""
        return self._encode(self._tokenizer, text)

    def encode_prompt(self, text: str) -> np.ndarray:
        """`encode`, in which names of special tokens, as those of a chat, are these tokens."""
        return self._encode(self._prompts, text)

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the package raises nothing narrower
            raise UsageError(
                f"--data.tokenizer: the tokenizer.json can't encode {text[:40]!r} "
                f"({one_line(error)[:100]}); give one with a token for what it doesn't know"
            ) from None
        return np.asarray([*ids, self.end], np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, without `end`."""
        kept = [int(i) for i in ids if i != self.end]
        return self._tokenizer.decode(kept, skip_special_tokens=False)


class Bytes:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end.

    >>> Bytes().encode("hé").tolist()
    [104, 195, 169, 256]
    >>> Bytes().decode([104, 195, 169, 256])
    'hé'
    """

    key = BYTES
    vocab_size = 257
    end = 256
    start = ()

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of a document, with `end` after it."""
        ids = np.empty(len(data := text.encode()) + 1, np.int32)
        ids[:-1], ids[-1] = np.frombuffer(data, np.uint8), self.end
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, without `end`; what is no UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids if i != self.end).decode(errors="replace")


def _without_lengths(text: str) -> tokenizers.Tokenizer:
    """A `tokenizer.json` that neither truncates nor pads."""
    found = tokenizers.Tokenizer.from_str(text)
    found.no_truncation()
    found.no_padding()
    return found


def _before_a_text(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids that a tokenizer's template sets before each text."""
    try:
        whole = tokenizer.encode("a").ids
        text = tokenizer.encode("a", add_special_tokens=False).ids
    except Exception:  # a text that it can't encode, of which `encode` will tell
        return ()
    places = range(len(whole) - len(text) + 1)
    return tuple(next((whole[:i] for i in places if whole[i : i + len(text)] == text), ()))


def open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a `.model` or `.json` file, of a folder with one, or `bytes`.

    The end of a text is SentencePiece's own eos. Beside a `tokenizer.json` it stands in
    `tokenizer_config.json`, `special_tokens_map.json` (`eos_token`) or `generation_config.json`,
    `config.json` (`eos_token_id`); where none of them says it, see `HuggingFace`.

    >>> open_tokenizer("bytes").vocab_size
    257

    Raises:
      UsageError: there is no such file, or it can't be read as a tokenizer.
    """
    if path == BYTES:
        return Bytes()
    place, told = Path(path), f"--data.tokenizer {path or repr(path)}"
    if path and place.is_dir():
        names = ("tokenizer.json", "tokenizer.model", "spiece.model")
        found = [place / name for name in names if (place / name).is_file()]
        if not found:
            raise UsageError(f"{told}: the folder holds none of {', '.join(names)}; give the file")
        place = found[0]
    if not path.strip() or not place.is_file():
        raise UsageError(
            f"{told}: no such file; give a SentencePiece .model, a tokenizer.json, or {BYTES}"
        )
    try:
        if place.suffix == ".json":
            return HuggingFace(place.read_text(encoding="utf-8"), _end_beside(place))
        # As transformers, which sets it unless it is told not to.
        starts = _json(place.with_name("tokenizer_config.json")).get("add_bos_token", True)
        return Pieces(place.read_bytes(), bool(starts))
    except OSError as error:
        raise UsageError(f"{told}: can't be read ({error.strerror}); give another file") from None
    except ValueError as error:
        raise UsageError(
            f"{told}: {one_line(error)}; give a SentencePiece .model, or a tokenizer.json with the "
            "files that came with it"
        ) from None


def _end_beside(file: Path) -> str | None:
    """The token that ends a text by the files beside a tokenizer.json."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _json(file.with_name(name)).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    for name in ("generation_config.json", "config.json"):
        number = _json(file.with_name(name)).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            names = [t for t in _json(file).get("added_tokens", []) if t.get("id") == number]
            if names:
                return names[0].get("content")
    return None


def is_of_bytes(folder: Path) -> bool:
    """Whether weights in a folder say that bytes are their tokens, which take no file."""
    with contextlib.suppress(OSError, ValueError):
        return _json(folder / "tokenizer_config.json").get("tokenizer") == BYTES
    return False


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def encode_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """int32 ids of a prompt, and of what follows it, with `end` after them.

    Special tokens may be written in it if the tokenizer has `encode_prompt`; in documents they are
    text like any other.

    >>> encode_prompt(Bytes(), "h").tolist()
    [104, 256]
    """
    return getattr(tokenizer, "encode_prompt", tokenizer.encode)(text)


def start_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What its users set before each text; nothing for tokenizers that don't say it."""
    return tuple(getattr(tokenizer, "start", ()))


def check_vocabulary(tokenizer: Tokenizer, embeddings: int, name: str) -> None:
    """Refuses a tokenizer with more ids than a model has embeddings.

    >>> check_vocabulary(Bytes(), 257, "bytes")

    Raises:
      UsageError: it says both numbers.
    """
    if tokenizer.vocab_size > embeddings:
        raise UsageError(
            f"--data.tokenizer {name}: has {tokenizer.vocab_size} ids, more than the "
            f"{embeddings} embeddings of --model.vocab_size; give --model.vocab_size "
            f"{tokenizer.vocab_size}"
        )


def identity(tokenizer: Tokenizer, sample: str) -> str:
    """Changes with the tokenizer: by its contents if it tells their `key`, else by what it makes of
    a sample of text.

    >>> identity(Bytes(), "any") == identity(Bytes(), "other")
    True
    """
    key = getattr(tokenizer, "key", None)
    if key is not None:
        return str(key)
    shape = f"{tokenizer.vocab_size} {tokenizer.end} {start_of(tokenizer)}"
    return cache.digest([shape, tokenizer.encode(sample).tobytes()])


def fit(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains the pieces and returns the serialised model.

    Raises:
      UsageError: the text is too small for so many pieces, or has too many characters.
    """
    lines = (line for text in texts for line in text.split("\n") if line.strip())
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=out, vocab_size=vocab_size, **_SETTINGS
        )
    except RuntimeError as error:
        raise _explained(error, vocab_size) from None
    return out.getvalue()


def _explained(error: RuntimeError, vocab_size: int) -> UsageError:
    message = str(error)
    most = re.search(r"set it to a value <= (\d+)", message)
    least = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if most:
        few = int(most[1]) < LEAST_PIECES
        advice = f"the text gives fewer; give {'' if few else f'at most {most[1]}, or '}more text"
    elif least:
        advice = f"fewer than the text's characters; give at least {least[1]}"
    else:
        advice = f"SentencePiece can't train on this text ({message}); give more text"
    return UsageError(f"--data.vocab_size {vocab_size}: {advice}")


def load_or_fit(texts: Sequence[str], vocab_size: int, cache_dir: Path) -> tuple[Pieces, bool]:
    """The pieces trained on `texts`, and whether they were there already."""
    settings = f"{sorted(_SETTINGS.items())} {vocab_size} {sentencepiece.__version__}"
    folder = cache_dir / f"tokenizer-{cache.digest([settings, *texts])[:16]}"
    fitted = False

    def build(target: Path) -> None:
        nonlocal fitted
        fitted = True
        (target / "tokenizer.model").write_bytes(fit(texts, vocab_size))

    model = (cache.built(folder, build) / "tokenizer.model").read_bytes()
    return Pieces(model), not fitted
