"""A saved training state: adapters, Adam's moments and counters, each checked before a run continues from it.

adapters/               the adapters, as everywhere
optimizer.safetensors   Adam's moments and step counts, each named "parameter index.key"
state.json              the counters
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.file_hashes import file_hash
from tl_adapters.utils.files import write_tensors, write_text
from tl_adapters.utils.reading import Record, UnreadableFileError, read_record, read_tensors

_STATE_FILE, _MOMENTS_FILE = "state.json", "optimizer.safetensors"


def state_folder(step: int) -> str:
    """The name of the folder of the training state after a step."""
    return f"step-{step:08d}"


class OrderPosition(Record):
    """The beginning of the current window of documents (`BatchOrder.position`)."""

    epoch: NonNegativeInt
    window: NonNegativeInt
    first_step: NonNegativeInt
    source: NonNegativeInt | dict[str, Any] | None
    """Position of the reader; its form is the reader's."""


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
    optimizer_sha256: str | None = None
    """Hash of the file of moments; None in states of the first release."""


@dataclass(frozen=True)
class TrainingState:
    """What a run resumes from."""

    adapters: AdapterSet
    moments: Mapping[str, Tensor]
    """Adam's moments and step counts by name (`moments_by_name`)."""
    counters: TrainingCounters

    def save(self, folder: Path) -> None:
        """Write the state into a new folder. Raises WriteError."""
        self.adapters.save_pretrained(folder / "adapters")
        write_tensors(folder / _MOMENTS_FILE, self.moments)
        counters = self.counters.model_copy(update={"optimizer_sha256": file_hash(folder / _MOMENTS_FILE)})
        write_text(folder / _STATE_FILE, counters.json_text(indent=None))

    @classmethod
    def load(cls, folder: Path, like: AdapterSet) -> TrainingState:
        """Read a state that `save` wrote.

        Args:
            folder: its folder.
            like: adapters of the run, whose tensors have the names and shapes of those that are read.

        Raises:
            UserError: a file is missing or damaged, or is another run's.
        """
        counters, moments_file = read_record(TrainingCounters, folder / _STATE_FILE, ""), folder / _MOMENTS_FILE
        if folder.name != state_folder(counters.step):
            raise UnreadableFileError(f"{folder / _STATE_FILE} is that of step {counters.step}.")
        if moments_file.is_file() and counters.optimizer_sha256 not in (None, file_hash(moments_file)):
            raise UnreadableFileError(f"The content of {moments_file} is not the one that was written.")
        moments = read_tensors(moments_file, advice="")
        _require_shapes(_moment_shapes(like), moments, moments_file)
        adapters = AdapterSet.from_pretrained(folder / "adapters")
        shapes = {name: value.shape for name, value in like.state_dict().items()}
        _require_shapes(shapes, adapters.state_dict(), folder / "adapters")
        return cls(adapters, moments, counters)


def moments_by_name(optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    """Adam's moments and step counts, each named "parameter index.key"."""
    return {
        f"{index}.{key}": value.contiguous()
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


def restore_moments(optimizer: torch.optim.Adam, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `moments_by_name`."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _moment_shapes(adapters: AdapterSet) -> dict[str, torch.Size]:
    """Names and shapes of the tensors that Adam keeps for adapters."""
    shapes: dict[str, torch.Size] = {}
    for index, parameter in enumerate(adapters.parameters()):
        of_key = {"step": torch.Size(()), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        shapes |= {f"{index}.{key}": shape for key, shape in of_key.items()}
    return shapes


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
