"""Runs on pretrained weights: begin, resume, export, sample."""

import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers
from safetensors import SafetensorError

from models import huggingface, pretrained
from models.config import LlamaConfig
from tests.test_pretrained import assert_same, weights
from tests.train_helpers import write_text
from train import cache, rows, runs
from train.cli import main, parse
from train.config import SUBSPACE
from train.errors import UsageError
from train.export import Arguments as ExportArguments
from train.export import export
from train.sample import Arguments as SampleArguments
from train.sample import sample
from train.tokenizer import Bytes, Pieces, fit
from train.weights import keep_tokenizer, key, tokenizer

MODEL = LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, num_layers=1
)
SHORT = [
    *["--train.batch_size", "2", "--train.sequence_length", "16", "--train.eval_batches", "2"],
    *["--checkpoint.every", "2"],
]


def write_model(folder):
    """A Hugging Face folder with small weights and a byte-level tokenizer."""
    params = jax.tree.map(lambda x: 0.1 * x, weights(MODEL))
    huggingface.write(folder, MODEL, params, context=64, end=0)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hub") / "small")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    text = write_text(folder / "text", 6)
    return [*SHORT, "--data.path", str(text), "--data.cache_dir", str(folder / "cache")]


def fail(capsys, arguments) -> str:
    """The one line with which a command ends."""
    assert main([str(word) for word in arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert "\n" not in err
    return err


def test_a_path_gives_configuration_and_weights(model):
    command = parse(["--model", str(model), "--model.remat", "--train.steps", "5"])
    assert command.model == "small" and command.config.weights == str(model)
    assert command.config.model.remat and command.config.model.kv_heads == 2
    again = parse(["--weights", str(model), "--model", "tiny", *shape_keys()])
    assert again.config.model.hidden_size == MODEL.hidden_size


def shape_keys():
    fields = ["vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads"]
    fields.append("num_layers")
    return [
        *(word for f in fields for word in (f"--model.{f}", str(getattr(MODEL, f)))),
        *("--data.vocab_size", "300"),
    ]


@pytest.mark.parametrize(
    "extra, line",
    [
        ([], None),
        (["--model.num_layers", "3"], "--model.num_layers 3: the weights in "),
        (["--model.num_kv_heads", "None"], "--model.num_kv_heads 4: the weights in "),
        (["--model.tie_embeddings"], "--model.tie_embeddings True: the weights in "),
    ],
)
def test_shapes_are_those_of_the_weights(model, extra, line):
    arguments = ["--model", str(model), *extra]
    if line is None:
        parse(arguments)
        return
    with pytest.raises(UsageError, match=line):
        parse(arguments)


def test_paths_that_are_no_model(tmp_path, capsys):
    assert "nowhere: no such folder or file" in fail(capsys, ["--model", tmp_path / "nowhere"])
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert 'model_type is "bert"' in fail(capsys, ["--model", tmp_path])
    assert "choose one of tiny" in fail(capsys, ["--model", "60x"])
    assert "choose one of tiny" in fail(capsys, ["--model", ""])


def test_a_folder_without_a_tokenizer_takes_one_that_is_given(model, words, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "alone")
    (tmp_path / "alone" / "tokenizer.json").unlink()
    run = ["--model", str(tmp_path / "alone"), *words, "--run_dir", str(tmp_path / "run")]
    assert "has no tokenizer.json or tokenizer.model; put" in fail(capsys, run)
    run += ["--data.tokenizer", str(model), "--train.steps", "1"]
    assert main(run) == 0


def test_a_run_whose_weights_are_damaged_leaves_its_folder_free(model, words, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    run = ["--model", str(tmp_path / "cut"), *words, "--run_dir", str(tmp_path / "run")]
    run += ["--train.steps", "1"]
    assert "is damaged" in fail(capsys, run)
    file.write_bytes(whole)
    assert main(run) == 0


def with_a_beginning(model, folder):
    """A copy of a model whose tokenizer sets the token of number 0 before each text."""
    shutil.copytree(model, folder)
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<end> $A <end>", special_tokens=[("<end>", 0)]
    )
    raw.save(str(folder / "tokenizer.json"))
    return folder


def test_what_stands_before_a_text(model, tmp_path):
    assert tokenizer(str(model)).start == ()
    copy = with_a_beginning(model, tmp_path / "copy")
    assert tokenizer(str(copy)).start == (0,)
    raw = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 0)]
    )
    raw.save(str(copy / "tokenizer.json"))
    assert tokenizer(str(copy)).start == (), "what comes after a text is not before it"
    # SentencePiece: the pieces that are trained here have no sign of a beginning.
    pieces = Pieces(fit(["law and work and war and law"] * 9, 270))
    assert pieces.start == ()
    keep_tokenizer(pieces, copy, 64)
    found = tokenizer(str(copy))
    assert found.start == () and found.vocab_size == 270
    keep_tokenizer(Bytes(), copy, 64)  # which have no file
    assert isinstance(tokenizer(str(copy)), Bytes)
    (copy / "tokenizer_config.json").write_text("{")
    assert tokenizer(str(copy)) is None


def test_a_sentencepiece_model_begins_texts_unless_it_is_told_not_to(tmp_path):
    model, settings = io.BytesIO(), dict(vocab_size=14, minloglevel=4, bos_id=1, eos_id=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["law and work and war and law"] * 9), model_writer=model, **settings
    )
    for told, start in ((None, (1,)), (False, ()), (True, (1,))):
        (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
        if told is not None:
            keep_tokenizer(Pieces(model.getvalue(), told), tmp_path, 64)
        assert tokenizer(str(tmp_path)).start == start


def test_examples_are_learned_as_they_will_be_read(model, words, tmp_path):
    """With what a tokenizer sets before a text, in training, of the run and of its export."""
    base, run, out = (tmp_path / name for name in ("base", "run", "out"))
    with_a_beginning(model, base)
    documents = ["--data.layout", "documents", "--train.steps", "2", *ADAPTERS[:4]]
    assert main([*words, *documents, "--model", str(base), "--run_dir", str(run)]) == 0
    export(ExportArguments(str(run), str(out)))
    assert [runs.load(str(path)).start for path in (base, run, out)] == [(0,)] * 3
    row = rows.encode({"text": b"law"}, runs.load(str(run)).tokenizer, 16)
    assert row.tokens[0] == 0 and row.first == 1


def test_the_key_changes_with_the_contents(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    assert key(str(copy)) == key(str(model)) and key(None) is None
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert key(str(copy)) != key(str(model))


ADAPTERS = ["--lora.rank", "2", "--lora.freeze", "all", "--train.steps", "4"]


@pytest.fixture(scope="module")
def run(model, words, tmp_path_factory):
    """Four steps of adapters on the weights, which stay as they are."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main([*words, *ADAPTERS, "--model", str(model), "--run_dir", str(folder)]) == 0
    return folder


def test_training_begins_from_the_weights(run, model):
    _, _, params = runs.read_checkpoint(run, None)
    is_kernel = lambda x: hasattr(x, "base")
    base = jax.tree.map(lambda x: x.base if is_kernel(x) else x, params, is_leaf=is_kernel)
    assert_same(base, pretrained.read_params(model, MODEL))
    assert float(np.abs(params["layers"]["q"]["kernel"].lora_b).max()) > 0
    found = runs.load(str(run))
    assert (found.context, found.tokenizer.end, found.tokenizer.vocab_size) == (64, 0, 257)


def test_a_resumed_run_must_have_the_same_first_weights(run, model, words, tmp_path, capsys):
    other = shutil.copytree(model, tmp_path / "small")
    huggingface.write(other, MODEL, weights(MODEL), context=64, end=0)
    copy = shutil.copytree(run, tmp_path / "run")
    arguments = [*words, *ADAPTERS, "--resume", "--model", other, "--run_dir", copy]
    assert "began from other weights than --weights gives now" in fail(capsys, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["galore", "online_subspace_descent", "lomo", "adamw"])
def test_every_parameter_is_trained_by_any_optimizer(name, model, words, tmp_path):
    folder = tmp_path / "run"
    more = ["--optimizer.rank", "4"] if name in SUBSPACE else []
    fused = ["--train.fused_backward", "--train.int8_weights"] if name == "lomo" else []
    arguments = [*words, *more, *fused, "--optimizer.name", name, "--train.steps", "4"]
    assert main([*arguments, "--model", str(model), "--run_dir", str(folder)]) == 0
    out = export(ExportArguments(str(folder), str(tmp_path / "hf")))
    found = pretrained.read_params(out, MODEL)
    assert_same(found, runs.load(str(folder)).params)
    before = pretrained.read_params(model, MODEL)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(before), strict=True):
        # Tokens that the text lacks have no gradient.
        assert np.abs(a - b).max() > 0, path


def test_export_merges_and_comes_back_to_the_bit(run, tmp_path):
    out = export(ExportArguments(str(run), str(tmp_path / "hf")))
    found = runs.load(str(run))
    header = pretrained.read_header(out)
    assert header.config == MODEL and header.end == 0
    assert_same(pretrained.read_params(out, header.config), found.params)
    again = runs.load(str(out))
    text = "law, that Über 東京"
    assert again.tokenizer.encode(text).tolist() == found.tokenizer.encode(text).tolist()
    assert again.tokenizer.decode(again.tokenizer.encode(text)) == text
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 64


def test_a_step_in_shards(run, tmp_path):
    out = export(ExportArguments(str(run), str(tmp_path / "hf"), step=2, max_shard_gb=2e-5))
    assert len(list(out.glob("model-0*.safetensors"))) > 2
    params = pretrained.read_params(out, MODEL)
    assert_same(params, runs.load(str(run), 2).params)
    last = runs.load(str(run)).params["layers"]["q"]["kernel"]
    assert not np.array_equal(params["layers"]["q"]["kernel"], last)


def test_export_refuses_by_name(run, model, tmp_path):
    for arguments, words in (
        ((str(tmp_path / "no"), "x"), "no such folder"),
        ((str(model), "x"), "is no run"),
        ((str(run), str(model)), "is there already"),
        ((str(run), str(tmp_path / "x"), 3), "no checkpoint of that step; it has 2, 4"),
        ((str(run), str(tmp_path / "x"), None, 0.0), "--max_shard_gb 0.0"),
    ):
        with pytest.raises(UsageError, match=words):
            export(ExportArguments(*arguments))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def full(*args, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(huggingface, "save_file", full)
    with pytest.raises(UsageError, match="hf: no space left on the device"):
        export(ExportArguments(str(run), str(tmp_path / "hf")))
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_passed_over_or_named(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    victim = next(p for p in (copy / "checkpoints" / "4" / "state").rglob("*") if p.is_file())
    victim.write_bytes(b"")
    capsys.readouterr()
    assert runs.load(str(copy)).name == "run, step 2"
    assert re.search("step 4 can't be used: .*; taking step 2", capsys.readouterr().err)
    with pytest.raises(UsageError, match="checkpoint of step 4 can't be used"):
        runs.load(str(copy), 4)
    older = copy / "checkpoints" / "2"
    for file in older.glob("meta/*"):
        text = file.read_text()
        file.write_text(
            text.replace('"model.param_dtype": "float32"', '"model.param_dtype": "bfloat16"')
        )
    cache.write_checksums(older, older / cache.MANIFEST)
    with pytest.raises(UsageError, match="holds params/.* as .*float32.* where this program has"):
        runs.load(str(copy), 2)
    shutil.rmtree(copy / "checkpoints" / "2")
    shutil.rmtree(copy / "checkpoints" / "4")
    with pytest.raises(UsageError, match="it has no checkpoint"):
        runs.load(str(copy))
    (tmp_path / "run" / "tokenizer.json").unlink()
    shutil.copytree(run / "checkpoints" / "4", copy / "checkpoints" / "4")
    with pytest.raises(UsageError, match="its tokenizer is missing"):
        runs.load(str(copy))


def test_sampling_from_a_run_and_from_a_model(run, model, capsys):
    for place in (run, model):
        request = SampleArguments(str(place), ("the law", "Über"), max_tokens=12, temperature=0)
        texts = sample(request)
        out = capsys.readouterr().out
        assert len(texts) == 2 and "the law" + texts[0] in out and "Über" + texts[1] in out
        assert sample(request) == texts
    assert len(sample(SampleArguments(str(model), ("", "law"), max_tokens=3))) == 2
    with pytest.raises(UsageError, match="more than the context of 64"):
        sample(SampleArguments(str(model), ("the law",), max_tokens=60))
    with pytest.raises(UsageError, match="--prompt: is missing"):
        sample(SampleArguments(str(model), ()))
    with pytest.raises(UsageError, match="is not UTF-8"):
        sample(SampleArguments(str(model), ("\udcff",)))
    with pytest.raises(UsageError, match="is no run, which alone has steps"):
        sample(SampleArguments(str(model), ("x",), step=3))
    (model / "tokenizer.json").rename(model / "kept.json")
    with pytest.raises(UsageError, match="has no tokenizer.json or tokenizer.model"):
        sample(SampleArguments(str(model), ("x",)))
    (model / "kept.json").rename(model / "tokenizer.json")
