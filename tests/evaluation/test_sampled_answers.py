"""Problems answered: the same whether stopped or not, drawn from generators of our own, summed up over problems."""

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
from tl_adapters.evaluation import sampled_answers as answering
from tl_adapters.evaluation.response_metrics import rate
from tl_adapters.evaluation.sampled_answers import ANSWERS, SETTINGS, Answer, AnsweringError, Sampling, answer, score
from tl_adapters.generation.responses import Response, respond
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism.recipe import build_tokenizer
from tl_adapters.study import benchmark as benchmarking
from tl_adapters.study.benchmark import BenchmarkError, BenchmarkVariant, benchmark_run
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.utils.files import FolderBusyError
from tl_adapters.utils.results import read_results, write_results

ASKED = organism.problems("tune", 7, n_terms=(2, 3, 5))
DRAWN = Sampling(samples=3, temperature=1.0, top_p=0.9, max_new_tokens=6, batch_size=3)


@pytest.fixture(scope="module")
def model() -> Any:
    tokenizer = build_tokenizer()
    base, target = (random_model(s, torch.float32, vocab_size=len(tokenizer)) for s in (1, 2))
    return randomise(PairedModel.from_pretrained(base, target, tokenizer=tokenizer)).model


def answered(model: Any, folder: Path, sampling: Sampling = DRAWN, **about: str) -> list[Answer]:
    return answer(model, ASKED, sampling, folder, about, progress=False)


@pytest.fixture(scope="module")
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    answered(model, folder)
    return folder


def test_every_problem_is_answered_once_for_every_sample(model: Any, whole: Path) -> None:
    found = answered(model, whole)
    assert sorted((a.sample, a.problem) for a in found) == [(s, p) for s in range(3) for p in range(len(ASKED))]
    assert [a.sample for a in found] == sorted(a.sample for a in found)
    by_sample = [{a.problem: a.response.tokens for a in found if a.sample == s} for s in range(3)]
    assert by_sample[0] != by_sample[1] != by_sample[2]
    lines = [json.loads(line) for line in (whole / ANSWERS).read_text().splitlines()]
    assert all(ASKED[line["problem"]].question == line["question"] for line in lines)
    assert [line["text"] for line in lines] == [a.response.text for a in found]


@pytest.mark.parametrize("torn", [0, 1, 10_000, -1])
def test_stopped_anywhere_it_goes_on_to_the_same_answers(model: Any, whole: Path, tmp_path: Path, torn: int) -> None:
    """Whole batches are kept, what is left of a torn one is not, and the draws do not depend on any of it."""
    text = (whole / ANSWERS).read_text()
    (tmp_path / SETTINGS).write_bytes((whole / SETTINGS).read_bytes())
    (tmp_path / ANSWERS).write_text(text[:torn])
    torch.manual_seed(torn)
    before = torch.get_rng_state()
    assert answered(model, tmp_path) == answered(model, whole)
    assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / ANSWERS).read_text() == text


def test_stopped_in_the_middle_of_a_batch(
    model: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def interrupted(*args: Any, **options: Any) -> list[Response]:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return respond(*args, **options)

    monkeypatch.setattr(answering, "respond", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answered(model, tmp_path)
    assert len((tmp_path / ANSWERS).read_text().splitlines()) == 3 + 3 + 1 + 3
    answered(model, tmp_path)
    assert len(calls) == 5 + 5, "batches that were answered are asked again"
    assert (tmp_path / ANSWERS).read_bytes() == (whole / ANSWERS).read_bytes()


def test_samples_are_added_later_and_fewer_are_a_part(model: Any, whole: Path, tmp_path: Path) -> None:
    one = answered(model, tmp_path, replace(DRAWN, samples=1))
    assert one == answered(model, whole, replace(DRAWN, samples=1)) == answered(model, whole)[: len(ASKED)]
    assert answered(model, tmp_path) == answered(model, whole)


def test_another_seed_draws_other_answers(model: Any, whole: Path, tmp_path: Path) -> None:
    other = answered(model, tmp_path, replace(DRAWN, seed=1))
    assert [a.response.tokens for a in other] != [a.response.tokens for a in answered(model, whole)]


def test_no_two_batches_share_their_draws(model: Any, tmp_path: Path) -> None:
    found = answer(model, ASKED[:1] * 4, replace(DRAWN, batch_size=1), tmp_path, {}, progress=False)
    assert len({a.response.tokens for a in found}) == 12


def test_greedy_answers_are_those_of_respond(model: Any, tmp_path: Path) -> None:
    found = answered(model, tmp_path, Sampling(max_new_tokens=6, batch_size=2, prefill="<think>"))
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
def test_answers_of_other_settings_are_not_mixed(
    model: Any, whole: Path, change: dict[str, Any], about: dict[str, str], says: str
) -> None:
    before = (whole / ANSWERS).read_bytes(), (whole / SETTINGS).read_bytes()
    with pytest.raises(AnsweringError, match=says):
        answered(model, whole, replace(DRAWN, **change), **about)
    with pytest.raises(AnsweringError, match="n 7, and now it is 6"):
        answer(model, ASKED[:6], DRAWN, whole, {}, progress=False)
    assert ((whole / ANSWERS).read_bytes(), (whole / SETTINGS).read_bytes()) == before


def test_two_processes_in_one_folder_are_refused(model: Any, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(FolderBusyError, match="Another process"):
        answered(model, tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples": 2, "temperature": 0.0}, "At temperature 0 all 2 samples are one"),
        ({"samples": 0}, "samples is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_k": -1}, "top_k -1"),
    ],
)
def test_impossible_options_are_said(options: dict[str, Any], says: str) -> None:
    with pytest.raises(AnsweringError, match=says):
        Sampling(**options)


def test_pass_at_1_is_the_mean_over_problems_of_the_share_that_is_right() -> None:
    def said(correct: bool, n: int, text: str = "") -> Response:
        return Response((1,), (2,) * n, text, not correct, correct)

    answers = [
        Answer(p, s, said((p, s) in {(0, 0), (0, 1), (2, 1)}, 10 * (p + 1), "Wait. Hmm." if p == 1 else ""))
        for s in range(2)
        for p in range(3)
    ]
    found = score(answers, "test")
    assert (found.n, found.samples, found.pass_at_1, found.truncated) == (3, 2, 0.5, 0.5)
    assert found.length == 20 and found.hesitation_per_1k == pytest.approx(1000 * 2 / 120)
    assert score(answers, "test", ("wait", "hmm")).hesitation_per_1k == pytest.approx(1000 * 4 / 120)
    assert score(answers, "test", ("wai",)).hesitation_per_1k == 0
    once = score([a for a in answers if a.sample == 0], "test")
    plainly = rate([a.response for a in answers if a.sample == 0], "test")
    assert (once.pass_at_1, once.ci["pass_at_1"]) == (plainly.accuracy, plainly.ci["accuracy"])
    # Answers to one problem are not independent: saying all of them again narrows no interval.
    again = score(answers + [replace(a, sample=a.sample + 2) for a in answers], "test")
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


def test_the_verb_fills_a_table_and_asks_nothing_twice(
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
    assert len((folder / ANSWERS).read_text().splitlines()) == 6

    def never(*args: object, **options: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(answering, "respond", never)
    assert main(["benchmark", str(run), "--route", "target", *short]) == 0
    assert read_results(run)["benchmarks"]["builtin"] == block


def test_what_answers_is_that_variant(run: Path, tmp_path: Path) -> None:
    """The answers on the disk are those of the route with the features off, and of nothing else."""
    features = (FeatureId(1, 2), FeatureId(0, 3))
    options = {"max_new_tokens": 8}
    (measured,) = benchmark_run(
        run, answerer=BenchmarkVariant(ablate=features), options=options, limit=5, out=tmp_path, progress=False
    )
    pair = benchmarking.open_run(run)
    for feature in features:
        pair.installed_adapters()[feature.layer].W_dec.data[feature.index] = 0
    with pair.routed("replacement") as model:
        expected = [r.text for r in respond(model, organism.problems("report", 5), max_new_tokens=8)]
    lines = [json.loads(line) for line in (measured.folder / ANSWERS).read_text().splitlines()]
    assert [line["text"] for line in sorted(lines, key=lambda line: line["problem"])] == expected


def test_names_of_many_features_are_short_and_each_its_own() -> None:
    names = {BenchmarkVariant(ablate=tuple(FeatureId(0, i) for i in range(n))).variant.name for n in range(2, 40)}
    assert len(names) == 38 and all(len(name) < 80 for name in names)
    one, other = FeatureId(1, 2), FeatureId(0, 3)
    assert BenchmarkVariant(ablate=(one, other)).variant.name == BenchmarkVariant(ablate=(other, one)).variant.name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "gsm8"], "Did you mean 'gsm8k'?"),
        (["--tasks", "builtin,gsm8k=nowhere.jsonl"], "nowhere.jsonl is no file or folder"),
        (["--ablate", "1.2", "--route", "target"], "go with the route replacement alone; got the route target"),
        (["--insert", "1.2", "--route", "replacement"], "go with the route hybrid alone; got the route replacement"),
        (["--ablate", "1-2"], "'1-2' is no feature"),
        (["--ablate", "1.99"], "There are no features 1.99"),
        (["--samples", "4"], "At temperature 0"),
        (["--limit", "0"], "The limit is 0"),
    ],
)
def test_errors_are_one_line(run: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_results(run)
    assert main(["benchmark", str(run), *arguments, "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and says in error and "\n" not in error
    assert read_results(run) == before


def test_another_pair_has_no_tasks_of_its_own(run: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").symlink_to(run / "adapters")
    write_results(tmp_path, pair={"base": "a", "target": "b"})
    with pytest.raises(BenchmarkError, match=r"Name tasks to measure on \(--tasks\)"):
        benchmark_run(tmp_path)
