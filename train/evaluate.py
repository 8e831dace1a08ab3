"""Scores multiple choice: python -m train.evaluate RUN_OR_MODEL --task TASK.

Of each question that answer counts as the model's which it finds the likeliest after the prompt:
by the sum of its tokens' log-probabilities, and by that sum for each byte of the answer, which
doesn't favour short ones.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tyro.conf import Positional

from train import tasks
from train.command import main
from train.errors import UsageError
from train.runs import Loaded, load
from train.tokenizer import encode_prompt


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Scores a run's or a pretrained model on questions of several choices."""

    model: Positional[str]
    """Folder of a run, Hugging Face folder, or .gguf file"""
    task: str
    """glue/NAME, super_glue/NAME, sotu/president, sotu/decade, or a .jsonl file of prompt (or
    question), choices and answer"""
    split: str | None = None
    """None is validation, or test of sotu"""
    limit: int | None = None
    """Only so many questions, spread over all"""
    batch_size: int = 8
    """Answers that are scored at once"""
    tfds_dir: str | None = None
    """glue, super_glue: folder of the prepared data sets; None is tensorflow-datasets' own"""
    out: str | None = None
    """File to which the result is appended, as a line of JSON"""
    step: int | None = None
    """Of a run, the checkpoint of this step; None is the newest good one"""


class Score(NamedTuple):
    """How many questions a model answered rightly."""

    questions: int
    accuracy: float
    accuracy_per_byte: float
    standard_error: float  # of the accuracy
    chance: float  # accuracy of guessing
    commonest: float  # accuracy of the answer that is the commonest
    truncated: int  # prompts that lost their beginning


def evaluate(arguments: Arguments) -> Score:
    """Does what the command line says, prints and returns the score.

    Raises:
      UsageError: the model or the task can't be read.
    """
    for key in ("limit", "batch_size"):
        if (value := getattr(arguments, key)) is not None and value < 1:
            raise UsageError(f"--{key} {value}: give a whole number of at least 1")
    questions = tasks.load(arguments.task, arguments.split, arguments.tfds_dir)
    if arguments.limit is not None and arguments.limit < len(questions):
        chosen = np.arange(arguments.limit) * len(questions) // arguments.limit
        questions = [questions[i] for i in chosen]
    model = load(arguments.model, arguments.step)
    found = score(model, questions, arguments.batch_size)
    error = f"{found.standard_error:.1%}"
    print(f"{model.name} on {arguments.task}: {found.questions:,} questions")
    print(f"accuracy             {found.accuracy:.1%} (standard error {error})")
    print(f"accuracy per byte    {found.accuracy_per_byte:.1%}")
    print(f"guessing             {found.chance:.1%}")
    print(f"the commonest answer {found.commonest:.1%}")
    if found.truncated:
        print(f"{found.truncated:,} prompts lost their beginning: the context is {model.context}")
    if arguments.out is not None:
        row = {"model": arguments.model, "task": arguments.task, **found._asdict()}
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return found


def score(model: Loaded, questions: Sequence[tasks.Question], batch_size: int = 8) -> Score:
    """How a model answers questions.

    Raises:
      UsageError: its answers have no likelihood that is a number.
    """
    rows, truncated = [], 0
    for question in questions:
        lost = False
        for choice in question.choices:
            row, cut = encode(model, question.prompt, choice)
            rows.append(row)
            lost = lost or cut
        truncated += lost
    largest = max(int(row.tokens.max()) for row in rows)
    if largest >= model.config.vocab_size:
        raise UsageError(
            f"{model.name}: its tokenizer gives the id {largest}, its weights have "
            f"{model.config.vocab_size} embeddings; put the tokenizer of these weights beside them"
        )
    sums = log_likelihoods(model, rows, batch_size)
    if not np.isfinite(sums).all():
        # The likeliest of such would be the first choice, whatever it says.
        raise UsageError(
            f"{model.name}: the log-probabilities of {np.sum(~np.isfinite(sums)):,} of "
            f"{len(sums):,} answers are not finite; its weights are no numbers or too large for "
            f"{model.config.dtype}: give an earlier checkpoint by --step, or other weights"
        )
    right = per_byte = place = 0
    for question in questions:
        part = sums[place : place + len(question.choices)]
        place += len(question.choices)
        sizes = [len(choice.encode()) for choice in question.choices]
        right += int(np.argmax(part)) == question.answer
        per_byte += int(np.argmax(part / sizes)) == question.answer
    count = len(questions)
    answers = [question.choices[question.answer] for question in questions]
    accuracy = right / count
    return Score(
        count,
        accuracy,
        per_byte / count,
        math.sqrt(accuracy * (1 - accuracy) / count),
        sum(1 / len(question.choices) for question in questions) / count,
        max(answers.count(answer) for answer in set(answers)) / count,
        truncated,
    )


class Row(NamedTuple):
    """A prompt and an answer as one text."""

    tokens: np.ndarray  # (n,) int32
    first: int  # of the answer's tokens, at least 1


def encode(model: Loaded, prompt: str, choice: str) -> tuple[Row, bool]:
    """A row of at most the context's length, and whether the prompt lost its beginning for that.

    Both are encoded as one text, since that is what the model would read; a token across the
    border belongs to the answer.

    Raises:
      UsageError: the answer alone is longer than the context.
    """
    before = encode_prompt(model.tokenizer, prompt)[:-1]
    whole = encode_prompt(model.tokenizer, prompt + choice)[:-1]
    shared = min(len(before), len(whole) - 1)
    differs = np.flatnonzero(before[:shared] != whole[:shared])
    first = int(differs[0]) if len(differs) else shared
    # Something has to stand before the first token that counts.
    start = model.start if model.start or first else (model.tokenizer.end,)
    answer = len(whole) - first
    if answer + max(len(start), 1) > model.context:
        raise UsageError(
            f"the answer {choice[:40]!r} has {answer} tokens, and the model's context is "
            f"{model.context}; give shorter answers"
        )
    cut = max(len(start) + len(whole) - model.context, 0)
    tokens = np.concatenate([np.array(start, np.int32), whole[cut:]])
    return Row(tokens, len(tokens) - answer), cut > 0


def log_likelihoods(model: Loaded, rows: Sequence[Row], batch_size: int) -> np.ndarray:
    """Sum of the log-probabilities of each row's answer, (rows,) float64."""
    import jax
    import jax.numpy as jnp

    from models.llama import graphdef, merge

    definition = graphdef(model.config)

    @jax.jit
    def run(params, tokens, places, targets, mask):
        llama = merge(definition, params)
        x = llama.norm(llama.stack(llama.embed(tokens)))
        # The head, the dearest part of a small model, for the answers alone.
        x = jnp.take_along_axis(x, places[..., None], axis=1)
        scores = jnp.dot(x, llama.head_kernel(), preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(mask * (picked - jax.nn.logsumexp(scores, axis=-1)), axis=-1)

    params = jax.device_put(model.params)
    longest = _power(max(len(row.tokens) - row.first for row in rows))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
    sums = np.zeros(len(rows))
    for begin in range(0, len(rows), batch_size):
        part = order[begin : begin + batch_size]
        length = min(_power(len(rows[part[0]].tokens)), max(model.context, 16))
        arrays = _padded([rows[i] for i in part], batch_size, length, longest)
        sums[part] = np.asarray(run(params, *arrays))[: len(part)]
    return sums


def _power(size: int) -> int:
    """The next power of two, at least 16: few lengths mean few programs."""
    return max(16, 1 << (size - 1).bit_length())


def _padded(rows: Sequence[Row], count: int, length: int, longest: int) -> tuple[np.ndarray, ...]:
    """tokens (count, length), and of the answers places, targets and mask (count, longest)."""
    tokens = np.zeros((count, length), np.int32)
    places, targets = np.zeros((2, count, longest), np.int32)
    mask = np.zeros((count, longest), np.float32)
    for i, row in enumerate(rows):
        size = len(row.tokens) - row.first
        # The last token is only predicted.
        tokens[i, : len(row.tokens) - 1] = row.tokens[:-1]
        places[i, :size] = np.arange(row.first - 1, len(row.tokens) - 1)
        targets[i, :size] = row.tokens[row.first :]
        mask[i, :size] = 1
    return tokens, places, targets, mask


if __name__ == "__main__":
    sys.exit(main("train.evaluate", Arguments, evaluate))
