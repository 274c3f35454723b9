"""A random pair of a published model's full shape, made on the device, with adapters of a chosen density.

Its weights say nothing, but its sizes, dtypes and operators are those of the real pair, so that memory and time are.
`ShapesOnly` is a pair of such a shape without any weights, which fits anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.checkpoints.base_mlps import read_base_mlps
from tl_adapters.data.traces import Trace
from tl_adapters.models.hooked_transformer import build_hooked_transformer
from tl_adapters.models.paired_model import PRE_ACTS_HOOK, PairedModel
from tl_adapters.models.routed_model import RoutedModel

SHAPES = {
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064),
    "14b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40,
                num_key_value_heads=8, vocab_size=152064),
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                 num_key_value_heads=2, vocab_size=151936),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512),
}  # fmt: skip
"""DeepSeek-R1-Distill-Qwen-7B, -14B and -1.5B, and a shape on which the script itself can be tried."""
MLP_CHANGE = 0.02
"""Standard deviation of the change of an MLP weight, as a share of the weights' own."""


def configuration(shape: str, n_ctx: int) -> Qwen2Config:
    """The target's configuration: a shape by its name in `SHAPES`, and the positions of the longest document."""
    return Qwen2Config(
        **SHAPES[shape],
        max_position_embeddings=n_ctx,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    )


def random_pair(
    shape: str, device: torch.device, n_ctx: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> PairedModel:
    """A pair in bfloat16 whose MLPs differ a little, as training changes them.

    Args:
        shape: a name in `SHAPES`.
        device: where weights are drawn.
        n_ctx: positions of the longest document.
        tokenizer: the pair's.
    """
    return pair_of_configuration(configuration(shape, n_ctx), device, torch.bfloat16, tokenizer)


def pair_of_configuration(
    config: Qwen2Config, device: torch.device, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase | None = None
) -> PairedModel:
    """`random_pair` of any shape and dtype."""
    return PairedModel.from_pretrained(*random_models(config, device, dtype), tokenizer=tokenizer)


def random_models(
    config: Qwen2Config, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Base and target of `pair_of_configuration`, as Hugging Face models."""
    torch.manual_seed(0)  # transformers draws initial weights from torch's own generator
    with _in_dtype(dtype):
        target = _model(config, device)
        return _base_of(target), target


class ShapesOnly(PairedModel):
    """A pair in bfloat16 of full shape whose tensors are on the meta device: every operation has a shape and no value.

    Args:
        shape: a name in `SHAPES`.
        n_ctx: positions of the longest document.
        n_features: features per layer.
    """

    def __init__(self, shape: str, n_ctx: int, n_features: int) -> None:
        with _in_dtype(torch.bfloat16):
            target, base = (_model(configuration(shape, n_ctx), torch.device("meta")) for _ in range(2))
        model, base_mlps = build_hooked_transformer(target, None), read_base_mlps(base, target.config.num_hidden_layers)
        RoutedModel.__init__(self, model, base_mlps)  # what identifies weights reads their values
        self.base_id, self.target_id, self.revisions = f"{shape} base", f"{shape} target", (None, None)
        d_model, device = target.config.hidden_size, torch.device("meta")
        adapters = AdapterSet([TranscoderAdapter(d_model, n_features, device=device) for _ in self.mlps], None)
        adapters.compute_in(torch.bfloat16)
        self.adapters = adapters
        for mlp, adapter in zip(self.mlps, adapters, strict=True):
            mlp.adapter = adapter
        self.backend.name_hooks()


def _model(config: Qwen2Config, device: torch.device) -> Qwen2ForCausalLM:
    with device:
        return Qwen2ForCausalLM(config).eval().requires_grad_(False)


@contextmanager
def _in_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _base_of(target: Qwen2ForCausalLM) -> PreTrainedModel:
    """A model that shares all weights with ``target`` but those of its MLPs."""
    with torch.device("meta"):
        base = Qwen2ForCausalLM(target.config).eval()
    scale = MLP_CHANGE * target.config.initializer_range

    def weight(name: str, value: Tensor) -> Tensor:
        return value + scale * torch.randn_like(value) if ".mlp." in name else value

    base.load_state_dict({name: weight(name, value) for name, value in target.state_dict().items()}, assign=True)
    base.model.rotary_emb = target.model.rotary_emb  # its frequencies are no weights
    return base.requires_grad_(False)


def install_adapters(pair: PairedModel, n_features: int, l0: float) -> float:
    """Install random adapters of which ``l0`` features a token are active at each layer; returns what they have.

    Encoders' biases are set from one forward pass of the hybrid; decoders write little, so that this stays true.
    """
    adapters = pair.new_adapters(n_features)
    generator = torch.Generator(pair.device).manual_seed(1)
    tokens = random_tokens(pair, 1, min(1024, pair.model.cfg.n_ctx)).to(pair.device)
    with torch.no_grad():
        for adapter in adapters:
            noise = torch.randn(adapter.W_dec.shape, generator=generator, device=pair.device)
            adapter.W_dec.copy_(1e-3 * noise)
        for measured in (False, True):
            found = []
            with pair.routed("replacement"), pair.recorded(PRE_ACTS_HOOK) as pre_acts:
                pair.model(tokens, return_type=None)
            for layer, adapter in enumerate(adapters):
                pre = pre_acts[layer].flatten(0, -2).float()
                if measured:
                    found.append(float((pre > 0).sum(-1).float().mean()))
                else:
                    active = max(1, round(l0 * len(pre)))
                    adapter.b_enc -= pre.flatten().topk(active).values[-1].to(adapter.b_enc)
    return sum(found) / len(found)


def random_tokens(pair: PairedModel, n: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids of the pair's vocabulary, [n, length], on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, pair.model.cfg.d_vocab, (n, length), generator=generator)


def random_documents(pair: PairedModel, n: int, length: int, seed: int = 0) -> list[Trace]:
    """Documents of random tokens whose first 20 are a prompt."""
    return [Trace(tuple(row), 20) for row in random_tokens(pair, n, length, seed).tolist()]
