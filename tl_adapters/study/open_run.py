"""Opens what a run folder or a configuration names: the pair, its adapters, its documents."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from tl_adapters import organism
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.checkpoints.device_map import DeviceMap, DeviceMapError, MaxMemory
from tl_adapters.config import BackendName, DataConfig, RunConfig
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.chat_template import set_template_date
from tl_adapters.data.columns import ConversationColumns
from tl_adapters.data.documents import EncodedDocuments, open_documents
from tl_adapters.data.sources import PairRecords, ShuffledReader
from tl_adapters.data.traces import DataError
from tl_adapters.errors import UserError
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.processes import processes
from tl_adapters.utils.devices import AUTO, GivenDevice, GivenDtype
from tl_adapters.utils.files import alone_in, require_writable
from tl_adapters.utils.printing import command
from tl_adapters.utils.results import read_results

ORGANISM_TRACES = 20_000
"""Training documents of the model organism."""


P = ParamSpec("P")
T = TypeVar("T")


def load_organism_pair(
    device: GivenDevice = None, dtype: torch.dtype | None = None, backend: BackendName | None = None
) -> PairedModel:
    """The model organism as a pair. ``device`` None is the first available of cuda, mps and cpu."""
    return open_pair(RunConfig(backend=backend), device, dtype)


def open_pair(config: RunConfig, device: GivenDevice = None, dtype: torch.dtype | None = None) -> PairedModel:
    """The pair that a configuration names, on ``device``.

    Args:
        device: None and "auto" are the configuration's device map, or else the first available of cuda, mps and cpu.
        dtype: of the models' weights; None is the configuration's.

    Raises what `PairedModel.from_pretrained` raises.
    """
    if dtype is None and config.dtype is not None:
        dtype = getattr(torch, config.dtype)
    models = (config.base, config.target) if config.target else (organism.BUILTIN_BASE, organism.BUILTIN_TARGET)
    where: dict[str, Any] = {"device": device}
    if device in (None, AUTO) and config.device_map is not None:
        processes().require_one("A pair with a device map")  # the map names the devices of all of them
        where = {"device_map": config.device_map, "max_memory": config.max_memory}
    return PairedModel.from_pretrained(*models, dtype=dtype, backend=config.backend, **where)


def open_run(
    folder: Path,
    device: GivenDevice = None,
    dtype: GivenDtype | None = None,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
) -> PairedModel:
    """The pair of a run with its adapters loaded, on ``device``.

    Args:
        folder: the run.
        device: None and "auto" are the run's device map, or else the first available of cuda, mps and cpu.
        dtype: of the models' weights; None is the run's.
        device_map, max_memory: in place of the run's own, as `PairedModel.from_pretrained` takes them.

    Raises UserError where the run has no adapters yet, and DeviceError.
    """
    require_adapters(folder)
    adapters = AdapterSet.from_pretrained(folder / "adapters")
    config = with_device_map(RunConfig.of_run(folder), device, device_map, max_memory)
    own: Any = dtype or config.dtype
    pair = open_pair(replace(config, dtype=own), device)
    set_run_date(folder, pair.model.tokenizer)
    pair.load_adapters(adapters)
    return pair


def with_device_map(
    config: RunConfig, device: GivenDevice, device_map: DeviceMap | None, max_memory: MaxMemory | None
) -> RunConfig:
    """The configuration with another device map, where one is given. Raises DeviceMapError beside a ``device``."""
    if device_map is None and max_memory is None:
        return config
    if device not in (None, AUTO):
        raise DeviceMapError(f"device={str(device)!r} and device_map= were given; give one of them.")
    given: Any = _named(device_map) if isinstance(device_map, Mapping) else device_map
    return replace(config, device_map=given, max_memory=None if max_memory is None else _named(max_memory))


def _named(values: Mapping[Any, Any]) -> dict[str, Any]:
    """A mapping as a configuration has it: keys are text, and devices are numbers or text."""
    return {str(key): value if isinstance(value, int) else str(value) for key, value in values.items()}


def set_run_date(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Fix the date that the template of a run's tokenizer writes, where it writes one, to the run's own."""
    set_template_date(tokenizer, _date(RunConfig.of_run(folder).data))


def alone_in_run(work: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path, P], T]:
    """A stage of a run that holds the run folder's lock, so that no other process trains or measures in it meanwhile.

    Raises FolderBusyError and WriteError before anything is loaded.
    """

    @wraps(work)
    def alone(folder: Path, /, *args: P.args, **options: P.kwargs) -> T:
        if not folder.is_dir():  # the stage says what is missing
            return work(folder, *args, **options)
        processes().together(lambda: require_writable(folder))
        with processes().held_by_main(alone_in(folder)):
            return work(folder, *args, **options)

    return alone


def require_adapters(folder: Path) -> None:
    """Raises UserError where a run folder has no adapters."""
    if not (folder / "adapters").is_dir():
        opened = command("open", folder, out="runs/opened")
        raise UserError(
            f"{folder} has no adapters; give the folder of a train or demo run that has finished. Adapters that are "
            f"not of a run become one with: {opened}"
        )


def _date(data: DataConfig) -> datetime.date | None:
    return None if data.template_date is None else datetime.date.fromisoformat(data.template_date)


def open_data(config: RunConfig, pair: PairedModel) -> EncodedDocuments:
    """The documents that a configuration names, in the target's chat format. Raises DataError."""
    data, training = config.data, config.training
    chat = ChatFormat.of(pair.model.tokenizer, data.think_start, data.think_end, _date(data))
    n_ctx = pair.model.cfg.n_ctx
    if data.source:
        return open_documents(data, chat, n_ctx, training.seed, training.count)
    if config.target:
        raise DataError("data.source is empty; give a .jsonl file or a dataset's name (--data on the command line).")
    pairs = organism.reasoning_pairs("train", ORGANISM_TRACES, training.seed)
    reader = ShuffledReader(PairRecords(pairs, organism.BUILTIN_TEXT), ConversationColumns(data))
    return EncodedDocuments(reader, chat, data, n_ctx, training.seed, training.count)


def open_held_out(config: RunConfig, data: str, pair: PairedModel) -> EncodedDocuments:
    """The held-out documents of ``data``, in the chat format of the run. Raises DataError."""
    revision = config.data.revision if data == config.data.source else None  # a commit is of one repository
    options: dict[str, Any] = dict(streaming=False, validation_fraction=0.0, validation_split=None)
    held_out = replace(config.data, source=data, revision=revision, **options)
    # Only the response is measured, so only documents that have one count.
    training = replace(config.training, count=("thinking", "answer"))
    return open_data(replace(config, data=held_out, training=training), pair)


def is_organism_run(folder: Path) -> bool:
    """Whether the run in ``folder`` was made on the model organism. Raises UserError if its pair is not recorded."""
    pair = read_results(folder).get("pair")
    if pair is None:
        raise UserError(f"{folder / 'results.json'} does not record a pair; give a folder that train or demo made.")
    return bool(pair["target"] == organism.BUILTIN_TARGET)
