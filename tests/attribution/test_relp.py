"""The linearized model: rows add up, agree with autograd, and agree with interventions on the model held linear."""

import pytest
import torch
from helpers.pairs import make
from helpers.random_models import ACTIVATION_OPTIONS, ARCHITECTURES, random_batch, random_model, randomise
from helpers.relp_by_hooks import relp_hooks
from helpers.users_models import plain, process, reference
from transformer_lens.hook_points import HookPoint

from tl_adapters.attribution import relp
from tl_adapters.attribution.gradient import GradientModel
from tl_adapters.attribution.relp import LinearizedModel, Rows, large_coefficient_bytes
from tl_adapters.interventions.feature_edits import ablated
from tl_adapters.interventions.frozen import frozen
from tl_adapters.models.attach import attach
from tl_adapters.models.paired_model import PairedModel

TOKENS = random_batch(3).tokens[0, :11]
SPOTS = torch.tensor([10, 7, 7, 0])


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def targets(pair: PairedModel, model: LinearizedModel | GradientModel, layer: int, start: int = 0):  # type: ignore[no-untyped-def]
    """(positions, vectors, values, own constants) of every feature target of a layer, or of logits."""
    if layer == model.n_layers:
        columns = pair.backend.unembedding().detach()[[3, 9, 12, 60]].to(model.dtype)
        positions = SPOTS.clamp(min=start)
        return positions, columns, (model.read_by_unembedding[positions] * columns).sum(-1), torch.zeros(4)
    active = model.active[(model.active[:, 0] == layer) & (model.active[:, 1] >= start)]
    positions, index = active[:, 1], active[:, 2]
    values = model.pre_activations[layer][positions, index]
    return positions, model.encoders[layer][:, index].T, values, model.b_enc[layer][index]


def total(rows: Rows) -> torch.Tensor:
    """The sum of all contributions, except the target's own constant."""
    sources = rows.features.sum(1) + rows.errors.sum((1, 2)) + rows.tokens.sum(1)
    return sources + rows.decoder_biases + rows.biases + rows.outside


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("linearization", ["relp", "frozen_mlp"])
def test_every_target_is_the_sum_of_its_contributions_and_constants(
    architecture: str, linearization: str, start: int
) -> None:
    pair = make(architecture, "hooked")
    model = LinearizedModel(pair, TOKENS, linearization, start)
    assert len(model.active) > 300
    for layer in range(5):
        positions, vectors, values, own = targets(pair, model, layer, start)
        rows = model.rows([layer] * len(positions), positions, vectors)
        assert (total(rows) + own - values).abs().max() < 1e-10
        assert rows.biases.abs().max() > 1e-3 or architecture != "Qwen2ForCausalLM" or layer == start == 4
        assert bool(rows.errors.any()) is (linearization == "frozen_mlp" and layer > 0)
        assert bool(rows.outside.abs().max() > 1e-6) is (start > 0)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("linearization", ["relp", "frozen_mlp"])
def test_coefficients_that_are_computed_again_change_no_row(
    architecture: str, backend: str, linearization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make(architecture, backend)
    kept = LinearizedModel(pair, TOKENS, linearization, 2)
    monkeypatch.setattr(relp, "KEPT_BYTES", large_coefficient_bytes(pair, len(TOKENS)) - 1)
    monkeypatch.setattr(relp, "HIDDEN_AT_ONCE", 300)
    again = LinearizedModel(pair, TOKENS, linearization, 2)
    assert kept._kept and not again._kept and torch.equal(kept.active, again.active)
    for layer in range(5):
        positions, vectors, _, _ = targets(pair, kept, layer, 2)
        for ours, theirs in zip(
            kept.rows([layer] * len(positions), positions, vectors),
            again.rows([layer] * len(positions), positions, vectors),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("linearization", ["relp", "frozen_mlp", "gradient"])
def test_targets_of_several_layers_share_a_pass_and_have_the_rows_of_their_own(
    architecture: str, linearization: str
) -> None:
    pair = make(architecture, "hooked")
    model = GradientModel(pair, TOKENS) if linearization == "gradient" else LinearizedModel(pair, TOKENS, linearization)
    layers = [4, 4, 3, 1, 1, 0]  # 4 is the unembedding, and none is of layer 2
    of_layers = {layer: targets(pair, model, layer)[:2] for layer in set(layers)}
    at = [(layer, layers[:i].count(layer)) for i, layer in enumerate(layers)]
    positions = torch.stack([of_layers[layer][0][i] for layer, i in at])
    vectors = torch.stack([of_layers[layer][1][i] for layer, i in at])
    together = model.rows(layers, positions, vectors)
    for i, layer in enumerate(layers):
        alone = model.rows([layer], positions[i : i + 1], vectors[i : i + 1])
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[i : i + 1], theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
@pytest.mark.parametrize("start", [0, 4])
def test_every_activation_conserves(activation: str, start: int) -> None:
    models = (random_model(seed) for seed in (1, 2))
    pair = randomise(PairedModel.from_pretrained(*models), activation=activation)
    model = LinearizedModel(pair, TOKENS, "relp", start)
    by_hooks = GradientModel(pair, TOKENS, relp_hooks(pair.model))
    assert len(model.active) == (5 * 4 * 11 if activation == "topk" else len(model.active)) > 100
    assert torch.equal(model.activations, torch.cat([p[tuple(a.T)] for p, a in by_layer(model)]))
    for layer in range(5):
        positions, vectors, values, own = targets(pair, model, layer, start)
        rows = model.rows([layer] * len(positions), positions, vectors)
        assert (total(rows) + own - values).abs().max() < 1e-10
        if start == 0:
            theirs = by_hooks.rows([layer] * len(positions), positions, vectors)
            assert (rows.features - theirs.features).abs().max() < 1e-10


def by_layer(model: LinearizedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer: pre-activations, and the positions and indices of active features."""
    layers = model.active[:, 0]
    return [(model.pre_activations[layer], model.active[layers == layer, 1:]) for layer in range(4)]


def test_a_bridge_agrees_to_the_precision_of_hugging_faces_norms(architecture: str) -> None:
    pair, reference = make(architecture), make(architecture, "hooked")
    model, expected = LinearizedModel(pair, TOKENS), LinearizedModel(reference, TOKENS)
    for layer in (2, 4):
        positions, vectors, values, own = targets(pair, model, layer)
        rows = model.rows([layer] * len(positions), positions, vectors)
        assert (total(rows) + own - values).abs().max() < 1e-5
        ours = expected.rows([layer] * len(positions), positions, vectors)
        assert torch.equal(model.active, expected.active)
        assert (rows.features - ours.features).abs().max() < 1e-5


@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_rows_agree_with_autograd_under_relp_hooks(architecture: str, freeze_mlps: bool) -> None:
    pair = make(architecture, "hooked")
    model = LinearizedModel(pair, TOKENS, "frozen_mlp" if freeze_mlps else "relp")
    by_hooks = GradientModel(pair, TOKENS, relp_hooks(pair.model, freeze_mlps))
    assert torch.equal(model.active, by_hooks.active)
    for layer in range(5):
        positions, vectors, _, _ = targets(pair, model, layer)
        ours, theirs = (
            model.rows([layer] * len(positions), positions, vectors),
            by_hooks.rows([layer] * len(positions), positions, vectors),
        )
        assert (ours.features - theirs.features).abs().max() < 1e-10
        assert (ours.tokens - theirs.tokens).abs().max() < 1e-10


def test_a_bfloat16_models_weights_are_not_copied() -> None:
    models = (random_model(seed, torch.float32).to(torch.bfloat16) for seed in (1, 2))
    pair = randomise(PairedModel.from_pretrained(*models))
    model = LinearizedModel(pair, TOKENS)
    pointer = lambda t: t.untyped_storage().data_ptr()  # noqa: E731
    assert pointer(model.layers[1].w_down) == pointer(pair.mlps[1].base.W_out)
    assert pointer(model.layers[1].w_v) == pointer(pair.model.blocks[1].attn._W_V)
    positions, vectors, values, own = targets(pair, model, 4)
    rows = model.rows([4] * len(positions), positions, vectors)
    assert rows.features.dtype == torch.float32
    assert (total(rows) + own - values).abs().max() < 0.3  # the residual stream itself is rounded to bfloat16


def test_plain_gradients_differ_and_do_not_add_up(architecture: str) -> None:
    pair = make(architecture, "hooked")
    model, plain_gradient = LinearizedModel(pair, TOKENS), GradientModel(pair, TOKENS)
    positions, vectors, values, own = targets(pair, model, 4)
    rows = plain_gradient.rows([4] * len(positions), positions, vectors)
    assert (rows.features - model.rows([4] * len(positions), positions, vectors).features).abs().max() > 1e-2
    assert (total(rows) + own - values).abs().max() > 1e-2  # they do not add up
    # the definition: the change of the value with one activation
    feature = model.active[model.active[:, 0] == 1][5]

    def value(factor: float) -> torch.Tensor:
        def scale(acts: torch.Tensor, hook: object, layer: int) -> torch.Tensor:
            scaled = reference_acts[layer].clone()
            if layer == 1:
                scaled[0, feature[1], feature[2]] *= factor
            return scaled

        hooks = [
            (f"blocks.{layer}.mlp.adapter.hook_sae_acts_post", lambda a, hook, layer=layer: scale(a, hook, layer))
            for layer in range(4)
        ]
        with torch.no_grad(), pair.routed("replacement"), pair.model.hooks(fwd_hooks=hooks):
            normalized = pair.model.run_with_cache(TOKENS[None])[1]["ln_final.hook_normalized"]
        return (normalized[0, positions] * pair.model.ln_final.w * vectors).sum(-1)

    with torch.no_grad(), pair.routed("replacement"):
        _, cache = pair.model.run_with_cache(TOKENS[None])
    reference_acts = [cache[f"blocks.{layer}.mlp.adapter.hook_sae_acts_post"] for layer in range(4)]
    column = int((plain_gradient.active == feature).all(1).nonzero())
    slope = (value(1 + 1e-5) - value(1 - 1e-5)) / 2e-5
    assert (slope - rows.features[:, column]).abs().max() < 1e-5


@pytest.mark.parametrize("linearization", ["relp", "frozen_mlp"])
@torch.no_grad()
def test_interventions_in_the_linear_model_give_the_edges(architecture: str, linearization: str) -> None:
    """With patterns and scales held, and MLPs held or linear, ablating a feature changes a target by its edge."""
    pair = make(architecture, "hooked")
    model = LinearizedModel(pair, TOKENS, linearization)
    every = [(layer, index) for layer in range(4) for index in range(24)]
    with pair.routed("replacement"):
        _, cache = pair.model.run_with_cache(TOKENS[None])
    live: dict[str, torch.Tensor] = {}

    def keep(value: torch.Tensor, hook: HookPoint) -> None:
        live[str(hook.name)] = value

    def linear_mlp(value: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        """Half of act(gate) * up through each factor, with the slope of the activation function held."""
        name = str(hook.name).removesuffix("hook_post")
        gate, up = cache[f"{name}hook_pre"], cache[f"{name}hook_pre_linear"]
        act = pair.model.blocks[0].mlp.act_fn(gate)
        return 0.5 * (act / gate * live[f"{name}hook_pre"] * up + act * live[f"{name}hook_pre_linear"])

    hooks = [(name, keep) for name in cache if name.endswith(("mlp.hook_pre", "mlp.hook_pre_linear"))]
    hooks += [(name, linear_mlp) for name in cache if name.endswith("mlp.hook_post")]
    held_mlps = linearization == "frozen_mlp"
    positions, vectors, values, _ = targets(pair, model, 4)
    edges = model.rows([4] * len(positions), positions, vectors).features
    for column in range(0, len(model.active), 97):
        layer, position, index = model.active[column].tolist()
        with (
            pair.routed("replacement"),
            frozen(pair, TOKENS[None], mlps=held_mlps, features=every),
            pair.model.hooks(fwd_hooks=[] if held_mlps else hooks),
            ablated(pair, [(layer, index)], positions=[position]),
        ):
            normalized = pair.model.run_with_cache(TOKENS[None])[1]["ln_final.hook_normalized"]
        without = (normalized[0, positions] * pair.model.ln_final.w * vectors).sum(-1)
        assert (values - without - edges[:, column]).abs().max() < 1e-10


@pytest.mark.parametrize("reads", ["mlp_input", "normalized"])
def test_in_a_model_with_folded_norms(reads: str) -> None:
    pair = reference()
    adapters = pair.installed_adapters()
    model = plain()
    process(model, "fold_ln")
    theirs = attach(model, adapters if reads == "mlp_input" else adapters.normalized(), base=random_model(1))
    expected = LinearizedModel(make("Qwen2ForCausalLM", "hooked"), TOKENS)
    folded = LinearizedModel(theirs, TOKENS)
    assert torch.equal(folded.active, expected.active)
    positions, vectors, values, own = targets(theirs, folded, 3)
    rows = folded.rows([3] * len(positions), positions, vectors)
    assert (total(rows) + own - values).abs().max() < 1e-6
    ours = expected.rows([3] * len(positions), *targets(make("Qwen2ForCausalLM", "hooked"), expected, 3)[:2])
    assert (rows.features - ours.features).abs().max() < 1e-4
