"""Which token ids does a text have? A tokenizer that gives those of its tokenizer.json, and a model that carries it.

`AutoTokenizer` may put a class chosen by the model's type over what tokenizer.json says, with other ids for the same
text (spaces lost, line breaks merged): the ids of probe texts are compared with those of the file before anything is
tokenized. TransformerLens derives facts from a tokenizer when it loads one; `give_tokenizer` derives the same ones.
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

from tl_adapters.errors import UserError

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
"""Texts on which tokenizers have been seen to differ: spaces, line breaks, digits, tags, accents, emoji."""
ADDED_PROBED = 256
"""Added tokens (chat tokens, tags) that are probed, each with text around it; more would take too long."""
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class TokenizerError(UserError, ValueError):
    """A tokenizer that gives other ids than its files, or ids that the model has no embedding for."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, with the ids of tokenizer.json; None where the folder has no tokenizer files.

    Where the class that transformers chooses gives other ids, or has tokens that the folder's files do not name,
    PreTrainedTokenizerFast is used, with the folder's special tokens, chat template and configuration.
    Raises TokenizerError, with the ids of both, where that gives other ids too.
    """
    if not any((folder / file).is_file() for file in _FILES):
        return None
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _opened(AutoTokenizer, folder)  # only the class can say what tokenizer.model means
    try:
        file = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise TokenizerError(f"{path} is not a tokenizer ({error}); copy it again.") from error
    known = file.get_vocab(with_added_tokens=True)
    chosen: PreTrainedTokenizerBase | None = None
    try:
        chosen = _opened(AutoTokenizer, folder)
        apart = difference(chosen, file)
    except TokenizerError as error:
        apart = str(error)
    if chosen is not None and apart is None and chosen.get_vocab().items() <= known.items():
        return chosen
    plain = _opened(PreTrainedTokenizerFast, folder)
    if (still := difference(plain, file)) is not None:
        raise TokenizerError(
            f"No tokenizer class of transformers gives the ids of {path}: {still}. Training on other ids than the "
            "model's would be wrong without a word; mend the tokenizer's files, or install another transformers."
        )
    if chosen is not None and apart is None and chosen.get_vocab() == plain.get_vocab():
        return chosen  # the folder's own configuration names the tokens that tokenizer.json lacks
    log.log(
        logging.WARNING if apart else logging.INFO,
        "%s would be read by the class that transformers chooses for it (%s), which %s; PreTrainedTokenizerFast is "
        "used, which gives the ids of tokenizer.json.",
        folder,
        type(chosen).__name__,
        f"gives other ids than tokenizer.json: {apart}" if apart else "adds tokens that the folder does not name",
    )
    return plain


def _opened(cls: Any, folder: Path) -> PreTrainedTokenizerBase:
    try:
        return cls.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of a dozen classes, and some from the tokenizers library
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TokenizerError(f"{folder} has tokenizer files that {cls.__name__} cannot load: {reason}") from error


def warn_of_other_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Log a warning where a tokenizer that the user gave has other ids than the tokenizer.json in ``folder``."""
    path = folder / "tokenizer.json"
    if path.is_file() and (apart := difference(tokenizer, Tokenizer.from_file(str(path)))) is not None:
        log.warning("The tokenizer that was given is not the one in %s: %s.", folder, apart)


def difference(tokenizer: PreTrainedTokenizerBase, file: Tokenizer) -> str | None:
    """The first probe text whose ids differ from those of ``file`` (a tokenizer.json), with both; None if none does.

    Special tokens that are written around a text are left out. Texts with tokens that ``file`` does not have are not
    compared.
    """
    known = file.get_vocab(with_added_tokens=True)
    own = [token for token in tokenizer.get_added_vocab() if token not in known]
    for text in _probes(file):
        if any(token in text for token in own):
            continue
        try:
            ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # a class that makes another tokenizer of the file may not even be able to use it
            return f"on {text!r} {type(tokenizer).__name__} fails ({error})"
        theirs = file.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            place = next(i for i, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b)
            kind = type(tokenizer).__name__
            return (
                f"from token {place} on {text!r} becomes {_shown(ours[place:])} by {kind} and {_shown(theirs[place:])} "
                "by the file"
            )
    return None


def _probes(file: Tokenizer) -> list[str]:
    added = sorted(file.get_added_tokens_decoder().items())[:ADDED_PROBED]
    return [*PROBES, *(f"Wait {token.content}\nso {token.content} 1" for _, token in added)]


def _shown(ids: Sequence[int], most: int = 12) -> str:
    return str(list(ids[:most]))[:-1] + (", ...]" if len(ids) > most else "]")


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Does the tokenizer put its BOS before every text by itself?"""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def without_embedding(tokenizer: PreTrainedTokenizerBase, d_vocab: int) -> dict[str, int]:
    """Token to id of what the tokenizer can write into a text and a model of ``d_vocab`` embeddings cannot read.

    A token that only pads, or only stands for what is unknown, does not count: it is never written into a text.
    """
    silent = {tokenizer.pad_token, tokenizer.unk_token} - {tokenizer.bos_token, tokenizer.eos_token}
    return {token: i for token, i in tokenizer.get_vocab().items() if i >= d_vocab and token not in silent}


def require_embeddings(tokenizer: PreTrainedTokenizerBase, d_vocab: int) -> None:
    """Raises TokenizerError where the tokenizer has ids that a model of ``d_vocab`` embeddings cannot read."""
    if beyond := without_embedding(tokenizer, d_vocab):
        shown = ", ".join(f"{token!r} ({i})" for token, i in sorted(beyond.items(), key=lambda item: item[1])[:5])
        raise TokenizerError(
            f"The tokenizer has {len(beyond):,} tokens that the model has no embedding for (it has {d_vocab:,}), such "
            f"as {shown}. Take the tokenizer that belongs to the target, or resize the target's embeddings."
        )


def give_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a HookedTransformer or TransformerBridge carry ``tokenizer``, with what TransformerLens derives from one.

    `set_tokenizer` is not used: it loads the tokenizer anew under its recorded name and makes encode() prepend BOS.
    ``tokenizer`` itself is not changed; where it has no pad token, the model carries a copy that pads with the end
    token, as TransformerLens does. One thing is not done as there: a tokenizer without BOS does not get its end token
    for one, since a chat template would then write it; ``prepend_bos=True`` puts nothing before its texts.
    Raises TokenizerError (`require_embeddings`, and for a tokenizer that gives other ids than the backend inside it).
    """
    require_embeddings(tokenizer, model.cfg.d_vocab)
    if tokenizer.is_fast and (apart := difference(tokenizer, tokenizer.backend_tokenizer)) is not None:
        raise TokenizerError(f"The tokenizer does not give the ids of its own backend: {apart}. Load it anew.")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    model.tokenizer = tokenizer
    model.cfg.tokenizer_prepends_bos = writes_bos(tokenizer)
    if hasattr(model.cfg, "tokenizer_appends_eos"):  # a bridge takes the end token off again where it is told
        eos = tokenizer.eos_token_id
        model.cfg.tokenizer_appends_eos = eos is not None and tokenizer("a")["input_ids"][-1:] == [eos]
