"""What benchmarks/generation.py records: cases that were not measured again stay, and means are over all of them."""

from __future__ import annotations

from typing import Any

import generation
import pytest


def case(model: str, batch: int, *ratios: float, sampled: bool = False) -> dict[str, Any]:
    return {"model": model, "batch": batch, "sampled": sampled, **{side: list(ratios) for side in generation.SIDES}}


def test_cases_can_be_recorded_in_parts() -> None:
    first = generation.block([case("random", 16, 1.0, 4.0, 2.0), case("organism", 1, 2.0, 2.0, 2.0)])
    assert first["cases"][0]["hooked"] == {"value": 2.0, "range": [1.0, 4.0], "runs": [1.0, 4.0, 2.0]}
    assert first["hf"] == first["means"]["hooked"]["value"] == pytest.approx(2.0)
    again = generation.with_earlier([case("random", 16, 8.0, 8.0, 8.0), case("smollm2", 1, 1.0, 1.0, 1.0)], first)
    assert [(one["model"], one["hooked"]) for one in again] == [
        ("organism", [2.0] * 3), ("random", [8.0] * 3), ("smollm2", [1.0] * 3),
    ]  # fmt: skip
    assert generation.block(again)["hf"] == pytest.approx(16 ** (1 / 3))
    assert generation.with_earlier([case("random", 1, 1.0)], {}) == [case("random", 1, 1.0)]
    with pytest.raises(SystemExit, match="another number of runs"):
        generation.with_earlier([case("random", 1, 1.0)], first)
