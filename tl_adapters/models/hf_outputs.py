"""What the Hugging Face models of a pair compute on a few tokens, recorded before TransformerLens changes them.

What a model in memory computes may differ from what its configuration and weights say: it may have biases set by hand,
forward hooks, replaced forward methods, LoRA. So `record_hf_outputs` runs the model as the user gave it, then runs the
stock model of its class with its weights, and raises an error where the two differ. Both are the same code in the same
dtype: in float32 they agree to rounding, and in bfloat16 and float16, where rounding would hide a small effect, to the
last bit.

`HFOutputs` holds the inputs and outputs of every decoder layer and MLP. `output_agreement` gives these inputs to the
TransformerLens model.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.checkpoints.base_mlps import MLPTensors
from tl_adapters.checkpoints.layer_samples import dtype_name
from tl_adapters.checkpoints.model_checks import stock_model
from tl_adapters.checkpoints.model_files import PROJECTIONS
from tl_adapters.checkpoints.offloaded_weights import execution_device, is_dispatched
from tl_adapters.models.output_comparison import DisagreementError, compare, is_low_precision, position_norms

log = logging.getLogger(__name__)

N_PROBE_TOKENS = 8
"""The number of tokens on which outputs are compared."""


@dataclass
class ModuleCall:
    """The input and the output of one module in a forward pass of a Hugging Face model."""

    input: Tensor = field(init=False)
    """[1, pos, d_model]"""
    output: Tensor = field(init=False)
    """[1, pos, d_model]"""

    @property
    def was_made(self) -> bool:
        """Whether the pass called the module at all."""
        return hasattr(self, "output")


class ForwardPass(NamedTuple):
    """The calls of decoder layers and MLPs in one forward pass, and its logits."""

    blocks: list[ModuleCall]
    """One call per decoder layer."""
    mlps: list[ModuleCall]
    """One call per MLP."""
    logits: Float[Tensor, "1 pos d_vocab"]
    """The model's output."""


@dataclass(frozen=True)
class HFOutputs:
    """What the Hugging Face models of a pair compute on a few tokens."""

    tokens: Int[Tensor, "1 pos"]
    """The token ids."""
    target: ForwardPass
    """The target's forward pass on them."""
    base_mlp_outputs: list[Tensor] | None
    """The base's MLP outputs for the inputs of the target's MLPs, [1, pos, d_model] per layer; None without a base."""
    attention_rounding: list[Tensor] | None
    """The relative difference between the target's attention implementations, [1, pos] per layer; None in full
    precision."""

    @property
    def probe(self) -> tuple[Tensor, Tensor]:
        """The token ids and the target's logits, on the CPU."""
        return self.tokens.cpu(), self.target.logits.cpu()


@torch.no_grad()
def record_hf_outputs(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: PreTrainedModel | None = None,
    base_mlps: Sequence[MLPTensors] | None = None,
) -> HFOutputs | None:
    """The outputs of a target, and of its base's MLPs, on `N_PROBE_TOKENS` tokens.

    Call this before TransformerLens changes the model. A model that Accelerate has distributed over devices is not
    compared with the stock model of its class, which would have to hold all its weights: transformers has just made it
    from its files.

    Args:
        hf_model: the target, with its hooks and all other modifications.
        tokenizer: the target's; its special tokens are left out of the tokens.
        base: the base, where it is a model in memory; its own MLP modules are run.
        base_mlps: the base's MLP weights. Without ``base`` they are run in the target's MLP modules.

    Returns:
        The outputs; None for a model on the meta device, which computes nothing.

    Raises:
        DisagreementError: a model whose outputs differ from those of its class with its weights, or are not finite.
    """
    dispatched = is_dispatched(hf_model)
    if next(hf_model.parameters()).is_meta and not dispatched:
        log.info("The target has no values (meta device), so its outputs were not compared.")
        return None
    stock = stock_model(hf_model.config).eval()
    tokens = _tokens_for(hf_model.config, tokenizer).to(execution_device(hf_model.get_input_embeddings()))
    layers = list(hf_model.model.layers)
    with _evaluating(hf_model):
        target = _run(layers, lambda: hf_model(input_ids=tokens, use_cache=False))
        _require_finite(target)
        if not dispatched:
            _require_stock(hf_model, stock, tokens, target)
        rounding = (
            _attention_rounding(hf_model, tokens, target.blocks) if is_low_precision(target.logits.dtype) else None
        )
        base_outputs = None
        if base is not None:
            base_outputs = mlp_outputs_in_memory(base, [mlp.input for mlp in target.mlps])
        elif base_mlps is not None:
            # Accelerate gives the modules of a model that it has distributed their own weights at every call.
            modules = stock.model.layers if dispatched else layers
            per_layer = zip(modules, base_mlps, target.mlps, strict=True)
            base_outputs = [_with_weights(layer.mlp, weights, call.input) for layer, weights, call in per_layer]
    return HFOutputs(tokens, target, base_outputs, rounding)


def _require_stock(hf_model: PreTrainedModel, stock: PreTrainedModel, tokens: Tensor, target: ForwardPass) -> None:
    """Raises DisagreementError where the model's pass differs from that of its class with its weights."""
    state, options = _state_of(hf_model, stock), {"input_ids": tokens, "use_cache": False}
    expected = _run(list(stock.model.layers), lambda: functional_call(stock, state, (), options))
    _require_stock_pass(target, expected, list_modifications(hf_model, stock), type(stock).__name__)


def _run(layers: Sequence[nn.Module], forward: Callable[[], Any]) -> ForwardPass:
    with _recorded_calls(layers) as blocks, _recorded_calls([layer.get_submodule("mlp") for layer in layers]) as mlps:
        logits = forward().logits
    return ForwardPass(blocks, mlps, logits)


def _require_finite(target: ForwardPass) -> None:
    for calls in (target.blocks, target.mlps):
        for layer, call in enumerate(calls):
            if not call.was_made:
                raise DisagreementError(f"The target's own forward pass does not run layer {layer}.")
    for layer, call in enumerate(target.blocks):
        if not bool(call.output.isfinite().all()):
            raise DisagreementError(
                f"Layer {layer} of the target returns numbers that are not finite in {dtype_name(call.output.dtype)}, "
                "in transformers itself. Load it in float32 or bfloat16; if they are still not finite, its weights are "
                "damaged."
            )


def _tokens_for(config: Any, tokenizer: PreTrainedTokenizerBase | None) -> Int[Tensor, "1 pos"]:
    special = {i for key in ("pad", "bos", "eos") for i in _as_list(getattr(config, f"{key}_token_id", None))}
    special |= set(tokenizer.all_special_ids if tokenizer else ())
    n_ids = config.vocab_size if tokenizer is None else min(config.vocab_size, len(tokenizer))
    return probe_tokens(n_ids, config.max_position_embeddings, special)


def probe_tokens(n_ids: int, n_ctx: int, special: Collection[int] = ()) -> Int[Tensor, "1 pos"]:
    """Different token ids below ``n_ids``, none of them ``special``, in an order that is always the same.

    There are `N_PROBE_TOKENS` of them, or fewer where the vocabulary or the context ``n_ctx`` is smaller.
    """
    shuffled = torch.randperm(n_ids, generator=torch.Generator().manual_seed(0)).tolist()
    return torch.tensor([[i for i in shuffled if i not in special][: min(N_PROBE_TOKENS, n_ctx)]])


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


@torch.no_grad()
def mlp_outputs_in_memory(base: PreTrainedModel, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of the MLPs of a base in memory for ``inputs``, one per layer, [1, pos, d_model] each.

    Raises:
        DisagreementError: MLPs whose outputs differ from those of their class with their weights.
    """
    stock = stock_model(base.config).eval()
    outputs = []
    with _evaluating(base):
        modifications = [text for text in list_modifications(base, stock) if ".mlp" in text]
        for layer, (block, x) in enumerate(zip(base.model.layers, inputs, strict=True)):
            weights = {name: block.mlp.get_submodule(name).weight for name in PROJECTIONS}
            mlp_input = x.to(weights["gate_proj"].device, weights["gate_proj"].dtype)
            output = hidden_states(block.mlp(mlp_input))
            expected = _with_weights(stock.model.layers[layer].mlp, weights, mlp_input)
            subject = f"The MLP of layer {layer} of the base"
            _compare_to_class(subject, expected, output, modifications, type(stock).__name__)
            outputs.append(output.to(x.device))
    return outputs


def _with_weights(mlp: nn.Module, weights: MLPTensors, x: Tensor) -> Tensor:
    """The output of a Hugging Face MLP module with other weights; the module keeps its own."""
    state = {f"{name}.weight": weights[name].to(x.device, x.dtype) for name in PROJECTIONS}
    return hidden_states(functional_call(mlp, state, (x,)))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """For the length of a block, no dropout; afterwards every module is in the mode that it had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _recorded_calls(modules: Sequence[nn.Module]) -> Iterator[list[ModuleCall]]:
    """The last call of each module in the block, including what other hooks do to its input and output."""
    calls = [ModuleCall() for _ in modules]

    def before(module: nn.Module, args: Any, kwargs: Any, call: ModuleCall) -> None:
        call.input = (args[0] if args else kwargs["hidden_states"]).detach().clone()

    def after(module: nn.Module, args: Any, output: Any, call: ModuleCall) -> None:
        call.output = hidden_states(output).detach().clone()

    handles = []
    for module, call in zip(modules, calls, strict=True):
        pre_hook = functools.partial(before, call=call)
        handles.append(module.register_forward_pre_hook(pre_hook, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(functools.partial(after, call=call)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def hidden_states(output: Any) -> Tensor:
    """The hidden states in the output of a Hugging Face module, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _attention_rounding(hf_model: PreTrainedModel, tokens: Tensor, blocks: Sequence[ModuleCall]) -> list[Tensor] | None:
    """The difference of each layer's output between transformers' fused and eager attention, [1, pos] per layer.

    It is relative to what the layer adds to the residual stream; None where the model's own attention is eager. In a
    model with large query or key biases the rounding of scores in bfloat16 is noticeable, and its size can only be
    measured. Each layer gets the input recorded in ``blocks``, so the differences are those of single layers.
    """
    implementation = hf_model.config._attn_implementation
    if implementation == "eager":
        return None

    def feed(module: nn.Module, args: Any, kwargs: Any, x: Tensor) -> Any:
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    layers = list(hf_model.model.layers)
    handles = [
        layer.register_forward_pre_hook(functools.partial(feed, x=call.input), with_kwargs=True, prepend=True)
        for layer, call in zip(layers, blocks, strict=True)
    ]
    try:
        hf_model.set_attn_implementation("eager")
        with _recorded_calls(layers) as eager:
            hf_model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        hf_model.set_attn_implementation(implementation)
    return [
        position_norms(other.output - call.output) / position_norms(call.output - call.input)
        for other, call in zip(eager, blocks, strict=True)
    ]


# -- comparison of a model in memory with the stock model of its class --------------------------------------------


def _state_of(hf_model: PreTrainedModel, stock: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and buffers of ``hf_model``, by name. Raises DisagreementError where ``stock`` has others."""
    names = [name for name, _ in (*stock.named_parameters(remove_duplicate=False), *stock.named_buffers())]
    # A parametrized module still has its weight, which is computed, and both libraries read it under that name.
    known = {*names, *stock.state_dict()}
    extra = [name for name in hf_model.state_dict() if name not in known and ".parametrizations." not in name]
    if extra:
        raise DisagreementError(
            f"The model in memory has {extra[0]}"
            + (f" and {len(extra) - 1} more tensors" if len(extra) > 1 else "")
            + f", which a {type(stock).__name__} of its configuration does not have: TransformerLens would leave it "
            "out. Give a model without it."
        )
    state = {}
    for name in names:
        module, _, tensor = name.rpartition(".")
        try:
            state[name] = getattr(hf_model.get_submodule(module), tensor)
        except AttributeError as error:
            raise DisagreementError(f"The model in memory lacks {name} of a {type(stock).__name__}.") from error
    return state


def _require_stock_pass(
    target: ForwardPass, expected: ForwardPass, modifications: Sequence[str], class_name: str
) -> None:
    """Raises DisagreementError at the first part in which a model differs from its class with its weights."""
    compare_part = functools.partial(_compare_to_class, modifications=modifications, class_name=class_name)
    compare_part("The embedding of the target", expected.blocks[0].input, target.blocks[0].input)
    for layer, (block, stock_block) in enumerate(zip(target.blocks, expected.blocks, strict=True)):
        mlp, stock_mlp = target.mlps[layer], expected.mlps[layer]
        if torch.equal(mlp.input, stock_mlp.input):
            compare_part(f"The MLP of layer {layer} of the target", stock_mlp.output, mlp.output)
        compare_part(f"Layer {layer} of the target", stock_block.output, block.output, residual=stock_block.input)
    compare_part("The unembedding of the target", expected.logits, target.logits)


def _compare_to_class(
    subject: str,
    expected: Tensor,
    actual: Tensor,
    modifications: Sequence[str],
    class_name: str,
    residual: Tensor | None = None,
) -> None:
    compare(
        subject,
        expected,
        actual,
        residual=residual,
        tolerance_factor=0.1,
        # Rounding can only hide an effect where the model has modifications.
        exact=bool(modifications) and is_low_precision(expected.dtype),
        computed_by=("in the model in memory", f"a stock {class_name} with its weights"),
        modifications=modifications,
    )


def list_modifications(hf_model: PreTrainedModel, stock: PreTrainedModel) -> list[str]:
    """Forward hooks, replaced forward methods and modules of other classes that ``stock`` lacks, one phrase each.

    Hooks of transformers and accelerate, which record outputs and move tensors, do not count.
    """
    expected = {name: type(module) for name, module in stock.named_modules()}
    modifications = []
    for name, module in hf_model.named_modules():
        where, cls = name or "the model", type(module)
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(_package_of(hook) not in ("transformers", "accelerate", "torch") for hook in hooks):
            modifications.append(f"{where} has a forward hook")
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            modifications.append(f"the forward method of {where} was replaced")
        if cls is not expected.get(name, cls) and not cls.__name__.startswith("Parametrized"):
            modifications.append(f"{where} is a {cls.__name__}")
    return modifications


def _package_of(hook: Any) -> str:
    """The top-level package that defines a hook's function."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None) or "").partition(".")[0]
