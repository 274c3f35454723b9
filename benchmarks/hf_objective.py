"""The objective of training as its formulas read, on Hugging Face's modules with fused attention: what
`benchmarks/training_step.py` compares with. It uses nothing of the package but the adapters' parameters.

A step takes four forward passes: the target without gradient, the replacement (output KL, NMSE and L1), and the two
bridges. Its gradients are those of `tl_adapters.training.objective.reference_step`
(tests/benchmarks/test_training_step.py; Hugging Face's norms compute in float32, so they are equal to its precision).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2ForCausalLM

from tl_adapters.adapters.transcoder import TranscoderAdapter


@dataclass(frozen=True)
class HFObjective:
    """The objective for one document, with every weight of a term 1 except the L1's."""

    base: Qwen2ForCausalLM
    target: Qwen2ForCausalLM
    adapters: Sequence[TranscoderAdapter]
    """Adapters whose parameters are read."""

    def streams(self, tokens: Tensor, replaced: Container[int]) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Residual streams of the target with the base's MLP and the adapter on the layers ``replaced``, and layer ->
        activations of the adapter."""
        model: Any = self.target.model
        resid = model.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        rotary = model.rotary_emb(resid, positions)
        streams, acts = [resid], dict[int, Tensor]()
        for layer, block in enumerate(model.layers):
            attended, _ = block.self_attn(block.input_layernorm(resid), rotary, attention_mask=None)
            resid = resid + attended
            x = block.post_attention_layernorm(resid)
            if layer in replaced:
                adapter, base = self.adapters[layer], self.base.model.layers[layer].mlp
                acts[layer] = torch.relu(x @ adapter.W_enc + adapter.b_enc)
                resid = resid + base(x) + acts[layer] @ adapter.W_dec + adapter.b_dec
            else:
                resid = resid + block.mlp(x)
            streams.append(resid)
        return streams, acts

    def log_probs(self, resid: Tensor) -> Tensor:
        """Log-probabilities of the next token after each position."""
        model: Any = self.target
        return F.log_softmax(model.lm_head(model.model.norm(resid)), -1)

    def loss(self, tokens: Tensor, cut: int, l1_weight: float) -> Tensor:
        """The loss of one document for a cut. All its tokens count for NMSE and L1, and all but the last predict."""
        n = len(self.adapters)
        with torch.no_grad():
            target, _ = self.streams(tokens, ())
            wanted = self.log_probs(target[-1][0, :-1])

        def kl(resid: Tensor) -> Tensor:
            found = self.log_probs(resid[0, :-1])
            return F.kl_div(found, wanted, log_target=True, reduction="sum") / len(wanted)

        replacement, acts = self.streams(tokens, range(n))
        forward_bridge, _ = self.streams(tokens, range(cut))
        backward_bridge, _ = self.streams(tokens, range(cut, n))
        nmse = [(r - t).square().sum() / t.square().sum() for r, t in zip(replacement, target, strict=True)]
        norms = [adapter.W_dec.norm(dim=1) for adapter in self.adapters]
        l1 = torch.stack([(acts[layer][0] @ norms[layer]).mean() for layer in range(n)]).sum()
        kls = kl(replacement[-1]) + kl(forward_bridge[-1]) + kl(backward_bridge[-1])
        return kls + torch.stack(nmse).mean() + l1_weight * l1


def take_step(loss: Tensor, optimizer: torch.optim.Optimizer, largest_norm: float) -> None:
    """Gradients of a loss, clipping to a norm of all of them together, and the optimizer's step."""
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, largest_norm)
    optimizer.step()
    optimizer.zero_grad()
