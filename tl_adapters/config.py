"""The options of a run: frozen dataclasses that pydantic checks, their YAML and JSON, and a JSON schema for editors.

The docstring under a field is its documentation, also in `commented_yaml` and in the schema. Every way to make a
configuration is checked, `dataclasses.replace` included, and raises ConfigError, which names the option, its value and
what is allowed; for an unknown option it names the nearest known one.
"""

from __future__ import annotations

import datetime
import functools
import json
import textwrap
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, field, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args

import pydantic.dataclasses
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, WrapValidator

from tl_adapters.errors import UserError
from tl_adapters.utils.reading import (
    STRICT,
    UnreadableFileError,
    known_keys,
    nearest_key,
    parse_yaml,
    problem_of,
    read_json,
    read_yaml,
    schemas_at,
    shown,
)

Options = TypeVar("Options")


class ConfigError(UserError, ValueError):
    """Raised for a configuration that cannot be used; the message names the key, the value and what is allowed."""


# -- checks -----------------------------------------------------------------------------------------------------------


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def _checked(cls: type[Options]) -> type[Options]:
    """Class decorator: a frozen dataclass whose fields pydantic checks, with ConfigError as its one error."""
    settings = ConfigDict(**STRICT, use_attribute_docstrings=True)
    made: Any = pydantic.dataclasses.dataclass(frozen=True, config=settings)(cls)
    check = made.__init__

    @functools.wraps(check)
    def init(self: Any, *values: Any, **named_values: Any) -> None:
        by_position = dict(zip(made.__pydantic_fields__, values, strict=False))
        if len(by_position) < len(values) or by_position.keys() & named_values:
            raise TypeError(f"{cls.__name__} was given more values than it has options, or one of them twice")
        try:
            check(self, **by_position, **named_values)
        except ValidationError as error:
            raise ConfigError(problem_of(error, made, "option")) from None

    made.__init__ = init
    return made


def _require_date(text: str) -> str:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError("give a date such as 2026-02-28, or null") from None
    return text


def _require_stages(stages: tuple[str, ...]) -> tuple[str, ...]:
    if stages not in STAGE_ORDERS:
        raise ValueError("give [local], [end_to_end] or [local, end_to_end]")
    return stages


def _as_given(value: Any, check: Callable[[Any], Any]) -> Any:
    """The value itself, which is checked: a whole number given for a number stays one."""
    check(value)
    return value


STAGE_ORDERS = (("local",), ("end_to_end",), ("local", "end_to_end"))
"""The stages of training that a run can have, each in its order."""

# The values that options take; pydantic checks the bounds, errors and the JSON schema name them.
Count = Annotated[int, Field(ge=1)]
GPUNumber = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
NotEmpty = Annotated[str, Field(min_length=1)]
Date = Annotated[str, AfterValidator(_require_date), Field(json_schema_extra={"format": "date"})]


# -- options ----------------------------------------------------------------------------------------------------------


@_checked
class LossWeights:
    """Weights of the four reconstruction terms (arXiv 2602.20904, section 3.2), the lowest cut of the bridges, and the
    weight of the local term."""

    output_kl: Weight = 1.0
    """Weight of KL(target || replacement)."""
    forward_bridge: Weight = 1.0
    """Weight of KL(target || replacement below the cut, target above it)."""
    backward_bridge: Weight = 1.0
    """Weight of KL(target || target below the cut, replacement above it)."""
    nmse: Weight = 1.0
    """Weight of the NMSE of the residual stream."""
    lowest_cut: Literal[0, 1] = 1
    """The cut is drawn uniformly from lowest_cut..n_layers: 1 in the paper, 0 in its public code."""
    local: Weight = 0.0
    """Weight of the local term, summed over layers: the squared error of the adapter's output for what the MLP reads in
    the target, over the energy of the difference of the two MLPs. 0 leaves it out; the paper has no such term."""
    local_l1: Weight = 0.05
    """Weight of the sparsity term inside the local term (L1 in units of the difference's root mean square for relu, L0
    for jumprelu)."""

    def times(self, factor: float) -> LossWeights:
        """Every term's weight times a factor; ``local_l1`` is within a term and stays.

        Raises ConfigError for a negative factor.
        """
        names = ("output_kl", "forward_bridge", "backward_bridge", "nmse", "local")
        return replace(self, **{name: factor * getattr(self, name) for name in names})


LOSS_WEIGHTS = {
    "paper": LossWeights(),
    "public_code": LossWeights(forward_bridge=2.0, backward_bridge=2.0, lowest_cut=0),
}
"""Named weights: the paper states weight 1 for every term; its public code doubles both bridges and may draw cut 0."""


def _named_weights(value: Any) -> Any:
    return LOSS_WEIGHTS.get(value, value) if isinstance(value, str) else value


def _dtype_name(value: Any) -> Any:
    """A dtype of torch by its name, whose class is known by its own, since torch is not imported here."""
    return str(value).removeprefix("torch.") if type(value).__name__ == "dtype" else value


TooLong = Literal["truncate", "drop", "refuse"]
BadRows = Literal["refuse", "drop"]
Region = Literal["prompt", "thinking", "answer"]
REGIONS: tuple[Region, ...] = get_args(Region)
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
BackendName = Literal["hooked", "bridge"]
DevicePlan = Literal["auto", "balanced", "balanced_low_0", "sequential"]
TrackerName = Literal["none", "tensorboard", "wandb", "trackio"]
ActivationName = Literal["relu", "jumprelu", "topk", "batchtopk"]
Penalty = Literal["l1", "tanh", "log"]
StageName = Literal["local", "end_to_end"]
AdapterPrecision = Literal["auto", "float32", "tf32", "bfloat16"]


@_checked
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
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    """Maximal length of a document in tokens; null is the target's context length."""
    too_long: TooLong = "truncate"
    """What happens to a longer document: "truncate", "drop" (both are counted and reported) or "refuse" (an error)."""
    bad_rows: BadRows = "refuse"
    """What happens to a row that holds no conversation, or one that the chat template refuses: "refuse" (an error that
    names the row) or "drop" (the row is left out and counted)."""
    template_date: Date | None = None
    """Date for a chat template that writes today's date, as YYYY-MM-DD; null is the day on which the run is started,
    which the run's own configuration then holds."""
    think_start: str = "<think>"
    """Tag that opens the thinking of a response; "<think>" stands for whichever published form the target uses."""
    think_end: NotEmpty = "</think>"
    """Tag that closes the thinking; the answer follows it."""
    shuffle_window: Count = 4096
    """Number of documents that are encoded, shuffled and batched by length together."""
    survey_documents: Count = 2000
    """Number of documents whose lengths are counted before training starts."""
    validation_fraction: Annotated[ShareBelowOne, WrapValidator(_as_given)] = 0.0
    """Share of the documents that are held out, chosen by a hash of the question, so that it does not depend on the
    seed."""
    validation_split: str | None = None
    """Another split of a hub dataset to validate on, instead of a share of the training split."""
    validation_documents: Count = 64
    """Maximal number of held-out documents that are measured."""


@_checked
class LocalConfig:
    """Options of the local stage, which regresses every layer's adapter on the difference of the two MLPs."""

    steps: Count = 1500
    """Number of optimizer steps of every layer."""
    tokens_per_step: Count = 512
    """Number of tokens of a step, drawn at random from those in memory."""
    max_tokens: Count = 200_000
    """Maximal number of tokens in memory. Of every token and layer, the MLP's input and the difference are kept:
    8 * d_model bytes in float32, 4 * d_model in bfloat16."""
    streaming: bool = False
    """Whether the oldest tokens are replaced at every step by as many new ones as the step draws, for documents that
    hold more than max_tokens; otherwise the tokens that are collected first are all that the stage trains on."""
    workers: Count | None = None
    """Number of layers that are trained at the same time: on the CPU each in a thread of its own, on accelerators each
    on one of as many devices. null is the number of cores on the CPU, and the model's own device elsewhere. It changes
    no result."""
    lr: Positive = 0.015
    """Peak learning rate of Adam, in whitened coordinates and units of the difference's root mean square."""
    warmup_fraction: Share = 0.05
    """Share of the steps over which the learning rate rises linearly; afterwards it falls to 0 as a cosine."""
    sparsity_weight: Weight = 0.2
    """Weight of the sparsity penalty."""
    sparsity_warmup_fraction: Share = 0.25
    """Share of the steps over which sparsity_weight rises linearly from 0."""
    penalty: Penalty = "l1"
    """Sparsity penalty of an activation s in decoder-norm units and units of the difference's root mean square: "l1"
    (s), "tanh" (tanh(3 s) / 3) or "log" (log(1 + 10 s) / 10). Only relu reads it; jumprelu is made sparse by its number
    of active features, and topk and batchtopk by k."""
    shrinkage: Positive = 0.01
    """Share of the largest eigenvalue of the inputs' covariance that is added to all of them before whitening."""
    revisions: Annotated[tuple[ShareBelowOne, ...], Field(strict=False)] = (0.2, 0.35, 0.5, 0.7)
    """Shares of the steps after which features are revised: features that split one direction are merged, and except
    at the last revision, unused features are given directions that no feature writes yet."""
    polish: bool = True
    """Whether encoders are polished at the end: each is fitted to all of its tokens and to those near its boundary,
    features are born once more where the error is large, and these are polished too. Only relu reads it."""
    smallest_gain: Weight = 1e-4
    """At the end, a feature is removed if the error without it is not higher by this share of the difference's
    energy."""


@_checked
class TrainingConfig:
    """Options of one training run. The defaults are tuned on the model organism (its tune split)."""

    n_features: Count = 128
    """Features per layer (8,192 in the paper, at d_model 3,584)."""
    steps: Count = 700
    """Number of optimizer steps of the end-to-end stage; those of the local stage are local.steps."""
    tokens_per_batch: Count = 1024
    """Maximal number of tokens per step, padding included; documents of similar length are batched together."""
    batches_per_step: Count = 1
    """Number of batches whose gradients are added up, each weighted by its share of the counted tokens, before a step
    of the end-to-end stage: a step on many documents in the memory of one batch."""
    lr: Positive = 0.012
    """Peak learning rate of Adam (8e-4 in the paper, for a model a thousand times larger)."""
    beta1: ShareBelowOne = 0.9
    """Adam's decay rate for the mean of the gradient."""
    beta2: ShareBelowOne = 0.999
    """Adam's decay rate for the mean of the squared gradient."""
    warmup_fraction: Share = 0.05
    """Share of the steps over which the learning rate rises linearly; afterwards it falls to 0 as a cosine."""
    grad_clip: Positive = 1.0
    """Maximal norm of the gradient of all adapters together; a larger gradient is scaled down to it."""
    activation: ActivationName = "relu"
    """Activation function, which decides which features are active: "relu" (the paper's; l1_weight makes it sparse),
    "jumprelu" (a learned threshold per feature; l0_weight makes it sparse), "topk" (the k largest of each token) or
    "batchtopk" (k per token on average: the largest of the whole batch in training, a threshold afterwards)."""
    l1_weight: Weight = 0.001
    """Weight of the sparsity term of relu, the L1 of activations in decoder-norm units: higher means fewer active
    features (1e-4 to 1e-2 in the paper). Only relu reads it."""
    l0_weight: Weight = 0.001
    """Weight of the sparsity term of jumprelu, the number of active features: higher means fewer active features. Only
    jumprelu reads it."""
    l1_warmup_fraction: Share = 0.25
    """Share of the steps over which l1_weight or l0_weight rises linearly from 0. Only relu and jumprelu read it."""
    k: Count = 6
    """Active features per token and layer: exactly k (topk) or k on average (batchtopk). Only these two read it."""
    bandwidth: Positive = 1.0
    """Width of the kernel through which jumprelu's thresholds get a gradient, and their initial value, in units of the
    pre-activation, which is of the order of 1 because the input of an adapter is normalized. Only jumprelu reads it."""
    adapter_precision: AdapterPrecision = "auto"
    """Precision of the adapters' products: "float32"; "tf32" (float32 with products of 10 bits, on GPUs that have
    them); "bfloat16"; or "auto" (bfloat16 beside a model in bfloat16 on a GPU, where float32 takes several times as
    long, and float32 elsewhere). Weights, gradients and moments are in float32 in any case."""
    recompute: bool = False
    """Whether the backward pass computes every block again instead of keeping what its forward pass made. Results are
    the same; a step takes about a third more time, and memory for a fraction of the tokens' activations."""
    count: Annotated[tuple[Region, ...], Field(strict=False, min_length=1)] = REGIONS
    """Regions whose tokens the objective counts: any of prompt, thinking and answer (all of them in the paper)."""
    loss_weights: Annotated[
        LossWeights,
        BeforeValidator(_named_weights, json_schema_input_type=LossWeights | Literal["paper", "public_code"]),
    ] = field(default_factory=LossWeights)
    """Weights of the reconstruction terms; in a file also the name "paper" or "public_code"."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] = 0
    """Seed of the encoders' initial weights, the order of the documents and the cuts."""
    checkpoint_every: Count = 500
    """Steps, counted over all stages, between saved training states; a run that is stopped or killed resumes from the
    last one, bit for bit."""
    keep_checkpoints: Count = 2
    """Number of saved training states that are kept on disk."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl, and of local_metrics.jsonl in the local stage."""
    validate_every: Count = 500
    """Steps between measurements on the held-out documents, if there are any (lines of validation.jsonl)."""
    tracker: TrackerName = "none"
    """Tracker that draws the curves besides metrics.jsonl; each but "none" needs the extra of its name."""
    tracker_project: str = "tl-adapters"
    """Project of the tracker in which the run appears."""
    stages: Annotated[tuple[StageName, ...], Field(strict=False), AfterValidator(_require_stages)] = ("local",)
    """Stages of training, in this order: "local" (every layer's adapter is regressed on the difference of its two MLPs;
    section local) and "end_to_end" (the paper's objective, from where the local stage ended if there was one). Each can
    be left out. Only end_to_end reads steps, batches_per_step, lr, warmup_fraction, grad_clip, l1_weight, l0_weight,
    l1_warmup_fraction, recompute and loss_weights; all other options of this section are read by both."""
    local: LocalConfig = field(default_factory=LocalConfig)
    """Options of the local stage, which only that stage reads."""

    def __post_init__(self) -> None:
        """Raises ConfigError for an option that was set although the activation function or no stage reads it."""
        for option, unread in unread_options(self.activation, self.stages).items():
            given = getattr(self, option)
            default = type(self).__pydantic_fields__[option].get_default(call_default_factory=True)  # type: ignore[attr-defined]
            if given not in (default, 0):  # a weight of 0 asks for nothing
                raise ConfigError(f"{option} is {given!r}, and {unread}")
        if self.activation in _READ_BY["k"] and self.k > self.n_features:
            raise ConfigError(f"k is {self.k}; allowed is a whole number from 1 to n_features ({self.n_features}).")

    @property
    def adapter_options(self) -> dict[str, Any]:
        """Activation function of an adapter, and its options, as `TranscoderAdapter` takes them."""
        k = self.k if self.activation in _READ_BY["k"] else None
        return {"activation": self.activation, "k": k, "bandwidth": self.bandwidth}


_READ_BY: dict[str, tuple[ActivationName, ...]] = {
    "l1_weight": ("relu",),
    "l0_weight": ("jumprelu",),
    "l1_warmup_fraction": ("relu", "jumprelu"),
    "k": ("topk", "batchtopk"),
    "bandwidth": ("jumprelu",),
}
"""Options that only some activation functions read, and those functions."""
_READ_BY_STAGE: dict[str, StageName] = {
    "local": "local",
    **dict.fromkeys(("steps", "batches_per_step", "lr", "warmup_fraction", "grad_clip", "recompute"), "end_to_end"),
    **dict.fromkeys(("l1_weight", "l0_weight", "l1_warmup_fraction", "loss_weights"), "end_to_end"),
}
"""Options that only one stage reads, and that stage."""
_LOCAL_OPTIONS = frozenset(LocalConfig.__pydantic_fields__)  # type: ignore[attr-defined]


def unread_options(activation: ActivationName, stages: Sequence[StageName]) -> dict[str, str]:
    """The options of training that nothing reads, each with the end of a sentence that says why."""
    unread: dict[str, str] = {}
    for option, stage in _READ_BY_STAGE.items():
        if stage not in stages:
            advice = f"Leave it out, give local.{option}," if option in _LOCAL_OPTIONS else "Leave it out"
            who = f"stages [{', '.join(stages)}] do not read it; only {stage} does"
            unread[option] = f"{who}. {advice} or add the stage."
    for option, readers in _READ_BY.items():
        if activation not in readers:
            verb = "do" if len(readers) > 1 else "does"
            who = f"activation {activation!r} does not read it; only {' and '.join(readers)} {verb}"
            unread[option] = f"{who}. Leave it out."
    return unread


def _require_device_map(value: Any) -> Any:
    """The value, if it may be a device map: pydantic's own message would be about one of the two forms."""
    devices = value.values() if isinstance(value, Mapping) else ()
    plan = value is None or (isinstance(value, str) and value in get_args(DevicePlan))
    if not plan and not (devices and all(isinstance(d, str) or (type(d) is int and d >= 0) for d in devices)):
        raise ValueError(
            f"give one of {', '.join(get_args(DevicePlan))}, or the device of each part of the model: the number of a "
            'GPU, "cpu" or "disk"'
        )
    return value


@_checked
class RunConfig:
    """The options of a whole run: models, data and training. `tl-adapters train --config` reads them from a file."""

    base: str = ""
    """Folder or hub name of the base; "" with an empty target is the model organism."""
    target: str = ""
    """Folder or hub name of the target."""
    dtype: Annotated[Dtype | None, BeforeValidator(_dtype_name, json_schema_input_type=Dtype | None)] = None
    """Dtype of the models' weights; null is the target's own. Adapters are always float32."""
    backend: BackendName | None = None
    """Class that runs the models: "hooked" (HookedTransformer) or "bridge" (TransformerBridge); null is the first of
    them that the installed TransformerLens has."""
    device_map: Annotated[DevicePlan | dict[str, GPUNumber | str] | None, BeforeValidator(_require_device_map)] = None
    """For a pair that does not fit one device: "auto", or the device of each part of the target: the number of a GPU,
    "cpu", or "disk" (weights stay in the model's files). --device replaces it; null is one device for all."""
    max_memory: dict[str, int | str] | None = None
    """Most bytes that device_map "auto" uses of each device, such as {"0": 60GiB, cpu: 100GiB}; null is what is free.
    Adapters, Adam and activations come on top."""
    data: DataConfig = field(default_factory=DataConfig)
    """The training documents."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The training of the adapters."""

    def __post_init__(self) -> None:
        if bool(self.base) != bool(self.target):
            raise ConfigError(f"base is {self.base!r} and target is {self.target!r}; give both, or neither.")
        if self.max_memory is not None and not isinstance(self.device_map, str):
            raise ConfigError(f"max_memory limits a plan ({', '.join(get_args(DevicePlan))}); set device_map to one.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON or YAML.

        Options that nothing reads are left out. Otherwise a recorded configuration would be refused after their
        defaults have changed.
        """
        plain = _plain(self)
        for option in unread_options(self.training.activation, self.training.stages):
            del plain["training"][option]
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; missing keys get their defaults. Raises ConfigError."""
        return _from_mapping(cls, values, "")

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a .yaml, .yml or .json file, or a shipped configuration by its name. Raises ConfigError."""
        path = shipped_configs().get(str(path), Path(path))
        advice = f"Give a .yaml or .json file, or a shipped configuration: {', '.join(shipped_configs())}."
        return _from_mapping(cls, _read(path, advice), f"{path}: ")

    @classmethod
    def of_run(cls, folder: str | Path) -> RunConfig:
        """Read the configuration that a run folder records. Raises ConfigError."""
        path = Path(folder) / "config.json"
        advice = "Give a folder that train, demo or sweep made, and restore a damaged file from a copy."
        return cls.from_record(_read(path, advice), f"{path}: ")

    @classmethod
    def from_record(cls, values: Any, source: str = "") -> RunConfig:
        """A configuration that an earlier version may have recorded. Raises ConfigError.

        Runs from before there were stages are end to end, and were recorded with options that nothing reads.
        """
        training = values.get("training") if isinstance(values, Mapping) else None
        if isinstance(training, Mapping):
            values = {**values, "training": _without_unread({"stages": ["end_to_end"], **training})}
        return _from_mapping(cls, values, source)


def _without_unread(training: Mapping[str, Any], given: Container[str] = ()) -> dict[str, Any]:
    """Options of training as a file has them, without those that nothing reads, except for those in ``given``."""
    stages, activation = (training.get(name, getattr(TrainingConfig, name)) for name in ("stages", "activation"))
    try:
        unread = unread_options(activation, stages)
    except TypeError:  # stages of a wrong type, for which a later check has the error
        unread = {}
    return {option: value for option, value in training.items() if option in given or option not in unread}


def _read(path: Path, advice: str) -> Any:
    try:
        return read_json(path, advice) if path.suffix == ".json" else read_yaml(path, advice)
    except UnreadableFileError as error:
        raise ConfigError(str(error)) from error


def _from_mapping(cls: type[Options], values: Any, source: str) -> Options:
    """Options from what a JSON or YAML parser gives. Raises ConfigError, whose message begins with ``source``."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}a configuration is a mapping of option: value, not {shown(values)}.")
    for option, value in _texts(values):
        if not value.isascii() and value != value.encode("utf-8", "replace").decode():
            advice = "Give a text in UTF-8, and rename a file or folder whose name is not."
            raise ConfigError(f"{source}{option} is {shown(value)}, which is not text in UTF-8. {advice}")
    try:
        # Parsed from JSON, since only there a strict tuple can be given as a list.
        return TypeAdapter(cls).validate_json(json.dumps(values, default=dict))
    except ValidationError as error:
        raise ConfigError(source + problem_of(error, cls, "option")) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}the configuration holds a value that is not JSON: {error}.") from error


def _texts(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested mappings, with the dotted name of its option."""
    if isinstance(values, str):
        yield name, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _texts(value, f"{name}.{key}" if name else str(key))


# -- changes, files and schema ----------------------------------------------------------------------------------------


def with_options(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """A copy of a configuration in which some options have other values.

    Args:
        config: the configuration.
        options: option -> value, as a file has them. An option is named as `option_path` reads it. Options of
            ``config`` that nothing reads after the change, such as those of a stage that is left out, are dropped.

    Raises ConfigError for an unknown option, with the nearest known one, and for a value that is not allowed.
    """
    values = config.to_dict()
    given: set[str] = set()
    for name, value in options.items():
        *parents, last = path = option_path(name).split(".")
        given.update(path[1:2] if path[0] == "training" else ())
        place = values
        for parent in parents:
            if not isinstance(place.setdefault(parent, {}), dict):
                raise ConfigError(f"{name} is given beside {parent} {place[parent]!r}; give one of them.")
            place = place[parent]
        place[last] = value
    if isinstance(values["training"], dict):
        values["training"] = _without_unread(values["training"], given)
    return RunConfig.from_dict(values)


def option_path(name: str) -> str:
    """The dotted path of an option, given that path or its end. Raises ConfigError.

    Of several paths with this end, the one with the fewest parts is meant: lr is training.lr, and local.lr is
    training.local.lr.
    """
    known = known_keys(RunConfig)
    ending = [path for path in known if path == name or path.endswith(f".{name}")]
    depth = min((path.count(".") for path in ending), default=0)
    found = [path for path in ending if path.count(".") == depth]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"Option {name} can be {' or '.join(found)}; give the whole name.")
    near = nearest_key(name, known)
    hint = f"Did you mean {near}?" if near else "tl-adapters config prints every option."
    raise ConfigError(f"Unknown option {name}. {hint}")


def parse_options(assignments: Sequence[str]) -> dict[str, Any]:
    """The options that texts such as "n_features=256" set, as `with_options` takes them.

    A value is read as YAML, or literally for an option that is text. Raises ConfigError for an unknown option, one that
    is given twice, and text without "=".
    """
    options: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r} sets no option; write OPTION=VALUE, such as n_features=256.")
        path = option_path(name.strip())
        if path in options:
            raise ConfigError(f"Option {path} is given twice; give it once.")
        options[path] = parse_option(path, text)
    return options


def parse_option(path: str, text: str) -> Any:
    """The value of an option, given by its dotted path, from text. Raises ConfigError for text that is not YAML."""
    types = [schema.get("type") for schema in schemas_at(RunConfig, path.split(".")) if "enum" not in schema]
    if "string" in types and not (text == "null" and "null" in types):
        return text
    try:
        return parse_yaml(text, f"The value of {path}, {text!r},")
    except UnreadableFileError as error:
        raise ConfigError(str(error)) from error


def json_schema() -> dict[str, Any]:
    """The JSON schema of configuration files, by which editors complete, check and explain them."""
    schema = TypeAdapter(RunConfig).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


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
            text = json.dumps(plain)
            if isinstance(value, float) and "." not in text:
                text = text.replace("e", ".0e")  # YAML 1.1 reads 1e-05 as text, but 1.0e-05 as a number
            lines.append(f"{indent}{name}: {text}")
    return lines


def field_docs(cls: type) -> dict[str, str]:
    """Name of every field and the docstring under it."""
    fields: Mapping[str, Any] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return {name: field.description for name, field in fields.items()}


def _plain(config: Any) -> dict[str, Any]:
    """The dataclass as a dict, in which tuples are lists."""
    return asdict(config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})
