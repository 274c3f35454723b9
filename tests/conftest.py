"""Tiny random pairs for every test, a closed network, and jaxtyping annotations that are checked."""

import functools
import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
if os.environ.get("TL_ADAPTERS_TEST_CUDA") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests are exact on the CPU, also where "auto" would find a GPU
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch, and for notebooks' kernels: as many workers as cores

import socket
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers.type_checks import begin_test, check_types

torch.backends.mps.is_available = functools.cache(lambda: False)  # likewise; cached, as torch 2.14 looks into it

check_types("tl_adapters")

from helpers.random_models import ARCHITECTURES, random_batch, random_model, randomise  # noqa: E402
from transformers import (  # noqa: E402
    PreTrainedModel,
)

from tl_adapters.data.traces import Batch  # noqa: E402
from tl_adapters.models.paired_model import PairedModel  # noqa: E402


def pytest_configure() -> None:
    """Collect garbage less often: a full collection reads the million objects that imports leave."""
    gc.set_threshold(100_000, 20, 100)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: a worker runs the notebooks while another makes the demo that many files read.

    Workers take whole files (`--dist loadfile`), whose tests share fixtures.
    """
    first = ("test_tutorials.py", "test_demo.py")
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


def pytest_runtest_setup() -> None:
    begin_test()


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
    from helpers.hub_folders import write_pair  # which imports this file

    return PairedModel.from_pretrained(*write_pair(tmp_path / "hub", "R1-Distill-Llama"), backend=request.param)


@pytest.fixture
def batch() -> Batch:
    """Three documents of different lengths, padded on the right."""
    return random_batch(3)


def small_scale():  # type: ignore[no-untyped-def]
    """A demo of few documents, features and steps. Most of its training would be births, so that it revises once, which
    is without them; and a graph takes the longer the more features are active, so that they are sparser than usual.
    """
    from tl_adapters.circuits.search import SearchOptions
    from tl_adapters.circuits.study import StudyOptions
    from tl_adapters.config import LocalConfig, TrainingConfig
    from tl_adapters.study.run_size import StudyScale

    return StudyScale(
        training_traces=400,
        problems=24,
        documents=32,
        baseline_documents=8,
        max_new_tokens=72,
        hesitation=(32, 16),
        circuit=StudyOptions(
            SearchOptions(per_round=8, documents=8), draws=1, probability_draws=1, curve_factors=(1.0,)
        ),
        training=TrainingConfig(
            stages=("local",),
            n_features=32,
            log_every=5,
            local=LocalConfig(steps=30, max_tokens=6_000, sparsity_weight=0.8, revisions=(0.5,), polish=False),
        ),
    )


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one small demo; no test changes it, and workers share it."""
    from tl_adapters.study.demo import demo

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "runs" / "demo"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.parent / "lock"):
        if not (folder.parent / "made").exists():
            assert demo(folder, small_scale(), progress=False) == folder / "report.html"
            (folder.parent / "made").touch()
    return folder
