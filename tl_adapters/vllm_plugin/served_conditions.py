"""The conditions of an exported folder, as its config.json describes them, and the files by which requests name them.

A *condition* is what one model name of the engine computes: which of the two MLPs, with or without the adapters, and
with which factor on every feature. The engine's own name for a condition is a LoRA of rank 1 with a single number, the
condition's index: vLLM passes every token's LoRA to the model, keeps conditions apart in its cache of prefixes, and
takes their names in requests. Nothing of the model's weights is changed by these LoRAs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tl_adapters.config import ActivationName
from tl_adapters.errors import UserError
from tl_adapters.utils.reading import Record, as_record

CONDITION_MODULE = "condition"
"""Name of the module of the model that a condition's LoRA belongs to."""
CONDITIONS_FOLDER = "conditions"
"""Folder of an export that holds a folder for every condition."""
MOST_CONDITIONS = 256
"""Indices up to this number are exact in bfloat16."""
SERVED_PREFIX = "TLAdapters"
"""What stands before the architecture's name in config.json."""
SERVING_VERSION: Literal[1] = 1
WORKER_EXTENSION = "tl_adapters.vllm_plugin.worker.ConditionWorker"
"""What vLLM adds to its workers, so that conditions can be defined while the engine runs."""
_EXPORT_AGAIN = "Export the adapters again with this version of tl_adapters."


class ServedModelError(UserError, ValueError):
    """An exported folder, or options of vLLM, with which the conditions cannot be served."""


class Condition(Record):
    """What one model name of the engine computes."""

    name: str = Field(min_length=1, pattern=r"^[\w.+-]+$")
    """Name of the condition in requests."""
    base_mlp: bool
    """Whether the base's MLPs compute instead of the target's."""
    adapter: bool
    """Whether the adapters' outputs are added."""
    decoder_bias: bool = True
    """Whether the adapters add their decoder bias."""
    factors: int | None = Field(default=None, ge=0)
    """Row of the factors of every layer's features; None leaves all features as they are."""


class ServedAdapters(Record):
    """The entry "tl_adapters" of an exported folder's config.json."""

    stream: Literal["vllm"]
    """Which of the models that this package writes the folder holds."""
    version: Literal[1]
    """Version of this entry."""
    target: str
    """Name of the target."""
    mlps_of: str
    """Name of the base."""
    activation: ActivationName
    """Activation function of the adapters."""
    k: int | None = Field(default=None, ge=1)
    """Active features per token of topk and batchtopk."""
    n_features: int = Field(ge=1)
    """Features per layer."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Dtype in which the adapters are stored and compute."""
    model_dtype: Literal["float32", "bfloat16", "float16"]
    """Dtype of the target's weights. vLLM, left to itself, computes models in float32 in bfloat16."""
    factor_rows: int = Field(ge=0)
    """Number of rows of feature factors."""
    spare: int = Field(default=0, ge=0)
    """Number of conditions, the last ones, that are defined while the engine runs."""
    fingerprint: str
    """Content hash of adapters, target and base, which the served model's name ends with."""
    conditions: tuple[Condition, ...] = Field(min_length=1, max_length=MOST_CONDITIONS)
    """The conditions by index; the first is what the engine computes where a request names none."""


def read_served(entry: Any) -> ServedAdapters:
    """The description in a config.json. Raises ServedModelError for one that is missing, damaged or inconsistent."""
    try:
        served = as_record(ServedAdapters, entry, "The entry tl_adapters of config.json", _EXPORT_AGAIN)
    except UserError as error:
        raise ServedModelError(str(error)) from error
    names = [condition.name for condition in served.conditions]
    rows = [condition.factors for condition in served.conditions if condition.factors is not None]
    spare = served.conditions[len(served.conditions) - served.spare :] if served.spare else ()
    named_twice, no_row = len(set(names)) < len(names), any(row >= served.factor_rows for row in rows)
    if named_twice or no_row or served.spare > len(names) or any(condition.factors is None for condition in spare):
        raise ServedModelError(
            f"The conditions of config.json have the names {names} and the rows {rows} of {served.factor_rows} rows "
            f"of factors, and {served.spare} are spare; names are given once, rows exist, and spare conditions have "
            f"one. {_EXPORT_AGAIN}"
        )
    return served


def spare_condition(number: int, first_row: int) -> Condition:
    """A condition that is defined while the engine runs; until then it is the replacement.

    Args:
        number: of the condition among the spare ones.
        first_row: the first row of factors that belongs to them.
    """
    return Condition(name=f"spare-{number}", base_mlp=True, adapter=True, factors=first_row + number)


def condition_lora(index: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The adapter_config.json and the tensors of the LoRA by which requests name the condition of an index."""
    description = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": [CONDITION_MODULE],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    prefix = f"base_model.model.{CONDITION_MODULE}"
    tensors = {
        f"{prefix}.lora_A.weight": torch.ones(1, 1),
        f"{prefix}.lora_B.weight": torch.full((1, 1), float(index)),
    }
    return description, tensors


def lora_options(n_conditions: int) -> dict[str, Any]:
    """The options of vLLM's engine with which requests can name ``n_conditions`` conditions."""
    return {
        "enable_lora": True,
        "max_loras": n_conditions,
        "max_lora_rank": 1,
        "lora_target_modules": [CONDITION_MODULE],
    }


def require_indices(indices: Sequence[int], served: ServedAdapters) -> None:
    """Raises ServedModelError for an index that no condition has, as a LoRA of another export would give."""
    if unknown := [index for index in indices if not 0 <= index < len(served.conditions)]:
        raise ServedModelError(
            f"A request names condition {unknown[0]}; this model has {len(served.conditions)}. Give vLLM the folders "
            f"in {CONDITIONS_FOLDER} of the export that it serves."
        )
