"""NaN and infinity are refused where they first occur, with the layer, document or step."""

import math
from pathlib import Path

import pytest
import torch
from helpers.random_models import random_batch, random_model, randomise
from safetensors.torch import load_file, save_file

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.finite_weights import NotFiniteError, require_finite_weights
from tl_adapters.adapters.saelens_folder import AdapterFormatError
from tl_adapters.attribution.attribute import attribute
from tl_adapters.config import TrainingConfig
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.faithfulness import measure_faithfulness
from tl_adapters.features.collect import collect_features
from tl_adapters.features.store_description import StoreOptions
from tl_adapters.interop.saelens import from_saelens
from tl_adapters.models.finite_activations import finite_blocks, require_finite_activations
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import reasoning_pairs
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.training.objective import held_out_terms
from tl_adapters.training.trainer import Trainer, TrainingError

BAD = [math.nan, math.inf, -math.inf]


@pytest.fixture
def pair() -> PairedModel:
    models = [random_model(seed, torch.float32, num_hidden_layers=3, vocab_size=31) for seed in (1, 2)]
    return randomise(PairedModel.from_pretrained(*models))


def poison_token(pair: PairedModel, token: int = 30, value: float = math.nan) -> None:
    """Make the embedding of one token not finite."""
    with torch.no_grad():
        pair.model.embed.W_E[token, 3] = value


def poison_layer(pair: PairedModel, layer: int, value: float) -> None:
    """Make both MLPs of a layer write values that are not finite."""
    with torch.no_grad():
        for weights in pair.mlps[layer].weights():
            weights.W_out[0, 0] = value


DOCUMENTS = [Trace((1, 2, 3, 4, 5), 2), Trace((1, 2, 3, 30, 5, 6, 7), 2), Trace((4, 5, 6), 1)]


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", BAD)
def test_weights_that_are_not_finite_are_not_saved(pair: PairedModel, tmp_path: Path, value: float) -> None:
    adapters = pair.installed_adapters()
    with torch.no_grad():
        adapters[1].W_dec[3, 4] = value
    with pytest.raises(NotFiniteError, match=r"not saved: layer 1, W_dec holds 1 values of 768"):
        adapters.save_pretrained(tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("read", "error", "match"),
    [
        (AdapterSet.from_pretrained, AdapterFormatError, "was edited"),  # the hash of the file comes first
        (lambda path: from_saelens(path, ["layer_2"]), NotFiniteError, "layer 2, W_enc"),
    ],
)
def test_weights_that_are_not_finite_are_not_loaded(
    pair: PairedModel, tmp_path: Path, read: object, error: type[Exception], match: str
) -> None:
    pair.installed_adapters().save_pretrained(tmp_path / "set")
    file = tmp_path / "set" / "layer_2" / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["W_enc"][0, 0] = math.inf
    save_file(tensors, file)
    with pytest.raises(error, match=match):
        read(tmp_path / "set")  # type: ignore[operator]


def test_weights_in_memory_that_are_not_finite_are_not_installed(pair: PairedModel) -> None:
    adapters = pair.installed_adapters()
    with torch.no_grad():
        adapters[0].b_enc[:5] = math.nan
    with pytest.raises(NotFiniteError, match="layer 0, b_enc holds 5 values of 24"):
        pair.load_adapters(adapters)


def test_integers_and_empty_tensors_are_finite() -> None:
    require_finite_weights([("n", torch.tensor(3))], "x")
    require_finite_weights([], "x")


# -- activations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", BAD)
def test_faithfulness_names_layer_and_document(pair: PairedModel, value: float) -> None:
    poison_token(pair, value=value)
    with pytest.raises(NotFiniteError, match=r"The target: the embedding, document 1 \(from 0\), position 3"):
        measure_faithfulness(pair, DOCUMENTS)


@pytest.mark.parametrize("layer", [0, 2])
def test_faithfulness_names_the_first_layer(pair: PairedModel, layer: int) -> None:
    poison_layer(pair, layer, math.inf)
    with pytest.raises(NotFiniteError, match=f"layer {layer}, document"):
        measure_faithfulness(pair, DOCUMENTS)


def test_validation_names_the_layer(pair: PairedModel) -> None:
    poison_layer(pair, 1, math.nan)
    with pytest.raises(NotFiniteError, match="Validation, target: layer 1"):
        held_out_terms(pair, [random_batch(3, vocab=31)])


@pytest.mark.parametrize("linearization", ["relp", "frozen_mlp", "gradient"])
def test_attribution_names_the_layer_and_not_the_chat_format(pair: PairedModel, linearization: str) -> None:
    poison_layer(pair, 1, math.nan)
    with pytest.raises(NotFiniteError, match="on this prompt: layer 1, document 0"):
        attribute(pair, [1, 2, 3, 4], [3], linearization=linearization, progress=False)


def test_padding_is_not_checked() -> None:
    values, real = torch.ones(2, 3, 4), torch.tensor([[True, True, False], [True, True, True]])
    values[0, 2] = math.nan
    require_finite_activations({"layer 0": values}, real, [5, 7], "x")
    values[1, 1, 2] = math.inf
    with pytest.raises(NotFiniteError, match="layer 0, document 7 .*, position 1"):
        require_finite_activations({"layer 0": values}, real, [5, 7], "x")


def test_a_pass_is_checked_after_every_layer(pair: PairedModel) -> None:
    batch = random_batch(3, vocab=31)
    watched = lambda: finite_blocks(pair.model, 3, batch.real, range(3), "x")  # noqa: E731
    with watched():
        pair.model(batch.tokens)
    poison_layer(pair, 2, math.nan)
    with pytest.raises(NotFiniteError, match="x: layer 2"), watched():
        pair.model(batch.tokens)


# -- collecting -------------------------------------------------------------------------------------------------------

OPTIONS = StoreOptions(examples=2, sample=2, before=2, after=2, tokens_per_batch=120)


@pytest.fixture
def builtin() -> PairedModel:
    return randomise(load_organism_pair("cpu"), n_features=12)


def the_traces(pair: PairedModel) -> list[Trace]:
    return encode_traces(reasoning_pairs("report", 5), pair.model.tokenizer)


@pytest.mark.parametrize("stream", ["replacement", "target"])
def test_a_token_that_is_not_finite_stops_a_collection_and_leaves_the_store_valid(
    builtin: PairedModel, tmp_path: Path, stream: str
) -> None:
    """The collection of the other documents continues once that document is removed."""
    traces = the_traces(builtin)
    bad = next(t for t in range(1, builtin.model.cfg.d_vocab) if not any(t in trace.tokens for trace in traces))
    broken = Trace((*traces[3].tokens[:9], bad, *traces[3].tokens[10:]), traces[3].prompt_length)
    poison_token(builtin, bad)
    quiet = {"stream": stream, "options": OPTIONS, "progress": False, "folder": tmp_path / "store"}
    with pytest.raises(NotFiniteError, match=r"residual stream: the embedding, document 3 \(from 0\), position 9"):
        collect_features(builtin, [*traces[:3], broken, *traces[4:]], **quiet)  # type: ignore[arg-type]
    store = collect_features(builtin, traces[:3], **quiet)  # type: ignore[arg-type]
    assert store.documents == 3
    for feature in store.features(store.ids()):
        assert all(math.isfinite(value) for example in feature.top_examples for value in example.values)


def test_an_infinite_activation_is_detected_where_adapters_only_read(builtin: PairedModel) -> None:
    """On the target's stream nothing is written back, so the stream itself stays finite."""
    with torch.no_grad():
        builtin.installed_adapters()[1].W_enc[:, 4] = 3e38
    with pytest.raises(NotFiniteError, match="Layer 1, feature 4, document"):
        collect_features(builtin, the_traces(builtin), stream="target", options=OPTIONS, progress=False)


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_names_step_route_layer_and_document(pair: PairedModel) -> None:
    config = TrainingConfig(stages=("end_to_end",), n_features=8, steps=2)
    trainer = Trainer(pair, [Trace((1, 2, 3, 4, 5), 1)], config, progress=False)
    poison_layer(pair, 2, math.nan)
    with pytest.raises(TrainingError, match=r"Step 1: output_kl.*In this batch, the target: layer 2, document 0"):
        trainer.run()


def test_target_weights_that_are_not_finite_are_not_mistaken_for_another_model(pair: PairedModel) -> None:
    poison_layer(pair, 2, math.nan)
    with pytest.raises(NotFiniteError, match=r"The target's weights.*layer 2.*mlp.down_proj"):
        pair.new_adapters(8)


def test_training_names_a_gradient_that_is_not_finite(pair: PairedModel) -> None:
    config = TrainingConfig(stages=("end_to_end",), n_features=8, steps=2)
    trainer = Trainer(pair, [Trace((1, 2, 3, 4, 5), 1)], config, progress=False)
    trainer.adapters[1].b_dec.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingError, match=r"Step 1: the gradient's norm.*layer 1, b_dec"):
        trainer.run()
