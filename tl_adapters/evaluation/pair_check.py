"""A first look at a pair with adapters: is it the model that it should be, and are its adapters what they say?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tl_adapters import organism
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.faithfulness import measure_faithfulness
from tl_adapters.models.output_comparison import position_norms
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.devices import free_memory
from tl_adapters.utils.notebook import tables_view
from tl_adapters.utils.results import plain

_GB = 1e9
N_DOCUMENTS = 8
"""Number of documents of the model organism that are read where none are given."""


@dataclass(frozen=True)
class PairCheck:
    """What `check_pair` found; printed, it is a line for each."""

    logits_off: float | None
    """Largest distance of the target's logits from those of the Hugging Face model that it was made of, as a share of
    their norm, on a few tokens; None for a pair that was not made by `PairedModel.from_pretrained`."""
    kl_hybrid: float
    """KL(target || hybrid) in nats per response token: how much the base's MLPs change, without adapters."""
    kl_replacement: float
    """KL(target || replacement) in nats per response token: what the adapters leave of it."""
    l0: tuple[float, ...]
    """Active features per response token, by layer."""
    claimed_l0: float | None
    """Active features per token and layer that the set's own description tells, as a mean over layers; None if none."""
    tokens: int
    """Number of response tokens that were measured."""
    memory_left: int
    """Bytes that are free on the pair's device."""

    @property
    def mean_l0(self) -> float:
        """Active features per response token and layer."""
        return sum(self.l0) / len(self.l0)

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the mean L0, as JSON values."""
        return {**plain(self), "mean_l0": self.mean_l0}

    def _repr_html_(self) -> str:
        return tables_view((["check", ""], [line.partition(": ")[::2] for line in str(self).splitlines()]))

    def __repr__(self) -> str:
        off = "not known" if self.logits_off is None else f"{self.logits_off:.1e} of their norm"
        claimed = "" if self.claimed_l0 is None else f"; the set says {self.claimed_l0:.3g}"
        left = f", {self.kl_replacement / self.kl_hybrid:.1%} of the hybrid's" if self.kl_hybrid else ""
        return "\n".join(
            [
                f"logits of the target differ from Hugging Face's by: {off}",
                f"KL(target || replacement): {self.kl_replacement:.4g} nats per response token{left}",
                f"KL(target || hybrid): {self.kl_hybrid:.4g} nats per response token",
                f"L0: {self.mean_l0:.3g} per layer ({min(self.l0):.3g} to {max(self.l0):.3g}){claimed}",
                f"measured on: {self.tokens:,} response tokens; {self.memory_left / _GB:.3g} GB of memory left",
            ]
        )


@torch.no_grad()
def check_pair(pair: PairedModel, traces: Sequence[Trace]) -> PairCheck:
    """Compare the target with its Hugging Face model, and the adapters with what their description says.

    Args:
        pair: a pair with adapters on every layer.
        traces: some documents; eight are enough for a first look.

    Raises what `measure_faithfulness` raises.
    """
    sums = measure_faithfulness(pair, traces)
    positions = float(sums.positions.sum())
    return PairCheck(
        logits_off=_logits_off(pair),
        kl_hybrid=float(sums.kl["hybrid"].sum()) / positions,
        kl_replacement=float(sums.kl["replacement"].sum()) / positions,
        l0=tuple(sums.l0.tolist()),
        claimed_l0=claimed_l0(pair.installed_adapters().metadata.figures),
        tokens=int(positions),
        memory_left=free_memory(pair.device),
    )


def sums_to_read(pair: PairedModel) -> list[Trace]:
    """Eight documents of the model organism, in the chat format of the pair's target."""
    return encode_traces(organism.reasoning_pairs("report", N_DOCUMENTS, 0), pair.model.tokenizer)


def claimed_l0(figures: Mapping[str, Any]) -> float | None:
    """The mean over layers of the L0 that a set's figures tell; None where they tell none."""
    # A set may be anybody's, so a figure may be of any form.
    told = [figure for name, figure in figures.items() if name.startswith("L0, ") and isinstance(figure, Mapping)]
    values = [float(figure["value"]) for figure in told if isinstance(figure.get("value"), int | float)]
    return sum(values) / len(values) if values else None


def _logits_off(pair: PairedModel) -> float | None:
    if pair.hf_probe is None:
        return None
    tokens, expected = (part.to(pair.device) for part in pair.hf_probe)
    with pair.routed("target"):
        logits = pair.unembed(pair.run_blocks(pair.embed(tokens), 0, pair.n_layers))
    return float((position_norms(logits.float() - expected.float()) / position_norms(expected)).max())
