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

from tl_adapters.errors import UserError
from tl_adapters.utils.arguments import texts

HESITATION_WORDS = (
    "Wait", "Hmm", "Hm", "But", "Alternatively", "Actually", "However", "Maybe", "Perhaps", "Oops",
)  # fmt: skip
"""With what reasoning models interrupt themselves. "Hold", "Check" or "No" would be as often something else."""

UNDECODED = "\N{REPLACEMENT CHARACTER}"
"""What decoding writes for bytes that are no whole character."""
CONTINUATION = "‥"
"""Shown for a token that only goes on with the character before it, where each token has a box of its own."""
_METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's sign for a space."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BYTES = re.compile(r"(<0x[0-9A-F]{2}>)")


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


def single_token(tokenizer: PreTrainedTokenizerBase | None, text: str) -> int:
    """The token that is exactly ``text``. Raises VocabularyError for text of several tokens, or no tokenizer."""
    if tokenizer is None:
        raise VocabularyError(f"There is no tokenizer to look {text!r} up in; give the target's tokenizer.")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = ", ".join(repr(token_text(tokenizer, i)) for i in ids) or "none"
        raise VocabularyError(f"{text!r} is {len(ids)} tokens of this model ({pieces}); name one of them.")
    return int(ids[0])


def token_text(tokenizer: PreTrainedTokenizerBase | None, token: int) -> str:
    """A token's text by itself; its number where there is no tokenizer.

    No two tokens that differ are shown alike: bytes that are no whole character are written as "<0xE6>", and the space
    that a SentencePiece token begins with is kept, although decoding the token alone drops it. `span_texts` puts such
    texts together again.
    """
    if tokenizer is None:
        return str(token)
    raw = tokenizer.convert_ids_to_tokens(token)
    if raw is None or _BYTE.fullmatch(raw):  # no token has this id, or it is a byte of SentencePiece's fallback
        return raw or f"[{token}]"
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if UNDECODED in text and UNDECODED not in raw:
        return _byte_level_text(raw)
    if raw.startswith(_METASPACE) and not text.startswith(" "):
        return " " + text
    return text


def span_texts(tokens: Sequence[str], continuation: str = "") -> list[str]:
    """The texts of neighboring tokens, with the characters that several of them spell put together.

    Args:
        tokens: texts as `token_text` gives them.
        continuation: stands for a token that only goes on with a character which an earlier one begins; the first of
            these has the character. With the default, the texts join to that of the whole span.
    """
    found, pending = [""] * len(tokens), list[tuple[int, int]]()

    def put_together() -> None:
        """Decode the bytes read so far; each character goes to the token of its first byte."""
        at = 0
        for character in bytes(byte for _, byte in pending).decode("utf-8", "surrogateescape"):
            found[pending[at][0]] += _escaped(character)
            at += len(character.encode("utf-8", "surrogateescape"))
        pending.clear()

    for i, token in enumerate(tokens):
        for part in filter(None, _BYTES.split(token)):
            if _BYTE.fullmatch(part):
                pending.append((i, int(part[3:5], 16)))
            else:
                put_together()
                found[i] += part
    put_together()
    return [text if text or not token else continuation for text, token in zip(found, tokens, strict=True)]


def _escaped(character: str) -> str:
    """A character, or the byte "<0xE6>" that Python's decoding put a surrogate for."""
    code = ord(character)
    return f"<0x{code - 0xDC00:02X}>" if 0xDC80 <= code <= 0xDCFF else character


def _byte_level_text(raw: str) -> str:
    """The text of a byte-level token, bytes that are no whole character written as "<0xE6>"."""
    if not all(character in _BYTE_OF for character in raw):
        return raw
    data = bytes(_BYTE_OF[character] for character in raw)
    return "".join(map(_escaped, data.decode("utf-8", "surrogateescape")))


def _byte_of_character() -> dict[str, int]:
    """Character to byte in the alphabet in which byte-level tokenizers write their tokens.

    Printable bytes stand for themselves, the others, in their order, for the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()
