"""Sequences that users pass are read in every form they may have, or refused; never iterated letter by letter."""

from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from helpers.random_models import random_model, randomise

from tl_adapters import organism
from tl_adapters.attribution.attribute import attribute
from tl_adapters.attribution.targets import LogitTarget
from tl_adapters.autointerp.rule_labels import rule_labels
from tl_adapters.circuits.onsets import find_onsets
from tl_adapters.circuits.subject import builtin_subject
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.data.traces import DataError, Trace, readable_traces
from tl_adapters.data.words import hesitation_tokens
from tl_adapters.evaluation.faithfulness import measure_faithfulness
from tl_adapters.features.collect import collect_features
from tl_adapters.features.notebook_view import show_features
from tl_adapters.generation.completions import complete
from tl_adapters.interventions.feature_edits import ablated
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.trainer import train
from tl_adapters.utils.arguments import ArgumentError, items, prompt_response_pairs, texts, token_ids

IDS = [3, 14, 15, 9]


@pytest.fixture(autouse=True)
def as_users_call_it() -> Iterator[None]:
    """Users run without annotation checks, so these tests do too."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


PROMPT, RESPONSE = "47+85=?", "<think>47+85=132.</think>132"


@pytest.fixture(scope="module")
def pair() -> PairedModel:
    return randomise(PairedModel.from_pretrained(random_model(1), random_model(2)))


@pytest.fixture(scope="module")
def builtin() -> PairedModel:
    return randomise(PairedModel.from_pretrained(organism.BASE, organism.TARGET))


@pytest.mark.parametrize(
    "given",
    [
        IDS, tuple(IDS), [IDS], torch.tensor(IDS), torch.tensor([IDS]), np.array(IDS), np.array([IDS], dtype=np.int32),
        [np.int64(i) for i in IDS], [torch.tensor(i) for i in IDS], range(2, 6), iter(IDS),
    ],
)  # fmt: skip
def test_a_sequence_of_ids_is_read_in_every_form(given: Any) -> None:
    assert token_ids(given, 61) == (IDS if not isinstance(given, range) else [2, 3, 4, 5])


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (torch.tensor([IDS, IDS]), "2 rows"), ([IDS, IDS], "2 rows"), ([torch.tensor(IDS)] * 2, "2 rows"),
        (torch.tensor([[IDS]]), "whole numbers"), ("Wait", "sequence of token ids"), (["Wait"], "whole numbers"),
        ([1.5], "whole numbers"), (torch.tensor(IDS) / 2, "whole numbers"), ([True], "whole numbers"),
        ([61], "from 0 to 60"), ([-1], "from 0 to 60"), (7, "sequence of token ids"), ({3: 1}, "sequence of token ids"),
        ([None], "whole numbers"), (None, "sequence of token ids"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(given: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        token_ids(given, 61, "prompt")


def test_a_batch_of_prompts_is_not_one_prompt(pair: PairedModel) -> None:
    one = attribute(pair, torch.tensor([IDS]), progress=False)
    assert one.tokens.tolist() == IDS
    with pytest.raises(ArgumentError, match="2 rows"):
        attribute(pair, torch.tensor([IDS, IDS]), progress=False)
    with pytest.raises(ArgumentError, match="from 0 to 60"):
        show_features(pair, [3, 61], [(0, 0)])


def test_a_kind_of_problem_is_one_of_the_recipe() -> None:
    with pytest.raises(ArgumentError, match=r"kind is 'sum'; allowed: 'sums', 'differences'. Did you mean 'sums'"):
        builtin_subject(1, 1, "sum")  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", ["Wait", b"Wait", {"Wait": 1}, LogitTarget(3), 3, [None], [3.0], [True]])
def test_targets_are_a_sequence_of_targets(pair: PairedModel, targets: Any) -> None:
    with pytest.raises(ArgumentError, match="give tokens"):
        attribute(pair, IDS, targets, progress=False)


@pytest.mark.parametrize(
    "call",
    [
        lambda builtin, words: hesitation_tokens(builtin.model.tokenizer, words),
        lambda builtin, words: collect_features(builtin, [Trace((1, 2), 1)], words=words, progress=False),
        lambda builtin, words: rule_labels([], {}, words),
    ],
)
@pytest.mark.parametrize("words", ["Wait", ["Wait", 3], 5, {"Wait": 1}])
def test_words_are_a_sequence_of_words(builtin: PairedModel, call: Callable[..., Any], words: Any) -> None:
    with pytest.raises(ArgumentError, match="words"):
        call(builtin, words)


def test_rows_of_our_own_data_files_are_their_values(builtin: PairedModel) -> None:
    tokenizer = builtin.model.tokenizer
    as_pairs = encode_traces([(PROMPT, RESPONSE)], tokenizer)
    assert encode_traces([{"prompt": PROMPT, "response": RESPONSE}], tokenizer) == as_pairs
    assert encode_traces(iter([[PROMPT, RESPONSE]]), tokenizer) == as_pairs
    assert encode_traces([{"prompt": PROMPT, "response": RESPONSE, "domain": "math"}], tokenizer) == as_pairs


@pytest.mark.parametrize(
    "rows",
    ["ab", ["ab"], [("ab",)], [(PROMPT, RESPONSE, "more")], [{"question": PROMPT, "answer": RESPONSE}],
     [(PROMPT, None)], {"prompt": PROMPT, "response": RESPONSE}, [3], 3],
)  # fmt: skip
def test_other_rows_are_refused_with_their_number(rows: Any) -> None:
    with pytest.raises(ArgumentError, match="Row 1|pairs is") as error:
        prompt_response_pairs(rows)
    assert "prompt" in str(error.value)


@pytest.mark.parametrize(("option", "given"), [("kind", "features"), ("stream", "replacment"), ("stream", "hybrid")])
def test_a_typo_names_the_nearest(builtin: PairedModel, option: str, given: str) -> None:
    with pytest.raises(ArgumentError, match="allowed"):
        collect_features(builtin, [Trace((1, 2), 1)], progress=False, **{option: given})  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [train, measure_faithfulness])
def test_documents_are_traces_that_the_model_can_read(pair: PairedModel, call: Callable[..., Any]) -> None:
    with pytest.raises(ArgumentError, match="encode_traces"):
        call(pair, [(PROMPT, RESPONSE)])
    with pytest.raises(DataError, match="Document 1 has 70 tokens"):
        call(pair, [Trace((1,) * 10, 3), Trace((1,) * 70, 3)])


def test_collection_refuses_them_too(builtin: PairedModel) -> None:
    with pytest.raises(ArgumentError, match="encode_traces"):
        collect_features(builtin, ["a text"], progress=False)
    with pytest.raises(DataError, match="Document 0 has"):
        collect_features(builtin, [Trace((1,) * 5000, 1)], progress=False)


def test_documents_of_another_vocabulary_are_refused_before_anything_runs(pair: PairedModel) -> None:
    with pytest.raises(DataError, match="Document 0 holds the token id 61"):
        readable_traces([Trace((1, 61), 1)], pair.model.cfg)
    with pytest.raises(DataError, match="Document 0 has 0 tokens"):
        readable_traces([Trace((), 0)], pair.model.cfg)


def test_a_text_is_not_a_sequence_of_texts() -> None:
    with pytest.raises(ArgumentError, match=r"give \['Wait'\]"):
        texts("Wait", "words")
    assert texts(("Wait", "Hmm"), "words") == ("Wait", "Hmm")
    with pytest.raises(ArgumentError, match="whole"):
        items([1, True], int, "numbers", "give whole numbers")


@pytest.mark.parametrize("features", [(0, 3), "0.3", {0: 3}, [3], ["03"], [(0, 3, 1)], [(0, 1.5)], 3])
def test_features_are_pairs(pair: PairedModel, features: Any) -> None:
    for call in (lambda: ablated(pair, features).__enter__(), lambda: show_features(pair, IDS, features)):
        with pytest.raises(ArgumentError, match="layer, index"):
            call()


@pytest.mark.parametrize("layers", ["01", [-1], [4], [0.5], {1: 2}, 3])
def test_layers_are_numbers_of_existing_layers(pair: PairedModel, layers: Any) -> None:
    with pytest.raises(ArgumentError, match="from 0 to 3"), pair.routed(only=layers):
        pass
    assert [route.adapter for route in pair.routes] == [False] * 4


def test_prompts_to_complete_are_sequences_of_ids(pair: PairedModel) -> None:
    options: dict[str, Any] = dict(stop_at=[1], max_new_tokens=2, batch_size=2)
    alone = complete(pair.model, [IDS], **options)
    assert complete(pair.model, torch.tensor([IDS, IDS]), **options) == alone * 2  # type: ignore[arg-type]
    for wrong in (["Wait"], IDS, [[61]]):
        with pytest.raises(ArgumentError):
            complete(pair.model, wrong, **options)  # type: ignore[arg-type]


def test_onsets_require_traces(builtin: PairedModel) -> None:
    with pytest.raises(ArgumentError, match="encode_traces"):
        find_onsets(builtin, [(PROMPT, RESPONSE)])  # type: ignore[list-item]
