"""What a run was made from is in its fingerprint: other data, another rendering or another day is noticed."""

import datetime
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from helpers.hub_folders import write_pair, write_tokenizer

from tl_adapters import PairedModel, train
from tl_adapters.checkpoints.tokenizers import load_tokenizer
from tl_adapters.config import DataConfig, RunConfig, TrainingConfig
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.documents import FINGERPRINTED_DOCUMENTS, EncodedDocuments, open_documents
from tl_adapters.data.sources import hash_of_files
from tl_adapters.study.open_run import open_data, open_run
from tl_adapters.training.run_folder import RunFolderError
from tl_adapters.training.trainer import Trainer

OPTIONS = TrainingConfig(
    stages=("end_to_end",), n_features=4, steps=6, tokens_per_batch=512, checkpoint_every=2, lr=1e-3
)
DAY, NEXT = datetime.date(2026, 11, 26), datetime.date(2026, 11, 27)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(n: int, changed: int | None = None) -> str:
    said = [f"<think>Wait</think>{i}{'!' if i == changed else ''}" for i in range(n)]
    return "".join(json.dumps({"prompt": f"{i}+0=?", "response": text}) + "\n" for i, text in enumerate(said))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Base, target, and a dataset of more rows than are rendered for the fingerprint."""
    write_pair(tmp_path, "Llama 3.2", dtype=torch.float32)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(rows(FINGERPRINTED_DOCUMENTS + 20))
    return tmp_path


def pair_of(folder: Path) -> PairedModel:
    return PairedModel.from_pretrained(folder / "base", folder / "target")


def documents(folder: Path, source: str = "data", **options: Any) -> EncodedDocuments:
    chat = ChatFormat.of(load_tokenizer(folder / "target"))
    return open_documents(DataConfig(source=str(folder / source), shuffle_window=16, **options), chat, 128)


def today(day: datetime.date, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_adapters.data.chat_template._today", lambda: day)


def stop_at(step: int) -> Any:
    def stop(now: int, terms: object) -> None:
        if now == step:
            raise InterruptedError

    return stop


def begun(folder: Path, data: EncodedDocuments, step: int = 3) -> Path:
    """A run that was stopped at a step."""
    trainer = Trainer(pair_of(folder), data, OPTIONS, folder / "run", progress=False)
    with pytest.raises(InterruptedError):
        trainer.run(stop_at(step))
    return folder / "run"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_resumed_on_another_day_keeps_its_date(
    streaming: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today(DAY, monkeypatch)
    whole = train(pair_of(folder), documents(folder, streaming=streaming), OPTIONS, progress=False).fingerprint
    run = begun(folder, documents(folder, streaming=streaming))
    assert RunConfig.load(run / "config.json").data.template_date == "2026-11-26"
    today(NEXT, monkeypatch)
    again = documents(folder, streaming=streaming)
    assert again.template_date == NEXT and again.traces()[0].tokens != again.with_date(DAY).traces()[0].tokens
    assert Trainer.resume(pair_of(folder), again, run, progress=False).run().fingerprint == whole


def test_a_run_keeps_its_date_wherever_it_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    today(DAY, monkeypatch)
    pair = pair_of(folder)
    train(pair, documents(folder), OPTIONS, folder / "run", progress=False)
    asked = [{"role": "user", "content": "1+1=?"}]
    then = ChatFormat.of(pair.model.tokenizer).prompt(asked)
    today(NEXT, monkeypatch)
    opened = open_run(folder / "run")
    assert (
        ChatFormat.of(opened.model.tokenizer).prompt(asked)
        == then
        != ChatFormat.of(load_tokenizer(folder / "target")).prompt(asked)
    )
    config = RunConfig.load(folder / "run" / "config.json")
    assert (
        open_data(
            RunConfig(config.base, config.target, data=DataConfig(str(folder / "data"), template_date="2026-11-26")),
            opened,
        ).template_date
        == DAY
    )


def test_fingerprints_depend_on_the_date(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    today(DAY, monkeypatch)
    first = documents(folder)
    today(NEXT, monkeypatch)
    second = documents(folder)
    assert first.fingerprint != second.fingerprint and first.fingerprint == second.with_date(DAY).fingerprint
    apart = {name for name, value in first.fingerprints.items() if second.fingerprints[name] != value}
    assert apart == {"chat_template", "rendered_text"}


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("changed", [3, FINGERPRINTED_DOCUMENTS + 15])
def test_data_that_changed_is_refused_wherever_it_changed(changed: int, streaming: bool, folder: Path) -> None:
    run = begun(folder, documents(folder, streaming=streaming))
    (folder / "data" / "train.jsonl").write_text(rows(FINGERPRINTED_DOCUMENTS + 20, changed))
    with pytest.raises(RunFolderError, match="was started with other (data|rendered text)"):
        Trainer.resume(pair_of(folder), documents(folder, streaming=streaming), run, progress=False)
    (folder / "data" / "train.jsonl").write_text(rows(FINGERPRINTED_DOCUMENTS + 20))
    if streaming:  # a table's own fingerprint knows the time of its files
        Trainer.resume(pair_of(folder), documents(folder, streaming=True), run, progress=False).run()


def test_a_template_or_tokenizer_that_renders_differently_is_refused(folder: Path) -> None:
    run = begun(folder, documents(folder))
    template = (load_tokenizer(folder / "target").chat_template or "").replace("Today Date", "Date")
    write_tokenizer(folder / "target", "Llama 3.2", chat_template=template)
    with pytest.raises(RunFolderError, match="was started with other (data|chat template)"):
        Trainer.resume(pair_of(folder), documents(folder), run, progress=False)


def test_a_commit_of_the_hub_is_in_the_fingerprint() -> None:
    """The datasets library resolves a hub dataset to addresses that name the commit."""
    found = []
    for commit in ("0a1b", "0a1b", "2c3d"):
        files = {"train": [f"hf://datasets/who/what@{commit}/train.jsonl"], "test": ["x"]}
        builder = SimpleNamespace(config=SimpleNamespace(data_files=files))
        found.append(hash_of_files(builder, "who/what", "train"))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("recorded", [("data",), ("data", "chat_template")])
def test_a_run_of_an_earlier_version_resumes_with_a_warning_of_what_is_not_checked(
    recorded: tuple[str, ...], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = begun(folder, documents(folder))
    record = json.loads((run / "run.json").read_text())
    record["fingerprints"] = {
        k: v for k, v in record["fingerprints"].items() if k in (*recorded, "target", "base_mlps")
    }
    (run / "run.json").write_text(json.dumps(record))
    Trainer.resume(pair_of(folder), documents(folder), run, progress=False).run()
    assert "data files" in caplog.text and "rendered text, so whether they are the same is not checked" in caplog.text
    assert ("chat template" in caplog.text) == (len(recorded) == 1)


def test_there_is_no_warning_where_all_is_checked(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Trainer.resume(pair_of(folder), documents(folder), begun(folder, documents(folder)), progress=False)
    assert "not checked" not in caplog.text
