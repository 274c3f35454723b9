"""Adapters and documents by one name, whoever made them: a pair, a run folder that every later stage takes, traces."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tl_adapters import organism
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.checkpoints.device_map import DeviceMap, MaxMemory
from tl_adapters.checkpoints.hub_client import hub_token
from tl_adapters.checkpoints.model_files import at_revision, fetch
from tl_adapters.config import BackendName, DataConfig, RunConfig, TrainingConfig
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.documents import open_documents
from tl_adapters.data.traces import DataError, Trace
from tl_adapters.errors import UserError
from tl_adapters.evaluation.tasks import ORGANISM_TASK, TASKS, load_problems
from tl_adapters.generation.responses import respond, traces_of
from tl_adapters.interop.any_set import is_authors_checkpoint, read_adapters
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.study.open_run import open_pair, open_run, with_device_map
from tl_adapters.study.train import pair_block
from tl_adapters.utils.devices import GivenDevice, GivenDtype
from tl_adapters.utils.files import new_folder, require_absent, require_writable, write_text
from tl_adapters.utils.results import versions, write_results
from tl_adapters.utils.strict_json import dumps

log = logging.getLogger(__name__)


def load(
    name: str | Path,
    *,
    base: str | None = None,
    target: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    device: GivenDevice = None,
    dtype: GivenDtype | None = None,
    backend: BackendName | None = None,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
) -> PairedModel:
    """A pair with its adapters, by one name: a run, or adapters of any form that this package reads.

    Args:
        name: a run folder, a folder or a repository on the hub of adapters (`interop.any_set.read_adapters`).
        base: folder or hub name (also USER/NAME@REVISION) of the base; None is the one that the adapters record.
        target: likewise of the target.
        revision: branch, tag or commit of the adapters' repository; a folder has none.
        token: for private or gated repositories; None takes HF_TOKEN or the stored login.
        device: where the weights go; None and "auto" are a run's own device map, or the first available of cuda, mps
            and cpu.
        dtype: of the models' weights, "bfloat16" or torch.bfloat16; None is the run's own, or the target's.
        backend, device_map, max_memory: as in `PairedModel.from_pretrained`.

    Raises UserError where adapters or models are missing, unknown, or do not belong together.
    """
    with hub_token(token):
        if (Path(name) / "config.json").is_file() and (Path(name) / "adapters").is_dir() and base is target is None:
            if given := [word for word, value in (("revision", revision), ("backend", backend)) if value is not None]:
                raise UserError(f"{name} is a run, which is opened as it was made; leave out {' and '.join(given)}.")
            return open_run(Path(name), device, dtype, device_map, max_memory)
        adapters = read_adapters(name, revision=revision, token=token)
        config = _config(name, adapters, base, target, dtype, backend, revision)
        return _pair(with_device_map(config, device, device_map, max_memory), adapters, device)


def open_set(
    name: str | Path,
    out: Path,
    *,
    base: str | None = None,
    target: str | None = None,
    revision: str | None = None,
    device: GivenDevice = None,
    dtype: GivenDtype | None = None,
) -> AdapterSet:
    """Write a run folder with somebody's adapters, after they were loaded into their pair and fitted it.

    Args:
        out: folder to make, which evaluate, features, attribute and every later stage take.
        name, base, target, revision, device, dtype: as in `load`.

    Returns the adapters. Raises UserError; nothing is written then.
    """
    require_absent(out)
    require_writable(out)
    adapters = read_adapters(name, revision=revision)
    config = _config(name, adapters, base, target, dtype, None, revision)
    pair = _pair(config, adapters, device)
    about, (base_commit, target_commit) = adapters.metadata, pair.revisions
    if not about.base:
        about = replace(about, base=pair.base_id, base_revision=base_commit)
    if not about.target:
        about = replace(about, target=pair.target_id, target_revision=target_commit)
    adapters.metadata = about
    with new_folder(out) as folder:
        write_text(folder / "config.json", dumps(config.to_dict(), indent=1) + "\n")
        adapters.save_pretrained(folder / "adapters")
        opened = {"name": str(name), "revision": revision, "n_features": adapters.n_features}
        opened["fingerprint"] = adapters.fingerprint
        write_results(folder, pair=pair_block(pair), opened=opened, versions=versions())
    return adapters


def load_traces(
    source: str | Path,
    pair: PairedModel,
    *,
    n: int = 64,
    data: DataConfig | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> list[Trace]:
    """Documents in the chat format of a pair's target.

    Args:
        source: a .jsonl file or a dataset of the hub, of prompts and responses; or the name of a benchmark, such as
            gsm8k, whose first problems the target answers greedily ("builtin" is the model organism's).
        pair: the pair; a benchmark is answered on its route "target".
        n: most documents. Of a benchmark there are fewer where answers were cut at their limit, which is logged.
        data: columns, split, think tags and other options; its source is not read.
        max_new_tokens: longest answer to a benchmark's problem; None is the task's own.
        seed: order of a dataset's documents.

    Raises DataError, and TaskError for a benchmark that cannot be loaded.
    """
    if n < 1:
        raise DataError(f"n is {n}; allowed is a whole number >= 1.")
    if str(source) in (*TASKS, ORGANISM_TASK):
        loaded = load_problems(str(source), n=n, checked=False)
        problems = loaded.problems
        if not loaded.republish:
            log.warning("The texts of %s are not to be republished: graphs, pages and exports leave them out.", source)
        with pair.routed("target"):
            traces = traces_of(respond(pair.model, problems, max_new_tokens=max_new_tokens), pair.model.tokenizer)
        return [replace(trace, republish=loaded.republish) for trace in traces]
    given = data or DataConfig()
    config = replace(given, source=str(source), shuffle_window=min(given.shuffle_window, n))  # no more are encoded
    chat = ChatFormat.of(pair.model.tokenizer, config.think_start, config.think_end)
    documents = open_documents(config, chat, pair.model.cfg.n_ctx, seed)
    return list(islice((trace for _, window in documents.windows(0, None) for trace in window), n))


def _pair(config: RunConfig, adapters: AdapterSet, device: GivenDevice) -> PairedModel:
    pair = open_pair(config, device)
    pair.load_adapters(adapters)
    return pair


def _config(
    name: str | Path,
    adapters: AdapterSet,
    base: str | None,
    target: str | None,
    dtype: GivenDtype | None,
    backend: BackendName | None,
    revision: str | None,
) -> RunConfig:
    """The configuration of a run with these adapters. Raises UserError where base or target are not known."""
    about = adapters.metadata
    models = {"base": base or about.base, "target": target or about.target}
    if not models["base"] and is_authors_checkpoint(fetch(name, ["config.json"], revision=revision)):
        models["base"] = str(at_revision(name, revision))  # the checkpoint's own MLPs are the base's
    if missing := [role for role, model in models.items() if not model]:
        raise UserError(
            f"{name} does not say what its {' and '.join(missing)} are. Name them: "
            f"{' and '.join(f'--{role}' for role in missing)} on the command line, {'= and '.join(missing)}= in Python."
        )
    if models == {"base": organism.BUILTIN_BASE, "target": organism.BUILTIN_TARGET}:
        models = {"base": "", "target": ""}
    training = TrainingConfig(n_features=adapters.n_features, activation=about.activation)
    if about.k is not None:
        training = replace(training, k=about.k)
    own: Any = dtype  # a configuration takes its name
    return RunConfig(models["base"], models["target"], dtype=own, backend=backend, training=training)
