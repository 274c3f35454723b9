"""A model in memory that computes more than its configuration and weights say is refused, or computed correctly."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import peft
import pytest
import torch
from helpers.random_models import ARCHITECTURES, random_batch, random_model
from torch import nn
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM, PreTrainedModel

from tl_adapters.checkpoints.architectures import UnsupportedModelError
from tl_adapters.checkpoints.model_files import CheckpointError
from tl_adapters.models import paired_model as paired
from tl_adapters.models.attach import attach
from tl_adapters.models.build import build_model
from tl_adapters.models.hf_outputs import probe_tokens, record_hf_outputs
from tl_adapters.models.hooked_transformer import build_hooked_transformer, tl_config
from tl_adapters.models.output_comparison import DisagreementError, tolerance
from tl_adapters.models.paired_model import PairedModel

TOKENS = random_batch(3).tokens[:1, :11]
BACKENDS = pytest.mark.parametrize("backend", ["hooked", "bridge"])


def model(seed: int, **options: object) -> PreTrainedModel:
    return random_model(seed, **{"dtype": torch.float32, **options})  # type: ignore[arg-type]


@torch.no_grad()
def hybrid(base: PreTrainedModel, target: PreTrainedModel) -> torch.Tensor:
    """Logits of the target with the MLP modules of the base, whatever those compute."""
    both = copy.deepcopy(target)
    for ours, theirs in zip(both.model.layers, base.model.layers, strict=True):
        ours.mlp = theirs.mlp
    return both(TOKENS).logits


# -- changes that no configuration shows ------------------------------------------------------------------------------


def bias(name: str, size: float = 1.0) -> Callable[[PreTrainedModel], None]:
    def change(hf: PreTrainedModel) -> None:
        linear = hf.get_submodule(name)
        noise = torch.randn(linear.out_features, generator=torch.Generator().manual_seed(7))
        linear.bias = nn.Parameter(size * noise.to(linear.weight))

    return change


def hook(name: str, factor: float = 0.5) -> Callable[[PreTrainedModel], None]:
    def change(hf: PreTrainedModel) -> None:
        hf.get_submodule(name).register_forward_hook(lambda module, args, out: out * factor)

    return change


def steer_a_layer(hf: PreTrainedModel) -> None:
    hf.model.layers[2].register_forward_hook(lambda module, args, out: out + 0.1)


def scale_logits(hf: PreTrainedModel) -> None:
    def hot(module: nn.Module, args: object, out: object) -> object:
        out.logits = out.logits * 2  # type: ignore[attr-defined]
        return out

    hf.register_forward_hook(hot)


def hook_before_attention(hf: PreTrainedModel) -> None:
    def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> object:
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 1.2}

    hf.model.layers[1].self_attn.register_forward_pre_hook(before, with_kwargs=True)


def replace_attention(hf: PreTrainedModel) -> None:
    attention = hf.model.layers[1].self_attn
    stock = attention.forward

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        out, pattern = stock(*args, **kwargs)
        return out * 0.9, pattern

    attention.forward = MethodType(forward, attention)


class LowRank(nn.Module):
    """LoRA written by hand, which no library's checks recognize."""

    def __init__(self, linear: nn.Linear, size: float) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        generator = torch.Generator().manual_seed(3)
        down = torch.randn(2, linear.in_features, generator=generator) / linear.in_features**0.5
        up = size * torch.randn(linear.out_features, 2, generator=generator)
        self.low_rank = [up.to(linear.weight), down.to(linear.weight)]  # in a list, so that they are not parameters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = self.low_rank
        return nn.functional.linear(x, self.weight, self.bias) + x @ down.T @ up.T


def low_rank(name: str, size: float) -> Callable[[PreTrainedModel], None]:
    def change(hf: PreTrainedModel) -> None:
        parent, _, child = name.rpartition(".")
        setattr(hf.get_submodule(parent), child, LowRank(hf.get_submodule(name), size))  # type: ignore[arg-type]

    return change


def change_scaling(hf: PreTrainedModel) -> None:
    hf.model.layers[2].self_attn.scaling *= 1.1


def change_epsilon(hf: PreTrainedModel) -> None:
    hf.model.layers[3].post_attention_layernorm.variance_epsilon = 0.1


CHANGES: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "bias on o_proj": (bias("model.layers.1.self_attn.o_proj"), r"layers\.1\.self_attn\.o_proj\.bias"),
    "bias on down_proj": (bias("model.layers.3.mlp.down_proj"), r"layers\.3\.mlp\.down_proj\.bias"),
    "hook on an MLP": (
        hook("model.layers.1.mlp"),
        r"MLP of layer 1 .*computes \S+ in the model in memory .*layers.1.mlp has a forward hook",
    ),
    "hook on a projection": (hook("model.layers.2.mlp.up_proj", 0.99), "MLP of layer 2"),
    "hook of a small effect": (hook("model.layers.1.mlp", 1.0005), "MLP of layer 1"),
    "hook on a norm": (hook("model.layers.3.input_layernorm"), "Layer 3"),
    "hook on the last norm": (hook("model.norm", 1.1), "unembedding"),
    "hook on the embedding": (hook("model.embed_tokens", 1.1), "embedding"),
    "hook on lm_head": (hook("lm_head", 1.1), "unembedding"),
    "steering": (steer_a_layer, "Layer 2"),
    "scaled logits": (scale_logits, "unembedding"),
    "hook before attention": (hook_before_attention, "Layer 1"),
    "replaced attention": (replace_attention, "Layer 1 .*forward method of model.layers.1.self_attn was replaced"),
    "another scale of scores": (change_scaling, "Layer 2"),
    "another epsilon": (change_epsilon, "Layer 3"),
    "low rank on q_proj": (low_rank("model.layers.0.self_attn.q_proj", 0.3), "Layer 0"),
    "low rank on gate_proj": (low_rank("model.layers.0.mlp.gate_proj", 1e-3), "MLP of layer 0"),
}


@BACKENDS
@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_computes_more_than_its_weights_is_refused(name: str, backend: str) -> None:
    """A TransformerBridge would compute the change, but analyses read the weights."""
    change, message = CHANGES[name]
    target = model(2)
    change(target)
    with pytest.raises(UnsupportedModelError, match=message):
        PairedModel.from_pretrained(model(1), target, backend=backend)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_hooks_that_change_nothing_are_accepted(dtype: torch.dtype, backend: str) -> None:
    called = []

    def watch(hf: PreTrainedModel) -> PreTrainedModel:
        for module in hf.modules():
            module.register_forward_hook(lambda module, args, out: called.append(type(module)))
        return hf.to(dtype)

    models = watch(model(1)), watch(model(2))
    expected = models[1](TOKENS).logits
    pair = PairedModel.from_pretrained(*models, backend=backend)
    assert (pair.model(TOKENS) - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.2) and called


BASE_CHANGES: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "hook on an MLP": (hook("model.layers.1.mlp"), "The MLP of layer 1 of the base"),
    "low rank on gate_proj": (low_rank("model.layers.0.mlp.gate_proj", 1e-3), "The MLP of layer 0 of the base"),
    "bias on gate_proj": (bias("model.layers.2.mlp.gate_proj"), "layers.2.mlp.gate_proj.bias"),
    "hook of a small effect": (hook("model.layers.3.mlp.gate_proj", 1.001), "MLP of layer 3"),
}


@BACKENDS
@pytest.mark.parametrize("name", BASE_CHANGES)
def test_a_base_whose_mlps_compute_more_than_their_weights_is_refused(name: str, backend: str) -> None:
    change, message = BASE_CHANGES[name]
    base = model(1)
    change(base)
    with pytest.raises(UnsupportedModelError, match=message):
        PairedModel.from_pretrained(base, model(2), backend=backend)
    pair = PairedModel.from_pretrained(model(1), model(2))
    adapters = pair.new_adapters(8)
    with pytest.raises(UnsupportedModelError, match=message):
        attach(build_model(model(2), backend=backend), adapters, base=base)


@BACKENDS
@torch.no_grad()
def test_changes_of_a_base_outside_its_mlps_are_accepted(backend: str) -> None:
    base = model(1)
    steer_a_layer(base)
    hook("lm_head")(base)
    pair = PairedModel.from_pretrained(base, model(2), backend=backend)
    with pair.routed("hybrid"):
        torch.testing.assert_close(pair.model(TOKENS), hybrid(base, model(2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("option", "value", "where"),
    [
        ("eps", 0.01, "Layer 0 of the target"),
        ("act_fn", "gelu", "The MLP of layer 0 of the target"),
        ("rotary_base", 50.0, "rotary embedding at position 1 "),
        ("attn_scale", 3.0, "Layer 0 of the target"),
    ],
)
def test_a_wrong_option_of_the_hooked_transformer_is_detected(
    option: str, value: object, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: object) -> object:
        config = tl_config(*args)  # type: ignore[arg-type]
        setattr(config, option, value)
        return config

    monkeypatch.setattr("tl_adapters.models.hooked_transformer.tl_config", wrong)
    with pytest.raises(UnsupportedModelError, match=where):
        PairedModel.from_pretrained(model(1), model(2), backend="hooked")


def test_a_wrong_norm_of_the_bridge_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.model_bridge.generalized_components.rms_normalization import RMSNormalizationBridge as Norm

    stock = Norm.forward
    monkeypatch.setattr(Norm, "forward", lambda self, x: stock(self, x) * 1.001)
    with pytest.raises(DisagreementError, match="Layer 0 of the target .* in TransformerLens where transformers"):
        PairedModel.from_pretrained(model(1), model(2), backend="bridge")


@BACKENDS
def test_base_mlps_in_the_wrong_order_are_detected(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = paired.read_base_mlps
    monkeypatch.setattr(paired, "read_base_mlps", lambda base, n: read(base, n)[::-1])
    with pytest.raises(DisagreementError, match="The MLP of layer 0 of the base"):
        PairedModel.from_pretrained(model(1), model(2), backend=backend)


@BACKENDS
@torch.no_grad()
def test_a_parametrized_norm_is_computed(backend: str) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    target = model(2)
    nn.utils.parametrize.register_parametrization(target.model.layers[1].post_attention_layernorm, "weight", Doubled())
    expected = target(TOKENS).logits
    assert (expected - model(2)(TOKENS).logits).abs().max() > 0.1
    pair = PairedModel.from_pretrained(model(1), target, backend=backend)
    torch.testing.assert_close(pair.model(TOKENS), expected, rtol=1e-4, atol=1e-4)


@BACKENDS
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rounding_in_low_precision_is_allowed(attention: str, backend: str) -> None:
    for architecture in ARCHITECTURES:
        for dtype in (torch.bfloat16, torch.float16):
            options = {} if architecture == "Gemma2ForCausalLM" else {"attn_implementation": attention}
            models = (model(seed, architecture=architecture, **options) for seed in (1, 2))
            PairedModel.from_pretrained(*models, dtype=dtype, backend=backend)


def test_rounding_is_measured_where_scores_are_large() -> None:
    """Qwen2's query and key biases make scores whose rounding in bfloat16 moves a layer's output by a fifth."""
    target = model(2, attn_implementation="sdpa", hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    with torch.no_grad():
        for layer in target.model.layers:
            for name in ("q_proj", "k_proj"):
                layer.self_attn.get_submodule(name).bias.mul_(60)
    target = target.bfloat16()
    hf_outputs = record_hf_outputs(target)
    assert hf_outputs is not None and hf_outputs.attention_rounding is not None
    assert max(float(r.max()) for r in hf_outputs.attention_rounding) > tolerance(torch.bfloat16, torch.device("cpu"))
    build_model(target, backend="bridge", hf_outputs=hf_outputs)


@BACKENDS
def test_a_change_smaller_than_rounding_is_refused_in_low_precision(backend: str) -> None:
    target = model(2).bfloat16()
    hook("model.layers.1.mlp", 1.004)(target)  # half a unit in the last place
    with pytest.raises(DisagreementError, match=r"MLP of layer 1 .*in bfloat16.*model.layers.1.mlp has a forward hook"):
        PairedModel.from_pretrained(model(1), target, backend=backend)
    base = model(1).half()
    low_rank("model.layers.0.mlp.up_proj", 1e-3)(base)
    with pytest.raises(DisagreementError, match=r"MLP of layer 0 .*float16.*model.layers.0.mlp.up_proj is a LowRank"):
        PairedModel.from_pretrained(base, model(2).half(), backend=backend)


@BACKENDS
def test_a_layer_that_is_not_finite_is_named(backend: str) -> None:
    target = model(2)
    target.model.layers[2].mlp.down_proj.weight.data[3, 5] = math.nan
    with pytest.raises(DisagreementError, match="Layer 2 of the target.*not finite"):
        PairedModel.from_pretrained(model(1), target, backend=backend)


def test_recording_leaves_the_model_as_it_was() -> None:
    target = model(2)
    target.train()
    target.model.layers[0].eval()
    modes = [module.training for module in target.modules()]
    state = {name: value.clone() for name, value in target.state_dict().items()}
    record_hf_outputs(target, base=target)
    assert [module.training for module in target.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in target.modules())
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())


def test_probe_tokens_are_never_special() -> None:
    for special in ((), range(40), range(1, 61, 2)):
        ids = probe_tokens(61, 64, list(special))[0].tolist()
        assert len(set(ids)) == len(ids) == 8 and not set(ids) & set(special)
    assert probe_tokens(61, 5).shape == (1, 5)


# -- LoRA of the peft library -----------------------------------------------------------------------------------------


def lora(hf: PreTrainedModel, **options: object) -> peft.PeftModel:
    settings = dict(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(copy.deepcopy(hf), peft.LoraConfig(**{**settings, **options}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return tuned.eval()


@BACKENDS
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["up_proj"]}], ids=str)
@torch.no_grad()
def test_lora_is_refused_until_it_is_merged(options: dict[str, object], backend: str, tmp_path: Path) -> None:
    model(2).save_pretrained(tmp_path / "plain")
    tuned = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), **options)
    tuned.save_pretrained(tmp_path / "lora")
    injected = AutoModelForCausalLM.from_pretrained(tmp_path / "lora")  # by transformers itself; a Qwen2ForCausalLM
    for given in (tuned, injected, tuned.base_model.model):
        with pytest.raises(UnsupportedModelError, match="The target has adapters of the peft.*merge_and_unload"):
            PairedModel.from_pretrained(model(1), given, backend=backend)
        with pytest.raises(UnsupportedModelError, match="The base has adapters of the peft"):
            PairedModel.from_pretrained(given, model(2), backend=backend)
    with pytest.raises(CheckpointError, match="adapter of the peft library and no model.*merge_and_unload"):
        PairedModel.from_pretrained(tmp_path / "plain", tmp_path / "lora", backend=backend)
    expected = tuned(TOKENS).logits
    pair = PairedModel.from_pretrained(model(1), tuned.merge_and_unload(), backend=backend)
    torch.testing.assert_close(pair.model(TOKENS), expected, rtol=1e-4, atol=1e-4)


@BACKENDS
def test_merged_weights_beside_a_lora_adapter_are_refused(backend: str, tmp_path: Path) -> None:
    """transformers would apply the adapter again."""
    model(2).save_pretrained(tmp_path / "plain")
    tuned = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))
    tuned.save_pretrained(tmp_path / "both")
    tuned.merge_and_unload().save_pretrained(tmp_path / "both")
    for base, target in (("plain", "both"), ("both", "plain")):
        with pytest.raises(CheckpointError, match=r"both holds a model's weights and adapter_config.json"):
            PairedModel.from_pretrained(tmp_path / base, tmp_path / target, backend=backend)


# -- rotary frequencies, dtypes, devices ------------------------------------------------------------------------------


@torch.no_grad()
def far(hf_or_ours: object) -> torch.Tensor:
    """Logits at the end of a long document."""
    tokens = torch.randint(1, 61, (1, 400), generator=torch.Generator().manual_seed(2))
    out = hf_or_ours(tokens)  # type: ignore[operator]
    return getattr(out, "logits", out)[0, -5:].float()


@BACKENDS
def test_casts_leave_rotary_frequencies_exact(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    def fresh() -> PreTrainedModel:
        return model(2, max_position_embeddings=2048, head_dim=64)

    exact = fresh()
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16()
    expected, noise = far(exact), (far(exact) - far(fresh())).norm() / far(exact).norm()
    at = torch.zeros(1), torch.tensor([[1500]])
    angles = [hf.model.rotary_emb(*at)[0] for hf in (exact, fresh().bfloat16())]
    assert (angles[0] - angles[1]).abs().max() > 0.3  # the cast of the whole model is another model
    for given, dtype in ((fresh(), torch.bfloat16), (fresh().bfloat16(), None), (copy.deepcopy(exact), None)):
        pair = PairedModel.from_pretrained(model(1), given, dtype=dtype, backend=backend)
        assert given.model.rotary_emb.inv_freq.dtype == torch.float32 and pair.model.W_E.dtype == torch.bfloat16
        assert (far(pair.model) - expected).norm() / expected.norm() < 2 * noise
    assert sum("rotary frequencies" in message for message in caplog.messages) == 1
    back = fresh().half().float()  # rounded, and in float32 again
    PairedModel.from_pretrained(model(1), back, backend=backend)
    assert torch.equal(back.model.rotary_emb.inv_freq, fresh().model.rotary_emb.inv_freq)


def test_changed_rotary_frequencies_are_refused_or_computed() -> None:
    """The comparison on a few tokens does not detect this, because the changed wavelengths are long."""

    def changed() -> PreTrainedModel:
        target = model(2, max_position_embeddings=512)
        target.model.rotary_emb.inv_freq[-3:] *= 1.3
        return target

    expected = far(changed())
    with pytest.raises(UnsupportedModelError, match="rotary embedding at position .* frequencies were changed"):
        PairedModel.from_pretrained(model(1), changed(), backend="hooked")
    pair = PairedModel.from_pretrained(model(1), changed(), backend="bridge")
    torch.testing.assert_close(far(pair.model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_built_on_the_meta_device_has_all_buffers_there(architecture: str) -> None:
    hf = model(2, architecture=architecture, dtype=torch.bfloat16, max_position_embeddings=4096).to("meta")
    ours = build_hooked_transformer(hf)
    stock = HookedTransformer(tl_config(hf.config, torch.bfloat16, "cpu"), None, move_to_device=False)
    expected = {name: buffer.dtype for name, buffer in stock.named_buffers()}
    assert {name: buffer.dtype for name, buffer in ours.named_buffers()} == expected
    ours(torch.zeros(1, 2500, dtype=torch.long, device="meta"))  # beyond the first 2,048 rows of the rotary tables
    ours.run_with_hooks(
        torch.zeros(1, 9, dtype=torch.long, device="meta"),
        fwd_hooks=[("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern)],  # stock attention
    )
    assert ours.blocks[1].attn.rotary_sin.shape[0] > 2048
    assert {tensor.device.type for tensor in (*ours.buffers(), *ours.parameters())} == {"meta"}


@BACKENDS
def test_a_pair_can_be_made_on_the_meta_device(backend: str, tmp_path: Path) -> None:
    model(1).save_pretrained(tmp_path)
    pair = PairedModel.from_pretrained(tmp_path, model(2).to("meta"), backend=backend)
    with pair.routed("hybrid"):
        assert pair.model(TOKENS.to("meta")).shape == (1, 11, 61)
    tensors = (*pair.model.parameters(), *pair.model.buffers())
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@torch.no_grad()
def test_gemmas_norms_in_bfloat16_equal_those_of_transformers() -> None:
    hf = model(2, architecture="Gemma2ForCausalLM", hidden_size=256)
    for parameter in hf.parameters():
        parameter.data = parameter.data.bfloat16()
    ours = build_hooked_transformer(hf)
    x = torch.randn(1, 50, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    theirs = hf.model.layers[1]
    for name, norm in (
        ("ln1", theirs.input_layernorm),
        ("ln1_post", theirs.post_attention_layernorm),
        ("ln2", theirs.pre_feedforward_layernorm),
        ("ln2_post", theirs.post_feedforward_layernorm),
    ):
        out = ours.blocks[1].get_submodule(name)(x)
        assert out.dtype == torch.bfloat16
        assert (out != norm(x)).float().mean() < 0.01, name  # rsqrt and 1 / sqrt differ in the last place of float32
    for backend in ("hooked", "bridge"):
        pair = PairedModel.from_pretrained(copy.deepcopy(hf), copy.deepcopy(hf), backend=backend)
        exact = 1 + theirs.pre_feedforward_layernorm.weight.float()
        assert torch.equal(pair.backend.norm("blocks.1.ln2"), exact)
        assert not torch.equal(exact, exact.bfloat16().float())


# -- the key-value cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_that_loses_the_past_is_detected(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformer_lens.model_bridge.bridge as bridge_module
    from transformer_lens import HookedTransformer as Hooked

    for backend, cls in (("hooked", Hooked), ("bridge", bridge_module.TransformerBridge)):
        stock = cls.generate

        def generate(self: object, tokens: torch.Tensor, stock: object = stock, **options: object) -> torch.Tensor:
            generated = tokens
            for _ in range(int(options["max_new_tokens"])):  # the past is lost after the prefill
                read = generated if generated is tokens else generated[:, -1:]
                step = stock(self, read, **{**options, "max_new_tokens": 1, "use_past_kv_cache": False})
                generated = torch.cat([generated, step[:, -1:]], 1)
            return generated

        models = [model(seed, architecture=architecture) for seed in (1, 2)]
        adapters = PairedModel.from_pretrained(*copy.deepcopy(models), backend=backend).new_adapters(8)
        theirs = build_model(copy.deepcopy(models[1]), backend=backend)
        with monkeypatch.context() as patch:
            patch.setattr(cls, "generate", generate)
            with pytest.raises(DisagreementError, match=r"key-value cache.*transformers \d.*transformer-lens \d"):
                PairedModel.from_pretrained(*copy.deepcopy(models), backend=backend)
            with pytest.raises(DisagreementError, match="key-value cache"):
                attach(theirs, adapters, base=models[0])
        attach(theirs, adapters, base=models[0])


def test_attach_refuses_weights_that_are_not_finite_and_runs_no_model_with_hooks() -> None:
    adapters = PairedModel.from_pretrained(model(1), model(2)).new_adapters(8)
    theirs = build_model(model(2), backend="hooked")
    theirs.blocks[1].attn.W_Q.data[0, 0, 0] = math.inf
    with pytest.raises(DisagreementError, match="logits are not finite"):
        attach(theirs, adapters, base=model(1))
    hooked = build_model(model(2), backend="hooked")
    fired = []
    hooked.add_hook("blocks.1.hook_resid_post", lambda x, hook: fired.append(1))
    attach(hooked, adapters, base=model(1))
    assert not fired


# -- wrapped models, and objects that are not models ------------------------------------------------------------------


@BACKENDS
@torch.no_grad()
def test_wrapped_models_are_unwrapped(backend: str) -> None:
    expected = model(2)(TOKENS).logits
    for wrap in (torch.compile, nn.DataParallel, lambda hf: torch.compile(nn.DataParallel(hf))):
        pair = PairedModel.from_pretrained(wrap(model(1)), wrap(model(2)), backend=backend)
        torch.testing.assert_close(pair.model(TOKENS), expected, rtol=1e-4, atol=1e-4)


@BACKENDS
def test_a_model_made_in_memory_needs_no_architectures(backend: str) -> None:
    class Mine(type(model(2))):  # type: ignore[misc]
        """A subclass that changes nothing."""

    base, target = model(1), model(2)
    target.__class__ = Mine
    base.config.architectures = target.config.architectures = None
    pair = PairedModel.from_pretrained(base, target, backend=backend)
    assert pair.backend.hf_config["architectures"] == ["Qwen2ForCausalLM"]


def partly_on_meta(hf: PreTrainedModel) -> PreTrainedModel:
    hf.model.layers[3].to("meta")
    return hf


NOT_MODELS: dict[str, tuple[Callable[[], object], str]] = {
    "of TransformerLens": (lambda: build_model(model(2), backend="hooked"), "TransformerLens.*attach"),
    "a bridge": (lambda: build_model(model(2), backend="bridge"), "TransformerLens.*attach"),
    "inside a bridge": (lambda: build_model(model(2), backend="bridge").original_model, "inside a TransformerBridge"),
    "the inner model": (lambda: model(2).model, "inner model without an unembedding.*AutoModelForCausalLM"),
    "partly offloaded": (lambda: partly_on_meta(model(2)), "parameters without values"),
    "another module": (lambda: nn.Linear(2, 2), "is a Linear; give a folder"),
    "of eight bits": (lambda: model(2).to(torch.float8_e4m3fn), "float8_e4m3fn: these are quantized"),
}


@pytest.mark.parametrize("name", NOT_MODELS)
def test_objects_that_are_not_whole_hugging_face_models_are_refused(name: str) -> None:
    make, message = NOT_MODELS[name]
    for role, pair in (("target", (model(1), make())), ("base", (make(), model(2)))):
        with pytest.raises(UnsupportedModelError, match=f"the {role}.*|The {role}.*") as error:
            PairedModel.from_pretrained(*pair)  # type: ignore[arg-type]
        error.match(message)
        assert "\n" not in str(error.value)
    with pytest.raises(UnsupportedModelError, match="The base has parameters without values"):
        PairedModel.from_pretrained(model(1).to("meta"), model(2))
