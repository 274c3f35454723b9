"""Defaults of generation that come with the model: its end tokens, its sampling parameters, its limit.

They are read from the target's generation_config.json, its tokenizer and its chat template. A TransformerBridge has the
Hugging Face model's; a HookedTransformer that this package builds keeps it as ``model.generation_config``. One built
elsewhere (see `attach`) has none: set it to `transformers.GenerationConfig.from_pretrained(name)` where the model ends
its responses with other tokens than its tokenizer and template name, or where it should be sampled from.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import GenerationConfig

from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.generation.sampling import SamplingParameters

log = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 32_768
"""Limit of a response where neither its problem nor generation_config.json names one: the limit with which DeepSeek-R1
is evaluated (arXiv 2501.12948, section 3.1)."""
NOT_APPLIED = {"repetition_penalty": 1.0, "min_p": 0.0, "typical_p": 1.0, "no_repeat_ngram_size": 0}
"""Options of generation_config.json that change which tokens are drawn and are not applied here -> the values at which
they have no effect."""


def generation_config(model: Any) -> GenerationConfig:
    """The model's generation_config.json; an empty one where it has none."""
    owner = getattr(model, "original_model", model)
    return getattr(owner, "generation_config", None) or GenerationConfig()


def end_tokens(model: Any) -> list[int]:
    """Ids of the tokens that end a response, sorted.

    They are the end tokens of generation_config.json, the tokenizer's end token and the template's end of a turn.
    Raises DataError for a chat template that cannot be used.
    """
    configured = generation_config(model).eos_token_id
    ids = set(configured) if isinstance(configured, list | tuple) else {configured}
    if model.tokenizer is not None:
        ids.add(model.tokenizer.eos_token_id)
        if model.tokenizer.chat_template is not None:
            ids.update(ChatFormat.of(model.tokenizer).end_tokens)
    return sorted(int(token) for token in ids - {None})


def sampling_parameters(
    model: Any, temperature: float | None = None, top_p: float | None = None, top_k: int | None = None
) -> SamplingParameters:
    """Sampling parameters as given, completed by generation_config.json; greedy where neither asks for sampling.

    ``temperature`` 0 is greedy whatever the file says; a ``temperature`` above 0 keeps the file's top_p and top_k.
    Raises GenerationError for values out of range.
    """
    config = generation_config(model)
    samples = bool(config.do_sample)
    if temperature is None:
        temperature = 0.0 if not samples else 1.0 if config.temperature is None else config.temperature
    default_top_p, default_top_k = None, None
    if samples and temperature != 0:
        default_top_p, default_top_k = config.top_p, config.top_k
        _warn_of_options_not_applied(config)
    top_p = default_top_p if top_p is None else top_p
    top_k = default_top_k if top_k is None else top_k
    return SamplingParameters(float(temperature), 1.0 if top_p is None else float(top_p), int(top_k or 0))


def default_max_new_tokens(model: Any) -> int:
    """The limit of a response whose problem names none: that of generation_config.json, else 32,768."""
    return generation_config(model).max_new_tokens or DEFAULT_MAX_NEW_TOKENS


def _warn_of_options_not_applied(config: GenerationConfig) -> None:
    for name, without_effect in NOT_APPLIED.items():
        value = getattr(config, name, None)
        if value is not None and value != without_effect:
            log.warning("generation_config.json asks for %s %s, which is not applied here.", name, value)
