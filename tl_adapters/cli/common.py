"""Options that several subcommands share, and how their values are read."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_adapters.errors import UserError

if TYPE_CHECKING:
    from tl_adapters.adapters.feature_id import FeatureId

DTYPES = ("float32", "bfloat16", "float16", "float64")
Subcommands = Any
"""The object that argparse's add_subparsers returns; its class has no public name."""
STRENGTH_HELP = "factor on --insert's features (default: a circuit's own strength; 1 for features by name)"
"""Help of --strength, which generate and benchmark have."""


def quiet_parent() -> argparse.ArgumentParser:
    """A parser with the option --quiet, to be given as a parent."""
    quiet = argparse.ArgumentParser(add_help=False)
    quiet.add_argument("--quiet", action="store_true", help="print results only, without progress")
    return quiet


def common_parent(quiet: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """A parser with --quiet, --seed, --device and --dtype, to be given as a parent."""
    common = argparse.ArgumentParser(add_help=False, parents=[quiet])
    common.add_argument(
        "--seed", type=int, default=None, help="seed of initialization, document order and cuts (default: 0)"
    )
    common.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto, the first available of cuda, mps, cpu)"
    )
    common.add_argument("--dtype", choices=DTYPES, default=None, help="dtype of the models (default: the target's own)")
    return common


def device_of(name: str) -> str:
    """The device of --device, checked against this machine; "auto" is resolved where the models are loaded.

    Raises UserError for a device that this machine does not have.
    """
    from tl_adapters.utils.devices import AUTO, DeviceError, resolve_device

    try:
        return name if name == AUTO else str(resolve_device(name))
    except DeviceError as error:
        raise UserError(f"--{error}") from error


def dtype_of(name: str | None):  # type: ignore[no-untyped-def]  # torch is not imported here
    """The torch dtype of --dtype, or None."""
    import torch

    return None if name is None else getattr(torch, name)


def feature_ids(names: Sequence[str]) -> list[FeatureId]:
    """The features that the command line names.

    A name is ``layer.index``, such as 2.17, or a circuit's file with or without a role, such as
    runs/demo/circuit.json:output. Raises UserError for any other text.
    """
    from tl_adapters.adapters.feature_id import FeatureId

    features: list[FeatureId] = []
    for name in names:
        path, _, role = name.partition(":")
        if path.endswith(".json"):
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


def insertion_strength(names: Sequence[str]) -> float:
    """The factor on the activations of features that --insert names: their circuit's strength, or 1 without a circuit.

    Raises UserError where circuits differ in strength, or a circuit is combined with other features, because one set
    of features has one strength.
    """
    from tl_adapters.circuits.circuit import Circuit

    files = [name.partition(":")[0] for name in names if name.partition(":")[0].endswith(".json")]
    strengths = {Circuit.load(path).strength for path in files} | ({1.0} if len(files) < len(names) else set())
    if len(strengths) > 1:
        raise UserError(
            f"--insert {' '.join(names)}: these features have the strengths "
            f"{', '.join(f'{s:g}' for s in sorted(strengths))}; set one with --strength, or give --insert once "
            "for each."
        )
    return strengths.pop() if strengths else 1.0


def strength_of(given: float | None, names: Sequence[str]) -> float:
    """The strength of --insert's features: --strength, or `insertion_strength`. Raises UserError."""
    if given is not None and not (names and math.isfinite(given)):
        raise UserError(f"--strength is {given:g}; give a finite number, together with --insert.")
    return insertion_strength(names) if given is None else given


def read_prompt(path: Path) -> str:
    """The text of --prompt-file. Raises UserError where the file cannot be read as UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path} cannot be read as text ({error}).") from error
