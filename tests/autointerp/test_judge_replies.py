"""Replies of real chat servers and reasoning models: truncated thinking, additional fields, errors with status 200."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_chat import FakeChat, Says

from tl_adapters.autointerp import endpoint as endpoint_module
from tl_adapters.autointerp.endpoint import Endpoint, Failure
from tl_adapters.autointerp.http_client import EndpointError
from tl_adapters.autointerp.reply_cache import read_json


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.01)


def completion(message: dict[str, Any], finish_reason: str = "stop") -> Says:
    """A chat completion whose message has fields of its own."""
    return Says(body=json.dumps({"choices": [{"message": message, "finish_reason": finish_reason}]}))


def ask(fake: FakeChat, n: int = 1, cache: Path | None = None, **options: Any) -> list[Any]:
    questions = [[{"role": "user", "content": f"question {i}"}] for i in range(n)]
    judge = Endpoint(fake.url, "judge", "key", cache=cache, concurrency=1, **options)
    return judge.ask_all(questions, lambda reply: reply["label"], progress=False)


@pytest.mark.parametrize(
    "reply",
    [
        '{"label": "fires on </think>"}',
        '<think>is it </think>? no</think>{"label": "fires on </think>"}',
        'so</think>\n```json\n{"label": "fires on </think>"}\n```',
    ],
)
def test_a_label_may_name_the_tag_that_ends_thinking(reply: str) -> None:
    assert read_json(reply) == {"label": "fires on </think>"}


def test_thinking_without_a_reply_after_it_is_refused() -> None:
    with pytest.raises(ValueError, match="no JSON"):
        read_json('<think>{"label": 1} or {"label": 2}</think> I cannot say.')


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("content", [None, ""])
def test_thinking_that_is_cut_in_a_field_of_its_own_names_the_limit(field: str, content: str | None) -> None:
    with FakeChat(lambda _: completion({"content": content, field: "Wait, " * 50}, "length")) as fake:
        (failure,) = ask(fake, reply_tokens=50)
        assert fake.asked[0]["max_tokens"] == 50
    assert isinstance(failure, Failure) and "--reply-tokens" in failure.reason


def test_cut_thinking_in_the_text_is_not_sent_back_and_asked_again_under_a_larger_limit(tmp_path: Path) -> None:
    def answer(messages: list[dict[str, str]]) -> Says:
        whole = fake.asked[-1]["max_tokens"] > 100
        text = '<think>Wait</think>{"label": "x"}' if whole else "<think>Wait, wait"
        return completion({"content": text}, "stop" if whole else "length")

    with FakeChat(answer) as fake:
        (failure,) = ask(fake, cache=tmp_path, reply_tokens=10)
        assert isinstance(failure, Failure) and "--reply-tokens" in failure.reason and len(fake.asked) == 1
        assert ask(fake, cache=tmp_path, reply_tokens=200) == ["x"] and len(fake.asked) == 2
        # A reply that came to its end is the same under any larger limit.
        assert ask(fake, cache=tmp_path, reply_tokens=400) == ["x"] and len(fake.asked) == 2


def test_a_reply_in_parts_is_read() -> None:
    parts = [{"type": "text", "text": '{"label": '}, {"type": "image"}, {"type": "text", "text": '"x"}'}]
    with FakeChat(lambda _: completion({"content": parts, "reasoning_content": "hm"})) as fake:
        assert ask(fake) == ["x"]


def test_thinking_alone_and_filtered_replies_are_told_apart() -> None:
    says = iter([completion({"content": None, "reasoning": "hm"}), completion({"content": None}, "content_filter")])
    with FakeChat(lambda _: next(says)) as fake:
        thinking, filtered = ask(fake, 2)
    assert "thinking and no text" in thinking.reason and "filter" in filtered.reason


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "overloaded", "code": 529}}, {"error": "try later"}, {"choices": []}, {"choices": None},
        {"choices": [{}]}, {"choices": [{"message": None}]}, {"error": {"code": "503"}, "choices": []},
    ],
)  # fmt: skip
def test_an_error_with_status_200_costs_one_try_and_not_the_run(body: dict[str, Any]) -> None:
    seen: Counter[str] = Counter()

    def answer(messages: list[dict[str, str]]) -> Says:
        seen[messages[0]["content"]] += 1
        if seen[messages[0]["content"]] == 1:
            return Says(body=json.dumps(body))
        return completion({"content": '{"label": "x"}'})

    with FakeChat(answer) as fake:
        assert ask(fake, 3) == ["x"] * 3
        assert len(fake.asked) == 6


def test_a_server_with_errors_of_status_200_only_stops_the_run() -> None:
    with FakeChat(lambda _: Says(body=json.dumps({"error": "no"}))) as fake:
        with pytest.raises(EndpointError, match="5 questions in a row"):
            ask(fake, 20, tries=2)
        assert len(fake.asked) == 10
