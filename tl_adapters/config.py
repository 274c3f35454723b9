"""The options of a run as frozen dataclasses, each documented under its field, and their YAML and JSON.

An error for an unknown key names the nearest known one, and an error for a value says which values are allowed.
`commented_yaml` prints a configuration with the documentation of each field, read from the docstrings in this file.
"""

from __future__ import annotations

import ast
import datetime
import difflib
import inspect
import json
import textwrap
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from tl_adapters.errors import UserError


class ConfigError(UserError, ValueError):
    """Raised for a configuration that cannot be used; the message names the key, the value and what is allowed."""


def _require(condition: bool, name: str, given: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {given!r}; allowed is {allowed}.")


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class LossWeights:
    """Weights of the four reconstruction terms (arXiv 2602.20904, section 3.2), and the lowest cut of the bridges."""

    output_kl: float = 1.0
    """Weight of KL(target || replacement)."""
    forward_bridge: float = 1.0
    """Weight of KL(target || replacement below the cut, target above it)."""
    backward_bridge: float = 1.0
    """Weight of KL(target || target below the cut, replacement above it)."""
    nmse: float = 1.0
    """Weight of the NMSE of the residual stream."""
    lowest_cut: int = 1
    """The cut is drawn uniformly from lowest_cut..n_layers: 1 in the paper, 0 in its public code."""

    def __post_init__(self) -> None:
        for name in ("output_kl", "forward_bridge", "backward_bridge", "nmse"):
            _require(getattr(self, name) >= 0, f"loss_weights.{name}", getattr(self, name), "a number >= 0")
        _require(self.lowest_cut in (0, 1), "loss_weights.lowest_cut", self.lowest_cut, "0 or 1")


LOSS_WEIGHTS = {
    "paper": LossWeights(),
    "public_code": LossWeights(forward_bridge=2.0, backward_bridge=2.0, lowest_cut=0),
}
"""Named weights: the paper states weight 1 for every term; its public code doubles both bridges and may draw cut 0."""


TooLong = Literal["truncate", "drop", "refuse"]
BadRows = Literal["refuse", "drop"]
Region = Literal["prompt", "thinking", "answer"]
REGIONS: tuple[Region, ...] = get_args(Region)
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
BackendName = Literal["hooked", "bridge"]
TrackerName = Literal["none", "tensorboard", "wandb", "trackio"]
ActivationName = Literal["relu", "jumprelu", "topk", "batchtopk"]


@dataclass(frozen=True)
class DataConfig:
    """The source of the documents, and how they become traces."""

    source: str = ""
    """A .jsonl file, or the name of a dataset on the hub; "" is the model organism's own text."""
    subset: str | None = None
    """Configuration of a hub dataset that has several of them."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset."""
    streaming: bool = False
    """Stream a hub dataset instead of downloading it first; it keeps its own order and is shuffled within a window."""
    conversation_column: str | None = None
    """Column of turns, [{role, content}] or [{from, value}]; null reads messages, conversations or conversation."""
    prompt_column: str | None = None
    """Column of questions; null reads prompt, question or problem."""
    response_column: str | None = None
    """Column of whole responses, thinking included; null reads response, completion or generation."""
    thinking_column: str | None = None
    """Column of the thinking of responses, if it has a column of its own; null reads reasoning_content, reasoning or
    thinking."""
    system_column: str | None = None
    """Column of a system turn, which is put before the other turns; null reads system."""
    domain_column: str | None = None
    """Column of the domain of each document (math, code, ...), by which features are counted; null reads domain."""
    max_tokens: int | None = None
    """Maximal length of a document in tokens; null is the target's context length."""
    too_long: TooLong = "truncate"
    """What happens to a longer document: "truncate", "drop" (both are counted and reported) or "refuse" (an error)."""
    bad_rows: BadRows = "refuse"
    """What happens to a row that holds no conversation, or one that the chat template refuses: "refuse" (an error that
    names the row) or "drop" (the row is left out and counted)."""
    template_date: str | None = None
    """Date for a chat template that writes today's date, as YYYY-MM-DD; null is the day on which the run is started,
    which the run's own configuration then holds."""
    think_start: str = "<think>"
    """Tag that opens the thinking of a response; "<think>" stands for whichever published form the target uses."""
    think_end: str = "</think>"
    """Tag that closes the thinking; the answer follows it."""
    shuffle_window: int = 4096
    """Number of documents that are encoded, shuffled and batched by length together."""
    survey_documents: int = 2000
    """Number of documents whose lengths are counted before training starts."""
    validation_fraction: float = 0.0
    """Share of the documents that are held out, chosen by a hash of the question, so that it does not depend on the
    seed."""
    validation_split: str | None = None
    """Another split of a hub dataset to validate on, instead of a share of the training split."""
    validation_documents: int = 64
    """Maximal number of held-out documents that are measured."""

    def __post_init__(self) -> None:
        for name in ("shuffle_window", "survey_documents", "validation_documents"):
            _require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "a whole number >= 1")
        fraction = self.validation_fraction
        _require(0 <= fraction < 1, "data.validation_fraction", fraction, "a number >= 0 and below 1")
        _require(self.max_tokens is None or self.max_tokens >= 2, "data.max_tokens", self.max_tokens, "null or >= 2")
        _require(bool(self.think_end), "data.think_end", self.think_end, "a string that is not empty")
        _require(
            self.template_date is None or _is_date(self.template_date),
            "data.template_date",
            self.template_date,
            "null or a date such as 2026-02-28",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """Options of one training run. The defaults are tuned on the model organism (its tune split)."""

    n_features: int = 512
    """Features per layer (8,192 in the paper, at d_model 3,584)."""
    steps: int = 700
    """Number of optimizer steps."""
    tokens_per_batch: int = 1024
    """Maximal number of tokens per step, padding included; documents of similar length are batched together."""
    lr: float = 0.012
    """Peak learning rate of Adam (8e-4 in the paper, for a model a thousand times larger)."""
    beta1: float = 0.9
    """Adam's decay rate for the mean of the gradient."""
    beta2: float = 0.999
    """Adam's decay rate for the mean of the squared gradient."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises linearly; afterwards it falls to 0 as a cosine."""
    grad_clip: float = 1.0
    """Maximal norm of the gradient of all adapters together; a larger gradient is scaled down to it."""
    activation: ActivationName = "relu"
    """Activation function, which decides which features are active: "relu" (the paper's; l1_weight makes it sparse),
    "jumprelu" (a learned threshold per feature; l0_weight makes it sparse), "topk" (the k largest of each token) or
    "batchtopk" (k per token on average: the largest of the whole batch in training, a threshold afterwards)."""
    l1_weight: float = 0.001
    """Weight of the sparsity term of relu, the L1 of activations in decoder-norm units: higher means fewer active
    features (1e-4 to 1e-2 in the paper). Only relu reads it."""
    l0_weight: float = 0.001
    """Weight of the sparsity term of jumprelu, the number of active features: higher means fewer active features. Only
    jumprelu reads it."""
    l1_warmup_fraction: float = 0.25
    """Share of the steps over which l1_weight or l0_weight rises linearly from 0. Only relu and jumprelu read it."""
    k: int = 6
    """Active features per token and layer: exactly k (topk) or k on average (batchtopk). Only these two read it."""
    bandwidth: float = 1.0
    """Width of the kernel through which jumprelu's thresholds get a gradient, and their initial value, in units of the
    pre-activation, which is of the order of 1 because the input of an adapter is normalized. Only jumprelu reads it."""
    count: tuple[Region, ...] = REGIONS
    """Regions whose tokens the objective counts: any of prompt, thinking and answer (all of them in the paper)."""
    loss_weights: LossWeights = field(default_factory=LossWeights)
    """Weights of the reconstruction terms; in a file also the name "paper" or "public_code"."""
    seed: int = 0
    """Seed of the encoders' initial weights, the order of the documents and the cuts."""
    checkpoint_every: int = 500
    """Steps between saved training states; a run that is stopped or killed resumes from the last one, bit for bit."""
    keep_checkpoints: int = 2
    """Number of saved training states that are kept on disk."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    validate_every: int = 500
    """Steps between measurements on the held-out documents, if there are any (lines of validation.jsonl)."""
    tracker: TrackerName = "none"
    """Tracker that draws the curves besides metrics.jsonl; each but "none" needs the extra of its name."""
    tracker_project: str = "tl-adapters"
    """Project of the tracker in which the run appears."""

    def __post_init__(self) -> None:
        for name in (
            "n_features", "steps", "tokens_per_batch", "checkpoint_every", "keep_checkpoints", "log_every",
            "validate_every",
        ):  # fmt: skip
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number >= 1")
        for name in ("lr", "grad_clip"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a number > 0")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a number >= 0 and below 1")
        for name in ("warmup_fraction", "l1_warmup_fraction"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a number from 0 to 1")
        for name in ("l1_weight", "l0_weight"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        _require(self.bandwidth > 0, "bandwidth", self.bandwidth, "a number > 0")
        self._require_read_options()
        _require(len(self.count) > 0, "count", list(self.count), f"one or more of {', '.join(REGIONS)}")

    def _require_read_options(self) -> None:
        """Raises ConfigError for an option that was set although the activation function does not read it."""
        _require(self.activation in get_args(ActivationName), "activation", self.activation, _in_words(ActivationName))
        for option, readers in _READ_BY.items():
            given, default = getattr(self, option), getattr(type(self), option)
            if self.activation not in readers and given != default:
                raise ConfigError(
                    f"{option} is {given!r}, and activation {self.activation!r} does not read it; only "
                    f"{' and '.join(readers)} {'do' if len(readers) > 1 else 'does'}. Leave it out."
                )
        if self.activation in _READ_BY["k"]:
            _require(
                1 <= self.k <= self.n_features, "k", self.k, f"a whole number from 1 to n_features ({self.n_features})"
            )


_READ_BY: dict[str, tuple[ActivationName, ...]] = {
    "l1_weight": ("relu",),
    "l0_weight": ("jumprelu",),
    "l1_warmup_fraction": ("relu", "jumprelu"),
    "k": ("topk", "batchtopk"),
    "bandwidth": ("jumprelu",),
}
"""Options that only some activation functions read, and those functions."""


@dataclass(frozen=True)
class RunConfig:
    """The options of a whole run: models, data and training. `tl-adapters train --config` reads them from a file."""

    base: str = ""
    """Folder or hub name of the base; "" with an empty target is the model organism."""
    target: str = ""
    """Folder or hub name of the target."""
    dtype: Dtype | None = None
    """Dtype of the models' weights; null is the target's own. Adapters are always float32."""
    backend: BackendName | None = None
    """Class that runs the models: "hooked" (HookedTransformer) or "bridge" (TransformerBridge); null is the first of
    them that the installed TransformerLens has."""
    data: DataConfig = field(default_factory=DataConfig)
    """The training documents."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The training of the adapters."""

    def __post_init__(self) -> None:
        if bool(self.base) != bool(self.target):
            raise ConfigError(f"base is {self.base!r} and target is {self.target!r}; give both, or neither.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON or YAML.

        Options that the activation function does not read are left out. Otherwise a recorded configuration would be
        refused after their defaults have changed.
        """
        plain = _plain(self)
        for option, readers in _READ_BY.items():
            if self.training.activation not in readers:
                del plain["training"][option]
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; missing keys get their defaults. Raises ConfigError."""
        return _build(cls, values, "")

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a .yaml, .yml or .json file, or a shipped configuration by its name. Raises ConfigError."""
        path = Path(path)
        if not path.suffix and str(path) in shipped_configs():
            path = shipped_configs()[str(path)]
        if not path.is_file():
            known = ", ".join(shipped_configs())
            raise ConfigError(
                f"There is no file {path}; give a .yaml or .json file, or a shipped configuration: {known}."
            )
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (json.JSONDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} is neither valid JSON nor YAML: {error}") from error
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path} holds {type(values).__name__}; a configuration is a mapping of option: value.")
        return cls.from_dict(values)


def shipped_configs() -> dict[str, Path]:
    """Name and file of every configuration that is shipped with the package."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


def commented_yaml(config: RunConfig) -> str:
    """The configuration as YAML, in which a comment with its documentation precedes every option."""
    return "\n".join(_commented_lines(config, ""))


def _commented_lines(config: Any, indent: str) -> list[str]:
    lines: list[str] = []
    for name, documentation in field_docs(type(config)).items():
        value = getattr(config, name)
        wrapped = textwrap.wrap(documentation, 110 - len(indent))
        lines += [f"{indent}# {line}" for line in wrapped]
        if is_dataclass(value):
            lines += [f"{indent}{name}:", *_commented_lines(value, indent + "  ")]
        else:
            plain = list(value) if isinstance(value, tuple) else value
            # PyYAML reads 1e-05 as a string, but 0.00001 as a number.
            text = f"{value:.12f}".rstrip("0") if isinstance(value, float) and "e" in repr(value) else json.dumps(plain)
            lines.append(f"{indent}{name}: {text}")
    return lines


def field_docs(cls: type) -> dict[str, str]:
    """Name of every field and the docstring under it, read from the class's source."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            docs[node.target.id] = inspect.cleandoc(ast.literal_eval(after.value))
    return docs


def _plain(config: Any) -> dict[str, Any]:
    """The dataclass as a dict, in which tuples are lists."""
    return asdict(config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})


def _build(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """A dataclass from a mapping. Raises ConfigError for an unknown key, or a value of another type than its field."""
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    arguments = {}
    for key, value in values.items():
        if key not in known:
            paths = _paths(cls, prefix)
            near = difflib.get_close_matches(str(key), paths, n=1)
            hint = f" Did you mean {paths[near[0]]}?" if near else f" Known are: {', '.join(known)}."
            raise ConfigError(f"Unknown option {prefix}{key}.{hint}")
        arguments[key] = _value(hints[key], value, f"{prefix}{key}")
    return cls(**arguments)


def _paths(cls: Any, prefix: str) -> dict[str, str]:
    """Name and dotted path of the options of ``cls`` and of nested dataclasses; on a clash its own is taken."""
    hints = get_type_hints(cls)
    nested = [_paths(hint, f"{prefix}{name}.") for name, hint in hints.items() if is_dataclass(hint)]
    own = {name: f"{prefix}{name}" for name in hints}
    return {**{name: path for paths in nested for name, path in paths.items()}, **own}


def _value(hint: Any, value: Any, key: str) -> Any:
    """The value of an option whose type is ``hint``. Raises ConfigError, which names ``key``, for another type."""
    if hint is LossWeights and isinstance(value, str):
        if value not in LOSS_WEIGHTS:
            raise ConfigError(f"{key} is {value!r}; allowed is a mapping or one of {sorted(LOSS_WEIGHTS)}.")
        return LOSS_WEIGHTS[value]
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is {value!r}; allowed is a mapping of option: value.")
        return _build(hint, value, f"{key}.")
    if get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key} is {value!r}; allowed is a list.")
        return tuple(_value(get_args(hint)[0], item, key) for item in value)
    if not _allowed(hint, value):
        raise ConfigError(f"{key} is {value!r}; allowed is {_in_words(hint)}.")
    return value


def _allowed(hint: Any, value: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_allowed(h, value) for h in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _in_words(hint: Any) -> str:
    """The values of a type, as an error names them."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_in_words(h) for h in get_args(hint))
    if get_origin(hint) is Literal:
        return ", ".join(map(json.dumps, get_args(hint)))
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}[hint]
