"""An LLM judge that sorts features into the paper's categories.

1. Features are drawn evenly from all layers, or all are taken. The shares of categories weight each layer by its number
   of alive features.
2. The judge, a model behind an endpoint, is shown the top activating and some random examples of a feature, its top and
   bottom logits, and where it fires. It replies with a category, a label and a reason. The prompts are ours.
3. Some features are judged a second time, with examples and categories in another order, and with other random examples
   where the store has more. How often the two verdicts agree shows how reliable a verdict is.

The names of the categories follow the paper (section on interpretability); their meanings are in our words
(`prompts.JUDGE_CATEGORIES`).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.autointerp.category_shares import CategoryShare, label_shares
from tl_adapters.autointerp.endpoint import Endpoint, EndpointUsage, Failure, Messages
from tl_adapters.autointerp.prompts import CATEGORY_PROMPT, JUDGE_CATEGORIES, chat_messages, feature_profile
from tl_adapters.errors import UserError
from tl_adapters.features.feature import Feature, Label
from tl_adapters.features.store import FeatureStore
from tl_adapters.utils.bootstrap import bootstrap_kappa
from tl_adapters.utils.measurement import Measurement
from tl_adapters.utils.notebook import ResultRecord, records_frame, rows_view
from tl_adapters.utils.share_intervals import share

if TYPE_CHECKING:
    from pandas import DataFrame

JUDGE_EXAMPLES = 8
"""Top activating examples that the judge is shown, and as many random ones, which show what the strongest hide."""
MAX_LABEL_CHARACTERS = 200
"""Longest label; longer ones are cut."""


class JudgingError(UserError, ValueError):
    """There is nothing to judge, or no verdict can be used."""


@dataclass(frozen=True)
class Verdict:
    """The judge's reply on one feature."""

    category: str
    """One of `prompts.JUDGE_CATEGORIES`."""
    label: str
    """A description in one line."""
    reason: str
    """The judge's reason."""


@dataclass(frozen=True)
class JudgeReport(ResultRecord):
    """Shares of the categories among the judged features, and the judge's agreement with itself."""

    model: str
    """The judge."""
    alive: int
    """Number of alive features of the store."""
    judged: int
    """Number of features with a verdict."""
    failed: dict[str, str]
    """Features without a verdict, and the reason."""
    shares: dict[str, CategoryShare]
    """Share of each category."""
    groups: dict[str, CategoryShare]
    """Share of each group, which is the first word of a category: language, domain, reasoning, uninterpretable."""
    agreement: Measurement | None
    """Share of features whose second verdict has the category of the first; None if none was judged twice."""
    group_agreement: Measurement | None
    """Share of features whose second verdict has the group of the first; None if none was judged twice."""
    kappa: Measurement | None
    """Cohen's kappa of the categories of the two verdicts; None if none was judged twice."""
    usage: EndpointUsage = field(metadata={"json_key": "spent"})
    """Requests and tokens that were used."""
    seed: int
    """Seed of the random draws."""

    def row(self) -> dict[str, Any]:
        """What was judged, and the judge's agreement with itself."""
        counts = {"model": self.model, "alive": self.alive, "judged": self.judged, "failed": len(self.failed)}
        return {**counts, "agreement": self.agreement, "group_agreement": self.group_agreement, "kappa": self.kappa}

    def to_pandas(self) -> DataFrame:
        """A DataFrame with a row for each category: number of features, and shares with their intervals."""
        return records_frame(self._categories())

    def _categories(self) -> list[dict[str, Any]]:
        return [
            {"category": name, "features": of.count, "share": of.share, "share_of_alive": of.weighted}
            for name, of in self.shares.items()
        ]

    def _repr_html_(self) -> str:
        return super()._repr_html_() + rows_view(self._categories())


def judge(
    store: FeatureStore,
    endpoint: Endpoint,
    *,
    n: int | None = None,
    retest: int = 50,
    seed: int = 0,
    progress: bool = True,
) -> JudgeReport:
    """Sort features into categories by a model; the labels that it gives are written to the store.

    Args:
        store: the store whose alive features are judged.
        endpoint: the judge.
        n: number of features, drawn evenly from the layers; None takes all.
        retest: number of these that are judged twice.
        seed: seed of the draws and orders.
        progress: show a progress bar.

    Raises:
        JudgingError: no feature is alive, or no verdict can be used.
        EndpointError: what `Endpoint.ask_all` raises.
    """
    alive = store.ids()
    if not alive or (n is not None and n < 1) or retest < 0:
        raise JudgingError(
            f"Asked for {'all' if n is None else n} features, {retest} of them twice, of {len(alive)} that are alive; "
            "give n >= 1 and retest >= 0, and a store in which something fires."
        )
    chosen = sorted(drawn_evenly(alive, len(alive) if n is None else n, seed))
    twice = sorted(random.Random(f"{seed} retest").sample(chosen, min(retest, len(chosen))))
    questions = [_question(feature, seed, 0) for feature in store.features(chosen)]
    questions += [_question(feature, seed, 1) for feature in store.features(twice)]
    used_before = endpoint.usage
    replies = endpoint.ask_all(questions, _read_verdict, progress=progress, what="judge")
    verdicts, failed = _sorted_replies(chosen, replies[: len(chosen)])
    labels = {id: Label(verdict.label, verdict.category, endpoint.model) for id, verdict in verdicts.items()}
    store.set_labels(labels)
    category_pairs = [
        (verdicts[id].category, second.category)
        for id, second in zip(twice, replies[len(chosen) :], strict=True)
        if id in verdicts and isinstance(second, Verdict)
    ]
    split = store.about.split
    return JudgeReport(
        model=endpoint.model,
        alive=len(alive),
        judged=len(verdicts),
        failed=failed,
        shares=label_shares(labels, alive, list(JUDGE_CATEGORIES), split=split, seed=seed),
        groups=_group_shares(labels, alive, split, seed),
        agreement=_agreement(category_pairs, split),
        group_agreement=_agreement([(_group(a), _group(b)) for a, b in category_pairs], split),
        kappa=_kappa(category_pairs, split, seed),
        usage=endpoint.usage.since(used_before),
        seed=seed,
    )


def drawn_evenly(ids: Sequence[FeatureId], n: int, seed: int) -> list[FeatureId]:
    """``n`` random features (or all, if there are fewer), as evenly from the layers as their numbers allow."""
    generator = random.Random(f"{seed} features")
    by_layer: dict[int, list[FeatureId]] = defaultdict(list)
    for id in sorted(ids):
        by_layer[id.layer].append(id)
    for layer in by_layer.values():
        generator.shuffle(layer)
    turns = [[id for id in turn if id is not None] for turn in zip_longest(*by_layer.values())]
    for turn in turns:  # so that the layers that give one more are random too
        generator.shuffle(turn)
    return [id for turn in turns for id in turn][:n]


def _question(feature: Feature, seed: int, attempt: int) -> Messages:
    """The question about a feature, with examples and categories in an order that depends on seed and attempt."""
    generator = random.Random(f"{seed} {feature.name} {attempt}")
    top = feature.top_examples[:JUDGE_EXAMPLES]
    in_top = {(e.document, e.position) for e in top}
    others = [e for e in feature.random_examples if (e.document, e.position) not in in_top]
    examples = [*top, *generator.sample(others, min(JUDGE_EXAMPLES, len(others)))]
    generator.shuffle(examples)
    names = list(JUDGE_CATEGORIES)
    generator.shuffle(names)
    prompt = CATEGORY_PROMPT % "\n".join(f'- "{name}": {JUDGE_CATEGORIES[name]}' for name in names)
    return chat_messages(prompt, feature_profile(feature, examples))


def _read_verdict(reply: Any) -> Verdict:
    """The verdict in a reply. Raises ValueError for anything else.

    The texts of these errors are sent to the judge, so cached replies are found by them; see `Endpoint.ask_all`.
    """
    keys = ("category", "label", "reason")
    if not isinstance(reply, dict) or not all(isinstance(reply.get(key), str) for key in keys):
        raise ValueError('it is no object with the texts "category", "label" and "reason"')
    if reply["category"] not in JUDGE_CATEGORIES:
        raise ValueError(f"the category {reply['category']!r} is none of {list(JUDGE_CATEGORIES)}")
    return Verdict(reply["category"], one_line(reply["label"]), one_line(reply["reason"]))


def one_line(text: str) -> str:
    """A reply's text as a label: in one line, and cut if it is too long. Raises ValueError where it is empty."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())  # UTF-8 lacks the halves of characters
    if not text:
        raise ValueError("a text is empty")
    return text if len(text) <= MAX_LABEL_CHARACTERS else text[: MAX_LABEL_CHARACTERS - 1] + "…"


def _sorted_replies(
    ids: Sequence[FeatureId], replies: Sequence[Verdict | Failure]
) -> tuple[dict[FeatureId, Verdict], dict[str, str]]:
    """The verdicts by feature, and the reasons of failures by name. Raises JudgingError where no reply is a verdict."""
    verdicts = {id: reply for id, reply in zip(ids, replies, strict=True) if isinstance(reply, Verdict)}
    failed = {
        f"{id.layer}.{id.index}": reply.reason
        for id, reply in zip(ids, replies, strict=True)
        if isinstance(reply, Failure)
    }
    if not verdicts:
        raise JudgingError(
            f"None of {len(ids)} features got a usable verdict; the first reply: {min(failed.values())}."
        )
    return verdicts, failed


def _group(category: str) -> str:
    return category.partition(":")[0]


def _group_shares(
    labels: Mapping[FeatureId, Label], alive: Sequence[FeatureId], split: str, seed: int
) -> dict[str, CategoryShare]:
    groups = list(dict.fromkeys(map(_group, JUDGE_CATEGORIES)))
    group_labels = {id: Label(label.text, _group(label.category)) for id, label in labels.items()}
    return label_shares(group_labels, alive, groups, split=split, seed=seed)


def _agreement(pairs: Sequence[tuple[str, str]], split: str) -> Measurement | None:
    if not pairs:
        return None
    same, n = sum(a == b for a, b in pairs), len(pairs)
    return share(same, n).measurement(n, "share of features judged alike twice", split)


def _kappa(pairs: Sequence[tuple[str, str]], split: str, seed: int) -> Measurement | None:
    if not pairs:
        return None
    order = list(JUDGE_CATEGORIES)
    first, second = (torch.tensor([order.index(pair[side]) for pair in pairs]) for side in (0, 1))
    return bootstrap_kappa(first, second, seed).measurement(len(pairs), "Cohen's kappa", split)
