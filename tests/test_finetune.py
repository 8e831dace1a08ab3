"""The fine-tuning benchmark: it goes on where it was stopped, and tells what it chose."""

import json
import math
import sys

from benchmarks import finetune


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    asked: list[str] = []

    def train(method, rate, folder, common):
        folder.mkdir(exist_ok=True)
        return abs(rate - 0.1) if rate < 0.3 else math.inf

    def evaluate(model, args):
        asked.append(model)
        return {"accuracy": 0.5, "accuracy_per_byte": 0.25, "standard_error": 0.1, "task": "x"}

    monkeypatch.setattr(finetune, "train", train)
    monkeypatch.setattr(finetune, "evaluate", evaluate)
    words = ["finetune", "model", "--out", str(tmp_path), "--methods", finetune.ZERO, "LOMO"]
    monkeypatch.setattr(sys, "argv", words)
    finetune.main()
    table = capsys.readouterr().out
    assert "| LOMO | 0.1 | 0.000 | 50.0 % | 25.0 % | 10.0 % |" in table
    assert "LOMO: held-out loss (learning rate) 0.070 (0.03), 0.000 (0.1), diverged (0.3)" in table
    assert asked == ["model", str(tmp_path / "president-200x8x160-LOMO-0.1")]

    monkeypatch.setattr(sys, "argv", [*words, "LoRA"])
    finetune.main()
    again = capsys.readouterr().out
    assert set(table.splitlines()) < set(again.splitlines()) and "| LoRA | 0.01* |" in again
    assert len(asked) == 3
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == [finetune.ZERO, "LOMO", "LoRA"]
    assert lines[1]["tried"] == {"0.03": 0.07, "0.1": 0.0, "0.3": None}
    assert lines[2]["command"].endswith("--methods zero-shot LOMO LoRA")
    # Another setting is another row.
    monkeypatch.setattr(sys, "argv", [*words, "--limit", "3"])
    finetune.main()
    assert len(asked) == 5
