"""Features as a stage of a study: collected, compared with the target's neurons, labeled by rules, drawn as pages.

RUN/features/store       the adapters' features (see features/store.py)
RUN/features/neurons     the target's MLP neurons on the same documents
RUN/features/pages       an index of all features and a page to look at each; neuron_pages likewise
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
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
from tl_adapters.features.feature import FeatureStoreError, ResidualStream
from tl_adapters.features.store import FeatureStore
from tl_adapters.features.store_description import StoreOptions
from tl_adapters.features.store_files import LABELS_FILE, STORE_NAMES, holds_store, read_description, read_labels
from tl_adapters.features.stream_agreement import stream_agreement
from tl_adapters.generation.responses import respond, traces_of
from tl_adapters.interop.neuronpedia import ALLOWED_NAME, write_neuronpedia
from tl_adapters.interop.sae_dashboard import require_dashboard, write_sae_dashboard
from tl_adapters.models.adapter_checks import short_model_name
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.feature_pages import write_feature_pages
from tl_adapters.processes import processes
from tl_adapters.study.open_run import is_organism_run, open_held_out, open_run, require_adapters
from tl_adapters.utils.files import alone_in, replace_folder, require_writable, working_folder
from tl_adapters.utils.results import changed_results, plain, stage

log = logging.getLogger(__name__)

FEATURES_FOLDER, STORE_FOLDER, NEURONS_FOLDER, PAGES_FOLDER, NEURON_PAGES_FOLDER = (
    "features",
    "store",
    "neurons",
    "pages",
    "neuron_pages",
)
AGREEMENT_DOCUMENTS = 200
"""Documents on which features read on both residual streams are compared."""
ORGANISM_PROBLEMS = 1_800
"""Problems of the model organism whose answers are the documents where none are given."""


def features_stage(pair: PairedModel, traces: Sequence[Trace], folder: Path, split: str) -> FeatureStore:
    """Collects, labels and draws the features of a run, and adds them to its block features.

    Stores of an earlier evaluation are replaced once the new ones are complete, and labels by a judge or a person are
    carried over. Stores that `features_run` collected on other documents stay, and are the ones labeled and drawn.
    """
    features_folder = folder / FEATURES_FOLDER
    with stage(folder, "features"):
        if _is_of_other_documents(features_folder / STORE_FOLDER, split):
            store, neurons = load_stores(folder)
            store.require_features_of(pair)
            log.info("keeping the features collected on %s, in %s", store.about.split, features_folder / STORE_FOLDER)
        else:
            store, neurons = _collect_again(pair, traces, features_folder, split)
        label_and_record(folder, store, neurons)
        draw_pages(store, features_folder / PAGES_FOLDER)
        draw_pages(neurons, features_folder / NEURON_PAGES_FOLDER)
    return store


def _is_of_other_documents(store: Path, split: str) -> bool:
    """Whether a store exists that was collected on other documents than an evaluation's."""
    return holds_store(store) and read_description(store).split != split


def _collect_again(
    pair: PairedModel, traces: Sequence[Trace], features_folder: Path, split: str
) -> tuple[FeatureStore, FeatureStore]:
    """New stores that replace earlier ones and take over their labels by judges and persons."""
    with working_folder(features_folder / STORE_FOLDER) as fresh:
        stores = collect_features_and_neurons(pair, traces, fresh, split, StoreOptions(), progress=False)
        stores[0].set_agreement(stream_agreement(pair, traces[:AGREEMENT_DOCUMENTS], split))
        for name, store in zip((STORE_FOLDER, NEURONS_FOLDER), stores, strict=True):
            earlier = features_folder / name
            labeled = (earlier / LABELS_FILE).is_file()
            if labeled and not differing(read_description(earlier).fingerprints, store.about.fingerprints):
                labels = read_labels(earlier / LABELS_FILE)
                store.set_labels({id: label for id, label in labels.items() if label.source != RULES_SOURCE})
            replace_folder(fresh / name, earlier, STORE_NAMES)
    return FeatureStore.load(features_folder / STORE_FOLDER), FeatureStore.load(features_folder / NEURONS_FOLDER)


def collect_features_and_neurons(
    pair: PairedModel,
    traces: Sequence[Trace],
    features_folder: Path,
    split: str,
    options: StoreOptions,
    *,
    stream: ResidualStream = "replacement",
    progress: bool = True,
) -> tuple[FeatureStore, FeatureStore]:
    """Stores of the adapters' features, and of as many neurons of the target per token and layer as features fire."""
    words = list(hesitation_tokens(pair.model.tokenizer))
    common: dict[str, Any] = dict(split=split, words=words, progress=progress)
    store = collect_features(pair, traces, features_folder / STORE_FOLDER, stream=stream, options=options, **common)
    active = float(store.firings.sum()) / max(1, store.tokens * len(store.about.layers))
    neurons_folder = features_folder / NEURONS_FOLDER
    # A store that documents are added to keeps its number of neurons, so that all of its counts mean the same.
    known = read_description(neurons_folder).options.neurons_per_token if holds_store(neurons_folder) else None
    options = replace(options, neurons_per_token=known or max(1, round(active)))
    neurons = collect_features(
        pair, traces, neurons_folder, kind="neuron", stream="target", options=options, **common
    )  # fmt: skip
    return store, neurons


def features_run(
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
    """Collects and draws a run's features on any documents; returns the index page, or None for one of several shares.

    Of several processes of one launch, each collects a share, and the main one merges and draws.

    Args:
        folder: a run that train or demo made.
        data: a .jsonl file or a dataset's name; None for the target's answers to problems of the model organism.
        stream: the model on whose residual stream features are read.
        options: how much the store keeps of each feature.
        share: (i, n): this process collects part i of n. Call once more without a share when all parts are done.
        device, dtype: as in `open_run`.
        progress: show progress bars.
    """
    options, features_folder = options or StoreOptions(), folder / FEATURES_FOLDER

    def opened() -> tuple[PairedModel, Sequence[Trace], str]:
        pair = open_run(folder, device, dtype)
        return pair, *_documents(pair, folder, data)

    processes().together(lambda: _require_usable(folder, data))
    # Processes that share a collection work at the same time; the stores' own locks keep them apart.
    with processes().held_by_main(nullcontext() if share is not None else alone_in(folder)):
        pair, traces, split = processes().together(opened)
        if share is not None:
            words = list(hesitation_tokens(pair.model.tokenizer))
            collect_share(
                pair, traces, features_folder / STORE_FOLDER, share, stream=stream, split=split, options=options,
                words=words, progress=progress,
            )  # fmt: skip
            return None
        store, neurons = collect_features_and_neurons(
            pair, traces, features_folder, split, options, stream=stream, progress=progress
        )

        def finished() -> Path:
            if not store.agreement:
                store.set_agreement(stream_agreement(pair, traces[:AGREEMENT_DOCUMENTS], split))
            label_and_record(folder, store, neurons)
            draw_pages(neurons, features_folder / NEURON_PAGES_FOLDER, progress=progress)
            return draw_pages(store, features_folder / PAGES_FOLDER, progress=progress)

        return processes().together(lambda: finished() if processes().is_main else None)


def _require_usable(folder: Path, data: str | None) -> None:
    require_adapters(folder)
    if data is None and not is_organism_run(folder):
        raise UserError(
            "--data is missing; give a .jsonl file of prompts and responses, or a dataset's name on the hub."
        )
    require_writable(folder)


def _documents(pair: PairedModel, folder: Path, data: str | None) -> tuple[Sequence[Trace], str]:
    if data is not None:
        return open_held_out(RunConfig.of_run(folder), data, pair).traces(), Path(data).name
    with pair.routed("target"):
        responses = respond(pair.model, organism.problems("report", ORGANISM_PROBLEMS))
    return traces_of(responses, pair.model.tokenizer), "report"


def load_stores(folder: Path) -> tuple[FeatureStore, FeatureStore]:
    """The stores of a run's features and neurons. Raises FeatureStoreError where they were not collected yet."""
    return FeatureStore.load(folder / FEATURES_FOLDER / STORE_FOLDER), FeatureStore.load(
        folder / FEATURES_FOLDER / NEURONS_FOLDER
    )


def features_if_begun(folder: Path) -> FeatureStore | None:
    """The store of a run's features, or None where no collection has begun.

    Raises FeatureStoreError where one was not finished.
    """
    store = folder / FEATURES_FOLDER / STORE_FOLDER
    return FeatureStore.load(store) if holds_store(store) else None


def has_features(folder: Path) -> bool:
    """Whether a run's features and neurons were collected to the end."""
    try:
        load_stores(folder)
    except FeatureStoreError:
        return False
    return True


def export_neuronpedia(folder: Path, out: Path, model_id: str | None, sae_set: str) -> Path:
    """Writes Neuronpedia's batch files of a run's features and returns their folder.

    Raises FeatureStoreError where the features were not collected yet, and UserError where no name of the model is
    given and its own cannot be one.
    """
    store, _ = load_stores(folder)
    name = model_id or short_model_name(store.about.target)
    if model_id is None and not ALLOWED_NAME.fullmatch(name):
        raise UserError(
            f"The target's name {name!r} cannot be one on Neuronpedia; give its name there with --model-id."
        )
    return write_neuronpedia(store, out, name, sae_set)


def export_sae_dashboard(
    folder: Path, out: Path, ids: Sequence[tuple[int, int]], data: str | None, device: str = "auto"
) -> list[Path]:
    """Writes sae-dashboard's page of chosen features for each layer and returns the paths. Raises DashboardError."""
    require_dashboard()
    require_adapters(folder)
    pair = open_run(folder, device)
    return write_sae_dashboard(pair, _documents(pair, folder, data)[0], ids, out)


def draw_pages(store: FeatureStore, pages: Path, progress: bool = False) -> Path:
    """Draws a store's pages and returns the index page. Earlier pages stay until the new ones are complete."""
    return write_feature_pages(store, pages, replace=True, progress=progress)


def label_and_record(folder: Path, store: FeatureStore, neurons: FeatureStore) -> dict[str, Any]:
    """Labels both stores by rules and adds their counts to the block features of results.json; returns the block.

    The shares are those of the rules' labels, also where a judge gave a feature another label.
    """
    about = store.about
    rules = [label_by_rules(each) for each in (store, neurons)]
    shares = [
        label_shares(labels, each.ids(), split=about.split)
        for labels, each in zip(rules, (store, neurons), strict=True)
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
    with changed_results(folder) as results:
        results["features"] = {**results.get("features", {}), **plain(block)}
    return dict(results["features"])
