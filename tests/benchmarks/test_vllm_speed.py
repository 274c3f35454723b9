"""The speed of vLLM: what a token reads is counted in the exported files, and a share is of the plain model's rate."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_speed
from helpers.random_models import random_model, randomise

from tl_adapters.interop.vllm_checkpoint import to_vllm
from tl_adapters.models.paired_model import PairedModel

SIZE = {**vllm_speed.SIZE, "hidden_size": 32, "intermediate_size": 48}


def test_the_weights_that_a_token_reads(tmp_path: Path) -> None:
    for seed, role in enumerate(("base", "target"), start=1):
        random_model(seed, torch.float32, **SIZE).save_pretrained(tmp_path / role)
    pair = randomise(PairedModel.from_pretrained(tmp_path / "base", tmp_path / "target"), n_features=8)
    adapters = pair.installed_adapters()
    to_vllm(adapters, tmp_path / "out", base=tmp_path / "base", target=tmp_path / "target")
    own, theirs = vllm_speed.weights_read(tmp_path / "out")
    target = random_model(2, torch.float32, **SIZE)
    assert own == sum(p.numel() for name, p in target.named_parameters() if "embed_tokens" not in name)
    assert theirs == sum(p.numel() for p in adapters.parameters())


def test_a_share_is_of_the_plain_models_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines stand for vLLM: in the time in which the plain one makes 8 sequences, ours makes 2."""
    asked: list[str] = []

    class Ours:
        def __init__(self, folder: Path) -> None:
            assert (folder / "config.json").is_file()

        def generate(self, name: str, requests: list[Any]) -> list[list[int]]:
            asked.append(name)
            return [[1] * vllm_speed.NEW_TOKENS] * 2

        def close(self) -> None:
            asked.append("closed")

    def generate(inputs: list[Any], sampling: Any, use_tqdm: bool) -> list[Any]:
        output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * vllm_speed.NEW_TOKENS)])
        return [output] * len(inputs)

    made: Any = SimpleNamespace(LLM=lambda **options: SimpleNamespace(generate=generate), SamplingParams=dict)
    modules = {"vllm": ModuleType("vllm"), "vllm.inputs": ModuleType("vllm.inputs")}
    vars(modules["vllm"]).update(vars(made))
    vars(modules["vllm.inputs"])["TokensPrompt"] = dict
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    ticks = iter(range(10_000))
    monkeypatch.setattr(vllm_speed, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(vllm_speed, "LocalVllm", Ours)
    monkeypatch.setattr(vllm_speed, "SIZE", SIZE)
    found = vllm_speed.measure(repeats=2)
    names = list(found["share_of_plain"])
    assert len(names) == len(vllm_speed.SERVED_ROUTES) + 1 and asked == [
        name for _ in range(2) for name in names for _ in range(2)
    ] + ["closed"]
    assert {share["value"] for share in found["share_of_plain"].values()} == {2 / vllm_speed.SEQUENCES}
    with_adapters = [found["share_of_plain"][name] for name in names if name not in vllm_speed.WITHOUT_ADAPTERS]
    assert len(with_adapters) == len(names) - 2 and {key: found[key] for key in ("value", "range")} in with_adapters
    assert found["plain_tokens_per_second"] == vllm_speed.SEQUENCES * vllm_speed.NEW_TOKENS
    assert 0 < found["wanted_with_adapters"] < vllm_speed.WANTED
