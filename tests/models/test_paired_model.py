"""What each route of a pair computes, and that TransformerLens's own tools work on its model."""

import copy
import inspect

import pytest
import torch
from helpers.random_models import random_batch, random_model, randomise
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.checkpoints.architectures import UnsupportedModelError
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.interventions import feature_edits
from tl_adapters.models.hooked_transformer import OURS, build_hooked_transformer, tl_config
from tl_adapters.models.paired_model import PairedModel

Models = tuple[PreTrainedModel, PreTrainedModel]
TOKENS = random_batch(3).tokens[:1, :11]
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])


def stock(hf: PreTrainedModel) -> HookedTransformer:
    """A HookedTransformer with its own weights and stock components."""
    model = build_hooked_transformer(copy.deepcopy(hf))
    for module in model.modules():
        if type(module) in OURS.values():
            module.__class__ = type(module).__mro__[1]
    return model


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() < tolerance, float((a - b).abs().max())


@torch.no_grad()
def test_route_target_computes_the_target(hf_models: Models, pair: PairedModel) -> None:
    logits = pair.model(TOKENS)
    # HF keeps its rotary tables in float32, so even float64 models agree to that only
    close(logits, hf_models[1](TOKENS).logits, 1e-5)
    close(logits, stock(hf_models[1])(TOKENS), 1e-10)


@torch.no_grad()
def test_route_hybrid_computes_the_target_with_the_bases_mlps(hf_models: Models, pair: PairedModel) -> None:
    base, target = hf_models
    for ours, theirs in zip(target.model.layers, base.model.layers, strict=True):
        ours.mlp = theirs.mlp
    with pair.routed("hybrid"):
        logits = pair.model(TOKENS)
    close(logits, target(TOKENS).logits, 1e-5)
    close(logits, stock(target)(TOKENS), 1e-10)
    assert (logits - pair.model(TOKENS)).abs().max() > 0.1


@torch.no_grad()
def test_with_zero_decoders_the_replacement_equals_the_hybrid(hf_models: Models) -> None:
    pair = PairedModel.from_pretrained(*hf_models)
    pair.new_adapters(16, dtype=torch.float64)
    with pair.routed("hybrid"):
        hybrid = pair.model(TOKENS)
    with pair.routed("replacement"):
        close(pair.model(TOKENS), hybrid, 1e-12)


@torch.no_grad()
def test_the_replacement_adds_the_formula(pair: PairedModel) -> None:
    with pair.routed("replacement"):
        _, cache = pair.model.run_with_cache(TOKENS)
    adapter, mlp = pair.mlps[2].adapter, pair.mlps[2]
    assert adapter is not None
    x = cache["blocks.2.mlp.hook_in"]
    close(x, cache["blocks.2.ln2.hook_normalized"] * pair.model.blocks[2].ln2.w, 1e-12)
    acts = torch.relu(x @ adapter.W_enc + adapter.b_enc)
    close(cache["blocks.2.mlp.adapter.hook_sae_acts_post"], acts, 1e-12)
    added = acts @ adapter.W_dec + adapter.b_dec
    close(cache["blocks.2.mlp.hook_adapter_out"], added, 1e-12)
    gate, up = x @ mlp.base.W_gate, x @ mlp.base.W_in
    close(cache["blocks.2.mlp.hook_pre"], gate, 1e-12)
    out = (mlp.act_fn(gate) * up) @ mlp.base.W_out + added
    if (post_norm := getattr(pair.model.blocks[2], "ln2_post", None)) is not None:
        out = post_norm(out)  # Gemma 2: what the adapter adds is normalised together with the MLP's output
    close(cache["blocks.2.hook_mlp_out"], out, 1e-12)


@torch.no_grad()
def test_partial_routes_set_the_route_of_each_layer(pair: PairedModel) -> None:
    names = {"base_mlp": False, "adapter": False}
    with pair.routed(first=1):
        assert [r.adapter for r in pair.routes] == [True, False, False, False]
    with pair.routed(last=1):
        assert [r.adapter for r in pair.routes] == [False, False, False, True]
    with pair.routed(only=[1, 2]):
        assert [r.base_mlp for r in pair.routes] == [False, True, True, False]
    with pair.routed("target+adapter", only=[0]):
        assert pair.routes[0]._asdict() == {"base_mlp": False, "adapter": True}
    assert all(r._asdict() == names for r in pair.routes)
    with pair.routed("replacement"):
        full = pair.model(TOKENS)
    with pair.routed(first=4):
        close(pair.model(TOKENS), full, 1e-15)
    target = pair.model(TOKENS)
    with pair.routed("hybrid"), pair.routed(first=0):
        close(pair.model(TOKENS), target, 1e-15)


def test_routes_are_restored_after_an_error(pair: PairedModel) -> None:
    with pytest.raises(RuntimeError, match="inside"), pair.routed("hybrid"):
        raise RuntimeError("inside")
    assert not any(r.base_mlp for r in pair.routes)


@pytest.mark.parametrize("route", ["target", "hybrid", "replacement"])
@torch.no_grad()
def test_split_runs_equal_the_full_run(pair: PairedModel, route: str) -> None:
    tokens = random_batch(6, lengths=(8, 8)).tokens
    for mask in (None, LEFT):
        with pair.routed(route):
            full = pair.model(tokens, attention_mask=mask)
            for cut in range(5):
                resid = pair.run_blocks(pair.embed(tokens, mask), 0, cut, mask)
                logits = pair.unembed(pair.run_blocks(resid, cut, 4, mask))
                real = slice(None) if mask is None else mask.bool()
                close(logits[real], full[real], 1e-12)


@torch.no_grad()
def test_left_padding_changes_nothing(pair: PairedModel) -> None:
    tokens = random_batch(6, lengths=(8, 8)).tokens
    with pair.routed("replacement"):
        padded = pair.model(tokens, attention_mask=LEFT)[0, 3:]
        close(padded, pair.model(tokens[:1, 3:])[0], 1e-10)


@torch.no_grad()
def test_fused_attention_equals_stock_attention(hf_models: Models, pair: PairedModel) -> None:
    reference = stock(hf_models[1])
    tokens = random_batch(6, lengths=(8, 8)).tokens
    for mask in (None, LEFT):
        real = slice(None) if mask is None else mask.bool()
        close(pair.model(tokens, attention_mask=mask)[real], reference(tokens, attention_mask=mask)[real], 1e-10)
        fused, cache_fused = pair.model.run_with_cache(
            tokens, attention_mask=mask, names_filter=lambda n: "hook_z" in n
        )
        stocked, cache_stock = reference.run_with_cache(tokens, attention_mask=mask)
        for name, value in cache_fused.items():
            close(value, cache_stock[name], 1e-10)
    # a hook on patterns or scores fires, and its return value is used
    for name in ("hook_pattern", "hook_attn_scores"):
        hooks = [(f"blocks.1.attn.{name}", lambda x, hook: x.flip(-1))]
        close(
            pair.model.run_with_hooks(tokens, fwd_hooks=hooks), reference.run_with_hooks(tokens, fwd_hooks=hooks), 1e-10
        )
        assert (pair.model.run_with_hooks(tokens, fwd_hooks=hooks) - pair.model(tokens)).abs().max() > 1e-3


def test_gradients_through_fused_attention_equal_those_of_stock_attention(hf_models: Models, pair: PairedModel) -> None:
    reference, gradients = stock(hf_models[1]), []
    for model in (pair.model, reference):
        resid = model(TOKENS, stop_at_layer=0).clone().requires_grad_()
        model(resid, start_at_layer=0).square().sum().backward()
        gradients.append(resid.grad)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("route", ["target", "hybrid", "replacement"])
def test_generation_with_a_cache_equals_generation_without(pair: PairedModel, route: str) -> None:
    options = dict(max_new_tokens=12, do_sample=False, stop_at_eos=False, verbose=False)
    with pair.routed(route):
        cached = pair.model.generate(TOKENS, use_past_kv_cache=True, **options)
        plain = pair.model.generate(TOKENS, use_past_kv_cache=False, **options)
    assert cached.tolist() == plain.tolist()


def test_generation_equals_hugging_faces(hf_models: Models, pair: PairedModel) -> None:
    ours = pair.model.generate(TOKENS, max_new_tokens=12, do_sample=False, stop_at_eos=False, verbose=False)
    theirs = hf_models[1].generate(TOKENS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.tolist() == theirs.tolist()


def test_names_and_weight_properties_of_transformer_lens_are_kept(hf_models: Models, pair: PairedModel) -> None:
    reference = stock(hf_models[1])
    ours, theirs = set(pair.model.hook_dict), set(reference.hook_dict)
    assert theirs < ours
    per_layer = ["hook_in", "hook_adapter_out"]
    per_layer += [f"adapter.hook_sae_{x}" for x in ("input", "acts_pre", "acts_post", "recons")]
    assert ours - theirs == {f"blocks.{i}.mlp.{name}" for i in range(4) for name in per_layer}
    for name in ("W_in", "W_gate", "W_out", "W_Q", "W_K", "W_V", "W_O", "W_E", "W_U", "b_in"):
        assert torch.equal(getattr(pair.model, name), getattr(reference, name)), name
    assert set(reference.state_dict()) < set(pair.model.state_dict())


@torch.no_grad()
def test_every_hook_fires_on_every_route(pair: PairedModel) -> None:
    for route, off in (("target", True), ("hybrid", True), ("replacement", False)):
        with pair.routed(route):
            _, cache = pair.model.run_with_cache(TOKENS)
        zeros = cache["blocks.0.mlp.hook_adapter_out"]
        assert zeros.shape == (1, 11, 32)
        assert bool((zeros == 0).all()) is off
        assert {"blocks.3.mlp.hook_pre", "blocks.3.mlp.hook_post", "blocks.3.mlp.hook_in"} <= set(cache)


@torch.no_grad()
def test_a_hook_on_a_feature_changes_the_output_and_leaves_no_trace(pair: PairedModel) -> None:
    def ablate(acts: torch.Tensor, hook: object) -> torch.Tensor:
        acts = acts.clone()
        acts[..., 3] = 0
        return acts

    adapter = pair.mlps[1].adapter
    assert adapter is not None
    with pair.routed("replacement"):
        before = pair.model(TOKENS)
        out = pair.model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.mlp.adapter.hook_sae_acts_post", ablate)])
        assert (out - before).abs().max() > 1e-6
        decoder = adapter.W_dec[3].clone()
        adapter.W_dec[3] = 0
        close(out, pair.model(TOKENS), 1e-12)
        adapter.W_dec[3] = decoder
        close(pair.model(TOKENS), before, 1e-15)


@torch.no_grad()
def test_the_value_at_hook_adapter_out_is_added_on_every_route(pair: PairedModel) -> None:
    with pair.routed("replacement"):
        expected, cache = pair.model.run_with_cache(TOKENS)
    hooks = [
        (f"blocks.{i}.mlp.hook_adapter_out", lambda x, hook, i=i: cache[f"blocks.{i}.mlp.hook_adapter_out"])
        for i in range(4)
    ]
    with pair.routed("hybrid"):
        close(pair.model.run_with_hooks(TOKENS, fwd_hooks=hooks), expected, 1e-12)


@torch.no_grad()
def test_a_deepcopy_is_independent(pair: PairedModel) -> None:
    with pair.routed("replacement"):
        other = copy.deepcopy(pair.model)
        close(other(TOKENS), pair.model(TOKENS), 1e-15)
        other.blocks[0].mlp.adapter.W_dec.zero_()
        assert (other(TOKENS) - pair.model(TOKENS)).abs().max() > 1e-6
        other.add_hook("blocks.0.mlp.hook_post", lambda x, hook: x * 0)
        before = pair.model(TOKENS)
        other(TOKENS)
        close(pair.model(TOKENS), before, 1e-15)
    assert other.hook_dict.keys() == pair.model.hook_dict.keys()


@torch.no_grad()
def test_the_dtype_can_be_changed(pair: PairedModel) -> None:
    with pair.routed("replacement"):
        expected = pair.model(TOKENS)
        pair.model.to(torch.float32, print_details=False)
        close(pair.model(TOKENS).double(), expected, 1e-3)


@torch.no_grad()
def test_float32_adapters_run_in_a_bfloat16_model() -> None:
    pair = PairedModel.from_pretrained(random_model(1), random_model(2), dtype=torch.bfloat16)
    adapters = pair.new_adapters(16)
    assert adapters[0].W_enc.dtype == torch.float32
    with pair.routed("replacement"):
        resid = pair.run_blocks(pair.embed(TOKENS), 0, 4)
        assert resid.dtype == torch.bfloat16
        assert pair.model(TOKENS).isfinite().all()


def test_weights_are_shared_with_the_hugging_face_model(hf_models: Models) -> None:
    base, target = hf_models
    pair = PairedModel.from_pretrained(base, target)
    pointer = lambda t: t.untyped_storage().data_ptr()  # noqa: E731
    layer, block = target.model.layers[2], pair.model.blocks[2]
    assert pointer(block.mlp.W_gate) == pointer(layer.mlp.gate_proj.weight)
    assert pointer(block.attn.W_Q) == pointer(layer.self_attn.q_proj.weight)
    assert pointer(block.mlp.base.W_out) == pointer(base.model.layers[2].mlp.down_proj.weight)
    embedding = pair.model.W_U if target.config.model_type == "gemma2" else pair.model.W_E  # Gemma scales W_E: a copy
    assert pointer(embedding) == pointer(target.model.embed_tokens.weight)
    for mlp in pair.mlps:  # in nn.Linear's layout the stock MLP's .T.contiguous() is no copy
        assert mlp.W_in.T.is_contiguous() and mlp.base.W_in.T.is_contiguous()


def test_only_the_mlps_of_the_base_are_read(hf_models: Models, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tl_adapters.checkpoints.base_mlps as references

    base, target = hf_models
    base.save_pretrained(tmp_path / "base", max_shard_size="20kB")
    target.save_pretrained(tmp_path / "target")
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    read: list[str] = []
    original = references.read_tensors
    monkeypatch.setattr(references, "read_tensors", lambda folder, names: read.extend(names) or original(folder, names))
    pair = randomise(PairedModel.from_pretrained(tmp_path / "base", tmp_path / "target"))
    assert len(read) == 12 and all(".mlp." in name for name in read)
    in_memory = randomise(PairedModel.from_pretrained(base, target))
    for route in ("target", "hybrid", "replacement"):
        with pair.routed(route), in_memory.routed(route), torch.no_grad():
            close(pair.model(TOKENS), in_memory.model(TOKENS), 1e-12)


def test_adapters_read_from_files_compute_the_same(pair: PairedModel, hf_models: Models, tmp_path) -> None:
    assert pair.adapters is not None
    pair.adapters.save_pretrained(tmp_path / "adapters")
    other = PairedModel.from_pretrained(*hf_models)
    other.load_adapters(AdapterSet.from_pretrained(tmp_path / "adapters"))
    with pair.routed("replacement"), other.routed("replacement"), torch.no_grad():
        assert torch.equal(pair.model(TOKENS), other.model(TOKENS))


# -- models and adapters that do not fit ------------------------------------------------------------------------------


def test_adapters_of_another_target_are_refused(pair: PairedModel) -> None:
    other = PairedModel.from_pretrained(random_model(1), random_model(7))
    with pytest.raises(PairMismatchError, match="second norm at layer 0"):
        other.load_adapters(pair.adapters)
    shallow = PairedModel.from_pretrained(random_model(1, num_hidden_layers=2), random_model(2, num_hidden_layers=2))
    with pytest.raises(PairMismatchError, match="4 layers of width 32.*2 of width 32"):
        shallow.load_adapters(pair.adapters)


def test_invalid_routes_are_refused(hf_models: Models) -> None:
    pair = PairedModel.from_pretrained(*hf_models)
    with pytest.raises(PairMismatchError, match="no adapters yet"), pair.routed("replacement"):
        pass
    with pytest.raises(ValueError, match="known routes are target, hybrid"), pair.routed("base"):
        pass
    with pytest.raises(ValueError, match="from 0 to 4"), pair.routed("hybrid", first=5):
        pass


@pytest.mark.parametrize(
    ("option", "value"), [("intermediate_size", 40), ("num_hidden_layers", 3), ("hidden_size", 64)]
)
def test_mlps_of_another_shape_are_refused(option: str, value: int) -> None:
    with pytest.raises(PairMismatchError, match=option):
        PairedModel.from_pretrained(random_model(1, **{option: value}), random_model(2))


@pytest.mark.parametrize(
    ("architecture", "option", "value", "reason"),
    [
        ("Qwen2ForCausalLM", "use_sliding_window", True, "use_sliding_window=True.*Qwen2ForCausalLM"),
        ("Qwen3ForCausalLM", "attention_bias", True, "attention_bias=True.*supported is False"),
        ("LlamaForCausalLM", "mlp_bias", True, "mlp_bias=True"),
        ("Gemma2ForCausalLM", "hidden_activation", "gelu_fast", "activation 'gelu_fast'.*gelu_pytorch_tanh"),
        ("LlamaForCausalLM", "quantization_config", {"quant_method": "fp8"}, "quantized weights.*bfloat16"),
        ("Qwen2ForCausalLM", "architectures", ["MambaForCausalLM"], "MambaForCausalLM.*Qwen2ForCausalLM, Qwen3"),
        ("Qwen2ForCausalLM", "rope_parameters", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, "'yarn'"),
    ],
)
def test_models_that_transformer_lens_cannot_represent_are_refused(
    architecture: str, option: str, value: object, reason: str
) -> None:
    config = random_model(1, architecture=architecture).config
    setattr(config, option, value)
    with pytest.raises(UnsupportedModelError, match=reason):
        tl_config(config, torch.float32, "cpu")


EDITS = {
    "ablated": {},
    "scaled": {"factor": 2.0},
    "clamped": {"value": 0.5},
    "added": {"value": 0.5},
    "patched": {"source": {1: torch.full((1, 11, 16), 0.25, dtype=torch.float64)}},
    "inserted": {"factor": 2.0},
    "negated": {"factor": -1.0},
}


@pytest.mark.parametrize("name", EDITS)
@torch.no_grad()
def test_a_change_of_features_as_a_method_is_the_function_of_that_name(pair: PairedModel, name: str) -> None:
    function, features = getattr(feature_edits, name), [(1, 3), (1, 5)]
    with pair.routed("replacement"):
        plain = pair.model(TOKENS)
        with function(pair, features, **EDITS[name]) as model:
            by_function = model(TOKENS)
        with getattr(pair, name)(features, **EDITS[name]) as model:
            assert model is pair.model and torch.equal(model(TOKENS), by_function)
        assert not torch.equal(by_function, plain) and torch.equal(pair.model(TOKENS), plain)
    of_method = inspect.signature(getattr(PairedModel, name)).parameters
    of_function = inspect.signature(function).parameters
    assert [(p.name, p.default) for p in list(of_method.values())[1:]] == [
        (p.name, p.default) for p in list(of_function.values())[1:]
    ]


def test_the_device_is_that_of_the_weights(pair: PairedModel) -> None:
    assert pair.device == pair.model.W_E.device == torch.device("cpu")
