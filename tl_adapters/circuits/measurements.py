"""What one condition does: to the probability of a behavior over given text, and to the model's own answers.

A condition is a `Variant`: a named intervention on one of the model's routes. Each is measured in two ways:

* *probabilities* over the text that the target wrote, at the onsets, at matched control positions and elsewhere in the
  response. They are exact and cheap, because the condition generates nothing. Beside them stands the harm:
  KL(replacement || condition) away from the onsets and continuations;
* *answers* that the model generates to the problems, which show what hesitation is for: length, accuracy, corrections.

A condition is compared with the model on which nothing is changed, paired by problem, with 95 % intervals
(`utils.measurement`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.circuits.onsets import Onsets, final_residual, log_odds, log_odds_from_logits
from tl_adapters.circuits.subject import Injection, Subject
from tl_adapters.evaluation.behaviors import GivenBehavior, counts
from tl_adapters.evaluation.response_metrics import correctness, measure_responses
from tl_adapters.generation.responses import Response, respond
from tl_adapters.interventions.feature_edits import FeaturePairs, ablated
from tl_adapters.interventions.frozen import FrozenChange, frozen_by_block
from tl_adapters.interventions.variants import Variant
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.kl_divergence import kl_per_token
from tl_adapters.utils.bootstrap import bootstrap_ratio
from tl_adapters.utils.clustered_intervals import (
    change_of_ratio,
    clustered_share,
    event_cluster_size,
    paired_difference,
)
from tl_adapters.utils.measurement import Estimate, Measurement, OutcomesMeasurement, SetsMeasurement
from tl_adapters.utils.precision import host_float64, wide
from tl_adapters.utils.results import plain
from tl_adapters.utils.share_intervals import share

POSITION_KEYS = {"onset": "moment", "control": "boundary", "elsewhere": "elsewhere"}
"""Positions of `Onsets` -> the key of the probability there, in what is returned and in results.json."""
_UNITS = {"kl_elsewhere": "nats per token", "behavior_left": "share of the replacement's probability"}
"""Units of the measurements over given text that are not probabilities."""
FEW_SETS = 5
"""A mean over fewer random sets than these states their number as its reason."""


def probabilities(
    pair: PairedModel, onsets: Onsets, variant: Variant, split: str, residuals: ReplacementResiduals | None = None
) -> dict[str, Measurement]:
    """Mean probability of the behavior by kind of position, with intervals over documents.

    Args:
        pair: with adapters on every layer.
        onsets: the texts; of a phrase the probability is that of all its tokens at the onsets, elsewhere that of the
            tokens that the text shares with it (see `onsets`).
        variant: the condition.
        split: of the problems, recorded in the figures.
        residuals: of the replacement over the same texts; with them "kl_elsewhere", the harm in nats per token, is
            measured too. It has no value where the condition rules a token out: the KL is infinite there.

    Returns figures under the keys "moment" (onsets), "boundary" (matched control positions) and "elsewhere", as in
    results.json; a kind of position that the texts do not have is left out.
    """
    return _as_measurements(probability_sums(pair, onsets, variant, residuals), split)


def mean_probabilities(
    pair: PairedModel,
    onsets: Onsets,
    variants: Sequence[Variant],
    split: str,
    residuals: ReplacementResiduals | None = None,
) -> dict[str, Measurement]:
    """`probabilities` as a mean over variants that were drawn (random sets); intervals include the choice of them."""
    sums = [probability_sums(pair, onsets, variant, residuals) for variant in variants]
    return _as_measurements({key: torch.stack([each[key] for each in sums]) for key in sums[0]}, split)


def behavior_left(
    pair: PairedModel,
    onsets: Onsets,
    variants: Sequence[Variant],
    split: str,
    residuals: ReplacementResiduals,
    unchanged: Float[Tensor, "n"],
) -> dict[str, Measurement]:
    """How much of the behavior is left under a condition, and its harm: "behavior_left" and "kl_elsewhere".

    What is left is the probability of the behavior at the onsets, as a share of the replacement's, paired by document.

    Args:
        pair: with adapters on every layer.
        onsets: the texts.
        variants: the condition; where it was drawn several times, the mean over its variants is measured.
        split: of the problems, recorded in the figures.
        residuals: of the replacement over the same texts.
        unchanged: of every document, the replacement's probabilities at the onsets, summed (`probability_sums`).
    """
    left, harm = [], []
    for variant in variants:
        sums = probability_sums(pair, onsets, variant, residuals)
        left.append(torch.stack([sums[POSITION_KEYS["onset"]][0], unchanged]))
        harm.append(sums["kl_elsewhere"])
    sets = (lambda parts: parts[0]) if len(variants) == 1 else torch.stack
    return _as_measurements({"behavior_left": sets(left), "kl_elsewhere": sets(harm)}, split)


@torch.no_grad()
def kl_from_replacement(
    pair: PairedModel, variant: Variant, plain: Float[Tensor, "n d_model"], residual: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n"]:
    """KL(replacement || variant) at every position, in nats, in float32 at least; logits are formed chunk by chunk.

    Args:
        pair: with adapters.
        variant: the condition; it is entered for the unembedding, because it may change the logits alone.
        plain: the replacement's final residual stream.
        residual: the condition's final residual stream.
    """
    parts = [residual.new_zeros(0)]
    for was, becomes in zip(plain.split(pair.rows_at_once), residual.split(pair.rows_at_once), strict=True):
        logits = pair.unembed(was)
        with variant.entered(pair):
            parts.append(kl_per_token(logits, pair.unembed(becomes)))
    return torch.cat(parts)


@dataclass(frozen=True)
class ReplacementResiduals:
    """The replacement's final residual stream away from the onsets of given texts: read once for all conditions."""

    batches: tuple[Float[Tensor, "n d_model"], ...]
    """On the CPU, in the order of `Onsets.batches`."""

    @classmethod
    @torch.no_grad()
    def read(cls, pair: PairedModel, onsets: Onsets) -> ReplacementResiduals:
        """Read them over the texts of ``onsets``."""
        residuals = []
        for _, batch in onsets.batches():
            batch = batch.to(pair.device)
            with pair.routed("replacement"):
                residuals.append(final_residual(pair, batch.tokens)[batch.away_from_onsets].cpu())
        return cls(tuple(residuals))


@torch.no_grad()
def probability_sums(
    pair: PairedModel, onsets: Onsets, variant: Variant, residuals: ReplacementResiduals | None = None
) -> dict[str, Float[Tensor, "2 n"]]:
    """By kind of position and document: the sum of the probabilities and the number of positions; the KL likewise."""
    sums = {key: torch.zeros(2, len(onsets), dtype=torch.float64) for key in POSITION_KEYS.values()}
    harm = torch.zeros(2, len(onsets), dtype=torch.float64)
    for number, (rows, batch) in enumerate(onsets.batches()):
        batch = batch.to(pair.device)
        with variant.entered(pair):  # for the unembedding too: a variant may change the logits alone
            residual = final_residual(pair, batch.tokens)
            for positions, key in POSITION_KEYS.items():
                at = getattr(batch, positions)
                probability = wide(log_odds(pair, residual, batch, at, pair.rows_at_once).sigmoid())
                by_position = probability.new_zeros(at.shape)
                by_position[at] = probability
                sums[key][:, rows] = host_float64(torch.stack([by_position.sum(1), at.sum(1).to(by_position)]))
        if residuals is not None:
            at = batch.away_from_onsets
            kl = kl_from_replacement(pair, variant, residuals.batches[number].to(residual), residual[at])
            by_row = torch.zeros(at.shape, dtype=torch.float64).masked_scatter(at.cpu(), host_float64(kl))
            harm[:, rows] = torch.stack([by_row.sum(1), host_float64(at.sum(1))])
    return sums if residuals is None else sums | {"kl_elsewhere": harm}


def _as_measurements(sums: dict[str, Float[Tensor, "*sets 2 n"]], split: str) -> dict[str, Measurement]:
    figures: dict[str, Measurement] = {}
    for key, totals in sums.items():
        top, bottom = totals.unbind(-2)
        if not float(bottom.sum()):
            continue
        estimate = Estimate(None, None, None, reason="it is infinite: a token is ruled out")
        if bool(top.isfinite().all()):
            estimate = bootstrap_ratio(top, bottom)
        figure = estimate.measurement(totals.shape[-1], _UNITS.get(key, "probability of the word"), split)
        values = (top.sum(-1) / bottom.sum(-1)).reshape(-1).tolist()
        figures[key] = figure if totals.ndim == 2 else _of_sets(figure, values)
    return figures


def _of_sets(figure: Measurement, values: Sequence[float]) -> SetsMeasurement:
    fields = {name: getattr(figure, name) for name in Measurement.__dataclass_fields__}
    few = "" if len(values) >= FEW_SETS else f"of only {len(values)} sets"
    fields["reason"] = "; ".join(filter(None, (fields["reason"], few)))
    return SetsMeasurement(**fields, draws=len(values), min=min(values), max=max(values))


def answers(
    pair: PairedModel,
    subject: Subject,
    variant: Variant,
    *,
    opened: bool = False,
    temperature: float | None = None,
    seed: int = 0,
) -> list[Response]:
    """The model's answers to the report problems under a condition.

    Args:
        pair: with adapters on every layer.
        subject: the problems, and how they are answered.
        variant: the condition.
        opened: write ``subject.prefill`` before the answer, for a model that would not open its thinking itself.
        temperature: None is the subject's.
        seed: of a draw; every condition draws the same numbers for the same problem.
    """
    with subject.engine.entered(pair, variant) as model:
        return respond(
            model,
            subject.report,
            max_new_tokens=subject.max_new_tokens,
            prefill=subject.prefill if opened else "",
            temperature=subject.temperature if temperature is None else temperature,
            seed=seed,
        )


def record(
    responses: Sequence[Response],
    baseline: Sequence[Response],
    behavior: GivenBehavior,
    split: str,
    slips: Sequence[bool] | None = None,
    signs: Mapping[str, int] | None = None,
    of_sets: bool = False,
) -> dict[str, Any]:
    """The record of a condition in results.json: its rates, and how they differ from the unchanged model's.

    Args:
        responses: under the condition; where it answers several times, all answers of one time after the other.
        baseline: of the unchanged model, to the same problems, once. A problem is drawn with all answers to it.
        behavior: what is counted, as `Behavior.of` takes it.
        split: of the problems.
        slips: of every problem, whether the target's answer contained a wrong step.
        signs: how often regular expressions matched, by name; recorded per 1,000 tokens.
        of_sets: the condition answers once with each of several sets of features that were drawn: the choice of sets
            is part of the intervals.
    """
    n = len(baseline)
    times = len(responses) // max(1, n)
    n_sets = times if of_sets else 1
    itself = responses is baseline

    def by_problem(values: Tensor) -> Tensor:
        return values.view(times, n) if n_sets > 1 else values.view(times, n).mean(0)

    after = _Outcomes.of(responses, behavior)
    after = _Outcomes(*(by_problem(values) for values in (after.counts, after.lengths, after.correct)))
    before = _Outcomes.of(baseline, behavior)
    problems = list(range(n)) * times
    fields: dict[str, Any] = plain(
        measure_responses(responses, split, behavior, problems, event_cluster_size(before.counts), n_sets)
    )
    if float(before.counts.sum()):
        change = _no_change(itself) or change_of_ratio((after.counts, after.lengths), (before.counts, before.lengths))
        fields["hesitation_cut"] = change.scaled(-1).measurement(n, "share of the hesitation rate", split)
    ones = torch.ones_like(after.lengths), torch.ones(n)
    change = _no_change(itself) or change_of_ratio((after.lengths, ones[0]), (before.lengths, ones[1]))
    fields["length_change"] = change.measurement(n, "share of the length", split)
    difference = _no_change(itself) or paired_difference(after.correct, before.correct)
    fields["accuracy_change"] = difference.measurement(n, "accuracy", split)
    if slips is not None:
        fields |= _accuracy_by_slip(after.correct, before.correct, slips, split, itself)
    if signs:
        thousands = max(1.0, float(_lengths(responses).sum())) / 1000
        fields["signs"] = {name: matched / thousands for name, matched in signs.items()}
    return fields


@dataclass(frozen=True)
class _Outcomes:
    """What is counted of every answer."""

    counts: Tensor
    lengths: Tensor
    correct: Tensor

    @classmethod
    def of(cls, responses: Sequence[Response], behavior: GivenBehavior) -> _Outcomes:
        n_shown = torch.tensor(counts(responses, behavior), dtype=torch.float64)
        return cls(n_shown, _lengths(responses), correctness(responses))


def _accuracy_by_slip(
    after: Tensor, before: Tensor, slips: Sequence[bool], split: str, itself: bool
) -> dict[str, Measurement]:
    """Accuracy and its change, apart for problems on which the target's answer has no wrong step, and has one."""
    fields: dict[str, Measurement] = {}
    slipped = torch.tensor(slips, dtype=torch.bool)
    for name, rows in (("without_slip", ~slipped), ("with_slip", slipped)):
        if n := int(rows.sum()):
            accuracy, change = clustered_share(after[..., rows]), paired_difference(after[..., rows], before[rows])
            fields[f"accuracy_{name}"] = accuracy.measurement(n, "accuracy", split)
            change = _no_change(itself) or change
            fields[f"accuracy_change_{name}"] = change.measurement(n, "accuracy", split)
    return fields


def _no_change(itself: bool) -> Estimate | None:
    """The change of a condition that is compared with itself: none, by definition."""
    return Estimate(0.0, 0.0, 0.0, reason="compared with itself") if itself else None


def _lengths(responses: Sequence[Response]) -> Tensor:
    return torch.tensor([len(r.tokens) for r in responses], dtype=torch.float64)


def corrected(
    pair: PairedModel, injections: Sequence[Injection], variant: Variant, subject: Subject, split: str
) -> OutcomesMeasurement:
    """Share of the wrong steps written into the model's answer that it corrects at once, under a condition."""
    limits = [i.n_tokens for i in injections]
    longest = None if None in limits else max(filter(None, limits), default=None)
    with subject.engine.entered(pair, variant) as model:
        responses = respond(
            model,
            [i.problem for i in injections],
            prefill=[i.prefill for i in injections],
            max_new_tokens=_smaller(subject.max_new_tokens, longest),
            temperature=subject.temperature,
        )
    is_corrected = [bool(i.corrected(r.text)) for i, r in zip(injections, responses, strict=True)]
    estimate, n = share(sum(is_corrected), len(is_corrected)), len(is_corrected)
    outcomes = "".join("1" if corrected else "0" for corrected in is_corrected)
    return OutcomesMeasurement(
        estimate.value,
        estimate.low,
        estimate.high,
        n,
        "share corrected",
        split,
        reason=estimate.reason,
        outcomes=outcomes,
    )


def _smaller(limit: int | None, other: int | None) -> int | None:
    """The smaller of two limits, where None is none."""
    return min((n for n in (limit, other) if n is not None), default=None)


def mean_corrected(
    pair: PairedModel, injections: Sequence[Injection], variants: Sequence[Variant], subject: Subject, split: str
) -> Measurement:
    """`corrected` as a mean over variants that were drawn (random sets), without the single outcomes.

    The interval of several variants includes the choice of them; the interval of one is that of `corrected`.
    """
    outcomes = [corrected(pair, injections, variant, subject, split).outcomes for variant in variants]
    hits = torch.tensor([[float(outcome) for outcome in each] for each in outcomes])
    figure = clustered_share(hits if len(variants) > 1 else hits[0]).measurement(
        len(injections), "share corrected", split
    )
    return figure if len(variants) == 1 else _of_sets(figure, hits.mean(1).tolist())


def corrected_more(more: OutcomesMeasurement, less: OutcomesMeasurement) -> Measurement:
    """By how much one condition corrects more of the same wrong steps than another, paired by wrong step."""
    first, second = (torch.tensor([float(c) for c in figure.outcomes]) for figure in (more, less))
    return paired_difference(first, second).measurement(more.n, more.unit, more.split)


@torch.no_grad()
def mediation(
    pair: PairedModel, onsets: Onsets, template: FeaturePairs, output: FeaturePairs, split: str
) -> dict[str, Measurement]:
    """How much of the effect of template features passes through output features, by intervention.

    Every figure is in nats of the behavior's log-odds at the onsets, with an interval over documents, paired:

    * total: the loss without the template features, with attention patterns and norm scales held;
    * through_output: total less direct, where direct is the same loss with the output features' activations held too;
    * interaction: the loss without both sets less the losses without each, with nothing held (2 x 2). It is negative
      where one set works through the other: removed together they lose less than the sum;
    * share: through_output over total, where the interval of total is above zero: there is no share of no loss.
    """
    names = ("clean", "total", "direct", "free", "template", "output", "both")
    sums = {name: torch.zeros(len(onsets), dtype=torch.float64) for name in names}
    n_onsets = onsets.onset.sum(1).double()
    for rows, batch in onsets.batches(tokens_per_batch=2048):
        batch = batch.to(pair.device)

        def add(name: str, odds: Tensor, batch: Onsets = batch, rows: list[int] = rows) -> None:
            by_position = torch.zeros(batch.onset.shape, dtype=torch.float64)
            by_position[batch.onset.cpu()] = host_float64(odds)
            sums[name][rows] = by_position.sum(1)

        with pair.routed("replacement"):
            changes = {
                "clean": FrozenChange(()),
                "total": FrozenChange(template),
                "direct": FrozenChange(template, held=output),
            }
            passes = frozen_by_block(pair, batch.tokens, changes)
            for name in changes:
                logits_at = partial(passes.logits, name)
                add(name, log_odds_from_logits(logits_at, batch, batch.onset, pair.rows_at_once))
            sets = {"free": [], "template": [*template], "output": [*output], "both": [*template, *output]}
            for name, features in sets.items():
                with ablated(pair, features):
                    residual = final_residual(pair, batch.tokens)
                    add(name, log_odds(pair, residual, batch, batch.onset, pair.rows_at_once))

    def per_onset(total: Tensor) -> Measurement:
        return bootstrap_ratio(total, n_onsets).measurement(len(onsets), "nats of log-odds", split)

    total, through = sums["clean"] - sums["total"], sums["direct"] - sums["total"]
    figures = {
        "total": per_onset(total),
        "through_output": per_onset(through),
        "interaction": per_onset(sums["template"] + sums["output"] - sums["free"] - sums["both"]),
    }
    if (figures["total"].low or 0.0) > 1e-9:
        figures["share"] = bootstrap_ratio(through, total).measurement(len(onsets), "share of the total", split)
    return figures
