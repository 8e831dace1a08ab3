"""The notebooks as they are committed: outputs of a whole run with full settings."""

import json
import pathlib
import re

import nbformat
import pytest

from notebooks.execute import digest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Of Unix, macOS and Windows.
PATH_OF_A_MACHINE = re.compile(
    r"(?<![\w/.:])/(?:home|root|Users|tmp|work|workspace|mnt|opt|usr|var|private)/|[A-Z]:\\\\?Users"
)


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def path(request):
    return request.param


def code_cells(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_was_executed_from_top_to_bottom_and_nothing_failed(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_its_settings_were_the_full_ones(path):
    printed = [o.get("text", "") for cell in code_cells(path)[:2] for o in cell.outputs]
    assert "settings: full" in "".join(printed)


def test_its_outputs_are_those_of_its_code(path):
    notebook = nbformat.read(path, as_version=4)
    stale = f"{path.name} was edited after it was executed: make notebooks NAMES={path.stem}"
    assert notebook.metadata.get("executed_code") == digest(notebook), stale


def test_it_tells_no_path_of_a_machine(path):
    notebook = json.loads(path.read_text())
    text = []

    def collect(node, key=""):
        if isinstance(node, dict):
            for name, part in node.items():
                collect(part, name)
        elif isinstance(node, list):
            for part in node:
                collect(part, key)
        elif isinstance(node, str) and not key.startswith("image/"):
            text.append(node)

    collect(notebook)
    assert text and not [line for line in text if PATH_OF_A_MACHINE.search(line)]


def test_it_is_small_and_ends_with_what_is_confirmed(path):
    assert path.stat().st_size < 500_000
    last = nbformat.read(path, as_version=4).cells[-1]
    assert last.cell_type == "markdown"
    assert "confirmed" in last.source


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("File /home/somebody/x.py", True),
        ("'/tmp/x'", True),
        (r"C:\Users\x", True),
        ("https://arxiv.org/abs/2403.03507", False),
        ("layers/q/kernel, docs/hamiltonian.md, 1 /    3.0", False),
    ],
)
def test_paths_are_told_from_other_text(text, found):
    assert bool(PATH_OF_A_MACHINE.search(text)) is found
