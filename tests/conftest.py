"""Tiny random pairs for every test, a closed network, and jaxtyping annotations that are checked."""

import functools
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests are exact on the CPU, also where "auto" would find a GPU
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch, and for notebooks' kernels: as many workers as cores

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from beartype import BeartypeConf, beartype
from filelock import FileLock
from jaxtyping import install_import_hook

torch.backends.mps.is_available = functools.cache(lambda: False)  # likewise; cached, as torch 2.14 looks into it

check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
install_import_hook("tl_adapters", "conftest.check_types")

from transformers import (  # noqa: E402
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tl_adapters.data.traces import Batch, Trace, collate  # noqa: E402
from tl_adapters.models.paired_model import PairedModel  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A worker takes whole files, whose tests share fixtures; notebooks share nothing, are long, and so come first."""
    notebooks = "test_tutorials.py"
    for item in items:
        alone = item.path.name == notebooks
        item.add_marker(pytest.mark.xdist_group(item.nodeid if alone else item.path.name))
    items.sort(key=lambda item: item.path.name != notebooks)


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


ARCHITECTURES = {
    "Qwen2ForCausalLM": (Qwen2Config, Qwen2ForCausalLM, {}),
    "Qwen3ForCausalLM": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12}),
    "LlamaForCausalLM": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,  # every head has its own keys
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            },
        },
    ),
    "Gemma2ForCausalLM": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "tie_word_embeddings": True, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 4,
            "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
        },
    ),
}  # fmt: skip
"""Per architecture what the others lack: head width, llama3 rope, tied weights, post-norms, windows, soft caps."""


def random_model(
    seed: int, dtype: torch.dtype = torch.float64, architecture: str = "Qwen2ForCausalLM", **overrides: object
) -> PreTrainedModel:
    """A small model with every weight random, norms and biases included (ones and zeros hide bugs)."""
    config_class, model_class, peculiar = ARCHITECTURES[architecture]
    options: dict[str, object] = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        architectures=[architecture],
        attn_implementation="eager",
    )
    model = model_class(config_class(**{**options, **peculiar, **overrides})).to(dtype)
    offset = 0 if architecture == "Gemma2ForCausalLM" else 1  # Gemma's norms multiply by 1 + w
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)
            if "norm" in name:
                weight.copy_(offset + 0.4 * noise)
            else:
                weight.copy_(noise * (0.3 if weight.ndim == 1 else 1.3 * weight.shape[-1] ** -0.5))
    return model.eval()


ACTIVATION_OPTIONS: dict[str, dict[str, object]] = {
    "relu": {},
    "jumprelu": {"activation": "jumprelu", "bandwidth": 1.5},
    "topk": {"activation": "topk", "k": 5},
    "batchtopk": {"activation": "batchtopk", "k": 5},
}
"""Options of new adapters by activation; a law of adapters holds for all four."""


def randomise(pair: PairedModel, n_features: int = 24, seed: int = 5, activation: str = "relu") -> PairedModel:
    """Install adapters whose every weight is random, so that no law holds because something is zero."""
    options = ACTIVATION_OPTIONS[activation]
    adapters = pair.new_adapters(n_features, seed=seed, dtype=pair.model.cfg.dtype, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in adapters.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        for adapter in adapters:
            if activation in ("jumprelu", "batchtopk"):
                adapter.threshold.copy_(torch.randn(n_features, generator=generator).abs() * 0.3)
    return pair


@pytest.fixture(params=ARCHITECTURES)
def hf_models(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(base, target) in float64; every law that reads a pair is asserted on every architecture."""
    return random_model(1, architecture=request.param), random_model(2, architecture=request.param)


@pytest.fixture
def pair(hf_models: tuple[PreTrainedModel, PreTrainedModel]) -> PairedModel:
    """A float64 pair with random adapters."""
    return randomise(PairedModel.from_pretrained(*hf_models))


@pytest.fixture(params=["hooked", "bridge"])
def bos_pair(request: pytest.FixtureRequest, tmp_path: Path) -> PairedModel:
    """A pair whose tokenizer writes BOS itself and whose template opens the thinking, from two folders of the hub."""
    from hub_folders import write_pair  # which imports this file

    return PairedModel.from_pretrained(*write_pair(tmp_path / "hub", "R1-Distill-Llama"), backend=request.param)


@pytest.fixture
def batch() -> Batch:
    """Three documents of different lengths, padded on the right."""
    return random_batch(3)


def random_batch(seed: int, lengths: tuple[int, ...] = (11, 7, 9), prompt: int = 3, vocab: int = 61) -> Batch:
    """Documents of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    draw: Callable[[int], list[int]] = lambda n: torch.randint(1, vocab, (n,), generator=generator).tolist()  # noqa: E731
    return collate([Trace(tuple(draw(n)), prompt) for n in lengths])


def small_scale():  # type: ignore[no-untyped-def]
    """A demo of seconds."""
    from tl_adapters.circuits.search import SearchOptions
    from tl_adapters.circuits.study import StudyOptions
    from tl_adapters.config import TrainingConfig
    from tl_adapters.study.evaluate import Scale

    return Scale(
        training_traces=400,
        problems=24,
        documents=32,
        baseline_documents=8,
        max_new_tokens=72,
        hesitation=(32, 16),
        circuit=StudyOptions(SearchOptions(per_round=8, documents=12), draws=1, probability_draws=1),
        training=TrainingConfig(n_features=64, steps=30, log_every=5),
    )


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one small demo; no test changes it, and workers share it."""
    from tl_adapters.study.evaluate import demo

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "runs" / "demo"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.parent / "lock"):
        if not (folder.parent / "made").exists():
            assert demo(folder, small_scale(), progress=False) == folder / "report.html"
            (folder.parent / "made").touch()
    return folder
