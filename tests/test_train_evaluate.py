"""Multiple choice: likelihoods, the readers of tasks, and the command."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tensorflow_datasets.text  # noqa: F401  (registers the builders)

from models.config import LlamaConfig
from models.llama import graphdef, merge
from tests.test_pretrained import weights
from train import evaluate as module
from train import tasks
from train.errors import UsageError
from train.evaluate import Arguments, encode, evaluate, log_likelihoods, score
from train.runs import Loaded
from train.tasks import Question
from train.tokenizer import Bytes

CONFIG = LlamaConfig(
    vocab_size=257, hidden_size=32, intermediate_size=40, num_heads=4, num_layers=1
)


@pytest.fixture(scope="module")
def model():
    return Loaded("small", CONFIG, weights(CONFIG), Bytes(), 64, ())


@jax.jit
def all_logs(params, tokens):
    return jax.nn.log_softmax(merge(graphdef(CONFIG), params)(tokens))


def expected(model, prompt: str, choice: str) -> float:
    """The sum, from all the logits of the text alone."""
    ids = np.frombuffer((prompt + choice).encode(), np.uint8).astype(np.int32)
    ids = np.array([*([256] if not prompt else []), *ids], np.int32)
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(ids)] = ids
    logs = np.asarray(all_logs(model.params, padded))[0]
    first = len(ids) - len(choice.encode())
    return sum(float(logs[i - 1, ids[i]]) for i in range(first, len(ids)))


PAIRS = [("Is it?", " yes"), ("Is it?", " perhaps"), ("", "a"), ("x" * 40, " Ü"), ("1", "2" * 20)]


@pytest.mark.parametrize("batch_size", [2, 5])
def test_likelihoods_are_those_of_the_model(model, batch_size):
    rows = [encode(model, *pair)[0] for pair in PAIRS]
    found = log_likelihoods(model, rows, batch_size)
    np.testing.assert_allclose(found, [expected(model, *pair) for pair in PAIRS], rtol=1e-5)


def test_both_accuracies_are_counted(model):
    questions = []
    for number in range(9):
        choices = (" a", f" something longer {number}", " bc")
        sums = [expected(model, f"{number}?", choice) for choice in choices]
        best = int(np.argmax(sums))
        per_byte = int(np.argmax([s / len(c) for s, c in zip(sums, choices, strict=True)]))
        # Two thirds right by the sum; the last third right by bytes where that differs.
        answer = best if number < 6 else per_byte if per_byte != best else (best + 1) % 3
        questions.append((Question(f"{number}?", choices, answer), best, per_byte))
    found = score(model, [q for q, _, _ in questions], 4)
    assert found.accuracy == 6 / 9
    assert found.accuracy_per_byte == sum(q.answer == b for q, _, b in questions) / 9
    assert found.accuracy_per_byte != found.accuracy
    assert math.isclose(found.chance, 1 / 3) and found.questions == 9
    assert math.isclose(found.standard_error, math.sqrt(2 / 9 / 9))


def test_a_model_that_gives_no_numbers_has_no_score(model, monkeypatch):
    found = np.array([-1.0, np.nan])
    monkeypatch.setattr(module, "log_likelihoods", lambda *_: found)
    with pytest.raises(UsageError, match="of 1 of 2 answers are not finite"):
        score(model, [Question("a", ("b", "c"), 0)])


def test_a_tokenizer_of_other_weights_is_told(model):
    small = model._replace(config=dataclasses.replace(CONFIG, vocab_size=120))
    with pytest.raises(UsageError, match="gives the id 121, its weights have 120 embeddings"):
        score(small, [Question("x", ("y", "ab"), 0)])


def test_what_is_too_long_loses_the_beginning_of_the_prompt(model):
    row, cut = encode(model, "a" * 80 + "?", " yes")
    assert cut and len(row.tokens) == 64 and bytes(row.tokens[row.first :].tolist()) == b" yes"
    row, cut = encode(model._replace(start=(256,)), "hm?", " yes")
    assert not cut and row.tokens[0] == 256 and row.first == 4
    with pytest.raises(UsageError, match="has 70 tokens, and the model's context is 64"):
        encode(model, "?", "b" * 70)


def test_lines(tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [
        {"question": "2+2=", "choices": ["3", "4"], "answer": 1},
        {"prompt": "sky:", "choices": [" red", " blue"], "answer": " blue", "id": 7},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = tasks.load(str(path))
    assert found == [
        Question("2+2=", ("3", "4"), 1),
        Question("sky:", (" red", " blue"), 1),
    ]
    text = '{"prompt": "a\u2028b\x85", "choices": ["b", "c"], "answer": 0}\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + (text * 2).encode())
    assert tasks.load(str(path)) == [Question("a\u2028b\x85", ("b", "c"), 0)] * 2
    for line, words in (
        ('{"prompt": "a", "choices": ["b", "c"]}', "line 1: lacks 'answer'"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "two texts or more"),
        ('{"prompt": 3, "choices": ["b", "c"], "answer": 0}', "prompt is no text"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer 2 is no number"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "answer True is no number"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "d"}', "'d' is none of the choices"),
        (r'{"prompt": "\ud800", "choices": ["b", "c"], "answer": 0}', "half of a surrogate pair"),
        ("[]", "line 1: "),
        ("{", "line 1: "),
        ("", "holds no question"),
    ):
        path.write_text(line)
        with pytest.raises(UsageError, match=words) as error:
            tasks.load(str(path))
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="can't be read"):
        tasks.load(str(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match="a file has no splits"):
        tasks.load(str(path), "test")


def prepare(folder, name, config, version, features, records):
    """A data set as the builder of that name writes it, in array_record."""
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(version)
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)]
            code_path = None

            def _info(self):
                dictionary = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(builder=self, features=dictionary)

            def _split_generators(self, manager):
                return {"validation": self._generate_examples(), "test": self._secret()}

            def _generate_examples(self):
                yield from enumerate(records)

            def _secret(self):
                yield 0, {**records[0], "label": -1}

    Builder.name = name
    options = {"data_dir": folder, "config": config, "file_format": "array_record"}
    Builder(**options).download_and_prepare()


def label(*names):
    return tfds.features.ClassLabel(names=names)


TEXT = tfds.features.Text


def test_glue(tmp_path):
    features = {"sentence": TEXT(), "label": label("negative", "positive"), "idx": np.int32}
    records = [
        {"sentence": "a fine film", "label": 1, "idx": 0},
        {"sentence": "Über dull", "label": 0, "idx": 1},
    ]
    prepare(tmp_path, "glue", "sst2", "2.0.0", features, records)
    # The one call of tensorflow-datasets that reads it by its name.
    source = tfds.data_source("glue/sst2", split="validation", data_dir=tmp_path, download=False)
    assert {record["sentence"].decode() for record in source} == {"a fine film", "Über dull"}
    found = sorted(tasks.load("glue/sst2", None, str(tmp_path)))
    ask = "\nQuestion: Is this sentence positive or negative?\nAnswer:"
    assert found == [
        Question("a fine film" + ask, (" negative", " positive"), 1),
        Question("Über dull" + ask, (" negative", " positive"), 0),
    ]
    with pytest.raises(UsageError, match="its answers are secret in glue/sst2"):
        tasks.load("glue/sst2", "test", str(tmp_path))
    with pytest.raises(UsageError, match="--split dev: glue/sst2 has "):
        tasks.load("glue/sst2", "dev", str(tmp_path))
    with pytest.raises(UsageError, match="--task glue/rte: .*--tfds_dir"):
        tasks.load("glue/rte", None, str(tmp_path))


def test_super_glue(tmp_path):
    features = {"question": TEXT(), "passage": TEXT(), "idx": np.int32}
    record = {"question": "is it so", "passage": "It is.", "idx": 0, "label": 1}
    prepare(
        *(tmp_path, "super_glue", "boolq", "1.0.2"),
        {**features, "label": label("False", "True")},
        [record],
    )
    # (By its name the builder's own class would be made, which asks for TensorFlow.)
    found = tasks.load("super_glue/boolq", None, str(tmp_path))
    assert found == [Question("It is.\nQuestion: is it so?\nAnswer:", (" no", " yes"), 1)]
    features = {key: TEXT() for key in ("premise", "choice1", "choice2", "question")}
    record = {"premise": "The man fell.", "choice1": "He slipped.", "choice2": "It rained."}
    prepare(
        *(tmp_path, "super_glue", "copa", "1.0.2"),
        {**features, "idx": np.int32, "label": label("choice1", "choice2")},
        [{**record, "question": "cause", "idx": 0, "label": 0}],
    )
    found = tasks.load("super_glue/copa", None, str(tmp_path))
    assert found == [Question("The man fell because", (" he slipped.", " it rained."), 0)]


def test_every_template_has_the_labels_and_features_of_its_builder():
    glue = tfds.builder_cls("glue").builder_configs
    assert set(glue) - {"stsb", "ax"} == {
        name.removeprefix("glue/") for name in tasks.TASKS if name.startswith("glue/")
    }
    for name, config in glue.items():
        template = tasks.TEMPLATES.get(f"glue/{name}")
        if template is not None:
            assert set(template.words) == set(config.label_classes)
            record = dict.fromkeys(config.text_features, "t")
            assert "{" not in template.prompt.format_map(record)
    others = tfds.builder_cls("super_glue").builder_configs
    for name, config in others.items():
        template = tasks.TEMPLATES.get(f"super_glue/{name}")
        if template is not None:
            assert set(template.words) == set(config.label_classes)
            record = dict.fromkeys(config.features, "t")
            assert "{" not in template.prompt.format_map(record)
    known = {name.removeprefix("super_glue/") for name in tasks.TASKS if "super" in name}
    assert {f"super_glue/{name}" for name in set(others) - known} < set(tasks.NOT_SCORED)


@pytest.mark.parametrize("kind, count", [("president", 39), ("decade", 24)])
def test_addresses_are_split_by_speech(kind, count):
    train, test = (tasks.addresses(kind, split) for split in ("train", "test"))
    assert len(train) + len(test) == 4 * 249 and 0.1 < len(test) / (4 * 249) < 0.3
    speech = lambda questions: {question.prompt.partition("\n")[0] for question in questions}
    assert not speech(train) & speech(test)
    answers = {q.choices[q.answer] for q in train + test}
    assert len(answers) == count
    for question in test:
        assert len(set(question.choices)) == 4 and set(question.choices) <= answers
    places = np.bincount([q.answer for q in train], minlength=4) / len(train)
    assert (abs(places - 0.25) < 0.1).all()
    assert tasks.addresses(kind, "test") == test
    assert next(tasks.examples(test))["completion"] == test[0].choices[test[0].answer]


def test_the_command(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(module, "load", lambda path, step: model)
    path = tmp_path / "q.jsonl"
    questions = [
        {"prompt": f"{i}?", "choices": ["a", "b"], "answer": int(i < 6)} for i in range(10)
    ]
    path.write_text("\n".join(map(json.dumps, questions)))
    out = tmp_path / "new" / "scores.jsonl"
    found = evaluate(Arguments("any", str(path), limit=5, out=str(out)))
    assert found.questions == 5 and found.commonest == 0.6 and found.chance == 0.5
    row = json.loads(out.read_text())
    assert row["accuracy"] == found.accuracy and row["model"] == "any"
    assert "5 questions" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--limit 0"):
        evaluate(Arguments("any", str(path), limit=0))
    with pytest.raises(UsageError, match="--task glue/sst: unknown"):
        evaluate(Arguments("any", "glue/sst"))
    for name in tasks.NOT_SCORED:
        with pytest.raises(UsageError, match=f"--task {name}: is not scored here: it"):
            evaluate(Arguments("any", name))
    with pytest.raises(UsageError, match="--split dev: sotu/decade has train and test"):
        evaluate(Arguments("any", "sotu/decade", split="dev"))
