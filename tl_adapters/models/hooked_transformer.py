"""A HookedTransformer made of a Hugging Face model's own weights, and HookedTransformer as a backend.

1. The configuration is made from the Hugging Face model's, not looked up by name: TransformerLens 3.9 has a list of
   names, and reasoning models are rarely on it.
2. Parameters are views of the model's weights, in nn.Linear's layout. No weight is held twice, and the copies that
   stock components make of transposed weights at every call cost nothing.
3. Components compute in fewer passes where no hook looks inside (`components`): attention runs in a fused kernel
   unless a hook reads scores or patterns; then the stock code runs.

TransformerLens 4 has no HookedTransformer; there `transformer_bridge` is used.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.components import GroupedQueryAttention, RMSNorm, TransformerBlock, Unembed
from transformer_lens.components.mlps.gated_mlp import GatedMLP
from transformer_lens.hook_points import HookPoint
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.checkpoints.architectures import UnsupportedModelError, find_architecture, supported_labels
from tl_adapters.checkpoints.model_checks import mlp_activation, require_representable, rope_parameters
from tl_adapters.checkpoints.model_files import PROJECTIONS
from tl_adapters.checkpoints.tokenizers import give_tokenizer
from tl_adapters.models.backend import Backend
from tl_adapters.models.components import (
    FusedAttention,
    FusedBlock,
    FusedRMSNorm,
    LeanUnembed,
    OffsetRMSNorm,
    dtype_of_norms,
)
from tl_adapters.models.routed_mlp import MLPWeights, RoutedMLP, WeightsProcessedError, require_unrouted
from tl_adapters.utils.precision import float32_logits, linear_in_float32

log = logging.getLogger(__name__)

OURS: dict[type, type] = {
    GroupedQueryAttention: FusedAttention,
    RMSNorm: FusedRMSNorm,
    TransformerBlock: FusedBlock,
    Unembed: LeanUnembed,
}
"""Components of TransformerLens, and what takes their place."""


def tl_config(config: PretrainedConfig, dtype: torch.dtype, device: torch.device | str) -> HookedTransformerConfig:
    """The TransformerLens configuration for a Hugging Face configuration. Raises UnsupportedModelError."""
    architecture = require_representable(config)
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = rope_parameters(config)
    options: dict[str, Any] = dict(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=config.max_position_embeddings,
        d_head=d_head,
        n_heads=config.num_attention_heads,
        # Also where every head has its own keys: grouped attention in groups of one is the same computation.
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn=mlp_activation(config),
        eps=config.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_base=rope.get("rope_theta", 10000.0),
        rotary_dim=d_head,
        rotary_adjacent_pairs=False,
        use_qk_norm=architecture.has_qk_norms,
        use_normalization_before_and_after=architecture.has_post_norms,
        original_architecture=architecture.name,
        model_name=config.name_or_path or architecture.name,
        init_weights=False,
        default_prepend_bos=False,  # chat templates write their own beginning of sequence
        dtype=dtype,
        device=str(device),
    )
    if rope.get("rope_type") == "llama3":
        options |= dict(
            use_NTK_by_parts_rope=True,
            NTK_original_ctx_len=rope["original_max_position_embeddings"],
            NTK_by_parts_low_freq_factor=rope["low_freq_factor"],
            NTK_by_parts_high_freq_factor=rope["high_freq_factor"],
            NTK_by_parts_factor=rope["factor"],
        )
    return HookedTransformerConfig(**options, **architecture.config_options(config))


@torch.no_grad()
def build_hooked_transformer(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> HookedTransformer:
    """A HookedTransformer whose parameters are views of ``hf_model``'s, with fused attention; all weights frozen.

    No processing (no folding, no centering): hook values are the model's own. Raises UnsupportedModelError.
    """
    weight = next(hf_model.parameters())
    cfg = tl_config(hf_model.config, weight.dtype, weight.device)
    architecture = find_architecture(cfg.original_architecture)
    convert = architecture.load_converter()
    with warnings.catch_warnings():
        # TransformerLens warns that 4.0 drops this class; pyproject.toml allows releases below 4 for that reason.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r".*")
        model = HookedTransformer(cfg, None, move_to_device=False)
    offset = bool(architecture.norm_offset)
    state = {
        name: tensor.detach().to(cfg.device, dtype_of_norms(cfg.dtype) if offset and name.endswith(".w") else cfg.dtype)
        for name, tensor in convert(hf_model, cfg).items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    parameters = dict(model.named_parameters())
    if unexpected or any(name in parameters for name in missing):
        raise UnsupportedModelError(
            f"TransformerLens's converter left weights of {cfg.original_architecture} unset: {missing}, {unexpected}."
        )
    if tokenizer is not None:
        give_tokenizer(model, tokenizer)
    model.generation_config = hf_model.generation_config  # end tokens and sampling options, which `generation` reads
    for module in model.modules():
        if type(module) in OURS:
            module.__class__ = OffsetRMSNorm if offset and type(module) is RMSNorm else OURS[type(module)]
        # Parameters have the device of the weights; buffers (rotary tables) were made on the CPU by the constructor.
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(cfg.device))
    if weight.device.type != "meta":
        _require_rotary(model, hf_model)
    return model.requires_grad_(False).eval()


def _require_rotary(model: HookedTransformer, hf_model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError where the rotary embedding differs from that of ``hf_model`` at some position.

    The whole tables are compared, because a wrong frequency makes no difference on a few tokens.
    """
    attn = model.blocks[0].attn
    positions = torch.arange(len(attn.rotary_cos), device=attn.rotary_cos.device)
    cos, sin = hf_model.model.rotary_emb(attn.rotary_cos.float(), positions[None])
    for ours, theirs in ((attn.rotary_cos, cos[0]), (attn.rotary_sin, sin[0])):
        # Angles of some thousand radians are known to a few thousandths in float32.
        wrong = (ours.float() - theirs.float()).abs().amax(-1) > 4e-3 + torch.finfo(ours.dtype).eps
        if bool(wrong.any()):
            position = int(wrong.nonzero()[0])
            raise UnsupportedModelError(
                f"The model's rotary embedding at position {position} is not what its configuration says (largest "
                f"difference {float((ours[position].float() - theirs[position].float()).abs().max()):.2g}): its "
                "frequencies were changed or rounded. Load it anew, with dtype= in from_pretrained in place of a cast."
            )


class NoPaddingInference:
    """A mixin before a HookedTransformer's class: token ids without an attention mask are all real.

    Stock TransformerLens infers padding then: its forward pass (and run_with_cache) treats pad tokens at the beginning
    as padding where the tokenizer pads on the left, and ``generate`` those at the beginning or the end, whichever side
    the tokenizer pads. So a prompt that begins with the pad token (which may be the BOS token) loses it. While adapters
    are attached, all token ids given are real. Texts are padded and masked as in stock TransformerLens, since their
    padding is known.
    """

    tokenizer: Any

    def input_to_embed(self, input: Any, *args: Any, attention_mask: Any = None, **options: Any) -> Any:
        """As HookedTransformer.input_to_embed, with all token ids real where no mask is given."""
        if isinstance(input, Tensor) and attention_mask is None and self.tokenizer is not None:
            tokens = input if input.ndim > 1 else input[None]
            if self.tokenizer.padding_side == "left":
                _warn_of_padding(tokens, self.tokenizer.pad_token_id)
            attention_mask = torch.ones_like(tokens)
            if self.tokenizer.padding_side != "left" and options.get("past_kv_cache") is None:
                attention_mask = None  # the same result, in the faster attention
        return super().input_to_embed(input, *args, attention_mask=attention_mask, **options)  # type: ignore[misc]

    def generate(self, input: Any = "", *args: Any, **options: Any) -> Any:
        """As HookedTransformer.generate, with all token ids real."""
        if not isinstance(input, Tensor) or input.is_floating_point() or self.tokenizer is None:
            return super().generate(input, *args, **options)  # type: ignore[misc]
        _warn_of_padding(input if input.ndim > 1 else input[None], self.tokenizer.pad_token_id)
        with self._without_pad_token():
            return super().generate(input, *args, **options)  # type: ignore[misc]

    @contextmanager
    def _without_pad_token(self) -> Iterator[None]:
        tokenizer, self.tokenizer = self.tokenizer, _NoPadToken(self.tokenizer)
        try:
            yield
        finally:
            self.tokenizer = tokenizer


class _NoPadToken:
    """A tokenizer whose pad token is an id that no text has; everything else is the wrapped tokenizer's."""

    pad_token_id = -1

    def __init__(self, tokenizer: Any) -> None:
        self.__dict__["tokenizer"] = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["tokenizer"], name, value)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.__dict__["tokenizer"](*args, **options)


def _warn_of_padding(tokens: Tensor, pad: int | None) -> None:
    """Warn where some rows begin with the pad token and others do not, which looks like padding."""
    if pad is not None and len(tokens) > 1 and 0 < int((tokens[:, 0] == pad).sum()) < len(tokens):
        log.warning(
            "Some rows of the token ids begin with the pad token, and no attention_mask was given, so they are read as "
            "tokens. If they are padding, give attention_mask= or texts (to generate: completions.complete)."
        )


def without_padding_inference(cls: type) -> type:
    """The subclass of a HookedTransformer class that infers no padding, the same for every model and every copy."""
    if issubclass(cls, NoPaddingInference):
        return cls
    if cls not in _SUBCLASSES:
        _SUBCLASSES[cls] = type(cls.__name__, (NoPaddingInference, cls), {"__module__": cls.__module__})
    return _SUBCLASSES[cls]


_SUBCLASSES: dict[type, type] = {}


class RoutedGatedMLP(RoutedMLP, GatedMLP):
    """A HookedTransformer's gated MLP with routes; `HookedBackend.install` changes an existing MLP into one."""

    hook_in: HookPoint
    hook_adapter_out: HookPoint
    W_gate: Tensor
    W_in: Tensor
    W_out: Tensor
    act_fn: Any
    _block: tuple[Any, ...]
    """The block of this MLP; in a tuple, because torch would register a parent module as a child."""
    _norm: type[nn.Module]
    """The class of the second norm at `install`."""

    @property
    def adapter_out_hook(self) -> nn.Module:
        """The hook point hook_adapter_out, or the module that another tool has put in its place."""
        return self.hook_adapter_out

    def apply_hook_in(self, x: Tensor) -> Tensor:
        """``x`` through the hook point hook_in, which a plain HookedTransformer's MLP lacks."""
        return self.hook_in(x)

    def require_unprocessed(self) -> None:
        """Raises WeightsProcessedError where the second norm was folded after `install`."""
        if type(self._block[0].ln2) is not self._norm:
            raise WeightsProcessedError(
                "The weights were processed after adapters were attached (the second norm was "
                f"{self._norm.__name__}, now {type(self._block[0].ln2).__name__}), so base MLP and adapters no longer "
                "fit. Process the weights before attaching, or load the model anew."
            )

    def weights(self) -> tuple[MLPWeights, MLPWeights]:
        """The target's and the base's weights."""
        assert isinstance(self.base, GatedMLP)
        target = MLPWeights(self.W_gate, self.W_in, self.W_out, self.act_fn)
        return target, MLPWeights(self.base.W_gate, self.base.W_in, self.base.W_out, self.act_fn)


class HookedBackend(Backend):
    """A HookedTransformer as a backend, whether the user made it or `build_hooked_transformer`."""

    name = "hooked"

    def __init__(self, model: HookedTransformer) -> None:
        self.model = model
        self.architecture = find_architecture(model.cfg.original_architecture)
        self._replaced: dict[int, dict[str, Any]] = {}  # by layer, what `install` changed in the MLP, for `uninstall`
        if model.cfg.normalization_type not in ("RMS", "RMSPre"):
            raise UnsupportedModelError(
                f"The model's norms are {model.cfg.normalization_type}; adapters need RMS norms ({supported_labels()})."
            )
        for layer, block in enumerate(model.blocks):
            if not isinstance(getattr(block, "mlp", None), GatedMLP):
                raise UnsupportedModelError(
                    f"The MLP of layer {layer} is a {type(getattr(block, 'mlp', None)).__name__}; adapters need "
                    f"gated MLPs ({supported_labels()})."
                )
            require_unrouted(block.mlp)
        self._class = type(model)

    @property
    def hf_config(self) -> dict[str, Any]:
        """The options that base and adapters must share with the model, under config.json's names."""
        cfg = self.model.cfg
        return {
            "architectures": [cfg.original_architecture],
            "num_hidden_layers": cfg.n_layers,
            "hidden_size": cfg.d_model,
            "intermediate_size": cfg.d_mlp,
            "hidden_act": cfg.act_fn,
        }

    @property
    def mlps(self) -> list[RoutedMLP]:
        """The routed MLP of every layer."""
        return [block.mlp for block in self.model.blocks]

    def second_norm(self, layer: int) -> Tensor | None:
        """The second norm's weights, [d_model]; None where they are folded into the MLP."""
        return self.norm(f"blocks.{layer}.ln2")

    def norm(self, name: str) -> Tensor | None:
        """Weights of the norm of that name as TransformerLens has them; None where they are folded."""
        return getattr(self.model.get_submodule(name), "w", None)

    def attention_biases(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """b_V [n_kv_heads, d_head] and b_O [d_model]."""
        attn = self.model.blocks[layer].attn
        yield "b_V", attn._b_V if hasattr(attn, "_b_V") else attn.b_V
        yield "b_O", attn.b_O

    def projection_biases(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """Biases of q, k, v and o in Hugging Face's names and layout."""
        attn = self.model.blocks[layer].attn
        for name in "QKVO":  # where heads share keys, b_K and b_V repeat them
            bias = getattr(attn, f"_b_{name}", None)
            yield (
                f"self_attn.{name.lower()}_proj.bias",
                (getattr(attn, f"b_{name}") if bias is None else bias).flatten(),
            )

    @property
    def embedding_scale(self) -> float:
        """The factor by which TransformerLens has multiplied the stored embedding."""
        return self.architecture.embedding_scale(self.model.cfg.d_model)

    def named_weights(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """The weights of a layer's attention and MLP in Hugging Face's names and layout."""
        attn, mlp = self.model.blocks[layer].attn, self.model.blocks[layer].mlp
        for name, weight in (
            ("q_proj", attn.W_Q),
            ("k_proj", getattr(attn, "_W_K", None)),  # where heads share keys, W_K repeats them
            ("v_proj", getattr(attn, "_W_V", None)),
        ):
            heads = weight if weight is not None else getattr(attn, f"W_{name[0].upper()}")
            yield f"self_attn.{name}", heads.permute(0, 2, 1).flatten(0, 1)
        yield "self_attn.o_proj", attn.W_O.permute(2, 0, 1).flatten(1)
        for name, attribute in PROJECTIONS.items():
            yield f"mlp.{name}", getattr(mlp, attribute).T

    def unembedding(self) -> Tensor:
        """The unembedding matrix, [d_vocab, d_model]."""
        return self.model.W_U.T

    def install(self, layer: int, base: dict[str, Tensor] | None, base_scale: Tensor | None) -> None:
        """Turn the MLP of ``layer`` into a `RoutedGatedMLP` in place, with the base's weights beside it."""
        block = self.model.blocks[layer]
        self.model.__class__ = without_padding_inference(self._class)  # until `uninstall`
        mlp = block.mlp
        # A HookedSAETransformer gives each MLP instance a forward that calls hook_in first. `forward` here does, too.
        self._replaced[layer] = {"class": type(mlp), "hook_in": getattr(mlp, "hook_in", None)}
        if "forward" in mlp.__dict__:
            self._replaced[layer]["forward"] = mlp.__dict__.pop("forward")
        module = None if base is None else _base_mlp(mlp, base)
        mlp.__class__ = RoutedGatedMLP
        mlp.install(module, base_scale)
        mlp.hook_adapter_out = HookPoint()
        if self._replaced[layer]["hook_in"] is None:
            mlp.hook_in = HookPoint()
        mlp.__dict__.update(_block=(block,), _norm=type(block.ln2))

    def uninstall(self, layer: int) -> None:
        """Restore the MLP of ``layer`` to what it was before `install`."""
        mlp, replaced = self.model.blocks[layer].mlp, self._replaced.pop(layer)
        for name in ("_block", "_norm"):
            del mlp.__dict__[name]
        del mlp.hook_adapter_out
        if replaced["hook_in"] is None:
            del mlp.hook_in
        mlp.uninstall(replaced["class"])
        if not self._replaced:
            self.model.__class__ = self._class
        if "forward" in replaced:
            mlp.__dict__["forward"] = replaced["forward"]

    def name_hooks(self) -> None:
        """Register new hook points with the model under their names, and remove those that are gone."""
        self.model.mod_dict, self.model.hook_dict = {}, {}
        self.model.setup()

    # -- running parts of the model -------------------------------------------------------------------------------

    def embed(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The residual stream before block 0."""
        return self.model(tokens, stop_at_layer=0, attention_mask=attention_mask)

    def run_blocks(self, resid: Tensor, start: int, stop: int, attention_mask: Tensor | None = None) -> Tensor:
        """The residual stream after blocks start..stop-1 have run on ``resid``, on the present routes."""
        if start == stop:
            return resid
        # start_at_layer never recomputes the padding mask, so the mask is always passed.
        return self.model(resid, start_at_layer=start, stop_at_layer=stop, attention_mask=attention_mask)

    def unembed(self, resid: Tensor) -> Tensor:
        """Final norm and unembedding; logits are in float32 where the weights have less."""
        with float32_logits(self.model.unembed, self.unembedding(), self._float32_logits):
            return self.model(resid, start_at_layer=self.model.cfg.n_layers)

    def _float32_logits(self, resid: Tensor) -> Tensor:
        module = self.model.unembed
        return module.hook_out(linear_in_float32(module.hook_in(resid), self.unembedding(), module.b_U))


def _base_mlp(target: GatedMLP, weights: dict[str, Tensor]) -> GatedMLP:
    """A GatedMLP around the base's tensors, as views in the layout that needs no copies."""
    with torch.device("meta"):  # the weights that the constructor makes are replaced, so they take no memory
        mlp = GatedMLP(target.cfg)
    mlp.b_in, mlp.b_out = (nn.Parameter(torch.zeros_like(b), requires_grad=False) for b in (target.b_in, target.b_out))
    for name, attribute in PROJECTIONS.items():
        view = weights[name].to(target.W_in.device, target.W_in.dtype).T
        setattr(mlp, attribute, nn.Parameter(view, requires_grad=False))
    # The hook points are shared, so that hook_pre and hook_post fire for whichever MLP computes.
    mlp.hook_pre, mlp.hook_pre_linear, mlp.hook_post = target.hook_pre, target.hook_pre_linear, target.hook_post
    return mlp
