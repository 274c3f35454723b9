"""Every reader of files, with valid files to damage: tiny, made once per process, without a forward pass."""

from __future__ import annotations

import atexit
import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fuzz.fuzzing import Reader
from fuzz.run_readers import RUN_READERS
from helpers import made_stores
from helpers.random_graphs import random_graph
from helpers.random_models import random_model
from helpers.word_tokenizers import word_tokenizer
from safetensors.torch import save_file

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.adapters.set_folder import SET_METADATA_FILE, record_hash
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.attribution.graph import AttributionGraph, GraphError
from tl_adapters.attribution.pruning import prune
from tl_adapters.autointerp.reply_cache import ReplyCache
from tl_adapters.checkpoints.base_mlps import read_base_mlps
from tl_adapters.checkpoints.compatibility import compare_configs, compare_vocabularies
from tl_adapters.checkpoints.hf_model import load_hf_model
from tl_adapters.checkpoints.layer_samples import LayerSamples
from tl_adapters.checkpoints.model_files import read_config, read_vocabulary
from tl_adapters.circuits.circuit import Circuit, CircuitEdge, CircuitFeature
from tl_adapters.evaluation import sampled_responses
from tl_adapters.evaluation.sampled_responses import ResponseOptions, SampledResponse, score_responses
from tl_adapters.features.feature import Label, feature_view
from tl_adapters.features.store import FeatureStore
from tl_adapters.features.store_files import STORE_FILE, VOCABULARY_FILE
from tl_adapters.features.store_parts import layer_file, write_part
from tl_adapters.generation.responses import Response
from tl_adapters.interop.authors_checkpoint import from_authors, to_authors
from tl_adapters.interop.circuit_tracer import node_ids, remove_circuit_tracer, write_circuit_tracer
from tl_adapters.interop.saelens import from_saelens
from tl_adapters.organism import recipe
from tl_adapters.utils.files import append_text, write_text
from tl_adapters.utils.reading import UnreadableFileError
from tl_adapters.utils.strict_json import dumps

D_MODEL, N_FEATURES, N_LAYERS = 8, 6, 2


def _copied(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """A writer that runs ``make`` once and copies what it wrote."""

    @cache
    def made() -> Path:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-")) / "files"
        atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
        make(folder)
        return folder

    return lambda folder: shutil.copytree(made(), folder)


# -- adapters ---------------------------------------------------------------------------------------------------------


def _adapters(activation: Any = "jumprelu", d_model: int = D_MODEL, n_layers: int = N_LAYERS) -> AdapterSet:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    layers = [
        TranscoderAdapter(d_model, N_FEATURES, activation=activation, generator=generator) for _ in range(n_layers)
    ]
    samples = [LayerSamples(draw(d_model), draw(4), draw(4)) for _ in layers]
    metadata = AdapterMetadata("base", "target", activation=activation, fingerprints={"base_mlps": "b", "target": "t"})
    return AdapterSet(layers, samples, metadata, samples={"target.embed": draw(4)})


def _without_hashes(folder: Path) -> None:
    """A set as version 2 of the format had it."""
    _adapters("relu").save_pretrained(folder)
    path = folder / SET_METADATA_FILE
    record = json.loads(path.read_text())
    del record["files"], record["sha256"]
    path.write_text(json.dumps({**record, "schema_version": 2}))


def _of_other_people(folder: Path) -> None:
    """SAELens folders without our metadata."""
    _adapters().save_pretrained(folder)
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    for path in folder.glob("*/cfg.json"):
        record = json.loads(path.read_text())
        record["metadata"].pop("tl_adapters")
        path.write_text(json.dumps(record))


def _rehash(folder: Path) -> None:
    """Give tl_adapters.json the hashes of the files as they are."""
    from tl_adapters.adapters.file_hashes import file_hash

    path = folder / SET_METADATA_FILE
    try:
        record = json.loads(path.read_text())
        for name, facts in record["files"].items():
            facts |= {"sha256": file_hash(folder / name), "size": (folder / name).stat().st_size}
        record["sha256"] = record_hash({key: value for key, value in record.items() if key != "sha256"})
        path.write_text(json.dumps(record))
    except Exception:  # it is too damaged for a stranger to repair
        return


def _read_set(folder: Path) -> None:
    adapters = AdapterSet.from_pretrained(folder)
    assert len(adapters.fingerprints) == N_LAYERS + 1
    normalized = adapters.normalized() if adapters.layer_samples else adapters
    for adapter in normalized:
        adapter(torch.ones(3, adapters.d_model, dtype=adapter.W_enc.dtype))


def _authors_checkpoint(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as models:
        for seed, name in enumerate(("base", "target")):
            model = random_model(seed, torch.float32, hidden_size=D_MODEL, intermediate_size=12, num_hidden_layers=2,
                                 vocab_size=11, num_attention_heads=2)  # fmt: skip
            model.save_pretrained(f"{models}/{name}")
        to_authors(_adapters("relu"), folder, base=f"{models}/base", target=f"{models}/target")


# -- models ----------------------------------------------------------------------------------------------------------


def _model(folder: Path) -> None:
    """A model in several shards with its tokenizer."""
    model = random_model(1, torch.float32, hidden_size=D_MODEL, intermediate_size=12, num_hidden_layers=N_LAYERS,
                         vocab_size=11, num_attention_heads=2)  # fmt: skip
    model.save_pretrained(folder, max_shard_size="4kB")
    word_tokenizer(*"abcdefgh").save_pretrained(folder)


def _read_model(folder: Path) -> None:
    hf_model, tokenizer = load_hf_model(folder)
    hf_model(torch.tensor([[1, 2, 3]]))
    if tokenizer is not None:
        tokenizer("a b c")
    read_vocabulary(folder)


def _read_base(folder: Path) -> None:
    """The model as a base: its MLPs, and the checks of doctor."""
    config = read_config(folder)
    compare_configs(config, config)
    compare_vocabularies(read_vocabulary(folder), read_vocabulary(folder))
    read_base_mlps(folder, N_LAYERS)


# -- circuits and graphs ----------------------------------------------------------------------------------------------


def _circuit(folder: Path) -> None:
    features = tuple(
        CircuitFeature(FeatureId(layer, 3), role, 0.5, 0.25, float("nan"), -0.125, 1.5, 2.0)
        for layer, role in enumerate(("output", "template", "suppress"))
    )
    edges = (CircuitEdge(FeatureId(0, 3), FeatureId(1, 3), 0.5), CircuitEdge(FeatureId(1, 3), None, -1.0))
    Circuit(
        "hesitation", ("Wait", " Hmm"), features, 1.0, "report", {"adapters": "a", "target": "t", "base_mlps": "b"},
        N_FEATURES, 3, 0.1, edges, ((1, 2), (3,)),
    ).save(folder)  # fmt: skip


def _read_circuit(folder: Path) -> None:
    circuit = Circuit.load(folder)
    circuit.ids()
    circuit._repr_html_()
    circuit.json_text()
    circuit._require_adapters(circuit.fingerprints, "the pair's are") if "adapters" in circuit.fingerprints else None


def _read_graph(folder: Path) -> None:
    graph = AttributionGraph.load(folder)
    assert graph.text is not None and graph.display_strings is not None and graph.residual >= 0
    with contextlib.suppress(GraphError):  # two targets may be the same
        node_ids(graph)
    if graph.targets and len(graph.tokens):
        prune(graph)


def _viewer_folder(folder: Path) -> None:
    for slug in ("a", "b"):
        write_circuit_tracer(random_graph(1, True, 4), folder, slug)


def _update_viewer_folder(folder: Path) -> None:
    write_circuit_tracer(random_graph(1, True, 4), folder, "b")
    remove_circuit_tracer(folder, "a")


# -- feature stores ---------------------------------------------------------------------------------------------------


def _store(folder: Path) -> None:
    store = made_stores.made_store(made_stores.on_its_token)
    write_text(folder / VOCABULARY_FILE, json.dumps(list(store.vocabulary)))
    write_text(folder / STORE_FILE, dumps({"schema_version": 1, **store.about.to_json()}))
    part = write_part(folder / "part-a", store.part, store.about.layers)
    (folder / "effects").mkdir()
    for layer in store.about.layers:
        effects = {name: tensor.contiguous() for name, tensor in store.layer(layer)[1]._asdict().items()}
        save_file(effects, folder / "effects" / layer_file(layer))
    written = FeatureStore(store.about, part, {}, store.vocabulary, folder)
    written.set_labels({FeatureId(0, 1): Label("a", "b", "rules", 0.5), FeatureId(2, 3): Label("c")})
    measured = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 40, "unit": "firings", "split": "report"}
    record = [{"layer": layer, "overlap": measured, "kept": measured, "correlation": 0.5} for layer in (0, 2)]
    write_text(folder / "agreement.json", json.dumps(record))


def _read_store(folder: Path) -> None:
    store = FeatureStore.load(folder)
    assert store.tokens >= 0 and store.region_tokens is not None
    store.table(min_firings=1)
    for feature in store.features(store.ids(1)[:3]):
        feature_view(feature)
        for example in feature.top_examples[:2]:
            store.region_of(example)
            store.document(example.document)
            store.excerpt(example.document, example.position)
    _ = [layer["overlap"]["value"] for layer in store.agreement]


# -- responses --------------------------------------------------------------------------------------------------------


def _responses(folder: Path) -> None:
    folder.mkdir()
    sampled_responses._require_same(folder / "settings.json", {"n": 4, "seed": 0, **asdict(ResponseOptions())})
    for batch in ((0, 1), (2, 3)):
        records = [
            SampledResponse(i, 0, Response((1, 2), (3, 4, 5), "Wait, it is 3.", False, i == 0, end=5)) for i in batch
        ]
        lines = [sampled_responses._as_record(record, "What is it?") for record in records]
        append_text(folder / "answers.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _read_responses(folder: Path) -> None:
    settings = {"n": 4, "seed": 0, **asdict(ResponseOptions())}
    sampled_responses._require_same(folder / "settings.json", settings)
    batches = sampled_responses._whole_batches(folder / "answers.jsonl", [[0, 1], [2, 3]])
    if sampled := [one for batch in batches for one in batch]:
        score_responses(sampled, "report")


QUESTIONS = [
    {"server": "http://h/v1", "model": "m", "parameters": {"seed": 0, "temperature": 0}, "messages": [{"role": r}]}
    for r in ("user", "system")
]


def _replies(folder: Path) -> None:
    reply = json.dumps({"category": "language", "label": "x", "reason": "y"})
    for question in QUESTIONS:
        ReplyCache(folder).reply(question, lambda: (reply, False))
    ReplyCache(folder).mark_unusable(QUESTIONS[1], "no")


def _read_replies(folder: Path) -> None:
    def ask() -> tuple[str, bool]:
        raise UnreadableFileError(f"A question of {folder} is asked again.")

    assert set(ReplyCache(folder).reply(QUESTIONS[0], ask)) >= {False, True}
    with contextlib.suppress(UnreadableFileError):  # this one is unusable
        ReplyCache(folder).reply(QUESTIONS[1], ask)


def _recipe(folder: Path) -> None:
    folder.mkdir()
    shutil.copy(recipe.PAIR / "recipe.json", folder)


def _read_recipe(folder: Path) -> None:
    made = recipe.Recipe.of(folder)
    assert made.d_model > 0 and sum(made.base_mix.values()) > 0


ADAPTER_FILES = ("*.json", "*.safetensors", "*/*.json", "*/*.safetensors")
MODEL_FILES = ("*.json", "*.safetensors")
READERS = {
    reader.name: reader
    for reader in (
        Reader("adapters", _copied(_adapters().save_pretrained), ADAPTER_FILES, _read_set, True),
        Reader("adapters-rehashed", _copied(_adapters().save_pretrained), ADAPTER_FILES, _read_set, True, _rehash),
        Reader("adapters-version-2", _copied(_without_hashes), ADAPTER_FILES, _read_set, True),
        Reader("saelens", _copied(_of_other_people), ADAPTER_FILES[2:], from_saelens, True),
        Reader("authors", _copied(_authors_checkpoint), ("config.json", "*.safetensors"), from_authors, True),
        Reader("model", _copied(_model), MODEL_FILES, _read_model, True),
        Reader("base", _copied(_model), MODEL_FILES, _read_base, True),
        Reader("circuit", _copied(_circuit), ("circuit.json",), _read_circuit, True),
        Reader("graph", _copied(random_graph(1, True, 4).save), ("*",), _read_graph, True),
        Reader("graph-list", _copied(_viewer_folder), ("graph-metadata.json",), _update_viewer_folder, False),
        Reader("store", _copied(_store), ("*.json", "*/*.json", "*/*.safetensors"), _read_store, False),
        Reader("responses", _copied(_responses), ("*.json", "*.jsonl"), _read_responses, False),
        Reader("replies", _copied(_replies), ("*/*.json",), _read_replies, False),
        Reader("recipe", _copied(_recipe), ("recipe.json",), _read_recipe, False),
        *(replace(reader, write=_copied(reader.write)) for reader in RUN_READERS),
    )
}  # fmt: skip
