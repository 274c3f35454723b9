"""The completions of one prompt by several variants of a model: its routes, and routes with edited features.

A `Variant` is a name and a context manager to enter while it generates. All variants get the same prompt and draw from
the same seed, so their completions differ only because the variants do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.hesitation_words import HESITATION_WORDS
from tl_adapters.data.traces import GivenPrompt, Trace, prompt_token_ids
from tl_adapters.data.words import word_pattern
from tl_adapters.generation.completions import Completion, complete
from tl_adapters.generation.sampling import GenerationError
from tl_adapters.interventions.variants import Variant
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.html import highlight_spans, render
from tl_adapters.utils.notebook import RecordTable
from tl_adapters.utils.renamed import renamed_attributes

DEFAULT_ROUTES = ("target", "hybrid", "replacement")
"""Routes that are compared by default."""


@renamed_attributes(hesitations="hesitation_spans", parts_at="differs_at")
@dataclass(frozen=True)
class VariantCompletion(Completion):
    """The completion by one variant, compared with that by the first variant."""

    variant: str
    """Name of the variant."""
    differs_at: int | None
    """Character at which the text first differs from the first variant's, at the start of a token; None where it does
    not differ."""

    def row(self) -> dict[str, Any]:
        """What `Completion.row` gives, with the variant, where it differs, and the number of hesitation words."""
        hesitations = len(self.hesitation_spans)
        return {"variant": self.variant, "differs_at": self.differs_at, "hesitations": hesitations, **super().row()}

    def _repr_html_(self) -> str:
        return VariantCompletions([self])._repr_html_()

    @property
    def hesitation_spans(self) -> list[tuple[int, int]]:
        """(start, stop) of each hesitation word (`HESITATION_WORDS`) in the text, in any case."""
        return [match.span() for match in word_pattern(HESITATION_WORDS).finditer(self.text)]

    @property
    def summary(self) -> str:
        """Length, hesitation words and kind of ending, in one line."""
        words = [self.text[start:stop].casefold() for start, stop in self.hesitation_spans]
        ending = "cut at the limit" if self.truncated else "stopped"
        return f"{len(self.tokens)} tokens; hesitation words: {len(words)}, wait: {words.count('wait')}; {ending}"


class VariantCompletions(RecordTable[VariantCompletion]):
    """The completions of one prompt; a notebook shows them side by side, with their hesitation words marked."""

    def _repr_html_(self) -> str:
        boxes = [(c.variant, c.summary, highlight_spans(c.text, c.hesitation_spans)) for c in self]
        return render("notebook/answers.html.j2", boxes=boxes)


def tokenize_question(
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    *,
    raw: bool = False,
    open_thinking: bool = False,
    think_start: str = ChatFormat.think_start,
) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: the target's.
        text: a question, which is rendered with the tokenizer's chat template.
        raw: take ``text`` as the whole prompt, chat tokens included.
        open_thinking: end the prompt with ``think_start`` where the template does not.
        think_start: the tag that opens the thinking.

    Raises DataError for a question where there is no chat template; GenerationError for no tokenizer or no text.
    """
    tokenizer = _required(tokenizer)
    if not text.strip():
        raise GenerationError("The prompt is empty; give a question, or with raw the text that the model continues.")
    if not raw:
        chat = ChatFormat.of(tokenizer, think_start)
        opening = chat.think_start if open_thinking else ""
        text = chat.prompt([{"role": "user", "content": text.strip()}], opening)
    elif open_thinking and not text.rstrip().endswith(think_start):
        text += think_start
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _required(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise GenerationError("The model has no tokenizer to encode a prompt with; give the target's tokenizer.")
    return tokenizer


def generate_variants(
    pair: PairedModel,
    prompt: GivenPrompt,
    variants: Sequence[Variant],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> VariantCompletions:
    """Complete ``prompt`` with every variant, in their order.

    Args:
        pair: with a tokenizer, and with adapters where a variant needs them.
        prompt: the text as the model reads it (with chat tokens; nothing is added), token ids, or a document, of which
            the prompt is completed.
        variants: the first is the one with which the others are compared.
        max_new_tokens, temperature, top_p, top_k: as in `complete`.
        seed: of the random numbers, the same for each variant; torch's global generator is not used.
        progress: show a progress bar.

    Raises GenerationError for options out of range, no tokenizer, and a prompt that is empty or fills the context;
    ArgumentError for token ids outside the model's vocabulary; and the errors of the variants.
    """
    tokenizer = _required(pair.model.tokenizer)
    asked = prompt.tokens[: prompt.prompt_length] if isinstance(prompt, Trace) else prompt
    tokens = prompt_token_ids(pair.model, asked, GenerationError).tolist()
    for variant in variants:  # one that cannot be entered ends the call before anything is generated
        with variant.entered(pair):
            pass
    completions = VariantCompletions()
    for variant in tqdm(variants, disable=not progress, unit="variant"):
        with variant.entered(pair):
            (completion,) = complete(
                pair.model,
                [tokens],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                keys=[seed],
            )
        differs_at = _difference(completion, completions[0], tokenizer) if completions else None
        completions.append(VariantCompletion(**vars(completion), variant=variant.name, differs_at=differs_at))
    return completions


def _difference(completion: Completion, first: Completion, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Character at which a completion first differs from another, at the start of a token; None where it does not."""
    if completion.tokens == first.tokens:
        return None
    same = tokenizer.decode(completion.tokens[: _common_length(completion.tokens, first.tokens)])
    # A token may be a part of a character, whose decoded text then occurs in neither text.
    return min(len(same), _common_length(completion.text, first.text))


def _common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
