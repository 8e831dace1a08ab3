"""A SentencePiece tokenizer, trained once on the training split and kept.

Byte-pair pieces without any normalisation, and a piece for every byte, so that text comes back as
it was (the one exception: U+2581, SentencePiece's sign for a space, comes back as a space).
"""

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from train import cache
from train.config import LEAST_PIECES
from train.errors import UsageError

UNKNOWN, END = 0, 1  # ids; END stands before the first document and after each
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


class Tokenizer:
    """Text to ids and back.

    Args:
      model: a serialised SentencePiece model.
    """

    def __init__(self, model: bytes):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of a document, with END after it."""
        return np.asarray([*self._processor.encode(text), END], np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without END."""
        return self._processor.decode([int(i) for i in ids if i != END])

    def __reduce__(self):
        return Tokenizer, (self._model,)


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


def load_or_fit(texts: Sequence[str], vocab_size: int, cache_dir: Path) -> tuple[Tokenizer, bool]:
    """The tokenizer of `texts`, and whether it was there already."""
    settings = f"{sorted(_SETTINGS.items())} {vocab_size} {sentencepiece.__version__}"
    folder = cache_dir / f"tokenizer-{cache.digest([settings, *texts])[:16]}"
    fitted = False

    def build(target: Path) -> None:
        nonlocal fitted
        fitted = True
        (target / "tokenizer.model").write_bytes(fit(texts, vocab_size))

    model = (cache.built(folder, build) / "tokenizer.model").read_bytes()
    return Tokenizer(model), not fitted
