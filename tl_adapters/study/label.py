"""Naming a run's features: by rules always, by a judge and by tested explanations where asked for.

Replies are kept beside the stores (RUN/features/replies), so a run that was stopped, or is asked again, pays for
nothing twice. What came out is the block labels of results.json (the rules' shares stand in the block features), and
the pages are drawn anew with the new names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_adapters.autointerp.detection import auto_interpret
from tl_adapters.autointerp.endpoint import Endpoint
from tl_adapters.autointerp.judge import judge
from tl_adapters.study.features import (
    FEATURES_FOLDER,
    NEURON_PAGES_FOLDER,
    PAGES_FOLDER,
    draw,
    name_and_record,
    stores_of,
)
from tl_adapters.utils.results import plain, read_results, write_results

REPLIES = "replies"


def label_run(
    folder: Path,
    *,
    judge_n: int | None = None,
    retest: int = 50,
    interpret_n: int | None = None,
    endpoint: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Label a run's features and neurons; returns the rules' shares and what judge and test found.

    Args:
        folder: a run whose features were collected.
        judge_n: features that a judge sorts; 0 all of them, None none.
        retest: how many of these it judges twice.
        interpret_n: features, and as many neurons, that are described and tested; None none.
        endpoint: arguments of `Endpoint`; what is missing comes from the environment.
        seed: of draws and orders.
        progress: show progress bars.

    Raises FeatureStoreError where there is no store, and what `judge`, `auto_interpret` and `Endpoint` raise; what was
    answered until then is kept.
    """
    store, neurons = stores_of(folder)
    rules = name_and_record(folder, store, neurons)["labels"]
    block: dict[str, Any] = {}
    asked = {"cache": folder / FEATURES_FOLDER / REPLIES, "seed": seed, **(endpoint or {})}
    if judge_n is not None:
        report = judge(store, Endpoint(**asked), judge_n or None, retest=retest, seed=seed, progress=progress)
        block["judge"] = plain(report)
    if interpret_n is not None:
        tested = auto_interpret(store, neurons, Endpoint(**asked), interpret_n, seed=seed, progress=progress)
        block["detection"] = plain(tested)
    if block:
        write_results(folder, labels={**read_results(folder).get("labels", {}), **block})
    draw(store, folder / FEATURES_FOLDER / PAGES_FOLDER, progress=progress)
    draw(neurons, folder / FEATURES_FOLDER / NEURON_PAGES_FOLDER, progress=progress)
    return {"rules": rules, **block}
