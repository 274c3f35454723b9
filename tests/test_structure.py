"""The house: imports run one way, the command line is light, and nothing unsafe is used."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tl_adapters"

LEVELS = [
    {"activations", "attention", "columns", "errors", "fingerprints", "masks", "precision"},
    {"arguments", "atomic", "compatibility", "config", "decoding", "devices", "finite", "intervals"}
    | {"losses", "posting", "strict_json", "tokenization", "trackers"},
    {"checking", "completions", "data", "file_hashes", "grids", "organism", "replies", "results", "saelens"}
    | {"transcoder", "views", "vocabulary"},
    {"chat", "checkpoints", "endpoint", "graphs", "likelihoods", "report", "server", "viewer"},
    {"architectures", "generation", "marks", "pruning", "sources"},
    {"adapter", "batching", "disagreement", "graph_files", "harness", "references"},
    {"features", "formats", "mixing", "recording", "routing", "runfolder"},
    {"agreement", "bridged", "hooked", "hub", "identity", "parts", "sweep_pages"},
    {"backends", "fitting"},
    {"doctor", "paired"},
    {"attaching", "authors", "baselines", "behaviors", "circuits", "effects", "faithfulness"}
    | {"interventions", "linear", "matching", "objective", "opening", "streams"},
    {"benchmarks", "dashboards", "feature_views", "freezing", "gradients", "moments", "publishing"}
    | {"store_files", "training", "variants"},
    {"answering", "attribution", "banning", "circuit_controls", "circuit_criteria", "circuit_roles"}
    | {"circuit_search", "counting", "feature_store", "planting", "subjects", "tasks"},
    {"benchmarking", "circuit_drawing", "circuit_finding", "circuit_trials", "collecting", "excerpts"}
    | {"feature_pages", "labels", "neuronpedia", "validity"},
    {"circuit_cells", "circuit_tuning", "describing", "graph_pages", "judging", "trials"},
    {"circuit_tables", "hesitation", "interpreting"},
    {"circuit_pages", "labelling"},
    {"circuit_stage"},
    {"study"},
    {"sweep"},
    {"cli"},
]
"""From the bottom up. A room imports rooms of lower levels only; results imports atomic, organism its own modules."""
WITHIN_A_LEVEL = {("results", "atomic"), ("organism", "atomic")}


def rooms() -> dict[str, set[str]]:
    """Room -> rooms it imports. A package is one room."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tl_adapters"):
                tail = node.module.split(".")[1:]
                names = tail[:1] or [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name.split(".")[1] for a in node.names if a.name.startswith("tl_adapters.")]
            found.setdefault(room, set()).update(n for n in names if n not in (room, "__version__"))
    return found


def test_imports_run_one_way() -> None:
    level = {room: i for i, level in enumerate(LEVELS) for room in level}
    found = rooms()
    assert set(found) == set(level), "a room without a level, or a level without a room"
    for room, imported in found.items():
        for other in imported:
            assert level[other] < level[room] or (room, other) in WITHIN_A_LEVEL, f"{room} imports {other}"


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "transformer_lens", "sae_lens", "matplotlib", "numpy")
    code = (
        "import sys; import tl_adapters; from tl_adapters.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert "demo" in out


def test_nothing_unsafe() -> None:
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "joblib", "shelve", "dill"} & set(modules), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "yaml.load", "eval", "exec"), f"{path}: {called}"
                trusted = [ast.unparse(k.value) for k in node.keywords if k.arg == "trust_remote_code"]
                # Left out, transformers asks on a terminal whether to run the model's own code.
                asks = called.startswith("Auto") and called.endswith(".from_pretrained")
                assert trusted == ["False"] if asks else trusted in ([], ["False"]), f"{path}: {called}"


def test_every_module_says_what_it_is_and_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} does not say what it is"
