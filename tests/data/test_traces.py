"""Traces become batches; masks count what they say; the order is a function of seed and step."""

from collections import Counter

import pytest
import torch

from tl_adapters.config import REGIONS
from tl_adapters.data.batching import BatchOrder, TracesInMemory
from tl_adapters.data.traces import DataError, Trace, collate, rows_by_length


def some_traces(n: int = 50) -> list[Trace]:
    return [Trace(tuple(range(1, 5 + i % 7)), 2) for i in range(n)]


def test_masks_of_a_batch() -> None:
    batch = collate([Trace((5, 6, 7, 8), 2), Trace((9, 9), 1)])
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [9, 9, 0, 0]]
    assert batch.real.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.response.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert batch.predicting.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert batch.predicting_response.tolist() == [[False, True, True, False], [True, False, False, False]]


def test_only_counted_regions_count() -> None:
    trace = Trace((5, 6, 7, 8, 9), prompt_length=2, thinking_length=2)
    batch = collate([trace, Trace((9, 9), 1)], count=("answer",))
    assert batch.region.tolist() == [[1, 1, 2, 2, 3], [1, 3, 0, 0, 0]]
    assert batch.counted.tolist() == [[False] * 4 + [True], [False, True, False, False, False]]
    assert batch.predicting.tolist() == [[False, False, False, True, False], [True, False, False, False, False]]
    assert batch.predicting_response.tolist() == [[False, True, True, True, False], [True, False, False, False, False]]


@pytest.mark.parametrize("count", [("prompt",), ("thinking",), ("answer",), ("prompt", "answer"), REGIONS])
@pytest.mark.parametrize("lengths", [(1, 0, 1), (0, 1, 0), (2, 0, 0), (0, 2, 1), (1, 1, 0), (1, 0, 0)])
def test_a_trace_counts_where_its_batch_has_something_to_predict(
    count: tuple[str, ...], lengths: tuple[int, int, int]
) -> None:
    trace = Trace(tuple(range(sum(lengths))), lengths[0], lengths[1])
    assert trace.has_counted_tokens(count) == bool(collate([trace], count).predicting.any())


def test_a_cut_trace_ends_in_its_region() -> None:
    trace = Trace((5, 6, 7, 8, 9), prompt_length=2, thinking_length=2)
    assert collate([trace.cut(1)]).region.tolist() == [[1]]
    assert collate([trace.cut(3)]).region.tolist() == [[1, 1, 2]]
    assert trace.cut(5) is trace and trace.cut(None) is trace


def test_a_trace_of_which_nothing_counts_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    source = TracesInMemory([Trace((1, 2), 2), Trace((3, 4, 5), 2)], count=("answer",))
    assert [t.tokens for _, window in source.windows(0, None) for t in window] == [(3, 4, 5)]
    assert "1 traces are left out" in caplog.text
    with pytest.raises(DataError, match=r"None of the 1 traces.*count is \['answer'\]"):
        TracesInMemory([Trace((1, 2), 2)], count=("answer",))


def test_an_epoch_holds_every_trace_once() -> None:
    traces = [Trace((1, *range(2, 3 + i % 5), 100 + i), 1) for i in range(40)]
    order = BatchOrder(TracesInMemory(traces), tokens_per_batch=30, seed=0)
    n = len(rows_by_length(traces, 30))
    for epoch in range(2):
        seen = Counter(
            int(row[mask][-1])
            for step in range(epoch * n, (epoch + 1) * n)
            for row, mask in zip(order[step].tokens, order[step].real, strict=True)
        )
        assert seen == Counter(range(100, 140))


def test_the_order_depends_on_seed_and_step_alone() -> None:
    traces = some_traces()
    source = TracesInMemory(traces)
    forward, backward = BatchOrder(source, 40, seed=3), BatchOrder(source, 40, seed=3)
    steps = range(25)
    first = [forward[s].tokens for s in steps]
    second = [backward[s].tokens for s in reversed(steps)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = BatchOrder(source, 40, seed=4)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, (other[s].tokens for s in steps)))


def test_batches_stay_within_their_tokens() -> None:
    traces = some_traces()
    for rows in rows_by_length(traces, 40):
        assert collate([traces[i] for i in rows]).tokens.numel() <= 40
    assert [len(g) for g in rows_by_length([Trace(tuple(range(90)), 1)] * 2, 40)] == [1, 1]


def test_nothing_to_train_on_is_reported() -> None:
    with pytest.raises(DataError, match="at least one"):
        TracesInMemory([])
    with pytest.raises(DataError, match="at least one"):
        collate([])
