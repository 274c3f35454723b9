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

from tl_adapters.adapter import AdapterSet
from tl_adapters.architectures import AUTHORS_SUFFIX
from tl_adapters.backends import backend_of
from tl_adapters.compatibility import PairMismatchError, compare_configs, require_fit
from tl_adapters.paired import PairedModel
from tl_adapters.references import ModelReference, model_config, model_name, read_base_mlps


def attach(
    model: Any,
    adapters: AdapterSet,
    *,
    base: ModelReference | None = None,
    on: Literal["own_mlp"] | None = None,
) -> PairedModel:
    """Put adapters, and the base's MLPs that they stand beside, into ``model``; it then computes the replacement.

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
    base_mlps = None
    if base is not None:
        require_fit(compare_configs(_described(model_config(base)), _described(backend.described)))
        base_mlps = read_base_mlps(base, backend.described["num_hidden_layers"])
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
        pair.load_adapters(adapters)
        pair.route_layers("target+adapter" if base is None else "replacement", adapters.layer_indices)
    except BaseException:
        pair.release()
        raise
    return pair


def detach(pair: PairedModel) -> Any:
    """Take base MLPs and adapters out of the pair's model and return it, bit for bit as it was before `attach`."""
    return pair.release()


@contextmanager
def attached(
    model: Any,
    adapters: AdapterSet,
    *,
    base: ModelReference | None = None,
    on: Literal["own_mlp"] | None = None,
) -> Iterator[PairedModel]:
    """`attach` for the length of a block."""
    pair = attach(model, adapters, base=base, on=on)
    try:
        yield pair
    finally:
        detach(pair)


def _described(config: dict[str, Any]) -> dict[str, Any]:
    """What base and target must share; TransformerLens keeps the architecture and not the model type."""
    architecture = str((config.get("architectures") or ["none"])[0]).removesuffix(AUTHORS_SUFFIX)
    return {**config, "model_type": architecture}
