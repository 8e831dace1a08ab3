"""Text, split, tokenizer, batches and the measures of text."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train_helpers import write_text
from train import batches, cache, corpus, tokenizer
from train.config import DataConfig
from train.errors import UsageError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return DataConfig(
        path=str(write_text(folder / "text")), vocab_size=320, cache_dir=str(folder / "cache")
    )


@pytest.fixture(scope="module")
def data(config):
    return corpus.load(config)


def texts(source):
    return [record["text"].decode() for record in source]


def test_the_split_is_by_document_and_nothing_is_lost(config, data):
    train, held_out = texts(data.train), texts(data.validation)
    assert len(held_out) == 1 and len(train) == 11
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(corpus.documents(config.path))


def test_the_embedded_corpus_is_split_ninety_to_ten():
    documents = corpus.documents(None)
    train, held_out = corpus.split(documents, 0.1, 0)
    assert (len(train), len(held_out)) == (224, 25)
    assert not set(train) & set(held_out)
    assert corpus.split(documents, 0.1, 1)[1] != held_out


@given(st.lists(st.text(max_size=3), min_size=2), st.floats(0.01, 0.99), st.integers(0, 9))
def test_split_keeps_copies_together(documents, fraction, seed):
    train, held_out = corpus.split(documents, fraction, seed)
    assert sorted(train + held_out) == sorted(documents)
    assert not set(train) & set(held_out)
    backwards = corpus.split(documents[::-1], fraction, seed)
    assert set(backwards[1]) == set(held_out)
    if len(set(documents)) > 1:
        assert train and held_out


def test_documents_of_a_file_are_its_paragraphs(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("one\nstill one\n\ntwo\n   \n\n\nthree\n")
    assert corpus.documents(str(file)) == ["one\nstill one", "two", "three"]
    for contents in ("A\n\nB", "\nA\n\nB\n", " \n\nA\n\nB\n \n", "\ufeffA\r\n\r\nB\r\n"):
        file.write_bytes(contents.encode())
        assert corpus.documents(str(file)) == ["A", "B"]
    file.write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "two.txt").write_bytes(b"two\nof it\n")
    (tmp_path / "windows.txt").write_bytes(b"two\r\nof it")
    assert corpus.documents(str(tmp_path)) == ["one", "two\nof it", "two\nof it"]


def test_unusable_text_is_one_line(tmp_path):
    def load(path):
        options = dataclasses.replace(DataConfig(), path=str(path), cache_dir=str(tmp_path / "c"))
        with pytest.raises(UsageError) as caught:
            corpus.load(options)
        message = str(caught.value)
        assert "\n" not in message and "--data" in message
        return message

    assert "no such file or folder" in load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds no text" in load(tmp_path / "empty")
    (tmp_path / "one.txt").write_text("a single paragraph")
    assert "holds 1 document" in load(tmp_path / "one.txt")
    (tmp_path / "latin.txt").write_bytes("première\n\nseconde".encode("latin-1"))
    assert "is not UTF-8 (byte 5)" in load(tmp_path / "latin.txt")
    (tmp_path / "small.txt").write_text("to be or not\n\nto be that is")
    assert "give at most 2" in load(tmp_path / "small.txt")
    (tmp_path / "tiny.txt").write_text("a\n\nb")
    assert load(tmp_path / "tiny.txt").endswith("the text gives fewer; give more text")
    (tmp_path / "same.txt").write_text("\n\n".join(["to be or not to be"] * 20))
    assert "are all the same" in load(tmp_path / "same.txt")


@settings(max_examples=200, deadline=None)
@given(st.text().filter(lambda text: "\u2581" not in text))
def test_any_text_comes_back(data, text):
    ids = data.tokenizer.encode(text)
    assert ids[-1] == tokenizer.END and ids.max() < 320
    assert data.tokenizer.decode(ids) == text


def test_the_tokenizer_sees_the_training_split_alone(config, data):
    again = tokenizer.fit(texts(data.train), 320)
    assert tokenizer.fit(texts(data.train), 320) == again
    everything = tokenizer.fit(corpus.documents(config.path), 320)
    assert everything != again


def test_the_cache_is_used_again_and_repaired(tmp_path, config):
    config = dataclasses.replace(config, cache_dir=str(tmp_path))
    first = corpus.load(config)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert [name.split("-")[0] for name in folders] == ["records", "tokenizer"]
    model = next(tmp_path.glob("tokenizer-*/tokenizer.model"))
    written = model.stat().st_mtime_ns
    assert corpus.load(config).key == first.key
    assert model.stat().st_mtime_ns == written
    # A file that broke is found by its checksum, and the folder is built anew.
    model.write_bytes(model.read_bytes()[:-7])
    record = next(tmp_path.glob("records-*/text/*/*train*"))
    record.write_bytes(b"x" + record.read_bytes()[1:])
    again = corpus.load(config)
    assert again.key == first.key
    assert texts(again.train) == texts(first.train)
    # Other settings or another text have folders of their own.
    other = corpus.load(dataclasses.replace(config, vocab_size=310))
    assert other.key != first.key and other.tokenizer.vocab_size == 310


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "part").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        cache.built(tmp_path / "thing", fail)
    assert not list(tmp_path.iterdir())


def test_batches_are_a_function_of_seed_and_position(data):
    first = batches.training(data, 3, 16, seed=0)
    same = batches.training(data, 3, 16, seed=0)
    other = batches.training(data, 3, 16, seed=1)
    rows = [next(first) for _ in range(30)]
    assert rows[0].inputs.shape == (3, 16) and rows[0].inputs.dtype == np.int32
    np.testing.assert_array_equal(rows[0].inputs[:, 1:], rows[0].targets[:, :-1])
    assert all(np.array_equal(row.inputs, next(same).inputs) for row in rows)
    assert not all(np.array_equal(row.inputs, next(other).inputs) for row in rows)


@pytest.mark.parametrize(("batch_size", "length"), [(3, 16), (2, 700), (8, 64)])
def test_every_position_is_restored(data, batch_size, length):
    """Also where a lane has not begun, and after the documents came round again."""
    reference = batches.training(data, batch_size, length, 0)
    positions, rows = [], []
    for _ in range(40):
        positions.append(json.dumps(reference.get_state()))
        rows.append(next(reference))
    for index in [*range(8), 13, 25, 36]:
        restored = batches.training(data, batch_size, length, 0)
        restored.set_state(json.loads(positions[index]))
        for row in rows[index : index + 4]:
            np.testing.assert_array_equal(next(restored).targets, row.targets)


def test_lanes_join_whole_documents(data):
    """Rows of one lane, joined, are documents with END after each."""
    rows = batches.training(data, batches.LANES, 64, 0)
    found = [next(rows) for _ in range(60)]
    lane = np.concatenate([np.append(batch.inputs[3], batch.targets[3, -1]) for batch in found])
    pieces = np.split(lane, np.flatnonzero(lane == tokenizer.END) + 1)
    decoded = [data.tokenizer.decode(piece) for piece in pieces[:-1]]
    assert decoded and all(text in texts(data.train) for text in decoded)


def test_the_held_out_stream_scores_every_token_once(data):
    stream = batches.held_out(data, 16)
    text = texts(data.validation)
    assert stream.text_bytes == sum(len(part.encode()) for part in text)
    scored, contexts = [], []
    for batch in stream.batches(3, 16):
        assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (3, 16)
        scored.append(batch.targets[batch.mask == 1])
        contexts.append(batch.inputs[batch.mask == 1])
    scored, contexts = np.concatenate(scored), np.concatenate(contexts)
    np.testing.assert_array_equal(scored, stream.targets)
    np.testing.assert_array_equal(contexts, stream.tokens[:-1])
    assert stream.tokens[0] == tokenizer.END
    assert data.tokenizer.decode(scored) == "".join(text)
    every = list(stream.batches(3, 16))
    part = list(stream.batches(3, 16, 4))
    assert len(part) == 4 and len(list(stream.batches(3, 16, 10**6))) == len(every)
    chosen = [i for i, b in enumerate(every) for p in part if np.array_equal(b.inputs, p.inputs)]
    assert chosen[0] == 0 and chosen[-1] >= 3 * len(every) // 4


def test_unigram_entropy_and_bits_per_byte_by_hand():
    tokens = np.array([7, 7, 7, 2])
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert batches.unigram_entropy(tokens) == pytest.approx(expected)
    assert batches.unigram_entropy(np.array([3, 3])) == 0.0
    # Uniform guessing among 256 values, one token a byte, is 8 bits per byte.
    assert batches.bits_per_byte(10 * math.log(256), 10) == pytest.approx(8.0)
