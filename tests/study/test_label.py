"""Both parts of `label` share one budget, and what one of them found is written before the other begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_chat import FakeChat, Says
from helpers.judges import knowing
from helpers.made_stores import anywhere, made_store, on_its_token

from tl_adapters.autointerp.endpoint import BudgetError
from tl_adapters.autointerp.http_client import EndpointError
from tl_adapters.study import label
from tl_adapters.study.features import FEATURES_FOLDER
from tl_adapters.study.label import REPLIES_FOLDER, label_run
from tl_adapters.utils.files import FolderBusyError, alone_in, make_folder
from tl_adapters.utils.results import read_results


@pytest.fixture(autouse=True)
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages of other modules that were run, on made stores and without pages."""
    ran: list[str] = []

    def rules(*_: Any) -> dict[str, Any]:
        ran.append("rules")
        return {"labels": {}}

    stores = made_store(on_its_token), made_store(anywhere, "neuron", seed=1)
    monkeypatch.setattr(label, "load_stores", lambda folder: stores)
    monkeypatch.setattr(label, "label_and_record", rules)
    monkeypatch.setattr(label, "draw_pages", lambda *_, **__: ran.append("pages"))
    return ran


def run_label(fake: FakeChat, folder: Path, **endpoint: Any) -> dict[str, Any]:
    options = {"base_url": fake.url, "model": "judge", "concurrency": 1, **endpoint}
    return label_run(folder, judge_n=4, retest=0, interpret_n=2, endpoint=options, progress=False)


def test_both_parts_share_the_budget_and_count_their_own_requests(tmp_path: Path) -> None:
    with FakeChat(knowing) as fake:
        with pytest.raises(BudgetError, match="budget of 6 requests"):
            run_label(fake, tmp_path, request_budget=6)
        assert len(fake.asked) == 6
        assert set(read_results(tmp_path)["labels"]) == {"judge"}  # the part that was complete
        found = run_label(fake, tmp_path)
        assert set(read_results(tmp_path)["labels"]) == {"judge", "detection"}
    assert found["judge"]["spent"] == {"requests": 0, "tokens": 0, "cached": 4}
    assert found["detection"]["spent"]["cached"] == 2
    assert found["detection"]["spent"]["requests"] == len(fake.asked) - 6


def test_an_endpoint_that_cannot_be_used_is_refused_before_anything_is_labelled(
    tmp_path: Path, stages: list[str]
) -> None:
    with FakeChat(knowing) as fake, pytest.raises(EndpointError, match="reply_tokens"):
        run_label(fake, tmp_path, reply_tokens=0)
    assert not stages and not list(tmp_path.iterdir())


def test_a_second_process_does_not_pay_for_the_same_replies(tmp_path: Path, stages: list[str]) -> None:
    replies = tmp_path / FEATURES_FOLDER / REPLIES_FOLDER
    make_folder(replies)
    with FakeChat(knowing) as fake:
        with alone_in(replies), pytest.raises(FolderBusyError, match="replies"):
            run_label(fake, tmp_path)
        assert not fake.asked and not stages
        run_label(fake, tmp_path)
        assert not list(replies.glob(".*"))
        run_label(fake, tmp_path, cache=None)


def test_without_a_model_nothing_is_asked(tmp_path: Path, stages: list[str]) -> None:
    assert label_run(tmp_path, progress=False) == {"rules": {}}
    assert stages == ["rules", "pages", "pages"]


@pytest.mark.parametrize("label_text", ["\ud83d", "\x1b[2J", "\u202e", "</think>", "</script><script>", "x" * 10_000])
def test_labels_of_any_text_are_written_in_one_line(label_text: str, tmp_path: Path) -> None:
    verdict = json.dumps({"category": "language", "label": label_text, "reason": label_text})
    with FakeChat(lambda _: Says(verdict)) as fake:
        options = {"base_url": fake.url, "model": "judge"}
        found = label_run(tmp_path, judge_n=2, retest=1, endpoint=options, progress=False)
    assert found["judge"]["judged"] == 2 and not found["judge"]["failed"]
    store, _ = label.load_stores(tmp_path)
    texts = [one.text for one in store.labels.values() if one.source == "judge"]
    assert len(texts) == 2 and all(len(text) <= 200 and "\n" not in text for text in texts)
    "".join(texts).encode("utf-8")
