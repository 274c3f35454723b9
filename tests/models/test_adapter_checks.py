"""Adapters are taken by the models they were trained on and by no others, whatever was cast or processed (A11)."""

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
from tl_adapters.checkpoints.hf_model import move_model as cast_back
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
def kept(dtype: torch.dtype = torch.float32, architecture: str = QWEN2, backend: str = "hooked") -> AdapterSet:
    """Adapters of one pair; nobody changes them."""
    base, target = (model(seed, dtype, architecture) for seed in (1, 2))
    pair = PairedModel.from_pretrained(base, target, backend=backend)
    return randomise(pair, n_features=6).installed_adapters()


def own(adapters: AdapterSet) -> AdapterSet:
    return copy.deepcopy(adapters)


def weight(name: str) -> Change:
    """Another random weight of the same spread."""

    def change(hf: PreTrainedModel) -> None:
        found = hf.get_parameter(name)
        noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
        found.data = (noise * found.data.float().std()).to(found.dtype)

    return change


def transposed(hf: PreTrainedModel) -> None:
    found = hf.model.layers[1].self_attn.q_proj.weight  # square
    found.data = found.data.T.contiguous()


def swapped_layers(hf: PreTrainedModel) -> None:
    hf.model.layers[0], hf.model.layers[1] = hf.model.layers[1], hf.model.layers[0]


def merged_lora(hf: PreTrainedModel) -> None:
    """Of rank 2 on q and v, as small as a short fine-tuning leaves it."""
    generator = torch.Generator().manual_seed(4)
    for layer in hf.model.layers:
        for found in (layer.self_attn.q_proj.weight, layer.self_attn.v_proj.weight):
            a, b = (
                torch.randn(found.shape[0], 2, generator=generator),
                torch.randn(2, found.shape[1], generator=generator),
            )
            found.data += (0.002 * a @ b).to(found.dtype)


def moved_by_one_ulp(hf: PreTrainedModel) -> None:
    """Every bfloat16 weight to its neighbor."""
    for found in hf.parameters():
        found.data = (found.data.view(torch.int16) + 1).view(torch.bfloat16)


LAYER = "model.layers.1."
OTHERS: dict[str, Change] = {
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
@pytest.mark.parametrize("name", OTHERS)
def test_another_target_is_refused_in_its_own_dtype_and_cast(name: str, dtype: torch.dtype) -> None:
    other = model(2)
    OTHERS[name](other)
    with pytest.raises(PairMismatchError, match="trained on another target|trained on .*the weights of the"):
        PairedModel.from_pretrained(model(1), other, dtype=dtype).load_adapters(own(kept()))


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_another_base_is_refused(name: str) -> None:
    base = model(1)
    weight(f"{LAYER}mlp.{name}.weight")(base)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(PairMismatchError, match="differ at layer 1"):
            PairedModel.from_pretrained(base.to(dtype), model(2), dtype=dtype).load_adapters(own(kept()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_unit_in_the_last_place_is_another_model(architecture: str) -> None:
    adapters = kept(torch.bfloat16, architecture)
    base = model(1, torch.bfloat16, architecture)
    move_model = model(2, torch.bfloat16, architecture)
    moved_by_one_ulp(move_model)
    for dtype in (torch.bfloat16, torch.float32):
        pair = PairedModel.from_pretrained(base, copy.deepcopy(move_model), dtype=dtype)
        with pytest.raises(PairMismatchError, match="trained on"):
            pair.load_adapters(own(adapters))
    moved_by_one_ulp(base)
    with pytest.raises(PairMismatchError, match="beside the MLPs"):
        PairedModel.from_pretrained(base, model(2, torch.bfloat16, architecture)).load_adapters(own(adapters))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("recorded", ["hooked", "bridge"])
def test_the_same_models_are_taken_cast_either_way_and_by_either_library(architecture: str, recorded: str) -> None:
    for saved, opened in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ):
        adapters = kept(saved, architecture, recorded)
        for backend in ("hooked", "bridge"):
            base, target = (model(seed, saved, architecture).to(opened) for seed in (1, 2))
            PairedModel.from_pretrained(base, target, backend=backend).load_adapters(own(adapters))


def users_own(hf: PreTrainedModel, **options: bool):  # type: ignore[no-untyped-def]
    """A processed HookedTransformer, as TransformerLens's from_pretrained gives it."""
    found = build_hooked_transformer(cast_back(hf, None, None))
    for block in found.blocks:
        block.attn.__class__ = GroupedQueryAttention
    for parameter in found.parameters():
        parameter.data = parameter.data.clone()
    found.process_weights_(**options)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folded_target_is_known_and_another_folded_one_refused(architecture: str) -> None:
    center = architecture != "Gemma2ForCausalLM"  # centering under a soft cap is another model
    for dtype in (torch.float32, torch.bfloat16):
        adapters, base = kept(dtype, architecture), model(1, dtype, architecture)
        detach(attach(users_own(model(2, dtype, architecture), center_unembed=center), own(adapters), base=base))
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
            other = model(2, dtype, architecture)
            weight(f"{LAYER}{name}.weight")(other)
            with pytest.raises(PairMismatchError, match="at layer 1 differ"):
                attach(users_own(other, center_unembed=center), own(adapters), base=base)
    move_model = model(2, torch.bfloat16, architecture)
    moved_by_one_ulp(move_model)
    with pytest.raises(PairMismatchError, match="trained on"):
        attach(users_own(move_model, center_unembed=center), own(kept(torch.bfloat16, architecture)), base=base)


def test_values_leave_no_more_room_than_their_roundings() -> None:
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


def test_what_is_not_known_of_the_models_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    pair = PairedModel.from_pretrained(model(1), model(2))
    with caplog.at_level(logging.WARNING, "tl_adapters"):
        pair.load_adapters(own(kept()))
        assert not caplog.records
        marked = own(kept())
        marked.samples = None
        for _ in range(2):
            pair.load_adapters(marked)
        assert [r.message for r in caplog.records] == [
            "These adapters carry values of second norms, attention outputs and down projections only, so only these "
            "were compared: make sure that target and base are those they were trained on."
        ]
        bare = own(kept())
        bare.samples = bare.layer_samples = None
        pair.load_adapters(bare)
        assert "nothing of the weights of their models" in caplog.records[-1].message


def test_earlier_sets_are_still_held_to_their_fingerprints() -> None:
    earlier = own(kept())  # the first release kept these two, and a few values of two matrices
    earlier.samples = None
    known = {name: earlier.metadata.fingerprints[name] for name in ("base_mlps", "target")}
    object.__setattr__(earlier.metadata, "fingerprints", known)
    PairedModel.from_pretrained(model(1), model(2)).load_adapters(own(earlier))
    other, base = model(2), model(1)
    weight(f"{LAYER}self_attn.v_proj.weight")(other)
    weight(f"{LAYER}mlp.gate_proj.weight")(base)
    for models in ((model(1), other), (base, model(2))):
        with pytest.raises(PairMismatchError, match="trained"):
            PairedModel.from_pretrained(*models).load_adapters(own(earlier))


def test_fingerprints_of_a_target_are_compared_in_one_dtype_only() -> None:
    ours = {"target": "a", "base_mlps": "b", "dtype": "float32", "adapters": "c", "adapters.1": "d"}
    assert differing(ours, {**ours, "target": "x"}) == ["target"]
    assert differing(ours, {**ours, "target": "x", "dtype": "bfloat16"}) == []
    assert differing(ours, {**ours, "base_mlps": "x", "dtype": "bfloat16"}) == ["base_mlps"]
    assert differing(ours, {"adapters": "some layers", "adapters.1": "d"}) == []
    assert differing(ours, {"adapters": "of an earlier version"}) == ["adapters"]
