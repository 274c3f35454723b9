"""Code beside a model's weights never runs, whoever asks, also at a terminal that answers yes to every question."""

import builtins
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from datasets import load_dataset_builder
from transformers import AutoConfig

from tl_adapters.checkpoints.architectures import UnsupportedModelError
from tl_adapters.checkpoints.hf_model import load_config
from tl_adapters.cli.main import main
from tl_adapters.config import DataConfig, RunConfig
from tl_adapters.data.sources import open_reader
from tl_adapters.data.traces import DataError
from tl_adapters.errors import UserError
from tl_adapters.interop.authors_checkpoint import from_authors
from tl_adapters.interop.hybrid_checkpoint import write_hybrid
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import BASE, TARGET
from tl_adapters.study.open_run import open_pair


class Terminal(io.StringIO):
    """A terminal at which somebody answers everything with yes."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a stranger's code would write; whoever asks a question fails the test."""

    def asked(prompt: str = "") -> NoReturn:
        raise AssertionError(f"somebody asks: {prompt}")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr(sys, "stdin", Terminal("y\n" * 100))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "canary"


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def with_code(folder: Path, of: Path, canary: Path) -> Path:
    """A copy of a model with code beside it that writes the canary file when it is imported."""
    shutil.copytree(of, folder)
    code = f"open({str(canary)!r}, 'w').close()\n"
    code += "from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM\n"
    # Subclasses, since transformers marks the classes that it loads so.
    code += "class C(Qwen2Config): ...\nclass M(Qwen2ForCausalLM): ...\nclass T(PreTrainedTokenizerFast): ...\n"
    code += "def generate(*args, **options): ...\n"
    for path in (folder / "evil.py", folder / "custom_generate" / "generate.py", folder / f"{folder.name}.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    return folder


MODEL_CODE = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoModel": "evil.M"}
TOKENIZER_CODE = {"AutoTokenizer": ["evil.T", "evil.T"]}
REFUSED: dict[str, dict[str, Any]] = {
    "model code": {"auto_map": MODEL_CODE},
    "model code of another type": {"auto_map": MODEL_CODE, "model_type": "stranger"},
    "a type of its own": {"auto_map": {"AutoConfig": "evil.C"}, "model_type": "stranger"},
    "an architecture of its own": {"auto_map": MODEL_CODE, "architectures": ["StrangerForCausalLM"]},
    "no architecture": {"auto_map": MODEL_CODE, "architectures": None},
    "classes of two models": {"model_type": "llama"},
    "a kernel of its own": {"attn_implementation": "stranger/kernel"},
    "weights of its own": {"transformers_weights": "../weights.safetensors"},
}
READ: dict[str, dict[str, Any]] = {
    "code for the configuration": {"auto_map": {"AutoConfig": "evil.C"}},
    "code for the tokenizer": {"auto_map": TOKENIZER_CODE},
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_with_code_of_its_own_is_refused(case: str, canary: Path, tmp_path: Path) -> None:
    evil = with_code(tmp_path / "evil", TARGET, canary)
    edit(evil / "config.json", **REFUSED[case])
    with pytest.raises(UnsupportedModelError) as caught:
        load_config(evil)
    assert str(evil) in str(caught.value)
    attempts: dict[str, Callable[[], object]] = {
        "target": lambda: PairedModel.from_pretrained(BASE, evil),
        "base": lambda: PairedModel.from_pretrained(evil, TARGET),
        "authors": lambda: from_authors(evil),
        "hybrid": lambda: write_hybrid(tmp_path / "hybrid", evil, evil),
        "run": lambda: open_pair(RunConfig(base=str(BASE), target=str(evil)), "cpu"),
    }
    for name, attempt in attempts.items():
        with pytest.raises(UserError):
            attempt()
        assert not canary.exists(), name
    write = {"--base": str(BASE), "--target": str(evil)}
    named = [word for pair in write.items() for word in pair]
    assert main(["doctor", str(BASE), str(evil)]) == 1
    assert main(["train", *named, "--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "run")]) == 2
    assert not canary.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", READ)
def test_a_stock_model_is_read_without_the_code_beside_it(case: str, canary: Path, tmp_path: Path) -> None:
    evil = with_code(tmp_path / "evil", TARGET, canary)
    edit(evil / "config.json", **READ[case])
    edit(evil / "tokenizer_config.json", auto_map=TOKENIZER_CODE, tokenizer_class="StrangerTokenizer")
    pair = PairedModel.from_pretrained(evil, evil)
    assert pair.model.tokenizer("Wait, 1+1=2.")["input_ids"]
    assert main(["doctor", str(evil), str(evil)]) == 0
    write_hybrid(tmp_path / "hybrid", evil, evil)
    assert "auto_map" not in (tmp_path / "hybrid" / "config.json").read_text()
    assert not canary.exists() and not list((tmp_path / "hybrid").rglob("*.py"))


def test_the_code_would_run_if_it_were_trusted(canary: Path, tmp_path: Path) -> None:
    evil = with_code(tmp_path / "evil", TARGET, canary)
    edit(evil / "config.json", **REFUSED["model code of another type"])
    AutoConfig.from_pretrained(evil, trust_remote_code=True)
    assert canary.exists()


def test_code_of_a_data_set_never_runs(canary: Path, tmp_path: Path) -> None:
    folder = with_code(tmp_path / "evil", TARGET, canary)
    for streaming in (False, True):
        with pytest.raises(DataError):
            open_reader(DataConfig(source=str(folder), streaming=streaming))
    with pytest.raises(Exception):  # the library's own; what matters is that it runs nothing
        load_dataset_builder(str(folder))
    assert not canary.exists()
