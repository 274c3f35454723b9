"""Padding is never inferred from token ids: every token of a prompt is read, whatever its first or last token."""

import logging
from typing import Any

import pytest
import torch
from helpers.random_models import random_model, randomise
from helpers.users_models import plain

from tl_adapters.generation.completions import complete
from tl_adapters.models.attach import attach
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism.recipe import build_tokenizer

PAD = 3
PROMPTS = {
    "begins with one": [PAD, 20, 21, 22, 23],
    "begins with two": [PAD, PAD, 21, 22, 23],
    "ends with one": [20, 21, 22, 23, PAD],
    "is one": [PAD],
}


def padded_pair(backend: str, side: str) -> tuple[PairedModel, Any]:
    """A pair whose tokenizer pads with an ordinary token, and the Hugging Face target."""
    tokenizer = build_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.convert_ids_to_tokens(PAD), side
    base, target = (random_model(seed, vocab_size=len(tokenizer)) for seed in (1, 2))
    reference = random_model(2, vocab_size=len(tokenizer))
    pair = randomise(PairedModel.from_pretrained(base, target, tokenizer=tokenizer, backend=backend))
    pair.route_layers("target")
    return pair, reference


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@torch.no_grad()
def test_every_call_reads_pad_tokens_in_a_prompt(backend: str, side: str) -> None:
    pair, reference = padded_pair(backend, side)
    for prompt in PROMPTS.values():
        tokens = torch.tensor([prompt])
        expected = reference(tokens).logits
        greedy = list(prompt)
        for _ in range(6):
            greedy.append(int(reference(torch.tensor([greedy])).logits[0, -1].argmax()))
        (completion,) = complete(pair.model, [prompt], stop_at=[], max_new_tokens=6, batch_size=1)
        assert [*prompt, *completion.tokens] == greedy
        assert complete(pair.model, [prompt, [5] * 9], stop_at=[], max_new_tokens=6, batch_size=2)[0] == completion
        for logits in (
            pair.model(tokens),
            pair.model.run_with_cache(tokens)[0],
            pair.unembed(pair.residual_streams(tokens)[-1]),
        ):
            assert torch.allclose(logits, expected, atol=1e-4)
        options = dict(max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False)
        assert pair.model.generate(tokens, **options)[0].tolist() == greedy
    assert pair.model.tokenizer.padding_side == side and pair.model.tokenizer.pad_token_id == PAD


def test_a_users_model_infers_no_padding_while_adapters_are_attached() -> None:
    source, cls = plain(), type(plain())
    adapters = randomise(PairedModel.from_pretrained(random_model(1), random_model(2))).installed_adapters()
    source.tokenizer = build_tokenizer()
    source.tokenizer.pad_token, source.tokenizer.padding_side = source.tokenizer.convert_ids_to_tokens(PAD), "left"
    tokens = torch.tensor([[PAD, 20, 21]])
    with torch.no_grad():
        expected = source(tokens, attention_mask=torch.ones_like(tokens))
        assert not torch.allclose(source(tokens), expected, atol=1e-3), "stock TransformerLens infers padding"
        pair = attach(source, adapters, base=random_model(1))
        with pair.routed("target") as model:
            assert torch.allclose(model(tokens), expected, atol=1e-10)
        assert isinstance(source, cls)
        assert type(pair.release()) is cls
        assert not torch.allclose(source(tokens), expected, atol=1e-3), "restored"


def test_texts_are_padded_and_masked_and_ids_that_look_padded_raise_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    pair, _ = padded_pair("hooked", "left")
    texts = ["47+85=", "1"]
    with torch.no_grad():
        together = pair.model(texts, prepend_bos=False)
        alone = [pair.model(text, prepend_bos=False) for text in texts]
    assert all(torch.allclose(together[i, -1], alone[i][0, -1], atol=1e-10) for i in range(2))
    with caplog.at_level(logging.WARNING, logger="tl_adapters"), torch.no_grad():
        pair.model(torch.tensor([[PAD, 20], [21, 22]]), attention_mask=torch.tensor([[0, 1], [1, 1]]))
        pair.model(torch.tensor([[PAD, 20], [PAD, 22]]))
        assert not caplog.records
        pair.model(torch.tensor([[PAD, 20], [21, 22]]))
    assert "give attention_mask=" in caplog.text
