"""NaN and infinity stop where they come in: in weights as they are read, and in activations as they are computed.

One NaN token would otherwise make every figure, and every feature of a store, NaN. Each check waits for the device
once, whatever the number of layers and tokens; where something is found, the error names the layer and the document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.errors import UserError


class NotFiniteError(UserError, ArithmeticError):
    """Weights or activations that are NaN or infinite."""


def require_finite_weights(weights: Iterable[tuple[str, Tensor]], of: str) -> None:
    """Raises NotFiniteError naming the first weight that holds NaN or infinity.

    Args:
        weights: names, such as "layer 3, W_dec", and tensors of one device.
        of: what they are the weights of, at the beginning of the message.
    """
    named = [(name, weight.detach()) for name, weight in weights if weight.is_floating_point()]
    if not named:
        return
    finite = torch.stack([torch.isfinite(weight).all() for _, weight in named]).tolist()
    bad = [(name, weight) for (name, weight), good in zip(named, finite, strict=True) if not good]
    if bad:
        name, weight = bad[0]
        n = int((~torch.isfinite(weight)).sum())
        raise NotFiniteError(
            f"{of}: {name} holds {n:,} values of {weight.numel():,} that are NaN or infinite"
            + (f", and so do {len(bad) - 1} more tensors" if len(bad) > 1 else "")
            + ". Take an earlier checkpoint, or copy the files again; float16 overflows above 65,504, so cast to "
            "bfloat16 or float32."
        )


def require_finite_activations(
    values: Mapping[str, Tensor], real: Bool[Tensor, "batch pos"], documents: Sequence[int], of: str
) -> None:
    """Raises NotFiniteError naming the first place, document and position with NaN or infinity.

    Args:
        values: by place and in the order of the model, such as "layer 3"; each [batch, pos, ...].
        real: the tokens that count; padding may be anything.
        documents: of every row, its number.
        of: which model computed them, at the beginning of the message.
    """
    flags = {place: _finite_tokens(value) for place, value in values.items()}
    _require(flags, real, documents, of)


def by_place(streams: Sequence[Tensor]) -> dict[str, Tensor]:
    """Residual streams at the embedding and after every layer, by name."""
    return {"the embedding" if i == 0 else f"layer {i - 1}": stream for i, stream in enumerate(streams)}


@contextmanager
def finite_blocks(
    model: Any,
    n_layers: int,
    real: Bool[Tensor, "batch pos"],
    documents: Sequence[int],
    of: str,
    embedding: Tensor | None = None,
) -> Iterator[None]:
    """Every pass within the block is watched after each layer; at its end NotFiniteError as above.

    Args:
        model: a model of TransformerLens.
        n_layers: its layers.
        real, documents, of: as `require_finite_activations`.
        embedding: what the passes begin with, where it is at hand. A token that is not finite can spoil earlier ones
            from the first layer on (attention multiplies what it must not see by zero), and not here.
    """
    flags = {} if embedding is None else {"the embedding": _finite_tokens(embedding)}

    def look(resid: Tensor, hook: HookPoint, layer: int) -> None:
        flags[f"layer {layer}"] = _finite_tokens(resid)

    hooks = [(f"blocks.{layer}.hook_resid_post", partial(look, layer=layer)) for layer in range(n_layers)]
    with model.hooks(fwd_hooks=hooks):
        yield
    _require(flags, real, documents, of)


def _finite_tokens(value: Tensor) -> Bool[Tensor, "batch pos"]:
    return torch.isfinite(value.detach()).flatten(2).all(-1)


def _require(flags: Mapping[str, Tensor], real: Tensor, documents: Sequence[int], of: str) -> None:
    bad = real & ~torch.stack(list(flags.values()))
    if not bool(bad.any()):
        return
    first = bad.nonzero()[0].tolist()
    place, row, position = list(flags)[first[0]], documents[first[1]], first[2]
    n = int(bad[first[0]].sum())
    raise NotFiniteError(
        f"{of}: {place}, document {row} (from 0), position {position}: the activations are NaN or infinite there"
        + (f", and at {n - 1:,} more positions of the batch" if n > 1 else "")
        + ". float16 overflows above 65,504: run the models in bfloat16 or float32 (dtype=, --dtype). Where they are, "
        "look at this document, and at the weights of this layer."
    )
