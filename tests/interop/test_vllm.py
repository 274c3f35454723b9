"""vLLM answers as our own engine does, from one engine for all conditions; the export and the client without vLLM."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from helpers.loopback_server import LoopbackServer, Request, Response
from helpers.random_models import random_model, randomise
from safetensors.torch import load_file
from torch import nn

import tl_adapters
from tl_adapters import organism
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId, ForeignFeaturesError, owned
from tl_adapters.adapters.saelens_folder import AdapterFormatError
from tl_adapters.checkpoints.tokenizers import load_tokenizer
from tl_adapters.circuits.comparisons import BIAS_ONLY
from tl_adapters.circuits.controls import inserted_in_part, removed_in_part
from tl_adapters.circuits.steering import banned
from tl_adapters.circuits.subject import OwnEngine, Subject
from tl_adapters.cli.main import main
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.traces import DataError
from tl_adapters.generation.completions import complete
from tl_adapters.generation.likelihoods import log_likelihoods, longest_text
from tl_adapters.generation.responses import respond
from tl_adapters.generation.sampling import GenerationError
from tl_adapters.interop import vllm_engine
from tl_adapters.interop.vllm_checkpoint import (
    SERVED_ROUTES,
    condition_of,
    read_served_folder,
    serve_command,
    served_model_name,
    to_vllm,
)
from tl_adapters.interop.vllm_engine import CompletionRequest, LocalVllm, ScoredToken, VllmError, VllmModel, VllmServer
from tl_adapters.interop.vllm_run import ServedRun
from tl_adapters.interventions.variants import Variant, on_route, rescaled, with_negated, with_only, without
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.study import hesitation
from tl_adapters.study.by_name import open_set
from tl_adapters.vllm_plugin.registration import SERVED_ARCHITECTURES
from tl_adapters.vllm_plugin.served_conditions import (
    SERVED_PREFIX,
    Condition,
    ServedModelError,
    condition_lora,
    read_served,
    spare_condition,
)
from tl_adapters.vllm_plugin.served_mlp import Routing, ServedAdapter, install

installed = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")
EARLY = [FeatureId(0, 1), FeatureId(2, 3)]
MANY = [FeatureId(layer, index) for layer in range(4) for index in range(6)]
VARIANTS = [v.named_apart() for v in (without(EARLY), rescaled(MANY, 3.0), with_only(MANY, 2.0))]
SIZE = dict(hidden_size=128, head_dim=32, vocab_size=64, max_position_embeddings=64)
"""vLLM on a CPU computes heads of 32 and more only."""


@pytest.fixture(autouse=True)
def quiet_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)


def random_pair(folder: Path, architecture: str, activation: str) -> tuple[PairedModel, Path, Path]:
    """A pair with strong random adapters, and the folders of its models."""
    options = {**SIZE, "sliding_window": 16} if architecture == "Gemma2ForCausalLM" else SIZE
    for seed, role in enumerate(("base", "target"), start=1):
        model = random_model(seed, torch.float32, architecture, **options)
        with torch.no_grad():
            # Gemma multiplies its embedding, and ties it: it would only repeat the last token.
            model.model.embed_tokens.weight.mul_(0.05 if architecture == "Gemma2ForCausalLM" else 1)
        model.save_pretrained(folder / role)
    pair = PairedModel.from_pretrained(folder / "base", folder / "target", dtype=torch.float32)
    return randomise(pair, activation=activation), folder / "base", folder / "target"


def requests_of(prompts: list[list[int]], n: int) -> list[CompletionRequest]:
    return [CompletionRequest(prompt, n, 0.0, 1.0, 0, 0, []) for prompt in prompts]


@installed
@pytest.mark.parametrize(
    ("architecture", "activation"),
    [
        ("Qwen2ForCausalLM", "relu"),
        ("Qwen3ForCausalLM", "jumprelu"),
        ("LlamaForCausalLM", "topk"),
        ("Gemma2ForCausalLM", "batchtopk"),
    ],
)
def test_every_condition_answers_as_our_own_engine(tmp_path: Path, architecture: str, activation: str) -> None:
    pair, base, target = random_pair(tmp_path, architecture, activation)
    to_vllm(pair.installed_adapters(), tmp_path / "out", base=base, target=target, variants=VARIANTS)
    engine = LocalVllm(tmp_path / "out", max_model_len=64)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 60, (n,), generator=generator).tolist() for n in (3, 11, 7, 5)]
    found = {}
    for one in (*SERVED_ROUTES, *VARIANTS):
        with one.entered(pair) as model:
            ours = [list(c.tokens) for c in complete(model, prompts, max_new_tokens=16, temperature=0, stop_at=[-1])]
        found[one.slug] = ours
        assert engine.generate(one.slug, requests_of(prompts, 16)) == ours, one.slug
    assert len({str(tokens) for tokens in found.values()}) >= 6, "conditions that do not differ test nothing"
    with pytest.raises(VllmError, match="does not serve nothing; it serves replacement, target"):
        engine.generate("nothing", requests_of(prompts, 1))

    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    rows = [(name, row) for row in range(len(prompts)) for name in found]  # every pass holds all conditions
    loras = {name: engine._lora(name) for name in found}
    assert all(isinstance(lora, LoRARequest) for lora in loras.values())
    outputs = engine._llm.generate(
        [TokensPrompt(prompt_token_ids=prompts[row]) for _, row in rows],
        SamplingParams(temperature=0, max_tokens=16, detokenize=False, ignore_eos=True),
        lora_request=[loras[name] for name, _ in rows],
        use_tqdm=False,
    )
    assert [list(o.outputs[0].token_ids) for o in outputs] == [found[name][row] for name, row in rows]
    engine.close()


def everything_else() -> list[Variant]:
    """Variants that no export holds: each multiplies features by factors of its own."""
    shares = dict(zip(MANY, (0.25 * n for n in range(len(MANY))), strict=True))
    return [
        with_negated(MANY), inserted_in_part(shares, 1.5), removed_in_part(shares), BIAS_ONLY, rescaled(EARLY, -2.0),
        without(MANY), on_route("hybrid"),
    ]  # fmt: skip


@installed
def test_conditions_are_defined_while_the_engine_runs(tmp_path: Path) -> None:
    """With two spare conditions for six variants, so that each name is defined anew."""
    pair, base, target = random_pair(tmp_path, "Qwen2ForCausalLM", "relu")
    to_vllm(pair.installed_adapters(), tmp_path / "out", base=base, target=target, spare=2)
    engine = LocalVllm(tmp_path / "out", max_model_len=64)
    exported = {one.factors.digest: one.slug for one in SERVED_ROUTES if one.factors}
    served = ServedRun(engine, pair.installed_adapters(), str(target), exported)
    prompts = [[5, 9, 40, 2, 17, 33, 8, 21], [3, 7]]
    options = {"max_new_tokens": 12, "temperature": 0, "stop_at": [63]}
    seen = set()
    for variant in 2 * everything_else():
        with variant.entered(pair) as model:
            ours = [c.tokens for c in complete(model, prompts, **options)]
        with served.entered(pair, variant) as model:
            assert isinstance(model, VllmModel)
            assert [c.tokens for c in complete(model, prompts, **options)] == ours, variant.name
        seen.add(str(ours))
    assert len(seen) >= 5 and not served.own
    with served.entered(pair, banned((5,), {})) as model:
        assert model is pair.model
    assert served.facts() == {"name": "vLLM", "dtype": "float32", "by_our_own": ["words banned"]}

    texts = [([5, 9, 40], [2, 17, 33]), ([1], [60]), ([7] * 30, [8] * 33)]
    for variant in (on_route("target"), without(MANY)):
        with variant.entered(pair) as model:
            expected = dict(log_likelihoods(model, texts))
        with served.entered(pair, variant) as model:
            for row, found in log_likelihoods(model, texts):
                assert found.log_probability == pytest.approx(expected[row].log_probability, abs=1e-3)
                assert found.greedy == expected[row].greedy
            with pytest.raises(DataError, match="together at most 63"):
                list(log_likelihoods(model, [([7] * 31, [8] * 33)]))
    engine.close()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the model organism with random adapters."""
    folder = tmp_path_factory.mktemp("opened")
    pair = randomise(PairedModel.from_pretrained(organism.BUILTIN_BASE, organism.BUILTIN_TARGET))
    with torch.no_grad():
        for adapter in pair.installed_adapters():
            adapter.W_dec.mul_(0.1)
    pair.installed_adapters().save_pretrained(folder / "adapters")
    open_set(folder / "adapters", folder / "run")
    return folder / "run"


def answers(run: Path, folder: str) -> list[tuple[list[int], list[int], int | None]]:
    lines = (run / "benchmarks" / "builtin" / folder / "answers.jsonl").read_text().splitlines()
    return [(one["prompt"], one["tokens"], one["end"]) for one in map(json.loads, lines)]


@installed
def test_a_benchmark_in_this_process_and_at_an_address(
    opened: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")  # as a user calls it; the engine takes a share of what is free
    call = ["benchmark", str(opened), "--limit", "8", "--max-new-tokens", "60"]
    sets = {"replacement": [], "hybrid-with-only-0.1": ["--insert", "0.1"], "target": ["--route", "target"]}
    for name, options in sets.items():
        assert main([*call, *options]) == 0
    assert main([*call, "--engine", "vllm"]) == 0
    assert answers(opened, "replacement-vllm") == answers(opened, "replacement")
    block = json.loads((opened / "results.json").read_text())["benchmarks"]["builtin"]
    assert block["replacement (vLLM)"]["pass_at_1"] == block["replacement"]["pass_at_1"]
    assert block["replacement (vLLM)"]["settings"]["engine"] == "vllm"
    assert not list(opened.glob("*vllm*"))  # the export is gone

    assert main(["export", str(opened), "--to", "vllm", "--insert", "0.1", "--out", str(tmp_path / "served")]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = shlex.split(serve_command(tmp_path / "served"))
    command[0] = sys.executable
    memory = ["--gpu-memory-utilization", "0.3"]  # of the machine's, which by itself vLLM wants nearly all of
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (
        open(tmp_path / "log", "w") as written,
        subprocess.Popen(
            [*command, *memory, "--port", port], stdout=written, stderr=written, env=environment
        ) as server,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, server, tmp_path / "log")
            for name, options in sets.items():
                out = tmp_path / f"answers_{name}"
                assert main([*call, *options, "--engine", url, "--out", str(out)]) == 0
                copied = out / "builtin" / f"{name}-vllm" / "answers.jsonl"
                ours = opened / "benchmarks" / "builtin" / name / "answers.jsonl"
                tokens = [
                    [json.loads(line)["tokens"] for line in path.read_text().splitlines()] for path in (copied, ours)
                ]
                assert tokens[0] == tokens[1]
        finally:
            server.terminate()


def wait_for(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(600):
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert server.poll() is None, log.read_text()[-3000:]
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@installed
def test_options_that_would_be_wrong_are_refused() -> None:
    from vllm.config import VllmConfig

    from tl_adapters.vllm_plugin.models import require_servable

    def config(eager: bool = True, quantized: object = None, ranks: int = 1, lora: object = None) -> VllmConfig:
        made = object.__new__(VllmConfig)  # without its checks, which want a whole model
        made.__dict__.update(
            model_config=SimpleNamespace(enforce_eager=eager),
            quant_config=quantized,
            parallel_config=SimpleNamespace(pipeline_parallel_size=ranks),
            speculative_config=None,
            lora_config=lora,
        )
        return made

    require_servable(config(lora=SimpleNamespace(target_modules=["condition"])))
    for wrong, message in (
        (config(eager=False), "give --enforce-eager"),
        (config(quantized="awq"), "quantization"),
        (config(ranks=2), "--pipeline-parallel-size 1"),
        (config(lora=SimpleNamespace(target_modules=None)), "--lora-target-modules condition"),
    ):
        with pytest.raises(ServedModelError, match=message):
            require_servable(wrong)


# -- without vLLM -----------------------------------------------------------------------------------------------------


class FakeMLP(nn.Module):
    """Stands for vLLM's MLP of a layer."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
@torch.no_grad()
def test_tokens_of_all_conditions_in_one_pass(tmp_path: Path, activation: str) -> None:
    pair, base, target = random_pair(tmp_path, "Qwen2ForCausalLM", activation)
    adapters = pair.installed_adapters()
    to_vllm(adapters, tmp_path / "out", base=base, target=target, variants=VARIANTS)
    served = read_served_folder(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    routing, mlp = Routing(served), FakeMLP(1.0)
    adapter = ServedAdapter(adapters.d_model, served)
    prefix = "model.layers.0.mlp.adapter."
    adapter.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    install(mlp, FakeMLP(-2.0), adapter, routing)
    x = torch.randn(21, adapters.d_model, generator=torch.Generator().manual_seed(0))
    acts = adapters[0].encode(x)
    of_set, twice = torch.ones(24), torch.zeros(24)
    of_set[1], twice[:6] = 0.0, 2.0
    thrice = torch.where(torch.arange(24) < 6, 3.0, 1.0)
    decoded = lambda factors: adapters[0].decode(acts * factors)  # noqa: E731
    expected = {
        "replacement": -2 * x + decoded(torch.ones(24)),
        "target": x,
        "hybrid": -2 * x,
        "target+adapter": x + decoded(torch.ones(24)),
        VARIANTS[0].slug: -2 * x + decoded(of_set),
        VARIANTS[1].slug: -2 * x + decoded(thrice),
        VARIANTS[2].slug: -2 * x + decoded(twice) - adapters[0].b_dec,
    }
    assert [condition.name for condition in served.conditions] == list(expected)
    mixed = torch.arange(len(x)) % len(expected)
    for index, (name, out) in enumerate(expected.items()):
        routing.route(torch.full((len(x),), index))
        assert torch.allclose(mlp(x), out, atol=1e-5), name
        routing.route(mixed)
        assert torch.allclose(mlp(x)[mixed == index], out[mixed == index], atol=1e-5), name
    some = torch.tensor([1, 4])[torch.arange(len(x)) % 2]  # no token of the first condition
    routing.route(some)
    assert torch.allclose(mlp(x)[1::2], expected[VARIANTS[0].slug][1::2], atol=1e-5)
    with pytest.raises(ServedModelError, match="condition 7; this model has 7"):
        routing.route(torch.full((3,), 7))
    with pytest.raises(ServedModelError, match="Condition target was exported"):
        routing.define(1, served.conditions[0])


@pytest.mark.parametrize("variant", everything_else(), ids=lambda variant: variant.name)
@torch.no_grad()
def test_a_spare_condition_computes_what_it_is_defined_as(tmp_path: Path, variant: Variant) -> None:
    pair, base, target = random_pair(tmp_path, "Qwen2ForCausalLM", "relu")
    adapters = pair.installed_adapters()
    to_vllm(adapters, tmp_path / "out", base=base, target=target, variants=VARIANTS[:1], spare=2)
    served = read_served_folder(tmp_path / "out")
    assert [c.name for c in served.conditions[-3:]] == [VARIANTS[0].slug, "spare-0", "spare-1"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    index, condition = len(served.conditions) - 1, served.conditions[-1]
    x = torch.randn(1, 5, adapters.d_model, generator=torch.Generator().manual_seed(0))
    for layer, rows in variant.factors.by_layer(adapters).items():
        mlp = pair.model.blocks[layer].mlp
        with pair.routed("target"):
            of_target = mlp(x)
        with pair.routed("hybrid"):
            of_base = mlp(x)
        routing, adapter = Routing(served), ServedAdapter(adapters.d_model, served)
        prefix = f"model.layers.{layer}.mlp.adapter."
        adapter.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
        stands_for_target, stands_for_base = FakeMLP(0.0), FakeMLP(0.0)
        install(stands_for_target, stands_for_base, adapter, routing)
        adapter.set_factors(condition.factors, rows.tolist())
        routing.define(index, condition_of(condition.name, variant.factors, condition.factors))
        routing.route(torch.full((5,), index))
        added = stands_for_target(x[0])  # the adapter's part alone, since both MLPs give zeros
        of_mlp = of_target if routing.groups.base is None else of_base
        with variant.entered(pair):
            expected = mlp(x)
        assert torch.allclose(of_mlp[0] + added, expected[0], atol=1e-5)


class RecordingEngine:
    """Stands for vLLM in this process: it keeps what its conditions are defined as."""

    dtype, max_model_len = "float32", 64

    def __init__(self, n_spare: int) -> None:
        self.spare = [f"spare-{n}" for n in range(n_spare)]
        self.defined: list[tuple[str, float]] = []

    def serves(self, condition: str) -> bool:
        return condition in [*self.spare, "replacement-without-0.1-2.3"]

    def require(self, condition: str) -> None:
        assert self.serves(condition)

    def define(self, condition: Condition, factors: list[torch.Tensor]) -> None:
        self.defined.append((condition.name, float(factors[0][1])))

    def generate(self, condition: str, requests: list[CompletionRequest]) -> list[list[int]]:
        raise AssertionError("nothing is generated here")

    def score(self, condition: str, texts: list[list[int]]) -> list[list[ScoredToken]]:
        raise AssertionError("nothing is scored here")

    def close(self) -> None:
        """Nothing is held."""


def test_the_oldest_spare_condition_that_is_not_in_use_is_defined_anew(opened: Path) -> None:
    pair = PairedModel.from_pretrained(organism.BUILTIN_BASE, organism.BUILTIN_TARGET)
    pair.load_adapters(adapters := AdapterSet.from_pretrained(opened / "adapters"))
    engine = RecordingEngine(2)
    exported = {on_route("target").factors.digest: "target"}
    served = ServedRun(engine, adapters, organism.BUILTIN_TARGET, exported)
    factors = [rescaled(EARLY, factor) for factor in (2.0, 3.0, 4.0, 5.0)]

    def condition(variant: Variant) -> str:
        with served.entered(pair, variant) as model:
            return model.condition

    assert [condition(factors[n]) for n in (0, 1, 0, 2, 0)] == ["spare-0", "spare-1", "spare-0", "spare-0", "spare-1"]
    assert engine.defined == [("spare-0", 2.0), ("spare-1", 3.0), ("spare-0", 4.0), ("spare-1", 2.0)]
    assert condition(on_route("target")) == "target" and len(engine.defined) == 4
    with (
        served.entered(pair, factors[2]) as first,
        served.entered(pair, factors[3]) as second,
        served.entered(pair, factors[1]) as third,
    ):
        assert {first.condition, second.condition} == {"spare-0", "spare-1"}
        assert third is pair.model  # no name is free, so our own engine computes it
    assert served.own == [factors[1].name]
    engine.spare = []  # as a server, which serves what it was given by name
    served = ServedRun(engine, adapters, organism.BUILTIN_TARGET)
    assert condition(without(EARLY)) == "replacement-without-0.1-2.3"
    with served.entered(pair, without(MANY)) as model:
        assert model is pair.model
    assert served.model_of("replacement-without-0.1-2.3").condition == condition(without(EARLY))


@pytest.mark.parametrize(("engine", "of_engine"), [("vllm", "bfloat16"), ("http://127.0.0.1:1", None)])
def test_a_study_of_a_run_answers_with_the_engine(
    opened: Path, monkeypatch: pytest.MonkeyPatch, engine: str, of_engine: str | None
) -> None:
    seen: list[object] = []

    own = OwnEngine()

    @contextmanager
    def recorded(*arguments: object, dtype: str | None, spare: int) -> Iterator[OwnEngine]:
        seen.append((*arguments, dtype))
        try:
            yield own
        finally:
            seen.append("closed")

    def stage(pair: PairedModel, subject: Subject, *arguments: object, **options: object) -> None:
        seen.append(subject.engine)
        raise InterruptedError("the study itself is tested elsewhere")

    monkeypatch.setattr(hesitation, "opened_engine", recorded)
    monkeypatch.setattr(hesitation, "hesitation_stage", stage)
    with pytest.raises(InterruptedError):
        hesitation.hesitation_of_run(opened, limit=4, engine=engine, dtype="bfloat16")
    assert seen == [(opened, engine, of_engine), own, "closed"]  # a server has a dtype of its own


def test_the_folder_holds_every_weight_once(tmp_path: Path) -> None:
    pair, base, target = random_pair(tmp_path, "LlamaForCausalLM", "relu")
    to_vllm(pair.installed_adapters(), tmp_path / "out", base=base, target=target, variants=VARIANTS)
    tensors, own = load_file(tmp_path / "out" / "model.safetensors"), load_file(target / "model.safetensors")
    of_base = load_file(base / "model.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in own.items())
    for name, tensor in of_base.items():
        if ".mlp." in name:
            assert torch.equal(tensors[name.replace(".mlp.", ".mlp.base.")], tensor)
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    adapters = {name: n for name, n in sizes.items() if ".adapter." in name}
    assert sum(sizes.values()) == sum(t.numel() for t in own.values()) + sum(adapters.values()) + sum(
        n for name, n in sizes.items() if ".base." in name
    )
    assert sum(n for name, n in adapters.items() if name.endswith("factors")) == 4 * 3 * 24
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["TLAdaptersLlamaForCausalLM"]
    assert str(tmp_path) not in json.dumps(config)
    for index, condition in enumerate(read_served(config["tl_adapters"]).conditions):
        place = tmp_path / "out" / "conditions" / condition.name
        about, numbers = condition_lora(index)
        assert json.loads((place / "adapter_config.json").read_text()) == about
        assert {k: t.tolist() for k, t in load_file(place / "adapter_model.safetensors").items()} == {
            k: t.tolist() for k, t in numbers.items()
        }
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    pair, base, target = random_pair(tmp_path, "Qwen2ForCausalLM", "relu")
    adapters, out = pair.installed_adapters(), tmp_path / "out"
    part = AdapterSet({1: adapters[1]}, adapters.layer_samples, adapters.metadata, adapters.n_layers)
    with pytest.raises(AdapterFormatError, match="of 1 of 4 layers"):
        to_vllm(part, out, base=base, target=target)
    with pytest.raises(AdapterFormatError, match="read normalized"):
        to_vllm(adapters.normalized(), out, base=base, target=target)
    foreign = [owned((0, 1), {"adapters.0": "0123456789abcdef"})]
    with pytest.raises(ForeignFeaturesError):
        to_vllm(adapters, out, base=base, target=target, variants=[without(foreign)])
    many = [rescaled(EARLY, 1 + k / 8) for k in range(253)]
    with pytest.raises(ServedModelError, match="at most 252"):
        to_vllm(adapters, out, base=base, target=target, variants=many)
    assert not out.exists()
    described = json.loads(json.dumps(_described(adapters, base, target, tmp_path)))
    for change, message in (
        ({"version": 2}, "version"),
        ({"conditions": []}, "conditions"),
        ({"conditions": 2 * described["conditions"]}, "names are given once"),
        ({"conditions": [{**described["conditions"][0], "factors": 3}]}, "rows exist"),
        ({"activation": "gelu"}, "activation"),
    ):
        with pytest.raises(ServedModelError, match=message):
            read_served({**described, **change})
    with pytest.raises(ServedModelError, match="tl_adapters"):
        read_served(None)


def _described(adapters: AdapterSet, base: Path, target: Path, folder: Path) -> object:
    to_vllm(adapters, folder / "described", base=base, target=target)
    return json.loads((folder / "described" / "config.json").read_text())["tl_adapters"]


def test_the_command_line_exports_and_says_how_to_serve(
    opened: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a folder"
    call = ["export", str(opened), "--to", "vllm", "--ablate", "0.1", "2.3", "--scale", "2", "1.4", "--out", str(out)]
    assert main(call) == 0
    command = shlex.split(capsys.readouterr().out.split("docs/vllm.md): ")[1].splitlines()[0])
    assert command[:5] == ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", str(out)]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert f"replacement-with-2-x-1.4={out}/conditions/replacement-with-2-x-1.4" in command
    assert served_model_name(AdapterSet.from_pretrained(opened / "adapters")) in command
    # the class that is named reads tokenizer.json as it is
    ids = [
        ChatFormat.of(load_tokenizer(folder)).tokenizer("47+85=132. Wait")["input_ids"]
        for folder in (out, organism.TARGET)
    ]
    assert ids[0] == ids[1]
    assert main(["export", str(opened), "--to", "hybrid", "--ablate", "0.1", "--out", str(tmp_path / "h")]) == 2
    assert "--to hybrid does not read this" in capsys.readouterr().err


def a_server(request: Request, served: str) -> Response:
    """Answers as vllm serve does; a completion is the prompt's last token, twice, and an end token."""
    if request.path == "/v1/models":
        names = [{"id": served, "parent": None, "max_model_len": 64, "object": "model"}]
        return Response(json.dumps({"data": [*names, {"id": "target", "parent": served, "max_model_len": None}]}))
    asked = request.json()
    assert asked["return_token_ids"] and asked["repetition_penalty"] == 1.0
    choice = {"token_ids": [asked["prompt"][-1]] * 2 + asked["stop_token_ids"][:1], "finish_reason": "stop", "text": ""}
    return Response(json.dumps({"choices": [choice]}))


def test_a_server_is_asked_by_token_ids_and_must_have_the_same_adapters() -> None:
    with LoopbackServer(lambda request: a_server(request, "tl-adapters-1")) as server:
        engine = VllmServer(server.url, "tl-adapters-1")
        prompts = [[n, n + 1] for n in range(1, 9)]
        asked = [CompletionRequest(prompt, 5, 0.0, 1.0, 0, 0, [63]) for prompt in prompts]
        assert engine.generate("target", asked) == [[n + 1, n + 1, 63] for n in range(1, 9)]
        with pytest.raises(VllmError, match="does not serve hybrid; it serves target"):
            engine.generate("hybrid", asked)
        with pytest.raises(VllmError, match="serves tl-adapters-1, target, and these adapters are tl-adapters-2"):
            VllmServer(server.url, "tl-adapters-2")
        engine.close()
        with LoopbackServer(
            lambda request: Response('{"choices": [{"token_ids": [], "finish_reason": "stop"}]}')
        ) as empty:
            engine.url, engine._client = empty.url, httpx.Client()
            with pytest.raises(VllmError, match="token_ids"):
                engine.generate("target", asked)
            engine.close()
    with pytest.raises(VllmError, match="does not answer"):
        VllmServer(server.url, "tl-adapters-1")
    with pytest.raises(VllmError, match="give vllm, or the address"):
        VllmServer("vlm", "tl-adapters-1")
    for body in ("{", '{"data": 3}', "[]"):
        with LoopbackServer(lambda request, body=body: Response(body)) as server, pytest.raises(VllmError):
            VllmServer(server.url, "tl-adapters-1")


def test_a_server_scores_texts_by_the_tokens_of_their_prompts() -> None:
    """The server finds token t of log-probability -t and likeliest where t is even, and knows nothing of token 13."""

    def scoring(request: Request) -> Response:
        if request.path == "/v1/models":
            return a_server(request, "tl-adapters-1")
        asked = request.json()
        assert asked["prompt_logprobs"] == 0 and asked["max_tokens"] == 1
        at = [
            {"99": {"logprob": -0.1, "rank": 1}}
            | ({str(token): {"logprob": -float(token), "rank": 1 + token % 2}} if token != 13 else {})
            for token in asked["prompt"][1:]
        ]
        return Response(json.dumps({"choices": [{"prompt_logprobs": [None, *at]}]}))

    with LoopbackServer(scoring) as server:
        engine = VllmServer(server.url, "tl-adapters-1")
        model = VllmModel.of(engine, "target", organism.TARGET)
        texts = [([5, 7], [4, 6]), ([9], [2, 3, 4]), ([8, 8], [])]
        found = [(one.log_probability, one.greedy) for _, one in log_likelihoods(model, texts)]
        assert found == [(-10.0, True), (-9.0, False), (0, True)]
        assert longest_text(model) == engine.max_model_len - 1
        with pytest.raises(DataError, match="both together at most 63"):
            list(log_likelihoods(model, [([1] * 60, [2] * 4)]))
        with pytest.raises(VllmError, match="does not say how likely every token"):
            list(log_likelihoods(model, [([1], [13])]))
        with pytest.raises(VllmError, match="were exported; export and serve spare-0"):
            engine.define(spare_condition(0, 0), [])
        with pytest.raises(VllmError, match="does not serve hybrid"):
            engine.score("hybrid", [[1, 2]])
        engine.close()


def test_completions_go_through_the_shared_checks_limits_and_seeds() -> None:
    seen: list[dict[str, object]] = []

    def recording(request: Request) -> Response:
        if request.path != "/v1/models":
            seen.append(request.json())
        return a_server(request, "tl-adapters-1")

    with LoopbackServer(recording) as server:
        engine = VllmServer(server.url, "tl-adapters-1")
        model = VllmModel.of(engine, "target", organism.TARGET)
        prompts = [[9] * 62, [5], [7, 8]]
        found = complete(model, prompts, max_new_tokens=6, keys=["a", "b", "a"], stop_at=[3], temperature=1.0)
        assert [c.prompt for c in found] == [tuple(p) for p in prompts]
        assert [(c.tokens, c.end, c.truncated) for c in found] == [((p[-1],) * 2, 3, False) for p in prompts]
        asked = {len(body["prompt"]): body for body in seen}  # type: ignore[arg-type]
        assert [asked[n]["max_tokens"] for n in (62, 1, 2)] == [2, 6, 6]  # what the context leaves
        assert asked[62]["seed"] == asked[2]["seed"] != asked[1]["seed"]
        with pytest.raises(GenerationError, match="A prompt has 64 tokens"):
            complete(model, [[9] * 64], max_new_tokens=6)
        (answer,) = respond(model, organism.problems("tune", 1), max_new_tokens=4)
        assert answer.end in seen[-1]["stop_token_ids"] and not answer.correct  # type: ignore[operator]
        engine.close()


@pytest.mark.parametrize(("first", "second"), [(1.0, -1.0), (0.5, -0.5)])
def test_sets_with_factors_of_either_sign_have_names_of_their_own(tmp_path: Path, first: float, second: float) -> None:
    pair, base, target = random_pair(tmp_path, "Qwen2ForCausalLM", "relu")
    variants = [rescaled(EARLY, factor) for factor in (first, second)]
    to_vllm(pair.installed_adapters(), tmp_path / "out", base=base, target=target, variants=[*variants, variants[0]])
    names = [c.name for c in read_served_folder(tmp_path / "out").conditions]
    assert names[-2:] == [one.slug for one in variants] and len({*names}) == 6
    nearly = [rescaled(EARLY, factor) for factor in (2.0, 2.0000001)]  # of one name
    with pytest.raises(ServedModelError, match="Two feature sets have the name .*2.0000001"):
        to_vllm(pair.installed_adapters(), tmp_path / "more", base=base, target=target, variants=nearly)
    assert not (tmp_path / "more").exists()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
@pytest.mark.parametrize("free", [4 * 2**30, 30 * 2**30])
def test_an_engine_leaves_memory_to_the_pair_that_lies_on_the_same_device(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own default, nine tenths of all memory, does not start where a pair holds a part of it."""
    monkeypatch.setattr(vllm_engine, "free_memory", lambda device: free)
    monkeypatch.setattr(vllm_engine, "total_memory", lambda device: 32 * 2**30)
    for device_type in ("cpu", "cuda"):
        asked = vllm_engine.memory_options(device_type)["gpu_memory_utilization"] * 32 * 2**30
        assert free / 4 < asked < 0.9 * free
    assert vllm_engine.memory_options("tpu") == {}


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_what_to_install(opened: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", str(opened), "--limit", "2", "--engine", "vllm"]) == 2
    assert "vLLM cannot be loaded" in capsys.readouterr().err
    assert not (opened / "benchmarks").exists()


def test_the_plugin_imports_neither_transformer_lens_nor_sae_lens() -> None:
    code = (
        "import sys; import tl_adapters.vllm_plugin.registration, tl_adapters.vllm_plugin.served_mlp\n"
        "print(sorted({'transformer_lens', 'sae_lens'} & {name.split('.')[0] for name in sys.modules}))"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert found.stdout.strip() == "[]"


def test_every_architecture_has_a_class() -> None:
    """Read as text, since only vLLM's own environment can import the classes."""
    source = (Path(tl_adapters.__file__).parent / "vllm_plugin" / "models.py").read_text()
    assert all(f"class {SERVED_PREFIX}{name}(ServedModel" in source for name in SERVED_ARCHITECTURES)
