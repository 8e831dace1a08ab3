"""The study of convergence: what it runs, what it finds again, and that it is the trainer's run."""

import json
import shlex

import pytest

from benchmarks import _methods, convergence
from benchmarks.convergence import METHODS, OTHERS, SETTINGS, Method, Run, Study, words_of
from tests.train_helpers import TINY, write_text
from train.cli import main, parse
from train.records import read


class Valley:
    """Stands in for runs: the loss has its minimum at a rate, and seeds differ."""

    made: list[tuple[str, float, int]] = []

    def __init__(self, words):
        self.words = words

    def __call__(self, rate, seed):
        self.made.append((self.words, rate, seed))
        loss = None if rate > 0.5 else (rate / 0.032 - 1) ** 2 + 0.1 * seed
        return {"loss": loss, "curve": [], "train": [], "state_bytes": 1}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(convergence, "Runner", Valley)
    monkeypatch.setattr(Valley, "made", [])
    return Study(tmp_path / "results.jsonl", SETTINGS["cpu"])


def test_rates_are_added_until_the_best_one_is_inside(study):
    study.sweep("GaLore", Method(METHODS["GaLore"].words, (0.004, 0.008)), 2)
    assert sorted({rate for _, rate, _ in Valley.made}) == [0.004, 0.008, 0.016, 0.032, 0.064]
    rate, losses = study.best(METHODS["GaLore"], 2)
    assert rate == 0.032 and losses == pytest.approx([0, 0.1])
    study.sweep("Fira", Method(OTHERS["Fira"].words, (0.064, 0.128, 1.0)), 1)
    assert study.best(OTHERS["Fira"], 1)[0] == 0.032
    assert study.get(words_of(study.setting, OTHERS["Fira"].words), 1.0, 0)["loss"] is None


def test_a_study_goes_on_where_it_was_stopped(study):
    method = Method(METHODS["GaLore"].words, (0.016, 0.032, 0.064))
    study.sweep("GaLore", method, 1)
    lines = study.path.read_text().splitlines()
    Valley.made.clear()
    again = Study(study.path, study.setting)
    again.sweep("GaLore", method, 2)
    assert [(rate, seed) for _, rate, seed in Valley.made] == [(r, 1) for r in method.rates]
    assert study.path.read_text().splitlines()[: len(lines)] == lines


def test_the_tables_tell_what_there_is(study):
    assert len(convergence.tables(study, 3).splitlines()) == 1
    for name in ("AdamW, kernels at 0.25", "GaLore", "APOLLO"):
        study.sweep(name, METHODS[name], 2)
    convergence.run_all(study, ["rank"], 2)
    table = convergence.tables(study, 3)
    row = next(line for line in table.splitlines() if line.startswith("GaLore "))
    assert "0.032 of 5" in row and "0.0500" in row and "0.0707" in row
    assert "### rank" in table and "GaLore, rank 32" in table
    assert "### 8 bits" in table  # those of its entries that are another question's runs


def test_ablations_that_are_repeated_keep_their_rate(study):
    study.sweep("GaLore", METHODS["GaLore"], 1)
    Valley.made.clear()
    convergence.run_all(study, ["refresh period", "rank"], 3)
    made = {(words, seed) for words, _, seed in Valley.made}
    assert {rate for _, rate, _ in Valley.made} == {0.032}
    every = words_of(study.setting, METHODS["GaLore"].words, "--optimizer.every 10")
    rank = words_of(study.setting, METHODS["GaLore"].words, "--optimizer.rank 8")
    assert {(every, 0), (every, 1), (every, 2), (rank, 0)} <= made and (rank, 1) not in made
    row = convergence.answers(study)["refresh period"]["GaLore, every 10"]
    assert row["seed"] == 0 and row["losses"] == pytest.approx([0, 0.1, 0.2])
    assert "0.1000  0.1000" in convergence.tables(study, 1)


def test_all_words_are_the_trainers():
    for setting in SETTINGS.values():
        for method in convergence.all_methods().values():
            words = words_of(setting, method.words)
            command = parse(shlex.split(Run(words, 0.01, 1).arguments))
            assert command.config.train.seed == 1
            assert 0.01 in (
                command.config.optimizer.learning_rate,
                command.config.lora.learning_rate,
            )
            assert len(method.rates) >= 5
        for entries in convergence.ablations(setting).values():
            for name, words in entries.values():
                parse(shlex.split(words_of(setting, METHODS[name].words, words)))


def test_the_large_setting_wants_a_text(monkeypatch, tmp_path, capsys):
    out = ["--setting", "gpu", "--report", "--out", str(tmp_path / "results.jsonl")]
    monkeypatch.setattr("sys.argv", ["convergence", *out])
    with pytest.raises(SystemExit):
        convergence.main()
    assert "name a text, as in --data" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["convergence", *out, "--data", "--data.path 'a b.json.gz'"])
    convergence.main()
    setting = SETTINGS["gpu"]
    words = words_of(setting._replace(words=f"{setting.words} --data.path 'a b.json.gz'"))
    assert "--data.path 'a b.json.gz' --train.batch_size" in words
    assert parse(shlex.split(words)).config.data.path == "a b.json.gz"


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            "--optimizer.name online_subspace_descent --optimizer.rank 4", marks=pytest.mark.slow
        ),
        pytest.param(
            "--optimizer.name adamw --lora.rank 2 --lora.freeze kernels --lora.merge_every 5",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_is_that_of_the_command_that_it_writes(words, tmp_path, monkeypatch):
    tiny = dict(zip(TINY[::2], TINY[1::2], strict=True))
    for key in ("--optimizer.rank", "--optimizer.every", "--checkpoint.every"):
        del tiny[key]
    steps, batch_size, length = 12, 2, 16
    for key in ("steps", "batch_size", "sequence_length"):
        del tiny[f"--train.{key}"]
    tiny |= {"--data.path": str(write_text(tmp_path / "text"))}
    tiny["--data.cache_dir"] = str(tmp_path / "cache")
    base = " ".join(f"{key} {value}" for key, value in tiny.items())
    setting = _methods.Setting(base, 4, steps, batch_size, length)
    study = Study(tmp_path / "results.jsonl", setting)
    row = study.run("", words_of(setting, words), 0.02, 3)
    command = shlex.split(row["command"])
    assert command[:3] == ["python", "-m", "train"]
    assert main([*command[3:], "--run_dir", str(tmp_path / "run")]) == 0
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["validation_loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert json.loads(study.path.read_text()) == row
    losses = [r["loss"] for r in rows if r["kind"] == "train"]
    assert row["train"] == [pytest.approx(sum(losses) / 12, abs=1e-4)]
