"""The feature store equals a plain reference, whatever the batches, order, parts, processes and interruptions."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.pairs import make
from helpers.random_models import randomise

import tl_adapters.features.collect as collecting
from tl_adapters import organism
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.data.chat_format import ChatFormat, encode_traces
from tl_adapters.data.tokens import VocabularyError
from tl_adapters.data.trace_regions import TRACE_REGIONS, TraceRegions
from tl_adapters.data.traces import DataError, Trace
from tl_adapters.features.collect import collect_features, collect_share
from tl_adapters.features.example_selection import mixed_bits
from tl_adapters.features.feature import FeatureStoreError
from tl_adapters.features.firing_reader import features_read_on
from tl_adapters.features.layer_statistics import histogram_bucket, histogram_edges
from tl_adapters.features.store import FeatureStore
from tl_adapters.features.store_description import StoreOptions
from tl_adapters.features.stream_agreement import stream_agreement
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel
from tl_adapters.utils.files import FolderBusyError, alone_in

OPTIONS = StoreOptions(examples=4, sample=5, before=3, after=2, tokens_per_batch=300)
QUIET = {"progress": False, "split": "report"}


@pytest.fixture(scope="module")
def pair() -> PairedModel:
    """The model organism with random adapters of which every twentieth feature or so fires."""
    pair = randomise(PairedModel.from_pretrained(organism.BASE, organism.TARGET, dtype=torch.float64), n_features=40)
    with torch.no_grad():
        for adapter in pair.installed_adapters():
            adapter.b_enc -= 5.0
            adapter.W_dec[3] = 0  # writes nothing: never a firing, however often its encoder says so
    return pair


@pytest.fixture(scope="module")
def traces(pair: PairedModel) -> list[Trace]:
    found = encode_traces(organism.reasoning_pairs("report", 24), pair.model.tokenizer)
    return [
        Trace(t.tokens, t.prompt_length, t.thinking_length, ("sums", "products")[i % 2]) for i, t in enumerate(found)
    ]


def activations(pair: PairedModel, trace: Trace, stream: str = "replacement") -> torch.Tensor:
    """[layers, pos, n_features] in decoder-norm units, one document at a time."""
    with features_read_on(pair, stream), pair.recorded(ACTS_HOOK) as acts, torch.no_grad():
        pair.model(torch.tensor([trace.tokens]))
    norms = [adapter.W_dec.norm(dim=-1) for adapter in pair.installed_adapters()]
    return torch.stack([acts[layer][0] * norms[layer] for layer in range(pair.n_layers)]).detach()


@pytest.mark.parametrize("stream", ["replacement", "target"])
def test_the_store_equals_a_plain_reference(pair: PairedModel, traces: list[Trace], stream: str) -> None:
    store = collect_features(pair, traces, stream=stream, options=OPTIONS, words=["Wait"], **QUIET)
    dense = [activations(pair, trace, stream) for trace in traces]
    chat = ChatFormat.of(pair.model.tokenizer)
    regions = [torch.tensor(TraceRegions(chat).codes(trace)) for trace in traces]
    assert store.tokens == sum(len(t.tokens) for t in traces) and store.documents == len(traces)
    for layer in range(pair.n_layers):
        statistics, _ = store.layer(layer)
        fires = [(d[layer] > 0) for d in dense]
        assert statistics.firings.tolist() == sum(f.sum(0) for f in fires).tolist()
        assert torch.allclose(statistics.summed_activation, sum(d[layer].sum(0) for d in dense), atol=1e-4)
        for code in range(len(TRACE_REGIONS)):
            expected = sum(f[r == code].sum(0) for f, r in zip(fires, regions, strict=True))
            assert statistics.region_firings[:, code].tolist() == expected.tolist()
        for place, domain in enumerate(store.part.totals.domains):
            expected = sum(f.sum(0) for f, t in zip(fires, traces, strict=True) if t.domain == domain)
            assert statistics.domain_firings[:, place].tolist() == expected.tolist()
        assert statistics.histogram.sum(1).tolist() == statistics.firings.tolist()
        thinking = torch.zeros(40, 10, dtype=torch.long)
        for f, r in zip(fires, regions, strict=True):
            inside = (r == TRACE_REGIONS.index("thinking")).nonzero()[:, 0].tolist()
            for i, at in enumerate(inside):
                thinking[:, i * 10 // len(inside)] += f[at]
        assert statistics.decile_firings.tolist() == thinking.tolist()
    alive = store.ids(1)
    assert len(alive) > 30 and FeatureId(0, 3) not in alive
    for feature in store.features(alive):
        layer, index = feature.id
        of = [d[layer, :, index] for d in dense]
        strongest = sorted((float(o.max()) for o in of if o.max() > 0), reverse=True)[:4]
        assert [e.values[e.token_index] for e in feature.top_examples] == pytest.approx(strongest, rel=1e-5)
        assert len({e.document for e in feature.top_examples}) == len(feature.top_examples)
        assert len(feature.random_examples) == min(5, feature.firings)
        assert len({(e.document, e.position) for e in feature.random_examples}) == len(feature.random_examples)
        for example in (*feature.top_examples, *feature.random_examples):
            trace, values = traces[example.document], of[example.document]
            first = max(0, example.position - 3)
            window = slice(first, example.position + 3)
            assert example.token_ids == trace.tokens[window] and example.token_index == example.position - first
            assert list(example.values) == pytest.approx(values[window].tolist(), rel=2e-3, abs=1e-6)
            assert example.values[example.token_index] > 0


def test_the_store_says_how_large_the_difference_is_beside_rounding(
    pair: PairedModel, traces: list[Trace], tmp_path: Path
) -> None:
    store = collect_features(pair, traces[:3], tmp_path / "s", options=OPTIONS, **QUIET)
    recorded = json.loads((tmp_path / "s" / "store.json").read_text())["signal_to_noise"]
    assert store.about.signal_to_noise is not None
    assert [vars(value) for value in store.about.signal_to_noise] == recorded
    assert len(recorded) == pair.n_layers
    assert all(0 <= value["noise"] < 1e-6 * value["energy"] for value in recorded)  # weights in float32
    again = collect_features(pair, traces, tmp_path / "s", options=OPTIONS, **QUIET)  # of other documents
    assert again.about == store.about
    assert collect_features(pair, traces[:3], kind="neuron", stream="target", **QUIET).about.signal_to_noise is None


def test_coactivating_features_fire_on_the_sampled_tokens(pair: PairedModel, traces: list[Trace]) -> None:
    options = StoreOptions(examples=1, sample=1000, coactivating=200, tokens_per_batch=300)
    store = collect_features(pair, traces, options=options, **QUIET)
    dense = torch.cat([activations(pair, trace) for trace in traces], 1)
    fires = (dense > 0).double()
    for feature in store.features(store.ids()):
        layer, index = feature.id
        here = fires[layer, :, index] > 0
        together = fires[:, here].mean(1)
        together[layer, index] = 0
        excess = (together - fires.mean(1)).flatten()
        for other in feature.coactivating:
            assert other.share == pytest.approx(float(together[other.id]), abs=1e-6)
            assert other.density == pytest.approx(float(fires.mean(1)[other.id]), abs=1e-6)
        if feature.coactivating:
            found = [n.share - n.density for n in feature.coactivating]
            best = excess[excess > 1e-9].sort(descending=True).values[: len(found)]
            assert found == pytest.approx(best.tolist(), abs=1e-6)


def same(a: FeatureStore, b: FeatureStore) -> None:
    """Equal but for the numbers of the documents."""
    assert (a.tokens, a.documents, a.region_tokens) == (b.tokens, b.documents, b.region_tokens)
    text = lambda example: (example.token_ids, example.position)  # noqa: E731
    values = lambda examples: sorted(e.values[e.token_index] for e in examples)  # noqa: E731
    for x, y in zip(a.features(a.ids(0)), b.features(map(tuple, b.ids(0))), strict=True):
        assert (x.id, x.firings, x.histogram, x.regions, x.thinking_deciles, x.domains) == (
            y.id, y.firings, y.histogram, y.regions, y.thinking_deciles, y.domains,
        )  # fmt: skip
        assert Counter(map(text, x.top_examples)) == Counter(map(text, y.top_examples))
        assert Counter(map(text, x.random_examples)) == Counter(map(text, y.random_examples))
        for kind in ("top_examples", "random_examples"):
            assert values(getattr(x, kind)) == pytest.approx(values(getattr(y, kind)), rel=1e-4, abs=1e-4)
        assert {n.id for n in x.coactivating} == {n.id for n in y.coactivating}


def test_batches_order_parts_and_processes_change_nothing(
    pair: PairedModel, traces: list[Trace], tmp_path: Path
) -> None:
    whole = collect_features(pair, traces, options=OPTIONS, **QUIET)
    small = StoreOptions(**{**vars(OPTIONS), "tokens_per_batch": 64, "tokens_per_part": 300})
    same(whole, collect_features(pair, traces[::-1], options=small, **QUIET))
    folder = tmp_path / "store"
    for number in (1, 0):
        collect_share(pair, traces, folder, (number, 2), options=small, **QUIET)
        if number == 1:
            with pytest.raises(FeatureStoreError, match="parts that are not merged"):
                FeatureStore.load(folder)
    same(whole, collect_features(pair, traces, folder, options=small, **QUIET))
    assert len(list(folder.glob("part-*"))) == 1
    same(whole, FeatureStore.load(folder))


def test_a_stopped_collection_continues_and_documents_can_be_added(
    pair: PairedModel, traces: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = 1 + sum(len(trace.tokens) for trace in traces[:18]) // 3
    options = StoreOptions(**{**vars(OPTIONS), "tokens_per_part": third})
    write, folder, written = collecting.write_part, tmp_path / "store", []

    def stop_at_the_third(path: Path, *args: object) -> object:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, *args)

    monkeypatch.setattr(collecting, "write_part", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        collect_features(pair, traces[:18], folder, options=options, **QUIET)
    passes = []
    monkeypatch.setattr(collecting, "write_part", write)
    part = collecting._collect_part

    def recorded(*args: object) -> object:
        collected = part(*args)
        passes.append(collected.totals.document_sets)
        return collected

    monkeypatch.setattr(collecting, "_collect_part", recorded)
    same(
        collect_features(pair, traces[:18], options=options, **QUIET),
        collect_features(pair, traces[:18], folder, options=options, **QUIET),
    )
    assert len(passes) == 4 and passes[2] == passes[3], "three in memory, and only the third of those in the folder"
    added = collect_features(pair, traces[18:], folder, options=options, **QUIET)
    same(collect_features(pair, traces, options=options, **QUIET), added)
    grown = tmp_path / "grown"
    collect_features(pair, traces[:18], grown, options=options, **QUIET)
    other_cut = StoreOptions(**{**vars(OPTIONS), "tokens_per_part": third - 100})
    same(added, collect_features(pair, [*traces, *traces[:5]], grown, options=other_cut, **QUIET))
    del passes[:]
    again = collect_features(pair, traces[18:], folder, options=options, **QUIET)
    assert passes == [] and again.documents == len(traces), "no document is counted twice"


def test_a_kill_between_merging_and_removing_costs_nothing(
    pair: PairedModel, traces: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = 1 + sum(len(trace.tokens) for trace in traces) // 2
    options = StoreOptions(**{**vars(OPTIONS), "tokens_per_part": half})
    folder = tmp_path / "store"
    monkeypatch.setattr(collecting, "remove_own", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        collect_features(pair, traces, folder, options=options, **QUIET)
    monkeypatch.undo()
    assert len(list(folder.glob("part-*"))) == 3
    store = FeatureStore.load(folder)
    assert store.documents == len(traces)
    same(store, collect_features(pair, traces, folder, options=options, **QUIET))
    assert len(list(folder.glob("part-*"))) == 1, "what is merged is cleared away"


def test_a_collection_killed_at_any_of_its_writes_continues(
    pair: PairedModel, traces: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the n-th rename, for n = 1, 2, ..., in one folder; vocabulary.json alone is no other's folder."""
    half = 1 + sum(len(trace.tokens) for trace in traces) // 2
    options = StoreOptions(**{**vars(OPTIONS), "tokens_per_part": half})
    whole, folder = collect_features(pair, traces, options=options, **QUIET), tmp_path / "store"

    class Killed(BaseException):
        pass

    def dying(rename: Callable[..., None]) -> Callable[..., None]:
        def call(*paths: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            rename(*paths)

        return call

    found = []
    for _ in range(20):
        left = 2 if found else 1
        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", dying(os.rename))
            patched.setattr(os, "replace", dying(os.replace))
            try:
                store = collect_features(pair, traces, folder, options=options, **QUIET)
                break
            except Killed:
                found.append(sorted(path.name.partition("-")[0] for path in folder.iterdir()))
    assert found[:3] == [[], ["vocabulary.json"], ["store.json", "vocabulary.json"]] and len(found) > 5
    same(whole, store)
    assert not list(folder.glob(".*"))


def test_processes_that_share_a_collection_start_together_and_two_of_one_share_do_not(
    pair: PairedModel, traces: list[Trace], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    options = StoreOptions(**{**vars(OPTIONS), "tokens_per_part": 300})
    for trial in range(3):
        folder, children = tmp_path / f"store-{trial}", []
        begin = time.time() + 0.3
        for number in range(3):
            if (child := os.fork()) == 0:
                try:
                    time.sleep(max(0, begin - time.time()))
                    collect_share(pair, traces, folder, (number, 3), options=options, **QUIET)
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    share = {"options": options, **QUIET}
    with alone_in(folder, ".share-0-of-3.lock"):
        with pytest.raises(FolderBusyError, match="Another process is writing to"):
            collect_share(pair, traces, folder, (0, 3), **share)
        with pytest.raises(FolderBusyError, match="Another process is writing to"):
            collect_features(pair, traces, folder, **share)
        collect_share(pair, traces, folder, (1, 3), **share)
    with alone_in(folder), pytest.raises(FolderBusyError):
        collect_share(pair, traces, folder, (1, 3), **share)
    (folder / ".share-2-of-3.lock").touch()  # of a process that was killed
    same(collect_features(pair, traces, options=options, **QUIET), collect_features(pair, traces, folder, **share))
    assert not list(folder.glob(".*"))


def test_another_vocabulary_alone_is_somebody_elses(pair: PairedModel, traces: list[Trace], tmp_path: Path) -> None:
    (tmp_path / "vocabulary.json").write_text('["mine"]')
    with pytest.raises(FeatureStoreError, match=r"is not a feature store: it holds vocabulary.json"):
        collect_features(pair, traces[:3], tmp_path, **QUIET)
    assert (tmp_path / "vocabulary.json").read_text() == '["mine"]'


def test_the_sample_is_uniform() -> None:
    """Each of many firings is drawn equally often, over seeds; independently of the others."""
    drawn = torch.zeros(60)
    positions = torch.arange(60)
    for seed in range(400):
        mixed = mixed_bits(torch.tensor(12345) ^ mixed_bits(positions * 977 + 5 ^ mixed_bits(torch.tensor(seed))))
        drawn[((mixed >> 1) & 0x7FFFFFFFFFFFFFFF).topk(6).indices] += 1
    expected = 400 * 6 / 60
    assert ((drawn - expected).square() / (expected * 0.9)).sum() < 99.6  # chi-squared, 59 degrees: p = 0.0007
    assert len(mixed_bits(torch.arange(10_000)).unique()) == 10_000


def test_neurons_are_read_on_the_target(pair: PairedModel, traces: list[Trace]) -> None:
    options = StoreOptions(examples=3, sample=3, neurons_per_token=6, tokens_per_batch=300)
    store = collect_features(pair, traces, kind="neuron", stream="target", options=options, **QUIET)
    assert store.about.n_features == pair.model.cfg.d_mlp
    counts = torch.zeros(pair.n_layers, pair.model.cfg.d_mlp, dtype=torch.long)
    for trace in traces:
        with pair.routed("target"):
            _, cache = pair.model.run_with_cache(torch.tensor([trace.tokens]))
        for layer in range(pair.n_layers):
            size = cache[f"blocks.{layer}.mlp.hook_post"][0].clamp(min=0) * pair.model.blocks[layer].mlp.W_out.norm(
                dim=1
            )
            top = size.topk(6)
            counts[layer].index_add_(0, top.indices[top.values > 0], torch.ones_like(top.indices[top.values > 0]))
    assert store.firings.tolist() == counts.tolist()
    with pytest.raises(FeatureStoreError, match="give stream='target'"):
        collect_features(pair, traces, kind="neuron", **QUIET)


def test_effects_are_in_decoder_norm_units(pair: PairedModel, traces: list[Trace]) -> None:
    store = collect_features(pair, traces[:4], options=OPTIONS, words=["Wait", "Hmm"], **QUIET)
    feature = store.feature(store.ids(1)[0])
    row = pair.installed_adapters()[feature.id.layer].W_dec[feature.id.index].detach()
    logits = (row / row.norm() * pair.model.ln_final.w) @ pair.model.W_U
    logits = logits - logits.mean()
    assert feature.decoder_norm == pytest.approx(float(row.norm()), rel=1e-5)
    assert [e for _, e in feature.top_logits] == pytest.approx(logits.topk(10).values.tolist(), abs=1e-4)
    assert [e for _, e in feature.bottom_logits] == pytest.approx((-(-logits).topk(10).values).tolist(), abs=1e-4)
    assert feature.effects["Wait"] == pytest.approx(
        float(logits[pair.model.tokenizer("Wait")["input_ids"][0]]), abs=1e-4
    )
    assert feature.effect_spread == pytest.approx(float(logits.std(correction=0)), rel=1e-4)
    assert sum(n for _, _, n in feature.effect_histogram) == pair.model.cfg.d_vocab
    assert feature.effect_kurtosis == pytest.approx(
        float((logits / logits.std(correction=0)).pow(4).mean() - 3), rel=1e-3
    )


def test_quantiles_are_accurate_to_a_bucket(pair: PairedModel, traces: list[Trace]) -> None:
    store = collect_features(pair, traces, options=OPTIONS, **QUIET)
    dense = torch.cat([activations(pair, trace) for trace in traces], 1)
    for feature in store.features(store.ids(30)):
        values = dense[feature.id.layer, :, feature.id.index]
        values = values[values > 0]
        for share, told in feature.quantiles:
            lower, higher = (float(values.quantile(share, interpolation=how)) for how in ("lower", "higher"))
            assert lower / 2**0.26 < told < higher * 2**0.26
    assert (histogram_edges()[histogram_bucket(dense[dense > 2**-10])] <= dense[dense > 2**-10]).all()


def test_the_table_and_the_records_agree(pair: PairedModel, traces: list[Trace]) -> None:
    store = collect_features(pair, traces, options=OPTIONS, words=["Wait"], **QUIET)
    table = store.table(1)
    assert len({len(column) for column in table.values()}) == 1
    for row, feature in enumerate(store.features(store.ids(1))):
        assert (table["layer"][row], table["index"][row]) == feature.id
        assert table["firings"][row] == feature.firings and table["mean"][row] == pytest.approx(feature.mean)
        assert table["max"][row] == pytest.approx(feature.max)
        assert table["top_logits"][row] == [token for token, _ in feature.top_logits[:3]]
        assert table["effects"][row] == list(feature.effects.values())
        region = table["region"][row]
        assert (
            feature.region_share[region]
            == max(feature.region_share.values())
            == pytest.approx(table["region_share"][row])
        )
        tokens = Counter(e.tokens[e.token_index] for e in feature.random_examples)
        assert [tokens[t] for t in table["fires_on"][row]] == [n for _, n in tokens.most_common(3)]


def test_stream_agreement_equals_a_plain_reference(pair: PairedModel, traces: list[Trace]) -> None:
    found = stream_agreement(pair, traces[:6], "report")
    for layer, agreement in enumerate(found):
        a, b = (torch.cat([activations(pair, t, s)[layer] for t in traces[:6]]) for s in ("target", "replacement"))
        both, either = ((a > 0) & (b > 0)).sum(), ((a > 0) | (b > 0)).sum()
        assert agreement.overlap.value == pytest.approx(float(both / either))
        assert agreement.kept.value == pytest.approx(float(both / (b > 0).sum()))
        fires = (a + b) > 0
        assert agreement.correlation == pytest.approx(float(torch.corrcoef(torch.stack([a[fires], b[fires]]))[0, 1]))
    assert found[0].overlap.value == 1.0, "below the first adapter the two streams are one"


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_both_backends_read_the_same(backend: str, pair: PairedModel, traces: list[Trace]) -> None:
    hooked = collect_features(pair, traces[:4], options=OPTIONS, **QUIET)
    other = PairedModel.from_pretrained(organism.BASE, organism.TARGET, dtype=torch.float64, backend=backend)
    other.load_adapters(pair.installed_adapters())
    same(hooked, collect_features(other, traces[:4], options=OPTIONS, **QUIET))


def test_errors_say_what_is_wrong(pair: PairedModel, traces: list[Trace], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    collect_features(pair, traces[:3], folder, options=OPTIONS, **QUIET)
    with pytest.raises(FeatureStoreError, match="with stream 'replacement', and this collection has 'target'"):
        collect_features(pair, traces[:3], folder, stream="target", options=OPTIONS, **QUIET)
    with pytest.raises(FeatureStoreError, match="was collected with options"):
        collect_features(pair, traces[:3], folder, **QUIET)
    with pytest.raises(DataError, match="no documents"):
        collect_features(pair, [], **QUIET)
    with pytest.raises(VocabularyError, match="is 2 tokens"):
        collect_features(pair, traces[:3], words=["Wait,"], **QUIET)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FeatureStoreError, match="is not a feature store"):
        collect_features(pair, traces[:3], tmp_path / "other", **QUIET)
    with pytest.raises(FeatureStoreError, match="holds no feature store"):
        FeatureStore.load(tmp_path / "other")
    with pytest.raises(FeatureStoreError, match="allowed is a whole number"):
        StoreOptions(examples=0)
    with pytest.raises(FeatureStoreError, match="number < of"):
        collect_share(pair, traces, folder, (2, 2))
    with pytest.raises(DataError, match="no tokenizer"):
        collect_features(make("Qwen2ForCausalLM", "hooked"), traces[:3], **QUIET)
    for file in ("vocabulary.json", "labels.json", "agreement.json"):
        kept = (folder / file).read_bytes() if (folder / file).exists() else None
        (folder / file).write_text("{")
        with pytest.raises(FeatureStoreError, match=rf"{file} is not valid JSON"):
            FeatureStore.load(folder)
        (folder / file).unlink() if kept is None else (folder / file).write_bytes(kept)
    record = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**record, "schema_version": 99}))
    with pytest.raises(FeatureStoreError, match="schema_version 99"):
        FeatureStore.load(folder)
