"""What formats of pretrained weights share: one table of names, and checks on every shape.

`models.huggingface` and `models.gguf` read the files. Everything is checked against their headers
before a tensor is read; then tensor after tensor goes into the stacked arrays, so that no second
copy ever exists.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.config import FLOATS, LlamaConfig
from models.llama import init_params

Params = dict[str, Any]


class Rule(NamedTuple):
    """One part of the model under its names; {} stands for the layer's number."""

    path: str  # here, see `models.llama`
    hf: str  # in safetensors
    gguf: str
    transpose: bool  # stored as (outputs, inputs) there


RULES = (
    Rule("embed/embedding", "model.embed_tokens.weight", "token_embd.weight", False),
    *(
        Rule(f"layers/{ours}", f"model.layers.{{}}.{hf}.weight", f"blk.{{}}.{gguf}.weight", turn)
        for ours, hf, gguf, turn in (
            ("attention_norm/scale", "input_layernorm", "attn_norm", False),
            ("q/kernel", "self_attn.q_proj", "attn_q", True),
            ("k/kernel", "self_attn.k_proj", "attn_k", True),
            ("v/kernel", "self_attn.v_proj", "attn_v", True),
            ("o/kernel", "self_attn.o_proj", "attn_output", True),
            ("mlp_norm/scale", "post_attention_layernorm", "ffn_norm", False),
            ("gate/kernel", "mlp.gate_proj", "ffn_gate", True),
            ("up/kernel", "mlp.up_proj", "ffn_up", True),
            ("down/kernel", "mlp.down_proj", "ffn_down", True),
        )
    ),
    Rule("norm/scale", "model.norm.weight", "output_norm.weight", False),
    Rule("head/kernel", "lm_head.weight", "output.weight", True),
)


class Header(NamedTuple):
    """What a folder or file says about its model."""

    config: LlamaConfig
    context: int  # the longest sequence that it was made for
    end: int | None  # id of the token that ends a text


class Place(NamedTuple):
    """Where a tensor goes."""

    path: str
    layer: int | None
    transpose: bool
    shape: tuple[int, ...]  # as it is stored


def read_header(path: Path) -> Header:
    """What a Hugging Face folder or a .gguf file says about its model.

    Raises:
      ValueError: it is neither, is damaged, or holds a model that `models.llama` doesn't compute.
    """
    return _format(path).read_header(path)


def read_params(path: Path, config: LlamaConfig) -> Params:
    """The weights in a folder or file, in `config.param_dtype`, as nested dicts of NumPy arrays.

    Raises:
      ValueError: a file is missing or damaged, or a tensor is missing, unknown or of another shape
        than `config` asks for; the message names it.
    """
    return _format(path).read_params(path, config)


def _format(path: Path) -> Any:
    # Here and not above: they stand on this module, and gguf is an extra.
    from models import gguf, huggingface

    if path.is_dir():
        return huggingface
    if not path.is_file():
        raise ValueError(f"{path}: no such folder or file; give a Hugging Face folder or a .gguf")
    if path.suffix != ".gguf":
        raise ValueError(f"{path}: is no .gguf file; give one, or the folder of safetensors")
    return gguf


def places(config: LlamaConfig, form: str) -> dict[str, Place]:
    """All tensors of a model by their names in a format, `hf` or `gguf`.

    >>> config = LlamaConfig(hidden_size=8, num_heads=2, num_layers=1, intermediate_size=12)
    >>> places(config, "hf")["model.layers.0.mlp.down_proj.weight"]
    Place(path='layers/down/kernel', layer=0, transpose=True, shape=(8, 12))
    """
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    found = {}
    for rule in RULES:
        if rule.path == "head/kernel" and config.tie_embeddings:
            continue
        shape, name = leaf_at(shapes, rule.path).shape, getattr(rule, form)
        layers = range(config.num_layers) if "{}" in name else [None]
        shape = shape[1:] if "{}" in name else shape
        shape = shape[::-1] if rule.transpose else shape
        for layer in layers:
            found[name.format(layer)] = Place(rule.path, layer, rule.transpose, shape)
    return found


def check(
    where: Mapping[str, Place], stored: Mapping[str, tuple[int, ...]], source: object
) -> None:
    """Raises ValueError unless exactly the tensors of `where` are stored, with their shapes."""
    if missing := [name for name in where if name not in stored]:
        raise ValueError(f"{source}: lacks {_some(missing)}, which its configuration asks for")
    if unknown := [name for name in stored if name not in where]:
        raise ValueError(
            f"{source}: {_some(unknown)} unknown in a LLaMA of {_layers(where)} layers; nothing "
            "is left out silently; give the weights of a plain LLaMA"
        )
    for name, place in where.items():
        if tuple(stored[name]) != place.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(stored[name])} where the configuration asks "
                f"for {place.shape}; give the configuration that belongs to these weights"
            )


def fill(
    config: LlamaConfig, where: Mapping[str, Place], tensors: Iterable[tuple[str, np.ndarray]]
) -> Params:
    """Puts tensors, one after the other, into new stacked arrays; all of `where` must come."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    for name, tensor in tensors:
        place, kind = where[name], np.dtype(tensor.dtype)
        if not jnp.issubdtype(kind, np.floating):
            raise ValueError(f"{name} is stored as {kind}; give weights in {', '.join(FLOATS)}")
        leaf = leaf_at(params, place.path)
        target = leaf if place.layer is None else leaf[place.layer]
        target[...] = tensor.T if place.transpose else tensor
    return params


def leaf_at(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def _layers(where: Mapping[str, Place]) -> int:
    return 1 + max(place.layer or 0 for place in where.values())


def _some(names: list[str]) -> str:
    """
    >>> _some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
