"""Hugging Face folders of a LLaMA: `config.json` beside safetensors, whole or in shards."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy, and so safetensors, bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.config import FLOATS, LlamaConfig
from models.pretrained import Header, Params, Place, check, fill, leaf_at, places

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# Tables that the configuration gives anyway; old checkpoints hold them.
_TABLES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def read_header(folder: Path) -> Header:
    """The model that `config.json` describes, with the dtype in which its weights are stored.

    Raises:
      ValueError: the file is missing or damaged, or the model is not one that `models.llama`
        computes.
    """
    path = folder / CONFIG
    raw = _read_json(path)

    def refuse(key: str, remedy: str) -> None:
        raise ValueError(f"{path}: {key} is {json.dumps(raw.get(key))}; {remedy}")

    if raw.get("model_type") != "llama":
        refuse("model_type", "only llama is computed here")
    if raw.get("architectures") not in (None, ["LlamaForCausalLM"]):
        refuse("architectures", 'only ["LlamaForCausalLM"] is computed here')
    for key, value in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if raw.get(key, value) != value:
            refuse(key, f"the model here has {json.dumps(value)} alone")
    if raw.get("quantization_config") is not None:
        refuse("quantization_config", "give unquantised weights, or a .gguf file")
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key) or {}
        plain = isinstance(rope, dict) and rope.get("rope_type", rope.get("type"))
        if plain not in (None, "default"):
            refuse(key, _PLAIN_ROPE)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(raw.get("rms_norm_eps", 1e-6), int | float):
        refuse("rms_norm_eps", "give a number")
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    heads = raw.get("num_attention_heads")
    with _named(path):
        config = LlamaConfig(
            vocab_size=_get(raw, "vocab_size"),
            hidden_size=_get(raw, "hidden_size"),
            intermediate_size=_get(raw, "intermediate_size"),
            num_heads=_get(raw, "num_attention_heads"),
            num_kv_heads=_fewer(raw.get("num_key_value_heads"), heads),
            num_layers=_get(raw, "num_hidden_layers"),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            param_dtype=dtype,
            dtype=dtype,
        )
    if raw.get("head_dim") not in (None, config.head_dim):
        refuse("head_dim", f"here it is hidden_size / num_attention_heads = {config.head_dim}")
    end = raw.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    context = raw.get("max_position_embeddings")
    return Header(
        config,
        context if isinstance(context, int) and context > 0 else 2048,
        end if isinstance(end, int) else None,
    )


_PLAIN_ROPE = "the rotary positions here are not scaled"


def read_params(folder: Path, config: LlamaConfig) -> Params:
    """The weights in a folder, in `config.param_dtype`, as nested dicts of NumPy arrays.

    Raises:
      ValueError: a file is missing or damaged, or a tensor is missing, unknown or of another shape
        than `config` asks for; the message names it.
    """
    files = _files(folder)
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(_open(path)) for path in set(files.values())}
        for path, file in opened.items():
            for name in sorted(set(file.keys()) - files.keys()):
                if not _TABLES.fullmatch(name):
                    raise ValueError(
                        f"{path}: holds {name}, which {INDEX} does not list; nothing is left out "
                        "silently; download both again"
                    )
        stored: dict[str, tuple[int, ...]] = {}
        for name, path in files.items():
            with _named(path):
                stored[name] = tuple(opened[path].get_slice(name).get_shape())
        ties = config.tie_embeddings and "lm_head.weight" in stored
        if ties:
            del stored["lm_head.weight"]
        stored = {name: shape for name, shape in stored.items() if not _TABLES.fullmatch(name)}
        where = places(config, "hf")
        check(where, stored, folder)
        for name in stored:
            # NumPy has no such types, and safetensors says so in words of its own.
            kind = opened[files[name]].get_slice(name).get_dtype()
            if kind.startswith(("F8", "F6", "F4")):
                raise ValueError(
                    f"{files[name]}: {name} is stored as {kind}; give weights in "
                    f"{', '.join(FLOATS)}"
                )

        def tensors() -> Iterator[tuple[str, np.ndarray]]:
            for name in stored:
                with _named(files[name]):
                    yield name, opened[files[name]].get_tensor(name)

        params = fill(config, where, tensors())
        if ties:
            with _named(files["lm_head.weight"]):
                head = opened[files["lm_head.weight"]].get_tensor("lm_head.weight")
            if not np.array_equal(head.astype(config.param_dtype), params["embed"]["embedding"]):
                raise ValueError(
                    f"{folder}: lm_head.weight differs from model.embed_tokens.weight, to which "
                    f"{CONFIG} ties it; set tie_word_embeddings to false there"
                )
    return params


def write(
    folder: Path,
    config: LlamaConfig,
    params: Any,
    *,
    context: int = 2048,
    end: int | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model as a Hugging Face folder, in the dtype of its parameters.

    Args:
      folder: is made if it isn't there.
      config: of the model.
      params: plain arrays, as `models.llama.init_params` gives them.
      context: written as `max_position_embeddings`.
      end: id of the token that ends a text, written as `eos_token_id`.
      max_shard_bytes: weights beyond it go into several files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = places(config, "hf")
    item = np.dtype(leaf_at(params, "embed/embedding").dtype).itemsize
    size = lambda name: item * int(np.prod(names[name].shape, dtype=np.int64))
    shards = _shards({name: size(name) for name in names}, max_shard_bytes)
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        tensors = {name: _tensor(params, names[name]) for name in shard}
        # transformers asks for this word.
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(size, names))},
            "weight_map": {n: f for f, shard in zip(files, shards, strict=True) for n in shard},
        }
        _write_json(folder / INDEX, index)
    stored = np.dtype(leaf_at(params, "embed/embedding").dtype).name
    _write_json(folder / CONFIG, _to_json(config, stored, context, end))


def _tensor(params: Any, place: Place) -> np.ndarray:
    leaf = leaf_at(params, place.path)
    value = np.asarray(leaf if place.layer is None else leaf[place.layer])
    # safetensors writes the bytes as they lie, whatever the strides.
    return np.ascontiguousarray(value.T if place.transpose else value)


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in groups of at most `most` bytes, or of one name."""
    groups: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups


def _files(folder: Path) -> dict[str, Path]:
    """The file of each tensor, by name."""
    if (folder / WEIGHTS).is_file():
        with _open(folder / WEIGHTS) as file:
            return dict.fromkeys(file.keys(), folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
        raise ValueError(
            f"{folder}: holds neither {WEIGHTS} nor {INDEX}; "
            + ("its pickled weights are never loaded: " if pickled else "")
            + "give weights as safetensors"
        )
    files = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in files.values()
    ):
        raise ValueError(f"{folder / INDEX}: has no weight_map of names of files beside it")
    return {tensor: folder / name for tensor, name in files.items()}


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: is missing; download it again")
    with _named(path):
        return safe_open(path, framework="np")


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the file's name before what is wrong with it."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged ({error}); download it again") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _get(raw: Mapping[str, Any], key: str) -> Any:
    if key not in raw:
        raise ValueError(f"lacks {key}; give the whole configuration of a LLaMA")
    return raw[key]


def _fewer(kv_heads: int | None, heads: int | None) -> int | None:
    return None if kv_heads == heads else kv_heads


def _to_json(config: LlamaConfig, stored: str, context: int, end: int | None) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "num_hidden_layers": config.num_layers,
        "max_position_embeddings": context,
        "rms_norm_eps": config.rms_norm_eps,
        # The older and the newer spelling of transformers.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": config.initializer_range,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": None,
        "torch_dtype": stored,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a folder of a Hugging Face model")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is no JSON object; download it again")
    return value
