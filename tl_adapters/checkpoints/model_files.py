"""A model's files: where they are, and single tensors out of their safetensors shards.

The base of a pair contributes only its MLP tensors. They are read from its shards one by one, so its attention and
embeddings are never in memory. Only safetensors are read, never pickle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import get_safetensors_metadata, snapshot_download
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from tl_adapters.checkpoints.architectures import ARCHITECTURES, AUTHORS_CHECKPOINT_SUFFIX, architecture_name
from tl_adapters.checkpoints.hub_client import given_token, hub_errors
from tl_adapters.errors import UserError
from tl_adapters.organism import BUILTIN
from tl_adapters.utils.files import plain_file
from tl_adapters.utils.reading import UnreadableFileError, as_record, read_json_object

SHARD_INDEX_FILE = "model.safetensors.index.json"
SINGLE_WEIGHTS_FILE = "model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
"""The configuration file that the peft library writes next to LoRA weights."""
MLP_KEY = "model.layers.{}.mlp.{}.weight"
PROJECTIONS = {"gate_proj": "W_gate", "up_proj": "W_in", "down_proj": "W_out"}
"""Names of a gated MLP's weights: Hugging Face -> TransformerLens, which has the transposed matrices."""
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
"""Dtypes, as safetensors headers name them, whose values are the weights themselves (not quantized)."""
MAX_LAYERS, MAX_SIZE = 1_000, 100_000_000
"""The largest number of layers, and of anything else that config.json counts; with more, it is damaged."""
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Finite = Annotated[float, Field(ge=-1e18, le=1e18)]  # torch takes whole numbers of 64 bits
_LONGEST_REASON = 300
_REQUIRED_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size")
_COPY_AGAIN = "Copy or download the model again."
DESCRIPTION_FILES = ("*.json", "*.jinja", "merges.txt", "tokenizer.model")
"""Patterns of the files that describe a model, without its weights."""


class CheckpointError(UserError, ValueError):
    """Model files that cannot be used; the message names the file and what is wrong with it."""


def locate(name: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a model: ``name`` itself if it is a folder, otherwise the hub's files in the local cache.

    Only safetensors, JSON and tokenizer files are downloaded, and without ``weights`` no safetensors either.
    Raises CheckpointError where ``name`` is neither a folder nor a repository on the hub (offline: in its cache).
    """
    return fetch(name, [*DESCRIPTION_FILES, *(["*.safetensors"] if weights else [])], revision=revision)


def fetch(name: str | Path, patterns: Sequence[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """A local folder, or the hub's cache with the files of a repository that match ``patterns``.

    A file gets its name only when it is complete, and what has arrived is not downloaded again.

    Args:
        name: a folder, or a repository on the hub as USER/NAME or USER/NAME@REVISION.
        patterns: names of files, with * for any characters.
        revision: branch, tag or commit, if the name has none; a folder has none.
        token: None is that of `hub_token`, HF_TOKEN or the stored login; a folder needs none.

    Raises CheckpointError.
    """
    if (local := name in BUILTIN) or os.path.isdir(name):
        if revision is not None:
            raise CheckpointError(
                f"{name} is on this machine and has no revisions, and revision is {revision}: leave revision out, or "
                "give the name of a repository on the hub."
            )
        return BUILTIN[str(name)] if local else Path(name)
    if os.path.exists(name):
        raise CheckpointError(f"{name} is a file; give the folder that contains it.")
    if str(name).startswith(("./", "../", "/", "~")):
        trained = " The adapters were trained with a folder of another machine: give your copy of it." * (
            str(name).count("/") == 1
        )
        raise CheckpointError(f"There is no folder {name}.{trained} Check the spelling, or give a name on the hub.")
    repo, revision = _repository(str(name), revision)
    with hub_errors(f"{name} is not a folder, and the hub did not give its files", repo, error=CheckpointError):
        options = dict(revision=revision, allow_patterns=list(patterns), token=token or given_token())
        return Path(snapshot_download(repo, **options))


def at_revision(name: str | Path, revision: str | None) -> str | Path:
    """The name of a repository with a revision, if one is given and the name has none."""
    return name if revision is None or "@" in str(name) else f"{name}@{revision}"


def _repository(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Repository and revision of a name on the hub, USER/NAME or USER/NAME@REVISION. Raises CheckpointError."""
    repo, _, of_name = name.partition("@")
    if of_name and revision not in (None, of_name):
        raise CheckpointError(f"{name} names the revision {of_name}, and revision is {revision}; give one of them.")
    return repo, of_name or revision


def commit_of(folder: Path) -> str | None:
    """The hub commit that a folder of the hub's cache is a snapshot of; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def require_whole_model(folder: Path) -> None:
    """Raises CheckpointError for a folder of LoRA weights, with or without a model's own weights.

    transformers would load the model that LoRA weights belong to, or apply them to weights that may contain them
    already.
    """
    if not (folder / PEFT_CONFIG_FILE).is_file():
        return
    merge = "peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder)"
    if (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds a model's weights and {PEFT_CONFIG_FILE}: transformers would apply the adapter of the "
            f"peft library to these weights, also where they were merged with it before. Remove {PEFT_CONFIG_FILE} if "
            f"they were; else merge them: {merge}."
        )
    raise CheckpointError(f"{folder} holds an adapter of the peft library and no model. Merge the two: {merge}.")


def require_unquantized(folder: Path, names: Iterable[str] | None = None) -> None:
    """Raises CheckpointError where one of the named tensors (None: any tensor) is stored as quantized numbers."""
    wanted = None if names is None else set(names)
    for shard in shard_files(folder, wanted):
        with _open(folder / shard) as file:
            for name in file.keys():  # noqa: SIM118  # a safe_open is not a mapping
                if (wanted is None or name in wanted) and (
                    dtype := file.get_slice(name).get_dtype()
                ) not in WEIGHT_DTYPES:
                    raise CheckpointError(
                        f"{name} of {folder} is stored in {dtype}: these are quantized numbers, not the weights. Give "
                        "the checkpoint in bfloat16 or float32."
                    )


class _Rope(BaseModel):
    """What is read of a rotary embedding."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    rope_type: str | None = None
    type: str | None = None
    rope_theta: Finite | None = None


class _ConfigEntries(BaseModel):
    """What is read of a config.json before transformers reads it; there are other entries, of any kind."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())
    architectures: list[str] | None = None
    model_type: str | None = None
    auto_map: dict[str, Any] | None = None
    num_hidden_layers: Size | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    vocab_size: Size | None = None
    head_dim: Size | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    max_position_embeddings: Size | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    tie_word_embeddings: bool | None = None
    rope_theta: Finite | None = None
    rms_norm_eps: Finite | None = None
    initializer_range: Finite | None = None
    query_pre_attn_scalar: Finite | None = None
    attn_logit_softcapping: Finite | None = None
    final_logit_softcapping: Finite | None = None
    sliding_window: Size | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    transcoder_n_features: Size | None = None
    transcoder_dec_bias: bool | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json. Raises CheckpointError, also for a folder of LoRA weights."""
    require_whole_model(folder)
    path = plain_file(folder, "config.json")
    with _damaged():
        config = read_json_object(path, _COPY_AGAIN)
        as_record(_ConfigEntries, config, str(path), _COPY_AGAIN)
    supported = architecture_name(config).removesuffix(AUTHORS_CHECKPOINT_SUFFIX) in ARCHITECTURES
    if supported and (missing := [key for key in _REQUIRED_SIZES if config.get(key) is None]):
        raise CheckpointError(f"{path} lacks {missing[0]}. {_COPY_AGAIN}")
    if (layers := config.get("num_hidden_layers") or 0) > MAX_LAYERS:
        raise CheckpointError(f"{path} has num_hidden_layers {layers}; allowed are up to {MAX_LAYERS}. {_COPY_AGAIN}")
    return config


def read_tensors(folder: Path, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """The named tensors of a checkpoint, sharded or not. Raises CheckpointError, naming the first that is missing."""
    shards = _shards(folder)
    wanted: dict[str, list[str]] = {}
    for name in names:
        if shards and name not in shards:
            raise CheckpointError(
                f"{folder} has no tensor {name}; it is not a complete checkpoint of this architecture."
            )
        wanted.setdefault(shards.get(name, SINGLE_WEIGHTS_FILE), []).append(name)
    tensors = {}
    for shard, members in wanted.items():
        with _open(folder / shard, str(device)) as file:
            stored = set(file.keys())
            for name in members:
                if name not in stored:
                    raise CheckpointError(
                        f"{folder / shard} has no tensor {name}; it is not a complete checkpoint of this architecture."
                    )
                tensors[name] = file.get_tensor(name)
    return tensors


def read_values(folder: Path, name: str, positions: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Single values of a matrix, without reading the rest. Raises CheckpointError.

    Args:
        folder, name: as `read_tensors`.
        positions: from the number of values of the matrix, the positions to read in the flattened matrix.
    """
    with _open(folder / _shard_of(folder, name)) as file:
        if name not in file.keys():  # noqa: SIM118  # a safe_open is not a mapping
            raise CheckpointError(f"{folder} has no tensor {name}; it is not a complete checkpoint.")
        matrix = file.get_slice(name)
        if len(shape := matrix.get_shape()) != 2 or 0 in shape:
            raise CheckpointError(f"{folder}: {name} has the shape {shape}; expected a matrix. Copy the folder again.")
        rows, columns = shape
        return torch.stack([matrix[int(i) // columns, int(i) % columns] for i in positions(rows * columns)])


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint, from the headers of its shards.

    Raises CheckpointError for a missing, truncated or foreign file, since a header records the length of its file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shard_files(folder):
        with _open(folder / shard) as file:
            for name in file.keys():  # noqa: SIM118  # a safe_open is not a mapping
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def shard_files(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """The safetensors files that hold the named tensors (None: all tensors). Raises CheckpointError."""
    shards = _shards(folder)
    if not shards:
        return [SINGLE_WEIGHTS_FILE]
    return sorted({shards[name] for name in names if name in shards} if names is not None else set(shards.values()))


def shard_tensors(folder: Path, shard: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor of one file with its name. Raises CheckpointError."""
    with _open(folder / shard) as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def mlp_tensor_names(n_layers: int) -> list[str]:
    """Names of the gate, up and down projection of every layer in a checkpoint."""
    return [MLP_KEY.format(layer, name) for layer in range(n_layers) for name in PROJECTIONS]


def remote_or_local_names(name: str, folder: Path) -> set[str]:
    """Names of a model's tensors, from the headers of a local folder or from the index of a model on the hub.

    ``folder`` is what `locate` returns for ``name`` without weights. Raises CheckpointError.
    """
    if name in BUILTIN or Path(name).is_dir():
        return set(tensor_shapes(folder))
    if (folder / SHARD_INDEX_FILE).is_file():
        return set(_shards(folder))
    repo, revision = _repository(name)
    with hub_errors(f"{name} has no readable safetensors on the hub", repo, error=CheckpointError):
        # For a single file this is a ranged read of its header.
        return set(get_safetensors_metadata(repo, revision=revision, token=given_token()).weight_map)


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id, special tokens included, from tokenizer.json; empty if the folder has none."""
    path = plain_file(folder, "tokenizer.json")
    if not path.is_file():
        return {}
    try:
        with _damaged():
            record = read_json_object(path, _COPY_AGAIN)
        vocabulary = record["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: [[token, score], ...]
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        vocabulary = {**vocabulary, **{t["content"]: t["id"] for t in record.get("added_tokens") or []}}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a tokenizer ({error}); copy it again.") from error
    if not all(isinstance(token, str) and type(i) is int for token, i in vocabulary.items()):
        raise CheckpointError(f"{path} is not a tokenizer (a token without an id); copy it again.")
    return vocabulary


@contextmanager
def _damaged() -> Iterator[None]:
    """Within this context, a file that cannot be read is a CheckpointError."""
    try:
        yield
    except UnreadableFileError as error:
        text = str(error)
        raise CheckpointError(text if len(text) < 1_500 else f"{text[:1_000]}... {_COPY_AGAIN}") from error


@contextmanager
def _open(path: Path, device: str = "cpu") -> Iterator[Any]:
    """Opens a safetensors file. Raises CheckpointError, also for errors within the context."""
    try:
        with safe_open(plain_file(path.parent, path.name), framework="pt", device=device) as file:
            yield file
    except UserError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({_short(error)}); copy or download it again.") from error


def _short(error: Exception) -> str:
    """An error that may quote a whole file."""
    return str(error)[:_LONGEST_REASON]


class _ShardIndex(BaseModel):
    """The index of a checkpoint in several files."""

    model_config = ConfigDict(strict=True)
    weight_map: dict[str, str]


def _shards(folder: Path) -> dict[str, str]:
    """Tensor name -> file name; empty for a checkpoint in one file, which takes precedence over an index.

    transformers has the same precedence.
    """
    if plain_file(folder, SINGLE_WEIGHTS_FILE).is_file():
        return {}
    index = plain_file(folder, SHARD_INDEX_FILE)
    if not index.is_file():
        raise CheckpointError(f"{folder} has neither {SINGLE_WEIGHTS_FILE} nor {SHARD_INDEX_FILE}; {_advice(folder)}")
    with _damaged():
        shards = as_record(_ShardIndex, read_json_object(index, _COPY_AGAIN), str(index), _COPY_AGAIN).weight_map
    for shard in set(shards.values()):
        if not plain_file(folder, shard).name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {shard!r}; only files *.safetensors are read: copy the index again.")
    return shards


def _advice(folder: Path) -> str:
    """What to do with a folder without safetensors."""
    if any(folder.glob("pytorch_model*.bin*")):
        return "it has weights of another format, and only safetensors are read: convert it with save_pretrained."
    if commit_of(folder):
        return "its weights were not downloaded: unset HF_HUB_OFFLINE, or download the repository first."
    return "only safetensors are read: give the folder that holds them."


def _shard_of(folder: Path, name: str) -> str:
    """The file that holds a tensor. Raises CheckpointError."""
    shards = _shards(folder)
    if shards and name not in shards:
        raise CheckpointError(f"{folder} has no tensor {name}; it is not a complete checkpoint.")
    return shards.get(name, SINGLE_WEIGHTS_FILE)
