"""`python -m train.report`: runs side by side, whole and broken ones."""

import html.parser
import json
import math
import re

import numpy as np
import pytest

from train import compare, page, recorded
from train.report import main

MIB = 2**20


def write_run(folder, steps=40, total=40, rate=0.01, **config):
    """What a run leaves: a row for each step, an evaluation each ten, and the end."""
    folder.mkdir(parents=True)
    config = {"train.steps": total, "optimizer.name": "galore", "run_dir": str(folder)} | config
    (folder / "config.json").write_text(json.dumps(config))
    rows, speeds = [], []
    for step in range(1, steps + 1):
        loss = 7 * math.exp(-step / 30)
        skipped = step == 3
        rows.append(
            {
                **{"kind": "train", "step": step, "tokens": 100 * step, "loss": loss},
                **{"grad_norm": None if skipped else 1 / step, "learning_rate": rate},
                **{"effective_learning_rate": rate / 4, "skipped": skipped},
            }
        )
        if step % 10 == 0:
            rows.append({"kind": "validation", "step": step, "validation_loss": loss + 0.25})
            rows.append({"kind": "subspace", "step": step, "captured_energy": 0.875})
            speeds.append(speed(step, 0, step / 2))
    if steps == total:
        final = {"validation_loss": 2.0, "bits_per_byte": 1.25, "skipped_gradients": 6}
        rows.append({"kind": "final", "step": steps, **final})
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines(rows))
    (folder / "throughput.jsonl").write_text(lines(speeds))
    parts = {"weights": 5 * MIB, "optimizer_state": 3 * MIB, "total": 20 * MIB, "temporaries": 0}
    memory = {"predicted": parts, "compiled": parts | {"total": 24 * MIB}}
    (folder / "memory.json").write_text(json.dumps(memory))
    return folder


def speed(step, after, seconds):
    return {
        **{"kind": "speed", "step": step, "after": after, "seconds": seconds},
        **{"tokens_per_second": 200.0, "tokens_per_second_per_device": 100.0, "devices": 2},
        **{"model_flops_per_second": 5e12, "utilisation": 0.375, "device": "NVIDIA L4"},
        "peak_bytes": 30 * MIB,
    }


class Page(html.parser.HTMLParser):
    """The tags, addresses and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data):
        self.text += data


def test_two_runs_in_a_table_and_a_page(tmp_path, capsys):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", steps=30, rate=0.02, **{"optimizer.name": "adamw"})
    out = tmp_path / "page.html"
    assert main([str(one), str(two), "--out", str(out)]) == 0
    said, err = capsys.readouterr()
    assert err == ""
    expected = {
        "state": ["finished", "step 30 of 40"],
        "tokens trained on": ["4,000", "3,000"],
        "validation loss (nats a token)": ["2.0000", f"{7 * math.exp(-1) + 0.25:.4f} (a part)"],
        "perplexity": ["7.39", f"{math.exp(7 * math.exp(-1) + 0.25):.2f} (a part)"],
        "bits per byte": ["1.2500", "-"],
        "captured energy, last": ["87.5%", "87.5%"],
        "effective learning rate, peak": ["0.0025", "0.005"],
        "skipped steps": ["1", "1"],
        "skipped gradients of leaves": ["6", "-"],
        "tokens/s": ["200", "200"],
        "tokens/s per device": ["100", "100"],
        "model FLOP/s": ["5e+12", "5e+12"],
        "utilisation of the peak": ["37.5%", "37.5%"],
        "device": ["2 x NVIDIA L4", "2 x NVIDIA L4"],
        "memory: weights and state": ["8.00 MiB", "8.00 MiB"],
        "memory: peak of a step": ["24.00 MiB", "24.00 MiB"],
        "memory: peak on the device": ["30.00 MiB", "30.00 MiB"],
        "--optimizer.name": ["galore", "adamw"],
    }
    for name, cells in expected.items():
        line = next(line for line in said.splitlines() if line.startswith(name + " "))
        assert re.split(r" {2,}", line.strip()) == [name, *cells]
    assert "--train.steps" not in said and "--run_dir" not in said  # equal, and a place
    assert "note: two: unfinished: step 30 of 40" in said and str(out) in said

    text = out.read_text()
    shown = Page(text)
    for name, cells in expected.items():
        assert name in shown.text and all(cell in shown.text for cell in cells)
    for part in ("1: one", "2: two", "two: unfinished", "Loss by tokens", "Loss by time"):
        assert part in shown.text
    assert "mathdefault" not in shown.text and "$" not in shown.text
    for label in ("nats a token", "(s)", "tokens/s", "Gradient norm", "Captured energy"):
        assert label in shown.text
    # Nothing from elsewhere, and nothing that runs.
    assert shown.tags.count("svg") == 1 and "script" not in shown.tags
    assert all(address.startswith("#") for address in shown.addresses)
    assert not re.search(r"(?i)url\((?!#)|@import|<link", text)


def test_broken_runs_are_named_and_the_others_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "good")
    write_run(tmp_path / "torn")
    lines = (tmp_path / "torn" / "metrics.jsonl").read_text().splitlines()
    lines[20] = lines[20][:15]
    (tmp_path / "torn" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "torn" / "config.json").write_text("[" * 100_000)
    (tmp_path / "torn" / "memory.json").write_bytes(b"\xff\x00")
    (tmp_path / "torn" / "throughput.jsonl").unlink()
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "stepless", steps=0)
    (tmp_path / "file").touch()
    names = ["good", "torn", "empty", "stepless", "file", "gone"]
    assert main(names) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for part in (
        "note: torn: unfinished: step 18 of an unknown number",
        "note: torn: config.json is damaged",
        "note: torn: metrics.jsonl is damaged: line 21",
        "note: torn: throughput.jsonl is missing",
        "note: torn: memory.json is damaged",
        "note: empty: holds no step of a run (config.json is missing",
        "note: stepless: holds no step of a run (metrics.jsonl is empty",
        "note: file: is a file",
        "note: gone: no such folder",
    ):
        assert part in out
        assert part.removeprefix("note: ") in Page((tmp_path / "report.html").read_text()).text

    assert main(["empty", "gone"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: there is nothing to compare: empty: holds no step")
    assert "gone: no such folder" in err and err.count("\n") == 1


def test_numbers_that_are_none_leave_gaps(tmp_path):
    folder = write_run(tmp_path / "run", steps=12)
    strange = ['"big"', "null", "NaN", "Infinity", "1" + "0" * 400, "true", "[3]", "{}"]
    with open(folder / "metrics.jsonl", "a") as file:
        for step, value in enumerate(strange, 13):
            row = f'{{"kind": "train", "step": {step}, "loss": {value}, "tokens": {value}}}\n'
            file.write(row)
    run = recorded.read(folder, "run")
    x, y = recorded.curve(run.of("train"), "step", "loss")
    assert list(x) == [*range(1, 13), 18] and np.all(np.isfinite(y))
    rows = compare.table([run])
    assert page.write([run], rows, run.notes).count("<svg") == 1


def test_names_and_values_are_escaped_everywhere(tmp_path, capsys):
    evil = "<script>alert(1)<!-- $x^{ [red] _&"
    folder = write_run(tmp_path / f"_{evil}", **{"data.note": evil, "data.bell": "a\x1b[2Jb"})
    other = write_run(tmp_path / "other", **{"data.note": "plain", "data.bell": "c"})
    out = tmp_path / "page.html"
    assert main([str(folder), str(other), "--out", str(out)]) == 0
    shown = Page(out.read_text())
    assert "script" not in shown.tags and f"1: _{evil}" in shown.text
    assert shown.text.count(evil) == 3  # the table's head, the legend, and the key's value
    said = capsys.readouterr().out
    assert said.count(evil) == 2 and "\x1b" not in said and "a?[2Jb" in said


def test_folders_of_one_name_are_told_apart(tmp_path, capsys):
    folders = [write_run(tmp_path / side / "run") for side in ("a", "b")]
    out = tmp_path / "page.html"
    # One that is given twice is shown once.
    assert main([*map(str, folders), str(folders[0]), "--out", str(out)]) == 0
    text = Page(out.read_text()).text
    assert f"1: {folders[0]}" in text and f"2: {folders[1]}" in text and "3: " not in text


def test_time_is_that_of_steps_that_stand():
    """Killed after step 60, resumed after 40; killed before the next row, resumed after 90."""
    speeds = [speed(25, 0, 10.0), speed(50, 0, 20.0), speed(50, 40, 5.0), speed(75, 40, 10.0)]
    speeds += [speed(100, 90, 3.0), {"kind": "speed", "step": 110}, {"kind": "speed", "step": 1}]
    run = recorded.Run("run", {}, [], speeds, {}, [])
    steps, seconds = recorded.timeline(run)
    assert list(steps) == [0, 25, 40, 50, 75, 90, 100]
    # Step 40 was reached at 16 s; steps 76 to 90 at the speed of those after.
    assert list(seconds) == [0, 10, 16, 21, 26, 30.5, 33.5]
    # A run that begins anew from its first step.
    speeds = [speed(10, 0, 4.0), speed(10, 0, 6.0)]
    steps, seconds = recorded.timeline(recorded.Run("run", {}, [], speeds, {}, []))
    assert list(steps) == [0, 10] and list(seconds) == [0, 6]


def test_long_runs_are_thinned_and_keep_their_peaks():
    x = np.arange(100_000.0)
    y = np.ones_like(x)
    y[54_321], y[77] = 9, -9
    thin_x, thin_y = page._extremes((x, y))
    assert len(thin_x) <= 300 and thin_y.max() == 9 and thin_y.min() == -9
    assert np.all(np.diff(thin_x) > 0)
    mean_x, mean_y = page._means((x, x))
    assert len(mean_x) == 100 and np.allclose(mean_x, mean_y)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "RUN"),
        (["run", "--outt", "x.html"], "--outt"),
        (["run", "--out", "metrics.jsonl"], "--out metrics.jsonl: is no page"),
        (
            ["run", "--out", "no/such/folder/x.html"],
            "--out no/such/folder/x.html: can't be written",
        ),
    ],
)
def test_a_mistake_is_one_line(words, part, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", steps=2)
    before = sorted(tmp_path.rglob("*"))
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and part in err
    assert sorted(tmp_path.rglob("*")) == before
