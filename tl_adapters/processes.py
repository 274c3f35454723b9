"""The processes of one launch (`accelerate launch`, `torchrun`): their number, what they add up and what they agree on.

A process that was started alone imports nothing here, and every operation gives back what it was given. Where there are
several, Accelerate does what passes between them. Every method but `mine` and the properties is then called by all of
them, in the same order, as each waits for the others.

An error of one process is an error of all of them (`Processes.together`): none waits for one that has stopped, and the
command line prints it once.
"""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from tl_adapters.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LONGEST_STANDSTILL = datetime.timedelta(hours=6)
"""How long a process waits for the others, such as for one that writes. The launcher ends all when one has failed."""

Given = TypeVar("Given")
Made = TypeVar("Made")
Raised = TypeVar("Raised", bound=BaseException)


class ProcessesError(UserError, RuntimeError):
    """Raised where several processes of one launch cannot do what they were started for, or another one has failed."""


@dataclass(frozen=True)
class Processes:
    """The processes of this launch, seen from one of them; made by `processes`."""

    count: int
    """Number of processes."""
    index: int
    """Number of this one, from 0."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.index == 0

    @property
    def device(self) -> torch.device:
        """The device of this process among several, on which tensors pass between them."""
        import torch

        own: torch.device = _state().device
        return own if own.type == "cuda" else torch.device("cpu")

    def mine(self, items: Sequence[Given]) -> Sequence[Given]:
        """The share of this process: every ``count``-th item, from its own number on."""
        return items[self.index :: self.count]

    # -- what all processes call --------------------------------------------------------------------------------------

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor, which has the same shape in every process."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        return reduce(tensor.to(self.device).contiguous(), reduction="sum").to(tensor.device)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, one at a time, so that one of them is held twice."""
        for tensor in tensors if self.count > 1 else ():
            whole = tensor.T if tensor.dim() == 2 and tensor.T.is_contiguous() else tensor
            whole.copy_(self.total(whole))

    def receive(self, tensors: Iterable[Tensor], owner: int) -> None:
        """Replace each tensor by that of the process ``owner``."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        for tensor in tensors:
            tensor.copy_(broadcast(tensor.detach().to(self.device).contiguous(), from_process=owner))

    def gathered(self, value: Given) -> list[Given]:
        """The value of every process, in their order."""
        if self.count == 1:
            return [value]
        _state()
        from accelerate.utils import gather_object

        return gather_object([value])

    def wait(self) -> None:
        """Wait for the others."""
        if self.count > 1:
            _state().wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in one of the processes."""
        if self.count == 1:
            return flag
        import torch

        return bool(self.total(torch.tensor(float(flag))) > 0)

    def together(self, work: Callable[[], Made]) -> Made:
        """The result of work that every process does without the others, once all of them have done it.

        Raises what ``work`` raises, and in the other processes ProcessesError or KeyboardInterrupt with the same text.
        """
        if self.count == 1:
            return work()
        result: Any = None
        error: BaseException | None = None
        try:
            result = work()
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        stopped = isinstance(error, KeyboardInterrupt)
        outcomes = self.gathered(None if error is None else (stopped, str(error) or type(error).__name__))
        if error is not None:
            raise everywhere(error)
        for index, outcome in enumerate(outcomes):
            if outcome is not None:
                stopped, text = outcome
                other = KeyboardInterrupt(text) if stopped else ProcessesError(f"Process {index}: {text}")
                raise everywhere(other)
        return result

    def on_main(self, work: Callable[[], object]) -> None:
        """Work that the main process does while the others wait, such as writing. Raises as `together`."""
        self.together(work if self.is_main else lambda: None)

    @contextmanager
    def held_by_main(self, context: AbstractContextManager[object]) -> Iterator[None]:
        """A context, such as a lock, that the main process holds for all of them. Raises as `together`."""
        with ExitStack() as held:
            self.on_main(lambda: held.enter_context(context))
            yield
            self.on_main(held.close)

    def require_one(self, what: str) -> None:
        """Raises ProcessesError where there are several processes, for work that would write the same files in each."""
        if self.count > 1:
            raise everywhere(
                ProcessesError(
                    f"{what} runs in one process, and {self.count} were started. Start it without accelerate launch; "
                    "several processes work together on train, on evaluate with --data, and on features."
                )
            )

    def require_same(self, value: object, what: str) -> None:
        """Raises ProcessesError where the processes were given different values, such as options."""
        if len(set(self.gathered(repr(value)))) > 1:
            raise everywhere(
                ProcessesError(
                    f"The {self.count} processes of this launch were given different {what}; they work on one thing "
                    "together. Give all of them the same, or start different work without accelerate launch."
                )
            )


@cache
def processes() -> Processes:
    """The processes of this launch; a launcher says in the environment that there are several."""
    if os.environ.get("WORLD_SIZE", "") in ("", "1") or "LOCAL_RANK" not in os.environ:
        return Processes(1, 0)
    state = _state()
    return Processes(state.num_processes, state.process_index)


@cache
def _state() -> Any:
    """Accelerate's own state, with which the processes find each other until they end."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=LONGEST_STANDSTILL)
    if on_cpu:  # Gloo's threads, where they still run, abort the process at its end; NCCL's end would wait for others
        atexit.register(state.destroy_process_group)
    return state


def everywhere(error: Raised) -> Raised:
    """Mark an error that every process raises, so that one of them prints it for all."""
    error.__dict__["raised_everywhere"] = True
    return error


def is_everywhere(error: BaseException | None) -> bool:
    """Whether every process raises this error, or one that it was raised from."""
    return error is not None and (hasattr(error, "raised_everywhere") or is_everywhere(error.__cause__))
