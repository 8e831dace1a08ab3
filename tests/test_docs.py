"""README and docs as a reader uses them: every block of code runs, every command line parses."""

import argparse
import contextlib
import doctest
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tyro
from markdown_it import MarkdownIt

import optax_subspace
from train import cli, command, evaluate, export, sample
from train.config import Config, flatten

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = sorted((ROOT / "docs/api").glob("*.md"))
MAKEFILE = (ROOT / "Makefile").read_text()
# Of a checkout, what the documentation is not made of.
LEFT_OUT = (".git", ".venv", ".cache", "runs", "site", "build", "dist")
names = lambda path: path.relative_to(ROOT).as_posix()

# What the command lines of the pages name and a checkout does not have.
PRETRAINED = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576}
PRETRAINED |= {"intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
PRETRAINED |= {"num_hidden_layers": 30, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}


# Of what is indented, or HTML; equations are indented too.
CODE = re.compile(r"^\s*(```|~~~|>>> |import |from \w|\$ |python |pip |make |<pre|<code)", re.M)


class Parsed(Exception):
    """A program has read its command line, and would go on to work."""


def blocks(text):
    """Fenced blocks ``(language, code, line)`` of a page."""
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "fence":
            yield token.info.strip(), token.content, token.map[0] + 1
        elif token.type in ("code_block", "html_block") and CODE.search(token.content):
            raise AssertionError(f"line {token.map[0] + 1}: code without a fence is not tested")


def spans(text):
    """Code within the lines of a page."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


def run_python(code, line, namespace, page):
    """A session with prompts and results, or plain code, in the namespace of its page."""
    if not re.search(r"^ *>>> ", code, re.M):
        exec(compile("\n" * line + code, page, "exec"), namespace)
        return
    # (`get_doctest` copies the namespace, which has to go on to the next block.)
    test = doctest.DocTestParser().get_doctest(code, {}, page, page, line)
    test.globs = namespace
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    told = io.StringIO()
    runner.run(test, out=told.write, clear_globs=False)
    assert not runner.failures, told.getvalue()


def check_shell(code, line, namespace, page):
    """Each command of a block: known, and with arguments that its own parser takes."""
    for text in code.replace("\\\n", " ").splitlines():
        words = shlex.split(text, comments=True)
        if words:
            check_command(words)


def check_command(words):
    while words and re.fullmatch(r"\w+=.*", words[0]):
        check_variable(words.pop(0).partition("=")[0])
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        check_make(arguments)
    elif program == "pip" and arguments[:1] == ["install"]:
        check_install(arguments[1:])
    elif program == "python" and arguments[:1] == ["-m"]:
        check_module(arguments[1], arguments[2:])
    elif program == "export":
        check_variable(arguments[0].partition("=")[0])
    else:
        raise AssertionError(f"no test knows the command {' '.join(words)}")


def check_variable(name):
    sources = [p.read_text() for part in ("train", "tests") for p in (ROOT / part).glob("*.py")]
    assert any(f'"{name}"' in text for text in sources), f"nothing here knows of {name}"


def check_make(arguments):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split())
    for word in arguments:
        name, is_setting, value = word.partition("=")
        if not is_setting:
            assert word in targets, f"there is no target {word}"
            continue
        assert re.search(rf"^{name} \?=", makefile, re.M), f"the Makefile has no {name}"
        if name == "DEVICE":
            assert value in re.search(r"filter \$\(DEVICE\),(.*?)\)", makefile)[1].split()
        if name == "ARGS" and "train" in arguments:
            cli.parse(shlex.split(value))


def check_install(arguments):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *sum(extras.values(), [])]
    known = {re.match(r"[\w.-]+", w)[0].lower() for w in wanted} | {project["name"]}
    for word in arguments:
        if word in ("-e", "--editable"):
            continue
        name, asked = re.fullmatch(r"([\w.-]+)(?:\[([\w,]+)\])?", word).groups()
        assert name == "." or name.lower() in known, f"{name} is no dependency of the project"
        if name in (".", project["name"]):
            assert set((asked or "").split(",")) - {""} <= set(extras), f"no such extra: {word}"


def check_module(module, arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            read(module, arguments)
        except SystemExit as stop:  # of --help
            assert stop.code == 0 and {"-h", "--help"} & set(arguments), f"{module} {arguments}"


def read(module, arguments):
    small = {"train.sample": sample, "train.evaluate": evaluate, "train.export": export}
    if module == "train":
        cli.parse(arguments)
    elif module in small:
        command.read(module, small[module].Arguments, arguments)
    else:
        assert module == "train.report" or module.startswith("benchmarks."), f"unknown: {module}"
        with stopping_once_parsed() as patch:
            main = importlib.import_module(module).main
            patch.setattr(sys, "argv", [module, *arguments])
            # (Reports a usage error of its own by its return value.)
            assert main() in (None, 0), f"{module} {arguments}"
            raise AssertionError(f"{module} did not read its arguments by argparse or tyro")


@contextlib.contextmanager
def stopping_once_parsed():
    """Programs stop where they have read their command line."""

    def stopping(parse):
        def parse_and_stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return parse_and_stop

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Parsed):
        for owner, name in ((argparse.ArgumentParser, "parse_args"), (tyro, "cli")):
            patch.setattr(owner, name, stopping(getattr(owner, name)))
        yield patch


HANDLERS = {"python": run_python, "sh": check_shell}


def check_page(text, page):
    namespace = {"__name__": "__main__"}
    for language, code, line in blocks(text):
        assert language in HANDLERS, f"{page}:{line}: no test handles blocks of {language!r}"
        try:
            HANDLERS[language](code, line, namespace, page)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}:{line}: {error}") from error
    keys = {*flatten(Config()), "model", "experiment"}
    for span in spans(text):
        if re.match(r"(make|pip install|python -m) [\w.]", span):
            # (Of `[--out FILE]` and `RUN ...` in a synopsis the words alone.)
            check_command(shlex.split(re.sub(r"[\[\]]| \.\.\.", "", span)))
        elif found := re.match(r"--(?:no_)?([a-z_]+\.[a-z_0-9]+)", span):
            assert found[1] in keys, f"{page}: the trainer has no key --{found[1]}"


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder with the pretrained models that command lines name."""
    for name in ("SmolLM2-135M", "llama-7b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(PRETRAINED))
        (folder / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", [p for p in PAGES if p not in REFERENCE], ids=names)
def test_the_code_of_a_page_runs(path, somewhere):
    check_page(path.read_text(), names(path))


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```yaml\na: 1\n```", "no test handles blocks of 'yaml'"),
        ("```\nplain\n```", "no test handles blocks of ''"),
        ("- a\n\n        ```sh\n        make\n        ```", "without a fence"),
        ("Run\n\n    python -m train\n", "without a fence"),
        ("<pre>\nmake train\n</pre>\n", "without a fence"),
        ("```python\nassert 1 > 2\n```", "page:1"),
        ("```python\n>>> 1 + 1\n3\n```", "  Expected:\n      3"),
        ("```sh\nmake nothing\n```", "no target nothing"),
        ("```sh\nmake train DEVICE=abacus\n```", "page:1"),
        ('```sh\nmake train ARGS="--train.step 3"\n```', "--train.step: unknown key"),
        ("```sh\npython -m train \\\n  --optimizer.nme lomo\n```", "--optimizer.nme: unknown key"),
        ("```sh\npython -m train.sample\n```", "page:1"),
        ("```sh\npython -m train.report --of a\n```", "train.report"),
        ("```sh\npython -m benchmarks.memory --modls 7b\n```", "page:1"),
        ("```sh\npip install '.[trein]'\n```", "no such extra"),
        ("```sh\ngcc hello.c\n```", "no test knows the command"),
        ("```sh\nJAX_COORDINATOR=a python -m train\n```", "knows of JAX_COORDINATOR"),
        ("Give `--train.stps 3`.", "no key --train.stps"),
        ("Run `make nothing`.", "no target nothing"),
    ],
)
def test_a_block_that_is_wrong_or_unknown_fails(page, message, somewhere, capsys):
    with pytest.raises(AssertionError, match=re.escape(message)):
        check_page(page, "page")


def test_every_public_name_is_on_one_reference_page():
    found = [
        name
        for path in REFERENCE
        for name in re.findall(r"^::: optax_subspace\.(\w+)$", path.read_text(), re.M)
    ]
    assert sorted(found) == optax_subspace.__all__


def test_lines_of_the_trainer_that_are_quoted_are_its_own():
    table = (ROOT / "docs/troubleshooting.md").read_text().split("| line | cause |")[1]
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    source = "\n".join(path.read_text() for path in sorted((ROOT / "train").glob("*.py")))
    # What is written in parts, as one.
    source = re.sub(r'"\n\s*f?"', "", source)
    assert len(quoted) > 5
    for line in quoted:
        parts = [part.strip(" ;:") for part in re.split(r"\.\.\.|KEY|\b[ABMN]\b", line)]
        unknown = [part for part in parts if part not in source]
        assert not unknown, f"{line}: the trainer does not say {unknown}"


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    """With the very options of `make docs`: some of them keep `--strict` from counting warnings."""
    line = re.search(r"^\t(\S*=\S+ )*\$\(bin\)/python (-m mkdocs .*)$", MAKEFILE, re.M)
    whole = tmp_path / "whole"
    shutil.copytree(ROOT, whole, ignore=lambda folder, found: [x for x in found if x in LEFT_OUT])
    page = whole / "docs" / "galore.md"
    page.write_text(page.read_text() + "\n[nowhere](nowhere.md)\n")
    command = [sys.executable, *shlex.split(line[2]), "--site-dir", str(tmp_path / "site")]
    build = subprocess.run(command, cwd=whole, capture_output=True, text=True, check=False)
    assert build.returncode == 1 and "nowhere.md" in build.stderr
