"""results.json of the benchmarks, and the pages whose tables are written from it."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import hesitation
import linearizations
import organism
import planted
import plots
import pytest
import tables
from helpers.page_values import dose_curves
from markupsafe import Markup
from recorded import FOLDER, commit, machine, record, recorded, standalone, value_and_range

from tl_adapters.utils.measurement import Interval


def share(k: int, n: int, **more: Any) -> dict[str, Any]:
    return {"k": k, "n": n, **more}


def cell(plant: int = 2, seed: int = 0, found: int = 1, **changed: Any) -> dict[str, Any]:
    """What one run of planted.py has measured."""
    rates = {"firings_training": [700, 900], "firings_held_out": [100 + seed, 120]}
    made = {
        "family": "discriminants", "plant": plant, "recipe": "local", "seed": seed,
        "recall": {"all": share(found, 4, **rates), "1e-3": share(found, 4, **rates)},
        "precision": share(found, 5), "kl_left": {"value": 0.02 * found, "low": 0.0, "high": 0.1}, "l0": 0.4,
        "true_l0": 0.3, "alive": 5, "representable": {}, "seconds": {"wall": 50.0, "cpu": 40.0}, "training_tokens": 9,
        "held_out_tokens": 8, "settings": {"features": 64}, "commit": "abc", "machine": machine(),
    }  # fmt: skip
    return {**made, **changed}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    cells = [cell(), cell(seed=1, found=3), cell(recipe="bias", precision=share(0, 0)), cell(family="neurons", found=0)]
    for i, made in enumerate(cells):
        (tmp_path / f"{made['family']}-plant2-{made['recipe']}-seed{i}.json").write_text(json.dumps(made))
    (tmp_path / planted.REFERENCE).write_text(json.dumps({"seconds": {"wall": 100.0, "cpu": 80.0}}))
    return tmp_path


def test_a_benchmark_replaces_its_own_block_only(tmp_path: Path) -> None:
    assert recorded("planted", tmp_path) is None
    record("planted", {"a": 1}, folder=tmp_path)
    record("organism", {"b": 2}, ["abc", "abc", "abd"], folder=tmp_path)
    record("planted", {"c": 3}, folder=tmp_path)
    ours, other = recorded("planted", tmp_path), recorded("organism", tmp_path)
    assert ours is not None and other is not None
    assert ours["c"] == 3 and "a" not in ours and ours["commits"] == [commit()]
    assert other["b"] == 2 and other["commits"] == ["abc", "abd"]
    assert set(ours["machine"]) == {"cores", "threads", "torch", "gflops"} and "torch" in ours["versions"]
    assert ours["machine"]["gflops"] > 0
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".partial"]


def test_a_part_of_a_block_is_recorded_by_a_benchmark_of_its_own(tmp_path: Path) -> None:
    assert recorded("generation.vllm", tmp_path) is None
    for part, block in (("generation.vllm", {"value": 0.7}), ("generation", {"hf": 1.1, "means": {"direct": 1}})):
        record(part, block, folder=tmp_path)
        assert (found := recorded(part, tmp_path)) and found.items() >= block.items()
    record("generation", {"hf": 1.2}, folder=tmp_path)
    record("generation.vllm", {"value": 0.8}, ["abc"], folder=tmp_path)
    whole, part = recorded("generation", tmp_path), recorded("generation.vllm", tmp_path)
    assert whole and part and whole["hf"] == 1.2 and whole["vllm"] == part and "means" not in whole
    assert part["value"] == 0.8 and part["commits"] == ["abc"] and whole["commits"] == [commit()]


def test_a_recorded_command_names_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", [str(tmp_path / "benchmarks" / "planted.py"), str(tmp_path / "out"), "--seeds", "0"]
    )
    record("planted", {}, folder=tmp_path)
    block = recorded("planted", tmp_path)
    assert block is not None and block["command"] == "python benchmarks/planted.py runs/out --seeds 0"
    for name, block in json.loads((FOLDER / "results.json").read_text()).items():
        if isinstance(block, dict) and "command" in block:
            assert not re.search(r"[ =]/", block["command"]), name


def test_runs_are_pooled_and_the_range_is_over_runs(runs: Path) -> None:
    block = planted.block(runs, "local", {})
    assert block["recall"]["1e-3"] == {
        **value_and_range(0.5, [0.25, 0.75]), "k": 4, "n": 8, "firings_training": [700, 900],
        "firings_held_out": [100, 120],
    }  # fmt: skip
    assert block["precision"]["value"] == 0.4 and block["kl_left"] == value_and_range(0.04, [0.02, 0.06])
    assert block["seconds"] == value_and_range(0.5, [0.5, 0.5]) and block["seeds"] == [0, 1]
    assert set(block["families"]) == {"discriminants", "neurons"} and set(block["recipes"]) == {"local", "bias"}
    assert block["recipes"]["bias"]["precision"] is None
    lines = list(planted.rows(planted.summaries(runs)))
    assert len(lines) == 2 + 3 and "50% (25% to 75%)" in lines[2] and {line.count("|") for line in lines} == {16}


def test_rows_that_are_not_measured_again_stay(runs: Path) -> None:
    settings = {"settings": {"features": 64}, "recipe": "local"}
    rows = {"recipes": {"low_rank": {"l0": 1}, "local": {"l0": 2}}, "families": {"noise": {"l0": 3}}}
    block = planted.block(runs, "local", {**settings, **rows})
    assert list(block["recipes"]) == ["local", "bias", "low_rank"] and block["recipes"]["low_rank"] == {"l0": 1}
    assert list(block["families"]) == ["discriminants", "noise", "neurons"] and block["recipes"]["local"]["l0"] != 2
    (runs / "discriminants-plant2-local-seed0.json").unlink()
    (runs / "discriminants-plant2-local-seed1.json").unlink()
    local = planted.block(runs, "local", {**settings, "recipes": {"local": block["recipes"]["local"]}})
    assert local["recall"] == block["recall"]
    with pytest.raises(SystemExit, match="remove it first"):
        planted.block(runs, "local", {**settings, "settings": {"features": 9}})


def test_runs_are_grouped_by_plant_and_all_recipes_run_on_the_first_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["planted.py", "out", "--plants", "2", "3", "--seeds", "0"])
    runs = planted.runs(planted.arguments())
    assert len(runs) == 2 * (len(planted.RECIPES) + len(planted.FAMILIES) - 1)
    order = [(run.plant, run.family) for run in runs]
    assert len({key for i, key in enumerate(order) if i == 0 or order[i - 1] != key}) == 2 * len(planted.FAMILIES)
    assert {run.recipe for run in runs if run.family != planted.MAIN_FAMILY} == {"local"}
    monkeypatch.setattr("sys.argv", ["planted.py", "out", "--earlier", "--families", "discriminants"])
    assert {run.recipe for run in planted.runs(planted.arguments())} == set(planted.EARLIER)


def agreement() -> dict[str, Any]:
    features = {"all": share(2, 4), "1e-1": share(2, 4)}
    observed = {"features": features, "features_in_span": share(3, 4), "energy_in_span": 0.9}
    chance = {"features": {"all": share(0, 4)}, "features_in_span": share(1, 4), "energy_in_span": 0.3}
    return {"alive": [4, 4], "tokens": 100, "seeds": [{"observed": observed, "chance": chance}] * 2}


def test_every_table_of_the_page_is_made_of_the_blocks(runs: Path, tmp_path: Path) -> None:
    text = "".join(f"before\n<!-- table {name} -->\nold\n<!-- end -->\n" for name in tables.TABLES)
    assert tables.filled(text, tmp_path).count(tables.NOT_MEASURED) == len(tables.TABLES)
    record("planted", planted.block(runs, "local", {}), folder=tmp_path)
    ran = {"kl_share": 0.004, "l0": 4.0, "seconds": {"wall": 60.0, "cpu": 50.0}, "commit": "abc"}
    figures = organism.summary([ran, {**ran, "kl_share": 0.006}], agreement())
    record("organism", {"recipes": {"local": {"128": figures}}}, folder=tmp_path)
    page = tables.filled(text, tmp_path)
    others = [name for name, (block, _) in tables.TABLES.items() if block not in ("planted", "organism")]
    others.remove("provenance")  # names those that are there
    assert re.findall(r"^\| (\w+) \| `", page, re.M) == ["planted", "organism"]
    assert page.count(tables.NOT_MEASURED) == len(others) and "old" not in page
    assert page.count("before") == len(tables.TABLES)
    assert "| 1e-3 | 700 to 900 | 100 to 120 | 4 of 8 | 50% (25% to 75%) |" in page
    assert "| local stage | 128 | 0.50% (0.40% to 0.60%) | 4.00 | 4 | 50%; 0% | 75%; 25% | 90%; 30% |" in page
    assert "| edited gated neurons |" in page and tables.filled(page, tmp_path) == page
    assert organism.rows({"local": {"128": figures}})[-1].count("|") == organism.rows({})[0].count("|")


def studied(template: int, left: float) -> dict[str, Any]:
    """What benchmarks/hesitation.py reads of one study."""
    curves = dose_curves()
    curves["curves"]["circuit"][1]["behavior_left"] = {"value": left}
    del curves["curves"]["neurons"]
    total = {"total": {"value": 0.1, "low": 0.1 if template < 4 else -0.1}, "share": {"value": 0.5}}
    mediation = {"n": 2 * template} | (total if template else {})
    size = {"template": template, "n": 60, "alive": 2000}
    return {"criteria": [], "circuit": size, "mediation": mediation, "dose_curves": curves}


def test_studies_of_one_pair_are_means_over_its_seeds(tmp_path: Path) -> None:
    found = {"sums-0": studied(0, 0.1), "sums-1": studied(3, 0.3), "null-0": {"moments": {}}}
    block = hesitation.block(found, {"pairs": {"sums": {"seeds": 9}, "differences": {"seeds": 3}}})
    assert block["pairs"].pop("differences") == {"seeds": 3}  # was measured before and is not now
    assert set(block["pairs"]) == {"sums"} and block["pairs"]["sums"]["seeds"] == 2
    assert block["pairs"]["sums"]["full_strength"]["circuit"]["behavior_left"] == value_and_range(0.2, [0.1, 0.3])
    assert block["pairs"]["sums"]["full_strength"]["neurons"] == {}
    assert block["pairs"]["sums"]["templates"]["total"] == value_and_range(0.1, [0.1])
    assert "share" in block["pairs"]["sums"]["templates"]
    assert "share" not in hesitation.block({"sums-0": studied(4, 0.1)}, {})["pairs"]["sums"]["templates"]
    record("hesitation", block, folder=tmp_path)
    page = tables.filled("<!-- table interventions -->\n<!-- end --><!-- table templates -->\n<!-- end -->", tmp_path)
    assert "| built-in (sums) | the circuit | 20% (10% to 30%) | 0.002 | 65% |" in page
    assert "| built-in (sums) | nothing | 100% | 0 | 80% |" in page
    assert "| 1.5 (0 to 3) of 60 | 3 (0 to 6) of 2,000 | 0.10 | 50% |" in page


def test_linearizations_of_several_runs_keep_their_intervals(tmp_path: Path) -> None:
    def run(mean: float) -> dict[str, Any]:
        intervals = {name: Interval(mean - 0.1, mean + 0.1) for name in linearizations.LINEARIZATIONS}
        correlations = dict.fromkeys(linearizations.LINEARIZATIONS, mean)
        by_prompt = {name: [mean, None] for name in linearizations.LINEARIZATIONS}
        return {
            "rank_correlation": correlations, "rank_correlation_ci": intervals, "rank_correlation_prompts": 30,
            "rank_correlation_by_prompt": by_prompt,
        }  # fmt: skip

    block = linearizations.block({"sums-0": run(0.4), "sums-1": run(0.6)})
    assert {key: block["rank_correlation"]["relp"][key] for key in ("value", "range")} == value_and_range(
        0.5, [0.4, 0.6]
    )
    assert linearizations.interval(run(0.4), "relp") == "0.40 (0.30 to 0.50; range 0.40 to 0.40)"
    record("linearizations", block, folder=tmp_path)
    page = tables.filled("<!-- table linearizations -->\n<!-- end -->", tmp_path)
    assert "| RelP | 0.50 (0.40 to 0.60) | 0.40 (0.30 to 0.50); 0.60 (0.50 to 0.70) |" in page
    assert "over 30 prompts" in page


def test_the_pages_show_what_is_recorded() -> None:
    texts = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    assert sorted(tables.TABLES) == sorted(name for text in texts for _, name, _ in tables.TABLE.findall(text))
    for text in texts:
        assert tables.filled(text, FOLDER) == text, "run `make tables`"


def test_every_plot_of_the_docs_is_an_svg_that_a_browser_opens() -> None:
    """A drawing is of a string type that escapes; `standalone` gives a file of it that is none."""
    for path in plots.PLOTS_FOLDER.glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.tag.rpartition("}")[2] == "svg" and len(root), path.name
    alone = ElementTree.fromstring(standalone(Markup('<svg width="1"><g>&amp;</g></svg>')))
    assert alone.get("style") == "color: #000; background: #fff" and alone.find("g").text == "&"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", plots.PLOTS)
def test_the_plots_show_what_is_recorded(name: str) -> None:
    """Byte for byte, with the matplotlib that constraints.txt pins."""
    text, file = plots.drawn(name), plots.PLOTS_FOLDER / f"{name}.svg"
    linked = f"({name}.svg)" in (plots.PLOTS_FOLDER / "benchmarks.md").read_text(encoding="utf-8")
    if text is None:  # not recorded yet
        assert not file.exists() and not linked
    else:
        assert file.read_text(encoding="utf-8") == text, "run `make tables`"
        assert linked
