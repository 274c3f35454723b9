"""A saved training state: adapters, the stage's tensors and counters, each checked before a run continues from it.

adapters/               the adapters, as everywhere
optimizer.safetensors   the tensors of the stage: Adam's moments and step counts, and what the local stage measured
state.json              the counters

The tensors of the end-to-end stage are named "parameter index.key", and after a local stage also "layer.L.name"
(`AdapterAdam.tensors`). Those of the local stage are named "L.name" (`LocalStage.state`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.file_hashes import file_hash
from tl_adapters.config import TrainingConfig
from tl_adapters.data.batching import OrderPosition
from tl_adapters.local_stage.token_buffer import StreamPosition
from tl_adapters.utils.files import write_tensors, write_text
from tl_adapters.utils.reading import Record, UnreadableFileError, read_record, read_tensors

_STATE_FILE, _TENSORS_FILE = "state.json", "optimizer.safetensors"


def state_folder(step: int) -> str:
    """The name of the folder of the training state after a step."""
    return f"step-{step:08d}"


class TrainingCounters(Record):
    """state.json: everything of a training state except its tensors."""

    schema_version: Literal[1] = 1
    step: NonNegativeInt
    """Steps done."""
    tokens: NonNegativeInt
    """Tokens trained on, without padding."""
    seconds: NonNegativeFloat
    """Seconds of training, over all processes that worked on the run."""
    order: OrderPosition
    stream: StreamPosition | None = None
    """Where the tokens of the local stage were read; None in the end-to-end stage."""
    optimizer_sha256: str | None = None
    """Hash of the file of tensors; None in states of the first release."""


@dataclass(frozen=True)
class TrainingState:
    """What a run resumes from."""

    adapters: AdapterSet
    tensors: Mapping[str, Tensor]
    """The tensors of the stage by name."""
    counters: TrainingCounters

    def save(self, folder: Path) -> None:
        """Write the state into a new folder. Raises WriteError."""
        self.adapters.save_pretrained(folder / "adapters")
        write_tensors(folder / _TENSORS_FILE, self.tensors)
        counters = self.counters.model_copy(update={"optimizer_sha256": file_hash(folder / _TENSORS_FILE)})
        write_text(folder / _STATE_FILE, counters.json_text(indent=None))

    @classmethod
    def load(cls, folder: Path, like: AdapterSet, config: TrainingConfig) -> TrainingState:
        """Read a state that `save` wrote.

        Args:
            folder: its folder.
            like: adapters of the run, whose tensors have the names and shapes of those that are read.
            config: options of the run, whose stages decide which other tensors there are.

        Raises:
            UserError: a file is missing or damaged, or is another run's.
        """
        counters, tensors_file = read_record(TrainingCounters, folder / _STATE_FILE, ""), folder / _TENSORS_FILE
        if folder.name != state_folder(counters.step):
            raise UnreadableFileError(f"{folder / _STATE_FILE} is that of step {counters.step}.")
        if (counters.stream is not None) is not in_local_stage(config, counters.step):
            raise UnreadableFileError(f"{folder / _STATE_FILE} is that of another stage.")
        if tensors_file.is_file() and counters.optimizer_sha256 not in (None, file_hash(tensors_file)):
            raise UnreadableFileError(f"The content of {tensors_file} is not the one that was written.")
        tensors = read_tensors(tensors_file, advice="")
        _require_shapes(_tensor_shapes(like, config, counters.step), tensors, tensors_file)
        adapters = AdapterSet.from_pretrained(folder / "adapters")
        _require_shapes(_shapes(like.state_dict()), adapters.state_dict(), folder / "adapters")
        return cls(adapters, tensors, counters)


def local_steps(config: TrainingConfig) -> int:
    """Number of steps of the local stage of a run; 0 without that stage."""
    return config.local.steps if "local" in config.stages else 0


def in_local_stage(config: TrainingConfig, step: int) -> bool:
    """Whether a training state after so many steps of a run is one of the local stage.

    That after its last step is, because useless features are removed afterwards.
    """
    return 0 < step <= local_steps(config)


def _tensor_shapes(like: AdapterSet, config: TrainingConfig, step: int) -> dict[str, torch.Size]:
    """Names and shapes of the tensors that belong to a training state after so many steps."""
    scalar, vector, d_model = torch.Size(()), torch.Size([like.n_features]), torch.Size([like.d_model])
    coordinates = {"mean": d_model, "matrix": d_model + d_model, "size": scalar}
    shapes: dict[str, torch.Size] = {}
    if in_local_stage(config, step):
        for layer, adapter in enumerate(like):
            own = {**_shapes(adapter.state_dict()), **coordinates, "inactive_steps": vector}
            for name, parameter in adapter.named_parameters():
                own |= {f"{name}.{key}": shape for key, shape in _moment_shapes(parameter).items()}
            shapes |= {f"{layer}.{name}": shape for name, shape in own.items()}
        return shapes
    for index, parameter in enumerate(like.parameters()):
        shapes |= {f"{index}.{key}": shape for key, shape in _moment_shapes(parameter).items()}
    if local_steps(config):
        for layer, adapter in enumerate(like):
            placed = {**_shapes(adapter.state_dict()), **coordinates}
            shapes |= {f"layer.{layer}.{name}": shape for name, shape in placed.items()}
    return shapes


def _moment_shapes(parameter: Tensor) -> dict[str, torch.Size]:
    """What Adam keeps for a parameter."""
    return {"step": torch.Size(()), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}


def _require_shapes(expected: Mapping[str, torch.Size], found: Mapping[str, Tensor], source: Path) -> None:
    """Raises UnreadableFileError for the first tensor that is missing, unknown, not finite, or of another shape."""
    for name in sorted({*expected, *found}):
        if name not in found or name not in expected:
            problem = "is missing" if name in expected else "does not belong there"
            raise UnreadableFileError(f"{source}: the tensor {name} {problem}.")
        value = found[name]
        if value.shape != expected[name] or not value.is_floating_point():
            raise UnreadableFileError(
                f"{source}: the tensor {name} is {value.dtype} of shape {tuple(value.shape)}; allowed are "
                f"floating-point numbers of shape {tuple(expected[name])}."
            )
        if not bool(value.isfinite().all()):
            raise UnreadableFileError(f"{source}: the tensor {name} holds NaN or infinities.")
