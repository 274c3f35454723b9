"""HTML pages of a feature store that open offline: an index of all alive features, and pages that show each feature.

    index.html                          every alive feature; sorted, filtered and searched in the browser
    layer_3/features_384.html#403       features 384 to 415 of layer 3, one displayed at a time

A browser does not let a page that was opened as a file read other files, so each page holds the data that it shows. One
page per feature would be 230,000 files at the paper's scale, each with a copy of style and script; one page per layer
would take minutes to open. A page therefore holds the alive features among 32 consecutive indices of a layer: a few
hundred kilobytes that open at once, at an address that follows from the feature's id (`feature_address`).

Text that comes from a model enters a page as JSON without ``<`` and is displayed as text only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.set_folder import LAYER_FOLDER
from tl_adapters.features.feature import ALIVE_FIRINGS, Example, Feature, FeatureStoreError
from tl_adapters.features.store import FeatureStore
from tl_adapters.pages.navigation import FEATURE_INDEX_PAGE, page_links
from tl_adapters.utils.arguments import HasFeatures, feature_pairs
from tl_adapters.utils.files import new_folder, replaced_folder, require_absent, write_text
from tl_adapters.utils.html import render
from tl_adapters.utils.renamed import renamed_arguments
from tl_adapters.utils.strict_json import NotFiniteJsonError

INDICES_PER_PAGE = 32
"""Consecutive feature indices of a layer that share a page."""
_OWN_NAMES = (FEATURE_INDEX_PAGE, LAYER_FOLDER.format("*"))
_TOKENS_PER_CELL = 3
"""Tokens listed in a cell of the index."""
_STREAM_DESCRIPTIONS = {
    ("feature", "replacement"): "replacement (base MLPs with the adapters)",
    ("feature", "target"): "target (the adapters read along, and write nothing)",
    ("neuron", "target"): "target (the neurons of its own MLPs)",
}


def feature_address(feature: FeatureId, kind: str = "feature") -> str:
    """Return the address of a feature, relative to the folder of the index: "layer_3/features_384.html#403"."""
    first = feature.index - feature.index % INDICES_PER_PAGE
    return f"{LAYER_FOLDER.format(feature.layer)}/{kind}s_{first}.html#{feature.index}"


@renamed_arguments(ids="features")
def write_feature_pages(
    store: FeatureStore,
    folder: str | Path,
    *,
    words: Sequence[str] | None = None,
    features: Iterable[FeatureId | tuple[int, int]] | HasFeatures | None = None,
    replace: bool = False,
    progress: bool = True,
) -> Path:
    """Write the index of all alive features and their pages; on failure the folder is not created.

    Args:
        store: the feature store, whose labels are shown.
        folder: must not exist, unless ``replace`` is set.
        words: those of the store's words whose logit effects are shown, in this order; None shows all.
        features: pairs (layer, index), or a circuit with its features, that get a page; None takes every alive one, at
            8 kB and some milliseconds each. The index lists all alive features in either case.
        replace: replace earlier pages once the new ones are complete; other files in the folder stay.
        progress: whether to show a progress bar.

    Returns:
        The path of the index.

    Raises:
        FeatureStoreError: words or features that the store does not have, or a store without alive features.
        ArgumentError: ``features`` holds something that is not a feature.
        FolderExistsError, DiskFullError: the folder cannot be made.
    """
    folder = Path(folder)
    if not replace:
        require_absent(folder)
    shown_words = _require_words(store, words)
    table = store.table()
    alive = [FeatureId(*id) for id in zip(table["layer"], table["index"], strict=True)]
    if not alive:
        raise FeatureStoreError(f"No {store.about.kind} of the store is alive; collect from more traces.")
    with_page = set(alive) if features is None else {FeatureId(*feature) for feature in feature_pairs(features)}
    if unknown := sorted(with_page - set(alive)):
        raise FeatureStoreError(f"{unknown[0].layer}.{unknown[0].index} is not alive in this store; see its ids().")
    title = _title(store)
    pages = page_links(folder / FEATURE_INDEX_PAGE)
    common = {"kind": store.about.kind, "per_page": INDICES_PER_PAGE, "store": title, "words": shown_words}
    with replaced_folder(folder, _OWN_NAMES) if replace else new_folder(folder) as partial:
        index = _index_json(store, table, [id in with_page for id in alive], shown_words)
        page = _page("index", {"title": title, "kind": store.about.kind, "run_pages": pages}, {**common, **index})
        write_text(partial / FEATURE_INDEX_PAGE, page)
        nested = page_links(folder / feature_address(FeatureId(0, 0)).partition("#")[0])
        columns = (table[name] for name in ("label", "top_logits", "fires_on"))
        summaries = {id: _Summary(*row) for id, *row in zip(alive, *columns, strict=True)}
        with tqdm(total=len(with_page), disable=not progress, unit="feature", mininterval=1.0) as bar:
            for first, data in _pages_json(store, sorted(with_page), summaries, shown_words):
                path = partial / feature_address(first, store.about.kind).partition("#")[0]
                texts = {"title": f"Layer {first.layer} · {title}", "kind": store.about.kind, "store": title}
                write_text(path, _page("feature", {**texts, "run_pages": nested}, {**common, **data}))
                bar.update(len(data["features"]))
    return folder / FEATURE_INDEX_PAGE


def _require_words(store: FeatureStore, words: Sequence[str] | None) -> list[str]:
    known = store.about.words
    if words is not None and (unknown := [word for word in words if word not in known]):
        raise FeatureStoreError(
            f"The store holds no effects on {unknown[0]!r}; it has {', '.join(map(repr, known)) or 'none'}. Collect "
            "again with that word among words=."
        )
    return list(known if words is None else dict.fromkeys(words))


def _title(store: FeatureStore) -> str:
    about = store.about
    target = about.target.rstrip("/").rpartition("/")[2] or "a model in memory"
    return f"{about.kind.capitalize()}s of {target}, {about.stream} stream, {about.split}"


class _StringTable:
    """The texts of a page, each stored once; the rest of the page refers to a text by its number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))

    def optional(self, text: str) -> int:
        """Return the number of a text, or -1 for an empty text."""
        return self(text) if text else -1


# -- the index ----------------------------------------------------------------------------------------------------


def _index_json(
    store: FeatureStore,
    table: Mapping[str, list[Any]],
    has_page: Sequence[bool],
    words: Sequence[str],
) -> dict[str, Any]:
    """Return the data of the index: columns of numbers, lists of three texts per row, and the texts by number."""
    strings = _StringTable()
    regions = [strings(region) for region in store.about.regions]
    numbers = {name: [_rounded(x) for x in table[name]] for name in ("density", "mean", "max", "decoder_norm")}
    lists = {
        name: [
            number for row in table[column] for number in _padded([strings(text) for text in row[:_TOKENS_PER_CELL]])
        ]
        for name, column in (("fires_on", "fires_on"), ("promotes", "top_logits"), ("suppresses", "bottom_logits"))
    }
    return {
        "layers": store.about.layers,
        "regions": regions,
        "width": _TOKENS_PER_CELL,
        "columns": {
            **{name: table[name] for name in ("layer", "index", "firings")},
            **numbers,
            "region": [strings(region) for region in table["region"]],
            "region_share": [_rounded(x) for x in table["region_share"]],
            "label": [strings.optional(text) for text in table["label"]],
            "category": [strings.optional(text) for text in table["category"]],
            "page": [int(page) for page in has_page],
        },
        "lists": lists,
        "effects": [
            [_rounded(row[i]) for row in table["effects"]] for i in (store.about.words.index(word) for word in words)
        ],
        "facts": _facts(store, len(has_page)),
        "more": _details(store),
        "strings": list(strings.numbers),
    }


def _padded(numbers: list[int]) -> list[int]:
    return numbers + [-1] * (_TOKENS_PER_CELL - len(numbers))


def _facts(store: FeatureStore, alive: int) -> list[tuple[str, str]]:
    """Return the facts at the top of the index, as (name, text)."""
    about = store.about
    total = len(about.layers) * about.n_features
    return [
        ("base", about.base or "in memory"),
        ("target", about.target or "in memory"),
        ("read on", f"{about.split}: {store.documents:,} documents, {store.tokens:,} tokens"),
        *([("not republished", f"the text of {n:,} documents is left out")] if (n := _withheld(store)) else []),
        ("stream", _STREAM_DESCRIPTIONS[about.kind, about.stream]),
        (f"alive {about.kind}s", f"{alive:,} of {total:,}: those that fired at least {ALIVE_FIRINGS} times"),
        *([("streams agree on", _agreement(store))] if store.agreement else []),
        ("activations", "in decoder-norm units: times the norm of what is written, so that layers compare"),
    ]


def _withheld(store: FeatureStore) -> int:
    """Return the number of documents of which examples show only the token that they were chosen for."""
    return int(store.part.documents.withheld.sum())


def _agreement(store: FeatureStore) -> str:
    overlaps = [layer["overlap"]["value"] for layer in store.agreement if layer["overlap"]["value"] is not None]
    if not overlaps:
        return "nothing: no feature fires on either"
    return (
        f"{min(overlaps):.0%} to {max(overlaps):.0%} of the firings on the target's or the replacement's stream, by "
        "layer"
    )


def _details(store: FeatureStore) -> list[tuple[str, str]]:
    """Return the facts that the index shows on request, as (name, text)."""
    return [
        ("layers", ", ".join(map(str, store.about.layers))),
        ("tokens by region", ", ".join(f"{name} {n:,}" for name, n in store.region_tokens.items())),
        *(
            (
                f"streams, layer {layer['layer']}",
                "no feature fires on either"
                if layer["overlap"]["value"] is None
                else f"{layer['overlap']['value']:.1%} of the firings on either are on both",
            )
            for layer in store.agreement
        ),
        *((f"fingerprint, {name}", value) for name, value in store.about.fingerprints.items() if "." not in name),
    ]


# -- the pages of features ------------------------------------------------------------------------------------------


class _Summary(NamedTuple):
    """What the pages show of a feature besides its record, and of features that are co-active with it."""

    label: str
    """The label; "" without one."""
    top_logits: list[str]
    """Tokens whose logits the feature raises most."""
    fires_on: list[str]
    """Tokens on which the feature fires most."""


def _pages_json(
    store: FeatureStore,
    with_page: Sequence[FeatureId],
    summaries: Mapping[FeatureId, _Summary],
    words: Sequence[str],
) -> Iterator[tuple[FeatureId, dict[str, Any]]]:
    """Yield the first feature and the data of each page, in the order of ``with_page``, which is sorted."""
    linked, end = set(with_page), 0
    features = store.features(with_page)
    for _, group in itertools.groupby(with_page, lambda id: (id.layer, id.index // INDICES_PER_PAGE)):
        ids, strings = list(group), _StringTable()
        records = [
            _feature_json(store, feature, strings, words, summaries, linked)
            for feature in itertools.islice(features, len(ids))
        ]
        start, end = end, end + len(ids)
        yield (
            ids[0],
            {
                "layer": ids[0].layer,
                "features": records,
                "before": with_page[start - 1] if start > 0 else None,
                "after": with_page[end] if end < len(with_page) else None,
                "strings": list(strings.numbers),
            },
        )


def _feature_json(
    store: FeatureStore,
    feature: Feature,
    strings: _StringTable,
    words: Sequence[str],
    summaries: Mapping[FeatureId, _Summary],
    linked: set[FeatureId],
) -> dict[str, Any]:
    """Return one feature as the script of its page reads it; texts are numbers of ``strings``."""
    logits = lambda tokens: [(strings(text), _rounded(value)) for text, value in tokens]  # noqa: E731
    histogram = lambda buckets: [(_rounded(low), _rounded(high), count) for low, high, count in buckets]  # noqa: E731
    no_summary = _Summary("", [], [])
    return {
        "index": feature.id.index,
        "label": None if feature.label is None else vars(feature.label),
        "firings": feature.firings,
        **{
            name: _rounded(getattr(feature, name))
            for name in ("density", "mean", "max", "decoder_norm", "effect_spread", "effect_kurtosis")
        },
        "fires_on": [strings(text) for text in summaries[feature.id].fires_on],
        "quantiles": [(share, _rounded(value)) for share, value in feature.quantiles],
        "histogram": histogram(feature.histogram),
        "regions": [
            (name, _rounded(rate), _rounded(feature.region_share[name])) for name, rate in feature.regions.items()
        ],
        "thinking": [_rounded(rate) for rate in feature.thinking_deciles],
        "domains": [(name, _rounded(rate)) for name, rate in feature.domains.items()],
        "promotes": logits(feature.top_logits),
        "suppresses": logits(feature.bottom_logits),
        "effects": [_rounded(feature.effects[word]) for word in words],
        "effect_histogram": histogram(feature.effect_histogram),
        "top": [_example_json(store, example, strings) for example in feature.top_examples],
        "sample": [_example_json(store, example, strings) for example in feature.random_examples],
        "neighbours": [
            {
                "id": other.id,
                "share": _rounded(other.share),
                "density": _rounded(other.density),
                "label": summaries.get(other.id, no_summary).label,
                "promotes": [strings(text) for text in summaries.get(other.id, no_summary).top_logits],
                "page": other.id in linked,
            }
            for other in feature.coactivating
        ],
    }


def _example_json(store: FeatureStore, example: Example, strings: _StringTable) -> tuple[Any, ...]:
    """Return an example as (token index, document, position, region, tokens, activations).

    The activations are (token index, activation) of the tokens on which the feature is active, since most are 0.
    """
    active = [(index, _rounded(value)) for index, value in enumerate(example.values) if value]
    tokens = [strings(token) for token in example.display_texts]
    return example.token_index, example.document, example.position, store.region_of(example), tokens, active


def _rounded(value: float) -> float:
    """Return a number with four significant digits, which halves the size of a page without a visible change."""
    return float(f"{value:.4g}")


def _page(name: str, texts: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Return a whole page with its data."""
    try:
        return render(f"feature_pages/{name}.html.j2", **texts, data=data)
    except NotFiniteJsonError as error:
        raise FeatureStoreError(
            f"The store holds a number that is not finite ({error}), which a page cannot show."
        ) from error
