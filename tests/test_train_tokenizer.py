"""SentencePiece models, tokenizer.json files and bytes as tokenizers."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train_helpers import write_text
from train import corpus, rows
from train.config import DataConfig
from train.errors import UsageError
from train.tokenizer import (
    Bytes,
    HuggingFace,
    check_vocabulary,
    encode_prompt,
    identity,
    open_tokenizer,
)

WORDS = ["the nation and its people", "peace trade and war", "hold that law", "work of land"] * 20


def sentencepiece_model(**options):
    """A model with T5's special pieces: pad 0, eos 1, unk 2."""
    out = io.BytesIO()
    settings = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, vocab_size=24, minloglevel=4)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS), model_writer=out, **(settings | options)
    )
    return out.getvalue()


def tokenizer_json(special=("<pad>", "<|endoftext|>"), post=True):
    """A byte-level BPE whose template puts a token in front, as LLaMA's does."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet
    )
    made.train_from_iterator(WORDS, trainer)
    if post:
        number = made.token_to_id(special[0])
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], number)]
        )
    made.enable_truncation(3)
    return made.to_str()


def test_a_sentencepiece_model_ends_with_its_own_eos(tmp_path):
    file = tmp_path / "spiece.model"
    file.write_bytes(sentencepiece_model())
    tokenizer = open_tokenizer(str(file))
    assert (tokenizer.vocab_size, tokenizer.end) == (24, 1)
    ids = tokenizer.encode("the people")
    assert ids.dtype == np.int32 and ids[-1] == 1 and np.all(ids[:-1] > 1)
    assert tokenizer.decode(ids) == "the people"
    assert open_tokenizer(str(tmp_path)).encode("the people").tolist() == ids.tolist()


def test_a_tokenizer_json_is_whole_and_without_its_template(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer_json())
    tokenizer = open_tokenizer(str(file))
    plain = tokenizers.Tokenizer.from_file(str(file))
    assert tokenizer.end == plain.token_to_id("<|endoftext|>")
    text = "the nation and its people hold that law"
    ids = tokenizer.encode(text)
    assert len(ids) > 4 and ids[-1] == tokenizer.end and tokenizer.decode(ids) == text
    assert ids[0] != plain.token_to_id("<pad>")
    assert tokenizer.vocab_size == 300 > ids.max()


def test_special_tokens_are_text_in_documents_and_tokens_in_prompts():
    tokenizer = HuggingFace(tokenizer_json(special=("<|user|>", "</s>"), post=False))
    text = "the <|user|></s>law"
    ids = tokenizer.encode(text)
    assert ids.tolist().count(tokenizer.end) == 1 and tokenizer.decode(ids) == text
    prompt = encode_prompt(tokenizer, text)
    assert len(prompt) < len(ids) and prompt.tolist().count(tokenizer.end) == 2
    record = {"prompt": text.encode(), "completion": b" and"}
    assert rows.encode({"text": text.encode()}, tokenizer, 99).tokens.tolist() == ids.tolist()
    assert (
        rows.encode(record, tokenizer, 99).tokens[: len(prompt) - 1].tolist()
        == prompt[:-1].tolist()
    )


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("tokenizer_config.json", {"eos_token": "<pad>"}),
        ("special_tokens_map.json", {"eos_token": {"content": "<pad>"}}),
        ("config.json", {"eos_token_id": 0}),
        ("generation_config.json", {"eos_token_id": [0, 1]}),
    ],
)
def test_the_end_stands_in_the_files_beside_a_tokenizer_json(tmp_path, name, contents):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / name).write_text(json.dumps(contents))
    assert open_tokenizer(str(tmp_path)).end == 0


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_bytes_come_back(text):
    ids = Bytes().encode(text)
    assert ids[-1] == 256 and np.all(ids[:-1] < 256) and len(ids) == len(text.encode()) + 1
    assert Bytes().decode(ids) == text


def test_ids_may_have_gaps():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 7}, unk_token="a"))
    assert HuggingFace(made.to_str()).vocab_size == 8


def test_text_that_a_tokenizer_json_has_no_token_for_is_one_line():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}))
    with pytest.raises(UsageError, match=r"--data.tokenizer: .* can't encode 'b' .*UNK"):
        HuggingFace(made.to_str()).encode("b")


def test_what_is_no_tokenizer_is_one_line(tmp_path):
    def refused(path, *words):
        with pytest.raises(UsageError) as caught:
            open_tokenizer(str(path))
        message = str(caught.value)
        assert "\n" not in message and message.startswith("--data.tokenizer")
        assert all(word in message for word in words), message

    refused(tmp_path / "absent.model", "no such file", "bytes")
    refused("", "no such file")
    refused(tmp_path, "holds none of tokenizer.json")
    (tmp_path / "bad.model").write_bytes(b"no model")
    refused(tmp_path / "bad.model", "is no SentencePiece model")
    (tmp_path / "noend.model").write_bytes(sentencepiece_model(pad_id=-1, eos_id=-1, unk_id=0))
    refused(tmp_path / "noend.model", "no piece that ends a text")
    (tmp_path / "bad.json").write_text("{}")
    refused(tmp_path / "bad.json", "is no tokenizer.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    refused(tmp_path / "binary.json", "utf-8")
    (tmp_path / "noend.json").write_text(tokenizer_json(special=("<pad>",)))
    refused(tmp_path / "noend.json", "no token that ends a text", "</s>")
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    refused(tmp_path / "tokenizer.json", "<stop>")


def test_the_vocabulary_must_fit_the_model():
    check_vocabulary(Bytes(), 257, "bytes")
    with pytest.raises(UsageError, match="has 257 ids, more than the 256 embeddings"):
        check_vocabulary(Bytes(), 256, "bytes")


class Foreign:
    """A tokenizer of another module, which tells no key."""

    vocab_size, end = 3, 2

    def __init__(self, odd):
        self.odd = odd

    def encode(self, text):
        return np.array([*(self.odd and ord(c) % 2 for c in text), 2], np.int32)

    def decode(self, ids):
        return "".join("ab"[i] for i in ids if i != 2)


def test_a_corpus_takes_a_tokenizer_and_its_key_changes_with_it(tmp_path):
    options = DataConfig(path=str(write_text(tmp_path / "text")), cache_dir=str(tmp_path / "cache"))
    found = [corpus.load(options, Foreign(odd)) for odd in (1, 0, 1)]
    assert isinstance(found[0].tokenizer, Foreign)
    assert found[0].key == found[2].key != found[1].key
    assert not list((tmp_path / "cache").glob("tokenizer-*"))
    # What is given on the command line comes first.
    given = DataConfig(path=options.path, cache_dir=options.cache_dir, tokenizer="bytes")
    assert isinstance(corpus.load(given, Foreign(1)).tokenizer, Bytes)
    assert identity(Foreign(1), "ab") != identity(Foreign(0), "ab")
