"""Does a model of TransformerLens compute what the Hugging Face model that it was made of computes?

What a model computes need not be what its configuration and weights say: there are biases set by hand, forward hooks,
replaced forward methods, changed buffers. And a release of either library may change what the other does. So
`record` runs the Hugging Face model on a few tokens before TransformerLens reads or changes it, and
`require_agreement` gives every block of the new model the very same inputs. Errors do not add up that way, and the
first layer that differs is named. `require_hybrid` does the same for the target with the base's MLP modules, and
`require_cache` compares greedy tokens made with the key-value cache to logits computed without it.

Tolerances are relative: to the norm of the output, per position. In float32 and float64 they are far above rounding
and far below any change of the model. In bfloat16 and float16 rounding alone moves the output of a block by one unit
in the last place, so what a small change does cannot be told from it; there a model in memory with hooks or replaced
methods is refused for having them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.architectures import UnsupportedModelError, stock_model
from tl_adapters.checkpoints import PROJECTIONS
from tl_adapters.references import MLPTensors
from tl_adapters.routing import Backend, RoutedMLP

log = logging.getLogger(__name__)

N_TOKENS = 8
NEW_TOKENS = 5
"""Greedy tokens that are made with the key-value cache."""
WHOLE = 4.0
"""A pass through the whole model may be off by so many times what one block may be."""


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


# -- recording ----------------------------------------------------------------------------------------------------


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
    _require_stock_tensors(hf_model)
    peculiar = peculiarities(hf_model)
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
        rounding = _rounding(hf_model, tokens, blocks) if _is_low(logits.dtype) else None
    outputs = None
    if base is not None:
        outputs = outputs_in_memory(base, [mlp.input for mlp in mlps])
    elif base_mlps is not None:
        with _evaluating(hf_model):
            outputs = [
                _with_weights(layer.mlp, weights, mlp.input)
                for layer, weights, mlp in zip(layers, base_mlps, mlps, strict=True)
            ]
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
    outputs = []
    with _evaluating(base):
        for layer, x in zip(base.model.layers, inputs, strict=True):
            like = layer.mlp.gate_proj.weight
            outputs.append(_first(layer.mlp(x.to(like.device, like.dtype))).to(x.device))
    return outputs


def _with_weights(mlp: nn.Module, weights: MLPTensors, x: Tensor) -> Tensor:
    """The output of a Hugging Face MLP module with other weights; the module keeps its own."""
    swapped = {f"{name}.weight": weights[name].to(x.device, x.dtype) for name in PROJECTIONS}
    return _first(torch.func.functional_call(mlp, swapped, (x,)))


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
        call.output = _first(output).detach().clone()

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


def _first(output: Any) -> Tensor:
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
            hf_model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
        hf_model.set_attn_implementation(own)
    return [
        _norm(other.output - call.output) / _norm(call.output - call.input)
        for other, call in zip(eager, blocks, strict=True)
    ]


# -- what a model in memory has besides its architecture ----------------------------------------------------------


def _require_stock_tensors(hf_model: PreTrainedModel) -> None:
    """Raises DisagreementError for parameters and buffers that a model of its configuration does not have."""
    stock = set(stock_model(hf_model.config).state_dict())
    extra = [name for name in hf_model.state_dict() if name not in stock and ".parametrizations." not in name]
    if extra:
        raise DisagreementError(
            f"The model in memory has {extra[0]}"
            + (f" and {len(extra) - 1} more tensors" if len(extra) > 1 else "")
            + f", which a {hf_model.config.architectures[0]} of its configuration does not have: TransformerLens would "
            "leave it out. Give a model without it."
        )


def peculiarities(hf_model: PreTrainedModel) -> list[str]:
    """Forward hooks, replaced forward methods and foreign modules of a model, one phrase each.

    Hooks of transformers and accelerate, which record outputs and place tensors, do not count.
    """
    stock = dict(stock_model(hf_model.config).named_modules())
    found = []
    for name, module in hf_model.named_modules():
        where, cls = name or "the model", type(module)
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(_source(hook) not in ("transformers", "accelerate", "torch") for hook in hooks):
            found.append(f"{where} has a forward hook")
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            found.append(f"the forward method of {where} was replaced")
        if name in stock and cls is not type(stock[name]) and not cls.__name__.startswith("Parametrized"):
            found.append(f"{where} is a {cls.__name__}")
    return found


def _source(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None) or "").partition(".")[0]


def _refuse_what_rounding_hides(hf_model: PreTrainedModel, peculiar: Sequence[str]) -> None:
    dtype = next(hf_model.parameters()).dtype
    if peculiar and _is_low(dtype):
        raise DisagreementError(
            f"The model in memory is not as its class makes it: {'; '.join(peculiar[:3])}. TransformerLens may leave "
            f"that out, and in {_named(dtype)} a small effect cannot be told from rounding. Remove it, or load the "
            "model in float32, where the two are compared."
        )


# -- comparing ----------------------------------------------------------------------------------------------------


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """What one block may be off by, relative to the norm of its output at a position.

    In low precision eight units in the last place (measured on random models: one for a block, a tenth for an MLP).
    In full precision 1e-4 (measured: 1e-6), unless torch was told to multiply float32 matrices in less.
    """
    if _is_low(dtype):
        return 8 * torch.finfo(dtype).eps
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" and device.type != "cpu":
        return 8 * torch.finfo(torch.bfloat16).eps
    return 1e-4


@torch.no_grad()
def require_agreement(backend: Backend, recording: Recording | None) -> None:
    """Give every part of the model what its Hugging Face model was given, and compare what comes out.

    The embedding, then MLP and block of each layer, the final norm with the unembedding, all of it together, and a few
    greedy tokens (`require_cache`). Before or after a pair was made of the model, on the route "target".

    Raises:
        DisagreementError: names the first layer that differs, with both numbers.
    """
    if recording is None:
        return
    model, tokens, blocks = backend.model, recording.tokens, recording.blocks
    compare = functools.partial(_compare, peculiar=recording.peculiar)
    compare("The embedding of the target", blocks[0].input, backend.embed(tokens))
    for layer, (block, mlp) in enumerate(zip(blocks, recording.mlps, strict=True)):
        compare(f"The MLP of layer {layer} of the target", mlp.output, _first(model.blocks[layer].mlp(mlp.input)))
        compare(
            f"Layer {layer} of the target (attention, norms or sums: its MLP agrees)",
            block.output,
            backend.run_blocks(block.input, layer, layer + 1),
            given=block.input,
            rounding=None if recording.rounding is None else recording.rounding[layer],
        )
    compare("The unembedding of the target", recording.logits, backend.unembed(blocks[-1].output))
    composed = backend.unembed(backend.run_blocks(backend.embed(tokens), 0, len(blocks)))
    compare("The target as a whole (its parts agree)", composed, model(tokens), times=WHOLE)
    require_cache(model, tokens)


@torch.no_grad()
def require_hybrid(mlps: Sequence[RoutedMLP], recording: Recording | None) -> None:
    """Compare the base's MLPs in a pair, and both models' weights as other code reads them, with Hugging Face's MLPs.

    Raises:
        DisagreementError: names the first layer that differs, with both numbers.
    """
    if recording is None or recording.base_outputs is None:
        return
    for layer, (mlp, call, output) in enumerate(zip(mlps, recording.mlps, recording.base_outputs, strict=True)):
        assert mlp.base is not None
        _compare(f"The MLP of layer {layer} of the base", output, mlp.base(call.input))
        require_base_weights(mlp, layer, call.input, output)
        of_target, _ = mlp.weights()
        ours = of_target.neurons(call.input) @ of_target.W_out
        _compare(f"The MLP of layer {layer} of the target", call.output, ours, peculiar=recording.peculiar)


def require_base_weights(mlp: RoutedMLP, layer: int, x: Tensor, output: Tensor) -> None:
    """Raises DisagreementError where the base's weights in a pair do not make ``output`` of ``x``."""
    _, weights = mlp.weights()
    _compare(f"The MLP of layer {layer} of the base", output, weights.neurons(x) @ weights.W_out)


def _compare(
    what: str,
    theirs: Tensor,
    ours: Tensor,
    *,
    given: Tensor | None = None,
    rounding: Tensor | None = None,
    times: float = 1.0,
    peculiar: Sequence[str] = (),
) -> None:
    """Raises DisagreementError where ``ours`` differs from ``theirs`` at some position by more than the tolerance.

    Args:
        what: subject of the message.
        given: the residual stream that went in, where the output is that and something added; the tolerance is then
            relative to what was added, and the rounding of the sums is allowed for.
        rounding: what is allowed besides, relative like the tolerance.
        times: a factor on the tolerance.
        peculiar: what may be the cause.
    """
    coarser = max(theirs.dtype, ours.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    allowed = times * tolerance(coarser, ours.device)
    added = _norm(theirs if given is None else theirs - given)
    sums = 0.0 if given is None else 2 * torch.finfo(coarser).eps * _norm(theirs)
    off = _norm(ours.to(theirs.device) - theirs)
    limit = (allowed + (0.0 if rounding is None else 4 * rounding)) * added + sums
    if bool((off <= limit).all()):
        return
    at = int((off - limit).nan_to_num(torch.inf).flatten().argmax())
    a, b = theirs.flatten(0, -2)[at].float(), ours.flatten(0, -2)[at].float()
    place = int((a - b).abs().nan_to_num(torch.inf).argmax())
    cause = f" What it has besides its class: {'; '.join(peculiar[:3])}." if peculiar else ""
    raise DisagreementError(
        f"{what} computes {float(b[place]):.6g} in TransformerLens where transformers computes {float(a[place]):.6g} "
        f"(token {at} of {off.numel()}, dimension {place}; the outputs differ by "
        f"{float(off.flatten()[at] / added.flatten()[at]):.2g} of their norm, allowed are {allowed:.2g} in "
        f"{_named(coarser)}). A pair of it would be another model.{cause} Installed: {versions()}."
    )


@torch.no_grad()
def require_cache(model: Any, tokens: Int[Tensor, "1 pos"]) -> None:
    """Raises DisagreementError where `generate` with the key-value cache makes tokens that are not the likeliest.

    The likeliest by a pass without the cache, on the same tokens; two that are as likely but for rounding both count.
    """
    new = min(NEW_TOKENS, model.cfg.n_ctx - tokens.shape[1])
    if new < 1:
        return
    with _without_tokenizer(model):
        options = dict(do_sample=False, stop_at_eos=False, prepend_bos=False, verbose=False)
        made = model.generate(tokens, max_new_tokens=new, use_past_kv_cache=True, **options)
        logits = model(made)[0, -new - 1 : -1].float()
    chosen = logits.gather(-1, made[0, -new:, None])[:, 0]
    best, average = logits.amax(-1), logits.mean(-1)
    wrong = ~(best - chosen <= WHOLE * tolerance(model.cfg.dtype, tokens.device) * (best - average))
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        likeliest = int(logits[at].argmax())
        raise DisagreementError(
            f"Generating with the key-value cache goes wrong at token {at + 1} of {new}: it makes "
            f"{int(made[0, at - new])} (logit {float(chosen[at]):.4g} without the cache), and the likeliest is "
            f"{likeliest} ({float(best[at]):.4g}). These releases do not work together for a {type(model).__name__}: "
            f"{versions()}. Install releases that tl_adapters' pyproject.toml allows, or take the other backend."
        )


@torch.no_grad()
def require_consistent(model: Any) -> None:
    """What can be asked of a model of TransformerLens alone: finite logits, and a key-value cache that changes nothing.

    A model with hooks is not asked, since a hook may act on single positions of a pass.

    Raises:
        DisagreementError: where either does not hold.
    """
    if model.W_E.is_meta or any(point.fwd_hooks for point in model.hook_dict.values()):
        log.info("The model has hooks or no values, so its logits and its key-value cache were not tried.")
        return
    tokens = probe_tokens(model.cfg.d_vocab, model.cfg.n_ctx).to(model.W_E.device)
    with _without_tokenizer(model):
        finite = bool(model(tokens).isfinite().all())
    if not finite:
        raise DisagreementError(
            f"The model's logits are not finite in {_named(model.cfg.dtype)}. Load it in float32 or bfloat16; else its "
            "weights are damaged."
        )
    require_cache(model, tokens)


@contextmanager
def _without_tokenizer(model: Any) -> Iterator[None]:
    """TransformerLens then takes token ids as they are, and looks for no padding in them."""
    tokenizer, model.tokenizer = model.tokenizer, None
    try:
        yield
    finally:
        model.tokenizer = tokenizer


def versions() -> str:
    """Installed releases of the libraries that compute."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "transformer-lens"))


def _is_low(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def _norm(x: Tensor) -> Tensor:
    """[..., d] to [...], in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=-1)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
