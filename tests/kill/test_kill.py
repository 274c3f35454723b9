"""A small share of the kills; `make kill` runs them all, and docs/reliability.md holds the counts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from kill.killing import _start, _wait, kill_often, refuse_often, run_two_at_once
from kill.subcommands import SUBCOMMANDS, Subcommand, prepare, shrink

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The inputs of every subcommand, made in a process whose sizes are small."""
    if os.environ.get("OMP_NUM_THREADS") != "1":
        pytest.skip("processes are forked, which needs OMP_NUM_THREADS=1")
    folder = tmp_path_factory.mktemp("kill") / "prepared"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (("open_run", "ORGANISM_TRACES"), ("demo", "DEMO_SCALE"), ("evaluate", "StudyScale")):
            patch.setattr(f"tl_adapters.study.{module}.{name}", None)  # undone at the end
        shrink()
        assert _wait(_start(Subcommand(prepare), folder)) == 0, (folder.parent / "stderr").read_text()
        yield folder


@pytest.mark.parametrize("name", ["train", "features", "attribute", "benchmark"])
@pytest.mark.parametrize("how", [kill_often, refuse_often, run_two_at_once])
def test_what_was_stopped_ends_as_if_it_had_not_been(name: str, how: object, prepared: Path, tmp_path: Path) -> None:
    tally = how(SUBCOMMANDS[name], prepared, tmp_path, 2, seed=1)
    assert not tally.failures
