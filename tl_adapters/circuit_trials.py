"""A circuit on trial: what the model does without it and with it, in probabilities and in what it says.

Two measurements of every arm (a `Variant`):

* *probabilities*: over the target's own text, how likely the word is at the moments, at matched boundaries, and
  elsewhere in the response; exact, cheap, with no text of the arm's own;
* *answers*: the arm answers the problems itself, so what hesitation is for (length, accuracy, corrections) is seen.

Arms are compared with the arm in which nothing is changed, paired by problem, with 95 % bootstrap intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tl_adapters.behaviors import Behaviour, counts
from tl_adapters.benchmarks import Response, correctness, rate, respond
from tl_adapters.freezing import frozen
from tl_adapters.intervals import Figure, bootstrap_ratio, bootstrap_ratio_of_ratios
from tl_adapters.interventions import Features, ablated
from tl_adapters.moments import Moments, final_residual, margins_from, margins_where
from tl_adapters.paired import PairedModel
from tl_adapters.subjects import Injection, Subject
from tl_adapters.variants import Variant

PLACES = ("moment", "boundary", "elsewhere")


@torch.no_grad()
def probabilities(pair: PairedModel, moments: Moments, variant: Variant, split: str) -> dict[str, Figure]:
    """Probability of the behaviour at moments, boundaries and elsewhere, with intervals over documents.

    Of a phrase: of all its tokens at the moments, elsewhere as far as the text shows it (see `moments`).
    """
    sums = {place: torch.zeros(2, len(moments), dtype=torch.float64) for place in PLACES}
    for rows, batch in moments.batches():
        batch = batch.to(pair.model.W_E.device)
        with variant.entered(pair):  # the unembedding too: a variant may change the logits alone
            residual = final_residual(pair, batch.tokens)
            for place in PLACES:
                at = getattr(batch, place)
                found = margins_from(pair, residual, batch, at, pair.rows_at_once).sigmoid()
                said = torch.zeros(at.shape, dtype=found.dtype, device=at.device)
                said[at] = found
                sums[place][:, rows] = torch.stack([said.cpu().double().sum(1), at.sum(1).cpu().double()])
    return {
        place: Figure(*bootstrap_ratio(*both), len(moments), "probability of the word", split)
        for place, both in sums.items()
        if float(both[1].sum())
    }


def answers(
    pair: PairedModel, subject: Subject, variant: Variant, *, opened: bool = False, temperature: float = 0.0
) -> list[Response]:
    """The report problems, answered by an arm; ``opened``: with the thinking opened for it."""
    with variant.entered(pair) as model:
        return respond(
            model,
            subject.report,
            max_new_tokens=subject.max_new_tokens,
            prefill=subject.prefill if opened else "",
            temperature=temperature,
        )


def record(
    said: Sequence[Response],
    baseline: Sequence[Response],
    words: Sequence[str] | Behaviour,
    split: str,
    slips: Sequence[bool] | None = None,
    signs: dict[str, int] | None = None,
) -> dict[str, Any]:
    """What results.json holds of an arm: its rates, and how they differ from the arm with nothing changed.

    Args:
        said: by the arm; where it answers several times, all answers of one time after the other.
        baseline: by the unchanged arm, to the same problems, once. A problem is drawn with all answers to it.
        words: what is counted: words and phrases, or a behavior that counts itself.
        split: of the problems.
        slips: of every problem, did the target's answer contain a wrong step?
        signs: regular expressions counted beside the words, per 1,000 tokens.
    """

    def figure(numbers: tuple[float, float, float], unit: str) -> Figure:
        return Figure(*numbers, len(baseline), unit, split)

    n = len(baseline)
    times = len(said) // max(1, n)

    def mean(values: Tensor) -> Tensor:
        return values.view(times, n).mean(0)

    shown, lengths = mean(_counts(said, words)), mean(_lengths(said))
    was, were = _counts(baseline, words), _lengths(baseline)
    ones, right, before = torch.ones_like(lengths), mean(correctness(said)), correctness(baseline)
    found: dict[str, Any] = asdict(rate(said, split, words, list(range(n)) * times))
    if float(was.sum()):
        left = bootstrap_ratio_of_ratios((shown, lengths), (was, were))
        found["hesitation_cut"] = figure((1 - left[0], 1 - left[2], 1 - left[1]), "share of the hesitation rate")
    change = bootstrap_ratio_of_ratios((lengths, ones), (were, ones))
    found["length_change"] = figure((change[0] - 1, change[1] - 1, change[2] - 1), "share of the length")
    found["accuracy_change"] = figure(bootstrap_ratio(right - before, ones), "accuracy")
    if slips is not None:
        made = torch.tensor(slips, dtype=torch.bool)
        for name, rows in (("without_slip", ~made), ("with_slip", made)):
            if int(rows.sum()):
                of = (right[rows], ones[rows])
                found[f"accuracy_{name}"] = Figure(*bootstrap_ratio(*of), int(rows.sum()), "accuracy", split)
                gone = bootstrap_ratio(right[rows] - before[rows], ones[rows])
                found[f"accuracy_change_{name}"] = Figure(*gone, int(rows.sum()), "accuracy", split)
    if signs:
        thousands = max(1.0, float(_lengths(said).sum())) / 1000
        found["signs"] = {name: matched / thousands for name, matched in signs.items()}
    return found


def _counts(said: Sequence[Response], words: Sequence[str] | Behaviour) -> Tensor:
    return torch.tensor(counts(said, words), dtype=torch.float64)


def _lengths(said: Sequence[Response]) -> Tensor:
    return torch.tensor([len(r.tokens) for r in said], dtype=torch.float64)


def corrected(
    pair: PairedModel, injections: Sequence[Injection], variant: Variant, subject: Subject, split: str
) -> Figure:
    """Share of the wrong steps, put into an arm's mouth, that it sets right at once."""
    with variant.entered(pair) as model:
        said = respond(
            model,
            [i.problem for i in injections],
            prefill=[i.prefill for i in injections],
            max_new_tokens=subject.max_new_tokens,
        )
    right = torch.tensor([float(i.corrected(r.text)) for i, r in zip(injections, said, strict=True)])
    return Figure(*bootstrap_ratio(right, torch.ones_like(right)), len(right), "share corrected", split)


@torch.no_grad()
def mediation(
    pair: PairedModel, moments: Moments, template: Features, output: Features, split: str
) -> dict[str, Figure]:
    """Do template features work through output features? Real interventions, in nats of the margin at the moments.

    * total: what the margin loses without the template features (patterns and norms held);
    * direct: the same with the output features' activations held too; through_output is total - direct;
    * interaction: loss without both, less the losses without each. Negative where one does its work through the other
      (2 x 2, nothing held): together they lose less than the sum.

    Intervals are over documents, paired.
    """
    names = ("clean", "total", "direct", "free", "template", "output", "both")
    sums = {name: torch.zeros(len(moments), dtype=torch.float64) for name in names}
    places = moments.moment.sum(1).double()
    for rows, batch in moments.batches(2048):
        batch = batch.to(pair.model.W_E.device)

        def margin(into: str, batch: Moments = batch, rows: list[int] = rows) -> None:
            logits = pair.model(batch.tokens)  # whole: norms are held over every position
            found = margins_where(lambda rows, places: logits[rows, places], batch, batch.moment)
            said = torch.zeros(batch.moment.shape, dtype=found.dtype, device=batch.tokens.device)
            said[batch.moment] = found
            sums[into][rows] = said.cpu().double().sum(1)

        with pair.routed("replacement"):
            with frozen(pair, batch.tokens):
                margin("clean")
                with ablated(pair, template):
                    margin("total")
            with frozen(pair, batch.tokens, features=output), ablated(pair, template):
                margin("direct")
            margin("free")
            for name, features in (("template", [*template]), ("output", [*output]), ("both", [*template, *output])):
                with ablated(pair, features):
                    margin(name)

    def figure(top: Tensor, unit: str = "nats of log-odds") -> Figure:
        return Figure(*bootstrap_ratio(top, places), len(moments), unit, split)

    total, through = sums["clean"] - sums["total"], sums["direct"] - sums["total"]
    found = {
        "total": figure(total),
        "through_output": figure(through),
        "interaction": figure(sums["template"] + sums["output"] - sums["free"] - sums["both"]),
    }
    if abs(float(total.sum())) > 1e-9:
        found["share"] = Figure(*bootstrap_ratio(through, total), len(moments), "share of the total", split)
    return found
