"""Code beside a model's weights never runs, whoever asks, also at a terminal that answers yes to every question."""

import builtins
import io
import json
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
from datasets import load_dataset_builder
from helpers.loopback_hub import LoopbackHub, hub  # noqa: F401  # a fixture
from helpers.random_graphs import random_graph
from helpers.random_models import randomise
from transformers import AutoConfig

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.attribution.graph import AttributionGraph
from tl_adapters.checkpoints.architectures import UnsupportedModelError
from tl_adapters.checkpoints.hf_model import load_config, load_hf_model
from tl_adapters.circuits.circuit import Circuit
from tl_adapters.cli.main import main
from tl_adapters.config import DataConfig, RunConfig
from tl_adapters.data.sources import open_reader
from tl_adapters.data.traces import DataError
from tl_adapters.errors import UserError
from tl_adapters.evaluation.tasks import load_problems
from tl_adapters.interop.authors_checkpoint import authors_pair, from_authors, to_authors
from tl_adapters.interop.export import load_adapters_with_measurements
from tl_adapters.interop.hub import pull
from tl_adapters.interop.hybrid_checkpoint import write_hybrid
from tl_adapters.interop.saelens import from_saelens
from tl_adapters.models.attach import attach, detach
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import BASE, TARGET
from tl_adapters.study.open_run import load_organism_pair, open_pair


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


@pytest.fixture(scope="module")
def organism_pair() -> PairedModel:
    return load_organism_pair("cpu")


@pytest.fixture(scope="module")
def adapters(organism_pair: PairedModel) -> AdapterSet:
    return randomise(organism_pair, n_features=4).installed_adapters()


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


def pickled(canary: Path) -> bytes:
    """What writes the canary file when it is unpickled."""

    class Opens:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
            return open, (str(canary), "w")

    return pickle.dumps(Opens())


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder as a repository of the hub."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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
def test_a_model_with_code_of_its_own_is_refused(case: str, canary: Path, adapters: AdapterSet, tmp_path: Path) -> None:
    evil = with_code(tmp_path / "evil", TARGET, canary)
    edit(evil / "config.json", **REFUSED[case])
    with pytest.raises(UnsupportedModelError) as caught:
        load_config(evil)
    assert str(evil) in str(caught.value)
    attempts: dict[str, Callable[[], object]] = {
        "target": lambda: PairedModel.from_pretrained(BASE, evil),
        "base": lambda: PairedModel.from_pretrained(evil, TARGET),
        "load_hf_model": lambda: load_hf_model(evil),
        "authors": lambda: from_authors(evil),
        "authors_pair": lambda: authors_pair(evil, TARGET),
        "authors_pair's target": lambda: authors_pair(TARGET, evil),
        "to_authors": lambda: to_authors(adapters, tmp_path / "authors", base=BASE, target=evil),
        "hybrid": lambda: write_hybrid(tmp_path / "hybrid", base=evil, target=evil),
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
    write_hybrid(tmp_path / "hybrid", base=evil, target=evil)
    assert "auto_map" not in (tmp_path / "hybrid" / "config.json").read_text()
    assert not canary.exists() and not list((tmp_path / "hybrid").rglob("*.py"))


def test_the_code_would_run_if_it_were_trusted(canary: Path, tmp_path: Path) -> None:
    evil = with_code(tmp_path / "evil", TARGET, canary)
    edit(evil / "config.json", **REFUSED["model code of another type"])
    AutoConfig.from_pretrained(evil, trust_remote_code=True)
    assert canary.exists()


@pytest.mark.parametrize("case", [*REFUSED, *READ])
def test_a_base_is_attached_or_refused_without_the_code_beside_it(
    case: str, canary: Path, organism_pair: PairedModel, adapters: AdapterSet, tmp_path: Path
) -> None:
    evil = with_code(tmp_path / "evil", BASE, canary)
    edit(evil / "config.json", **{**REFUSED, **READ}[case])
    model = load_organism_pair("cpu").release()
    with suppress(UserError):
        detach(attach(model, adapters, base=evil))
    assert not canary.exists()


@pytest.mark.parametrize("case", READ)
def test_a_model_of_the_hub_is_read_without_the_code_beside_it(
    case: str,
    canary: Path,
    hub: LoopbackHub,  # noqa: F811
    tmp_path: Path,
) -> None:
    evil = with_code(tmp_path / "evil", TARGET, canary)
    edit(evil / "config.json", **READ[case])
    hub.files["user/evil"] = {**files_of(evil), "pytorch_model.bin": pickled(canary)}
    PairedModel.from_pretrained("user/evil", "user/evil")
    assert not canary.exists() and not [name for name in hub.downloads() if name.endswith((".py", ".bin"))]


def test_adapters_are_read_without_the_code_beside_them(
    canary: Path,
    hub: LoopbackHub,  # noqa: F811
    adapters: AdapterSet,
    tmp_path: Path,
) -> None:
    adapters.save_pretrained(tmp_path / "adapters")
    evil = with_code(tmp_path / "evil", tmp_path / "adapters", canary)
    for name in ("pytorch_model.bin", "adapters.pt", "layer_0/sae_weights.pt", "layer_0/sparsity.pkl"):
        (evil / name).write_bytes(pickled(canary))
    hub.files["user/evil"] = files_of(evil)
    for name in (evil, "user/evil"):
        for load in (AdapterSet.from_pretrained, load_adapters_with_measurements, from_saelens):
            assert load(name).fingerprint == adapters.fingerprint
    pull("user/evil", tmp_path / "pulled")
    assert main(["pull", "user/evil", "--out", str(tmp_path / "pulled too")]) == 0
    assert main(["doctor", str(BASE), str(TARGET), str(evil)]) == 0
    assert not canary.exists()
    assert not [name for name in hub.downloads() if name.endswith((".py", ".bin", ".pt", ".pkl"))]
    assert {path.suffix for path in tmp_path.glob("pulled*/**/*.*")} <= {".json", ".md", ".safetensors"}


def test_a_pickle_in_place_of_a_file_is_refused(
    canary: Path,
    hub: LoopbackHub,  # noqa: F811
    adapters: AdapterSet,
    tmp_path: Path,
) -> None:
    adapters.save_pretrained(tmp_path / "adapters")
    random_graph(1, with_errors=True).save(tmp_path / "graph")

    def with_pickle(of: Path, name: str) -> Path:
        """A copy of a folder, one file of which is a pickle."""
        folder = tmp_path / f"{of.name}, {name.replace('/', ' ')}"
        shutil.copytree(of, folder)
        assert (folder / name).is_file()
        (folder / name).write_bytes(pickled(canary))
        return folder

    layer = "layer_0/sae_weights.safetensors"
    evil = with_pickle(tmp_path / "adapters", layer)
    hub.files["user/evil"] = {**files_of(evil), "circuits/hesitation.json": pickled(canary)}
    attempts: dict[str, Callable[[], object]] = {
        "adapters": lambda: AdapterSet.from_pretrained(evil),
        "adapters of the hub": lambda: pull("user/evil", tmp_path / "pulled"),
        "SAELens": lambda: from_saelens(evil),
        "circuit": lambda: Circuit.from_hub("user/evil"),
        "graph": lambda: AttributionGraph.load(with_pickle(tmp_path / "graph", "graph.safetensors")),
        "model": lambda: load_hf_model(with_pickle(TARGET, "model.safetensors")),
        "base": lambda: PairedModel.from_pretrained(with_pickle(BASE, "model.safetensors"), TARGET),
        "tokenizer": lambda: load_hf_model(with_pickle(TARGET, "tokenizer.json")),
    }
    for name, attempt in attempts.items():
        with pytest.raises(UserError):
            attempt()
        assert not canary.exists(), name
    pickle.loads(pickled(canary))
    assert canary.exists()  # so whoever unpickled it would have written it


def test_code_of_a_data_set_never_runs(canary: Path, tmp_path: Path) -> None:
    folder = with_code(tmp_path / "evil", TARGET, canary)
    for streaming in (False, True):
        with pytest.raises(DataError):
            open_reader(DataConfig(source=str(folder), streaming=streaming))
    with pytest.raises(Exception):  # the library's own; what matters is that it runs nothing
        load_dataset_builder(str(folder))
    assert not canary.exists()


def test_only_tables_of_a_data_set_are_read(canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Early releases of the library unpickle files for the data set "pandas", and others decode what is in archives."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("train.pkl", "train.pth", "train.json"):
        Path(name).write_bytes(pickled(canary) if name != "train.json" else b'{"prompt": "a", "response": "b"}')
    for name in ("pandas", "json", "text"):
        with pytest.raises(DataError, match=f"{name} is a format of files and no dataset"):
            open_reader(DataConfig(source=name))
    archive = tmp_path / "archive"
    archive.mkdir()
    with tarfile.open(archive / "train.tar", "w") as tar:
        tar.add("train.pth")
    with pytest.raises(
        DataError, match="of the format webdataset, which is not read: conversations are read from json"
    ):
        open_reader(DataConfig(source=str(archive)))
    with pytest.raises(UserError, match="cannot be read"):
        load_problems("gsm8k", str(archive))
    assert not canary.exists()
