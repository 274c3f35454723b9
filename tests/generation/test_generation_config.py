"""End tokens, limits and sampling parameters come from the model's files, are recorded, and apply everywhere."""

import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.random_models import random_model, randomise
from transformers import GenerationConfig

from tl_adapters import organism
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.circuit import Circuit, CircuitFeature
from tl_adapters.cli.common import insertion_strength
from tl_adapters.cli.generate import variants
from tl_adapters.cli.parsing import Words
from tl_adapters.errors import UserError
from tl_adapters.evaluation.response_metrics import measure_responses
from tl_adapters.evaluation.sampled_responses import (
    RESPONSE_SETTINGS_FILE,
    ResponseOptions,
    SamplingError,
    sample_responses,
)
from tl_adapters.evaluation.tasks import MathProblem
from tl_adapters.generation.completions import LOOP_TOKENS, Completion, complete, default_batch_size
from tl_adapters.generation.generation_config import (
    DEFAULT_MAX_NEW_TOKENS,
    default_max_new_tokens,
    end_tokens,
    sampling_parameters,
)
from tl_adapters.generation.responses import Response, respond, response_limit, traces_of
from tl_adapters.generation.sampling import SamplingParameters
from tl_adapters.interventions.feature_edits import InterventionError, clamped, inserted
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism.recipe import build_tokenizer

ASKED = organism.problems("tune", 4)


def made(backend: str = "hooked", **said: Any) -> PairedModel:
    """A pair whose target has these values in its generation_config.json."""
    tokenizer = build_tokenizer()
    base, target = (random_model(s, vocab_size=len(tokenizer), max_position_embeddings=256) for s in (1, 2))
    target.generation_config = GenerationConfig(**said)
    return randomise(PairedModel.from_pretrained(base, target, tokenizer=tokenizer, backend=backend))


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("named", [40, [40], [274, 40, 41]], ids=str)
def test_a_response_ends_at_any_end_token_and_its_trace_includes_it(backend: str, named: Any) -> None:
    pair = made(backend, eos_token_id=named)
    eos = pair.model.tokenizer.eos_token_id
    assert end_tokens(pair.model) == sorted({eos, *([named] if isinstance(named, int) else named)})

    def say_40(module: object, inputs: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([40]), 1e6)

    handle = pair.model.unembed.register_forward_hook(say_40)
    try:
        found = respond(pair.model, ASKED, max_new_tokens=5)
    finally:
        handle.remove()
    assert [(r.tokens, r.end, r.truncated) for r in found] == [((), 40, False)] * 4
    assert [t.tokens for t in traces_of(found, pair.model.tokenizer)] == [(*r.prompt, 40) for r in found]
    made_without = Response((1, 2), (3,), "", False, True)
    assert traces_of([made_without], pair.model.tokenizer)[0].tokens == (1, 2, 3, eos)


def test_the_generation_config_of_a_folder_is_read(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    for name, seed in (("base", 1), ("target", 2)):
        model = random_model(seed, torch.float32, vocab_size=len(tokenizer))
        model.generation_config.eos_token_id = [7, 9]
        model.save_pretrained(tmp_path / name), tokenizer.save_pretrained(tmp_path / name)
    written = json.loads((tmp_path / "target" / "generation_config.json").read_text())
    said = {**written, "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 33}
    (tmp_path / "target" / "generation_config.json").write_text(json.dumps(said))
    for backend in ("hooked", "bridge"):
        model = PairedModel.from_pretrained(tmp_path / "base", tmp_path / "target", backend=backend).model
        assert {7, 9} < set(end_tokens(model)) and sampling_parameters(model) == SamplingParameters(0.6, 0.95, 20)
        assert default_max_new_tokens(model) == 33


def test_limits_and_sampling_come_from_the_problem_and_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    greedy, drawn = made().model, made(do_sample=True, temperature=0.6, top_p=0.95, max_new_tokens=2_000).model
    mathematics = [MathProblem("?", "1")]
    assert sampling_parameters(greedy) == SamplingParameters() and sampling_parameters(
        greedy, 0.5
    ) == SamplingParameters(0.5)
    assert (
        sampling_parameters(drawn) == SamplingParameters(0.6, 0.95)
        and sampling_parameters(drawn, 0.0) == SamplingParameters()
    )
    assert sampling_parameters(drawn, 1.2, top_k=5) == SamplingParameters(1.2, 0.95, 5)
    assert (
        response_limit(greedy, mathematics) == DEFAULT_MAX_NEW_TOKENS
        and default_batch_size(DEFAULT_MAX_NEW_TOKENS) == 16
    )
    assert response_limit(drawn, mathematics) == 2_000
    assert response_limit(drawn, ASKED) == 160 and default_batch_size(160) == 250
    assert respond(drawn, ASKED) != respond(drawn, ASKED, temperature=0.0) == respond(greedy, ASKED)
    sample_responses(drawn, ASKED, ResponseOptions(max_new_tokens=5), tmp_path, {}, False)
    settings = json.loads((tmp_path / RESPONSE_SETTINGS_FILE).read_text())
    assert (settings["temperature"], settings["top_p"], settings["top_k"]) == (0.6, 0.95, 0)
    assert settings["ends"] == end_tokens(drawn) and settings["batch_size"] == 250
    drawn.generation_config.eos_token_id = [11]
    with pytest.raises(SamplingError, match="holds responses with ends"):
        sample_responses(drawn, ASKED, ResponseOptions(max_new_tokens=5), tmp_path, {}, False)
    with pytest.raises(SamplingError, match="At temperature 0 all 3 samples are equal"):
        sample_responses(greedy, ASKED, ResponseOptions(samples=3), tmp_path / "other", {}, False)
    with caplog.at_level(logging.WARNING, logger="tl_adapters"):
        sampling_parameters(made(do_sample=True, repetition_penalty=1.1).model)
    assert "repetition_penalty 1.1, which is not applied" in caplog.text


def test_truncated_and_looping_responses_are_counted_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def said(tokens: list[int], truncated: bool = True) -> Response:
        return Response((1,), tuple(tokens), "", truncated, False)

    start, block = list(range(100, 190)), list(range(12))
    loops = [start + block * 4, start + block * 4 + block[:5], [7] * LOOP_TOKENS, [1, 2] * 20, block * 3 + block]
    others = [start + block * 2, [7] * (LOOP_TOKENS - 1), start, start + block * 4 + [99], [*block, 50] + block * 3]
    assert [said(tokens).looping for tokens in loops] == [True] * 5
    assert [said(tokens).looping for tokens in others] == [False] * 5
    assert not said(loops[0], truncated=False).looping, "what comes to its end is no loop"
    responses = [*map(said, loops + others), said(start, truncated=False)]
    found = measure_responses(responses, "report")
    assert (found.looping, found.truncated) == (5 / 11, 10 / 11)
    with caplog.at_level(logging.WARNING, logger="tl_adapters"):
        assert len(traces_of(responses, build_tokenizer())) == 1
    assert "10 of 11 responses were cut at the limit (5 of them looping)" in caplog.text


# -- positions of interventions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_positions_count_over_the_sequence_in_cached_generation_too(backend: str) -> None:
    """Also in padded rows, and in the decoding loop as in the model's own ``generate``."""
    pair = made(backend)
    prompts = [[20, 21, 22, 23, 24, 25, 26], [30, 31, 32]]
    features = [(layer, i) for layer in range(4) for i in range(12)]
    options: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
    with pair.routed("replacement") as model:
        free = complete(model, prompts, stop_at=[], max_new_tokens=8, batch_size=2)
        for at in ([0], [2, 1]):
            with clamped(pair, features, 9.0, positions=at):
                plainly = [model.generate(torch.tensor([p]), use_past_kv_cache=False, **options)[0] for p in prompts]
                cached = [model.generate(torch.tensor([p]), **options)[0] for p in prompts]
                ours = complete(model, prompts, stop_at=[], max_new_tokens=8, batch_size=2)
            assert [c.tolist() for c in cached] == [p.tolist() for p in plainly]
            assert [[*p, *o.tokens] for p, o in zip(prompts, ours, strict=True)] == [p.tolist() for p in plainly]
            assert [o.tokens for o in ours] != [o.tokens for o in free]
        with clamped(pair, features, 9.0, positions=[]):
            assert complete(model, prompts, stop_at=[], max_new_tokens=8, batch_size=2) == free
        with (
            pytest.raises(InterventionError, match="Position 7 is to be changed, and this pass has 7"),
            clamped(pair, features, 9.0, positions=[7]),
        ):
            complete(model, prompts, stop_at=[], max_new_tokens=8, batch_size=2)
        with (
            pytest.raises(InterventionError, match="Position -1 is negative; positions count from 0"),
            clamped(pair, features, 9.0, positions=[-1]),
        ):
            pass


# -- a circuit's own strength -----------------------------------------------------------------------------------------


def test_a_circuit_is_inserted_at_its_own_strength(tmp_path: Path) -> None:
    features = tuple(CircuitFeature(FeatureId(i, 3), "output", 1.0, 0.0, 1.0, 0.0, 1.0, 1.0) for i in range(3))
    pair, tokens = made(), torch.tensor([[20, 21, 22]])
    known = {**pair.fingerprints, **pair.installed_adapters().fingerprints}
    for name, strength in (("a", 2.5), ("b", 4.0)):
        Circuit("hesitation", ("Wait",), features, strength, "select", known, 24, 4, 0.1).save(
            tmp_path / f"{name}.json"
        )
    a, b = (str(tmp_path / f"{name}.json") for name in "ab")
    assert insertion_strength([a]) == insertion_strength([f"{a}:output"]) == insertion_strength([a, a]) == 2.5
    assert insertion_strength(["1.2", "0.3"]) == 1.0
    for mixed in ([a, b], [a, "1.2"]):
        with pytest.raises(UserError, match="set one with --strength, or give --insert once for each"):
            insertion_strength(mixed)
    for given, factor in ((None, 2.5), (1.0, 1.0)):
        (_, variant) = variants(["hybrid"], None, [Words([a])], given, None, None)
        with torch.no_grad(), variant.entered(pair):
            found = pair.model(tokens)
        with torch.no_grad(), inserted(pair, [f.id for f in features], factor) as model:
            assert torch.equal(found, model(tokens))
        assert variant.name.startswith("hybrid with only 2.5 x " if given is None else "hybrid with only 0.3")


# -- truncated thinking, in lm-evaluation-harness -------------------------------------------------------------------


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of `HarnessModel` with a stub of the harness, which need not be installed."""
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.models", "lm_eval.models.utils", "lm_eval.utils")
    modules = {name: ModuleType(name) for name in names}
    modules["lm_eval.api.model"].TemplateLM = type("TemplateLM", (), {"cache_hook": None})  # type: ignore[attr-defined]
    modules["lm_eval.models.utils"].normalize_gen_kwargs = lambda given, most: {  # type: ignore[attr-defined]
        "until": [], "max_gen_toks": most, **given
    }  # fmt: skip
    for name in ("get_rolling_token_windows", "make_disjoint_window"):
        setattr(modules["lm_eval.utils"], name, None)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "tl_adapters.evaluation.lm_eval_harness", raising=False)
    import tl_adapters.evaluation.lm_eval_harness as found

    yield found
    sys.modules.pop("tl_adapters.evaluation.lm_eval_harness", None)


@pytest.mark.parametrize(
    ("said", "answer_"),
    [
        ("<think>Perhaps 4? The answer is 4. But no, since", ""),
        ("<think>4?</think>\n\nIt is 5.\n\nSo", "It is 5."),
        ("<think>a</think>5<think>but", ""),
        ("The answer is 4.\n\nQ:", "The answer is 4."),  # a model that does not think
        ("", ""),
    ],
)
def test_thinking_that_never_ends_gives_an_empty_text(harness: Any, said: str, answer_: str) -> None:
    model = made().model
    encode = lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    lm = harness.HarnessModel(model, think_end="</think>")
    assert lm._cut(said, ["\n\n"]) == answer_
    tokens = tuple(encode(said))
    closed, opened = (
        lm._visible_text(Completion(tuple(encode(prompt)), tokens, model.tokenizer.decode(tokens), True), ["\n\n"])
        for prompt in ("<|user|>2+2?<|assistant|>", "<|user|>2+2?<|assistant|><think>\n")
    )
    assert closed == answer_
    assert opened == (answer_ if "</think>" in said else ""), "the prompt opens the thinking"
    assert harness.HarnessModel(model)._cut(said, []) == said


def test_equal_requests_draw_different_numbers(harness: Any) -> None:
    from types import SimpleNamespace

    model = made().model
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6}

    class Hook:
        def add_partial(self, *args: Any) -> None:
            pass

    def asked(size: int, *texts: str, seed: int = 0) -> list[str]:
        lm = harness.HarnessModel(model, batch_size=size, seed=seed)
        lm.cache_hook = Hook()
        return lm.generate_until([SimpleNamespace(args=(text, options)) for text in texts], disable_tqdm=True)

    one, two, again = asked(3, "47+85=", "Wait, 1", "47+85=")
    assert one != again, "asked twice, answered twice"
    assert asked(1, "Wait, 1", "47+85=") == [two, one]
    assert asked(3, "47+85=", "Wait, 1", seed=1) != [one, two]
