"""Words of hesitation, and which tokens of a vocabulary say them.

"Wait", "wait", " Wait" and " wait" are one word and up to four tokens. A word is counted where the tokenizer has it
as one token, in one of its spellings: as written, in small letters, with a capital, in capitals, each with and without
a space before it. What the tokenizer splits has no logit of its own and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tl_adapters.errors import UserError

HESITATION_WORDS = (
    "Wait", "Hmm", "Hm", "But", "Alternatively", "Actually", "However", "Maybe", "Perhaps", "Oops",
)  # fmt: skip
"""With what reasoning models interrupt themselves. "Hold", "Check" or "No" would be as often something else."""


class VocabularyError(UserError, ValueError):
    """Words that cannot be looked up."""


def spellings(word: str) -> tuple[str, ...]:
    """A word as written, in small letters, with a capital and in capitals, each without and with a space before it."""
    cases = dict.fromkeys((word, word.lower(), word.capitalize(), word.upper()))
    return tuple(space + case for case in cases for space in ("", " "))


def hesitation_tokens(
    tokenizer: PreTrainedTokenizerBase | None, words: Sequence[str] = HESITATION_WORDS
) -> dict[str, int]:
    """Spelling to token id, for every spelling of ``words`` that is one token; in the order of the words.

    Where two spellings are one token (a tokenizer that always puts a space before a text), the first stands for both;
    it is empty where the tokenizer splits every word. Raises VocabularyError for no tokenizer, no words, or a word
    that is none.
    """
    if tokenizer is None:
        raise VocabularyError("There is no tokenizer to look words up in; give the target's tokenizer.")
    bad = [word for word in words if len(word.split()) != 1 or word != word.strip()]
    if not words or bad:
        raise VocabularyError(f"Got the words {bad or list(words)}; give single words without spaces, like 'Wait'.")
    variants = list(dict.fromkeys(spelling for word in words for spelling in spellings(word)))
    found: dict[str, int] = {}
    for spelling, ids in zip(variants, tokenizer(variants, add_special_tokens=False)["input_ids"], strict=True):
        if len(ids) == 1 and ids[0] not in found.values() and says(tokenizer.decode(ids), [spelling]):
            found[spelling] = ids[0]
    return found


def says(token: str, words: Sequence[str] = HESITATION_WORDS) -> bool:
    """True if a token's text is one of ``words``, whatever its case and the spaces around it."""
    text = token.strip().casefold()
    return text != "" and any(text == word.strip().casefold() for word in words)


def single_token(tokenizer: PreTrainedTokenizerBase | None, text: str) -> int:
    """The token that is exactly ``text``. Raises VocabularyError for text of several tokens, or no tokenizer."""
    if tokenizer is None:
        raise VocabularyError(f"There is no tokenizer to look {text!r} up in; give the target's tokenizer.")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids) or "none"
        raise VocabularyError(f"{text!r} is {len(ids)} tokens of this model ({pieces}); name one of them.")
    return int(ids[0])


def token_text(tokenizer: PreTrainedTokenizerBase | None, token: int) -> str:
    """A token's text; its number where there is no tokenizer."""
    return tokenizer.decode([token]) if tokenizer is not None else str(token)
