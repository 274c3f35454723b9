"""No response of a server stops a run, holds a thread, fills the memory or ends in another error than ours."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz.mutations import damaged
from helpers.fake_chat import FakeChat, Says
from helpers.loopback_server import LoopbackServer, Response, refusing_url

from tl_adapters.autointerp import endpoint as endpoint_module
from tl_adapters.autointerp import http_client
from tl_adapters.autointerp.endpoint import Endpoint, Failure
from tl_adapters.autointerp.http_client import ChatServer, EndpointError
from tl_adapters.autointerp.reply_cache import read_json

GOOD = '{"label": "x"}'


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint_module, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(http_client, "MAX_RESPONSE_BYTES", 1 << 20)


def completion(content: Any = GOOD, finish_reason: Any = "stop", **usage: Any) -> str:
    """The text of a chat completion; what json.dumps cannot write, such as NaN, it writes as Python does."""
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice], "usage": usage})


def raw(text: str) -> Response:
    return Response(raw=text.encode())


WHOLE = completion().encode()
FLOOD = b"X-Flood: " + b"a" * 4000 + b"\r\n"
ASKED_AGAIN: dict[str, Callable[[], Response]] = {
    "reset at once": lambda: Response(reset=True),
    "reset within the body": lambda: Response(WHOLE, cut_after=20, reset=True),
    "cut in half": lambda: Response(WHOLE, cut_after=len(WHOLE) // 2),
    "cut in half without content-length": lambda: Response(iter([WHOLE[: len(WHOLE) // 2]])),
    "closed without a byte": lambda: Response(raw=b""),
    "no HTTP": lambda: raw("220 mail.example.com ESMTP\r\n"),
    "a status line of nonsense": lambda: raw("HTTP/9.9 banana\r\n\r\n"),
    "a negative content-length": lambda: raw("HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}"),
    "two content-lengths": lambda: raw("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}"),
    "chunks without sizes": lambda: raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n{}\r\n"),
    "a flood of headers": lambda: Response(raw=itertools.chain([b"HTTP/1.1 200 OK\r\n"], itertools.repeat(FLOOD))),
    "a flood of interim responses": lambda: Response(raw=itertools.repeat(b"HTTP/1.1 102 Processing\r\n\r\n" * 100)),
    "silence": lambda: Response(delay=5),
    "headers byte by byte": lambda: Response(raw=b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1000, piece=1, pause=0.05),
    "a body byte by byte": lambda: Response(WHOLE, piece=1, pause=0.05),
    "a body that stops and stays": lambda: Response(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", pause=5),
    "an empty body": lambda: Response(),
    "408": lambda: Response("slow", 408),
    "429 without Retry-After": lambda: Response("busy", 429),
    "429 for a century": lambda: Response("busy", 429, {"Retry-After": "3155760000"}),
    "429 for infinity": lambda: Response("busy", 429, {"Retry-After": "inf"}),
    "429 for not a number": lambda: Response("busy", 429, {"Retry-After": "nan"}),
    "429 since yesterday": lambda: Response("busy", 429, {"Retry-After": "-86400"}),
    "429 until a date that cannot be": lambda: Response("busy", 429, {"Retry-After": "Fri, 99 Foo 99999 99:99:99 GMT"}),
    "500": lambda: Response("oh", 500),
    "503 as HTML": lambda: Response("<html>", 503),
    "a charset that is none": lambda: Response("{", 502, {"Content-Type": "application/json; charset=base64"}),
    "an error with status 200": lambda: Response('{"error": {"message": "overloaded"}}'),
    "vLLM's error with status 200": lambda: Response('{"object": "error", "message": "no", "code": 503}'),
    "an error of a 5,000-digit code": lambda: Response(json.dumps({"error": {"code": "5" * 5000}})),
    "no choices": lambda: Response('{"choices": []}'),
    "choices that are an object": lambda: Response('{"choices": {"message": {"content": "x"}}}'),
    "choices that are texts": lambda: Response('{"choices": ["x"]}'),
    "a choice without message": lambda: Response('{"choices": [{"finish_reason": "stop"}]}'),
    "NaN in the completion": lambda: Response(completion(total_tokens=float("nan"))),
    "nesting of 100,000 objects": lambda: Response('{"a":' * 100_000),
    "a number of 100,000 digits": lambda: Response('{"choices": 1' + "0" * 100_000 + "}"),
}  # fmt: skip
"""Responses after which the question is asked again."""
REPORTED: dict[str, tuple[Callable[[], Response], str]] = {
    "a body without end": (lambda: Response(itertools.repeat(b"x" * 65536)), "longer than 1 MiB"),
    "an error page without end": (lambda: Response(itertools.repeat(b"x" * 65536), 500), "longer than 1 MiB"),
    "400": (lambda: Response("too long", 400), "HTTP 400: too long"),
    "201": (lambda: Response(WHOLE, 201), "HTTP 201"),
    "null content": (lambda: Response(completion(None)), "no text"),
    "content that is a number": (lambda: Response(completion(5)), "no text"),
    "content that is an object": (lambda: Response(completion({"text": "x"})), "no text"),
    "a refusal": (
        lambda: Response('{"choices": [{"message": {"content": null, "refusal": "I will not"}}]}'),
        "the model refused to answer: I will not",
    ),
    "a filtered reply": (lambda: Response(completion(None, "content_filter")), "filter"),
    "a finish_reason that is a list": (lambda: Response(completion("no", ["length"])), "no usable JSON"),
    "a reply cut at its limit": (lambda: Response(completion("<think>hm", "length")), "--reply-tokens"),
    "no reply, cut at its limit": (lambda: Response(completion(None, "length")), "--reply-tokens"),
    "escape sequences": (lambda: Response("\x1b[2J\u202e gone", 400), r"\\x1b\[2J\\u202e gone"),
    "a category of a megabyte": (lambda: Response(completion(json.dumps({"label": "y" * 500_000}))), "…"),
}
"""Responses that are reported as failures of their question, and what the reason says."""


def read_label(reply: Any) -> str:
    if not isinstance(reply, dict) or reply.get("label") != "x":
        raise ValueError(f"it is {reply!r}")
    return reply["label"]


def ask_three(fake: FakeChat, **options: Any) -> list[Any]:
    """Three questions, one at a time."""
    questions = [[{"role": "user", "content": f"question {i}"}] for i in range(3)]
    judge = Endpoint(fake.url, "judge", "key", **{"concurrency": 1, "timeout": 1.0, "tries": 2, **options})
    return judge.ask_all(questions, read_label, progress=False)


@pytest.mark.parametrize("behavior", ASKED_AGAIN)
def test_a_question_is_asked_again_after(behavior: str, tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(messages: list[dict[str, str]]) -> str | Response:
        asked.append(messages[0]["content"])
        return ASKED_AGAIN[behavior]() if len(asked) == 1 else GOOD

    started = time.monotonic()
    with FakeChat(answer) as fake:
        assert ask_three(fake, cache=tmp_path, timeout=0.4) == ["x"] * 3
        assert asked == ["question 0", "question 0", "question 1", "question 2"]
    assert time.monotonic() - started < 3
    assert len(list(tmp_path.rglob("*.json"))) == 3


@pytest.mark.parametrize("behavior", REPORTED)
def test_one_failure_is_reported_after(behavior: str) -> None:
    response, reason = REPORTED[behavior]
    with FakeChat(lambda messages: response() if messages[0]["content"] == "question 1" else GOOD) as fake:
        first, failure, last = ask_three(fake)
    assert first == last == "x" and isinstance(failure, Failure)
    assert re.search(reason, failure.reason)
    assert len(failure.reason) < 1200 and failure.reason.isprintable()


@pytest.mark.parametrize("cases", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_damaged_completion_becomes_a_reply_and_nothing_else(cases: int) -> None:
    """Random damage to each part of a completion, as to the files that we read."""
    choice = {"index": 0, "message": {"role": "assistant", "content": GOOD, "reasoning_content": "hm"},
              "finish_reason": "stop"}  # fmt: skip
    whole = json.dumps({"choices": [choice], "usage": {"total_tokens": 12}, "error": None, "object": "x"}).encode()
    server = ChatServer("http://127.0.0.1:1/v1", "judge", "sk-a-secret-key", 1.0)
    rng, texts = random.Random(0), 0
    for case in range(cases):
        damage = damaged(".json", whole, [whole], rng) or b""
        reply = server._completion(damage.decode("utf-8-sig", "replace"), {"messages": []})
        texts += reply.text is not None
        assert (reply.text is None) <= bool(reply.problem), case
        assert 0 <= reply.tokens <= http_client.MAX_REPORTED_TOKENS and len(reply.problem) < 2000, case
        assert reply.problem.isprintable() and not (reply.fatal and reply.retryable), case
    assert 0.05 * cases < texts < cases


@pytest.mark.parametrize(
    "page", ["<html>Log in</html>", "[]", '{"detail": "hello"}', "\ufeff?", GOOD.join(['"', '"'])]
)  # fmt: skip
def test_another_kind_of_service_stops_the_run_unless_it_has_given_completions(page: str) -> None:
    with FakeChat(lambda _: Response(page)) as fake:
        with pytest.raises(EndpointError, match="not a chat completion"):
            ask_three(fake)
        assert len(fake.asked) == 1

    def answer(messages: list[dict[str, str]]) -> str | Response:
        return Response(page) if len(fake.asked) == 2 else GOOD

    with FakeChat(answer) as fake:  # such as a proxy's page while the server restarts
        assert ask_three(fake) == ["x"] * 3


@pytest.mark.parametrize("coding", ["gzip", "br", "x"])
def test_a_compressed_response_is_not_unpacked(coding: str) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    with FakeChat(lambda _: Response(bomb, headers={"Content-Encoding": coding})) as fake:
        with pytest.raises(EndpointError, match="compressed"):
            ask_three(fake)
        assert fake.headers[0]["accept-encoding"] == "identity"


@pytest.mark.parametrize("tokens", [-5, 10**18, 1.5, "12", True, [3], None, 0])
def test_impossible_numbers_of_tokens_are_estimated(tokens: Any, caplog: pytest.LogCaptureFixture) -> None:
    with FakeChat(lambda _: Response(completion(total_tokens=tokens))) as fake:
        judge = Endpoint(fake.url, "judge", token_budget=1000)
        judge.ask_all([[{"role": "user", "content": "question"}]], read_label, progress=False)
    assert 20 < judge.usage.tokens < 100
    assert ("impossible number of tokens" in caplog.text) == (tokens not in (None, 0))


def test_a_budget_of_tokens_holds_against_a_server_that_reports_negative_ones() -> None:
    with FakeChat(lambda _: Response(completion(total_tokens=-1_000_000))) as fake:
        with pytest.raises(endpoint_module.BudgetError):
            ask_three(fake, token_budget=30)
        assert len(fake.asked) < 3


@pytest.mark.parametrize("content", ["\ud83d", json.dumps({"label": "\ud83d"}), "\udcff\x00"])
def test_halves_of_characters_are_sent_back_and_cached(content: str, tmp_path: Path) -> None:
    with FakeChat(lambda _: Response(completion(content))) as fake:
        failures = ask_three(fake, cache=tmp_path)
        assert len(fake.asked) == 6
    assert all("no usable JSON" in failure.reason for failure in failures)
    for failure in failures:
        failure.reason.encode("utf-8")


def test_bytes_that_are_no_text_are_replaced() -> None:
    body = completion('{"label": "BAD"}').encode().replace(b"BAD", b"x\xff\xfe")
    with FakeChat(lambda _: Response(body)) as fake:
        judge = Endpoint(fake.url, "judge")
        (label,) = judge.ask_all([[{"role": "user", "content": "q"}]], lambda r: r["label"], progress=False)
    assert label == "x\ufffd\ufffd"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_nothing_is_sent_where_a_redirect_leads(status: int) -> None:
    with LoopbackServer(lambda _: Response(completion())) as other:
        moved = Response(status=status, headers={"Location": f"{other.url}/v1"})
        with FakeChat(lambda _: moved) as fake, pytest.raises(EndpointError, match=f"HTTP {status}"):
            ask_three(fake)
        assert not other.requests


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificates_that_cannot_be_read_are_an_error(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "certificates.pem"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with pytest.raises(EndpointError, match="SSL_CERT_FILE"):
        Endpoint("https://example.com/v1", "judge")


def test_an_address_where_nothing_listens_is_reported() -> None:
    with refusing_url() as url:
        judge = Endpoint(url, "judge", tries=2)
        (failure,) = judge.ask_all([[{"role": "user", "content": "q"}]], read_label, progress=False)
    assert "ConnectError" in failure.reason


@pytest.mark.parametrize(
    "reply",
    [
        "</think>" * 200_000,
        "</think>{" * 200_000,
        "```" + "\n" * 1_000_000,
        "```json\n" + "\n```" * 300_000,
        "[" * 1_000_000,
        '{"label": 1' + "0" * 100_000 + "}",
    ],
)
def test_a_reply_of_a_megabyte_is_refused_at_once(reply: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError):
        read_json(reply)
    assert time.monotonic() - started < 1


def test_replies_are_cut_once_and_asked_for_with_a_larger_limit() -> None:
    def answer(messages: list[dict[str, str]]) -> Response:
        limit = fake.asked[-1]["max_tokens"]
        return Response(completion(GOOD if limit > 5000 else "<think>hm", "stop" if limit > 5000 else "length"))

    with FakeChat(answer) as fake:
        assert ask_three(fake) == ["x"] * 3
        assert [asked["max_tokens"] for asked in fake.asked] == [4096, 16384] * 3
    for fixed in ({"reply_tokens": 4096}, {"parameters": {"max_tokens": 100}}):  # a limit that the user has set is kept
        with FakeChat(answer) as fake:
            assert all("--reply-tokens" in failure.reason for failure in ask_three(fake, **fixed))
            assert len(fake.asked) == 3


def test_a_server_that_refuses_the_larger_limit_is_quoted() -> None:
    def answer(messages: list[dict[str, str]]) -> Response:
        if fake.asked[-1]["max_tokens"] > 5000:
            return Response("max_tokens exceeds the context of 8192", 400)
        return Response(completion("<think>hm", "length"))

    with FakeChat(answer) as fake:
        failures = ask_three(fake)
    assert all("--reply-tokens" in f.reason and "context of 8192" in f.reason for f in failures)


def ask_many(fake: FakeChat) -> list[Any]:
    judge = Endpoint(fake.url, "judge", concurrency=1, tries=2)
    return judge.ask_all([[{"role": "user", "content": str(i)}] for i in range(12)], read_label, progress=False)


@pytest.mark.parametrize("finish_reason", ["stop", "content_filter"])
def test_a_model_that_says_nothing_does_not_stop_the_run(finish_reason: str) -> None:
    with FakeChat(lambda _: Response(completion(None, finish_reason))) as fake:
        assert all(isinstance(failure, Failure) for failure in ask_many(fake))
        assert len(fake.asked) == 12


@pytest.mark.parametrize("content", [None, "<think>hm"])
def test_a_model_all_of_whose_replies_are_cut_stops_the_run_early(content: str | None) -> None:
    with FakeChat(lambda _: Response(completion(content, "length"))) as fake:
        with pytest.raises(EndpointError, match="5 questions in a row.*--reply-tokens"):
            ask_many(fake)
        assert len(fake.asked) == 10


def test_a_byte_order_mark_is_no_damage() -> None:
    with FakeChat(lambda _: Response("\ufeff" + completion())) as fake:
        assert ask_three(fake) == ["x"] * 3 and len(fake.asked) == 3


def test_a_broken_server_stops_the_run_in_a_bounded_time() -> None:
    with FakeChat(lambda _: Says(status=503, headers={"retry-after": "1e9"})) as fake:
        started = time.monotonic()
        judge = Endpoint(fake.url, "judge", concurrency=1, tries=2)
        with pytest.raises(EndpointError, match="5 questions in a row"):
            judge.ask_all([[{"role": "user", "content": str(i)}] for i in range(50)], read_label, progress=False)
        assert len(fake.asked) == 10 and time.monotonic() - started < 5
