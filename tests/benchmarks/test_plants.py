"""Families of plants: the target has what was planted and nothing else, and the true features say what it is."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.random_models import random_model
from helpers.skewed_traces import skewed_traces
from plants.edited_neurons import NeuronChanges, edited_neurons
from plants.families import FAMILIES, NOISE_SHARE, discriminants
from plants.learned_features import learned_features
from plants.plant import Ground, Plant, layer_inputs
from plants.related_features import CHILD_RATE, CONTAINMENT, CORRELATION, TOLERANCE, related_features
from torch import Tensor

LAYERS, PER_LAYER = 2, 8
RATES = (0.1, 0.05, 0.02, 0.01)


@pytest.fixture(scope="module")
def ground() -> Ground:
    base, other = (random_model(seed, torch.float32, num_hidden_layers=LAYERS) for seed in (1, 2))
    return Ground(base, skewed_traces(400), other, per_layer=PER_LAYER, rates=RATES, strength=1.0)


@pytest.fixture(scope="module")
def plants(ground: Ground) -> Callable[[str], Plant]:
    """Plants by family, each made once."""
    made: dict[str, Plant] = {}

    def plant(family: str) -> Plant:
        if family not in made:
            made[family] = learned_features(ground, 0, steps=20) if family == "learned" else FAMILIES[family](ground, 0)
        return made[family]

    return plant


def differences(plant: Plant, ground: Ground, layer: int, documents: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a layer, the difference of its two MLPs there, and what the true features write there."""
    x = layer_inputs(plant.pair, ground.calibration[:documents], layer)
    truth = plant.truth[layer]
    with torch.no_grad():
        return x, plant.pair.mlps[layer].difference(x), truth.decode(truth.encode(x))


def close(a: Tensor, b: Tensor, share: float = 1e-5) -> None:
    assert float((a - b).norm()) <= share * float(b.norm())


@pytest.mark.parametrize("family", ["discriminants", "related", "attention", "learned"])
def test_the_difference_is_what_the_true_features_write(
    family: str, plants: Callable[[str], Plant], ground: Ground
) -> None:
    for layer in range(LAYERS):
        _, d, planted = differences(plants(family), ground, layer)
        assert float(d.norm()) > 0.01
        close(planted, d)


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("discriminants", set()),
        ("related", set()),
        ("learned", set()),
        ("noise", {"mlp.W_out"}),
        ("attention", {"attn.W_Q", "attn._W_K", "attn._W_V", "attn.W_O", "attn.b_Q", "attn._b_K", "attn._b_V"}),
        ("neurons", {"mlp.W_gate", "mlp.W_in", "mlp.W_out"}),
    ],
)
def test_nothing_else_of_the_target_differs_from_the_base(
    family: str, changed: set[str], plants: Callable[[str], Plant], ground: Ground
) -> None:
    plant, base = plants(family), ground.pair(copy.deepcopy(ground.base))
    ours, theirs = (
        {name: weight for name, weight in pair.model.state_dict().items() if ".planted." not in name}
        for pair in (plant.pair, base)
    )
    assert ours.keys() == theirs.keys()
    differing = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert differing == {f"blocks.{layer}.{name}" for layer in range(LAYERS) for name in changed}
    assert (plant.pair.planted is None) == (family == "neurons")
    assert not any(bool(adapter.b_dec.any()) for adapter in plant.truth)


def test_noise_is_dense_and_has_its_share_of_the_energy(plants: Callable[[str], Plant], ground: Ground) -> None:
    plant, clean = plants("noise"), plants("discriminants")
    for ours, theirs in zip(plant.truth.parameters(), clean.truth.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for layer in range(LAYERS):
        x, d, planted = differences(plant, ground, layer, documents=len(ground.calibration))
        target, base = plant.pair.mlps[layer].weights()
        close(d - planted, base.neurons(x) @ (target.W_out - base.W_out), 1e-3)
        energy = float((d - planted).square().sum() / planted.square().sum())
        # It was set on the stream of the target without noise, which is the same in the first layer only.
        assert energy == pytest.approx(NOISE_SHARE, rel=1e-3 if layer == 0 else 0.3)
        assert float(((d - planted).norm(dim=1) > 0).float().mean()) == 1


def test_attention_is_that_of_the_other_model(plants: Callable[[str], Plant], ground: Ground) -> None:
    plant = plants("attention")
    for layer, block in enumerate(ground.other.model.layers):
        ours = plant.pair.model.blocks[layer].attn.W_Q
        theirs = block.self_attn.q_proj.weight.unflatten(0, ours.shape[::2]).transpose(1, 2)
        assert torch.equal(ours, theirs)


def test_children_are_active_within_their_parents_tokens_and_pairs_are_correlated(
    plants: Callable[[str], Plant], ground: Ground
) -> None:
    plant = plants("related")
    assert len(plant.about["related"]) == LAYERS * PER_LAYER // 2
    for layer in range(LAYERS):
        x = layer_inputs(plant.pair, ground.calibration, layer)
        acts = plant.truth[layer].encode(x)
        for relation in (r for r in plant.about["related"] if r["layer"] == layer):
            one, other = acts[:, relation["of"]], acts[:, relation["feature"]]
            if relation["kind"] == "child":
                rate = int((other > 0).sum()) / int((one > 0).sum())
                assert rate == pytest.approx(CHILD_RATE, rel=0.25) or rate == pytest.approx(
                    RATES[1] / RATES[0], rel=0.25
                )
                inside = float((one[other > 0] > 0).float().mean())
                assert inside == pytest.approx(relation["containment"], abs=0.01) and inside >= CONTAINMENT - 0.01
            else:
                correlation = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
                assert correlation == pytest.approx(relation["correlation"], abs=0.01)
                assert abs(correlation - CORRELATION) <= TOLERANCE + 0.01
        directions = torch.nn.functional.normalize(plant.truth[layer].W_dec, dim=1)
        assert float((directions @ directions.T - torch.eye(PER_LAYER)).abs().max()) < 0.9


def test_learned_features_lower_the_loss_of_the_text(plants: Callable[[str], Plant], ground: Ground) -> None:
    plant = plants("learned")
    assert 0 < plant.about["features"] <= LAYERS * PER_LAYER
    assert plant.about["loss"] < float(learned_features(ground, 0, steps=1).about["loss"]) - 0.05


def test_edited_neurons_are_the_whole_difference_and_each_term_is_rank_one(ground: Ground) -> None:
    plant = edited_neurons(ground, 0)
    for layer in range(LAYERS):
        x, d, _ = differences(plant, ground, layer)
        truth = plant.truth[layer]
        assert isinstance(truth, NeuronChanges) and truth.smallest > 0
        few = truth.encode(x)
        truth.smallest = 0.0
        every = truth.encode(x)
        close(truth.decode(every), d)
        half = truth.n_features // 2
        assert bool((every >= 0).all()) and not bool(((every[:, :half] > 0) & (every[:, half:] > 0)).any())
        assert bool((few.count_nonzero(0) <= every.count_nonzero(0)).all()) and few.count_nonzero() > 0
        edits = plant.about["edits"][layer]
        assert [edit["kind"] for edit in edits] == 2 * ["gate", "in", "out", "all"]
        assert half == sum(2 if edit["kind"] == "all" else 1 for edit in edits)
        target, base = plant.pair.mlps[layer].weights()
        for edit in edits:
            neuron, donor = edit["neuron"], edit["donor"]
            for kind, new, old in (
                ("gate", target.W_gate.T, base.W_gate.T),
                ("in", target.W_in.T, base.W_in.T),
                ("out", target.W_out, base.W_out),
            ):
                assert torch.equal(new[neuron], old[donor] if edit["kind"] in (kind, "all") else old[neuron])


@pytest.mark.parametrize("family", [discriminants, related_features, edited_neurons])
def test_a_plant_depends_on_its_seed_only_and_leaves_the_base_as_it_is(
    family: Callable[[Ground, int], Plant], ground: Ground, plants: Callable[[str], Plant]
) -> None:
    before = {name: weight.clone() for name, weight in ground.base.state_dict().items()}
    name = next(name for name, made in FAMILIES.items() if made is family)
    again, other = family(ground, 0), family(ground, 1)
    for ours, theirs in zip(again.truth, plants(name).truth, strict=True):
        assert torch.equal(ours.W_dec, theirs.W_dec) and torch.equal(ours.W_enc, theirs.W_enc)
    assert not torch.equal(other.truth[0].W_dec, again.truth[0].W_dec)
    assert all(torch.equal(weight, before[name]) for name, weight in ground.base.state_dict().items())
