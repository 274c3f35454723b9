"""A HookedTransformer that reads the token ids it is given, and masks only what it is told to.

Stock TransformerLens guesses: without ``attention_mask`` its forward pass (run_with_cache too) takes pad tokens at the
beginning for padding where the tokenizer pads on the left, and ``generate`` takes those at the beginning or the end,
whichever side the tokenizer pads. So a prompt that begins with the pad token (where that is the BOS token, say) loses
it. While adapters are attached, token ids are read whole; texts are padded and masked as ever, since there it is known.
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


class ReadsWhole:
    """Stands before a HookedTransformer's class."""

    tokenizer: Any

    def input_to_embed(self, input: Any, *args: Any, attention_mask: Any = None, **options: Any) -> Any:
        """As HookedTransformer.input_to_embed; token ids without a mask are all real."""
        if isinstance(input, Tensor) and attention_mask is None and self.tokenizer is not None:
            tokens = input if input.ndim > 1 else input[None]
            if self.tokenizer.padding_side == "left":
                _warn_of_padding(tokens, self.tokenizer.pad_token_id)
            attention_mask = torch.ones_like(tokens)
            if self.tokenizer.padding_side != "left" and options.get("past_kv_cache") is None:
                attention_mask = None  # the same, and the faster attention
        return super().input_to_embed(input, *args, attention_mask=attention_mask, **options)  # type: ignore[misc]

    def generate(self, input: Any = "", *args: Any, **options: Any) -> Any:
        """As HookedTransformer.generate; token ids are all real."""
        if not isinstance(input, Tensor) or input.is_floating_point() or self.tokenizer is None:
            return super().generate(input, *args, **options)  # type: ignore[misc]
        _warn_of_padding(input if input.ndim > 1 else input[None], self.tokenizer.pad_token_id)
        with self._without_padding():
            return super().generate(input, *args, **options)  # type: ignore[misc]

    @contextmanager
    def _without_padding(self) -> Iterator[None]:
        tokenizer, self.tokenizer = self.tokenizer, _NoPadding(self.tokenizer)
        try:
            yield
        finally:
            self.tokenizer = tokenizer


class _NoPadding:
    """A tokenizer in all but its pad token, which is an id that no text has."""

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
    """Say so where some rows begin with the pad token and others do not: that looks like padding."""
    if pad is not None and len(tokens) > 1 and 0 < int((tokens[:, 0] == pad).sum()) < len(tokens):
        log.warning(
            "Some rows of the token ids begin with the pad token, and no attention_mask was given: they are read as "
            "tokens. Give attention_mask=, or texts, where they are padding (to generate: completions.complete)."
        )


def reads_whole(cls: type) -> type:
    """The class that reads token ids whole, of a HookedTransformer's; one and the same for every model, for copies."""
    if issubclass(cls, ReadsWhole):
        return cls
    if cls not in _CLASSES:
        _CLASSES[cls] = type(cls.__name__, (ReadsWhole, cls), {"__module__": cls.__module__})
    return _CLASSES[cls]


_CLASSES: dict[type, type] = {}
