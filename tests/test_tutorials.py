"""Every notebook runs from top to bottom, offline, with public names only, and is committed with small outputs."""

import ast
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

import tl_adapters

NOTEBOOKS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))
SMALLER = {
    r"\bsteps=\d+": "steps=40",
    r"\bn_features=\d+": "n_features=32",
    r"\bpolish=False": "polish=False, revisions=(0.5,)",  # one, which is without births
    r"\b(train)', \d+": r"\1', 100",
    r"\b(report|tune)', \d{3,}": r"\1', 40",
    r"\bkl_documents=\d+": "kl_documents=8",
    r"\bper_layer=\d+": "per_layer=2",
    r"\bbuiltin_subject\(\d+, \d+": "builtin_subject(48, 8",
    r"\bdocuments=\d+": "documents=8",
}
"""The sizes that a notebook sets, and those at which the same code runs in seconds."""
MAX_BYTES = 2_000_000
"""Size of a committed notebook; circuitsvis's script, which a notebook may hold once, is 1.3 MB of it."""
NEEDS_MORE = "# needs a network and a GPU"
"""First line of a cell that is skipped where there is no GPU."""


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def source(path: Path) -> str:
    """The code of a notebook, without its first cell, which installs."""
    return "\n".join(cell.source for cell in code_cells(nbformat.read(path, as_version=4))[1:])


def outputs(cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """What a cell shows, without progress bars and warnings, which are not committed."""
    return [out for out in cell.outputs if out.get("name") != "stderr"]


def require_runs(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Execute a notebook and compare which of its cells show something with those of the committed one."""
    shown = [bool(outputs(cell)) for cell in code_cells(notebook)]
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    assert [bool(outputs(cell)) for cell in code_cells(notebook)] == shown


def test_they_are_numbered_without_gaps_and_the_readme_links_each() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == [f"0{n}_" for n in range(1, len(NOTEBOOKS) + 1)]
    readme = (NOTEBOOKS[0].parents[1] / "README.md").read_text()
    assert re.findall(r"\(tutorials/(\w+\.ipynb)\)", readme) == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_was_run_before_it_was_committed(path: Path) -> None:
    for cell in code_cells(nbformat.read(path, as_version=4)):
        assert cell.execution_count, "committed without outputs"
        assert not any(out.output_type == "error" for out in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_its_outputs_are_small_and_of_no_one_machine(path: Path) -> None:
    text = path.read_text()
    assert len(text) < MAX_BYTES and text.count("var CircuitsVis=") <= 1
    written = [out.get("text", "") for cell in code_cells(nbformat.reads(text, as_version=4)) for out in cell.outputs]
    assert not re.search(r"/home/|/root/|/tmp/|Traceback", "\n".join(written))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_begins_with_the_cell_that_installs(path: Path) -> None:
    """The same in every notebook; it does nothing where the package can be imported."""
    first, *others = (code_cells(nbformat.read(p, as_version=4))[0].source for p in (path, *NOTEBOOKS))
    assert set(others) == {first} and "find_spec('tl_adapters') is None" in first


class Shell:
    """What a notebook's cell asks of IPython: only the magics that it calls."""

    def __init__(self) -> None:
        self.magics: list[tuple[str, str]] = []

    def run_line_magic(self, name: str, line: str) -> None:
        self.magics.append((name, line))


@pytest.mark.parametrize("there", [True, False])
def test_the_cell_that_installs(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is missing it installs what is at SOURCE; where nothing is, it says so and stops."""
    cell = code_cells(nbformat.read(NOTEBOOKS[0], as_version=4))[0].source
    source, shell = tmp_path / "tl_adapters", Shell()
    code = TransformerManager().transform_cell(cell.replace("/content/tl_adapters", str(source)))
    exec(code, {"get_ipython": lambda: shell})
    assert not shell.magics, "it is installed here"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if there:
        source.mkdir()
        exec(code, {"get_ipython": lambda: shell})
        assert shell.magics == [("pip", 'install --quiet "{SOURCE}[saelens]"')]
        return
    with pytest.raises(SystemExit, match=f"{source} does not exist: upload tl_adapters there, or set SOURCE"):
        exec(code, {"get_ipython": lambda: shell})
    assert not shell.magics


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_uses_public_names_only(path: Path) -> None:
    for node in ast.walk(ast.parse(source(path))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tla":
            assert node.attr in tl_adapters.EXPORTS
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tl_adapters"):
            assert (node.module, [alias.name for alias in node.names]) == ("tl_adapters", ["organism"])
        if isinstance(node, ast.Import):
            assert all(
                (alias.name, alias.asname) == ("tl_adapters", "tla")
                for alias in node.names
                if alias.name.startswith("tl_adapters")
            )


def test_a_cell_that_needs_more_than_this_machine_is_marked_and_guarded() -> None:
    marked = 0
    for path in NOTEBOOKS:
        for cell in code_cells(nbformat.read(path, as_version=4))[1:]:
            if cell.source.startswith(NEEDS_MORE):
                marked += 1
                guarded = ast.parse(cell.source).body[-1]
                assert isinstance(guarded, ast.If) and ast.unparse(guarded.test) == "RUN"
                assert not cell.outputs, "a figure of a machine with a GPU, in a notebook that says it was not run"
            else:
                assert "device='cuda'" not in cell.source
    assert marked == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    """At smaller sizes."""
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        for size, smaller in SMALLER.items():
            cell.source = re.sub(size, smaller, cell.source)
    require_runs(notebook, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs_as_it_is_printed(path: Path, tmp_path: Path) -> None:
    require_runs(nbformat.read(path, as_version=4), tmp_path)


def test_there_are_notebooks_and_each_size_is_set_in_one() -> None:
    written = "\n".join(path.read_text() for path in NOTEBOOKS)
    assert NOTEBOOKS and all(re.search(size, written) for size in SMALLER)
