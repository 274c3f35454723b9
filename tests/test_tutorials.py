"""Every notebook runs from top to bottom, offline, and is committed with its outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))
SMALLER = {
    r"\bsteps=\d+": "steps=30",
    r"\bn_features=\d+": "n_features=64",
    r"\b(train)', \d+\)": r"\1', 400)",
    r"\b(report|tune)', \d{3,}\)": r"\1', 24)",
    r"\bkl_documents=\d+": "kl_documents=8",
}
"""The sizes that a notebook sets, and those of the small demo, at which the same code runs in seconds."""
AS_PRINTED = "06_hesitation_circuit"
"""Shows an answer that hesitates, which adapters of a short training do not make."""


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def require_runs(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Execute a notebook and compare which of its cells show something with those of the committed one."""
    shown = [bool(cell.outputs) for cell in code_cells(notebook)]
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    assert [bool(cell.outputs) for cell in code_cells(notebook)] == shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_was_run_before_it_was_committed(path: Path) -> None:
    for cell in code_cells(nbformat.read(path, as_version=4)):
        assert cell.execution_count, "committed without outputs"
        assert not any(out.output_type == "error" for out in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    """At smaller sizes, but for the one notebook whose text needs its own."""
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        for size, smaller in SMALLER.items() if path.stem != AS_PRINTED else ():
            cell.source = re.sub(size, smaller, cell.source)
    require_runs(notebook, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem != AS_PRINTED], ids=lambda p: p.stem)
def test_it_runs_as_it_is_printed(path: Path, tmp_path: Path) -> None:
    require_runs(nbformat.read(path, as_version=4), tmp_path)


def test_there_are_notebooks_and_each_size_is_set_in_one() -> None:
    written = "\n".join(path.read_text() for path in NOTEBOOKS if path.stem != AS_PRINTED)
    assert NOTEBOOKS and all(re.search(size, written) for size in SMALLER)
