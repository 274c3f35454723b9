"""Every option of a run, documented under its field; frozen; YAML and JSON both ways.

An unknown key is an error that names the nearest known one, an impossible value one that says what is allowed.
`commented_yaml` prints a configuration with each field's documentation beside it, from this file's own docstrings.
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
    """A configuration that cannot be used; the message says which key, what was given and what is allowed."""


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
    """Weights of the four reconstruction terms, and where the cut of the bridges is drawn from."""

    output_kl: float = 1.0
    """Weight of KL(target || replacement)."""
    forward_bridge: float = 1.0
    """Weight of KL(target || replacement below the cut, target above it)."""
    backward_bridge: float = 1.0
    """Weight of KL(target || target below the cut, replacement above it)."""
    nmse: float = 1.0
    """Weight of the normalised squared error of the residual stream."""
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
"""The paper states weight 1 for every term; its public code doubles both bridges and may draw cut 0."""


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
    """Where documents come from and how they become traces."""

    source: str = ""
    """A .jsonl file, or a dataset's name on the hub; "" is the built-in pair's own text."""
    subset: str | None = None
    """Configuration of a hub dataset that has several."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset."""
    streaming: bool = False
    """Read a hub dataset as it arrives instead of downloading it first; its own order, shuffled within a window."""
    conversation_column: str | None = None
    """Column of [{role, content}] or [{from, value}] turns; null finds messages, conversations or conversation."""
    prompt_column: str | None = None
    """Column of questions; null finds prompt, question or problem."""
    response_column: str | None = None
    """Column of whole responses, thinking included; null finds response, completion or generation."""
    thinking_column: str | None = None
    """Column of the response's thinking, where that has one of its own; null finds reasoning_content, reasoning or
    thinking."""
    system_column: str | None = None
    """Column of a system turn that comes before the others; null finds system."""
    domain_column: str | None = None
    """Column that says what a document is about (math, code, ...), for counting by domain; null finds domain."""
    max_tokens: int | None = None
    """Longest document in tokens; null is the target's context length."""
    too_long: TooLong = "truncate"
    """What happens to a longer document: "truncate", "drop" (both are counted and said) or "refuse" (an error)."""
    bad_rows: BadRows = "refuse"
    """What happens to a row that is no conversation, or one that the chat template refuses: "refuse" (an error that
    names it) or "drop" (left out and counted)."""
    template_date: str | None = None
    """What a chat template that writes today's date is to write, as YYYY-MM-DD; null is the day on which the run is
    started, and the run then keeps it here."""
    think_start: str = "<think>"
    """What opens the thinking part of a response; "<think>" stands for whatever published form the target has."""
    think_end: str = "</think>"
    """What ends it; the answer follows."""
    shuffle_window: int = 4096
    """Documents that are encoded, shuffled and bucketed by length together."""
    survey_documents: int = 2000
    """Documents whose lengths are counted before training starts."""
    validation_fraction: float = 0.0
    """Share of the documents held out, chosen by a hash of the question: never trained on, whatever the seed."""
    validation_split: str | None = None
    """Another split of a hub dataset to validate on, instead of a share of this one."""
    validation_documents: int = 64
    """Held-out documents that are measured, at most."""

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
    """Options of one training run. The defaults are tuned on the built-in pair (its tune split)."""

    n_features: int = 512
    """Features per layer (8,192 in the paper, at d_model 3,584)."""
    steps: int = 700
    """Optimiser steps."""
    tokens_per_batch: int = 1024
    """Tokens per step, padding included; documents of similar length are batched together."""
    lr: float = 0.012
    """Peak learning rate of Adam (8e-4 in the paper, for a model a thousand times larger)."""
    beta1: float = 0.9
    """Adam's decay rate of the mean gradient."""
    beta2: float = 0.999
    """Adam's decay rate of the squared gradient."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises linearly; afterwards it falls as a cosine to 0."""
    grad_clip: float = 1.0
    """Largest norm of the gradient of all adapters together."""
    activation: ActivationName = "relu"
    """Which features are active: "relu" (the paper's; l1_weight makes it sparse), "jumprelu" (a learned threshold per
    feature; l0_weight makes it sparse), "topk" (the k largest of each token) or "batchtopk" (k per token on average:
    the largest of the whole batch in training, a threshold afterwards)."""
    l1_weight: float = 0.001
    """Weight of relu's sparsity term, the activations in decoder-norm units: higher means fewer active features (1e-4
    to 1e-2 in the paper). Only relu reads it."""
    l0_weight: float = 0.001
    """Weight of jumprelu's sparsity term, the number of active features: higher means fewer. Only jumprelu reads it."""
    l1_warmup_fraction: float = 0.25
    """Share of the steps over which l1_weight or l0_weight rises linearly from 0; topk and batchtopk have neither."""
    k: int = 6
    """Active features per token and layer: exactly (topk) or on average (batchtopk). Only these two read it."""
    bandwidth: float = 1.0
    """Width of the kernel through which jumprelu's thresholds learn, and where they start; in units of the
    pre-activation, which is of the order of 1 because what an adapter reads is normalised. Only jumprelu reads it."""
    count: tuple[Region, ...] = REGIONS
    """Which tokens the objective counts: any of prompt, thinking and answer (all of them in the paper)."""
    loss_weights: LossWeights = field(default_factory=LossWeights)
    """Weights of the reconstruction terms; in a file also a name: "paper" or "public_code"."""
    seed: int = 0
    """Seeds the encoders, the order of the documents and the cuts."""
    checkpoint_every: int = 500
    """Steps between checkpoints; a run that is stopped or killed goes on from the last one, bit for bit."""
    keep_checkpoints: int = 2
    """How many of the last checkpoints stay on disk."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    validate_every: int = 500
    """Steps between measurements on the held-out documents, where there are any (lines of validation.jsonl)."""
    tracker: TrackerName = "none"
    """Where the curves go besides metrics.jsonl; the others come with the extras of their name."""
    tracker_project: str = "tl-adapters"
    """Project the run is filed under in the tracker."""

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
        self._require_options_of_the_activation()
        _require(len(self.count) > 0, "count", list(self.count), f"one or more of {', '.join(REGIONS)}")

    def _require_options_of_the_activation(self) -> None:
        """Raises ConfigError for an option that was set and that the activation does not read."""
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
"""The activations that read an option which not all of them read."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run: the pair, its data, its training. What `tl-adapters train --config` reads and a run records."""

    base: str = ""
    """Folder or hub name of the base; "" with an empty target is the built-in pair."""
    target: str = ""
    """Folder or hub name of the target."""
    dtype: Dtype | None = None
    """Of the models' weights; null keeps the target's own. Adapters are float32 always."""
    backend: BackendName | None = None
    """What runs the models: "hooked" (HookedTransformer), "bridge" (TransformerBridge); null takes the first that the
    installed TransformerLens has."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where documents come from."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How adapters are trained."""

    def __post_init__(self) -> None:
        if bool(self.base) != bool(self.target):
            raise ConfigError(f"base is {self.base!r} and target is {self.target!r}; give both, or neither.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON or YAML.

        Without the options that the activation does not read: what was recorded today must not be refused once
        defaults have changed.
        """
        plain = _plain(self)
        for option, readers in _READ_BY.items():
            if self.training.activation not in readers:
                del plain["training"][option]
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; keys left out take their defaults. Raises ConfigError."""
        return _build(cls, values, "")

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a .yaml, .yml or .json file, or a configuration that ships by its name. Raises ConfigError."""
        path = Path(path)
        if not path.suffix and str(path) in shipped_configs():
            path = shipped_configs()[str(path)]
        if not path.is_file():
            known = ", ".join(shipped_configs())
            raise ConfigError(f"{path} is no file; give a .yaml or .json, or a shipped configuration: {known}.")
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (json.JSONDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} is neither valid JSON nor YAML: {error}") from error
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path} holds {type(values).__name__}; a configuration is a mapping of option: value.")
        return cls.from_dict(values)


def shipped_configs() -> dict[str, Path]:
    """Name to file of every configuration that comes with the package."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


def commented_yaml(config: RunConfig) -> str:
    """The configuration as YAML, every option after its documentation."""
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
            # PyYAML reads 1e-05 as a string; a decimal point makes it a number everywhere.
            text = f"{value:.12f}".rstrip("0") if isinstance(value, float) and "e" in repr(value) else json.dumps(plain)
            lines.append(f"{indent}{name}: {text}")
    return lines


def field_docs(cls: type) -> dict[str, str]:
    """Field name to the docstring under it, read from the class's source."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            docs[node.target.id] = inspect.cleandoc(ast.literal_eval(after.value))
    return docs


def _plain(config: Any) -> dict[str, Any]:
    return asdict(config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})


def _build(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """A dataclass from a mapping: every key known, every value of its field's type. Raises ConfigError."""
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
    """Option name to its dotted path, for the options of ``cls`` and of what it holds; its own come first."""
    hints = get_type_hints(cls)
    nested = [_paths(hint, f"{prefix}{name}.") for name, hint in hints.items() if is_dataclass(hint)]
    found = {name: f"{prefix}{name}" for name in hints}
    return {**{name: path for paths in nested for name, path in paths.items()}, **found}


def _value(hint: Any, value: Any, key: str) -> Any:
    if hint is LossWeights and isinstance(value, str):
        if value not in LOSS_WEIGHTS:
            raise ConfigError(f"{key}: no weights named {value!r}; known are {sorted(LOSS_WEIGHTS)}.")
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
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_in_words(h) for h in get_args(hint))
    if get_origin(hint) is Literal:
        return ", ".join(map(json.dumps, get_args(hint)))
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}[hint]
