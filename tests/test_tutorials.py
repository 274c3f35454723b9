"""Every notebook runs from top to bottom, offline, and is committed with its outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "committed without outputs"
    assert not any(out.output_type == "error" for cell in code for out in cell.outputs)
    shown = {i for i, cell in enumerate(code) if cell.outputs}
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert {i for i, cell in enumerate(code) if cell.outputs} == shown


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
