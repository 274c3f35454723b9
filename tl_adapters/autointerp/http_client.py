"""One request to an OpenAI-compatible chat server: its address, its key, and what its answer means.

The key goes into one header and nowhere else: whatever the server or the network says is cleaned of it before it is
returned. A key that is meant for another server is not sent: OPENAI_API_KEY goes to OPENAI_BASE_URL and api.openai.com
only. Redirects are not followed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import httpx

from tl_adapters.errors import UserError

log = logging.getLogger(__name__)

BASE_URL, MODEL, API_KEY = "TL_ADAPTERS_BASE_URL", "TL_ADAPTERS_MODEL", "TL_ADAPTERS_API_KEY"
"""Environment variables that are read where nothing is given."""
_OPENAI = "https://api.openai.com/v1"
_BUSY = {408, 409, 425, 429}
"""What the next try may get past; so may 5xx."""
_FOR_ALL = {401, 402, 403, 404, 405}
"""Refusals that every other question would meet too."""
_SECRET = 16
"""Characters of a real key, which is taken out of replies too; a shorter one ("EMPTY") says nothing to anybody."""
_CHARACTERS_PER_TOKEN = 4
"""Where a server does not say how many tokens it used."""
_THINKING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Where servers put the thinking of a reasoning model, beside the text."""
CUT = "the reply was cut at the limit of its length; allow longer replies (reply_tokens=, --reply-tokens)"
"""What is wrong with a reply whose model was stopped at its limit of tokens."""
_SHOWN = 300
"""Characters of what a server says that an error repeats."""


class EndpointError(UserError, RuntimeError):
    """The endpoint is not named rightly, refuses, or does not answer."""


class Reply(NamedTuple):
    """What came of one request."""

    text: str | None
    """What the model said; None if nothing came."""
    tokens: int = 0
    """Read and written by the model."""
    problem: str = ""
    """What was wrong, if nothing came."""
    again: bool = False
    """Another try may get past it."""
    fatal: bool = False
    """Every other question would fail too."""
    wait: float | None = None
    """Seconds that the server asks to wait."""
    cut: bool = False
    """The model was stopped at its limit of tokens before it came to the end of its reply."""


class ChatServer:
    """A model behind an address.

    Args:
        base_url: like "http://127.0.0.1:8000/v1"; else TL_ADAPTERS_BASE_URL, else OPENAI_BASE_URL.
        model: its name there; else TL_ADAPTERS_MODEL.
        api_key: else TL_ADAPTERS_API_KEY, else OPENAI_API_KEY for the address that it is meant for. A server that
            wants none gets none.
        timeout: seconds without a sign from the server.

    Raises EndpointError for an address, model or key that cannot be used.
    """

    def __init__(self, base_url: str | None, model: str | None, api_key: str | None, timeout: float) -> None:
        self.base_url = _address(base_url or os.environ.get(BASE_URL) or os.environ.get("OPENAI_BASE_URL"))
        self.model = model or os.environ.get(MODEL) or ""
        if not self.model:
            raise EndpointError(f"No model is named; give the model's name at {self.base_url}, or set {MODEL}.")
        if timeout <= 0:
            raise EndpointError(f"timeout is {timeout}; allowed is more than 0 seconds.")
        self.timeout = timeout
        self._key = _key(api_key, self.base_url)
        local = httpx.URL(self.base_url).host in ("127.0.0.1", "localhost", "::1")
        if self._key and not local and self.base_url.startswith("http:"):
            log.warning("The key goes to %s unencrypted; use https.", self.base_url)
        # A proxy of the environment leads out of this machine, not to itself.
        self._client = httpx.Client(timeout=timeout, trust_env=not local)

    def __repr__(self) -> str:
        return f"ChatServer({self.base_url!r}, {self.model!r})"

    def post(self, body: Mapping[str, Any]) -> Reply:
        """Send one request; the body lacks the model only. Threads may share the server."""
        body = {"model": self.model, **body}
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            response = self._client.post(f"{self.base_url}/chat/completions", json=body, headers=headers)
        except httpx.TimeoutException:
            return Reply(None, problem=f"no answer within {self.timeout:g} seconds", again=True)
        except httpx.RequestError as error:
            return Reply(None, problem=self._clean(f"{type(error).__name__}: {error}"), again=True)
        status, said = response.status_code, " ".join(self._clean(response.text).split())[:_SHOWN]
        if status != 200:
            again, fatal = status in _BUSY or status >= 500, status in _FOR_ALL or 300 <= status < 400
            return Reply(None, 0, f"HTTP {status}: {said}", again, fatal, _retry_after(response))
        return self._completion(response, body, said)

    def _completion(self, response: httpx.Response, body: Mapping[str, Any], said: str) -> Reply:
        """What a response of status 200 holds: a reply, or what is wrong with it."""
        try:
            completion = response.json()
        except ValueError:
            completion = None
        if not isinstance(completion, dict) or not {"choices", "error"} & set(completion):
            return Reply(None, problem=f"this is no chat completion: {said}", fatal=True)
        if completion.get("error"):  # some servers and proxies send their errors with status 200
            code = _code(completion["error"])
            again, fatal = code in _BUSY or code >= 500 or not code, code in _FOR_ALL
            return Reply(None, _used(completion), f"an error with HTTP 200: {said}", again, fatal)
        choices = completion["choices"]
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            return Reply(None, _used(completion), f"a completion without a message: {said}", again=True)
        text, why = _content(message), choice.get("finish_reason")
        tokens = _tokens(completion, body, text)
        if text is None:
            return Reply(None, tokens, _without_text(message, why))
        return Reply(self._clean(text) if len(self._key) >= _SECRET else text, tokens, cut=why == "length")

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _address(given: str | None) -> str:
    """The base address without its last slash. Raises EndpointError, without what may be a password."""
    if not given:
        raise EndpointError(
            f"No endpoint is named; give a base address like http://127.0.0.1:8000/v1, or set {BASE_URL}."
        )
    try:
        url = httpx.URL(given)
        usable = url.scheme in ("http", "https") and url.host and not (url.userinfo or url.query or url.fragment)
    except httpx.InvalidURL:
        usable = False
    if not usable:
        shown = "" if any(c in given for c in "@?#") else f" {given!r}"
        raise EndpointError(
            f"The endpoint's address{shown} cannot be used; give http(s)://host/path, with no name, password or "
            f"question mark in it, and the key as {API_KEY}."
        )
    return str(url).rstrip("/").removesuffix("/chat/completions")


def _key(given: str | None, base_url: str) -> str:
    """The key for an address; "" for none. Raises EndpointError, without the key, where no header can hold it."""
    key = given or os.environ.get(API_KEY) or ""
    meant = (os.environ.get("OPENAI_BASE_URL") or _OPENAI).rstrip("/")
    if not key and base_url in (meant, _OPENAI):
        key = os.environ.get("OPENAI_API_KEY") or ""
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise EndpointError("The key has characters that no key has (spaces, line ends, accents); copy it again.")
    return key


def _content(message: Mapping[str, Any]) -> str | None:
    """The text of a message, also where it comes in parts; None where it has none but white space."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(text for text in texts if isinstance(text, str))
    thought = any(isinstance(message.get(name), str) and message[name] for name in _THINKING_FIELDS)
    return content if isinstance(content, str) and (content.strip() or not thought) else None


def _without_text(message: Mapping[str, Any], finish_reason: Any) -> str:
    """Why a message has no text, and what to do about it."""
    if finish_reason == "length":
        return CUT
    if finish_reason == "content_filter":
        return "the server's content filter withheld the reply"
    if any(message.get(name) for name in _THINKING_FIELDS):
        return "the reply has thinking and no text; give the model more tokens, or ask the server not to think"
    return "the reply has no text"


def _code(error: Any) -> int:
    """The status that an error body names; 0 where it names none."""
    code = error.get("code", error.get("status")) if isinstance(error, dict) else None
    return int(code) if isinstance(code, int) or (isinstance(code, str) and code.isdecimal()) else 0


def _used(completion: Mapping[str, Any]) -> int:
    """Tokens that a response without a reply says it used."""
    usage = completion.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if type(total) is int and total > 0 else 0


def _tokens(completion: Mapping[str, Any], body: Mapping[str, Any], text: str | None) -> int:
    """Tokens read and written, as the server counts them; else by the length of the text."""
    return _used(completion) or (len(json.dumps(body)) + len(text or "")) // _CHARACTERS_PER_TOKEN


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait; None if it does not say."""
    given = response.headers.get("retry-after")
    if given is None:
        return None
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
