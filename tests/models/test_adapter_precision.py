"""Adapters with float32 weights that compute in bfloat16, as they do beside a model in bfloat16 on a GPU."""

from pathlib import Path

import pytest
import torch
from helpers.random_models import ACTIVATION_OPTIONS, random_batch, random_model

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.attribution.attribute import attribute
from tl_adapters.config import LocalConfig, LossWeights, TrainingConfig
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.faithfulness import measure_faithfulness
from tl_adapters.interventions.feature_edits import ablated, added, clamped, gated, inserted, negated, patched, scaled
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel
from tl_adapters.training.objective import shared_prefix_step
from tl_adapters.training.trainer import Trainer
from tl_adapters.utils.precision import adapter_dtype, product_in_float32, tf32_products

BF16 = torch.bfloat16
GPU = torch.device("cuda")


def make(activation: str = "relu") -> PairedModel:
    pair = PairedModel.from_pretrained(*(random_model(seed, BF16) for seed in (1, 2)))
    pair.new_adapters(24, **ACTIVATION_OPTIONS[activation])  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for weight in pair.installed_adapters().parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    pair.installed_adapters().compute_in(BF16)
    return pair


def documents(n: int = 6) -> list[Trace]:
    generator = torch.Generator().manual_seed(0)
    return [Trace(tuple(torch.randint(1, 61, (9 + i % 3,), generator=generator).tolist()), 3) for i in range(n)]


def test_bfloat16_is_chosen_beside_a_bfloat16_model_on_a_gpu() -> None:
    assert adapter_dtype(BF16, GPU) == BF16
    assert adapter_dtype(BF16, torch.device("cpu")) is adapter_dtype(torch.float32, GPU) is None
    assert adapter_dtype(torch.float32, torch.device("cpu"), "bfloat16") == BF16
    assert adapter_dtype(BF16, GPU, "float32") is adapter_dtype(BF16, GPU, "tf32") is None


def test_tf32_is_on_within_its_context_only() -> None:
    before = torch.get_float32_matmul_precision()
    with tf32_products(True):
        assert torch.get_float32_matmul_precision() == "high"
    with tf32_products(False):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float64])
def test_a_product_in_float32_is_that_of_float64_arithmetic(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5, 64), (64, 32)))
    product = product_in_float32(x, weight.to(BF16))
    assert product.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(product.double(), x.double() @ weight.to(BF16).double(), rtol=1e-5, atol=1e-5)


def test_activations_are_rounded_and_weights_and_gradients_are_not() -> None:
    adapter = TranscoderAdapter(32, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapter.W_dec.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    outputs, gradients = [], []
    for dtype in (None, BF16):
        adapter.zero_grad()
        with adapter.computing_in(dtype):
            assert adapter.encode(x).dtype == (dtype or torch.float32)
            outputs.append(adapter(x))
            outputs[-1].square().sum().backward()
        assert adapter.W_enc.dtype == torch.float32 and adapter.compute_dtype is None
        assert adapter.W_enc.grad is not None and adapter.W_enc.grad.dtype == torch.float32
        gradients.append(adapter.W_enc.grad.clone())
    for exact, rounded in (outputs, gradients):
        assert 0 < float((rounded - exact).detach().norm()) < 0.02 * float(exact.detach().norm())


def test_sums_over_features_are_taken_in_float32() -> None:
    pair = make()
    prompt = list(documents(1)[0].tokens)
    exact, graph = (attribute(pair, prompt, [3], progress=False) for _ in range(2))
    assert all(adapter.compute_dtype == BF16 for adapter in pair.installed_adapters())
    pair.installed_adapters().compute_in(None)
    torch.testing.assert_close(graph.rows, attribute(pair, prompt, [3], progress=False).rows)
    torch.testing.assert_close(graph.rows, exact.rows)


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
def test_a_step_has_nearly_the_terms_and_gradients_of_float32(activation: str) -> None:
    pair, batch = make(activation), random_batch(3)
    terms, gradients = [], []
    for dtype in (None, BF16):
        pair.installed_adapters().compute_in(dtype)
        pair.installed_adapters().zero_grad()
        terms.append(shared_prefix_step(pair, batch, 2, LossWeights(local=0.5), 0.05))
        gradients.append(torch.cat([w.grad.flatten() for w in pair.installed_adapters().parameters()]))  # type: ignore[union-attr]
    for name, exact in terms[0].by_name().items():
        assert abs(float(terms[1].by_name()[name]) - float(exact)) <= 0.05 * abs(float(exact)), name
    assert float(torch.nn.functional.cosine_similarity(*gradients, dim=0)) > 0.98


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
def test_both_stages_train_and_resume(activation: str, tmp_path: Path) -> None:
    local = LocalConfig(steps=6, tokens_per_step=16, max_tokens=99, revisions=(0.4, 0.7))
    config = TrainingConfig(
        n_features=8, steps=3, tokens_per_batch=24, checkpoint_every=4, log_every=2, activation=activation,
        stages=("local", "end_to_end"), local=local, adapter_precision="bfloat16",
        **({"k": 3} if "topk" in activation else {}),
    )  # type: ignore[arg-type]  # fmt: skip
    pair = PairedModel.from_pretrained(*(random_model(seed, BF16) for seed in (1, 2)))
    whole = Trainer(pair, documents(), config, progress=False).run().state_dict()

    def stop(step: int, shown: object) -> None:
        if step > 7:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        Trainer(pair, documents(), config, tmp_path / "run", progress=False).run(stop)
    resumed = Trainer.resume(pair, documents(), tmp_path / "run", progress=False)
    assert all(adapter.compute_dtype == BF16 for adapter in resumed.adapters)
    for name, weight in resumed.run().state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, whole[name]), name


def test_evaluations_and_interventions_run() -> None:
    pair, tokens = make(), random_batch(3).tokens
    measure_faithfulness(pair, documents())
    features = [FeatureId(0, 3), FeatureId(1, 2), FeatureId(1, 7)]
    with torch.no_grad(), pair.routed("replacement"), pair.recorded(ACTS_HOOK) as source:
        pair.model(tokens)
    assert source[0].dtype == BF16
    for changed in (
        ablated(pair, features), scaled(pair, features, 2.0), clamped(pair, features, 1.0, [2, 4]),
        added(pair, features, 1.0, range(3)), patched(pair, features, dict(source)), inserted(pair, features),
        negated(pair, features), gated(pair, dict(enumerate(torch.ones(4, 24)))),
    ):  # fmt: skip
        with torch.no_grad(), pair.routed("replacement"), changed as model:
            assert bool(model(tokens).isfinite().all())
