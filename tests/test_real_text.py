"""The built-in target on its own text: the figure that the README gives for logits."""

import torch
from transformers import AutoModelForCausalLM

from tl_adapters import organism
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.models.paired_model import PairedModel


@torch.no_grad()
def test_logits_are_hugging_faces_to_2e_5_of_their_standard_deviation() -> None:
    reference = AutoModelForCausalLM.from_pretrained(organism.TARGET)
    pair = PairedModel.from_pretrained(organism.BASE, organism.TARGET, device="cpu")
    traces = encode_traces(organism.reasoning_pairs("train", 40), pair.model.tokenizer)
    with pair.routed("target") as model:
        for trace in traces:
            tokens = torch.tensor([trace.tokens])
            theirs = reference(tokens).logits
            assert (model(tokens) - theirs).abs().max() < 2e-5 * theirs.std()
