"""The records that describe one feature: its statistics, examples, logit effects and label.

A `Feature` is read from a `FeatureStore` and describes an adapter's feature or, for comparison, a neuron of the
target's MLP. All activations are in decoder-norm units: the raw activation times the norm of the feature's decoder row,
which is given beside it. A feature with a small encoder and a large decoder and one with a large encoder and a small
decoder compute the same, and in these units they look the same.

In a notebook, a feature displays itself with circuitsvis, whose script is embedded so that nothing is loaded from the
network; token texts are escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.data.tokens import CONTINUATION, span_texts
from tl_adapters.errors import UserError
from tl_adapters.utils.html import render
from tl_adapters.utils.notebook import NotebookView, ResultRecord, circuitsvis_tokens, circuitsvis_view
from tl_adapters.utils.renamed import renamed_attributes

ALIVE_FIRINGS = 10
"""A feature counts as alive if it fired at least this often."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles of its activations that a feature's record gives."""
UnitKind = Literal["feature", "neuron"]
"""An adapter's feature, or a neuron of the target's MLP."""
ResidualStream = Literal["replacement", "target"]
"""The model whose residual stream features are read on."""
VISIBLE_WHITESPACE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})
"""Visible signs for white space in tokens, for `str.translate`."""


class FeatureStoreError(UserError, ValueError):
    """A feature store cannot be read, or does not match what is asked of it."""


@renamed_attributes(at="token_index", shown="display_texts")
@dataclass(frozen=True)
class Example:
    """A window of a document around one token, with a feature's activation on every token of the window."""

    tokens: tuple[str, ...]
    """Text of each token by itself (`data.tokens.token_text`)."""
    token_ids: tuple[int, ...]
    """Ids of the same tokens."""
    values: tuple[float, ...]
    """Activation of the feature on each token, in decoder-norm units; 0 where it does not fire."""
    token_index: int
    """Index, in ``tokens``, of the token that the example was chosen for."""
    document: int
    """Number of the document in the store."""
    position: int
    """Position of the chosen token in the document."""

    @property
    def texts(self) -> list[str]:
        """Texts of the tokens, which join to the text of the window; "" where a token continues a character."""
        return span_texts(self.tokens)

    @property
    def display_texts(self) -> list[str]:
        """The same texts for views that draw a box per token: a mark where a token continues a character."""
        return span_texts(self.tokens, CONTINUATION)


@dataclass(frozen=True)
class CoactivatingFeature:
    """A feature that often fires on the tokens on which another feature fires."""

    id: FeatureId
    """Layer and index."""
    share: float
    """Share of the first feature's sampled firings at which this one is among the strongest features."""
    density: float
    """Share of all tokens on which this one fires, which is what ``share`` would be if the two were independent."""


@dataclass(frozen=True)
class Label:
    """A short description of a feature, who gave it, and its detection score."""

    text: str
    """The description, in one line."""
    category: str = ""
    """One of the categories of the judge or of the rules."""
    source: str = ""
    """ "rules", or the name of the model that judged."""
    score: float | None = None
    """Detection score: balanced accuracy on examples that the label was not made from; None if not measured."""

    def __post_init__(self) -> None:
        """Replace halves of characters, which the JSON of a judge can spell and no page can hold, by "?"."""
        for name in ("text", "category", "source"):
            object.__setattr__(self, name, getattr(self, name).encode("utf-8", "replace").decode())


@renamed_attributes(
    promotes="top_logits",
    suppresses="bottom_logits",
    top="top_examples",
    sample="random_examples",
    neighbours="coactivating",
    thinking="thinking_deciles",
)
@dataclass(frozen=True)
class Feature(ResultRecord):
    """Everything that a store holds on one feature or one MLP neuron. Activations are in decoder-norm units."""

    id: FeatureId
    """Layer and index."""
    kind: UnitKind
    """An adapter's feature, or a neuron of the target's MLP."""
    firings: int
    """Number of tokens on which it fires."""
    density: float
    """Share of all tokens on which it fires."""
    mean: float
    """Mean activation over its firings; 0 if it never fires."""
    max: float
    """Largest activation."""
    decoder_norm: float
    """Norm of its decoder row. An activation divided by this norm is the value at the hook point."""
    quantiles: tuple[tuple[float, float], ...]
    """(share, activation): this share of its firings lies below the activation. Read off the histogram, so accurate to
    about a fifth."""
    histogram: tuple[tuple[float, float, int], ...]
    """(low, high, firings) for every bucket from the first to the last that is not empty."""
    regions: Mapping[str, float]
    """Share of each trace region's tokens on which it fires."""
    region_share: Mapping[str, float]
    """Share of its firings that lie in each trace region."""
    thinking_deciles: tuple[float, ...]
    """Share of tokens on which it fires, by decile of the thinking."""
    domains: Mapping[str, float]
    """Share of tokens on which it fires, by domain of the document, where the data names domains."""
    top_logits: tuple[tuple[str, float], ...]
    """Tokens whose logits it raises most, with the effect per unit of activation; strongest first."""
    bottom_logits: tuple[tuple[str, float], ...]
    """Tokens whose logits it lowers most, with the (negative) effect per unit of activation; strongest first."""
    effects: Mapping[str, float]
    """Effect on the logits of the chosen words, per unit of activation."""
    effect_spread: float
    """Standard deviation of its logit effects over the vocabulary."""
    effect_kurtosis: float
    """Excess kurtosis of its logit effects over the vocabulary; large where few tokens take most of the effect."""
    effect_histogram: tuple[tuple[float, float, int], ...]
    """(low, high, tokens) for each bin of its logit effects over the vocabulary."""
    top_examples: tuple[Example, ...] = field(repr=False)
    """Top activating examples, at most one per document; strongest first."""
    random_examples: tuple[Example, ...] = field(repr=False)
    """A uniform random sample of its firings; strongest first."""
    coactivating: tuple[CoactivatingFeature, ...] = ()
    """Co-activating features: those that fire on its tokens more often than chance."""
    label: Label | None = None
    """Its label, if it has one."""

    @property
    def name(self) -> str:
        """ "layer.index", as the command line takes it."""
        return f"{self.id.layer}.{self.id.index}"

    def _repr_html_(self) -> str:
        return feature_view(self).html


def feature_view(feature: Feature) -> NotebookView:
    """A notebook view of a feature: its statistics, top logits, trace regions, top and random examples."""
    statistics = (
        f"fires on {feature.density:.3g} of the tokens ({feature.firings:,} times), mean {feature.mean:.3g}, "
        f"largest {feature.max:.3g}; decoder norm {feature.decoder_norm:.3g}"
    )
    head = render(
        "notebook/feature.html.j2",
        name=f"{feature.kind.capitalize()} {feature.name}",
        label=feature.label,
        statistics=statistics,
        top_logits=_logit_texts(feature.top_logits),
        bottom_logits=_logit_texts(feature.bottom_logits),
        regions=[[name, f"{rate:.3g}", f"{feature.region_share[name]:.3g}"] for name, rate in feature.regions.items()],
    )
    parts: list[Markup | tuple[str, dict[str, object]]] = [head]
    for title, examples in (
        ("Top activating examples", feature.top_examples),
        ("A random sample", feature.random_examples),
    ):
        if examples:
            parts += [render("notebook/heading.html.j2", title=title), _examples_view(feature, examples)]
    return circuitsvis_view(parts)


def _logit_texts(logits: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    return [(text.translate(VISIBLE_WHITESPACE), f"{value:+.3g}") for text, value in logits]


def _examples_view(feature: Feature, examples: Sequence[Example]) -> tuple[str, dict[str, object]]:
    return "TopkSamples", {
        "tokens": [[[circuitsvis_tokens(example.display_texts) for example in examples]]],
        "activations": [[[list(example.values) for example in examples]]],
        "zerothDimensionName": "Layer",
        "firstDimensionName": feature.kind.capitalize(),
        "zerothDimensionLabels": [str(feature.id.layer)],
        "firstDimensionLabels": [str(feature.id.index)],
    }
