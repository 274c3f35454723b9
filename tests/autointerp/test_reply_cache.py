"""Replies that were paid for are kept, for their owner alone, and found again under the question that was asked."""

from __future__ import annotations

import hashlib
import json
import logging
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_chat import FakeChat

from tl_adapters.autointerp.endpoint import Endpoint, Failure
from tl_adapters.autointerp.reply_cache import ReplyCache
from tl_adapters.utils.files import WriteError


def ask(fake: FakeChat, n: int = 1, cache: Path | None = None, **options: Any) -> list[Any]:
    questions = [[{"role": "user", "content": f"question {i}"}] for i in range(n)]
    judge = Endpoint(fake.url, "judge", "key", cache=cache, concurrency=1, **options)
    return judge.ask_all(questions, lambda reply: reply["label"], progress=False)


def test_an_unusable_reply_is_asked_for_again_by_the_next_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    good = False
    with FakeChat(lambda _: '{"label": "x"}' if good else "I would rather not.") as fake:
        (failure,) = ask(fake, cache=tmp_path)
        assert isinstance(failure, Failure) and len(fake.asked) == 2
        good = True
        assert ask(fake, cache=tmp_path) == ["x"] and len(fake.asked) == 3
        assert ask(fake, cache=tmp_path) == ["x"] and len(fake.asked) == 3
    assert not caplog.records  # what was refused is no damaged file
    assert any("unusable" in json.loads(f.read_text()) for f in tmp_path.rglob("*.json"))  # and can still be read


def test_two_servers_with_one_model_name_do_not_share_replies(tmp_path: Path) -> None:
    with FakeChat(lambda _: '{"label": "one"}') as one, FakeChat(lambda _: '{"label": "other"}') as other:
        assert ask(one, cache=tmp_path) == ["one"]
        assert ask(other, cache=tmp_path) == ["other"]
        assert ask(one, cache=tmp_path) == ["one"] and len(one.asked) == 1


def write_first_release(cache: Path, text: str, question: str = "question 0", **parameters: Any) -> Path:
    """The file of a reply as the first release wrote it: its name and content do not depend on the server."""
    sent = {"temperature": 0, "seed": 0, "max_tokens": 1024, **parameters}
    record = {"model": "judge", "parameters": sent, "messages": [{"role": "user", "content": question}]}
    name = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (cache / name[:2]).mkdir(exist_ok=True)
    file = cache / name[:2] / f"{name}.json"
    file.write_text(json.dumps({**record, "reply": text}))
    return file


def test_replies_of_the_first_release_are_taken_over_by_the_first_server_that_asks(tmp_path: Path) -> None:
    old = write_first_release(tmp_path, '{"label": "paid"}')
    with FakeChat(lambda _: '{"label": "new"}') as one, FakeChat(lambda _: '{"label": "other"}') as other:
        assert ask(one, cache=tmp_path) == ["paid"] and not one.asked
        assert not old.exists()
        assert ask(other, cache=tmp_path) == ["other"]
        assert ask(one, cache=tmp_path) == ["paid"] and not one.asked


@pytest.mark.parametrize("text", ["<think>Wait, wait", "I would rather not.", ""])
def test_replies_of_the_first_release_that_cannot_be_used_are_asked_for_again(text: str, tmp_path: Path) -> None:
    write_first_release(tmp_path, text)
    with FakeChat(lambda _: '{"label": "new"}') as fake:
        assert ask(fake, cache=tmp_path) == ["new"] and len(fake.asked) == 1
        assert ask(fake, cache=tmp_path) == ["new"] and len(fake.asked) == 1


def test_replies_of_the_first_release_under_a_users_limit_are_taken_over(tmp_path: Path) -> None:
    write_first_release(tmp_path, '{"label": "paid"}', max_tokens=2000)
    with FakeChat(lambda _: '{"label": "new"}') as fake:
        assert ask(fake, cache=tmp_path, parameters={"max_tokens": 2000}) == ["paid"] and not fake.asked


def test_servers_that_ask_at_once_take_over_each_reply_once(tmp_path: Path) -> None:
    """Processes have nothing in common but the folder, as these caches do."""
    for i in range(20):
        write_first_release(tmp_path, '{"label": "paid"}', f"question {i}")

    def paid(server: int) -> list[bool]:
        cache = ReplyCache(tmp_path)
        parameters = {"temperature": 0, "seed": 0, "max_tokens": 4096}
        questions = [{"server": f"http://{server}/v1", "model": "judge", "parameters": parameters,
                      "messages": [{"role": "user", "content": f"question {i}"}]} for i in range(20)]  # fmt: skip
        return ["paid" in cache.reply(question, lambda: ("{}", False))[0] for question in questions]

    with ThreadPoolExecutor(4) as pool:
        by_server = list(pool.map(paid, range(4)))
    assert [sum(of_question) for of_question in zip(*by_server, strict=True)] == [1] * 20
    assert not list(tmp_path.rglob(".*"))  # no locks and no partial files are left


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_the_owner_can_read_replies(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "replies"
    with FakeChat(lambda _: '{"label": "x"}') as fake:
        ask(fake, 3, cache)
        file, *_ = cache.rglob("*.json")
        assert [mode(path) for path in (cache, file.parent, file)] == [0o700, 0o700, 0o600]
        users = tmp_path / "users"
        users.mkdir(mode=0o755)
        old = write_first_release(users, '{"label": "x"}')
        old.parent.chmod(0o755)
        ReplyCache(users)
        assert mode(old.parent) == 0o700 and mode(users) == 0o755  # the user's own folder stays as it is
        ask(fake, 1, users)
        assert {mode(path) for path in users.rglob("*.json")} == {0o600}


DAMAGES: dict[str, Callable[[str], str | bytes]] = {
    "cut": lambda text: text[:40],
    "empty": lambda text: "",
    "not UTF-8": lambda text: b"\xff" + text.encode(),
    "nested": lambda text: "[" * 100_000,
    "a list": lambda text: "[1]",
    "a reply that is a number": lambda text: text.replace(json.dumps('{"label": "x"}'), "5"),
    "an unknown key": lambda text: text.replace('"reply"', '"other": 1, "reply"'),
    "a version of the future": lambda text: text.replace('"schema_version": 2', '"schema_version": 3'),
    "the reply to another question": lambda text: text.replace("question 0", "question 1"),
    "the reply of another model": lambda text: text.replace('"judge"', '"other"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_reply_is_named_and_asked_for_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with FakeChat(lambda _: '{"label": "x"}') as fake:
        ask(fake, cache=tmp_path)
        (file,) = tmp_path.rglob("*.json")
        whole = file.read_text()
        changed = DAMAGES[damage](whole)
        assert changed != whole
        file.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
        assert ask(fake, cache=tmp_path) == ["x"] and len(fake.asked) == 2
        (record,) = caplog.records
        assert str(file) in record.getMessage() and "asked again" in record.getMessage()
        assert file.read_text() == whole
        assert ask(fake, cache=tmp_path) == ["x"] and len(fake.asked) == 2


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with FakeChat(lambda _: '{"label": "x"}') as fake:
        with pytest.raises(WriteError, match="file"):
            ask(fake, cache=tmp_path / "file" / "replies")
        assert not fake.asked
