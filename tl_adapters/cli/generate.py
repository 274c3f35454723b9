"""The subcommand generate: what routes and changed features write after one prompt."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from tl_adapters.cli.common import (
    AsJson,
    Device,
    Dtype,
    PromptFile,
    Quiet,
    RouteName,
    RunFolder,
    Seed,
    Strength,
    Temperature,
    TopK,
    TopP,
    device_of,
    feature_ids,
    given_device,
    joined,
    read_prompt,
    scale_factor,
    strength_of,
)
from tl_adapters.cli.parsing import Words, choices, whole, words
from tl_adapters.cli.result import Result
from tl_adapters.utils.printing import command

if TYPE_CHECKING:
    from tl_adapters.cli.columns import Column
    from tl_adapters.generation.compare_variants import VariantCompletion
    from tl_adapters.interventions.variants import Variant


_Prompt = Annotated[
    str | None,
    typer.Option("--prompt", metavar="TEXT", help="a question; the target's chat template is applied"),
]
_Raw = Annotated[bool, typer.Option("--raw", help="the prompt is the model's whole input, chat tokens included")]
_OpenThinking = Annotated[
    bool, typer.Option("--open-thinking", help="end the prompt with the tag that opens the thinking")
]
_Route = Annotated[
    list[str] | None, choices("--route", "a route to show (default: the first three)", get_args(RouteName))
]
_Ablate = Annotated[list[Words] | None, words("--ablate", "also the replacement without these features", "L.I")]
_Insert = Annotated[list[Words] | None, words("--insert", "also the hybrid with only these", "L.I")]
_Negate = Annotated[list[Words] | None, words("--negate", "also the target less half of these features' output", "L.I")]
_Scale = Annotated[
    list[Words] | None,
    words("--scale", "also the replacement with these features times FACTOR", "FACTOR L.I"),
]
_MaxNewTokens = Annotated[
    int | None,
    whole(
        "--max-new-tokens",
        "longest completion (default: generation_config.json's, or 32,768, or what the context leaves)",
    ),
]


def generate(
    run_folder: RunFolder,
    prompt: _Prompt = None,
    prompt_file: PromptFile = None,
    raw: _Raw = False,
    open_thinking: _OpenThinking = False,
    route: _Route = None,
    ablate: _Ablate = None,
    insert: _Insert = None,
    strength: Strength = None,
    negate: _Negate = None,
    scale: _Scale = None,
    max_new_tokens: _MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    quiet: Quiet = False,
    json: AsJson = False,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> Result:
    """Complete a prompt on routes and with changed features, side by side.

    Examples:
        tl-adapters generate runs/demo --prompt "47+85+19=?"
        tl-adapters generate runs/demo --prompt "47+85+19=?" --ablate runs/demo/circuit.json --scale 2 4.12 4.80
    """
    from tl_adapters.config import RunConfig
    from tl_adapters.generation.compare_variants import generate_variants, tokenize_question
    from tl_adapters.study.open_run import open_run

    text = read_prompt(prompt, prompt_file)
    shown = variants(route, ablate, insert, strength, negate, scale)
    pair = open_run(run_folder, device_of(device), dtype)
    think_start = RunConfig.of_run(run_folder).data.think_start
    tokens = tokenize_question(
        pair.model.tokenizer, text, raw=raw, open_thinking=open_thinking, think_start=think_start
    )
    decoding: dict[str, Any] = dict(temperature=temperature, top_p=top_p, top_k=top_k)
    completions = generate_variants(
        pair, tokens, shown, max_new_tokens=max_new_tokens, seed=seed or 0, progress=not quiet, **decoding
    )
    asked = text if raw else pair.model.tokenizer.decode(tokens)
    return Result(
        values={"completions": [_plain(completion) for completion in completions]},
        text="\n".join([_beside(completions), _decoding_line(pair.model, len(tokens), max_new_tokens, decoding)]),
        escaped=True,
        next=command("attribute", run_folder, prompt=asked, device=given_device(device), dtype=dtype)
        if len(tokens) > 1 and _fits_a_command(asked)
        else None,
    )


def _fits_a_command(text: str) -> bool:
    """Whether the system takes a text as one word of a command: 128 KiB on Linux, without a null character."""
    return "\0" not in text and len(text.encode("utf-8", "surrogateescape")) < 2**17


def variants(
    routes: Sequence[str] | None,
    ablate: Sequence[Words] | None,
    insert: Sequence[Words] | None,
    strength: float | None,
    negate: Sequence[Words] | None,
    scale: Sequence[Words] | None,
) -> list[Variant]:
    """The routes and variants of the options, in the order of their help. Raises UserError."""
    from tl_adapters.generation.compare_variants import DEFAULT_ROUTES
    from tl_adapters.interventions.variants import on_route, rescaled, with_negated, with_only, without

    if strength is not None:
        strength_of(strength, joined(insert))
    return [
        *(on_route(route) for route in routes or DEFAULT_ROUTES),
        *(without(feature_ids(names)) for names in ablate or ()),
        *(with_only(feature_ids(names), strength_of(strength, names)) for names in insert or ()),
        *(with_negated(feature_ids(names)) for names in negate or ()),
        *(rescaled(feature_ids(names), scale_factor(factor, names)) for factor, *names in scale or ()),
    ]


def _plain(completion: VariantCompletion) -> dict[str, Any]:
    return {"variant": completion.variant, "text": completion.text, "differs_at": completion.differs_at}


def _beside(completions: Sequence[VariantCompletion]) -> str:
    from tl_adapters.cli.columns import side_by_side

    width = shutil.get_terminal_size((100, 24)).columns
    columns = [_column(completion, completions[0]) for completion in completions]
    return side_by_side(columns, width, styled=sys.stdout.isatty())


def _column(completion: VariantCompletion, first: VariantCompletion) -> Column:
    from tl_adapters.cli.columns import Column

    same = completion is not first and completion.differs_at is None
    footer = completion.summary + (f"; the same as {first.variant}" if same else "")
    return Column(completion.variant, completion.text, footer, completion.hesitation_spans, completion.differs_at)


def _decoding_line(model: Any, prompt_length: int, max_new_tokens: int | None, decoding: dict[str, Any]) -> str:
    from tl_adapters.generation.generation_config import default_max_new_tokens, sampling_parameters

    limit = default_max_new_tokens(model) if max_new_tokens is None else max_new_tokens
    limit = min(limit, model.cfg.n_ctx - prompt_length)
    return f"decoding: {sampling_parameters(model, **decoding)}, up to {limit:,} tokens"
