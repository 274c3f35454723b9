"""Do these adapters belong to this model and this base, and what must they be fed here?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tl_adapters.adapter import AdapterSet
from tl_adapters.compatibility import PairMismatchError
from tl_adapters.marks import same, sample
from tl_adapters.references import MLPTensors
from tl_adapters.routing import Backend


def require_belonging(
    adapters: AdapterSet, backend: Backend, target: str, base_mlps: Sequence[Tensor] | None, base: str
) -> None:
    """Raises PairMismatchError, with both sides, where depth, width or content show that they belong elsewhere.

    Args:
        adapters: what is to be put in.
        backend: the model.
        target, base: what model and base are called.
        base_mlps: `base_marks` of the base, or None for adapters beside the model's own MLPs.
    """
    about, cfg = adapters.metadata, backend.model.cfg
    if about.writes != "adapter_out":
        raise PairMismatchError(
            "These transcoders stand in place of the MLP (they write its output); adapters are added to it. Use "
            "them with SAELens's HookedSAETransformer.add_sae."
        )
    if (adapters.n_layers, adapters.d_model) != (cfg.n_layers, cfg.d_model):
        raise PairMismatchError(
            f"The adapters have {adapters.n_layers} layers of width {adapters.d_model}; "
            f"the model has {cfg.n_layers} of width {cfg.d_model}."
        )
    if adapters.marks is None:
        _require_names("target", about.target, target)
        if base_mlps is not None:
            _require_names("base", about.base, base)
        return
    for layer, known in adapters.marks.items():
        norm = backend.second_norm(layer)
        for what, ours, theirs in (
            ("second norm", known.ln2_w if norm is None else norm, known.ln2_w),
            ("attention's output", attention_out(backend, layer), known.attention_out),
        ):
            if not same(ours, theirs):
                raise PairMismatchError(
                    f"The adapters were trained on {about.target or 'another target'}: the weights of the {what} at "
                    f"layer {layer} differ from those of {target or 'this model'} (another model, or one processed in "
                    "another way)."
                )
        if base_mlps is not None and not same(base_mlps[layer], known.base_mlp_out):
            raise PairMismatchError(
                f"The adapters were trained beside the MLPs of {about.base or 'another base'}, and those of "
                f"{base or 'this base'} differ at layer {layer}. Give the base they were trained with."
            )


def base_marks(base_mlps: Sequence[MLPTensors]) -> list[Tensor]:
    """`LayerMarks.base_mlp_out` of every layer of a base."""
    return [sample(mlp["down_proj"]) for mlp in base_mlps]


def attention_out(backend: Backend, layer: int) -> Tensor:
    """`LayerMarks.attention_out` of a model."""
    return sample(next(w for name, w in backend.named_weights(layer) if name == "self_attn.o_proj"))


def adapter_scale(adapters: AdapterSet, backend: Backend, layer: int) -> Tensor | None:
    """What brings the MLP's input in this model to what the adapter reads, [d_model]; None where it is that.

    Raises PairMismatchError where it cannot be had.
    """
    here, marks = backend.second_norm(layer), adapters.marks
    if adapters.metadata.reads == "normalized":
        if here is not None and bool((here == 0).any()):
            raise PairMismatchError(
                f"The second norm of layer {layer} has weights that are 0, so what stands before it cannot be had "
                "from the MLP's input. Give adapters that read mlp_input, or fold the model's norms."
            )
        return None if here is None else 1 / here.detach().to(torch.promote_types(here.dtype, torch.float32))
    if here is not None:
        return None
    if marks is None:
        raise PairMismatchError(
            "The model's second norms are folded, and these adapters, which read the MLP's input, do not carry "
            "their weights. Load the model with from_pretrained_no_processing."
        )
    return marks[layer].ln2_w


def _require_names(role: str, recorded: str, given: str) -> None:
    """For adapters that carry no marks: by name, where both names are known."""
    if recorded and given and last_part(recorded) != last_part(given):
        raise PairMismatchError(
            f"These adapters carry no marks of their {role}, and by name it is {recorded}; given is {given}. Give the "
            f"whole set as it was saved, which knows its {role} by content, or the {role} of that name."
        )


def last_part(name: str) -> str:
    """The part of an id or path that copies of a model usually share."""
    return name.rstrip("/").rpartition("/")[2].lower()
