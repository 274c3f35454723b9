"""Labels as a stage of a study: by rules always, by an LLM judge and by scored explanations on request.

Replies are kept beside the stores (RUN/features/replies), so that a run that was stopped, or is repeated, pays for no
reply twice. The results are the block labels of results.json (the rules' shares are in the block features), and the
pages are drawn again with the new labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tl_adapters.autointerp.detection import auto_interpret
from tl_adapters.autointerp.endpoint import Endpoint
from tl_adapters.autointerp.judge import judge
from tl_adapters.study.features import (
    FEATURES_FOLDER,
    NEURON_PAGES_FOLDER,
    PAGES_FOLDER,
    draw_pages,
    label_and_record,
    load_stores,
)
from tl_adapters.study.open_run import alone_in_run
from tl_adapters.utils.files import alone_in, make_folder
from tl_adapters.utils.results import changed_results, plain

REPLIES_FOLDER = "replies"


@alone_in_run
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
    """Labels a run's features and neurons; returns the rules' shares, the judge's report and the detection scores.

    Args:
        folder: a run whose features were collected.
        judge_n: how many features the judge sorts; 0 for all, None for none.
        retest: how many of these are judged twice.
        interpret_n: how many features, and as many neurons, are explained and scored; None for none.
        endpoint: arguments of `Endpoint`; missing ones are read from the environment.
        seed: seed of sampling and order.
        progress: show progress bars.

    Raises FeatureStoreError where there is no store, FolderBusyError where another process asks a model about the same
    run, and what `judge`, `auto_interpret` and `Endpoint` raise. Replies that were received until then are kept.
    """
    store, neurons = load_stores(folder)
    options = {"cache": folder / FEATURES_FOLDER / REPLIES_FOLDER, "seed": seed, **(endpoint or {})}
    asked = judge_n is not None or interpret_n is not None
    with _endpoint(options) if asked else nullcontext() as model:  # one for both parts, which share its budget
        rules = label_and_record(folder, store, neurons)["labels"]
        block: dict[str, Any] = {}
        if model is not None and judge_n is not None:
            report = judge(store, model, n=judge_n or None, retest=retest, seed=seed, progress=progress)
            block["judge"] = _recorded(folder, "judge", report)
        if model is not None and interpret_n is not None:
            tested = auto_interpret(store, neurons, model, n=interpret_n, seed=seed, progress=progress)
            block["detection"] = _recorded(folder, "detection", tested)
    draw_pages(store, folder / FEATURES_FOLDER / PAGES_FOLDER, progress=progress)
    draw_pages(neurons, folder / FEATURES_FOLDER / NEURON_PAGES_FOLDER, progress=progress)
    return {"rules": rules, **block}


@contextmanager
def _endpoint(options: Mapping[str, Any]) -> Iterator[Endpoint]:
    """An endpoint whose cache no other process uses meanwhile, because both would pay for the same replies."""
    endpoint = Endpoint(**options)
    if (cache := endpoint.cache.folder) is None:
        yield endpoint
        return
    if not cache.exists():
        make_folder(cache, private=True)
    with alone_in(cache):
        yield endpoint


def _recorded(folder: Path, name: str, report: Any) -> dict[str, Any]:
    """Write a report to the block labels as soon as it is complete, and return it as it is written."""
    written: dict[str, Any] = plain(report)
    with changed_results(folder) as results:
        results["labels"] = {**results.get("labels", {}), name: written}
    return written
