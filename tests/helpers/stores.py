"""A small feature store of the model organism with random adapters."""

from functools import cache

import torch
from helpers.random_models import randomise

from tl_adapters import organism
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.data.traces import Trace
from tl_adapters.features.collect import collect_features
from tl_adapters.features.feature import Label
from tl_adapters.features.store import FeatureStore
from tl_adapters.features.store_description import StoreOptions
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.study.open_run import load_organism_pair

HOSTILE = "</script><img src=x onerror=\"console.error('ran')\"><b>"
WORDS = ("Wait", "Hmm", "=")
OPTIONS = StoreOptions(examples=14, sample=4, before=8, after=4)


@cache
def random_pair() -> PairedModel:
    """The model organism with 40 random features per layer; tests must not change it."""
    pair = randomise(load_organism_pair(), n_features=40)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in pair.installed_adapters():
            # Some fire on most tokens, some on few, some never.
            adapter.b_enc.copy_(-6 * torch.rand(40, generator=generator))
    return pair


@cache
def documents() -> tuple[Trace, ...]:
    """Forty traces, half of them of the domain "sums"."""
    pairs = organism.reasoning_pairs("report", 40)
    traces = encode_traces(pairs, random_pair().model.tokenizer)
    return tuple(
        Trace(t.tokens, t.prompt_length, t.thinking_length, "sums" if i % 2 else "") for i, t in enumerate(traces)
    )


def new_store() -> FeatureStore:
    """A new store in memory, which a test may change. Two features are labeled."""
    new = collect_features(random_pair(), documents(), split="report", words=WORDS, options=OPTIONS, progress=False)
    first, second = new.ids()[:2]
    new.set_labels({
        first: Label("a <b>bold</b> & odd label", "simple input", "rules", 0.75),
        second: Label("ends a step", "reasoning output", "", None),
    })  # fmt: skip
    return new


@cache
def store() -> FeatureStore:
    """The same store, shared between tests, which must not change it."""
    return new_store()
