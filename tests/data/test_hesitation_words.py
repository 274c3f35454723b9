"""Hesitation words in a vocabulary: every spelling that is one token, and nothing else."""

import pytest
from helpers.word_tokenizers import word_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tl_adapters.data.hesitation_words import HESITATION_WORDS, hesitation_tokens, says, spellings
from tl_adapters.data.tokens import VocabularyError
from tl_adapters.organism import TARGET


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TARGET)


def test_it_finds_every_token_that_says_a_word_and_no_other(tokenizer: PreTrainedTokenizerBase) -> None:
    """Differential: all tokens of the vocabulary, decoded and compared."""
    words = (*HESITATION_WORDS, "No")
    found = hesitation_tokens(tokenizer, words)
    wanted = {v for word in words for v in spellings(word)}
    plain = {tokenizer.decode([i]): i for i in range(len(tokenizer)) if tokenizer.decode([i]) in wanted}
    assert found == plain and {"Wait", " Wait", "wait", "No"} <= set(found)
    assert " wait" not in found  # the pair's tokenizer splits it


def test_the_order_is_that_of_the_words(tokenizer: PreTrainedTokenizerBase) -> None:
    assert [s.strip().lower() for s in hesitation_tokens(tokenizer, ["hmm", "Wait"])] == ["hmm"] * 4 + ["wait"] * 3


def test_one_token_is_counted_once_and_the_unknown_token_says_nothing() -> None:
    found = hesitation_tokens(word_tokenizer("Wait", "but"))
    assert found == {"Wait": 1, "but": 2}  # " Wait" is the same token; Hmm and all the others are [UNK]


def test_where_all_is_split_nothing_is_found() -> None:
    assert hesitation_tokens(word_tokenizer("x")) == {}


@pytest.mark.parametrize("words", [[], ["hold on"], [""], [" Wait"], ["Wait", "\n"]])
def test_what_is_no_word_is_refused(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> None:
    with pytest.raises(VocabularyError, match="single words"):
        hesitation_tokens(tokenizer, words)


def test_no_tokenizer_is_refused() -> None:
    with pytest.raises(VocabularyError, match="tokenizer"):
        hesitation_tokens(None)


@pytest.mark.parametrize("token", ["Wait", " wait", "WAIT", "\nHmm ", "oops"])
def test_a_token_says_a_word_in_any_case(token: str) -> None:
    assert says(token)


@pytest.mark.parametrize("token", ["", " ", "Waiter", "await", "Wa", "Wait,"])
def test_another_token_does_not(token: str) -> None:
    assert not says(token)
