"""One bad row ends no run for good: it is named, and can be dropped and counted."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers.hub_folders import write_pair

from tl_adapters import PairedModel
from tl_adapters.checkpoints.tokenizers import load_tokenizer
from tl_adapters.cli.main import main
from tl_adapters.config import DataConfig, RunConfig, TrainingConfig
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.documents import EncodedDocuments, open_documents
from tl_adapters.data.traces import DataError
from tl_adapters.training.trainer import Trainer

N, AT = 90, 75
BAD: dict[str, Any] = {
    "an empty response": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]},
    "a role that the template refuses": {
        "messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")]
    },
    "turns that the template refuses": {"messages": [{"role": r, "content": r} for r in ("user", "user", "assistant")]},
    "no assistant": {"messages": [{"role": "user", "content": "q"}]},
}
OPTIONS = TrainingConfig(
    stages=("end_to_end",), n_features=4, steps=14, tokens_per_batch=512, checkpoint_every=3, lr=1e-3
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def good(i: int) -> dict[str, Any]:
    said = f"<think>Wait</think>{i}"
    return {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": said}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Gemma's template refuses system turns and roles that do not alternate."""
    write_pair(tmp_path, "Gemma", dtype=torch.float32)
    return tmp_path


def write(folder: Path, *bad: Any, at: int = AT) -> Path:
    lines = [json.dumps(good(i)) for i in range(N)]
    lines[at : at + len(bad)] = [row if isinstance(row, str) else json.dumps(row) for row in bad]
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data"


def documents(folder: Path, kind: str, **options: Any) -> EncodedDocuments:
    source = folder / "data" / ("train.jsonl" if kind == "file" else "")
    config = DataConfig(source=str(source), streaming=kind == "stream", shuffle_window=8, survey_documents=5, **options)
    return open_documents(config, ChatFormat.of(load_tokenizer(folder / "target")), 128)


def pair_of(folder: Path) -> PairedModel:
    return PairedModel.from_pretrained(folder / "base", folder / "target")


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_of_a_file_is_named_before_anything_is_made(bad: str, folder: Path) -> None:
    write(folder, BAD[bad])
    with pytest.raises(DataError, match=rf"train\.jsonl, line {AT + 1}: .*data\.bad_rows: drop") as caught:
        documents(folder, "file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_of_a_stream_is_named_and_a_run_resumes_without_it(bad: str, folder: Path) -> None:
    write(folder, BAD[bad])
    trainer = Trainer(pair_of(folder), documents(folder, "stream"), OPTIONS, folder / "run", progress=False)
    with pytest.raises(DataError, match=rf"row {AT}: .*data\.bad_rows: drop"):
        trainer.run()
    with pytest.raises(DataError, match=rf"row {AT}: "):  # with the same options the run stops there again
        Trainer.resume(pair_of(folder), documents(folder, "stream"), folder / "run", progress=False).run()
    dropping = documents(folder, "stream", bad_rows="drop")
    resumed = Trainer.resume(pair_of(folder), dropping, folder / "run", progress=False)
    assert resumed.step > 0
    resumed.run()
    assert dropping.survey().bad_rows == 1 and "unusable rows dropped 1" in str(dropping.survey())


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_of_a_downloaded_dataset_is_named(bad: str, folder: Path) -> None:
    write(folder, BAD[bad])
    with pytest.raises(DataError, match=rf"row {AT}: .*\. Fix the row.*data\.bad_rows: drop"):
        documents(folder, "table").traces()


@pytest.mark.parametrize("kind", ["file", "table", "stream"])
def test_dropped_rows_are_the_unusable_ones_and_are_counted_once(kind: str, folder: Path) -> None:
    bad = [*BAD.values()]
    write(folder, *([*bad, "{no json", "[1]"] if kind == "file" else bad), at=3)
    n = len(bad) + 2 * (kind == "file")
    data = documents(folder, kind, bad_rows="drop")
    usable = [good(i)["messages"] for i in range(N) if not 3 <= i < 3 + n]
    chat = ChatFormat.of(load_tokenizer(folder / "target"))
    for _ in range(2):
        assert sorted(t.tokens for t in data.traces()) == sorted(t.tokens for t in chat.encode(usable))
    assert data.survey().bad_rows == n


def test_row_numbers_go_on_when_a_stream_is_resumed(folder: Path) -> None:
    write(folder, BAD["no assistant"])
    reader = documents(folder, "stream")._reader
    position = None
    for _, position in reader.read("", None):
        if position["row"] == 50:
            break
    for place, message in (
        (json.loads(json.dumps(position)), f"row {AT}"),
        (position["state"], f"row {AT - 50} after"),
    ):
        with pytest.raises(DataError, match=message):
            list(reader.read("", place))


def test_a_document_that_is_too_long_is_named(folder: Path) -> None:
    long = {"prompt": "q", "response": "very long " * 40}
    write(folder, json.dumps(long))
    data = documents(folder, "stream", too_long="refuse")
    with pytest.raises(DataError, match=rf"It is .*row {AT}\."):
        data.traces()


def test_the_command_line_drops_from_now_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, BAD["no assistant"], at=0)
    config = {
        "base": str(folder / "base"), "target": str(folder / "target"),
        "data": {"source": str(folder / "data"), "streaming": True},
        "training": {"n_features": 4, "local": {"steps": 2}, "tokens_per_batch": 128},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    train = ["train", "--config", str(folder / "config.json"), "--out", str(folder / "run"), "--quiet"]
    assert main(train) == 2 and not (folder / "run").exists()
    assert "row 0: " in capsys.readouterr().err
    assert main([*train, "--bad-rows", "drop"]) == 0
    assert json.loads((folder / "run" / "data.json").read_text())["bad_rows"] == 1
    assert RunConfig.load(folder / "run" / "config.json").data.bad_rows == "drop"
