"""frozen(): the reference without interventions, linear with everything held, and mediated effects removed."""

import weakref

import pytest
import torch
from helpers.pairs import TOKENS, make, state
from helpers.random_models import ARCHITECTURES, random_model, randomise

from tl_adapters.adapters.feature_id import ForeignFeaturesError, OwnedFeatureId
from tl_adapters.attribution.relp import LinearizedModel
from tl_adapters.interventions.feature_edits import InterventionError, ablated, added, patched
from tl_adapters.interventions.frozen import FrozenChange, frozen, frozen_by_block
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel

LATER = [(layer, i) for layer in (2, 3) for i in range(24)]
EVERY = [(layer, i) for layer in range(4) for i in range(24)]
EARLY = [(1, 5), (1, 9), (1, 17)]
OPTIONS: list[dict[str, object]] = [
    {},
    {"attention": False},
    {"norms": False, "mlps": True},
    {"mlps": True, "features": EVERY},
    {"layers": range(1, 3)},
    {"layers": range(0), "norms": False},
]


@pytest.fixture(params=[("hooked", 1e-10), ("bridge", 1e-5)], ids=["hooked", "bridge"])
def kind(request: pytest.FixtureRequest) -> tuple[str, float]:
    """A backend and its precision: a bridge's norms are Hugging Face's, in float32."""
    return request.param


@torch.no_grad()
def run(pair: PairedModel, *names: str, tokens: torch.Tensor = TOKENS) -> dict[str, torch.Tensor]:
    """Hook points of one pass, and what the unembedding reads, as "read"."""
    _, cache = pair.model.run_with_cache(tokens, return_type=None)
    weight = pair.backend.norm("ln_final")
    assert weight is not None
    return {"read": cache["ln_final.hook_normalized"] * weight, **{name: cache[name] for name in names}}


def logits(pair: PairedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Before a soft cap."""
    return run(pair, tokens=tokens)["read"] @ pair.backend.unembedding().T


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_interventions_the_model_is_the_reference(architecture: str, kind) -> None:  # type: ignore[no-untyped-def]
    if kind[0] == "bridge" and architecture in ("Qwen3ForCausalLM", "LlamaForCausalLM"):
        pytest.skip("the others have what a bridge could get wrong: post-norms, soft caps, biases")
    pair = make(architecture, kind[0])
    before = state(pair)
    mask = torch.ones_like(TOKENS)
    mask[1, 6:] = 0
    for route, attention_mask in (("replacement", None), ("replacement", mask), ("target+adapter", None)):
        with torch.no_grad(), pair.routed(route):
            plain = pair.model(TOKENS, attention_mask=attention_mask)
            for options in OPTIONS:
                with frozen(pair, TOKENS, attention_mask=attention_mask, **options) as model:  # type: ignore[arg-type]
                    held = model(TOKENS, attention_mask=attention_mask)
                assert (held - plain).abs().max() < kind[1], options
    assert state(pair) == before


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Gemma2ForCausalLM"])
def test_with_everything_held_logits_are_linear_in_a_feature_and_the_slope_is_its_edge(architecture: str, kind) -> None:  # type: ignore[no-untyped-def]
    pair, tokens = make(architecture, kind[0]), TOKENS[:1]
    model = LinearizedModel(pair, tokens[0], "frozen_mlp")
    layer, position, index = next(place.tolist() for place in model.active if place[0] == 1 and place[1] == 4)
    columns = pair.backend.unembedding()[[3, 9, 12]]
    rows = model.rows([4] * 3, torch.tensor([8, 8, 8]), columns)
    column = int((model.active == torch.tensor([layer, position, index])).all(1).nonzero())
    slope = rows.features[:, column] / model.activations[column]
    assert slope.abs().max() > 1e-3

    def moved(d: float, features: list[tuple[int, int]]) -> torch.Tensor:
        with (
            pair.routed("replacement"),
            frozen(pair, tokens, mlps=True, features=features),
            added(pair, [(layer, index)], d, positions=[position]),
        ):
            return logits(pair, tokens)[0, 8, [3, 9, 12]]

    plain = moved(0.0, EVERY)
    for d in (0.5, 1.0, -40.0):
        assert (moved(d, EVERY) - plain - d * slope).abs().max() < kind[1] * max(1, abs(d))
        assert (moved(d, LATER) - plain - d * slope).abs().max() < kind[1] * max(1, abs(d)), (
            "features of earlier layers do not respond"
        )
    assert (moved(-40.0, []) - plain + 40 * slope).abs().max() > 1e-2, "features that are not held respond"


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Gemma2ForCausalLM"])
def test_held_features_remove_the_effects_through_them_only(architecture: str, kind) -> None:  # type: ignore[no-untyped-def]
    pair = make(architecture, kind[0])
    names = [f"blocks.{layer}.{ACTS_HOOK}" for layer in range(4)]
    with pair.routed("replacement"):
        plain = run(pair, *names)
        with ablated(pair, EARLY):
            total = run(pair, *names)
        with frozen(pair, TOKENS, attention=False, norms=False, features=LATER[:24]), ablated(pair, EARLY):
            direct = run(pair, *names)
        with ablated(pair, EARLY), patched(pair, LATER[:24], {2: plain[names[2]]}):
            by_hand = run(pair, *names)
    assert (plain[names[2]] - total[names[2]]).abs().max() > 1e-2
    assert (direct[names[2]] - plain[names[2]]).abs().max() < kind[1]
    assert (direct[names[1]][..., [i for _, i in EARLY]] == 0).all(), "inner interventions take precedence"
    assert (direct[names[3]] - plain[names[3]]).abs().max() > 1e-2, "other features are not held"
    assert (direct["read"] - total["read"]).abs().max() > 1e-3
    assert (direct["read"] - by_hand["read"]).abs().max() < kind[1]


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Gemma2ForCausalLM"])
def test_in_the_linear_model_the_total_effect_is_direct_plus_mediated(architecture: str, kind) -> None:  # type: ignore[no-untyped-def]
    """Mediated effect: the later features are as without the early ones, and the early ones are unchanged."""
    pair = make(architecture, kind[0])

    def effect(held: list[tuple[int, int]], off: list[tuple[int, int]]) -> torch.Tensor:
        with frozen(pair, TOKENS, mlps=True, features=held), ablated(pair, off):
            return logits(pair) - plain

    mediators, others = LATER[:24], LATER[24:]
    with pair.routed("replacement"):
        plain = logits(pair)
        total, direct = effect(others, EARLY), effect(LATER, EARLY)
        with (
            frozen(pair, TOKENS, mlps=True, features=others),
            ablated(pair, EARLY),
            pair.recorded(ACTS_HOOK) as moved,
        ):
            logits(pair)
        with frozen(pair, TOKENS, mlps=True, features=others), patched(pair, mediators, dict(moved)):
            mediated = logits(pair) - plain
    assert mediated.abs().max() > 1e-3
    assert (total - direct - mediated).abs().max() < kind[1]


def test_effects_spread_through_the_given_layers_only(kind) -> None:  # type: ignore[no-untyped-def]
    pair = make("Gemma2ForCausalLM", kind[0])
    parts = ("hook_attn_out", "hook_mlp_out")
    names = [f"blocks.{layer}.{part}" for layer in range(4) for part in parts]
    with pair.routed("replacement"):
        plain = run(pair, *names)
        with frozen(pair, TOKENS, layers=range(2, 3)), added(pair, EARLY, 3.0):
            moved = run(pair, *names)
    changed_at = {name for name in names if (moved[name] - plain[name]).abs().max() > 1e-3}
    kept = {name for name in names if (moved[name] - plain[name]).abs().max() < kind[1]}
    assert changed_at == {"blocks.1.hook_mlp_out", "blocks.2.hook_attn_out", "blocks.2.hook_mlp_out"}
    assert kept == set(names) - changed_at


def test_through_no_layers_only_the_direct_write_reaches_the_end(kind) -> None:  # type: ignore[no-untyped-def]
    pair = make("Qwen2ForCausalLM", kind[0])
    decoder = pair.installed_adapters()[1].W_dec.detach()[[i for _, i in EARLY]].sum(0)
    last, scale = "blocks.3.hook_resid_post", "ln_final.hook_scale"
    with pair.routed("replacement"):
        plain = run(pair, last, scale)
        for norms in (True, False):
            with frozen(pair, TOKENS, norms=norms, layers=range(0)), added(pair, EARLY, 2.0, positions=[4]):
                moved = run(pair, last, scale)
            write = moved[last] - plain[last]
            assert (write[:, 4] - 2 * decoder).abs().max() < kind[1]
            assert write[:, [p for p in range(9) if p != 4]].abs().max() < kind[1]
            assert bool((moved[scale] - plain[scale]).abs().max() < kind[1]) is norms


def test_the_reference_is_recorded_with_the_outer_interventions() -> None:
    pair = make("Qwen2ForCausalLM", "hooked")
    with pair.routed("replacement"), ablated(pair, EARLY):
        without = logits(pair)
        with frozen(pair, TOKENS, mlps=True, features=EVERY):
            assert (logits(pair) - without).abs().max() < 1e-10
            other = TOKENS.flip(1)
            assert (logits(pair, other) - without).abs().max() > 1e-2, "other tokens of that shape are another pass"


def test_planted_features_are_held_as_part_of_the_targets_mlp() -> None:
    adapters = make("Qwen2ForCausalLM", "hooked").installed_adapters()
    pair = randomise(PairedModel.plant(random_model(1), adapters), seed=9)
    point = "blocks.3.hook_mlp_out"
    with pair.routed("target+adapter"):
        plain = run(pair, point)
        with frozen(pair, TOKENS, layers=range(0)), added(pair, EARLY, 3.0):
            moved = run(pair, point)
    assert (moved[point] - plain[point]).abs().max() < 1e-10
    assert (moved["read"] - plain["read"]).abs().max() > 1e-3


def test_gradients_flow_through_what_is_not_held() -> None:
    pair = make("Qwen2ForCausalLM", "hooked")
    with pair.routed("replacement"), frozen(pair, TOKENS, mlps=True, features=EVERY) as model:
        resid = pair.embed(TOKENS).detach().requires_grad_()
        out = pair.run_blocks(resid, 0, 4)
        slopes = [torch.autograd.grad(out[0, 8, 0], resid, retain_graph=True)[0]]
        with torch.no_grad():
            resid.mul_(2)
        slopes.append(torch.autograd.grad(pair.run_blocks(resid, 0, 4)[0, 8, 0], resid)[0])
        assert model is pair.model
    assert slopes[0].abs().max() > 1e-3
    assert (slopes[0] - slopes[1]).abs().max() < 1e-10, "with everything held, gradients do not depend on the input"


def test_passes_of_another_shape_or_route_are_refused(kind) -> None:  # type: ignore[no-untyped-def]
    pair = make("Qwen2ForCausalLM", kind[0])
    before = state(pair)
    options: dict[str, object] = dict(max_new_tokens=3, do_sample=False, verbose=False, stop_at_eos=False)
    if kind[0] == "hooked":
        options["prepend_bos"] = False
    for cached in (True, False):
        with (
            pytest.raises(InterventionError, match=r"recorded over 1 x 9 tokens.*generate text outside"),
            pair.routed("replacement"),
            frozen(pair, TOKENS[:1]) as model,
        ):
            model.generate(TOKENS[:1], use_past_kv_cache=cached, **options)
    with (
        pytest.raises(InterventionError, match=r"recorded over 2 x 9 tokens"),
        pair.routed("replacement"),
        frozen(pair, TOKENS, attention=False, norms=False, mlps=True),
    ):
        pair.model(TOKENS[:1])
    with (
        pytest.raises(InterventionError, match="was not computed in the reference"),
        pair.routed("hybrid"),
        frozen(pair, TOKENS, layers=range(0)),
        pair.routed("replacement"),
    ):
        pair.model(TOKENS)
    with (
        pytest.raises(InterventionError, match=r"no layers \[4, 5\]; the model has 0 to 3"),
        frozen(pair, TOKENS, layers=range(3, 6)),
    ):
        pass
    with (
        pytest.raises(InterventionError, match="no features 0.24"),
        pair.routed("replacement"),
        frozen(pair, TOKENS, features=[(0, 24)]),
    ):
        pass
    assert state(pair) == before


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Gemma2ForCausalLM"])
def test_block_by_block_an_ablation_is_the_same(architecture: str, kind) -> None:  # type: ignore[no-untyped-def]
    pair, late = make(architecture, kind[0]), [feature for feature in LATER if feature[0] == 3]
    before, changes = state(pair), {"nothing": FrozenChange(()), "early": FrozenChange(EARLY)}
    changes |= {"late": FrozenChange(late), "held": FrozenChange(EARLY, held=LATER)}
    rows, positions = torch.tensor([0, 0, 1]), torch.tensor([2, 5, 4])
    with torch.no_grad(), pair.routed("replacement"):
        plain = pair.model(TOKENS)
        passes = frozen_by_block(pair, TOKENS, changes)
        found = {name: passes.logits(name, rows, positions) for name in changes}
        for name, change in changes.items():
            with frozen(pair, TOKENS, features=change.held), ablated(pair, change.ablated) as model:
                expected = model(TOKENS)[rows, positions]
            assert (found[name] - expected).abs().max() < 10 * kind[1]
            assert ((found[name] - plain[rows, positions]).abs().max() > 1e-4) == (name != "nothing")
    assert (found["held"] - found["early"]).abs().max() > 1e-4 and state(pair) == before


def test_features_that_are_not_there_or_not_the_pairs_own_are_refused_block_by_block() -> None:
    pair = make("Qwen2ForCausalLM", "hooked")
    with pair.routed("replacement"):
        for change in (FrozenChange([(9, 1)]), FrozenChange([], held=[(0, 99)])):
            with pytest.raises(InterventionError, match=r"no features (9\.1|0\.99)"):
                frozen_by_block(pair, TOKENS, {"change": change})
        foreign = FrozenChange([OwnedFeatureId(1, 2, "of another set")])
        with pytest.raises(ForeignFeaturesError):
            frozen_by_block(pair, TOKENS, {"change": foreign})


def test_patterns_of_one_block_at_a_time_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make("Qwen2ForCausalLM", "hooked")
    alive, most = weakref.WeakSet[torch.Tensor](), 0

    def count(pattern: torch.Tensor, hook: object) -> None:
        nonlocal most
        alive.add(pattern)
        most = max(most, len(alive))

    points = [(f"blocks.{layer}.attn.hook_pattern", count) for layer in range(pair.n_layers)]
    with pair.routed("replacement"), pair.model.hooks(fwd_hooks=points):
        frozen_by_block(pair, TOKENS, {"early": FrozenChange(EARLY), "late": FrozenChange([(3, 2)])})
        block_by_block, most = most, 0
        with frozen(pair, TOKENS):
            pair.model(TOKENS)
    assert block_by_block <= 4 < pair.n_layers + 1 <= most
