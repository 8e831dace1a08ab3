"""Executes notebooks in place with their full settings: `make notebooks`.

The kernel starts at the root of the repository, as in the tests, and nothing of this machine is
written into the file but the outputs. A digest of the code that was run is kept in the notebook's
metadata, by which the tests tell outputs that are older than their code.
"""

import argparse
import hashlib
import os
import resource
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def digest(notebook: nbformat.NotebookNode) -> str:
    """Of all code, in order."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()[:16]


def execute(path: Path, settings: str = "full") -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    environment = os.environ | {"NOTEBOOK_SETTINGS": settings}
    client = NotebookClient(
        notebook,
        timeout=900,
        record_timing=False,
        resources={"metadata": {"path": str(HERE.parent)}},
    )
    client.execute(env=environment)
    notebook.metadata["executed_code"] = digest(notebook)
    return notebook


def main() -> None:
    """Prints the time of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as 02_gradients_are_low_rank; none is all")
    parser.add_argument("--settings", choices=("full", "small"), default="full")
    parser.add_argument("--discard", action="store_true", help="write nothing, only measure")
    args = parser.parse_args()
    paths = [HERE / f"{Path(name).stem}.ipynb" for name in args.names]
    for path in paths or sorted(HERE.glob("*.ipynb")):
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        notebook = execute(path, args.settings)
        if not args.discard:
            nbformat.write(notebook, path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{path.stem:28} {time.perf_counter() - begin:5.0f} s, CPU {cpu:5.0f} s", flush=True)


if __name__ == "__main__":
    main()
