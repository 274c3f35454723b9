"""The subcommand attribute: an attribution graph of a prompt's next token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tl_adapters.cli.common import AsJson, Device, Dtype, PromptFile, Quiet, RunFolder, device_of, read_prompt
from tl_adapters.cli.parsing import number, whole
from tl_adapters.cli.result import Result
from tl_adapters.utils.printing import command

if TYPE_CHECKING:
    from tl_adapters.attribution.graph import AttributionGraph

_Prompt = Annotated[
    str | None,
    typer.Option("--prompt", metavar="TEXT", help="text as the model reads it, chat tokens included"),
]
_Target = Annotated[
    list[str] | None,
    typer.Option("--target", metavar="TOKEN", help="a token to attribute (default: the most probable next tokens)"),
]
_Linearization = Annotated[
    Literal["relp", "frozen_mlp", "gradient"],
    typer.Option("--linearization", "--linearisation", help="rule by which the model is made linear"),
]
_MaxFeatureNodes = Annotated[int, whole("--max-feature-nodes", "keep the N most influential")]
_Window = Annotated[int | None, whole("--window", "feature nodes of the last N positions only")]
_ExcludeBos = Annotated[bool, typer.Option("--exclude-bos", help="leave out features at the first position")]
_NodeThreshold = Annotated[
    float,
    number("--node-threshold", "share of the influence that the page's nodes hold", 0, 1, above=True),
]
_EdgeThreshold = Annotated[float, number("--edge-threshold", "share that its edges hold", 0, 1, above=True)]
_Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="folder of graphs (default: RUN/graphs)")]
_Name = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="name of the page (default: graph-1, graph-2, ...)"),
]


def attribute(
    run_folder: RunFolder,
    prompt: _Prompt = None,
    prompt_file: PromptFile = None,
    target: _Target = None,
    linearization: _Linearization = "relp",
    max_feature_nodes: _MaxFeatureNodes = 5000,
    window: _Window = None,
    exclude_bos: _ExcludeBos = False,
    node_threshold: _NodeThreshold = 0.8,
    edge_threshold: _EdgeThreshold = 0.98,
    out: _Out = None,
    name: _Name = None,
    quiet: Quiet = False,
    json: AsJson = False,
    device: Device = "auto",
    dtype: Dtype = None,
) -> Result:
    """Attribute the next token to features and input tokens.

    Examples:
        tl-adapters attribute runs/demo --prompt-file prompt.txt
        tl-adapters attribute runs/demo --prompt-file prompt.txt --target Wait --name wait
    """
    from tl_adapters.attribution.attribute import attribute as attribute_tokens
    from tl_adapters.attribution.graph import GraphError
    from tl_adapters.data.traces import prompt_token_ids
    from tl_adapters.interop.circuit_tracer import require_drawable
    from tl_adapters.pages.graph_page import require_new_graph, write_graph
    from tl_adapters.pages.navigation import GRAPHS_FOLDER, refresh_navigation
    from tl_adapters.study.features import features_if_begun
    from tl_adapters.study.open_run import open_run

    text = read_prompt(prompt, prompt_file)
    out = out or run_folder / GRAPHS_FOLDER
    require_new_graph(out, name)
    store = features_if_begun(run_folder)
    pair = open_run(run_folder, device_of(device), dtype)
    require_drawable(prompt_token_ids(pair.model, text, GraphError))
    graph = attribute_tokens(
        pair, text, target, linearization=linearization, max_feature_nodes=max_feature_nodes, window=window,
        exclude_bos=exclude_bos, progress=not quiet,
    )  # fmt: skip
    page, url = write_graph(
        pair,
        graph,
        out,
        name,
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
        store=store,
    )
    refresh_navigation(run_folder)
    saved = page.with_suffix("")
    return Result(
        paths={"page": page, "graph": saved, "circuit-tracer": out / "circuit-tracer", "in circuit-tracer": url},
        values=_numbers(graph),
        text=_line(graph),
        next=command("serve", out),
    )


def _numbers(graph: AttributionGraph) -> dict[str, Any]:
    residual = graph.residual if graph.adds_up else None
    return {"features": len(graph.features), "edges": len(graph.weights), "residual": residual}


def _line(graph: AttributionGraph) -> str:
    check = f"conservation residual {graph.residual:.1e}" if graph.adds_up else "this linearization does not conserve"
    return f"{len(graph.features):,} features, {len(graph.weights):,} edges, {check}"
