"""Sampled responses: the same whether stopped or not, independent of torch's generator, and scored by problem."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers.random_models import random_model, randomise

from tl_adapters import organism
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.cli.main import main
from tl_adapters.config import RunConfig
from tl_adapters.evaluation import sampled_responses
from tl_adapters.evaluation.response_metrics import measure_responses
from tl_adapters.evaluation.sampled_responses import (
    RESPONSE_SETTINGS_FILE,
    RESPONSES_FILE,
    ResponseOptions,
    SampledResponse,
    SamplingError,
    sample_responses,
    score_responses,
)
from tl_adapters.generation.responses import Response, respond
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism.recipe import build_tokenizer
from tl_adapters.study import benchmark as benchmarking
from tl_adapters.study.benchmark import BenchmarkError, BenchmarkVariant, benchmark_run
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.utils.files import FolderBusyError
from tl_adapters.utils.results import read_results, write_results

ASKED = organism.problems("tune", 7, n_terms=(2, 3, 5))
DRAWN = ResponseOptions(samples=3, temperature=1.0, top_p=0.9, max_new_tokens=6, batch_size=3)


@pytest.fixture(scope="module")
def model() -> Any:
    tokenizer = build_tokenizer()
    base, target = (random_model(s, torch.float32, vocab_size=len(tokenizer)) for s in (1, 2))
    return randomise(PairedModel.from_pretrained(base, target, tokenizer=tokenizer)).model


def answered(model: Any, folder: Path, sampling: ResponseOptions = DRAWN, **about: str) -> list[SampledResponse]:
    return sample_responses(model, ASKED, sampling, folder, about, progress=False)


@pytest.fixture(scope="module")
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    answered(model, folder)
    return folder


def test_every_problem_has_one_response_per_sample(model: Any, whole: Path) -> None:
    found = answered(model, whole)
    assert sorted((a.sample, a.problem) for a in found) == [(s, p) for s in range(3) for p in range(len(ASKED))]
    assert [a.sample for a in found] == sorted(a.sample for a in found)
    by_sample = [{a.problem: a.response.tokens for a in found if a.sample == s} for s in range(3)]
    assert by_sample[0] != by_sample[1] != by_sample[2]
    lines = [json.loads(line) for line in (whole / RESPONSES_FILE).read_text().splitlines()]
    assert all(ASKED[line["problem"]].question == line["question"] for line in lines)
    assert [line["text"] for line in lines] == [a.response.text for a in found]


@pytest.mark.parametrize("torn", [0, 1, 10_000, -1])
def test_a_run_stopped_anywhere_ends_with_the_same_responses(
    model: Any, whole: Path, tmp_path: Path, torn: int
) -> None:
    """Whole batches are read again, an incomplete one is removed, and the draws do not depend on either."""
    text = (whole / RESPONSES_FILE).read_text()
    (tmp_path / RESPONSE_SETTINGS_FILE).write_bytes((whole / RESPONSE_SETTINGS_FILE).read_bytes())
    (tmp_path / RESPONSES_FILE).write_text(text[:torn])
    torch.manual_seed(torn)
    before = torch.get_rng_state()
    assert answered(model, tmp_path) == answered(model, whole)
    assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / RESPONSES_FILE).read_text() == text


def test_a_run_stopped_within_a_batch_repeats_that_batch_only(
    model: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def interrupted(*args: Any, **options: Any) -> list[Response]:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return respond(*args, **options)

    monkeypatch.setattr(sampled_responses, "respond", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answered(model, tmp_path)
    assert len((tmp_path / RESPONSES_FILE).read_text().splitlines()) == 3 + 3 + 1 + 3
    answered(model, tmp_path)
    assert len(calls) == 5 + 5, "batches that were answered are asked again"
    assert (tmp_path / RESPONSES_FILE).read_bytes() == (whole / RESPONSES_FILE).read_bytes()


def test_samples_can_be_added_later_and_fewer_are_the_first_ones(model: Any, whole: Path, tmp_path: Path) -> None:
    one = answered(model, tmp_path, replace(DRAWN, samples=1))
    assert one == answered(model, whole, replace(DRAWN, samples=1)) == answered(model, whole)[: len(ASKED)]
    assert answered(model, tmp_path) == answered(model, whole)


def test_another_seed_draws_other_responses(model: Any, whole: Path, tmp_path: Path) -> None:
    other = answered(model, tmp_path, replace(DRAWN, seed=1))
    assert [a.response.tokens for a in other] != [a.response.tokens for a in answered(model, whole)]


def test_no_two_batches_share_their_draws(model: Any, tmp_path: Path) -> None:
    found = sample_responses(model, ASKED[:1] * 4, replace(DRAWN, batch_size=1), tmp_path, {}, progress=False)
    assert len({a.response.tokens for a in found}) == 12


def test_greedy_responses_are_those_of_respond(model: Any, tmp_path: Path) -> None:
    found = answered(model, tmp_path, ResponseOptions(max_new_tokens=6, batch_size=2, prefill="<think>"))
    expected = respond(model, ASKED, max_new_tokens=6, prefill="<think>")
    assert [a.response for a in sorted(found, key=lambda a: a.problem)] == expected


@pytest.mark.parametrize(
    ("change", "about", "says"),
    [
        ({"temperature": 0.5}, {}, "temperature 1.0, and now it is 0.5"),
        ({"prefill": "<think>"}, {}, "prefill '', and now it is '<think>'"),
        ({}, {"route": "hybrid"}, "route None, and now it is 'hybrid'"),
    ],
)
def test_responses_with_different_settings_are_not_mixed(
    model: Any, whole: Path, change: dict[str, Any], about: dict[str, str], says: str
) -> None:
    before = (whole / RESPONSES_FILE).read_bytes(), (whole / RESPONSE_SETTINGS_FILE).read_bytes()
    with pytest.raises(SamplingError, match=says):
        answered(model, whole, replace(DRAWN, **change), **about)
    with pytest.raises(SamplingError, match="n 7, and now it is 6"):
        sample_responses(model, ASKED[:6], DRAWN, whole, {}, progress=False)
    assert ((whole / RESPONSES_FILE).read_bytes(), (whole / RESPONSE_SETTINGS_FILE).read_bytes()) == before


def test_two_processes_in_one_folder_are_refused(model: Any, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(FolderBusyError, match="Another process"):
        answered(model, tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples": 2, "temperature": 0.0}, "At temperature 0 all 2 samples are equal"),
        ({"samples": 0}, "samples is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_k": -1}, "top_k -1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SamplingError, match=says):
        ResponseOptions(**options)


def test_pass_at_1_is_the_mean_over_problems_of_the_share_of_right_answers() -> None:
    def said(correct: bool, n: int, text: str = "") -> Response:
        return Response((1,), (2,) * n, text, not correct, correct)

    answers = [
        SampledResponse(p, s, said((p, s) in {(0, 0), (0, 1), (2, 1)}, 10 * (p + 1), "Wait. Hmm." if p == 1 else ""))
        for s in range(2)
        for p in range(3)
    ]
    found = score_responses(answers, "test")
    assert (found.n, found.samples, found.pass_at_1, found.truncated) == (3, 2, 0.5, 0.5)
    assert found.length == 20 and found.hesitation_per_1k == pytest.approx(1000 * 2 / 120)
    assert score_responses(answers, "test", ("wait", "hmm")).hesitation_per_1k == pytest.approx(1000 * 4 / 120)
    assert score_responses(answers, "test", ("wai",)).hesitation_per_1k == 0
    once = score_responses([a for a in answers if a.sample == 0], "test")
    plainly = measure_responses([a.response for a in answers if a.sample == 0], "test")
    assert (once.pass_at_1, once.ci["pass_at_1"]) == (plainly.accuracy, plainly.ci["accuracy"])
    # Answers to one problem are not independent: saying all of them again narrows no interval.
    again = score_responses(answers + [replace(a, sample=a.sample + 2) for a in answers], "test")
    assert again.ci == found.ci and again.samples == 4


# -- of a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on the built-in pair, with random adapters."""
    folder = tmp_path_factory.mktemp("run")
    pair = randomise(load_organism_pair(), n_features=16)
    pair.installed_adapters().save_pretrained(folder / "adapters")
    (folder / "config.json").write_text(json.dumps(RunConfig().to_dict()))
    write_results(folder, pair={"base": organism.BUILTIN_BASE, "target": organism.BUILTIN_TARGET})
    return folder


def test_the_subcommand_fills_a_table_and_repeats_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["--limit", "6", "--max-new-tokens", "60", "--quiet"]
    assert main(["benchmark", str(run), "--route", "target", *short]) == 0
    assert main(["benchmark", str(run), "--ablate", "1.2", "0.3", *short]) == 0
    assert main(["benchmark", str(run), "--insert", "1.2", "--open-thinking", *short]) == 0
    out = capsys.readouterr().out
    assert "builtin, target: pass@1" in out and "next: tl-adapters benchmark" in out
    block = read_results(run)["benchmarks"]["builtin"]
    assert set(block) == {"target", "replacement without 0.3, 1.2", "hybrid with only 1.2"}
    assert block["target"]["pass_at_1"] > 0.5 and block["target"]["n"] == 6
    settings = block["hybrid with only 1.2"]["settings"]
    assert settings["insert"] == ["1.2"] and settings["prefill"] == "<think>" and settings["route"] == "hybrid"
    folder = run / "benchmarks" / "builtin" / "replacement-without-0.3-1.2"
    assert len((folder / RESPONSES_FILE).read_text().splitlines()) == 6

    def never(*args: object, **options: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(sampled_responses, "respond", never)
    assert main(["benchmark", str(run), "--route", "target", *short]) == 0
    assert read_results(run)["benchmarks"]["builtin"] == block


def test_responses_are_those_of_the_variant(run: Path, tmp_path: Path) -> None:
    """The responses on disk are those of the route with the features ablated."""
    features = (FeatureId(1, 2), FeatureId(0, 3))
    options = {"max_new_tokens": 8}
    (measured,) = benchmark_run(
        run, variant=BenchmarkVariant(ablate=features), options=options, n=5, out=tmp_path, progress=False
    )
    pair = benchmarking.open_run(run)
    for feature in features:
        pair.installed_adapters()[feature.layer].W_dec.data[feature.index] = 0
    with pair.routed("replacement") as model:
        expected = [r.text for r in respond(model, organism.problems("report", 5), max_new_tokens=8)]
    lines = [json.loads(line) for line in (measured.folder / RESPONSES_FILE).read_text().splitlines()]
    assert [line["text"] for line in sorted(lines, key=lambda line: line["problem"])] == expected


def test_names_of_variants_with_many_features_are_short_and_unique() -> None:
    names = {BenchmarkVariant(ablate=tuple(FeatureId(0, i) for i in range(n))).variant.name for n in range(2, 40)}
    assert len(names) == 38 and all(len(name) < 80 for name in names)
    one, other = FeatureId(1, 2), FeatureId(0, 3)
    assert BenchmarkVariant(ablate=(one, other)).variant.name == BenchmarkVariant(ablate=(other, one)).variant.name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "gsm8"], "Did you mean 'gsm8k'?"),
        (["--tasks", "builtin,gsm8k=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--ablate", "1.2", "--route", "target"], "need the route replacement; got the route target"),
        (["--insert", "1.2", "--route", "replacement"], "need the route hybrid; got the route replacement"),
        (["--ablate", "1-2"], "'1-2' does not name a feature"),
        (["--ablate", "1.99"], "There are no features 1.99"),
        (["--samples", "4"], "At temperature 0"),
        (["--limit", "0"], "--limit is 0"),
    ],
)
def test_errors_are_one_line(run: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_results(run)
    assert main(["benchmark", str(run), *arguments, "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and says in error and "\n" not in error
    assert read_results(run) == before


def test_another_pair_has_no_default_tasks(run: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").symlink_to(run / "adapters")
    write_results(tmp_path, pair={"base": "a", "target": "b"})
    with pytest.raises(BenchmarkError, match=r"--tasks is missing"):
        benchmark_run(str(tmp_path))
