"""Conversations become traces: the target's own chat format, thinking kept, regions marked.

Many templates strip the thinking of past turns. So the template renders only what comes before the last response;
the response itself is appended as it stands, with what the template would write before it and after it. Where such a
document still differs from the template's own rendering of the whole, `ChatFormat.differences` says so.
"""

from __future__ import annotations

import datetime
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import takewhile, zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from tl_adapters.checkpoints.tokenizers import writes_bos
from tl_adapters.data.traces import DataError, Trace
from tl_adapters.utils.arguments import prompt_response_pairs

Message = Mapping[str, str]
"""One turn: {"role": "user" or "assistant" or "system", "content": text}; an assistant's may have its thinking in a
field of its own (`THINKING_FIELDS`), and a response may name its "domain"."""
Conversation = Sequence[Message]
"""Turns; the last is the assistant's response, thinking included."""

TRACE_REGIONS = ("template", "question", "think_start", "thinking", "think_end", "answer", "end")
"""Where a token of a trace may stand: what the chat template writes around a question, the question (and whatever
turns came before it), the tags around the thinking, the thinking, the answer, and what ends a response."""
THINKING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names of the field that holds a turn's thinking (DeepSeek's and vLLM's API, Qwen3's template, TRL, gpt-oss)."""
THINK_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)
"""Forms of the tags around thinking that published models and data sets use."""

_QUESTION, _THOUGHT, _ANSWER = "what was asked", "what was thought", "what was answered"
_BREAK, _CLOCK = "\n", "strftime_now"
_DATE = "_tl_adapters_template_date"
"""Attribute of a tokenizer: the date that its template writes (`set_template_date`)."""
_OTHER_DATES = (datetime.date(1996, 2, 29), datetime.date(2031, 10, 17))  # no two parts of which are the same


@dataclass(frozen=True)
class Document:
    """A conversation as text."""

    prompt: str
    """What the model reads before it responds."""
    response: str
    """What it then writes, its end token included."""
    thinking: int
    """How many characters of the response are thinking, its tags included."""
    domain: str = ""
    """What the document is about, where the data says so."""


@dataclass(frozen=True)
class Difference:
    """Where documents are not what the template itself would write."""

    says: str
    """What differs, as a sentence."""
    meant: bool
    """It is as it should be: documents are what a model reads and writes when it responds."""

    def __str__(self) -> str:
        return self.says


@dataclass(frozen=True)
class ChatFormat:
    """What a tokenizer's chat template does to a response, found out by rendering one."""

    tokenizer: PreTrainedTokenizerBase
    """The target's tokenizer, with its template."""
    turn_end: str
    """What ends a response: the template's text after it, up to its first special token."""
    strips_thinking: bool
    """The template drops the thinking of a finished response."""
    opens_thinking: bool
    """The prompt itself already opens the thinking."""
    think_start: str = "<think>"
    """What opens the thinking."""
    think_end: str = "</think>"
    """What ends it."""
    before_answer: str = ""
    """What the template writes between a prompt and a response without thinking."""
    before_thinking: str = ""
    """Likewise before a response that opens its thinking."""
    around_thinking: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    """What stands before thinking from a field of its own, and between it and the answer."""
    date: datetime.date | None = None
    """The date that the template writes; None where it writes none."""

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase | None,
        think_start: str = "<think>",
        think_end: str = "</think>",
        date: datetime.date | None = None,
    ) -> ChatFormat:
        """Probe a tokenizer. Raises DataError where it has no template, or one that loses the response.

        Args:
            tokenizer: the target's.
            think_start, think_end: the tags; the default ones stand for whichever of `THINK_TAGS` the target has.
            date: what a template that writes the date is to write; None is the tokenizer's (`set_template_date`), or
                today's.
        """
        if tokenizer is None or tokenizer.chat_template is None:
            what = "There is no tokenizer" if tokenizer is None else "The tokenizer has no chat template"
            raise DataError(f"{what}; traces cannot be rendered in the target's format. Give the target's tokenizer.")
        think_start, think_end = _tags_of(tokenizer, think_start, think_end)
        date = date or getattr(tokenizer, _DATE, None) or _today()
        question = {"role": "user", "content": _QUESTION}

        def whole(content: str, **fields: str) -> str:
            turns = [question, {"role": "assistant", "content": content, **fields}]
            return _render(tokenizer, turns, opening=False, date=date)

        prompt = _render(tokenizer, [question], opening=True, date=date)
        plain, thinking = whole(_ANSWER), whole(f"{think_start}\n{_THOUGHT}\n{think_end}\n\n{_ANSWER}")
        if _QUESTION not in prompt or _ANSWER not in thinking or _ANSWER not in plain:
            raise DataError("The tokenizer's chat template leaves out what was asked or answered; it cannot be used.")
        base, block = _thinking_block(prompt, think_start, think_end)
        before_answer = _between(prompt, plain, _ANSWER)
        if before_answer is None:
            before_answer = _between(base, plain, _ANSWER) or ""
        before_thinking = _between(base, thinking, think_start) if _THOUGHT in thinking else None
        if before_thinking is None:
            before_thinking = "" if think_end in before_answer else before_answer
        return cls(
            tokenizer,
            turn_end=_turn_end(tokenizer, thinking.rpartition(_ANSWER)[2]),
            strips_thinking=_THOUGHT not in thinking,
            opens_thinking=bool(block) and think_end not in block,
            think_start=think_start,
            think_end=think_end,
            before_answer=before_answer,
            before_thinking=before_thinking,
            around_thinking=_around(base, (whole(_ANSWER, **{f: _THOUGHT}) for f in THINKING_FIELDS), think_start)
            or (f"{think_start}\n", f"\n{think_end}\n\n"),
            date=None if prompt == _render(tokenizer, [question], opening=True, date=_OTHER_DATES[0]) else date,
        )

    @property
    def end_tokens(self) -> list[int]:
        """Ids that end a response: the token at the template's end of a turn, and the end token."""
        pieces = self.tokenizer(self.turn_end, add_special_tokens=False)["input_ids"]
        return sorted({self.tokenizer.eos_token_id, *pieces[-1:]} - {None})

    @property
    def writes_thinking(self) -> bool:
        """Does the target think before it answers, as far as its template and its tokens tell?"""
        return self.opens_thinking or _has_tags(self.tokenizer, self.think_end)

    def prompt(self, messages: Conversation, beginning: str = "") -> str:
        """What a model reads before it responds to the last of ``messages``, or goes on with ``beginning``.

        A tag that opens the thinking stands once, whether the template writes it, ``beginning`` does, or both.
        """
        field = next((f for f in THINKING_FIELDS if f in str(self.tokenizer.chat_template)), THINKING_FIELDS[0])
        turns = [{**m, field: thought} if (thought := _thought(m)) else m for m in messages]
        text = _render(self.tokenizer, turns, opening=True, date=self.date)
        opens = beginning.lstrip().startswith(self.think_start)
        return "".join(self._join(text, beginning)) if opens else text + beginning

    def render(self, conversation: Conversation) -> tuple[str, str]:
        """The prompt's text and the response's, which together are the document."""
        document = self.document(conversation)
        return document.prompt, document.response

    def document(self, conversation: Conversation) -> Document:
        """The conversation as text, with the length of its thinking. Raises DataError where the template refuses."""
        last = conversation[-1]
        given = self._with_thinking(last)
        prompt, response = self._join(self.prompt(conversation[:-1]), given)
        start, end = self._tags(given)
        head, tag, _ = response.partition(end)
        whole = self._ended(response)
        if tag:
            thinking = len(head) + len(tag)
        else:  # thinking that never ends is thinking to the last token; without an opening tag it is an answer
            thinking = len(whole) if given.lstrip().startswith(start) else 0
        return Document(prompt, whole, thinking, last.get("domain", ""))

    def encode(self, conversations: Sequence[Conversation]) -> list[Trace]:
        """Traces of whole conversations, in their order."""
        return self.tokenize([self.document(conversation) for conversation in conversations])

    def tokenize(self, documents: Sequence[Document]) -> list[Trace]:
        """Documents as traces: the ids of prompt and response, as the model reads the one and writes the other.

        The text is tokenized as a whole, as the template's own rendering would be. Where a token would reach from the
        prompt into the response, both are tokenized on their own: a model that responds has read the prompt's ids.
        """
        if not documents:
            return []
        prompts = self.tokenizer([d.prompt for d in documents], add_special_tokens=False)["input_ids"]
        together = self.tokenizer([d.prompt + d.response for d in documents], add_special_tokens=False)
        return [
            self._trace(document, prompt, together, row)
            for row, (document, prompt) in enumerate(zip(documents, prompts, strict=True))
        ]

    def _trace(self, document: Document, prompt: list[int], together: Any, row: int) -> Trace:
        whole, n, shift = together["input_ids"][row], len(prompt), len(document.prompt)
        if whole[:n] != prompt or not self.tokenizer.is_fast:
            together = self.tokenizer([document.response], add_special_tokens=False)
            whole, row, shift = [*prompt, *together["input_ids"][0]], 0, 0
        if not document.thinking:
            thinking = 0
        elif document.thinking == len(document.response):
            thinking = len(whole) - n
        elif self.tokenizer.is_fast:
            last = together.char_to_token(row, shift + document.thinking - 1)
            thinking = last + 1 - (n if shift else 0)
        else:
            head = self.tokenizer(document.response[: document.thinking], add_special_tokens=False)["input_ids"]
            thinking = min(len(whole) - n, len(head))
        return Trace(tuple(whole), n, thinking, document.domain)

    def differences(self) -> list[Difference]:
        """Where documents differ from the template's own rendering of a whole conversation."""
        user: Message = {"role": "user", "content": _QUESTION}
        found: list[Difference] = []
        answer = {"role": "assistant", "content": _ANSWER}
        thinks = {**answer, "content": _THOUGHT.join(self.around_thinking) + _ANSWER}
        probes = {
            "a response without thinking": [user, answer],
            "a response with thinking": [user, thinks],
            "a second response": [user, answer, user, answer],
            "a conversation with a system turn": [{"role": "system", "content": "Be kind."}, user, answer],
        }
        for what, turns in probes.items():
            try:
                template = _render(self.tokenizer, turns, opening=False, date=self.date)
                ours = self.document(turns)
            except DataError:
                found.append(Difference(f"The template refuses {what}.", meant=True))
                continue
            found += self._difference(what, ours, template)
        bos = self.tokenizer.bos_token
        if writes_bos(self.tokenizer) and not self.prompt([user]).startswith(str(bos)):
            says = f"The tokenizer puts {bos!r} before a text, the template does not; documents have none."
            found.append(Difference(says, meant=False))
        return list(dict.fromkeys(found))

    def _difference(self, what: str, ours: Document, template: str) -> list[Difference]:
        text = ours.prompt + ours.response
        if _THOUGHT in text and _THOUGHT not in template:
            says = "The template strips the thinking of a finished response; documents keep it."
            return [Difference(says, meant=True)]
        if not template.startswith(text):
            _, block = _thinking_block(ours.prompt, self.think_start, self.think_end)
            if block and not template.startswith(ours.prompt) and template.startswith(ours.prompt[: -len(block)]):
                says = f"The template ends a prompt with {block!r}, which it does not write before a finished response"
                return [Difference(f"{says}; documents have it, as a model has read it that responds.", meant=True)]
            place = next(i for i, (a, b) in enumerate(zip_longest(text, template)) if a != b)
            shown = slice(max(0, place - 20), place + 30)
            says = f"For {what} documents have {text[shown]!r} where the template writes {template[shown]!r}."
            return [Difference(says, meant=False)]
        found = []
        if rest := template[len(text) :]:
            says = f"The template writes {rest!r} after the end of a response; documents stop before it."
            found.append(Difference(says, meant=True))
        (trace,) = self.tokenize([ours])
        if tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) != trace.tokens:
            says = f"For {what} a token of the whole text would reach from the prompt into the response; documents "
            found.append(Difference(f"{says}have the prompt's own ids, as a model that responds has.", meant=True))
        return found

    def regions(self, trace: Trace) -> list[int]:
        """Region of every token of a trace, as indices into `TRACE_REGIONS`."""
        template, question, think_start, thinking, think_end, answer, end = range(len(TRACE_REGIONS))
        prompt, response = trace.tokens[: trace.prompt_length], trace.tokens[trace.prompt_length :]
        codes = [question] * len(prompt) + [answer] * len(response)
        head = self._head(prompt)
        codes[:head] = [template] * head
        begun = self._begun(prompt)
        # A prompt may end as the template ends it, or with its thinking opened, closed or left unopened.
        tail = max(len(_shared_start([prompt[:begun][::-1], ending[::-1]])) for ending in self._prompt_ends)
        begin = begun - tail
        codes[begin:begun] = [template] * tail
        codes[begun : len(prompt)] = [thinking] * (len(prompt) - begun)
        opening = self._span(prompt[begin:begun], self.think_start)
        opened = opening is not None and self._span(prompt[begin + opening[1] : begun], self.think_end) is None
        if opening is not None and opened:
            codes[begin + opening[0] : begin + opening[1]] = [think_start] * (opening[1] - opening[0])
        inside, closing = len(prompt), self.think_end
        if not opened and (found := self._opening(response)) is not None:
            (start, stop), closing = found
            codes[inside : inside + start] = [template] * start
            codes[inside + start : inside + stop] = [think_start] * (stop - start)
            opened, inside = True, inside + stop
        if opened or trace.thinking_length:
            place = self._span(trace.tokens[inside:], closing)
            stop = inside + place[0] if place else len(prompt) + (trace.thinking_length or len(response))
            codes[inside:stop] = [thinking] * (stop - inside)
            if place:
                codes[stop : inside + place[1]] = [think_end] * (place[1] - place[0])
        ending = self._ids(self.turn_end)
        if ending and response[-len(ending) :] == ending:
            codes[-len(ending) :] = [end] * len(ending)
        elif response and response[-1] in self.end_tokens:
            codes[-1] = end
        return codes

    def _begun(self, prompt: tuple[int, ...]) -> int:
        """Where the template's part of a prompt ends: before thinking that was put into the prompt (a prefill)."""
        span = self._span(prompt, self.think_start, last=True)
        if span is None or self._span(prompt[span[1] :], self.think_end) is not None:
            return len(prompt)
        if any(len(end) > 1 and prompt[-len(end) :] == end for end in self._prompt_ends):
            return len(prompt)  # the template's own
        before = max(len(_shared_start([prompt[: span[1]][::-1], end[::-1]])) for end in self._prompt_ends)
        return span[1] if before > span[1] - span[0] else len(prompt)  # else a tag that somebody asks about

    def _head(self, prompt: tuple[int, ...]) -> int:
        """How many of a prompt's tokens the template writes before the question."""
        (before, after_date) = self._before
        head = len(_shared_start([prompt, before]))
        if after_date and head < len(before):  # the template of another day
            place = _find(after_date, prompt[head : len(before) + len(after_date) + 8])
            return head if place is None else head + place + len(after_date)
        return head

    @cached_property
    def _before(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the template before a question; and of these, those after a date that it writes."""
        before, _ = self._edges(self.date)
        if self.date is None:
            return before, ()
        others = [self._edges(date)[0][::-1] for date in _OTHER_DATES]
        return before, _shared_start([before[::-1], *others])[::-1]

    def _edges(self, date: datetime.date | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the template before and after a question."""
        asked = ([{"role": "user", "content": text}] for text in ("apple tart", "7 = x", "Why?"))
        probes = [self._ids(_render(self.tokenizer, turns, opening=True, date=date)) for turns in asked]
        before = _shared_start(probes)
        return before, _shared_start([probe[len(before) :][::-1] for probe in probes])[::-1]

    @cached_property
    def _prompt_ends(self) -> list[tuple[int, ...]]:
        """Ids of the template after a question: as it is, and with the thinking opened, closed or left unopened."""
        _, after = self._edges(self.date)
        prompt = self.prompt([{"role": "user", "content": _QUESTION}])
        base, _ = _thinking_block(prompt, self.think_start, self.think_end)
        opened = "".join(self._join(prompt, self.think_start))
        closed = self.before_answer if self.think_end in self.before_answer else ""
        tail = len(after)
        whole = self._ids(prompt)
        ends = [after]
        for text in (base, opened, base + self.before_thinking + self.think_start, base + closed):
            ids = self._ids(text)
            ends.append(ids[min(len(whole) - tail, len(ids)) :])
        return ends

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _opening(self, response: tuple[int, ...]) -> tuple[tuple[int, int], str] | None:
        """Where a response opens its thinking, with nothing but spaces before; and the tag that will end it."""
        for start, end in self._forms:
            span = self._span(response, start)
            if span is not None and not self.tokenizer.decode(list(response[: span[0]])).strip():
                return span, end
        return None

    def _span(self, tokens: tuple[int, ...], tag: str, last: bool = False) -> tuple[int, int] | None:
        """First and last token (and one) that hold ``tag``, where it stands first in ``tokens``, or last."""
        single = self.tokenizer.get_added_vocab().get(tag)
        if single is not None:
            if single not in tokens:
                return None
            place = len(tokens) - 1 - tokens[::-1].index(single) if last else tokens.index(single)
            return place, place + 1
        text = self.tokenizer.decode(list(tokens))
        at = text.rfind(tag) if last else text.find(tag)
        if at < 0:
            return None

        def characters(n: int) -> int:
            return len(self.tokenizer.decode(list(tokens[:n])))

        places = range(len(tokens) + 1)
        return bisect_right(places, at, key=characters) - 1, bisect_left(places, at + len(tag), key=characters)

    @property
    def _forms(self) -> list[tuple[str, str]]:
        """The target's own tags first, then the other forms that data may have."""
        return list(dict.fromkeys([(self.think_start, self.think_end), *THINK_TAGS]))

    def _tags(self, response: str) -> tuple[str, str]:
        """The form of the tags that a response opens its thinking with; the target's own where it opens none."""
        begins = response.lstrip()
        return next((tags for tags in self._forms if begins.startswith(tags[0])), self._forms[0])

    def _with_thinking(self, message: Message) -> str:
        """A response's text with the thinking that it has in a field of its own."""
        content, thought = message["content"], _thought(message)
        if thought is None or self._tags(content)[1] in content:
            return content
        before, between = self.around_thinking
        answer = f"{between}{content.lstrip(_BREAK)}" if content.strip() else ""  # it was cut off while it thought
        return f"{before}{thought.strip(_BREAK)}{answer}"

    def _join(self, prompt: str, text: str) -> tuple[str, str]:
        """A rendered prompt and (the beginning of) a response, so that what opens the thinking stands once."""
        base, block = _thinking_block(prompt, self.think_start, self.think_end)
        start, end = self._tags(text)
        opens, begins = text.lstrip().startswith(start), text.lstrip()
        if block and self.think_end not in block:  # the prompt opens the thinking
            if begins.startswith(self.think_start):
                rest = begins[len(self.think_start) :]
                return prompt, rest.lstrip("\n") if prompt != prompt.rstrip() else rest
            if end in text:
                return prompt, text
            prompt = base  # an answer without thinking: nothing is to be opened
        elif block and opens:  # the prompt closes a thinking that the response has
            prompt = base
        elif block:
            return prompt, text
        before = self.before_thinking if opens else self.before_answer
        if self.think_end in before:  # an empty thinking: what a prompt to an answer without thinking ends with
            return prompt + before, text
        return prompt, text if text.startswith(before) else before + text

    def _ended(self, response: str) -> str:
        """A response with its end: its own where it has one, else what the template writes."""
        ends = {self.turn_end.strip(), self.tokenizer.eos_token or self.turn_end}
        stripped = response.rstrip()
        return stripped if stripped.endswith(tuple(ends)) else response + self.turn_end


def set_template_date(tokenizer: PreTrainedTokenizerBase | None, date: datetime.date | None) -> None:
    """Let a template that writes the date write ``date`` wherever ``tokenizer`` renders: a run's own, not today's."""
    if tokenizer is not None and date is not None:
        setattr(tokenizer, _DATE, date)


def _today() -> datetime.date:
    return datetime.date.today()


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, opening: bool, date: datetime.date | None
) -> str:
    template = tokenizer.get_chat_template()
    if date is not None and _CLOCK in template:
        template = _clock(date) + template
    try:
        return tokenizer.apply_chat_template(
            [dict(m) for m in messages], chat_template=template, tokenize=False, add_generation_prompt=opening
        )
    except Exception as error:  # templates raise in their own words, in several classes
        roles = [m["role"] for m in messages]
        raise DataError(f"The chat template refuses a conversation of roles {roles}: {error}") from error


@lru_cache
def _clock(date: datetime.date) -> str:
    """A template's definition of the function that it reads the date from: one run must not read two days.

    Written as a macro: transformers turns what it is given for a template's own functions into plain data.
    """
    at = datetime.datetime.combine(date, datetime.time())
    fields = [f"%{flag}{letter}" for letter in "aAbBcdeDfFGHIjklmMnpPrRsStTuUVwWxXyYzZ" for flag in ("", "-")]
    values = {field: at.strftime(field) for field in [*fields, "%%"]}
    table = ", ".join(f"({json.dumps(field)}, {json.dumps(value)})" for field, value in values.items())
    return (
        f"{{%- macro {_CLOCK}(format) -%}}{{%- set now = namespace(text=format) -%}}"
        f"{{%- for field, value in [{table}] -%}}{{%- set now.text = now.text | replace(field, value) -%}}"
        "{%- endfor -%}{{- now.text -}}{%- endmacro %}\n"
    )


def _has_tags(tokenizer: PreTrainedTokenizerBase, think_end: str) -> bool:
    return think_end in str(tokenizer.chat_template) or think_end in tokenizer.get_added_vocab()


def _tags_of(tokenizer: PreTrainedTokenizerBase, start: str, end: str) -> tuple[str, str]:
    """The tags that are named; for the default ones, those of `THINK_TAGS` that template or tokens have."""
    if (start, end) != THINK_TAGS[0] or _has_tags(tokenizer, end):
        return start, end
    return next((tags for tags in THINK_TAGS if _has_tags(tokenizer, tags[1])), (start, end))


def _thinking_block(prompt: str, start: str, end: str) -> tuple[str, str]:
    """A prompt without the thinking that its end opens, or opens and closes again; and the text of that."""
    stripped = prompt.rstrip()
    if stripped.endswith(start):
        place = len(stripped) - len(start)
        return prompt[:place], prompt[place:]
    if stripped.endswith(end):
        place = stripped.rfind(start)
        if place >= 0 and not stripped[place + len(start) : -len(end)].strip():
            return prompt[:place], prompt[place:]
    return prompt, ""


def _between(before: str, text: str, after: str) -> str | None:
    """What ``text`` has between ``before``, with which it begins, and ``after``; None where it does not begin so."""
    if not text.startswith(before) or after not in text[len(before) :]:
        return None
    return text[len(before) : text.index(after, len(before))]


def _around(base: str, renderings: Iterable[str], think_start: str) -> tuple[str, str] | None:
    """How a template that knows a field for thinking writes it: the text before it, and between it and the answer."""
    for text in renderings:
        before, between = (
            _between(base, text, _THOUGHT),
            _between(text.partition(_THOUGHT)[0] + _THOUGHT, text, _ANSWER),
        )
        if before is not None and between is not None and think_start in before:
            return before, between
    return None


def _thought(message: Message) -> str | None:
    """The thinking that a turn has in a field of its own."""
    return next((message[field] for field in THINKING_FIELDS if message.get(field)), None)


def _shared_start(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest beginning that all have."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return tuple(column[0] for column in same)


def _find(wanted: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Where ``wanted`` first stands in ``tokens``."""
    places = range(len(tokens) - len(wanted) + 1)
    return next((i for i in places if tokens[i : i + len(wanted)] == wanted), None) if wanted else None


def _turn_end(tokenizer: PreTrainedTokenizerBase, after: str) -> str:
    """The template's text after a response, up to and with its first special token; else the end token."""
    # Spaces and line breaks may be added tokens (Gemma's are); they end nothing.
    added = [token for token in tokenizer.get_added_vocab() if token.strip()]
    places = [(after.index(token), token) for token in added if token in after]
    if places:
        start, token = min(places, key=lambda place: (place[0], -len(place[1])))
        return after[:start] + token
    if tokenizer.eos_token is None:
        raise DataError("Neither the chat template nor the tokenizer has an end token; responses would never end.")
    return tokenizer.eos_token


def encode_traces(
    pairs: Iterable[tuple[str, str] | Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase | None,
    max_tokens: int | None = None,
) -> list[Trace]:
    """(question, response) pairs as traces, rendered in the tokenizer's chat template.

    Rows {"prompt": ..., "response": ...}, as our data files have them, are pairs too.
    The response is taken as it stands, thinking included, and ended as the template ends it. Documents longer than
    ``max_tokens`` are cut. Raises DataError where there is no chat template, ArgumentError for other rows.
    """
    conversations = [
        ({"role": "user", "content": question}, {"role": "assistant", "content": response})
        for question, response in prompt_response_pairs(pairs)
    ]
    traces = ChatFormat.of(tokenizer).encode(conversations)
    return [trace.cut(max_tokens) for trace in traces]
