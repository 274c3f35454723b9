"""What the verbs share: the options with one meaning everywhere, and what is made of them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_adapters.errors import UserError

if TYPE_CHECKING:
    from tl_adapters.adapters.feature_id import FeatureId

DTYPES = ("float32", "bfloat16", "float16", "float64")
Subcommands = Any
"""What argparse's add_subparsers gives; it has no public name."""


def quiet_parent() -> argparse.ArgumentParser:
    """--quiet."""
    quiet = argparse.ArgumentParser(add_help=False)
    quiet.add_argument("--quiet", action="store_true", help="no progress, only what was written")
    return quiet


def common_parent(quiet: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """--quiet, --seed, --device and --dtype."""
    common = argparse.ArgumentParser(add_help=False, parents=[quiet])
    common.add_argument("--seed", type=int, default=None, help="seed of encoders, document order and cuts (default 0)")
    common.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto, the first there is of cuda, mps, cpu)"
    )
    common.add_argument("--dtype", choices=DTYPES, default=None, help="of the models (default: the target's own)")
    return common


def device_of(name: str) -> str:
    """--device, if this machine has it; "auto" is chosen, and said, where the models are loaded. Raises UserError."""
    from tl_adapters.utils.devices import AUTO, DeviceError, resolve_device

    try:
        return name if name == AUTO else str(resolve_device(name))
    except DeviceError as error:
        raise UserError(f"--{error}") from error


def dtype_of(name: str | None):  # type: ignore[no-untyped-def]  # torch is not imported here
    """--dtype as torch's."""
    import torch

    return None if name is None else getattr(torch, name)


def feature_ids(names: Sequence[str]) -> list[FeatureId]:
    """Features as the command line takes them. Raises UserError for another text.

    ``layer.index`` such as 2.17; or a circuit's file, with or without a role, such as runs/demo/circuit.json:output.
    """
    from tl_adapters.adapters.feature_id import FeatureId

    found: list[FeatureId] = []
    for name in names:
        path, _, role = name.partition(":")
        if path.endswith(".json"):
            from tl_adapters.circuits.circuit import ROLES, Circuit

            if role and role not in ROLES:
                raise UserError(f"{role!r} is no role of a circuit; there are {', '.join(ROLES)}.")
            circuit = Circuit.load(path)
            found += circuit.ids(*(r for r in ROLES if r == role))
        elif match := re.fullmatch(r"(\d+)\.(\d+)", name):
            found.append(FeatureId(int(match[1]), int(match[2])))
        else:
            raise UserError(
                f"{name!r} is no feature; give features as layer.index, such as 2.17 4.3, or a circuit.json."
            )
    return found


def insertion_strength(names: Sequence[str]) -> float:
    """How strongly features named for --insert fire: as their circuit's file says, and once where none is named.

    Raises UserError where files disagree, or a file stands beside other features: one set has one strength.
    """
    from tl_adapters.circuits.circuit import Circuit

    files = [name.partition(":")[0] for name in names if name.partition(":")[0].endswith(".json")]
    strengths = {Circuit.load(path).strength for path in files} | ({1.0} if len(files) < len(names) else set())
    if len(strengths) > 1:
        raise UserError(
            f"--insert {' '.join(names)}: these have the strengths {', '.join(f'{s:g}' for s in sorted(strengths))}; "
            "say one with --strength, or give --insert once for each."
        )
    return strengths.pop() if strengths else 1.0


def read_prompt(path: Path) -> str:
    """--prompt-file's text. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path} cannot be read as text ({error}).") from error
