"""How a file is read: as text, JSON, JSON lines, YAML or safetensors, or as a record with checked fields.

A file that somebody else wrote, or that was cut off or edited, ends in one error, `UnreadableFileError`, which names
the file and the line or key, and says what is allowed and what to do. No other error leaves a reader: parsers also
raise RecursionError (deep nesting), UnicodeDecodeError and errors about numbers of thousands of digits.

A file of ours has a `Record` that describes its fields. Records are frozen, refuse unknown keys, and take no value of
another type than their field's: neither true for 1, nor "1" for 1, nor NaN for a number.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from safetensors import SafetensorError

from tl_adapters.errors import UserError
from tl_adapters.utils.strict_json import dumps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RecordType = TypeVar("RecordType")
WRITE_AGAIN = "Restore the file from a copy, or remove it and run the command that writes it again."
"""The way out for a file that a command of ours writes."""
_LARGEST_NUMBER = 400
"""Most characters of a number in JSON; the longest float needs 324, and converting longer integers takes quadratic
time."""


STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
"""Pydantic's settings for everything that is read from a file: no unknown keys, other types, NaN and infinities."""


class UnreadableFileError(UserError, ValueError):
    """A file that is missing, damaged, or holds something else than it should; the message says where and what."""


@contextmanager
def unreadable_as(error_class: type[UserError]) -> Iterator[None]:
    """Within this context, an UnreadableFileError becomes an ``error_class`` with the same message."""
    try:
        yield
    except UnreadableFileError as error:
        raise error_class(str(error)) from error


class Record(BaseModel):
    """Base of the records in our files: frozen, strict about types, without unknown keys, NaN and infinities."""

    model_config = ConfigDict(**STRICT, frozen=True)

    def json_text(self, indent: int | None = 1) -> str:
        """Return the record as the text of its file."""
        return dumps(self.model_dump(mode="json"), indent=indent) + "\n"


# -- files ------------------------------------------------------------------------------------------------------------


def read_text(path: str | Path, advice: str = WRITE_AGAIN) -> str:
    """Return the text of a UTF-8 file, without a byte-order mark.

    Args:
        path: the file.
        advice: a sentence that says what to do where the file cannot be used.

    Raises UnreadableFileError.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UnreadableFileError(f"There is no file {path}. {advice}") from error
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"{path} is not UTF-8 text (byte {error.start}). {advice}") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise UnreadableFileError(f"{path} cannot be read ({getattr(error, 'strerror', error)}). {advice}") from error


def read_json(path: str | Path, advice: str = WRITE_AGAIN) -> Any:
    """Return the value that a JSON file holds; numbers are finite. Arguments and errors as in `read_text`."""
    return parse_json(read_text(path, advice), str(path), advice)


def read_json_object(path: str | Path, advice: str = WRITE_AGAIN) -> dict[str, Any]:
    """Return the mapping that a JSON file holds. Arguments and errors as in `read_text`."""
    value = read_json(path, advice)
    if not isinstance(value, dict):
        raise UnreadableFileError(f"{path} holds {shown(value)}; it should hold a mapping of keys. {advice}")
    return value


def read_json_lines(
    path: str | Path, advice: str = WRITE_AGAIN, partial_end: bool = False
) -> Iterator[tuple[int, Any]]:
    """Yield the number, from 1, and the value of every line of a .jsonl file that is not blank.

    Args:
        path: the file.
        advice: a sentence that says what to do where the file cannot be used.
        partial_end: end without an error at a last line that has no line break and is no JSON, which a process that
            was killed while it appended leaves behind.

    Raises UnreadableFileError.
    """
    lines = read_text(path, advice).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line, f"{path}, line {number}", advice)
        except UnreadableFileError:
            if partial_end and number == len(lines):
                return
            raise


def read_yaml(path: str | Path, advice: str = WRITE_AGAIN) -> Any:
    """Return the value that a YAML file holds, read by `parse_yaml`. Arguments and errors as in `read_text`."""
    return parse_yaml(read_text(path, advice), str(path), advice)


def read_tensors(path: str | Path, device: torch.device | str = "cpu", advice: str = WRITE_AGAIN) -> dict[str, Tensor]:
    """Return every tensor of a safetensors file by name, on ``device``.

    Raises UnreadableFileError.
    """
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error) if not isinstance(error, KeyError) else f"unknown dtype {error}"
        raise UnreadableFileError(f"{path} is missing or damaged ({reason[:200]}). {advice}") from error


# -- texts ------------------------------------------------------------------------------------------------------------


def parse_json(text: str, source: str, advice: str = "") -> Any:
    """Return the value of a JSON text. NaN, infinities and numbers beyond a float's range are errors.

    Args:
        text: the JSON.
        source: where the text is from, for the error; such as a file, or a file and a line.
        advice: a sentence that says what to do where the text cannot be used.

    Raises UnreadableFileError.
    """

    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_whole)
    except RecursionError as error:
        raise UnreadableFileError(f"{source} is nested too deeply. {advice}".rstrip()) from error
    except ValueError as error:
        raise UnreadableFileError(f"{source} is not valid JSON: {error}. {advice}".rstrip()) from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant[:40]}, and JSON holds only finite numbers")


def _finite(number: str) -> float:
    return value if math.isfinite(value := float(number)) else _refuse(number)


def _whole(number: str) -> int:
    if len(number) > _LARGEST_NUMBER:
        raise ValueError(f"it holds a number of {len(number)} digits")
    return int(number)


class _PlainYaml(yaml.SafeLoader):
    """YAML of scalars, lists and mappings, in which 1e-3 is a number and a date is text.

    Aliases are refused: a few of them stand for a value of any size. Repeated keys are refused, too, because only the
    last of them would count.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012  # as PyYAML declares it; filled below

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        given: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is not a single word", problem_mark=key.start_mark)
            if key.value in given:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is repeated", problem_mark=key.start_mark)
            given.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     list("-+.0123456789")),
):  # fmt: skip  # the core schema of YAML 1.2; PyYAML's own, of YAML 1.1, reads 1e-3 as text and 08:30 as a number
    _PlainYaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_PlainYaml.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))


def parse_yaml(text: str, source: str, advice: str = "") -> Any:
    """Return the value of a YAML text: scalars, lists and mappings.

    Numbers are read as YAML 1.2 defines them, so 1e-3 is one; a date stays text. Aliases and repeated keys are errors.
    Arguments and errors as in `parse_json`.
    """
    try:
        return _PlainYaml(text).get_single_data()
    except RecursionError as error:
        raise UnreadableFileError(f"{source} is nested too deeply. {advice}".rstrip()) from error
    except (yaml.YAMLError, ValueError) as error:
        where = f" ({_line_of(error)})" if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else ""
        problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
        raise UnreadableFileError(f"{source} is not valid YAML{where}: {problem}. {advice}".rstrip()) from error


def _line_of(error: yaml.MarkedYAMLError) -> str:
    assert error.problem_mark is not None
    return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"


# -- records ----------------------------------------------------------------------------------------------------------


def read_record(record: type[RecordType], path: str | Path, advice: str = WRITE_AGAIN) -> RecordType:
    """Return the record that a JSON file holds. Arguments and errors as in `read_text`."""
    return as_record(record, read_json(path, advice), str(path), advice)


def read_record_lines(
    record: type[RecordType], path: str | Path, advice: str = WRITE_AGAIN, partial_end: bool = False
) -> list[RecordType]:
    """Return the records of a .jsonl file, one a line. Arguments and errors as in `read_json_lines`."""
    lines = read_json_lines(path, advice, partial_end)
    return [as_record(record, value, f"{path}, line {number}", advice) for number, value in lines]


def as_record(record: type[RecordType], value: Any, source: str, advice: str = "") -> RecordType:
    """Return ``value``, as a JSON or YAML parser gives it, as a record. A lone surrogate in a text becomes "?".

    Args:
        record: the class of the record, or a pydantic dataclass.
        value: mappings, lists and scalars.
        source: where the value is from, for the error.
        advice: a sentence that says what to do where the value cannot be used.

    Raises UnreadableFileError, which names the first key that cannot be used.
    """
    try:
        # Parsed from JSON, since only there a strict tuple can be given as a list.
        return TypeAdapter(record).validate_json(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except ValidationError as error:
        raise UnreadableFileError(f"{source}: {problem_of(error, record)} {advice}".rstrip()) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise UnreadableFileError(f"{source} holds values that are not JSON ({error}). {advice}".rstrip()) from error


def as_dataclass(cls: type[RecordType], value: Any, source: str, advice: str = "") -> RecordType:
    """Return ``value`` as a standard dataclass, as strict about keys and types as a `Record`; nested ones too.

    Arguments and errors as in `as_record`.
    """
    checked: Any = as_record(_checked(cls), value, source, advice)  # type: ignore[arg-type]  # cached by the class
    return cls(**{field.name: getattr(checked, field.name) for field in fields(checked)})


@cache
def _checked(cls: type[Any]) -> type[Any]:
    """The dataclass with pydantic's checks of its arguments."""
    return pydantic_dataclass(cls, config=STRICT, frozen=True)


def problem_of(error: ValidationError, record: type[Any], noun: str = "key") -> str:
    """Return the first problem of a pydantic error as a sentence: the key, its value, and what it should be.

    Args:
        error: the error of a record or of a pydantic dataclass.
        record: its class.
        noun: what its keys are called.
    """
    first = error.errors(include_url=False)[0]
    kind, location, message, given = first["type"], first["loc"], str(first["msg"]), shown(first["input"])
    key = _short_key(_dotted(location)) or "the value"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"Unknown {noun} {key}.{_hint(key, record)}"
    if kind == "missing":
        return f"The {noun} {key} is missing."
    if kind in ("value_error", "assertion_error"):
        cause = first["ctx"]["error"]
        return str(cause) if isinstance(cause, UserError) else f"{key} is {given}: {str(cause).rstrip('.')}."
    if kind == "json_invalid":
        return f"{message}."
    if kind == "dataclass_exact_type":
        return f"{key} is {given}; allowed is an instance of {first['ctx']['class_name']}."
    newer = isinstance(first["input"], int) and first["input"] > 0
    if location[-1:] == ("schema_version",) and kind == "literal_error" and newer:
        versions = allowed_values(record, location)
        return f"it has schema_version {given}; this version of tl-adapters reads {versions}, so update tl-adapters."
    allowed = allowed_values(record, location) or message.removeprefix("Input should be ").rstrip(".")
    if kind == "finite_number":
        allowed = allowed.replace("a number", "a finite number")
    return f"{key} is {given}; allowed is {allowed}."


def _dotted(location: Sequence[str | int]) -> str:
    """A place in nested mappings and lists, such as a.b[3].c."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _short_key(key: str) -> str:
    """A key in an error, which may be of any length in a damaged file."""
    return key if len(key) <= 120 else f"{key[:60]}..."


def _hint(key: str, record: type[Any]) -> str:
    """The known key that is nearest to an unknown one, else the known keys beside it."""
    known = known_keys(record)
    if near := nearest_key(key, known):
        return f" Did you mean {near}?"
    parent = key.rpartition(".")[0]
    beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    return f" Known are: {', '.join(beside)}." if beside else ""


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """Return the known dotted key that is spelled most like ``key``, or whose last part is; None if none is close."""
    last_parts: dict[str, str] = {}
    for path in sorted(known, key=lambda path: path.count(".")):  # of paths with equal last parts, the shortest
        last_parts.setdefault(path.rpartition(".")[2], path)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    near_last = difflib.get_close_matches(key.rpartition(".")[2], last_parts, n=1)
    return near[0] if near else last_parts[near_last[0]] if near_last else None


def known_keys(record: type[Any], prefix: str = "") -> list[str]:
    """Return the dotted keys of a record, or of a pydantic dataclass, and of the records in its fields."""
    keys: list[str] = []
    for name, field in record.__pydantic_fields__.items():
        key = f"{prefix}{field.alias or name}"
        keys.append(key)
        if hasattr(field.annotation, "__pydantic_fields__"):
            keys += known_keys(field.annotation, f"{key}.")
    return keys


def allowed_values(record: type[Any], location: Sequence[str | int]) -> str | None:
    """Return the values that a key of a record takes, in words; None where its JSON schema does not say.

    Args:
        record: the class of the record, or a pydantic dataclass.
        location: the place of the value in nested mappings and lists; () is the whole record.
    """
    words = [word for schema in schemas_at(record, location) for word in _in_words(schema)]
    return None if "" in words or not words else " or ".join([", ".join(words[:-1]), words[-1]]).removeprefix(" or ")


def schemas_at(record: type[Any], location: Sequence[str | int]) -> list[Mapping[str, Any]]:
    """Return the JSON schemas, one of which a value at a place of a record must have. Arguments as `allowed_values`."""
    schema = TypeAdapter(record).json_schema()
    options: list[Mapping[str, Any]] = [schema]
    for part in location:
        found = (_part_of(option, part) for option in _alternatives(options, schema))
        options = [option for option in found if option]
    return _alternatives(options, schema)


def _alternatives(options: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """JSON schemas without references and unions, in place of schemas with both."""
    flat: list[Mapping[str, Any]] = []
    for option in options:
        if "$ref" in option:
            flat += _alternatives([schema["$defs"][option["$ref"].rpartition("/")[2]]], schema)
        elif "anyOf" in option:
            flat += _alternatives(option["anyOf"], schema)
        else:
            flat.append(option)
    return flat


def _part_of(schema: Mapping[str, Any], part: str | int) -> Mapping[str, Any] | None:
    """The JSON schema of an item of a list or of a value of a mapping; None where it has none."""
    if isinstance(part, int):
        return dict(enumerate(schema.get("prefixItems", ()))).get(part, schema.get("items"))
    extra = schema.get("additionalProperties")
    return schema.get("properties", {}).get(part, extra if isinstance(extra, Mapping) else None)


def _in_words(schema: Mapping[str, Any]) -> list[str]:
    """The values that a JSON schema without references allows, in words; "" where it does not say."""
    if "const" in schema or "enum" in schema:
        return [json.dumps(value) for value in schema.get("enum", [schema.get("const")])]
    if schema.get("format") == "date":
        return ["a date such as 2026-02-28"]
    words = _PLAIN_WORDS.get(schema.get("type", ""), "")
    if schema.get("minLength") == 1 or schema.get("minItems") == 1:
        words += " that is not empty"
    if items := schema.get("items", {}).get("enum"):
        words += f" of {', '.join(map(json.dumps, items))}"
    return [words + _bounds_in_words(schema)]


def _bounds_in_words(schema: Mapping[str, Any]) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']} to {schema['maximum']}"
    bounds = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    return " and".join(f" {sign} {schema[bound]}" for bound, sign in bounds if bound in schema)


_PLAIN_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}
"""What JSON schemas call types, and what our messages call them."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def shown(value: Any) -> str:
    """Return a value as an error shows it: short, whatever its size."""
    if isinstance(value, Mapping) and len(value) > 4:
        return f"a mapping of {len(value)} keys"
    return _SHORT.repr(value)
