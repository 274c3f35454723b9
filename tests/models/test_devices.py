"""Every stage on a device: no operator mixes devices, no float64 where there is none, few waits.

The device is pretended (`pretended_device`), once as a GPU and once as MPS, which has no float64. Parameters go there
by the library's own calls; buffers are put there in any case, so that these tests are about operators only. On a
machine with a GPU, ``TL_ADAPTERS_TEST_CUDA=1`` runs the stages there, too, and compares what they compute with the CPU
(``make gpu``).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.cuda_device import CUDA_IS_TESTED, CudaDevice
from helpers.pretended_device import DEVICE, PretendedDevice, PretendedDeviceError, grown
from helpers.random_models import ACTIVATION_OPTIONS, ARCHITECTURES, random_batch, random_model, randomise
from transformers import PreTrainedModel

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.attribution.attribute import attribute
from tl_adapters.attribution.targets import FeatureTarget, LogitTarget
from tl_adapters.attribution.validation import (
    ablation_effects,
    compare_linearizations,
    explain_difference,
    faithfulness_curve,
)
from tl_adapters.circuits import control_strengths, controls, steering
from tl_adapters.circuits.control_strengths import TuningTexts, set_controls
from tl_adapters.circuits.controls import inserted_in_part, removed_in_part
from tl_adapters.circuits.measurements import ReplacementResiduals, mediation, probabilities
from tl_adapters.circuits.onsets import Onsets
from tl_adapters.circuits.roles import assign_roles, circuit_edges, effects_at
from tl_adapters.circuits.search import SearchOptions, search_circuit
from tl_adapters.circuits.steering import shifted_logits, steered, without_neurons
from tl_adapters.cli.common import device_of
from tl_adapters.config import LocalConfig, LossWeights, TrainingConfig
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.data.traces import Trace
from tl_adapters.errors import UserError
from tl_adapters.evaluation.baselines import baseline_kl, difference_directions, low_rank, top_neurons
from tl_adapters.evaluation.faithfulness import faithfulness_block, measure_faithfulness
from tl_adapters.evaluation.feature_matching import match_features, seed_agreement
from tl_adapters.evaluation.planted_features import plant_features
from tl_adapters.features.collect import collect_features
from tl_adapters.features.logit_effects import layer_effects
from tl_adapters.features.store_description import StoreOptions
from tl_adapters.features.stream_agreement import stream_agreement
from tl_adapters.generation.compare_variants import generate_variants
from tl_adapters.generation.likelihoods import log_likelihoods
from tl_adapters.generation.responses import respond
from tl_adapters.interventions import feature_edits
from tl_adapters.interventions.feature_edits import ablated, added, clamped, gated, inserted, negated, patched, scaled
from tl_adapters.interventions.frozen import frozen
from tl_adapters.interventions.variants import on_route, with_only, without
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel
from tl_adapters.organism import problems, reasoning_pairs
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.training.objective import shared_prefix_step
from tl_adapters.training.trainer import Trainer
from tl_adapters.utils.devices import DeviceError, resolve_device
from tl_adapters.utils.precision import product_in_float32

Device = PretendedDevice | CudaDevice
ON_CUDA = ["real_cuda"] if CUDA_IS_TESTED else []


@pytest.fixture(params=["gpu", "mps", *ON_CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == "real_cuda":
        yield CudaDevice()
        return
    with PretendedDevice(float64=request.param == "gpu") as emulator:
        yield emulator


@pytest.fixture(params=["gpu", "mps"])
def pretended(request: pytest.FixtureRequest) -> Iterator[PretendedDevice]:
    with PretendedDevice(float64=request.param == "gpu") as emulator:
        yield emulator


def on(device: Device, pair: PairedModel) -> PairedModel:
    """The pair with everything of it on the device."""
    device.hold(pair.model)
    pair.model.cfg.device = str(device.name)
    return pair


def tiny(
    device: Device,
    layers: int = 2,
    activation: str = "relu",
    architecture: str = "Qwen2ForCausalLM",
    n_features: int = 24,
    backend: str | None = None,
) -> PairedModel:
    """A random pair with adapters, on the device, and built elsewhere, which is many times as fast."""
    with device.paused():
        pair = PairedModel.from_pretrained(*models(layers, architecture), backend=backend)
        randomise(pair, n_features, activation=activation)
    return on(device, pair)


def models(layers: int, architecture: str) -> list[PreTrainedModel]:
    return [random_model(seed, torch.float32, architecture, num_hidden_layers=layers, vocab_size=31) for seed in (1, 2)]


def documents(n: int = 4, seed: int = 0, vocab: int = 31) -> list[Trace]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Trace(tuple(torch.randint(1, vocab, (9 + i % 3,), generator=generator).tolist()), 3, domain="x")
        for i in range(n)
    ]


def some_onsets() -> Onsets:
    batch = random_batch(3, (12, 9, 11), vocab=31)
    kinds = torch.randint(4, batch.tokens.shape, generator=torch.Generator().manual_seed(3))
    masks = [batch.predicting_response & (kinds == kind) for kind in range(3)]
    return Onsets(batch.tokens, batch.predicting_response, masks[0], masks[1], masks[2], (5, 9))


# -- the emulator itself ----------------------------------------------------------------------------------------------


def test_the_emulator_refuses_what_a_device_refuses(pretended: PretendedDevice) -> None:
    x, host = torch.ones(3, device=DEVICE), torch.ones(3)
    assert x.device == DEVICE and host.device.type == "cpu" and x.cpu().device.type == "cpu"
    assert (x * 2 + torch.tensor(1.0)).device == DEVICE  # an operator may take a number of the CPU
    for wrong in (
        lambda: x + host,
        lambda: torch.stack([x, host]),
        lambda: host[x.long()],
        lambda: x.index_copy(0, torch.tensor([1]), x[:1]),
        lambda: x.numpy(),
        lambda: torch.rand(3, generator=torch.Generator(), device=DEVICE),
    ):
        with pytest.raises(PretendedDeviceError):
            wrong()
    if not pretended.float64:
        with pytest.raises(PretendedDeviceError, match="float64"):
            x.double()


def test_the_emulator_counts_waits(pretended: PretendedDevice) -> None:
    x = torch.ones(3, 2, device=DEVICE)
    for act, kind in (
        (lambda: float(x.sum()), "sync"),
        (lambda: x.tolist(), "sync"),
        (lambda: x[x > 0], "sync"),
        (lambda: x.nonzero(), "sync"),
        (lambda: x.cpu(), "to_host"),
        (lambda: x[torch.tensor([1, 2])], "to_device"),
        (lambda: x[[0, 1]], "to_device"),
        (lambda: torch.tensor([1.0], device=x.device), "to_device"),
    ):
        before = len(pretended.events)
        act()
        assert [event.kind for event in pretended.events[before:]] == [kind]
    before = len(pretended.events)
    x[x > 0] = 1.0
    assert x[1:, 0].sum().device == DEVICE and len(pretended.events) == before


def test_a_gradient_returns_to_the_device_of_its_tensor(pretended: PretendedDevice) -> None:
    host = torch.ones(3, requires_grad=True)
    (host.to(DEVICE) * torch.ones(3, device=DEVICE)).sum().backward()
    assert host.grad is not None and host.grad.device.type == "cpu"


# -- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Gemma2ForCausalLM"])
def test_a_pair_and_its_adapters_are_built_on_the_device(device: Device, architecture: str, backend: str) -> None:
    base, target = models(2, architecture)
    device.hold(target)
    pair = on(device, PairedModel.from_pretrained(base, target, backend=backend))
    for activation in ACTIVATION_OPTIONS:
        randomise(pair, activation=activation)
        assert all(device.holds(tensor) for tensor in pair.model.state_dict().values())
        with torch.no_grad(), pair.routed("replacement"):
            assert device.holds(pair.model(torch.tensor([documents(1)[0].tokens], device=device.name)))


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
def test_training_runs(device: Device, activation: str) -> None:
    k = {"k": 5} if "topk" in activation else {}
    config = TrainingConfig(
        stages=("end_to_end",),
        n_features=16,
        steps=3,
        tokens_per_batch=24,
        activation=activation,
        log_every=1,
        validate_every=2,
        **k,
    )  # type: ignore[arg-type]
    trainer = Trainer(tiny(device), documents(), config, validation=documents(2, 1), progress=False)
    adapters = trainer.run()
    assert all(device.holds(weight) and weight.isfinite().all() for weight in adapters.state_dict().values())


@pytest.mark.parametrize(("activation", "streaming"), [("relu", True), ("batchtopk", False)])
def test_both_stages_of_training_run_and_resume(
    device: Device, activation: str, streaming: bool, tmp_path: Path
) -> None:
    local = LocalConfig(
        steps=6, tokens_per_step=16, max_tokens=20 if streaming else 99, streaming=streaming, revisions=(0.4, 0.7)
    )
    config = TrainingConfig(
        n_features=8, steps=2, tokens_per_batch=24, checkpoint_every=4, log_every=2, activation=activation,
        stages=("local", "end_to_end"), local=local, loss_weights=LossWeights(local=0.1),
        **({"k": 3} if "topk" in activation else {}),
    )  # fmt: skip
    pair = tiny(device)

    def stop(step: int, shown: object) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        Trainer(pair, documents(), config, tmp_path / "run", progress=False).run(stop)
    adapters = Trainer.resume(pair, documents(), tmp_path / "run", progress=False).run()
    assert all(device.holds(weight) and weight.isfinite().all() for weight in adapters.state_dict().values())


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Gemma2ForCausalLM"])
def test_faithfulness_and_baselines_run(device: Device, architecture: str) -> None:
    pair, traces = tiny(device, architecture=architecture), documents()
    faithfulness_block(measure_faithfulness(pair, traces), "x")
    baseline_kl(pair, [top_neurons(mlp, 3) for mlp in pair.mlps], traces)
    directions = difference_directions(pair, traces)
    baseline_kl(pair, [low_rank(mlp, d[:, :4]) for mlp, d in zip(pair.mlps, directions, strict=True)], traces)
    stream_agreement(pair, traces)
    layer_effects(pair, 0, pair.installed_adapters()[0].W_dec, words=(3, 4))


def test_matching_and_planting_run(device: Device) -> None:
    pair, traces = tiny(device), documents(80)
    matching = match_features(pair.installed_adapters(), pair.installed_adapters(), pair, traces)
    assert matching.matches and all(m.same for m in matching.matches)
    assert seed_agreement(pair, pair.installed_adapters(), pair.installed_adapters(), traces).matches
    plant = plant_features(pair, traces, per_layer=2, rates=(0.02,))
    assert all(device.holds(weight) for weight in plant.adapters.parameters())


@pytest.mark.parametrize("linearization", ["relp", "frozen_mlp", "gradient"])
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Gemma2ForCausalLM"])
def test_attribution_runs(device: Device, linearization: str, architecture: str) -> None:
    pair, quiet = tiny(device, architecture=architecture), {"linearization": linearization, "progress": False}
    prompt = list(documents(1)[0].tokens)
    attribute(pair, prompt, **quiet)  # type: ignore[arg-type]
    few = {"max_feature_nodes": 6, "batch_size": 4, "window": None if linearization == "gradient" else 4}
    attribute(pair, prompt, [3, LogitTarget(4), FeatureTarget(1, 2, -1)], **few, **quiet)  # type: ignore[arg-type]


def test_ablations_in_the_model_run(device: Device) -> None:
    pair, prompt = tiny(device), list(documents(1)[0].tokens)
    compare_linearizations(pair, prompt, LogitTarget(3))
    explain_difference(pair, prompt, LogitTarget(3), progress=False)
    graph = attribute(pair, prompt, [3], progress=False)
    effects = ablation_effects(pair, graph, torch.arange(4))
    faithfulness_curve(pair, graph, torch.randn(len(graph.features)), [2, 5])
    assert not device.holds(effects)


def test_interventions_run(device: Device) -> None:
    pair, tokens = tiny(device), random_batch(3, vocab=31).to(device.name).tokens
    features = [FeatureId(0, 3), FeatureId(1, 2), FeatureId(1, 7)]
    with torch.no_grad(), pair.routed("replacement"), pair.recorded(ACTS_HOOK) as source:
        pair.model(tokens)
    on_host = {layer: acts.cpu() for layer, acts in source.items()}  # activations of another run may be on any device
    gates = torch.ones(2, 24, requires_grad=True)
    for changed in (
        ablated(pair, features), scaled(pair, features, 2.0), clamped(pair, features, 1.0, [2, 4]),
        added(pair, features, 1.0, range(3)), patched(pair, features, dict(source)),
        patched(pair, features, on_host, [1]),
    ):  # fmt: skip
        with pair.routed("replacement"), changed as model:
            model(tokens)
    for changed in (inserted(pair, features), negated(pair, features), gated(pair, dict(enumerate(gates)))):
        with changed as model:
            out = model(tokens)
    assert torch.autograd.grad(out.sum(), gates)[0].device.type == "cpu"
    with pair.routed("replacement"), frozen(pair, tokens.cpu(), mlps=True, features=features, layers=[1]) as model:
        model(tokens)


def test_circuit_search_and_measurements_run(device: Device) -> None:
    pair, onsets = tiny(device), some_onsets()
    everything = torch.ones(2, 24, dtype=torch.bool)
    found = search_circuit(pair, onsets, everything, SearchOptions(share=0.1, per_round=2), progress=False)
    circuit_edges(pair, onsets, assign_roles(pair, onsets, found.order, everything).features)
    others = {"others": [f for f in (FeatureId(i // 24, i % 24) for i in range(48)) if f not in found.order]}
    settings = set_controls(TuningTexts(pair, onsets), found.order, others, effects_at(pair, onsets).activation)
    arms = [setting.variant for setting in settings.values()]
    arms += [inserted_in_part(dict.fromkeys(found.order, 0.5)), shifted_logits((5, 9), -torch.inf)]
    residuals = ReplacementResiduals.read(pair, onsets)
    assert [probabilities(pair, onsets, arm, "x", residuals) for arm in arms]
    mediation(pair, onsets, found.order[:2], found.order[2:], "x")


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Gemma2ForCausalLM"])
def test_the_stages_run_on_a_bridge(device: Device, architecture: str) -> None:
    pair, features = tiny(device, architecture=architecture, backend="bridge"), [FeatureId(0, 1), FeatureId(1, 4)]
    prompt = list(documents(1)[0].tokens)
    measure_faithfulness(pair, documents())
    effects_at(pair, some_onsets())
    for linearization in ("relp", "gradient"):
        attribute(pair, prompt, linearization=linearization, progress=False)
    with inserted(pair, features) as model:
        model(torch.tensor([prompt], device=device.name))
    Trainer(pair, documents(), TrainingConfig(stages=("end_to_end",), n_features=16, steps=2), progress=False).run()


@pytest.fixture
def loaded() -> PairedModel:
    """The model organism, read before a device is pretended: transformers' loader has function modes of its own."""
    return load_organism_pair("cpu")


@pytest.fixture
def builtin(loaded: PairedModel, device: Device) -> PairedModel:
    pair = on(device, loaded)
    randomise(pair, n_features=16)
    with torch.no_grad():
        for adapter in pair.installed_adapters():
            adapter.b_enc -= 4.0
    return pair


def test_collection_runs(builtin: PairedModel, device: Device) -> None:
    traces = encode_traces(reasoning_pairs("report", 4), builtin.model.tokenizer)
    options = StoreOptions(examples=2, sample=2, before=2, after=2, tokens_per_batch=200)
    for kind, stream in (("feature", "replacement"), ("feature", "target"), ("neuron", "target")):
        store = collect_features(
            builtin, traces, kind=kind, stream=stream, options=options, words=["Wait"], progress=False
        )  # type: ignore[arg-type]
        assert store.ids(1)


def test_generation_runs(builtin: PairedModel, device: Device) -> None:
    features = [FeatureId(0, 3), FeatureId(1, 2)]
    prompt = encode_traces(reasoning_pairs("report", 1), builtin.model.tokenizer)[0].tokens[:12]
    variants = [on_route("target"), without(features), with_only(features)]
    generate_variants(builtin, prompt, variants, max_new_tokens=3, progress=False)
    generate_variants(builtin, prompt, variants[:1], max_new_tokens=3, temperature=0.7, top_p=0.9, progress=False)
    for temperature in (0.0, 0.7):
        respond(builtin.model, problems("report", 2), max_new_tokens=3, temperature=temperature)
    assert len(list(log_likelihoods(builtin.model, [(prompt[:5], prompt[5:8]), (prompt[:3], prompt[3:9])]))) == 2


@pytest.mark.skipif(not CUDA_IS_TESTED, reason="make gpu runs this on a machine with a GPU")
@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_real_cuda_computes_what_the_cpu_computes(architecture: str, activation: str) -> None:
    """In float64, where nothing but the order of sums can differ."""
    found = []
    for name in ("cpu", "cuda"):
        hf_models = (random_model(seed, architecture=architecture) for seed in (1, 2))
        pair = randomise(PairedModel.from_pretrained(*hf_models, device=name), activation=activation)
        batch = random_batch(3).to(torch.device(name))
        values: dict[str, torch.Tensor] = {}
        for route in ("target", "hybrid", "replacement", "target+adapter"):
            with torch.no_grad(), pair.routed(route):
                values[route] = pair.model(batch.tokens, attention_mask=batch.real.long())[batch.real]
        terms = shared_prefix_step(pair, batch, 2, LossWeights(), 0.01)
        values |= terms.by_name()
        values |= {
            f"gradient of {n}": w.grad for n, w in pair.installed_adapters().named_parameters() if w.grad is not None
        }
        graph = attribute(pair, batch.tokens[0], [3], progress=False)
        values |= {"active": graph.features, "rows": graph.rows}
        found.append({key: value.detach().cpu() for key, value in values.items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


@pytest.mark.skipif(not CUDA_IS_TESTED, reason="make gpu runs this on a machine with a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_cuda_products_are_those_of_float64_arithmetic(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to("cuda", dtype) for shape in ((3, 50, 640), (640, 320)))
    weight = weight.to(torch.bfloat16)
    exact = x.double() @ weight.double()
    assert float((product_in_float32(x, weight) - exact).norm()) < 1e-6 * float(exact.norm())


@pytest.mark.skipif(not CUDA_IS_TESTED, reason="make gpu runs this on a machine with a GPU")
@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
def test_real_cuda_adapters_train_in_bfloat16_beside_a_bfloat16_model(activation: str) -> None:
    base, target = (random_model(seed, torch.bfloat16) for seed in (1, 2))
    pair = PairedModel.from_pretrained(base, target, device="cuda")
    local = LocalConfig(steps=6, tokens_per_step=16, max_tokens=99, revisions=(0.4, 0.7))
    config = TrainingConfig(
        n_features=16, steps=3, tokens_per_batch=24, activation=activation, stages=("local", "end_to_end"),
        local=local, recompute=True, **({"k": 5} if "topk" in activation else {}),
    )  # type: ignore[arg-type]  # fmt: skip
    adapters = Trainer(pair, documents(vocab=61), config, progress=False).run()
    assert all(adapter.acts_dtype == torch.bfloat16 for adapter in adapters)
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in adapters.parameters())
    faithfulness_block(measure_faithfulness(pair, documents(vocab=61)), "x")


# -- how often the host waits -----------------------------------------------------------------------------------------


def file_name(module: ModuleType) -> str:
    """The name under which the emulator counts the waits of a module."""
    return Path(str(module.__file__)).name


def waits(pretended: PretendedDevice, act: Callable[[], object]) -> Counter[tuple[str, str, str]]:
    with pretended.counted() as counts:
        act()
    return counts


def test_a_changed_pass_copies_nothing_by_layer_or_token(pretended: PretendedDevice) -> None:
    counts = []
    for layers, length in ((2, 6), (4, 11)):
        pair = tiny(pretended, layers)
        tokens = torch.arange(1, length, device=DEVICE)[None]
        features = [FeatureId(layer, i) for layer in range(layers) for i in (1, 5)]
        with torch.no_grad(), pair.routed("replacement"), pair.recorded(ACTS_HOOK) as source:
            pair.model(tokens)
        for changed in (
            ablated(pair, features), scaled(pair, features, 2.0, [1, 3]), patched(pair, features, dict(source)),
            inserted(pair, features), negated(pair, features),
        ):  # fmt: skip
            with torch.no_grad(), pair.routed("replacement"), changed as model:
                counts.append(waits(pretended, lambda model=model, tokens=tokens: model(tokens)))
    ours = [{key: n for key, n in count.items() if key[1] == file_name(feature_edits)} for count in counts]
    assert not any(ours), ours


def test_entering_an_intervention_copies_once_for_all_layers(pretended: PretendedDevice) -> None:
    counts = []
    for layers in (2, 4):
        pair, total = tiny(pretended, layers), Counter[tuple[str, str, str]]()
        features = [FeatureId(layer, i) for layer in range(layers) for i in (1, 5)]
        for make in (ablated, inserted, negated):

            def enter(make: Callable[..., object] = make, pair: PairedModel = pair, which: object = features) -> None:
                with make(pair, which):  # type: ignore[attr-defined]
                    pass

            total += waits(pretended, enter)
        counts.append(total)
    assert counts[0] and not grown(*counts)


def test_rows_of_an_attribution_graph_wait_once_per_batch(pretended: PretendedDevice) -> None:
    """The longer prompt has more tokens, features and rows, and as many batches: one per layer."""
    pair, counts, rows = tiny(pretended, 3), [], []
    for length in (4, 12):
        graphs: list[object] = []
        prompt = list(range(1, length))
        counts.append(
            waits(
                pretended, lambda p=prompt, g=graphs: g.append(attribute(pair, p, [3], batch_size=9999, progress=False))
            )
        )
        rows.append(len(graphs[0].rows))  # type: ignore[attr-defined]
    assert rows[1] > 2 * rows[0]
    assert not grown(*counts)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batchtopk"])
def test_the_waits_of_a_training_step_do_not_grow_with_layers(pretended: PretendedDevice, activation: str) -> None:
    counts = []
    for layers in (2, 4):
        k = {"k": 5} if activation == "batchtopk" else {}
        config = TrainingConfig(stages=("end_to_end",), n_features=16, steps=1, activation=activation, **k)  # type: ignore[arg-type]
        trainer = Trainer(tiny(pretended, layers), documents(), config, validation=documents(2, 1), progress=False)
        counts.append(waits(pretended, trainer.run))
    ours = lambda key: key[2] == "clip"  # noqa: E731 (torch's gradient clipping asks a device for its devices)
    assert not grown(*counts, allowed=ours)


def test_ablations_in_the_model_copy_once_for_all_layers(pretended: PretendedDevice) -> None:
    counts = []
    for layers in (2, 4):
        pair = tiny(pretended, layers)
        graph = attribute(pair, list(range(1, 9)), [3], progress=False)
        counts.append(waits(pretended, lambda pair=pair, graph=graph: ablation_effects(pair, graph, torch.arange(4))))
    assert counts[0] and not grown(*counts)


def test_the_waits_of_effects_and_faithfulness_do_not_grow_with_layers(pretended: PretendedDevice) -> None:
    counts: list[Counter[tuple[str, str, str]]] = []
    for layers in (2, 4):
        pair, onsets = tiny(pretended, layers), some_onsets()
        counts.append(
            waits(pretended, lambda pair=pair: measure_faithfulness(pair, documents()))
            + waits(pretended, lambda pair=pair: stream_agreement(pair, documents()))
            + waits(pretended, lambda pair=pair, onsets=onsets: effects_at(pair, onsets))
        )
    assert not grown(*counts)


def test_the_waits_of_matching_do_not_grow_with_features(pretended: PretendedDevice) -> None:
    counts = []
    for n_features in (12, 48):
        pair = tiny(pretended, n_features=n_features)
        both = pair.installed_adapters()
        counts.append(waits(pretended, lambda pair=pair, both=both: match_features(both, both, pair, documents(80))))
    assert not grown(*counts)


# -- choice of device -------------------------------------------------------------------------------------------------


def test_auto_is_the_first_available_of_cuda_mps_and_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("auto") == resolve_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps") and resolve_device("mps:0").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda") and resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="cuda, cuda:1, mps, cpu"):
        resolve_device("cuda:2")


def test_a_model_in_memory_stays_where_it_is_unless_a_device_is_named(pretended: PretendedDevice) -> None:
    base, target = (random_model(seed, torch.float32, num_hidden_layers=2) for seed in (1, 2))
    pretended.hold(target)
    assert pretended.holds(PairedModel.from_pretrained(base, target).model.W_E)
    with pytest.raises(DeviceError, match="This machine has cpu"):
        PairedModel.from_pretrained(base, base, device="cuda:7")


def test_the_device_that_auto_chose_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="tl_adapters"):
        assert device_of("auto") == "auto" and not caplog.text  # an error of the command line stands alone
        assert load_organism_pair(device_of("auto")).model.W_E.device.type == "cpu"
    assert "device: cpu (auto" in caplog.text
    for unknown in ("gpu", "mps:3", "cuda:-2", ""):
        with pytest.raises(UserError, match="--device"):
            device_of(unknown)


def test_controls_copy_once_for_all_layers_and_nothing_in_a_pass(pretended: PretendedDevice) -> None:
    entering, passing = [], []
    for layers, length in ((2, 6), (4, 11)):
        pair, tokens = tiny(pretended, layers), torch.arange(1, length, device=DEVICE)[None]
        direction = torch.ones(pair.model.cfg.d_model, device=DEVICE)
        held = torch.ones(layers, pair.model.cfg.d_mlp, device=DEVICE)
        shares = {FeatureId(layer, i): 0.5 for layer in range(layers) for i in (1, 5)}
        total = Counter[tuple[str, str, str]]()
        for variant in (
            steered(1, direction, 2.0), steered(1, direction, 2.0, [3, 4]), shifted_logits((5, 9), -1.0),
            without_neurons([(layer, 2) for layer in range(layers)], held, 0.5), removed_in_part(shares),
            inserted_in_part(shares),
        ):  # fmt: skip
            with pretended.counted() as counts, torch.no_grad(), variant.entered(pair) as model:
                passing.append(waits(pretended, lambda model=model, tokens=tokens: model(tokens)))
            total += counts
        entering.append(total)
    assert entering[0]
    assert not grown(*entering)
    files = {file_name(module) for module in (controls, steering, control_strengths)}
    ours = [{key: n for key, n in count.items() if key[1] in files} for count in passing]
    assert not any(ours), ours
