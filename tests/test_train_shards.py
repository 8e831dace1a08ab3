"""Shards of JSON lines: their index, what breaks them, and the order in which they are read."""

import gzip
import json
import os

import fsspec
import numpy as np
import pytest

from train import batches, corpus, shards
from train.config import DataConfig
from train.errors import UsageError

TEXTS = [f"{n} {'ab' * (n % 37)}é" for n in range(700)]


def write(path, texts, level=6, **more):
    data = "".join(json.dumps({"text": text, **more}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data, level) if path.name.endswith(".gz") else data)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two shards, one of them compressed."""
    (tmp_path / "c4").mkdir()
    write(tmp_path / "c4" / "a.json.gz", TEXTS[:400], url="u")
    write(tmp_path / "c4" / "b.jsonl", TEXTS[400:])
    return tmp_path / "c4"


def load(path, cache="cache", say=None, **options):
    options = DataConfig(
        path=str(path), tokenizer="bytes", cache_dir=str(path.parent.parent / cache), **options
    )
    return corpus.load(options, say=say or (lambda line: pytest.fail(line)))


def read(folder, **options):
    spare = folder.parent / "spare"
    files = [(str(file), file) for file in sorted(folder.iterdir()) if ".index" not in file.name]
    return shards.load(files, spare, **{"refuse": True, "say": pytest.fail} | options)


def texts(source):
    return [record["text"].decode() for record in source]


def test_every_document_is_read_by_its_number(folder, monkeypatch):
    monkeypatch.setattr(shards, "_SPACING", 1 << 16)
    monkeypatch.setattr(shards, "BLOCK", 16)
    long = [text * 20 for text in TEXTS[:400]]
    write(folder / "a.json.gz", long, level=0)
    source = shards.Shards(read(folder))
    assert len(source) == 700 and texts(source) == long + TEXTS[400:]
    for number in (699, 0, 400, 399, 15, 16):
        assert source[number]["text"].decode() == (long + TEXTS[400:])[number]
    with np.load(folder / "a.json.gz.index.npz") as index:
        assert len(index["points"]) > 2 * 32768


def test_an_index_is_built_once_and_an_interrupted_one_goes_on(folder, monkeypatch):
    scanned = []
    scan = shards._scan
    monkeypatch.setattr(shards, "_scan", lambda name, path: scanned.append(path.name) or killed())

    def killed():
        if scanned[-1] == "b.jsonl":
            raise KeyboardInterrupt
        return scan("a.json.gz", folder / "a.json.gz")

    with pytest.raises(KeyboardInterrupt):
        read(folder)
    assert [file.name for file in folder.glob("*.npz")] == ["a.json.gz.index.npz"]
    monkeypatch.setattr(
        shards, "_scan", lambda name, path: scanned.append(path.name) or scan(name, path)
    )
    read(folder)
    read(folder)
    assert scanned == ["a.json.gz", "b.jsonl", "b.jsonl"]


def test_many_shards_are_indexed_by_several_processes(folder, monkeypatch):
    (folder / "c.jsonl").write_text("{")
    monkeypatch.setattr(shards, "_MANY_BYTES", 1)
    monkeypatch.setattr(shards, "_scan", lambda *_: pytest.fail("read in this process"))
    with pytest.raises(UsageError, match="c.jsonl: line 1 is not JSON"):
        read(folder)
    (folder / "c.jsonl").unlink()
    assert texts(shards.Shards(read(folder))) == TEXTS


def test_where_the_folder_cannot_be_written_the_index_is_in_the_cache(folder, monkeypatch):
    write_index = shards._write_index

    def refuse(place, *rest):
        if place.parent == folder:
            raise PermissionError(13, "no", str(place))
        write_index(place, *rest)

    monkeypatch.setattr(shards, "_write_index", refuse)
    source = shards.Shards(read(folder))
    assert texts(source) == TEXTS and not list(folder.glob("*.npz"))
    assert len(list((folder.parent / "spare").rglob("*.npz"))) == 2
    monkeypatch.setattr(shards, "_scan", lambda *_: pytest.fail("read again"))
    read(folder)


def test_an_index_that_broke_or_is_of_another_file_is_built_anew(folder):
    expected = read(folder)
    place = folder / "a.json.gz.index.npz"
    place.write_bytes(place.read_bytes()[:100])
    said = []
    assert [s.key for s in read(folder, say=said.append)] == [s.key for s in expected]
    assert "a.json.gz changed since it was indexed" in said.pop()
    write(folder / "a.json.gz", TEXTS[1:400])
    found = read(folder, say=said.append)
    assert found[0].documents == 399 and found[0].key != expected[0].key
    assert "a.json.gz changed since it was indexed" in said.pop()


def test_a_shard_that_changes_or_goes_while_it_is_read_is_named(folder):
    found = read(folder)
    write(folder / "a.json.gz", TEXTS[:399])
    with pytest.raises(UsageError, match=r"a.json.gz was changed or deleted .* --resume"):
        shards.Shards(found)[0]
    # Also where neither its size nor its time tells it.
    for line in (b'{"te', b'{"text": ""}'):
        source = shards.Shards(found)
        source._block = lambda *_, line=line: [line]
        with pytest.raises(UsageError, match=r"b.jsonl was changed or deleted"):
            source[500]
    (folder / "b.jsonl").unlink()
    with pytest.raises(UsageError, match=r"b.jsonl was changed or deleted"):
        shards.Shards(found)[500]


GOOD = b'{"text": "a"}\n{"text": "b"}\n'
BAD = {
    "cut.jsonl": (GOOD + b'{"text": "c', "line 3 is not JSON"),
    "utf.jsonl": (GOOD + b'{"text": "\xff"}\n', "line 3 is not UTF-8 (byte 10)"),
    "list.json": (b'[{"text": "a"}]\n', "line 1 is no JSON object"),
    "pretty.json": (b'{\n"text": "a"}\n', "line 1 is not JSON"),
    "none.jsonl": (GOOD + b'\n{"body": "c"}\n', "line 4 has neither text nor prompt"),
    "half.jsonl": (b'{"prompt": "c"}\n', "line 1 has neither text nor prompt"),
    "null.jsonl": (b'{"text": null}\n', "line 1 has a text that is no string"),
    "surrogate.jsonl": (rb'{"text": "\ud800"}', "line 1 has half of a surrogate pair"),
    "kinds.jsonl": (GOOD + b'{"prompt": "", "completion": "a"}', "line 3 has a text where others"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is not JSON"),
    "cut.json.gz": (
        gzip.compress(GOOD * 999)[:60],
        "after line 334 the compressed data are damaged",
    ),
    "trailer.json.gz": (gzip.compress(GOOD)[:-4], "after line 2 the compressed data are damaged"),
    "begun.json.gz": (gzip.compress(GOOD)[:5], "after line 0 the compressed data are damaged"),
    "flip.json.gz": (gzip.compress(GOOD)[:-8] + b"\0" * 8, "after line 2 the compressed data"),
    "plain.json.gz": (GOOD, "after line 0 the compressed data are damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_shard_is_named_and_refused_or_left_out(folder, name):
    contents, words = BAD[name]
    (folder / name).write_bytes(contents)
    for _ in range(2):  # read, and by its index
        with pytest.raises(UsageError) as caught:
            read(folder)
        message = str(caught.value)
        assert f"{name}: {words}" in message and "--data.bad_shards skip" in message
        assert "\n" not in message
    said = []
    found = read(folder, refuse=False, say=said.append)
    assert texts(shards.Shards(found)) == TEXTS
    assert len(said) == 1 and said[0].startswith("warning") and name in said[0]
    # A shard that was mended is taken.
    write(folder / name, ["mended"])
    assert sum(s.documents for s in read(folder, say=said.append)) == 701


def test_empty_shards_lines_and_texts_hold_no_document(folder):
    (folder / "c.jsonl").write_bytes(b"")
    (folder / "d.jsonl").write_bytes(b'\n{"text": " "}\n{"text": "d"}\r\n\n{"text": "e"}')
    (folder / "e.json.gz").write_bytes(gzip.compress(b'{"text": "f"}\n') + gzip.compress(b""))
    said = []
    found = read(folder, say=said.append)
    assert texts(shards.Shards(found)) == [*TEXTS, "d", "e", "f"]
    assert said == [
        "1 lines without a text or a completion to learn are left out",
        f"no documents in {folder / 'c.jsonl'}",
    ]


def test_a_shard_that_is_gone_is_named(folder):
    load(folder)
    (folder / "b.jsonl").rename(folder / "b")
    with pytest.raises(UsageError, match=r"b.jsonl is gone, and its index is still there"):
        load(folder)
    said = []
    data = load(folder, bad_shards="skip", say=said.append)
    assert len(data.train) == 400 and "b.jsonl is gone" in said[0]
    # Another glob doesn't ask for it.
    assert len(load(folder / "a*.json.gz", cache="../cache").train) == 400
    (folder / "b").rename(folder / "b.jsonl")
    assert len(load(folder).train) == 700


@pytest.mark.parametrize("beside", [True, False])
def test_the_last_shard_of_a_folder_is_missed_too(folder, beside, monkeypatch):
    (folder / "x" / "y").mkdir(parents=True)
    only = write(folder / "x" / "y" / "c.jsonl", ["c"])
    if not beside:
        place = shards.index_places
        monkeypatch.setattr(shards, "index_places", lambda *given: place(*given)[1:])
    paths = (folder, folder / "**" / "*.jsonl", folder / "x*" / "*" / "*.jsonl", folder / "**")
    for path in paths:
        load(path, str(folder.parent / "cache"), validation_path=str(folder / "a.json.gz"))
    only.unlink()
    for path in paths:
        with pytest.raises(UsageError, match=r"x/y/c.jsonl is gone"):
            load(path, str(folder.parent / "cache"))
    assert len(load(folder / "*.jsonl", str(folder.parent / "cache")).train) == 300


def test_the_names_of_shards(folder):
    (folder / "b.jsonl").rename(folder / "b.NDJSON")
    (folder / "a.json.gz").rename(folder / "A.JSONL.GZ")
    data = load(folder)
    assert sorted(texts(data.train) + texts(data.validation)) == sorted(TEXTS)
    assert load(folder / "b.NDJSON").validation[0]["text"].decode() in TEXTS
    (folder / "A.JSONL.GZ").rename(folder / "a.00000.gz")
    with pytest.raises(UsageError, match=r"a.00000.gz can't be told .* end in .jsonl.gz"):
        load(folder / "a.00000.gz")


def test_the_split_is_by_hash_and_copies_stay_together(folder):
    write(folder / "b.jsonl", [*TEXTS[400:], *TEXTS[:50]])
    data = load(folder, validation_fraction=0.3)
    train, held = texts(data.train), texts(data.validation)
    assert not set(train) & set(held) and sorted(train + held) == sorted(TEXTS + TEXTS[:50])
    assert len(set(held)) == 210
    other = load(folder, validation_fraction=0.3, split_seed=1)
    assert set(texts(other.validation)) != set(held) and other.key != data.key


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_training_never_sees_a_held_out_document(folder, kind):
    held = folder.parent / f"held.{kind}"
    if kind == "txt":
        held.write_text("new\n\n" + TEXTS[5])
    else:
        write(held, [TEXTS[5], "new"])
    data = load(folder, validation_path=str(held))
    assert texts(data.train) == TEXTS[:5] + TEXTS[6:]
    assert sorted(texts(data.validation)) == sorted([TEXTS[5], "new"])
    stream = batches.training(data, 8, 64, 0)
    rows = [next(stream).inputs for _ in range(120)]  # all documents, some of them twice
    stream.close()
    seen = " ".join(bytes((x % 256).astype(np.uint8)).decode(errors="ignore") for x in rows)
    assert f"\0{TEXTS[6]}\0" in seen and f"\0{TEXTS[5]}\0" not in seen


def test_text_files_take_held_out_documents_too(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "train.txt").write_text("one\n\ntwo\n\nthree")
    (tmp_path / "held.txt").write_text("two")
    data = load(tmp_path / "t" / "train.txt", validation_path=str(tmp_path / "held.txt"))
    assert texts(data.train) == ["one", "three"] and texts(data.validation) == ["two"]
    (tmp_path / "held.txt").write_text("one\n\ntwo\n\nthree")
    with pytest.raises(UsageError, match="all of its documents are held out too"):
        load(tmp_path / "t" / "train.txt", validation_path=str(tmp_path / "held.txt"))


def test_neighbours_are_read_together_and_all_are_read_once(folder, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 16)
    monkeypatch.setattr(shards, "_BLOCKS", 4)
    write(folder / "b.json.gz", TEXTS[400:])
    (folder / "b.jsonl").unlink()
    data = load(folder, validation_fraction=0.01)
    assert data.train.block == 16 and load(folder.parent / "c4" / "a.json.gz").train.block == 16
    order = []
    monkeypatch.setattr(
        batches.rows, "encode", lambda r, *_: order.append(r["text"].decode()) or rows_of(r)
    )
    rows_of = lambda r: batches.rows.Row(np.zeros(2, np.int32), 1)
    data = data._replace(options=DataConfig(layout="documents"))
    stream = batches.training(data, 8, 4, 0)
    count = len(texts(data.train))
    for _ in range(count // 8 + 4):
        next(stream)
    stream.close()
    lane = [TEXTS.index(text) for text in order[:: batches.LANES]]
    assert np.mean(np.diff(lane[:60]) == 1) > 0.8  # a lane goes from neighbour to neighbour
    # Lanes are not equally long, so that some begin their next round before others end the first.
    assert len(set(order[: count // 2])) == count // 2


def test_small_and_plain_shards_are_shuffled_document_by_document(folder):
    assert load(folder).train.block == 1
    # Beyond what is remembered of compressed ones too.
    lines = "".join(f'{{"text": "{n}"}}\n' for n in range(9000)).encode()
    (folder / "many.json").write_bytes(lines)
    (folder / "many.json.gz").write_bytes(gzip.compress(lines))
    plain, compressed = load(folder / "many.json"), load(folder / "many.json.gz")
    assert (plain.train.block, compressed.train.block) == (1, shards.BLOCK)
    # Their orders differ, and so a position in one is none in the other.
    assert plain.key != compressed.key and len(plain.train) == len(compressed.train)


def test_a_position_in_blocks_is_restored(folder, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 16)
    monkeypatch.setattr(shards, "_BLOCKS", 4)
    data = load(folder, validation_fraction=0.1)
    stream = batches.training(data, 4, 128, 0)
    positions, found = [], []
    for _ in range(60):
        positions.append(json.dumps(stream.get_state()))
        found.append(next(stream))
    stream.close()
    for index in (0, 1, 7, 33, 55):
        again = batches.training(data, 4, 128, 0)
        again.set_state(json.loads(positions[index]))
        for batch in found[index : index + 4]:
            np.testing.assert_array_equal(next(again).targets, batch.targets)
        again.close()


def test_remote_shards_are_fetched_once(folder, tmp_path):
    remote = fsspec.filesystem("memory")
    for file in sorted(folder.iterdir()):
        remote.pipe(f"/bucket/{file.name}", file.read_bytes())
    try:
        options = DataConfig(
            path="memory://bucket/*.json*", tokenizer="bytes", cache_dir=str(tmp_path / "cache")
        )
        data = corpus.load(options, say=pytest.fail)
        assert sorted(texts(data.train) + texts(data.validation)) == sorted(TEXTS)
        assert data.key == load(folder).key
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}
        assert corpus.load(options, say=pytest.fail).key == data.key
        after = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}
        assert before.keys() == after.keys()
        assert all(after[p] == t for p, t in before.items() if p.name != "cache")
        # One that was mended is fetched again.
        write(folder / "b.jsonl", TEXTS[400:699])
        remote.pipe("/bucket/b.jsonl", (folder / "b.jsonl").read_bytes())
        said = []
        assert corpus.load(options, say=said.append).key == load(folder, say=said.append).key
        assert all("b.jsonl changed since it was indexed" in line for line in said)
        with pytest.raises(UsageError, match=r"memory://bucket/x\*.jsonl: no such file"):
            corpus.load(DataConfig(path="memory://bucket/x*.jsonl", cache_dir=str(tmp_path)))
        with pytest.raises(UsageError, match="can't be fetched"):
            corpus.load(DataConfig(path="memory://bucket/x.jsonl", cache_dir=str(tmp_path)))
        with pytest.raises(UsageError, match="can't be fetched"):
            corpus.load(DataConfig(path="nothing://bucket/x.jsonl", cache_dir=str(tmp_path)))
    finally:
        remote.rm("/bucket", recursive=True)


def test_unusable_shards_are_one_line(folder, tmp_path):
    def refused(path, words, **options):
        with pytest.raises(UsageError) as caught:
            load(path, **options)
        assert "\n" not in str(caught.value) and words in str(caught.value)

    refused(folder / "x.jsonl", "no such file")
    refused(folder / "*.json", "no such file")
    write(tmp_path / "same.jsonl", ["a"] * 5)
    refused(tmp_path / "same.jsonl", "are all the same")
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    refused(tmp_path / "empty.jsonl", "no documents are left")
    (folder / "read.txt").write_text("words")
    refused(folder, "both .txt files and JSON lines")
    (folder / "read.txt").unlink()
    (folder / "p.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n')
    refused(folder, "give files of one kind")
    refused(folder / "p.jsonl", "--data.path", validation_path=str(folder / "b.jsonl"))
    if os.geteuid():
        (folder / "b.jsonl").chmod(0)
        refused(folder / "b.jsonl", "can't be read")
