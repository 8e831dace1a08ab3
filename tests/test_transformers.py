"""The models that transformers loads and writes: the same logits here and there.

Slow, and skipped without torch and transformers, which the trainer never needs:
`pip install torch transformers` beside what is there.
"""

import dataclasses

import jax
import numpy as np
import pytest

from models import huggingface, pretrained
from models.config import LlamaConfig
from models.llama import graphdef, merge
from tests.test_pretrained import assert_same, weights

torch = pytest.importorskip("torch", reason="torch isn't installed")
transformers = pytest.importorskip("transformers", reason="transformers isn't installed")
pytestmark = pytest.mark.slow

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    num_layers=3,
    rms_norm_eps=1e-5,
    rope_theta=5e4,
)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 40)).astype(np.int32)


def logits(config, params):
    return np.asarray(jax.jit(lambda p: merge(graphdef(config), p)(TOKENS))(params))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", [10**9, 30_000])
def test_an_exported_model_has_the_same_logits_there(tmp_path, tied, shard):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = weights(config)
    huggingface.write(tmp_path, config, params, context=64, end=1, max_shard_bytes=shard)
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found = theirs(torch.tensor(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(found, logits(config, params), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_theirs_has_the_same_logits_here(tmp_path, dtype):
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=3,
            rms_norm_eps=1e-5,
            initializer_range=0.2,
            max_position_embeddings=77,
        )
    ).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    header = pretrained.read_header(tmp_path)
    assert header.context == 77 and header.config.param_dtype == dtype
    # Computed in float32, from the same weights.
    config = dataclasses.replace(header.config, param_dtype="float32", dtype="float32")
    # Loaded anew: `float()` would keep the positions' angles of few bits.
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        found = theirs(torch.tensor(TOKENS).long()).logits.numpy()
    params = pretrained.read_params(tmp_path, config)
    np.testing.assert_allclose(logits(config, params), found, rtol=2e-5, atol=2e-5)
    stored = pretrained.read_params(tmp_path, header.config)
    huggingface.write(tmp_path / "again", header.config, stored)
    assert_same(pretrained.read_params(tmp_path / "again", header.config), stored)
