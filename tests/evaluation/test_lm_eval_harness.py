"""Routes in lm-evaluation-harness: its results are plain sums of the model's log-probabilities."""

import builtins
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from helpers.random_models import random_model, randomise

from tl_adapters.data.traces import DataError
from tl_adapters.generation import likelihoods
from tl_adapters.generation.likelihoods import Likelihood, log_likelihoods
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism.recipe import build_tokenizer

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra lm-eval")
N_CTX = 32
TEXTS = ["47+85=132.", "Wait, 1+1=3?\n", "9", "312-47-85=180</think>180"]


@pytest.fixture(scope="module")
def pair() -> PairedModel:
    """A float64 pair with a short context."""
    return randomise(PairedModel.from_pretrained(*models(), tokenizer=build_tokenizer()))


def models() -> tuple[Any, Any]:
    """The base and the target of the pair."""
    sizes = {"vocab_size": len(build_tokenizer()), "max_position_embeddings": N_CTX}
    base, target = (random_model(s, **sizes) for s in (1, 2))
    return base, target


@pytest.fixture(params=["target", "hybrid", "replacement"])
def model(pair: PairedModel, request: pytest.FixtureRequest) -> Iterator[Any]:
    with pair.routed(request.param) as routed:
        yield routed


@torch.no_grad()
def plainly(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The definition: one text at a time, without padding."""
    tokens = torch.tensor([[*context, *continuation][:-1]])
    logits = model(tokens, attention_mask=torch.ones_like(tokens))[0, len(context) - 1 :]
    wanted = torch.tensor(continuation)
    chosen = logits.log_softmax(-1)[torch.arange(len(continuation)), wanted]
    return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())


def asked(*arguments: Any) -> Any:
    """Requests as the harness passes them."""
    return SimpleNamespace(args=arguments)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens_per_batch", [1, 40, 10_000])
def test_a_likelihood_is_the_plain_sum_in_any_batch(model: Any, side: str, tokens_per_batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, model.cfg.d_vocab, (n,), generator=generator).tolist()  # noqa: E731
    pad = model.tokenizer.pad_token_id  # a text may begin with it, and is no padding for that
    texts = [(draw(a), draw(b)) for a, b in ((3, 4), (1, 9), (20, 1), (5, N_CTX - 4))] + [([pad, pad, 5], [pad, 7])]
    texts.append((likely := draw(4), greedily(model, likely, 3)))
    before, model.tokenizer.padding_side = model.tokenizer.padding_side, side
    try:
        found = dict(log_likelihoods(model, texts, tokens_per_batch))
    finally:
        model.tokenizer.padding_side = before
    for number, (context, continuation) in enumerate(texts):
        value, greedy = plainly(model, context, continuation)
        assert found[number].log_probability == pytest.approx(value, rel=1e-9)
        assert found[number].greedy is greedy
    assert found[len(texts) - 1].greedy
    assert dict(log_likelihoods(model, [([1], [])])) == {0: Likelihood(0.0, True)}


def test_logits_are_formed_where_they_are_needed_and_in_pieces(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole text they would take gigabytes. A hook that reads them at their positions gets all of them at once."""
    texts = [([5] * 20, [7, 9, 4, 11]), ([6] * 18, [3]), ([9] * 22, [8])]
    expected = dict(log_likelihoods(model, texts))
    monkeypatch.setattr(likelihoods, "rows_at_once", lambda d_vocab, device: 7)
    shapes: list[tuple[int, ...]] = []
    keep = lambda logits, hook: shapes.append(tuple(logits.shape[:2]))  # noqa: E731
    with model.hooks(fwd_hooks=[("unembed.hook_out", keep)]):
        found = dict(log_likelihoods(model, texts))
    assert shapes == [(3, 2), (3, 2), (3, 2)], "positions 17 to 22 of three texts, at most seven rows at once"
    for number, (context, continuation) in enumerate(texts):
        assert found[number].log_probability == pytest.approx(plainly(model, context, continuation)[0], rel=1e-9)
        assert found[number].greedy is expected[number].greedy
    handle = model.unembed.register_forward_hook(lambda module, inputs, logits: shapes.append(tuple(logits.shape[:2])))
    shapes.clear()
    assert dict(log_likelihoods(model, texts)).keys() == found.keys()
    handle.remove()
    assert shapes == [(3, 6)]


def test_a_bridge_scores_as_the_other_model_does(pair: PairedModel) -> None:
    bridged = PairedModel.from_pretrained(*models(), tokenizer=pair.model.tokenizer, backend="bridge")
    texts = [([5] * 20, [7, 9, 4, 11]), ([6] * 18, [3]), ([9] * 22, [8]), ([1, 2], [])]
    for tokens_per_batch in (1, 1000):
        with bridged.routed("hybrid") as theirs, pair.routed("hybrid") as ours:
            found, expected = (dict(log_likelihoods(model, texts, tokens_per_batch)) for model in (theirs, ours))
        assert [found[i].greedy for i in range(4)] == [expected[i].greedy for i in range(4)]
        for i in range(4):
            assert found[i].log_probability == pytest.approx(expected[i].log_probability, rel=1e-4)


@torch.no_grad()
def greedily(model: Any, prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_texts_that_cannot_be_scored_are_refused(pair: PairedModel) -> None:
    for text in (([], [1]), ([1] * N_CTX, [1, 1])):
        with pytest.raises(DataError, match=f"must have 1 or more, and both together at most {N_CTX + 1}"):
            next(log_likelihoods(pair.model, [text]))


def test_without_the_extra_one_line_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError("No module named 'lm_eval'")
        return imported(name, *args, **options)

    monkeypatch.delitem(sys.modules, "tl_adapters.evaluation.lm_eval_harness", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r'pip install "tl-adapters\[lm-eval\]"'):
        importlib.import_module("tl_adapters.evaluation.lm_eval_harness")


@needs_harness
def test_loglikelihoods_of_texts(model: Any) -> None:
    from tl_adapters.evaluation.lm_eval_harness import HarnessModel

    lm = HarnessModel(model, tokens_per_batch=30)
    encode = lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    requests = [*(asked("<|bos|>" + text, "=12.") for text in TEXTS), asked("", TEXTS[0])]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    for request, (value, greedy) in zip(requests, found, strict=True):
        context, continuation = request.args
        before = encode(context.rstrip())  # the harness leaves spaces to what follows them
        expected = plainly(model, before or [lm.prefix_token_id], encode(context + continuation)[len(before) :])
        assert (value, greedy) == (pytest.approx(expected[0], rel=1e-9), expected[1])
    # Longer than the context: the end of the context is what is read.
    long = "<|bos|>" + "1+" * N_CTX
    ((value, _),) = lm.loglikelihood([asked(long, "=12.")], disable_tqdm=True)
    rest = encode("=12.")
    assert value == pytest.approx(plainly(model, encode(long)[-(N_CTX + 1 - len(rest)) :], rest)[0], rel=1e-9)


@needs_harness
def test_a_rolling_likelihood_predicts_every_token_once(model: Any) -> None:
    from tl_adapters.evaluation.lm_eval_harness import HarnessModel

    lm = HarnessModel(model)
    ids = model.tokenizer("47+85=132. " * 12, add_special_tokens=False)["input_ids"]
    long = model.tokenizer.decode(ids)
    ids = model.tokenizer(long, add_special_tokens=False)["input_ids"]
    assert len(ids) > 2 * N_CTX
    short_value, long_value = lm.loglikelihood_rolling([asked(TEXTS[0]), asked(long)], disable_tqdm=True)
    short = model.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert short_value == pytest.approx(plainly(model, [lm.prefix_token_id], short)[0], rel=1e-9)
    expected = plainly(model, [lm.prefix_token_id], ids[:N_CTX])[0]
    for start in range(N_CTX, len(ids), N_CTX):
        window = ids[max(0, min(start + N_CTX, len(ids)) - N_CTX - 1) : min(start + N_CTX, len(ids))]
        n = len(ids[start : start + N_CTX])
        expected += plainly(model, window[:-n], window[-n:])[0]
    assert long_value == pytest.approx(expected, rel=1e-9)


@needs_harness
def test_completions_end_at_stop_strings_and_limits(model: Any) -> None:
    from tl_adapters.evaluation.lm_eval_harness import HarnessError, HarnessModel

    lm, tokenizer = HarnessModel(model, batch_size=3), model.tokenizer
    greedy = {text: tokenizer.decode(greedily(model, tokenizer(text)["input_ids"], 8)) for text in TEXTS}
    whole = [asked(text, {"until": [], "max_gen_toks": 8}) for text in TEXTS]
    assert lm.generate_until(whole, disable_tqdm=True) == list(greedy.values())
    cut = [asked(text, {"until": [said[3:5], ""], "max_gen_toks": 8}) for text, said in greedy.items()]
    expected = [said.partition(said[3:5])[0] for said in greedy.values()]
    assert lm.generate_until(cut, disable_tqdm=True) == expected
    after = HarnessModel(model, think_end=greedy[TEXTS[0]][:2])
    assert after.generate_until(whole[:1], disable_tqdm=True) == [
        greedy[TEXTS[0]].rpartition(after.think_end)[2].lstrip()
    ]
    drawn = [asked(text, {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "max_gen_toks": 8}) for text in TEXTS]
    first = lm.generate_until(drawn, disable_tqdm=True)
    torch.manual_seed(9)
    assert lm.generate_until(drawn, disable_tqdm=True) == first != list(greedy.values())
    assert HarnessModel(model, batch_size=3, seed=1).generate_until(drawn, disable_tqdm=True) != first
    with pytest.raises(HarnessError, match="option top_k is not supported"):
        lm.generate_until([asked("1", {"top_k": 3})], disable_tqdm=True)
    with pytest.raises(HarnessError, match=f"leave no room for a prompt in a context of {N_CTX}"):
        lm.generate_until([asked("1", {})], disable_tqdm=True)


@needs_harness
def test_a_task_of_the_harness_runs_on_a_route(
    pair: PairedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local tasks of each kind, run by the harness itself, give the results of the log-probabilities."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from tl_adapters.evaluation.lm_eval_harness import HarnessModel

    encode = lambda text: pair.model.tokenizer(text)["input_ids"]  # noqa: E731
    first, said = pair.model.tokenizer.bos_token_id, "<think>"
    rows = [{"q": f"{n}+{n}=", "choices": [str(2 * n), str(n)], "label": n % 2, "said": said} for n in range(1, 7)]
    with pair.routed("target") as model:
        for row in rows[::2]:
            row["said"] = model.tokenizer.decode(greedily(model, encode(row["q"]), 4))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "target_delimiter": "",
    }
    chosen = {**task, "task": "chosen", "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
    chosen |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}
    spoken = {**task, "task": "spoken", "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    spoken |= {"generation_kwargs": {"max_gen_toks": 4, "until": []}, "doc_to_target": "{{said}}"}
    read = {**task, "task": "read", "output_type": "loglikelihood_rolling", "doc_to_target": "{{q}}"}
    read |= {"metric_list": [{"metric": "word_perplexity"}]}
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    alone = TaskManager(include_defaults=False)  # the harness's own tasks take long to index
    for route in ("target", "replacement"):
        with pair.routed(route) as model:
            options = {"task_manager": alone, "bootstrap_iters": 0, "log_samples": False}
            found = simple_evaluate(model=HarnessModel(model), tasks=[chosen, spoken, read], **options)["results"]
            values = [[plainly(model, encode(r["q"]), encode(c))[0] for c in r["choices"]] for r in rows]
            same = [model.tokenizer.decode(greedily(model, encode(r["q"]), 4)) == r["said"] for r in rows]
            total = sum(plainly(model, [first], encode(r["q"]))[0] for r in rows)
        right = [v.index(max(v)) == row["label"] for v, row in zip(values, rows, strict=True)]
        assert found["chosen"]["acc,none"] == pytest.approx(sum(right) / len(rows))
        assert found["spoken"]["exact_match,none"] == pytest.approx(sum(same) / len(rows))
        assert found["read"]["word_perplexity,none"] == pytest.approx(math.exp(-total / len(rows)))
        assert sum(same) == (3 if route == "target" else 0)


@needs_harness
def test_turns_are_rendered_as_the_target_renders_them(pair: PairedModel) -> None:
    from tl_adapters.evaluation.lm_eval_harness import HarnessModel

    lm = HarnessModel(pair.model)
    prompt = lm.apply_chat_template([{"role": "user", "content": "1+1=?"}])
    assert prompt.startswith("<|bos|>") and "1+1=?" in prompt
    ids = lm.tok_encode(prompt)
    assert ids.count(lm.tok_encode("<|bos|>")[0]) == 1
    assert lm.chat_template(True) == pair.model.tokenizer.chat_template
