"""C4 as tensorflow-datasets prepares it, read by the calls that read the real one."""

import json
import os
import sys

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from train import batches, corpus
from train.config import DataConfig
from train.errors import UsageError

TRAIN = [f"document {n} of the web" for n in range(30)] + [" ", "held 2", "document 3 of the web"]
HELD = [f"held {n}" for n in range(5)]


def write_c4(folder, splits=(("train", TRAIN), ("validation", HELD)), **options):
    """A data set c4/en:3.1.0 with the features of the real one."""
    with registered.skip_registration():

        class C4(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("3.1.0")
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en", version="3.1.0")]
            name = "c4"
            code_path = None

            def _info(self):
                names = ("text", "url", "content-type", "content-length", "timestamp")
                features = tfds.features.FeaturesDict({n: tfds.features.Text() for n in names})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(texts) for name, texts in splits}

            def _generate_examples(self, texts):
                for number, text in enumerate(texts):
                    rest = {"url": "u", "content-type": "t", "timestamp": "2019-04-25T12:57:54Z"}
                    yield number, {"text": text, "content-length": str(len(text)), **rest}

    form = {"file_format": "array_record", **options}
    C4(data_dir=folder, config="en", **form).download_and_prepare()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    write_c4(folder)
    return folder


def load(folder, path="tfds:c4/en", **options):
    options = {"tokenizer": "bytes", "cache_dir": str(folder.parent / "cache")} | options
    return corpus.load(DataConfig(path=path, tfds_dir=str(folder), **options))


def texts(source):
    return [record["text"].decode() for record in source]


def test_the_call_of_the_documentation_reads_the_fixture(prepared):
    import tensorflow_datasets.text  # noqa: F401  (registers c4)

    source = tfds.data_source("c4/en", split="train", data_dir=prepared, download=False)
    assert sorted(record["text"].decode() for record in source) == sorted(TRAIN)
    assert set(source[0]) == {"text", "url", "content-type", "content-length", "timestamp"}


@pytest.mark.parametrize("path", ["tfds:c4/en", "tfds:c4/en:3.1.0"])
def test_its_own_validation_split_is_held_out(prepared, path):
    data = load(prepared, path)
    assert sorted(texts(data.validation)) == HELD
    assert sorted(texts(data.train)) == sorted(t for t in TRAIN if t not in (" ", "held 2"))
    stream = batches.training(data, 4, 32, 0)
    rows = b"".join(bytes((next(stream).inputs % 256).astype("u1")) for _ in range(20))
    stream.close()
    assert b"\0document 3 of the web\0" in rows and b"held" not in rows
    assert data.key == load(prepared).key


def test_hashes_of_the_held_out_documents_are_kept(prepared, monkeypatch):
    load(prepared)
    (kept,) = (prepared.parent / "cache").glob("hashes-*/hashes.npy")
    written = kept.stat().st_mtime_ns
    load(prepared)
    assert kept.stat().st_mtime_ns == written


def test_held_out_documents_may_come_from_elsewhere(prepared, tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": TRAIN[3]}) + "\n")
    data = load(prepared, validation_path=str(tmp_path / "held.jsonl"))
    assert TRAIN[3] not in texts(data.train) and "held 2" in texts(data.train)
    assert texts(data.validation) == [TRAIN[3]]


def test_pieces_are_trained_on_documents_of_the_training_split(prepared):
    assert load(prepared, tokenizer=None, vocab_size=285).tokenizer.vocab_size == 285


def test_what_is_not_prepared_is_one_line(prepared, tmp_path):
    def refused(words, folder=prepared, **options):
        with pytest.raises(UsageError) as caught:
            load(folder, **options)
        message = str(caught.value)
        assert "\n" not in message and message.startswith("--data.path tfds:")
        assert words in message, message

    refused("there are c4/en/3.1.0", path="tfds:c4/de")
    refused("3.0.1/dataset_info.json is missing", path="tfds:c4/en:3.0.1")
    refused("there are none", folder=tmp_path)
    refused("there are none", folder=tmp_path / "absent")
    refused("dataset_info.json is missing", path="tfds:")
    write_c4(tmp_path / "alone", splits=(("train", TRAIN),))
    refused("has no split validation, but train", folder=tmp_path / "alone")
    info = tmp_path / "alone" / "c4" / "en" / "3.1.0" / "dataset_info.json"
    contents = json.loads(info.read_text())
    info.write_text(json.dumps({**contents, "fileFormat": "tfrecord"}))
    refused("is stored as tfrecord", folder=tmp_path / "alone")
    info.write_text("{")
    refused("can't be opened", folder=tmp_path / "alone")


def test_a_file_that_is_gone_is_named(tmp_path):
    write_c4(tmp_path / "tfds")
    (tmp_path / "tfds/c4/en/3.1.0/c4-train.array_record-00000-of-00001").unlink()
    with pytest.raises(UsageError, match="--data.path"):
        load(tmp_path / "tfds")


EVIL = "evilfeature.Url"


@pytest.mark.parametrize(
    "feature",
    [
        {"pythonClassName": EVIL, "text": {}},
        {"python_class_name": EVIL, "text": {}},
        {"type": EVIL, "content": {}},
        {
            "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
            "jsonFeature": {"json": json.dumps({"feature": {"type": EVIL, "content": "{}"}})},
        },
    ],
)
def test_no_code_of_a_data_set_is_run(tmp_path, monkeypatch, feature):
    write_c4(tmp_path / "tfds")
    (tmp_path / "evilfeature.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "tfds/c4/en/3.1.0/features.json"
    contents = json.loads(file.read_text())
    contents["featuresDict"]["features"]["url"] = feature
    file.write_text(json.dumps(contents))
    with pytest.raises(UsageError, match=r"features.json asks for the class evilfeature\.Url"):
        load(tmp_path / "tfds")
    assert "evilfeature" not in sys.modules


def test_a_data_set_of_other_contents_is_another_one(tmp_path):
    options = {"cache_dir": str(tmp_path / "cache")}
    train = [f"doc {n:02}" for n in range(20)]
    found = {}
    for name, first, held in (("a", 0, "12"), ("b", 0, "56"), ("c", 1, "56"), ("copy", 1, "56")):
        texts_of = (("train", train[first:]), ("validation", [f"doc 0{n}" for n in held]))
        write_c4(tmp_path / name, splits=texts_of)
        found[name] = load(tmp_path / name, **options)
        assert not set(texts(found[name].train)) & set(texts(found[name].validation))
    assert found["a"].key != found["b"].key != found["c"].key == found["copy"].key
    # The same number of documents, of the same lengths, in the same place.
    write_c4(
        tmp_path / "b2", splits=(("train", [*train[:-1], "doc 99"]), ("validation", train[5:7]))
    )
    for file in (tmp_path / "b2/c4/en/3.1.0").iterdir():
        os.replace(file, tmp_path / "b/c4/en/3.1.0" / file.name)
    assert load(tmp_path / "b", **options).key != found["b"].key
