"""A HookedTransformer that does not infer padding from token ids: it masks only what the caller masks.

Stock TransformerLens infers padding where no ``attention_mask`` is given. Its forward pass (and run_with_cache) treats
pad tokens at the beginning as padding where the tokenizer pads on the left, and ``generate`` those at the beginning or
the end, whichever side the tokenizer pads. So a prompt that begins with the pad token (which may be the BOS token)
loses it. While adapters are attached, all token ids given are real. Texts are padded and masked as in stock
TransformerLens, since their padding is known.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)


class NoPaddingInference:
    """A mixin before a HookedTransformer's class: token ids without an attention mask are all real."""

    tokenizer: Any

    def input_to_embed(self, input: Any, *args: Any, attention_mask: Any = None, **options: Any) -> Any:
        """As HookedTransformer.input_to_embed, with all token ids real where no mask is given."""
        if isinstance(input, Tensor) and attention_mask is None and self.tokenizer is not None:
            tokens = input if input.ndim > 1 else input[None]
            if self.tokenizer.padding_side == "left":
                _warn_of_padding(tokens, self.tokenizer.pad_token_id)
            attention_mask = torch.ones_like(tokens)
            if self.tokenizer.padding_side != "left" and options.get("past_kv_cache") is None:
                attention_mask = None  # the same result, in the faster attention
        return super().input_to_embed(input, *args, attention_mask=attention_mask, **options)  # type: ignore[misc]

    def generate(self, input: Any = "", *args: Any, **options: Any) -> Any:
        """As HookedTransformer.generate, with all token ids real."""
        if not isinstance(input, Tensor) or input.is_floating_point() or self.tokenizer is None:
            return super().generate(input, *args, **options)  # type: ignore[misc]
        _warn_of_padding(input if input.ndim > 1 else input[None], self.tokenizer.pad_token_id)
        with self._without_pad_token():
            return super().generate(input, *args, **options)  # type: ignore[misc]

    @contextmanager
    def _without_pad_token(self) -> Iterator[None]:
        tokenizer, self.tokenizer = self.tokenizer, _NoPadToken(self.tokenizer)
        try:
            yield
        finally:
            self.tokenizer = tokenizer


class _NoPadToken:
    """A tokenizer whose pad token is an id that no text has; everything else is the wrapped tokenizer's."""

    pad_token_id = -1

    def __init__(self, tokenizer: Any) -> None:
        self.__dict__["tokenizer"] = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["tokenizer"], name, value)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.__dict__["tokenizer"](*args, **options)


def _warn_of_padding(tokens: Tensor, pad: int | None) -> None:
    """Warn where some rows begin with the pad token and others do not, which looks like padding."""
    if pad is not None and len(tokens) > 1 and 0 < int((tokens[:, 0] == pad).sum()) < len(tokens):
        log.warning(
            "Some rows of the token ids begin with the pad token, and no attention_mask was given, so they are read as "
            "tokens. If they are padding, give attention_mask= or texts (to generate: completions.complete)."
        )


def without_padding_inference(cls: type) -> type:
    """The subclass of a HookedTransformer class that infers no padding, the same for every model and every copy."""
    if issubclass(cls, NoPaddingInference):
        return cls
    if cls not in _SUBCLASSES:
        _SUBCLASSES[cls] = type(cls.__name__, (NoPaddingInference, cls), {"__module__": cls.__module__})
    return _SUBCLASSES[cls]


_SUBCLASSES: dict[type, type] = {}
