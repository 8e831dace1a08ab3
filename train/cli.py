"""The command line: two words choose the defaults, dotted keys change them.

`--model NAME` (a size of `models.config.PRESETS`, or the path of a pretrained model) and
`--experiment NAME` (a recipe of
`train.experiments`) are taken off first, because they decide the defaults of everything else.
tyro reads the rest onto the configuration's dataclasses. Every mistake is one line.
"""

import contextlib
import dataclasses
import difflib
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence

import tyro

from models.config import PRESETS
from train import weights
from train.checks import NO_ADAPTERS, unread_data_keys, validate
from train.config import (
    READ_BY,
    Config,
    DataConfig,
    flatten,
    follows_every_gradient,
    resolve,
)
from train.errors import TrainError, UsageError, no_space, one_line, silence_stdout
from train.experiments import EXPERIMENTS, check_model, check_text, header, listing, model_of

PROGRAM = "python -m train"
DEFAULT_MODEL, DEFAULT_EXPERIMENT = "tiny", "quickstart"


@dataclasses.dataclass(frozen=True)
class Command:
    """A parsed command line."""

    config: Config
    model: str
    experiment: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{PROGRAM} {shlex.join(self.arguments)}".rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; `--help` raises SystemExit(0)."""
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        # Here and not above: --help and a wrong key shall not wait for JAX.
        if command.config.compile_only:
            from train.topology import show

            show(command)
        else:
            from train.launch import run

            run(command)
        return 0
    except TrainError as error:
        return _fail(error, error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted before training began; nothing had to be saved", 130)
    except BrokenPipeError:
        return silence_stdout()
    except Exception as error:
        what = getattr(error, "filename", None) or "a file of the run or the cache"
        if reason := no_space(error):
            return _fail(
                f"couldn't write {what}: {reason}; free some space and run again with --resume", 2
            )
        if isinstance(error, OSError) and error.filename:
            return _fail(f"{what}: {error.strerror}; give another place, or mend this one", 2)
        raise


def _fail(message: object, code: int) -> int:
    word = "stopped" if code > 2 else "error"
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized() and jax.process_index():
        word = f"process {jax.process_index()}: {word}"
    print(f"{word}: {one_line(message)}", file=sys.stderr, flush=True)
    return code


# What the optimizer of the base weights reads, and that of the adapters does not.
_OF_BASE = (*(key for key in READ_BY if key not in ("b1", "b2", "eps")), "learning_rate")


def parse(arguments: Sequence[str]) -> Command:
    """Reads a command line into a checked configuration.

    >>> parse(["--model", "60m", "--train.steps", "7"]).config.train.steps
    7

    Raises:
      UsageError: anything unknown or impossible.
    """
    rest, experiment = _take(list(arguments), "--experiment", DEFAULT_EXPERIMENT, EXPERIMENTS)
    fallback = model_of(experiment, DEFAULT_MODEL)
    rest, model = _take(rest, "--model", fallback, PRESETS, weights.is_path)
    check_model(experiment, model, PRESETS)
    default = EXPERIMENTS[experiment].delta(_first(model))
    model = model if model in PRESETS else weights.name(model)
    wants_help = any(word in ("-h", "--help") for word in rest)
    given = set() if wants_help else _check_keys(rest, flatten(default))
    named = any(word.partition("=")[0] == "--experiment" for word in arguments)
    head = _about(experiment) if named else description()
    config = _read(rest, default, head if wants_help else None)
    check_text(experiment, config)
    for key in sorted(given):
        group, _, field = key.partition(".")
        if group == "optimizer" and config.optimizer.name not in READ_BY.get(
            field, (config.optimizer.name,)
        ):
            raise UsageError(
                f"--{key}: the optimizer {config.optimizer.name} doesn't read it; leave it out, or "
                f"choose --optimizer.name {READ_BY[field][0]}"
            )
        if key == "optimizer.every" and follows_every_gradient(config.optimizer):
            raise UsageError(
                f"--{key}: the projector of {config.optimizer.name} follows every gradient; leave "
                "it out, or choose --optimizer.projector svd"
            )
        if group == "lora" and field != "rank" and not config.lora.rank:
            raise UsageError(f"--{key}: there are no adapters; give --lora.rank, e.g. 8")
        if group == "lora" and config.lora.factorize and field not in ("rank", "factorize"):
            raise UsageError(f"--{key}: {NO_ADAPTERS}; leave it out")
        alone = config.lora.freeze == "all"
        if group == "optimizer" and alone and (field == "name" or field in _OF_BASE):
            raise UsageError(
                f"--{key}: with --lora.freeze all the adapters alone are trained, by AdamW; leave "
                "it out"
            )
    for field, why in unread_data_keys(config.data).items():
        if f"data.{field}" in given:
            raise UsageError(f"--data.{field}: {why}; leave it out")
    config = resolve(config)
    validate(config)
    weights.check(config)
    return Command(config, model, experiment, tuple(arguments))


def _first(model: str) -> Config:
    """The configuration of a size, or of a pretrained model at a path."""
    if model in PRESETS:
        return Config(model=PRESETS[model])
    found = weights.header(model).config
    pieces = min(DataConfig.vocab_size, found.vocab_size)
    return Config(model=found, weights=model, data=DataConfig(vocab_size=pieces))


def _take(
    words: list[str],
    flag: str,
    default: str,
    known: Iterable[str],
    accepts: Callable[[str], bool] = lambda value: False,
) -> tuple[list[str], str]:
    """Takes `flag NAME` or `flag=NAME` out of the words; the last one counts."""
    rest, value, index = [], default, 0
    while index < len(words):
        word = words[index]
        if word == flag:
            index += 1
            if index == len(words) or words[index].startswith("--"):
                raise UsageError(f"{flag}: give one of {', '.join(known)}")
            value = words[index]
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1 :]
        else:
            rest.append(word)
        index += 1
    if value not in known and not accepts(value):
        raise UsageError(f"{flag} {value}: unknown; {_nearest(value, known)}")
    return rest, value


def _nearest(word: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    start = f"did you mean {close[0]}? " if close else ""
    return f"{start}choose one of {', '.join(names)}"


def _check_keys(words: list[str], known: dict[str, object]) -> set[str]:
    """The keys that the words name; raises for one that no field has."""
    given = set()
    flags = {name: name for name in known}
    for name, value in known.items():
        if isinstance(value, bool):
            group, dot, field = name.rpartition(".")
            flags[f"{group}{dot}no_{field}"] = name
    for word in words:
        if not word.startswith("--"):
            continue
        key = word[2:].partition("=")[0].replace("-", "_")
        if key not in flags:
            raise UsageError(f"--{word[2:].partition('=')[0]}: unknown key; {_suggest(key, known)}")
        given.add(flags[key])
    return given


def _suggest(key: str, known: dict[str, object]) -> str:
    # The last part decides: `--steps` for `--train.steps`, `--optimizer.rnk` for `.rank`.
    group, _, last = key.lower().rpartition(".")
    last = {"lr": "learning_rate", "wd": "weight_decay"}.get(last, last)
    tails: dict[str, list[str]] = {}
    for name in known:
        tails.setdefault(name.rpartition(".")[2], []).append(name)
    close = difflib.get_close_matches(last, tails, n=1, cutoff=0.7)
    names = tails[close[0]] if close else []
    names = [name for name in names if name.rpartition(".")[0] == group] or names
    names = names or difflib.get_close_matches(key, list(known), n=1, cutoff=0.75)
    listing = f"{PROGRAM} --help lists all keys"
    return f"did you mean {' or '.join(f'--{n}' for n in names)}? {listing}" if names else listing


def _read(words: list[str], default: Config, head: str | None) -> Config:
    """tyro's reading of the words; its boxed errors become one line. With a `head` it is help that
    is asked for."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured) if head is None else contextlib.nullcontext():
            return tyro.cli(
                Config,
                prog=PROGRAM,
                description=head,
                default=default,
                args=words,
                use_underscores=True,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(unbox(captured.getvalue())) from None
    except ValueError as error:
        raise UsageError(error) from None


def unbox(box: str, program: str = PROGRAM) -> str:
    """The message of one of tyro's boxes: its first section, without the frame."""
    lines: list[str] = []
    # On a terminal the box has colours, and without UTF-8 a frame of other characters.
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:
        text = line.strip("│|+ ╭╮╰╯")
        if set(text) <= {"─", "-"}:
            if lines:
                break
            continue
        lines.append(text)
    message = one_line(" ".join(lines)) or one_line(box)
    return f"{message.rstrip('.')}; {program} --help shows what it takes"


def description() -> str:
    """The head of `--help`: the two words and what they may be."""
    sizes = [
        f"  {name:<6} {config.num_params() / 1e6:8,.1f} M parameters: hidden {config.hidden_size}, "
        f"{config.num_layers} layers, {config.num_heads} heads, vocabulary {config.vocab_size}"
        for name, config in PRESETS.items()
    ]
    return "\n".join(
        [
            "Trains a LLaMA. Two words choose the defaults, the keys below change them.",
            "",
            f"--model NAME (default {DEFAULT_MODEL}), the size, or --model PATH of a Hugging Face",
            "folder or .gguf file, which gives first weights and tokenizer too:",
            *sizes,
            "",
            f"--experiment NAME (default {DEFAULT_EXPERIMENT}), the recipe; one that is named for "
            "a size brings that model; with --help it tells more of itself:",
            *listing(),
        ]
    )


def _about(experiment: str) -> str:
    """The head of `--experiment NAME --help`: the experiment's own."""
    lines = header(experiment).splitlines()
    # tyro joins lines that aren't indented.
    indented = [f"  {line}" for line in lines[1:]]
    end = f"The keys below change it; {PROGRAM} --help lists all others."
    return "\n".join([lines[0], "", *indented, "", end])
