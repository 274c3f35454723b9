"""Importing tl_adapters changes nothing of the user's process beyond what its named dependencies change themselves."""

import json

import nbformat
import pytest
from nbclient import NotebookClient

STATE = """
def state():
    import logging, os, random, sys, threading, warnings
    import matplotlib, numpy, torch
    loggers = {name: logger for name, logger in logging.root.manager.loggerDict.items()
               if isinstance(logger, logging.Logger) and not name.startswith("tl_adapters")}
    return {
        "backend": matplotlib.get_backend(),
        "rcParams": {k: repr(v) for k, v in matplotlib.rcParams.items()},
        "environment": dict(os.environ),
        "filters": [repr(f) for f in warnings.filters],
        "root logger": [logging.root.level, len(logging.root.handlers), logging.root.manager.disable],
        "random": hash(random.getstate()),
        "numpy": hash(numpy.random.get_state()[1].tobytes()),
        "torch": hash(torch.get_rng_state().numpy().tobytes()),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "hooks": [repr(sys.excepthook), repr(sys.displayhook), repr(threading.excepthook)],
        "recursion": sys.getrecursionlimit(),
    }, {name: (log.level, len(log.handlers), log.disabled, log.propagate) for name, log in loggers.items()}
"""
IMPORT_THEIRS = "import torch, transformers, transformer_lens, circuitsvis"
IMPORT_OURS = """
import importlib.util
import tl_adapters
missing = [] if importlib.util.find_spec("lm_eval") else ["HarnessModel"]
for name in tl_adapters.EXPORTS:
    if name not in missing:
        getattr(tl_adapters, name)
"""
COMPARE = """
(before, loggers), (after, loggers_after) = first, state()
changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
changed |= {name: [loggers[name], loggers_after[name]] for name in loggers if loggers[name] != loggers_after[name]}
import json
print(json.dumps(changed, default=repr))
"""


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    """A notebook with the inline backend that imports every public name and then draws a plot of its own."""
    cells = [
        "%matplotlib inline\nimport matplotlib.pyplot as plt\n" + IMPORT_THEIRS,
        STATE + "first = state()",
        IMPORT_OURS,
        COMPARE,
        "plt.plot([1, 2, 4]);",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    return notebook


def test_importing_every_public_name_changes_no_state_of_the_process(notebook: nbformat.NotebookNode) -> None:
    (output,) = [o for o in notebook.cells[3].outputs if o.get("name") == "stdout"]
    assert json.loads(output.text) == {}


def test_a_users_plot_appears_after_every_public_name_was_imported(notebook: nbformat.NotebookNode) -> None:
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[4].outputs)
