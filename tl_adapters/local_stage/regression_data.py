"""What the adapters of all layers are regressed on: the inputs that they read and the outputs that they should have.

Adapters explain the difference of the two MLPs of a pair (`MLPDifferences`), ordinary transcoders the whole output of
one model's MLPs (`MLPOutputs`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_adapters.adapters.saelens_folder import INPUT_HOOKS, OUTPUT_HOOKS
from tl_adapters.data.batching import TraceSource
from tl_adapters.data.traces import Batch, Trace, collate, readable_traces
from tl_adapters.errors import UserError
from tl_adapters.local_stage.signal_to_noise import SignalToNoise, signal_to_noise
from tl_adapters.models.paired_model import PairedModel

READS, WRITES = "normalized", "mlp_out"
"""What a transcoder of a model's own MLP reads and writes, as `AdapterMetadata` names it."""

FIRST_DOCUMENTS, FIRST_TOKENS = 8, 256
"""Number of documents, and of tokens of each, on which the signal to noise of a pair is measured."""


class HookMissingError(UserError, ValueError):
    """A model without a hook point that transcoders read or write."""


@runtime_checkable
class RegressionData(Protocol):
    """Inputs and wanted outputs of every layer's adapter."""

    n_layers: int
    """Number of layers of the model."""
    d_model: int
    """Width of inputs and outputs."""
    d_vocab: int
    """Number of token ids that the model embeds."""
    dtype: torch.dtype
    """Dtype of the model."""
    device: torch.device
    """Device of the model."""

    def read(
        self, batch: Batch, layers: Sequence[int] | None = None
    ) -> Iterator[tuple[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]]:
        """Inputs and wanted outputs of one layer after another, or of some, at the counted tokens of a batch."""
        ...

    def signal_to_noise(
        self, layer: int, x: Float[Tensor, "n d_model"], d: Float[Tensor, "n d_model"]
    ) -> SignalToNoise | None:
        """How large the wanted outputs d of a layer are beside rounding errors; None where they are no difference."""
        ...


class MLPDifferences:
    """What every layer's MLP reads in the target of a pair, and MLP_target(x) - MLP_base(x), in float32 at least."""

    def __init__(self, pair: PairedModel) -> None:
        self.pair, self.n_layers, self.device = pair, pair.n_layers, pair.device
        cfg = pair.model.cfg
        self.d_model, self.d_vocab, self.dtype = cfg.d_model, cfg.d_vocab, cfg.dtype

    @torch.no_grad()
    def read(
        self, batch: Batch, layers: Sequence[int] | None = None
    ) -> Iterator[tuple[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]]:
        """Like `RegressionData.read`."""
        pair, batch = self.pair, batch.to(self.device)
        with pair.routed("target"), pair.recorded("mlp.hook_in") as inputs, self._outputs() as outputs:
            pair.run_blocks(pair.embed(batch.tokens), 0, pair.n_layers)
        counted = batch.counted.flatten().nonzero()[:, 0]
        for layer in range(pair.n_layers) if layers is None else layers:
            mlp, both = pair.mlps[layer], (inputs[layer], outputs[layer])
            x, output = (values.flatten(0, 1).index_select(0, counted) for values in both)
            yield mlp.adapter_input(x), mlp.difference(x, output)

    @contextmanager
    def _outputs(self) -> Iterator[dict[int, Tensor]]:
        """Layer to what its MLP has written last, for the length of a block."""
        latest: dict[int, Tensor] = {}

        def keep(mlp: nn.Module, args: object, out: Tensor, layer: int) -> None:
            latest[layer] = out

        with ExitStack() as handles:
            for layer, mlp in enumerate(self.pair.mlps):
                handles.enter_context(mlp.register_forward_hook(partial(keep, layer=layer)))
            yield latest

    def signal_to_noise(
        self, layer: int, x: Float[Tensor, "n d_model"], d: Float[Tensor, "n d_model"]
    ) -> SignalToNoise:
        """Like `RegressionData.signal_to_noise`."""
        return signal_to_noise(*self.pair.mlps[layer].weights(), x.to(self.device), d.to(self.device))


@torch.no_grad()
def pair_signal_to_noise(pair: PairedModel, traces: Sequence[Trace] | TraceSource) -> list[SignalToNoise] | None:
    """How large the difference of every layer is beside the rounding of weights, on the first of some documents.

    Returns None for a pair without a base, with norms folded into the target's weights alone, without documents, or
    where a weight or activation is not finite, which whoever reads the documents finds and names.
    """
    if not pair.has_base or any(mlp.base_scale is not None for mlp in pair.mlps):
        return None
    documents = traces if isinstance(traces, Sequence) else next(traces.windows(0, None), (None, []))[1]
    first = [trace.cut(FIRST_TOKENS) for trace in readable_traces(documents[:FIRST_DOCUMENTS], pair.model.cfg)]
    if not first:
        return None
    data = MLPDifferences(pair)
    measured = [data.signal_to_noise(layer, x, d) for layer, (x, d) in enumerate(data.read(collate(first)))]
    return measured if all(math.isfinite(found.energy) for found in measured) else None


class MLPOutputs:
    """What every layer's MLP reads in a TransformerLens model, and its output, at the hook points that SAELens names.

    The input is the second norm's output before its weight (``blocks.N.ln2.hook_normalized``), the output is what the
    layer adds to the residual stream (``blocks.N.hook_mlp_out``, after a norm that follows the MLP). The first token of
    a document is left out: in many models its output is hundreds of times as long as any other, and always the same.

    Args:
        model: a HookedTransformer or a TransformerBridge, with any processing of its weights.

    Raises HookMissingError for a model without these hook points, such as one whose attention and MLP share a norm.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.n_layers, self.d_model = model, model.cfg.n_layers, model.cfg.d_model
        self.d_vocab, self.dtype, device = model.cfg.d_vocab, model.cfg.dtype, next(model.parameters()).device
        self.device = torch.device(model.cfg.device) if device.type == "meta" else device  # meta: it is offloaded
        for hook in (INPUT_HOOKS[READS].format(0), OUTPUT_HOOKS[WRITES].format(0)):
            if hook not in model.hook_dict:
                raise HookMissingError(
                    f"This {type(model).__name__} has no {hook}; transcoders need a model with a norm before every MLP."
                )

    @torch.no_grad()
    def read(
        self, batch: Batch, layers: Sequence[int] | None = None
    ) -> Iterator[tuple[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]]:
        """Like `RegressionData.read`."""
        batch, recorded = batch.to(self.device), dict[str, Tensor]()
        counted = batch.counted.clone()
        counted[:, 0] = False

        def keep(value: Tensor, hook: Any, name: str) -> None:
            recorded[name] = value[counted]

        layers = range(self.n_layers) if layers is None else layers
        names = [(INPUT_HOOKS[READS].format(layer), OUTPUT_HOOKS[WRITES].format(layer)) for layer in layers]
        with self.model.hooks(fwd_hooks=[(name, partial(keep, name=name)) for both in names for name in both]):
            self.model(batch.tokens, attention_mask=batch.real.long(), stop_at_layer=self.n_layers)
        for x, output in names:
            yield recorded[x], recorded[output]

    def signal_to_noise(self, layer: int, x: Float[Tensor, "n d_model"], d: Float[Tensor, "n d_model"]) -> None:
        """Like `RegressionData.signal_to_noise`: a whole output is far above the rounding of its MLP's weights."""
