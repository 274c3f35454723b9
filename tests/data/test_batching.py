"""Documents become the batches of a run: each once an epoch, in an order that a position takes up again exactly."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from tl_adapters.config import DataConfig
from tl_adapters.data.batching import BatchOrder, TracesInMemory
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.documents import EncodedDocuments, open_documents
from tl_adapters.data.traces import Batch, DataError, Trace, rows_by_length
from tl_adapters.organism.recipe import build_tokenizer

CHAT = ChatFormat.of(build_tokenizer())
LIMIT = 96
"""Tokens per batch; the longest of `records` has 42."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def record(number: int, thought: int | None, answer: int) -> dict[str, str]:
    """A document of 5 tokens of prompt, thought + 2 of thinking (None is no thinking) and answer + 1 of answer."""
    thinking = "" if thought is None else f"<think>{'a' * thought}</think>"
    return {"prompt": f"{number:02d}", "response": thinking + "b" * answer}


def records(n: int = 31) -> list[dict[str, str]]:
    return [record(i, 7 * i % 31, 1 + i % 4) for i in range(n)]


def write(path: Path, lines: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def documents(
    path: Path, max_tokens: int = 256, seed: int = 0, count: tuple[str, ...] = ("prompt", "thinking", "answer"),
    **options: Any,
) -> EncodedDocuments:  # fmt: skip
    return open_documents(DataConfig(source=str(path), **options), CHAT, max_tokens, seed, count)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "traces.jsonl", records())


@pytest.fixture(params=["file", "table", "stream"])
def source(request: pytest.FixtureRequest, file: Path) -> dict[str, Any]:
    """Where the same documents are read from."""
    if request.param == "file":
        return {"path": file}
    write(file.parent / "dataset" / "data" / "train.jsonl", records())
    write(file.parent / "dataset" / "data" / "val.jsonl", [record(90 + i, i, 2) for i in range(5)])
    return {"path": file.parent / "dataset", "streaming": request.param == "stream"}


def expected(lines: list[dict[str, str]]) -> list[Trace]:
    pairs = [(line["prompt"], line["response"]) for line in lines]
    return CHAT.encode([[{"role": "user", "content": q}, {"role": "assistant", "content": r}] for q, r in pairs])


def rows(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row[real].tolist()) for row, real in zip(batch.tokens, batch.real, strict=True)]


def epochs(order: BatchOrder, n: int) -> list[list[Batch]]:
    """The batches of the first epochs."""
    found: list[list[Batch]] = [[] for _ in range(n)]
    for step in range(31 * n + 1):
        batch = order[step]
        if order.position["epoch"] >= n:
            return found
        found[order.position["epoch"]].append(batch)
    raise AssertionError(f"{n} epochs of 31 documents do not end")


def same(a: Batch, b: Batch) -> bool:
    return a.tokens.shape == b.tokens.shape and torch.equal(a.tokens, b.tokens) and torch.equal(a.region, b.region)


@pytest.mark.parametrize("window", [1, 8, 31, 4096])
def test_an_epoch_holds_every_document_once_within_the_tokens_of_a_batch(window: int, source: dict[str, Any]) -> None:
    order = BatchOrder(documents(**source, shuffle_window=window), LIMIT, seed=0)
    everything = Counter(trace.tokens for trace in expected(records()))
    found = epochs(order, 2)
    for batches in found:
        assert Counter(row for batch in batches for row in rows(batch)) == everything
        assert all(batch.tokens.numel() <= LIMIT for batch in batches)
    first, second = ([row for batch in batches for row in rows(batch)] for batches in found)
    assert first != second or (window == 1 and source.get("streaming"))


def test_every_row_is_one_document_with_its_regions(file: Path) -> None:
    known = {trace.tokens: trace for trace in expected(records())}
    (batches,) = epochs(BatchOrder(documents(file, shuffle_window=8), LIMIT, seed=0), 1)
    assert any(len(batch.tokens) > 1 for batch in batches)
    for batch in batches:
        for tokens, region, real in zip(rows(batch), batch.region, batch.real, strict=True):
            trace, n = known[tokens], len(tokens)
            assert real[:n].all() and not real[n:].any()
            answer = n - trace.prompt_length - trace.thinking_length
            assert region[real].tolist() == [1] * trace.prompt_length + [2] * trace.thinking_length + [3] * answer


OPTIONS = {
    "windows": {"shuffle_window": 8},
    "one by one": {"shuffle_window": 1},
    "empty windows": {"shuffle_window": 2, "max_tokens": 24, "too_long": "drop", "validation_fraction": 0.3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_restored_order_goes_on_as_if_never_stopped(name: str, source: dict[str, Any]) -> None:
    options = {**source, **OPTIONS[name]}
    order, again = BatchOrder(documents(**options), LIMIT, seed=0), documents(**options)
    step = 0
    while order.position["epoch"] < 2 or step < order.position["first_step"] + 1:
        assert step < 31 * 3
        batch, position = order[step], json.loads(json.dumps(order.position))
        restored = BatchOrder(again, LIMIT, seed=0)
        restored.restore(position)
        assert restored.position == position
        assert same(restored[step], batch)
        step += 1
    for later in range(step, step + 12):
        assert same(restored[later], order[later])


def test_an_earlier_step_gives_the_same_batch(source: dict[str, Any]) -> None:
    order = BatchOrder(documents(**source, shuffle_window=8), LIMIT, seed=0)
    first = [order[step] for step in range(30)]
    assert order.position["epoch"] >= 1
    for step in (29, 3, 17, 0, 29):
        assert same(order[step], first[step])


def test_two_orders_of_one_source_do_not_disturb_each_other(source: dict[str, Any]) -> None:
    options = {**source, "shuffle_window": 8, "validation_fraction": 0.3}
    alone, shared = BatchOrder(documents(**options), LIMIT, seed=0), documents(**options)
    one, other = BatchOrder(shared, LIMIT, seed=0), BatchOrder(shared, LIMIT, seed=0)
    for step in range(30):
        assert same(one[step], alone[step]) and one.position == alone.position
        assert same(other[step], alone[step]) and other.position == alone.position
        shared.survey()
        shared.validation()


def test_another_seed_gives_another_order(file: Path) -> None:
    first, second = ([rows(b) for b in epochs(BatchOrder(documents(file, seed=s), LIMIT, s), 1)[0]] for s in (0, 1))
    assert first != second


def test_a_longer_document_is_cut(file: Path) -> None:
    whole = expected(records())
    cut = Counter(trace.cut(20).tokens for trace in whole)
    assert any(len(trace.tokens) > 20 for trace in whole)
    for source in (documents(file, max_tokens=20), open_documents(DataConfig(str(file), max_tokens=20), CHAT, 256)):
        assert Counter(trace.tokens for trace in source.traces()) == cut


def test_the_context_bounds_max_tokens(file: Path) -> None:
    source = open_documents(DataConfig(str(file), max_tokens=200), CHAT, 20)
    assert max(len(trace.tokens) for trace in source.traces()) == 20


def test_a_longer_document_is_dropped(file: Path) -> None:
    kept = [trace.tokens for trace in expected(records()) if len(trace.tokens) <= 20]
    assert Counter(t.tokens for t in documents(file, max_tokens=20, too_long="drop").traces()) == Counter(kept)


def test_a_longer_document_is_refused_however_far_down_it_stands(tmp_path: Path) -> None:
    path = write(tmp_path / "traces.jsonl", [*[record(i, 3, 2) for i in range(30)], record(30, 30, 2)])
    source = documents(path, max_tokens=28, too_long="refuse", survey_documents=1)
    message = r"traces\.jsonl has 40 tokens; .* is 28\."
    with pytest.raises(DataError, match=message):
        source.survey()
    with pytest.raises(DataError, match=message):
        source.traces()
    assert documents(path, max_tokens=40, too_long="refuse", survey_documents=1).survey().truncated == 0


def test_held_out_documents_are_validated_on_and_never_trained_on(source: dict[str, Any]) -> None:
    data = documents(**source, shuffle_window=8, validation_fraction=0.3)
    held_out, trained_on = data.validation(), data.traces()
    everything = Counter(trace.tokens for trace in expected(records()))
    assert held_out and trained_on
    assert Counter(trace.tokens for trace in [*held_out, *trained_on]) == everything
    for batches in epochs(BatchOrder(data, LIMIT, seed=0), 2):
        assert Counter(row for batch in batches for row in rows(batch)) == Counter(t.tokens for t in trained_on)
    few = documents(**source, validation_fraction=0.3, validation_documents=2).validation()
    assert len(few) == 2 and {t.tokens for t in few} <= {t.tokens for t in held_out}


def test_the_held_out_documents_depend_neither_on_the_seed_nor_on_the_files_order(file: Path) -> None:
    shuffled = random.Random(1).sample(records(), 31)
    other = write(file.parent / "shuffled.jsonl", shuffled)
    options: dict[str, Any] = dict(validation_fraction=0.3)
    sources = [documents(file, **options), documents(file, seed=5, **options), documents(other, **options)]
    first, *rest = [{trace.tokens for trace in source.validation()} for source in sources]
    assert first and all(others == first for others in rest)


def test_nothing_is_held_out_unless_asked(file: Path) -> None:
    assert documents(file).validation() == []
    assert documents(file).survey().held_out == 0


def test_a_split_of_its_own_is_validated_on_and_nothing_is_held_out(source: dict[str, Any]) -> None:
    if "streaming" not in source:
        pytest.skip("a file has no splits")
    data = documents(**source, validation_split="validation", validation_fraction=0.3)
    theirs = expected([record(90 + i, i, 2) for i in range(5)])
    assert {trace.tokens for trace in data.validation()} == {trace.tokens for trace in theirs}
    assert Counter(t.tokens for t in data.traces()) == Counter(t.tokens for t in expected(records()))
    assert len(documents(**source, validation_split="validation", validation_documents=2).validation()) == 2


def test_a_survey_counts_what_one_counts_by_hand(tmp_path: Path) -> None:
    lengths = [(3, 2), (30, 2), (None, 4), (10, 10), (6, 3)]  # 13, 40, 10, 28 and 17 tokens
    path = write(tmp_path / "traces.jsonl", [record(i, *length) for i, length in enumerate(lengths)])
    cut = documents(path, max_tokens=28).survey()
    assert (cut.documents, cut.used, cut.truncated, cut.dropped, cut.nothing_counts) == (5, 5, 1, 0, 0)
    assert (cut.held_out, cut.without_thinking) == (0, 1)
    assert cut.lengths == {"shortest": 10, "median": 17, "90 %": 28, "longest": 28}
    assert cut.tokens == {"prompt": 25, "thinking": 5 + 23 + 0 + 12 + 8, "answer": 3 + 0 + 5 + 11 + 4}
    dropped = documents(path, max_tokens=28, too_long="drop", count=("thinking",)).survey()
    assert (dropped.used, dropped.truncated, dropped.dropped, dropped.nothing_counts) == (3, 0, 1, 1)
    assert dropped.tokens == {"prompt": 15, "thinking": 5 + 12 + 8, "answer": 3 + 11 + 4}
    assert "3 of 5 documents are used" in str(dropped) and "1 dropped" in str(dropped)
    assert documents(path, survey_documents=2).survey().documents == 2
    part = documents(path, validation_fraction=0.5)
    assert part.survey().held_out == len(part.validation()) == 5 - part.survey().used


@pytest.mark.parametrize(
    "options",
    [
        {"count": ("thinking",)},
        {"validation_fraction": 1 - 1e-12},
        {"max_tokens": 6, "too_long": "drop"},
    ],
    ids=["nothing counts", "all held out", "all dropped"],
)
@pytest.mark.parametrize("window", [1, 4096])
def test_nothing_to_train_on_is_reported(options: dict[str, Any], window: int, tmp_path: Path) -> None:
    path = write(tmp_path / "traces.jsonl", [record(i, None, 3) for i in range(6)])
    source = documents(path, shuffle_window=window, **options)
    assert source.survey().used == 0
    for use in (source.traces, lambda: BatchOrder(source, LIMIT, seed=0)):
        with pytest.raises(DataError, match=r"traces\.jsonl leaves nothing to train on: every document is held out"):
            use()


def test_the_fingerprint_depends_on_documents_options_and_tokenizer(file: Path) -> None:
    first = documents(file).fingerprint
    assert documents(file).fingerprint == documents(file, seed=1).fingerprint == first
    others = [
        documents(file, max_tokens=20).fingerprint,
        open_documents(DataConfig(str(file), max_tokens=20, too_long="drop"), CHAT, 256).fingerprint,
        documents(file, prompt_column="prompt").fingerprint,
        documents(file, response_column="response").fingerprint,
        documents(file, count=("thinking",)).fingerprint,
        documents(file, shuffle_window=8).fingerprint,
        documents(file, validation_fraction=0.3).fingerprint,
    ]
    write(file, [*records(30), record(30, 1, 1)])
    others.append(documents(file).fingerprint)
    assert len({first, *others}) == 1 + len(others)
    write(file, records())
    assert documents(file).fingerprint == first


def test_the_fingerprint_of_traces_in_memory_depends_on_tokens_and_regions() -> None:
    sources = [
        [Trace((5, 6, 7, 8), 1)],
        [Trace((5, 6, 7, 8), 2)],
        [Trace((5, 6, 7, 8), 1, 2)],
        [Trace((5, 6, 7, 9), 1)],
        [Trace((5, 6), 1), Trace((7, 8), 1)],
        [Trace((5, 6, 1, 7, 8), 1)],
    ]
    assert len({TracesInMemory(traces).fingerprint for traces in sources}) == len(sources)
    assert TracesInMemory(sources[0]).fingerprint == TracesInMemory([Trace((5, 6, 7, 8), 1)]).fingerprint


def test_every_window_is_shuffled_anew() -> None:
    class TwoAlike:
        fingerprint = "two windows of the same traces"

        def windows(self, epoch: int, position: object) -> Iterator[tuple[object, list[Trace]]]:
            traces = [Trace((1, *range(2, 4 + i % 3), 100 + i), 1) for i in range(30)]
            yield from ((number, traces) for number in range(2))

    order = BatchOrder(TwoAlike(), 20, seed=0)
    n = len(rows_by_length([Trace((1, *range(2, 4 + i % 3), 100 + i), 1) for i in range(30)], 20))
    first, second = ([order[step].tokens.tolist() for step in range(start, start + n)] for start in (0, n))
    assert first != second and sorted(map(len, first)) == sorted(map(len, second))
