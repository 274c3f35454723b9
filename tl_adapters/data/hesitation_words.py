"""Words of hesitation, which tokens of a vocabulary say them, and the text of tokens, alone and in a span.

"Wait", "wait", " Wait" and " wait" are one word and up to four tokens. A word is counted where the tokenizer has it
as one token, in one of its spellings: as written, in small letters, with a capital, in capitals, each with and without
a space before it. What the tokenizer splits has no logit of its own and is left out, unless no spelling of it is one
token: then it is a phrase ("Hold on"), and all its spellings are (`word_tokens`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from tl_adapters.data.tokens import VocabularyError
from tl_adapters.utils.arguments import texts

HESITATION_WORDS = (
    "Wait", "Hmm", "Hm", "But", "Alternatively", "Actually", "However", "Maybe", "Perhaps", "Oops",
)  # fmt: skip
"""With what reasoning models interrupt themselves. "Hold", "Check" or "No" would be as often something else."""


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
    words = texts(words, "words")
    bad = [word for word in words if len(word.split()) != 1 or word != word.strip()]
    if not words or bad:
        raise VocabularyError(f"Got the words {bad or list(words)}; give single words without spaces, like 'Wait'.")
    variants = list(dict.fromkeys(spelling for word in words for spelling in spellings(word)))
    found: dict[str, int] = {}
    for spelling, ids in zip(variants, tokenizer(variants, add_special_tokens=False)["input_ids"], strict=True):
        if len(ids) == 1 and ids[0] not in found.values() and says(tokenizer.decode(ids), [spelling]):
            found[spelling] = ids[0]
    return found


def word_tokens(tokenizer: PreTrainedTokenizerBase | None, words: Sequence[str]) -> dict[str, int | tuple[int, ...]]:
    """Spelling to token id, or to the ids of a spelling of several tokens; in the order of the words.

    Of a word that is one token in some spelling only those spellings are taken (`hesitation_tokens`), of another one
    all that the tokenizer can write. A spelling that holds another one of them is left out (" Hold on" where a space is
    a token of its own): where it stands the other one does. Empty where the tokenizer can write none. Raises
    VocabularyError for no tokenizer, no words, or a word that is empty or has spaces around it.
    """
    if tokenizer is None:
        raise VocabularyError("There is no tokenizer to look words up in; give the target's tokenizer.")
    words = texts(words, "words")
    bad = [word for word in words if not word or word != word.strip()]
    if not words or bad:
        raise VocabularyError(f"Got the words {bad or list(words)}; give words or phrases without spaces around them.")
    found: dict[str, tuple[int, ...]] = {}
    for word in words:
        written = dict(
            zip(
                spellings(word),
                map(tuple, tokenizer(list(spellings(word)), add_special_tokens=False)["input_ids"]),
                strict=True,
            )
        )
        written = {s: ids for s, ids in written.items() if ids and says(tokenizer.decode(list(ids)), [s])}
        single = {s: ids for s, ids in written.items() if len(ids) == 1}
        for spelling, ids in (single or written).items():
            if ids not in found.values():
                found.setdefault(spelling, ids)
    return {spelling: ids[0] if len(ids) == 1 else ids for spelling, ids in without_extensions(found).items()}


def without_extensions(phrases: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The phrases that hold no other one of them: where a longer one stands the shorter one does."""
    known = set(phrases.values())
    lengths = sorted({len(ids) for ids in known})

    def holds_another(ids: tuple[int, ...]) -> bool:
        return any(
            ids[start : start + n] in known for n in lengths if n < len(ids) for start in range(len(ids) - n + 1)
        )

    return {text: ids for text, ids in phrases.items() if not holds_another(ids)}


_BOUNDS = (r"(?<!\w)", r"(?!\w)")


def pattern_of(words: Sequence[str]) -> re.Pattern[str]:
    """Matches each of ``words`` in any case, whole: no letter or digit goes on where a word begins or ends with one.

    A space in a phrase stands for any white space. Of two words that begin at one place the shorter one is matched.
    """
    return _pattern(tuple(words))


@lru_cache(maxsize=64)  # asked for every answer
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(_whole, sorted(words, key=len))), re.IGNORECASE)


def _whole(word: str) -> str:
    inner = r"\s+".join(map(re.escape, word.split()))
    edges = word.strip()[:1], word.strip()[-1:]
    before, after = ("" if re.match(r"\w", edge) is None else bound for edge, bound in zip(edges, _BOUNDS, strict=True))
    return before + inner + after


def says(token: str, words: Sequence[str] = HESITATION_WORDS) -> bool:
    """True if a token's text is one of ``words``, whatever its case and the spaces around it."""
    text = token.strip().casefold()
    return text != "" and any(text == word.strip().casefold() for word in words)


HESITATION = ("wait",)
"""What counts as a hesitation, where no other words are asked for."""
