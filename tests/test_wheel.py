"""`pip install .`, and a wheel, work without make: the wheel holds every file of the package, and runs by itself."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tl_adapters

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(out), str(ROOT)], check=True, timeout=120)
    (made,) = out.glob("*.whl")
    return made


def test_it_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    in_package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tl_adapters").rglob("*") if p.is_file()}
    in_package = {name for name in in_package if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        about = next(name for name in names if name.endswith(".dist-info/METADATA")).removesuffix("METADATA")
        entry_points = files.read(f"{about}entry_points.txt").decode()
    assert {name for name in names if not name.startswith(about)} == in_package
    assert any(name.endswith("d3.LICENSE") for name in names) and f"{about}licenses/LICENSE" in names
    assert "tl-adapters = tl_adapters.cli.main:main" in entry_points
    assert "tl_adapters = tl_adapters.vllm_plugin.registration:register" in entry_points


def test_it_runs_from_a_folder_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """pip installs it, its command starts, and the built-in pair, whose files are the wheel's own, answers."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(tmp_path / "installed"), str(wheel)], check=True, timeout=120)
    code = (
        "import tl_adapters\n"
        "from tl_adapters.study.open_run import load_organism_pair\n"
        "with load_organism_pair().routed('target') as model:\n"
        "    print(tl_adapters.respond(model, tl_adapters.organism.problems('tune', 1))[0].text)\n"
        "print(tl_adapters.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}
    command = [str(tmp_path / "installed" / "bin" / "tl-adapters"), "--version"]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (said.returncode, said.stdout.split()[-1]) == (0, tl_adapters.__version__), said.stderr
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == str(tmp_path / "installed" / "tl_adapters" / "__init__.py")
    assert "</think>" in ran.stdout
