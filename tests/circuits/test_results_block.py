"""Blocks "hesitation" of results.json of every schema are read."""

import copy
from typing import Any

import pytest

from tl_adapters.circuits.results_block import HESITATION_SCHEMA_VERSION, upgraded_block
from tl_adapters.errors import UserError

OLD: dict[str, Any] = {
    "behaviour": "hesitation",
    "words": ["Wait"],
    "moments": {"select": {"documents": 1, "moments": 1, "boundaries": 1}},
    "circuit": {"n": 3, "share_of_mass": {"circuit": 0.5}},
    "controls": {"circuit": {"size": 3}},
    "probabilities": {"replacement": 0, "replacement - both": 1, "hybrid + both": 2, "hybrid + both_at_strength": 3},
    "other_words": {"replacement - both": 1},
    "necessity": {"none": 0, "both": 1, "random": 2},
    "sufficiency": {"none": 0, "both": 1, "both_at_strength": 2},
    "transfer": {"none": 0, "negated": 1},
    "injected": {"target": 0, "replacement - both": 1, "hybrid + both": 2},
    "kinds": {"none": 0, "both": 1, "hybrid + both": 2},
    "sampled": {"none": 0, "both": 1},
    "dose": [{"n": 3}],
}
"""As version 1 wrote it, numbers in place of records."""


def test_an_old_block_gets_the_present_names_of_conditions() -> None:
    before = copy.deepcopy(OLD)
    block = upgraded_block(OLD)
    assert before == OLD, "the block that was given stays as it is"
    assert block["schema_version"] == HESITATION_SCHEMA_VERSION
    assert block["necessity"] == {"none": 0, "circuit": 1, "random": 2}
    assert block["sufficiency"] == {"none": 0, "circuit": 1, "circuit_at_strength": 2}
    assert block["injected"] == {"target": 0, "replacement - circuit": 1, "hybrid + circuit": 2}
    assert block["kinds"] == {"none": 0, "circuit": 1, "hybrid + circuit": 2}
    assert block["sampled"] == {"none": 0, "circuit": 1}
    assert block["other_words"] == {"replacement - circuit": 1}
    assert list(block["probabilities"]) == [
        "replacement", "replacement - circuit", "hybrid + circuit", "hybrid + circuit_at_strength",
    ]  # fmt: skip
    same = ("behaviour", "words", "moments", "circuit", "controls", "transfer", "dose")
    assert {name: block[name] for name in same} == {name: OLD[name] for name in same}


def test_a_block_of_the_present_schema_stays_as_it_is() -> None:
    block = upgraded_block(OLD)
    assert upgraded_block(block) == block


def test_a_block_without_a_circuit_has_no_conditions_to_rename() -> None:
    empty = {"behaviour": "doubt", "words": [], "moments": {}, "circuit": {"n": 0}}
    assert upgraded_block(empty) == {"schema_version": HESITATION_SCHEMA_VERSION, **empty}


def test_a_newer_schema_is_refused() -> None:
    with pytest.raises(UserError, match="schema_version 3; this version reads 1 and 2"):
        upgraded_block({"schema_version": 3})
