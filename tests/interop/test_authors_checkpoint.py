"""The paper's authors' checkpoints: tiny ones of exactly that layout, read, paired and written."""

import json
from pathlib import Path

import pytest
import torch
from helpers.random_models import ACTIVATION_OPTIONS, random_model, randomise
from helpers.users_models import TOKENS, log_probabilities, plain, process
from safetensors import safe_open
from transformers import PreTrainedModel

import tl_adapters.checkpoints.layer_samples as marks_module
import tl_adapters.checkpoints.model_files as checkpoints
import tl_adapters.interop.authors_checkpoint as authors_module
from tl_adapters.adapters.saelens_folder import AdapterFormatError
from tl_adapters.checkpoints.architectures import UnsupportedModelError
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.checkpoints.model_files import CheckpointError
from tl_adapters.interop.authors_checkpoint import authors_pair, from_authors, to_authors
from tl_adapters.interop.hybrid_checkpoint import write_hybrid
from tl_adapters.models.attach import attach
from tl_adapters.models.paired_model import PairedModel

LAYOUT = {
    "model.layers.{}.mlp.transcoder_enc.weight": (24, 32),
    "model.layers.{}.mlp.transcoder_enc.bias": (24,),
    "model.layers.{}.mlp.transcoder_dec.weight": (32, 24),
    "model.layers.{}.mlp.transcoder_dec.bias": (32,),
}
"""The list in the notes on their files; written out here on purpose, not taken from the code."""


def write_theirs(
    folder: Path, base: PreTrainedModel, target: PreTrainedModel, bias: bool, shard_size: str = "5GB"
) -> dict[str, torch.Tensor]:
    """A checkpoint as theirs: a Qwen2 with the base's MLPs in the target, and modules of their names inside."""
    generator = torch.Generator().manual_seed(5)
    dtype = target.dtype
    for ours, theirs in zip(target.model.layers, base.model.layers, strict=True):
        ours.mlp = theirs.mlp
        ours.mlp.transcoder_enc = torch.nn.Linear(32, 24, dtype=dtype)
        ours.mlp.transcoder_dec = torch.nn.Linear(24, 32, bias=bias, dtype=dtype)
        for module in (ours.mlp.transcoder_enc, ours.mlp.transcoder_dec):
            for weight in module.parameters():
                weight.data = (torch.randn(weight.shape, generator=generator) * 0.3).to(dtype)
    target.config.architectures = ["Qwen2ForCausalLMWithTranscoder"]
    target.save_pretrained(folder, max_shard_size=shard_size)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["Qwen2ForCausalLMWithTranscoder"],
        "transcoder_n_features": 24,
        "transcoder_dec_bias": bias,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return {name: tensor.detach().clone() for name, tensor in target.state_dict().items()}


def replacement_logits(base: PreTrainedModel, target: PreTrainedModel, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Their model's forward: MLP(x) + dec(relu(enc(x))), by hooks on the Hugging Face model."""

    def add(layer: int):
        parts = {
            name.rpartition("transcoder_")[2]: t
            for name, t in state.items()
            if f"layers.{layer}.mlp.transcoder_" in name
        }

        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
            acts = torch.relu(torch.nn.functional.linear(args[0], parts["enc.weight"], parts["enc.bias"]))
            return out + torch.nn.functional.linear(acts, parts["dec.weight"], parts.get("dec.bias"))

        return hook

    for layer, (ours, theirs) in enumerate(zip(target.model.layers, base.model.layers, strict=True)):
        ours.mlp = theirs.mlp
        ours.mlp.register_forward_hook(add(layer))
    with torch.no_grad():
        return target(TOKENS).logits.log_softmax(-1)


@pytest.fixture(
    params=[(torch.float32, True, "5GB"), (torch.float32, False, "20kB"), (torch.bfloat16, True, "20kB")], ids=str
)
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], torch.dtype]:
    dtype, bias, size = request.param
    state = write_theirs(tmp_path / "theirs", random_model(1, dtype), random_model(2, dtype), bias, size)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file() is (size != "5GB")
    random_model(2, dtype).save_pretrained(tmp_path / "target")
    random_model(1, dtype).save_pretrained(tmp_path / "base")
    return tmp_path, state, dtype


def test_the_adapters_are_read_and_compute_the_same(theirs: tuple[Path, dict[str, torch.Tensor], torch.dtype]) -> None:
    folder, state, dtype = theirs
    adapters = from_authors(folder / "theirs")
    assert (len(adapters), adapters.n_features, adapters[0].W_enc.dtype) == (4, 24, dtype)
    expected = replacement_logits(random_model(1, dtype), random_model(2, dtype), state)
    model = plain(dtype=dtype)
    pair = attach(model, adapters, base=folder / "theirs")  # its MLPs are the base's
    tolerance = 1e-5 if dtype == torch.float32 else 0.2
    assert (log_probabilities(model) - expected).abs().max() < tolerance
    with pair.routed("hybrid"):
        assert (log_probabilities(model) - expected).abs().max() > 0.3
    if dtype == torch.float32:
        folded = plain(dtype=dtype)
        process(folded, "fully processed")
        attach(folded, from_authors(folder / "theirs"), base=folder / "base")
        assert (log_probabilities(folded) - expected).abs().max() < 2e-5
        with pytest.raises(PairMismatchError, match="second norm at layer 0 differ"):
            attach(plain(seed=7, dtype=dtype), from_authors(folder / "theirs"), base=folder / "base")


def test_a_pair_from_that_one_checkpoint(theirs: tuple[Path, dict[str, torch.Tensor], torch.dtype]) -> None:
    folder, state, dtype = theirs
    pair = authors_pair(folder / "theirs", folder / "target")
    expected = PairedModel.from_pretrained(folder / "base", folder / "target")
    expected.load_adapters(from_authors(folder / "theirs"))
    assert pair.fingerprints == expected.fingerprints
    for route in ("target", "hybrid", "replacement"):
        with pair.routed(route), expected.routed(route):
            assert torch.equal(log_probabilities(pair.model), log_probabilities(expected.model))


def test_only_what_is_needed_is_read(
    theirs: tuple[Path, dict[str, torch.Tensor], torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = theirs
    whole: list[str] = []
    for module in (authors_module, marks_module):
        original = module.read_tensors
        read = lambda f, names, *device, o=original: whole.extend(names) or o(f, names, *device)  # noqa: E731
        monkeypatch.setattr(module, "read_tensors", read)
    some = from_authors(folder / "theirs", layers=[1])
    assert some.layer_indices == [1] and some.n_layers == 4
    assert all(".transcoder_" in name or "post_attention_layernorm" in name for name in whole)
    assert all(".layers.1." in name for name in whole)


def test_from_the_hub_by_name(
    theirs: tuple[Path, dict[str, torch.Tensor], torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = theirs
    asked: list[list[str]] = []

    def fake(name: str, *, revision: str | None, allow_patterns: list[str], token: str | None) -> str:
        assert name == "nathu0/transcoder-adapters-R1-Distill-Qwen-7B-l1w0.001-l0-1.4" and revision == "main"
        asked.append(allow_patterns)
        return str(folder / "theirs")

    monkeypatch.setattr(checkpoints, "snapshot_download", fake)
    name = "nathu0/transcoder-adapters-R1-Distill-Qwen-7B-l1w0.001-l0-1.4"
    adapters = from_authors(name, revision="main")
    assert not any("safetensors" in p and "index" not in p for p in asked[0]) and any(
        "safetensors" in p for p in asked[1]
    )
    assert adapters.metadata.base == "Qwen/Qwen2.5-Math-7B"
    assert adapters.metadata.target == "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"


def test_a_pair_of_a_revision_on_the_hub_is_read_from_it_alone(
    theirs: tuple[Path, dict[str, torch.Tensor], torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = theirs

    def fake(name: str, *, revision: str | None, allow_patterns: list[str], token: str | None) -> str:
        assert (name, revision, token) == ("them/theirs", "trial", "secret")
        return str(folder / "theirs")

    monkeypatch.setattr(checkpoints, "snapshot_download", fake)
    pair = authors_pair("them/theirs", folder / "target", revision="trial", token="secret")
    assert pair.fingerprints == authors_pair(folder / "theirs", folder / "target").fingerprints
    named = authors_pair("them/theirs@trial", folder / "target", token="secret")
    assert pair.base_id == named.base_id == "them/theirs@trial"
    with pytest.raises(CheckpointError, match="has no revisions"):
        authors_pair(folder / "theirs", folder / "target", revision="trial")


def test_written_in_their_layout_and_read_back(theirs: tuple[Path, dict[str, torch.Tensor], torch.dtype]) -> None:
    folder, state, dtype = theirs
    adapters = from_authors(folder / "theirs")
    to_authors(adapters, folder / "ours", base=folder / "base", target=folder / "target")
    with_bias = "model.layers.0.mlp.transcoder_dec.bias" in state
    config = json.loads((folder / "ours" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLMWithTranscoder"]
    assert (config["transcoder_n_features"], config["transcoder_dec_bias"]) == (24, with_bias)
    written: dict[str, torch.Tensor] = {}
    for shard in (folder / "ours").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            written |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for layer in range(4):
        for key, shape in LAYOUT.items():
            name = key.format(layer)
            assert (name in written) is (with_bias or "dec.bias" not in name)
            assert name not in written or tuple(written[name].shape) == shape
    assert set(written) == set(state) and all(torch.equal(written[name], state[name]) for name in written)
    back = from_authors(folder / "ours")
    assert back.fingerprint == adapters.fingerprint
    with pytest.raises(ValueError, match="read normalized"):
        to_authors(adapters.normalized(), folder / "b", base=folder / "base", target=folder / "target")
    with pytest.raises(ValueError, match="of 1 of 4 layers"):
        to_authors(
            from_authors(folder / "ours", layers=[1]), folder / "b", base=folder / "base", target=folder / "target"
        )
    assert not (folder / "b").exists()


@pytest.mark.parametrize("activation", [name for name in ACTIVATION_OPTIONS if name != "relu"])
def test_their_model_class_computes_relu_only(activation: str, tmp_path: Path) -> None:
    models = (random_model(seed, torch.float32) for seed in (1, 2))
    adapters = randomise(PairedModel.from_pretrained(*models), activation=activation).installed_adapters()
    with pytest.raises(AdapterFormatError, match=f"computes relu, and these adapters are {activation}"):
        to_authors(adapters, tmp_path / "out", base=tmp_path / "base", target=tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shard_size", ["5GB", "20kB"])
def test_the_hybrid_as_a_plain_folder(shard_size: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, target = random_model(1, torch.float32), random_model(2, torch.float32)
    base.save_pretrained(tmp_path / "base")
    target.save_pretrained(tmp_path / "target", max_shard_size=shard_size)
    write_hybrid(tmp_path / "hybrid", base=tmp_path / "base", target=tmp_path / "target")
    write_hybrid(tmp_path / "copy", base=None, target=tmp_path / "target")
    pair = PairedModel.from_pretrained(base, target)
    for name, route in (("hybrid", "hybrid"), ("copy", "target")):
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with pair.routed(route), torch.no_grad():
            assert (stock(TOKENS).logits - pair.model(TOKENS)).abs().max() < 1e-5
    random_model(3, torch.float32, intermediate_size=40).save_pretrained(tmp_path / "narrow")
    with pytest.raises(PairMismatchError, match="intermediate_size"):
        write_hybrid(tmp_path / "b", base=tmp_path / "narrow", target=tmp_path / "target")
    assert not (tmp_path / "b").exists()


def test_what_is_not_theirs_is_refused(theirs: tuple[Path, dict[str, torch.Tensor], torch.dtype]) -> None:
    folder, _, _ = theirs
    with pytest.raises(AdapterFormatError, match="Qwen2ForCausalLM, or lacks transcoder_n_features"):
        from_authors(folder / "target")
    with pytest.raises(UnsupportedModelError, match="whole replacement model.*from_authors"):
        PairedModel.from_pretrained(folder / "base", folder / "theirs")
    with pytest.raises(AdapterFormatError, match=r"no layers \[4\]"):
        from_authors(folder / "theirs", layers=[0, 4])
    config = json.loads((folder / "theirs" / "config.json").read_text())
    (folder / "theirs" / "config.json").write_text(json.dumps({**config, "transcoder_n_features": 7}))
    with pytest.raises(AdapterFormatError, match="says transcoder_n_features 7; layer 0 has 24"):
        from_authors(folder / "theirs")
    (folder / "theirs" / "config.json").write_text(json.dumps(config))
    for shard in (folder / "theirs").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        from_authors(folder / "theirs")
