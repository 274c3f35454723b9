"""Do these adapters belong to this model and this base, and what must they be fed here?"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.checkpoints.layer_samples import agrees, dtype_name
from tl_adapters.models.backend import Backend
from tl_adapters.models.weight_identity import ModelSamples, layer_and_weight, recorded_samples
from tl_adapters.utils.finite import require_finite_weights

log = logging.getLogger(__name__)


def require_belonging(
    adapters: AdapterSet,
    backend: Backend,
    target: str,
    base_mlps: Mapping[str, Tensor] | None,
    base: str,
    fingerprints: Mapping[str, str] | None = None,
) -> None:
    """Raises PairMismatchError, with both sides, where depth, width or content show that they belong elsewhere.

    Content is compared weight by weight (`marks.agrees`), and where adapters and models are of one dtype and nothing
    was processed, by fingerprint too, which reads more of every weight. What the adapters do not know of their models
    cannot be compared, and a warning says so.

    Args:
        adapters: what is to be put in.
        backend: the model.
        target, base: what model and base are called.
        base_mlps: `identity.base_samples` of the base, or None for adapters beside the model's own MLPs.
        fingerprints: of the pair; None compares none, and says nothing of what is not known.
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
    known = recorded_samples(adapters)
    if of_target := {name: values for name, values in known.items() if not name.startswith("base.")}:
        here = ModelSamples.of(backend)
        require_finite_weights(
            ((_placed(name), values) for name, values in here.values.items()), "The target's weights"
        )
        for name in here.differing(of_target):
            _refuse_target(adapters, target, *layer_and_weight(name))
    for name, there in (base_mlps or {}).items():
        if name in known and not agrees(known[name], there):
            _refuse_base(adapters, base, layer_and_weight(name)[0])
    if fingerprints is None:
        return
    _require_fingerprints(adapters, target, base, fingerprints)
    _say_what_is_unknown(adapters)


def _require_fingerprints(adapters: AdapterSet, target: str, base: str, fingerprints: Mapping[str, str]) -> None:
    """Compare what was recorded of whole models, where both sides are in one dtype and nothing was processed."""
    known, trained_on = recorded_samples(adapters), dict(adapters.metadata.fingerprints)
    for key, weight in (("dtype", ".self_attn.o_proj"), ("base_dtype", ".mlp.down_proj")):
        # Earlier versions recorded no dtype; the weights tell it. Without either nothing can be compared exactly.
        found = [
            t for name, t in known.items() if name.endswith(weight) and (key == "dtype") != name.startswith("base.")
        ]
        trained_on.setdefault(key, dtype_name(found[0].dtype) if found else "unknown")
    differs = differing(trained_on, fingerprints)
    if any(name.startswith("target") for name in differs):
        _refuse_target(adapters, target, None, "projections, embeddings or norms")
    if "base_mlps" in differs:
        _refuse_base(adapters, base, None)


def _placed(name: str) -> str:
    layer, weight = layer_and_weight(name)
    return weight if layer is None else f"layer {layer}, {weight}"


def _refuse_target(adapters: AdapterSet, target: str, layer: int | None, what: str) -> None:
    where = what if layer is None else f"{what} at layer {layer}"
    raise PairMismatchError(
        f"The adapters were trained on {adapters.metadata.target or 'another target'}: the weights of the {where} "
        f"differ from those of {target or 'this model'} (another model, or one processed in another way)."
    )


def _refuse_base(adapters: AdapterSet, base: str, layer: int | None) -> None:
    where = "" if layer is None else f" at layer {layer}"
    raise PairMismatchError(
        f"The adapters were trained beside the MLPs of {adapters.metadata.base or 'another base'}, and those of "
        f"{base or 'this base'} differ{where}. Give the base they were trained with."
    )


def _say_what_is_unknown(adapters: AdapterSet) -> None:
    if adapters.samples is not None or adapters.warned:
        return
    adapters.warned = True
    if adapters.marks is None:
        known = "carry nothing of the weights of their models, so only names, depth and width were compared"
    else:
        known = "carry values of second norms, attention outputs and down projections only, so only these were compared"
    log.warning("These adapters %s: make sure that target and base are those they were trained on.", known)


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
    if recorded and given and short_model_name(recorded) != short_model_name(given):
        raise PairMismatchError(
            f"These adapters carry no marks of their {role}, and by name it is {recorded}; given is {given}. Give the "
            f"whole set as it was saved, which knows its {role} by content, or the {role} of that name."
        )


def short_model_name(name: str) -> str:
    """The part of an id or path that copies of a model usually share."""
    return name.rstrip("/").rpartition("/")[2].lower()
