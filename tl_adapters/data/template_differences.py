"""Where documents differ from the chat template's own rendering of a whole conversation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

from tl_adapters.checkpoints.tokenizers import writes_bos
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.chat_template import PROBE_ANSWER, PROBE_QUESTION, PROBE_THINKING, render, split_thinking_block
from tl_adapters.data.conversations import Document, Message
from tl_adapters.data.traces import DataError


@dataclass(frozen=True)
class Difference:
    """One way in which documents differ from what the template itself would write."""

    message: str
    """The difference, as a sentence."""
    intended: bool
    """True if documents should differ: they hold what a model reads and writes when it responds."""

    def __str__(self) -> str:
        return self.message


def template_differences(chat: ChatFormat) -> list[Difference]:
    """Differences between documents in a chat format and the template's rendering of whole conversations."""
    user: Message = {"role": "user", "content": PROBE_QUESTION}
    answer = {"role": "assistant", "content": PROBE_ANSWER}
    thinks = {**answer, "content": PROBE_THINKING.join(chat.around_thinking) + PROBE_ANSWER}
    probes = {
        "a response without thinking": [user, answer],
        "a response with thinking": [user, thinks],
        "a second response": [user, answer, user, answer],
        "a conversation with a system turn": [{"role": "system", "content": "Be kind."}, user, answer],
    }
    differences: list[Difference] = []
    for what, turns in probes.items():
        try:
            rendering = render(chat.tokenizer, turns, opening=False, date=chat.date)
            document = chat.document(turns)
        except DataError:
            differences.append(Difference(f"The template refuses {what}.", intended=True))
            continue
        differences += _differences(chat, what, document, rendering)
    bos = chat.tokenizer.bos_token
    if writes_bos(chat.tokenizer) and not chat.prompt([user]).startswith(str(bos)):
        message = f"The tokenizer puts {bos!r} before a text, the template does not; documents have none."
        differences.append(Difference(message, intended=False))
    return list(dict.fromkeys(differences))


def _differences(chat: ChatFormat, what: str, document: Document, rendering: str) -> list[Difference]:
    """How ``document`` differs from ``rendering``, the template's text of the same conversation."""
    text = document.prompt + document.response
    if PROBE_THINKING in text and PROBE_THINKING not in rendering:
        message = "The template strips the thinking of a finished response; documents keep it."
        return [Difference(message, intended=True)]
    if not rendering.startswith(text):
        _, block = split_thinking_block(document.prompt, chat.think_start, chat.think_end)
        without_block = document.prompt[: -len(block)]
        if block and not rendering.startswith(document.prompt) and rendering.startswith(without_block):
            message = f"The template ends a prompt with {block!r}, which it does not write before a finished response"
            return [Difference(f"{message}; documents have it, because a model that responds has read it.", True)]
        first = next(i for i, (a, b) in enumerate(zip_longest(text, rendering)) if a != b)
        shown = slice(max(0, first - 20), first + 30)
        message = f"For {what} documents have {text[shown]!r} where the template writes {rendering[shown]!r}."
        return [Difference(message, intended=False)]
    differences = []
    if rest := rendering[len(text) :]:
        message = f"The template writes {rest!r} after the end of a response; documents stop before it."
        differences.append(Difference(message, intended=True))
    (trace,) = chat.tokenize([document])
    if tuple(chat.tokenizer(text, add_special_tokens=False)["input_ids"]) != trace.tokens:
        message = (
            f"For {what} a token of the whole text would reach from the prompt into the response; documents have the "
            "prompt's own ids, as a model that responds has read them."
        )
        differences.append(Difference(message, intended=True))
    return differences
