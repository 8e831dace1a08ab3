"""Generation with a cache: the tokens and logits of the model without one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import generate as module
from models.config import LlamaConfig
from models.generate import Sampling, decode, draw, generate, prefill
from models.llama import graphdef, merge
from tests.test_pretrained import weights

TINY = LlamaConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=40,
    num_heads=4,
    num_kv_heads=2,
    num_layers=2,
)
PROMPTS = [np.array(ids, np.int32) for ids in ([5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7])]


@pytest.fixture(scope="module")
def params():
    return weights(TINY)


@functools.lru_cache
def model(config):
    return jax.jit(lambda params, tokens: merge(graphdef(config), params)(tokens))


def logits(params, ids, config=TINY):
    """After the last id. One length for all: what comes later is not seen."""
    tokens = np.zeros((1, 24), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(model(config)(params, tokens))[0, len(ids) - 1]


def test_logits_are_those_of_the_model_without_a_cache():
    config = dataclasses.replace(TINY, tie_embeddings=True, num_layers=3)
    params = jax.tree.map(lambda x: x / 2, weights(config))
    lengths = np.array([len(p) for p in PROMPTS], np.int32)
    tokens = np.zeros((3, 8), np.int32)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    rows = [list(prompt) for prompt in PROMPTS]
    begin = jax.jit(lambda params, *args: prefill(config, params, *args, 12))
    found, cache = begin(params, tokens, lengths)
    step = jax.jit(lambda *args: decode(config, params, *args))
    for count in range(4):
        for row, ids in enumerate(rows):
            np.testing.assert_allclose(
                found[row], logits(params, ids, config), rtol=1e-5, atol=1e-5
            )
        new = np.asarray([7 * count + 11, count, 30], np.int32)
        for ids, token in zip(rows, new, strict=True):
            ids.append(int(token))
        found, cache = step(new, lengths + count, cache)


def test_greedy_is_the_argmax_of_the_model_and_a_batch_changes_nothing(params):
    together = generate(TINY, params, PROMPTS, 9, context=16, temperature=0)
    for prompt, found in zip(PROMPTS, together, strict=True):
        ids = list(prompt)
        for _ in range(9):
            ids.append(int(logits(params, ids).argmax()))
        assert ids[len(prompt) :] == found.tolist()
    # In other company, in another place, the same.
    others = [PROMPTS[2], PROMPTS[2], PROMPTS[0]]
    alone = generate(TINY, params, others, 9, context=16, temperature=0)
    assert alone[0].tolist() == alone[1].tolist() == together[2].tolist()
    assert len({tuple(t) for t in together}) == 3


def test_rows_stop_at_the_end_on_their_own(params):
    free = generate(TINY, params, PROMPTS, 9, context=16, temperature=0)
    end = int(free[0][3])
    found = generate(TINY, params, PROMPTS, 9, context=16, temperature=0, end=end)
    for whole, part in zip(free, found, strict=True):
        cut = whole.tolist().index(end) if end in whole else len(whole)
        assert part.tolist() == whole[:cut].tolist()
    assert len(found[0]) <= 3


def test_one_program_for_all_settings_and_lengths(params, monkeypatch):
    traced = []
    inner = module.prefill
    monkeypatch.setattr(module, "prefill", lambda *a: traced.append(1) or inner(*a))
    module._generate.clear_cache()
    draws = set()
    for seed, prompts in enumerate((PROMPTS, PROMPTS[::-1], [PROMPTS[0]] * 3)):
        found = generate(
            TINY, params, prompts, 9, context=99, temperature=1 + seed, top_k=9 + seed, seed=seed
        )
        draws.add(str(found))
    assert len(traced) == 1 and len(draws) == 3


def test_the_seed_decides(params):
    run = lambda seed: [
        r.tolist() for r in generate(TINY, params, PROMPTS, 9, context=16, seed=seed)
    ]
    assert run(0) == run(0) != run(1)


def counts(sampling, scores, draws=4000):
    many = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (draws, len(scores)))
    found = np.asarray(draw(many, sampling, jax.random.key(0)))
    return np.bincount(found, minlength=len(scores)) / draws


def sampling(temperature=1.0, top_k=5, top_p=1.0, known=5):
    return Sampling(
        jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.int32(known)
    )


def test_ids_that_the_tokenizer_does_not_have_are_not_drawn():
    scores = [0.0, 1.0, 0.5, 9.0, 9.0]
    assert np.all(counts(sampling(known=3), scores)[3:] == 0)
    assert np.argmax(counts(sampling(temperature=0.0, known=3), scores)) == 1


def test_draws_have_the_distribution_that_is_asked_for():
    scores = np.log([0.1, 0.4, 0.05, 0.25, 0.2])
    share = np.exp(scores)
    np.testing.assert_allclose(counts(sampling(), scores), share, atol=0.03)
    np.testing.assert_allclose(
        counts(sampling(temperature=0.5), scores), share**2 / (share**2).sum(), atol=0.03
    )
    two = np.array([0, 0.4, 0, 0.25, 0]) / 0.65
    np.testing.assert_allclose(counts(sampling(top_k=2), scores), two, atol=0.03)
    # 0.4 alone is less than 0.5: the next one is needed, the third is not.
    np.testing.assert_allclose(counts(sampling(top_p=0.5), scores), two, atol=0.03)
    assert counts(sampling(top_p=1e-6), scores)[1] == 1
    assert counts(sampling(temperature=0), scores)[1] == 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": [np.array([], np.int32)]}, "prompt 1 has no token"),
        ({"prompts": [PROMPTS[0], np.array([60])]}, "prompt 2 holds an id outside"),
        ({"prompts": [np.arange(14)]}, "14 tokens, which with max_tokens=3"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_impossible_requests(params, change, words):
    request = {"prompts": PROMPTS, "max_tokens": 3, "context": 16, **change}
    with pytest.raises(ValueError, match=words):
        generate(TINY, params, **request)
