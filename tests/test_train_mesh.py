"""Training on several devices, in micro-batches and in several processes: the same losses."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import sharding
from models.lora import LoraKernel
from optax_subspace import dequantize
from tests.train_helpers import (
    ROOT,
    batch_shapes,
    host_devices,
    on_eight_devices,
    pair,
    write_text,
)
from train import hlo, launch, mesh, placement, source, step
from train.cli import parse
from train.config import MeshConfig
from train.errors import UsageError
from train.runs import read_checkpoint

SMALL = [
    *["--model.num_layers", "2", "--model.hidden_size", "32", "--model.intermediate_size", "48"],
    *["--model.num_heads", "2", "--model.vocab_size", "320", "--data.vocab_size", "320"],
    *["--train.batch_size", "16", "--train.sequence_length", "8", "--train.steps", "20"],
    *["--model.unroll", "1"],
]
# With a larger epsilon Adam does not blow rounding up to steps of full size.
GALORE = ["--optimizer.rank", "4", "--optimizer.every", "2", "--optimizer.eps", "1e-3"]
FUSED, INT8 = "--train.fused_backward", "--train.int8_weights"
MICRO = ["--train.micro_batch_size", "8"]
CASES = {
    "adamw": ["--optimizer.name", "adamw", "--optimizer.eps", "1e-3"],
    "galore": GALORE,
    "galore fused": [*GALORE, FUSED],
    "galore micro": [*GALORE, *MICRO],
    "galore 8 bits": [*GALORE, "--optimizer.name", "galore_adamw8bit"],
    "subspace fused micro": [
        *["--optimizer.name", "online_subspace_adamw8bit", FUSED, "--optimizer.clip_norm", "None"],
        *["--optimizer.rank", "4", "--optimizer.eps", "1e-3", *MICRO],
    ],
    "lomo fused": ["--optimizer.name", "lomo", FUSED],
    "adamw int8": ["--optimizer.name", "adamw", "--optimizer.eps", "1e-3", INT8],
    "lora fused int8": ["--optimizer.name", "lomo", "--lora.rank", "4", FUSED, INT8],
    "lora only": [
        *["--lora.rank", "4", "--lora.freeze", "all", "--optimizer.eps", "1e-3"],
        *["--model.tie_embeddings", "--model.remat"],
    ],
}
FAST = ("adamw", "lomo fused")
RANDOM = np.random.default_rng(0)
WINDOWS = RANDOM.integers(0, 320, (4, 16, 9), np.int32)
MASKS = (RANDOM.random((4, 16, 8)) > 0.3).astype(np.float32)


def parts_of(state):
    """The shape of each array, or shape, of a state, and that of a device's part."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {
        name(path): [x.shape, x.sharding.shard_shape(x.shape)]
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


def begin(words, devices, data=None, fsdp=None):
    """What a run begins with: its step, the shapes of its state, the state, and an evaluation."""
    config = parse([*SMALL, *words]).config
    work = mesh.Work(mesh.make(MeshConfig(data, fsdp), devices), config.train.micro_batch_size)
    optimizer, fused, first = launch.prepare(config, work)
    shapes = placement.place(jax.eval_shape(first, jax.random.key(0)), optimizer, work.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    # (Rounding at random would draw other numbers where sums differ in their last bit.)
    run = step.make_train_step(config.model, optimizer, None, fused, work, shardings)
    if config.train.project_at_source:
        run = source.SourceSteps(*source.jitted_steps(config, optimizer, fused, work, shardings))
    initial = jax.jit(first, out_shardings=shardings)
    return run, shapes, initial, work, step.make_eval_step(config.model, work)


def train(words, devices, data=None, fsdp=None, steps=3):
    """Losses and gradient norms of some steps, the loss after them, and the state."""
    run, _, initial, work, evaluate = begin(words, devices, data, fsdp)
    losses, state = [], initial(jax.random.key(0))
    for windows, mask in zip(WINDOWS[:steps], MASKS, strict=False):
        batch = work.mesh.put(pair(windows)._replace(mask=mask))
        state, metrics = run(state, batch)
        losses += [float(metrics.loss), float(metrics.grad_norm)]
    nats, count = evaluate(state.params, batch)
    assert int(state.step) == steps and float(count) == MASKS[steps - 1].sum()
    return [*losses, float(nats / count)], state


def without_warnings(program, *arguments):
    return on_eight_devices(program, *arguments, options=["-W", "error::UserWarning"])


# Losses by case and mesh, and the parts of each array of the state on 2 x 4 devices.
PROGRAM = """
import json, sys
import jax
from tests.test_train_mesh import CASES, begin, parts_of, train

found = {}
for case in sys.argv[1:]:
    found[case] = {"1 x 1": train(CASES[case], jax.devices()[:1])[0]}
    for data, fsdp in ((8, 1), (2, 4)):
        losses, state = train(CASES[case], jax.devices(), data, fsdp)
        found[case][f"{data} x {fsdp}"] = losses
    found[case]["parts"] = parts_of(state)
found["galore shapes"] = parts_of(begin(CASES["galore"], jax.devices(), 2, 4)[1])
print(json.dumps(found))
"""


AT_SOURCE = {
    "galore": [*GALORE, "--train.project_at_source"],
    "osd micro": [
        *["--optimizer.name", "online_subspace_descent", "--optimizer.clip_norm", "None"],
        *["--optimizer.rank", "4", "--optimizer.eps", "1e-3", "--train.project_at_source", *MICRO],
    ],
}
SOURCE = """
import json, jax
from tests.test_train_mesh import AT_SOURCE, GALORE, crossing, train

losses = lambda words: [train(words, jax.devices()[:n], n)[0] for n in (1, 8)]
found = {name: losses(words) for name, words in AT_SOURCE.items()}
print(json.dumps([found, crossing(GALORE), crossing(AT_SOURCE["galore"])]))
"""


def crossing(words):
    """Bytes that one step between refreshes moves between all devices, by kind."""
    chunks = ["--model.loss", "fused", "--model.loss_chunk", "16"]
    run, shapes, _, work, _ = begin([*words, *chunks], jax.devices(), 8)
    run = run._between if isinstance(run, source.SourceSteps) else run
    batch = batch_shapes(16, 8)
    batch = mesh.with_shardings(batch, jax.tree.map(lambda _: work.mesh.rows, batch))
    return hlo.traffic(run.lower(shapes, batch).compile().as_text())


def check(found, tolerance=1e-5):
    for case, result in found.items():
        if case not in CASES:
            continue
        for grid in ("8 x 1", "2 x 4"):
            np.testing.assert_allclose(
                result[grid], result["1 x 1"], rtol=tolerance, err_msg=f"{case}, {grid}"
            )


@pytest.fixture(scope="module")
def found():
    return without_warnings(PROGRAM, *FAST)


def test_any_mesh_gives_the_same_losses(found):
    check(found)


@pytest.mark.slow
def test_every_kind_of_step_gives_the_same_losses():
    everything = without_warnings(PROGRAM, *(case for case in CASES if case not in FAST))
    few_bits = {case for case in CASES if case not in FAST and ("8" in case or "subspace" in case)}
    check({case: result for case, result in everything.items() if case not in few_bits})
    # Blocks keep to a device's part, so that scales and codes differ with the mesh.
    check({case: everything[case] for case in few_bits}, 2e-3)
    for case in ("galore 8 bits", "lora fused int8"):
        parts = everything[case]["parts"]
        # (Codes are named by their code and the shape they stand for: "…/dynamic_320x32".)
        is_code = lambda path: path.rsplit("/", 1)[-1].startswith(("dynamic", "linear"))
        codes = {path: x for path, x in parts.items() if is_code(path)}
        assert codes and all(np.prod(own) < np.prod(all_) for all_, own in codes.values()), codes


@pytest.mark.slow
def test_gradients_projected_at_the_source_are_those_of_one_device():
    losses, afterwards, at_source = without_warnings(SOURCE)
    for name, (alone, split) in losses.items():
        np.testing.assert_allclose(split, alone, rtol=1e-5, err_msg=name)
    # Neither hidden states nor tokens cross, though the loss goes through them in chunks.
    assert set(at_source) == {"all-reduce"}, at_source
    assert at_source["all-reduce"] < 0.8 * afterwards["all-reduce"]


@pytest.mark.parametrize(
    ("words", "grid", "message"),
    [
        ([], (2, 4), "--mesh.fsdp 4: kernels that are split over devices"),
        ([FUSED, "--model.remat"], (8, 1), "it runs on one device, and here are 8"),
    ],
)
def test_meshes_that_the_source_does_not_know_are_refused(words, grid, message):
    words = [*SMALL, *GALORE, "--optimizer.clip_norm", "None", "--train.project_at_source", *words]
    devices = jax.sharding.AbstractMesh(grid, ("data", "fsdp"))
    with pytest.raises(UsageError, match=message):
        source.check(parse(words).config, mesh.Mesh(devices))


def test_state_of_a_split_weight_is_split(found):
    for parts in (found["adamw"]["parts"], found["galore shapes"]):
        weights = {p: x for p, x in parts.items() if p.startswith("params")}
        moments = {p: x for p, x in parts.items() if "/mu/" in p or "/nu/" in p}
        assert len(weights) == 12 and len(moments) == 2 * 12
        for path, (shape, own) in {**weights, **moments}.items():
            assert np.prod(own) * (1 if "norm" in path else 4) == np.prod(shape), path
    bases = {p: x for p, x in found["galore shapes"].items() if "bases" in p}
    # Of the side that is not split: on every device.
    assert len(bases) == 7 and all(shape == own for shape, own in bases.values())


def test_each_parameter_has_a_rule_and_what_cannot_be_split_is_not():
    weight = {"layers": {"gate": {"kernel": jnp.ones((2, 6, 10))}}}
    spec = lambda parts: tuple(sharding.specs(weight, parts)["layers"]["gate"]["kernel"])
    assert spec(1) == () and spec(2) == (None, None, "fsdp")
    assert spec(3) == (None, "fsdp") and spec(16) == ()
    square = {"layers": {"q": {"kernel": jnp.ones((2, 8, 8))}}}  # whose basis is on the inputs
    assert tuple(sharding.specs(square, 2)["layers"]["q"]["kernel"]) == (None, None, "fsdp")
    with pytest.raises(ValueError, match="layers/new/kernel has no rule in models.sharding"):
        sharding.specs({"layers": {"new": {"kernel": jnp.ones((2, 2))}}}, 2)
    adapted = LoraKernel(jnp.ones((2, 8, 6)), jnp.ones((2, 8, 2)), jnp.ones((2, 2, 6)), 1.0)
    specs = sharding.specs({"q": {"kernel": adapted}}, 2, "layers/")["q"]["kernel"]
    assert [tuple(s) for s in (specs.base, specs.lora_a, specs.lora_b)] == [
        (None, "fsdp"),
        (None, "fsdp"),
        (None, None, "fsdp"),
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None), (8, 1)),
        ((2, None), (2, 4)),
        ((None, 4), (2, 4)),
        ((1, 8), (1, 8)),
        ((3, None), "--mesh.data 3: makes 3 of the 8 devices"),
        ((2, 2), "--mesh.data 2 --mesh.fsdp 2: makes 4 of the 8 devices"),
        ((None, 16), "--mesh.fsdp 16: makes 16 of the 8 devices"),
    ],
)
def test_lengths_of_the_mesh(given, expected):
    devices = np.array([jax.devices()[0]] * 8, object)

    class Chosen(Exception):
        pass

    def shape(lengths, names, **_):
        assert names == ("data", "fsdp")
        raise Chosen(lengths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_mesh", shape)
        if isinstance(expected, str):
            with pytest.raises(UsageError, match=expected):
                mesh.make(MeshConfig(*given), devices)
        else:
            with pytest.raises(Chosen) as chosen:
                mesh.make(MeshConfig(*given), devices)
            assert chosen.value.args[0] == expected


def test_rows_that_cannot_be_split_are_refused():
    class Three:
        size = 3

    config = parse(["--train.batch_size", "8"]).config
    with pytest.raises(UsageError, match=r"batch_size 8: .* over 3 devices; .* e.g. 9"):
        mesh.check_rows(config, Three())
    config = parse(["--train.batch_size", "12", "--train.micro_batch_size", "2"]).config
    with pytest.raises(UsageError, match=r"micro_batch_size 2: .* over 3 devices; .* e.g. 3"):
        mesh.check_rows(config, Three())


@pytest.mark.parametrize("case", ["adamw", pytest.param("subspace", marks=pytest.mark.slow)])
def test_micro_batches_equal_the_whole_batch(case):
    """Their tokens are masked unevenly, so that a mean of means would be another number."""
    words = CASES["adamw"]
    if case == "subspace":  # in the fused pass, where the optimizer adds up what it keeps
        # Random bases: others are those of the first micro-batch, not of the whole batch.
        words = [*GALORE, FUSED, "--optimizer.clip_norm", "None"]
        words += ["--optimizer.projector", "random_projection"]
    whole, one = train(words, jax.devices()[:1], steps=3)
    parts, other = train([*words, "--train.micro_batch_size", "4"], jax.devices()[:1], steps=3)
    if case == "subspace":  # whose gradient norms are of micro-batches
        whole, parts = whole[::2], parts[::2]
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    away = jax.tree.map(lambda a, b: optax.tree.norm(a - b), one.params, other.params)
    assert max(jax.tree.leaves(away)) < 1e-4
    counts = MASKS[0].reshape(4, 4, -1).sum((0, 2))
    assert len(set(counts.tolist())) > 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--train.micro_batch_size", "3"], ["micro_batch_size 3", "--train.batch_size 8", "2"]),
        (["--train.micro_batch_size", "0"], ["micro_batch_size 0", "at least 1"]),
        ([*MICRO, "--train.batch_size", "16", FUSED, "--optimizer.name", "lomo"], ["lomo", FUSED]),
        ([*MICRO, "--train.batch_size", "16", FUSED], ["--optimizer.clip_norm None"]),
        (
            [*MICRO, "--train.batch_size", "16", FUSED, "--lora.rank", "2"],
            ["adapters would need", "online_subspace_descent"],
        ),
        (
            [
                *[*MICRO, "--train.batch_size", "16", FUSED, "--optimizer.clip_norm", "None"],
                *["--model.dtype", "float16"],
            ],
            ["overflows", "bfloat16"],
        ),
        (["--mesh.fsdp", "0"], ["--mesh.fsdp 0", "at least 1"]),
        (["--topology", "v5e:2x2"], ["--topology v5e:2x2", "--compile_only"]),
    ],
)
def test_what_cannot_work_is_told(words, parts):
    with pytest.raises(UsageError) as error:
        parse(words)
    for part in parts:
        assert part in str(error.value)
    # All rows at once are no micro-batches.
    parse(["--train.micro_batch_size", "8", FUSED])


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def run_of(words, processes, devices):
    """`python -m train` in some processes of some devices each; what each printed."""
    port, running = free_port(), []
    for number in range(processes):
        environment = {
            **os.environ,
            "XLA_FLAGS": host_devices(devices),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        if processes > 1:
            environment["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
            environment["JAX_NUM_PROCESSES"] = str(processes)
            environment["JAX_PROCESS_ID"] = str(number)
        command = [sys.executable, "-m", "train", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env=environment, cwd=ROOT, **pipes))
    results = [process.communicate(timeout=500) for process in running]
    codes = [process.returncode for process in running]
    assert codes == [0] * processes, [out[-1500:] + err[-3000:] for out, err in results]
    return [out for out, _ in results]


def losses_in(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row.get("loss", row.get("validation_loss")) for row in rows if "kind" in row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The words of a run, its folder, that of the same in two processes, and what these said."""
    folder = tmp_path_factory.mktemp("processes")
    words = [*SMALL, "--data.path", str(write_text(folder / "text")), *CASES["adamw"]]
    words += ["--data.cache_dir", str(folder / "cache"), "--train.eval_batches", "2"]
    words += ["--train.steps", "6", "--checkpoint.every", "3", "--train.eval_every", "2"]
    alone, several = folder / "alone", folder / "several"
    run_of([*words, "--run_dir", str(alone)], 1, 1)
    said = run_of([*words, "--run_dir", str(several), "--mesh.fsdp", "2"], 2, 2)
    return words, alone, several, said


def check_losses(first, second):
    for a, b in zip(losses_in(first), losses_in(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_two_processes_train_as_one(runs):
    _, alone, several, (first, second) = runs
    assert "4 devices (cpu): data 2 x fsdp 2" in first and "tokens/s" in first
    # (The library of collectives prints by itself, from several threads into one another's lines.)
    of_gloo = lambda line: "[Gloo]" in line or "peer ranks" in line or not line.strip()
    assert [line for line in second.splitlines() if not of_gloo(line)] == []
    assert len(losses_in(several)) == 6 + 2 + 1  # steps, evaluations, the end
    check_losses(several, alone)


@pytest.mark.slow
def test_a_checkpoint_serves_another_number_of_devices(runs):
    """From that of four devices on one, and from that of one on four."""
    words, alone, several, _ = runs
    for folder, devices in ((several, 1), (alone, 4)):
        shutil.rmtree(folder / "checkpoints" / "6")
        out = run_of([*words, "--run_dir", str(folder), "--resume"], 1, devices)[0]
        assert "after step 3" in out
    check_losses(several, alone)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["adamw int8", "subspace fused micro"])
def test_states_in_few_bits_serve_another_number_of_devices(case, tmp_path):
    """Their blocks keep to the parts of a device, and are made anew for other parts."""
    words = [*SMALL, "--data.path", str(write_text(tmp_path / "text")), *CASES[case]]
    words += ["--data.cache_dir", str(tmp_path / "cache"), "--train.eval_batches", "2"]
    words += ["--train.steps", "6", "--checkpoint.every", "3"]
    run_of([*words, "--run_dir", str(tmp_path / "one")], 1, 1)
    run_of([*words, "--run_dir", str(tmp_path / "four"), "--mesh.fsdp", "4"], 1, 4)
    for name, devices in (("one", 4), ("four", 1)):
        folder = tmp_path / name
        whole = losses_in(folder)
        shutil.rmtree(folder / "checkpoints" / "6")
        again = [*words, "--run_dir", str(folder), "--resume", "--mesh.fsdp", str(devices)]
        assert "after step 3" in run_of(again, 1, devices)[0]
        np.testing.assert_allclose(losses_in(folder), whole, rtol=2e-3)
        *_, params = read_checkpoint(folder, 6)  # as for export, on one device
        assert float(optax.tree.norm(dequantize(params))) > 0
