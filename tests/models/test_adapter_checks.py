"""Adapters are accepted by the models they were trained on and by no others, whatever was cast or processed."""

import copy
import logging
from collections.abc import Callable
from functools import cache

import pytest
import torch
from helpers.random_models import ARCHITECTURES, random_model, randomise
from transformer_lens.components import GroupedQueryAttention
from transformers import PreTrainedModel

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.checkpoints.hf_model import move_model
from tl_adapters.checkpoints.layer_samples import agrees
from tl_adapters.models.attach import attach, detach
from tl_adapters.models.hooked_transformer import build_hooked_transformer
from tl_adapters.models.paired_model import PairedModel

QWEN2 = "Qwen2ForCausalLM"
Change = Callable[[PreTrainedModel], None]


def model(
    seed: int, dtype: torch.dtype = torch.float32, architecture: str = QWEN2, **options: object
) -> PreTrainedModel:
    return random_model(seed, dtype, architecture, num_hidden_layers=2, **options)


@cache
def trained_adapters(
    dtype: torch.dtype = torch.float32, architecture: str = QWEN2, backend: str = "hooked"
) -> AdapterSet:
    """Adapters of one pair, shared by the tests, which must not change them."""
    base, target = (model(seed, dtype, architecture) for seed in (1, 2))
    pair = PairedModel.from_pretrained(base, target, backend=backend)
    return randomise(pair, n_features=6).installed_adapters()


def copied(adapters: AdapterSet) -> AdapterSet:
    return copy.deepcopy(adapters)


def weight(name: str) -> Change:
    """A change of one weight to another random one of the same standard deviation."""

    def change(hf: PreTrainedModel) -> None:
        tensor = hf.get_parameter(name)
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(9))
        tensor.data = (noise * tensor.data.float().std()).to(tensor.dtype)

    return change


def transposed(hf: PreTrainedModel) -> None:
    tensor = hf.model.layers[1].self_attn.q_proj.weight  # square
    tensor.data = tensor.data.T.contiguous()


def swapped_layers(hf: PreTrainedModel) -> None:
    hf.model.layers[0], hf.model.layers[1] = hf.model.layers[1], hf.model.layers[0]


def merged_lora(hf: PreTrainedModel) -> None:
    """A merged update of rank 2 on q and v, as small as after a short fine-tuning."""
    generator = torch.Generator().manual_seed(4)
    for layer in hf.model.layers:
        for tensor in (layer.self_attn.q_proj.weight, layer.self_attn.v_proj.weight):
            a, b = (
                torch.randn(tensor.shape[0], 2, generator=generator),
                torch.randn(2, tensor.shape[1], generator=generator),
            )
            tensor.data += (0.002 * a @ b).to(tensor.dtype)


def moved_by_one_ulp(hf: PreTrainedModel) -> None:
    """Move every bfloat16 weight by one unit in the last place."""
    for tensor in hf.parameters():
        tensor.data = (tensor.data.view(torch.int16) + 1).view(torch.bfloat16)


LAYER = "model.layers.1."
CHANGES: dict[str, Change] = {
    name: weight(name)
    for name in (
        *(f"{LAYER}self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"{LAYER}mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
        f"{LAYER}self_attn.k_proj.bias",
        f"{LAYER}input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    )
} | {f.__name__: f for f in (transposed, swapped_layers, merged_lora)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHANGES)
def test_another_target_is_refused_in_its_own_dtype_and_after_a_cast(name: str, dtype: torch.dtype) -> None:
    other = model(2)
    CHANGES[name](other)
    with pytest.raises(PairMismatchError, match="trained on another target|trained on .*the weights of the"):
        PairedModel.from_pretrained(model(1), other, dtype=dtype).load_adapters(copied(trained_adapters()))


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_another_base_is_refused(name: str) -> None:
    base = model(1)
    weight(f"{LAYER}mlp.{name}.weight")(base)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(PairMismatchError, match="differ at layer 1"):
            PairedModel.from_pretrained(base.to(dtype), model(2), dtype=dtype).load_adapters(copied(trained_adapters()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_unit_in_the_last_place_is_another_model(architecture: str) -> None:
    adapters = trained_adapters(torch.bfloat16, architecture)
    base = model(1, torch.bfloat16, architecture)
    other = model(2, torch.bfloat16, architecture)
    moved_by_one_ulp(other)
    for dtype in (torch.bfloat16, torch.float32):
        pair = PairedModel.from_pretrained(base, copy.deepcopy(other), dtype=dtype)
        with pytest.raises(PairMismatchError, match="trained on"):
            pair.load_adapters(copied(adapters))
    moved_by_one_ulp(base)
    with pytest.raises(PairMismatchError, match="beside the MLPs"):
        PairedModel.from_pretrained(base, model(2, torch.bfloat16, architecture)).load_adapters(copied(adapters))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("recorded", ["hooked", "bridge"])
def test_the_same_models_are_accepted_after_casts_and_in_either_backend(architecture: str, recorded: str) -> None:
    for saved, opened in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ):
        adapters = trained_adapters(saved, architecture, recorded)
        for backend in ("hooked", "bridge"):
            base, target = (model(seed, saved, architecture).to(opened) for seed in (1, 2))
            PairedModel.from_pretrained(base, target, backend=backend).load_adapters(copied(adapters))


def processed(hf: PreTrainedModel, **options: bool):  # type: ignore[no-untyped-def]
    """A processed HookedTransformer, as TransformerLens's from_pretrained returns it."""
    hooked = build_hooked_transformer(move_model(hf, None, None))
    for block in hooked.blocks:
        block.attn.__class__ = GroupedQueryAttention
    for parameter in hooked.parameters():
        parameter.data = parameter.data.clone()
    hooked.process_weights_(**options)
    return hooked


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folded_target_is_recognized_and_another_folded_target_is_refused(architecture: str) -> None:
    center = architecture != "Gemma2ForCausalLM"  # centering under a soft cap is another model
    for dtype in (torch.float32, torch.bfloat16):
        adapters, base = trained_adapters(dtype, architecture), model(1, dtype, architecture)
        detach(attach(processed(model(2, dtype, architecture), center_unembed=center), copied(adapters), base=base))
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
            other = model(2, dtype, architecture)
            weight(f"{LAYER}{name}.weight")(other)
            with pytest.raises(PairMismatchError, match="at layer 1 differ"):
                attach(processed(other, center_unembed=center), copied(adapters), base=base)
    other = model(2, torch.bfloat16, architecture)
    moved_by_one_ulp(other)
    with pytest.raises(PairMismatchError, match="trained on"):
        attach(
            processed(other, center_unembed=center), copied(trained_adapters(torch.bfloat16, architecture)), base=base
        )


def test_the_comparison_of_samples_allows_no_more_than_rounding() -> None:
    exact = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    norms = 1 + 0.3 * torch.randn(4096, generator=torch.Generator().manual_seed(1))
    low = exact.bfloat16()
    assert agrees(exact, low) and agrees(low, exact) and agrees(low, low.float()) and agrees(exact.half(), low)
    assert not agrees(low, exact.bfloat16().add(0.01)) and not agrees(exact, exact + 1e-6)
    assert agrees(exact, (exact * norms).bfloat16(), norms) and agrees(low, (low * norms.bfloat16()), norms.bfloat16())
    up = (low.view(torch.int16) + 1).view(torch.bfloat16)
    for recorded in (exact, low, low.float()):
        assert not agrees(recorded, up) and not agrees(recorded, up.float())
    assert not agrees(low, up * norms.bfloat16(), norms.bfloat16())


def test_a_warning_says_once_which_weights_could_not_be_compared(caplog: pytest.LogCaptureFixture) -> None:
    pair = PairedModel.from_pretrained(model(1), model(2))
    with caplog.at_level(logging.WARNING, "tl_adapters"):
        pair.load_adapters(copied(trained_adapters()))
        assert not caplog.records
        partial = copied(trained_adapters())
        partial.samples = None
        for _ in range(2):
            pair.load_adapters(partial)
        assert [r.message for r in caplog.records] == [
            "These adapters carry values of second norms, attention outputs and down projections only, so only these "
            "were compared: make sure that target and base are those they were trained on."
        ]
        bare = copied(trained_adapters())
        bare.samples = bare.layer_samples = None
        pair.load_adapters(bare)
        assert "nothing of the weights of their models" in caplog.records[-1].message


def test_fingerprints_of_sets_of_earlier_versions_are_compared() -> None:
    earlier = copied(trained_adapters())  # the first release kept these two, and a few values of two matrices
    earlier.samples = None
    known = {name: earlier.metadata.fingerprints[name] for name in ("base_mlps", "target")}
    object.__setattr__(earlier.metadata, "fingerprints", known)
    PairedModel.from_pretrained(model(1), model(2)).load_adapters(copied(earlier))
    other, base = model(2), model(1)
    weight(f"{LAYER}self_attn.v_proj.weight")(other)
    weight(f"{LAYER}mlp.gate_proj.weight")(base)
    for models in ((model(1), other), (base, model(2))):
        with pytest.raises(PairMismatchError, match="trained"):
            PairedModel.from_pretrained(*models).load_adapters(copied(earlier))


def test_fingerprints_of_a_target_are_compared_in_one_dtype_only() -> None:
    ours = {"target": "a", "base_mlps": "b", "dtype": "float32", "adapters": "c", "adapters.1": "d"}
    assert differing(ours, {**ours, "target": "x"}) == ["target"]
    assert differing(ours, {**ours, "target": "x", "dtype": "bfloat16"}) == []
    assert differing(ours, {**ours, "base_mlps": "x", "dtype": "bfloat16"}) == ["base_mlps"]
    assert differing(ours, {"adapters": "some layers", "adapters.1": "d"}) == []
    assert differing(ours, {"adapters": "of an earlier version"}) == ["adapters"]
