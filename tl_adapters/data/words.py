"""Words in a vocabulary and in text: the tokens that spell a word, and the pattern that finds it.

A word has up to eight spellings: as written, in lower case, capitalized and in upper case, each with and without a
space before it. Each spelling that the tokenizer keeps as one token ("Wait", "wait", " Wait") has a logit of its own,
so only those are looked for (`hesitation_tokens`). A word of which no spelling is a single token is a phrase, such as
"Hold on"; `word_tokens` returns all spellings of a phrase, each as a sequence of token ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from tl_adapters.data.hesitation_words import HESITATION_WORDS
from tl_adapters.data.tokens import VocabularyError
from tl_adapters.utils.arguments import texts


def spellings(word: str) -> tuple[str, ...]:
    """The word as written, in lower case, capitalized and in upper case, each without and with a space before it."""
    cases = dict.fromkeys((word, word.lower(), word.capitalize(), word.upper()))
    return tuple(space + case for case in cases for space in ("", " "))


def hesitation_tokens(
    tokenizer: PreTrainedTokenizerBase | None, words: Sequence[str] = HESITATION_WORDS
) -> dict[str, int]:
    """Token id of every spelling of ``words`` that is a single token, in the order of the words.

    Where two spellings are the same token (in a tokenizer that always puts a space before a text), only the first is
    returned. The result is empty if the tokenizer splits every word.

    Args:
        tokenizer: the target's tokenizer.
        words: single words without spaces.

    Raises:
        VocabularyError: there is no tokenizer, or ``words`` is empty or holds something other than single words.
        ArgumentError: ``words`` is not a sequence of texts.
    """
    tokenizer = _required(tokenizer)
    words = texts(words, "words")
    bad = [word for word in words if len(word.split()) != 1 or word != word.strip()]
    if not words or bad:
        raise VocabularyError(f"Got the words {bad or list(words)}; give single words without spaces, like 'Wait'.")
    variants = list(dict.fromkeys(spelling for word in words for spelling in spellings(word)))
    token_of: dict[str, int] = {}
    for spelling, ids in zip(variants, tokenizer(variants, add_special_tokens=False)["input_ids"], strict=True):
        if len(ids) == 1 and ids[0] not in token_of.values() and is_word(tokenizer.decode(ids), [spelling]):
            token_of[spelling] = ids[0]
    return token_of


def word_tokens(tokenizer: PreTrainedTokenizerBase | None, words: Sequence[str]) -> dict[str, int | tuple[int, ...]]:
    """Token id, or sequence of token ids, of every spelling of words and phrases, in the order of the words.

    For a word with a spelling that is a single token, only such spellings are returned (`hesitation_tokens`); for any
    other word or phrase, all spellings that the tokenizer can encode. A spelling that contains another one of the
    result is left out (" Hold on" where the space is a token of its own), because the other one occurs wherever it
    does. The result is empty if the tokenizer can encode none.

    Args:
        tokenizer: the target's tokenizer.
        words: words or phrases without spaces around them.

    Raises:
        VocabularyError: there is no tokenizer, or ``words`` is empty or holds an empty or padded string.
    """
    tokenizer = _required(tokenizer)
    words = texts(words, "words")
    bad = [word for word in words if not word or word != word.strip()]
    if not words or bad:
        raise VocabularyError(f"Got the words {bad or list(words)}; give words or phrases without spaces around them.")
    phrases: dict[str, tuple[int, ...]] = {}
    for word in words:
        variants = list(spellings(word))
        encoded = map(tuple, tokenizer(variants, add_special_tokens=False)["input_ids"])
        written = {
            spelling: ids
            for spelling, ids in zip(variants, encoded, strict=True)
            if ids and is_word(tokenizer.decode(list(ids)), [spelling])
        }
        single = {spelling: ids for spelling, ids in written.items() if len(ids) == 1}
        for spelling, ids in (single or written).items():
            if ids not in phrases.values():
                phrases.setdefault(spelling, ids)
    return {spelling: ids[0] if len(ids) == 1 else ids for spelling, ids in without_extensions(phrases).items()}


def _required(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise VocabularyError("There is no tokenizer to look words up in; give the target's tokenizer.")
    return tokenizer


def without_extensions(phrases: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The phrases that contain no other phrase of the mapping: a longer one occurs only where the shorter one does."""
    known = set(phrases.values())
    lengths = sorted({len(ids) for ids in known})

    def contains_another(ids: tuple[int, ...]) -> bool:
        return any(
            ids[start : start + n] in known for n in lengths if n < len(ids) for start in range(len(ids) - n + 1)
        )

    return {text: ids for text, ids in phrases.items() if not contains_another(ids)}


_WORD_BOUNDARIES = (r"(?<!\w)", r"(?!\w)")


def word_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """A pattern that matches each of ``words`` as a whole word, in any case.

    A word that begins or ends with a letter or digit does not match inside a longer word. A space in a phrase matches
    any white space. Of two words that begin at the same position the shorter one is matched.
    """
    return _pattern(tuple(words))


@lru_cache(maxsize=64)  # the same words are counted in every answer
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(_whole_word, sorted(words, key=len))), re.IGNORECASE)


def _whole_word(word: str) -> str:
    inner = r"\s+".join(map(re.escape, word.split()))
    edges = word.strip()[:1], word.strip()[-1:]
    before, after = (
        "" if re.match(r"\w", edge) is None else boundary
        for edge, boundary in zip(edges, _WORD_BOUNDARIES, strict=True)
    )
    return before + inner + after


def is_word(token: str, words: Sequence[str] = HESITATION_WORDS) -> bool:
    """True if a token's text is one of ``words``, regardless of its case and of spaces around it."""
    text = token.strip().casefold()
    return text != "" and any(text == word.strip().casefold() for word in words)
