"""Completions by variants: each equals the model's own on that variant, and the terminal columns are safe and fit."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.random_models import randomise

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.circuit import Circuit, CircuitFeature
from tl_adapters.cli.columns import BETWEEN, PARTING, Column, side_by_side
from tl_adapters.cli.common import feature_ids
from tl_adapters.cli.main import main
from tl_adapters.config import RunConfig
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.traces import DataError, Trace
from tl_adapters.errors import UserError
from tl_adapters.generation.compare_variants import generate_variants, tokenize_question
from tl_adapters.generation.sampling import GenerationError
from tl_adapters.interventions.feature_edits import InterventionError, ablated, inserted, negated, scaled
from tl_adapters.interventions.variants import on_route, rescaled, with_negated, with_only, without
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.study.open_run import load_organism_pair

QUESTION = "47+85+19=?"
FEATURES = [FeatureId(layer, index) for layer in range(5) for index in range(8)]
STYLE = re.compile(r"\x1b\[[01]m")


@pytest.fixture(scope="module", params=["hooked", "bridge"])
def pair(request: pytest.FixtureRequest) -> PairedModel:
    """The built-in pair with random adapters, strong enough that edits of a few features change the text."""
    pair = randomise(load_organism_pair(backend=request.param), n_features=16)
    for adapter in pair.installed_adapters():
        adapter.W_dec.data *= 10
    return pair


@pytest.fixture(scope="module")
def prompt(pair: PairedModel) -> list[int]:
    return tokenize_question(pair.model.tokenizer, QUESTION)


@torch.no_grad()
def greedy(pair: PairedModel, prompt: list[int], n: int) -> list[int]:
    """The likeliest tokens, by full forward passes."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(pair.model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] == pair.model.tokenizer.eos_token_id:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


def test_a_variant_completes_as_the_model_with_that_route_and_those_features(
    pair: PairedModel, prompt: list[int]
) -> None:
    some = FEATURES[::5]
    variants = [on_route("target"), on_route("hybrid"), on_route("replacement")]
    variants += [without(some), rescaled(some, 3.0), with_only(some), with_negated(some)]
    before = torch.get_rng_state(), pair.routes, pair.model.tokenizer
    said = generate_variants(pair, prompt, variants, max_new_tokens=12, progress=False)
    assert torch.equal(torch.get_rng_state(), before[0]) and pair.routes == before[1]
    assert pair.model.tokenizer is before[2]
    with pair.routed("target"):
        expected = [greedy(pair, prompt, 12)]
    with pair.routed("hybrid"):
        expected.append(greedy(pair, prompt, 12))
    with pair.routed("replacement"):
        expected.append(greedy(pair, prompt, 12))
        for manager in (ablated(pair, some), scaled(pair, some, 3.0)):
            with manager:
                expected.append(greedy(pair, prompt, 12))
    for manager in (inserted(pair, some), negated(pair, some)):
        with manager:
            expected.append(greedy(pair, prompt, 12))
    assert [list(one.tokens) for one in said] == expected
    assert len({one.tokens for one in said}) == 7, "every variant is another model"
    assert [one.variant for one in said] == [
        "target",
        "hybrid",
        "replacement",
        *(f"{how} 0.0, 0.5, 1.2 and 5 more" for how in ("replacement without", "replacement with 3 x")),
        *(f"{how} 0.0, 0.5, 1.2 and 5 more" for how in ("hybrid with only", "target less")),
    ]


def test_the_target_hesitates_stops_and_is_truncated(pair: PairedModel, prompt: list[int]) -> None:
    whole, again = generate_variants(pair, prompt, [on_route("target")] * 2, max_new_tokens=100, progress=False)
    (cut,) = generate_variants(pair, prompt, [on_route("target")], max_new_tokens=5, progress=False)
    assert whole == again and whole.differs_at is None
    assert not whole.truncated and whole.text.endswith("</think>151")
    assert [whole.text[a:b] for a, b in whole.hesitation_spans] == ["Wait"]
    assert whole.summary == f"{len(whole.tokens)} tokens; hesitation words: 1, wait: 1; stopped"
    assert cut.truncated and cut.tokens == whole.tokens[:5] and cut.summary.endswith("cut at the limit")


def test_every_variant_draws_from_the_same_seed(pair: PairedModel, prompt: list[int]) -> None:
    def drawn(seed: int, *routes: str, **options: float) -> list[tuple[int, ...]]:
        variants = [on_route(route) for route in routes]
        options = {"temperature": 3.0, **options}
        said = generate_variants(pair, prompt, variants, seed=seed, max_new_tokens=15, progress=False, **options)
        return [one.tokens for one in said]

    one, two = drawn(0, "target", "target")
    assert one == two == drawn(0, "target")[0]
    assert one != drawn(1, "target")[0]
    assert drawn(0, "target", top_p=1e-6) == drawn(0, "target", temperature=0.0) != [one]


def test_texts_differ_from_the_start_of_a_token(pair: PairedModel, prompt: list[int]) -> None:
    first, other = generate_variants(
        pair, prompt, [on_route("target"), on_route("hybrid")], max_new_tokens=40, progress=False
    )
    place = other.differs_at
    assert place is not None and first.text[:place] == other.text[:place]
    tokenizer = pair.model.tokenizer
    same = next(i for i in range(41) if first.tokens[: i + 1] != other.tokens[: i + 1])
    assert tokenizer.decode(other.tokens[:same]) == other.text[:place]


def test_a_prompt_is_a_question_or_raw_text(pair: PairedModel) -> None:
    tokenizer = pair.model.tokenizer
    rendered = ChatFormat.of(tokenizer).prompt([{"role": "user", "content": QUESTION}])
    decoded = lambda *args, **options: tokenizer.decode(tokenize_question(tokenizer, *args, **options))  # noqa: E731
    assert decoded(f" {QUESTION}\n") == rendered, "an editor's line break is no part of a question"
    assert decoded(QUESTION, open_thinking=True) == rendered + "<think>"
    assert decoded(QUESTION, raw=True) == QUESTION
    assert decoded(QUESTION + "<think>\n", raw=True, open_thinking=True) == QUESTION + "<think>\n"
    assert decoded(QUESTION, open_thinking=True, think_start="<|end|>") == rendered + "<|end|>"
    with pytest.raises(GenerationError, match="prompt is empty"):
        tokenize_question(tokenizer, " \n")
    with pytest.raises(GenerationError, match="no tokenizer"):
        tokenize_question(None, QUESTION)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        assert decoded(QUESTION, raw=True) == QUESTION
        with pytest.raises(DataError, match="no chat template"):
            tokenize_question(tokenizer, QUESTION)
        (said,) = generate_variants(pair, tokenize_question(tokenizer, rendered, raw=True), [on_route("target")])
    finally:
        tokenizer.chat_template = template
    assert said.text.endswith("</think>151") and not said.truncated


def test_pad_tokens_in_a_prompt_are_read(pair: PairedModel, prompt: list[int]) -> None:
    pad = pair.model.tokenizer.pad_token_id
    for odd in ([pad, pad, *prompt], [*prompt, pad]):
        (said,) = generate_variants(pair, odd, [on_route("target")], max_new_tokens=6, progress=False)
        with pair.routed("target"):
            assert list(said.tokens) == greedy(pair, odd, 6)


def test_a_prompt_is_given_in_every_way(pair: PairedModel, prompt: list[int]) -> None:
    variants = [on_route("target")]
    expected = generate_variants(pair, prompt, variants, max_new_tokens=4, progress=False)
    document = Trace((*prompt, *expected[0].tokens, 1), len(prompt))
    text = pair.model.tokenizer.decode(prompt)
    for same in (text, torch.tensor(prompt), torch.tensor([prompt]), document):
        assert generate_variants(pair, same, variants, max_new_tokens=4, progress=False) == expected


def test_unusable_options_and_prompts_are_refused(pair: PairedModel, prompt: list[int]) -> None:
    variants = [on_route("target")]
    for options in ({"temperature": -1.0}, {"temperature": 1.0, "top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}):
        with pytest.raises(GenerationError, match="temperature must be 0 or more"):
            generate_variants(pair, prompt, variants, **options)  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match="max_new_tokens 0; both must be 1 or more"):
        generate_variants(pair, prompt, variants, max_new_tokens=0)
    for bad, says in (([], "prompt has 0 tokens"), ("", "prompt has 0 tokens"), ([1] * 256, "allowed are 1 to 255")):
        with pytest.raises(GenerationError, match=says):
            generate_variants(pair, bad, variants)
    (said,) = generate_variants(pair, [*prompt * 30][:250], variants, progress=False)
    assert len(said.tokens) <= 6, "the context is full"
    with pytest.raises(InterventionError, match=r"no features 0\.16"):
        generate_variants(pair, prompt, [without([FeatureId(0, 16)])], progress=False)
    assert pair.model.tokenizer is not None


# -- in a terminal ------------------------------------------------------------------------------------------------

NASTY = "a\x1b]0;title\x07b\x9b31mc\rd\u202ee\u2028f\u200bg\x00h\ti\ud800j"


def columns(*texts: str, **options: object) -> list[Column]:
    return [Column(f"variant {i}", text, "2 tokens", **options) for i, text in enumerate(texts)]  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [1, 20, 59, 63, 100, 201])
def test_printed_columns_are_safe_and_fit(width: int) -> None:
    text = f"{NASTY}\n\nwords " + "x" * 90 + " 漢字" * 40
    for styled in (False, True):
        out = side_by_side(columns(text, NASTY), width, styled)
        plain = STYLE.sub("", out)
        assert styled == (plain != out)
        assert all(c == "\n" or c.isprintable() for c in plain)
        lines = plain.split("\n")
        wide = [sum(2 if c in "漢字" else 1 for c in line) for line in lines]
        assert max(wide) <= max(width, 6), "no escaped character is broken"
        beside = width >= 2 * 30 + len(BETWEEN)
        assert any(BETWEEN in line for line in lines) is beside


def test_columns_hold_their_texts_in_order_and_end_on_one_line() -> None:
    one, other = "alpha beta gamma " * 6 + "\n\nend", "short"
    rows = side_by_side(columns(one, other), 63).split("\n")
    left, right = ([row.split("│")[side].strip() for row in rows] for side in (0, 1))
    assert left[0] == "variant 0" and right[0] == "variant 1"
    assert left[-1] == right[-1] == "2 tokens", "footers stand on one line"
    assert " ".join(" ".join(left[1:-1]).split()) == " ".join(one.split())
    assert [text for text in right[1:-1] if text] == [other]
    assert all(len(row.split("│")[0]) == 31 for row in rows), "the second column stands upright"
    stacked = side_by_side(columns(one, other), 50).split("\n")
    assert [line for line in stacked if line.startswith("variant")] == ["variant 0", "variant 1"]


def test_differences_are_marked_and_hesitations_bold() -> None:
    text = "so 12.\nWait, 13"
    (column,) = columns(text, strong=[(7, 11)], parts_at=3)
    assert side_by_side([column], 80).split("\n") == ["variant 0", "", f"so {PARTING}12.", "Wait, 13", "", "2 tokens"]
    styled = side_by_side([column], 80, styled=True)
    assert styled.split("\n")[2:4] == [f"so \x1b[1m{PARTING}\x1b[0m12.", "\x1b[1mWait\x1b[0m, 13"]
    (column,) = columns(text, parts_at=len(text))
    assert side_by_side([column], 80).split("\n")[3] == f"Wait, 13{PARTING}", "one that breaks off parts at its end"


# -- the subcommand ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the built-in pair whose adapters add nothing."""
    folder = tmp_path_factory.mktemp("run")
    load_organism_pair().new_adapters(16).save_pretrained(folder / "adapters")
    (folder / "config.json").write_text(json.dumps(RunConfig().to_dict()))
    return folder


@pytest.fixture
def printed(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def run(*argv: str, width: int = 120, status: int = 0) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["generate", str(folder), "--quiet", *argv]) == status
        out = capsys.readouterr()
        return out.err if status else out.out

    return run


def test_the_subcommand_compares_routes(printed) -> None:  # type: ignore[no-untyped-def]
    out = printed("--prompt", QUESTION)
    assert "hesitation words: 1, wait: 1; stopped" in printed("--prompt", QUESTION, "--route", "target")
    lines = out.splitlines()
    assert [title.strip() for title in lines[0].split(BETWEEN)] == ["target", "hybrid", "replacement"]
    assert "</think>151" in out and "\x1b" not in out
    assert max(map(len, lines[:-1])) <= 120
    assert PARTING in out and "Wait" in out
    assert lines[-1].startswith("next: tl-adapters attribute")


def test_the_subcommand_adds_variants(printed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "prompt.txt"
    file.write_text(QUESTION + "\n")
    out = printed(
        "--prompt-file", str(file), "--route", "replacement", "--ablate", "1.3", "2.4", "--ablate", "4.0", "--insert",
        "0.1", "--negate", "0.2", "--scale", "-2.5", "3.1", "--max-new-tokens", "8", "--temperature", "1", "--top-p",
        "0.9", "--seed", "3", width=25,
    )  # fmt: skip
    titles = re.sub(r"\s+", " ", out)
    for title in ("replacement without 1.3, 2.4", "replacement without 4.0", "hybrid with only 0.1", "target less 0.2"):
        assert title in titles
    assert "replacement with -2.5 x 3.1" in titles
    # The decoders are zero: whatever is done to the features, the text drawn is the same.
    assert titles.count("the same as replacement") == (5 if PARTING not in out else 4)


def test_the_subcommand_takes_a_raw_prompt_and_opens_the_thinking(printed) -> None:  # type: ignore[no-untyped-def]
    raw = f"<|bos|><|user|>{QUESTION}<|assistant|><think>"
    options = ("--route", "target", "--max-new-tokens", "30")
    assert printed("--prompt", raw, "--raw", *options) == printed("--prompt", QUESTION, "--open-thinking", *options)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "a", "--ablate", "1-3"], "'1-3' does not name a feature; give features as layer.index"),
        (["--prompt", "a", "--ablate", "9.0"], "There are no features 9.0"),
        (["--prompt", "a", "--scale", "1.3"], "--scale is 1.3; give a factor and features"),
        (["--prompt", "a", "--scale", "nan", "1.3"], "give a factor and features"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature is -1; give a finite number of at least 0"),
        (["--prompt", ""], "--prompt needs a value, and an empty one follows"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file: There is no file nowhere.txt"),
    ],
)
def test_the_subcommand_refuses_in_one_line(printed, argv: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    error = printed(*argv, status=2)
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_features_are_read_from_the_command_line() -> None:
    assert feature_ids(["2.17", "4.3"]) == [FeatureId(2, 17), FeatureId(4, 3)]
    for bad in ("2", "2.", "-1.2", "1.2.3", "a.b", "1.2 "):
        with pytest.raises(UserError, match="layer.index, such as 2.17"):
            feature_ids(["1.1", bad])


def test_a_circuit_file_stands_for_its_features(tmp_path: Path) -> None:
    features = [
        CircuitFeature(FeatureId(3, 1), "output", 1.0, 0.0, 1.0, 0.0, 1.0, 1.0),
        CircuitFeature(FeatureId(1, 4), "template", 0.0, 1.0, 1.0, 0.0, 1.0, 1.0),
        CircuitFeature(FeatureId(2, 2), "suppress", -1.0, 0.0, -1.0, 0.0, -1.0, 1.0),
    ]
    circuit = Circuit("hesitation", ("Wait",), tuple(features), 1.5, "select", {}, 8, 4, 0.1)
    path = circuit.save(tmp_path)
    assert feature_ids([str(path)]) == [FeatureId(1, 4), FeatureId(3, 1)]
    assert feature_ids([f"{path}:suppress", "0.0"]) == [FeatureId(2, 2), FeatureId(0, 0)]
    with pytest.raises(UserError, match="'outpt' is not a role of a circuit; the roles are output"):
        feature_ids([f"{path}:outpt"])
    with pytest.raises(UserError, match="nothing"):
        feature_ids([str(tmp_path / "nothing.json")])
