"""A small share of the fuzz: readers accept damaged files or refuse them with our error, and do nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.fuzzing import fuzz
from fuzz.readers import READERS

CASES = 40


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    """To repeat a case: PYTHONPATH=tests python -m fuzz --reader NAME --first CASE --cases 1."""
    tally = fuzz(READERS[name], tmp_path / "files", CASES, seed=1)
    assert not tally.strays, f"seed 1: {tally.strays[:3]}"
    assert tally.refused > 0 and tally.cases == CASES
