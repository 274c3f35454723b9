"""Tokenizers whose vocabulary a test writes down."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(*tokens: str) -> PreTrainedTokenizerFast:
    """Splits at spaces, which belong to no token; what it does not know is [UNK]."""
    vocab = {token: i for i, token in enumerate(("[UNK]", *tokens))}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
