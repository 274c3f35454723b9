"""Adapters that somebody else trained are opened by their name, and every later stage takes them like a run's own."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.fake_chat import FakeChat
from helpers.hub_folders import write_pair
from helpers.judges import knowing
from helpers.loopback_hub import LoopbackHub, hub  # noqa: F401  # a fixture
from helpers.random_models import randomise

from tl_adapters import load, load_traces, organism
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.set_folder import SET_METADATA_FILE, SET_SAMPLES_FILE
from tl_adapters.checkpoints.model_files import CheckpointError, fetch
from tl_adapters.checkpoints.model_reference import published_name
from tl_adapters.circuits.circuit import Circuit
from tl_adapters.cli.main import main
from tl_adapters.config import DataConfig, RunConfig
from tl_adapters.data.traces import DataError
from tl_adapters.errors import UserError
from tl_adapters.evaluation.pair_check import claimed_l0
from tl_adapters.evaluation.tasks import Problems
from tl_adapters.interop.authors_checkpoint import from_authors, to_authors
from tl_adapters.interop.hub import pull, push_to_hub
from tl_adapters.interop.saelens import from_saelens, to_saelens
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism.recipe import build_tokenizer
from tl_adapters.study import by_name, open_run
from tl_adapters.utils.devices import resolve_device
from tl_adapters.utils.results import read_results

TOKENS = torch.tensor([[5, 9, 20, 31, 7]])
CLAIMED = "user/sums-l0-1.5"


@torch.no_grad()
def logits(pair: PairedModel, route: str = "replacement") -> torch.Tensor:
    with pair.routed(route):
        return pair.model(TOKENS)


@pytest.fixture
def trained(tmp_path: Path) -> PairedModel:
    """A tiny pair from two folders, with adapters."""
    return randomise(PairedModel.from_pretrained(*write_pair(tmp_path / "models", "Qwen3", dtype=torch.float32)))


def as_folder(trained: PairedModel, form: str, folder: Path) -> Path:
    adapters = trained.installed_adapters()
    if form == "ours":
        adapters.save_pretrained(folder)
    elif form == "saelens":
        to_saelens(adapters, folder)
        for file in (SET_METADATA_FILE, SET_SAMPLES_FILE):  # as SAELens itself would write it
            (folder / file).unlink()
    else:
        to_authors(adapters, folder, base=trained.base_id, target=trained.target_id)
    return folder


@pytest.mark.parametrize("device", [None, "auto", "cpu", torch.device("cpu")])
def test_a_device_is_one_of_torch_its_name_or_none(
    trained: PairedModel, device: torch.device | str | None, tmp_path: Path
) -> None:
    adapters = as_folder(trained, "ours", tmp_path / "theirs")
    expected = resolve_device(device)
    assert load(adapters, device=device).device.type == expected.type
    with pytest.raises(UserError, match="device.* is not known"):
        load(adapters, device="abacus")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_one_of_torch_or_its_name(trained: PairedModel, dtype: torch.dtype | str, tmp_path: Path) -> None:
    adapters = as_folder(trained, "ours", tmp_path / "theirs")
    for pair in (
        load(adapters, dtype=dtype),
        PairedModel.from_pretrained(trained.base_id, trained.target_id, dtype=dtype),
        PairedModel.plant(trained.base_id, trained.installed_adapters(), dtype=dtype),
    ):
        assert pair.model.cfg.dtype == pair.model.W_E.dtype == torch.bfloat16
    for wrong in (torch.int8, "half"):
        name = str(wrong).removeprefix("torch.")
        with pytest.raises(UserError, match=f"dtype .*{name}.* allowed are float32, bfloat16"):
            PairedModel.from_pretrained(trained.base_id, trained.target_id, dtype=wrong)
        with pytest.raises(UserError, match=f"dtype is .*{name}.* allowed is .*bfloat16"):
            load(adapters, dtype=wrong)


@pytest.mark.parametrize("form", ["ours", "saelens", "authors"])
def test_any_form_is_loaded_by_its_name(trained: PairedModel, form: str, tmp_path: Path) -> None:
    name = as_folder(trained, form, tmp_path / "theirs")
    pair = load(name, target=trained.target_id, base=trained.base_id)
    torch.testing.assert_close(logits(pair), logits(trained))
    models = ["--target", trained.target_id, "--base", trained.base_id]
    assert main(["open", str(name), *models, "--out", str(tmp_path / "run")]) == 0
    torch.testing.assert_close(logits(load(tmp_path / "run")), logits(trained))
    opened = read_results(tmp_path / "run")["opened"]
    assert opened["name"] == str(name) and opened["n_features"] == trained.installed_adapters().n_features


def test_the_bases_mlps_of_an_authors_checkpoint_are_its_own(trained: PairedModel, tmp_path: Path) -> None:
    name = as_folder(trained, "authors", tmp_path / "theirs")
    pair = load(name, target=trained.target_id)
    assert pair.base_id == str(name)
    for route in ("hybrid", "replacement"):
        torch.testing.assert_close(logits(pair, route), logits(trained, route))


def put_on(hub: LoopbackHub, name: str, folder: Path) -> None:  # noqa: F811
    hub.files[name] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_by_hub_name_and_revision(hub: LoopbackHub, trained: PairedModel, tmp_path: Path) -> None:  # noqa: F811
    """A set, a base and a target are on the hub, each at its own revision, with one token for all of them."""
    theirs = as_folder(trained, "authors", tmp_path / "theirs")
    hub.commits |= {"v1": "1" * 40, "v2": "2" * 40}
    for name, folder in ((f"{CLAIMED}@v1", theirs), ("org/target@v2", Path(trained.target_id))):
        put_on(hub, name, folder)
        hub.files.setdefault(name.partition("@")[0], {})
    pair = load(f"{CLAIMED}@v1", target="org/target@v2", token="secret")
    by_option = load(CLAIMED, target="org/target@v2", revision="v1", token="secret")
    for one in (pair, by_option):
        torch.testing.assert_close(logits(one), logits(trained))
        assert one.base_id == f"{CLAIMED}@v1"
    asked = [request for request in hub.server.requests if "/resolve/" in request.path]
    assert asked and all(request.headers.get("authorization") == "Bearer secret" for request in asked)
    check = pair.check()
    assert check.claimed_l0 == 1.5 and "the set says 1.5" in str(check)
    with pytest.raises(UserError, match="names the revision v1, and revision is v2; give one of them"):
        load(f"{CLAIMED}@v1", target="org/target@v2", revision="v2")
    with pytest.raises(UserError, match="org/target"):
        load(f"{CLAIMED}@v1", target="org/target@v3")


def test_a_pushed_set_needs_no_other_name(hub: LoopbackHub, trained: PairedModel, tmp_path: Path) -> None:  # noqa: F811
    for role in ("base", "target"):
        put_on(hub, f"org/{role}", Path(getattr(trained, f"{role}_id")))
    adapters = PairedModel.from_pretrained("org/base", "org/target").new_adapters(4)
    push_to_hub(adapters, "user/set")
    out = tmp_path / "run"
    assert main(["open", "user/set", "--out", str(out), "--json"]) == 0
    assert AdapterSet.from_pretrained(out / "adapters").metadata.target == "org/target"


def test_what_is_missing_is_said(trained: PairedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        UserError, match=r"holds no adapters: neither tl_adapters.json .* nor cfg.json .* WithTranscoder"
    ):
        load(empty)
    theirs = as_folder(trained, "authors", tmp_path / "theirs")
    assert main(["open", str(theirs), "--out", str(out)]) == 2
    assert "does not say what its target are. Name them: --target" in capsys.readouterr().err
    assert main(["open", str(theirs), "--out", str(empty), "--target", trained.target_id]) == 2
    assert "exists already" in capsys.readouterr().err
    other = write_pair(tmp_path / "other", "Qwen3", dtype=torch.float32, num_hidden_layers=3)[1]
    assert main(["open", str(theirs), "--out", str(out), "--target", str(other)]) == 2
    assert "layers" in capsys.readouterr().err
    assert not out.exists()
    assert main(["open", str(theirs), "--out", str(out), "--target", trained.target_id]) == 0
    with pytest.raises(UserError, match="is a run, which is opened as it was made; leave out backend"):
        load(out, backend="hooked")


def test_a_folder_has_no_revision(trained: PairedModel, tmp_path: Path) -> None:
    """Whoever made it, and in every function that takes a revision: it would say that a commit was read."""
    saelens, authors = (as_folder(trained, form, tmp_path / form) for form in ("saelens", "authors"))
    models, run = dict(base=trained.base_id, target=trained.target_id), tmp_path / "run"
    named = ["--base", trained.base_id, "--target", trained.target_id]
    assert main(["open", str(saelens), *named, "--out", str(run)]) == 0
    calls: list[Callable[[], object]] = [
        lambda: load(run, revision="v1", **models),
        lambda: load(saelens, revision="v1", **models),
        lambda: load(authors, revision="v1", **models),
        lambda: AdapterSet.from_pretrained(run / "adapters", revision="v1"),
        lambda: from_saelens(saelens, revision="v1"),
        lambda: from_authors(authors, revision="v1"),
        lambda: pull(str(run / "adapters"), tmp_path / "pulled", revision="v1"),
        lambda: Circuit.from_hub(str(run), revision="v1"),
        lambda: fetch(organism.BUILTIN_TARGET, ["*"], revision="v1"),
    ]
    for call in calls:
        with pytest.raises(CheckpointError, match="on this machine and has no revisions, and revision is v1: leave"):
            call()
    with pytest.raises(UserError, match="is a run, which is opened as it was made; leave out revision"):
        load(run, revision="v1")
    assert not (tmp_path / "pulled").exists()


def test_a_revision_is_of_one_dataset(monkeypatch: pytest.MonkeyPatch, trained: PairedModel) -> None:
    """Held-out text of the training data's repository is read at its revision, that of another at its latest."""
    asked: list[tuple[str, str | None]] = []

    def refusing(config: DataConfig, *_: object) -> None:
        asked.append((config.source, config.revision))
        raise DataError("not asked here")

    monkeypatch.setattr(open_run, "open_documents", refusing)
    trained.model.tokenizer = build_tokenizer()
    config = RunConfig("base", "target", data=DataConfig("org/data", revision="v1"))
    for source in ("org/data", "org/other"):
        with pytest.raises(DataError, match="not asked here"):
            open_run.open_held_out(config, source, trained)
    assert asked == [("org/data", "v1"), ("org/other", None)]


def test_the_check_measures_what_it_says(trained: PairedModel) -> None:
    check = trained.check()
    assert check.logits_off is not None and check.logits_off < 1e-5
    assert check.claimed_l0 is None and 0 < check.mean_l0 < trained.installed_adapters().n_features
    assert json.loads(json.dumps(check.to_dict()))["mean_l0"] == check.mean_l0
    html = check._repr_html_()
    assert html.count("<tr>") == 1 + len(str(check).splitlines()) and f">{check.kl_replacement:.4g} nats" in html
    assert check.kl_replacement > 0 and check.kl_hybrid > 0 and check.memory_left > 1e8
    with torch.no_grad():
        trained.model.blocks[0].mlp.W_out.mul_(1.1)
    assert trained.check().logits_off > 1e-3, "the target is another model now"


def test_figures_of_any_form_are_read() -> None:
    layer = {"value": 2.0, "unit": "features per token"}
    assert claimed_l0({"L0, layer 0": layer, "L0, layer 1": {"value": 4}, "KL": {"value": 9.0}}) == 3.0
    for odd in (None, "1.4", 1.4, {}, {"value": None}, {"value": "1.4"}, [2.0]):
        assert claimed_l0({"L0, layer 0": odd}) is None
        assert claimed_l0({"L0, layer 0": odd, "L0, layer 1": layer}) == 2.0


def test_a_name_with_a_revision_is_published_as_its_repository() -> None:
    assert published_name("org/name@v1", "a" * 40) == "org/name"
    assert published_name("org/name@v1") == "org/name@v1", "not as if it were a folder"
    assert published_name("/home/me/name@v1") == "./name@v1"


def test_traces_by_name(builtin: PairedModel, tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    rows = [{"prompt": p, "response": r} for p, r in organism.reasoning_pairs("report", 9, 0)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_traces(file, builtin, n=4)) == 4 and len(load_traces(file, builtin)) == 9
    answered = load_traces("builtin", builtin, n=3, max_new_tokens=160)
    text = builtin.model.tokenizer.decode(answered[0].tokens)
    assert len(answered) == 3 and re.search(r"=\?.*<think>.*</think>", text, re.DOTALL)
    with pytest.raises(DataError, match="n is 0"):
        load_traces(file, builtin, n=0)


def test_texts_that_are_not_to_be_republished_come_with_a_warning(
    builtin: PairedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    problems = Problems("gpqa_diamond", "a copy", "train", organism.problems("tune", 2))
    for task in ("gpqa_diamond", "gsm8k"):
        caplog.clear()
        monkeypatch.setattr(by_name, "load_problems", lambda *_, task=task, **__: replace(problems, task=task))
        assert load_traces(task, builtin, n=2, max_new_tokens=160)
        assert ("texts of gpqa_diamond are not to be republished" in caplog.text) == (task == "gpqa_diamond")


@pytest.fixture(scope="module")
def builtin() -> PairedModel:
    """The built-in pair with a few random features."""
    pair = PairedModel.from_pretrained(organism.BUILTIN_BASE, organism.BUILTIN_TARGET)
    generator = torch.Generator().manual_seed(0)
    for adapter in pair.new_adapters(16):
        for parameter in adapter.parameters():
            parameter.data.normal_(0, 0.1, generator=generator)
    return pair


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, builtin: PairedModel) -> Path:
    """A folder with "run", opened from a checkpoint of the authors' layout, and with documents."""
    folder = tmp_path_factory.mktemp("opened")
    to_authors(builtin.installed_adapters(), folder / "theirs", base=builtin.base_id, target=builtin.target_id)
    pairs = organism.reasoning_pairs("report", 12)
    (folder / "held.jsonl").write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
    options = ["--target", builtin.target_id]
    assert main(["open", str(folder / "theirs"), *options, "--out", str(folder / "run"), "--quiet"]) == 0
    return folder


def take(opened: Path, *words: str) -> None:
    """A stage takes the opened run."""
    assert main([words[0], str(opened / "run"), *words[1:], "--quiet"]) == 0


def test_stages_take_an_opened_run(opened: Path, builtin: PairedModel) -> None:
    take(opened, "evaluate", "--data", str(opened / "held.jsonl"))
    take(opened, "attribute", "--prompt", "<|user|>12+7=?", "--max-feature-nodes", "20")
    take(opened, "generate", "--prompt", "12+7=?", "--max-new-tokens", "8")
    for to in ("saelens", "authors", "hybrid", "target"):
        take(opened, "export", "--to", to, "--out", str(opened / to))
    results = read_results(opened / "run")
    assert "faithfulness" in results and results["pair"]["fingerprints"] == builtin.fingerprints
    assert AdapterSet.from_pretrained(opened / "saelens").metadata.datasets == [], "it was trained elsewhere"
    page = (opened / "run" / "report.html").read_text()
    assert "greedy text" not in page and re.search(r"tokens in\s+all\) of\s+held\.jsonl\. Dead", page)
    assert "they were opened from" in page and str(opened / "theirs") in page


@pytest.mark.slow
def test_long_stages_take_an_opened_run(opened: Path) -> None:
    take(opened, "features", "--data", str(opened / "held.jsonl"))
    with FakeChat(knowing) as judge:
        judged = ["--base-url", f"{judge.server.url}/v1", "--model", "judge", "--judge", "4", "--retest", "0"]
        take(opened, "label", *judged)
    take(opened, "benchmark", "--tasks", "builtin", "--limit", "2", "--max-new-tokens", "16")
    take(opened, "hesitation", "--limit", "12", "--share", "0.01")
    take(opened, "export", "--to", "neuronpedia", "--model-id", "m", "--out", str(opened / "np"))
    assert {"features", "labels", "hesitation", "benchmarks"} <= set(read_results(opened / "run"))


def test_training_is_not_resumed_from_an_opened_run(opened: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(opened / "run")]) == 2
    assert "is not the folder of a training run" in capsys.readouterr().err
