"""TransformerBridge as the second backend: the same names, values and gradients, on every route.

Runs with TransformerLens 3.9 beside the HookedTransformer, and alone with TransformerLens 4 (`make bridge`).
"""

import copy
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest
import torch
from helpers.pairs import make
from helpers.random_models import ARCHITECTURES, random_batch, random_model
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

import tl_adapters
from tl_adapters import organism
from tl_adapters.checkpoints.architectures import UnsupportedModelError
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.cli.main import main
from tl_adapters.config import LossWeights
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.evaluation.faithfulness import measure_faithfulness
from tl_adapters.generation.responses import respond
from tl_adapters.interop.saelens import from_saelens, to_saelens
from tl_adapters.models.build import backend_of, build_model, default_backend
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.models.routed_mlp import ROUTES, WeightsProcessedError
from tl_adapters.training.objective import reference_step, shared_prefix_step
from tl_adapters.training.trainer import train
from tl_adapters.vllm_plugin.served_conditions import ServedModelError

TOKENS = random_batch(3).tokens[:1, :11]
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
Models = tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def bridged(architecture: str) -> PairedModel:
    return make(architecture)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() < tolerance, float((a - b).abs().max())


@torch.no_grad()
def test_routes_compute_the_target_and_the_target_with_the_bases_mlps(architecture: str, bridged: PairedModel) -> None:
    base, target = (random_model(seed, architecture=architecture) for seed in (1, 2))
    close(bridged.model(TOKENS), target(TOKENS).logits, 1e-5)
    for ours, theirs in zip(target.model.layers, base.model.layers, strict=True):
        ours.mlp = theirs.mlp
    with bridged.routed("hybrid"):
        close(bridged.model(TOKENS), target(TOKENS).logits, 1e-5)


@torch.no_grad()
def test_routes_compute_different_outputs(bridged: PairedModel) -> None:
    """An invariant of every backend: if the MLP were bypassed, every route would be the target, with a KL of 0."""
    logits = {}
    for route in ROUTES:
        with bridged.routed(route):
            logits[route] = bridged.model(TOKENS)
    for one in ROUTES:
        for other in ROUTES:
            assert one == other or (logits[one] - logits[other]).abs().max() > 1e-2, (one, other)


@torch.no_grad()
def test_the_replacement_adds_the_formula(bridged: PairedModel) -> None:
    with bridged.routed("replacement"):
        _, cache = bridged.model.run_with_cache(TOKENS)
    adapter, (_, base) = bridged.mlps[2].adapter, bridged.mlps[2].weights()
    assert adapter is not None
    x = cache["blocks.2.mlp.hook_in"]
    acts = torch.relu(x @ adapter.W_enc + adapter.b_enc)
    close(cache["blocks.2.mlp.adapter.hook_sae_acts_post"], acts, 1e-12)
    added = acts @ adapter.W_dec + adapter.b_dec
    close(cache["blocks.2.mlp.hook_adapter_out"], added, 1e-12)
    close(cache["blocks.2.mlp.hook_out"], base.neurons(x) @ base.W_out + added, 1e-12)


@torch.no_grad()
def test_split_runs_equal_the_full_run(architecture: str) -> None:
    tokens = random_batch(6, lengths=(8, 8)).tokens
    # Hugging Face's own eager attention takes its softmax in float32, where a float64 mask overflows to NaN
    for mask, dtype, tolerance in ((None, torch.float64, 1e-12), (LEFT, torch.float32, 1e-5)):
        bridged = make(architecture, dtype=dtype)
        options = {} if mask is None else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "attention_mask": mask}
        for route in ("target", "replacement"):
            with bridged.routed(route):
                full = bridged.model(tokens, **options)
                for cut in range(5):
                    resid = bridged.run_blocks(bridged.embed(tokens, mask), 0, cut, mask)
                    logits = bridged.unembed(bridged.run_blocks(resid, cut, 4, mask))
                    real = slice(None) if mask is None else mask.bool()
                    close(logits[real], full[real], tolerance)


def test_hooks_copies_and_generation_work(bridged: PairedModel) -> None:
    options = dict(max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
    with torch.no_grad(), bridged.routed("replacement"):
        before = bridged.model(TOKENS)
        hooks = [("blocks.1.mlp.adapter.hook_sae_acts_post", lambda acts, hook: acts * 0)]
        assert (bridged.model.run_with_hooks(TOKENS, fwd_hooks=hooks) - before).abs().max() > 1e-6
        close(bridged.model(TOKENS), before, 1e-15)
        other = copy.deepcopy(bridged.model)
        close(other(TOKENS), before, 1e-15)
        other.blocks[0].mlp.adapter.W_dec.data.zero_()
        assert (other(TOKENS) - before).abs().max() > 1e-6
        close(bridged.model(TOKENS), before, 1e-15)
        cached = bridged.model.generate(TOKENS, use_past_kv_cache=True, **options)
        plain = bridged.model.generate(TOKENS, use_past_kv_cache=False, **options)
    assert cached.tolist() == plain.tolist()


def test_hook_points_are_looked_up_again_when_they_change() -> None:
    """By a bridge that looks them up once, and by a copy of it."""
    pair = make()
    looked_up = TransformerBridge.hook_dict.fget
    changes = {
        "nothing": lambda: pair.model.hook_dict.clear(),
        "other adapters": lambda: pair.new_adapters(3),
        "an alias": lambda: pair.model.hook_aliases.update(hook_of_mine="embed.hook_out"),
        "no adapters": pair.release,
    }
    for name, change in changes.items():
        before = pair.model.hook_dict
        change()
        found = pair.model.hook_dict
        assert found == looked_up(pair.model) and list(found) == list(looked_up(pair.model)), name
        assert (found == before) == (name == "nothing"), name
    other = copy.deepcopy(pair.model)
    assert other.hook_dict == looked_up(other) != pair.model.hook_dict


@pytest.mark.parametrize("cut", [0, 2, 4])
def test_the_fast_objective_equals_the_formulas(cut: int) -> None:
    gradients, weights = [], LossWeights(output_kl=0.7, forward_bridge=1.1, backward_bridge=0.9, nmse=1.3)
    for step in (reference_step, shared_prefix_step):
        pair = make()
        for adapter in pair.installed_adapters():
            adapter.requires_grad_(True)
        step(pair, random_batch(3), cut, weights, 0.01)
        gradients.append([p.grad for p in pair.installed_adapters().parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # HF norms compute in float32


# -- the two backends side by side ------------------------------------------------------------------------------------

needs_both = pytest.mark.skipif(default_backend() != "hooked", reason="this TransformerLens has no HookedTransformer")


@needs_both
@torch.no_grad()
def test_cached_values_equal_the_hooked_transformers(architecture: str, bridged: PairedModel) -> None:
    hooked = make(architecture, "hooked")
    for route in ROUTES:
        with bridged.routed(route), hooked.routed(route):
            logits, cache = bridged.model.run_with_cache(TOKENS)
            theirs, reference = hooked.model.run_with_cache(TOKENS)
        close(logits, theirs, 1e-5)
        shared = set(cache.cache_dict) & set(reference.cache_dict)
        for layer in range(4):
            expected_names = {"hook_mlp_out", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "mlp.hook_pre"}
            expected_names |= {
                "mlp.hook_in",
                "mlp.hook_post",
                "mlp.hook_adapter_out",
                "ln2.hook_normalized",
                "attn.hook_z",
            }
            if ROUTES[route].adapter:
                expected_names |= {f"mlp.adapter.hook_sae_{x}" for x in ("input", "acts_pre", "acts_post", "recons")}
            assert {f"blocks.{layer}.{name}" for name in expected_names} <= shared
        for name in shared:
            ours, expected = cache[name], reference[name]
            if ".q_norm." in name or ".k_norm." in name:  # [batch, head, pos, d] there, [(batch pos head), d] here
                ours = ours.transpose(1, 2).reshape(expected.shape)
            assert ours.shape == expected.shape, name
            finite = expected.isfinite()  # attention scores are -inf above the diagonal
            assert (ours - expected)[finite].abs().max() < 1e-5, (route, name)


@needs_both
def test_adapter_gradients_equal_the_hooked_transformers(architecture: str) -> None:
    gradients = []
    for backend in ("bridge", "hooked"):
        pair = make(architecture, backend)
        with pair.routed("replacement"):
            pair.model(TOKENS).log_softmax(-1)[..., 7].sum().backward()
        gradients.append([p.grad for p in pair.installed_adapters().parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() < 1e-6 * max(1.0, float(theirs.abs().max()))


@needs_both
def test_fingerprints_do_not_depend_on_the_backend(architecture: str, bridged: PairedModel) -> None:
    hooked = make(architecture, "hooked")
    assert bridged.fingerprints == hooked.fingerprints
    for ours, theirs in zip(bridged.layer_samples, hooked.layer_samples, strict=True):
        assert torch.equal(ours.attention_out, theirs.attention_out)
        assert torch.equal(ours.base_mlp_out, theirs.base_mlp_out)
        close(ours.ln2_w, theirs.ln2_w, 1e-7)
    hooked.load_adapters(bridged.installed_adapters())  # and adapters of one fit the other


# -- compatibility mode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["enable_compatibility_mode", "process_weights"])
def test_processing_after_attaching_raises(how: str) -> None:
    pair = make(dtype=torch.float32)
    getattr(pair.model, how)()
    for route in ("hybrid", "target"):
        with pytest.raises(WeightsProcessedError, match="no longer calls the MLPs"), pair.routed(route):
            pair.model(TOKENS)


def test_a_processed_bridge_is_refused_and_an_unprocessed_one_accepted() -> None:
    base = random_model(1, torch.float32)
    mlps = [{n: getattr(x.mlp, n).weight for n in ("gate_proj", "up_proj", "down_proj")} for x in base.model.layers]
    processed = build_model(random_model(2, torch.float32), backend="bridge")
    processed.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(WeightsProcessedError, match="silently do nothing"):
        PairedModel(processed, mlps)
    named = build_model(random_model(2, torch.float32), backend="bridge")
    named.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    pair = PairedModel(named, mlps)
    with torch.no_grad(), pair.routed("hybrid"):
        hybrid = pair.model(TOKENS)
    assert (hybrid - pair.model(TOKENS)).abs().max() > 0.1


def test_other_models_and_unknown_backends_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="HookedTransformer.*or a TransformerBridge"):
        backend_of(random_model(1))
    with pytest.raises(UnsupportedModelError, match="hooked or bridge"):
        build_model(random_model(1), backend="jax")
    pair = make()
    with pytest.raises(UnsupportedModelError, match="adapters attached already"):
        backend_of(pair.model)
    assert isinstance(pair.model, TransformerBridge)
    with pytest.raises(PairMismatchError, match="2 layers of width 32; the model has 4"):
        pair.load_adapters(make(num_hidden_layers=2).installed_adapters())


# -- the rest of the library on a bridge ------------------------------------------------------------------------------


def test_adapters_trained_on_a_bridge_round_trip_through_saelens_folders(tmp_path: Path) -> None:
    pair = PairedModel.from_pretrained(organism.BASE, organism.TARGET, backend="bridge")
    traces = encode_traces(organism.reasoning_pairs("train", 40), pair.model.tokenizer)
    adapters = train(pair, traces[:30], stages=("end_to_end",), steps=8, n_features=32, progress=False)
    with torch.no_grad():
        sums = measure_faithfulness(pair, traces[30:])
    assert 0 < float(sums.kl["replacement"].sum()) < float(sums.kl["hybrid"].sum())
    to_saelens(adapters, tmp_path / "s")  # files only: sae_lens itself is not needed
    again = PairedModel.from_pretrained(organism.BASE, organism.TARGET, backend="bridge")
    again.load_adapters(from_saelens(tmp_path / "s"))
    tokens = torch.tensor([traces[30].tokens[:40]])
    with torch.no_grad(), pair.routed("replacement"), again.routed("replacement"):
        close(again.model(tokens), pair.model(tokens), 1e-4)


def test_responses_in_a_padded_batch_equal_single_responses() -> None:
    pair = PairedModel.from_pretrained(organism.BASE, organism.TARGET, backend="bridge")
    problems = [
        p for p in organism.problems("report", 40) if len(p.question) != len(organism.problems("report", 1)[0].question)
    ][:3]
    problems += organism.problems("report", 3)
    assert len({len(problem.question) for problem in problems}) > 1
    together = respond(pair.model, problems)
    assert together == [respond(pair.model, [problem])[0] for problem in problems]
    assert sum(bool(answer.hesitations) for answer in together) and not all(a.truncated for a in together)
    if default_backend() == "hooked":
        assert together == respond(PairedModel.from_pretrained(organism.BASE, organism.TARGET).model, problems)


def test_saelens_folders_are_written_without_sae_lens_and_the_output_says_how_to_install_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make().installed_adapters().save_pretrained(tmp_path / "a")
    assert main(["export", str(tmp_path / "a"), "--to", "saelens", "--out", str(tmp_path / "s")]) == 0
    missing = importlib.util.find_spec("sae_lens") is None
    assert ("It needs TransformerLens 3: pip install 'tl-adapters[saelens]'" in capsys.readouterr().out) is missing
    assert missing or default_backend() == "hooked"  # SAELens pins TransformerLens below 4
    assert from_saelens(tmp_path / "s").metadata.reads == "normalized"


def test_every_module_imports_but_those_of_the_hooked_transformer() -> None:
    failed = set()
    for module in pkgutil.walk_packages(tl_adapters.__path__, "tl_adapters."):
        try:
            importlib.import_module(module.name)
        except (ImportError, ServedModelError):
            failed.add(module.name)
    for library, name in {"lm_eval": "evaluation.lm_eval_harness", "vllm": "vllm_plugin.models"}.items():
        if importlib.util.find_spec(library) is None:  # optional, and nothing else needs them
            assert f"tl_adapters.{name}" in failed
            failed.remove(f"tl_adapters.{name}")
    if default_backend() == "hooked":
        assert not failed
        return
    hooked = {"generation.direct_layers", "models.components", "models.hooked_transformer"}
    assert failed == {f"tl_adapters.{name}" for name in hooked}
    with pytest.raises(UnsupportedModelError, match="backend='bridge', or install 'transformer-lens<4'"):
        build_model(random_model(1), backend="hooked")
    assert isinstance(PairedModel.from_pretrained(random_model(1), random_model(2)).model, TransformerBridge)
