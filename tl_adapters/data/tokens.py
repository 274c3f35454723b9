"""The text of tokens: of one token, of a span, and the single token of a text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tl_adapters.errors import UserError

UNDECODED = "\N{REPLACEMENT CHARACTER}"
"""The character that decoding writes for bytes that do not form a whole character."""
CONTINUATION = "‥"
"""Shown, where every token has a box of its own, for a token that only continues the character before it."""
WITHHELD = "…"
"""Shown in place of a token whose text is not to be republished."""
_METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""The character with which SentencePiece writes a space."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BYTES = re.compile(r"(<0x[0-9A-F]{2}>)")


class VocabularyError(UserError, ValueError):
    """Raised for words that cannot be looked up in a vocabulary."""


def single_token(tokenizer: PreTrainedTokenizerBase | None, text: str) -> int:
    """The token whose text is ``text``. Raises VocabularyError for a text of several tokens, or for no tokenizer."""
    if tokenizer is None:
        raise VocabularyError(f"There is no tokenizer to look {text!r} up in; give the target's tokenizer.")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = ", ".join(repr(token_text(tokenizer, i)) for i in ids) or "none"
        raise VocabularyError(f"{text!r} is {len(ids)} tokens of this model ({pieces}); name one of them.")
    return int(ids[0])


def token_text(tokenizer: PreTrainedTokenizerBase | None, token: int) -> str:
    """The text of one token; its id if there is no tokenizer.

    Different tokens have different texts: bytes that do not form a whole character are written as "<0xE6>", and the
    space that a SentencePiece token begins with is kept, although decoding the token alone drops it. `span_texts`
    joins such texts.
    """
    if tokenizer is None:
        return str(token)
    raw = tokenizer.convert_ids_to_tokens(token)
    if raw is None or _BYTE.fullmatch(raw):  # the id is unused, or is a byte of SentencePiece's fallback
        return raw or f"[{token}]"
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if UNDECODED in text and UNDECODED not in raw:
        return _byte_level_text(raw)
    if raw.startswith(_METASPACE) and not text.startswith(" "):
        return " " + text
    return text


def span_texts(tokens: Sequence[str], continuation: str = "") -> list[str]:
    """The texts of neighboring tokens, in which characters that several of them spell are decoded.

    Args:
        tokens: texts as `token_text` gives them.
        continuation: the text of a token that only continues a character which an earlier token begins; that token
            gets the character. With the default, the texts join to the text of the whole span.
    """
    if "<0x" not in "".join(tokens):  # most spans hold no part of a character
        return list(tokens)
    result, pending = [""] * len(tokens), list[tuple[int, int]]()

    def flush() -> None:
        """Decode the pending bytes; each character goes to the token of its first byte."""
        offset = 0
        for character in bytes(byte for _, byte in pending).decode("utf-8", "surrogateescape"):
            result[pending[offset][0]] += _escaped(character)
            offset += len(character.encode("utf-8", "surrogateescape"))
        pending.clear()

    for i, token in enumerate(tokens):
        for part in filter(None, _BYTES.split(token)):
            if _BYTE.fullmatch(part):
                pending.append((i, int(part[3:5], 16)))
            else:
                flush()
                result[i] += part
    flush()
    return [text if text or not token else continuation for text, token in zip(result, tokens, strict=True)]


def _escaped(character: str) -> str:
    """A character, or "<0xE6>" for a byte that Python's decoding replaced by a surrogate."""
    code = ord(character)
    return f"<0x{code - 0xDC00:02X}>" if 0xDC80 <= code <= 0xDCFF else character


def _byte_level_text(raw: str) -> str:
    """The text of a byte-level token, in which bytes that do not form a whole character are written as "<0xE6>"."""
    if not all(character in _BYTE_OF for character in raw):
        return raw
    data = bytes(_BYTE_OF[character] for character in raw)
    return "".join(map(_escaped, data.decode("utf-8", "surrogateescape")))


def _byte_of_character() -> dict[str, int]:
    """Character to byte, in the alphabet with which byte-level tokenizers write their tokens.

    Printable bytes are written as themselves, and the others, in their order, as the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()
