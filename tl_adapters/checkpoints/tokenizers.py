"""Tokenizers that give the token ids of their tokenizer.json, and models that carry them.

`AutoTokenizer` may use a class, chosen by the model's type, that overrides tokenizer.json and gives other ids for the
same text (spaces lost, line breaks merged). So the ids of probe texts are compared with those of the file before
anything is tokenized. TransformerLens sets several entries of its configuration when it loads a tokenizer;
`give_tokenizer` sets the same ones.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tl_adapters.errors import UserError, first_line
from tl_adapters.utils.files import plain_file

log = logging.getLogger(__name__)

PROBES = (
    "How are you doing? Wait, 47+85=132.",
    " two  spaces,   three,\ta tab, and one at the end ",
    "Lines\n\nbreak\r\n\n   and are indented.\n",
    "0123456789 1,000.5 2026",
    "<think>\nHmm, 3.\n</think>\n\nSo \\boxed{½} it is.",
    "naïve café Ünïcödé e\u0301 Привет 日本語",
    "🤔👍🏽 ok",
    "def f(x):\n    return x**2  # it's don't I'LL",
)
"""Texts on which tokenizers have been observed to differ: spaces, line breaks, digits, tags, accents, emoji."""
MAX_PROBED_ADDED_TOKENS = 256
"""How many added tokens (chat tokens, tags) are probed, each with text around it; more would take too long."""
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class TokenizerError(UserError, ValueError):
    """A tokenizer whose ids differ from those of its files, or have no embedding in the model."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, with the ids of tokenizer.json; None if the folder has no tokenizer files.

    If the class that transformers chooses gives other ids, or has tokens that the folder's files do not name,
    PreTrainedTokenizerFast is used instead, with the folder's special tokens, chat template and configuration.
    Raises TokenizerError, with the ids of both, if that gives other ids as well.
    """
    if not any((folder / file).is_file() for file in _FILES):
        return None
    path = plain_file(folder, "tokenizer.json")
    if not path.is_file():
        return _load(AutoTokenizer, folder)  # only that class can interpret tokenizer.model
    file = _tokenizer_in(path)
    vocabulary = file.get_vocab(with_added_tokens=True)
    chosen: PreTrainedTokenizerBase | None = None
    try:
        chosen = _load(AutoTokenizer, folder)
        mismatch = difference(chosen, file)
    except TokenizerError as error:
        mismatch = str(error)
    if chosen is not None and mismatch is None and chosen.get_vocab().items() <= vocabulary.items():
        return chosen
    plain = _load(PreTrainedTokenizerFast, folder)
    if (plain_mismatch := difference(plain, file)) is not None:
        raise TokenizerError(
            f"No tokenizer class of transformers gives the ids of {path}: {plain_mismatch}. Training on other ids than "
            "the model's would be wrong without any error; repair the tokenizer's files, or install another version of "
            "transformers."
        )
    if chosen is not None and mismatch is None and chosen.get_vocab() == plain.get_vocab():
        return chosen  # the folder's own configuration names the tokens that tokenizer.json lacks
    log.log(
        logging.WARNING if mismatch else logging.INFO,
        "transformers chooses the class %s for the tokenizer of %s, which %s; PreTrainedTokenizerFast is used instead, "
        "which gives the ids of tokenizer.json.",
        type(chosen).__name__,
        folder,
        f"gives other ids than tokenizer.json: {mismatch}" if mismatch else "adds tokens that the folder does not name",
    )
    return plain


def _tokenizer_in(path: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes. Raises TokenizerError."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode_batch(_probes(tokenizer))  # some damage is noticed only here
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise TokenizerError(f"{path} is not a tokenizer ({str(error)[:300]}); copy it again.") from error
    return tokenizer


def _load(cls: Any, folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, as a class loads it. Raises TokenizerError."""
    try:
        return cls.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a dozen classes, some of the tokenizers library
        raise TokenizerError(
            f"{folder} has tokenizer files that {cls.__name__} cannot load: {first_line(error)}"
        ) from error


def warn_of_other_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Logs a warning if the ids of a user's tokenizer differ from those of the tokenizer.json in ``folder``."""
    path = plain_file(folder, "tokenizer.json")
    if path.is_file() and (mismatch := difference(tokenizer, _tokenizer_in(path))) is not None:
        log.warning("The given tokenizer differs from the one in %s: %s.", folder, mismatch)


def difference(tokenizer: PreTrainedTokenizerBase, file: Tokenizer) -> str | None:
    """The first difference between the ids of a tokenizer and those of ``file``, a tokenizer.json, on probe texts.

    Texts are tokenized without special tokens around them. Texts with tokens that ``file`` does not have are skipped.

    Returns:
        A description with both lists of ids, or None if all are equal.
    """
    vocabulary = file.get_vocab(with_added_tokens=True)
    own = [token for token in tokenizer.get_added_vocab() if token not in vocabulary]
    for text in _probes(file):
        if any(token in text for token in own):
            continue
        try:
            ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # a class that does not fit the file may fail on any text
            return f"on {text!r} {type(tokenizer).__name__} fails ({error})"
        theirs = file.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            first = next(i for i, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b)
            return (
                f"from token {first} on, {text!r} has the ids {_shown(ours[first:])} in {type(tokenizer).__name__} and "
                f"{_shown(theirs[first:])} in the file"
            )
    return None


def _probes(file: Tokenizer) -> list[str]:
    """`PROBES`, and a text around every added token."""
    added = sorted(file.get_added_tokens_decoder().items())[:MAX_PROBED_ADDED_TOKENS]
    return [*PROBES, *(f"Wait {token.content}\nso {token.content} 1" for _, token in added)]


def _shown(ids: Sequence[int], most: int = 12) -> str:
    """The first ids as a list, for messages."""
    return str(list(ids[:most]))[:-1] + (", ...]" if len(ids) > most else "]")


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer adds its BOS token before every text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def without_embedding(tokenizer: PreTrainedTokenizerBase, d_vocab: int) -> dict[str, int]:
    """Token -> id of the tokens that a text may have and that a model of ``d_vocab`` embeddings cannot read.

    Tokens that are used only for padding or for unknown characters are left out, since no text has them.
    """
    unused = {tokenizer.pad_token, tokenizer.unk_token} - {tokenizer.bos_token, tokenizer.eos_token}
    return {token: i for token, i in tokenizer.get_vocab().items() if i >= d_vocab and token not in unused}


def require_embeddings(tokenizer: PreTrainedTokenizerBase, d_vocab: int) -> None:
    """Raises TokenizerError if the tokenizer has ids that a model of ``d_vocab`` embeddings cannot read."""
    if beyond := without_embedding(tokenizer, d_vocab):
        shown = ", ".join(f"{token!r} ({i})" for token, i in sorted(beyond.items(), key=lambda item: item[1])[:5])
        raise TokenizerError(
            f"The tokenizer has {len(beyond):,} tokens that the model has no embedding for (it has {d_vocab:,}), such "
            f"as {shown}. Give the tokenizer that belongs to the target, or resize the target's embeddings."
        )


def give_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets the tokenizer of a HookedTransformer or TransformerBridge, with the entries of cfg that depend on it.

    `set_tokenizer` is not used, since it loads the tokenizer again under its recorded name and makes encode() prepend
    BOS. ``tokenizer`` itself is not changed: if it has no pad token, the model gets a copy that pads with the end
    token, as in TransformerLens. Unlike there, a tokenizer without BOS does not get its end token as BOS, since a chat
    template would then write it; ``prepend_bos=True`` prepends nothing to its texts.

    Raises TokenizerError for ids without an embedding, and for a tokenizer whose ids differ from those of its backend.
    """
    require_embeddings(tokenizer, model.cfg.d_vocab)
    if tokenizer.is_fast and (mismatch := difference(tokenizer, tokenizer.backend_tokenizer)) is not None:
        raise TokenizerError(f"The tokenizer's ids differ from those of its own backend: {mismatch}. Load it again.")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    model.tokenizer = tokenizer
    model.cfg.tokenizer_prepends_bos = writes_bos(tokenizer)
    if hasattr(model.cfg, "tokenizer_appends_eos"):  # with it a bridge removes the end token again
        eos = tokenizer.eos_token_id
        model.cfg.tokenizer_appends_eos = eos is not None and tokenizer("a")["input_ids"][-1:] == [eos]
