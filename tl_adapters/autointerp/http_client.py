"""Sends one request to an OpenAI-compatible chat server and interprets the response.

1. The key is sent in one header and nowhere else, and is removed from all texts of the server or the network before
   they are returned or logged (`secret_keys`). A key of the environment is sent to the server that it is for and to no
   other: TL_ADAPTERS_API_KEY to TL_ADAPTERS_BASE_URL where that is set, OPENAI_API_KEY to OPENAI_BASE_URL or else
   api.openai.com. Redirects are not followed.
2. One deadline holds for the whole request, so a server that sends a byte now and then cannot hold a thread. Sizes are
   bounded: headers by the HTTP library (100 kB), the body by `MAX_RESPONSE_BYTES`. Compressed bodies are not asked for
   and not read, since a small one may expand to any size.
3. Every response becomes a `Reply`, also one that is no chat completion.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import threading
import weakref
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from tl_adapters.autointerp.secret_keys import KeyFilter, SecretKey
from tl_adapters.data.conversations import THINKING_FIELDS
from tl_adapters.errors import UserError
from tl_adapters.utils.printing import printable_line
from tl_adapters.utils.reading import UnreadableFileError, parse_json

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

BASE_URL_VARIABLE, MODEL_VARIABLE = "TL_ADAPTERS_BASE_URL", "TL_ADAPTERS_MODEL"
API_KEY_VARIABLE = "TL_ADAPTERS_API_KEY"
"""Environment variables that are read where no argument is given."""
TRUNCATED_REPLY = "the reply was cut at the limit of its length; allow longer replies (reply_tokens=, --reply-tokens)"
"""The problem with a reply whose model was stopped at its limit of tokens."""
MAX_RESPONSE_BYTES = 16 << 20
"""Bytes of the longest response that is read: many times those of the longest reply."""
MAX_REPORTED_TOKENS = 10_000_000
"""Tokens that one request can have used at most; a server that reports more is not believed."""
CONNECT_SECONDS = 30.0
"""Seconds in which a connection must stand; the rest of the time is the model's."""
_OPENAI = "https://api.openai.com/v1"
_RETRYABLE = {408, 409, 425, 429}
"""Statuses after which another try may succeed; so may it after 5xx."""
_FATAL = {401, 402, 403, 404, 405}
"""Statuses with which every other question would be refused too."""
_TRUNCATED = ("length", "max_tokens")
"""What servers call the reason that a reply was cut at its limit."""
_CHARACTERS_PER_TOKEN = 4
"""Used to estimate tokens where a server does not report them."""
_SHOWN_CHARACTERS = 300
"""Characters of a server's response that an error message quotes."""
_HTTP_LOGGERS = ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy", "httpcore.socks")
"""Loggers of the HTTP library, which write what servers send: the status line and headers."""


class EndpointError(UserError, RuntimeError):
    """The endpoint's address, model or key cannot be used, or it refuses or does not answer."""


class Reply(NamedTuple):
    """The outcome of one request."""

    text: str | None
    """The model's reply; None if there is none."""
    tokens: int = 0
    """Tokens read and written by the model."""
    problem: str = ""
    """The reason why there is no whole reply."""
    retryable: bool = False
    """Whether another try may succeed."""
    fatal: bool = False
    """Whether every other question would fail too."""
    retry_after: float | None = None
    """Seconds that the server asks to wait."""
    truncated: bool = False
    """Whether the model was stopped at its limit of tokens before the end of its reply."""
    completed: bool = False
    """Whether the model came to the end of its reply, also where that has no text."""


class ChatServer:
    """A model behind an address.

    Args:
        base_url: address like "http://127.0.0.1:8000/v1"; by default TL_ADAPTERS_BASE_URL or OPENAI_BASE_URL.
        model: name of the model at that address; by default TL_ADAPTERS_MODEL.
        api_key: by default TL_ADAPTERS_API_KEY or, for the address that it belongs to, OPENAI_API_KEY. May be missing
            where the server needs none.
        timeout: seconds for one request, from the connection to the last byte of the response.

    Raises:
        EndpointError: the address, model or key cannot be used.
    """

    def __init__(self, base_url: str | None, model: str | None, api_key: str | None, timeout: float) -> None:
        self.base_url = _address(base_url or os.environ.get(BASE_URL_VARIABLE) or os.environ.get("OPENAI_BASE_URL"))
        self._key = SecretKey(_key(api_key, self.base_url))
        lower = self.base_url.lower()  # as hosts are read
        if SecretKey(self._key.value.lower()).removed_from_reply(lower) != lower:
            raise EndpointError(f"The endpoint's address contains the key; give the key as {API_KEY_VARIABLE} only.")
        self.model = model or os.environ.get(MODEL_VARIABLE) or ""
        if not self.model:
            raise EndpointError(f"No model was given; give its name at {self.base_url}, or set {MODEL_VARIABLE}.")
        if not 0 < timeout < threading.TIMEOUT_MAX:
            raise EndpointError(f"timeout is {timeout}; allowed is a number of seconds greater than 0.")
        self.timeout = timeout
        self._answered = False
        self._new_client = self._client_maker()
        for name in _HTTP_LOGGERS if self._key else ():
            logger, key_filter = logging.getLogger(name), KeyFilter(self._key)
            logger.addFilter(key_filter)
            weakref.finalize(self, logger.removeFilter, key_filter)

    def __repr__(self) -> str:
        return f"ChatServer({self.base_url!r}, {self.model!r})"

    def _client_maker(self) -> Callable[[], httpx.AsyncClient]:
        """A function that makes an HTTP client. Raises EndpointError for an environment that httpx cannot use."""
        import httpx  # not at the top: its import draws from the user's random numbers

        local = httpx.URL(self.base_url).host in ("127.0.0.1", "localhost", "::1")
        if self._key and not local and self.base_url.startswith("http:"):
            log.warning("The key goes to %s unencrypted; use https.", self.base_url)
        try:
            new_client = partial(
                httpx.AsyncClient,
                timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),  # `post` has a deadline for all of it
                trust_env=not local,  # a proxy from the environment cannot reach servers on this machine
                verify=httpx.create_ssl_context(),
            )
            new_client()
        except OSError as error:
            raise EndpointError(
                f"The certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read ({error}); unset it to use "
                "those of the package certifi."
            ) from error
        except (ValueError, ImportError, httpx.InvalidURL):
            raise EndpointError(
                "The proxy that the environment names (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) cannot be used; give "
                "http(s)://host:port, or unset it."
            ) from None
        return new_client

    def post(self, body: Mapping[str, Any]) -> Reply:
        """Send one request, whose body is complete but for the model.

        Threads may share the server. A thread that runs an event loop, such as that of a notebook's cells, cannot call
        this.
        """
        import httpx

        body = {"model": self.model, **body}
        try:
            # A coroutine can be stopped at any moment; a thread that waits for a slow server cannot.
            response, content = asyncio.run(asyncio.wait_for(self._exchange(body), self.timeout))
        except (TimeoutError, httpx.TimeoutException):
            problem = f"no complete answer within {self.timeout:g} seconds (timeout=, --timeout)"
            return Reply(None, problem=problem, retryable=True)
        except (httpx.RequestError, OSError, ValueError) as error:
            return Reply(None, problem=self._quoted(f"{type(error).__name__}: {error}"), retryable=True)
        if len(content) > MAX_RESPONSE_BYTES:
            return Reply(None, problem=f"the response is longer than {MAX_RESPONSE_BYTES >> 20} MiB; it was not read")
        status, text = response.status_code, content.decode("utf-8-sig", "replace")
        if status != 200:
            retryable, fatal = status in _RETRYABLE or status >= 500, status in _FATAL or 300 <= status < 400
            return Reply(None, 0, f"HTTP {status}: {self._quoted(text)}", retryable, fatal, _retry_after(response))
        if response.headers.get("content-encoding", "identity") != "identity":
            return self._no_completion("the response is compressed, which was not asked for")
        return self._completion(text, body)

    async def _exchange(self, body: Mapping[str, Any]) -> tuple[httpx.Response, bytes]:
        """The response and its content, of which no more is read than shows that it is too long."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.value}"
        url, sent, content = f"{self.base_url}/chat/completions", json.dumps(body).encode(), bytearray()
        async with (
            self._new_client() as client,
            client.stream("POST", url, content=sent, headers=headers) as response,
        ):
            async for piece in response.aiter_raw():
                content += piece
                if len(content) > MAX_RESPONSE_BYTES:
                    break
        return response, bytes(content)

    def _completion(self, response: str, body: Mapping[str, Any]) -> Reply:
        """The outcome of a response of status 200."""
        try:
            completion = parse_json(response, "the response")
        except UnreadableFileError:
            if response.strip()[:1] in ("", "{"):  # of a server that gives completions, but was interrupted
                return Reply(
                    None, problem=f"the response is damaged or incomplete: {self._quoted(response)}", retryable=True
                )
            return self._no_completion(f"this is not a chat completion: {self._quoted(response)}")
        error = _error(completion)
        if error is not None:  # some servers and proxies send their errors with status 200
            code = _code(error)
            retryable, fatal = code in _RETRYABLE or code >= 500 or not code, code in _FATAL
            return Reply(
                None,
                _reported_tokens(completion),
                f"an error with HTTP 200: {self._quoted(response)}",
                retryable,
                fatal,
            )
        if not isinstance(completion, dict) or "choices" not in completion:
            return self._no_completion(f"this is not a chat completion: {self._quoted(response)}")
        choices = completion["choices"]
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            return Reply(
                None,
                _reported_tokens(completion),
                f"a completion without a message: {self._quoted(response)}",
                retryable=True,
            )
        self._answered = True
        text, truncated = _content(message), choice.get("finish_reason") in _TRUNCATED
        problem = TRUNCATED_REPLY if truncated else _missing_text(message, choice.get("finish_reason"))
        return Reply(
            text=None if text is None else self._key.removed_from_reply(text),
            tokens=_tokens(completion, body, message),
            problem="" if text is not None and not truncated else self._quoted(problem),
            truncated=truncated,
            completed=not truncated,
        )

    def _no_completion(self, problem: str) -> Reply:
        """A response that a chat server does not give: fatal, unless this server has given others before."""
        return Reply(None, problem=problem, retryable=self._answered, fatal=not self._answered)

    def _quoted(self, text: str) -> str:
        """A text of the server or the network in one short line, without the key."""
        return printable_line(" ".join(self._key.removed_from(text).split())[:_SHOWN_CHARACTERS])


def _address(given: str | None) -> str:
    """The base address without its last slash. Raises EndpointError, whose text does not quote what was given."""
    if not given:
        raise EndpointError(
            f"No endpoint was given; give a base address like http://127.0.0.1:8000/v1, or set {BASE_URL_VARIABLE}."
        )
    import httpx

    try:
        url = httpx.URL(given)
        url.host.encode("idna")
        is_server = url.scheme in ("http", "https") and re.fullmatch(r"[\w.:-]+", url.host) is not None
        usable = is_server and not (url.userinfo or url.query or url.fragment)
    except (httpx.InvalidURL, ValueError):
        usable = False
    if not usable:  # whose every part may be a key in the wrong place
        raise EndpointError(
            "The endpoint's address cannot be used (it is not shown, since it may contain a key); give "
            "http(s)://host/path or http(s)://host:port/path, with no name, password or question mark in it, and the "
            f"key as {API_KEY_VARIABLE}."
        )
    return str(url).rstrip("/").removesuffix("/chat/completions")


def _key(given: str | None, base_url: str) -> str:
    """The key for an address, or "". Raises EndpointError, whose text does not hold the key, if it cannot be sent."""
    key = _environment_key(base_url) if given is None else given
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise EndpointError("The key has characters that no key has (spaces, line ends, accents); copy it again.")
    return key


def _environment_key(base_url: str) -> str:
    """The key of the environment that is for the server at an address, or ""."""
    ours, our_address = os.environ.get(API_KEY_VARIABLE), os.environ.get(BASE_URL_VARIABLE) or base_url
    if ours and _origin(our_address) == _origin(base_url):
        return ours
    if ours:
        log.warning(
            "%s is for the server that %s names, and is not sent to %s; set %s to that address if the key is for it.",
            API_KEY_VARIABLE, BASE_URL_VARIABLE, base_url, BASE_URL_VARIABLE,
        )  # fmt: skip
    theirs = os.environ.get("OPENAI_API_KEY") or ""
    return theirs if _origin(os.environ.get("OPENAI_BASE_URL") or _OPENAI) == _origin(base_url) else ""


def _origin(address: str) -> tuple[str, str, int | None] | None:
    """The scheme, host and port of an address, which say what server it is; None where it cannot be read."""
    import httpx

    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        return None
    return url.scheme, url.host, url.port


def _content(message: Mapping[str, Any]) -> str | None:
    """The text of a message, which may come in parts; None where a message with thinking has only white space."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str) or not (content.strip() or not _thinking(message)):
        return None
    return content.encode("utf-8", "replace").decode()  # JSON can spell halves of characters, which UTF-8 lacks


def _thinking(message: Mapping[str, Any]) -> str:
    """The thinking that a message has in a field of its own, or ""."""
    texts = [message.get(name) for name in THINKING_FIELDS]
    return next((text for text in texts if isinstance(text, str) and text), "")


def _missing_text(message: Mapping[str, Any], finish_reason: Any) -> str:
    """The reason why a message that was not cut has no text, and what to do about it."""
    if finish_reason == "content_filter":
        return "the server's content filter withheld the reply"
    if isinstance(refusal := message.get("refusal"), str) and refusal:
        return f"the model refused to answer: {refusal}"
    if any(message.get(name) for name in THINKING_FIELDS):
        return "the reply has thinking and no text; give the model more tokens, or ask the server not to think"
    return "the reply has no text"


def _error(completion: Any) -> Any:
    """The error that a response of status 200 carries; None where there is none."""
    if not isinstance(completion, dict):
        return None
    return completion if completion.get("object") == "error" else completion.get("error") or None


def _code(error: Any) -> int:
    """The status that an error in a response names; 0 where it names none."""
    code = error.get("code", error.get("status")) if isinstance(error, dict) else None
    if isinstance(code, str):
        return int(code) if re.fullmatch(r"[0-9]{3}", code) else 0
    return code if type(code) is int else 0


def _reported_tokens(completion: Mapping[str, Any]) -> int:
    """Tokens that the server reports; 0 where it reports none or a number that cannot be."""
    usage = completion.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    if total is None:
        return 0
    if type(total) is not int or not 0 <= total <= MAX_REPORTED_TOKENS:
        log.warning("The server reports an impossible number of tokens; it is estimated from the texts instead.")
        return 0
    return total


def _tokens(completion: Mapping[str, Any], body: Mapping[str, Any], message: Mapping[str, Any]) -> int:
    """Tokens read and written, as the server reports them, or else estimated from the length of the texts."""
    texts = json.dumps(body), _content(message) or "", _thinking(message)
    return _reported_tokens(completion) or sum(map(len, texts)) // _CHARACTERS_PER_TOKEN


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
    except (ValueError, TypeError, OverflowError):
        return None
