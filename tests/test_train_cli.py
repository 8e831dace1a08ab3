"""The trainer's command line: precedence, and one line for each mistake."""

import dataclasses
import os
import pty
import subprocess
import sys

import pytest

from models.config import PRESETS
from tests.train_helpers import ROOT, finish, start
from train import rundir
from train.checks import validate
from train.cli import Command, main, parse
from train.config import Config, flatten, get, resolve
from train.errors import UsageError
from train.experiments import EXPERIMENTS


def test_defaults_are_the_quickstart():
    command = parse([])
    assert (command.model, command.experiment) == ("tiny", "quickstart")
    assert command.config.model == PRESETS["tiny"]
    assert command.config.optimizer.name == "galore"
    assert command.config.optimizer.learning_rate == 0.01


def test_preset_then_experiment_then_keys(monkeypatch):
    def short(config):
        train = dataclasses.replace(config.train, steps=2, batch_size=3)
        return dataclasses.replace(config, train=train)

    entry = EXPERIMENTS["quickstart"]._replace(summary="two steps", delta=short)
    monkeypatch.setitem(EXPERIMENTS, "short", entry)
    apart = ["--model", "60m", "--experiment", "short"]
    for spelled in (apart, ["--model=60m", "--experiment=short"]):
        config = parse([*spelled, "--train.batch-size", "5", "--model.num_layers=2"]).config
        assert config.train.steps == 2  # of the experiment
        assert config.train.batch_size == 5  # of the command line
        assert config.model == dataclasses.replace(PRESETS["60m"], num_layers=2)


@pytest.mark.parametrize("model", PRESETS)
@pytest.mark.parametrize("experiment", [k for k, v in EXPERIMENTS.items() if v.model is None])
def test_every_model_goes_with_every_experiment_of_no_size(model, experiment):
    config = parse(["--model", model, "--experiment", experiment]).config
    assert config.model == PRESETS[model]


def test_learning_rate_is_the_optimizers_own_unless_given():
    assert parse(["--optimizer.name", "adamw"]).config.optimizer.learning_rate == 0.003
    words = ["--optimizer.name", "adamw", "--optimizer.learning_rate", "0.5"]
    assert parse(words).config.optimizer.learning_rate == 0.5


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--model", "61m"], ["--model 61m", "did you mean 71m", "60m"]),
        (["--model"], ["--model", "tiny"]),
        (["--experiment", "quikstart"], ["--experiment quikstart", "did you mean quickstart"]),
        (["--optimizer.rnk", "3"], ["--optimizer.rnk", "did you mean --optimizer.rank"]),
        (["--steps", "3"], ["--steps", "did you mean --train.steps"]),
        (["--rank", "3"], ["--rank", "did you mean --optimizer.rank or --lora.rank?"]),
        (["--OPTIMIZER.rank", "3"], ["did you mean --optimizer.rank?"]),
        (["--optimizer.lr", "3"], ["did you mean --optimizer.learning_rate?"]),
        (["--zzz"], ["--zzz", "--help"]),
        (["stray"], ["stray", "--help"]),
        (["--train.steps", "many"], ["--train.steps", "many"]),
        (["--train.steps", "1.5"], ["--train.steps", "1.5"]),
        (["--train.steps"], ["--train.steps"]),
        (["--optimizer.name", "adam"], ["adam", "--optimizer.name", "galore", "adamw"]),
        (["--optimizer.rank", "0"], ["--optimizer.rank 0", "at least 1"]),
        (["--optimizer.rank=-4"], ["--optimizer.rank -4", "at least 1"]),
        (["--optimizer.every", "0"], ["--optimizer.every 0"]),
        (["--optimizer.learning_rate", "nan"], ["--optimizer.learning_rate nan"]),
        (["--optimizer.learning_rate", "0"], ["--optimizer.learning_rate 0"]),
        (["--optimizer.warmup_fraction", "1.5"], ["--optimizer.warmup_fraction", "at most 1"]),
        (["--optimizer.b1", "1"], ["--optimizer.b1", "below 1"]),
        (["--optimizer.name", "adamw", "--optimizer.rank", "4"], ["--optimizer.rank", "adamw"]),
        (["--optimizer.name", "adalomo"], ["--optimizer.name adalomo", "--train.fused_backward"]),
        (["--optimizer.name", "lomo", "--optimizer.b1", "0.5"], ["--optimizer.b1", "lomo"]),
        (["--optimizer.kinetic", "newton"], ["--optimizer.kinetic", "heavy_ball"]),
        (
            ["--optimizer.name", "adamw", "--optimizer.kinetic", "lion"],
            ["--optimizer.kinetic", "adamw doesn't read it", "galore"],
        ),
        (
            ["--log.hamiltonian", "--optimizer.name", "lomo"],
            ["--log.hamiltonian", "lomo has no kinetic energy"],
        ),
        (["--log.hamiltonian", "--lora.rank", "4"], ["--log.hamiltonian", "adapters"]),
        (["--lora.freeze", "all"], ["--lora.freeze", "--lora.rank"]),
        (["--lora.alpha", "4"], ["--lora.alpha", "--lora.rank"]),
        (
            ["--lora.rank", "4", "--lora.freeze", "all", "--optimizer.name", "lomo"],
            ["--optimizer.name", "--lora.freeze all", "AdamW"],
        ),
        (["--lora.rank", "-1"], ["--lora.rank -1", "at least 0"]),
        (["--model.loss", "logits", "--model.loss_chunk", "8"], ["loss_chunk=8", "fused"]),
        (["--optimizer.code", "linear"], ["--optimizer.code", "galore doesn't read it", "8bit"]),
        (
            ["--optimizer.name", "adamw", "--optimizer.moment_dtype", "bfloat16"],
            ["--optimizer.moment_dtype", "adamw doesn't read it"],
        ),
        (["--optimizer.projector_dtype", "int8"], ["--optimizer.projector_dtype", "linear4"]),
        (["--model.hidden_size", "66"], ["hidden_size=66", "num_heads=4"]),
        (["--model.dtype", "int8"], ["dtype", "int8", "float32"]),
        (["--data.vocab_size", "5000"], ["--data.vocab_size 5000", "--model.vocab_size 4096"]),
        (["--data.vocab_size", "100"], ["--data.vocab_size 100", "260"]),
        (["--data.validation_fraction", "1"], ["--data.validation_fraction", "0.1"]),
        (["--train.batch_size", "0"], ["--train.batch_size 0"]),
        (["--train.seed", "9" * 23], ["--train.seed 99999", "at most 2147483647"]),
        (["--optimizer.learning_rate", "1e39"], ["--optimizer.learning_rate 1e+39", "at most"]),
        (["--optimizer.eps", "1e-45"], ["--optimizer.eps 1e-45", "at least 1.17549e-38"]),
        (["--data.path", ""], ["--data.path ''", "no such file"]),
        (["--data.path", "no/such/text"], ["--data.path no/such/text", "no such file"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err and "│" not in err
    for part in parts:
        assert part in err
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_the_real_program_exits_so_too():
    _, err = finish(start(["--model", "nine"]), 2)
    assert err.startswith("error: --model nine: unknown;") and err.count("\n") == 1
    out, err = finish(start(["--help"]), 0)
    for name in (*PRESETS, *EXPERIMENTS, *flatten(Config())):
        assert name in out
    assert EXPERIMENTS["quickstart"].summary in out and err == ""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_mistake_is_one_line_on_a_terminal_too(encoding):
    """tyro draws boxes, with colours on a terminal and of other characters without UTF-8."""
    controller, terminal = pty.openpty()
    program = [sys.executable, "-m", "train", "--train.steps", "abc"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    with subprocess.Popen(program, stderr=terminal, cwd=ROOT, env=environment) as process:
        os.close(terminal)
        assert process.wait(timeout=120) == 2
    err = os.read(controller, 65536).decode()
    os.close(controller)
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 300
    assert "abc" in err and "\x1b" not in err and "---" not in err and "─" not in err


def test_every_check_names_a_real_key():
    config = resolve(Config())
    for key in flatten(config):
        get(config, key)
    validate(dataclasses.replace(config, model=PRESETS["9m"]))


def test_every_key_is_read_somewhere():
    """A field of the trainer's own configuration that no other file names is a defect."""
    source = "".join(
        path.read_text() for path in (ROOT / "train").glob("*.py") if path.name != "config.py"
    )
    for key in flatten(Config()):
        if not key.startswith("model."):
            assert f".{key.rpartition('.')[2]}" in source, key


def test_run_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def choose(*words):
        return rundir.choose(parse(list(words)))

    base = "runs/quickstart-tiny-galore"
    assert choose() == (tmp_path.__class__(base), False, base.partition("/")[2])
    assert choose("--resume") == (tmp_path.__class__(base), False, "")
    (tmp_path / base).mkdir(parents=True)
    (tmp_path / base / "metrics.jsonl").touch()
    assert str(choose().path) == f"{base}-2"
    assert choose("--resume") == (tmp_path.__class__(base), True, "")
    (tmp_path / f"{base}-10").mkdir()
    assert str(choose().path) == f"{base}-11"
    assert str(choose("--resume").path) == f"{base}-10"
    # Another optimizer's runs are not this one's.
    assert str(choose("--optimizer.name", "adamw").path) == "runs/quickstart-tiny-adamw"
    with pytest.raises(UsageError, match="holds a run already; add --resume"):
        choose("--run_dir", base)
    assert choose("--run_dir", base, "--resume").resumes
    # Two runs that chose before either began.
    command = parse([])
    first, second = rundir.choose(command), rundir.choose(command)
    assert first == second
    (first, one), (second, two) = first.open(command), second.open(command)
    with one, two:
        assert [str(first.path), str(second.path)] == [f"{base}-11", f"{base}-12"]
    command = parse(["--run_dir", "named"])
    late = rundir.choose(command)
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "metrics.jsonl").touch()
    with pytest.raises(UsageError, match="another run has just begun in it"):
        late.open(command)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        choose("--run_dir", "file")


def test_a_folder_in_use_is_refused(tmp_path):
    command = parse(["--run_dir", str(tmp_path / "run")])
    place = rundir.choose(command)
    with place.open(command)[1]:
        code = (
            "import sys; from train import rundir; from train.cli import parse\n"
            "command = parse(['--run_dir', sys.argv[1], '--resume'])\n"
            "rundir.choose(command).open(command)"
        )
        program = [sys.executable, "-c", code, str(tmp_path / "run")]
        other = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
        assert "another process is training in it" in other.stderr


def test_the_command_prints_as_it_was_given():
    command = Command(Config(), "tiny", "quickstart", ("--data.path", "my text"))
    assert str(command) == "python -m train --data.path 'my text'"
