"""How faithfully adapters reproduce what training changed in the model (arXiv 2602.20904, section 4.1).

1. KL(target || x) for the hybrid, the replacement, and partial replacement: layers 0..i, layers i..L-1, layer i alone.
2. NMSE of the replacement's residual stream, at the embedding and after every layer.
3. L0 of every layer, and the number of alive features.

The headline figures count response tokens only (a KL counts positions whose next token belongs to the response); the
same figures over all tokens are given beside them. Everything is summed per document first, so that intervals are over
documents, and partial and full KL are paired. Prefixes are shared between the models: partial replacements start from
the target's or the replacement's own residual streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.adapters.l0 import active_counts
from tl_adapters.data.traces import Batch, Trace, batches_by_length, readable_traces
from tl_adapters.features.feature import ALIVE_FIRINGS
from tl_adapters.models.finite_activations import by_layer_name, require_finite_activations
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel
from tl_adapters.processes import processes
from tl_adapters.training.kl_divergence import token_kl_from_residual
from tl_adapters.utils.bootstrap import bootstrap_ratio, bootstrap_ratio_of_ratios
from tl_adapters.utils.clustered_intervals import clustered_share, event_rate
from tl_adapters.utils.html import measurement_cell, percent, three_digits
from tl_adapters.utils.measurement import Measurement
from tl_adapters.utils.notebook import data_frame, tables_view
from tl_adapters.utils.precision import host_float64, wide
from tl_adapters.utils.results import plain

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class DocumentSums:
    """The sums per document whose ratios are the reported figures; the first axis is the document."""

    kl: dict[str, Float[Tensor, "n"]]
    """KL in nats over response-predicting positions, by model: hybrid, replacement, first[i], last[i], only[i]."""
    kl_all: dict[str, Float[Tensor, "n"]]
    """The same over all positions that predict a token."""
    positions: Float[Tensor, "n"]
    """Number of positions that predict a response token."""
    positions_all: Float[Tensor, "n"]
    """Number of positions that predict a token."""
    same_top1: Float[Tensor, "n"]
    """Number of response-predicting positions where target and replacement have the same likeliest token."""
    error: Float[Tensor, "n streams"]
    """Squared error of the residual stream over response tokens, at the embedding and after each layer."""
    energy: Float[Tensor, "n streams"]
    """Squared norm of the target's residual stream over the same tokens."""
    error_all: Float[Tensor, "n streams 2"]
    """Squared error over all tokens: [..., 0] with position 0, [..., 1] without."""
    energy_all: Float[Tensor, "n streams 2"]
    """Squared norm of the target's residual stream over the same tokens."""
    active: Float[Tensor, "n n_layers"]
    """Number of active features, summed over response tokens."""
    active_all: Float[Tensor, "n n_layers"]
    """Number of active features, summed over all tokens."""
    tokens: Float[Tensor, "n"]
    """Number of response tokens."""
    tokens_all: Float[Tensor, "n"]
    """Number of tokens."""
    firings: Float[Tensor, "n_layers n_features"]
    """Number of tokens at which each feature is active, over all documents (no document axis)."""

    @property
    def l0(self) -> Float[Tensor, "n_layers"]:
        """L0 of each layer over the response tokens of all documents."""
        return self.active.sum(0) / self.tokens.sum()

    def __repr__(self) -> str:
        hybrid, replacement = (float(self.kl[name].sum() / self.positions.sum()) for name in ("hybrid", "replacement"))
        return (
            f"DocumentSums of {len(self.tokens):,} documents, {int(self.tokens.sum()):,} response tokens: KL of the "
            f"replacement {replacement:.4g}, of the hybrid {hybrid:.4g} nats per token, mean L0 {self.l0.mean():.3g}"
        )

    def to_dict(self, split: str = "") -> dict[str, Any]:
        """The reported figures with their intervals (`faithfulness_block`), as JSON values."""
        return plain(faithfulness_block(self, split))

    def to_pandas(self) -> DataFrame:
        """A DataFrame with a row per layer: KL with adapters up to, from and on that layer alone, NMSE, L0, alive."""
        return data_frame(self._by_layer())

    def _by_layer(self) -> dict[str, list[Any]]:
        layers, positions = range(self.active.shape[1]), float(self.positions.sum())
        nmse = self.error.sum(0) / self.energy.sum(0)  # of the embedding too, which comes first
        return {
            "layer": list(layers),
            **{
                f"kl_{kind}": [float(self.kl[f"{kind}[{i}]"].sum()) / positions for i in layers]
                for kind in ("first", "last", "only")
            },
            "nmse": nmse[1:].tolist(),
            "l0": self.l0.tolist(),
            "alive": (self.firings >= ALIVE_FIRINGS).sum(1).tolist(),
        }

    def _repr_html_(self) -> str:
        block = faithfulness_block(self, "")
        shown = {
            "KL(target || hybrid)": (block["kl"]["hybrid"], three_digits),
            "KL(target || replacement)": (block["kl"]["replacement"], three_digits),
            "the same of the hybrid's": (block["kl_of_hybrid"], percent),
            "same likeliest token": (block["top1_agreement"], percent),
        }
        head = [[name, measurement_cell(vars(figure), fmt), figure.unit] for name, (figure, fmt) in shown.items()]
        columns = self._by_layer()
        rows = [[f"{value:.3g}" for value in row] for row in zip(*columns.values(), strict=True)]
        return tables_view((["faithfulness", "95 % interval below", "unit"], head), (list(columns), rows))


def measure_faithfulness(pair: PairedModel, traces: Sequence[Trace], *, tokens_per_batch: int = 2048) -> DocumentSums:
    """The faithfulness sums of the pair's adapters on ``traces``.

    Of several processes of one launch, each measures its share of the documents, and all return the sums of all.

    Args:
        pair: a pair with adapters on every layer.
        traces: evaluation text; for published figures the target's own greedy text on held-out problems.
        tokens_per_batch: tokens of a forward pass.

    Raises:
        ArgumentError, DataError: ``traces`` holds something else than traces, or one that the model cannot read.
        PairMismatchError: the pair has no base, or a layer without an adapter.
        NotFiniteError: activations are NaN or infinite.
    """
    traces = readable_traces(traces, pair.model.cfg)
    batches = batches_by_length(traces, tokens_per_batch)
    own = processes().together(lambda: _measured(pair, processes().mine(list(batches))))
    shares = [share for share in processes().gathered(own) if share is not None]
    back = torch.tensor([row for rows, _ in shares for row in rows]).argsort()
    sums = _joined([part for _, part in shares])
    by_document = {name: value for name, value in vars(sums).items() if name != "firings"}
    return replace(sums, **{name: _rows(value, back) for name, value in by_document.items()})


def _measured(
    pair: PairedModel, batches: Sequence[tuple[Sequence[int], Batch]]
) -> tuple[list[int], DocumentSums] | None:
    """The sums of some batches, and which documents they hold in which order; None where there is no batch."""
    parts = [_measure_batch(pair, batch.to(pair.device), rows) for rows, batch in batches]
    return ([row for rows, _ in batches for row in rows], _joined(parts)) if parts else None


def _rows(value: Any, rows: Tensor) -> Any:
    return {key: each[rows] for key, each in value.items()} if isinstance(value, dict) else value[rows]


def _joined(parts: Sequence[DocumentSums]) -> DocumentSums:
    """The sums of the documents of all parts, in float64 on the CPU."""
    cat = lambda tensors: torch.cat([host_float64(t) for t in tensors])  # noqa: E731
    joined: dict[str, Any] = {}
    for name in DocumentSums.__dataclass_fields__:
        values = [getattr(part, name) for part in parts]
        if name == "firings":
            joined[name] = torch.stack([host_float64(value) for value in values]).sum(0)
        elif isinstance(values[0], dict):
            joined[name] = {key: cat([v[key] for v in values]) for key in values[0]}
        else:
            joined[name] = cat(values)
    return DocumentSums(**joined)


@torch.no_grad()
def _measure_batch(pair: PairedModel, batch: Batch, documents: Sequence[int]) -> DocumentSums:
    with pair.routed("target"):
        target = pair.residual_streams(batch.tokens)
    with pair.routed("replacement"), pair.recorded(ACTS_HOOK) as acts:
        replacement = pair.residual_streams(batch.tokens)
    for name, streams in (("target", target), ("replacement", replacement)):
        require_finite_activations(by_layer_name(streams), batch.real, documents, f"The {name}")
    response, everything = batch.predicting_response, batch.predicting

    kl: dict[str, Tensor] = {}
    at_predicting = everything.nonzero(as_tuple=True)  # once, since indexing with a mask waits for the device
    for names, final in _final_streams(pair, target, replacement):
        by_token = wide(torch.zeros(batch.tokens.shape, device=final.device))
        values = token_kl_from_residual(
            target[-1][at_predicting], final[at_predicting], pair.unembed, pair.rows_at_once
        )
        by_token[at_predicting] = values.to(by_token)
        kl |= dict.fromkeys(names, torch.stack([(by_token * response).sum(1), by_token.sum(1)]))
    of_response, of_all = host_float64(torch.stack(list(kl.values()), 1))

    same = torch.zeros_like(response)
    same[at_predicting] = _top1(pair, target[-1][at_predicting]) == _top1(pair, replacement[-1][at_predicting])
    errors = torch.stack([(wide(r) - wide(t)).square().sum(-1) for t, r in zip(target, replacement, strict=True)], -1)
    energies = torch.stack([wide(t).square().sum(-1) for t in target], -1)
    real, answer = batch.real[..., None], batch.response[..., None]
    count = lambda x, *dims: x.sum(dims).to(errors)  # noqa: E731
    active = lambda mask: torch.stack([active_counts(acts[i], mask) for i in range(pair.n_layers)], -1).to(errors)  # noqa: E731
    both = lambda x: torch.stack([(x * real).sum(1), (x * real)[:, 1:].sum(1)], -1)  # noqa: E731
    return DocumentSums(
        kl=dict(zip(kl, of_response, strict=True)),
        kl_all=dict(zip(kl, of_all, strict=True)),
        positions=count(response, 1),
        positions_all=count(everything, 1),
        same_top1=count(same & response, 1),
        error=(errors * answer).sum(1),
        energy=(energies * answer).sum(1),
        error_all=both(errors),
        energy_all=both(energies),
        active=active(batch.response),
        active_all=active(batch.real),
        tokens=count(batch.response, 1),
        tokens_all=count(batch.real, 1),
        firings=torch.stack([count((acts[layer] > 0) & real, 0, 1) for layer in range(pair.n_layers)]),
    )


def _final_streams(
    pair: PairedModel, target: list[Tensor], replacement: list[Tensor]
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The final residual streams of the hybrid, the replacement and every partial replacement, with their names."""
    n = pair.n_layers

    def run(route: str, resid: Tensor, start: int, stop: int = n) -> Tensor:
        with pair.routed(route):
            return pair.run_blocks(resid, start, stop)

    yield ("hybrid",), run("hybrid", target[0], 0)
    yield ("replacement", f"first[{n - 1}]", "last[0]", *(["only[0]"] if n == 1 else [])), replacement[-1]
    for i in range(n - 1):
        # Replacing layer 0 only is first[0], and replacing the last layer only is last[n - 1]: one pass, two names.
        yield (f"first[{i}]", *(["only[0]"] if i == 0 else [])), run("target", replacement[i + 1], i + 1)
    for i in range(1, n):
        yield (f"last[{i}]", *([f"only[{i}]"] if i == n - 1 else [])), run("replacement", target[i], i)
    for i in range(1, n - 1):
        yield (f"only[{i}]",), run("target", run("replacement", target[i], i, i + 1), i + 1)


def _top1(pair: PairedModel, resid: Tensor) -> Tensor:
    """The likeliest token at each position."""
    return torch.cat([pair.unembed(part).argmax(-1) for part in resid.split(pair.rows_at_once)])


def faithfulness_block(sums: DocumentSums, split: str, seeds: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """The block "faithfulness" of results.json, with an interval on every figure."""
    n, n_layers = len(sums.tokens), sums.active.shape[1]

    def figure(top: Tensor, bottom: Tensor, unit: str) -> Measurement:
        return bootstrap_ratio(top, bottom).measurement(n, unit, split, seeds)

    def l0(active: Tensor, tokens: Tensor, unit: str) -> Measurement:
        return event_rate(active, tokens).measurement(n, unit, split, seeds)

    def kl(name: str, unit: str = "nats per response token") -> Measurement:
        return figure(sums.kl[name], sums.positions, unit)

    def against_full(name: str) -> Measurement:
        full = (sums.kl["replacement"], sums.positions)
        ratio = bootstrap_ratio_of_ratios((sums.kl[name], sums.positions), full)
        return ratio.measurement(n, "KL over the KL of full replacement", split, seeds)

    layers = range(n_layers)
    share = bootstrap_ratio_of_ratios((sums.kl["replacement"], sums.positions), (sums.kl["hybrid"], sums.positions))
    ratio = "squared error over squares"
    alive = (sums.firings >= ALIVE_FIRINGS).sum(1)
    return {
        "kl": {name: kl(name) for name in ("hybrid", "replacement")},
        "kl_of_hybrid": share.measurement(n, "KL of the replacement over KL of the hybrid", split, seeds),
        "kl_all_tokens": {
            name: figure(sums.kl_all[name], sums.positions_all, "nats per token") for name in ("hybrid", "replacement")
        },
        **{f"kl_{kind}": [kl(f"{kind}[{i}]") for i in layers] for kind in ("first", "last", "only")},
        "partial_of_full": {kind: [against_full(f"{kind}[{i}]") for i in layers] for kind in ("first", "last", "only")},
        "nmse": [figure(sums.error[:, i], sums.energy[:, i], ratio) for i in range(n_layers + 1)],
        "nmse_all_tokens": [
            figure(sums.error_all[:, i, 0], sums.energy_all[:, i, 0], ratio) for i in range(n_layers + 1)
        ],
        "nmse_without_position_0": [
            figure(sums.error_all[:, i, 1], sums.energy_all[:, i, 1], ratio) for i in range(n_layers + 1)
        ],
        "l0": [l0(sums.active[:, i], sums.tokens, "active features per response token") for i in layers],
        "l0_all_tokens": [l0(sums.active_all[:, i], sums.tokens_all, "active features per token") for i in layers],
        "dead": (sums.firings.shape[1] - alive).tolist(),
        "top1_agreement": clustered_share(sums.same_top1, sums.positions).measurement(
            n, "share of response tokens", split, seeds
        ),
        "tokens": {"response": int(sums.tokens.sum()), "all": int(sums.tokens_all.sum())},
    }


def features_block(sums: DocumentSums) -> dict[str, int]:
    """The block "features" of results.json: the numbers of features, of alive features and of tokens."""
    alive = int((sums.firings >= ALIVE_FIRINGS).sum())
    return {"total": sums.firings.numel(), "alive": alive, "tokens": int(sums.tokens_all.sum())}
