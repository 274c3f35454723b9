"""The text of tokens: of one token, of a span, and the single token of a text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tl_adapters.errors import UserError

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
