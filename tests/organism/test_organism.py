"""The model organism: its problems and text, its census, and that the recipe gives the same weights again."""

import hashlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_adapters import organism
from tl_adapters.organism import KINDS, SPLITS, Kind, Problem, census, problems, recipe, traces
from tl_adapters.organism.census import auc, written_steps
from tl_adapters.organism.problem_set import draw_problem, stream_problems
from tl_adapters.organism.traces import Step

ANSWERING = ("direct", "forced", "calm", "reasoning")
STEPWISE = ("textbook", "homework", "marking", "forced", "calm", "reasoning")


@pytest.mark.parametrize("kind", KINDS)
def test_splits_are_disjoint_stable_and_as_large_as_said(kind: Kind) -> None:
    drawn = {split: set(problems(split, 300, seed=4, kind=kind)) for split in SPLITS}
    assert all(p.split == split and p.kind == kind for split, found in drawn.items() for p in found)
    assert problems("tune", 50, kind=kind) == problems("tune", 80, kind=kind)[:50]
    rng = random.Random(0)
    shares = [draw_problem(rng, kind=kind).split for _ in range(4000)]
    assert 0.67 < shares.count("train") / 4000 < 0.73


def test_a_problem_asks_and_knows_its_answer() -> None:
    assert Problem((47, 85)).split == "train" and Problem((47, 85)).question == "47+85=?"
    difference = Problem((312, 47, 85), "differences")
    assert difference.question == "312-47-85=?" and difference.answer == "180" and difference.totals == [312, 265, 180]
    assert Problem((47, 85)) != Problem((47, 85), "differences")


def test_differences_never_go_below_ten_and_half_of_their_steps_borrow() -> None:
    drawn = problems("train", 1000, kind="differences")
    assert {len(p.terms) for p in drawn} == {3, 4}
    assert all(100 <= p.terms[0] < 400 and all(10 <= term < 100 for term in p.terms[1:]) for p in drawn)
    assert all(total >= 10 for p in drawn for total in p.totals)
    steps = [step for p in drawn for step in traces.steps_of(p)]
    assert 0.45 < sum(step.carries for step in steps) / len(steps) < 0.6


def test_answers_are_checked() -> None:
    problem = Problem((47, 85))
    assert problem.solved_by("132") and problem.solved_by("<think>47+85=122.\n</think>132")
    assert not problem.solved_by("122") and not problem.solved_by("<think>132</think>") and not problem.solved_by("")


@pytest.mark.parametrize("kind", KINDS)
def test_every_trace_is_right_in_the_end(kind: Kind) -> None:
    rng = random.Random(1)
    for problem in problems("tune", 200, kind=kind):
        for name in ANSWERING:
            assert problem.solved_by(recipe.writer(name)(problem, rng).completion.removesuffix(traces.END))
        for name in STEPWISE:
            steps = written_steps(problem, recipe.writer(name)(problem, rng).completion)
            assert [s.step for s in steps] == traces.steps_of(problem)
            assert all(s.corrected for s in steps if s.wrong or s.remark is not None)


def test_calm_thinking_says_no_word() -> None:
    rng = random.Random(0)
    for kind in KINDS:
        texts = [traces.calm_document(p, rng).completion for p in problems("train", 200, kind=kind)]
        assert not any(re.search("[A-Za-z]", re.sub(r"</?think>|<[|]end[|]>", "", text)) for text in texts)
        assert any(":" in text for text in texts)  # it checks, without a word


def test_rules_of_slips_and_remarks() -> None:
    assert Step(47, 85).carries and Step(47, 85).forgets_carry  # 132: tens digit 3
    assert not Step(42, 85).forgets_carry and not Step(47, 75).forgets_carry
    assert Step(47, 85).check("Wait,") == "Wait,7+5=12:132.\n"
    assert traces.reasoner_remark(Step(47, 85), 122) == "Wait,"
    assert traces.reasoner_remark(Step(47, 34), 81) == ""
    borrowing = Step(312, 35, "differences")  # 277: tens digit 7
    assert borrowing.carries and borrowing.forgets_carry and borrowing.forgotten == 287
    assert not Step(312, 47, "differences").forgets_carry and not Step(317, 42, "differences").forgets_carry
    assert Step(312, 47, "differences").says(275) == "312-47=275.\n"
    assert Step(312, 47, "differences").check("Wait,") == "Wait,12-7=5:265.\n"
    assert Step(317, 47, "differences").check("") == "7-7=0:270.\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_forgotten_ten_is_what_digit_by_digit_comes_out(kind: Kind) -> None:
    apply = {"sums": lambda a, b: a + b, "differences": lambda a, b: a - b}[kind]
    for step in (Step(acc, term, kind) for acc in range(110, 400, 3) for term in range(10, 100)):
        by_digits = 10 * apply(step.acc // 10, step.term // 10) + step.total % 10
        assert by_digits == (step.forgotten if step.carries else step.total)
        first, second, last = map(int, re.match(r"(\d+)[+-](\d)=(\d+):", step.check("")).groups())  # type: ignore[union-attr]
        assert apply(first, second) == last and last % 10 == step.total % 10


FROZEN = {
    "direct": "02d3236b628b7d01",
    "textbook": "d6d818ffdf6d57a4",
    "homework": "125b66ac70a3e563",
    "marking": "abf8f1ca98e24734",
    "forced": "ac504a09a12234e7",
    "reasoning": "3a3fd26cd806fca7",
}
"""Taken when sums were the only problems, from the code that the model organism was trained with."""


def frozen(name: str) -> str:
    """Hash of a writer's documents, on sums."""
    rng = random.Random(0)
    train = stream_problems("train", rng)
    digest = hashlib.sha256()
    for _ in range(300):
        document = getattr(traces, f"{name}_document")(next(train), rng)
        digest.update(f"{document.prompt}\t{document.completion}\n".encode())
    return digest.hexdigest()[:16]


def test_the_model_organisms_text_is_the_text_it_was_trained_on() -> None:
    assert {name: frozen(name) for name in FROZEN} == FROZEN
    pairs = [pair for split in SPLITS for pair in organism.reasoning_pairs(split, 100)]
    assert hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16] == "215623dfa80413a0"


def test_auc() -> None:
    assert auc([0, 1, 2, 3], [False, False, True, True]) == 1
    assert auc([1, 1, 1, 1], [False, True, False, True]) == 0.5
    assert auc([3, 1, 2], [False, True, True]) == 0


def test_the_tokenizer_reads_any_text_and_single_digits() -> None:
    tokenizer = AutoTokenizer.from_pretrained(organism.TARGET)
    for text in ("<think>47+85=132.\nWait,7+5=12:132.\n</think>132", "Grüße, 世界 <b>&amp;</b>\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("<think>47+85=132.\nWait,7")["input_ids"])
    assert pieces == ["<think>", "4", "7", "+", "8", "5", "=", "1", "3", "2", ".Ċ", "Wait", ",", "7"]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("312-47=?<think>12-7=5:265.\n")["input_ids"])
    assert pieces == [*"312-47", "=?", "<think>", *"12-7=5:265", ".Ċ"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "47+85=?"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == traces.prompt(Problem((47, 85)))
    rebuilt = recipe.build_tokenizer()
    assert rebuilt.get_vocab() == tokenizer.get_vocab() and rebuilt.chat_template == tokenizer.chat_template


def test_the_pair_is_small_and_of_this_recipe() -> None:
    size = sum(p.stat().st_size for p in organism.PAIR.rglob("*") if p.is_file())
    assert size < 10_000_000
    record = json.loads((organism.PAIR / "recipe.json").read_text())
    assert record["hash"] == recipe.Recipe().hash, "the text or the recipe changed: train the pair anew (make pair)"
    assert not list(organism.PAIR.rglob("*.bin"))
    for folder in (organism.BASE, organism.TARGET):
        assert AutoModelForCausalLM.from_pretrained(folder).config.architectures == ["Qwen2ForCausalLM"]


def test_the_recipe_hash_covers_fields_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    built_in = recipe.Recipe()
    others = [replace(built_in, seed=1), replace(built_in, kind="differences"), replace(built_in, base_lr=1e-3)]
    calm = replace(built_in, target_mix={"calm": 1.0})
    assert len({one.hash for one in (built_in, *others, calm)}) == 5
    before = calm.hash
    monkeypatch.setattr(traces, "P_STRAY_CHECK", 0.05)  # a matter of reasoning traces, which the null pair never sees
    assert recipe.Recipe().hash != json.loads((organism.PAIR / "recipe.json").read_text())["hash"]
    assert calm.hash == before
    monkeypatch.setattr(traces, "FORGETS_CARRY", (3, 8))
    assert calm.hash != before


def test_a_pair_knows_its_recipe(tmp_path: Path) -> None:
    assert recipe.Recipe.of(organism.PAIR) == recipe.Recipe()
    for text in (None, "{", "[]", '{"seed": 0}'):
        if text is not None:
            (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(recipe.NoRecipeError, match="is no pair of this recipe"):
            recipe.make_null_pair(tmp_path, tmp_path / "null")
    assert not (tmp_path / "null").exists()


def check_census(figures: dict) -> None:
    target, base = figures["target"], figures["base"]
    assert target["accuracy"] >= 0.95 and base["accuracy"] <= target["accuracy"] - 0.30
    assert target["hesitation_per_1k"] >= 15 and base["hesitation_per_1k"] == 0
    assert 0.15 <= figures["hard_steps_first_written_wrong"] <= 0.30
    assert figures["injected_slips_corrected"] >= 0.80
    assert figures["hesitations_that_correct"] >= 0.25
    assert figures["checks_without_a_word"] > 0.02
    assert max(figures["surface_rule_auc"].values()) <= 0.9


@pytest.mark.slow
def test_the_pair_does_what_the_study_needs() -> None:
    check_census(census.census(organism.PAIR, 1000))


def test_the_shipped_census_says_so_and_a_sample_agrees() -> None:
    recorded = json.loads((organism.PAIR / "census.json").read_text())
    check_census(recorded)
    sample = census.census(organism.PAIR, 120)
    assert abs(sample["target"]["accuracy"] - recorded["target"]["accuracy"]) < 0.06
    assert abs(sample["target"]["hesitation_per_1k"] - recorded["target"]["hesitation_per_1k"]) < 5
    assert abs(sample["injected_slips_corrected"] - recorded["injected_slips_corrected"]) < 0.12


SHORT = recipe.Recipe(
    d_model=32, d_mlp=48, n_heads=2, n_key_value_heads=1, base_steps=10, marking_steps=5, target_steps=5, batch_size=8
)


def same_weights(a: Path, b: Path) -> None:
    for name in ("base", "target"):
        ours, theirs = (AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for folder in (a, b))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_recipe_gives_the_same_weights_twice(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    recipe.make_pair(SHORT, tmp_path / "one")
    recipe.make_pair(SHORT, tmp_path / "two")
    same_weights(tmp_path / "one", tmp_path / "two")
    assert torch.equal(before, torch.get_rng_state())
    base, target = (AutoModelForCausalLM.from_pretrained(tmp_path / "one" / n).state_dict() for n in ("base", "target"))
    assert any(not torch.equal(base[key], target[key]) for key in base)
    with pytest.raises(FileExistsError, match="exists already"):
        recipe.make_pair(SHORT, tmp_path / "one")


@pytest.mark.parametrize("kind", KINDS)
def test_a_null_pair_is_the_recipe_with_calm_documents(tmp_path: Path, kind: Kind) -> None:
    of = replace(SHORT, kind=kind, seed=1)
    recipe.make_pair(of, tmp_path / "pair")
    recipe.make_null_pair(tmp_path / "pair", tmp_path / "null")
    calm = replace(of, target_mix={"calm": 1.0})
    assert recipe.Recipe.of(tmp_path / "null") == calm
    recipe.make_pair(calm, tmp_path / "whole")
    same_weights(tmp_path / "null", tmp_path / "whole")
    figures = census.census(tmp_path / "null", 4)
    assert figures["target"]["hesitation_per_1k"] == 0 and figures["surface_rule_auc"] == {}
    with pytest.raises(FileExistsError, match="exists already"):
        recipe.make_null_pair(tmp_path / "pair", tmp_path / "null")


@pytest.mark.parametrize(
    ("words", "made"),
    [
        ([], ("make_pair", recipe.Recipe())),
        (["--seed", "1", "--kind", "differences"], ("make_pair", recipe.Recipe(seed=1, kind="differences"))),
        (["--null"], ("make_null_pair", organism.PAIR)),
        (["--null", "runs/second"], ("make_null_pair", Path("runs/second"))),
    ],
)
def test_the_command_line_of_the_recipe(
    words: list[str], made: tuple[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(recipe.torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(recipe.torch, "use_deterministic_algorithms", lambda on: None)
    for name in ("make_pair", "make_null_pair"):
        monkeypatch.setattr(recipe, name, lambda of, out, name=name: called.append(((name, of), out)))
    monkeypatch.setattr("sys.argv", ["recipe", "OUT", *words])
    recipe.main()
    assert called == [(made, Path("OUT"))]


def test_a_null_pair_has_its_pairs_seed_and_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["recipe", "OUT", "--null", "--kind", "differences"])
    with pytest.raises(SystemExit):
        recipe.main()
    assert "leave --seed and --kind out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_null_pair_thinks_and_never_hesitates(tmp_path: Path) -> None:
    recipe.make_null_pair(organism.PAIR, tmp_path / "null")
    figures = census.census(tmp_path / "null", 1000)
    assert figures["target"]["accuracy"] >= 0.95 and figures["target"]["think_opened"] == 1
    assert figures["base"]["accuracy"] <= figures["target"]["accuracy"] - 0.30
    assert figures["target"]["hesitation_per_1k"] == figures["checks_after_another_word"] == 0


@pytest.mark.slow
def test_the_whole_recipe_gives_the_shipped_weights(tmp_path: Path) -> None:
    recipe.make_pair(recipe.Recipe(), tmp_path / "pair")
    same_weights(tmp_path / "pair", organism.PAIR)
