"""Were these adapters trained with this target and this base, and what scale brings the MLP's input to theirs?

`require_belonging` answers the first question for models in memory: by depth and width, by the samples of weights that
the adapters carry (`weight_identity`), by fingerprints, and by name where they carry no samples. Whether outputs agree
is the question of `output_agreement`, whether configurations fit that of `checkpoints.compatibility`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.finite_weights import require_finite_weights
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.checkpoints.layer_samples import agrees, dtype_name
from tl_adapters.models.backend import Backend
from tl_adapters.models.weight_identity import ModelSamples, layer_and_title, recorded_samples

log = logging.getLogger(__name__)


def require_belonging(
    adapters: AdapterSet,
    backend: Backend,
    target: str,
    base_samples: Mapping[str, Tensor] | None,
    base: str,
    fingerprints: Mapping[str, str] | None = None,
) -> None:
    """Raises PairMismatchError, with both sides, where depth, width or content show that adapters belong elsewhere.

    Content is compared weight by weight (`layer_samples.agrees`). Where adapters and models have one dtype and nothing
    was processed, fingerprints are compared too, since they cover more values of every weight. What the adapters do not
    know of their models cannot be compared, and a warning says so.

    Args:
        adapters: the adapters to install.
        backend: the model.
        target, base: the names of model and base.
        base_samples: `BaseIdentity.samples`, or None for adapters that are added to the model's own MLPs.
        fingerprints: of the pair; None compares none, and does not warn of what is unknown.
    """
    metadata, cfg = adapters.metadata, backend.model.cfg
    if metadata.writes != "adapter_out":
        raise PairMismatchError(
            "These transcoders replace the MLP (they write its output), while adapters are added to it. Use them with "
            "SAELens's HookedSAETransformer.add_sae."
        )
    if (adapters.n_layers, adapters.d_model) != (cfg.n_layers, cfg.d_model):
        raise PairMismatchError(
            f"The adapters have {adapters.n_layers} layers of width {adapters.d_model}; "
            f"the model has {cfg.n_layers} of width {cfg.d_model}."
        )
    if adapters.layer_samples is None:
        _require_names("target", metadata.target, target)
        if base_samples is not None:
            _require_names("base", metadata.base, base)
    recorded = recorded_samples(adapters)
    if of_target := {name: values for name, values in recorded.items() if not name.startswith("base.")}:
        present = ModelSamples.of(backend)
        require_finite_weights(
            ((_weight_at_layer(name), values) for name, values in present.values.items()), "The target's weights"
        )
        for name in present.differing(of_target):
            raise _other_target(adapters, target, *layer_and_title(name))
    for name, values in (base_samples or {}).items():
        if name in recorded and not agrees(recorded[name], values):
            raise _other_base(adapters, base, layer_and_title(name)[0])
    if fingerprints is None:
        return
    _require_fingerprints(adapters, target, base, fingerprints)
    _warn_of_unknown_weights(adapters)


def require_planted(adapters: AdapterSet, planted: str | None, target: str) -> None:
    """Raises PairMismatchError where adapters were trained on planted features other than those in the model.

    Args:
        adapters: the adapters to install.
        planted: the fingerprint of the features planted in the model, None where there are none.
        target: the name of the model.
    """
    trained_on = adapters.metadata.fingerprints.get("planted")
    if trained_on is not None and trained_on != planted:
        raise PairMismatchError(
            f"These adapters were trained on {adapters.metadata.target}; the target here is "
            f"{target or 'a model'} without those features. Plant them again: "
            "PairedModel.plant(base, planted)."
        )


def _require_fingerprints(adapters: AdapterSet, target: str, base: str, fingerprints: Mapping[str, str]) -> None:
    """Compare fingerprints of whole models, where both sides have one dtype and nothing was processed."""
    recorded, trained_on = recorded_samples(adapters), dict(adapters.metadata.fingerprints)
    for key, weight in (("dtype", ".self_attn.o_proj"), ("base_dtype", ".mlp.down_proj")):
        # Earlier versions recorded no dtype; the weights tell it. Without either nothing can be compared exactly.
        samples = [
            values
            for name, values in recorded.items()
            if name.endswith(weight) and (key == "dtype") != name.startswith("base.")
        ]
        trained_on.setdefault(key, dtype_name(samples[0].dtype) if samples else "unknown")
    differs = differing(trained_on, fingerprints)
    if any(name.startswith("target") for name in differs):
        raise _other_target(adapters, target, None, "projections, embeddings or norms")
    if "base_mlps" in differs:
        raise _other_base(adapters, base, None)


def _weight_at_layer(name: str) -> str:
    layer, title = layer_and_title(name)
    return title if layer is None else f"layer {layer}, {title}"


def _other_target(adapters: AdapterSet, target: str, layer: int | None, title: str) -> PairMismatchError:
    where = title if layer is None else f"{title} at layer {layer}"
    return PairMismatchError(
        f"The adapters were trained on {adapters.metadata.target or 'another target'}: the weights of the {where} "
        f"differ from those of {target or 'this model'} (another model, or one processed in another way)."
    )


def _other_base(adapters: AdapterSet, base: str, layer: int | None) -> PairMismatchError:
    where = "" if layer is None else f" at layer {layer}"
    return PairMismatchError(
        f"The adapters were trained beside the MLPs of {adapters.metadata.base or 'another base'}, and those of "
        f"{base or 'this base'} differ{where}. Give the base they were trained with."
    )


def _warn_of_unknown_weights(adapters: AdapterSet) -> None:
    if adapters.samples is not None or adapters.warned:
        return
    adapters.warned = True
    if adapters.layer_samples is None:
        known = "carry nothing of the weights of their models, so only names, depth and width were compared"
    else:
        known = "carry values of second norms, attention outputs and down projections only, so only these were compared"
    log.warning("These adapters %s: make sure that target and base are those they were trained on.", known)


def adapter_scale(adapters: AdapterSet, backend: Backend, layer: int) -> Tensor | None:
    """The factor from the MLP's input in this model to the adapter's input, [d_model]; None where both are the same.

    Raises PairMismatchError where the adapter's input cannot be computed.
    """
    norm, samples = backend.second_norm(layer), adapters.layer_samples
    if adapters.metadata.reads == "normalized":
        if norm is not None and bool((norm == 0).any()):
            raise PairMismatchError(
                f"The second norm of layer {layer} has weights that are 0, so its input cannot be computed from the "
                "MLP's input. Give adapters that read mlp_input, or fold the model's norms."
            )
        return None if norm is None else 1 / norm.detach().to(torch.promote_types(norm.dtype, torch.float32))
    if norm is not None:
        return None
    if samples is None:
        raise PairMismatchError(
            "The model's second norms are folded, and these adapters, which read the MLP's input, do not carry "
            "the weights of those norms. Load the model with from_pretrained_no_processing."
        )
    return samples[layer].ln2_w


def _require_names(role: str, recorded: str, given: str) -> None:
    """Compare names, for adapters that carry no samples of their models, where both names are known."""
    if recorded and given and short_model_name(recorded) != short_model_name(given):
        raise PairMismatchError(
            f"These adapters carry no samples of their {role}'s weights. Its recorded name is {recorded}; given is "
            f"{given}. Give the whole set as it was saved, which identifies its {role} by content, or the {role} of "
            "that name."
        )


def short_model_name(name: str) -> str:
    """The last part of an id or path in lower case, which copies of a model usually share."""
    return name.rstrip("/").rpartition("/")[2].lower()
