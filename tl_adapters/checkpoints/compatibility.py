"""Do base and target fit together? What must match, what may differ, and what a difference means.

Only the base's MLPs enter a pair, so only their number, shapes and activation must match. The paper's own pair
differs in special tokens, context length and rope: that is said, and it matters only to who runs the real base on
the target's token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tl_adapters.errors import UserError

Level = Literal["ok", "warning", "error"]


class PairMismatchError(UserError, ValueError):
    """Base, target and adapters do not fit together; the message says both sides."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    level: Level
    """ "error": it will not work; "warning": it works, and this is what to know; "ok"."""
    subject: str
    """What was looked at."""
    says: str
    """What was found, both sides where there are two."""
    do: str = ""
    """What to change, or why nothing need be."""

    def __str__(self) -> str:
        return f"{self.subject}: {self.says}" + (f" {self.do}" if self.do else "")


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
ONLY_MLPS = "Only the base's MLPs are used, so a pair works; the real base is a model of its own."


def compare_configs(base: Mapping[str, Any], target: Mapping[str, Any]) -> list[Finding]:
    """Findings on two config.json's: one per key that must match, and one per other key that differs."""
    findings = []
    for key, name in _MUST_MATCH.items():
        ours, theirs = _value(base, key), _value(target, key)
        if ours == theirs:
            findings.append(Finding("ok", name, f"{theirs}."))
        else:
            do = "A pair is two models of one architecture with MLPs of one shape: give the target's own base."
            findings.append(Finding("error", name, f"{key} is {ours} in the base and {theirs} in the target.", do))
    for key, name in _MAY_DIFFER.items():
        ours, theirs = _value(base, key), _value(target, key)
        if ours != theirs:
            says = f"{key} is {ours} in the base and {theirs} in the target."
            findings.append(Finding("warning", name, says, ONLY_MLPS))
    return findings


def _value(config: Mapping[str, Any], key: str) -> Any:
    if key == "hidden_act":
        return config.get("hidden_activation") or config.get("hidden_act")
    if key == "rope_parameters":  # older config.json's keep the same facts in two places
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
    says = (
        f"{len(differing):,} of the target's {len(target):,} tokens have no or another id in the base, such as {shown}."
    )
    return [Finding("warning", "token ids", says, ONLY_MLPS)]


def require_fit(findings: Sequence[Finding]) -> None:
    """Raises PairMismatchError with the first finding that is an error."""
    for finding in findings:
        if finding.level == "error":
            raise PairMismatchError(str(finding))


def require_same_ids(base: Mapping[str, int], target: Mapping[str, int], used: Sequence[str] = ()) -> None:
    """For who runs the real base on the target's token ids. Raises PairMismatchError where those mean other tokens."""
    differing = [token for token in (used or target) if base.get(token) != target.get(token)]
    if differing:
        raise PairMismatchError(
            f"The real base cannot read the target's token ids: {len(differing):,} tokens have no or another id there, "
            f"such as {', '.join(map(repr, differing[:5]))}. Give it text through its own tokenizer, or leave it out."
        )
