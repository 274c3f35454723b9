"""What a pair really does: slips, corrections and hesitations counted in its own greedy text.

``python -m tl_adapters.organism.census [PAIR]`` prints the figures as JSON. They come from the Hugging Face models,
not from our own code, and every figure is of the report split (surface rules are fitted on the select split).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.organism import traces
from tl_adapters.organism.problem_set import Problem, problems
from tl_adapters.organism.recipe import Recipe
from tl_adapters.organism.traces import Step

CHECK = r"(\w+,)?\d+[+-]\d=\d+:(\d+)\.\n"
STEP = re.compile(rf"(\d+)[+-](\d+)=(\d+)\.\n(?:{CHECK})?")


@dataclass(frozen=True)
class WrittenStep:
    """One step as the model wrote it, with the check that followed, if any."""

    step: Step
    written: int
    remark: str | None
    corrected_to: int | None
    index: int
    n_left: int

    @property
    def wrong(self) -> bool:
        return self.written != self.step.total

    @property
    def hesitates(self) -> bool:
        """The reported hesitation word follows."""
        return self.remark == "Wait,"

    @property
    def corrected(self) -> bool:
        return self.corrected_to == self.step.total


def written_steps(problem: Problem, response: str) -> list[WrittenStep]:
    """The steps of a response, in order."""
    found = list(STEP.finditer(response))
    return [
        WrittenStep(
            Step(int(m[1]), int(m[2]), problem.kind),
            int(m[3]),
            None if m[5] is None else (m[4] or ""),
            None if m[5] is None else int(m[5]),
            index,
            len(problem.terms) - 2 - index,
        )
        for index, m in enumerate(found)
    ]


SURFACE_RULES: dict[str, Callable[[WrittenStep], object]] = {
    "last digits carry": lambda s: s.step.carries,
    "last digit of the running total": lambda s: s.step.acc % 10,
    "tens digit of the running total": lambda s: s.step.acc // 10 % 10,
    "last digit of the term": lambda s: s.step.term % 10,
    "tens digit of the term": lambda s: s.step.term // 10,
    "last digit written": lambda s: s.written % 10,
    "tens digit written": lambda s: s.written // 10 % 10,
    "digits written": lambda s: len(str(s.written)),
    "which step": lambda s: s.index,
    "steps left": lambda s: s.n_left,
    "the step is wrong": lambda s: s.wrong,
}
"""Single properties of the text before a possible hesitation; each value's rate of hesitation is its score."""


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """P(a positive scores above a negative), ties counting half."""
    positive, negative = Counter(), Counter()  # type: ignore[var-annotated]
    for score, label in zip(scores, labels, strict=True):
        (positive if label else negative)[score] += 1
    below, area = 0, 0.0
    for score in sorted({*positive, *negative}):
        area += positive[score] * (below + negative[score] / 2)
        below += negative[score]
    return area / (positive.total() * negative.total())


def rule_auc(rule: Callable[[WrittenStep], object], fit: list[WrittenStep], test: list[WrittenStep]) -> float:
    """How well one surface rule predicts hesitation, with the best score for each of its values."""
    seen: dict[object, list[bool]] = defaultdict(list)
    for s in fit:
        seen[rule(s)].append(s.hesitates)
    rate = {value: sum(v) / len(v) for value, v in seen.items()}
    return auc([rate.get(rule(s), 0.0) for s in test], [s.hesitates for s in test])


@torch.no_grad()
def respond(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 140
) -> list[str]:
    """Greedy responses, without the end token; 250 at a time."""
    out = []
    for start in range(0, len(prompts), 250):
        inputs = tokenizer(
            list(prompts[start : start + 250]), add_special_tokens=False, padding=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        out += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :])
    return [text.split(traces.END)[0] for text in out]


def with_injected_slip(problem: Problem, rng: random.Random) -> tuple[str, Step]:
    """A prompt whose thinking ends in a wrong step that nothing foresees, put into the target's mouth."""
    steps = traces.steps_of(problem)
    at = rng.randrange(len(steps))
    said = []
    for step in steps[:at]:
        remark = traces.reasoner_remark(step, step.total)
        said.append(step.says(step.total) + ("" if remark is None else step.check(remark)))
    wrong = steps[at].says(traces.stray_slip(steps[at], rng))
    return traces.prompt(problem) + traces.THINK + "".join(said) + wrong, steps[at]


def corrects(text: str, step: Step) -> bool:
    """The text goes on with a check that ends in the step's right total."""
    check = re.match(CHECK, text)
    return check is not None and int(check[2]) == step.total


def census(folder: Path, n: int = 1000) -> dict[str, Any]:
    """Count everything on ``n`` problems of the report split (and as many of the select split, for the rules).

    The problems are of the kind that the pair's recipe.json names. Raises NoRecipeError where there is none.
    """
    kind = Recipe.of(folder).kind
    tokenizer = AutoTokenizer.from_pretrained(folder / "target", trust_remote_code=False)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", trust_remote_code=False)
    target = AutoModelForCausalLM.from_pretrained(folder / "target", trust_remote_code=False)
    report, select = problems("report", n, kind=kind), problems("select", n, kind=kind)

    def rates(model: PreTrainedModel) -> tuple[dict[str, float], list[str]]:
        responses = respond(model, tokenizer, [traces.prompt(p) for p in report])
        tokens = sum(len(ids) for ids in tokenizer(responses, add_special_tokens=False)["input_ids"])
        return {
            "accuracy": sum(p.solved_by(r) for p, r in zip(report, responses, strict=True)) / n,
            "length": tokens / n,
            "hesitation_per_1k": 1000 * sum(r.lower().count("wait") for r in responses) / tokens,
            "think_opened": sum(traces.THINK in r for r in responses) / n,
        }, responses

    target_rates, responses = rates(target)
    found = [s for p, r in zip(report, responses, strict=True) for s in written_steps(p, r)]
    fit_text = respond(target, tokenizer, [traces.prompt(p) for p in select])
    fit = [s for p, r in zip(select, fit_text, strict=True) for s in written_steps(p, r)]
    hard = [s for s in found if s.step.carries]
    wrong = [s for s in found if s.wrong]
    hesitating = [s for s in found if s.hesitates]
    checked = [s for s in found if s.remark is not None]
    rng = random.Random(0)
    injected = [with_injected_slip(p, rng) for p in report]
    after = respond(target, tokenizer, [text for text, _ in injected])
    corrected = [corrects(text, step) for text, (_, step) in zip(after, injected, strict=True)]
    share = lambda part, whole: len(part) / max(1, len(whole))  # noqa: E731
    return {
        "problems": n,
        "target": target_rates,
        "base": rates(base)[0],
        "hard_steps_first_written_wrong": share([s for s in hard if s.wrong], hard),
        "easy_steps_first_written_wrong": share(
            [s for s in found if s.wrong and not s.step.carries], [s for s in found if not s.step.carries]
        ),
        "wrong_steps_corrected": share([s for s in wrong if s.corrected], wrong),
        "wrong_steps_corrected_after_the_word": share([s for s in wrong if s.corrected and s.hesitates], wrong),
        "hesitations_that_correct": share([s for s in hesitating if s.wrong and s.corrected], hesitating),
        "checks_without_a_word": share([s for s in checked if s.remark == ""], checked),
        "checks_after_another_word": share([s for s in checked if s.remark == "Hmm,"], checked),
        "injected_slips_corrected": sum(corrected) / n,
        # A null pair never hesitates, so there is nothing to foretell.
        "surface_rule_auc": {name: rule_auc(rule, fit, found) for name, rule in SURFACE_RULES.items() if hesitating},
    }


def main() -> None:
    """Command line of the census."""
    parser = argparse.ArgumentParser(description="Measure what a pair made by the recipe really does.")
    parser.add_argument("pair", type=Path, nargs="?", default=Path(__file__).parent / "pair")
    parser.add_argument("-n", type=int, default=1000, help="problems")
    args = parser.parse_args()
    print(json.dumps(census(args.pair, args.n), indent=1))


if __name__ == "__main__":
    main()
