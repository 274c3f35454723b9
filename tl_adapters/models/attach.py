"""Adapters in a model that the user already has: HookedTransformer, SAELens's HookedSAETransformer, TransformerBridge.

    pair = attach(model, adapters, base="Qwen/Qwen2.5-Math-7B")      # model now computes the replacement
    with pair.routed("target"): ...
    detach(pair)

    with attached(model, adapters, base=...) as pair: ...            # afterwards the model is as it was before

Only the base's MLPs are read. The model may have its norms folded (as TransformerLens's from_pretrained does): the
adapters carry the target's norms, so base MLPs and adapters still read what they were trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.checkpoints.architectures import architecture_name, find_architecture
from tl_adapters.checkpoints.base_mlps import read_base_mlps
from tl_adapters.checkpoints.compatibility import PairMismatchError, compare_configs, require_fit
from tl_adapters.checkpoints.model_reference import GivenModel, model_config, model_name, resolve_model
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
    """Put adapters and the base's MLPs into ``model``, which then computes the replacement.

    The function checks that adapters, base and model fit and are, by content, those that the adapters were trained
    with; that the model's logits are finite and its greedy tokens the same with the key-value cache as without it
    (unless it has hooks); and that the MLPs of a base in memory compute what their weights say. It cannot check whether
    ``model`` computes what the target computes in transformers, since there is no Hugging Face model to compare with:
    ``model`` may lack a bias, LoRA layers or a rope type that its loader left out. `PairedModel.from_pretrained`
    compares the two.

    Args:
        model: the adapters' target as a HookedTransformer, HookedSAETransformer or TransformerBridge.
        adapters: shares its weights with the model from now on.
        base: folder, hub name or Hugging Face model whose MLPs the adapters were trained beside.
        on: "own_mlp" in place of ``base``: the adapters' output is added to the model's own MLPs. The result differs
            from the replacement, so it has to be requested.

    Returns:
        The pair: its routes switch the model. `detach`, or `attached`, restores the model.

    Raises:
        PairMismatchError: other layers, width, architecture, target or base than the adapters'; names both sides.
        UnsupportedModelError: not a gated-MLP model of TransformerLens, or one with adapters attached already.
        DisagreementError: logits that are not finite, a key-value cache that changes tokens, a base in memory that
            computes more than its MLPs' weights say.
        WeightsProcessedError: a TransformerBridge with processed weights.
        CheckpointError, NotFiniteError: missing or damaged files of the base; adapters that are NaN or infinite.
    """
    _require_base_or_own_mlp(adapters, base, on)
    backend = backend_of(model)
    require_consistent(model)
    base_mlps = None
    if base is not None:
        base = resolve_model(base, "base")
        require_fit(compare_configs(_comparable(model_config(base)), _comparable(backend.hf_config)))
        base_mlps = read_base_mlps(base, backend.hf_config["num_hidden_layers"])
    name = str(getattr(model.cfg, "model_name", "") or "")
    pair = PairedModel(
        model, base_mlps, "" if base is None else model_name(base), name, ln2_weights=_recorded_norms(adapters)
    )
    try:
        if isinstance(base, PreTrainedModel):
            _require_plain_base(pair, base)
        pair.load_adapters(adapters)
        pair.route_layers("target+adapter" if base is None else "replacement", adapters.layer_indices)
    except BaseException:
        pair.release()
        raise
    return pair


def _require_base_or_own_mlp(adapters: AdapterSet, base: GivenModel | None, on: str | None) -> None:
    """Raises ValueError or PairMismatchError unless exactly one of base= and on="own_mlp" was given."""
    if on not in (None, "own_mlp"):
        raise ValueError(f'on= takes "own_mlp" or nothing; got {on!r}.')
    if (base is None) == (on is None):
        recorded = adapters.metadata.base
        raise PairMismatchError(
            "Give either base= or on='own_mlp'. The adapters were trained beside the base's MLPs"
            + (f" (base={recorded!r})" if recorded else "")
            + "; beside the model's own MLPs (on='own_mlp') the model computes something else."
        )


def _recorded_norms(adapters: AdapterSet) -> list[Tensor] | None:
    """The target's second-norm weights of every layer, None where the adapters do not carry them all."""
    samples = adapters.layer_samples
    if not samples or len(samples) != adapters.n_layers:
        return None
    return [samples[layer].ln2_w for layer in range(adapters.n_layers)]


@torch.no_grad()
def _require_plain_base(pair: PairedModel, base: PreTrainedModel) -> None:
    """Raises DisagreementError where a base in memory computes more than its MLPs' weights say."""
    like = pair.model.W_E
    shape = (pair.n_layers, 1, N_PROBE_TOKENS, like.shape[-1])
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
    for layer, (x, output) in enumerate(zip(inputs, mlp_outputs_in_memory(base, list(inputs)), strict=True)):
        require_base_weights(pair.mlps[layer], layer, x, output)


def detach(pair: PairedModel) -> Any:
    """Take base MLPs and adapters out of the pair's model and return it, bit for bit as it was before `attach`.

    Raises PairMismatchError where that was done already.
    """
    return pair.release()


@contextmanager
def attached(
    model: Any,
    adapters: AdapterSet,
    *,
    base: GivenModel | None = None,
    on: Literal["own_mlp"] | None = None,
) -> Iterator[PairedModel]:
    """`attach` for the length of a block; raises what `attach` raises."""
    pair = attach(model, adapters, base=base, on=on)
    try:
        yield pair
    finally:
        detach(pair)


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the architecture as its model type, because TransformerLens keeps only the architecture."""
    return {**config, "model_type": find_architecture(architecture_name(config)).name}
