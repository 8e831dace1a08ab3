"""Hugging Face folders: what is written comes back to the bit, and what doesn't fit is named."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models import huggingface, pretrained
from models.config import PRESETS, LlamaConfig
from models.llama import init_params

TINY = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2, num_layers=3
)


def weights(config: LlamaConfig = TINY):
    """Parameters none of which is a constant, as the norms' first ones are."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype), shapes)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


@pytest.fixture
def folder(tmp_path):
    huggingface.write(tmp_path / "m", TINY, weights(), context=64, end=3)
    return tmp_path / "m"


def edit(folder, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for key, value in changes.items():
        raw[key] = value
        if value is ...:
            del raw[key]
    path.write_text(json.dumps(raw))


def test_sizes_of_llama_1():
    counts = {name: PRESETS[name].num_params() for name in ("13b", "30b", "65b")}
    assert counts == {"13b": 13_015_864_320, "30b": 32_528_943_616, "65b": 65_285_660_672}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", [10**9, 3000])
def test_round_trip_is_bit_equal(tmp_path, dtype, tied, shard):
    config = dataclasses.replace(TINY, param_dtype=dtype, dtype=dtype, tie_embeddings=tied)
    params = weights(config)
    huggingface.write(tmp_path, config, params, context=64, end=3, max_shard_bytes=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) == (shard == 3000) == (tmp_path / huggingface.INDEX).exists()
    for file in files:
        assert sum(x.nbytes for x in load_file(file).values()) <= max(shard, 40 * 16 * 4)
    assert pretrained.read_header(tmp_path) == pretrained.Header(config, 64, 3)
    assert_same(pretrained.read_params(tmp_path, config), params)


def test_names_and_orientation_are_those_of_transformers(folder):
    stored, params = load_file(folder / "model.safetensors"), weights()
    assert len(stored) == 3 + 9 * TINY.num_layers
    assert stored["model.embed_tokens.weight"].shape == (40, 16)
    for name, path, shape in (
        ("self_attn.q_proj", "q", (16, 16)),
        ("self_attn.k_proj", "k", (8, 16)),
        ("mlp.gate_proj", "gate", (24, 16)),
        ("mlp.down_proj", "down", (16, 24)),
    ):
        kernel = stored[f"model.layers.2.{name}.weight"]
        assert kernel.shape == shape
        np.testing.assert_array_equal(kernel, params["layers"][path]["kernel"][2].T)
    norm = stored["model.layers.1.post_attention_layernorm.weight"]
    np.testing.assert_array_equal(norm, params["layers"]["mlp_norm"]["scale"][1])
    np.testing.assert_array_equal(stored["lm_head.weight"], params["head"]["kernel"].T)


def test_weights_are_cast_to_the_dtype_that_is_asked_for(folder):
    config = dataclasses.replace(TINY, param_dtype="bfloat16")
    params = pretrained.read_params(folder, config)
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights()))


def test_the_newer_and_the_older_spellings_of_transformers(folder):
    edit(folder, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    edit(folder, torch_dtype=..., dtype="bfloat16", eos_token_id=[7, 8])
    found = pretrained.read_header(folder)
    assert (found.config.rope_theta, found.config.param_dtype, found.end) == (5e5, "bfloat16", 7)
    edit(folder, rope_theta=2e4, rope_parameters=..., num_key_value_heads=..., dtype=...)
    found = pretrained.read_header(folder).config
    assert (found.rope_theta, found.num_kv_heads, found.dtype) == (2e4, None, "float32")


def test_values_of_the_configuration_are_read(folder):
    edit(folder, rms_norm_eps=1e-5, tie_word_embeddings=True, head_dim=4)
    config = pretrained.read_header(folder).config
    assert config == dataclasses.replace(TINY, rms_norm_eps=1e-5, tie_embeddings=True)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "mistral"}, 'model_type is "mistral"'),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "linear"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"rope_scaling": [1]}, "rope_scaling is [1]"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 8}, "head_dim is 8"),
        ({"num_hidden_layers": ...}, "lacks num_hidden_layers"),
        ({"hidden_size": 18}, "hidden_size=18"),
        ({"dtype": "float64"}, "float64"),
        ({"rms_norm_eps": "small"}, 'rms_norm_eps is "small"'),
        ({"rms_norm_eps": None}, "rms_norm_eps is null"),
    ],
)
def test_what_the_model_does_not_do_is_refused_by_name(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(ValueError) as error:
        pretrained.read_header(folder)
    assert words in str(error.value) and "config.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": np.ones((24, 16))}), "layers.3."),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(16)}), "q_proj.bias"),
        (lambda t: t.update({"lm_head.weight": np.ones((41, 16), "f4")}), "(41, 16)"),
        (lambda t: t.update({"model.norm.weight": np.ones(16, np.int32)}), "int32"),
        (
            lambda t: [t.pop(k) for k in list(t) if "up_proj" in k or "norm" in k],
            "lacks model.layers.0.input_layernorm.weight, model.layers.1.input_layernorm.weight, "
            "model.layers.2.input_layernorm.weight and 7 more",
        ),
    ],
)
def test_missing_unknown_and_misshaped_tensors_are_named(folder, change, words):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        pretrained.read_params(folder, TINY)
    assert words in str(error.value)


def test_a_tied_head_may_be_stored_as_well_if_it_is_the_embedding(folder):
    tensors = load_file(folder / "model.safetensors")
    config = dataclasses.replace(TINY, tie_embeddings=True)
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        pretrained.read_params(folder, config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, folder / "model.safetensors")
    params = pretrained.read_params(folder, config)
    assert "head" not in params
    assert_same(params["layers"], weights()["layers"])


def test_damaged_folders(folder, tmp_path):
    def message(path):
        with pytest.raises(ValueError) as error:
            pretrained.read_params(path, TINY)
        return str(error.value)

    weights_file = folder / "model.safetensors"
    whole = weights_file.read_bytes()
    weights_file.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors: is damaged" in message(folder)
    weights_file.write_bytes(b"no")
    assert "is damaged" in message(folder)
    weights_file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights are never loaded" in message(folder)
    assert "no such folder" in message(tmp_path / "nowhere")
    (tmp_path / "x.bin").write_bytes(b"x")
    assert "is no .gguf file" in message(tmp_path / "x.bin")


def test_weights_of_eight_bits_are_named(folder):
    path = folder / huggingface.WEIGHTS
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{name} is stored as F8_E4M3; give weights in float32"):
        pretrained.read_params(folder, TINY)


def test_damaged_shards(tmp_path):
    huggingface.write(tmp_path / "m", TINY, weights(), max_shard_bytes=4000)
    index = tmp_path / "m" / huggingface.INDEX
    raw = json.loads(index.read_text())

    def message():
        with pytest.raises(ValueError) as error:
            pretrained.read_params(tmp_path / "m", TINY)
        return str(error.value)

    last = raw["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": f"../{last}"}}))
    assert "no weight_map of names of files beside it" in message()
    first = raw["weight_map"]["model.embed_tokens.weight"]
    raw["weight_map"]["lm_head.weight"] = first
    index.write_text(json.dumps(raw))
    assert first in message() and "lm_head.weight" in message()
    (tmp_path / "m" / last).unlink()
    raw["weight_map"]["lm_head.weight"] = last
    index.write_text(json.dumps(raw))
    assert f"{last}: is missing" in message()
    huggingface.write(tmp_path / "m", TINY, weights(), max_shard_bytes=4000)
    extra = {"model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32)}
    save_file(load_file(tmp_path / "m" / first) | extra, tmp_path / "m" / first)
    assert f"{first}: holds model.layers.0.self_attn.q_proj.bias, which" in message()
    index.write_text("{")
    assert "is not JSON" in message()
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(ValueError, match="no such folder"):
        pretrained.read_header(tmp_path / "m")
    (tmp_path / "m").mkdir()
    with pytest.raises(ValueError, match="config.json: no such file"):
        pretrained.read_header(tmp_path / "m")
