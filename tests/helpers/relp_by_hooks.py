"""RelP's rules as hooks on a HookedTransformer that detach: an autograd implementation to compare with."""

from functools import partial

import torch
from transformer_lens import HookedTransformer

from tl_adapters.attribution.gradient import ForwardHook


def relp_hooks(model: HookedTransformer, freeze_mlps: bool = False) -> list[ForwardHook]:
    """Hooks that hold patterns, norm scales and activation slopes constant, and halve the gradients of gate * up."""
    kept: dict[tuple[str, int], torch.Tensor] = {}

    def keep(value, hook, what, layer):  # type: ignore[no-untyped-def]
        kept[what, layer] = value

    def half(value, hook, layer):  # type: ignore[no-untyped-def]
        gate, up = kept["gate", layer], kept["up", layer]
        act = model.blocks[layer].mlp.act_fn(gate).detach()
        slope = torch.where(gate == 0, torch.full_like(gate, 0.5), act / gate.detach()).detach()
        if freeze_mlps:
            return value.detach()
        return 0.5 * (slope * gate * up.detach() + act * up)

    def detach(value, hook):  # type: ignore[no-untyped-def]
        return value.detach()

    hooks: list[ForwardHook] = []
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}."
        hooks.append((f"{name}mlp.hook_pre", partial(keep, what="gate", layer=layer)))
        hooks.append((f"{name}mlp.hook_pre_linear", partial(keep, what="up", layer=layer)))
        hooks.append((f"{name}mlp.hook_post", partial(half, layer=layer)))
        hooks.append((f"{name}attn.hook_pattern", detach))
        for norm in ("ln1", "ln2", "ln1_post", "ln2_post"):
            if f"{name}{norm}.hook_scale" in model.hook_dict:
                hooks.append((f"{name}{norm}.hook_scale", detach))
    return [*hooks, ("ln_final.hook_scale", detach)]
