"""The model against Hugging Face's LLaMA, against itself in its other forms, and its contract."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention, backend, losses
from models.config import PRESETS, LlamaConfig
from models.llama import Llama, graphdef, init_params, merge, pieces, split, subspace_rules

GOLDEN = Path(__file__).parent / "golden"
SMALL = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    num_layers=2,
    initializer_range=0.2,
)

# transformers' name -> path here; its kernels are (outputs, inputs), ours (inputs, outputs).
HF_LAYER = {
    "self_attn.q_proj": ("q", "kernel"),
    "self_attn.k_proj": ("k", "kernel"),
    "self_attn.v_proj": ("v", "kernel"),
    "self_attn.o_proj": ("o", "kernel"),
    "mlp.gate_proj": ("gate", "kernel"),
    "mlp.up_proj": ("up", "kernel"),
    "mlp.down_proj": ("down", "kernel"),
    "input_layernorm": ("attention_norm", "scale"),
    "post_attention_layernorm": ("mlp_norm", "scale"),
}


def from_hf(tensors, num_layers):
    """Our nested dicts from a flat dict of transformers' names; every tensor is used once."""
    rest = dict(tensors)
    params = {
        "embed": {"embedding": rest.pop("model.embed_tokens.weight")},
        "norm": {"scale": rest.pop("model.norm.weight")},
        "layers": {},
    }
    if "lm_head.weight" in rest:
        params["head"] = {"kernel": rest.pop("lm_head.weight").T}
    for name, (module, leaf) in HF_LAYER.items():
        stack = [rest.pop(f"model.layers.{i}.{name}.weight") for i in range(num_layers)]
        params["layers"][module] = {leaf: np.stack([a.T if a.ndim == 2 else a for a in stack])}
    assert not rest, f"unused tensors: {sorted(rest)}"
    return jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def golden():
    raw = json.loads((GOLDEN / "hf_tiny_gqa" / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        num_layers=raw["num_hidden_layers"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope_theta=raw["rope_parameters"]["rope_theta"],
        tie_embeddings=raw["tie_word_embeddings"],
    )
    with np.load(GOLDEN / "hf_tiny_gqa.npz") as data:
        arrays = dict(data)

    def tree(prefix):
        flat = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        return from_hf(flat, config.num_layers)

    return config, arrays, tree("param/"), tree("grad/")


def tokens_of(config, batch=2, length=12, seed=0):
    key = jax.random.key(seed)
    return jax.random.randint(key, (batch, length + 1), 0, config.vocab_size, jnp.int32)


def params_of(config, seed=0):
    """Random values in the shapes of `init_params`, which itself takes seconds to compile."""
    rng = np.random.default_rng(seed)

    def value(leaf):
        return jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    params = jax.tree.map(value, jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    for norm in (params["norm"], *(params["layers"][n] for n in ("attention_norm", "mlp_norm"))):
        norm["scale"] += 1
    return params


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens):
    return merge(graphdef(config), params)(tokens)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(config, params, tokens, mask=None):
    return merge(graphdef(config), params).loss(tokens[:, :-1], tokens[:, 1:], mask)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(config, params, tokens, mask=None):
    return jax.value_and_grad(lambda params: loss_of(config, params, tokens, mask)[0])(params)


# One layer, where the number of layers does not matter: programs compile faster.
SHALLOW = dataclasses.replace(SMALL, num_layers=1)

# Every attention and every loss, without their whole product.
PAIRS = [("dot_product", "logits"), ("einsum", "fused"), ("blocked", "fused")]


def close(actual, expected, tolerance):
    """Relative to the largest entry of each leaf: single entries near zero carry no digits."""
    flat, _ = jax.tree_util.tree_flatten_with_path(expected)
    found = jax.tree.leaves(actual)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, want), got in zip(flat, found, strict=True):
        want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
        assert want.shape == got.shape
        error = np.abs(want - got).max() / max(np.abs(want).max(), 1e-30)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


class TestHuggingFace:
    """Equality with transformers 5's LlamaForCausalLM, of every implementation."""

    def test_logits(self, golden):
        config, arrays, params, _ = golden
        logits = logits_of(config, params, arrays["tokens"])
        assert logits.dtype == jnp.float32
        close(logits, arrays["logits"], 1e-5)

    @pytest.mark.parametrize(("name", "loss"), PAIRS)
    def test_loss_and_every_gradient(self, golden, name, loss):
        config, arrays, params, expected = golden
        config = dataclasses.replace(config, attention=name, loss=loss)
        value, grads = loss_and_grads(config, params, jnp.asarray(arrays["tokens"]))
        np.testing.assert_allclose(value, arrays["loss"], rtol=1e-6)
        close(grads, expected, 1e-4)


class TestConfig:
    KNOWN: ClassVar = {
        "60m": 58_073_600,
        "130m": 134_105_856,
        "350m": 367_969_280,
        "1b": 1_339_082_752,
    }

    @pytest.mark.parametrize("name", PRESETS)
    def test_preset_shapes_count_to_the_formula(self, name):
        config = PRESETS[name]
        d, f, layers = config.hidden_size, config.intermediate_size, config.num_layers
        by_hand = 2 * config.vocab_size * d + layers * (4 * d * d + 3 * d * f + 2 * d) + d
        shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == by_hand == config.num_params()

    def test_known_sizes(self):
        assert {name: PRESETS[name].num_params() for name in self.KNOWN} == self.KNOWN
        assert PRESETS["7b"].num_params() == 6_738_415_616
        assert PRESETS["100m"].vocab_size == 32_100
        assert len(PRESETS) == 17

    @pytest.mark.parametrize("kv", [None, 1, 2, 4])
    @pytest.mark.parametrize("tied", [False, True])
    def test_count_with_grouped_heads_and_ties(self, kv, tied):
        config = dataclasses.replace(SMALL, num_kv_heads=kv, tie_embeddings=tied)
        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.num_params()

    @pytest.mark.parametrize(
        ("field", "value", "remedy"),
        [
            ("vocab_size", 0, "positive whole number"),
            ("num_layers", 2.5, "positive whole number"),
            ("hidden_size", 30, "multiple"),
            ("hidden_size", 36, "even"),
            ("num_kv_heads", 3, "divisor"),
            ("num_kv_heads", -1, "positive whole number"),
            ("rms_norm_eps", 0.0, "positive"),
            ("rope_theta", float("nan"), "positive"),
            ("initializer_range", -0.1, "positive"),
            ("param_dtype", "int8", "float32"),
            ("dtype", "fp32", "float32"),
            ("attention", "flash", "dot_product"),
            ("loss", "mse", "fused"),
            ("unroll", 0, "'auto'"),
        ],
    )
    def test_bad_values_name_field_value_and_remedy(self, field, value, remedy):
        with pytest.raises(ValueError) as error:
            dataclasses.replace(SMALL, **{field: value})
        for part in (f"{field}=", str(value), remedy):
            assert part in str(error.value)

    def test_every_implementation_can_be_chosen(self):
        kinds = {
            f.name: f.type.__args__
            for f in dataclasses.fields(SMALL)
            if f.name in ("attention", "loss")
        }
        assert set(kinds["attention"]) == {"auto", *attention.IMPLEMENTATIONS}
        assert set(kinds["loss"]) == {"auto", *losses.IMPLEMENTATIONS}

    @pytest.mark.parametrize("name", ["cpu", "gpu", "tpu"])
    def test_auto_resolves_on_every_back_end(self, name):
        choice = backend.choose(SMALL, name)
        assert choice.attention in attention.IMPLEMENTATIONS
        assert choice.loss in losses.IMPLEMENTATIONS
        assert choice.unroll >= 1
        assert (choice.attention == "dot_product") == (name != "cpu")


class TestParameters:
    def test_paths_and_shapes(self):
        params = jax.eval_shape(lambda: init_params(SMALL, jax.random.key(0)))
        assert type(params) is dict and type(params["layers"]["q"]) is dict
        shapes = jax.tree.map(lambda leaf: leaf.shape, params)
        assert shapes["embed"] == {"embedding": (61, 32)}
        assert shapes["head"] == {"kernel": (32, 61)}
        assert shapes["norm"] == {"scale": (32,)}
        assert shapes["layers"] == {
            "attention_norm": {"scale": (2, 32)},
            "mlp_norm": {"scale": (2, 32)},
            "q": {"kernel": (2, 32, 32)},
            "k": {"kernel": (2, 32, 16)},
            "v": {"kernel": (2, 32, 16)},
            "o": {"kernel": (2, 32, 32)},
            "gate": {"kernel": (2, 32, 48)},
            "up": {"kernel": (2, 32, 48)},
            "down": {"kernel": (2, 48, 32)},
        }
        assert "head" not in params_of(dataclasses.replace(SMALL, tie_embeddings=True))

    def test_initial_values(self):
        init = jax.jit(lambda key: init_params(SMALL, key))
        params = init(jax.random.key(1))
        assert jnp.all(params["layers"]["mlp_norm"]["scale"] == 1)
        for leaf in (params["embed"]["embedding"], params["layers"]["gate"]["kernel"]):
            np.testing.assert_allclose(jnp.std(leaf), SMALL.initializer_range, rtol=0.1)
        kernel = params["layers"]["q"]["kernel"]
        assert not jnp.any(kernel[0] == kernel[1]), "layers share a key"
        same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, init(jax.random.key(1)))
        assert jax.tree.all(same)

    def test_split_and_merge_are_inverse(self):
        model = Llama(SMALL)
        definition, params = split(model)
        assert definition == graphdef(SMALL)
        tokens = tokens_of(SMALL)
        close(logits_of(SMALL, params, tokens), jax.jit(model.__call__)(tokens), 1e-6)

    def test_abstract_7b_allocates_nothing(self):
        config = dataclasses.replace(PRESETS["7b"], param_dtype="bfloat16", dtype="bfloat16")
        before = {id(array) for array in jax.live_arrays()}
        shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 6_738_415_616
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        logits = jax.eval_shape(lambda p, t: merge(graphdef(config), p)(t), shapes, tokens)
        assert logits.shape == (2, 8, 32000)
        new = [array.shape for array in jax.live_arrays() if id(array) not in before]
        assert sum(map(math.prod, new)) < 100, "a key is fine, parameters are not"

    def test_rules_take_the_seven_kernels(self):
        pytest.importorskip("optax_subspace")
        (kernels, spec), (others, none) = subspace_rules()
        assert (spec.reduction_axis, spec.output_axis) == (-2, -1)
        # GaLore's side of the same weight in torch, which is (outputs, inputs).
        assert spec.square_side == "left"
        assert none is None
        flat, _ = jax.tree_util.tree_flatten_with_path(params_of(SMALL))
        names = ["/".join(key.key for key in path) for path, _ in flat]
        taken = [name for name in names if re.fullmatch(kernels, name)]
        assert len(taken) == 7
        assert all(re.fullmatch(others, name) for name in names)


class TestForms:
    """Options that must not change the numbers."""

    TOKENS = tokens_of(SMALL)

    def reference(self, **changes):
        config = dataclasses.replace(SMALL, attention="einsum", loss="logits", **changes)
        config = dataclasses.replace(config, unroll=config.num_layers)
        params = params_of(config)
        return config, params, loss_and_grads(config, params, self.TOKENS)

    @pytest.mark.parametrize(
        "change",
        [
            *(
                pytest.param(change, marks=pytest.mark.slow)
                for change in ({"unroll": 1}, {"remat": True}, {"num_layers": 5, "unroll": 2})
            ),
            {"remat": True, "unroll": 1},
            {"attention": "dot_product", "tie_embeddings": True, "loss": "fused"},
            {"attention": "blocked", "tie_embeddings": True, "loss": "fused"},
            {"loss": "auto", "loss_chunk": 7},
        ],
        ids=str,
    )
    def test_same_loss_and_gradients(self, change):
        shape = {k: v for k, v in change.items() if k in ("num_layers", "tie_embeddings")}
        config, params, expected = self.reference(**shape)
        close(
            loss_and_grads(dataclasses.replace(config, **change), params, self.TOKENS),
            expected,
            1e-5,
        )

    def test_no_more_logits_exist_than_those_of_a_chunk(self):
        """Whatever the gradients of head and hidden states are made of, in sizes of arrays."""
        tokens, width, vocabulary, chunk = 48, 4, 64, 8
        arrays = (
            jax.ShapeDtypeStruct((tokens, width), jnp.float32),
            jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
            jax.ShapeDtypeStruct((tokens,), jnp.int32),
            jax.ShapeDtypeStruct((tokens,), jnp.float32),
        )

        def largest(jaxpr):
            sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
            inner = [eqn.params["jaxpr"].jaxpr for eqn in jaxpr.eqns if "jaxpr" in eqn.params]
            return max([*sizes, *map(largest, inner)])

        def of(loss):
            return largest(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(*arrays).jaxpr)

        assert of(functools.partial(losses.fused, chunk=chunk)) == chunk * vocabulary
        assert of(losses.logits) == tokens * vocabulary

    def test_pieces_walk_to_the_same_loss(self):
        for tied in (False, True):
            config, params, (loss, _) = self.reference(tie_embeddings=tied)
            parts = pieces(config)

            @jax.jit
            def walk(params, tokens, parts=parts):
                rest = {name: value for name, value in params.items() if name != "layers"}
                x = parts.embed(rest, tokens[:, :-1])
                for i in range(SMALL.num_layers):
                    x = parts.block(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]), x)
                return parts.loss(rest, x, tokens[:, 1:], None), parts.head(rest, x)

            (mean, count), logits = walk(params, self.TOKENS)
            np.testing.assert_allclose(mean, loss, rtol=1e-6)
            assert count == 24
            close(logits, logits_of(config, params, self.TOKENS[:, :-1]), 1e-5)

    def test_kernel_may_be_an_object_with_astype_and_matmul(self):
        @jax.tree_util.register_pytree_node_class
        class Doubled:
            def __init__(self, array):
                self.array = array

            def astype(self, dtype):
                return Doubled(self.array.astype(dtype))

            def __rmatmul__(self, x):
                return 2 * (x @ self.array)

            def tree_flatten(self):
                return (self.array,), None

            @classmethod
            def tree_unflatten(cls, _, children):
                return cls(*children)

        params = params_of(SMALL)
        kernel = params["layers"]["down"]["kernel"]

        def with_down(kernel):
            return {**params, "layers": {**params["layers"], "down": {"kernel": kernel}}}

        expected = logits_of(SMALL, with_down(2 * kernel), self.TOKENS)
        for unroll in (1, SMALL.num_layers):
            config = dataclasses.replace(SMALL, unroll=unroll)
            close(logits_of(config, with_down(Doubled(kernel)), self.TOKENS), expected, 1e-5)


class TestAttention:
    @pytest.mark.parametrize("name", attention.IMPLEMENTATIONS)
    @pytest.mark.parametrize(("kv", "length"), [(1, 7), (4, 256), (2, 300)])
    def test_agrees_with_a_loop_over_heads(self, name, kv, length):
        keys = jax.random.split(jax.random.key(0), 4)
        q, up = (jax.random.normal(key, (2, length, 4, 8)) for key in keys[:2])
        k, v = (jax.random.normal(key, (2, length, kv, 8)) for key in keys[2:])

        def plain(q, k, v):
            seen = jnp.tril(jnp.ones((length, length), bool))
            heads = []
            for h in range(4):
                kh, vh = k[:, :, h * kv // 4], v[:, :, h * kv // 4]
                scores = jnp.where(seen, q[:, :, h] @ kh.mT / jnp.sqrt(8.0), -jnp.inf)
                heads.append(jax.nn.softmax(scores, axis=-1) @ vh)
            return jnp.stack(heads, axis=2)

        @functools.partial(jax.jit, static_argnums=0)
        def both(function, q, k, v, up):
            out, vjp = jax.vjp(function, q, k, v)
            return out, vjp(up)

        function = attention.IMPLEMENTATIONS[name]
        close(both(function, q, k, v, up), both(plain, q, k, v, up), 1e-5)

    @pytest.mark.parametrize("name", attention.IMPLEMENTATIONS)
    def test_large_scores_stay_finite(self, name):
        q = jnp.full((1, 6, 2, 8), 300.0)
        function = attention.IMPLEMENTATIONS[name]
        loss = jax.jit(jax.value_and_grad(lambda q: jnp.sum(function(q, q, q) ** 2)))
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in loss(q))

    @pytest.mark.parametrize("name", attention.IMPLEMENTATIONS)
    def test_causal(self, name):
        config = dataclasses.replace(SHALLOW, attention=name)
        params, tokens = params_of(config), tokens_of(config, length=11)
        changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % config.vocab_size)
        before, after = (logits_of(config, params, each) for each in (tokens, changed))
        assert jnp.all(before[:, :7] == after[:, :7])
        assert jnp.all(jnp.any(before[:, 7:] != after[:, 7:], axis=-1))


class TestLoss:
    @pytest.mark.parametrize("size", [1, 700])
    def test_fused_equals_logits(self, size):
        keys = jax.random.split(jax.random.key(0), 4)
        x, kernel = jax.random.normal(keys[0], (size, 16)), jax.random.normal(keys[1], (16, 33))
        targets = jax.random.randint(keys[2], (size,), 0, 33, jnp.int32)
        weights = jax.random.bernoulli(keys[3], 0.7, (size,)).astype(jnp.float32)

        def both(function):
            value = jax.jit(function)(x, kernel, targets, weights)
            grad = jax.grad(lambda *a: 3 * function(*a), argnums=(0, 1, 3))
            return value, jax.jit(grad)(x, kernel, targets, weights)

        close(both(losses.fused), both(losses.logits), 1e-5)

    def test_a_sum_over_tokens_beyond_float16_has_a_finite_mean(self):
        size = 512
        x, kernel = jnp.full((size, 4), 300, jnp.float16), jnp.zeros((4, 8), jnp.float16)
        targets, weights = jnp.zeros(size, jnp.int32), jnp.ones(size)
        mean = lambda kernel: losses.fused(x, kernel, targets, weights) / size
        found = jax.jit(jax.grad(mean))(kernel)
        assert found.dtype == jnp.float16
        expected = jnp.broadcast_to(300 * (1 / 8 - (jnp.arange(8) == 0)), (4, 8))
        np.testing.assert_allclose(found, expected, rtol=1e-3)

    @pytest.mark.parametrize("name", [pytest.param("logits", marks=pytest.mark.slow), "fused"])
    def test_mask(self, name):
        config = dataclasses.replace(SHALLOW, loss=name)
        params, tokens = params_of(config), tokens_of(config)
        mask = jnp.arange(12)[None, :] < jnp.array([[12], [5]])
        loss, count = loss_of(config, params, tokens, mask)
        log_probs = jax.nn.log_softmax(logits_of(config, params, tokens[:, :-1]))
        nll = -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
        assert (loss.dtype, count.dtype, float(count)) == (jnp.float32, jnp.float32, 17.0)
        np.testing.assert_allclose(loss, nll[mask].mean(), rtol=1e-5)
        np.testing.assert_allclose(loss_of(config, params, tokens)[0], nll.mean(), rtol=1e-5)
        # What stands under the mask must not matter, not even in the gradient.
        other = tokens.at[1, 6:].set(0)
        close(
            loss_and_grads(config, params, other, mask),
            loss_and_grads(config, params, tokens, mask),
            1e-5,
        )

    @pytest.mark.parametrize("name", losses.IMPLEMENTATIONS)
    def test_nothing_unmasked_is_zero_not_nan(self, name):
        config = dataclasses.replace(SHALLOW, loss=name)
        params, tokens = params_of(config), tokens_of(config)
        loss, grads = loss_and_grads(config, params, tokens, jnp.zeros((2, 12), bool))
        assert loss == 0
        assert all(jnp.all(grad == 0) for grad in jax.tree.leaves(grads))


class TestNumerics:
    @pytest.mark.parametrize(
        ("name", "loss"),
        [p if p[0] == "blocked" else pytest.param(*p, marks=pytest.mark.slow) for p in PAIRS],
    )
    def test_bfloat16_compute_on_float32_parameters(self, name, loss):
        config = dataclasses.replace(SHALLOW, attention=name, loss=loss)
        params, tokens = params_of(config), tokens_of(SHALLOW)
        expected, _ = loss_and_grads(config, params, tokens)
        half = dataclasses.replace(config, dtype="bfloat16")
        value, grads = loss_and_grads(half, params, tokens)
        assert value.dtype == jnp.float32
        assert {grad.dtype for grad in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
        np.testing.assert_allclose(value, expected, rtol=2e-2)
        logits = jax.eval_shape(lambda: merge(graphdef(half), params)(tokens))
        assert logits.dtype == jnp.float32

    def test_bfloat16_parameters_have_bfloat16_gradients(self):
        config = dataclasses.replace(SHALLOW, param_dtype="bfloat16", dtype="bfloat16")
        params = params_of(config)
        loss, grads = loss_and_grads(config, params, tokens_of(SHALLOW))
        assert loss.dtype == jnp.float32 and jnp.isfinite(loss)
        assert {grad.dtype for grad in jax.tree.leaves(grads)} == {jnp.dtype("bfloat16")}

    def test_every_parameter_has_a_gradient(self):
        params = params_of(SMALL)
        _, grads = loss_and_grads(SMALL, params, tokens_of(SMALL))
        assert all(jnp.any(grad != 0) for grad in jax.tree.leaves(grads))


def test_compiles_once():
    traces = []

    @jax.jit
    def forward(params, tokens):
        traces.append(1)
        return merge(graphdef(SHALLOW), params)(tokens)

    batches = [params_of(SHALLOW, seed) for seed in range(3)]
    tokens = tokens_of(SHALLOW)
    compiles = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiles.append(event)

    forward(batches[0], tokens)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for params in batches:
            jax.block_until_ready(forward(params, tokens))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(traces) == 1
    assert compiles == []
