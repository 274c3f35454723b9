"""The endpoint caches replies, asks nothing twice, waits when asked to, respects budgets and shows no key."""

import json
import logging
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_chat import KEY, FakeChat, Says

from tl_adapters.autointerp import endpoint as endpoint_room
from tl_adapters.autointerp.endpoint import BudgetError, Endpoint, Failure
from tl_adapters.autointerp.http_client import EndpointError
from tl_adapters.autointerp.reply_cache import ReplyCache, read_json


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_room, "FIRST_WAIT", 0.01)
    for name in (
        "TL_ADAPTERS_BASE_URL",
        "TL_ADAPTERS_MODEL",
        "TL_ADAPTERS_API_KEY",
        "OPENAI_BASE_URL",
        "OPENAI_API_KEY",
    ):
        monkeypatch.delenv(name, raising=False)


def questions(n: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"question {i}"}] for i in range(n)]


def echo(messages: list[dict[str, str]]) -> str:
    return json.dumps({"echo": messages[0]["content"]})


def client(fake: FakeChat, **options: Any) -> Endpoint:
    return Endpoint(fake.url, "judge-1", KEY, **options)


def ask(it: Endpoint, n: int) -> list[Any]:
    return it.ask_all(questions(n), lambda reply: reply["echo"], progress=False)


def test_replies_come_in_the_order_of_the_questions_whatever_the_order_they_are_answered_in() -> None:
    delays = random.Random(0)

    def answer(messages: list[dict[str, str]]) -> Says:
        return Says(echo(messages), delay=delays.random() * 0.03)

    with FakeChat(answer) as fake:
        it = client(fake, concurrency=4)
        assert ask(it, 20) == [f"question {i}" for i in range(20)]
    assert 2 <= fake.most_at_once <= 4
    assert it.usage.requests == len(fake.asked) == 20 and it.usage.tokens == 200
    assert {asked["path"] for asked in fake.asked} == {"/v1/chat/completions"}
    assert all(a["temperature"] == 0 and a["seed"] == 0 and a["model"] == "judge-1" for a in fake.asked)
    assert {headers["authorization"] for headers in fake.headers} == {f"Bearer {KEY}"}


def test_a_cached_question_is_not_asked_again(tmp_path: Path) -> None:
    with FakeChat(echo) as fake:
        first = ask(client(fake, cache=tmp_path), 6)
        again = client(fake, cache=tmp_path)
        assert ask(again, 8) == [*first, "question 6", "question 7"]
        assert len(fake.asked) == 8 and (again.usage.requests, again.usage.cached) == (2, 6)
        # Another model, another parameter: other questions.
        Endpoint(fake.url, "judge-2", cache=tmp_path).ask_all(questions(1), dict, progress=False)
        client(fake, cache=tmp_path, parameters={"temperature": 0.5}).ask_all(questions(1), dict, progress=False)
        client(fake, cache=tmp_path, seed=1).ask_all(questions(1), dict, progress=False)
        assert len(fake.asked) == 11


def test_the_same_question_twice_at_a_time_is_one_request(tmp_path: Path) -> None:
    with FakeChat(lambda messages: Says(echo(messages), delay=0.05)) as fake:
        it = client(fake, cache=tmp_path)
        assert it.ask_all(questions(1) * 5, lambda r: r["echo"], progress=False) == ["question 0"] * 5
    assert len(fake.asked) == 1


@pytest.mark.parametrize(
    "trouble",
    [
        Says(status=500), Says(status=503, body="<html>"), Says(status=408), Says(status=429),
        Says(status=429, headers={"retry-after": "0.02"}), Says(delay=0.6), Says(status=529),
    ],
)  # fmt: skip
def test_a_question_is_asked_again_after_an_error_that_may_pass(trouble: Says) -> None:
    seen: Counter[str] = Counter()

    def answer(messages: list[dict[str, str]]) -> str | Says:
        seen[messages[0]["content"]] += 1
        return trouble if seen[messages[0]["content"]] == 1 else echo(messages)

    with FakeChat(answer) as fake:
        it = client(fake, timeout=0.3)
        assert ask(it, 3) == [f"question {i}" for i in range(3)]
        assert it.usage.requests == 6 == len(fake.asked)


@pytest.mark.parametrize("as_date", [False, True])
def test_no_thread_sends_a_request_before_the_time_that_the_server_names(as_date: bool) -> None:
    """Once the server has asked one thread to wait, no thread sends a request until then."""
    told: list[float] = []
    lock = threading.Lock()

    def answer(messages: list[dict[str, str]]) -> str | Says:
        with lock:
            if len(fake.asked) >= 4 and not told:
                told.append(time.monotonic())
                after = formatdate(time.time() + 2, usegmt=True) if as_date else "0.4"
                return Says(status=429, headers={"retry-after": after})
        return Says(echo(messages), delay=0.02)

    with FakeChat(answer) as fake:
        assert len(ask(client(fake, concurrency=2), 12)) == 12
    wait = 0.9 if as_date else 0.4  # a date has whole seconds
    # What was under way when the server said so had been sent before.
    assert not [t for t in fake.times if told[0] + 0.1 < t < told[0] + wait]


def test_waits_grow_and_have_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    with FakeChat(lambda messages: Says(status=500)) as fake:
        it = client(fake, tries=5)
        monkeypatch.setattr(it._stop, "wait", waits.append)
        (failure,) = ask(it, 1)
    assert isinstance(failure, Failure) and "HTTP 500" in failure.reason
    assert len(waits) == 4 and len({w / 2**i for i, w in enumerate(waits)}) == 4
    assert all(0.005 * 2**i <= w <= 0.015 * 2**i for i, w in enumerate(waits))


def test_one_failure_is_reported_and_the_others_are_answered() -> None:
    def answer(messages: list[dict[str, str]]) -> str | Says:
        return Says(status=400, body="too long") if messages[0]["content"] == "question 1" else echo(messages)

    with FakeChat(answer) as fake:
        found = ask(client(fake), 3)
        assert len(fake.asked) == 3  # a refusal of one question is not worth another try
    assert found[0] == "question 0" and found[2] == "question 2"
    assert found[1] == Failure("HTTP 400: too long")


def test_a_broken_server_stops_the_run() -> None:
    with FakeChat(lambda messages: Says(status=500)) as fake:
        with pytest.raises(EndpointError, match="5 questions in a row"):
            ask(client(fake, tries=2, concurrency=1), 50)
        assert len(fake.asked) == 10


@pytest.mark.parametrize(
    ("says", "match"),
    [
        (Says(status=401, body=json.dumps({"error": f"bad key {KEY}"})), "HTTP 401"),
        (Says(status=404, body="no such path"), "HTTP 404"),
        (Says(status=307, headers={"location": "http://127.0.0.1:1/"}), "HTTP 307"),
        (Says(body="<html>hello</html>"), "not a chat completion"),
        (Says(body=json.dumps({"error": {"code": 401, "message": KEY}})), "error with HTTP 200"),
        (Says(body="[1]"), "not a chat completion"),
    ],
)
def test_a_refusal_of_every_question_stops_the_run_at_once(
    says: Says, match: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with FakeChat(lambda messages: says) as fake:
        with pytest.raises(EndpointError, match=match) as error:
            ask(client(fake, concurrency=1, cache=tmp_path), 5)
        assert len(fake.asked) == 1
    assert "TL_ADAPTERS_API_KEY" in str(error.value)
    _nowhere(error.value, caplog, tmp_path)


def _nowhere(error: BaseException, caplog: pytest.LogCaptureFixture, cache: Path) -> None:
    """The key is not in the error or what caused it, the log, or the cache."""
    seen: BaseException | None = error
    while seen is not None:
        assert KEY not in repr(seen) and KEY not in str(seen)
        assert not hasattr(seen, "request")  # httpx's errors hold the headers
        seen = seen.__cause__ or seen.__context__
    assert KEY not in caplog.text and not any(KEY in repr(vars(record)) for record in caplog.records)
    assert not [f for f in cache.rglob("*") if f.is_file() and KEY in f.read_text()]


def test_the_key_is_shown_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    calls: Counter[str] = Counter()

    def answer(messages: list[dict[str, str]]) -> str | Says:
        calls[messages[0]["content"]] += 1
        if calls[messages[0]["content"]] == 1:
            return Says(status=500, body=f"your key was {KEY}")
        return json.dumps({"echo": f"the key is {KEY}"})

    with FakeChat(answer) as fake:
        it = client(fake, cache=tmp_path, request_budget=3, concurrency=1)
        with pytest.raises(BudgetError) as error:
            ask(it, 2)
        assert fake.headers[0]["authorization"].endswith(KEY)
        assert list(tmp_path.rglob("*.json")) and caplog.records
        assert KEY not in repr(it) + repr(it.server) + str(it.parameters)
    _nowhere(error.value, caplog, tmp_path)


def test_a_placeholder_for_a_key_is_not_removed_from_replies() -> None:
    with FakeChat(echo) as fake:
        it = Endpoint(fake.url, "judge", "e")
        assert ask(it, 1) == ["question 0"]  # not "qu[key]stion"


@pytest.mark.parametrize("cached", [True, False])
def test_a_budget_of_requests_is_never_exceeded(cached: bool, tmp_path: Path) -> None:
    with FakeChat(lambda messages: Says(echo(messages), delay=0.01)) as fake:
        with pytest.raises(BudgetError) as error:
            ask(client(fake, request_budget=5, cache=tmp_path if cached else None), 20)
        assert len(fake.asked) == 5
        if cached:
            assert str(tmp_path) in str(error.value) and "budget of 5 requests" in str(error.value)
            assert ask(client(fake, request_budget=15, cache=tmp_path), 20) == [f"question {i}" for i in range(20)]
            assert len(fake.asked) == 20 and len(set(fake.questions)) == 20
        else:
            assert "the replies are lost" in str(error.value)


def test_a_budget_of_tokens_stops_new_requests(tmp_path: Path) -> None:
    with FakeChat(echo) as fake:
        with pytest.raises(BudgetError, match="35 tokens"):
            ask(client(fake, token_budget=35, concurrency=1, cache=tmp_path), 20)
        assert len(fake.asked) == 4  # 10 tokens each


def test_tokens_are_estimated_where_the_server_does_not_count_them() -> None:
    with FakeChat(lambda messages: Says(echo(messages), usage=None)) as fake:
        it = client(fake)
        ask(it, 1)
        assert 10 < it.usage.tokens < 100


def test_a_killed_run_continues_where_it_stopped(tmp_path: Path) -> None:
    """A question whose reply a killed process has read is not asked again."""
    code = (
        "import sys; from tl_adapters.autointerp.endpoint import Endpoint\n"
        "it = Endpoint(sys.argv[1], 'judge-1', cache=sys.argv[2], concurrency=1)\n"
        "q = [[{'role': 'user', 'content': f'question {i}'}] for i in range(12)]\n"
        "print(it.ask_all(q, lambda r: r['echo'], progress=False)[-1])\n"
    )

    def answer(messages: list[dict[str, str]]) -> Says:
        if messages[0]["content"] == "question 5" and len(fake.asked) == 6:
            child.kill()
            child.wait()
        return Says(echo(messages))

    with FakeChat(answer) as fake:
        child = subprocess.Popen([sys.executable, "-c", code, fake.url, str(tmp_path)])
        child.wait()
        before = Counter(fake.questions)
        out = subprocess.run([sys.executable, "-c", code, fake.url, str(tmp_path)], capture_output=True, text=True)
        assert out.stdout.strip() == "question 11", out.stderr
        twice = [q for q, n in Counter(fake.questions).items() if n > 1]
    assert len(before) == 6 and twice == ["question 5"]  # the one whose reply the killed process never read
    assert not list(tmp_path.rglob("*partial"))


def test_an_interrupted_run_caches_replies_under_way(tmp_path: Path) -> None:
    def read(reply: Any) -> str:
        if reply["echo"] == "question 3":
            raise KeyboardInterrupt
        return reply["echo"]

    with FakeChat(echo) as fake:
        with pytest.raises(KeyboardInterrupt):
            client(fake, cache=tmp_path, concurrency=2).ask_all(questions(40), read, progress=False)
        asked = len(fake.asked)
        assert asked < 40 and len(list(tmp_path.rglob("*.json"))) == asked
        assert ask(client(fake, cache=tmp_path), 40)[-1] == "question 39"
        assert len(fake.asked) == 40


@pytest.mark.parametrize("broken", ['{"echo": ', "Sure! {}", '{"echo": NaN}', "[" * 100_000, '{"other": 1}', ""])
def test_a_broken_reply_is_sent_back_once(broken: str, tmp_path: Path) -> None:
    def answer(messages: list[dict[str, str]]) -> str:
        return echo(messages) if len(messages) == 3 or "0" not in messages[0]["content"] else broken

    def read(reply: Any) -> str:
        if "echo" not in reply:
            raise ValueError("it has no echo")
        return reply["echo"]

    with FakeChat(answer) as fake:
        assert client(fake, cache=tmp_path).ask_all(questions(2), read, progress=False) == ["question 0", "question 1"]
        assert len(fake.asked) == 3
        again = next(asked["messages"] for asked in fake.asked if len(asked["messages"]) == 3)
        assert [m["role"] for m in again] == ["user", "assistant", "user"] and again[1]["content"] == broken
        client(fake, cache=tmp_path).ask_all(questions(2), read, progress=False)
        assert len(fake.asked) == 3  # the second reply is cached too


def test_a_second_broken_reply_is_reported_as_failure() -> None:
    with FakeChat(lambda messages: "no") as fake:
        (failure,) = ask(client(fake), 1)
        assert len(fake.asked) == 2
    assert isinstance(failure, Failure) and "two replies" in failure.reason


def test_a_reply_without_text_is_reported() -> None:
    with FakeChat(lambda messages: Says(body=json.dumps({"choices": [{"message": {"content": None}}]}))) as fake:
        assert ask(client(fake), 1) == [Failure("the reply has no text")]


@pytest.mark.parametrize(
    "reply", ['{"a": 1}', ' {"a": 1}\n', '```json\n{"a": 1}\n```', '```\n{"a": 1}\n```', '<think>{"b"}</think>{"a": 1}']
)
def test_json_may_follow_thinking_and_lie_in_one_fence(reply: str) -> None:
    assert read_json(reply) == {"a": 1}


@pytest.mark.parametrize("reply", ['{"a": 1} {"a": 1}', 'Here: {"a": 1}', "{'a': 1}", '{"a": Infinity}'])
def test_json_with_anything_else_is_refused(reply: str) -> None:
    with pytest.raises(ValueError):
        read_json(reply)


def test_a_reply_is_cached_with_its_question(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path)
    question = {
        "server": "s",
        "model": "m",
        "parameters": {},
        "messages": [{"role": "user", "content": "«\u2028\x00»"}],
    }
    assert cache.reply(question, lambda: ("yes", False)) == ("yes", False, False)
    assert cache.reply(dict(reversed(question.items())), lambda: ("no", False)) == ("yes", False, True)
    (file,) = tmp_path.rglob("*.json")
    assert json.loads(file.read_text()) == {"schema_version": 2, **question, "reply": "yes"} and re.fullmatch(
        r"[0-9a-f]{64}", file.stem
    )
    with pytest.raises(RuntimeError):
        cache.reply({**question, "model": "x"}, lambda: (_ for _ in ()).throw(RuntimeError()))
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_arguments_come_before_the_environment_and_openai_last(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeChat(echo) as ours, FakeChat(echo) as theirs:
        monkeypatch.setenv("OPENAI_BASE_URL", theirs.url + "/")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-theirs")
        monkeypatch.setenv("TL_ADAPTERS_MODEL", "m")
        ask(Endpoint(), 1)
        assert theirs.headers[0]["authorization"] == "Bearer sk-theirs"
        monkeypatch.setenv("TL_ADAPTERS_BASE_URL", ours.url)
        ask(Endpoint(), 1)
        assert "authorization" not in ours.headers[0]  # a key for one server is not shown to another
        monkeypatch.setenv("TL_ADAPTERS_API_KEY", "sk-ours")
        ask(Endpoint(), 1)
        ask(Endpoint(theirs.url, "n", "sk-given"), 1)
        assert ours.headers[1]["authorization"] == "Bearer sk-ours"
        assert theirs.headers[1]["authorization"] == "Bearer sk-given" and theirs.asked[1]["model"] == "n"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "TL_ADAPTERS_BASE_URL"),
        ({"base_url": "http://h/v1"}, "TL_ADAPTERS_MODEL"),
        ({"base_url": "ftp://h", "model": "m"}, "http"),
        ({"base_url": "localhost:80", "model": "m"}, "http"),
        ({"base_url": f"https://me:{KEY}@h/v1", "model": "m"}, "password"),
        ({"base_url": f"https://me:{KEY}@h:99999999/v1", "model": "m"}, "password"),
        ({"base_url": f"https://h/v1?key={KEY}", "model": "m"}, "question mark"),
        ({"base_url": "http://h", "model": "m", "api_key": KEY + "\n"}, "copy it again"),
        ({"base_url": "http://h", "model": "m", "api_key": KEY + "é"}, "copy it again"),
        ({"base_url": "http://h", "model": "m", "concurrency": 0}, "concurrency"),
        ({"base_url": "http://h", "model": "m", "tries": 0}, "tries"),
        ({"base_url": "http://h", "model": "m", "timeout": 0.0}, "timeout"),
        ({"base_url": "http://h", "model": "m", "timeout": float("nan")}, "timeout"),
        ({"base_url": "http://h", "model": "m", "reply_tokens": 0}, "reply_tokens"),
        ({"base_url": "http://h", "model": "m", "request_budget": -1}, "request_budget"),
        ({"base_url": "http://h", "model": "m", "parameters": {"temperature": float("nan")}}, "temperature"),
        ({"base_url": "http://h", "model": "m", "parameters": {"stop": {KEY}}}, "not JSON"),
        ({"base_url": "http://h", "model": "m", "parameters": {"stream": True}}, "stream"),
    ],
)
def test_errors_about_arguments_show_no_secrets(given: dict[str, Any], match: str) -> None:
    with pytest.raises(EndpointError, match=match) as error:
        Endpoint(**given)
    assert KEY not in str(error.value)


def test_parameters_can_be_added_and_removed() -> None:
    with FakeChat(echo) as fake:
        ask(client(fake, parameters={"max_tokens": None, "seed": None, "max_completion_tokens": 7}), 1)
    assert fake.asked[0]["max_completion_tokens"] == 7 and not {"max_tokens", "seed"} & set(fake.asked[0])


def test_an_address_without_a_server_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeChat(echo) as fake:
        url = fake.url
    (failure,) = ask(Endpoint(url, "m", KEY, tries=2), 1)
    assert "ConnectError" in failure.reason
