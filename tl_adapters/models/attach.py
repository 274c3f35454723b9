"""Adapters in a model that the user already has: a HookedTransformer, SAELens's HookedSAETransformer, a bridge.

    pair = attach(model, adapters, base="Qwen/Qwen2.5-Math-7B")      # model now computes the replacement
    with pair.routed("target"): ...
    detach(pair)

    with attached(model, adapters, base=...) as pair: ...            # the model is given back as it was

Only the base's MLPs are read. The model may have its norms folded (as TransformerLens's from_pretrained does): the
adapters carry the target's norms, so base MLPs and adapters still read what they were trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.checkpoints.architectures import architecture_name, find_architecture
from tl_adapters.checkpoints.base_mlps import GivenModel, model_config, model_name, read_base_mlps, resolve
from tl_adapters.checkpoints.compatibility import PairMismatchError, compare_configs, require_fit
from tl_adapters.models.build import backend_of
from tl_adapters.models.hf_outputs import N_PROBE_TOKENS, mlp_outputs_in_memory
from tl_adapters.models.output_agreement import require_base_weights, require_consistent
from tl_adapters.models.paired_model import PairedModel


def attach(
    model: Any,
    adapters: AdapterSet,
    *,
    base: GivenModel | None = None,
    on: Literal["own_mlp"] | None = None,
) -> PairedModel:
    """Put adapters, and the base's MLPs that they stand beside, into ``model``; it then computes the replacement.

    Checked: that adapters, base and model fit and are those that the adapters were trained with, by content; that the
    model's logits are finite and its greedy tokens the same with the key-value cache as without it (where it has no
    hooks); that the MLPs of a base in memory compute what their weights say. Not checked, since there is no Hugging
    Face model to hold it against: whether ``model`` computes what the target computes in transformers. It may lack a
    bias, LoRA layers or a rope type that its loader left out. `PairedModel.from_pretrained` checks that.

    Args:
        model: the adapters' target as a HookedTransformer, HookedSAETransformer or TransformerBridge.
        adapters: shares its weights with the model from now on.
        base: folder, hub name or Hugging Face model whose MLPs the adapters were trained beside.
        on: "own_mlp" in place of ``base``: the adapters' output is added to the model's own MLPs. That is another
            model than the replacement (T beside the target's MLP), and has to be asked for.

    Returns:
        The pair: its routes switch the model. `detach`, or `attached`, gives the model back.

    Raises:
        PairMismatchError: other layers, width, architecture, target or base than the adapters'; says both sides.
        UnsupportedModelError: not a gated-MLP model of TransformerLens, or one with adapters attached already.
        DisagreementError: logits that are not finite, a key-value cache that changes tokens, a base in memory that
            computes more than its MLPs' weights say.
        WeightsProcessedError: a TransformerBridge with processed weights.
    """
    if on not in (None, "own_mlp"):
        raise ValueError(f'on= takes "own_mlp" or nothing; got {on!r}.')
    if (base is None) == (on is None):
        recorded = adapters.metadata.base
        raise PairMismatchError(
            "Give either base= or on='own_mlp'. The adapters stand beside the base's MLPs"
            + (f" (base={recorded!r})" if recorded else "")
            + "; beside the model's own MLPs (on='own_mlp') they make another model."
        )
    backend = backend_of(model)
    require_consistent(model)
    base_mlps = None
    if base is not None:
        base = resolve(base, "base")
        require_fit(compare_configs(_comparable(model_config(base)), _comparable(backend.hf_config)))
        base_mlps = read_base_mlps(base, backend.hf_config["num_hidden_layers"])
    known = adapters.marks
    norms = (
        [known[layer].ln2_w for layer in range(adapters.n_layers)]
        if known and len(known) == adapters.n_layers
        else None
    )
    pair = PairedModel(
        model,
        base_mlps,
        base="" if base is None else model_name(base),
        target=str(getattr(model.cfg, "model_name", "") or ""),
        ln2_weights=norms,
    )
    try:
        if isinstance(base, PreTrainedModel):
            _require_own_mlps(pair, base)
        pair.load_adapters(adapters)
        pair.route_layers("target+adapter" if base is None else "replacement", adapters.layer_indices)
    except BaseException:
        pair.release()
        raise
    return pair


@torch.no_grad()
def _require_own_mlps(pair: PairedModel, base: PreTrainedModel) -> None:
    """Raises DisagreementError where a base in memory computes more than its MLPs' weights say."""
    like = pair.model.W_E
    shape = (pair.n_layers, 1, N_PROBE_TOKENS, like.shape[-1])
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
    for layer, (x, output) in enumerate(zip(inputs, mlp_outputs_in_memory(base, list(inputs)), strict=True)):
        require_base_weights(pair.mlps[layer], layer, x, output)


def detach(pair: PairedModel) -> Any:
    """Take base MLPs and adapters out of the pair's model and return it, bit for bit as it was before `attach`."""
    return pair.release()


@contextmanager
def attached(
    model: Any,
    adapters: AdapterSet,
    *,
    base: GivenModel | None = None,
    on: Literal["own_mlp"] | None = None,
) -> Iterator[PairedModel]:
    """`attach` for the length of a block."""
    pair = attach(model, adapters, base=base, on=on)
    try:
        yield pair
    finally:
        detach(pair)


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """What base and target must share; TransformerLens keeps the architecture and not the model type."""
    return {**config, "model_type": find_architecture(architecture_name(config)).name}
