"""Conversations become traces: the target's own chat format, thinking kept, regions marked.

Many templates strip the thinking of past turns. So the template renders only what comes before the last response;
the response itself is appended as it stands, and ended with what the template would end it with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tl_adapters.data import DataError, Trace

Message = Mapping[str, str]
"""One turn: {"role": "user" or "assistant" or "system", "content": text}."""
Conversation = Sequence[Message]
"""Turns; the last is the assistant's response, thinking included."""

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
            Trace((*prompt, *ids), len(prompt), self._thinking_length(text, ids, conversation[-1]["content"]))
            for prompt, text, ids, conversation in zip(prompt_ids, responses, response_ids, conversations, strict=True)
        ]

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
    pairs: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase | None, max_tokens: int | None = None
) -> list[Trace]:
    """(question, response) pairs as traces, rendered in the tokenizer's chat template.

    The response is taken as it stands, thinking included, and ended as the template ends it. Documents longer than
    ``max_tokens`` are cut. Raises DataError where there is no chat template.
    """
    conversations = [
        ({"role": "user", "content": question}, {"role": "assistant", "content": response})
        for question, response in pairs
    ]
    traces = ChatFormat.of(tokenizer).encode(conversations)
    return [trace.cut(max_tokens) for trace in traces]
