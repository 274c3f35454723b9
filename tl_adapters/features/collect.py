"""Reading features off documents: one forward pass each, everything counted on the way.

1. A hook takes what fires in a layer out of the dense activations at once: (token, feature, activation) of the few
   per cent that are not zero. Nothing dense is kept, and nothing else is touched again.
2. Firings are counted by feature, region of the trace, tenth of the thinking, domain, and size.
3. The strongest firing of each feature in each document, and those whose hash is among the largest (a uniform sample,
   the same whatever the order of the documents and however many processes share them), are candidates for examples.
   Only candidates have their surroundings looked up; a feature's threshold keeps them few.

What is held is bounded by the options, whatever the length of the data: documents are taken a part at a time, and a
part that is done is on the disk. A document is known by its hash and counted once, whatever the list it comes in: so a
collection that was stopped goes on after its last part, and more documents can be added later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from tl_adapters.data.batching import TraceSource
from tl_adapters.data.chat_format import TRACE_REGIONS, ChatFormat
from tl_adapters.data.traces import DataError, Trace, collate, readable_traces, rows_by_length
from tl_adapters.features.feature import FeatureStoreError, ResidualStream, UnitKind
from tl_adapters.features.firing_counts import Counts, TokenBatch
from tl_adapters.features.layer_statistics import (
    DECILES,
    Documents,
    Part,
    PartTotals,
    write_part,
)
from tl_adapters.features.logit_effects import written_rows
from tl_adapters.features.store import FeatureStore, finish
from tl_adapters.features.store_files import StoreDescription, StoreOptions, open_store
from tl_adapters.features.stream_agreement import reading
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel
from tl_adapters.utils.arguments import choice, texts
from tl_adapters.utils.finite import NotFiniteError, finite_blocks

NEURONS = "mlp.hook_post"


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
    """Statistics and examples of every adapter feature (or of the target's MLP neurons), in one pass over documents.

    Args:
        pair: with adapters, and the tokenizer whose chat template tells the regions of a trace.
        traces: a list, or a source that reads them as they are needed.
        folder: where the store is kept; what is there already is gone on with or added to. None keeps it in memory.
        kind: "feature", or "neuron": positive activations of the target's MLP on the target's stream, of each token
            the ``options.neurons_per_token`` that write most.
        stream: whose residual stream the features read: the "replacement"'s, which they were trained on, or the
            "target"'s.
        split: what the documents are called in figures ("report", a file's name).
        options: how much is kept.
        words: single tokens, as text, whose logit effects are kept one by one.
        progress: show a progress bar.

    Raises:
        FeatureStoreError: the store in ``folder`` was read on something else, or with other options.
        DataError: there are no documents, or no chat template.
        UserError: a word that is no single token.
    """
    collector = _Collector(pair, kind, stream, split, options or StoreOptions(), texts(words, "words"), progress)
    parts = list(collector.parts(traces, folder, (0, 1)))
    return finish(pair, collector.description, parts, folder)


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
    """The share of one of several processes: (0, 4) takes every fourth part, from the first on.

    Every process is given the same documents. When all are done, `collect_features` with the same arguments finds all
    parts there and merges them. Raises what it raises.
    """
    number, of = share
    if not 0 <= number < of:
        raise FeatureStoreError(f"The share is {share}; allowed is (number, of) with 0 <= number < of.")
    collector = _Collector(pair, kind, stream, split, options or StoreOptions(), texts(words, "words"), progress)
    for _ in collector.parts(traces, folder, share):
        pass


class _Collector:
    def __init__(
        self,
        pair: PairedModel,
        kind: UnitKind,
        stream: ResidualStream,
        split: str,
        options: StoreOptions,
        words: tuple[str, ...],
        progress: bool,
    ) -> None:
        choice(kind, get_args(UnitKind), "kind")
        choice(stream, get_args(ResidualStream), "stream")
        if kind == "neuron" and stream != "target":
            raise FeatureStoreError("Neurons are the target's own, on its own stream; give stream='target'.")
        self.pair, self.options, self.progress = pair, options, progress
        self.chat = ChatFormat.of(pair.model.tokenizer)
        self.description = StoreDescription.of(pair, kind, stream, split, options, words)
        layers = self.description.layers
        self.norms = {layer: rows.norm(dim=-1).float() for layer, rows in written_rows(pair, kind, layers)}
        writes_all = torch.stack([(norms > 0).all() for norms in self.norms.values()]).tolist()
        self.some_write_nothing = {layer: not all_write for layer, all_write in zip(layers, writes_all, strict=True)}

    def parts(
        self, traces: Sequence[Trace] | TraceSource, folder: str | Path | None, share: tuple[int, int]
    ) -> Iterator[Part]:
        """The parts of a share: those in the folder already, then those made here, each as soon as it is done."""
        known: set[int] = set()
        if not isinstance(traces, TraceSource):
            traces = readable_traces(traces, self.pair.model.cfg)
        if folder is not None:
            there = open_store(self.pair, Path(folder), self.description, first=share[0] == 0)
            known = {identity for part in there for identity in part.documents.identity.tolist()}
            yield from there
        stream, n_taken = iter(traces) if isinstance(traces, Sequence) else _every(traces), 0
        with tqdm(desc="collect", unit=" tokens", unit_scale=True, disable=not self.progress) as bar:
            # What is known already is left out of a chunk, not of the stream: all processes number the chunks alike.
            for number, chunk in enumerate(_chunks(_once(stream), self.options.tokens_per_part)):
                n_taken += len(chunk)
                new = [trace for trace in chunk if _identity(trace) not in known]
                if number % share[1] == share[0] and new:
                    name = _hash(new)
                    part = self._part(new, name, bar)
                    if folder is not None:
                        part = write_part(Path(folder) / f"part-{name}", part, self.description.layers)
                    yield part
        if not n_taken:
            raise DataError("There are no documents to read features on; give at least one trace.")

    @torch.no_grad()
    def _part(self, traces: Sequence[Trace], name: str, bar: Any) -> Part:
        domains = sorted({trace.domain for trace in traces})
        regions = [self.chat.regions(trace) for trace in traces]
        counts = Counts(self.description, len(domains))
        for rows in rows_by_length(traces, self.options.tokens_per_batch):
            batch = _batch(traces, regions, rows, domains)
            counts.add(batch, *self._firings(batch))
            bar.update(int(batch.length.sum()))
        ids = torch.tensor([token for trace in traces for token in trace.tokens], dtype=torch.int32)
        flat = torch.tensor([code for codes in regions for code in codes], dtype=torch.int8)
        starts = torch.tensor([0, *(len(trace.tokens) for trace in traces)]).cumsum(0)
        totals = PartTotals(
            [name], len(traces), counts.region_tokens.tolist(), counts.tenth_tokens.tolist(), domains,
            counts.domain_tokens.tolist(),
        )  # fmt: skip
        identity = torch.tensor([_identity(trace) for trace in traces])
        return Part(totals, Documents(ids, flat, starts, identity), counts.layers(), None)

    def _firings(self, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(flat token, flat feature, activation) of everything that fires, sorted by feature and then token.

        Raises NotFiniteError, with layer and document.
        """
        pair, found = self.pair, list[tuple[Tensor, Tensor, Tensor]]()
        device, documents = pair.model.W_E.device, batch.document.tolist()
        real = (batch.region >= 0).view(batch.tokens.shape)
        resid, of = pair.embed(batch.tokens.to(device)), f"The {self.description.stream}'s residual stream"
        watched = finite_blocks(pair.model, pair.n_layers, real.to(device), documents, of, resid)
        with self._extracting(found), watched:
            pair.run_blocks(resid, 0, pair.n_layers)
        token, feature, value = (torch.cat([part[i] for part in found]).cpu() for i in range(3))
        self._require_finite(batch, token, feature, value)
        order = feature.argsort(stable=True)  # within a layer they come by token
        order = order[batch.region[token[order]] >= 0]
        return token[order], feature[order], value[order]

    def _require_finite(self, batch: TokenBatch, token: Tensor, feature: Tensor, value: Tensor) -> None:
        """Activations may be infinite where the stream that adapters only read is not."""
        bad = (~torch.isfinite(value) & (batch.region[token] >= 0)).nonzero()[:, 0]
        if len(bad):
            row, position = divmod(int(token[bad[0]]), batch.tokens.shape[1])
            place, index = divmod(int(feature[bad[0]]), self.description.n_features)
            raise NotFiniteError(
                f"Layer {self.description.layers[place]}, {self.description.kind} {index}, document "
                f"{int(batch.document[row])} (from 0), position {position}: the activation is NaN or infinite. Run the "
                "models in bfloat16 or float32 (dtype=, --dtype); where they are, look at the weights of this layer."
            )

    @contextmanager
    def _extracting(self, found: list[tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
        """Hooks that append what fires, on the model's device.

        `nonzero` waits for the device once per layer and batch: the price of keeping nothing dense.
        """
        pair, description = self.pair, self.description

        def extract(acts: Tensor, hook: HookPoint, place: int, layer: int) -> None:
            norms, n_features = self.norms[layer], description.n_features
            if description.kind == "neuron":
                size = acts.flatten(0, 1).clamp(min=0).float() * norms
                strongest = size.topk(min(self.options.neurons_per_token, n_features), dim=-1)
                acts = torch.zeros_like(size).scatter_(1, strongest.indices, strongest.values)
                norms = torch.ones_like(norms)
            flat = acts.flatten()
            at = flat.nonzero()[:, 0]
            index = at % n_features
            value = flat[at].float() * norms[index]
            if (
                self.some_write_nothing[layer] and description.kind == "feature"
            ):  # a row of zeros writes nothing: what fires there is no firing of anything
                at, index, value = (column[value > 0] for column in (at, index, value))
            found.append((at // n_features, index + place * n_features, value))

        point = NEURONS if description.kind == "neuron" else ACTS_HOOK
        hooks = [
            (f"blocks.{layer}.{point}", partial(extract, place=place, layer=layer))
            for place, layer in enumerate(description.layers)
        ]
        along = pair.routed("target") if description.kind == "neuron" else reading(pair, description.stream)
        with along, pair.model.hooks(fwd_hooks=hooks):
            yield


def _batch(
    traces: Sequence[Trace], regions: Sequence[Sequence[int]], rows: Sequence[int], domains: Sequence[str]
) -> TokenBatch:
    tokens = collate([traces[i] for i in rows]).tokens
    region, tenth = torch.full(tokens.shape, -1), torch.full(tokens.shape, -1)
    thinking = TRACE_REGIONS.index("thinking")
    for place, i in enumerate(rows):
        codes = torch.tensor(regions[i])
        region[place, : len(codes)] = codes
        inside = (codes == thinking).nonzero()[:, 0]
        tenth[place, inside] = torch.arange(len(inside)) * DECILES // max(1, len(inside))
    return TokenBatch(
        tokens,
        document=torch.tensor(list(rows)),
        length=torch.tensor([len(traces[i].tokens) for i in rows]),
        identity=torch.tensor([_identity(traces[i]) for i in rows]),
        domain=torch.tensor([domains.index(traces[i].domain) for i in rows]),
        region=region.flatten(),
        tenth=tenth.flatten(),
    )


def _chunks(traces: Iterator[Trace], tokens: int) -> Iterator[list[Trace]]:
    """Documents in their order, as many at a time as have so many tokens together."""
    chunk: list[Trace] = []
    held = 0
    for trace in traces:
        chunk.append(trace)
        held += len(trace.tokens)
        if held >= tokens:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _once(traces: Iterator[Trace]) -> Iterator[Trace]:
    """Every document the first time it comes."""
    seen: set[int] = set()
    for trace in traces:
        if (identity := _identity(trace)) not in seen:
            seen.add(identity)
            yield trace


def _every(source: TraceSource) -> Iterator[Trace]:
    for _, window in source.windows(0, None):
        yield from window


def _identity(trace: Trace) -> int:
    """64 bits of a hash of a document's tokens: one document draws the same examples wherever it stands."""
    return int.from_bytes(_digest([trace]).digest()[:8], "big", signed=True)


def _hash(traces: Iterable[Trace]) -> str:
    return _digest(traces).hexdigest()[:16]


def _digest(traces: Iterable[Trace]) -> Any:
    digest = hashlib.sha256()
    for trace in traces:
        digest.update(repr((trace.tokens, trace.prompt_length, trace.thinking_length, trace.domain)).encode())
    return digest
