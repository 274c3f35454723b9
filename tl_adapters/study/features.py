"""What a run's features are: collected, held against the target's neurons, labelled by rules, drawn as pages.

RUN/features/store       the adapters' features (`feature_store`)
RUN/features/neurons     the target's MLP neurons on the same documents
RUN/features/pages       an index of all features, and what is known of each; neuron_pages likewise
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_adapters import organism
from tl_adapters.autointerp.category_shares import label_shares
from tl_adapters.autointerp.rule_labels import RULES_SOURCE, label_by_rules
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.config import Dtype, RunConfig
from tl_adapters.data.traces import Trace
from tl_adapters.data.words import hesitation_tokens
from tl_adapters.errors import UserError
from tl_adapters.features.collect import collect_features, collect_share
from tl_adapters.features.feature import ResidualStream
from tl_adapters.features.store import FeatureStore
from tl_adapters.features.store_description import StoreOptions
from tl_adapters.features.store_files import LABELS_FILE, read_description, read_labels
from tl_adapters.features.stream_agreement import stream_agreement
from tl_adapters.generation.responses import respond, traces_of
from tl_adapters.interop.neuronpedia import write_neuronpedia
from tl_adapters.interop.sae_dashboard import require_dashboard, write_sae_dashboard
from tl_adapters.models.adapter_checks import short_model_name
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.feature_pages import write_feature_pages
from tl_adapters.study.open_run import is_builtin, open_held_out, open_run, require_adapters
from tl_adapters.utils.results import read_results, stage, write_results

log = logging.getLogger(__name__)

FEATURES_FOLDER, STORE_FOLDER, NEURONS_FOLDER, PAGES_FOLDER, NEURON_PAGES_FOLDER = (
    "features",
    "store",
    "neurons",
    "pages",
    "neuron_pages",
)
AGREEMENT_DOCUMENTS = 200
"""Documents on which the two streams are compared."""
OWN_PROBLEMS = 1_800
"""Problems of the built-in pair whose answers are read where no documents are named."""


def features_stage(pair: PairedModel, traces: Sequence[Trace], folder: Path, split: str) -> FeatureStore:
    """Collect, label and draw the features of a run, and add them to its block features.

    Stores of an earlier evaluation are replaced once the new ones are whole, and what a judge or a person called their
    features is carried over. Stores that were collected on other documents (`describe_run`) stay, and are described.
    """
    here = folder / FEATURES_FOLDER
    with stage(folder, "features"):
        if _is_others(here / STORE_FOLDER, split):
            store, neurons = stores_of(folder)
            store.require_features_of(pair)
            log.info("the features stay those that were collected on %s, in %s", store.about.split, here / STORE_FOLDER)
        else:
            store, neurons = _collect_anew(pair, traces, here, split)
        name_and_record(folder, store, neurons)
        draw(store, here / PAGES_FOLDER)
        draw(neurons, here / NEURON_PAGES_FOLDER)
    return store


def _is_others(store: Path, split: str) -> bool:
    """Whether there is a store of documents that no evaluation reads."""
    return store.is_dir() and read_description(store).split != split


def _collect_anew(
    pair: PairedModel, traces: Sequence[Trace], here: Path, split: str
) -> tuple[FeatureStore, FeatureStore]:
    """New stores in the places of those that are there, with the labels that were given to these."""
    fresh = here / "new"
    shutil.rmtree(fresh, ignore_errors=True)
    made = collect_both(pair, traces, fresh, split, StoreOptions(), progress=False)
    made[0].set_agreement(stream_agreement(pair, traces[:AGREEMENT_DOCUMENTS], split))
    for name, store in zip((STORE_FOLDER, NEURONS_FOLDER), made, strict=True):
        if (here / name).is_dir():
            same = not differing(read_description(here / name).fingerprints, store.about.fingerprints)
            if same and (here / name / LABELS_FILE).is_file():
                given = read_labels(here / name / LABELS_FILE)
                store.set_labels({id: label for id, label in given.items() if label.source != RULES_SOURCE})
            shutil.rmtree(here / name)
        (fresh / name).rename(here / name)
    fresh.rmdir()
    return FeatureStore.load(here / STORE_FOLDER), FeatureStore.load(here / NEURONS_FOLDER)


def collect_both(
    pair: PairedModel,
    traces: Sequence[Trace],
    here: Path,
    split: str,
    options: StoreOptions,
    *,
    stream: ResidualStream = "replacement",
    progress: bool = True,
) -> tuple[FeatureStore, FeatureStore]:
    """Stores of the adapters' features and of as many neurons a token and layer as features fire there."""
    words = list(hesitation_tokens(pair.model.tokenizer))
    common: dict[str, Any] = dict(split=split, words=words, progress=progress)
    store = collect_features(pair, traces, here / STORE_FOLDER, stream=stream, options=options, **common)
    active = float(store.firings.sum()) / max(1, store.tokens * len(store.about.layers))
    there = here / NEURONS_FOLDER
    # A store that is added to keeps its number: one store means one thing.
    n = read_description(there).options.neurons_per_token if there.is_dir() else max(1, round(active))
    options = replace(options, neurons_per_token=n)
    neurons = collect_features(
        pair, traces, here / NEURONS_FOLDER, kind="neuron", stream="target", options=options, **common
    )  # fmt: skip
    return store, neurons


def describe_run(
    folder: Path,
    data: str | None = None,
    *,
    stream: ResidualStream = "replacement",
    options: StoreOptions | None = None,
    share: tuple[int, int] | None = None,
    device: str = "auto",
    dtype: Dtype | None = None,
    progress: bool = True,
) -> Path | None:
    """Collect and draw a run's features on any documents; returns the index, or None for one of several shares.

    Args:
        folder: made by train or demo.
        data: a .jsonl file or a dataset's name; None for the target's own answers to the built-in pair's problems.
        stream: whose residual stream is read.
        options: how much is kept.
        share: (number, of): this process collects every ``of``-th part. Call without it when all are done.
        device, dtype: as in `opening.open_run`.
        progress: show progress bars.
    """
    require_adapters(folder)
    if data is None and not is_builtin(folder):
        raise UserError("--data is missing: a .jsonl file of prompts and responses, or a dataset's name on the hub.")
    pair, here, options = open_run(folder, device, dtype), folder / FEATURES_FOLDER, options or StoreOptions()
    traces, split = _documents(pair, folder, data)
    if share is not None:
        words = list(hesitation_tokens(pair.model.tokenizer))
        collect_share(
            pair, traces, here / STORE_FOLDER, share, stream=stream, split=split, options=options, words=words,
            progress=progress,
        )  # fmt: skip
        return None
    store, neurons = collect_both(pair, traces, here, split, options, stream=stream, progress=progress)
    if not store.agreement:
        store.set_agreement(stream_agreement(pair, traces[:AGREEMENT_DOCUMENTS], split))
    name_and_record(folder, store, neurons)
    draw(neurons, here / NEURON_PAGES_FOLDER, progress=progress)
    return draw(store, here / PAGES_FOLDER, progress=progress)


def _documents(pair: PairedModel, folder: Path, data: str | None) -> tuple[Sequence[Trace], str]:
    if data is not None:
        return open_held_out(RunConfig.load(folder / "config.json"), data, pair).traces(), Path(data).name
    with pair.routed("target"):
        responses = respond(pair.model, organism.problems("report", OWN_PROBLEMS))
    return traces_of(responses, pair.model.tokenizer), "report"


def stores_of(folder: Path) -> tuple[FeatureStore, FeatureStore]:
    """The features and the neurons of a run. Raises FeatureStoreError where they were not collected yet."""
    return FeatureStore.load(folder / FEATURES_FOLDER / STORE_FOLDER), FeatureStore.load(
        folder / FEATURES_FOLDER / NEURONS_FOLDER
    )


def export_neuronpedia(folder: Path, out: Path, model_id: str | None, sae_set: str) -> Path:
    """Neuronpedia's batch files of a run's features. Raises FeatureStoreError where they were not collected yet."""
    store, _ = stores_of(folder)
    return write_neuronpedia(store, out, model_id or short_model_name(store.about.target), sae_set)


def export_dashboard(
    folder: Path, out: Path, ids: Sequence[tuple[int, int]], data: str | None, device: str = "auto"
) -> list[Path]:
    """sae-dashboard's page of each layer, of chosen features of a run. Raises DashboardError."""
    require_dashboard()
    require_adapters(folder)
    pair = open_run(folder, device)
    return write_sae_dashboard(pair, _documents(pair, folder, data)[0], ids, out)


def draw(store: FeatureStore, pages: Path, progress: bool = False) -> Path:
    """Draw a store's pages anew; returns the index. Those that are there stay until the new ones are done."""
    fresh = pages.with_name(f"new-{pages.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    index = write_feature_pages(store, fresh, progress=progress)
    shutil.rmtree(pages, ignore_errors=True)
    return fresh.rename(pages) / index.name


def name_and_record(folder: Path, store: FeatureStore, neurons: FeatureStore) -> dict[str, Any]:
    """Label both stores by rules and add what they hold to the block features of results.json; returns the block.

    The shares are of the rules' labels, also where a judge has given a feature another one.
    """
    about = store.about
    rules = [label_by_rules(one) for one in (store, neurons)]
    shares = [
        label_shares(labels, one.ids(), split=about.split) for labels, one in zip(rules, (store, neurons), strict=True)
    ]
    block = {
        "total": about.total_features,
        "alive": len(store.ids()),
        "tokens": store.tokens,
        "documents": store.documents,
        "stream": about.stream,
        "split": about.split,
        "agreement": store.agreement,
        "labels": shares[0],
        "neurons": {
            "total": neurons.about.total_features,
            "alive": len(neurons.ids()),
            "per_token": neurons.about.options.neurons_per_token,
            "labels": shares[1],
        },
        "page": f"{FEATURES_FOLDER}/{PAGES_FOLDER}/index.html",
    }
    results = write_results(folder, features={**read_results(folder).get("features", {}), **block})
    return dict(results["features"])
