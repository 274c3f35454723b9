"""Readers of files: the value, or one error that names the file, the line or key, what is allowed and the way out."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import Field
from safetensors.torch import save_file

from tl_adapters.utils.reading import (
    Record,
    UnreadableFileError,
    as_record,
    parse_json,
    parse_yaml,
    read_json_lines,
    read_json_object,
    read_record_lines,
    read_tensors,
    read_text,
)


class Inner(Record):
    lr: float = Field(0.1, gt=0)
    kinds: tuple[str, ...] = ()


class Outer(Record):
    schema_version: Literal[1] = 1
    n: int = Field(3, ge=1, le=10)
    inner: Inner = Inner()
    name: str | None = None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"n": True}, "n is True; allowed is a whole number"),
        ({"n": "3"}, "n is '3'; allowed is a whole number"),
        ({"n": 11}, "n is 11; allowed is a whole number from 1 to 10"),
        ({"inner": {"lr": float("nan")}}, "inner.lr is nan; allowed is a finite number"),
        ({"inner": {"lr": float("inf")}}, "inner.lr is inf; allowed is a finite number"),
        ({"inner": {"lrr": 1.0}}, "Unknown key inner.lrr. Did you mean inner.lr?"),
        ({"lrr": 1.0}, "Unknown key lrr. Did you mean inner.lr?"),
        ({"inner": {"kinds": "abc"}}, "inner.kinds is 'abc'; allowed is a list"),
        ({"schema_version": 2}, "it has schema_version 2; this version of tl-adapters reads 1, so update tl-adapters"),
        ([], "the value is []; allowed is a mapping"),
        ({"n": {1}}, "not JSON"),
    ],
)
def test_a_record_refuses_what_its_fields_do_not_allow(value: Any, message: str) -> None:
    with pytest.raises(UnreadableFileError) as error:
        as_record(Outer, value, "run.json", "Copy it again.")
    assert str(error.value).startswith("run.json")
    assert message in str(error.value)
    assert str(error.value).endswith("Copy it again.")


def test_a_record_takes_lists_for_tuples_and_whole_numbers_for_numbers() -> None:
    assert as_record(Outer, {"inner": {"lr": 1, "kinds": ["a"]}}, "x").inner == Inner(lr=1.0, kinds=("a",))


@pytest.mark.parametrize(
    "text",
    ["NaN", "-Infinity", "1e999", "1" * 5000, "[" * 100_000, '{"a": 1', "", "\x00", '{"a": 01}', "'a'", "[1,]"],
)
def test_json_that_is_no_json_is_one_error(text: str) -> None:
    with pytest.raises(UnreadableFileError, match=r"^some\.json"):
        parse_json(text, "some.json")


def test_yaml_numbers_dates_and_words_are_read_as_yaml_1_2_defines_them() -> None:
    text = "lr: 1e-3\nn: 010\ntime: 08:30\nday: 2026-02-28\nanswer: yes\nthousand: 1_000\nempty:\nflag: true"
    assert parse_yaml(text, "c.yaml") == {
        "lr": 0.001, "n": 10, "time": "08:30", "day": "2026-02-28", "answer": "yes", "thousand": "1_000",
        "empty": None, "flag": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: [*x, *x]", "line 2, column 5.*aliases"),
        ("a: 1\nb: 2\na: 3", "line 3.*key a is repeated"),
        ("!!python/object/apply:os.system [id]", "line 1"),
        ("[" * 5000, "nested too deeply"),
        ("? [a]\n: 1", "key is not a single word"),
        ("a: " + "1" * 5000, "not valid YAML"),
        ("a: [1", "line 1"),
        ("a: \x07", "not valid YAML"),
    ],
)
def test_yaml_that_cannot_be_used_is_one_error(text: str, message: str) -> None:
    with pytest.raises(UnreadableFileError, match=f"c.yaml.*{message}"):
        parse_yaml(text, "c.yaml")


def test_text_is_utf8_and_loses_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "marked").write_bytes("\ufeffwait".encode())
    assert read_text(tmp_path / "marked") == "wait"
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name, message in (("latin", "not UTF-8"), ("absent", "no file"), (".", "cannot be read"), ("a\0b", "read")):
        with pytest.raises(UnreadableFileError, match=message):
            read_text(f"{tmp_path}/{name}")


def test_json_lines_name_the_line_and_may_end_in_a_part_of_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"n": 1}\n\n{"n": 2}\n{"n":')
    with pytest.raises(UnreadableFileError, match=r"metrics\.jsonl, line 4"):
        list(read_json_lines(path))
    assert list(read_json_lines(path, partial_end=True)) == [(1, {"n": 1}), (3, {"n": 2})]
    path.write_text('{"n": 1}\n{"n":\n')
    with pytest.raises(UnreadableFileError, match="line 2"):  # a whole line was damaged, not cut off
        list(read_json_lines(path, partial_end=True))
    path.write_text('{"n": 1}\n{"n": "x"}\n')
    with pytest.raises(UnreadableFileError, match=r"line 2: n is 'x'"):
        read_record_lines(Outer, path)


def test_an_object_is_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(UnreadableFileError, match=r"a\.json holds \[1, 2\]; it should hold a mapping"):
        read_json_object(tmp_path / "a.json")


def test_tensors_that_were_cut_off_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(3)}, path)
    assert torch.equal(read_tensors(path)["w"], torch.ones(3))
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:4], b"", b"\xff" * 64, whole.replace(b"F32", b"Q99")):
        path.write_bytes(damaged)
        with pytest.raises(UnreadableFileError, match=r"w\.safetensors is missing or damaged"):
            read_tensors(path)


def test_a_lone_surrogate_becomes_a_question_mark() -> None:
    assert as_record(Outer, {"name": "a\ud800b"}, "x").name == "a?b"
