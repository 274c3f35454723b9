"""What a Hugging Face model computes on a few tokens, recorded before TransformerLens reads or changes it.

What a model in memory computes need not be what its configuration and weights say: there are biases set by hand,
forward hooks, replaced forward methods, LoRA. So `record_hf_outputs` runs it as the user gave it, and then its own
class with its weights, and refuses it where the two differ. They are the same code in the same dtype: in float32 they
agree to rounding, and in bfloat16 and float16, where rounding would hide a small effect, to the last bit.

The hf_outputs keeps what goes into and comes out of every decoder layer and MLP, for `agreement` to give to the model
that TransformerLens makes.
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
from tl_adapters.checkpoints.model_checks import stock_model
from tl_adapters.checkpoints.model_files import PROJECTIONS
from tl_adapters.models.output_comparison import DisagreementError, compare, is_low, named, norm

log = logging.getLogger(__name__)

N_PROBE_TOKENS = 8


@dataclass
class ModuleCall:
    """What one module was given and returned in the Hugging Face model, [1, pos, d_model] each."""

    input: Tensor = field(init=False)
    output: Tensor = field(init=False)

    @property
    def was_made(self) -> bool:
        """The module was called at all."""
        return hasattr(self, "output")


class ForwardPass(NamedTuple):
    """One forward pass."""

    blocks: list[ModuleCall]
    """Of the decoder layers."""
    mlps: list[ModuleCall]
    logits: Float[Tensor, "1 pos d_vocab"]


@dataclass(frozen=True)
class HFOutputs:
    """What a Hugging Face model computes on a few tokens."""

    tokens: Int[Tensor, "1 pos"]
    target: ForwardPass
    base_mlp_outputs: list[Tensor] | None
    """What the base's MLPs return for the inputs of the target's; None where there is no base."""
    attention_rounding: list[Tensor] | None
    """By how much the model's own attention implementations differ, per layer [1, pos]; None in full precision."""


@torch.no_grad()
def record_hf_outputs(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: PreTrainedModel | None = None,
    base_mlps: Sequence[MLPTensors] | None = None,
) -> HFOutputs | None:
    """What ``hf_model`` computes on `N_PROBE_TOKENS` tokens; to be called before TransformerLens changes it.

    Args:
        hf_model: the target, with its hooks and whatever else it has.
        tokenizer: the target's; its special tokens are not among the tokens.
        base: the base where it is a model in memory; its own MLP modules are run.
        base_mlps: the base's MLP weights, which are put into the target's MLP modules where there is no ``base``.

    Returns:
        The hf_outputs; None for a model on the meta device, which computes nothing.

    Raises:
        DisagreementError: a model that computes something else than its class with its weights, or numbers that are
            not finite.
    """
    if next(hf_model.parameters()).is_meta:
        log.info("The target has no values (meta device), so what it computes was not compared.")
        return None
    stock = stock_model(hf_model.config).eval()
    state = _state_of(hf_model, stock)
    tokens = _tokens_for(hf_model.config, tokenizer).to(hf_model.device)
    layers = list(hf_model.model.layers)
    with _evaluating(hf_model):
        own = _run(layers, lambda: hf_model(input_ids=tokens, use_cache=False))
        _require_finite(own)
        options = {"input_ids": tokens, "use_cache": False}
        by_class = _run(list(stock.model.layers), lambda: functional_call(stock, state, (), options))
        _require_stock_pass(own, by_class, peculiarities(hf_model, stock), type(stock).__name__)
        rounding = _rounding(hf_model, tokens, own.blocks) if is_low(own.logits.dtype) else None
        outputs = None
        if base is not None:
            outputs = mlp_outputs_in_memory(base, [mlp.input for mlp in own.mlps])
        elif base_mlps is not None:
            found = zip(layers, base_mlps, own.mlps, strict=True)
            outputs = [_with_weights(layer.mlp, weights, call.input) for layer, weights, call in found]
    return HFOutputs(tokens, own, outputs, rounding)


def _run(layers: Sequence[nn.Module], forward: Callable[[], Any]) -> ForwardPass:
    with _listening(layers) as blocks, _listening([layer.get_submodule("mlp") for layer in layers]) as mlps:
        logits = forward().logits
    return ForwardPass(blocks, mlps, logits)


def _require_finite(run: ForwardPass) -> None:
    n = len(run.blocks)
    for layer, call in enumerate([*run.blocks, *run.mlps]):
        if not call.was_made:
            raise DisagreementError(f"The target's own forward pass does not run layer {layer % n}.")
    for layer, call in enumerate(run.blocks):
        if not bool(call.output.isfinite().all()):
            raise DisagreementError(
                f"Layer {layer} of the target returns numbers that are not finite in {named(call.output.dtype)}, in "
                "transformers itself. Load it in float32 or bfloat16; else its weights are damaged."
            )


def _tokens_for(config: Any, tokenizer: PreTrainedTokenizerBase | None) -> Int[Tensor, "1 pos"]:
    special = {i for key in ("pad", "bos", "eos") for i in _listed(getattr(config, f"{key}_token_id", None))}
    n = config.vocab_size if tokenizer is None else min(config.vocab_size, len(tokenizer))
    return probe_tokens(
        n, config.max_position_embeddings, special | set(tokenizer.all_special_ids if tokenizer else ())
    )


def probe_tokens(n: int, n_ctx: int, special: Collection[int] = ()) -> Int[Tensor, "1 pos"]:
    """Different ids below ``n`` of a fixed draw, none of them ``special``; at most `N_PROBE_TOKENS`, and ``n_ctx``."""
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    return torch.tensor([[i for i in drawn if i not in special][: min(N_PROBE_TOKENS, n_ctx)]])


def _listed(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


@torch.no_grad()
def mlp_outputs_in_memory(base: PreTrainedModel, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the MLPs of a base in memory return for ``inputs``, one per layer.

    Raises:
        DisagreementError: MLPs that compute something else than their class with their weights.
    """
    stock = stock_model(base.config).eval()
    outputs = []
    with _evaluating(base):
        peculiar = [what for what in peculiarities(base, stock) if ".mlp" in what]
        for number, (layer, x) in enumerate(zip(base.model.layers, inputs, strict=True)):
            weights = {name: layer.mlp.get_submodule(name).weight for name in PROJECTIONS}
            given = x.to(weights["gate_proj"].device, weights["gate_proj"].dtype)
            own = hidden_states(layer.mlp(given))
            by_class = _with_weights(stock.model.layers[number].mlp, weights, given)
            what = f"The MLP of layer {number} of the base"
            _compare_to_class(what, by_class, own, peculiar, type(stock).__name__)
            outputs.append(own.to(x.device))
    return outputs


def _with_weights(mlp: nn.Module, weights: MLPTensors, x: Tensor) -> Tensor:
    """The output of a Hugging Face MLP module with other weights; the module keeps its own."""
    swapped = {f"{name}.weight": weights[name].to(x.device, x.dtype) for name in PROJECTIONS}
    return hidden_states(functional_call(mlp, swapped, (x,)))


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
def _listening(modules: Sequence[nn.Module]) -> Iterator[list[ModuleCall]]:
    """The last call of each module, with all that other hooks do to its input and output counted in."""
    calls = [ModuleCall() for _ in modules]

    def before(module: nn.Module, args: Any, kwargs: Any, call: ModuleCall) -> None:
        call.input = (args[0] if args else kwargs["hidden_states"]).detach().clone()

    def after(module: nn.Module, args: Any, output: Any, call: ModuleCall) -> None:
        call.output = hidden_states(output).detach().clone()

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


def hidden_states(output: Any) -> Tensor:
    """The hidden states in what a module returned."""
    return output[0] if isinstance(output, tuple) else output


def _rounding(hf_model: PreTrainedModel, tokens: Tensor, blocks: Sequence[ModuleCall]) -> list[Tensor] | None:
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


def _state_of(hf_model: PreTrainedModel, stock: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and buffers of ``hf_model`` that ``stock`` has too. Raises DisagreementError for others."""
    names = [name for name, _ in (*stock.named_parameters(remove_duplicate=False), *stock.named_buffers())]
    # What is parametrized has its weight all the same, computed, and under that name both libraries read it.
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


def _require_stock_pass(own: ForwardPass, by_class: ForwardPass, peculiar: Sequence[str], name: str) -> None:
    """Raises DisagreementError at the first place where a model differs from its class with its weights."""
    compare = functools.partial(_compare_to_class, peculiar=peculiar, name=name)
    compare("The embedding of the target", by_class.blocks[0].input, own.blocks[0].input)
    for layer, (ours, theirs) in enumerate(zip(own.blocks, by_class.blocks, strict=True)):
        mlp, stock_mlp = own.mlps[layer], by_class.mlps[layer]
        if torch.equal(mlp.input, stock_mlp.input):
            compare(f"The MLP of layer {layer} of the target", stock_mlp.output, mlp.output)
        compare(f"Layer {layer} of the target", theirs.output, ours.output, given=theirs.input)
    compare("The unembedding of the target", by_class.logits, own.logits)


def _compare_to_class(
    what: str, theirs: Tensor, ours: Tensor, peculiar: Sequence[str], name: str, given: Tensor | None = None
) -> None:
    compare(
        what,
        theirs,
        ours,
        given=given,
        times=0.1,
        # Without hooks and the like there is nothing that rounding could hide.
        exact=bool(peculiar) and is_low(theirs.dtype),
        where=("in the model in memory", f"a stock {name} with its weights"),
        peculiar=peculiar,
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
