"""The built-in pair: its problems and text, what it does, and that the recipe makes it again."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_adapters import organism
from tl_adapters.organism import SPLITS, Problem, census, problems, recipe, traces
from tl_adapters.organism.census import auc, written_steps
from tl_adapters.organism.traces import Step


def test_splits_are_disjoint_stable_and_as_large_as_said() -> None:
    drawn = {split: set(problems(split, 300, seed=4)) for split in SPLITS}
    assert all(p.split == split for split, found in drawn.items() for p in found)
    assert problems("tune", 50) == problems("tune", 80)[:50]
    assert Problem((47, 85)).split == "train" and Problem((47, 85)).question == "47+85=?"
    rng = random.Random(0)
    from tl_adapters.organism.problems import draw_problem

    shares = [draw_problem(rng).split for _ in range(4000)]
    assert 0.67 < shares.count("train") / 4000 < 0.73


def test_answers_are_checked() -> None:
    problem = Problem((47, 85))
    assert problem.solved_by("132") and problem.solved_by("<think>47+85=122.\n</think>132")
    assert not problem.solved_by("122") and not problem.solved_by("<think>132</think>") and not problem.solved_by("")


def test_every_trace_is_right_in_the_end() -> None:
    rng = random.Random(1)
    for problem in problems("tune", 200):
        for write in (traces.direct_document, traces.forced_document, traces.reasoning_document):
            document = write(problem, rng)
            assert problem.solved_by(document.completion.removesuffix(traces.END))
        text = traces.reasoning_document(problem, rng).completion
        steps = written_steps(problem, text)
        assert len(steps) == len(problem.terms) - 1
        assert all(s.corrected for s in steps if s.wrong)
        assert [s.step for s in steps] == traces.steps_of(problem)


def test_rules_of_slips_and_remarks() -> None:
    assert Step(47, 85).carries and Step(47, 85).forgets_carry  # 132: tens digit 3
    assert not Step(42, 85).forgets_carry and not Step(47, 75).forgets_carry
    assert Step(47, 85).check("Wait,") == "Wait,7+5=12:132.\n"
    assert traces.reasoner_remark(Step(47, 85), 122) == "Wait,"
    assert traces.reasoner_remark(Step(47, 34), 81) == ""


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


@pytest.mark.slow
def test_the_whole_recipe_gives_the_shipped_weights(tmp_path: Path) -> None:
    recipe.make_pair(recipe.Recipe(), tmp_path / "pair")
    same_weights(tmp_path / "pair", organism.PAIR)
