"""Tiny random pairs for every test, a closed network, and jaxtyping annotations that are checked."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import socket
from collections.abc import Callable

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
install_import_hook("tl_adapters", "conftest.check_types")

from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from tl_adapters.data import Batch, Trace, collate  # noqa: E402
from tl_adapters.paired import PairedModel  # noqa: E402


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anything but this machine is an error."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        local = self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1"))
        if not local:
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


def random_qwen2(seed: int, dtype: torch.dtype = torch.float64, **overrides: object) -> Qwen2ForCausalLM:
    """A small Qwen2 with every weight random, norms and biases included (ones and zeros hide bugs)."""
    options: dict[str, object] = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    )
    model = Qwen2ForCausalLM(Qwen2Config(**{**options, **overrides})).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)
            if "norm" in name:
                weight.copy_(1 + 0.4 * noise)
            else:
                weight.copy_(noise * (0.3 if weight.ndim == 1 else 1.3 * weight.shape[-1] ** -0.5))
    return model.eval()


def randomise(pair: PairedModel, n_features: int = 24, seed: int = 5) -> PairedModel:
    """Install adapters whose every weight is random, so that no law holds because something is zero."""
    adapters = pair.new_adapters(n_features, seed=seed, dtype=pair.model.cfg.dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in adapters.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return pair


@pytest.fixture
def hf_models() -> tuple[Qwen2ForCausalLM, Qwen2ForCausalLM]:
    """(base, target) in float64."""
    return random_qwen2(1), random_qwen2(2)


@pytest.fixture
def pair(hf_models: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM]) -> PairedModel:
    """A float64 pair with random adapters."""
    return randomise(PairedModel.from_pretrained(*hf_models))


@pytest.fixture
def batch() -> Batch:
    """Three documents of different lengths, padded on the right."""
    return random_batch(3)


def random_batch(seed: int, lengths: tuple[int, ...] = (11, 7, 9), prompt: int = 3, vocab: int = 61) -> Batch:
    """Documents of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    draw: Callable[[int], list[int]] = lambda n: torch.randint(1, vocab, (n,), generator=generator).tolist()  # noqa: E731
    return collate([Trace(tuple(draw(n)), prompt) for n in lengths])
