"""Words in a vocabulary: every spelling that is one token, and nothing else."""

import pytest
from helpers.word_tokenizers import word_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tl_adapters.data.hesitation_words import HESITATION_WORDS
from tl_adapters.data.tokens import VocabularyError
from tl_adapters.data.words import hesitation_tokens, is_word, spellings
from tl_adapters.organism import TARGET


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TARGET)


def test_every_token_that_spells_a_word_is_found_and_no_other(tokenizer: PreTrainedTokenizerBase) -> None:
    """Differential: all tokens of the vocabulary, decoded and compared."""
    words = (*HESITATION_WORDS, "No")
    tokens = hesitation_tokens(tokenizer, words)
    variants = {v for word in words for v in spellings(word)}
    plain = {tokenizer.decode([i]): i for i in range(len(tokenizer)) if tokenizer.decode([i]) in variants}
    assert tokens == plain and {"Wait", " Wait", "wait", "No"} <= set(tokens)
    assert " wait" not in tokens  # the pair's tokenizer splits it


def test_tokens_are_in_the_order_of_the_words(tokenizer: PreTrainedTokenizerBase) -> None:
    assert [s.strip().lower() for s in hesitation_tokens(tokenizer, ["hmm", "Wait"])] == ["hmm"] * 4 + ["wait"] * 3


def test_a_token_is_returned_once_and_the_unknown_token_never() -> None:
    found = hesitation_tokens(word_tokenizer("Wait", "but"))
    assert found == {"Wait": 1, "but": 2}  # " Wait" is the same token; Hmm and all the others are [UNK]


def test_a_tokenizer_that_splits_every_word_has_no_such_tokens() -> None:
    assert hesitation_tokens(word_tokenizer("x")) == {}


@pytest.mark.parametrize("words", [[], ["hold on"], [""], [" Wait"], ["Wait", "\n"]])
def test_anything_but_single_words_is_refused(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> None:
    with pytest.raises(VocabularyError, match="single words"):
        hesitation_tokens(tokenizer, words)


def test_a_missing_tokenizer_is_refused() -> None:
    with pytest.raises(VocabularyError, match="tokenizer"):
        hesitation_tokens(None)


@pytest.mark.parametrize("token", ["Wait", " wait", "WAIT", "\nHmm ", "oops"])
def test_a_token_is_a_word_in_any_case(token: str) -> None:
    assert is_word(token)


@pytest.mark.parametrize("token", ["", " ", "Waiter", "await", "Wa", "Wait,"])
def test_another_token_is_not_a_word(token: str) -> None:
    assert not is_word(token)
