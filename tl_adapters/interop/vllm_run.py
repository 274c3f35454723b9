"""vLLM for the adapters of a run: one engine, and a model of it for every variant that it can compute."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.config import RunConfig
from tl_adapters.errors import UserError
from tl_adapters.interop.export import export
from tl_adapters.interop.vllm_checkpoint import SERVED_ROUTES, condition_of, served_model_name
from tl_adapters.interop.vllm_engine import LocalVllm, VllmEngine, VllmModel, VllmServer, require_vllm
from tl_adapters.interventions.variants import FeatureFactors, Variant
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import BUILTIN_BASE, BUILTIN_TARGET
from tl_adapters.utils.devices import GivenDtype, resolve_dtype
from tl_adapters.utils.files import working_folder

log = logging.getLogger(__name__)

VLLM_HERE = "vllm"
"""The engine that is vLLM in this process; any other name of one is an address."""
SPARE_CONDITIONS = 32
"""Conditions of a study that are in the engine at a time; with further ones, the oldest are defined anew."""


@dataclass
class ServedRun:
    """An engine that serves the adapters of a run."""

    engine: VllmEngine
    """The engine; `opened_engine` closes it."""
    adapters: AdapterSet
    """The adapters."""
    target: str
    """Folder or hub name of the target, whose tokenizer is used."""
    exported: dict[str, str] = field(default_factory=dict)
    """Digest of the factors -> name, of the conditions that were exported for this engine."""
    own: list[str] = field(default_factory=list)
    """Names of the variants that our own engine computed in its place."""
    _spare: OrderedDict[str, str] = field(default_factory=OrderedDict)
    """Digest of the factors -> spare condition, the oldest first."""
    _in_use: set[str] = field(default_factory=set)
    """Conditions within whose block the caller is; they are not defined anew."""

    @cached_property
    def _target(self) -> VllmModel:
        return VllmModel.of(self.engine, SERVED_ROUTES[1].slug, self.target)

    def model_of(self, variant: Variant | str) -> VllmModel:
        """The model of a variant that was exported, or that a server serves, by its name too.

        Raises VllmError where it is not served.
        """
        name = variant if isinstance(variant, str) else variant.slug
        self.engine.require(name)
        return replace(self._target, condition=name)

    @contextmanager
    def entered(self, pair: PairedModel, variant: Variant) -> Iterator[Any]:
        """The model of a variant: this engine's, or the pair's where the engine cannot compute it.

        Raises what `FeatureFactors.by_layer` and the variant itself raise.
        """
        name = self._condition(variant)
        if name is None:
            if variant.name not in self.own:
                log.info("%s is computed by our own engine; vLLM cannot, or does not serve it", variant.name)
                self.own.append(variant.name)
            with variant.entered(pair) as model:
                yield model
            return
        self._in_use.add(name)
        try:
            yield replace(self._target, condition=name, tokenizer=pair.model.tokenizer)
        finally:
            self._in_use.discard(name)

    def facts(self) -> dict[str, Any]:
        """What computed the answers, for results.json."""
        return {"name": "vLLM", "dtype": self.engine.dtype, "by_our_own": list(self.own)}

    def _condition(self, variant: Variant) -> str | None:
        """The name of the condition that computes a variant; None where none does."""
        if (factors := variant.factors) is None:
            return None
        if exported := self.exported.get(factors.digest):
            return exported
        if self.engine.spare and factors.digest not in self._spare:
            self._define(factors)
        if spare := self._spare.get(factors.digest):
            return spare
        slug = variant.named_apart().slug
        return slug if self.engine.serves(slug) else None

    def _define(self, factors: FeatureFactors) -> None:
        """Define a spare condition: one that has none yet, else the oldest that is not in use."""
        taken = set(self._spare.values())
        free = [name for name in self.engine.spare if name not in taken]
        if not free:
            oldest = next((digest for digest, name in self._spare.items() if name not in self._in_use), None)
            if oldest is None:
                return
            free = [self._spare.pop(oldest)]
        by_layer = factors.by_layer(self.adapters)
        self.engine.define(condition_of(free[0], factors), [by_layer[layer] for layer in sorted(by_layer)])
        self._spare[factors.digest] = free[0]


@contextmanager
def opened_engine(
    run: str | Path, engine: str, *, dtype: GivenDtype | None = None, variants: Sequence[Variant] = (), spare: int = 0
) -> Iterator[ServedRun]:
    """An engine for the adapters of a run; an export for vLLM in this process is removed again.

    Args:
        run: folder of a run that train, demo or open made.
        engine: "vllm", or the address of a server.
        dtype: of the models in this process; None is the run's own.
        variants: what is served beside the routes, in this process.
        spare: number of conditions that are defined when they are entered, in this process.

    Raises VllmError, UserError for a dtype beside an address, and what an export raises.
    """
    run = Path(run)
    adapters, config = AdapterSet.from_pretrained(run / "adapters"), RunConfig.of_run(run)
    base, target = (config.base, config.target) if config.target else (BUILTIN_BASE, BUILTIN_TARGET)
    with ExitStack() as closing:
        served: VllmEngine
        exported: dict[str, str] = {}
        if engine == VLLM_HERE:
            require_vllm()  # before the export, which copies both models
            folder = closing.enter_context(working_folder(run / VLLM_HERE)) / "export"
            export(run, "vllm", folder, base=base, target=target, variants=variants, spare=spare)
            own = config.dtype if dtype is None else str(resolve_dtype(dtype)).removeprefix("torch.")
            served = LocalVllm(folder, own)
            exported = {one.factors.digest: one.slug for one in (*SERVED_ROUTES, *variants) if one.factors}
        elif dtype is None:
            served = VllmServer(engine, served_model_name(adapters))
        else:
            raise UserError(f"The server at {engine} has a dtype already, and --dtype is {dtype}; leave it out.")
        closing.callback(served.close)
        yield ServedRun(served, adapters, target, exported)
