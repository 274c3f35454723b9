"""The house: imports run one way, the command line is light, and nothing unsafe is used."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import tl_adapters
from tl_adapters.cli.main import SUBCOMMANDS

PACKAGE = Path(__file__).parents[1] / "tl_adapters"

ORDER = ["errors", "processes", "utils", "config", "organism", "checkpoints", "adapters", "data", "models"]
ORDER += ["local_stage", "training", "features", "interventions", "attribution", "generation", "evaluation"]
ORDER += ["autointerp", "vllm_plugin", "interop", "circuits", "pages", "study", "cli", "__main__"]
"""From the bottom up: a package imports those before it and itself."""
SHORTHANDS = {
    "models.paired_model": {"interventions.feature_edits", "evaluation.pair_check"},
    "attribution.graph": {"pages.graph_diagram"},
    "circuits.circuit": {"pages.circuit_diagram"},
}
"""The modules that reach up the order, by imports within methods: PairedModel has `ablated`, its like, and `check` as
methods, and a graph and a circuit draw themselves in a notebook."""


def imports() -> dict[str, set[str]]:
    """Module -> modules of this package that it imports, wherever in the file."""
    modules = {".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tl_adapters":
                inside = node.module.removeprefix("tl_adapters").lstrip(".")
                whole = {f"{inside}.{alias.name}".lstrip(".") for alias in node.names}
                names |= (whole & modules) or {inside}
            elif isinstance(node, ast.Import):
                names |= {a.name.removeprefix("tl_adapters.") for a in node.names if a.name.startswith("tl_adapters.")}
        found[module] = {f"{n}.__init__" if f"{n}.__init__" in modules else n for n in names if n}
    for module, higher in SHORTHANDS.items():
        found[module] -= higher
    return found


def package_of(module: str) -> str:
    return module.split(".")[0]


def test_packages_import_one_way() -> None:
    found = {module: names for module, names in imports().items() if module != "__init__"}
    assert {package_of(m) for m in found} == set(ORDER), "a package without a place in ORDER, or the reverse"
    for module, names in found.items():
        for other in names:
            assert ORDER.index(package_of(other)) <= ORDER.index(package_of(module)), f"{module} imports {other}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    found = imports()
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a cycle: {' -> '.join([*way, module])}"
        if module not in done:
            for other in found.get(module, ()):
                visit(other, (*way, module))
            done.add(module)

    for module in found:
        if module != "__init__":
            visit(module, ())


def test_shorthands_import_only_when_they_are_called() -> None:
    for module, higher in SHORTHANDS.items():
        tree = ast.parse((PACKAGE / Path(*module.split("."))).with_suffix(".py").read_text())
        at_top = {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not {f"tl_adapters.{name}" for name in higher} & at_top


PACKAGES = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def test_packages_are_few_and_of_readable_size() -> None:
    assert 12 <= len(PACKAGES) <= 20
    for package in PACKAGES:
        modules = [path for path in package.glob("*.py") if not path.stem.startswith("__")]
        assert 3 <= len(modules) <= 15, f"{package.name} holds {len(modules)} modules"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_says_what_each_module_is_for(package: Path) -> None:
    tree = ast.parse((package / "__init__.py").read_text())
    if package.name != "organism":  # whose names are public: `organism.BASE`, `organism.problems`
        assert len(tree.body) == 1, f"{package.name}/__init__.py holds more than a docstring"
        listed = re.findall(r"^\* `(\w+)`: \S", ast.get_docstring(tree) or "", re.M)
        assert listed == sorted(path.stem for path in package.glob("*.py") if not path.stem.startswith("__"))


def test_functions_and_classes_fit_on_a_screen() -> None:
    large = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > (250 if isinstance(node, ast.ClassDef) else 60):
                    large.append(f"{path.relative_to(PACKAGE)}: {node.name} has {lines} lines")
    assert not large


def test_the_front_door_has_one_list() -> None:
    """`EXPORTS` is the list; what type checkers read and the modules themselves agree with it."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    assert {
        alias.asname: (node.module or "").removeprefix("tl_adapters.")
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    } == tl_adapters.EXPORTS
    assert tl_adapters.__all__ == sorted(tl_adapters.EXPORTS)
    assert list(tl_adapters.EXPORTS) == sorted(tl_adapters.EXPORTS, key=lambda name: (name.lower(), name))
    for name, module in tl_adapters.EXPORTS.items():
        tree = ast.parse((PACKAGE / Path(*module.split("."))).with_suffix(".py").read_text())
        assert name in defined(tree), f"{module} does not define {name}"


def defined(tree: ast.Module) -> set[str]:
    """Names that a module defines at its top level."""
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [target for n in tree.body if isinstance(n, ast.Assign) for target in n.targets]
    names |= {t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)}
    return names | {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def test_common_options_of_the_public_interface_are_given_by_name() -> None:
    """What many functions take is nowhere known by its place, which differs from one function to the next."""
    common = {"tokens_per_batch", "batch_size", "seed", "progress", "dtype", "device", "n", "limit"}
    by_place = []
    for name, module in tl_adapters.EXPORTS.items():
        tree = ast.parse((PACKAGE / Path(*module.split("."))).with_suffix(".py").read_text())
        public = [node for node in tree.body if getattr(node, "name", None) == name]
        methods = [node for one in public if isinstance(one, ast.ClassDef) for node in one.body]
        for node in (*public, *methods):
            if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
                given = [argument.arg for argument in node.args.args]
                optional = given[len(given) - len(node.args.defaults) :]
                by_place += [f"{name}: {node.name}({argument}=)" for argument in optional if argument in common]
    assert not by_place


def test_a_renamed_name_still_works_and_warns() -> None:
    for old, new in tl_adapters.RENAMED.items():
        with pytest.warns(FutureWarning, match=f"{old} is now tl_adapters.{new}"):
            assert getattr(tl_adapters, old) is getattr(tl_adapters, new)


def imported_by(*argv: str) -> tuple[list[str], set[str]]:
    """Lines that the command line prints, and packages outside the standard library that it imports, ours by module."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "from tl_adapters.cli.main import main\n"
        f"main({list(argv)})\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    *shown, modules = out.splitlines()
    outside = {name for name in modules.split() if name.split(".")[0] not in sys.stdlib_module_names}
    return shown, {name if name.startswith("tl_adapters") else name.split(".")[0] for name in outside}


def test_help_imports_the_command_line_and_typer_alone() -> None:
    ours = {"tl_adapters", "tl_adapters.errors", "tl_adapters.cli", "tl_adapters.utils", "tl_adapters.utils.printing"}
    ours |= {
        f"tl_adapters.cli.{path.stem}" for path in (PACKAGE / "cli").glob("*.py") if not path.stem.startswith("__")
    }
    shown, imported = imported_by("--help")
    assert imported <= ours | {"typer", "annotated_doc", "shellingham"}
    assert any("demo" in line for line in shown)
    shown, imported = imported_by("train", "--help")
    assert {name for name in imported if name.startswith("tl_adapters")} <= ours
    assert not imported & {"torch", "transformers", "transformer_lens", "numpy", "yaml", "rich"}
    assert any("--resume" in line for line in shown)


def test_every_library_that_is_imported_is_a_declared_dependency() -> None:
    """Imports at the top of a module are of dependencies; those of extras happen inside functions."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    named = lambda lines: {re.split(r"[^\w-]", line)[0].lower().replace("-", "_") for line in lines}  # noqa: E731
    required = named(project["dependencies"])
    optional = set().union(
        *(named(lines) for extra, lines in project["optional-dependencies"].items() if extra != "dev")
    )
    distributions = {"yaml": "pyyaml", "PIL": "pillow"}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"tl_adapters"}:
                allowed = required if node in tree.body else required | optional
                assert distributions.get(name, name).lower() in allowed, f"{path.name} imports {name}"


def test_one_module_prints() -> None:
    """Ruff's T20 refuses `print` elsewhere; nothing else writes to the streams, where names of others would pass."""
    root = PACKAGE.parent
    ignores = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]["per-file-ignores"]
    inside = [pattern for pattern, rules in ignores.items() if pattern.startswith("tl_adapters/") and "T20" in rules]
    assert inside == ["tl_adapters/utils/printing.py"]
    for path in PACKAGE.rglob("*.py"):
        if path != root / inside[0]:
            assert not re.search(r"\bstd(out|err)(\.buffer)?\.write", path.read_text()), path


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


WRITERS = (
    {
        f"os.{name}"
        for name in ("replace", "rename", "remove", "unlink", "rmdir", "mkdir", "makedirs", "link", "symlink")
    }
    | {f"shutil.{name}" for name in ("rmtree", "move", "copy", "copy2", "copyfile", "copytree")}
    | {"os.open", "os.truncate", "os.chmod", "os.utime", "os.removedirs", "os.renames", "save_file", "save_model"}
)
"""Functions that write, rename or remove."""
WRITING_METHODS = {"write_text", "write_bytes", "mkdir", "rmdir", "unlink", "rename", "touch", "chmod", "symlink_to"}
WRITING_METHODS |= {"hardlink_to", "tofile"}
"""Methods of paths and arrays that do."""


def test_only_one_module_writes_renames_or_removes() -> None:
    """Whatever writes without `utils.files` is not whole or not at all, or has a name that two processes share."""
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "utils" / "files.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}; use the functions of utils/files.py"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {f"{getattr(node, 'module', None) or ''}.{alias.name}".lstrip(".") for alias in node.names}
                shorter = {".".join(name.split(".")[-1:]) for name in names} | names
                assert not shorter & (WRITERS | {"tempfile", "filelock"}), place
                assert not any(name.startswith(("tempfile.", "filelock.")) for name in names), place
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in WRITERS, f"{called} in {place}"
                method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                assert method not in WRITING_METHODS, f"{called} in {place}"
                # A string's replace takes two arguments; with one it is a path's, which overwrites.
                assert not (method == "replace" and len(node.args) == 1), f"{called} in {place}"
                if method == "open" or called == "open":
                    modes = [*node.args[(called == "open") :][:1], *(k.value for k in node.keywords if k.arg == "mode")]
                    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
                    assert all(isinstance(text, str) and not set(text) & set("wax+") for text in texts), place


def test_a_block_that_depends_on_the_written_one_is_changed_under_the_lock() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "write_results":
                place = f"{path.relative_to(PACKAGE)}:{node.lineno}; use changed_results"
                assert "read_results" not in ast.unparse(node), place


HTML_TAG = re.compile(
    r"</?(?:html|head|body|meta|title|link|style|script|div|span|p|a|b|i|br|h[1-6]|ul|ol|li|dl|dt|dd|table|thead|tbody"
    r"|tr|th|td|pre|code|mark|small|figure|figcaption|img|iframe|form|input|button|svg|g|path|text|rect|circle|line)"
    r"(?=[\s/>])",
    re.IGNORECASE,
)
HTML_IN_PYTHON = {"interop/sae_dashboard.py"}
"""Modules with HTML in strings: the page of another package is taken apart at its tags."""
MARKED_AS_HTML = {"utils/html.py", "utils/notebook.py", "pages/plots.py", "interop/sae_dashboard.py"}
MARKED_AS_HTML |= {"interop/model_card.py"}
"""Modules that call `Markup`, which keeps a template from escaping a text: of files of this package, of a library's
script, of matplotlib, of another package's page; and sentences of ours in the model card."""


def test_a_command_in_a_message_is_written_by_the_function_that_quotes() -> None:
    """A folder's name may hold what a shell acts on, so no command is put together from text and values."""
    subcommand = "|".join(function.__name__ for function in SUBCOMMANDS)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                assert not re.search(rf"tl-adapters ({subcommand}) [^.()]*\0", text), f"{path}: {text}"


def test_html_stands_in_templates_alone() -> None:
    """Where Python writes HTML, one value is forgotten sooner or later; a template escapes every value."""
    found, marking = set(), set()
    for path in PACKAGE.rglob("*.py"):
        tree, name = ast.parse(path.read_text()), path.relative_to(PACKAGE).as_posix()
        bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
                found |= {name} if HTML_TAG.search(node.value) else set()
            marking |= {name} if isinstance(node, ast.Call) and ast.unparse(node.func) == "Markup" else set()
    assert (found, marking) == (HTML_IN_PYTHON, MARKED_AS_HTML)


def test_templates_escape_everything_and_run_nothing_inline() -> None:
    templates = {path: path.read_text() for path in (PACKAGE / "pages" / "templates").rglob("*.j2")}
    assert len(templates) > 10
    for path, text in templates.items():
        assert path.name.endswith((".html.j2", ".svg.j2", ".md.j2"))
        assert not re.search(
            r"\|\s*safe|autoescape|\son\w+\s*=|javascript:|<script[^>]*src|https?://(?!www\.w3\.org)", text
        )
        # An address from data passes the filter `address`, which gives nothing for one that leads elsewhere.
        addresses = re.findall(r'(?:href|src)="([^#"]*{{[^"]*)"', text)  # after "#" it stays on the page
        # Before it stand as many "../" as there are folders between a page and its run.
        assert set(addresses) <= {"{{ target }}", "{{ up }}{{ target }}"}, path
        assert "{{ up }}" not in text or '{% set up = "../" * page.up %}' in text, path
        assert not addresses or re.search(r"{% set target = [\w.]+ \| address %}", text), path
        frameless = path.parent.name in ("notebook", "shared") or not path.name.endswith(".html.j2")
        assert frameless or text.startswith('{% extends "shared/layout.html.j2" %}'), f"{path} has no content policy"


def test_every_module_says_what_it_is_and_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} does not say what it is"


def test_the_pre_commit_hook_formats_as_the_tests_do() -> None:
    root = PACKAGE.parent
    pinned = re.search(r"^ruff==(\S+)$", (root / "constraints.txt").read_text(), re.M)
    hook = re.search(r"ruff-pre-commit\n\s+rev: v(\S+)$", (root / ".pre-commit-config.yaml").read_text(), re.M)
    assert pinned and hook and pinned[1] == hook[1]


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((PACKAGE.parent / "CITATION.cff").read_text())
    assert citation["version"] == tl_adapters.__version__


WHERE = tomllib.loads((Path(__file__).parent / "where.toml").read_text())


@pytest.mark.parametrize("question", WHERE)
def test_what_a_stranger_asks_for_is_where_the_table_says(question: str) -> None:
    """Moving a definition means answering the question anew."""
    file, definition = WHERE[question]
    path = PACKAGE.parent / file
    assert path.is_file(), f"{file} moved; where is it now?"
    assert definition in defined(ast.parse(path.read_text())), f"{definition} is not defined in {file}"


def test_contributing_names_what_is_there() -> None:
    root = PACKAGE.parent
    text = (root / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`([\w/]+(?:\.py|\.toml|\.txt|/))`", text):
        assert any((place / name).exists() for place in (root, PACKAGE)), f"CONTRIBUTING.md names {name}"
    assert re.findall(r"^\| `(\w+)/` \|", text, re.M) == [package for package in ORDER if (PACKAGE / package).is_dir()]
    functions = {"render": "utils/html.py"}
    for function, file in functions.items():
        assert function in text and function in defined(ast.parse((PACKAGE / file).read_text()))


def test_the_makefile_and_the_workflow_name_files_that_are_there() -> None:
    root = PACKAGE.parent
    files = [root / "Makefile", *(root / ".github").rglob("*.yml"), *(root / ".ci").iterdir()]
    named = {path for file in files for path in re.findall(r"(?:tests|benchmarks)/[\w/]+\.py", file.read_text())}
    assert len(named) > 15
    assert not [path for path in named if not (root / path).is_file()]


def test_a_constant_means_one_thing() -> None:
    """No two modules have a public constant of one name: FILE, SHARE or KINDS would mean something else in each."""
    homes: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for name in defined(ast.parse(path.read_text())):
            if name.isupper() and len(name) > 1 and not name.startswith("_"):
                homes.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}
