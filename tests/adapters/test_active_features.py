"""A pass over active features has the values and gradients of whole products, and gives way where it may not run."""

import pytest
import torch
from torch import Tensor

from tl_adapters.adapters import active_features
from tl_adapters.adapters.activation_functions import smallest_active
from tl_adapters.adapters.active_features import ActiveFeatures, flat_indices
from tl_adapters.adapters.l0 import active_counts
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.config import ActivationName
from tl_adapters.training.loss_terms import l1_term

COUNTED = torch.tensor([[True] * 5, [True, True, True, False, False]])


@pytest.fixture(autouse=True)
def any_density(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_features, "LARGEST_DENSITY", 1.0)


def make(n_features: int = 24, activation: ActivationName = "relu", by_feature: bool = False) -> TranscoderAdapter:
    k = 3 if activation in ("topk", "batchtopk") else None
    adapter = TranscoderAdapter(8, n_features, activation=activation, k=k, dtype=torch.float64)
    generator = torch.Generator().manual_seed(n_features)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        adapter.b_enc -= 2
        adapter.W_dec[0] = 0  # the norm of such a row has no gradient
    if by_feature:
        adapter.lay_out_by_feature()
    adapter.training_tokens, adapter.n_training_tokens = COUNTED, int(COUNTED.sum())
    return adapter


def inputs() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(
    adapter: TranscoderAdapter, x: Tensor, over_active: bool, of_acts: float, of_output: float
) -> tuple[Tensor | ActiveFeatures, dict[str, Tensor | None]]:
    """The activations, and the gradients of a function of output and L1."""
    adapter.over_active = over_active
    acts, output = adapter.run(x)
    assert isinstance(acts, ActiveFeatures) is over_active
    loss = of_acts * l1_term(acts, adapter.decoder_norms(acts), COUNTED) + of_output * output.sin().sum()
    wanted = {"x": x, **dict(adapter.named_parameters())} if x.requires_grad else dict(adapter.named_parameters())
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return acts, {"loss": loss.detach(), **dict(zip(wanted, gradients, strict=True))}


@pytest.mark.parametrize(("of_acts", "of_output"), [(0.7, 1.3), (0.7, 0.0), (0.0, 1.3)])
@pytest.mark.parametrize("by_feature", [False, True])
@pytest.mark.parametrize("tokens_at_once", [1, 4, 100])
def test_values_and_gradients_are_those_of_whole_products(
    monkeypatch: pytest.MonkeyPatch, of_acts: float, of_output: float, by_feature: bool, tokens_at_once: int
) -> None:
    adapter = make(by_feature=by_feature)
    monkeypatch.setattr("tl_adapters.adapters.transcoder.ACTS_AT_ONCE", tokens_at_once * adapter.n_features)
    x = inputs().requires_grad_()
    _, whole = run(adapter, x, False, of_acts, of_output)
    _, active = run(adapter, x, True, of_acts, of_output)
    for name, expected in whole.items():
        assert expected is not None and (expected.any() or (name == "b_dec" and not of_output)), name
        torch.testing.assert_close(active[name], expected, rtol=1e-12, atol=1e-12, msg=name)
    assert not whole["W_dec"][0].any() or of_output  # type: ignore[index]


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
@pytest.mark.parametrize("n_features", [23, 24])
def test_activations_as_a_list_are_the_activations(activation: ActivationName, n_features: int) -> None:
    adapter, x = make(n_features, activation), inputs()
    whole, _ = run(adapter, x, False, 1.0, 1.0)
    active, gradients = run(adapter, x, True, 1.0, 1.0)
    assert isinstance(active, ActiveFeatures) and isinstance(whole, Tensor) and gradients["W_enc"] is not None
    dense = torch.zeros(10, n_features, dtype=torch.float64)
    dense[active.tokens, active.features] = active.values.detach()
    torch.testing.assert_close(dense.view(whole.shape), whole.detach(), rtol=1e-12, atol=1e-12)
    assert 0 < len(active.values) < whole.numel()
    weights = torch.arange(n_features, dtype=torch.float64)
    torch.testing.assert_close(active @ weights, whole @ weights)
    assert torch.equal(active_counts(active, COUNTED), active_counts(whole, COUNTED))
    assert torch.equal(active.counts(), (whole > 0).sum(-1))
    for real in (COUNTED, torch.zeros_like(COUNTED)):
        torch.testing.assert_close(smallest_active(active, real), smallest_active(whole, real))


def test_indices_are_those_of_nonzero() -> None:
    generator = torch.Generator().manual_seed(0)
    for width, density in ((8, 0.5), (24, 0.02), (23, 0.3), (16, 0.0), (16, 1.0)):
        active = torch.rand(7, width, generator=generator) < density
        found = flat_indices(active)
        assert found is not None and torch.equal(found, active.flatten().nonzero()[:, 0])


def test_indices_are_not_listed_where_most_are_active(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_features, "LARGEST_DENSITY", 0.1)
    active = torch.zeros(4, 80, dtype=torch.bool)
    active[:, :64:8] = True  # a tenth, each in a run of its own
    assert flat_indices(active) is not None
    active[0, 72] = True
    assert flat_indices(active) is None


def test_a_feature_is_active_above_zero_and_where_it_is_nan() -> None:
    adapter, x = make(), torch.zeros(1, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        adapter.b_enc.fill_(-1.0)
        adapter.W_enc.zero_()[0, :3] = torch.tensor([1.0, 1.0 + 1e-15, 1.0 - 1e-15], dtype=x.dtype)
        x[0, 2, 0], x[0, 4, 0] = 1.0, torch.nan
    adapter.over_active = True
    acts, _ = adapter.run(x)
    assert isinstance(acts, ActiveFeatures)
    at_two = acts.tokens == 2
    assert acts.features[at_two].tolist() == [1] and 0 < float(acts.values[at_two].detach()) < 2e-15
    assert (acts.tokens[~at_two] == 4).all() and acts.values[~at_two].isnan().all()
    assert len(acts.values) == 1 + adapter.n_features


def test_an_adapter_without_active_features_writes_its_bias_and_learns_it_alone() -> None:
    adapter = make()
    with torch.no_grad():
        adapter.b_enc -= 1e6
    acts, gradients = run(adapter, inputs(), True, 1.0, 1.0)
    assert isinstance(acts, ActiveFeatures) and len(acts.values) == 0
    assert not acts.counts().any() and smallest_active(acts, COUNTED) == 0
    assert gradients["b_dec"] is not None and gradients["b_dec"].abs().min() > 0
    assert not any(gradients[name].any() for name in ("W_enc", "b_enc", "W_dec"))  # type: ignore[union-attr]


def test_a_nan_in_the_encoder_reaches_the_output() -> None:
    adapter = make()
    with torch.no_grad():
        adapter.W_enc[3, 5] = torch.nan
    adapter.over_active = True
    acts, output = adapter.run(inputs())
    assert isinstance(acts, ActiveFeatures) and bool(output.isnan().any(-1).all())


def test_whole_products_run_where_many_features_are_active(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, x = make(), inputs()
    adapter.over_active = True
    share = float((adapter.encode(x) > 0).double().mean())
    for limit, active in ((share * 1.001, True), (share * 0.999, False)):
        monkeypatch.setattr(active_features, "LARGEST_DENSITY", limit)
        assert isinstance(adapter.run(x)[0], ActiveFeatures) is active


@pytest.mark.parametrize(("point", "width"), [("input", 8), ("acts_pre", 24), ("acts_post", 24)])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_hook_sees_a_whole_pass_once(point: str, width: int, direction: str) -> None:
    adapter, seen = make(), list[torch.Size]()
    adapter.over_active = True
    getattr(adapter, f"hook_sae_{point}").add_hook(lambda value, hook: seen.append(value.shape), dir=direction)
    acts, output = adapter.run(inputs().requires_grad_())
    output.sum().backward()
    assert isinstance(acts, Tensor) and seen == [torch.Size([2, 5, width])]


@pytest.mark.parametrize("active", [False, True])
def test_a_hook_on_the_output_leaves_the_pass_over_active_features(active: bool) -> None:
    adapter = make()
    adapter.over_active = active
    adapter.hook_sae_recons.add_hook(lambda value, hook: 2 * value)
    acts, output = adapter.run(inputs())
    assert isinstance(acts, ActiveFeatures) is active
    torch.testing.assert_close(output, 2 * make().decode(make().encode(inputs())), rtol=1e-12, atol=1e-12)


class ReadsTwice(TranscoderAdapter):
    def encode(self, x: Tensor) -> Tensor:
        return super().encode(2 * x)


class WritesTwice(TranscoderAdapter):
    def decode(self, acts: Tensor) -> Tensor:
        return 2 * super().decode(acts)


@pytest.mark.parametrize("kind", [ReadsTwice, WritesTwice])
def test_what_a_subclass_defines_is_what_runs(kind: type[TranscoderAdapter]) -> None:
    adapter = kind(8, 24, dtype=torch.float64)
    adapter.load_state_dict(make().state_dict())
    adapter.over_active = True
    expected = adapter.decode(adapter.encode(inputs()))
    assert isinstance(adapter.run(inputs())[0], Tensor)
    assert torch.equal(adapter(inputs()), expected)
    assert not torch.allclose(expected, make()(inputs()))


def test_it_runs_only_where_gradients_are_wanted_and_equal() -> None:
    adapter, x = make(), inputs()
    assert isinstance(adapter.run(x)[0], Tensor)  # not asked for
    adapter.over_active = True
    with torch.no_grad():
        assert isinstance(adapter.run(x)[0], Tensor)
    with adapter.computing_in(torch.float32):  # weights are cast, in float64
        assert isinstance(adapter.run(x)[0], Tensor)
    jumprelu = make(activation="jumprelu")
    jumprelu.over_active = True
    assert isinstance(jumprelu.run(x)[0], Tensor)
    assert isinstance(adapter.run(x)[0], ActiveFeatures)
