"""First weights from a pretrained model: `--model PATH` and `--weights PATH`.

A Hugging Face folder or a .gguf file gives the model's configuration, its weights and, where the
user names none, the tokenizer.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Raw

from models import pretrained
from models.config import LlamaConfig
from train.config import Config
from train.errors import UsageError
from train.tokenizer import (
    BYTES,
    Bytes,
    HuggingFace,
    Pieces,
    Tokenizer,
    is_of_bytes,
    open_tokenizer,
)

# What must be as in the weights; all else may be chosen.
_SHAPES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "kv_heads",
    "num_layers",
    "tie_embeddings",
)
TOKENIZERS, ABOUT = ("tokenizer.json", "tokenizer.model"), "tokenizer_config.json"
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def is_path(word: str) -> bool:
    """Whether a word means a folder or file, not a name.

    >>> is_path("60m"), is_path("models/SmolLM2"), is_path("SmolLM2.gguf")
    (False, True, True)
    """
    return word.endswith(".gguf") or os.sep in word or (word != "" and Path(word).is_dir())


def name(path: str) -> str:
    """What a run on these weights is called.

    >>> name("models/SmolLM2-135M/"), name("SmolLM2.Q4_1.gguf")
    ('SmolLM2-135M', 'SmolLM2.Q4_1')
    """
    place = Path(path)
    place = place if place.name else place.resolve()
    return place.stem if place.suffix == ".gguf" else place.name


def header(path: str, flag: str = "--model") -> pretrained.Header:
    """What a folder or file says about its model.

    Raises:
      UsageError: nothing is there, it is damaged, or of another kind of model.
    """
    try:
        return pretrained.read_header(Path(path))
    except (ValueError, OSError) as error:
        raise UsageError(f"{flag} {path}: {_after(error, path)}") from None


def read(path: str, config: LlamaConfig, flag: str = "--model") -> Any:
    """The weights as nested dicts of NumPy arrays in `config.param_dtype`.

    Raises:
      UsageError: they are damaged or don't fit; the message names the tensor.
    """
    try:
        return pretrained.read_params(Path(path), config)
    except (ValueError, OSError) as error:
        raise UsageError(f"{flag} {path}: {_after(error, path)}") from None


def check(config: Config) -> None:
    """Refuses first weights of other shapes than the model's; reads headers alone."""
    if config.weights is None:
        return
    theirs = header(config.weights, "--weights").config
    for field in _SHAPES:
        ours, wanted = getattr(config.model, field), getattr(theirs, field)
        if ours != wanted:
            key = "num_kv_heads" if field == "kv_heads" else field
            raise UsageError(
                f"--model.{key} {ours}: the weights in {config.weights} are of a model with "
                f"{wanted}; leave it out, or give --model {config.weights}"
            )


def tokenizer(path: str | None) -> Tokenizer | None:
    """The tokenizer beside or within the weights; None if there is none.

    Raises:
      UsageError: there is one that can't be read.
    """
    if path is None:
        return None
    place = Path(path)
    if place.is_dir():
        files = [place / name for name in TOKENIZERS if (place / name).is_file()]
        if files:
            return open_tokenizer(str(files[0]))
        return open_tokenizer(BYTES) if is_of_bytes(place) else None
    # Here and not above: gguf is an extra.
    from models.gguf import read_tokenizer

    end = header(path).end
    try:
        text = read_tokenizer(place)
        return HuggingFace(text, None if end is None else Raw.from_str(text).id_to_token(end))
    except ValueError as error:
        raise UsageError(f"--model {path}: {_after(error, path)}") from None


def context(config: Config) -> int:
    """The longest sequence, in tokens, that the model of a run is made for."""
    length = config.train.sequence_length
    return length if config.weights is None else max(length, header(config.weights).context)


def keep_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes a tokenizer's file into a folder, for whoever uses the model there.

    That of another tokenizer goes. What the file doesn't say, the token that ends a text and the
    model's context, is written beside it.
    """
    about: dict[str, Any] = {"model_max_length": context}
    kept = None
    if isinstance(tokenizer, HuggingFace):
        raw = tokenizer._tokenizer
        kept = TOKENIZERS[0]
        (folder / kept).write_text(raw.to_str(), encoding="utf-8")
        about["tokenizer_class"] = "PreTrainedTokenizerFast"
        about["eos_token"] = raw.id_to_token(tokenizer.end)
    elif isinstance(tokenizer, Pieces):
        kept = TOKENIZERS[1]
        about["add_bos_token"] = bool(tokenizer.start)
        (folder / kept).write_bytes(tokenizer._processor.serialized_model_proto())
    elif isinstance(tokenizer, Bytes):  # which has no file
        about["tokenizer"] = BYTES
    for name in TOKENIZERS:
        if name != kept:
            (folder / name).unlink(missing_ok=True)
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def key(path: str | None) -> str | None:
    """Changes with the weights: by the files' names, sizes and samples of their contents.

    Not by all of their contents, which would take a minute for a large model at each start.
    """
    if path is None:
        return None
    place = Path(path)
    files = [place]
    if place.is_dir():
        files = sorted(p for p in place.iterdir() if p.suffix == ".safetensors")
        files.append(place / "config.json")
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        inner = file.name if place.is_dir() else ""
        total.update(f"{inner}\n{size}\n".encode())
        with open(file, "rb") as stream:
            for number in range(_SAMPLES):
                stream.seek(number * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                total.update(stream.read(_SAMPLE_BYTES))
    return total.hexdigest()


def _after(error: Exception, path: str) -> str:
    """The message without the path that is named before it anyway."""
    if isinstance(error, OSError):
        return f"{error.filename or path} can't be read ({error.strerror}); check its permissions"
    return str(error).removeprefix(f"{Path(path)}: ")
