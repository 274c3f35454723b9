"""A random pair of a published model's full shape, made on the device, with adapters of a chosen density.

Its weights say nothing, but its sizes, dtypes and operators are those of the real pair, so that memory and time are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from tl_adapters.data.traces import Trace
from tl_adapters.models.paired_model import PRE_ACTS_HOOK, PairedModel

SHAPES = {
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064),
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                 num_key_value_heads=2, vocab_size=151936),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512),
}  # fmt: skip
"""DeepSeek-R1-Distill-Qwen-7B and -1.5B, and a shape on which the script itself can be tried."""
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
    config = configuration(shape, n_ctx)
    torch.manual_seed(0)  # transformers draws initial weights from torch's own generator
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            target = Qwen2ForCausalLM(config).eval().requires_grad_(False)
        base = _base_of(target)
    finally:
        torch.set_default_dtype(before)
    return PairedModel.from_pretrained(base, target, tokenizer=tokenizer)


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
