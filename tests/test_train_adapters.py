"""Adapters that begin anew (ReLoRA), frozen kernels, and kernels as products of factors."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from models import factored, llama, lora
from models.config import LlamaConfig
from models.pretrained import read_header, read_params
from optax_subspace import QuantizedWeight, dequantize
from tests.train_helpers import TINY, batch_shapes, finish, host_devices, pair, start, write_text
from train import flops, gradient, memory, relora, runs, step
from train.checks import validate
from train.cli import main
from train.config import Config, LoraConfig, OptimizerConfig, TrainConfig, resolve
from train.errors import UsageError
from train.export import Arguments, export
from train.mesh import Work
from train.optimizer import make, warmup_cosine

MODEL = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_heads=2, num_layers=2)
WINDOWS = jax.random.randint(jax.random.key(1), (6, 4, 17), 0, 96)
FACTORS = ["--lora.factorize"]
KERNELS = ("q", "k", "v", "o", "gate", "up", "down")
RELORA = LoraConfig(rank=4, freeze="kernels", merge_every=3, rewarm_steps=2, learning_rate=0.01)


def configuration(adapters, name="adamw", **train):
    optimizer = OptimizerConfig(name=name)
    return resolve(
        Config(
            model=MODEL,
            optimizer=optimizer,
            lora=adapters,
            train=TrainConfig(steps=20, **train),
        )
    )


def begin(adapters, name="adamw", fused=False, int8=False, model=MODEL, micro=None):
    """State before the first step, the jitted step, and the optimizer."""
    options = configuration(adapters, name)
    optimizer = make(options.optimizer, 20, fused, options.lora)
    layerwise = step.make_fused(model, optimizer, 0) if fused else None
    work = Work(micro_batch_size=micro)
    run = step.make_train_step(model, optimizer, 0, layerwise, work)
    state = jax.jit(lambda key: step.init_state(model, optimizer, key, int8, layerwise))(
        jax.random.key(0)
    )
    return state, run, optimizer


def steps(state, run, windows=WINDOWS):
    state = jax.tree.map(jnp.copy, state)
    for window in windows:
        state, _ = run(state, pair(window))
    return state


def named(tree):
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def logits(params):
    return jax.jit(lambda p: llama.merge(llama.graphdef(MODEL), p)(WINDOWS[0]))(dequantize(params))


def of_adapters(opt_state):
    """Adam's states of the adapters, and the counts of their schedules."""
    states = {kind: [] for kind in (optax.ScaleByAdamState, optax.ScaleByScheduleState)}
    is_state = lambda x: isinstance(x, tuple(states))
    for path, node in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_state):
        if is_state(node) and "'adapter'" in jax.tree_util.keystr(path):
            states[type(node)].append(node)
    return list(states.values())


@functools.cache
def three_steps(fused):
    """The state before and after three steps with adapters, whose kernels are frozen."""
    before, run, _ = begin(RELORA, "adamw", fused)
    return before, steps(before, run, WINDOWS[:3])


class TestFrozenKernels:
    @pytest.mark.parametrize(
        ("name", "fused", "int8", "micro"),
        [
            ("adamw", False, True, 2),
            ("lomo", True, False, None),
            pytest.param("adamw", False, False, None, marks=pytest.mark.slow),
            pytest.param("adamw8bit", True, True, None, marks=pytest.mark.slow),
        ],
    )
    def test_all_but_they_moves(self, name, fused, int8, micro):
        before, run, _ = begin(LoraConfig(rank=4, freeze="kernels"), name, fused, int8, micro=micro)
        after = named(steps(before, run).params)
        for path, value in named(before.params).items():
            assert np.array_equal(after[path], value) == ("base" in path), path

    def test_micro_batches_give_the_gradient_of_the_whole_batch(self):
        adapters = LoraConfig(rank=4, freeze="kernels")
        state, whole, optimizer = begin(adapters)
        gradients = [
            gradient.make_gradient(MODEL, optimizer, Work(micro_batch_size=size))
            for size in (None, 2)
        ]
        one, parts = (jax.jit(g)(state.params, pair(WINDOWS[0]))[1] for g in gradients)
        parts = named(parts)
        for path, value in named(one).items():
            np.testing.assert_allclose(parts[path], value, atol=1e-6, err_msg=path)
            assert np.any(value) != ("base" in path or "lora_a" in path), path  # B is zero yet

    @pytest.mark.parametrize("fused", [False, True])
    def test_they_have_no_moments_and_no_gradients_in_the_prediction(self, fused):
        options = configuration(LoraConfig(rank=4, freeze="kernels"))
        optimizer = make(options.optimizer, 20, fused, options.lora)
        layerwise = step.make_fused(MODEL, optimizer) if fused else None
        state = jax.eval_shape(
            lambda key: step.init_state(MODEL, optimizer, key, fused=layerwise), jax.random.key(0)
        )
        leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
        assert not any("base" in jax.tree_util.keystr(p[-1:]) for p, _ in leaves)
        kernels = 2 * sum(m * n for m, n in MODEL.kernel_shapes())
        adapters = 2 * sum((m + n) * 4 for m, n in MODEL.kernel_shapes())
        trained = MODEL.num_params() - kernels + adapters
        moments = [x.size for _, x in leaves if x.size > 2]  # (counts, of a fused step by layer)
        assert sum(moments) == 2 * trained
        loss, parts = gradient.make_loss(MODEL, optimizer), llama.pieces(MODEL) if fused else None
        find = lambda size: memory.predict(
            state, batch_shapes(4, 16), loss, parts, False, "kernels", Work(None, size)
        )
        layer = adapters // 2 + 2 * 32
        assert find(None).gradients == 4 * (max(layer, 96 * 32) if fused else trained)
        assert find(None).optimizer_state < 1.01 * 4 * 2 * trained + 100
        if not fused:
            assert find(2).gradients == 2 * 4 * trained

    def test_flops(self):
        c, n = MODEL, 2 * sum(m * n for m, n in MODEL.kernel_shapes())
        assert flops.per_token(c, 8) - flops.per_token(c, 8, "kernels") == 2 * n
        factors = 2 * sum((m + n) * 4 for m, n in MODEL.kernel_shapes())
        assert flops.per_token(c, 8) - flops.per_token(c, 8, kernel_rank=4) == 6 * (n - factors)


class TestMerging:
    @pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_the_model_stays_and_the_adapters_begin_anew(self, fused):
        before, grown = three_steps(fused)
        merge = relora.jitted_merge(configuration(RELORA))
        merged = merge(jax.tree.map(jnp.copy, grown))
        assert float(jnp.max(jnp.abs(logits(grown.params) - logits(before.params)))) > 1e-3
        np.testing.assert_allclose(logits(merged.params), logits(grown.params), atol=2e-6)
        for name in KERNELS:
            old, new = (s.params["layers"][name]["kernel"] for s in (grown, merged))
            product = np.asarray(old.lora_a, np.float64) @ np.asarray(old.lora_b, np.float64)
            np.testing.assert_allclose(new.base, old.base + product * old.scale, atol=1e-7)
            assert np.any(old.lora_b) and not np.any(new.lora_b)
            first = before.params["layers"][name]["kernel"].lora_a
            bound = 1 / np.sqrt(first.shape[-2])
            for other in (old.lora_a, first):
                # Drawn anew, not as before: of two uniform numbers the mean distance is a third.
                away = float(jnp.mean(jnp.abs(new.lora_a - other)))
                assert 0.5 < away / (2 * bound / 3) < 1.5
            assert bound * 0.9 < float(jnp.max(jnp.abs(new.lora_a))) <= bound
        # Its own draw each time, the same one for the same step.
        twice = [merge(jax.tree.map(jnp.copy, grown._replace(step=jnp.int32(s)))) for s in (3, 6)]
        a = [s.params["layers"]["q"]["kernel"].lora_a for s in (merged, *twice)]
        np.testing.assert_array_equal(a[0], a[1])
        assert np.all(a[1] != a[2])

    @pytest.mark.parametrize("fused", [False, True])
    def test_moments_of_adapters_alone_begin_anew_and_the_schedule_goes_on(self, fused):
        _, grown = three_steps(fused)
        state = relora.without_moments(grown.opt_state)
        adam, schedules = of_adapters(state)  # (several of a fused step, which takes keys apart)
        assert len(jax.tree.leaves([x.mu for x in adam])) == 14
        assert not any(np.any(x) for x in jax.tree.leaves(adam))
        assert schedules and all(np.all(x.count == 3) for x in schedules)
        assert all(np.any(x) for x in jax.tree.leaves(of_adapters(grown.opt_state)))
        before, after = named(grown.opt_state), named(state)
        assert before.keys() == after.keys()
        changed = {path for path in before if not np.array_equal(before[path], after[path])}
        assert changed and all("adapter" in path for path in changed)
        assert len(changed) == len(jax.tree.leaves(adam))

    @pytest.mark.parametrize("kind", ["int8", "bfloat16"])
    def test_kernels_of_few_bits_take_products_up_in_the_mean(self, kind):
        """Each product is far below the distance of two codes, or numbers in bfloat16."""
        base = jax.random.uniform(jax.random.key(2), (1, 64, 64), minval=1.01, maxval=1.4)
        base = base.astype("bfloat16" if kind == "bfloat16" else "float32")
        params = {"layers": {"q": {"kernel": base}}}
        if kind == "int8":
            params = step.kernels_in_int8(params)
        start = np.asarray(dequantize(params)["layers"]["q"]["kernel"], np.float32)
        a, b = jnp.full((1, 64, 1), 0.5), jnp.full((1, 1, 64), 2.0**-9)
        kernel = lora.LoraKernel(params["layers"]["q"]["kernel"], a, b, 2.0)
        adapted = {"layers": {"q": {"kernel": kernel}}}

        def found(rounding):
            new = lora.restart(adapted, jax.random.key(0), rounding)["layers"]["q"]["kernel"].base
            assert isinstance(new, QuantizedWeight) == (kind == "int8")
            return np.asarray(dequantize({"w": new})["w"], np.float32) - start

        np.testing.assert_allclose(found(jax.random.key(1)).mean(), 2.0**-9, rtol=0.25)
        if kind == "bfloat16":
            assert not np.any(found(None))  # to the nearest they are lost

    def test_the_rates_fall_and_rise_together(self):
        adapters = LoraConfig(rank=4, merge_every=5, rewarm_steps=2, learning_rate=1.0)
        given = OptimizerConfig(name="adamw", learning_rate=0.5)
        options = resolve(Config(optimizer=given)).optimizer
        plain = warmup_cosine(1.0, 20, options.warmup_fraction, options.final_fraction)
        of_base = make(options, 20, False, adapters).schedule
        of_adapters = make(options, 20, False, dataclasses.replace(adapters, freeze="all")).schedule
        for t in range(20):
            share = 0.5 if t in (5, 10, 15) else 1.0
            np.testing.assert_allclose(of_base(t), 0.5 * share * plain(t), rtol=1e-6)
            np.testing.assert_allclose(of_adapters(t), share * plain(t), rtol=1e-6)
        assert resolve(Config(lora=LoraConfig(rank=4, merge_every=50))).lora.rewarm_steps == 5

    def test_it_holds_one_layers_product_beside_the_state(self):
        model = dataclasses.replace(MODEL, hidden_size=64, intermediate_size=256, num_layers=16)
        options = configuration(RELORA)
        optimizer = make(options.optimizer, 20, False, options.lora)
        shapes = jax.eval_shape(
            lambda key: step.init_state(model, optimizer, key), jax.random.key(0)
        )
        found = relora.jitted_merge(options).lower(shapes).compile().memory_analysis()
        assert found.alias_size_in_bytes > 0.99 * found.output_size_in_bytes
        kernel = 4 * 64 * 256
        assert found.temp_size_in_bytes < 8 * kernel  # the stack of one has 16

    def test_it_comes_before_the_steps_that_follow_on_so_many(self):
        calls = []
        run = lambda state, batch: (calls.append("step"), (state._replace(step=state.step + 1), 0))[
            1
        ]
        merge = lambda state: (calls.append(f"merge {state.step}"), state)[1]
        state = step.State(4, None, None)
        merging = relora.MergingSteps(run, merge, 2)
        for _ in range(4):
            state, _ = merging(state, None)
        assert calls == ["merge 4", "step", "step", "merge 6", "step", "step"]
        calls.clear()
        relora.MergingSteps(run, merge, 2)(step.State(0, None, None), None)
        assert calls == ["step"]


class TestFactors:
    FACTORS = LoraConfig(rank=6, factorize=True)

    def test_they_begin_as_the_best_approximation_with_the_values_split_evenly(self):
        params = llama.init_params(MODEL, jax.random.key(0))
        layers = jax.jit(lambda p: factored.factorize(p, 6))(params)["layers"]
        for name in KERNELS:
            kernel, factors = params["layers"][name]["kernel"], layers[name]["kernel"]
            for w, left, right in zip(kernel, factors.left, factors.right, strict=True):
                u, s, vt = np.linalg.svd(w, full_matrices=False)
                np.testing.assert_allclose(left @ right, (u[:, :6] * s[:6]) @ vt[:6], atol=1e-5)
                np.testing.assert_allclose(left.T @ left, np.diag(s[:6]), atol=1e-5)
                np.testing.assert_allclose(right @ right.T, np.diag(s[:6]), atol=1e-5)

    @pytest.mark.parametrize(
        ("name", "fused"),
        [("adamw", False), pytest.param("adalomo", True, marks=pytest.mark.slow)],
    )
    def test_every_parameter_moves_and_multiplying_out_keeps_the_model(self, name, fused):
        before, run, optimizer = begin(self.FACTORS, name, fused)
        after = steps(before, run)
        moved = named(after.params)
        for path, value in named(before.params).items():
            assert "base" not in path and np.any(moved[path] != value), path
        plain = step.without_adapters(after.params)
        assert jax.tree.structure(plain) == jax.tree.structure(
            llama.init_params(MODEL, jax.random.key(0))
        )
        np.testing.assert_allclose(logits(plain), logits(after.params), atol=1e-5)

    def test_the_prediction_counts_them_and_compares_with_plain_kernels(self):
        options = configuration(self.FACTORS)
        optimizer = make(options.optimizer, 20, False, options.lora)
        state = jax.eval_shape(
            lambda key: step.init_state(MODEL, optimizer, key), jax.random.key(0)
        )
        found = memory.predict(state, batch_shapes(4, 16), gradient.make_loss(MODEL, optimizer))
        shapes = MODEL.kernel_shapes()
        count = MODEL.num_params() + 2 * sum((m + n) * 6 - m * n for m, n in shapes)
        assert found.weights == found.gradients == 4 * count
        assert 0 <= found.optimizer_state - 8 * count < 16
        assert 0 <= found.adamw_state - 8 * MODEL.num_params() < 16


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Options of a small run by full-rank AdamW."""
    folder = tmp_path_factory.mktemp("text")
    pairs = zip(TINY[::2], TINY[1::2], strict=True)
    kept = {k: v for k, v in pairs if k not in ("--optimizer.rank", "--optimizer.every")}
    kept |= {"--optimizer.name": "adamw", "--train.steps": "12", "--checkpoint.every": "2"}
    kept |= {"--checkpoint.keep": "9", "--data.cache_dir": str(folder / "cache")}
    kept |= {"--data.path": str(write_text(folder / "text")), "--train.eval_every": "4"}
    return [word for pair in kept.items() for word in pair]


def at_end(folder):
    """The state after the last step, and the metrics."""
    path = (folder / "checkpoints" / "12" / "state").absolute()
    return named(ocp.StandardCheckpointer().restore(path)), (folder / "metrics.jsonl").read_bytes()


def assert_resumes(arguments, folder, after, capsys):
    """Goes on from an earlier checkpoint, and ends in the same to the bit."""
    whole, rows = at_end(folder)
    for number in (folder / "checkpoints").iterdir():
        if int(number.name) > after:
            shutil.rmtree(number)
    assert main([*arguments, "--resume"]) == 0
    assert f"after step {after}" in capsys.readouterr().out
    again, same = at_end(folder)
    assert whole.keys() == again.keys() and rows == same
    for path, value in whole.items():
        np.testing.assert_array_equal(value, again[path], err_msg=path)


def assert_exports(folder, out):
    """To plain kernels, which are the model of the last checkpoint."""
    found = runs.load(str(folder))
    written = export(Arguments(str(folder), str(out)))
    back = named(read_params(written, read_header(written).config))
    for path, value in named(found.params).items():
        np.testing.assert_array_equal(back[path], value, err_msg=path)
    return found


@pytest.mark.slow
def test_a_run_that_begins_anew_resumes_bit_equal_on_either_side(words, tmp_path, capsys):
    folder = tmp_path / "run"
    run = [*words, "--run_dir", str(folder), "--lora.rank", "4", "--lora.freeze", "kernels"]
    run += ["--lora.merge_every", "4", "--lora.rewarm_steps", "2", "--train.int8_weights"]
    assert main(run) == 0
    out = capsys.readouterr().out
    assert "adapters are trained, and all else but the kernels" in out and "of adapters" in out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in rows if row["kind"] == "train"]
    smooth = [float(warmup_cosine(0.003, 12, 0.1, 0.1)(t)) for t in range(12)]
    shares = [0.5 if t in (4, 8) else 1.0 for t in range(12)]
    np.testing.assert_allclose(rates, np.multiply(smooth, shares), rtol=1e-5)
    # Kernels change between the steps 4 and 5, and 8 and 9, and at no others.
    codes = []
    for number in range(2, 13, 2):
        params = runs.read_checkpoint(folder, number)[2]
        codes.append(np.asarray(params["layers"]["up"]["kernel"].base.codes))
    changes = [bool(np.any(a != b)) for a, b in zip(codes[:-1], codes[1:], strict=True)]
    assert changes == [False, True, False, True, False]
    assert_resumes(run, folder, 4, capsys)  # from before a merge, through another
    assert_exports(folder, tmp_path / "hf")


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--lora.freeze", "kernels", "--lora.merge_every", "4"], FACTORS])
def test_several_devices_come_to_the_same(more, words, tmp_path, monkeypatch):
    run = [*words, "--lora.rank", "4", *more, "--train.batch_size", "4", "--optimizer.eps", "1e-3"]
    found = []
    for devices, fsdp in ((1, 1), (4, 2)):
        monkeypatch.setenv("XLA_FLAGS", host_devices(devices))
        folder = tmp_path / str(devices)
        finish(start([*run, "--run_dir", str(folder), "--mesh.fsdp", str(fsdp)]))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append([row["loss"] for row in rows if row["kind"] == "train"])
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.slow
def test_a_run_of_factors(words, tmp_path, capsys):
    folder = tmp_path / "run"
    run = [*words, "--run_dir", str(folder), "--lora.rank", "4", *FACTORS]
    run += ["--train.fused_backward", "--log.hamiltonian"]
    assert main(run) == 0
    out = capsys.readouterr().out
    assert "with kernels of rank 4" in out and "trains the factors" in out
    assert_resumes(run, folder, 6, capsys)
    found = assert_exports(folder, tmp_path / "hf")
    for name in KERNELS:
        values = np.linalg.svd(found.params["layers"][name]["kernel"][0], compute_uv=False)
        assert values[3] > 1e-3 and values[4] < 1e-5 * values[0], name


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--lora.merge_every", "4"], ["--lora.merge_every", "--lora.rank"]),
        (["--lora.factorize"], ["--lora.factorize", "--lora.rank"]),
        (
            ["--lora.rank", "4", "--lora.factorize", "--lora.merge_every", "4"],
            ["--lora.merge_every", "--lora.factorize"],
        ),
        (
            ["--lora.rank", "4", "--lora.factorize", "--lora.freeze", "nothing"],
            ["--lora.freeze", "--lora.factorize"],
        ),
        (["--lora.rank", "400", "--lora.factorize"], ["--lora.rank 400", "at most 128"]),
        (
            ["--lora.rank", "4", "--lora.factorize", "--train.int8_weights"],
            ["--train.int8_weights", "--lora.factorize"],
        ),
        (
            ["--lora.rank", "4", "--lora.rewarm_steps", "4"],
            ["--lora.rewarm_steps 4", "merge_every"],
        ),
        (
            ["--lora.rank", "4", "--lora.merge_every", "4", "--lora.rewarm_steps", "5"],
            ["--lora.rewarm_steps 5", "at most"],
        ),
        (
            ["--lora.rank", "4", "--lora.merge_every", "20", "--train.steps", "20"],
            ["--lora.merge_every 20", "run of 20"],
        ),
        (
            ["--lora.rank", "4", "--lora.freeze", "kernels", "--optimizer.name", "galore"],
            ["--optimizer.name galore", "--lora.freeze kernels", "adamw"],
        ),
        (
            ["--lora.rank", "4", "--lora.factorize", "--optimizer.name", "galore"],
            ["--optimizer.name galore", "--lora.factorize", "adamw"],
        ),
    ],
)
def test_what_makes_no_sense_is_refused(given, parts, capsys):
    assert main(["--optimizer.name", "adamw", *given]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


def test_a_configuration_of_adapters_that_nothing_reads_is_refused():
    for adapters in (LoraConfig(freeze="all"), LoraConfig(4, alpha=3.0, factorize=True)):
        with pytest.raises(UsageError, match="adapters"):
            validate(resolve(Config(lora=adapters)))
