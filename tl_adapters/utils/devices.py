"""The device that models run on, one by name or the best that this machine has, and how fast it is; dtypes by name."""

from __future__ import annotations

import logging
import math
import time

import psutil
import torch

from tl_adapters.errors import UserError
from tl_adapters.processes import processes

log = logging.getLogger(__name__)

DEVICE_KINDS = ("cuda", "mps", "cpu")
"""Types of device that models can run on."""
AUTO = "auto"
"""Name that stands for the first available one of cuda, mps and cpu."""


GivenDevice = torch.device | str | None
"""A device, or its name; None and "auto" are the first available one of cuda, mps and cpu."""
GivenDtype = torch.dtype | str
"""A dtype of weights, or its name."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""Dtypes that models' weights can have."""


class DeviceError(UserError, ValueError):
    """A device that this machine does not have, or a dtype that weights cannot have."""


def available_devices() -> list[str]:
    """Names of the devices of this machine, the best first; cuda:1 and so on where there are several GPUs."""
    names = []
    if torch.cuda.is_available():
        names += ["cuda", *(f"cuda:{i}" for i in range(1, torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def resolve_device(device: GivenDevice = AUTO) -> torch.device:
    """The device with a name; "auto" and None are the first available one of cuda, mps and cpu, which is logged.

    Of several processes of one launch, each has its own device, which "auto" and "cuda" then are.

    Raises DeviceError for a device that this machine does not have, with the names of those that it has.
    """
    if processes().count > 1 and device in (None, AUTO, processes().device.type):
        return processes().device
    if device is None or device == AUTO:
        chosen = available_devices()[0]
        log.info("device: %s (auto; this machine has %s)", chosen, ", ".join(available_devices()))
        return torch.device(chosen)
    available = f'This machine has {", ".join(available_devices())}; "{AUTO}" takes the first of them.'
    try:
        requested = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"device {str(device)!r} is not known. {available}") from error
    if requested.type not in DEVICE_KINDS:
        raise DeviceError(f"device {str(device)!r} is not known. {available}")
    devices = {torch.device(name) for name in available_devices()}
    if requested not in devices and not (requested.index == 0 and torch.device(requested.type) in devices):
        raise DeviceError(f"device {device}: this machine does not have it, or torch was built without it. {available}")
    return requested


def resolve_dtype(dtype: GivenDtype | None) -> torch.dtype | None:
    """The dtype with a name, "bfloat16" or "torch.bfloat16"; None stays None. Raises DeviceError for another dtype."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in DTYPES:
        raise DeviceError(f"dtype {str(dtype)!r} is not one of weights; allowed are {', '.join(DTYPES)}, or None.")
    return None if name is None else DTYPES[name]


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on the CPU and on Apple's GPU, which share them, those of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def total_memory(device: torch.device) -> int:
    """Bytes of a device, free or not; on the CPU and on Apple's GPU, which share them, those of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def seconds_of(operations: float, device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """The time of so many floating-point operations on a device, estimated from matrix products in a dtype.

    It is one and a half times what these products take, since there are other operations between a model's products.
    """
    side = 512 if device.type == "cpu" else 4096
    a = torch.ones(side, side, device=device, dtype=dtype)
    (a @ a).sum().item()
    fastest = math.inf
    for _ in range(3):  # other processes and a cold cache make single products slow
        began = time.perf_counter()
        (a @ a @ a @ a).sum().item()
        fastest = min(fastest, time.perf_counter() - began)
    return operations * fastest / (3 * 2 * side**3) * 1.5


def seconds_to_write(n_bytes: float, device: torch.device) -> float:
    """The time of elementwise operations on a device that write so many bytes, each to new memory, in all."""
    written = 2**26
    x = torch.ones(written // 4, device=device)
    fastest = math.inf
    for _ in range(3):
        began = time.perf_counter()
        (x + 1)[-1].item()
        fastest = min(fastest, time.perf_counter() - began)
    return n_bytes * fastest / written
