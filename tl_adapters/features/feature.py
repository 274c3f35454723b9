"""What is known of one feature: the records that pages, labels and exports read.

A `Feature` comes out of a store (`feature_store`) and describes an adapter's feature or, for comparison, a neuron of
the target's MLP. All its activations are in decoder-norm units: the activation times the norm of what the feature
writes, with that norm beside it. So a feature with a small encoder and a large decoder looks the same as one with a
large encoder and a small decoder, which compute the same.

In a notebook a feature draws itself by circuitsvis, from its own script, which loads nothing; tokens are escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.data.tokens import CONTINUATION, span_texts
from tl_adapters.errors import UserError
from tl_adapters.utils.html import escape, table
from tl_adapters.utils.notebook import NotebookView, circuitsvis_tokens, circuitsvis_view

ALIVE_FIRINGS = 10
"""A feature is alive if it fired at least this often."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Shares of a feature's firings whose activation is told."""
Kind = Literal["feature", "neuron"]
Stream = Literal["replacement", "target"]


_STYLE = """<style>
.tl-feature table { display: inline-table; margin: 4px 32px 4px 0; vertical-align: top; }
.tl-feature td, .tl-feature th { text-align: left; padding: 1px 12px 1px 0; } .tl-feature h4 { margin: 12px 0 2px; }
.tl-feature code { white-space: pre; } .tl-feature small { opacity: .7; }
</style>"""
SIGNS = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})
"""What shows where a token has a space or a line break, in places where it would not be seen."""


class FeatureStoreError(UserError, ValueError):
    """A feature store that cannot be read, or that would not mean what is asked of it."""


@dataclass(frozen=True)
class Example:
    """A stretch of a document around one token on which a feature fires."""

    tokens: tuple[str, ...]
    """Each token's text by itself (`vocabulary.token_text`)."""
    token_ids: tuple[int, ...]
    """The same as ids."""
    values: tuple[float, ...]
    """The feature's activation on each token, in decoder-norm units; 0 where it does not fire."""
    at: int
    """Place, in ``tokens``, of the token that the example was chosen for."""
    document: int
    """Number of the document in the store."""
    position: int
    """Position of that token in the document."""

    @property
    def texts(self) -> list[str]:
        """The tokens' texts, which join to the text of the stretch; "" where a token goes on with a character."""
        return span_texts(self.tokens)

    @property
    def shown(self) -> list[str]:
        """The same for views in which each token has a box of its own."""
        return span_texts(self.tokens, CONTINUATION)


@dataclass(frozen=True)
class Neighbour:
    """A feature that often fires where another one does."""

    id: FeatureId
    """Which one."""
    share: float
    """Share of the sampled firings of the first at which this one is among the strongest."""
    density: float
    """Share of all tokens on which this one fires: what the share would be if the two were independent."""


@dataclass(frozen=True)
class Label:
    """What a feature is called, by whom, and how well that was tested."""

    text: str
    """One line."""
    category: str = ""
    """Of the judge's or the rules' categories."""
    source: str = ""
    """ "rules", or the model that judged."""
    score: float | None = None
    """Detection score (balanced accuracy on examples that the label was not made from); None if not measured."""


@dataclass(frozen=True)
class Feature:
    """Everything the store knows of one feature (or of one MLP neuron). Activations are in decoder-norm units."""

    id: FeatureId
    """Layer and index."""
    kind: Kind
    """An adapter's feature, or a neuron of the target's MLP."""
    firings: int
    """Tokens on which it fires."""
    density: float
    """The same as a share of all tokens."""
    mean: float
    """Mean activation where it fires; 0 if it never does."""
    max: float
    """Largest activation."""
    decoder_norm: float
    """Norm of what it writes per unit of raw activation; activation over this is what the hook point holds."""
    quantiles: tuple[tuple[float, float], ...]
    """(share, activation): below it lies that share of its firings. From the histogram, so good to a fifth."""
    histogram: tuple[tuple[float, float, int], ...]
    """(low, high, firings) of every bucket from the first to the last that is not empty."""
    regions: Mapping[str, float]
    """Region of the trace to the share of that region's tokens on which it fires."""
    region_share: Mapping[str, float]
    """Region of the trace to the share of its firings that lie there."""
    thinking: tuple[float, ...]
    """Share of tokens on which it fires, by tenth of the thinking."""
    domains: Mapping[str, float]
    """Domain of the document (where the data says so) to the share of tokens on which it fires."""
    promotes: tuple[tuple[str, float], ...]
    """Tokens whose logits it raises most, and by how much per unit of activation; strongest first."""
    suppresses: tuple[tuple[str, float], ...]
    """Likewise lowers (negative)."""
    effects: Mapping[str, float]
    """Its effect on the chosen words' logits, per unit of activation."""
    effect_spread: float
    """Standard deviation of its effects over the vocabulary."""
    effect_kurtosis: float
    """Excess kurtosis of its effects: large where few tokens take all of it."""
    effect_histogram: tuple[tuple[float, float, int], ...]
    """(low, high, tokens) of its effects over the vocabulary."""
    top: tuple[Example, ...] = field(repr=False)
    """Where it fires most strongly, one place in a document; strongest first."""
    sample: tuple[Example, ...] = field(repr=False)
    """A uniform random sample of its firings, strongest first."""
    neighbours: tuple[Neighbour, ...] = ()
    """Features that fire where it does more often than by chance."""
    label: Label | None = None
    """What it is called."""

    @property
    def name(self) -> str:
        """ "layer.index", as the command line takes it."""
        return f"{self.id.layer}.{self.id.index}"

    def _repr_html_(self) -> str:
        return feature_view(self).html


def feature_view(feature: Feature) -> NotebookView:
    """A feature's figures, what it writes, where it fires, and its examples: strongest first, then a random sample."""
    label = feature.label
    named = "" if label is None else f" · {escape(label.text)}"
    chip = f" <small>{escape(label.category)}</small>" if label and label.category else ""
    figures = (
        f"fires on {feature.density:.3g} of the tokens ({feature.firings:,} times), mean {feature.mean:.3g}, "
        f"largest {feature.max:.3g}; decoder norm {feature.decoder_norm:.3g}"
    )
    regions = [
        [escape(name), f"{rate:.3g}", f"{feature.region_share[name]:.3g}"] for name, rate in feature.regions.items()
    ]
    head = (
        f'{_STYLE}<div class="tl-feature"><h3>{feature.kind.capitalize()} {feature.name}{named}{chip}</h3>'
        f"<p>{figures}</p>{_effects('raises', feature.promotes)}{_effects('lowers', feature.suppresses)}"
        f"{table(['region', 'of its tokens', 'of the firings'], regions)}</div>"
    )
    parts: list[str | tuple[str, dict[str, object]]] = [head]
    for title, examples in (("Strongest activations", feature.top), ("A random sample", feature.sample)):
        if examples:
            parts += [f'<div class="tl-feature"><h4>{title}</h4></div>', _examples(feature, examples)]
    return circuitsvis_view(parts)


def _effects(title: str, effects: Sequence[tuple[str, float]]) -> str:
    return table(
        [title, ""], [[f"<code>{escape(text.translate(SIGNS))}</code>", f"{value:+.3g}"] for text, value in effects]
    )


def _examples(feature: Feature, examples: Sequence[Example]) -> tuple[str, dict[str, object]]:
    return "TopkSamples", {
        "tokens": [[[circuitsvis_tokens(example.shown) for example in examples]]],
        "activations": [[[list(example.values) for example in examples]]],
        "zerothDimensionName": "Layer",
        "firstDimensionName": feature.kind.capitalize(),
        "zerothDimensionLabels": [str(feature.id.layer)],
        "firstDimensionLabels": [str(feature.id.index)],
    }
