"""Checks that activations, as they are computed, hold neither NaN nor infinity.

One NaN token would otherwise make every measurement, and every feature of a store, NaN. Each check waits for the device
once, whatever the number of layers and tokens; its error names the layer and the document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.finite_weights import NotFiniteError


def require_finite_activations(
    values: Mapping[str, Tensor], real: Bool[Tensor, "batch pos"], documents: Sequence[int], of: str
) -> None:
    """Raise NotFiniteError with the first layer, document and position that holds NaN or infinity.

    Args:
        values: activations [batch, pos, ...] by layer name, such as "layer 3", in the order of the model.
        real: mask of the tokens to check; padding may hold any value.
        documents: the number of the document in every row.
        of: the model that computed them, with which the message begins.
    """
    flags = {name: _finite_tokens(value) for name, value in values.items()}
    _require(flags, real, documents, of)


def by_layer_name(streams: Sequence[Tensor]) -> dict[str, Tensor]:
    """Residual streams at the embedding and after every layer, by layer name."""
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
    """Check the residual stream after each layer in all passes of a block; raise NotFiniteError at its end.

    Args:
        model: a model of TransformerLens.
        n_layers: its number of layers.
        real, documents, of: as in `require_finite_activations`.
        embedding: the input of the passes, where the caller has it. From the first layer on a token that is not finite
            can make earlier tokens NaN too (attention multiplies masked values by zero); the embedding shows which one
            it was.
    """
    flags = {} if embedding is None else {"the embedding": _finite_tokens(embedding)}

    def record(resid: Tensor, hook: HookPoint, layer: int) -> None:
        flags[f"layer {layer}"] = _finite_tokens(resid)

    hooks = [(f"blocks.{layer}.hook_resid_post", partial(record, layer=layer)) for layer in range(n_layers)]
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
    name, document, position = list(flags)[first[0]], documents[first[1]], first[2]
    n = int(bad[first[0]].sum())
    raise NotFiniteError(
        f"{of}: {name}, document {document} (from 0), position {position}: the activations are NaN or infinite there"
        + (f", and at {n - 1:,} more positions of the batch" if n > 1 else "")
        + ". float16 overflows above 65,504: run the models in bfloat16 or float32 (dtype=, --dtype). If they "
        "are already, check this document and the weights of this layer."
    )
