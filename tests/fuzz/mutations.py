"""Damage of files: bytes of any file, values of JSON and YAML, lines of JSON lines, headers and tensors of safetensors.

Every function takes its random numbers from the generator that it is given, so a seed and a case number repeat a file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load, save

RAW_VALUES = (
    "1e999", "-1e999", "1e-999", "NaN", "Infinity", "-Infinity", "9" * 5000, "-" + "9" * 5000, '"\\ud800"',
    '"\\u0000"', "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "-0", "01", "0x10", "", "nul", '"',
    '{"a":1,"a":2}',
)  # fmt: skip
"""JSON texts of values that `json.dumps` does not write; some are not JSON."""
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, -(2**31), 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**30, 0.0, -0.0,
    0.5, 1.0, 1e-300, 1e300, -1e300, 3.5, "", "0", "1", "a", " ", "\x00", "\x1b[31m", "\u202e", "../../etc/passwd",
    "/etc/passwd", "é" * 50, "x" * 5000, "nan", [], [None], [[]], [1], [1, 2, 3], ["a"], {}, {"a": 1}, {"": None},
    [0] * 1000,
)  # fmt: skip
BYTES = (
    b"\xef\xbb\xbf", b"\x00", b"\xff\xfe", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\r", b"\n", b"\n\n", b"{", b"}", b"[",
    b"]", b'"', b"\\", b",", b":", b"\x1b", b"9" * 5000, b"[" * 20000, b"1e999", b"NaN", b"null", b"\xe2\x80\xa8",
)  # fmt: skip
WHOLE_FILES = (
    b"", b"null", b"true", b"0", b'""', b"[]", b"{}", b"[" * 100_000, b"[" * 5000 + b"]" * 5000, b"9" * 5000,
    b"\x00" * 100, b"\xff" * 100, b"\xef\xbb\xbf{}", b"NaN", b"[null]", b'["a"]', b"\n\n\n", b"{}\n{}",
    struct.pack("<Q", 2**63), struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 100), b"version https://git-lfs.github.com/spec/v1\n",
    b"<!DOCTYPE html><html></html>", b"%YAML 9.9\n---\n", b"!!python/object/apply:os.system [true]",
)  # fmt: skip
_MARK = "@@raw@@"
"""Stands for a text of RAW_VALUES until the rest of the tree is written."""
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "X", "", None, 7)
_TORCH_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.bool,
)  # fmt: skip
_EXTREMES = (float("nan"), float("inf"), -1, 0, 1, 2**31 - 1, -(2**31), 2**40, 1e30)


def damaged(suffix: str, content: bytes, others: Sequence[bytes], rng: Random) -> bytes | None:
    """A file's content after one to three mutations; None means that the file is removed.

    Args:
        suffix: of the file's name; it decides which mutations there are besides those of bytes.
        content: the valid content.
        others: contents of other files, which may be put in its place.
        rng: source of all random numbers.
    """
    if (kind := rng.random()) < 0.02:
        return None
    if kind < 0.06:
        return rng.choice([*WHOLE_FILES, *others])
    mutate = _OF_SUFFIX.get(suffix, _damaged_bytes)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = (_damaged_bytes if rng.random() < 0.2 else mutate)(content, rng)
    return content


def _damaged_bytes(content: bytes, rng: Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    stop = min(len(content), start + rng.choice((1, 1, 2, 8, 64)))
    operation = rng.randrange(6)
    if operation == 0:  # flip bits
        flipped = bytes(byte ^ (1 << rng.randrange(8)) for byte in content[start:stop])
        return content[:start] + flipped + content[stop:]
    if operation == 1:
        return content[:start]
    if operation == 2:
        return content[:stop] + content[start:]  # duplicates the part between
    if operation == 3:
        return content[:start] + content[stop:]
    if operation == 4:
        return content[: (at := rng.choice((0, start, len(content))))] + rng.choice(BYTES) + content[at:]
    return content + content


# -- values of JSON and YAML ------------------------------------------------------------------------------------------


def _damaged_json(content: bytes, rng: Random) -> bytes:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return _damaged_bytes(content, rng)
    tree, raw = damaged_value(tree, rng)
    return _json_bytes(tree, raw)


def _json_bytes(tree: Any, raw: str | None) -> bytes:
    try:
        text = json.dumps(tree, default=str)
    except (ValueError, RecursionError):  # integers of more than 4,300 digits, or too deep
        return b"9" * 5000
    return (text if raw is None else text.replace(json.dumps(_MARK), raw)).encode()


def damaged_value(tree: Any, rng: Random) -> tuple[Any, str | None]:
    """A parsed value with one node replaced, removed, repeated or renamed, and JSON text to put in place of `_MARK`."""
    raw = rng.choice(RAW_VALUES) if rng.random() < 0.2 else None
    node = _MARK if raw is not None else rng.choice(VALUES)
    places = _places(tree, rng)
    if not places:
        return node, raw
    parent, key = places[rng.randrange(len(places))]
    operation = rng.choice(
        ("replace", "replace", "replace", "nudge", "nudge", "remove", "repeat", "rename", "add", "swap", "wrap")
    )
    if raw is not None or operation == "replace":
        parent[key] = node
    elif operation == "nudge":
        parent[key] = _nudged(parent[key], rng)
    elif operation == "remove":
        del parent[key]
    elif operation == "wrap":
        parent[key] = rng.choice(([parent[key]], {"a": parent[key]}, str(parent[key])))
    elif operation == "swap":
        other, second = places[rng.randrange(len(places))]
        parent[key], other[second] = other[second], parent[key]
    elif isinstance(parent, list):
        parent.insert(key, parent[key] if operation == "repeat" else node)
    elif operation == "add":
        parent[rng.choice(("a", "", "schema_version", key + " ", "__class__"))] = node
    else:
        value = parent.pop(key) if operation == "rename" else parent[key]
        parent[rng.choice((key.upper(), key + "s", key[:-1], "", "a"))] = value
    return tree, raw


def _nudged(value: Any, rng: Random) -> Any:
    """A value of the same type that may be out of range."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 1000, 0, float(value), str(value)))
    if isinstance(value, float):
        return rng.choice((-value, value * 1e10, 0.0, int(value) if abs(value) < 1e15 else 0, str(value)))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value.upper(), value * 300, "../" + value, ""))
    if isinstance(value, list):
        return rng.choice((value[:-1], value[::-1], value + value, value[1:]))
    if isinstance(value, dict):
        return list(value.items())
    return rng.choice(VALUES)


def _places(tree: Any, rng: Random) -> list[tuple[Any, Any]]:
    """(container, key or index) of nodes: all of a small tree, the first thousand of a large one."""
    places: list[tuple[Any, Any]] = []
    stack = [tree]
    while stack and len(places) < 1000:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        if len(keys) > 50:
            keys = rng.sample(list(keys), 50)
        places += [(node, key) for key in keys]
        stack += [node[key] for key in keys if isinstance(node[key], (dict, list))]
    return places


def _damaged_lines(content: bytes, rng: Random) -> bytes:
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    operation = rng.randrange(6)
    if operation == 0:
        del lines[i]
    elif operation == 1:
        lines.insert(i, lines[i])
    elif operation == 2:
        lines.insert(i, rng.choice((b"", b"null", b"[]", b"{}", b"1", b'"a"', b"{", b"[" * 20000)))
    else:
        lines[i] = _damaged_json(lines[i], rng)
    return b"\n".join(lines)


def _damaged_yaml(content: bytes, rng: Random) -> bytes:
    tricks = (
        b"\na: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
        b"c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
        b"e: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d]\nf: &f [*e, *e, *e, *e, *e, *e, *e, *e, *e]\n"
        b"g: &g [*f, *f, *f, *f, *f, *f, *f, *f, *f]\nh: &h [*g, *g, *g, *g, *g, *g, *g, *g, *g]\n",
        b"\na: &a [*a]\n", b"\n? [1, 2]\n: 3\n", b"\n1: 2\n", b"\nwhen: 2020-01-01\n", b"\nx: !!python/name:os.kill\n",
        b"\nx: !!binary aGk=\n", b"\n<<: {a: 1}\n", b"\nx: 1:30:00\n", b"\nx: 0o17\n", b"\nyes: no\n", b"\t\tx: 1\n",
        b"\n? " + b"[" * 2000 + b"]" * 2000 + b"\n: 1\n", b"\n---\na: 1\n", b"\n!!set {a, b}\n", b"\nx: .inf\n",
        b"\nx: .nan\n",
    )  # fmt: skip
    if rng.random() < 0.25:
        return content + rng.choice(tricks)
    if b"&" in content:  # an earlier trick: aliases, which stand for a value of any size
        return _damaged_bytes(content, rng)
    try:
        tree = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError):
        return _damaged_bytes(content, rng)
    return _json_bytes(*damaged_value(tree, rng))  # JSON is YAML


# -- safetensors ------------------------------------------------------------------------------------------------------


def _damaged_safetensors(content: bytes, rng: Random) -> bytes:
    return (_damaged_header if rng.random() < 0.5 else _damaged_tensors)(content, rng)


def _damaged_header(content: bytes, rng: Random) -> bytes:
    """Damages the header, so that it may no longer fit the data."""
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    try:
        header = json.loads(text)
        names = [name for name in header if name != "__metadata__"]
    except (ValueError, RecursionError, TypeError):
        return _damaged_bytes(content, rng)
    if rng.random() < 0.1 or not names or not isinstance(header, dict):
        return struct.pack("<Q", rng.choice((0, 1, length + 1, 2**31, 2**62, 2**64 - 1))) + text + data
    entry = header[rng.choice(names)]
    operation = rng.randrange(6)
    if operation == 0 and isinstance(entry, dict):
        entry["dtype"] = rng.choice(_DTYPES)
    elif operation == 1 and isinstance(entry, dict):
        shape = entry.get("shape") if isinstance(entry.get("shape"), list) else [1]  # it may be damaged already
        entry["shape"] = rng.choice(
            (shape[::-1], [*shape, 1], [-1, *shape], [2**62, 4], [], [0], None, [2**70], shape[1:])
        )
    elif operation == 2 and isinstance(entry, dict):
        start, stop = rng.choice((0, 8, len(data), 2**60)), rng.choice((0, 8, len(data), len(data) + 8, 2**63))
        entry["data_offsets"] = rng.choice(([start, stop], [stop, start], [start], None))
    elif operation == 3:
        header["__metadata__"] = rng.choice((None, 1, {"a": 1}, {"a": "b"}, {"format": "tf"}, []))
    else:
        header, raw = damaged_value(header, rng)
        return _with_header(_json_bytes(header, raw), data)
    return _with_header(json.dumps(header).encode(), data)


def _with_header(header: bytes, data: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def _damaged_tensors(content: bytes, rng: Random) -> bytes:
    """Changes tensors, and writes a valid file of them."""
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError, OverflowError):
        return _damaged_bytes(content, rng)
    if not tensors:
        return content + b"\x00"
    name, other = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
    operation = rng.randrange(8)
    if operation == 0:
        del tensors[name]
    elif operation == 1:
        tensors[rng.choice((name + "x", "", name.upper(), "é", "a" * 300))] = tensors.pop(name)
    elif operation == 2:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif operation == 3:
        tensors[name] = tensors[name].to(rng.choice(_TORCH_DTYPES))
    elif operation == 4:
        tensors[name] = _reshaped(tensors[name], rng)
    else:
        tensors[name] = _with_extreme(tensors[name], rng)
    return save({key: tensor.clone().contiguous() for key, tensor in tensors.items()})


def _reshaped(tensor: torch.Tensor, rng: Random) -> torch.Tensor:
    changes: list[Callable[[], torch.Tensor]] = [
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor[:0],
        lambda: tensor[:-1],
        lambda: torch.cat([tensor, tensor]),
        lambda: tensor.T,
        lambda: tensor[..., :-1],
        lambda: tensor.flatten()[0],
    ]
    try:
        return rng.choice(changes)()
    except (IndexError, RuntimeError):  # of a scalar, or of no values
        return torch.zeros(3)


def _with_extreme(tensor: torch.Tensor, rng: Random) -> torch.Tensor:
    """One value, or all of them, changed to an extreme one that the dtype can hold."""
    if not tensor.numel():
        return torch.ones(2)
    changed, value = tensor.clone().contiguous(), rng.choice(_EXTREMES)
    try:
        if rng.random() < 0.3:
            return changed.fill_(value)
        changed.view(-1)[rng.randrange(changed.numel())] = value
    except (RuntimeError, OverflowError, ValueError):
        changed.view(-1)[0] = 1
    return changed


_OF_SUFFIX: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": _damaged_json,
    ".jsonl": _damaged_lines,
    ".yaml": _damaged_yaml,
    ".safetensors": _damaged_safetensors,
}
