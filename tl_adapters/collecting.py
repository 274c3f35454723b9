"""Reading features off documents: one forward pass each, everything counted on the way.

1. A hook takes what fires in a layer out of the dense activations at once: (token, feature, activation) of the few
   per cent that are not zero. Nothing dense is kept, and nothing else is touched again.
2. Firings are counted by feature, region of the trace, tenth of the thinking, domain, and size.
3. The strongest firing of each feature in each document, and those whose hash is among the largest (a uniform sample,
   the same whatever the order of the documents and however many processes share them), are candidates for examples.
   Only candidates have their surroundings looked up; a feature's threshold keeps them few.

What is held is bounded by the options, whatever the length of the data: documents are taken a part at a time, and a
part that is done is on the disk. A part is known by the hash of its documents, so a collection that was stopped goes
on after its last part, more documents can be added later, and no document is counted twice.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from tl_adapters.batching import TraceSource
from tl_adapters.chat import TRACE_REGIONS, ChatFormat
from tl_adapters.data import DataError, Trace, collate, rows_by_length
from tl_adapters.effects import written_rows
from tl_adapters.feature_store import FeatureStore, StoreDescription, StoreOptions, finish, open_store
from tl_adapters.features import FeatureStoreError, Kind, Stream
from tl_adapters.paired import ACTIVATIONS, PairedModel
from tl_adapters.parts import (
    BUCKETS,
    SUMS,
    TENTHS,
    Documents,
    Examples,
    LayerStatistics,
    Part,
    PartTotals,
    best,
    bucket,
    group_starts,
    joined,
    rank_within,
    write_part,
)
from tl_adapters.streams import reading

log = logging.getLogger(__name__)

NEURONS = "mlp.hook_post"


def collect_features(
    pair: PairedModel,
    traces: Sequence[Trace] | TraceSource,
    folder: str | Path | None = None,
    *,
    kind: Kind = "feature",
    stream: Stream = "replacement",
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
    collector = _Collector(pair, kind, stream, split, options or StoreOptions(), tuple(words), progress)
    parts = list(collector.parts(traces, folder, (0, 1)))
    return finish(pair, collector.description, parts, folder)


def collect_share(
    pair: PairedModel,
    traces: Sequence[Trace] | TraceSource,
    folder: str | Path,
    share: tuple[int, int],
    *,
    kind: Kind = "feature",
    stream: Stream = "replacement",
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
    collector = _Collector(pair, kind, stream, split, options or StoreOptions(), tuple(words), progress)
    for _ in collector.parts(traces, folder, share):
        pass


@dataclass(frozen=True)
class _Batch:
    """Documents padded on the right, and what is known of each of their tokens; flat tensors are [batch * pos]."""

    tokens: Int[Tensor, "batch pos"]
    document: Tensor  # [batch]: number in the part
    length: Tensor  # [batch]
    identity: Tensor  # [batch]: hash of each document's tokens
    domain: Tensor  # [batch]
    region: Tensor  # flat; -1 at padding
    tenth: Tensor  # flat; -1 outside the thinking


class _Collector:
    def __init__(
        self,
        pair: PairedModel,
        kind: Kind,
        stream: Stream,
        split: str,
        options: StoreOptions,
        words: tuple[str, ...],
        progress: bool,
    ) -> None:
        if kind == "neuron" and stream != "target":
            raise FeatureStoreError("Neurons are the target's own, on its own stream; give stream='target'.")
        self.pair, self.options, self.progress = pair, options, progress
        self.chat = ChatFormat.of(pair.model.tokenizer)
        self.description = StoreDescription.of(pair, kind, stream, split, options, words)
        layers = self.description.layers
        self.norms = {layer: rows.norm(dim=-1).float() for layer, rows in written_rows(pair, kind, layers)}

    def parts(
        self, traces: Sequence[Trace] | TraceSource, folder: str | Path | None, share: tuple[int, int]
    ) -> Iterator[Part]:
        """The parts of a share: those in the folder already, then those made here, each as soon as it is done."""
        done: set[str] = set()
        if folder is not None:
            there = open_store(self.pair, Path(folder), self.description, first=share[0] == 0)
            done = {hash_ for part in there for hash_ in part.totals.covers}
            yield from there
        size, n_taken = self.options.documents_per_part, 0
        stream = iter(traces) if isinstance(traces, Sequence) else _every(traces)
        with tqdm(desc="collect", unit=" tokens", unit_scale=True, disable=not self.progress) as bar:
            for number, chunk in enumerate(iter(lambda: list(islice(stream, size)), [])):
                n_taken += len(chunk)
                name = _hash(chunk)
                if number % share[1] == share[0] and name not in done:
                    part = self._part(chunk, name, bar)
                    done.add(name)
                    if folder is not None:
                        part = write_part(Path(folder) / f"part-{name}", part, self.description.layers)
                    yield part
        if not n_taken:
            raise DataError("There are no documents to read features on; give at least one trace.")

    @torch.no_grad()
    def _part(self, traces: Sequence[Trace], name: str, bar: Any) -> Part:
        domains = sorted({trace.domain for trace in traces})
        regions = [self.chat.regions(trace) for trace in traces]
        counts = _Counts(self.description, len(domains))
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
        return Part(totals, Documents(ids, flat, starts), counts.layers(), None)

    def _firings(self, batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(flat token, flat feature, activation) of everything that fires, sorted by feature and then token."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        with self._extracting(found):
            resid = self.pair.embed(batch.tokens.to(self.pair.model.W_E.device))
            self.pair.run_blocks(resid, 0, self.pair.n_layers)
        token, feature, value = (torch.cat([part[i] for part in found]) for i in range(3))
        order = feature.argsort(stable=True)  # within a layer they come by token
        order = order[batch.region[token[order]] >= 0]
        return token[order], feature[order], value[order]

    @contextmanager
    def _extracting(self, found: list[tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
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
            if not bool((norms > 0).all()):  # a row of zeros writes nothing: what fires there is no firing of anything
                at, index, value = (column[value > 0] for column in (at, index, value))
            found.append(((at // n_features).cpu(), index.cpu() + place * n_features, value.cpu()))

        point = NEURONS if description.kind == "neuron" else ACTIVATIONS
        hooks = [
            (f"blocks.{layer}.{point}", partial(extract, place=place, layer=layer))
            for place, layer in enumerate(description.layers)
        ]
        along = pair.routed("target") if description.kind == "neuron" else reading(pair, description.stream)
        with along, pair.model.hooks(fwd_hooks=hooks):
            yield


class _Counts:
    """Running statistics of all layers at once: the features of a layer follow those of the one before."""

    def __init__(self, description: StoreDescription, n_domains: int) -> None:
        self.description, options = description, description.options
        n, long = description.n_flat, torch.long
        self.count, self.total = torch.zeros(n, dtype=long), torch.zeros(n, dtype=torch.float64)
        self.region, self.tenth, self.domain, self.histogram = (
            torch.zeros(n, width, dtype=long) for width in (len(TRACE_REGIONS), TENTHS, n_domains, BUCKETS)
        )
        self.region_tokens, self.tenth_tokens, self.domain_tokens = (
            torch.zeros(width, dtype=long) for width in (len(TRACE_REGIONS), TENTHS, n_domains)
        )
        width = options.before + 1 + options.after
        self.top = _Best(options.examples, n, Examples.none(width, 0))
        self.sample = _Best(options.sample, n, Examples.none(width, options.neighbours))
        self.seed = _mixed(torch.tensor(options.seed))

    def add(self, batch: _Batch, token: Tensor, feature: Tensor, value: Tensor) -> None:
        """One batch's firings, sorted by feature and then token."""
        row, position = token // batch.tokens.shape[1], token % batch.tokens.shape[1]
        _tally(self.count, feature)
        self.total.index_add_(0, feature, value.double())
        _tally(self.region, feature, batch.region[token])
        _tally(self.domain, feature, batch.domain[row])
        _tally(self.histogram, feature, bucket(value))
        tenth = batch.tenth[token]
        thinking = tenth >= 0
        _tally(self.tenth, feature[thinking], tenth[thinking])
        _tally(self.region_tokens, batch.region[batch.region >= 0])
        _tally(self.tenth_tokens, batch.tenth[batch.tenth >= 0])
        self.domain_tokens.index_add_(0, batch.domain, batch.length)

        drawn = _mixed(batch.identity[row] ^ _mixed(position * self.description.n_flat + feature ^ self.seed))
        # A positive float's bits are ordered as it is; between equals the hash decides, not the order of documents.
        size = (value.view(torch.int32).long() << 32) | ((drawn >> 32) & 0xFFFFFFFF)
        fired = _Firings(batch, self.description, token, feature, value, row, position)
        of_document = _is_best(group_starts(feature, row), size)
        wanted = self.top.wanted(feature, size, of_document)
        self.top.add(fired.examples(wanted, size[wanted], others=0))
        drawn = (drawn >> 1) & 0x7FFFFFFFFFFFFFFF
        wanted = self.sample.wanted(feature, drawn)
        self.sample.add(fired.examples(wanted, drawn[wanted], others=self.description.options.neighbours))

    def layers(self) -> dict[int, LayerStatistics]:
        """The statistics, layer by layer."""
        n = self.description.n_features
        ranked = {"top": self.top.result(), "sample": self.sample.result()}
        found = {}
        for place, layer in enumerate(self.description.layers):
            here = slice(place * n, (place + 1) * n)
            mine: dict[str, Any] = {name: getattr(self, name)[here] for name in SUMS}
            for which, examples in ranked.items():
                start, stop = torch.searchsorted(examples.feature, torch.tensor([here.start, here.stop]))
                columns = [column[start:stop] for column in examples]
                mine[which] = Examples(columns[0] - here.start, *columns[1:])
            found[layer] = LayerStatistics(**mine)
        return found


class _Best:
    """The k best firings of each feature so far. Candidates wait until there are enough of them to be worth sorting."""

    def __init__(self, k: int, n_flat: int, none: Examples) -> None:
        self.k, self.kept, self.waiting, self.n_waiting = k, none, [none], 0
        self.threshold = torch.full((n_flat,), -1, dtype=torch.long)

    def wanted(self, feature: Tensor, key: Tensor, among: Tensor | None = None) -> Tensor:
        """Indices of the firings (``among`` those marked) that may be among the best: at most k of each feature."""
        above = key >= self.threshold[feature]
        candidates = (above if among is None else above & among).nonzero()[:, 0]
        order, rank = rank_within(feature[candidates], key[candidates])
        return candidates[order[rank < self.k]]

    def add(self, candidates: Examples) -> None:
        """Firings that `wanted` chose."""
        self.waiting.append(candidates)
        self.n_waiting += len(candidates.feature)
        if self.n_waiting > max(20_000, len(self.kept.feature) // 4):
            self.result()

    def result(self) -> Examples:
        """The best of all."""
        if self.n_waiting:
            self.kept = best(joined([self.kept, *self.waiting]), self.k)
            self.waiting, self.n_waiting = [], 0
            _, rank = rank_within(self.kept.feature, self.kept.key)
            last = rank == self.k - 1
            self.threshold[self.kept.feature[last].long()] = self.kept.key[last]
        return self.kept


@dataclass(frozen=True)
class _Firings:
    """A batch's firings, sorted by feature and then token, and how to look around in them."""

    batch: _Batch
    description: StoreDescription
    token: Tensor
    feature: Tensor
    value: Tensor
    row: Tensor
    position: Tensor

    def examples(self, chosen: Tensor, key: Tensor, others: int) -> Examples:
        """The chosen firings with their surroundings."""
        return Examples(
            self.feature[chosen].int(),
            key,
            self.value[chosen],
            self.batch.document[self.row[chosen]].int(),
            self.position[chosen].int(),
            self._window(chosen),
            self._beside(chosen, others),
        )

    def _window(self, chosen: Tensor) -> Tensor:
        """[n, width]: the same feature's activations around each chosen firing.

        In this order they stand next to it: as many places away as there are tokens between, at most.
        """
        before, after = self.description.options.before, self.description.options.after
        width, n = before + 1 + after, len(self.token)
        place = chosen[:, None] + torch.arange(-before, after + 1)
        inside = (place >= 0) & (place < n)
        place = place.clamp(0, max(0, n - 1))
        column = self.token[place] - self.token[chosen, None] + before
        same = (self.feature[place] == self.feature[chosen, None]) & (self.row[place] == self.row[chosen, None])
        column = torch.where(inside & same & (column >= 0) & (column < width), column, width)
        windows = torch.zeros(len(chosen), width + 1).scatter_(1, column, self.value[place])
        return windows[:, :width].clamp(max=torch.finfo(torch.float16).max).half()

    def _beside(self, chosen: Tensor, others: int) -> Tensor:
        """[n, others]: the strongest other features on the same token, -1 where there are fewer."""
        if not others or not len(chosen):
            return torch.full((len(chosen), others), -1, dtype=torch.int32)
        here = self.token[chosen]
        looked_at = torch.zeros(self.batch.tokens.numel(), dtype=torch.bool).index_fill_(0, here, True)
        near = looked_at[self.token].nonzero()[:, 0]
        near = near[self.value[near].argsort(descending=True)]
        near = near[self.token[near].argsort(stable=True)]  # by token, the strongest first
        tokens = self.token[near]
        place = torch.searchsorted(tokens, here)[:, None] + torch.arange(others + 1)
        there = place < torch.searchsorted(tokens, here, right=True)[:, None]
        found = torch.where(there, self.feature[near[place.clamp(max=len(near) - 1)]], -1)
        found = torch.where(found == self.feature[chosen, None], -1, found)
        # The feature itself, or the one too many, is -1 now: to the end with it.
        last = (found < 0).int().argsort(dim=-1, stable=True)
        return found.gather(1, last)[:, :others].int()


def _is_best(group: Tensor, key: Tensor) -> Tensor:
    """True at the entry of each group that has the largest key."""
    best_key = torch.full_like(key, -1).scatter_reduce_(0, group, key, "amax")
    return key == best_key[group]


def _tally(counts: Tensor, index: Tensor, column: Tensor | None = None) -> None:
    """Count occurrences of ``index``, or of pairs (index, column)."""
    flat = index if column is None else index * counts.shape[1] + column
    counts.view(-1).index_add_(0, flat, torch.ones_like(flat))


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 64 bit integers that scrambles all of them (the finaliser of SplitMix64)."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _batch(
    traces: Sequence[Trace], regions: Sequence[Sequence[int]], rows: Sequence[int], domains: Sequence[str]
) -> _Batch:
    tokens = collate([traces[i] for i in rows]).tokens
    region, tenth = torch.full(tokens.shape, -1), torch.full(tokens.shape, -1)
    thinking = TRACE_REGIONS.index("thinking")
    for place, i in enumerate(rows):
        codes = torch.tensor(regions[i])
        region[place, : len(codes)] = codes
        inside = (codes == thinking).nonzero()[:, 0]
        tenth[place, inside] = torch.arange(len(inside)) * TENTHS // max(1, len(inside))
    return _Batch(
        tokens,
        document=torch.tensor(list(rows)),
        length=torch.tensor([len(traces[i].tokens) for i in rows]),
        identity=torch.tensor([_identity(traces[i]) for i in rows]),
        domain=torch.tensor([domains.index(traces[i].domain) for i in rows]),
        region=region.flatten(),
        tenth=tenth.flatten(),
    )


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
