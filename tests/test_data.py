"""Traces become batches; masks count what they say; the order is a function of seed and step."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tl_adapters.data import BatchOrder, DataError, Trace, collate, encode_traces, read_jsonl, rows_by_length
from tl_adapters.organism.recipe import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


def some_traces(n: int = 50) -> list[Trace]:
    return [Trace(tuple(range(1, 5 + i % 7)), 2) for i in range(n)]


def test_masks_of_a_batch() -> None:
    batch = collate([Trace((5, 6, 7, 8), 2), Trace((9, 9), 1)])
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [9, 9, 0, 0]]
    assert batch.real.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.response.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert batch.predicting.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert batch.predicting_response.tolist() == [[False, True, True, False], [True, False, False, False]]


def test_every_epoch_shows_every_trace_once() -> None:
    traces = [Trace((1, *range(2, 3 + i % 5), 100 + i), 1) for i in range(40)]
    order = BatchOrder(traces, tokens_per_batch=30, seed=0)
    n = len(rows_by_length(traces, 30))
    for epoch in range(2):
        seen = Counter(
            int(row[mask.bool()][-1])
            for step in range(epoch * n, (epoch + 1) * n)
            for row, mask in zip(order[step].tokens, order[step].attention_mask, strict=True)
        )
        assert seen == Counter(range(100, 140))


def test_the_order_depends_on_seed_and_step_alone() -> None:
    traces = some_traces()
    forward, backward = BatchOrder(traces, 40, seed=3), BatchOrder(traces, 40, seed=3)
    steps = range(25)
    first = [forward[s].tokens for s in steps]
    second = [backward[s].tokens for s in reversed(steps)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = BatchOrder(traces, 40, seed=4)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, (other[s].tokens for s in steps)))


def test_batches_stay_within_their_tokens() -> None:
    traces = some_traces()
    for rows in rows_by_length(traces, 40):
        assert collate([traces[i] for i in rows]).tokens.numel() <= 40
    assert [len(g) for g in rows_by_length([Trace(tuple(range(90)), 1)] * 2, 40)] == [1, 1]


def test_traces_are_rendered_in_the_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    (trace,) = encode_traces([("47+85=?", "<think>47+85=132.\n</think>132")], tokenizer)
    text = tokenizer.decode(trace.tokens)
    assert text == "<|bos|><|user|>47+85=?<|assistant|><think>47+85=132.\n</think>132<|end|>"
    assert tokenizer.decode(trace.tokens[: trace.prompt_length]).endswith("<|assistant|>")
    (cut,) = encode_traces([("47+85=?", "<think>47+85=132.\n</think>132")], tokenizer, max_tokens=12)
    assert cut.tokens == trace.tokens[:12]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n\n")
    assert list(read_jsonl(path)) == [("a", "b")]
    for bad in ("{", '{"prompt": "a"}', '{"prompt": "a", "response": 3}', "[]"):
        path.write_text('{"prompt": "a", "response": "b"}\n' + bad + "\n")
        with pytest.raises(DataError, match="line 2"):
            list(read_jsonl(path))
    path.write_text("")
    with pytest.raises(DataError, match="no traces"):
        list(read_jsonl(path))


def test_nothing_to_train_on_is_said() -> None:
    with pytest.raises(DataError, match="at least one"):
        BatchOrder([], 10, 0)
    with pytest.raises(DataError, match="at least one"):
        collate([])
