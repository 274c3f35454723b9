"""Conversations become traces: the target's own chat format, thinking kept, regions marked.

Many templates strip the thinking of past turns. So the template renders only what comes before the last response;
the response itself is appended as it stands, and ended with what the template would end it with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from tl_adapters.arguments import prompt_response_pairs
from tl_adapters.data import DataError, Trace

Message = Mapping[str, str]
"""One turn: {"role": "user" or "assistant" or "system", "content": text}; a response may name its "domain"."""
Conversation = Sequence[Message]
"""Turns; the last is the assistant's response, thinking included."""

TRACE_REGIONS = ("template", "question", "think_start", "thinking", "think_end", "answer", "end")
"""Where a token of a trace may stand: what the chat template writes around a question, the question (and whatever
turns came before it), the tags around the thinking, the thinking, the answer, and what ends a response."""

_QUESTION, _THOUGHT, _ANSWER = "what was asked", "what was thought", "what was answered"


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

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase | None, think_start: str = "<think>", think_end: str = "</think>"
    ) -> ChatFormat:
        """Probe a tokenizer. Raises DataError where it has no template, or one that loses the response."""
        if tokenizer is None or tokenizer.chat_template is None:
            what = "There is no tokenizer" if tokenizer is None else "The tokenizer has no chat template"
            raise DataError(f"{what}; traces cannot be rendered in the target's format. Give the target's tokenizer.")
        question = {"role": "user", "content": _QUESTION}
        response = f"{think_start}\n{_THOUGHT}\n{think_end}\n\n{_ANSWER}"
        prompt = _render(tokenizer, [question], opening=True)
        whole = _render(tokenizer, [question, {"role": "assistant", "content": response}], opening=False)
        if _QUESTION not in prompt or _ANSWER not in whole:
            raise DataError("The tokenizer's chat template leaves out what was asked or answered; it cannot be used.")
        return cls(
            tokenizer,
            turn_end=_turn_end(tokenizer, whole.rpartition(_ANSWER)[2]),
            strips_thinking=_THOUGHT not in whole,
            opens_thinking=prompt.rstrip().endswith(think_start),
            think_start=think_start,
            think_end=think_end,
        )

    @property
    def end_tokens(self) -> list[int]:
        """Ids that end a response: the template's end of a turn, where it is one token, and the end token."""
        pieces = self.tokenizer(self.turn_end, add_special_tokens=False)["input_ids"]
        ends = {self.tokenizer.eos_token_id, *(pieces if len(pieces) == 1 else [])}
        return sorted(ends - {None})

    def prompt(self, messages: Conversation) -> str:
        """What a model reads before it responds to the last of ``messages``."""
        return _render(self.tokenizer, messages, opening=True)

    def render(self, conversation: Conversation) -> tuple[str, str]:
        """The prompt's text and the response's, which together are the document."""
        prompt = self.prompt(conversation[:-1])
        response = conversation[-1]["content"]
        if self.opens_thinking:
            head = prompt.rstrip()
            if response.lstrip().startswith(self.think_start):  # else the tag would stand there twice
                response = response.lstrip()[len(self.think_start) :]
                response = response.lstrip("\n") if prompt != head else response
            elif self.think_end not in response:  # an answer without thinking: nothing is to be opened
                prompt = head[: -len(self.think_start)]
        return prompt, response + self.turn_end

    def encode(self, conversations: Sequence[Conversation]) -> list[Trace]:
        """Traces of whole conversations, in their order."""
        if not conversations:
            return []
        prompts, responses = zip(*(self.render(c) for c in conversations), strict=True)
        prompt_ids = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        response_ids = self.tokenizer(list(responses), add_special_tokens=False)["input_ids"]
        return [
            Trace(
                (*prompt, *ids),
                len(prompt),
                self._thinking_length(text, ids, conversation[-1]["content"]),
                conversation[-1].get("domain", ""),
            )
            for prompt, text, ids, conversation in zip(prompt_ids, responses, response_ids, conversations, strict=True)
        ]

    def regions(self, trace: Trace) -> list[int]:
        """Region of every token of a trace, as indices into `TRACE_REGIONS`."""
        template, question, think_start, thinking, think_end, answer, end = range(len(TRACE_REGIONS))
        prompt, response = trace.tokens[: trace.prompt_length], trace.tokens[trace.prompt_length :]
        before, after, opening, closing, ending = self._edges
        codes = [question] * len(prompt)
        head = len(_shared_start([prompt, before]))
        codes[:head] = [template] * head
        # An answer without thinking: there `render` has left out a tag that the prompt would open.
        tag = _find(opening, after) if self.opens_thinking else None
        tails = [len(_shared_start([prompt[::-1], end_[::-1]])) for end_ in (after, after[:tag])]
        tail, opened = max(tails), tag is not None and tails[0] > tails[1]
        codes[len(prompt) - tail :] = [template] * tail
        if tag is not None and opened:
            start = len(prompt) - len(after) + tag
            codes[start : start + len(opening)] = [think_start] * len(opening)
        codes += [answer] * len(response)
        inside = len(prompt)
        if not opened and response[: len(opening)] == opening:
            codes[inside : inside + len(opening)] = [think_start] * len(opening)
            opened, inside = True, inside + len(opening)
        if opened or trace.thinking_length:
            place = _find(closing, trace.tokens[inside:])
            stop = inside + place if place is not None else len(prompt) + (trace.thinking_length or len(response))
            codes[inside:stop] = [thinking] * (stop - inside)
            if place is not None:
                codes[stop : stop + len(closing)] = [think_end] * len(closing)
        if ending and response[-len(ending) :] == ending:
            codes[-len(ending) :] = [end] * len(ending)
        elif response and response[-1] in self.end_tokens:
            codes[-1] = end
        return codes

    @cached_property
    def _edges(self) -> tuple[tuple[int, ...], ...]:
        """Ids of the template before and after a question, of both tags, and of what ends a response."""
        encode = lambda text: tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
        probes = [encode(self.prompt([{"role": "user", "content": text}])) for text in ("apple tart", "7 = x", "Why?")]
        before = _shared_start(probes)
        after = _shared_start([probe[len(before) :][::-1] for probe in probes])[::-1]
        return before, after, encode(self.think_start), encode(self.think_end), encode(self.turn_end)

    def _thinking_length(self, response: str, ids: Sequence[int], as_given: str) -> int:
        head, tag, _ = response.partition(self.think_end)
        if not tag:
            # Thinking that never ends is thinking to the last token; without an opening tag it is an answer.
            return len(ids) if as_given.lstrip().startswith(self.think_start) else 0
        end = self.tokenizer.get_added_vocab().get(self.think_end)
        if end in ids:
            return list(ids).index(end) + 1
        return min(len(ids), len(self.tokenizer(head + tag, add_special_tokens=False)["input_ids"]))


def _render(tokenizer: PreTrainedTokenizerBase, messages: Conversation, opening: bool) -> str:
    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=opening)
    except Exception as error:  # templates raise in their own words, in several classes
        roles = [m["role"] for m in messages]
        raise DataError(f"The chat template refuses a conversation of roles {roles}: {error}") from error


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
    places = [(after.index(token), token) for token in tokenizer.get_added_vocab() if token in after]
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
