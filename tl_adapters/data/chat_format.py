"""The target's chat format: conversations become documents and traces, with the thinking kept.

Many templates strip the thinking of past turns. Therefore the template renders only what precedes the last response;
the response itself is appended unchanged, with the text that the template would write before and after it. Where such
a document still differs from the template's own rendering, `template_differences` describes the difference.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tl_adapters.data.chat_template import (
    PROBE_ANSWER,
    PROBE_DATES,
    PROBE_QUESTION,
    PROBE_THINKING,
    THINK_TAGS,
    has_think_tags,
    render,
    split_thinking_block,
    template_date,
    text_between,
    think_tags_of,
    turn_end_of,
)
from tl_adapters.data.conversations import THINKING_FIELDS, Conversation, Document, Message, thinking_of
from tl_adapters.data.traces import DataError, Trace
from tl_adapters.utils.arguments import prompt_response_pairs


@dataclass(frozen=True)
class ChatFormat:
    """What a tokenizer's chat template writes around a response, found by rendering probes (`of`).

    The names and values of the fields are part of a run's fingerprint, so they must not be renamed.
    """

    tokenizer: PreTrainedTokenizerBase
    """The target's tokenizer, with its template."""
    turn_end: str
    """The text that ends a response: the template's text after it, through its first special token."""
    strips_thinking: bool
    """True if the template drops the thinking of a finished response."""
    opens_thinking: bool
    """True if the prompt already opens the thinking."""
    think_start: str = "<think>"
    """The tag that opens the thinking."""
    think_end: str = "</think>"
    """The tag that closes the thinking."""
    before_answer: str = ""
    """The text that the template writes between a prompt and a response without thinking."""
    before_thinking: str = ""
    """The text that the template writes between a prompt and a response that opens its thinking."""
    around_thinking: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    """The texts before thinking that has a field of its own, and between it and the answer."""
    date: datetime.date | None = None
    """The date that the template writes; None if it writes none."""

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase | None,
        think_start: str = "<think>",
        think_end: str = "</think>",
        date: datetime.date | None = None,
    ) -> ChatFormat:
        """The chat format of a tokenizer, found by rendering probes in its template.

        Args:
            tokenizer: the target's.
            think_start, think_end: the tags; the default ones stand for whichever of `THINK_TAGS` the target has.
            date: the date that a template which writes one is to write; None is the tokenizer's
                (`set_template_date`), or today's.

        Raises:
            DataError: there is no template, or it loses the question or the response.
        """
        if tokenizer is None or tokenizer.chat_template is None:
            what = "There is no tokenizer" if tokenizer is None else "The tokenizer has no chat template"
            raise DataError(f"{what}; traces cannot be rendered in the target's format. Give the target's tokenizer.")
        think_start, think_end = think_tags_of(tokenizer, think_start, think_end)
        date = date or template_date(tokenizer)
        question = {"role": "user", "content": PROBE_QUESTION}

        def whole(content: str, **fields: str) -> str:
            turns = [question, {"role": "assistant", "content": content, **fields}]
            return render(tokenizer, turns, opening=False, date=date)

        prompt = render(tokenizer, [question], opening=True, date=date)
        undated = prompt == render(tokenizer, [question], opening=True, date=PROBE_DATES[0])
        plain = whole(PROBE_ANSWER)
        thinking = whole(f"{think_start}\n{PROBE_THINKING}\n{think_end}\n\n{PROBE_ANSWER}")
        if PROBE_QUESTION not in prompt or PROBE_ANSWER not in thinking or PROBE_ANSWER not in plain:
            raise DataError("The tokenizer's chat template leaves out what was asked or answered; it cannot be used.")
        base, block = split_thinking_block(prompt, think_start, think_end)
        before_answer, before_thinking = _before_response(prompt, base, plain, thinking, (think_start, think_end))
        with_fields = (whole(PROBE_ANSWER, **{field: PROBE_THINKING}) for field in THINKING_FIELDS)
        return cls(
            tokenizer,
            turn_end=turn_end_of(tokenizer, thinking.rpartition(PROBE_ANSWER)[2]),
            strips_thinking=PROBE_THINKING not in thinking,
            opens_thinking=bool(block) and think_end not in block,
            think_start=think_start,
            think_end=think_end,
            before_answer=before_answer,
            before_thinking=before_thinking,
            around_thinking=_around_thinking(base, with_fields, think_start)
            or (f"{think_start}\n", f"\n{think_end}\n\n"),
            date=None if undated else date,
        )

    @property
    def end_tokens(self) -> list[int]:
        """Ids that end a response: the token at the template's end of a turn, and the end token."""
        pieces = self.tokenizer(self.turn_end, add_special_tokens=False)["input_ids"]
        return sorted({self.tokenizer.eos_token_id, *pieces[-1:]} - {None})

    @property
    def writes_thinking(self) -> bool:
        """True if the template or the added tokens show that the target thinks before it answers."""
        return self.opens_thinking or has_think_tags(self.tokenizer, self.think_end)

    @property
    def tag_forms(self) -> list[tuple[str, str]]:
        """The target's own think tags first, then the other forms that data may have."""
        return list(dict.fromkeys([(self.think_start, self.think_end), *THINK_TAGS]))

    # -- text -----------------------------------------------------------------------------------------------------

    def prompt(self, messages: Conversation, beginning: str = "") -> str:
        """The text that a model reads before it responds to the last of ``messages``, or continues ``beginning``.

        The tag that opens the thinking appears once, whether the template writes it, ``beginning`` does, or both.
        """
        field = next((f for f in THINKING_FIELDS if f in str(self.tokenizer.chat_template)), THINKING_FIELDS[0])
        turns = [{**m, field: thinking} if (thinking := thinking_of(m)) else m for m in messages]
        text = render(self.tokenizer, turns, opening=True, date=self.date)
        opens = beginning.lstrip().startswith(self.think_start)
        return "".join(self.join(text, beginning)) if opens else text + beginning

    def render(self, conversation: Conversation) -> tuple[str, str]:
        """The text of the prompt and that of the response; together they are the document."""
        document = self.document(conversation)
        return document.prompt, document.response

    def document(self, conversation: Conversation) -> Document:
        """The conversation as text, with the length of its thinking. Raises DataError if the template refuses it."""
        last = conversation[-1]
        given = self._with_thinking(last)
        prompt, response = self.join(self.prompt(conversation[:-1]), given)
        start, end = self._tags_of_response(given)
        head, tag, _ = response.partition(end)
        whole = self._ended(response)
        if tag:
            thinking = len(head) + len(tag)
        else:  # thinking that is never closed reaches to the last token; without an opening tag the text is an answer
            thinking = len(whole) if given.lstrip().startswith(start) else 0
        return Document(prompt, whole, thinking, last.get("domain", ""), last.get("republish", True))

    def join(self, prompt: str, response: str) -> tuple[str, str]:
        """A rendered prompt and (the beginning of) a response, changed so that the opening think tag appears once."""
        base, block = split_thinking_block(prompt, self.think_start, self.think_end)
        start, end = self._tags_of_response(response)
        opens, stripped = response.lstrip().startswith(start), response.lstrip()
        if block and self.think_end not in block:  # the prompt opens the thinking
            if stripped.startswith(self.think_start):
                rest = stripped[len(self.think_start) :]
                return prompt, rest.lstrip("\n") if prompt != prompt.rstrip() else rest
            if end in response:
                return prompt, response
            prompt = base  # the answer has no thinking, so none is opened
        elif block and opens:  # the prompt closes an empty thinking, but the response thinks
            prompt = base
        elif block:
            return prompt, response
        before = self.before_thinking if opens else self.before_answer
        if self.think_end in before:  # an empty thinking, with which the prompt of an answer without thinking ends
            return prompt + before, response
        return prompt, response if response.startswith(before) else before + response

    def _tags_of_response(self, response: str) -> tuple[str, str]:
        """The pair of tags with which a response opens its thinking; the target's own if it opens none."""
        stripped = response.lstrip()
        return next((tags for tags in self.tag_forms if stripped.startswith(tags[0])), self.tag_forms[0])

    def _with_thinking(self, message: Message) -> str:
        """A response's text, with the thinking from its separate field put before it."""
        content, thinking = message["content"], thinking_of(message)
        if thinking is None or self._tags_of_response(content)[1] in content:
            return content
        before, between = self.around_thinking
        stripped = thinking.strip("\n")
        # A response without content was cut off while the model was thinking, so its thinking stays open.
        answer = between + content.lstrip("\n") if content.strip() else ""
        return before + stripped + answer

    def _ended(self, response: str) -> str:
        """A response with its own ending if it has one, else with the template's."""
        ends = {self.turn_end.strip(), self.tokenizer.eos_token or self.turn_end}
        stripped = response.rstrip()
        return stripped if stripped.endswith(tuple(ends)) else response + self.turn_end

    # -- tokens ---------------------------------------------------------------------------------------------------

    def encode(self, conversations: Sequence[Conversation]) -> list[Trace]:
        """Traces of whole conversations, in their order."""
        return self.tokenize([self.document(conversation) for conversation in conversations])

    def tokenize(self, documents: Sequence[Document]) -> list[Trace]:
        """Traces of documents, in their order: the token ids of prompt and response.

        The text is tokenized as a whole, as the template's own rendering would be. If a token would then reach from
        the prompt into the response, both are tokenized separately: a model that responds has read the prompt's ids.
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
        return Trace(tuple(whole), n, thinking, document.domain, document.republish)


def _before_response(prompt: str, base: str, plain: str, thinking: str, tags: tuple[str, str]) -> tuple[str, str]:
    """What a template writes between a prompt and a response, without thinking and with it.

    Args:
        prompt, base: the rendered question, and the same without a thinking block at its end.
        plain, thinking: the rendered question with a response that does not think, and with one that does.
        tags: the think tags.
    """
    think_start, think_end = tags
    before_answer = text_between(prompt, plain, PROBE_ANSWER)
    if before_answer is None:
        before_answer = text_between(base, plain, PROBE_ANSWER) or ""
    before_thinking = text_between(base, thinking, think_start) if PROBE_THINKING in thinking else None
    if before_thinking is None:
        before_thinking = "" if think_end in before_answer else before_answer
    return before_answer, before_thinking


def _around_thinking(base: str, renderings: Iterable[str], think_start: str) -> tuple[str, str] | None:
    """How a template writes thinking from a separate field: the text before it, and between it and the answer."""
    for text in renderings:
        before = text_between(base, text, PROBE_THINKING)
        between = text_between(text.partition(PROBE_THINKING)[0] + PROBE_THINKING, text, PROBE_ANSWER)
        if before is not None and between is not None and think_start in before:
            return before, between
    return None


def encode_traces(
    pairs: Iterable[tuple[str, str] | Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase | None,
    max_tokens: int | None = None,
) -> list[Trace]:
    """Traces of (question, response) pairs, rendered in the tokenizer's chat template.

    Each response is kept as it is, thinking included, and ended as the template ends it.

    Args:
        pairs: (question, response), or rows {"prompt": ..., "response": ...} as data files have them.
        tokenizer: the target's.
        max_tokens: longer documents are cut to this many tokens; None cuts none.

    Raises:
        DataError: there is no chat template.
        ArgumentError: a pair has another form.
    """
    conversations = [
        ({"role": "user", "content": question}, {"role": "assistant", "content": response})
        for question, response in prompt_response_pairs(pairs)
    ]
    traces = ChatFormat.of(tokenizer).encode(conversations)
    return [trace.cut(max_tokens) for trace in traces]
