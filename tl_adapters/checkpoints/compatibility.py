"""Comparison of base and target: what must match, what may differ, and what a difference means.

Only the base's MLPs enter a pair, so only their number, shapes and activation must match. The paper's own pair differs
in special tokens, context length and rope. Such differences are warnings; they matter only where the real base is run
on the target's token ids.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from tl_adapters.checkpoints.model_files import locate, read_vocabulary
from tl_adapters.checkpoints.model_reference import ModelReference, model_config
from tl_adapters.errors import UserError

Level = Literal["ok", "warning", "error"]


class PairMismatchError(UserError, ValueError):
    """Base, target and adapters do not fit together; the message describes both sides."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: Level
    """ "error" where the pair cannot be used, "warning" for a difference that one should know of, else "ok"."""
    subject: str
    """What was checked."""
    message: str
    """What was found; for a comparison, the values of both sides."""
    advice: str = ""
    """What to change, or why nothing needs to be changed."""

    def __str__(self) -> str:
        return f"{self.subject}: {self.message}" + (f" {self.advice}" if self.advice else "")


_MUST_MATCH = {
    "model_type": "architecture",
    "num_hidden_layers": "layers",
    "hidden_size": "d_model",
    "intermediate_size": "d_mlp",
    "hidden_act": "activation",
}
_MAY_DIFFER = {
    "vocab_size": "vocabulary size",
    "max_position_embeddings": "context length",
    "rope_parameters": "rope",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key-value heads",
    "tie_word_embeddings": "tied embeddings",
}
ONLY_MLPS = "Only the base's MLPs are used, so a pair works; the real base is a separate model."
"""Why a difference outside the MLPs is no error."""


def compare_configs(base: Mapping[str, Any], target: Mapping[str, Any]) -> list[Finding]:
    """Findings on two config.json's: one per key that must match, and one per other key that differs."""
    findings = []
    for key, name in _MUST_MATCH.items():
        ours, theirs = _value(base, key), _value(target, key)
        if ours == theirs:
            findings.append(Finding("ok", name, f"{theirs}."))
        else:
            advice = "A pair is two models of one architecture with MLPs of one shape: give the target's own base."
            findings.append(Finding("error", name, f"{key} is {ours} in the base and {theirs} in the target.", advice))
    for key, name in _MAY_DIFFER.items():
        ours, theirs = _value(base, key), _value(target, key)
        if ours != theirs:
            message = f"{key} is {ours} in the base and {theirs} in the target."
            findings.append(Finding("warning", name, message, ONLY_MLPS))
    return findings


def _value(config: Mapping[str, Any], key: str) -> Any:
    if key == "hidden_act":
        return config.get("hidden_activation") or config.get("hidden_act")
    if key == "rope_parameters":  # older config.json files hold it under two other names
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        return (kind, float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    return config.get(key)


def compare_vocabularies(base: Mapping[str, int], target: Mapping[str, int]) -> list[Finding]:
    """Findings on two vocabularies (token to id, special tokens included)."""
    differing = [token for token, i in target.items() if base.get(token) != i]
    if not differing:
        return [Finding("ok", "token ids", f"all {len(target):,} tokens of the target have the same id in the base.")]
    shown = ", ".join(repr(t) for t in differing[:5])
    message = (
        f"{len(differing):,} of the target's {len(target):,} tokens have no or another id in the base, such as {shown}."
    )
    return [Finding("warning", "token ids", message, ONLY_MLPS)]


def require_fit(findings: Sequence[Finding]) -> None:
    """Raises PairMismatchError with the first finding that is an error."""
    for finding in findings:
        if finding.level == "error":
            raise PairMismatchError(str(finding))


def require_same_ids(base: Mapping[str, int], target: Mapping[str, int], used: Sequence[str] = ()) -> None:
    """Raises PairMismatchError where the target's token ids mean other tokens in the real base.

    ``used`` restricts the comparison to these tokens; by default all of the target's are compared.
    """
    differing = [token for token in (used or target) if base.get(token) != target.get(token)]
    if differing:
        raise PairMismatchError(
            f"The real base cannot read the target's token ids: {len(differing):,} tokens have no or another id there, "
            f"such as {', '.join(map(repr, differing[:5]))}. Give it text through its own tokenizer, or leave it out."
        )


log = logging.getLogger(__name__)


def require_pair(base: ModelReference, target: ModelReference) -> None:
    """Compares configurations and vocabularies before any weight is read; differences that matter little are logged.

    Raises PairMismatchError where the models do not fit together.
    """
    findings = compare_configs(model_config(base), model_config(target))
    if not isinstance(base, PreTrainedModel) and not isinstance(target, PreTrainedModel):
        base_vocabulary, vocabulary = (read_vocabulary(locate(m, weights=False)) for m in (base, target))
        if base_vocabulary and vocabulary:
            findings += compare_vocabularies(base_vocabulary, vocabulary)
    require_fit(findings)
    for finding in findings:
        if finding.level == "warning":
            log.warning("%s", finding)
