"""Trackers that draw the curves of a run besides its metrics.jsonl: TensorBoard, Weights & Biases or Trackio.

A run that was killed may have logged steps past its last training state. The resumed run goes through those steps
again; ``first_step`` of `open_tracker` is where it starts.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tl_adapters.errors import UserError

log = logging.getLogger(__name__)

_Write = Callable[[int, dict[str, float]], None]
_Finish = Callable[[], None]
_Calls = tuple[_Write, _Finish]


class TrackerError(UserError, RuntimeError):
    """Raised for a tracker that cannot be opened; the message says why and what to do."""


@runtime_checkable
class Tracker(Protocol):
    """The interface through which a training run draws its curves."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each named curve, except for values that are not finite. Never raises an error."""

    def close(self) -> None:
        """Write all pending points and close the tool. Never raises an error."""


def open_tracker(
    name: str,
    folder: Path,
    run_id: str,
    config: Mapping[str, Any],
    first_step: int = 0,
    project: str = "tl-adapters",
) -> Tracker:
    """Open a tracker that starts the curves of a run or continues them.

    Args:
        name: one of `TRACKERS`.
        folder: the run folder, which must exist.
        run_id: names the curves; the same at every resume, and unique to the run.
        config: the run's options, shown beside its curves.
        first_step: steps done already; 0 for a new run.
        project: the project under which the tool groups the run.

    Raises:
        TrackerError: the name is unknown, or the tool is not installed or does not start.
    """
    require_tracker(name)
    try:
        return _Guarded(name, *_OPENERS[name](Path(folder), run_id, dict(config), first_step, project))
    except ImportError as error:
        raise TrackerError(_not_installed(name, _line(error))) from error
    except Exception as error:  # each tool raises classes of its own, most often for a missing login
        raise TrackerError(f"The tracker {name} did not start: {_line(error)}") from error


def require_tracker(name: str) -> None:
    """Raises TrackerError if the name is unknown or the tool is not installed. Imports nothing."""
    if name not in _OPENERS:
        near = difflib.get_close_matches(name, TRACKERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TrackerError(f"There is no tracker {name!r}.{hint} Known are {', '.join(TRACKERS)}.")
    if name != "none" and sys.modules.get(name) is None and importlib.util.find_spec(name) is None:
        raise TrackerError(_not_installed(name, f"there is no package {name}"))


def _not_installed(name: str, why: str) -> str:
    return f'The tracker {name} cannot be loaded: {why}. Run: pip install "tl-adapters[{name}]"'


class _Guarded:
    """A tracker that logs the first error of its tool and then does nothing, so that training continues."""

    def __init__(self, name: str, write: _Write, finish: _Finish) -> None:
        self._name, self._write, self._finish = name, write, finish
        self._failed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if not self._failed:
            self._attempt(lambda: self._write(step, {k: v for k, v in values.items() if math.isfinite(v)}))

    def close(self) -> None:
        finish, self._finish = self._finish, _nothing  # a second close does nothing
        self._attempt(finish)

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if not self._failed:
                log.warning("The tracker %s failed and gets no more points: %s", self._name, _line(error))
            self._failed = True


def _none(folder: Path, run_id: str, config: dict[str, Any], first_step: int, project: str) -> _Calls:
    return lambda step, values: None, _nothing


def _tensorboard(folder: Path, run_id: str, config: dict[str, Any], first_step: int, project: str) -> _Calls:
    from torch.utils.tensorboard import SummaryWriter

    # Event files are append-only; purge_step hides the points of earlier files from that step on.
    writer = SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=first_step + 1)
    options = json.dumps(config, indent=1, default=str)
    writer.add_text("config", f"```json\n{options}\n```", first_step)

    def write(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # otherwise a kill loses up to two minutes of points, some older than the training state

    return write, writer.close


def _wandb(folder: Path, run_id: str, config: dict[str, Any], first_step: int, project: str) -> _Calls:
    # reinit: if another run is open in this process, such as a notebook's own, the default returns that run.
    run = importlib.import_module("wandb").init(
        project=project, id=run_id, name=run_id, resume="allow", dir=folder, config=config, reinit="create_new"
    )
    # wandb's own steps only increase: the steps of a resumed run are ignored, with a warning each, until they exceed
    # the last one that was logged, and `wandb sync` renumbers those of a run that was resumed offline. With the step
    # logged as a metric and set as the x axis of all others, every point has its right position. Repeated steps are
    # drawn twice at the same point, because a resumed run repeats its values. (Rewinding, with
    # wandb.init(resume_from=...), needs a server that supports it.)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return lambda step, values: run.log({"step": step, **values}), run.finish


def _trackio(folder: Path, run_id: str, config: dict[str, Any], first_step: int, project: str) -> _Calls:
    # The points are written to Trackio's own folder, which `trackio show` reads. embed=False: no dashboard server is
    # started in a notebook. Points cannot be removed from a run. Repeated steps are drawn twice at the same point,
    # because the dashboard sorts by step and a resumed run repeats its values.
    trackio = importlib.import_module("trackio")
    run = trackio.init(project=project, name=run_id, resume="allow", config=config, embed=False)
    return lambda step, values: run.log(values, step=step), trackio.finish


def _nothing() -> None:
    pass


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_OPENERS = {"none": _none, "tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
TRACKERS: tuple[str, ...] = tuple(_OPENERS)
