"""The region of a trace that each token belongs to: template, question, thinking, tags, answer or end."""

from __future__ import annotations

import datetime
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile

from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.chat_template import PROBE_DATES, PROBE_QUESTION, render, split_thinking_block
from tl_adapters.data.traces import Trace

TRACE_REGIONS = ("template", "question", "think_start", "thinking", "think_end", "answer", "end")
"""Regions of a trace: what the chat template writes around a question, the question (with any turns before it), the
tags around the thinking, the thinking, the answer, and what ends a response."""
_PROBE_QUESTIONS = ("apple tart", "7 = x", "Why?")
"""Questions that have no token in common at either end: what their prompts share is the template's."""
_DATE_SLACK = 8
"""How many tokens more than the probe's a date may take in another trace."""


class TraceRegions:
    """Finds the region of every token of traces in one chat format."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat

    def codes(self, trace: Trace) -> list[int]:
        """The region of every token of a trace, as indices into `TRACE_REGIONS`."""
        template, question, think_start, thinking, think_end, answer, end = range(len(TRACE_REGIONS))
        prompt, response = trace.tokens[: trace.prompt_length], trace.tokens[trace.prompt_length :]
        codes = [question] * len(prompt) + [answer] * len(response)
        before_question = self._before_question(prompt)
        codes[:before_question] = [template] * before_question
        template_end = self._template_end(prompt)
        # A prompt may end as the template ends it, or with its thinking opened, closed or left unopened.
        tail = max(len(_common_suffix(prompt[:template_end], ending)) for ending in self._prompt_endings)
        tail_start = template_end - tail
        codes[tail_start:template_end] = [template] * tail
        codes[template_end : len(prompt)] = [thinking] * (len(prompt) - template_end)
        tag = self._tag_span(prompt[tail_start:template_end], self._chat.think_start)
        opened = (
            tag is not None and self._tag_span(prompt[tail_start + tag[1] : template_end], self._chat.think_end) is None
        )
        if tag is not None and opened:
            codes[tail_start + tag[0] : tail_start + tag[1]] = [think_start] * (tag[1] - tag[0])
        thinking_start, closing_tag = len(prompt), self._chat.think_end
        if not opened and (opening := self._opening(response)) is not None:
            (start, stop), closing_tag = opening
            codes[thinking_start : thinking_start + start] = [template] * start
            codes[thinking_start + start : thinking_start + stop] = [think_start] * (stop - start)
            opened, thinking_start = True, thinking_start + stop
        if opened or trace.thinking_length:
            span = self._tag_span(trace.tokens[thinking_start:], closing_tag)
            stop = thinking_start + span[0] if span else len(prompt) + (trace.thinking_length or len(response))
            codes[thinking_start:stop] = [thinking] * (stop - thinking_start)
            if span:
                codes[stop : thinking_start + span[1]] = [think_end] * (span[1] - span[0])
        ending = self._ids(self._chat.turn_end)
        if ending and response[-len(ending) :] == ending:
            codes[-len(ending) :] = [end] * len(ending)
        elif response and response[-1] in self._chat.end_tokens:
            codes[-1] = end
        return codes

    def _template_end(self, prompt: tuple[int, ...]) -> int:
        """Number of tokens of a prompt up to the end of the template's part; a prefill of thinking may follow it."""
        span = self._tag_span(prompt, self._chat.think_start, last=True)
        if span is None or self._tag_span(prompt[span[1] :], self._chat.think_end) is not None:
            return len(prompt)
        if any(len(ending) > 1 and prompt[-len(ending) :] == ending for ending in self._prompt_endings):
            return len(prompt)  # the template opens the thinking itself
        shared = max(len(_common_suffix(prompt[: span[1]], ending)) for ending in self._prompt_endings)
        # Without more of the template than the tag, the tag is part of a question about it.
        return span[1] if shared > span[1] - span[0] else len(prompt)

    def _before_question(self, prompt: tuple[int, ...]) -> int:
        """Number of tokens of a prompt that the template writes before the question."""
        before, after_date = self._template_head
        shared = len(_common_prefix([prompt, before]))
        if after_date and shared < len(before):  # the template was rendered on another day
            found = _find(after_date, prompt[shared : len(before) + len(after_date) + _DATE_SLACK])
            return shared if found is None else shared + found + len(after_date)
        return shared

    @cached_property
    def _template_head(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the template before a question, and those of them that follow a date."""
        before, _ = self._around_question(self._chat.date)
        if self._chat.date is None:
            return before, ()
        others = [self._around_question(date)[0][::-1] for date in PROBE_DATES]
        return before, _common_prefix([before[::-1], *others])[::-1]

    def _around_question(self, date: datetime.date | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the template before and after a question."""
        turns = ([{"role": "user", "content": text}] for text in _PROBE_QUESTIONS)
        probes = [self._ids(render(self._chat.tokenizer, turn, opening=True, date=date)) for turn in turns]
        before = _common_prefix(probes)
        return before, _common_prefix([probe[len(before) :][::-1] for probe in probes])[::-1]

    @cached_property
    def _prompt_endings(self) -> list[tuple[int, ...]]:
        """Ids of the template after a question: as it is, and with the thinking opened, closed or left unopened."""
        chat = self._chat
        _, after = self._around_question(chat.date)
        prompt = chat.prompt([{"role": "user", "content": PROBE_QUESTION}])
        base, _ = split_thinking_block(prompt, chat.think_start, chat.think_end)
        opened = "".join(chat.join(prompt, chat.think_start))
        closed = chat.before_answer if chat.think_end in chat.before_answer else ""
        question_end = len(self._ids(prompt)) - len(after)
        endings = [after]
        for text in (base, opened, base + chat.before_thinking + chat.think_start, base + closed):
            ids = self._ids(text)
            endings.append(ids[min(question_end, len(ids)) :])
        return endings

    def _opening(self, response: tuple[int, ...]) -> tuple[tuple[int, int], str] | None:
        """Span of the tag with which a response opens its thinking, and the tag that will close it.

        Only white space may precede the opening tag; None if the response does not open its thinking.
        """
        for start, end in self._chat.tag_forms:
            span = self._tag_span(response, start)
            if span is not None and not self._chat.tokenizer.decode(list(response[: span[0]])).strip():
                return span, end
        return None

    def _tag_span(self, tokens: tuple[int, ...], tag: str, last: bool = False) -> tuple[int, int] | None:
        """(start, stop) of the tokens that hold the first (or last) occurrence of ``tag``; None if there is none."""
        tokenizer = self._chat.tokenizer
        single = tokenizer.get_added_vocab().get(tag)
        if single is not None:
            if single not in tokens:
                return None
            position = len(tokens) - 1 - tokens[::-1].index(single) if last else tokens.index(single)
            return position, position + 1
        text = tokenizer.decode(list(tokens))
        offset = text.rfind(tag) if last else text.find(tag)
        if offset < 0:
            return None

        def characters(n: int) -> int:
            return len(tokenizer.decode(list(tokens[:n])))

        counts = range(len(tokens) + 1)
        return bisect_right(counts, offset, key=characters) - 1, bisect_left(counts, offset + len(tag), key=characters)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._chat.tokenizer(text, add_special_tokens=False)["input_ids"])


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest prefix that all sequences share."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return tuple(column[0] for column in same)


def _common_suffix(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """The longest suffix that both sequences share, reversed."""
    return _common_prefix([one[::-1], other[::-1]])


def _find(wanted: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Index of the first occurrence of ``wanted`` in ``tokens``; None if there is none or ``wanted`` is empty."""
    starts = range(len(tokens) - len(wanted) + 1)
    return next((i for i in starts if tokens[i : i + len(wanted)] == wanted), None) if wanted else None
