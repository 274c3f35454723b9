"""What variants of one model say to the same prompt: its routes, and routes with features taken out or put in.

A `Variant` is a name and what to enter while it speaks, so anything that is a context manager of a pair can be one.
Every variant has the same prompt and draws from the same seed: where one says something else, it is the variant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.hesitation_words import HESITATION_WORDS
from tl_adapters.data.words import word_pattern
from tl_adapters.errors import UserError
from tl_adapters.generation.completions import complete
from tl_adapters.generation.decoding import Completion, CompletionError
from tl_adapters.generation.generation_config import decoding_of, end_tokens, longest_answer
from tl_adapters.interventions.variants import Variant
from tl_adapters.models.paired_model import PairedModel

DEFAULT_ROUTES = ("target", "hybrid", "replacement")
"""What is compared when nothing else is asked for."""


class VariantError(UserError, ValueError):
    """A prompt or options with which nothing can be generated."""


@dataclass(frozen=True)
class Continuation:
    """What one variant said."""

    variant: str
    """Its name."""
    tokens: tuple[int, ...]
    """Token ids, without the end token."""
    text: str
    """As text, think tags included."""
    truncated: bool
    """The limit came before an end token."""
    parts_at: int | None
    """Character at which it first differs from the first variant's text, at the start of a token; None: nowhere."""

    @property
    def hesitations(self) -> list[tuple[int, int]]:
        """Character spans of the hesitation words (`HESITATION_WORDS`) in the text, in any case."""
        return [match.span() for match in word_pattern(HESITATION_WORDS).finditer(self.text)]

    @property
    def summary(self) -> str:
        """Length, hesitations and how it ended, in one line."""
        words = [self.text[start:stop].casefold() for start, stop in self.hesitations]
        ending = "cut at the limit" if self.truncated else "stopped"
        return f"{len(self.tokens)} tokens; hesitation words: {len(words)}, wait: {words.count('wait')}; {ending}"


def tokenize_question(
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    *,
    raw: bool = False,
    open_thinking: bool = False,
    think_start: str = ChatFormat.think_start,
) -> list[int]:
    """A prompt's token ids.

    Args:
        tokenizer: the target's.
        text: a question, put into the tokenizer's chat template.
        raw: ``text`` is what the model reads, chat tokens included.
        open_thinking: the prompt ends with ``think_start``, where the template does not write it anyway.
        think_start: what opens the thinking.

    Raises DataError where a question is asked and there is no chat template; VariantError for no tokenizer or no text.
    """
    tokenizer = _known(tokenizer)
    if not text.strip():
        raise VariantError("The prompt is empty; give a question, or with raw text what the model is to go on with.")
    if not raw:
        chat = ChatFormat.of(tokenizer, think_start)
        opening = chat.think_start if open_thinking else ""
        text = chat.prompt([{"role": "user", "content": text.strip()}], opening)
    elif open_thinking and not text.rstrip().endswith(think_start):
        text += think_start
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _known(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise VariantError("The model has no tokenizer to read a prompt with; give the target's tokenizer.")
    return tokenizer


def generate_variants(
    pair: PairedModel,
    prompt: Sequence[int],
    variants: Sequence[Variant],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Continuation]:
    """What every variant says after ``prompt``, in their order.

    Args:
        pair: with a tokenizer, and with adapters where a variant needs them.
        prompt: token ids (`tokenize_question`).
        variants: the first is what the others are compared with.
        max_new_tokens: the limit; None is the model's own (`generation.longest_answer`). Where the model's context is
            full before, that is the limit.
        temperature, top_p, top_k: as `decoding.Decoding`; None is what the model's generation_config.json says, which
            is greedy where it does not sample.
        seed: of the draws, the same for each variant. torch's own generator is left as it was.
        progress: show a bar.

    Raises VariantError for options out of range, no tokenizer or a prompt that fills the context; and what a variant
    raises.
    """
    tokenizer = _known(pair.model.tokenizer)
    limit, ends = longest_answer(pair.model) if max_new_tokens is None else max_new_tokens, end_tokens(pair.model)
    said: list[Continuation] = []
    for variant in tqdm(variants, disable=not progress, unit="variant"):
        try:
            how = decoding_of(pair.model, temperature, top_p, top_k)
            with variant.entered(pair):
                (done,) = complete(
                    pair.model, [prompt], ends, max_new_tokens=limit, batch_size=1, decoding=how, keys=[seed]
                )
        except CompletionError as error:
            raise VariantError(str(error)) from error
        said.append(_continuation(variant.name, done, tokenizer, said[0] if said else None))
    return said


def _continuation(
    name: str, done: Completion, tokenizer: PreTrainedTokenizerBase, first: Continuation | None
) -> Continuation:
    tokens, text = done.tokens, tokenizer.decode(done.tokens)
    parts_at = None
    if first is not None and tokens != first.tokens:
        same = tokenizer.decode(tokens[: _shared(tokens, first.tokens)])
        # A token may be part of a character, and then decodes to what neither text holds there.
        parts_at = min(len(same), _shared(text, first.text))
    return Continuation(name, tokens, text, not done.ended, parts_at)


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest beginning that both have."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
