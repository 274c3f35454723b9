"""A key reaches the server that it is for, and no other server, text, log record or file."""

from __future__ import annotations

import base64
import html
import json
import logging
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_chat import FakeChat, Says

from tl_adapters.autointerp import endpoint as endpoint_module
from tl_adapters.autointerp.endpoint import Endpoint, Failure
from tl_adapters.autointerp.http_client import EndpointError
from tl_adapters.autointerp.secret_keys import SecretKey

KEY = 'sk-Q7/x+never"seen\\by&anybody=<9f>'
VARIABLES = ("TL_ADAPTERS_BASE_URL", "TL_ADAPTERS_MODEL", "TL_ADAPTERS_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_KEY")


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.01)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def each(spelled: Callable[[str], str]) -> Callable[[str], str]:
    return lambda key: "".join(map(spelled, key))


def in_base64(before: str, after: str, encode: Callable[[bytes], bytes] = base64.b64encode) -> Callable[[str], str]:
    return lambda key: "Basic " + encode((before + key + after).encode()).decode()


SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "JSON": json.dumps,
    "JSON with escaped slashes": lambda key: json.dumps(key).replace("/", "\\/"),
    "JSON within JSON within JSON": lambda key: json.dumps(json.dumps(json.dumps(key))),
    "JSON, every character escaped": each(lambda c: f"\\u{ord(c):04x}"),
    "JSON within JSON, every character escaped": lambda key: json.dumps("".join(f"\\u{ord(c):04X}" for c in key)),
    "Python": repr,
    "URL": urllib.parse.quote,
    "URL, slashes too": lambda key: urllib.parse.quote(key, safe=""),
    "URL within URL": lambda key: urllib.parse.quote(urllib.parse.quote(key, safe=""), safe=""),
    "URL, every character escaped": each(lambda c: f"%{ord(c):02x}"),
    "HTML": html.escape,
    "HTML within HTML": lambda key: html.escape(html.escape(key)),
    "HTML, every character escaped": each(lambda c: f"&#{ord(c)};"),
    "HTML in hexadecimal": each(lambda c: f"&#X{ord(c):04X};"),
    "basic authentication, as password": in_base64("user:", ""),
    "basic authentication, as user": in_base64("", ":"),
    "basic authentication without a user": in_base64(":", ""),
    "base64 for URLs": in_base64("ab", "c", base64.urlsafe_b64encode),
    "base64 in JSON": lambda key: in_base64("us:", "x")(key).replace("/", "\\/"),
    "base64 in a URL": lambda key: urllib.parse.quote(in_base64("use:", "")(key)),
}


def traces(key: str) -> list[str]:
    """Parts of the key, and of its base64, that must not be left; none of them is a word."""
    parts = [key[i : i + 6] for i in range(len(key) - 5)]
    encoded = [base64.b64encode((" " * i + key).encode()).decode()[4:-4] for i in range(3)]
    return parts + [e[i : i + 10] for e in encoded for i in range(len(e) - 9)]


def plain(text: str) -> str:
    """A text with what was escaped in JSON, URLs and HTML unescaped."""
    for _ in range(3):
        text = html.unescape(urllib.parse.unquote(text)).replace('\\"', '"').replace("\\/", "/").replace("\\\\", "\\")
    return text


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_key_is_removed_in_every_spelling(spelling: str) -> None:
    text = f"The key {SPELLINGS[spelling](KEY)} is not valid."
    cleaned = SecretKey(KEY).removed_from(text)
    assert cleaned.startswith("The key ") and cleaned.endswith(" is not valid.") and "[key]" in cleaned
    assert not [part for part in traces(KEY) if part in cleaned or part in plain(cleaned)]
    assert SecretKey("sk-another-key").removed_from(text) == text


def test_short_keys_are_placeholders() -> None:
    assert SecretKey("key").removed_from("the key") == "the key"
    assert (
        SecretKey("EMPTY").removed_from("EMPTY") == "[key]"
        and SecretKey("EMPTY").removed_from_reply("EMPTY") == "EMPTY"
    )
    assert SecretKey("a-secret").removed_from_reply("a-secret") == "[key]"
    assert SecretKey("").removed_from("") == "" and not SecretKey("")
    assert KEY not in repr(SecretKey(KEY))


@pytest.mark.parametrize("text", ["s" * 10**6, "\\" * 10**6, "%" + "25" * 500_000, "&" + "amp;" * 250_000, "A" * 10**6])
def test_a_megabyte_is_cleaned_in_linear_time(text: str) -> None:
    started = time.monotonic()
    assert SecretKey(KEY).removed_from(text) == text
    assert time.monotonic() - started < 5


ECHOES: dict[str, Callable[[str], Says]] = {
    "an error": lambda key: Says(status=400, body=f"bad key {key}"),
    "an error that passes": lambda key: Says(status=503, body=f"bad key {key}"),
    "a refusal": lambda key: Says(status=401, body=f"bad key {key}"),
    "an error with status 200": lambda key: Says(body=json.dumps({"error": {"code": 400, "message": key}})),
    "a page": lambda key: Says(body=f"<p>{key}</p>"),
    "a label": lambda key: Says(json.dumps({"label": key})),
    "a reply that is no JSON": lambda key: Says(f"the key is {key}"),
    "a refusal of the model": lambda key: Says(body=json.dumps({"choices": [{"message": {"refusal": key}}]})),
    "a header": lambda key: Says(status=400, headers={"X-Echo": urllib.parse.quote(key) + key}),
    "a category": lambda key: Says(json.dumps({"label": 3, "category": key})),
}


@pytest.mark.parametrize("spelling", ["as it is", "JSON, every character escaped", "URL, slashes too",
                                      "basic authentication, as password"])  # fmt: skip
@pytest.mark.parametrize("echo", ECHOES)
def test_what_a_server_echoes_is_cleaned(
    echo: str, spelling: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seen = ""

    def read(reply: Any) -> str:
        if not isinstance(reply["label"], str):
            raise ValueError(f"it is {reply!r}")
        return reply["label"]

    with FakeChat(lambda _: ECHOES[echo](SPELLINGS[spelling](KEY))) as fake:
        judge = Endpoint(fake.url, "judge", KEY, cache=tmp_path, tries=2)
        try:
            (found,) = judge.ask_all([[{"role": "user", "content": "q"}]], read, progress=False)
            seen += found.reason if isinstance(found, Failure) else found
        except EndpointError as error:
            seen += str(error) + repr(error.__context__) + repr(error.__cause__)
        assert fake.headers[0]["authorization"] == f"Bearer {KEY}"
    files = "".join(file.read_text() for file in tmp_path.rglob("*.json"))
    for text in (
        seen,
        caplog.text,
        "".join(repr(vars(record)) for record in caplog.records),
        files,
        repr(judge.server),
    ):
        assert not [part for part in traces(KEY) if part in text or part in plain(text)]


def test_the_filters_of_a_server_leave_the_loggers_with_it() -> None:
    logger = logging.getLogger("httpcore.http11")
    before = list(logger.filters)
    judge = Endpoint("http://127.0.0.1:1/v1", "judge", KEY)
    assert len(logger.filters) == len(before) + 1
    del judge
    assert logger.filters == before


@pytest.mark.parametrize(
    "address",
    [
        "http://{}:x", "http://{}:x/v1", "http://{}:x@host/v1", "https://me:{}@host/v1", "https://{}@host/v1", "{}:x",
        "//{}:x@host", "{}", "{}://host", "http://host/v1?key={}", "http://host/v1#{}", "http://[{}", "http://host:{}",
        "http://host/\n{}", "http://{0}.{0}.{0}.{0}/v1", "ftp://{}/v1",
    ],
)  # fmt: skip
def test_an_address_with_a_secret_in_the_wrong_place_is_not_shown(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "sk-Q7xnever0seen1by2anybody9f" * 2
    for given in (address.format(secret), address.format(secret.upper())):
        monkeypatch.setenv("TL_ADAPTERS_API_KEY", secret)
        with pytest.raises(EndpointError) as error:
            Endpoint(given, "judge")
        monkeypatch.setenv("TL_ADAPTERS_BASE_URL", given)
        with pytest.raises(EndpointError) as of_environment:
            Endpoint(model="judge")
        shown = f"{error.value} {of_environment.value} {error.value.__cause__!r} {caplog.text}".lower()
        assert secret[:20].lower() not in shown and "TL_ADAPTERS_API_KEY" in str(error.value)
        monkeypatch.delenv("TL_ADAPTERS_BASE_URL")


def sent_key(fake: FakeChat, base_url: str | None = None, api_key: str | None = None) -> str | None:
    Endpoint(base_url, "m", api_key).ask_all([[{"role": "user", "content": "q"}]], dict, progress=False)
    header = fake.headers[-1].get("authorization")
    return None if header is None else header.removeprefix("Bearer ")


def test_a_key_of_the_environment_goes_to_its_own_server_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeChat(lambda _: "{}") as own, FakeChat(lambda _: "{}") as other:
        monkeypatch.setenv("TL_ADAPTERS_API_KEY", "sk-of-tl-adapters")
        assert sent_key(other, other.url) == "sk-of-tl-adapters"  # where no server is named, it is for the one given
        monkeypatch.setenv("TL_ADAPTERS_BASE_URL", own.url)
        assert sent_key(own) == "sk-of-tl-adapters"
        assert sent_key(own, own.url + "/") == sent_key(own, own.url.replace("/v1", "/v2")) == "sk-of-tl-adapters"
        assert not caplog.records
        assert sent_key(other, other.url) is None
        assert "TL_ADAPTERS_API_KEY is for the server" in caplog.text and "sk-of" not in caplog.text
        assert sent_key(other, other.url, "sk-given") == "sk-given"
        assert sent_key(own, own.url, "") is None
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
        assert sent_key(other, other.url) is None
        monkeypatch.setenv("OPENAI_BASE_URL", other.url)
        assert sent_key(other, other.url) == "sk-of-openai"


def test_a_key_of_openai_is_for_openai_unless_another_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_adapters.autointerp.http_client import ChatServer

    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    assert ChatServer("https://api.openai.com/v1", "m", None, 1.0)._key.value == "sk-of-openai"
    assert ChatServer("https://api.openai.com:443/v1/", "m", None, 1.0)._key.value == "sk-of-openai"
    for address in ("http://api.openai.com/v1", "https://api.openai.com.example.com/v1", "https://example.com/v1"):
        assert not ChatServer(address, "m", None, 1.0)._key
    monkeypatch.setenv("OPENAI_BASE_URL", "https://example.com/v1")
    assert not ChatServer("https://api.openai.com/v1", "m", None, 1.0)._key


@pytest.mark.parametrize("proxy", ["socks5://me:{}@host:1", "ftp://{}"])
def test_a_proxy_that_cannot_be_used_is_an_error_without_its_password(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy.format("sk-proxy-password"))
    with pytest.raises(EndpointError, match="proxy") as error:
        Endpoint("https://example.com/v1", "m")
    assert "sk-proxy" not in str(error.value) + repr(error.value.__cause__)
