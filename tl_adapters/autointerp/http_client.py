"""Sends one request to an OpenAI-compatible chat server and interprets the response.

The key is sent in one header and nowhere else, and is removed from all texts of the server or the network before they
are returned. A key that belongs to another server is not sent: OPENAI_API_KEY is sent to OPENAI_BASE_URL and
api.openai.com only. Redirects are not followed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from tl_adapters.data.conversations import THINKING_FIELDS
from tl_adapters.errors import UserError

log = logging.getLogger(__name__)

BASE_URL_VARIABLE, MODEL_VARIABLE = "TL_ADAPTERS_BASE_URL", "TL_ADAPTERS_MODEL"
API_KEY_VARIABLE = "TL_ADAPTERS_API_KEY"
"""Environment variables that are read where no argument is given."""
TRUNCATED_REPLY = "the reply was cut at the limit of its length; allow longer replies (reply_tokens=, --reply-tokens)"
"""The problem with a reply whose model was stopped at its limit of tokens."""
_OPENAI = "https://api.openai.com/v1"
_RETRYABLE = {408, 409, 425, 429}
"""Statuses after which another try may succeed; so may it after 5xx."""
_FATAL = {401, 402, 403, 404, 405}
"""Statuses with which every other question would be refused too."""
_MIN_SECRET_LENGTH = 16
"""Characters of a real key, which is removed from replies too; a shorter one ("EMPTY") is not a secret."""
_CHARACTERS_PER_TOKEN = 4
"""Used to estimate tokens where a server does not report them."""
_SHOWN_CHARACTERS = 300
"""Characters of a server's response that an error message quotes."""


class EndpointError(UserError, RuntimeError):
    """The endpoint's address, model or key cannot be used, or it refuses or does not answer."""


class Reply(NamedTuple):
    """The outcome of one request."""

    text: str | None
    """The model's reply; None if there is none."""
    tokens: int = 0
    """Tokens read and written by the model."""
    problem: str = ""
    """The reason why there is no reply."""
    retryable: bool = False
    """Whether another try may succeed."""
    fatal: bool = False
    """Whether every other question would fail too."""
    retry_after: float | None = None
    """Seconds that the server asks to wait."""
    truncated: bool = False
    """Whether the model was stopped at its limit of tokens before the end of its reply."""


class ChatServer:
    """A model behind an address.

    Args:
        base_url: address like "http://127.0.0.1:8000/v1"; by default TL_ADAPTERS_BASE_URL or OPENAI_BASE_URL.
        model: name of the model at that address; by default TL_ADAPTERS_MODEL.
        api_key: by default TL_ADAPTERS_API_KEY or, for the address that it belongs to, OPENAI_API_KEY. May be missing
            where the server needs none.
        timeout: seconds to wait for the server.

    Raises:
        EndpointError: the address, model or key cannot be used.
    """

    def __init__(self, base_url: str | None, model: str | None, api_key: str | None, timeout: float) -> None:
        self.base_url = _address(base_url or os.environ.get(BASE_URL_VARIABLE) or os.environ.get("OPENAI_BASE_URL"))
        self.model = model or os.environ.get(MODEL_VARIABLE) or ""
        if not self.model:
            raise EndpointError(f"No model was given; give its name at {self.base_url}, or set {MODEL_VARIABLE}.")
        if timeout <= 0:
            raise EndpointError(f"timeout is {timeout}; allowed is more than 0 seconds.")
        import httpx  # not at the top: its import draws from the user's random numbers

        self.timeout = timeout
        self._key = _key(api_key, self.base_url)
        local = httpx.URL(self.base_url).host in ("127.0.0.1", "localhost", "::1")
        if self._key and not local and self.base_url.startswith("http:"):
            log.warning("The key goes to %s unencrypted; use https.", self.base_url)
        # A proxy from the environment cannot reach servers on this machine.
        self._client = httpx.Client(timeout=timeout, trust_env=not local)

    def __repr__(self) -> str:
        return f"ChatServer({self.base_url!r}, {self.model!r})"

    def post(self, body: Mapping[str, Any]) -> Reply:
        """Send one request, whose body is complete but for the model. Threads may share the server."""
        import httpx

        body = {"model": self.model, **body}
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            response = self._client.post(f"{self.base_url}/chat/completions", json=body, headers=headers)
        except httpx.TimeoutException:
            return Reply(None, problem=f"no answer within {self.timeout:g} seconds", retryable=True)
        except httpx.RequestError as error:
            return Reply(None, problem=self._clean(f"{type(error).__name__}: {error}"), retryable=True)
        status, quote = response.status_code, " ".join(self._clean(response.text).split())[:_SHOWN_CHARACTERS]
        if status != 200:
            retryable, fatal = status in _RETRYABLE or status >= 500, status in _FATAL or 300 <= status < 400
            return Reply(None, 0, f"HTTP {status}: {quote}", retryable, fatal, _retry_after(response))
        return self._completion(response, body, quote)

    def _completion(self, response: Any, body: Mapping[str, Any], quote: str) -> Reply:
        """The outcome of a response of status 200."""
        try:
            completion = response.json()
        except ValueError:
            completion = None
        if not isinstance(completion, dict) or not {"choices", "error"} & set(completion):
            return Reply(None, problem=f"this is not a chat completion: {quote}", fatal=True)
        if completion.get("error"):  # some servers and proxies send their errors with status 200
            code = _code(completion["error"])
            retryable, fatal = code in _RETRYABLE or code >= 500 or not code, code in _FATAL
            return Reply(None, _reported_tokens(completion), f"an error with HTTP 200: {quote}", retryable, fatal)
        choices = completion["choices"]
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            return Reply(None, _reported_tokens(completion), f"a completion without a message: {quote}", retryable=True)
        text, finish_reason = _content(message), choice.get("finish_reason")
        tokens = _tokens(completion, body, text)
        if text is None:
            return Reply(None, tokens, _missing_text(message, finish_reason))
        return Reply(
            self._clean(text) if len(self._key) >= _MIN_SECRET_LENGTH else text,
            tokens,
            truncated=finish_reason == "length",
        )

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _address(given: str | None) -> str:
    """The base address without its last slash. Raises EndpointError, whose text shows no password."""
    if not given:
        raise EndpointError(
            f"No endpoint was given; give a base address like http://127.0.0.1:8000/v1, or set {BASE_URL_VARIABLE}."
        )
    import httpx

    try:
        url = httpx.URL(given)
        usable = url.scheme in ("http", "https") and url.host and not (url.userinfo or url.query or url.fragment)
    except httpx.InvalidURL:
        usable = False
    if not usable:
        shown = "" if any(c in given for c in "@?#") else f" {given!r}"
        raise EndpointError(
            f"The endpoint's address{shown} cannot be used; give http(s)://host/path, with no name, password or "
            f"question mark in it, and the key as {API_KEY_VARIABLE}."
        )
    return str(url).rstrip("/").removesuffix("/chat/completions")


def _key(given: str | None, base_url: str) -> str:
    """The key for an address, or "". Raises EndpointError, whose text does not hold the key, if it cannot be sent."""
    key = given or os.environ.get(API_KEY_VARIABLE) or ""
    openai_address = (os.environ.get("OPENAI_BASE_URL") or _OPENAI).rstrip("/")
    if not key and base_url in (openai_address, _OPENAI):
        key = os.environ.get("OPENAI_API_KEY") or ""
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise EndpointError("The key has characters that no key has (spaces, line ends, accents); copy it again.")
    return key


def _content(message: Mapping[str, Any]) -> str | None:
    """The text of a message, which may come in parts; None where a message with thinking has only white space."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(text for text in texts if isinstance(text, str))
    has_thinking = any(isinstance(message.get(name), str) and message[name] for name in THINKING_FIELDS)
    return content if isinstance(content, str) and (content.strip() or not has_thinking) else None


def _missing_text(message: Mapping[str, Any], finish_reason: Any) -> str:
    """The reason why a message has no text, and what to do about it."""
    if finish_reason == "length":
        return TRUNCATED_REPLY
    if finish_reason == "content_filter":
        return "the server's content filter withheld the reply"
    if any(message.get(name) for name in THINKING_FIELDS):
        return "the reply has thinking and no text; give the model more tokens, or ask the server not to think"
    return "the reply has no text"


def _code(error: Any) -> int:
    """The status that an error in a response names; 0 where it names none."""
    code = error.get("code", error.get("status")) if isinstance(error, dict) else None
    return int(code) if isinstance(code, int) or (isinstance(code, str) and code.isdecimal()) else 0


def _reported_tokens(completion: Mapping[str, Any]) -> int:
    """Tokens that the server reports; 0 where it reports none."""
    usage = completion.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if type(total) is int and total > 0 else 0


def _tokens(completion: Mapping[str, Any], body: Mapping[str, Any], text: str | None) -> int:
    """Tokens read and written, as the server reports them, or else estimated from the length of the texts."""
    return _reported_tokens(completion) or (len(json.dumps(body)) + len(text or "")) // _CHARACTERS_PER_TOKEN


def _retry_after(response: Any) -> float | None:
    """Seconds that the server asks to wait; None if it does not ask."""
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
