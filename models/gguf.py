"""Weights and tokenizers from GGUF files (llama.cpp's format), read by the package `gguf`.

llama.cpp rotates neighbouring pairs of a head's features where `models.llama`, as Hugging Face,
rotates its halves; for that its files hold the rows of q and k in another order, which is undone
here. Quantised tensors are dequantised, one at a time.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from models.config import LlamaConfig
from models.pretrained import Header, Params, check, fill, places

# The kinds of tokens that stand for themselves in a text.
_CONTROL, _USER_DEFINED = 3, 4


def read_header(path: Path) -> Header:
    """The model that a file's metadata describes; its parameters are to be float32.

    Raises:
      ValueError: the file is damaged, or the model is not one that `models.llama` computes.
    """
    return _header(_open(path), path)


def read_params(path: Path, config: LlamaConfig) -> Params:
    """The weights in a file, in `config.param_dtype`, as nested dicts of NumPy arrays.

    Raises:
      ValueError: a tensor is missing, unknown, of another shape than `config` asks for, or of a
        type that the package can't dequantise; the message names it.
    """
    from gguf import dequantize

    reader = _open(path)
    where = places(config, "gguf")
    # Their shapes are stored with the last axis first.
    check(where, {t.name: tuple(map(int, reversed(t.shape))) for t in reader.tensors}, path)
    heads = {"layers/q/kernel": config.num_heads, "layers/k/kernel": config.kv_heads}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for tensor in reader.tensors:
            place = where[tensor.name]
            try:
                value = dequantize(tensor.data, tensor.tensor_type).reshape(place.shape)
            except NotImplementedError:
                raise ValueError(
                    f"{path}: {tensor.name} is of the type {tensor.tensor_type.name}, which the "
                    "package gguf can't dequantise; give the file in another type, e.g. Q8_0"
                ) from None
            count = heads.get(place.path)
            yield tensor.name, value if count is None else unpermute(value, count)

    return fill(config, where, tensors())


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * D, inputs) from the order of pairs to that of halves.

    >>> unpermute(np.array([0, 2, 1, 3])[:, None], 1).ravel().tolist()
    [0, 1, 2, 3]
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def read_tokenizer(path: Path) -> str:
    """The file's tokenizer as the text of a `tokenizer.json`.

    Raises:
      ValueError: it has none, or one of a kind that isn't known here.
    """
    reader = _open(path)
    kind = _get(reader, "tokenizer.ggml.model", path)
    tokens = _get(reader, "tokenizer.ggml.tokens", path)
    types = _get(reader, "tokenizer.ggml.token_type", path, [1] * len(tokens))
    if kind == "gpt2":
        merges = _get(reader, "tokenizer.ggml.merges", path)
        before = _get(reader, "tokenizer.ggml.pre", path, "default")
        tokenizer = _byte_level(tokens, merges, before, path)
    elif kind == "llama":
        scores = _get(reader, "tokenizer.ggml.scores", path)
        prefix = bool(_get(reader, "tokenizer.ggml.add_space_prefix", path, True))
        tokenizer = _sentencepiece(tokens, scores, types, prefix)
    else:
        raise ValueError(
            f"{path}: its tokenizer is of the kind {kind!r}, and only 'gpt2' and 'llama' are read; "
            "give a tokenizer of yours"
        )
    from tokenizers import AddedToken, processors

    for token, sort in zip(tokens, types, strict=True):
        if sort in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, special=sort == _CONTROL, normalized=False)
            (tokenizer.add_special_tokens if sort == _CONTROL else tokenizer.add_tokens)([added])
    first = _first_token(reader, kind, path)
    if first is not None:
        name = tokens[first]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[name, "$A"], special_tokens=[(name, first)]
        )
    return tokenizer.to_str()


def _first_token(reader: Any, kind: str, path: Path) -> int | None:
    """The token that stands before each text; None if there is none."""
    # As llama.cpp decides where the file doesn't say.
    if not _get(reader, "tokenizer.ggml.add_bos_token", path, kind == "llama"):
        return None
    return _get(reader, "tokenizer.ggml.bos_token_id", path, None)


# How a text is cut before its parts are merged, by the name in the file.
_DIGITS = r"\p{N}"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(tokens: list[str], merges: list[str], before: str, path: Path) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated")
    known: dict[str, list[Any]] = {
        "default": [level],
        "gpt-2": [level],
        "smollm": [split(_DIGITS), level],
        "llama-bpe": [
            split(_LLAMA3),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    if before not in known:
        raise ValueError(
            f"{path}: its tokenizer cuts texts as {before!r}, which isn't known here (but "
            f"{', '.join(known)}); give a tokenizer of yours"
        )
    pairs = [(a, b) for a, _, b in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Meta's own takes a whole word that is a token as it is.
    whole = before == "llama-bpe"
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=whole))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(known[before])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: list[str], scores: list[float], types: list[int], prefix: bool) -> Any:
    """SentencePiece's byte-pair pieces: two pieces merge if the joint is one, best score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = []
    for i, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                pairs.append((-scores[i], vocabulary[left], vocabulary[right], left, right))
    merges = [pair[3:] for pair in sorted(pairs)]
    unknown = next((token for token, sort in zip(tokens, types, strict=True) if sort == 2), None)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    )
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*after, decoders.Strip(" ", 1, 0)] if prefix else after)
    return tokenizer


def _header(reader: Any, path: Path) -> Header:
    get = lambda key, *default: _get(reader, key, path, *default)
    architecture = get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: its architecture is {architecture}; only llama is computed here")
    scaling = get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(
            f"{path}: llama.rope.scaling.type is {scaling}; the rotary positions here aren't scaled"
        )
    if get("llama.expert_count", 0):
        raise ValueError(f"{path}: has experts; only dense models are computed here")
    names = {tensor.name: tensor for tensor in reader.tensors}
    heads = get("llama.attention.head_count")
    kv_heads = get("llama.attention.head_count_kv", heads)
    tokens = reader.get_field("tokenizer.ggml.tokens")
    with _named(path):
        config = LlamaConfig(
            vocab_size=int(get("llama.vocab_size") if tokens is None else len(tokens.data)),
            hidden_size=int(get("llama.embedding_length")),
            intermediate_size=int(get("llama.feed_forward_length")),
            num_heads=int(heads),
            num_kv_heads=None if kv_heads == heads else int(kv_heads),
            num_layers=int(get("llama.block_count")),
            rms_norm_eps=float(get("llama.attention.layer_norm_rms_epsilon", 1e-6)),
            rope_theta=float(get("llama.rope.freq_base", 10000.0)),
            tie_embeddings="output.weight" not in names,
        )
    if (size := get("llama.rope.dimension_count", config.head_dim)) != config.head_dim:
        raise ValueError(
            f"{path}: rotates {size} features of a head; here it is all {config.head_dim}"
        )
    end = get("tokenizer.ggml.eos_token_id", None)
    return Header(config, int(get("llama.context_length", 2048)), end)


_NEEDED = object()


def _get(reader: Any, key: str, path: Path, default: Any = _NEEDED) -> Any:
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is _NEEDED:
        raise ValueError(f"{path}: lacks {key}; give the file of a whole model")
    return default


def _open(path: Path) -> Any:
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); check the path") from None
    return _reader(path, found.st_mtime_ns, found.st_size)


# A vocabulary takes seconds to read, and is asked for several times.
@functools.lru_cache(maxsize=1)
def _reader(path: Path, *state: int) -> Any:
    """The file at `path`; `state` changes when the file does."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(
            f"{path}: is read by the package gguf, which isn't there; pip install gguf"
        ) from None
    try:
        return GGUFReader(path)
    # A damaged file ends in whatever its numbers lead to.
    except Exception as error:
        raise ValueError(
            f"{path}: can't be read as GGUF ({type(error).__name__}: {error}); download it again"
        ) from None


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None
