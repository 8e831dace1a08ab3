"""The project as a user meets it: wheel, imports, notebooks, pinned versions."""

import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

import optax_subspace
from notebooks.execute import execute

ROOT = pathlib.Path(__file__).parent.parent


def build(where):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(where)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = where.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_library_alone(tmp_path):
    with zipfile.ZipFile(build(tmp_path)) as wheel:
        names = wheel.namelist()
        (meta,) = (n for n in names if n.endswith("METADATA"))
        metadata = wheel.read(meta).decode()
    tops = {name.split("/")[0] for name in names}
    info = f"optax_subspace-{optax_subspace.__version__}.dist-info"
    assert tops == {"optax_subspace", info}
    assert {f"optax_subspace/{p.name}" for p in (ROOT / "optax_subspace").glob("*.py")} <= set(
        names
    )
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert sorted(required) == ["jax", "optax"]
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert "optax_subspace/py.typed" in names  # so that type checkers read its annotations


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path):
    wheel = build(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    constraints = "python-3.11" if sys.version_info < (3, 12) else "python-3.12"
    pins = str(ROOT / "constraints" / f"{constraints}.txt")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", pins, str(wheel)], check=True)
    code = """
import importlib.util, jax.numpy as jnp, optax
from optax_subspace import subspace_project, scale_by_adam
assert importlib.util.find_spec("flax") is None
tx = optax.chain(subspace_project(rank=2), scale_by_adam(), optax.scale_by_learning_rate(1e-2))
params = {"w": jnp.ones((8, 4))}
updates, _ = tx.update(params, tx.init(params), params)
print(updates["w"].shape)
"""
    run = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd="/")
    assert run.stdout.strip() == "(8, 4)"


def test_the_library_imports_nothing_but_jax_and_optax():
    code = (
        "import sys, optax_subspace; "
        "print([m for m in ('flax', 'orbax', 'grain', 'models', 'train') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert run.stdout.strip() == "[]"


def test_public_names_are_documented_and_all_exist():
    for name in optax_subspace.__all__:
        assert getattr(optax_subspace, name).__doc__, f"{name} has no docstring"
    assert sorted(optax_subspace.__all__) == optax_subspace.__all__


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_constraints_are_plain_pins_of_every_dependency(version):
    text = (ROOT / "constraints" / f"python-{version}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+", line) for line in lines)
    pinned = {line.split("==")[0] for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {re.match(r"[\w.-]+", w)[0].lower().replace("_", "-") for w in wanted}
    assert names <= pinned
    assert {"jaxlib", "libtpu", "jax-cuda12-plugin"} <= pinned


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path):
    notebook = execute(path, "small")
    images = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert images, "a notebook shows figures"
