"""Documents as rows, examples with completions, and segments, from the text to the step."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention, llama
from models.config import LlamaConfig
from tests.train_helpers import write_text
from train import batches, corpus, gradient, memory, rows, step
from train.config import Config, DataConfig, OptimizerConfig, resolve
from train.optimizer import make
from train.tokenizer import Bytes

MODEL = LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_heads=4, num_layers=2)
END = Bytes.end


def params_of(config):
    return jax.jit(lambda key: llama.init_params(config, key))(jax.random.key(0))


def load(path, tmp_path, **options):
    return corpus.load(
        DataConfig(path=str(path), tokenizer="bytes", cache_dir=str(tmp_path / "cache"), **options)
    )


def lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


class TestRows:
    def row(self, length, **record):
        return rows.encode({k: v.encode() for k, v in record.items()}, Bytes(), length)

    @pytest.mark.parametrize(
        ("length", "expected", "first"),
        [
            (7, "abcDEF", 3),
            (8, "abcDEF", 3),
            (6, "bcDEF", 2),
            (5, "cDEF", 1),
            (4, "cDEF", 1),
            (3, "cDE", 1),
            (2, "cD", 1),
        ],
    )
    def test_a_long_example_keeps_its_completion(self, length, expected, first):
        row = self.row(length, prompt="abc", completion="DEF")
        whole = [*expected.encode(), *([END] if length >= len(expected) + 1 else [])]
        assert row.tokens.tolist() == whole and row.first == first
        mask = rows.padded(row, length).mask
        assert mask.sum() == len(whole) - first > 0

    def test_without_a_prompt_the_end_stands_before_the_completion(self):
        row = self.row(8, prompt="", completion="ab")
        assert row.tokens.tolist() == [END, 97, 98, END] and row.first == 1

    def test_what_a_tokenizer_sets_before_a_text_stands_there(self):
        class Started(Bytes):
            start = (300,)

        encode = lambda length, **record: rows.encode(
            {k: v.encode() for k, v in record.items()}, Started(), length
        )
        row = encode(8, text="abc")
        assert row.tokens.tolist() == [300, 97, 98, 99, END] and row.first == 1
        np.testing.assert_array_equal(rows.padded(row, 8).mask, [1, 1, 1, 1, 0, 0, 0, 0])
        assert encode(4, text="abcdef").tokens.tolist() == [300, 97, 98, END]
        for length, expected, first in (
            (9, [300, *b"abcDEF", END], 4),
            (7, [300, *b"bcDEF", END], 3),
            (4, [300, *b"DEF"], 1),
            (3, [300, *b"DE"], 1),
        ):
            row = encode(length, prompt="abc", completion="DEF")
            assert row.tokens.tolist() == expected and row.first == first
        row = encode(8, prompt="", completion="ab")
        assert row.tokens.tolist() == [300, 97, 98, END] and row.first == 1

    def test_a_token_across_the_border_is_of_the_completion(self):
        class Pairs:
            """Two letters a token."""

            end, vocab_size = 0, 1 << 16

            def encode(self, text):
                data = text.encode()
                pairs = [int.from_bytes(data[i : i + 2]) for i in range(0, len(data), 2)]
                return np.array([*pairs, 0], np.int32)

        row = rows.encode({"prompt": b"abc", "completion": b"def"}, Pairs(), 8)
        assert row.first == 1 and row.tokens.tolist() == [0x6162, 0x6364, 0x6566, 0]

    @pytest.mark.parametrize("count", [1, 6, 7, 8, 20])
    def test_a_document_is_cut_or_padded(self, count):
        text = "x" * count
        row = self.row(8, text=text)
        kept = min(count, 7)
        assert row.tokens.tolist() == [120] * kept + [END]
        inputs, targets, mask = rows.padded(row, 8)
        assert inputs.shape == targets.shape == mask.shape == (8,)
        # S - 1 tokens are predicted at most: the first one of a document is not.
        np.testing.assert_array_equal(mask, [1] * kept + [0] * (8 - kept))
        np.testing.assert_array_equal(targets[:kept], [120] * (kept - 1) + [END])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    return load(write_text(folder / "text"), folder, layout="documents")


class TestDocuments:
    def test_each_row_begins_a_document(self, data):
        texts = [record["text"] for record in data.train]
        stream = batches.training(data, 4, 32, 0)
        seen = []
        for _ in range(len(texts)):
            batch = next(stream)
            assert batch.segments is None
            for tokens, mask in zip(batch.inputs, batch.mask, strict=True):
                seen.append(bytes(tokens[:31].tolist()))
                assert mask.sum() == 31 and tokens[31] == END
        assert set(seen) == {text[:31] for text in texts}
        stream.close()

    def test_shapes_are_those_of_the_batches(self, data):
        stream = batches.training(data, 4, 32, 0)
        expected = batches.shapes(data.options, 4, 32)
        found = jax.tree.map(lambda x: (x.shape, x.dtype), next(stream))
        assert found == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
        stream.close()

    def test_held_out_rows_are_scored_alike(self, data):
        held = batches.held_out(data, 32)
        assert len(held.rows) == len(data.validation) and held.text_bytes is None
        found = list(held.batches(3, 32))
        assert sum(batch.mask.sum() for batch in found) == len(held.targets) == 31 * len(held.rows)
        assert all(batch.inputs.shape == (3, 32) for batch in found)
        scored = np.concatenate([batch.targets[batch.mask == 1] for batch in found])
        np.testing.assert_array_equal(scored, held.targets)

    def test_the_score_is_the_mean_over_all_tokens(self):
        """Not the mean of the batches' means, which counts short documents for more."""
        found = [rows.Row(np.full(n, 7, np.int32), 1) for n in (2, 9, 3)]
        held = batches.HeldOutRows(found)
        params = params_of(MODEL)
        evaluate = step.make_eval_step(MODEL)
        nats, tokens = 0.0, 0.0
        for batch in held.batches(2, 16):
            loss, count = evaluate(params, batch)
            nats, tokens = nats + float(loss), tokens + float(count)
        model = llama.merge(llama.graphdef(MODEL), params)
        alone = 0.0
        for row in found:
            loss, count = jax.jit(model.loss)(row.tokens[None, :-1], row.tokens[None, 1:])
            alone += float(loss) * float(count)
        assert tokens == 1 + 8 + 2
        assert nats == pytest.approx(alone, rel=1e-5)

    def test_held_out_documents_without_a_token_are_left_out(self, tmp_path):
        class Deaf(Bytes):
            def encode(self, text):
                return super().encode(text.replace("x", ""))

        path = lines(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b"}])
        for texts, count in ((["x", "ab"], 1), (["x", "xx"], 0)):
            held = lines(tmp_path / "h.jsonl", [{"text": text} for text in texts])
            options = {"validation_path": str(held), "layout": "documents"}
            data = load(path, tmp_path, **options)._replace(tokenizer=Deaf())
            if count:
                assert len(batches.held_out(data, 8).rows) == count
            else:
                with pytest.raises(batches.UsageError, match="leaves nothing of it to predict"):
                    batches.held_out(data, 8)

    def test_validation_tokens_limit_the_held_out_documents(self, tmp_path):
        path = write_text(tmp_path / "text", 40)
        options = dict(layout="documents", validation_fraction=0.5)
        assert len(batches.held_out(load(path, tmp_path, **options), 32).rows) == 20
        some = load(path, tmp_path, validation_tokens=65, **options)
        assert len(batches.held_out(some, 32).rows) == 3


def test_validation_tokens_limit_the_stream_to_whole_documents(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": c * 9} for c in "abcdef"])
    held = lines(tmp_path / "b.jsonl", [{"text": c * 9} for c in "uvw"])
    data = load(path, tmp_path, validation_path=str(held), validation_tokens=11)
    stream = batches.held_out(data, 16)
    assert stream.text_bytes == 18 and len(stream.targets) == 20


class TestCompletions:
    def test_only_completions_are_scored(self, tmp_path):
        records = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(40)]
        path = lines(tmp_path / "a.jsonl", records)
        data = load(path, tmp_path, layout="documents")
        stream = batches.training(data, 4, 16, 0)
        for _ in range(6):
            batch = next(stream)
            for inputs, targets, mask in zip(*batch[:3], strict=True):
                text = bytes(x for x in inputs.tolist() if x != END).rstrip(b"\0").decode()
                prompt, _, answer = text.partition("=")
                assert 2 * int(prompt.split("+")[0]) == int(answer)
                assert targets[mask == 1].tolist() == [*answer.encode(), END]
        stream.close()

    def test_packed_examples_are_refused(self, tmp_path):
        path = lines(tmp_path / "a.jsonl", [{"prompt": "a", "completion": c} for c in "bcd"])
        with pytest.raises(batches.UsageError, match="--data.layout documents"):
            load(path, tmp_path)

    def test_examples_without_a_completion_are_counted(self, tmp_path):
        records = [{"prompt": "a", "completion": c} for c in ("b", "", "c", " ", "d")]
        path, said = lines(tmp_path / "a.jsonl", records), []
        options = DataConfig(
            path=str(path), tokenizer="bytes", cache_dir=str(tmp_path / "c"), layout="documents"
        )
        data = corpus.load(options, say=said.append)
        assert len(data.train) == 3
        assert said == ["2 lines without a text or a completion to learn are left out"]


class TestSegments:
    """Rows of packed documents, of which each sees itself alone."""

    NUMBERS = np.array([[0, 0, 1, 1, 1, 2, 2, 2, 2, 2], [0] * 10])

    @pytest.mark.parametrize("name", attention.IMPLEMENTATIONS)
    def test_attention_within_segments(self, name):
        """Output and gradients are those of each segment on its own."""
        keys = jax.random.split(jax.random.key(0), 4)
        q, up = (jax.random.normal(key, (2, 10, 4, 8)) for key in keys[:2])
        k, v = (jax.random.normal(key, (2, 10, 2, 8)) for key in keys[2:])
        function = attention.IMPLEMENTATIONS[name]
        if name == "blocked":  # which a block's edge within a segment must not disturb
            function = lambda *a: attention.blocked(*a, block=4)
        edges = [(0, 0, 2), (0, 2, 5), (0, 5, 10), (1, 0, 10)]

        @functools.partial(jax.jit, static_argnums=0)
        def both(function, q, k, v, up):
            out, vjp = jax.vjp(function, q, k, v)
            return out, *vjp(up)

        def apart(q, k, v):
            out = jnp.zeros_like(q)
            for row, start, stop in edges:
                part = [x[row : row + 1, start:stop] for x in (q, k, v)]
                out = out.at[row, start:stop].set(attention.einsum(*part)[0])
            return out

        numbers = self.NUMBERS.astype(np.float32 if name == "blocked" else np.int32)
        found = both(lambda q, k, v: function(q, k, v, numbers), q, k, v, up)
        for ours, theirs in zip(found, both(apart, q, k, v, up), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("changes", [{"unroll": 1, "remat": True}, {"attention": "einsum"}])
    def test_packed_documents_are_scored_as_if_alone(self, changes):
        config = dataclasses.replace(MODEL, **changes)
        params = params_of(config)
        model = llama.merge(llama.graphdef(config), params)
        documents = [np.append(np.arange(n) * 7 % 250, END) for n in (3, 1, 6)]
        row = np.concatenate([[END], *documents]).astype(np.int32)
        inputs, targets = row[None, :-1], row[None, 1:]
        numbers = batches.segments(inputs, END)
        packed = jax.jit(lambda n: model(inputs, n))(numbers)[0]
        place = 0
        for document in documents:
            alone = jax.jit(model)(np.append(END, document[:-1]).astype(np.int32)[None])[0]
            np.testing.assert_allclose(
                packed[place : place + len(document)], alone, rtol=1e-4, atol=1e-5
            )
            place += len(document)
        each = jax.nn.log_softmax(packed)[np.arange(place), targets[0]]
        loss, count = jax.jit(model.loss)(inputs, targets, None, numbers)
        assert count == place and float(loss) == pytest.approx(-float(each.mean()), rel=1e-5)

    def test_batches_have_the_segments_of_their_documents(self, tmp_path):
        data = load(write_text(tmp_path / "text"), tmp_path, segments=True)
        stream = batches.training(data, 3, 700, 0)
        for _ in range(4):
            batch = next(stream)
            assert batch.mask is None and batch.segments.dtype == np.int32
            for tokens, numbers in zip(batch.inputs, batch.segments, strict=True):
                starts = np.flatnonzero(np.diff(numbers)) + 1
                ends = np.flatnonzero(tokens == END)
                np.testing.assert_array_equal(starts, ends[ends > 0])
        stream.close()
        (scored, *_) = batches.held_out(data, 64).batches(2, 64)
        np.testing.assert_array_equal(scored.segments, np.cumsum(scored.inputs == END, 1))

    @pytest.mark.slow
    @pytest.mark.parametrize("remat", [True, False])
    def test_fused_steps_equal_plain_ones(self, remat):
        model = dataclasses.replace(MODEL, remat=remat)
        options = resolve(Config(optimizer=OptimizerConfig(name="lomo"))).optimizer
        tokens = jax.random.randint(jax.random.key(1), (4, 17), 0, 250).at[:, ::6].set(END)
        inputs = tokens[:, :-1]
        batch = batches.Batch(inputs, tokens[:, 1:], None, batches.segments(inputs, END))
        found = {}
        for fused in (True, False):
            optimizer = make(options, 20, fused)
            layerwise = step.make_fused(model, optimizer, 0) if fused else None
            initial = lambda key, o=optimizer, f=layerwise: step.init_state(model, o, key, fused=f)
            state = jax.jit(initial)(jax.random.key(0))
            run = step.make_train_step(model, optimizer, 0, layerwise)
            for _ in range(2):
                state, metrics = run(state, batch)
            found[fused] = (state.params, metrics.loss, metrics.grad_norm)
        for ours, theirs in zip(*map(jax.tree.leaves, found.values()), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        # And the segments count: without them the loss is another one.
        loss = jax.jit(gradient.make_loss(model, make(options, 20, False)))
        params = params_of(model)
        assert loss(params, batch) != loss(params, batch._replace(segments=None))

    def test_the_predicted_memory_counts_them(self):
        optimizer = make(
            resolve(Config(optimizer=OptimizerConfig(name="lomo"))).optimizer, 20, True
        )
        fused = step.make_fused(MODEL, optimizer)
        state = jax.eval_shape(
            lambda key: step.init_state(MODEL, optimizer, key, fused=fused), jax.random.key(0)
        )
        predicted = [
            memory.predict(
                state,
                batches.shapes(DataConfig(segments=segments), 2, 16),
                gradient.make_loss(MODEL, optimizer),
                llama.pieces(MODEL),
                remat=True,
            )
            for segments in (False, True)
        ]
        extra = predicted[1].activations - predicted[0].activations
        # float32 numbers beside each block's input, and what the mask keeps of them.
        assert 2 * 2 * 16 * 4 <= extra < predicted[0].activations / 4
        assert predicted[1].batch - predicted[0].batch == 2 * 16 * 4
