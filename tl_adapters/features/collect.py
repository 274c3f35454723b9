"""Collects statistics and examples of all features into a store, in one pass over documents.

Each document takes one forward pass, and everything is counted on the way (`firing_reader`, `firing_counts`). Memory is
bounded by the options, whatever the length of the data: documents are taken one part at a time, and a part that is
complete is written to the disk. A document is identified by its hash and counted once. So a collection that was stopped
continues after its last part, and documents can be added later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from tl_adapters.data.batching import TraceSource
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.trace_regions import TraceRegions
from tl_adapters.data.traces import DataError, Trace, readable_traces, rows_by_length
from tl_adapters.features.document_batches import document_hash, documents_hash, part_documents, token_batch
from tl_adapters.features.feature import FeatureStoreError, ResidualStream, UnitKind
from tl_adapters.features.firing_counts import FiringCounts
from tl_adapters.features.firing_reader import FiringReader
from tl_adapters.features.store import FeatureStore
from tl_adapters.features.store_description import StoreDescription, StoreOptions
from tl_adapters.features.store_files import (
    FEATURE_TABLE_FILE,
    effects_by_layer,
    prepare_folder,
    remove_feature_table,
    vocabulary_texts,
)
from tl_adapters.features.store_parts import (
    Documents,
    DocumentTotals,
    MergedStorePart,
    StorePart,
    superseded_parts,
    write_part,
)
from tl_adapters.local_stage.regression_data import pair_signal_to_noise
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.processes import processes
from tl_adapters.utils.arguments import choice, texts
from tl_adapters.utils.files import alone_in, make_folder, remove_own


def collect_features(
    pair: PairedModel,
    traces: Sequence[Trace] | TraceSource,
    folder: str | Path | None = None,
    *,
    kind: UnitKind = "feature",
    stream: ResidualStream = "replacement",
    split: str = "",
    options: StoreOptions | None = None,
    words: Sequence[str] = (),
    progress: bool = True,
) -> FeatureStore:
    """Collect statistics and examples of every adapter feature, or of the target's MLP neurons, over documents.

    Of several processes of one launch, each collects its share into the folder (`collect_share`), and the main one
    merges them.

    Args:
        pair: the pair, with adapters, and with the tokenizer whose chat template gives the regions of a trace.
        traces: a list, or a source that reads documents as they are needed.
        folder: where the store is kept. A store that is there already is continued or added to. None keeps the store in
            memory.
        kind: "feature", or "neuron": positive activations of the target's MLP on the target's residual stream, on each
            token those of the ``options.neurons_per_token`` neurons that write most.
        stream: the model whose residual stream the features are read on: the "replacement", which they were trained in,
            or the "target".
        split: name of the documents in measurements ("report", or a file's name).
        options: how much is kept.
        words: single tokens, as text, whose logit effects are kept one by one.
        progress: show a progress bar.

    Raises:
        FeatureStoreError: the store in ``folder`` was collected on another pair, or with other options.
        FolderBusyError: another process is collecting into ``folder``.
        DataError: there are no documents, or no chat template.
        UserError: a word is not a single token; ``kind`` or ``stream`` is unknown; there are no adapters.
    """
    progress = progress and processes().is_main
    arguments: dict[str, Any] = dict(kind=kind, stream=stream, split=split, options=options, words=words)

    def collected() -> FeatureStore:
        description = _description(pair, traces, **arguments)
        with nullcontext() if folder is None else _collecting(Path(folder), (0, 1)):
            parts = list(_collected_parts(pair, traces, folder, description, (0, 1), progress))
            return _merged_store(pair, description, parts, folder)

    if folder is None or (several := processes()).count == 1:
        return collected()
    share = (several.index, several.count)
    several.together(lambda: collect_share(pair, traces, folder, share, progress=progress, **arguments))
    several.on_main(collected)
    return several.together(lambda: FeatureStore.load(folder))


def collect_share(
    pair: PairedModel,
    traces: Sequence[Trace] | TraceSource,
    folder: str | Path,
    share: tuple[int, int],
    *,
    kind: UnitKind = "feature",
    stream: ResidualStream = "replacement",
    split: str = "",
    options: StoreOptions | None = None,
    words: Sequence[str] = (),
    progress: bool = True,
) -> None:
    """Collect the share of one of several processes: (0, 4) takes every fourth part, from the first on.

    Every process is given the same documents. When all are done, `collect_features` with the same arguments reads all
    parts from the folder and merges them. Raises what `collect_features` raises.
    """
    number, of = share
    if not 0 <= number < of:
        raise FeatureStoreError(f"The share is {share}; allowed is (number, of) with 0 <= number < of.")
    description = _description(pair, traces, kind, stream, split, options, words)
    with _collecting(Path(folder), share):
        for _ in _collected_parts(pair, traces, folder, description, share, progress):
            pass


@contextmanager
def _collecting(folder: Path, share: tuple[int, int]) -> Iterator[None]:
    """Hold the lock of a share; one process collects a share, and the one without a share is alone.

    Raises FolderBusyError.
    """
    whole = share == (0, 1)
    make_folder(folder)
    with alone_in(folder) if whole else alone_in(folder, f".share-{share[0]}-of-{share[1]}.lock"):
        for other in sorted(folder.glob(".share-*.lock")) if whole else [folder / ".lock"]:
            if other.exists():  # it may have been left by a process that was killed
                with alone_in(folder, other.name):
                    pass
        yield


def _description(
    pair: PairedModel,
    traces: Sequence[Trace] | TraceSource,
    kind: UnitKind,
    stream: ResidualStream,
    split: str,
    options: StoreOptions | None,
    words: Sequence[str],
) -> StoreDescription:
    words = texts(words, "words")
    choice(kind, get_args(UnitKind), "kind")
    choice(stream, get_args(ResidualStream), "stream")
    if kind == "neuron" and stream != "target":
        raise FeatureStoreError("Neurons are the target's own, on its own stream; give stream='target'.")
    ChatFormat.of(pair.model.tokenizer)  # raises DataError for a pair whose traces could not be read
    measured = pair_signal_to_noise(pair, traces) if kind == "feature" else None
    return StoreDescription.of(pair, kind, stream, split, options or StoreOptions(), words, measured)


def _collected_parts(
    pair: PairedModel,
    traces: Sequence[Trace] | TraceSource,
    folder: str | Path | None,
    description: StoreDescription,
    share: tuple[int, int],
    progress: bool,
) -> Iterator[StorePart]:
    """The parts that are in the folder already, then the new parts of a share, each as soon as it is complete."""
    trace_regions = TraceRegions(ChatFormat.of(pair.model.tokenizer))
    reader = FiringReader(pair, description)
    known: set[int] = set()
    if not isinstance(traces, TraceSource):
        traces = readable_traces(traces, pair.model.cfg)
    if folder is not None:
        existing = prepare_folder(pair, Path(folder), description, write_effects=share[0] == 0)
        known = {identity for part in existing for identity in part.documents.identity.tolist()}
        yield from existing
    n_documents = 0
    with tqdm(desc="collect", unit=" tokens", unit_scale=True, disable=not progress) as bar:
        # Documents that are collected already are left out of a group only after grouping, so that all processes
        # number the groups alike.
        for number, group in enumerate(part_documents(traces, description.options.tokens_per_part)):
            n_documents += len(group)
            new = [trace for trace in group if document_hash(trace) not in known]
            if number % share[1] == share[0] and new:
                part = _collect_part(reader, trace_regions, description, new, bar)
                if folder is not None:
                    (name,) = part.totals.document_sets
                    remove_feature_table(Path(folder))
                    part = write_part(Path(folder) / f"part-{name}", part, description.layers)
                yield part
    if not n_documents:
        raise DataError("There are no documents to read features on; give at least one trace.")


@torch.no_grad()
def _collect_part(
    reader: FiringReader, trace_regions: TraceRegions, description: StoreDescription, traces: Sequence[Trace], bar: Any
) -> StorePart:
    """The statistics over some documents."""
    domains = sorted({trace.domain for trace in traces})
    regions = [trace_regions.codes(trace) for trace in traces]
    counts = FiringCounts(description, len(domains))
    for rows in rows_by_length(traces, description.options.tokens_per_batch):
        batch = token_batch(traces, regions, rows, domains)
        counts.add(batch, reader.read(batch))
        bar.update(int(batch.length.sum()))
    totals = DocumentTotals(
        document_sets=[documents_hash(traces)],
        documents=len(traces),
        region_tokens=counts.region_tokens.tolist(),
        decile_tokens=counts.decile_tokens.tolist(),
        domains=domains,
        domain_tokens=counts.domain_tokens.tolist(),
    )
    documents = Documents(
        tokens=torch.tensor([token for trace in traces for token in trace.tokens], dtype=torch.int32),
        region=torch.tensor([code for codes in regions for code in codes], dtype=torch.int8),
        start=torch.tensor([0, *(len(trace.tokens) for trace in traces)]).cumsum(0),
        identity=torch.tensor([document_hash(trace) for trace in traces]),
        withheld=torch.tensor([not trace.republish for trace in traces], dtype=torch.int8),
    )
    return StorePart(totals, documents, counts.layers(), None)


def _merged_store(
    pair: PairedModel, description: StoreDescription, parts: Sequence[StorePart], folder: str | Path | None
) -> FeatureStore:
    """The store of all parts, in the folder or in memory."""
    k = {"top": description.options.examples, "sample": description.options.sample}
    in_order = sorted(parts, key=lambda part: part.totals.document_sets)
    merged = parts[0] if len(parts) == 1 else MergedStorePart(in_order, k)
    if folder is None:
        layers = {layer: merged.layer(layer) for layer in description.layers}
        whole = StorePart(merged.totals, merged.documents, layers, None)
        return FeatureStore(description, whole, dict(effects_by_layer(pair, description)), vocabulary_texts(pair))
    folder = Path(folder)
    if len(parts) > 1:
        name = hashlib.sha256("".join(merged.totals.document_sets).encode()).hexdigest()[:16]
        write_part(folder / f"part-{name}", merged, description.layers)
    # Parts are removed only now: a process that is killed before leaves both, and the merged part is the one read.
    for superseded in superseded_parts(folder):
        remove_own(superseded)
    store = FeatureStore.load(folder)
    if not (folder / FEATURE_TABLE_FILE).is_file():  # whoever adds to a store removes its table first
        store.write_parquet()
    return store
