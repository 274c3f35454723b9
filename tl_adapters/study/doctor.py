"""Checks of a pair, its data and this machine, before anything expensive.

Of the models only the configuration, the tokenizer and the index or headers of the safetensors files are read, and of
local ones the MLPs; the weights of a hub model are not downloaded. Every finding says what to change, or why nothing
has to change.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from transformers import PretrainedConfig

from tl_adapters.adapters.set_folder import read_description
from tl_adapters.checkpoints.base_mlps import require_plain_folder
from tl_adapters.checkpoints.compatibility import Finding, compare_configs, compare_vocabularies
from tl_adapters.checkpoints.hf_model import load_config
from tl_adapters.checkpoints.model_checks import require_representable, require_stock_files, rope_parameters
from tl_adapters.checkpoints.model_files import (
    locate,
    mlp_tensor_names,
    read_config,
    read_vocabulary,
    remote_or_local_names,
)
from tl_adapters.checkpoints.tokenizers import load_tokenizer, without_embedding
from tl_adapters.circuits.search import SearchOptions
from tl_adapters.config import RunConfig
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.documents import DataStatistics, open_documents
from tl_adapters.data.template_differences import template_differences
from tl_adapters.errors import UserError
from tl_adapters.local_stage.signal_to_noise import SMALLEST_RATIO, stored_signal_to_noise
from tl_adapters.models.adapter_checks import short_model_name
from tl_adapters.models.weight_identity import recorded_samples, trained_on
from tl_adapters.organism import BUILTIN, BUILTIN_BASE, BUILTIN_TARGET
from tl_adapters.study.run_size import RunSize, SearchSize, estimate_search, estimate_size, stored_dtype
from tl_adapters.utils.devices import free_memory, resolve_device, seconds_of

_GB = 1e9
_LARGE_MLP, _MEASURED_LAYERS = 10_000_000, 4
"""With matrices of more weights than this, signal to noise is measured in so many layers only."""


BUSY_LOAD = 0.5
"""Load of the machine, as a share of torch's threads, above which `diagnose` reports it."""


def diagnose(
    config: RunConfig, out: Path = Path(), device: str = "auto", adapters: str | Path | None = None
) -> list[Finding]:
    """The findings for the run that ``config`` describes: the pair, the data, and this machine's memory and disk.

    Args:
        config: the run to check.
        out: folder that the run would be written under.
        device: device of the run; "auto" is the first available of cuda, mps and cpu.
        adapters: a run, a folder or a hub name of adapters, to check whether they belong to the pair.
    """
    findings: list[Finding] = []
    folders: dict[str, Path] = {}
    for role, name in (("base", config.base), ("target", config.target)):
        try:
            folders[role] = locate(name, weights=False)
            read_config(folders[role])
        except UserError as error:
            return [*findings, Finding("error", role, str(error))]
        findings.append(Finding("ok", role, f"{name}."))
    base, target = folders["base"], folders["target"]
    findings += compare_configs(read_config(base), read_config(target))
    try:
        described = load_config(target)
        require_representable(described)
    except UserError as error:
        return [*findings, Finding("error", "architecture", str(error))]
    findings += _rope_and_context(described, config)
    findings += _weights(config, base, target, described)
    if not any(finding.level == "error" for finding in findings):
        findings += _signal_to_noise(config, base, target, described)
    if adapters is not None:
        findings += _adapters(adapters, config, base, target, described)
    base_vocabulary, vocabulary = read_vocabulary(base), read_vocabulary(target)
    if base_vocabulary and vocabulary:
        findings += compare_vocabularies(base_vocabulary, vocabulary)
    of_documents, longest = _documents(config, target, described)
    findings += of_documents
    findings += _dtype(config, described)
    chosen = resolve_device(device)
    size = estimate_size(config, described, longest, chosen)
    less = _less_memory(config, described, longest, chosen)
    findings += [*_memory(size, chosen, config, less), _time(size, chosen)]
    findings += [*_processors(chosen), *_disk(size, config, out)]
    return [*findings, *_search(described, config, longest or size.tokens, chosen)]


def _documents(config: RunConfig, target: Path, described: PretrainedConfig) -> tuple[list[Finding], int]:
    """Findings on the chat template and the data, and the tokens of the longest document; 0 where it is not known."""
    findings: list[Finding] = []
    longest = described.max_position_embeddings if config.data.max_tokens is None else config.data.max_tokens
    checked = "chat template"
    try:
        chat = ChatFormat.of(load_tokenizer(target), config.data.think_start, config.data.think_end)
        findings += _chat(chat, described)
        checked = "data"
        if config.data.source:
            documents = open_documents(
                config.data, chat, described.max_position_embeddings, config.training.seed, config.training.count
            )
            statistics = documents.survey()
            findings.append(_data(statistics))
            if warning := documents.warning(statistics):
                findings.append(Finding("warning", "thinking", warning))
            longest = (statistics.lengths or {}).get("longest", longest)
        elif config.data.max_tokens is None:
            longest = 0  # the documents are not known, so the tokens of a batch are what counts
    except UserError as error:
        findings.append(Finding("error", checked, str(error)))
    return findings, longest


def plan_run(config: RunConfig, out: Path = Path(), device: str = "auto") -> list[Finding]:
    """Of `diagnose`, what a run would take (memory, time, disk space), and whatever stands in its way.

    Args: as `diagnose`. A configuration without a pair is the model organism's.
    """
    if not config.target:
        config = replace(config, base=BUILTIN_BASE, target=BUILTIN_TARGET)
    findings = diagnose(config, out, device)
    return [f for f in findings if f.level == "error" or f.subject in ("memory", "time", "disk")]


def _rope_and_context(described: PretrainedConfig, config: RunConfig) -> Iterator[Finding]:
    rope = rope_parameters(described)
    n_ctx, wanted = described.max_position_embeddings, config.data.max_tokens
    yield Finding("ok", "rope", f"{rope.get('rope_type', 'default')}, base {rope.get('rope_theta', 10000.0):g}.")
    if wanted is not None and wanted > n_ctx:
        says = f"max_tokens is {wanted:,}, the target's context {n_ctx:,}; documents end at {n_ctx:,}."
        yield Finding("warning", "context length", says, f"Set data.max_tokens to {n_ctx} or less.")
    else:
        yield Finding("ok", "context length", f"{n_ctx:,} tokens.")


def _is_local(name: str) -> bool:
    return name in BUILTIN or Path(name).is_dir()


def _weights(config: RunConfig, base: Path, target: Path, described: PretrainedConfig) -> Iterator[Finding]:
    needed = mlp_tensor_names(described.num_hidden_layers)
    for role, name, folder in (("base", config.base, base), ("target", config.target, target)):
        try:
            names = remote_or_local_names(name, folder)
        except UserError as error:
            yield Finding("error", f"{role}'s weights", str(error))
            continue
        local = _is_local(name)  # of a hub model only the names of its tensors are known
        try:
            if role == "base":
                require_plain_folder(folder, read_config(folder), names, needed if local else ())
            elif local:
                require_stock_files(folder, described)
        except UserError as error:
            yield Finding("error", f"{role}'s weights", str(error))
            continue
        missing = [tensor for tensor in needed if tensor not in names]
        if missing:
            says = f"{len(missing)} of {len(needed)} MLP tensors are missing, such as {missing[0]}."
            yield Finding("error", f"{role}'s weights", says, "Give a complete checkpoint of this architecture.")
        else:
            yield Finding("ok", f"{role}'s weights", f"safetensors, {len(names)} tensors, every MLP among them.")


def _signal_to_noise(config: RunConfig, base: Path, target: Path, described: PretrainedConfig) -> Iterator[Finding]:
    """Whether training changed MLPs by more than the rounding of their weights, where weights are on this machine."""
    if not (_is_local(config.base) and _is_local(config.target)):
        return
    n_layers = described.num_hidden_layers
    if described.hidden_size * described.intermediate_size > _LARGE_MLP:
        layers = sorted({round(i * (n_layers - 1) / (_MEASURED_LAYERS - 1)) for i in range(_MEASURED_LAYERS)})
    else:
        layers = list(range(n_layers))
    try:
        measured = {layer: stored_signal_to_noise(base, target, described, layer) for layer in layers}
    except UserError as error:
        yield Finding("error", "signal to noise", str(error))
        return
    where = "every layer" if len(layers) == n_layers else f"layers {', '.join(map(str, layers))}"
    lowest = min(value.ratio for value in measured.values())
    times = "more than 1,000" if lowest > 1_000 else f"at least {lowest:.2g}"
    says = f"the difference of the MLPs is {times} times the rounding of their weights in {where}, on random inputs."
    if unexplained := [layer for layer, value in measured.items() if not value.explainable]:
        few = ", ".join(map(str, unexplained))
        do = (
            f"Below {SMALLEST_RATIO:g} a difference is mostly rounding: the local stage measures it on the data and "
            f"leaves such layers unexplained, here {few}. Give checkpoints in float32, if there are any."
        )
        yield Finding("warning", "signal to noise", says, do)
    else:
        yield Finding("ok", "signal to noise", says)


def _adapters(
    name: str | Path, config: RunConfig, base: Path, target: Path, described: PretrainedConfig
) -> Iterator[Finding]:
    """Whether adapters fit the models' shapes and were trained on them; compared by content where weights are local."""
    inside = Path(name) / "adapters"
    try:
        about = read_description(inside if inside.is_dir() else name)
    except UserError as error:
        yield Finding("error", "adapters", str(error))
        return
    ours, theirs = (about.n_layers, about.d_model), (described.num_hidden_layers, described.hidden_size)
    says = (
        f"{len(about.layers)} of {ours[0]} layers of width {ours[1]}; the target has {theirs[0]} of width {theirs[1]}."
    )
    if ours != theirs:
        yield Finding("error", "adapters", says, "Give adapters of this model.")
        return
    yield Finding("ok", "adapters", says)
    local = {"target": _is_local(config.target), "base": _is_local(config.base)}
    try:
        if recorded_samples(about) and all(local.values()):
            for role, folder in (("target", target), ("base", base)):
                equal = trained_on(about, role, folder) is not False
                yield _belongs(equal, role, getattr(about.metadata, role), getattr(config, role))
        else:
            for role in local:
                yield _by_name(role, getattr(about.metadata, role), getattr(config, role))
    except UserError as error:
        yield Finding("error", "adapters", str(error))


def _belongs(equal: bool, role: str, recorded: str, given: str) -> Finding:
    trained = f"trained with {recorded or f'a {role} that was not recorded'}"
    if equal:
        return Finding("ok", f"adapters' {role}", f"{trained}, and {given} has the same weights, by content.")
    return Finding(
        "error", f"adapters' {role}", f"{trained}; {given} has other weights.", f"Give the {role} of the adapters."
    )


def _by_name(role: str, recorded: str, given: str) -> Finding:
    if short_model_name(recorded) == short_model_name(given):
        return Finding(
            "ok", f"adapters' {role}", f"{recorded}, by name; the weights are compared when they are loaded."
        )
    says = f"the adapters record {recorded or 'no name'}, and {given} was given; its weights are not on this machine."
    return Finding(
        "warning",
        f"adapters' {role}",
        says,
        "The weights are compared when the pair is loaded, and other weights are refused.",
    )


def _chat(chat: ChatFormat, described: PretrainedConfig) -> Iterator[Finding]:
    says = f"responses end with {chat.turn_end!r}; a prompt " + ("opens" if chat.opens_thinking else "does not open")
    yield Finding("ok", "chat template", f"{says} the thinking.")
    for difference in template_differences(chat):
        yield Finding("ok" if difference.intended else "warning", "chat template", difference.message)
    for tag in (chat.think_start, chat.think_end):
        pieces = chat.tokenizer(tag, add_special_tokens=False)["input_ids"]
        if len(pieces) == 1:
            yield Finding("ok", "think tokens", f"{tag} is one token.")
        else:
            do = "Regions are still found by text; set other tags with data.think_start and data.think_end."
            yield Finding("warning", "think tokens", f"{tag} is {len(pieces)} tokens of the target's tokenizer.", do)
    if beyond := without_embedding(chat.tokenizer, described.vocab_size):
        says = f"the tokenizer has {len(chat.tokenizer):,} tokens, the model {described.vocab_size:,} embeddings; "
        says += f"{', '.join(sorted(beyond, key=lambda token: beyond[token])[:5])} would have no embedding."
        yield Finding("error", "vocabulary", says, "Use the tokenizer that belongs to the target.")


def _data(statistics: DataStatistics) -> Finding:
    if not statistics.used:
        return Finding("error", "data", str(statistics), "Give documents that can be used.")
    cut = statistics.truncated + statistics.dropped > 0.1 * statistics.documents
    return Finding("warning" if cut else "ok", "data", str(statistics))


def _dtype(config: RunConfig, described: PretrainedConfig) -> Iterator[Finding]:
    stored, used = stored_dtype(described), config.dtype or stored_dtype(described)
    if used == "float16":
        do = "Set dtype to bfloat16 (same memory) or float32."
        yield Finding("warning", "dtype", "float16 overflows in long training of some models.", do)
    elif used != stored:
        yield Finding("ok", "dtype", f"weights are stored in {stored} and used in {used}; adapters are float32.")
    else:
        yield Finding("ok", "dtype", f"{used}; adapters are float32.")


def _less_memory(
    config: RunConfig, described: PretrainedConfig, longest: int, device: torch.device
) -> Iterator[tuple[str, RunSize]]:
    """Settings of the end-to-end stage that train the same with less memory, and the size with each of them."""
    training = config.training
    if "end_to_end" not in training.stages:
        return
    again = replace(training, recompute=True)
    # The tokens of a step stay the same, in more and smaller batches, none of them smaller than a document.
    parts = max(1, training.tokens_per_batch // longest) if longest else 1
    tokens, batches = training.tokens_per_batch // parts, training.batches_per_step * parts
    smaller = replace(training, tokens_per_batch=tokens, batches_per_step=batches)
    both = replace(again, tokens_per_batch=tokens, batches_per_step=batches)
    in_words = f"training.tokens_per_batch: {tokens} and training.batches_per_step: {batches}"
    for says, changed, worth in (
        ("training.recompute: true", again, not training.recompute),
        (in_words, smaller, parts > 1),
        (f"training.recompute: true, {in_words}", both, parts > 1 and not training.recompute),
    ):
        if worth:
            yield says, estimate_size(replace(config, training=changed), described, longest, device)


def _memory(
    size: RunSize, device: torch.device, config: RunConfig, less: Iterable[tuple[str, RunSize]]
) -> Iterator[Finding]:
    free, where = free_memory(device), str(device) if device.type == "cuda" else "this machine"
    largest = size.largest
    tokens = f", tokens {largest.tokens / _GB:.2g}" if largest.tokens else ""
    stage = f" in the stage {largest.stage}" if len(size.stages) > 1 else ""
    says = (
        f"about {size.memory / _GB:.2g} GB{stage} (models {size.models / _GB:.2g}, adapters with Adam "
        f"{largest.adapters / _GB:.2g}, activations of {size.tokens:,} tokens {largest.activations / _GB:.2g}"
        f"{tokens}); {where} has {free / _GB:.2g} GB free."
    )
    if config.device_map is not None:
        yield Finding("ok", "memory", f"{says} The device map's other devices are not counted.")
    elif size.memory > free:
        do = (
            "Use dtype bfloat16, fewer training.n_features, or a shorter data.max_tokens and training.tokens_per_batch."
        )
        if fits := next(((says, other) for says, other in less if other.memory <= free), None):
            do = f"Set {fits[0]}, which takes about {fits[1].memory / _GB:.2g} GB. Or: {do[0].lower()}{do[1:]}"
        if largest.tokens:
            do = f"Lower training.local.max_tokens, with training.local.streaming to read as many in turn. {do}"
        yield Finding("error", "memory", says, do)
    else:
        yield Finding("warning" if size.memory > 0.8 * free else "ok", "memory", says)


def _time(size: RunSize, device: torch.device) -> Finding:
    """The time of each stage by the speeds of a matrix product in the models' dtype and of an elementwise operation."""
    dtype = getattr(torch, size.dtype)
    each = (f"{stage.stage} {_duration(stage.seconds(device, dtype))}" for stage in size.stages)
    return Finding("ok", "time", f"{', '.join(each)} on {device}, by the speed of products in {size.dtype}.")


def _processors(device: torch.device) -> Iterator[Finding]:
    """What to do where other processes keep the processors busy."""
    load, n = psutil.getloadavg()[0], torch.get_num_threads()
    if device.type == "cpu" and n > 1 and load > BUSY_LOAD * n:
        says = (
            f"{n} threads of torch, and other processes use about {load:.1f} processors. Threads that wait for each "
            "other then keep a processor busy: the command line lets them sleep (OMP_WAIT_POLICY=passive); in Python "
            "set this variable before torch is imported, or set OMP_NUM_THREADS=1."
        )
        yield Finding("ok", "processors", says)


def _search(described: PretrainedConfig, config: RunConfig, tokens: int, device: torch.device) -> Iterator[Finding]:
    """The search of a circuit: its memory, and its time by the methods greedy and sampled."""
    options, n_features = SearchOptions(), config.training.n_features
    chosen = max(1, round(options.share * n_features * described.num_hidden_layers))
    shape = (described, n_features, chosen, options.documents, tokens)
    greedy, sampled = (
        estimate_search(*shape, given, config.dtype, device) for given in (options, replace(options, method="sampled"))
    )
    dtype = getattr(torch, config.dtype or stored_dtype(described))

    def duration(size: SearchSize) -> str:
        of_adapters = seconds_of(size.adapter_operations, device, torch.float32)
        return _duration(seconds_of(size.model_operations, device, dtype) + of_adapters)

    memory, free = greedy.memory, free_memory(device)
    says = (
        f"hesitation searches {chosen:,} features in {options.documents} texts of {tokens:,} tokens: about "
        f"{memory / _GB:.2g} GB, {duration(greedy)}; with --search sampled {duration(sampled)}."
    )
    if memory > free:
        do = "Take shorter texts (data.max_tokens), fewer training.n_features, or a machine with more memory."
        yield Finding("warning", "circuit", says, do)
    else:
        yield Finding("ok", "circuit", says)


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.0f} {unit}"
    return f"about {seconds:.0f} seconds"


def _disk(size: RunSize, config: RunConfig, out: Path) -> Iterator[Finding]:
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    n_kept = config.training.keep_checkpoints
    needed = (n_kept + 1) * size.checkpoint + size.result
    says = f"{needed / _GB:.2g} GB for {n_kept} + 1 checkpoints and the result; {folder} has {free / _GB:.2g} GB free."
    if needed > free:
        yield Finding("error", "disk", says, "Lower training.keep_checkpoints or write elsewhere (--out).")
    else:
        yield Finding("ok", "disk", says)


def format_findings(findings: list[Finding]) -> str:
    """The findings as text, one per line, with a summary in the last line."""
    lines = [f"{finding.level:8}{finding}" for finding in findings]
    errors, warnings = (sum(f.level == level for f in findings) for level in ("error", "warning"))
    summary = f"{errors} errors, {warnings} warnings."
    return "\n".join([*lines, summary])
