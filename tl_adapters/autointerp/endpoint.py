"""A client of any OpenAI-compatible chat endpoint: what is asked once is never asked again.

1. Every reply is kept under what was asked (replies.py), before anything uses it. So a run that was stopped goes on
   where it stood, and a run that is repeated costs nothing.
2. Questions are asked by several threads. What a busy or broken server may yet answer (timeouts, 408, 429, 5xx) is
   asked again, after exponentially growing waits with jitter, or after what its Retry-After says; while it asks for
   patience, all threads wait.
3. A budget bounds requests and tokens. When it is spent, the error says what is kept and how to go on.
4. Replies are read as JSON, strictly. One that is none is sent back once; what fails again is reported, not invented,
   and asked anew by the next run. A reply that was cut at its limit is not sent back: it needs a larger limit.
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

from tl_adapters.autointerp.http_client import API_KEY, CUT, MODEL, ChatServer, EndpointError, Reply
from tl_adapters.autointerp.reply_cache import ReplyCache, read_json

log = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, str]]
"""Turns: {"role": "system" or "user" or "assistant", "content": text}."""
T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 1.0, 120.0
"""Seconds: before the second try (doubled at every further one), and at most, whatever the server asks for."""
REPLY_TOKENS = 4096
"""Longest reply: a reasoning model thinks for some thousand tokens before it gives a verdict of a hundred."""
GIVE_UP_AFTER = 5
"""Questions in a row that fail after all their tries before the endpoint counts as out of order."""


class BudgetError(EndpointError):
    """The budget is spent."""


@dataclass(frozen=True)
class Failure:
    """A question that got no usable reply."""

    reason: str
    """What was wrong."""


@dataclass(frozen=True)
class Spent:
    """What an endpoint has cost so far."""

    requests: int = 0
    """Sent, those included that failed."""
    tokens: int = 0
    """Read and written by the model."""
    cached: int = 0
    """Questions answered from the cache."""


class Endpoint:
    """A model behind an address, asked by `ask_all`.

    Args:
        base_url: like "http://127.0.0.1:8000/v1"; else TL_ADAPTERS_BASE_URL, else OPENAI_BASE_URL.
        model: its name there; else TL_ADAPTERS_MODEL.
        api_key: else TL_ADAPTERS_API_KEY, else OPENAI_API_KEY for the address that it is meant for. A server that
            wants none gets none.
        cache: folder of the replies; None keeps nothing.
        concurrency: requests at a time.
        timeout: seconds without a sign from the server.
        tries: of one question, the first included.
        request_budget: requests that this object may send; None sets no bound.
        token_budget: likewise tokens, read and written. What is under way when it is reached is finished.
        reply_tokens: tokens of one reply, the thinking of a reasoning model included.
        parameters: sent with every question, over temperature 0, ``seed`` and ``reply_tokens`` as max_tokens; None
            takes one out ({"max_tokens": None, "max_completion_tokens": 4000} for models that know only the latter).
        seed: sent to the server, and of the jitter.

    Raises EndpointError for an address, model, key or bound that cannot be used.
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        *,
        cache: str | Path | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        tries: int = 6,
        request_budget: int | None = None,
        token_budget: int | None = None,
        reply_tokens: int = REPLY_TOKENS,
        parameters: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        for name, given in (("concurrency", concurrency), ("tries", tries), ("reply_tokens", reply_tokens)):
            if given < 1:
                raise EndpointError(f"{name} is {given}; allowed is a whole number >= 1.")
        self.server = ChatServer(base_url, model, api_key, timeout)
        self.cache, self.concurrency, self.tries = ReplyCache(cache), concurrency, tries
        self.request_budget, self.token_budget = request_budget, token_budget
        chosen = {"temperature": 0, "seed": seed, "max_tokens": reply_tokens, **(parameters or {})}
        self.parameters = {name: value for name, value in chosen.items() if value is not None}
        self._jitter = random.Random(seed)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._spent, self._not_before, self._failed_in_a_row = Spent(), 0.0, 0

    @property
    def model(self) -> str:
        """Who answers."""
        return self.server.model

    @property
    def spent(self) -> Spent:
        """Requests and tokens so far."""
        return self._spent

    def ask_all(
        self,
        questions: Sequence[Messages],
        read: Callable[[Any], T] | Sequence[Callable[[Any], T]],
        *,
        progress: bool = True,
        what: str = "ask",
    ) -> list[T | Failure]:
        """The JSON replies to all questions, each as ``read`` returns it, in the order of the questions.

        ``read`` is one function, or one for each question.

        A reply that is no JSON, or that ``read`` refuses with a ValueError, is sent back once with what is wrong; if
        the next one is no better, its place holds a `Failure`. So does that of a question which no try got answered.

        Raises BudgetError, and EndpointError where the endpoint refuses or fails altogether; every reply that came
        is in the cache then.
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
        finally:  # also when interrupted: what is under way is finished and kept, nothing more is sent
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            bar.close()

    def _answer(self, messages: Messages, read: Callable[[Any], T]) -> T | Failure:
        try:
            text, cut = self._ask(messages)
            try:
                return read(read_json(text))
            except ValueError as error:
                if cut:
                    return Failure(CUT)
                complaint = (
                    f"That cannot be used: {error}. Answer the same again, with nothing but the JSON object asked for."
                )
            again = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": complaint}]
            text, cut = self._ask(again)
            try:
                return read(read_json(text))
            except ValueError as error:
                for asked in (messages, again):
                    self.cache.refuse(self._question(asked), str(error))
                return Failure(CUT if cut else f"no usable JSON in two replies: {error}")
        except _Unanswered as error:
            return Failure(str(error))
        except BaseException:
            self._stop.set()  # before this thread, or another, sends its next question
            raise

    def _question(self, messages: Messages) -> dict[str, Any]:
        """What a reply is kept under."""
        return {
            "server": self.server.base_url,
            "model": self.model,
            "parameters": self.parameters,
            "messages": [dict(m) for m in messages],
        }

    def _ask(self, messages: Messages) -> tuple[str, bool]:
        """One reply, from the cache or the server, and whether it was cut.

        Raises _Unanswered, BudgetError, EndpointError.
        """
        text, cut, kept = self.cache.reply(self._question(messages), lambda: self._send(messages))
        if kept:
            self._count(cached=1)
        return text, cut

    def _send(self, messages: Messages) -> tuple[str, bool]:
        """One reply of the server, after as many tries as it takes, and whether it was cut.

        Raises _Unanswered, BudgetError, EndpointError.
        """
        body = {"messages": [dict(m) for m in messages], **self.parameters}
        problem = ""
        for attempt in range(self.tries):
            self._hold()
            self._take()
            reply = self.server.post(body)
            self._count(tokens=reply.tokens)
            if reply.text is not None:
                self._failed_in_a_row = 0
                return reply.text, reply.cut
            problem = reply.problem
            if reply.fatal:
                hint = f"Check the address, {MODEL} and {API_KEY}."
                raise EndpointError(self._told(f"{self.server.base_url} refuses: {problem}. {hint}"))
            if not reply.again:
                break
            if attempt + 1 < self.tries:
                self._postpone(attempt, reply)
        with self._lock:
            self._failed_in_a_row += 1
            if self._failed_in_a_row < GIVE_UP_AFTER:
                raise _Unanswered(problem)
        fails = f"{self.server.base_url} fails: {GIVE_UP_AFTER} questions in a row got no answer, the last: {problem}."
        raise EndpointError(self._told(fails))

    # -- budget and patience --------------------------------------------------------------------------------------

    def _take(self) -> None:
        """Count a request that is about to be sent. Raises BudgetError, or _Unanswered when all is being stopped."""
        with self._lock:
            if self._stop.is_set():
                raise _Unanswered("stopped")
            spent = self._spent
            over_requests = self.request_budget is not None and spent.requests >= self.request_budget
            if over_requests or (self.token_budget is not None and spent.tokens >= self.token_budget):
                bound = f"{self.request_budget} requests" if over_requests else f"{self.token_budget} tokens"
                raise BudgetError(
                    self._told(f"The budget of {bound} is spent ({spent.requests} requests, {spent.tokens} tokens).")
                )
            self._spent = Spent(spent.requests + 1, spent.tokens, spent.cached)

    def _count(self, tokens: int = 0, cached: int = 0) -> None:
        with self._lock:
            spent = self._spent
            self._spent = Spent(spent.requests, spent.tokens + tokens, spent.cached + cached)

    def _postpone(self, attempt: int, reply: Reply) -> None:
        """Let all threads wait where the server asks for it, and this one otherwise."""
        with self._lock:
            grown = FIRST_WAIT * 2**attempt * (0.5 + self._jitter.random())
            delay = min(LONGEST_WAIT, max(grown, reply.wait or 0.0))
            if reply.wait is not None:
                self._not_before = max(self._not_before, time.monotonic() + delay)
        log.warning("%s; asked again in %.1f seconds.", reply.problem, delay)
        self._stop.wait(delay)

    def _hold(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0 and not self._stop.is_set():
            self._stop.wait(left)

    def _told(self, problem: str) -> str:
        if self.cache.folder is None:
            return f"{problem} No cache folder was given, so nothing is kept; give one before you ask again."
        return (
            f"{problem} Every reply so far is kept in {self.cache.folder} and is not asked for again: run the same "
            "once more, with a larger budget or when the endpoint answers."
        )


class _Unanswered(Exception):
    """One question got no reply; the others may."""


def _raise_first(done: set[Future[Any]]) -> None:
    for future in done:
        if not future.cancelled() and (error := future.exception()) is not None:
            raise error
