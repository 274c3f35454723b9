"""The method that vLLM's workers get from this package: it defines a condition while the engine runs.

vLLM adds the methods of `ConditionWorker` to its own worker class (`worker_extension_cls`), and `collective_rpc` calls
them on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tl_adapters.vllm_plugin.served_conditions import Condition


class ConditionWorker:
    """A mixin of vLLM's worker class."""

    def define_condition(self, index: int, condition: dict[str, Any], factors: Sequence[Sequence[float]]) -> None:
        """Define a spare condition of this rank's model.

        Args:
            index: of the condition.
            condition: the fields of a `Condition`.
            factors: of all features, by layer.
        """
        model: Any = self.get_model()  # type: ignore[attr-defined]  # of vLLM's class
        model.define_condition(index, Condition(**condition), factors)
