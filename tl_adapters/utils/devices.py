"""Where models go: a device that is named, or the best that this machine has."""

from __future__ import annotations

import logging

import torch

from tl_adapters.errors import UserError

log = logging.getLogger(__name__)

DEVICE_KINDS = ("cuda", "mps", "cpu")
"""Devices that models are run on."""
AUTO = "auto"
"""The first that is there of cuda, mps and cpu."""


class DeviceError(UserError, ValueError):
    """A device that this machine does not have."""


def available_devices() -> list[str]:
    """Devices of this machine, the best first; cuda:1 and on where there are several."""
    found = []
    if torch.cuda.is_available():
        found += ["cuda", *(f"cuda:{i}" for i in range(1, torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def resolve_device(device: str | torch.device | None = AUTO) -> torch.device:
    """The device meant by a name; "auto" and None are the first there is of cuda, mps and cpu, which is logged.

    Raises DeviceError for a device that this machine does not have, naming those it has.
    """
    if device is None or device == AUTO:
        chosen = available_devices()[0]
        log.info("device: %s (auto; this machine has %s)", chosen, ", ".join(available_devices()))
        return torch.device(chosen)
    has = f'This machine has {", ".join(available_devices())}; "{AUTO}" takes the first of them.'
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"device {str(device)!r} is not known. {has}") from error
    if asked.type not in DEVICE_KINDS:
        raise DeviceError(f"device {str(device)!r} is not known. {has}")
    there = {torch.device(name) for name in available_devices()}
    if asked not in there and not (asked.index == 0 and torch.device(asked.type) in there):
        raise DeviceError(f"device {device}: this machine has none, or torch was built without it. {has}")
    return asked
