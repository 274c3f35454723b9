"""A pretended accelerator, for tests on machines without one: it tags storages, and computes on the CPU.

Within `PretendedDevice` a tensor whose storage is tagged says that it is on ``privateuseone:0``; factories, ``.to`` and
``.cpu`` called with that device (or with the CPU) move tags along. As on a real accelerator

* an operator over tagged and other tensors raises (a 0-dim CPU tensor may stand beside tagged ones, CPU index tensors
  may index a tagged tensor, and ``copy_`` is a transfer);
* a generator of the CPU cannot draw on the device, and NumPy cannot see a tagged tensor;
* with ``float64=False`` (as on MPS) a tagged float64 tensor raises.

What a real device does silently and slowly is recorded: ``events`` holds every transfer and every synchronisation
with the line of tl_adapters that caused it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("privateuseone:0")
_DEVICE_OF = Tensor.device.__get__  # type: ignore[attr-defined]
_MAY_MIX = ("aten::copy_", "aten::_foreach_copy_", "aten::set_")
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_SYNCHRONISE = (
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::equal", "aten::bincount",
)  # fmt: skip
_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)


class PretendedDeviceError(RuntimeError):
    """What a real device would raise."""


@dataclass(frozen=True)
class Event:
    """Something that a device waits for."""

    kind: str
    """ "sync", "to_device" or "to_host"."""
    file: str
    """Innermost module of tl_adapters on the stack, such as "linear.py"; empty where there is none."""
    line: int
    function: str
    """Of tl_adapters, which did it."""


class _Tags:
    """Which storages are on the device."""

    def __init__(self) -> None:
        self._refs: dict[int, StorageWeakRef] = {}
        self._next_sweep = 10_000

    def __contains__(self, tensor: Tensor) -> bool:
        ref = self._refs.get(_key(tensor))
        return ref is not None and not ref.expired()

    def add(self, tensor: Tensor) -> None:
        # The weak reference keeps the storage's address from being used again, so a key never names another storage.
        self._refs[_key(tensor)] = StorageWeakRef(tensor.untyped_storage())
        if len(self._refs) > self._next_sweep:
            self._refs = {key: ref for key, ref in self._refs.items() if not ref.expired()}
            self._next_sweep = 2 * len(self._refs) + 10_000

    def discard(self, tensor: Tensor) -> None:
        self._refs.pop(_key(tensor), None)


def _key(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # batched or meta tensors have none
        return 0


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dictionaries; several times as fast as torch's pytree."""
    found: list[Tensor] = []
    _add_tensors(tree, found)
    return found


def _add_tensors(tree: Any, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, tuple | list):
        for item in tree:
            _add_tensors(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _add_tensors(item, found)


def _has_list(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(part, list) for part in index))


def _is_device(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == DEVICE.type


class PretendedDevice:
    """See the module's text. A context manager; `hold` puts modules and tensors on the device."""

    name = DEVICE

    def __init__(self, float64: bool = True) -> None:
        self.float64, self.events, self.tags = float64, list[Event](), _Tags()
        self.ambient = False  # is an operator of device tensors under way? what it makes inside is on the device
        self._modes = (_Functions(self), _Operators(self))

    def __enter__(self) -> PretendedDevice:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Compute on the CPU within a block, as fast as usual."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def hold(self, *things: nn.Module | Tensor) -> None:
        """Put modules (parameters and buffers) and tensors on the device, where they stand."""
        for thing in things:
            held: Iterable[Tensor] = [thing] if isinstance(thing, Tensor) else [*thing.parameters(), *thing.buffers()]
            for tensor in held:
                self.require_dtype(tensor)
                self.tags.add(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Is it on the device?"""
        return tensor in self.tags

    def require_dtype(self, tensor: Tensor) -> None:
        if not self.float64 and tensor.dtype == torch.float64:
            raise PretendedDeviceError("This device has no float64 (as MPS).")

    def record(self, kind: str) -> None:
        """An event, with the line of tl_adapters that caused it."""
        frame: Any = sys._getframe(1)
        while frame is not None and "/tl_adapters/" not in frame.f_code.co_filename.replace("\\", "/"):
            frame = frame.f_back
        if frame is None:
            self.events.append(Event(kind, "", 0, ""))
        else:
            code = frame.f_code
            self.events.append(Event(kind, code.co_filename.rpartition("/")[2], frame.f_lineno, code.co_name))

    @contextmanager
    def counted(self) -> Iterator[Counter[tuple[str, str, str]]]:
        """What happens within a block: how often each (kind, file, function) waits."""
        found: Counter[tuple[str, str, str]] = Counter()
        start = len(self.events)
        yield found
        found.update((event.kind, event.file, event.function) for event in self.events[start:])


class _Move(torch.autograd.Function):
    """A copy on the other side; its gradient is moved back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, emulator: PretendedDevice, to_device: bool) -> Tensor:
        ctx.emulator, ctx.to_device = emulator, to_device
        return _moved(x, emulator, to_device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _moved(grads[0], ctx.emulator, not ctx.to_device), None, None


def _moved(x: Tensor, emulator: PretendedDevice, to_device: bool) -> Tensor:
    copied = x.clone()
    (emulator.tags.add if to_device else emulator.tags.discard)(copied)
    if to_device:
        emulator.require_dtype(copied)
    emulator.record("to_device" if to_device else "to_host")
    return copied


class _Functions(TorchFunctionMode):
    """Devices in calls of the Python API."""

    def __init__(self, emulator: PretendedDevice) -> None:
        super().__init__()
        self.emulator = emulator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, emulator = dict(kwargs or {}), self.emulator
        name = getattr(func, "__name__", "")
        if name == "_parse_to":  # only reads what it is given
            return func(*args, **kwargs)
        if name == "__get__":
            on_device = func == _DEVICE_OF and args[0] in emulator.tags
            return DEVICE if on_device else func(*args, **kwargs)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is Tensor.cpu:
            return self._move(args[0], False)
        inputs = _tensors((args, kwargs))
        tagged = any(t in emulator.tags for t in inputs)
        if func in (Tensor.numpy, Tensor.__array__) and tagged:
            raise PretendedDeviceError("NumPy cannot see a tensor on the device; copy it to the host first.")
        if func is Tensor.tolist and tagged:
            emulator.record("sync")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0] in emulator.tags and _has_list(args[1]):
            emulator.record("to_device")  # a list becomes an index tensor, which is copied
        generator = kwargs.get("generator")
        where: bool | None = None if kwargs.get("device") is None else _is_device(kwargs["device"])
        if where is not None:
            kwargs["device"] = "cpu"
            if where and func in _FROM_DATA:
                emulator.record("to_device")
        elif func is torch.tensor:
            where = False
        if generator is not None and (tagged if where is None else where):
            raise PretendedDeviceError("A generator of the CPU cannot draw on the device.")
        before, emulator.ambient = emulator.ambient, (tagged if where is None else where)
        try:
            out = func(*args, **kwargs)
        finally:
            emulator.ambient = before
        if where is not None or (tagged and func is Tensor.__deepcopy__):
            for tensor in _tensors(out):
                (emulator.tags.discard if where is False else emulator.tags.add)(tensor)
                if where:
                    emulator.require_dtype(tensor)
        return out

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        other = next((a for a in (*args, kwargs.get("other")) if isinstance(a, Tensor)), None)
        if other is not None:
            device: Any = DEVICE if other in self.emulator.tags else "cpu"
            dtype, memory_format = other.dtype, None
        else:
            device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        options: dict[str, Any] = {} if memory_format is None else {"memory_format": memory_format}
        on_device = tensor in self.emulator.tags
        goes = on_device if device is None else _is_device(device)
        if on_device and not goes:  # moved first: the device may not have the dtype
            tensor = self._move(tensor, False)
        before, self.emulator.ambient = self.emulator.ambient, goes and on_device
        try:
            tensor = tensor.to(dtype=dtype or tensor.dtype, copy=copy, **options)
        finally:
            self.emulator.ambient = before
        return self._move(tensor, True) if goes and not on_device else tensor

    def _move(self, tensor: Tensor, to_device: bool) -> Tensor:
        if (tensor in self.emulator.tags) == to_device:
            return tensor
        moved: Tensor = _Move.apply(tensor, self.emulator, to_device)
        return moved


class _Operators(TorchDispatchMode):
    """What operators are given, and where their results are."""

    def __init__(self, emulator: PretendedDevice) -> None:
        super().__init__()
        self.emulator = emulator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        emulator, name = self.emulator, func._schema.name
        inputs = _tensors((args, kwargs))
        if emulator.ambient and name in ("aten::lift_fresh", "aten::lift"):  # torch.tensor within a torch function
            emulator.tags.add(inputs[0])
        on = [t for t in inputs if t in emulator.tags]
        off = [t for t in inputs if t.dim() and t not in emulator.tags]
        if on:
            self._examine(name, args, on, off)
        out = func(*args, **kwargs)
        if on or (not inputs and emulator.ambient):
            held = {_key(t) for t in inputs}
            for tensor in _tensors(out):
                if _key(tensor) not in held:
                    emulator.tags.add(tensor)
                if tensor in emulator.tags:
                    emulator.require_dtype(tensor)
        return out

    def _examine(self, name: str, args: Any, on: list[Tensor], off: list[Tensor]) -> None:
        emulator = self.emulator
        if name in _INDEXING:
            self._examine_index(name, args)
        elif off and name not in _MAY_MIX:
            shapes = f"{[tuple(t.shape) for t in on]} on the device and {[tuple(t.shape) for t in off]} not"
            raise PretendedDeviceError(f"{name} over tensors of two devices: {shapes}.")
        elif off:
            emulator.record("to_device" if args[0] in emulator.tags else "to_host")
        elif name in _SYNCHRONISE:
            emulator.record("sync")

    def _examine_index(self, name: str, args: Any) -> None:
        emulator, indices = self.emulator, [i for i in args[1] if i is not None]
        if args[0] not in emulator.tags:
            raise PretendedDeviceError(f"{name}: a CPU tensor is indexed, or written to, with tensors of the device.")
        if len(args) > 2 and args[2].dim() and args[2] not in emulator.tags:
            raise PretendedDeviceError(f"{name}: values of the CPU are written into a tensor of the device.")
        if any(i not in emulator.tags for i in indices):
            emulator.record("to_device")
        filled = len(args) > 2 and args[2].numel() == 1  # then a mask is filled, and nobody counts it
        if not filled and any(i.dtype in (torch.bool, torch.uint8) and i in emulator.tags for i in indices):
            emulator.record("sync")


def grown(small: Counter[Any], large: Counter[Any], allowed: Callable[[Any], bool] = lambda key: False) -> list[str]:
    """Where a larger run waited more often than a smaller one."""
    return [
        f"{kind} in {file}:{function}, {small[kind, file, function]} -> {n}"
        for (kind, file, function), n in sorted(large.items())
        if n > small[kind, file, function] and not allowed((kind, file, function))
    ]
