"""A circuit on trial: what the model does without it and with it, in probabilities and in what it says.

Two measurements of every arm (a `Variant`):

* *probabilities*: over the target's own text, how likely the word is at the moments, at matched boundaries, and
  elsewhere in the response; exact, cheap, with no text of the arm's own. Beside them the harm elsewhere:
  KL(replacement || condition) away from the onsets and what follows them;
* *answers*: the arm answers the problems itself, so what hesitation is for (length, accuracy, corrections) is seen.

Arms are compared with the arm in which nothing is changed, paired by problem, with 95 % intervals
(`intervals` says which).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_adapters.circuits.onsets import BehaviorError, Onsets, final_residual, log_odds, log_odds_from_logits
from tl_adapters.circuits.subject import Injection, Subject
from tl_adapters.evaluation.behaviors import Behavior, counts
from tl_adapters.evaluation.response_metrics import correctness, rate
from tl_adapters.generation.responses import Response, respond
from tl_adapters.interventions.feature_edits import Features, ablated
from tl_adapters.interventions.frozen import frozen
from tl_adapters.interventions.variants import Variant
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.bootstrap import bootstrap_ratio
from tl_adapters.utils.clustered_intervals import (
    change_of_ratio,
    clustered_share,
    event_cluster_size,
    paired_difference,
)
from tl_adapters.utils.kl_divergence import kl_per_token
from tl_adapters.utils.measurement import Estimate, Measurement, OutcomesMeasurement, SetsMeasurement
from tl_adapters.utils.precision import host_float64, wide
from tl_adapters.utils.results import plain
from tl_adapters.utils.share_intervals import share

POSITION_KEYS = {"onset": "moment", "control": "boundary", "elsewhere": "elsewhere"}
"""Positions of `Onsets` -> what results.json calls the probability there."""
FEW_SETS = 5
"""A mean over fewer random sets than these says how many they are."""


def probabilities(
    pair: PairedModel, onsets: Onsets, variant: Variant, split: str, unchanged: Unchanged | None = None
) -> dict[str, Measurement]:
    """Probability of the behaviour at moments, boundaries and elsewhere, with intervals over documents.

    Of a phrase: of all its tokens at the moments, elsewhere as far as the text shows it (see `moments`).
    With ``unchanged``, read over the same texts, the harm elsewhere too: "kl_elsewhere" (see `kl_elsewhere`).
    """
    return _probabilities(_probability_sums(pair, onsets, variant, unchanged), split)


def mean_probabilities(
    pair: PairedModel,
    onsets: Onsets,
    variants: Sequence[Variant],
    split: str,
    unchanged: Unchanged | None = None,
) -> dict[str, Measurement]:
    """The same as a mean over variants that were drawn themselves (random sets): their choice is in the interval."""
    drawn = [_probability_sums(pair, onsets, variant, unchanged) for variant in variants]
    return _probabilities({place: torch.stack([sums[place] for sums in drawn]) for place in drawn[0]}, split)


def away(onsets: Onsets) -> Bool[Tensor, "batch pos"]:
    """Where a condition should change nothing: the response without the onsets and what follows them.

    Matched control positions are among them: the word may come there and did not, and that should stay so.
    """
    return onsets.predicting & ~onsets.onset & ~onsets.continuation


@torch.no_grad()
def kl_from_replacement(
    pair: PairedModel, variant: Variant, plain: Float[Tensor, "n d_model"], residual: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n"]:
    """KL(replacement || variant) at every position, in nats, in float32 at least; logits are formed chunk by chunk.

    Args:
        pair: with adapters.
        variant: what it is entered for: it may change the logits alone.
        plain: the replacement's final residual stream.
        residual: the variant's.
    """
    parts = [residual.new_zeros(0)]
    for was, becomes in zip(plain.split(pair.rows_at_once), residual.split(pair.rows_at_once), strict=True):
        logits = pair.unembed(was)
        with variant.entered(pair):
            parts.append(kl_per_token(logits, pair.unembed(becomes)))
    return torch.cat(parts)


class Unchanged:
    """The replacement's final residual stream over given texts, away from the onsets: read once, for all conditions."""

    @torch.no_grad()
    def __init__(self, pair: PairedModel, onsets: Onsets) -> None:
        self.residuals = []
        for _, batch in onsets.batches():
            batch = batch.to(pair.model.W_E.device)
            with pair.routed("replacement"):
                self.residuals.append(final_residual(pair, batch.tokens)[away(batch)].cpu())


def kl_elsewhere(pair: PairedModel, onsets: Onsets, variant: Variant, split: str) -> Measurement:
    """KL(replacement || variant) in nats per token, away from the onsets and what follows them (`away`).

    The interval is over documents. There is no value for a variant that rules a token out: its KL is infinite. Raises
    BehaviourError where the texts have no such position.
    """
    found = probabilities(pair, onsets, variant, split, Unchanged(pair, onsets))
    if "kl_elsewhere" not in found:
        raise BehaviorError("Every position of these responses is an onset or follows one; give longer texts.")
    return found["kl_elsewhere"]


@torch.no_grad()
def _probability_sums(
    pair: PairedModel, onsets: Onsets, variant: Variant, unchanged: Unchanged | None = None
) -> dict[str, Float[Tensor, "2 n"]]:
    """By place and document: the probabilities' sum, and how many there are; the KL elsewhere likewise."""
    sums = {key: torch.zeros(2, len(onsets), dtype=torch.float64) for key in POSITION_KEYS.values()}
    harm = torch.zeros(2, len(onsets), dtype=torch.float64)
    for number, (rows, batch) in enumerate(onsets.batches()):
        batch = batch.to(pair.model.W_E.device)
        with variant.entered(pair):  # the unembedding too: a variant may change the logits alone
            residual = final_residual(pair, batch.tokens)
            for positions, key in POSITION_KEYS.items():
                at = getattr(batch, positions)
                found = wide(log_odds(pair, residual, batch, at, pair.rows_at_once).sigmoid())
                said = found.new_zeros(at.shape)
                said[at] = found
                sums[key][:, rows] = host_float64(torch.stack([said.sum(1), at.sum(1).to(said)]))
        if unchanged is not None:
            at = away(batch)
            kl = kl_from_replacement(pair, variant, unchanged.residuals[number].to(residual), residual[at])
            by_row = torch.zeros(at.shape, dtype=torch.float64).masked_scatter(at.cpu(), host_float64(kl))
            harm[:, rows] = torch.stack([by_row.sum(1), host_float64(at.sum(1))])
    return sums if unchanged is None else sums | {"kl_elsewhere": harm}


def _probabilities(sums: dict[str, Float[Tensor, "*sets 2 n"]], split: str) -> dict[str, Measurement]:
    found: dict[str, Measurement] = {}
    for place, both in sums.items():
        top, bottom = both.unbind(-2)
        if not float(bottom.sum()):
            continue
        estimate = Estimate(None, None, None, reason="it is infinite: a token is ruled out")
        if bool(top.isfinite().all()):
            estimate = bootstrap_ratio(top, bottom)
        unit = "nats per token" if place == "kl_elsewhere" else "probability of the word"
        figure = estimate.measurement(both.shape[-1], unit, split)
        values = (top.sum(-1) / bottom.sum(-1)).reshape(-1).tolist()
        found[place] = figure if both.ndim == 2 else _of_sets(figure, values)
    return found


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
    """The report problems, answered by an arm; ``opened``: with the thinking opened for it.

    ``temperature`` None is the subject's. Every arm draws the same numbers for the same problem.
    """
    with variant.entered(pair) as model:
        return respond(
            model,
            subject.report,
            max_new_tokens=subject.max_new_tokens,
            prefill=subject.prefill if opened else "",
            temperature=subject.temperature if temperature is None else temperature,
            seed=seed,
        )


def record(
    said: Sequence[Response],
    baseline: Sequence[Response],
    words: Sequence[str] | Behavior,
    split: str,
    slips: Sequence[bool] | None = None,
    signs: dict[str, int] | None = None,
    of_sets: bool = False,
) -> dict[str, Any]:
    """What results.json holds of an arm: its rates, and how they differ from the arm with nothing changed.

    Args:
        said: by the arm; where it answers several times, all answers of one time after the other.
        baseline: by the unchanged arm, to the same problems, once. A problem is drawn with all answers to it.
        words: what is counted: words and phrases, or a behavior that counts itself.
        split: of the problems.
        slips: of every problem, did the target's answer contain a wrong step?
        signs: regular expressions counted beside the words, per 1,000 tokens.
        of_sets: the arm answers once with each of several sets of features that were drawn: their choice is part of
            the intervals.
    """
    n = len(baseline)
    times = len(said) // max(1, n)
    sets = times if of_sets else 1

    def each(values: Tensor) -> Tensor:
        return values.view(times, n) if sets > 1 else values.view(times, n).mean(0)

    shown, lengths, right = (each(values) for values in (_counts(said, words), _lengths(said), correctness(said)))
    was, were, before = _counts(baseline, words), _lengths(baseline), correctness(baseline)
    asked = list(range(n)) * times
    found: dict[str, Any] = plain(rate(said, split, words, asked, event_cluster_size(was), sets))
    if float(was.sum()):
        left = _unchanged(said is baseline) or change_of_ratio((shown, lengths), (was, were))
        found["hesitation_cut"] = left.scaled(-1).measurement(n, "share of the hesitation rate", split)
    change = _unchanged(said is baseline) or change_of_ratio((lengths, torch.ones_like(lengths)), (were, torch.ones(n)))
    found["length_change"] = change.measurement(n, "share of the length", split)
    difference = _unchanged(said is baseline) or paired_difference(right, before)
    found["accuracy_change"] = difference.measurement(n, "accuracy", split)
    if slips is not None:
        made = torch.tensor(slips, dtype=torch.bool)
        for name, rows in (("without_slip", ~made), ("with_slip", made)):
            if several := int(rows.sum()):
                of, gone = clustered_share(right[..., rows]), paired_difference(right[..., rows], before[rows])
                found[f"accuracy_{name}"] = of.measurement(several, "accuracy", split)
                gone = _unchanged(said is baseline) or gone
                found[f"accuracy_change_{name}"] = gone.measurement(several, "accuracy", split)
    if signs:
        thousands = max(1.0, float(_lengths(said).sum())) / 1000
        found["signs"] = {name: matched / thousands for name, matched in signs.items()}
    return found


def _unchanged(itself: bool) -> Estimate | None:
    """The change of an arm that is compared with itself: none, by definition."""
    return Estimate(0.0, 0.0, 0.0, reason="compared with itself") if itself else None


def _counts(said: Sequence[Response], words: Sequence[str] | Behavior) -> Tensor:
    return torch.tensor(counts(said, words), dtype=torch.float64)


def _lengths(said: Sequence[Response]) -> Tensor:
    return torch.tensor([len(r.tokens) for r in said], dtype=torch.float64)


def corrected(
    pair: PairedModel, injections: Sequence[Injection], variant: Variant, subject: Subject, split: str
) -> OutcomesMeasurement:
    """Share of the wrong steps, written into the model's answer, that it corrects at once."""
    with variant.entered(pair) as model:
        said = respond(
            model,
            [i.problem for i in injections],
            prefill=[i.prefill for i in injections],
            max_new_tokens=subject.max_new_tokens,
            temperature=subject.temperature,
        )
    right = [bool(i.corrected(r.text)) for i, r in zip(injections, said, strict=True)]
    found = share(sum(right), len(right))
    outcomes = "".join("1" if r else "0" for r in right)
    return OutcomesMeasurement(
        found.value, found.low, found.high, len(right), "share corrected", split, reason=found.reason, outcomes=outcomes
    )


def corrected_more(more: OutcomesMeasurement, less: OutcomesMeasurement) -> Measurement:
    """By how much one condition corrects more of the same wrong steps than another, paired by wrong step."""
    right, than = (torch.tensor([float(c) for c in figure.outcomes]) for figure in (more, less))
    return paired_difference(right, than).measurement(more.n, more.unit, more.split)


@torch.no_grad()
def mediation(
    pair: PairedModel, onsets: Onsets, template: Features, output: Features, split: str
) -> dict[str, Measurement]:
    """Do template features work through output features? Real interventions, in nats of the margin at the moments.

    * total: what the margin loses without the template features (patterns and norms held);
    * direct: the same with the output features' activations held too; through_output is total - direct;
    * interaction: loss without both, less the losses without each. Negative where one does its work through the other
      (2 x 2, nothing held): together they lose less than the sum.

    Intervals are over documents, paired.
    """
    names = ("clean", "total", "direct", "free", "template", "output", "both")
    sums = {name: torch.zeros(len(onsets), dtype=torch.float64) for name in names}
    places = onsets.onset.sum(1).double()
    for rows, batch in onsets.batches(2048):
        batch = batch.to(pair.model.W_E.device)

        def add_log_odds(into: str, batch: Onsets = batch, rows: list[int] = rows) -> None:
            logits = pair.model(batch.tokens)  # whole: norms are held over every position
            found = wide(log_odds_from_logits(lambda rows, places: logits[rows, places], batch, batch.onset))
            said = found.new_zeros(batch.onset.shape)
            said[batch.onset] = found
            sums[into][rows] = host_float64(said.sum(1))

        with pair.routed("replacement"):
            with frozen(pair, batch.tokens):
                add_log_odds("clean")
                with ablated(pair, template):
                    add_log_odds("total")
            with frozen(pair, batch.tokens, features=output), ablated(pair, template):
                add_log_odds("direct")
            add_log_odds("free")
            for name, features in (("template", [*template]), ("output", [*output]), ("both", [*template, *output])):
                with ablated(pair, features):
                    add_log_odds(name)

    def figure(top: Tensor, unit: str = "nats of log-odds") -> Measurement:
        return bootstrap_ratio(top, places).measurement(len(onsets), unit, split)

    total, through = sums["clean"] - sums["total"], sums["direct"] - sums["total"]
    found = {
        "total": figure(total),
        "through_output": figure(through),
        "interaction": figure(sums["template"] + sums["output"] - sums["free"] - sums["both"]),
    }
    if abs(float(total.sum())) > 1e-9:
        found["share"] = bootstrap_ratio(through, total).measurement(len(onsets), "share of the total", split)
    return found
