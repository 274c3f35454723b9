"""A tokenizer's chat template: rendering with a fixed date, its thinking tags, and the token that ends a turn."""

from __future__ import annotations

import datetime
import json
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from tl_adapters.data.conversations import Conversation
from tl_adapters.data.traces import DataError

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
"""Pairs of tags around thinking that published models and data sets use."""
_DATE_FUNCTION = "strftime_now"
"""The function from which a template reads today's date."""
_DATE_ATTRIBUTE = "_tl_adapters_template_date"
"""Attribute of a tokenizer that holds the date its template writes (`set_template_date`)."""
PROBE_DATES = (datetime.date(1996, 2, 29), datetime.date(2031, 10, 17))
"""Two dates without a common year, month, day or weekday: where their renderings differ, the template writes a date."""
PROBE_QUESTION, PROBE_THINKING, PROBE_ANSWER = "what was asked", "what was thought", "what was answered"
"""Texts that are rendered in a template to find out what it writes around them."""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, opening: bool, date: datetime.date | None
) -> str:
    """The text of a conversation in the chat template.

    Args:
        tokenizer: has the template.
        messages: the turns.
        opening: end with what the template writes before a response (``add_generation_prompt``).
        date: the date that the template writes, if it writes one; None is the day on which this is called.

    Raises:
        DataError: the template refuses the conversation.
    """
    template = tokenizer.get_chat_template()
    if date is not None and _DATE_FUNCTION in template:
        template = _date_macro(date) + template
    try:
        return tokenizer.apply_chat_template(
            [dict(m) for m in messages], chat_template=template, tokenize=False, add_generation_prompt=opening
        )
    except Exception as error:  # templates raise several classes, with messages of their own
        roles = [m["role"] for m in messages]
        raise DataError(f"The chat template refuses a conversation of roles {roles}: {error}") from error


@lru_cache
def _date_macro(date: datetime.date) -> str:
    """A template's definition of `strftime_now` that always returns ``date``, so that a run reads one day only.

    It is a macro, because transformers converts what it is given for a template's own functions into plain data.
    """
    midnight = datetime.datetime.combine(date, datetime.time())
    directives = [f"%{flag}{letter}" for letter in "aAbBcdeDfFGHIjklmMnpPrRsStTuUVwWxXyYzZ" for flag in ("", "-")]
    values = {directive: midnight.strftime(directive) for directive in [*directives, "%%"]}
    table = ", ".join(f"({json.dumps(directive)}, {json.dumps(value)})" for directive, value in values.items())
    return (
        f"{{%- macro {_DATE_FUNCTION}(format) -%}}{{%- set now = namespace(text=format) -%}}"
        f"{{%- for field, value in [{table}] -%}}{{%- set now.text = now.text | replace(field, value) -%}}"
        "{%- endfor -%}{{- now.text -}}{%- endmacro %}\n"
    )


def set_template_date(tokenizer: PreTrainedTokenizerBase | None, date: datetime.date | None) -> None:
    """Fix the date that a template which writes one writes for ``tokenizer``: a run's own date instead of today's."""
    if tokenizer is not None and date is not None:
        setattr(tokenizer, _DATE_ATTRIBUTE, date)


def template_date(tokenizer: PreTrainedTokenizerBase) -> datetime.date:
    """The date set by `set_template_date`, else today's."""
    return getattr(tokenizer, _DATE_ATTRIBUTE, None) or _today()


def _today() -> datetime.date:
    return datetime.date.today()


def has_think_tags(tokenizer: PreTrainedTokenizerBase, think_end: str) -> bool:
    """True if the template or the added tokens hold the tag that closes the thinking."""
    return think_end in str(tokenizer.chat_template) or think_end in tokenizer.get_added_vocab()


def think_tags_of(tokenizer: PreTrainedTokenizerBase, start: str, end: str) -> tuple[str, str]:
    """The given tags; for the default ones, the first pair of `THINK_TAGS` that template or added tokens hold."""
    if (start, end) != THINK_TAGS[0] or has_think_tags(tokenizer, end):
        return start, end
    return next((tags for tags in THINK_TAGS if has_think_tags(tokenizer, tags[1])), (start, end))


def split_thinking_block(prompt: str, start: str, end: str) -> tuple[str, str]:
    """Splits off the thinking that the end of a prompt opens, or opens and closes; the second text is "" for none."""
    stripped = prompt.rstrip()
    if stripped.endswith(start):
        split = len(stripped) - len(start)
        return prompt[:split], prompt[split:]
    if stripped.endswith(end):
        split = stripped.rfind(start)
        if split >= 0 and not stripped[split + len(start) : -len(end)].strip():
            return prompt[:split], prompt[split:]
    return prompt, ""


def text_between(before: str, text: str, after: str) -> str | None:
    """The part of ``text`` between its beginning ``before`` and ``after``; None if ``text`` does not have that form."""
    if not text.startswith(before) or after not in text[len(before) :]:
        return None
    return text[len(before) : text.index(after, len(before))]


def turn_end_of(tokenizer: PreTrainedTokenizerBase, after: str) -> str:
    """The template's text ``after`` a response, through its first special token; the end token if it has none."""
    # Spaces and line breaks may be added tokens (as in Gemma); they do not end a turn.
    added = [token for token in tokenizer.get_added_vocab() if token.strip()]
    matches = [(after.index(token), token) for token in added if token in after]
    if matches:
        start, token = min(matches, key=lambda match: (match[0], -len(match[1])))
        return after[:start] + token
    if tokenizer.eos_token is None:
        raise DataError("Neither the chat template nor the tokenizer has an end token; responses would never end.")
    return tokenizer.eos_token
