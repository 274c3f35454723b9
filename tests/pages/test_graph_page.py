"""From a run to a graph's page: on the command line, in the demo's report, in a browser, and refused in one line."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.browser import PANEL, SELECTED, Browser, browser  # noqa: F401  # a fixture
from helpers.pairs import make
from helpers.random_models import ARCHITECTURES, random_batch

from tl_adapters.attribution.attribute import attribute
from tl_adapters.attribution.graph import AttributionGraph, GraphError
from tl_adapters.attribution.pruning import prune
from tl_adapters.attribution.targets import LogitTarget
from tl_adapters.cli.main import main
from tl_adapters.errors import UserError
from tl_adapters.features.logit_effects import logit_effects
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.graph_page import feature_records, write_graph
from tl_adapters.study import attribution
from tl_adapters.study.attribution import rank_correlations_of_run

PROMPT = "<|bos|><|user|>47+85+19=?<|assistant|><think>47+85=122.\n"
TOKENS = random_batch(3).tokens[0, :11]


def page_data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logit_effects_are_what_a_feature_adds_to_the_logits(architecture: str) -> None:
    """Without the scales of the norms on the way: the effect of an activation where they are all held at 1."""
    pair = make(architecture, "hooked")
    effects = logit_effects(pair, 3, pair.installed_adapters()[3].W_dec[[2, 5]])
    adapter, blocks = pair.installed_adapters()[3], pair.model.blocks
    decoder = adapter.W_dec.detach()[[2, 5]]
    if hasattr(blocks[3], "ln2_post"):
        decoder = decoder * blocks[3].ln2_post.w
    expected = (decoder * pair.model.ln_final.w) @ pair.model.W_U
    assert (effects - (expected - expected.mean(-1, keepdim=True)).float()).abs().max() < 1e-5


def test_the_page_holds_the_pruned_graph(tmp_path: Path) -> None:
    pair = make("Qwen2ForCausalLM", "hooked")
    graph = attribute(pair, TOKENS, linearization="frozen_mlp", progress=False)
    pruned = prune(graph)
    page, url = write_graph(pair, graph, tmp_path / "graphs", "one")
    assert "slug=one" in url and "pinnedIds=" in url
    data = page_data(page)
    assert len(data["nodes"]) == int(pruned.node_mask.sum()) and len(data["links"]) == int(pruned.edge_mask.sum())
    kinds = {node["kind"] for node in data["nodes"]}
    assert kinds == {"feature", "token", "logit", "error"}
    records = feature_records(pair, graph, pruned)
    for node in data["nodes"]:
        if node["kind"] == "feature":
            record = records[node["layer"], node["feature"]]
            assert node["top"][0][0] == record.top_logits[0] and node["top"][0][1] > 0 > node["bottom"][0][1]
            strengths = [act for window in node["examples"] for _, act in window]
            assert max(strengths) == pytest.approx(record.act_max) and node["activation"] in strengths
    back = AttributionGraph.load(tmp_path / "graphs" / "one")
    assert torch.equal(back.weights, graph.weights)
    slug = json.loads((tmp_path / "graphs" / "circuit-tracer" / "one.json").read_text())
    assert len(slug["nodes"]) == len(data["nodes"])
    with pytest.raises(FileExistsError, match="exists already"):
        write_graph(pair, graph, tmp_path / "graphs", "one")
    with pytest.raises(GraphError, match="slug"):
        write_graph(pair, graph, tmp_path / "graphs", "../two")
    assert not (tmp_path / "two").exists()


def test_on_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    common = ["attribute", str(run), "--max-feature-nodes", "200", "--quiet"]
    assert main([*common, "--prompt-file", str(tmp_path / "prompt.txt"), "--out", str(tmp_path / "g")]) == 0
    out = capsys.readouterr().out
    assert f"page: {tmp_path / 'g' / 'graph-1.html'}" in out and "conservation residual" in out
    assert main([*common, "--prompt", PROMPT, "--target", "Wait", "--target", "1", "--out", str(tmp_path / "g")]) == 0
    graph = AttributionGraph.load(tmp_path / "g" / "graph-2")
    assert [target.label for target in graph.targets] == ["Wait", "1"] and len(graph.features) == 200

    def fails(*argv: str) -> str:
        assert main(list(argv)) == 2
        err = capsys.readouterr().err.strip()
        assert err.startswith("error: ") and len(err.splitlines()) == 1
        return err

    gradient = ["--linearization", "gradient", "--prompt", PROMPT, "--target", "Wait", "--out", str(tmp_path / "h")]
    assert main([*common, *gradient]) == 0
    assert "this linearization does not conserve" in capsys.readouterr().out
    assert json.loads((tmp_path / "h" / "graph-1" / "graph.json").read_text())["residual"] is None
    one = ["--prompt", "<|bos|>", "--out", str(tmp_path / "one")]
    assert main([*common, *one]) == 2 and not (tmp_path / "one").exists()
    capsys.readouterr()
    two = ["--prompt", PROMPT, "--target", "Wait,"]
    assert "is 2 tokens of this model ('Wait', ',')" in fails(*common, *two, "--out", str(tmp_path / "g"))
    missing = str(tmp_path / "none.txt")
    assert "--prompt-file: There is no file" in fails(*common, "--prompt-file", missing, "--out", str(tmp_path / "g"))
    assert "has no adapters" in fails("attribute", str(tmp_path), "--prompt", "x")
    assert "--node-threshold is 2" in fails(
        *common, "--prompt", PROMPT, "--node-threshold", "2", "--out", str(tmp_path / "g")
    )
    assert sorted(p.name for p in (tmp_path / "g").iterdir()) == [
        "circuit-tracer", "graph-1", "graph-1.html", "graph-2", "graph-2.html",
    ]  # fmt: skip


def test_the_demo_draws_three_hesitations_and_holds_them_to_account(run: Path) -> None:
    block = json.loads((run / "results.json").read_text())["attribution"]
    report = (run / "report.html").read_text()
    assert block["graphs"] == len(block["moments"]) == 3 and block["conservation"] < 1e-3
    assert set(block["rank_correlation"]) == {"relp", "frozen_mlp", "gradient"}
    assert block["rank_correlation_prompts"] == 3 and "no interval: an interval requires 10 prompts" in report
    for moment in block["moments"]:
        assert f'href="{moment["page"]}"' in report and (run / moment["page"]).is_file()
        d = moment["difference"]
        parts = d["hybrid"] + d["features"] + d["decoder_biases"] + d["unexplained"]
        assert parts == pytest.approx(d["replacement"], abs=1e-4)
        assert set(moment["curve"]) == {"relp", "frozen_mlp", "gradient", "ablation"}
        labels = [node["label"] for node in page_data(run / moment["page"])["nodes"] if node["kind"] == "logit"]
        assert "Wait" in labels


def test_linearizations_are_compared_on_more_prompts_than_there_are_graphs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, compared = tmp_path / "run", []
    shutil.copytree(run, folder)

    def measured(pair: PairedModel, prompt: tuple[int, ...], target: LogitTarget) -> dict[str, float]:
        compared.append(pair.model.tokenizer.decode(prompt))
        return {"relp": 0.1 * len(compared), "frozen_mlp": 0.2, "gradient": 0.9}

    monkeypatch.setattr(attribution, "rank_correlations", measured)
    before = json.loads((folder / "results.json").read_text())
    rank_correlations_of_run(folder, 10, progress=False)
    after = json.loads((folder / "results.json").read_text())
    graphs, block = before.pop("attribution"), after.pop("attribution")
    assert {key: value for key, value in after.items() if key != "files"} | {"files": before["files"]} == before
    fields = {f"rank_correlation{part}" for part in ("", "_ci", "_prompts", "_by_prompt")}
    assert {key for key in block if block[key] != graphs.get(key)} == fields
    assert compared[:3] == [moment["prompt"] for moment in graphs["moments"]] and len(set(compared)) == 10
    assert block["rank_correlation_by_prompt"]["relp"] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert block["rank_correlation"] == pytest.approx({"relp": 0.55, "frozen_mlp": 0.2, "gradient": 0.9})
    low, high = (block["rank_correlation_ci"]["relp"][end] for end in ("low", "high"))
    assert 0.3 < low < 0.45 and 0.65 < high < 0.8
    report = (folder / "report.html").read_text()
    assert "mean over 10 prompts" in report and f"{low:.2f} to {high:.2f}" in report
    monkeypatch.setattr(attribution, "PROBLEMS_PER_PROMPT", 1)
    with pytest.raises(UserError, match=r"of 20 answers hesitate; give n_prompts=\d+ or fewer"):
        rank_correlations_of_run(folder, 20, progress=False)


def test_prompts_are_those_of_the_model_organism(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "results.json").write_text(
        json.dumps({"schema_version": 1, "pair": {"base": "org/base", "target": "org/target"}})
    )
    with pytest.raises(UserError, match="another pair than the model organism"):
        rank_correlations_of_run(tmp_path)


@pytest.mark.browser
def test_a_real_page_in_a_browser(run: Path, browser: Browser) -> None:  # noqa: F811
    page = run / "graphs" / "moment-1.html"
    nodes = page_data(page)["nodes"]
    feature = next(node for node in nodes if node["kind"] == "feature")
    browser.errors.clear()
    browser.open(page, f"#select={feature['id']}")
    assert browser.js("document.querySelectorAll('.node').length") == len(nodes)
    assert browser.js(SELECTED) == [feature["id"]]
    panel = browser.js(PANEL)
    assert f"{feature['layer']}/{feature['feature']}" in panel and "Raises" in panel and "Where it is strong" in panel
    assert not browser.errors
