"""Adapters attached to models of three kinds, processed or not, which `detach` restores."""

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.random_models import ARCHITECTURES, random_model
from helpers.users_models import PROCESSING, TOKENS, bridge, log_probabilities, plain, process, reference, with_saes
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.checkpoints.architectures import UnsupportedModelError
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.models.attach import attach, attached, detach
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.models.routed_mlp import RoutedMLP, WeightsProcessedError

MAKERS = {"HookedTransformer": plain, "HookedSAETransformer": with_saes, "TransformerBridge": bridge}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def state_of(model: Any) -> str:
    """Hash of weights, classes, module names and hooks."""
    digest = hashlib.sha256()
    for name, module in model.named_modules(remove_duplicate=False):
        digest.update(f"{name} {type(module).__name__} {sorted(module.__dict__)} {len(module._forward_hooks)}".encode())
        digest.update(f"{len(module._forward_pre_hooks)} {getattr(module, 'name', None)}".encode())
    for name, weight in model.named_parameters():
        digest.update(name.encode() + weight.detach().numpy().tobytes())
    digest.update(repr(sorted(model.hook_dict)).encode())
    return digest.hexdigest()


@pytest.mark.parametrize("reads", ["mlp_input", "normalized"])
@pytest.mark.parametrize("how", PROCESSING)
@pytest.mark.parametrize("maker", [plain, with_saes])
def test_an_attached_model_equals_the_pair_however_it_was_processed(
    architecture: str, maker: Callable[..., HookedTransformer], how: str, reads: str
) -> None:
    pair = reference(architecture)
    adapters = copy.deepcopy(pair.installed_adapters())
    model = maker(architecture)
    process(model, how)
    theirs = attach(
        model,
        adapters if reads == "mlp_input" else adapters.normalized(),
        base=random_model(1, architecture=architecture),
    )
    tolerance = 1e-5 if how != "unprocessed" else 1e-6 if reads == "normalized" else 1e-10  # folding is done in float32
    outputs = []
    for route in ("replacement", "hybrid", "target", "target+adapter"):
        with pair.routed(route), theirs.routed(route):
            outputs.append(log_probabilities(model))
            assert (outputs[-1] - log_probabilities(pair.model)).abs().max() < tolerance, route
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(outputs) for b in outputs[:i])
    assert (log_probabilities(model) - outputs[0]).abs().max() < 1e-12  # attach leaves it on the replacement's route


@pytest.mark.parametrize("reads", ["mlp_input", "normalized"])
def test_an_attached_bridge_equals_the_pair(architecture: str, reads: str) -> None:
    pair = reference(architecture)
    adapters = copy.deepcopy(pair.installed_adapters())
    model = bridge(architecture)
    attach(
        model,
        adapters if reads == "mlp_input" else adapters.normalized(),
        base=random_model(1, architecture=architecture),
    )
    with pair.routed("replacement"):
        assert (log_probabilities(model) - log_probabilities(pair.model)).abs().max() < 1e-5


@pytest.mark.parametrize("how", PROCESSING)
@pytest.mark.parametrize("kind", MAKERS)
def test_detach_restores_the_model(kind: str, how: str) -> None:
    model = MAKERS[kind]()
    if kind != "TransformerBridge":
        process(model, how)
    fired = []
    model.add_hook(
        "blocks.1.hook_resid_post" if kind != "TransformerBridge" else "blocks.1.hook_out",
        lambda x, hook: fired.append(1),
    )
    logits, before = log_probabilities(model), state_of(model)  # a bridge sets itself up in its first pass
    adapters = reference().installed_adapters()
    with attached(model, adapters, base=random_model(1)) as pair:
        assert state_of(model) != before
        assert (log_probabilities(model) - logits).abs().max() > 1e-2
        with pair.routed("target"):
            assert (log_probabilities(model) - logits).abs().max() < 1e-12
    assert state_of(model) == before
    assert torch.equal(log_probabilities(model), logits)
    with pytest.raises(RuntimeError, match="inside"), attached(model, adapters, base=random_model(1)):
        raise RuntimeError("inside")
    assert state_of(model) == before
    detach(pair := attach(model, adapters, on="own_mlp"))
    assert state_of(model) == before and fired
    with pytest.raises(PairMismatchError, match="taken out of its model already"):
        detach(pair)
    assert state_of(model) == before


def test_adding_to_the_models_own_mlps_must_be_requested() -> None:
    adapters, model = reference().installed_adapters(), plain()
    with pytest.raises(PairMismatchError, match=r"either base= or on='own_mlp'"):
        attach(model, adapters)
    with pytest.raises(PairMismatchError, match=r"either base= or on='own_mlp'"):
        attach(model, adapters, base=random_model(1), on="own_mlp")
    pair = attach(model, adapters, on="own_mlp")
    expected = reference()
    with expected.routed("target+adapter"):
        assert (log_probabilities(model) - log_probabilities(expected.model)).abs().max() < 1e-10
        with pair.routed("target"), pair.ablated([]):  # on a route without adapters it takes the one that adds them
            assert (log_probabilities(model) - log_probabilities(expected.model)).abs().max() < 1e-10
    with pytest.raises(PairMismatchError, match="given no base"), pair.routed("hybrid"):
        pass


def test_adapters_of_some_layers_are_attached(tmp_path: Any) -> None:
    whole = reference().installed_adapters()
    whole.save_pretrained(tmp_path / "a")
    some = AdapterSet.from_pretrained(tmp_path / "a", layers=[1, 3])
    assert some.layer_indices == [1, 3] and some.n_layers == 4
    model = plain()
    process(model, "fully processed")
    pair, expected = attach(model, some, base=random_model(1)), reference()
    with expected.routed(only=[1, 3]):
        assert (log_probabilities(model) - log_probabilities(expected.model)).abs().max() < 1e-5
        with pair.routed("target"), pair.ablated([]):
            assert (log_probabilities(model) - log_probabilities(expected.model)).abs().max() < 1e-5
    with pytest.raises(PairMismatchError, match=r"no adapters of layers \[0, 2\]"), pair.routed("replacement"):
        pass


@pytest.mark.parametrize("maker", [plain, with_saes])
def test_processing_after_attaching_raises(maker: Callable[..., HookedTransformer]) -> None:
    model = maker()
    pair = attach(model, reference().installed_adapters(), base=random_model(1))
    model.process_weights_()
    for route in ("replacement", "target"):
        with pytest.raises(WeightsProcessedError, match="RMSNorm, now RMSNormPre"), pair.routed(route):
            model(TOKENS)


def test_a_mismatch_names_both_sides() -> None:
    pair = reference()
    adapters = pair.installed_adapters()
    base = random_model(1)

    def refused(match: str, model: Any, **options: Any) -> None:
        before = state_of(model)
        with pytest.raises(PairMismatchError, match=match):
            attach(model, adapters, **options)
        assert state_of(model) == before

    refused("num_hidden_layers is 3 in the base and 4", plain(), base=random_model(1, num_hidden_layers=3))
    refused("intermediate_size is 40 in the base and 48", plain(), base=random_model(1, intermediate_size=40))
    refused("LlamaForCausalLM in the base and Qwen2", plain(), base=random_model(1, architecture="LlamaForCausalLM"))
    refused("have 4 layers of width 32.*2 of width 32", plain(num_hidden_layers=2), on="own_mlp")
    refused("second norm at layer 0 differ", plain(seed=7), base=base)
    folded = plain(seed=7)
    process(folded, "fully processed")
    refused("attention's output at layer 0 differ", folded, base=base)
    object.__setattr__(adapters.metadata, "base", "org/first")
    other = random_model(9)
    other.config.name_or_path = "mirror/first"  # content counts, not the name
    refused("trained beside the MLPs of org/first, and those of mirror/first differ at layer 0", plain(), base=other)
    attached_already = plain()
    attach(attached_already, adapters, base=base)
    assert isinstance(attached_already.blocks[0].mlp, RoutedMLP)
    with pytest.raises(ValueError, match="attached already"):
        attach(attached_already, adapters, base=base)
    with pytest.raises(ValueError, match="HookedTransformer"):
        attach(base, adapters, base=base)


@pytest.mark.parametrize(
    ("norm", "gated", "message"), [("LN", True, "norms are LN"), ("RMS", False, "layer 0 is a MLP")]
)
def test_models_without_rms_norms_or_gated_mlps_are_refused(norm: str, gated: bool, message: str) -> None:
    options = dict(n_layers=2, d_model=32, n_ctx=16, d_head=8, d_vocab=61, d_mlp=48, act_fn="gelu")
    model = HookedTransformer(HookedTransformerConfig(**options, normalization_type=norm, gated_mlp=gated))
    with pytest.raises(UnsupportedModelError, match=message):
        attach(model, reference().installed_adapters(), on="own_mlp")


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_cast_model_is_accepted_and_a_further_trained_one_is_refused(maker: Callable[..., Any]) -> None:
    adapters = reference(dtype=torch.float32).installed_adapters()
    for dtype in (torch.bfloat16, torch.float16):
        model = maker(dtype=torch.float32).to(dtype)
        for form in (adapters, adapters.normalized()):
            with attached(model, copy.deepcopy(form), base=random_model(1, torch.float32).to(dtype)):
                assert model(TOKENS).isfinite().all()
    for seed, role in ((1, "base"), (2, "target")):
        tuned = {"base": random_model(1), "target": random_model(2)}
        for name, weight in tuned[role].named_parameters():
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=weight.dtype)
            if "norm" not in name:
                weight.data += 0.01 * weight.std() * noise  # a hundredth of the weights' spread
        with pytest.raises(PairMismatchError, match="MLPs of" if role == "base" else "attention's output"):
            PairedModel.from_pretrained(tuned["base"], tuned["target"]).load_adapters(adapters)


def test_adapters_without_samples_are_compared_by_name() -> None:
    adapters = reference().installed_adapters()
    adapters.layer_samples = None
    for name, value in (("base", "org/base"), ("target", "org/target")):
        object.__setattr__(adapters.metadata, name, value)
    model, base = plain(), random_model(1)
    model.cfg.model_name, base.config.name_or_path = "target", "mirror/other"
    with pytest.raises(
        PairMismatchError, match="no samples of their base.s weights. Its recorded name is org/base; given is mirror/o"
    ):
        attach(model, adapters, base=base)
    base.config.name_or_path = "mirror/base"
    detach(attach(model, adapters, base=base))
    model.cfg.model_name = "another"
    with pytest.raises(PairMismatchError, match="no samples of their target.*org/target; given is another"):
        attach(model, adapters, base=base)


def test_a_folded_model_whose_norms_are_unknown_is_refused() -> None:
    adapters = reference().installed_adapters()
    adapters.layer_samples = None
    model = plain()
    process(model, "fold_ln")
    with pytest.raises(PairMismatchError, match="from_pretrained_no_processing"):
        attach(model, adapters, base=random_model(1))
    with pytest.raises(PairMismatchError, match="from_pretrained_no_processing"):
        attach(model, adapters, on="own_mlp")
