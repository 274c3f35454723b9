"""The benchmarks of running times, on small models and with times that are given."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import growth
import imports
import local_stage
import opening
import plots
import pytest
import tables
import training_step
from recorded import record
from training_step import Size

SMALL = Size(features=200, tokens=32, layers=2, vocab=64)


def page(table: str, folder: Path) -> str:
    return tables.filled(f"<!-- table {table} -->\n<!-- end -->", folder)


def test_sides_of_a_training_step_take_turns_and_the_first_run_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []

    def seconds(step: training_step.Step, cuts: range) -> float:
        turns.append(hash(step))
        for cut in cuts:
            step(cut)
        return float(len(turns))

    monkeypatch.setattr(training_step, "seconds", seconds)
    assert training_step.times(SMALL, 2) == {"ours": [4, 7], "reference": [5, 8], "products": [6, 9]}
    assert turns == turns[:3] * 3 and len(set(turns)) == 3


def test_series_of_growth_pass_through_the_standard_case() -> None:
    for name, values in growth.SERIES.items():
        assert getattr(growth.STANDARD, name) in values and list(values) == sorted(values)


def test_growth_is_timed_for_both_sides_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "STANDARD", SMALL)
    sizes: list[Size] = []
    made = growth.made
    monkeypatch.setattr(growth, "made", lambda size: sizes.append(size) or made(size))
    runs = growth.timed("layers", (2, 3), 1)
    assert [(size.layers, size.features) for size in sizes] == [(2, 200), (3, 200)]
    assert {value: {side: len(taken) for side, taken in sides.items()} for value, sides in runs.items()} == {
        value: dict.fromkeys(growth.SIDES, 1) for value in (2, 3)
    }
    assert growth.relative(runs, 2)["2"]["ours"] == {"value": 1.0, "range": [1.0, 1.0]}
    assert all(taken > 0 for sides in runs.values() for (taken,) in sides.values())


def grown() -> dict[str, growth.Runs]:
    """Runs in which a step takes a second per standard value, the formulas twice that, and the second run 1.5 times."""
    runs = {}
    for name, values in growth.SERIES.items():
        at = getattr(growth.STANDARD, name)
        runs[name] = {v: {"ours": [v / at, 1.5 * v / at], "reference": [2 * v / at, 4.5 * v / at]} for v in values}
    return runs


def test_growth_is_relative_to_our_step_at_the_standard_case(tmp_path: Path) -> None:
    block = growth.block(grown())
    assert block["features_x16"] == {"value": 16.0, "range": [16.0, 16.0]}
    assert block["seconds"] == {"value": 1.25, "range": [1.0, 1.5]}
    assert block["series"]["tokens"]["2048"]["reference"] == {"value": 10.0, "range": [8.0, 12.0]}
    record("growth", block, folder=tmp_path)
    text = page("growth", tmp_path)
    assert "| tokens | 2,048 | 4.00 | 10.00 (8.00 to 12.00) |" in text and "takes 16.00 times as long" in text
    for name in growth.SERIES:
        drawn = plots.drawn(tables.growth_plot(name), tmp_path)
        assert drawn is not None and f"({tables.growth_plot(name)}.svg)" in text
        assert "our step" in drawn and "the formulas" in drawn


def test_the_local_stage_reads_as_many_new_tokens_as_a_step_draws() -> None:
    pair, _ = local_stage.made(SMALL)
    stage = local_stage.stage_of(pair, SMALL)
    before = stage.tokens
    assert before == 2 * local_stage.RING * SMALL.tokens  # the ring, and as many that have replaced them
    stage.advance(3)
    assert stage.tokens == before + 3 * SMALL.tokens


def test_the_local_stage_is_timed_with_the_active_features_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = local_stage.times(SMALL, 2)
    assert found["l0"] == pytest.approx(training_step.DENSITY * SMALL.features, rel=0.5)
    assert all(len(found[name]) == 2 and min(found[name]) > 0 for name in ("local", "reading", "end_to_end"))
    given = {"local": [1.0, 4.0], "end_to_end": [2.0, 4.0], "reading": [0.5, 1.0], "l0": 2.0}
    monkeypatch.setattr(local_stage, "times", lambda size, repeats: given)
    monkeypatch.setattr(local_stage, "memory_of_process", lambda case, stage, threads: {"local": 30.0}.get(stage, 40.0))
    block = local_stage.block("features_1024", 2, 1)
    assert block["over_end_to_end"] == {"value": 0.75, "range": [0.5, 1.0]}
    assert block["reading"] == {"value": 0.375, "range": [0.25, 0.5]}
    record("local_stage", {"cases": dict.fromkeys(local_stage.CASES, block)}, folder=tmp_path)
    row = "| 8,192 features, vocabulary 4,096 | 0.75 (0.50 to 1.00) | 38% (25% to 50%) | 30 | 40 |"
    assert row in page("local_stage", tmp_path)


def test_a_random_pair_opens_from_its_folder(tmp_path: Path) -> None:
    size = Size(features=8, tokens=64, layers=1, vocab=300)
    base, target = opening.write_random_pair(tmp_path, size)
    adapters = opening.write_adapters(tmp_path / "adapters", base, target, size.features)
    pair = opening.load(adapters, base=str(base), target=str(target), device="cpu")
    assert pair.installed_adapters().n_features == size.features
    models, tokenizer = opening.in_transformers(base, target)
    assert [model.config.num_hidden_layers for model in models] == [1, 1] and tokenizer.chat_template


def test_an_opening_is_over_that_of_transformers_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = iter([99.0, 1.0, 6.0, 2.0, 8.0, 2.0])  # the first run is not counted
    monkeypatch.setattr(opening, "seconds", lambda act: next(taken))
    found = opening.opening(tmp_path, tmp_path, tmp_path, 2)
    assert found == {"over_transformers": {"value": 3.5, "range": [3.0, 4.0]}, "seconds": 7.0}
    record("opening", {"pairs": {"organism": found, "random": found}}, folder=tmp_path)
    assert "| built-in, 128 features | 3.5 (3.0 to 4.0) | 7.00 |" in page("opening", tmp_path)


def test_an_import_is_timed_in_a_fresh_process() -> None:
    fresh = "import sys\nassert not {'torch', 'tl_adapters'} & set(sys.modules)\nprint('a line of its own')"
    assert imports.seconds(fresh, 1) >= 0
    assert imports.seconds("time.sleep(0.05)", 1) >= 0.05
    with pytest.raises(subprocess.CalledProcessError):
        imports.seconds("import no_such_module_as_this", 1)


def test_imports_take_turns_and_are_over_that_of_transformer_lens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def seconds(statement: str, threads: int) -> float:
        asked.append(statement)
        return {"import transformer_lens": 4.0, "import torch": 1.0 + len(asked)}.get(statement, 2.0)

    monkeypatch.setattr(imports, "seconds", seconds)
    found: dict[str, Any] = imports.block(imports.STATEMENTS, 2, 1)
    assert asked == list(imports.STATEMENTS.values()) * 3
    assert found["torch"]["over_transformer_lens"] == {"value": 2.0, "range": [1.5, 2.5]}
    assert found["names"]["over_transformer_lens"]["value"] == 0.5 and found["names"]["seconds"] == 2.0
    record("imports", {"statements": found}, folder=tmp_path)
    assert "| `import torch` | 2.000 (1.500 to 2.500) | 8.00 |" in page("imports", tmp_path)
