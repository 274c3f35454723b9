"""Text made of tokens: characters that several tokens spell, and spaces that decoding a token alone drops."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tl_adapters.autointerp.prompts import activation_excerpt, detection_excerpt
from tl_adapters.data.tokens import CONTINUATION, span_texts, token_text
from tl_adapters.features.feature import Example

TEXTS = ["日本は 47+85=132.", "naïve  café\n\n🤔 wait", "x é̀ \u200d🏳️\u200d🌈", " leading", "<think>\nWait</think>"]


def byte_level() -> PreTrainedTokenizerBase:
    """As GPT-2, Qwen and Llama 3 have it; hardly any merges, so most characters are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["Wait, 日日日"] * 4, trainers.BpeTrainer(vocab_size=266, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece(prefix: bool) -> PreTrainedTokenizerBase:
    """As Llama 2 (with a space before the text) and Gemma (without) have it: a sign for spaces, bytes as a fallback."""
    words = ["▁", "▁Wait", "▁wait", "W", "a", "i", "t", "▁47", "+", "85", "=", "1", "3", "2", ".", "é", "n", "<", ">"]
    vocabulary = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), *((w, -1.0) for w in words)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    before = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS = {"byte level": byte_level, "Llama 2": lambda: sentencepiece(True), "Gemma": lambda: sentencepiece(False)}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("text", TEXTS)
def test_the_texts_of_a_span_join_to_its_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    names = [token_text(tokenizer, token) for token in ids]
    assert tokenizer.decode(ids) == text
    # A text of Llama 2's begins with a space that its tokenizer puts there and its decoder takes off.
    assert "".join(span_texts(names)) in (text, " " + text)
    assert all(span_texts(names, CONTINUATION))


def test_different_tokens_have_different_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    names = [token_text(tokenizer, token) for token in range(len(tokenizer))]
    assert len(set(names)) == len(names) and all(names)
    assert not any("\N{REPLACEMENT CHARACTER}" in name for name in names)


def test_bytes_of_no_character_are_shown_as_bytes(tokenizer: PreTrainedTokenizerBase) -> None:
    names = [token_text(tokenizer, t) for t in tokenizer("本a", add_special_tokens=False)["input_ids"]]
    broken = [name for name in names if name.strip()][1:]  # the character's first byte is missing
    assert "".join(span_texts(broken)).endswith("a") and "<0x" in "".join(span_texts(broken))


def test_tokens_without_a_text_have_a_name() -> None:
    tokenizer = byte_level()
    assert token_text(tokenizer, len(tokenizer) + 3) == f"[{len(tokenizer) + 3}]"
    assert token_text(None, 7) == "7"


def test_a_judge_reads_characters_and_the_strongest_of_their_tokens() -> None:
    tokenizer = byte_level()
    ids = tuple(tokenizer("a本b", add_special_tokens=False)["input_ids"])
    assert len(ids) == 5
    names = tuple(token_text(tokenizer, token) for token in ids)
    example = Example(names, ids, (0.0, 0.0, 0.0, 2.0, 0.0), 3, 0, 3)
    assert activation_excerpt(example, 2.0) == ["a", {"fires": "本", "strength": 10}, "b"]
    assert detection_excerpt(example) == {"before": "a", "token": "本", "after": "b"}
    assert example.display_texts == ["a", "本", CONTINUATION, CONTINUATION, "b"] and example.texts == [
        "a",
        "本",
        "",
        "",
        "b",
    ]
