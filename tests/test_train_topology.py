"""Compiling a step for devices that are not there, and what the program's text tells."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from models.config import LlamaConfig
from train import hlo, placement, topology
from train.cli import main

SMALL = [
    *["--model.num_layers", "2", "--model.hidden_size", "64", "--model.intermediate_size", "128"],
    *["--model.vocab_size", "512", "--data.vocab_size", "512", "--model.unroll", "1"],
    *["--model.num_heads", "1", "--train.sequence_length", "128", "--compile_only"],
    *["--optimizer.name", "lomo", "--optimizer.clip_norm", "None", "--train.fused_backward"],
]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the compiler is told must not stay for other tests."""
    values = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    for name, value in {**values, "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        monkeypatch.setenv(name, value)


def test_here_a_step_is_compiled_without_data(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--data.path", "no/such/text"]) == 0
    out = capsys.readouterr().out
    assert "arguments" in out and "= peak" in out and "it fits" in out
    # The weights in float32, and nothing is moved on one device.
    found = re.search(r"arguments +([\d.]+)", out)
    weights = LlamaConfig(512, 64, 128, 1, num_layers=2).num_params() * 4 / 2**30
    assert float(found[1]) == pytest.approx(weights, abs=1e-3)
    # XLA's own peak leaves the temporaries out on a CPU.
    peak, temporaries = (
        float(re.search(rf"{part} +([\d.]+)", out)[1]) for part in ("= peak", "temporaries")
    )
    assert temporaries > 0.001 and peak >= float(found[1]) + temporaries - 0.001
    assert re.search(r"= all +0.000", out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("v5e", ["--topology v5e", "v5e:4x4"]),
        ("v9:2x2", ["--topology v9:2x2", "v5p"]),
    ],
)
def test_a_slice_that_does_not_exist_is_one_line(name, parts, capsys):
    assert main([*SMALL, "--topology", name]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


def test_traffic_counts_loops_branches_and_a_chain_once():
    step = (
        '%a.{0} = bf16[4]{{0}} all-gather(%p), channel_id=3, frontend_attributes={{chain_id="7"}}'
    )
    text = f"""
%first (p: bf16[2]) -> bf16[4] {{
  ROOT {step.format(1)}, metadata={{op_name="all-reduce("}}
}}
%second (p: bf16[2]) -> bf16[4] {{
  ROOT {step.format(2)}
}}
%branch (p: bf16[2]) -> bf16[2] {{
  ROOT %r = (u8[3]{{0}}, pred[]) all-reduce(%p, %p), channel_id=1
}}
ENTRY %main (p: bf16[2]) -> bf16[4] {{
  %f = bf16[4]{{0}} fusion(%p), kind=kCustom, calls=%first
  %g = bf16[4]{{0}} fusion(%f), kind=kCustom, calls=%second
  %s = (f32[2]{{0}}, f32[8]{{0}}) all-gather-start(%p), channel_id=2
  %d = f32[8]{{0}} all-gather-done(%s)
  ROOT %c = bf16[4]{{0}} conditional(%i, %p, %p), branch_computations={{%branch, %branch}}
}}"""
    assert hlo.traffic(text) == {"all-gather": 8 + 32, "all-reduce": 2 * 4}


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra aot")
def test_a_slice_that_is_not_there(capsys):
    words = [*SMALL, "--model.param_dtype", "bfloat16", "--model.dtype", "bfloat16"]
    assert main([*words, "--topology", "v5e:2x2", "--train.batch_size", "4"]) == 0
    out = capsys.readouterr().out
    assert "4 devices (TPU v5 lite): data 1 x fsdp 4" in out
    for kind in ("all-gather", "reduce-scatter"):
        size = re.search(rf"{kind} +([\d.]+)", out)
        assert size, out
    assert topology.gibibytes(2**30) == "1.000"


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra aot")
def test_a_tpu_keeps_layers_of_odd_width_in_one_piece():
    place = jax.sharding.SingleDeviceSharding(topology.devices("v5e:2x2")[0][0])
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=place)
    odd, even, matrix = shape(48, 1024, 2731), shape(48, 1024, 2736), shape(1024, 2731)
    found = placement.in_whole_layers([odd, even, matrix])
    assert found[0].format.layout.major_to_minor == (0, 2, 1)
    assert found[1:] == [even, matrix]

    def layers(stack):
        step = lambda x, layer: (jnp.tanh(x @ layer) @ layer.T, None)
        return jax.lax.scan(step, jnp.ones((8, 1024), jnp.bfloat16), stack)[0]

    held = [jax.jit(layers).lower(x).compile().memory_analysis() for x in (odd, found[0])]
    size = 48 * 1024 * 2731 * 2
    copied, whole = (memory.temp_size_in_bytes for memory in held)
    assert copied > size and whole < size / 10
