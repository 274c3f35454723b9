"""Where the curves of a run go besides its metrics.jsonl: nowhere, TensorBoard, Weights & Biases or Trackio.

A run that was killed may have logged steps past its last checkpoint; `open_tracker` says with ``first_step`` where the
resumed run starts, and it goes through those steps again.
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
    """A tracker that cannot be opened; the message says why and what to do."""


@runtime_checkable
class Tracker(Protocol):
    """What a training run needs of a tool that draws curves."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each named curve; values that are not finite are left out. Raises nothing."""

    def close(self) -> None:
        """Write what is still held back and let go of the tool. Raises nothing."""


def open_tracker(
    name: str,
    folder: Path,
    run_id: str,
    config: Mapping[str, Any],
    first_step: int = 0,
    project: str = "tl-adapters",
) -> Tracker:
    """Start the curves of a run, or go on with them.

    Args:
        name: one of `TRACKERS`.
        folder: the run folder; it exists.
        run_id: the same at every resume, and no other run's: it names the curve.
        config: the run's options, shown beside its curves.
        first_step: steps done already; 0 for a new run.
        project: the curves shown together, in the tools that group them.

    Raises TrackerError where the name is unknown, or the tool is not installed or does not start.
    """
    require_tracker(name)
    try:
        return _Guarded(name, *_OPENERS[name](Path(folder), run_id, dict(config), first_step, project))
    except ImportError as error:
        raise TrackerError(_not_installed(name, _line(error))) from error
    except Exception as error:  # each tool has its own kinds, most often for a missing login
        raise TrackerError(f"The tracker {name} did not start: {_line(error)}") from error


def require_tracker(name: str) -> None:
    """Raises TrackerError where the name is unknown or the tool is not installed; opens and imports nothing."""
    if name not in _OPENERS:
        near = difflib.get_close_matches(name, TRACKERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TrackerError(f"No tracker is called {name!r}.{hint} Known are {', '.join(TRACKERS)}.")
    if name != "none" and sys.modules.get(name) is None and importlib.util.find_spec(name) is None:
        raise TrackerError(_not_installed(name, f"there is no package {name}"))


def _not_installed(name: str, why: str) -> str:
    return f'The tracker {name} cannot be loaded: {why}. Run: pip install "tl-adapters[{name}]"'


class _Guarded:
    """A tool whose failure costs the curve, not the hours of training behind it."""

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

    # Event files are only ever added to; purge_step hides what earlier ones hold from that step on.
    writer = SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=first_step + 1)
    options = json.dumps(config, indent=1, default=str)
    writer.add_text("config", f"```json\n{options}\n```", first_step)

    def write(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # else a kill takes up to two minutes of points, older than the checkpoint too

    return write, writer.close


def _wandb(folder: Path, run_id: str, config: dict[str, Any], first_step: int, project: str) -> _Calls:
    # reinit: with another run open in this process, e.g. a notebook's own, the default hands that one back.
    run = importlib.import_module("wandb").init(
        project=project, id=run_id, name=run_id, resume="allow", dir=folder, config=config, reinit="create_new"
    )
    # wandb's own steps only grow: a resumed run's are ignored, with a warning each, until they pass the last one it
    # has, and `wandb sync` renumbers those of a run resumed offline. With the step as a metric and the x axis of all
    # others, every point is where it belongs. Repeated steps are there twice, one upon the other: a resumed run
    # repeats its values. (Rewinding, wandb.init(resume_from=...), needs a server that offers it.)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return lambda step, values: run.log({"step": step, **values}), run.finish


def _trackio(folder: Path, run_id: str, config: dict[str, Any], first_step: int, project: str) -> _Calls:
    # The points go to Trackio's own folder, where `trackio show` looks. embed: no dashboard server starts unasked in a
    # notebook. Nothing can be taken back from a run: repeated steps are there twice and, since the dashboard sorts by
    # step and a resumed run repeats its values, lie one upon the other.
    trackio = importlib.import_module("trackio")
    run = trackio.init(project=project, name=run_id, resume="allow", config=config, embed=False)
    return lambda step, values: run.log(values, step=step), trackio.finish


def _nothing() -> None:
    pass


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_OPENERS = {"none": _none, "tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
TRACKERS: tuple[str, ...] = tuple(_OPENERS)
