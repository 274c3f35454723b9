"""Options that several subcommands share, and how their values are read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tl_adapters.cli.parsing import LARGEST_SEED, Words, number, whole, words
from tl_adapters.errors import UserError

if TYPE_CHECKING:
    from tl_adapters.adapters.feature_id import FeatureId
    from tl_adapters.config import RunConfig

HELD_OUT = "HELD_OUT.jsonl"
"""What a printed command names where the user has documents of their own."""
GIVE_HELD_OUT = f"For {HELD_OUT} below, give held-out documents: a .jsonl file, or a dataset's name on the hub."

RouteName = Literal["target", "hybrid", "replacement", "target+adapter"]
DtypeName = Literal["float32", "bfloat16", "float16", "float64"]

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="folder that train or demo made", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", help="print results only, without progress")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object, with results, paths and next command")]
Seed = Annotated[
    int | None,
    whole("--seed", "seed of initialization, document order and cuts (default: 0)", 0, LARGEST_SEED, "SEED"),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        show_default=False,
        help="cpu, cuda, cuda:1, mps (default: auto, the first available of cuda, mps, cpu)",
    ),
]
Dtype = Annotated[DtypeName | None, typer.Option("--dtype", help="dtype of the models (default: the target's own)")]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="BASE", help="folder or hub name of the base (default: the model organism)"),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="vllm|URL",
        help="answer with vLLM: in this process, or at the address of a vllm serve (default: our own engine)",
    ),
]
Target = Annotated[str | None, typer.Option("--target", metavar="TARGET", help="folder or hub name of the target")]
ConfigFile = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", help="a YAML or JSON file, or the name of a shipped configuration"),
]
SetOptions = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="OPTION=VALUE", help="an option of the configuration, such as n_features=256"),
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompt-file", metavar="FILE", help="a text file with the prompt, in UTF-8")
]
Strength = Annotated[
    float | None,
    number(
        "--strength",
        "factor on --insert's features (default: a circuit's own strength; 1 for features by name)",
        float("-inf"),
        metavar="F",
    ),
]
_OWN = "(default: generation_config.json's"
Temperature = Annotated[float | None, number("--temperature", f"0 is greedy {_OWN}, or 0)")]
TopP = Annotated[float | None, number("--top-p", f"nucleus sampling {_OWN}, or 1)", 0, 1, above=True)]
TopK = Annotated[int | None, whole("--top-k", f"sample from the N most probable tokens {_OWN}, or all)", 0)]
HesitationWords = Annotated[
    list[Words] | None,
    words("--words", 'words or phrases that count as a hesitation, such as wait "hold on"', "WORD"),
]


def joined(groups: Iterable[Sequence[str]] | None) -> list[str]:
    """The words of every occurrence of an option, in order."""
    return [word for group in groups or () for word in group]


def device_of(name: str) -> str:
    """The device of --device, checked against this machine; "auto" is resolved where the models are loaded.

    Raises UserError for a device that this machine does not have.
    """
    from tl_adapters.utils.devices import AUTO, DeviceError, resolve_device

    try:
        return name if name == AUTO else str(resolve_device(name))
    except DeviceError as error:
        raise UserError(f"--{error}") from error


def given_device(name: str) -> str | None:
    """The device of --device for a further command, or None where it was not given."""
    from tl_adapters.utils.devices import AUTO

    return None if name == AUTO else name


def dtype_of(name: str | None) -> Any:
    """The torch dtype of --dtype, or None."""
    import torch

    return None if name is None else getattr(torch, name)


def run_config(
    config: str | None,
    set_options: Sequence[str] | None = None,
    *,
    base: str | None = None,
    target: str | None = None,
    data: str | None = None,
    bad_rows: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
) -> RunConfig:
    """The configuration of --config or the defaults, with the options that other options of the command override.

    Raises ConfigError, and UserError where one option is given in two ways.
    """
    from tl_adapters.config import RunConfig, parse_options, with_options

    if (base is None) != (target is None):
        raise UserError(
            "--base and --target are given together; leave both out for the configuration's pair or the model organism."
        )
    own: dict[str, Any] = {"base": base, "target": target, "dtype": dtype}
    own |= {"data.source": data, "data.bad_rows": bad_rows, "training.seed": seed}
    given = {option: value for option, value in own.items() if value is not None}
    named = parse_options(set_options or ())
    for option in given.keys() & named.keys():
        raise UserError(f"{option} is given twice, by --set and by an option of its own; leave one out.")
    return with_options(RunConfig.load(config) if config else RunConfig(), given | named)


def scale_factor(text: str, names: Sequence[str]) -> float:
    """The factor of --scale before the names of features. Raises UserError for another text, and for no names."""
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor) or not names:
        given = " ".join([text, *names])
        raise UserError(f"--scale is {given}; give a factor and features, such as --scale 2 2.17 4.3.")
    return factor


def feature_ids(names: Sequence[str]) -> list[FeatureId]:
    """The features that the command line names.

    A name is ``layer.index``, such as 2.17, or a circuit's file with or without a role, such as
    runs/demo/circuit.json:output. Raises UserError for any other text.
    """
    from tl_adapters.adapters.feature_id import FeatureId

    features: list[FeatureId] = []
    for name in names:
        path, role = circuit_file(name)
        if path is not None:
            from tl_adapters.circuits.circuit import ROLES, Circuit

            if role and role not in ROLES:
                raise UserError(f"{role!r} is not a role of a circuit; the roles are {', '.join(ROLES)}.")
            circuit = Circuit.load(path)
            features += circuit.ids(*(r for r in ROLES if r == role))
        elif match := re.fullmatch(r"(\d+)\.(\d+)", name):
            features.append(FeatureId(int(match[1]), int(match[2])))
        else:
            raise UserError(
                f"{name!r} does not name a feature; give features as layer.index, such as 2.17 4.3, or a circuit.json."
            )
    return features


def circuit_file(name: str) -> tuple[Path | None, str]:
    """The file and the role of a circuit's name, which is FILE.json or FILE.json:ROLE; None for another name.

    The role follows the last colon, since a path may hold colons as well.
    """
    path, _, role = name.rpartition(":") if ".json:" in name and not name.endswith(".json") else (name, "", "")
    return (Path(path), role) if path.endswith(".json") else (None, "")


def strength_of(given: float | None, names: Sequence[str]) -> float:
    """The strength of --insert's features: --strength, or `insertion_strength`. Raises UserError."""
    if given is not None and not names:
        raise UserError(
            f"--strength is {given:g} without --insert; it is a factor on the features that --insert names."
        )
    return insertion_strength(names) if given is None else given


def insertion_strength(names: Sequence[str]) -> float:
    """The factor on the activations of features that --insert names: their circuit's strength, or 1 without a circuit.

    Raises UserError where circuits differ in strength, or a circuit is combined with other features, because one set
    of features has one strength.
    """
    from tl_adapters.circuits.circuit import Circuit

    files = [path for name in names if (path := circuit_file(name)[0])]
    strengths = {Circuit.load(path).strength for path in files} | ({1.0} if len(files) < len(names) else set())
    if len(strengths) > 1:
        raise UserError(
            f"--insert {' '.join(names)}: these features have the strengths "
            f"{', '.join(f'{s:g}' for s in sorted(strengths))}; set one with --strength, or give --insert once "
            "for each."
        )
    return strengths.pop() if strengths else 1.0


def tasks_of(given: Sequence[str]) -> dict[str, str | None]:
    """Name of each task and the local copy of its dataset, or None for the hub's.

    A word is NAME, NAME=FILE, or several of these with commas between; a file may hold commas itself. Raises UserError
    where a task has no name or no file, or is given twice.
    """
    texts = [text for word in given for text in re.split(r",(?=[\w-]+=)", word)]
    texts = [name for text in texts for name in ([text] if "=" in text else text.split(","))]
    tasks: dict[str, str | None] = {}
    for name, equals, file in (text.partition("=") for text in texts):
        if not name or (equals and not file) or name in tasks:
            which = f"{name} twice" if name in tasks else repr(" ".join(given))
            raise UserError(f"Tasks are given as NAME or NAME=FILE, each once, such as gsm8k,math500; got {which}.")
        tasks[name] = file or None
    return tasks


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text of --prompt or of --prompt-file, without a byte-order mark. Raises UserError."""
    from tl_adapters.cli.parsing import exactly_one

    exactly_one(prompt=prompt, prompt_file=file)
    if prompt is not None:
        return prompt
    assert file is not None
    from tl_adapters.utils.reading import UnreadableFileError, read_text

    try:
        return read_text(file, "Give a text file in UTF-8.")
    except UnreadableFileError as error:
        raise UserError(f"--prompt-file: {error}") from error
