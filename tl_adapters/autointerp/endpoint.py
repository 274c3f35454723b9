"""Asks many questions of an OpenAI-compatible chat endpoint, with retries, a budget and a cache of replies.

1. Every reply is cached under its question before it is used (`reply_cache`). So a run that was stopped continues where
   it stopped, and a run that is repeated costs nothing.
2. Questions are asked by several threads. After an error that may pass (timeouts, 408, 429, 5xx), a question is asked
   again, after exponentially growing waits with jitter, or after the time that the server's Retry-After names; all
   threads wait for that time.
3. A budget limits requests and tokens. When it is used up, the error says where the replies are and how to continue.
4. Replies are read strictly as JSON. A reply that is not JSON is sent back once; after a second failure the question is
   reported as failed, and the next run asks it again.
5. A reply that was cut at its limit of tokens is not sent back, because it needs a larger limit. Where the limit is
   ours, the question is asked once more with `LONG_REPLY_TOKENS`. A user's limit is kept, and the error names it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from tl_adapters.autointerp.http_client import (
    API_KEY_VARIABLE,
    MODEL_VARIABLE,
    TRUNCATED_REPLY,
    ChatServer,
    EndpointError,
    Reply,
)
from tl_adapters.autointerp.reply_cache import LENGTH_LIMITS, ReplyCache, read_json
from tl_adapters.utils.printing import printable_line
from tl_adapters.utils.renamed import renamed_attributes
from tl_adapters.utils.strict_json import dumps

log = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, str]]
"""The messages of a conversation: {"role": "system" or "user" or "assistant", "content": text} each."""
T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 1.0, 120.0
"""Seconds to wait before the second try, doubled at every further one; and at most, whatever the server asks for."""
REPLY_TOKENS, LONG_REPLY_TOKENS = 4096, 16384
"""Tokens of the longest reply, thinking included, and of the second try where the first reply was cut.

A reasoning model thinks for thousands of tokens before a verdict of a hundred.
"""
MAX_FAILURES_IN_A_ROW = 5
"""After this many questions in a row that failed after all tries, or whose replies were cut, the run stops."""
MAX_COMPLAINT = 1000
"""Characters of the reason why a reply cannot be used."""


class BudgetError(EndpointError):
    """The budget of requests or tokens is used up."""


@dataclass(frozen=True)
class Failure:
    """The outcome of a question that got no usable reply."""

    reason: str
    """The reason."""


@dataclass(frozen=True)
class EndpointUsage:
    """Requests and tokens that an endpoint has used."""

    requests: int = 0
    """Requests sent, including those that failed."""
    tokens: int = 0
    """Tokens read and written by the model."""
    cached: int = 0
    """Questions answered from the cache."""

    def since(self, before: EndpointUsage) -> EndpointUsage:
        """What was used after ``before``."""
        return EndpointUsage(self.requests - before.requests, self.tokens - before.tokens, self.cached - before.cached)


@renamed_attributes(spent="usage")
class Endpoint:
    """A model behind an address; `ask_all` asks it questions.

    Args:
        base_url: address like "http://127.0.0.1:8000/v1"; by default TL_ADAPTERS_BASE_URL or OPENAI_BASE_URL.
        model: name of the model at that address; by default TL_ADAPTERS_MODEL.
        api_key: by default TL_ADAPTERS_API_KEY or, for the address that it belongs to, OPENAI_API_KEY. May be missing
            where the server needs none; "" sends none.
        cache: folder of cached replies; None caches nothing.
        concurrency: number of requests at a time.
        timeout: seconds for one request, from the connection to the last byte of the reply.
        tries: number of tries for a question, including the first.
        request_budget: number of requests that this object may send; None sets no limit.
        token_budget: number of tokens that may be read and written; None sets no limit. Requests that are under way
            when the limit is reached are completed.
        reply_tokens: tokens of one reply, including the thinking of a reasoning model; None allows `REPLY_TOKENS`, and
            asks once more with `LONG_REPLY_TOKENS` where a reply was cut.
        parameters: request parameters, which override temperature 0, ``seed``, and ``reply_tokens`` as max_tokens. None
            removes one ({"max_tokens": None, "max_completion_tokens": 4000} for models that know only the latter).
        seed: seed that is sent to the server, and seed of the jitter.

    Raises:
        EndpointError: the address, model, key, a limit or a parameter cannot be used.
        WriteError: nothing can be written into the cache's folder.
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        *,
        cache: str | Path | None = None,
        concurrency: int = 8,
        timeout: float = 300.0,
        tries: int = 6,
        request_budget: int | None = None,
        token_budget: int | None = None,
        reply_tokens: int | None = None,
        parameters: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        _require_whole(1, concurrency=concurrency, tries=tries, reply_tokens=reply_tokens)
        _require_whole(0, request_budget=request_budget, token_budget=token_budget)
        self.server = ChatServer(base_url, model, api_key, timeout)
        self.cache, self.concurrency, self.tries = ReplyCache(cache), concurrency, tries
        self.request_budget, self.token_budget = request_budget, token_budget
        chosen = {"temperature": 0, "seed": seed, "max_tokens": reply_tokens or REPLY_TOKENS, **(parameters or {})}
        self.parameters = {name: value for name, value in chosen.items() if value is not None}
        _require_sendable(self.parameters)
        self._may_ask_longer = reply_tokens is None and not set(LENGTH_LIMITS) & set(parameters or {})
        self._jitter = random.Random(seed)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._usage, self._not_before, self._failed_in_a_row = EndpointUsage(), 0.0, 0

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.server.model

    @property
    def usage(self) -> EndpointUsage:
        """Requests and tokens used so far."""
        return self._usage

    def ask_all(
        self,
        questions: Sequence[Messages],
        read: Callable[[Any], T] | Sequence[Callable[[Any], T]],
        *,
        progress: bool = True,
        what: str = "ask",
    ) -> list[T | Failure]:
        """Ask all questions and read the JSON replies.

        A reply that is not JSON, or that ``read`` refuses with a ValueError, is sent back once with the text of the
        error. (So that text is part of a question, under which a reply is cached.)

        Args:
            questions: the messages of each question.
            read: a function that turns the JSON of a reply into a result, or one function for each question.
            progress: show a progress bar.
            what: label of the progress bar.

        Returns:
            The result of each question, in their order. A `Failure` where two replies could not be read, or where no
            try got a reply.

        Raises:
            BudgetError: the budget is used up; all replies so far are cached.
            EndpointError: the endpoint refuses the requests or fails altogether; all replies so far are cached.
        """
        self._stop.clear()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        bar = tqdm(total=len(questions), desc=what, unit="question", disable=not progress)
        readers = [read] * len(questions) if callable(read) else read
        futures = [pool.submit(self._answer, messages, r) for messages, r in zip(questions, readers, strict=True)]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            _raise_first(done)
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            wait_for = "Requests under way are completed first, so that their replies are kept; at most %.0f seconds."
            log.warning(wait_for, self.server.timeout)
            raise
        finally:  # also when interrupted: requests under way are completed and cached, and no more are sent
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            bar.close()

    def _answer(self, messages: Messages, read: Callable[[Any], T]) -> T | Failure:
        try:
            text, truncated = self._ask(messages)
            try:
                return read(read_json(text))
            except ValueError as error:
                if truncated:
                    return Failure(TRUNCATED_REPLY)
                complaint = (
                    f"That cannot be used: {_short(error)}. Answer the same again, with nothing but the JSON object "
                    "asked for."
                )
            again = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": complaint}]
            text, truncated = self._ask(again)
            try:
                return read(read_json(text))
            except ValueError as error:
                for question in (messages, again):
                    self.cache.mark_unusable(self._question(question), _short(error))
                return Failure(TRUNCATED_REPLY if truncated else f"no usable JSON in two replies: {_short(error)}")
        except _NoReply as error:
            return Failure(str(error))
        except BaseException:
            self._stop.set()  # so that no thread sends its next question
            raise

    def _question(self, messages: Messages) -> dict[str, Any]:
        """The question under which a reply is cached."""
        return {
            "server": self.server.base_url,
            "model": self.model,
            "parameters": self.parameters,
            "messages": [dict(m) for m in messages],
        }

    def _ask(self, messages: Messages) -> tuple[str, bool]:
        """One reply, from the cache or the server, and whether it was truncated.

        Raises _NoReply, BudgetError, EndpointError.
        """
        text, truncated, cached = self.cache.reply(self._question(messages), lambda: self._send(messages))
        if cached:
            self._count(cached=1)
        return text, truncated

    def _send(self, messages: Messages) -> tuple[str, bool]:
        """One reply of the server, and whether it was truncated. Raises _NoReply, BudgetError, EndpointError."""
        body = {"messages": [dict(m) for m in messages], **self.parameters}
        reply = self._try(body)
        if reply.truncated and self._may_ask_longer:
            longer = self._try({**body, "max_tokens": LONG_REPLY_TOKENS})
            # A server refuses a limit beyond what its model can read.
            refused = longer.text is None and not longer.truncated
            reply = Reply(None, problem=f"{TRUNCATED_REPLY}; with more: {longer.problem}") if refused else longer
        with self._lock:
            self._failed_in_a_row = 0 if reply.completed else self._failed_in_a_row + 1
            broken = self._failed_in_a_row >= MAX_FAILURES_IN_A_ROW
        if broken:
            failure = f"{MAX_FAILURES_IN_A_ROW} questions in a row got no whole answer, the last: {reply.problem}."
            raise EndpointError(self._with_advice(f"{self.server.base_url} fails: {failure}"))
        if reply.text is None:
            raise _NoReply(reply.problem)
        return reply.text, reply.truncated

    def _try(self, body: Mapping[str, Any]) -> Reply:
        """The reply to a request, or the problem with the last try. Raises _NoReply, BudgetError, EndpointError."""
        for attempt in range(self.tries):
            self._wait_until_allowed()
            self._count_request()
            reply = self.server.post(body)
            self._count(tokens=reply.tokens)
            if reply.fatal:
                hint = f"Check the address, {MODEL_VARIABLE} and {API_KEY_VARIABLE}."
                raise EndpointError(self._with_advice(f"{self.server.base_url} refuses: {reply.problem}. {hint}"))
            if reply.text is not None or not reply.retryable:
                break
            if attempt + 1 < self.tries:
                self._postpone(attempt, reply)
        return reply

    # -- budget and waiting --------------------------------------------------------------------------------------

    def _count_request(self) -> None:
        """Count a request that is about to be sent. Raises BudgetError, or _NoReply while all threads are stopped."""
        with self._lock:
            if self._stop.is_set():
                raise _NoReply("stopped")
            used = self._usage
            over_requests = self.request_budget is not None and used.requests >= self.request_budget
            if over_requests or (self.token_budget is not None and used.tokens >= self.token_budget):
                limit = f"{self.request_budget} requests" if over_requests else f"{self.token_budget} tokens"
                total = f"{used.requests} requests, {used.tokens} tokens"
                raise BudgetError(self._with_advice(f"The budget of {limit} is used up ({total})."))
            self._usage = EndpointUsage(used.requests + 1, used.tokens, used.cached)

    def _count(self, tokens: int = 0, cached: int = 0) -> None:
        with self._lock:
            used = self._usage
            self._usage = EndpointUsage(used.requests, used.tokens + tokens, used.cached + cached)

    def _postpone(self, attempt: int, reply: Reply) -> None:
        """Wait before the next try; if the server has named a time, let all threads wait for it."""
        with self._lock:
            backoff = FIRST_WAIT * 2**attempt * (0.5 + self._jitter.random())
            delay = min(LONGEST_WAIT, max(backoff, reply.retry_after or 0.0))
            if reply.retry_after is not None:
                self._not_before = max(self._not_before, time.monotonic() + delay)
        log.warning("%s; asked again in %.1f seconds.", reply.problem, delay)
        self._stop.wait(delay)

    def _wait_until_allowed(self) -> None:
        """Wait for as long as the server has asked all threads to."""
        while (left := self._not_before - time.monotonic()) > 0 and not self._stop.is_set():
            self._stop.wait(left)

    def _with_advice(self, problem: str) -> str:
        if self.cache.folder is None:
            return f"{problem} No cache folder was given, so the replies are lost; give one before you run this again."
        return (
            f"{problem} Every reply so far is cached in {self.cache.folder} and is not asked for again: run the same "
            "again, with a larger budget or when the endpoint answers."
        )


class _NoReply(Exception):
    """One question got no reply; the others may get theirs."""


def _require_whole(lowest: int, **given: int | None) -> None:
    """Raise EndpointError for a number that is below the lowest allowed."""
    for name, number in given.items():
        if number is not None and number < lowest:
            raise EndpointError(f"{name} is {number}; allowed is a whole number >= {lowest}.")


def _require_sendable(parameters: Mapping[str, Any]) -> None:
    """Raise EndpointError for request parameters that are not JSON, or that `Endpoint` sets or cannot read."""
    if reserved := {"model", "messages", "stream"} & set(parameters):
        raise EndpointError(f"parameters contain {', '.join(sorted(reserved))}; give all but model, messages, stream.")
    try:
        dumps(parameters)
    except (TypeError, ValueError) as error:
        raise EndpointError(f"parameters hold a value that is not JSON: {error}") from error


def _short(error: ValueError) -> str:
    """The text of an error about a reply, of which it may quote much."""
    text = str(error)
    return printable_line(text if len(text) <= MAX_COMPLAINT else text[:MAX_COMPLAINT] + "…")


def _raise_first(done: set[Future[Any]]) -> None:
    for future in done:
        if not future.cancelled() and (error := future.exception()) is not None:
            raise error
