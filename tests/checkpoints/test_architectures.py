"""The registry of architectures is the only module that knows what differs between them."""

import ast
from pathlib import Path

import pytest
import torch
from helpers.random_models import ARCHITECTURES as TESTED
from helpers.random_models import random_batch, randomise
from transformers import MistralConfig, MistralForCausalLM

import tl_adapters
from tl_adapters.checkpoints.architectures import ARCHITECTURES, Architecture, UnsupportedModelError, find_architecture
from tl_adapters.models.attach import attach
from tl_adapters.models.paired_model import PairedModel

TOKENS = random_batch(3).tokens[:1]


def test_every_supported_architecture_is_tested() -> None:
    assert set(TESTED) == set(ARCHITECTURES)


def test_no_other_module_names_an_architecture() -> None:
    """Docstrings may give one as an example; code reads the registry."""
    folder = Path(tl_adapters.__file__).parent
    names = [text for record in ARCHITECTURES.values() for text in (record.name, record.label)]
    for path in folder.rglob("*.py"):
        if path.relative_to(folder) == Path("checkpoints/architectures.py"):
            continue
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                named = [name for name in names if name in node.value]
                assert not named or "/" in node.value, f"{path.relative_to(folder)}, line {node.lineno}: {node.value!r}"


def random_mistral(seed: int) -> MistralForCausalLM:
    torch.manual_seed(seed)
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        max_position_embeddings=64,
        sliding_window=None,
        architectures=["MistralForCausalLM"],
        initializer_range=0.3,
    )
    model = MistralForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.4 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@torch.no_grad()
def test_a_record_is_all_that_a_gated_architecture_needs(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, target = tmp_path / "base", tmp_path / "target"
    for seed, folder in enumerate((base, target)):
        random_mistral(seed).save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="MistralForCausalLM; supported: Qwen2ForCausalLM"):
        PairedModel.from_pretrained(base, target, backend=backend)

    converter = "transformer_lens.pretrained.weight_conversions.mistral.convert_mistral_weights"
    record = Architecture("MistralForCausalLM", "Mistral", "mistral", converter)
    monkeypatch.setitem(ARCHITECTURES, record.name, record)
    pair = randomise(PairedModel.from_pretrained(base, target, backend=backend))
    theirs = random_mistral(1)
    torch.testing.assert_close(pair.model(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    for layer, other in zip(theirs.model.layers, random_mistral(0).model.layers, strict=True):
        layer.mlp = other.mlp
    with pair.routed("hybrid"):
        torch.testing.assert_close(pair.model(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)

    with pair.routed("replacement"):
        replacement = pair.model(TOKENS)
    adapters = pair.installed_adapters()
    assert attach(pair.release(), adapters, base=base).fingerprints == adapters.metadata.fingerprints
    again = PairedModel.from_pretrained(base, target, backend=backend)
    again.load_adapters(adapters)
    with again.routed("replacement"):
        assert torch.equal(again.model(TOKENS), replacement)


def test_another_architecture_of_transformer_lens_is_as_llama() -> None:
    for name in (None, "MistralForCausalLM"):
        record = find_architecture(name)
        assert record.norms == ARCHITECTURES["LlamaForCausalLM"].norms and record.embedding_scale(9) == 1
    assert find_architecture("Gemma2ForCausalLMWithTranscoder") is ARCHITECTURES["Gemma2ForCausalLM"]
