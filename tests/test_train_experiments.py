"""The published runs as experiments: recipes, memory from shapes, headers and help."""

import dataclasses
import re
import shlex

import jax
import pytest

from models.config import PRESETS
from tests.train_helpers import finish, start
from train.cli import description, main, parse
from train.errors import UsageError
from train.experiments import EXPERIMENTS, header
from train.memory import tree_bytes
from train.optimizer import make
from train.step import init_state, make_fused

PUBLISHED = [name for name in EXPERIMENTS if name != "quickstart"]
ON_C4 = [name for name in PUBLISHED if EXPERIMENTS[name].on_c4]
# The public scripts that step at every sequence.
SINGLE = ["galore8bit-7b-batch1", "apollo-mini-7b-12gb"]
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}
STEPS = {"60m": 10_000, "130m": 20_000, "350m": 60_000, "1b": 100_000, "7b": 150_000}
# Keys that other parts of the trainer bring.
TEXT = ["--data.path", "c4", "--data.tokenizer", "spiece.model"]


def read(name, *words):
    return parse(["--experiment", name, *TEXT, *words]).config


def test_every_published_run_is_there():
    for size in RANKS:
        for family in ("galore", "osd", "full"):
            assert f"{family}-{size}" in EXPERIMENTS
    names = ("galore8bit-7b", "galore8bit-7b-24gb", "osd8bit-7b", "full8bit-7b", "lomo-7b")
    for name in (*names, *SINGLE):
        assert name in EXPERIMENTS
    assert [n for n in EXPERIMENTS if n.startswith("lomo-") and n.count("-") == 1] == [
        f"lomo-{size}" for size in ("7b", "13b", "30b", "65b")
    ]


@pytest.mark.parametrize("name", ON_C4)
def test_the_c4_recipe_is_the_papers(name):
    command = parse(["--experiment", name, *TEXT])
    config, size = command.config, EXPERIMENTS[name].model
    assert command.model == size and f"-{size}" in name
    tokens = config.train.batch_size * config.train.sequence_length
    assert tokens == (256 if name in SINGLE else 131_072)
    assert config.train.steps == STEPS[size]
    optimizer = config.optimizer
    assert (optimizer.warmup_fraction, optimizer.final_fraction) == (0.1, 0.1)
    assert optimizer.weight_decay == 0
    # (In the fused step of micro-batches there is no norm to clip by.)
    clips = size == "7b" and not config.train.fused_backward
    assert config.train.fused_backward == (name == "galore8bit-7b-24gb" or name in SINGLE)
    assert optimizer.clip_norm == (1.0 if clips else None)
    assert config.model.param_dtype == "bfloat16"
    shape = dataclasses.replace(config.model, param_dtype="float32", dtype="float32", remat=False)
    assert shape == PRESETS[size]
    if name.startswith("apollo"):
        assert (optimizer.learning_rate, optimizer.every) == (0.01, 200)
    elif not name.startswith("full"):
        assert optimizer.rank == RANKS[size] and optimizer.scale == 0.25
        assert optimizer.learning_rate == (0.005 if size == "7b" else 0.01)
    if "galore" in name:
        assert optimizer.every == (500 if size == "7b" else 200)
    assert config.data.layout == "documents" and config.data.validation_tokens == 10_000_000
    assert config.train.batch_size % (config.train.micro_batch_size or 1) == 0


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in ON_C4])
def test_lomos_recipe_updates_in_the_backward_pass(name):
    config = parse(["--experiment", name]).config
    assert (config.train.batch_size, config.train.sequence_length) == (8, 512)
    assert config.model.remat and config.model.param_dtype == "bfloat16"
    if name == "lomo-7b-adamw":
        assert config.optimizer.name == "adamw"
    else:
        assert (config.optimizer.name, config.optimizer.learning_rate) == ("lomo", 0.03)
    assert config.train.fused_backward == (name.count("-") == 1)


def test_one_card_of_24_gb_gets_the_fused_step_and_few_bits():
    config = read("galore8bit-7b-24gb")
    assert config.optimizer.name == "galore_adamw8bit"
    assert config.optimizer.projector_dtype == "linear4"
    assert config.train.fused_backward and config.train.int8_weights and config.model.remat


def test_the_public_scripts_of_one_sequence_a_step():
    galore, mini = (read(name) for name in SINGLE)
    assert galore.optimizer.name == "galore_adamw8bit" and not galore.model.remat
    assert mini.optimizer.name == "apollo_mini" and mini.train.int8_weights
    for config in (galore, mini):
        assert config.train.batch_size == 1 and config.train.micro_batch_size is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_header_tells_command_memory_and_result(name):
    text = header(name)
    command = re.search(r"^Command: python -m train (.*)$", text, re.MULTILINE)[1]
    # Fine-tuning begins with weights, whose folder the reader has.
    assert ("--model PATH" in command) == name.startswith("lomo")
    words = shlex.split(command.replace("--model PATH ", ""))
    assert parse(words).experiment == name
    result = re.search(r"^Published: (.*)\.$", text, re.MULTILINE)[1]
    assert re.search(r"\d|below|close|yardstick", result)
    # The figure is that of the trainer's own state.
    said = float(re.search(r"^Memory: ([\d.]+) GiB of weights and optim", text, re.MULTILINE)[1])
    config = parse(words).config
    # (The sums of micro-batches come on top.)
    whole = dataclasses.replace(config.train, micro_batch_size=None)
    config = dataclasses.replace(config, train=whole)
    fused = config.train.fused_backward
    optimizer = make(config.optimizer, config.train.steps, fused, config.lora)
    step = make_fused(config.model, optimizer) if fused else None
    initial = lambda key: init_state(config.model, optimizer, key, config.train.int8_weights, step)
    state = jax.eval_shape(initial, jax.random.key(0))
    assert said == pytest.approx(tree_bytes((state.params, state.opt_state)) / 2**30, abs=0.006)


def test_published_figures_stand_in_the_headers():
    for name, part in {
        "galore-60m": "34.88",
        "galore-1b": "15.64",
        "full-130m": "25.08",
        "full-350m": "2.06 G",
        "galore8bit-7b": "18 G",
        "galore8bit-7b-24gb": "22.8 G",
        "galore8bit-7b-batch1": "22.72 G",
        "apollo-mini-7b-12gb": "12 G",
        "osd-1b": "31.30 where GaLore has 35.52",
        "lomo-7b": "14.58 GB",
        "lomo-7b-sgd": "51.99 GB",
        "lomo-7b-adamw": "102.20 GB",
    }.items():
        assert part in header(name)


def test_a_named_size_is_its_model_and_no_other_goes_with_it():
    assert read("galore-130m", "--model", "130m") == read("galore-130m")
    with pytest.raises(UsageError, match="leave --model out, or choose --experiment galore-1b"):
        read("galore-60m", "--model", "1b")
    with pytest.raises(UsageError, match=r"galore8bit-7b-24gb is that of 7b; leave --model out$"):
        read("galore8bit-7b-24gb", "--model", "9m")
    # Keys still change what the experiment has chosen.
    assert read("galore-60m", "--train.steps", "7").train.steps == 7
    assert read("galore-60m", "--model.num_layers", "2").model.num_layers == 2


def test_without_c4_it_says_where_to_get_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--experiment", "osd-60m"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --data.path: osd-60m trains on C4") and err.count("\n") == 1
    assert "c4-train.*.json.gz" in err and "allenai/c4" in err
    assert main(["--experiment", "osd-60m", "--data.path", "c4"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --data.tokenizer:") and err.count("\n") == 1
    # To compile a step takes neither.
    assert parse(["--experiment", "osd-60m", "--compile_only"]).config.data.path is None
    assert not list(tmp_path.iterdir())


def test_help_lists_by_family_and_tells_of_one():
    text = description()
    for name in EXPERIMENTS:
        assert re.search(rf"^    {name} +\S", text, re.MULTILINE)
    families = re.findall(r"^  (\w.*):$", text, re.MULTILINE)
    assert len(families) == len(set(families)) == 6
    out, err = finish(start(["--experiment", "galore-60m", "--help"]))
    flat = " ".join(re.sub(r"[│|]", " ", out).split())
    for part in ("galore-60m: GaLore at rank 128", "34.88", "0.26 GiB", "(default: 10000)"):
        assert part in flat
    assert "lomo-7b" not in out and err == ""
