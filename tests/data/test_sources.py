"""Documents from files and datasets: what a record may be, what is wrong with a line, and a resumed order."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.loopback_hub import COMMIT, LoopbackHub, hub  # noqa: F401  # a fixture
from helpers.loopback_server import Request, Response

from tl_adapters.config import DataConfig
from tl_adapters.data.conversations import Conversation
from tl_adapters.data.sources import DocumentReader, ReaderPosition, open_reader
from tl_adapters.data.traces import DataError

PAIR = {"prompt": "1+1=?", "response": "<think>1+1=2.</think>2"}
TURNS = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "<think>1+1=2.</think>2"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def numbered(n: int, name: str = "") -> list[dict[str, str]]:
    return [{"prompt": f"{name}{i}", "response": f"<think>{i}</think>{i}"} for i in range(n)]


def opened(source: Path | str, split: str | None = None, **options: Any) -> DocumentReader:
    return open_reader(DataConfig(source=str(source), **options), split)


def conversations(reader: DocumentReader, seed: str = "seed", position: ReaderPosition = None) -> list[Conversation]:
    return [conversation for conversation, _ in reader.read(seed, position)]


def questions(reader: DocumentReader, seed: str = "seed", position: ReaderPosition = None) -> list[str]:
    return [conversation[0]["content"] for conversation in conversations(reader, seed, position)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset as the hub has them, with two splits."""
    write(tmp_path / "dataset" / "data" / "train.jsonl", *numbered(13, "train "))
    write(tmp_path / "dataset" / "data" / "val.jsonl", *numbered(5, "val "))
    return tmp_path / "dataset"


@pytest.mark.parametrize(
    "record",
    [
        PAIR,
        {"question": PAIR["prompt"], "completion": PAIR["response"], "id": 7},
        {"problem": PAIR["prompt"], "answer": "2", "generation": PAIR["response"]},
        {"messages": TURNS},
        {"messages": None, **PAIR},
        {"conversation": TURNS, "prompt": "another"},
        {"conversations": [{"from": "human", "value": "1+1=?"}, {"from": "gpt", "value": PAIR["response"]}], "id": 7},
    ],
    ids=lambda record: "-".join(record),
)
@pytest.mark.parametrize("kind", ["file", "table", "stream"])
def test_a_record_of_any_known_shape_is_a_conversation(record: dict[str, Any], kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "dataset" / "train.jsonl", record)
    reader = opened(path) if kind == "file" else opened(path.parent, streaming=kind == "stream")
    assert conversations(reader) == [TURNS]


def test_every_turn_is_kept_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be kind."}, *TURNS, {"role": "user", "content": "Sure?"}, TURNS[1]]
    path = tmp_path / "traces.jsonl"
    path.write_text(f"\n{json.dumps({'messages': turns})}\n   \n\r\n{json.dumps(PAIR)}\r\n\n")
    reader = opened(path)
    assert len(list(reader.read("seed", None))) == 2
    assert sorted(conversations(reader), key=len) == [TURNS, turns]


def test_the_last_line_needs_no_end_and_text_is_utf8(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b'{"prompt": "\xc2\xbd", "response": "\xf0\x9f\xa4\x94"}')
    assert [[m["content"] for m in c] for c in conversations(opened(path))] == [["½", "🤔"]]


def test_named_columns_are_read_instead_of_the_known_ones(tmp_path: Path) -> None:
    other = [{"role": "user", "content": "frage"}, {"role": "assistant", "content": "antwort"}]
    record = {**PAIR, "messages": TURNS, "q": "frage", "a": "antwort", "turns": other}
    path = write(tmp_path / "traces.jsonl", record)
    assert conversations(opened(path)) == [TURNS]
    assert conversations(opened(path, conversation_column="turns")) == [other]
    assert conversations(opened(path, prompt_column="q", response_column="a")) == [other]
    assert conversations(opened(path, prompt_column="q")) == [[other[0], TURNS[1]]]
    with pytest.raises(DataError, match="line 1.*no question and response in the columns prompt, response, messages"):
        opened(path, prompt_column="nowhere")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes("\ufeff".encode() + json.dumps(PAIR).encode() + b"\n" + json.dumps(PAIR).encode())
    assert conversations(opened(path)) == [TURNS, TURNS]


MALFORMED = {
    "no json": (b"{", "Expecting"),
    "a list": (b'["prompt", "response"]', r"found \['prompt', 'response'\]"),
    "a number": (b"7", "found 7"),
    "null": (b"null", "found None"),
    "unknown columns": (b'{"frage": "a", "antwort": "b"}', "columns frage, antwort"),
    "no response": (b'{"prompt": "a"}', "columns prompt"),
    "a response of null": (b'{"prompt": "a", "response": null}', "columns prompt, response"),
    "a response that is a number": (b'{"prompt": "a", "response": 2}', "text"),
    "a response that is a list": (b'{"prompt": "a", "response": ["b"]}', "text"),
    "an empty response": (b'{"prompt": "a", "response": ""}', "response"),
    "a response of spaces": (b'{"prompt": "a", "response": " \\n"}', "response"),
    "turns that are text": (b'{"messages": "a"}', "turns are str"),
    "no turns": (b'{"messages": []}', "assistant"),
    "a turn that is text": (b'{"messages": ["a", "b"]}', "list of {role, content}"),
    "a turn without text": (b'{"messages": [{"role": "user"}]}', "role and content must be text"),
    "no assistant": (b'{"messages": [{"role": "user", "content": "a"}]}', r"\['user'\].*last turn"),
    "no user": (b'{"messages": [{"role": "assistant", "content": "a"}]}', r"\['assistant'\].*user"),
    "a last turn that is the user's": (
        b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, '
        b'{"from": "human", "value": "c"}]}',
        r"\['user', 'assistant', 'user'\].*last turn",
    ),
    "invalid utf-8": (b'{"prompt": "a\xff", "response": "b"}', "not UTF-8 text"),
    "half a surrogate pair": (b'{"prompt": "a", "response": "\\ud83d"}', "surrogate"),
    "half a surrogate pair in a role": (b'{"messages": [{"role": "\\ud83d", "content": "a"}]}', "surrogate"),
    "half a surrogate pair in a domain": (b'{"prompt": "a", "response": "b", "domain": "\\ud83d"}', "surrogate"),
    "nested too deeply": (b'{"prompt": ' + b"[" * 10**5 + b"}", "nested too deeply"),
    "NaN": (b'{"prompt": "a", "response": "b", "score": NaN}', "finite numbers"),
    "many columns": (
        json.dumps({f"column {i}": 1 for i in range(10**4)}).encode(),
        r"column 18, column 19, \.\.\.\. Known",
    ),
    "a number of 5,000 digits": (b'{"prompt": ' + b"1" * 5000 + b', "response": "b"}', "digits"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_line_raises_one_line_that_names_file_and_line(name: str, tmp_path: Path) -> None:
    line, message = MALFORMED[name]
    path = tmp_path / "traces.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n\n" + line + b"\n" + json.dumps(PAIR).encode() + b"\n")
    with pytest.raises(DataError, match=rf"traces\.jsonl, line 3\b.*{message}") as caught:
        opened(path)
    assert "\n" not in str(caught.value)


def test_a_malformed_row_of_a_dataset_is_named_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "dataset" / "train.jsonl", PAIR, {"prompt": "a", "response": ""})
    for streaming, where in ((False, "row 1"), (True, "dataset")):
        with pytest.raises(DataError, match=f"{where}.*: .*response"):
            conversations(opened(tmp_path / "dataset", streaming=streaming))


@pytest.mark.parametrize("text", ["", "\n \n\r\n"])
def test_an_empty_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "traces.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"traces\.jsonl holds no traces"):
        opened(tmp_path / "traces.jsonl")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file .*nowhere\.jsonl"):
        opened(tmp_path / "nowhere.jsonl")


def test_a_file_has_no_revision(tmp_path: Path) -> None:
    for source in (write(tmp_path / "traces.jsonl", PAIR), tmp_path):
        with pytest.raises(DataError, match="on this machine and has no revisions, and data.revision is v1: leave"):
            open_reader(DataConfig(str(source), revision="v1"))


def test_a_file_needs_no_suffix(tmp_path: Path) -> None:
    assert conversations(opened(write(tmp_path / "traces.txt", PAIR))) == [TURNS]


@pytest.mark.parametrize("kind", ["file", "table"])
def test_the_order_depends_on_the_seed(kind: str, folder: Path) -> None:
    source = folder / "data" / "train.jsonl" if kind == "file" else folder
    first, again = questions(opened(source), "one"), questions(opened(source), "one")
    other = questions(opened(source), "another")
    everything = sorted(f"train {i}" for i in range(13))
    assert first == again and sorted(first) == everything
    assert first != other and sorted(other) == everything


def test_a_stream_keeps_its_own_order(folder: Path) -> None:
    reader = opened(folder, streaming=True)
    assert questions(reader, "one") == questions(reader, "another") == [f"train {i}" for i in range(13)]


@pytest.fixture(params=["file", "table", "stream", "stream in parts"])
def reader(request: pytest.FixtureRequest, folder: Path) -> DocumentReader:
    if request.param == "file":
        return opened(folder / "data" / "train.jsonl")
    if request.param == "stream in parts":
        (folder / "data" / "train.jsonl").unlink()
        for part in range(3):
            records = numbered(13, "train ")[5 * part : 5 * part + 5]
            write(folder / "data" / f"train-0000{part}-of-00003.jsonl", *records)
    return opened(folder, streaming=request.param != "table")


def test_reading_from_a_position_gives_exactly_the_rest(reader: DocumentReader) -> None:
    documents = list(reader.read("seed", None))
    assert len(documents) == 13
    for place, (_, position) in enumerate(documents, 1):
        saved = json.loads(json.dumps(position))
        assert conversations(reader, position=saved) == [conversation for conversation, _ in documents[place:]]
    assert conversations(reader) == [conversation for conversation, _ in documents]


def test_a_position_after_a_resume_can_be_resumed_from(reader: DocumentReader) -> None:
    everything = questions(reader)
    position: ReaderPosition = None
    for question in everything:
        conversation, after = next(iter(reader.read("seed", position)))
        assert conversation[0]["content"] == question
        position = json.loads(json.dumps(after))
    assert questions(reader, position=position) == []


def test_two_readings_at_once_do_not_disturb_each_other(reader: DocumentReader) -> None:
    alone = list(reader.read("seed", None))

    first, second = reader.read("seed", None), reader.read("seed", None)
    begun = [next(first) for _ in range(3)]
    assert [next(second) for _ in range(6)] == alone[:6]
    assert begun + list(first) == alone


@pytest.mark.parametrize("streaming", [False, True])
def test_the_split_is_the_configurations_or_the_one_asked_for(streaming: bool, folder: Path) -> None:
    validation = sorted(f"val {i}" for i in range(5))
    assert sorted(questions(opened(folder, split="validation", streaming=streaming))) == validation
    config = DataConfig(source=str(folder), split="validation", streaming=streaming)
    assert sorted(questions(open_reader(config))) == validation
    assert sorted(questions(open_reader(config, "train"))) == sorted(f"train {i}" for i in range(13))
    assert (
        opened(folder, "validation", streaming=streaming).fingerprint
        != opened(folder, "train", streaming=streaming).fingerprint
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "value"), [("split", "nowhere"), ("subset", "nobody")])
def test_a_split_or_subset_that_does_not_exist_is_reported(
    name: str, value: str, streaming: bool, folder: Path
) -> None:
    with pytest.raises(DataError, match=rf"dataset \(.*{name} {value}.*\) is neither") as caught:
        opened(folder, streaming=streaming, **{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_name_that_nobody_has_is_reported(streaming: bool) -> None:
    with pytest.raises(DataError, match="nobody/nothing.* is neither a .jsonl file nor a dataset") as caught:
        opened("nobody/nothing", streaming=streaming)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_the_hub_answers_is_kept_with_a_way_out(hub: LoopbackHub, streaming: bool) -> None:  # noqa: F811
    words = {"error": "Access to dataset user/traces is restricted."}
    hub.fault = lambda request: Response(json.dumps(words), 401, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(
        DataError, match=r"is restricted.*/datasets/user/traces in a browser, accept the license"
    ) as gated:
        opened("user/traces", streaming=streaming)
    hub.fault = lambda request: Response(reset=True)
    with pytest.raises(DataError, match=r"Check the network.*call again") as away:
        opened("user/traces", streaming=streaming)
    assert str(gated.value).isprintable() and str(away.value).isprintable()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub_that_ends_early(hub: LoopbackHub, streaming: bool) -> None:  # noqa: F811
    lines = "".join(json.dumps(pair) + "\n" for pair in numbered(3)).encode()
    hub.files["datasets/user/traces"] = {"train.jsonl": lines}
    assert len(conversations(opened("user/traces", streaming=streaming))) == 3

    def cut(request: Request) -> Response | None:
        if request.method != "GET" or not request.path.endswith("train.jsonl"):
            return None
        return Response(lines, headers={"ETag": '"0"', "X-Repo-Commit": COMMIT}, cut_after=10)

    hub.fault = cut
    hub.files["datasets/user/other"] = {"train.jsonl": lines}
    with pytest.raises(DataError, match="user/other"):
        conversations(opened("user/other", streaming=streaming))


def test_the_fingerprint_depends_on_the_texts_alone(tmp_path: Path) -> None:
    same = [opened(write(tmp_path / name, *numbered(3))).fingerprint for name in ("a.jsonl", "b.jsonl")]
    assert len(set(same)) == 1
    assert opened(write(tmp_path / "c.jsonl", *numbered(2), PAIR)).fingerprint not in same
