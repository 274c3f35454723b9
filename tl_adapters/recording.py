"""What a Hugging Face model computes on a few tokens, recorded before TransformerLens reads or changes it.

What a model computes need not be what its configuration and weights say: there are biases set by hand, forward hooks,
replaced forward methods, changed buffers. `record` runs the model as the user gave it, with all of these, and keeps
what goes into and comes out of every decoder layer and MLP; `agreement` compares.

In float32 the comparison finds any change that matters. In bfloat16 and float16 rounding alone moves the output of a
block by one unit in the last place, so what a small change does cannot be told from it; there a model in memory that
has hooks or replaced methods is refused for having them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.architectures import UnsupportedModelError, stock_model
from tl_adapters.checkpoints import PROJECTIONS
from tl_adapters.references import MLPTensors

log = logging.getLogger(__name__)

N_TOKENS = 8


class DisagreementError(UnsupportedModelError):
    """A model of TransformerLens that computes something else than its Hugging Face model; says where and how much."""


@dataclass
class Call:
    """What one module was given and returned in the Hugging Face model, [1, pos, d_model] each."""

    input: Tensor = field(init=False)
    output: Tensor = field(init=False)

    @property
    def was_made(self) -> bool:
        """The module was called at all."""
        return hasattr(self, "output")


@dataclass(frozen=True)
class Recording:
    """What a Hugging Face model computes on a few tokens."""

    tokens: Int[Tensor, "1 pos"]
    blocks: list[Call]
    """Decoder layers."""
    mlps: list[Call]
    base_outputs: list[Tensor] | None
    """What the base's MLPs return for the inputs of ``mlps``; None where there is no base."""
    logits: Float[Tensor, "1 pos d_vocab"]
    rounding: list[Tensor] | None
    """By how much the model's own attention implementations differ, per layer [1, pos]; None in full precision."""
    peculiar: list[str]
    """Hooks, replaced methods and foreign modules that the Hugging Face model has."""


@torch.no_grad()
def record(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: PreTrainedModel | None = None,
    base_mlps: Sequence[MLPTensors] | None = None,
) -> Recording | None:
    """What ``hf_model`` computes on `N_TOKENS` tokens; to be called before TransformerLens changes it.

    Args:
        hf_model: the target, with its hooks and whatever else it has.
        tokenizer: the target's; its special tokens are not among the tokens.
        base: the base where it is a model in memory; its own MLP modules are run.
        base_mlps: the base's MLP weights, which are put into the target's MLP modules where there is no ``base``.

    Returns:
        The recording; None for a model on the meta device, which computes nothing.

    Raises:
        DisagreementError: parameters that its architecture does not have, or numbers that are not finite.
    """
    if next(hf_model.parameters()).is_meta:
        log.info("The target has no values (meta device), so what it computes was not compared.")
        return None
    stock = stock_model(hf_model.config)
    _require_stock_tensors(hf_model, stock)
    peculiar = peculiarities(hf_model, stock)
    _refuse_what_rounding_hides(hf_model, peculiar)
    tokens = _tokens_for(hf_model.config, tokenizer).to(hf_model.device)
    layers = list(hf_model.model.layers)
    with _evaluating(hf_model):
        with _listening(layers) as blocks, _listening([layer.mlp for layer in layers]) as mlps:
            logits = hf_model(input_ids=tokens, use_cache=False).logits
        for layer, call in enumerate([*blocks, *mlps]):
            if not call.was_made:
                raise DisagreementError(f"The target's own forward pass does not run layer {layer % len(layers)}.")
        for layer, call in enumerate(blocks):
            if not bool(call.output.isfinite().all()):
                raise DisagreementError(
                    f"Layer {layer} of the target returns numbers that are not finite in {call.output.dtype}, in "
                    "transformers itself. Load it in float32 or bfloat16; else its weights are damaged."
                )
        rounding = _rounding(hf_model, tokens, blocks) if is_low(logits.dtype) else None
        outputs = None
        if base is not None:
            outputs = outputs_in_memory(base, [mlp.input for mlp in mlps])
        elif base_mlps is not None:
            found = zip(layers, base_mlps, mlps, strict=True)
            outputs = [_with_weights(layer.mlp, weights, call.input) for layer, weights, call in found]
    return Recording(tokens, blocks, mlps, outputs, logits, rounding, peculiar)


def _tokens_for(config: Any, tokenizer: PreTrainedTokenizerBase | None) -> Int[Tensor, "1 pos"]:
    special = {i for key in ("pad", "bos", "eos") for i in _listed(getattr(config, f"{key}_token_id", None))}
    n = config.vocab_size if tokenizer is None else min(config.vocab_size, len(tokenizer))
    return probe_tokens(
        n, config.max_position_embeddings, special | set(tokenizer.all_special_ids if tokenizer else ())
    )


def probe_tokens(n: int, n_ctx: int, special: Collection[int] = ()) -> Int[Tensor, "1 pos"]:
    """Different ids below ``n`` of a fixed draw, none of them ``special``; at most `N_TOKENS`, and ``n_ctx``."""
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    return torch.tensor([[i for i in drawn if i not in special][: min(N_TOKENS, n_ctx)]])


def _listed(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


@torch.no_grad()
def outputs_in_memory(base: PreTrainedModel, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the MLP modules of a base in memory return, its hooks and whatever else it has included."""
    peculiar = [what for what in peculiarities(base, stock_model(base.config)) if ".mlp" in what]
    _refuse_what_rounding_hides(base, peculiar)
    outputs = []
    with _evaluating(base):
        for layer, x in zip(base.model.layers, inputs, strict=True):
            like = layer.mlp.gate_proj.weight
            outputs.append(first_of(layer.mlp(x.to(like.device, like.dtype))).to(x.device))
    return outputs


def _with_weights(mlp: nn.Module, weights: MLPTensors, x: Tensor) -> Tensor:
    """The output of a Hugging Face MLP module with other weights; the module keeps its own."""
    swapped = {f"{name}.weight": weights[name].to(x.device, x.dtype) for name in PROJECTIONS}
    return first_of(torch.func.functional_call(mlp, swapped, (x,)))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout for the length of a block; afterwards every module is in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _listening(modules: Sequence[nn.Module]) -> Iterator[list[Call]]:
    """The last call of each module, with all that other hooks do to its input and output counted in."""
    calls = [Call() for _ in modules]

    def before(module: nn.Module, args: Any, kwargs: Any, call: Call) -> None:
        call.input = (args[0] if args else kwargs["hidden_states"]).detach().clone()

    def after(module: nn.Module, args: Any, output: Any, call: Call) -> None:
        call.output = first_of(output).detach().clone()

    handles = []
    for module, call in zip(modules, calls, strict=True):
        first = functools.partial(before, call=call)
        handles.append(module.register_forward_pre_hook(first, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(functools.partial(after, call=call)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def first_of(output: Any) -> Tensor:
    """The hidden states in what a module returned."""
    return output[0] if isinstance(output, tuple) else output


def _rounding(hf_model: PreTrainedModel, tokens: Tensor, blocks: Sequence[Call]) -> list[Tensor] | None:
    """How far each layer's output moves, relative to what it adds, between fused and eager attention of transformers.

    A model with large query or key biases has scores whose rounding in bfloat16 is felt; how much, only it can tell.
    Each layer gets the input recorded in ``blocks``, so the differences are those of single layers.
    """
    own = hf_model.config._attn_implementation
    if own == "eager":
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
        with _listening(layers) as eager:
            hf_model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        hf_model.set_attn_implementation(own)
    return [
        norm(other.output - call.output) / norm(call.output - call.input)
        for other, call in zip(eager, blocks, strict=True)
    ]


# -- what a model in memory has besides its architecture ----------------------------------------------------------


def _require_stock_tensors(hf_model: PreTrainedModel, stock: PreTrainedModel) -> None:
    """Raises DisagreementError for parameters and buffers that a model of its configuration does not have."""
    names = set(stock.state_dict())
    # What is parametrized has its weight all the same, computed, and under that name both libraries read it.
    extra = [name for name in hf_model.state_dict() if name not in names and ".parametrizations." not in name]
    if extra:
        raise DisagreementError(
            f"The model in memory has {extra[0]}"
            + (f" and {len(extra) - 1} more tensors" if len(extra) > 1 else "")
            + f", which a {hf_model.config.architectures[0]} of its configuration does not have: TransformerLens would "
            "leave it out. Give a model without it."
        )


def peculiarities(hf_model: PreTrainedModel, stock: PreTrainedModel) -> list[str]:
    """Forward hooks, replaced forward methods and foreign modules of a model that ``stock`` lacks, one phrase each.

    Hooks of transformers and accelerate, which record outputs and place tensors, do not count.
    """
    expected = {name: type(module) for name, module in stock.named_modules()}
    found = []
    for name, module in hf_model.named_modules():
        where, cls = name or "the model", type(module)
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(_source(hook) not in ("transformers", "accelerate", "torch") for hook in hooks):
            found.append(f"{where} has a forward hook")
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            found.append(f"the forward method of {where} was replaced")
        if cls is not expected.get(name, cls) and not cls.__name__.startswith("Parametrized"):
            found.append(f"{where} is a {cls.__name__}")
    return found


def _source(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None) or "").partition(".")[0]


def _refuse_what_rounding_hides(hf_model: PreTrainedModel, peculiar: Sequence[str]) -> None:
    dtype = next(hf_model.parameters()).dtype
    if peculiar and is_low(dtype):
        raise DisagreementError(
            f"The model in memory is not as its class makes it: {'; '.join(peculiar[:3])}. TransformerLens may leave "
            f"that out, and in {named(dtype)} a small effect cannot be told from rounding. Remove it, or load the "
            "model in float32, where the two are compared."
        )


def is_low(dtype: torch.dtype) -> bool:
    """The dtype has fewer digits than float32."""
    return dtype in (torch.float16, torch.bfloat16)


def norm(x: Tensor) -> Tensor:
    """[..., d] to [...], in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=-1)


def named(dtype: torch.dtype) -> str:
    """ "bfloat16" and the like."""
    return str(dtype).removeprefix("torch.")
