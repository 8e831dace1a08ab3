"""How arrays of the state are laid out on their devices, from the first step to a resumed one."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from tests.train_helpers import TINY, write_text
from train import loop, placement, records
from train.cli import main


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ((2, 0, 1), (0, 2, 1)),  # parts of all layers in a tile
        ((1, 2, 0), (0, 1, 2)),
        ((0, 1, 2), None),
        ((0, 2, 1), None),  # each layer transposed is in one piece, too
        ((1, 0), None),
    ],
)
def test_stacks_that_are_not_in_whole_layers_are_laid_out_anew(order, expected):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x = jax.ShapeDtypeStruct((3, 8, 5)[-len(order) :], jnp.float32, sharding=place)
    found = placement._in_whole_layers(x, Format(Layout(order), place))
    assert (found.shape, found.dtype, found.sharding) == (x.shape, x.dtype, place)
    layout = found.format.layout
    assert layout is None if expected is None else layout.major_to_minor == expected


def test_on_a_cpu_all_is_as_it_was():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {"layers": jax.ShapeDtypeStruct((3, 8, 5), jnp.float32, sharding=place)}
    assert placement.in_whole_layers(shapes) == shapes


def reversed_axes(shapes):
    """A layout that no CPU chooses."""

    def one(x):
        layout = Layout(tuple(reversed(range(len(x.shape)))))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=Format(layout, x.sharding))

    return jax.tree.map(lambda x: one(x) if len(x.shape) > 1 else x, shapes)


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer.name", "galore_adamw8bit"],
        pytest.param(
            ["--optimizer.name", "galore", "--train.fused_backward", "--train.int8_weights"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--train.project_at_source"], marks=pytest.mark.slow),
        pytest.param(
            ["--lora.rank", "4", "--lora.merge_every", "9"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_layouts_change_no_result_and_outlive_a_checkpoint(options, tmp_path, monkeypatch):
    words = [*TINY, *options, "--data.path", str(write_text(tmp_path / "text"))]
    words += ["--data.cache_dir", str(tmp_path / "cache")]
    plain, other = tmp_path / "plain", tmp_path / "other"
    assert main([*words, "--run_dir", str(plain)]) == 0
    monkeypatch.setattr(placement, "in_whole_layers", reversed_axes)
    began, train = [], loop.Trainer.train

    def seen(trainer, state, stream):
        began.append([x.format.layout.major_to_minor for x in jax.tree.leaves(state) if x.ndim > 1])
        train(trainer, state, stream)

    monkeypatch.setattr(loop.Trainer, "train", seen)
    words += ["--run_dir", str(other)]
    assert main(words) == 0
    losses = lambda folder: [row["loss"] for row in rows(folder) if row["kind"] == "train"]
    rows = lambda folder: records.read(folder / "metrics.jsonl")
    np.testing.assert_allclose(losses(other), losses(plain), rtol=1e-4)
    whole = (other / "metrics.jsonl").read_bytes()
    for step in (35, 40):
        shutil.rmtree(other / "checkpoints" / str(step), ignore_errors=True)
    assert not (other / "checkpoints" / "40").exists()
    assert main([*words, "--resume"]) == 0
    assert (other / "metrics.jsonl").read_bytes() == whole
    assert len(began) == 2 and began[0] == began[1]
    assert began[0] and all(list(order) == sorted(order)[::-1] for order in began[0])
