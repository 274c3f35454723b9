"""A store of features as pages that open offline: an index of all of them, and a page to look at each.

    index.html                          every alive feature: sorted, filtered and searched where it is opened
    layer_3/features_384.html#403       features 384 to 415 of layer 3, one shown at a time

A browser reads no other file from a page that was opened as a file, so a page holds the data it shows. One page for
every feature would be 230,000 files at the paper's scale, each with a copy of style and script; one for every layer
would take minutes to open. A page therefore holds the alive ones among 32 numbers of a layer: a few hundred kilobytes
that open at once, at an address that follows from the feature's name (`feature_address`).

What comes from a model goes into a page as JSON that holds no ``<`` and reaches the screen as text alone. The policy
of each page allows only the one style and the one script that it was written with, by their hashes, and loads nothing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.set_folder import LAYER_FOLDER
from tl_adapters.features.feature import ALIVE_FIRINGS, Example, Feature, FeatureStoreError
from tl_adapters.features.store import FeatureStore
from tl_adapters.utils.files import new_folder, require_absent
from tl_adapters.utils.html import escape, script_json

PER_PAGE = 32
"""Numbers of a layer that share a page."""
INDEX_FILE = "index.html"
LISTED = 3
"""Tokens in a cell of the index."""
_STREAMS = {
    ("feature", "replacement"): "replacement (base MLPs with the adapters)",
    ("feature", "target"): "target (the adapters read along, and write nothing)",
    ("neuron", "target"): "target (the neurons of its own MLPs)",
}


def feature_address(feature: FeatureId, kind: str = "feature") -> str:
    """Where a feature is shown, from the folder of all pages: "layer_3/features_384.html#403"."""
    first = feature.index - feature.index % PER_PAGE
    return f"{LAYER_FOLDER.format(feature.layer)}/{kind}s_{first}.html#{feature.index}"


def write_feature_pages(
    store: FeatureStore,
    folder: str | Path,
    *,
    words: Sequence[str] | None = None,
    ids: Iterable[FeatureId | tuple[int, int]] | None = None,
    progress: bool = True,
) -> Path:
    """Write the index of all alive features and their pages; nothing is left where that fails.

    Args:
        store: what was collected, with the labels that it has.
        folder: must not exist.
        words: those of the store's words whose logits are of interest, in this order; None takes all.
        ids: the features that get a page; None takes every alive one, at 8 kB and some milliseconds each. The index
            lists all alive ones in any case.
        progress: show a bar.

    Returns:
        The index.

    Raises:
        FeatureStoreError: words or features that the store does not have, or none alive.
        FolderExistsError, DiskFullError.
    """
    folder = Path(folder)
    require_absent(folder)
    shown_words = _require_words(store, words)
    table = store.table()
    alive = [FeatureId(*name) for name in zip(table["layer"], table["index"], strict=True)]
    if not alive:
        raise FeatureStoreError(f"No {store.about.kind} of the store is alive; collect from more traces.")
    chosen = set(alive) if ids is None else {FeatureId(*feature) for feature in ids}
    if unknown := sorted(chosen - set(alive)):
        raise FeatureStoreError(f"{unknown[0].layer}.{unknown[0].index} is not alive in this store; see its ids().")
    title = _title(store)
    common = {"kind": store.about.kind, "per_page": PER_PAGE, "store": title, "words": shown_words}
    with new_folder(folder) as partial:
        index = _index(store, table, [name in chosen for name in alive], shown_words)
        page = _page("index", {"title": title, "kind": store.about.kind}, {**common, **index})
        (partial / INDEX_FILE).write_text(page, encoding="utf-8")
        told = {name: (label, row) for name, label, row in zip(alive, table["label"], table["top_logits"], strict=True)}
        with tqdm(total=len(chosen), disable=not progress, unit="feature", mininterval=1.0) as bar:
            for first, data in _pages(store, sorted(chosen), table, told, shown_words):
                path = partial / feature_address(first, store.about.kind).partition("#")[0]
                path.parent.mkdir(exist_ok=True)
                texts = {"title": f"Layer {first.layer} · {title}", "kind": store.about.kind, "store": title}
                path.write_text(_page("feature", texts, {**common, **data}), encoding="utf-8")
                bar.update(len(data["features"]))
    return folder / INDEX_FILE


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


# -- the index ----------------------------------------------------------------------------------------------------


class _Strings:
    """Every text of a page once; the rest of the page names it by number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))

    def optional(self, text: str) -> int:
        """-1 for no text."""
        return self(text) if text else -1


def _index(
    store: FeatureStore,
    table: Mapping[str, list[Any]],
    has_page: Sequence[bool],
    words: Sequence[str],
) -> dict[str, Any]:
    """What the index holds: columns of numbers, lists of three texts a row, and texts by number."""
    strings = _Strings()
    regions = [strings(region) for region in store.about.regions]
    numbers = {name: [_short(x) for x in table[name]] for name in ("density", "mean", "max", "decoder_norm")}
    lists = {
        name: [number for row in table[column] for number in _padded([strings(text) for text in row[:LISTED]])]
        for name, column in (("fires_on", "fires_on"), ("promotes", "top_logits"), ("suppresses", "bottom_logits"))
    }
    return {
        "layers": store.about.layers,
        "regions": regions,
        "width": LISTED,
        "columns": {
            **{name: table[name] for name in ("layer", "index", "firings")},
            **numbers,
            "region": [strings(region) for region in table["region"]],
            "region_share": [_short(x) for x in table["region_share"]],
            "label": [strings.optional(text) for text in table["label"]],
            "category": [strings.optional(text) for text in table["category"]],
            "page": [int(page) for page in has_page],
        },
        "lists": lists,
        "effects": [
            [_short(row[i]) for row in table["effects"]] for i in (store.about.words.index(word) for word in words)
        ],
        "facts": _facts(store, len(has_page)),
        "more": _details(store),
        "strings": list(strings.numbers),
    }


def _padded(numbers: list[int]) -> list[int]:
    return numbers + [-1] * (LISTED - len(numbers))


def _facts(store: FeatureStore, alive: int) -> list[tuple[str, str]]:
    about = store.about
    total = len(about.layers) * about.n_features
    return [
        ("base", about.base or "in memory"),
        ("target", about.target or "in memory"),
        ("read on", f"{about.split}: {store.documents:,} documents, {store.tokens:,} tokens"),
        ("stream", _STREAMS[about.kind, about.stream]),
        (f"alive {about.kind}s", f"{alive:,} of {total:,}: those that fired at least {ALIVE_FIRINGS} times"),
        *([("streams agree on", _agreement(store))] if store.agreement else []),
        ("activations", "in decoder-norm units: times the norm of what is written, so that layers compare"),
    ]


def _agreement(store: FeatureStore) -> str:
    overlaps = [layer["overlap"]["value"] for layer in store.agreement if layer["overlap"]["value"] is not None]
    if not overlaps:
        return "nothing: no feature fires on either"
    return (
        f"{min(overlaps):.0%} to {max(overlaps):.0%} of the firings on the target's or the replacement's stream, by "
        "layer"
    )


def _details(store: FeatureStore) -> list[tuple[str, str]]:
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


# -- the pages ----------------------------------------------------------------------------------------------------


def _pages(
    store: FeatureStore,
    chosen: Sequence[FeatureId],
    table: Mapping[str, list[Any]],
    told: Mapping[FeatureId, tuple[str, list[str]]],
    words: Sequence[str],
) -> Iterator[tuple[FeatureId, dict[str, Any]]]:
    """Each page's first feature and what the page holds, a layer after the other."""
    fires_on = dict(zip(told, table["fires_on"], strict=True))
    with_page, place = set(chosen), 0
    features = store.features(chosen)
    for _, group in itertools.groupby(chosen, lambda name: (name.layer, name.index // PER_PAGE)):
        names, strings = list(group), _Strings()
        records = [
            _record(store, feature, strings, words, fires_on[feature.id], told, with_page)
            for feature in itertools.islice(features, len(names))
        ]
        place += len(names)
        yield (
            names[0],
            {
                "layer": names[0].layer,
                "features": records,
                "before": chosen[place - len(names) - 1] if place > len(names) else None,
                "after": chosen[place] if place < len(chosen) else None,
                "strings": list(strings.numbers),
            },
        )


def _record(
    store: FeatureStore,
    feature: Feature,
    strings: _Strings,
    words: Sequence[str],
    fires_on: Sequence[str],
    told: Mapping[FeatureId, tuple[str, list[str]]],
    with_page: set[FeatureId],
) -> dict[str, Any]:
    """One feature as its page takes it; texts by number."""
    pairs = lambda found: [(strings(text), _short(value)) for text, value in found]  # noqa: E731
    buckets = lambda found: [(_short(low), _short(high), count) for low, high, count in found]  # noqa: E731
    return {
        "index": feature.id.index,
        "label": None if feature.label is None else vars(feature.label),
        "firings": feature.firings,
        **{
            name: _short(getattr(feature, name))
            for name in ("density", "mean", "max", "decoder_norm", "effect_spread", "effect_kurtosis")
        },
        "fires_on": [strings(text) for text in fires_on],
        "quantiles": [(share, _short(value)) for share, value in feature.quantiles],
        "histogram": buckets(feature.histogram),
        "regions": [(name, _short(rate), _short(feature.region_share[name])) for name, rate in feature.regions.items()],
        "thinking": [_short(rate) for rate in feature.thinking_deciles],
        "domains": [(name, _short(rate)) for name, rate in feature.domains.items()],
        "promotes": pairs(feature.top_logits),
        "suppresses": pairs(feature.bottom_logits),
        "effects": [_short(feature.effects[word]) for word in words],
        "effect_histogram": buckets(feature.effect_histogram),
        "top": [_example(store, example, strings) for example in feature.top_examples],
        "sample": [_example(store, example, strings) for example in feature.random_examples],
        "neighbours": [
            {
                "id": near.id,
                "share": _short(near.share),
                "density": _short(near.density),
                "label": told[near.id][0] if near.id in told else "",
                "promotes": [strings(text) for text in (told[near.id][1] if near.id in told else [])],
                "page": near.id in with_page,
            }
            for near in feature.coactivating
        ],
    }


def _example(store: FeatureStore, example: Example, strings: _Strings) -> tuple[Any, ...]:
    """Place of its token, document, position, region, tokens, and (place, activation) where it fires: most are 0."""
    active = [(place, _short(value)) for place, value in enumerate(example.values) if value]
    tokens = [strings(token) for token in example.display_texts]
    return example.token_index, example.document, example.position, store.region_of(example), tokens, active


def _short(value: float) -> float:
    """Four figures: more than can be seen, and half the page."""
    return float(f"{value:.4g}")


def _page(name: str, texts: Mapping[str, str], data: Mapping[str, Any]) -> str:
    """A whole page. The one style and the one script that it holds are the only ones that its policy lets run."""
    css, js = _asset("pages.css"), _asset("common.js") + _asset(f"{name}.js")
    policy = (
        f"default-src 'none'; script-src {_hash(js)}; style-src {_hash(css)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    try:
        held = script_json(data)
    except ValueError as error:
        raise FeatureStoreError(f"The store holds a number that is not finite ({error}); a page shows none.") from error
    parts = {"policy": policy, "css": css, "js": js, "data": held, **{k: escape(text) for k, text in texts.items()}}
    # One pass, so that text of the store that looks like a place to fill is left alone.
    return re.sub(r"@@([a-z]+)@@", lambda place: parts[place[1]], _asset(f"{name}.html"))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@functools.cache
def _asset(name: str) -> str:
    return (files(__package__) / "templates" / "feature_pages" / name).read_text(encoding="utf-8")
