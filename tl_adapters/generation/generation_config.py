"""What a model says about its own answers: the tokens that end them, how tokens are drawn, how long they may be.

It comes from the target's generation_config.json, its tokenizer and its chat template. A TransformerBridge has the
Hugging Face model's; a HookedTransformer that is built here keeps it as ``model.generation_config``. One made elsewhere
(see `attach`) has none: set it, to `transformers.GenerationConfig.from_pretrained(name)`, where the model ends its
answers with other tokens than its tokenizer and template name, or is to be sampled from.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import GenerationConfig

from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.generation.decoding import Decoding

log = logging.getLogger(__name__)

LONGEST_ANSWER = 32_768
"""Tokens of an answer where neither its problem nor generation_config.json names a limit (arXiv 2501.12948, section
3.1, evaluates DeepSeek-R1 with this one)."""
NOT_APPLIED = {"repetition_penalty": 1.0, "min_p": 0.0, "typical_p": 1.0, "no_repeat_ngram_size": 0}
"""Options of generation_config.json that change which tokens are drawn and are not applied here, and the values at
which they do nothing."""


def generation_config(model: Any) -> GenerationConfig:
    """The model's generation_config.json; an empty one where it has none."""
    holder = getattr(model, "original_model", model)
    return getattr(holder, "generation_config", None) or GenerationConfig()


def end_tokens(model: Any) -> list[int]:
    """Ids that end an answer: those of generation_config.json, the tokenizer's end token, the template's end of a turn.

    Raises DataError for a chat template that cannot be used.
    """
    named = generation_config(model).eos_token_id
    ends = set(named) if isinstance(named, list | tuple) else {named}
    if model.tokenizer is not None:
        ends.add(model.tokenizer.eos_token_id)
        if model.tokenizer.chat_template is not None:
            ends.update(ChatFormat.of(model.tokenizer).end_tokens)
    return sorted(int(token) for token in ends - {None})


def decoding_of(
    model: Any, temperature: float | None = None, top_p: float | None = None, top_k: int | None = None
) -> Decoding:
    """How tokens are chosen: as given, and else as generation_config.json says; greedy where it does not sample.

    ``temperature`` 0 is greedy whatever the file says, and a ``temperature`` given leaves top_p and top_k the file's.
    Raises CompletionError for values out of range.
    """
    config = generation_config(model)
    samples = bool(config.do_sample)
    if temperature is None:
        temperature = 0.0 if not samples else 1.0 if config.temperature is None else config.temperature
    if temperature == 0:
        return Decoding(0.0, 1.0 if top_p is None else top_p, top_k or 0)
    own_p, own_k = (config.top_p, config.top_k) if samples else (None, None)
    if samples:
        _say_what_is_left_out(config)
    return Decoding(
        float(temperature),
        float((1.0 if own_p is None else own_p) if top_p is None else top_p),
        int((own_k or 0) if top_k is None else top_k),
    )


def longest_answer(model: Any) -> int:
    """The limit of an answer whose problem names none: generation_config.json's max_new_tokens, or `LONGEST_ANSWER`."""
    return generation_config(model).max_new_tokens or LONGEST_ANSWER


def _say_what_is_left_out(config: GenerationConfig) -> None:
    for name, without_effect in NOT_APPLIED.items():
        value = getattr(config, name, None)
        if value is not None and value != without_effect:
            log.warning("generation_config.json asks for %s %s, which is not applied here.", name, value)
