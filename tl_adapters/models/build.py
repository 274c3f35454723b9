"""A TransformerLens model made of a Hugging Face model, and the backend of an existing TransformerLens model.

    "hooked"   HookedTransformer: the model of TransformerLens 3 and SAELens; faster
    "bridge"   TransformerBridge: the model of TransformerLens 3.9 and 4

Both give the same hook names and, to rounding, the same values. TransformerLens 4 has only the second.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import version
from typing import Any, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.checkpoints.architectures import UnsupportedModelError
from tl_adapters.checkpoints.device_map import DeviceMapError
from tl_adapters.config import BackendName
from tl_adapters.models.backend import Backend
from tl_adapters.models.hf_outputs import HFOutputs, record_hf_outputs
from tl_adapters.models.output_agreement import require_agreement


def default_backend() -> BackendName:
    """ "hooked" where TransformerLens still has HookedTransformer, else "bridge"."""
    return "hooked" if _has_hooked_transformer() else "bridge"


def require_mapping_backend(backend: str | None) -> None:
    """Raises DeviceMapError for a backend that cannot have a model's weights on several devices, or offloaded."""
    installed = f"TransformerLens {version('transformer-lens')} is installed"
    if (backend or default_backend()) == "hooked":
        raise DeviceMapError(
            "device_map= needs backend='bridge': the weights of a HookedTransformer are on one device. It needs "
            f"TransformerLens 4 as well; {installed}."
        )
    component = importlib.import_module("transformer_lens.model_bridge.generalized_components.base")
    if not hasattr(component, "align_module_device"):  # a release whose bridge computes with the empty placeholders
        raise DeviceMapError(
            f"device_map= needs TransformerLens 4, whose bridge reads offloaded weights; {installed}. Install "
            "'transformer-lens>=4' (without SAELens, which pins it below), or give device= and a dtype that fits."
        )


def build_model(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    backend: str | None = None,
    hf_outputs: HFOutputs | None = None,
) -> Any:
    """``hf_model`` as a HookedTransformer or TransformerBridge, sharing its weights, and computing the same.

    Args:
        hf_model: a Hugging Face model; a TransformerBridge changes it in place.
        tokenizer: the tokenizer that the new model gets.
        backend: "hooked" or "bridge"; None takes `default_backend`.
        hf_outputs: the outputs of ``hf_model`` on a few tokens (`record_hf_outputs`); None records them here.

    Raises:
        UnsupportedModelError: a model that TransformerLens does not represent.
        DisagreementError: a model whose outputs differ between the two libraries (`require_agreement`).
    """
    backend = backend or default_backend()
    if backend not in get_args(BackendName):
        raise UnsupportedModelError(f"There is no backend {backend!r}; choose {' or '.join(get_args(BackendName))}.")
    if backend == "hooked" and not _has_hooked_transformer():
        raise UnsupportedModelError(
            "TransformerLens 4 has no HookedTransformer. Use backend='bridge', or install 'transformer-lens<4'."
        )
    hf_outputs = hf_outputs or record_hf_outputs(hf_model, tokenizer)
    if backend == "bridge":
        from tl_adapters.models.transformer_bridge import build_bridge

        model: Any = build_bridge(hf_model, tokenizer)
    else:
        from tl_adapters.models.hooked_transformer import build_hooked_transformer

        model = build_hooked_transformer(hf_model, tokenizer)
    require_agreement(backend_of(model), hf_outputs)
    return model


def backend_of(model: Any) -> Backend:
    """The backend of an existing TransformerLens model. Raises UnsupportedModelError for anything else."""
    transformer_bridge = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
    if isinstance(model, transformer_bridge):
        from tl_adapters.models.transformer_bridge import BridgedBackend

        return BridgedBackend(model)
    if _has_hooked_transformer():
        from transformer_lens import HookedTransformer

        if isinstance(model, HookedTransformer):
            from tl_adapters.models.hooked_transformer import HookedBackend

            return HookedBackend(model)
    raise UnsupportedModelError(
        f"A {type(model).__name__} is not a model of TransformerLens; give a HookedTransformer (SAELens's included) or "
        "a TransformerBridge. A Hugging Face model goes into PairedModel.from_pretrained(base, target)."
    )


def _has_hooked_transformer() -> bool:
    return importlib.util.find_spec("transformer_lens.HookedTransformer") is not None
