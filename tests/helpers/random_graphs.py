"""Attribution graphs of random weights."""

from __future__ import annotations

import torch

from tl_adapters.attribution.graph import AttributionGraph, GraphTarget


def random_graph(seed: int, with_errors: bool, n_features: int | None = None) -> AttributionGraph:
    """Features of a few layers, some never fed; edges go up in layer and never back in position, some weigh nothing."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    n_layers, n_tokens, n_targets = draw(1, 5), draw(2, 7), draw(1, 4)
    drawn = [(draw(0, n_layers), draw(0, n_tokens), i) for i in range(n_features or draw(1, 60))]
    features = sorted(drawn)
    errors = [(layer, p) for layer in range(n_layers) for p in range(n_tokens)] if with_errors else []
    n = len(features) + len(errors) + n_tokens
    sources = [(la, p) for la, p, _ in features] + errors + [(-1, p) for p in range(n_tokens)]
    goals = {i: (la, p) for i, (la, p, _) in enumerate(features) if draw(0, 10)}
    goals |= {n + i: (n_layers, n_tokens - 1) for i in range(n_targets)}
    edges: dict[tuple[int, int], float] = {}
    for goal, (layer, position) in goals.items():
        for source, (below, p) in enumerate(sources):
            if below < layer and p <= position and draw(0, 10) < 7:
                value = torch.randn(2, generator=generator, dtype=torch.float64)
                edges[goal, source] = float(value[0] * value[1].exp()) if draw(0, 12) else 0.0
        edges[goal, n - n_tokens] = 0.25 + draw(0, 100) / 70  # from the first token; so no target is without any
    weights = torch.rand(n_targets, generator=generator, dtype=torch.float64) / n_targets
    return build(features, errors, n_tokens, weights.sort(descending=True).values.tolist(), edges, n_layers)


def build(
    features: list[tuple[int, int, int]],
    errors: list[tuple[int, int]],
    n_tokens: int,
    weights: list[float],
    edges: dict[tuple[int, int], float],
    n_layers: int = 4,
    dtype: torch.dtype = torch.float64,
) -> AttributionGraph:
    """A graph of logits with these ``weights``, from edges {(target, source): weight}."""
    pairs = sorted(edges)
    first_target = len(features) + len(errors) + n_tokens
    rows = [*range(len(features)), *range(first_target, first_target + len(weights))]
    return AttributionGraph(
        tokens=torch.arange(n_tokens) + 5,
        strings=[f" t{i}" for i in range(n_tokens)],
        n_layers=n_layers,
        features=torch.tensor(features, dtype=torch.long).reshape(-1, 3),
        activations=torch.arange(len(features)).to(dtype) + 0.5,
        errors=torch.tensor(errors, dtype=torch.long).reshape(-1, 2),
        targets=[GraphTarget(f"out{i}", n_tokens - 1, w, token=i, probability=w) for i, w in enumerate(weights)],
        edges=torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T.contiguous(),
        weights=torch.tensor([edges[pair] for pair in pairs], dtype=dtype),
        rows=torch.tensor(rows),
        balance=torch.zeros(len(rows), 4, dtype=dtype),
        decoder_biases=torch.zeros(len(rows), dtype=dtype),
    )
