"""Several processes of one launch: a command or this file's training run under `accelerate launch`, on the CPU.

python launched.py FOLDER OPTIONS trains a random pair and adapters in float64 into a new folder, or resumes that run.
With the option stop_at, the last of the processes gets a signal after that step, with kill_at it is killed, and with
refuse_at the first one finds the disk full. python launched.py COMMANDS runs commands of the command line one after
another, and prints their exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
LAUNCH = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
"""On a machine without a GPU, accelerate's --multi_gpu starts processes on the CPU; its --cpu starts a single one."""
CODES = "exit-codes-of-process"
"""What begins the line of exit codes."""


def started(n: int, words: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """A Python command in n processes of one launch, which find each other at a free port; n = 1 is no launch."""
    head = [sys.executable]
    if n > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        head += ["-m", "accelerate.commands.launch", *LAUNCH, "--num_processes", str(n), "--main_process_port", port]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [*head, *words], env={**os.environ, "PYTHONPATH": paths, **own}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], seconds: float = 180) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of what was started; all of it is killed after so many seconds."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        launcher = psutil.Process(process.pid)
        # Processes of a launch have sessions of their own: they outlive their launcher, and would wait for each other.
        for one in (*launcher.children(recursive=True), launcher):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        out, err = process.communicate(timeout=30)
        raise AssertionError(f"it did not end in {seconds} s:\n{err[-3000:]}") from None
    return process.returncode, out, err


def trained(n: int, folder: Path, **options: Any) -> None:
    """Train the run of this file in n processes, or resume it, to its end or to the step ``stop_at``."""
    code, out, err = ended(started(n, [__file__, str(folder), json.dumps(options)]))
    assert code == 0, err[-3000:]


def exit_codes(n: int, *commands: Sequence[str]) -> tuple[list[list[int]], str, str]:
    """Exit codes of commands by process, which run one after another, and what all processes printed."""
    code, out, err = ended(started(n, [__file__, json.dumps(commands)]))
    assert code == 0, err[-3000:]
    found = {line.split()[1]: json.loads(line.split(maxsplit=2)[2]) for line in out.splitlines() if CODES in line}
    return [found[rank] for rank in sorted(found)], "\n".join(x for x in out.splitlines() if CODES not in x), err


def run_commands(commands: Sequence[Sequence[str]]) -> None:
    from tl_adapters.cli.main import main

    codes = [main(words) for words in commands]
    print(f"{CODES} {os.environ.get('RANK', '0')} {codes}\n", end="", flush=True)  # one write, as others print too


def main(folder: Path, options: dict[str, Any]) -> None:
    import torch
    from helpers.random_models import random_model

    from tl_adapters.config import LocalConfig, TrainingConfig
    from tl_adapters.data.traces import Trace
    from tl_adapters.models.paired_model import PairedModel
    from tl_adapters.training import run_folder
    from tl_adapters.training.trainer import Trainer, TrainingInterrupted
    from tl_adapters.utils.files import DiskFullError

    generator = torch.Generator().manual_seed(0)
    traces = [Trace(tuple(torch.randint(1, 61, (6 + i % 9,), generator=generator).tolist()), 2) for i in range(60)]
    faults = {name: options.pop(name, None) for name in ("stop_at", "kill_at", "refuse_at")}
    pair = PairedModel.from_pretrained(random_model(1), random_model(2))
    if folder.exists():
        trainer = Trainer.resume(pair, traces[10:], folder, validation=traces[:10], progress=False)
    else:
        local = LocalConfig(**options.pop("local", {}))
        config = TrainingConfig(**options, local=local)
        trainer = Trainer(pair, traces[10:], config, folder, validation=traces[:10], progress=False)
    if "local" not in trainer.config.stages:  # which trains in float32
        trainer.adapters.to(torch.float64)

    def on_step(step: int, terms: Any) -> None:
        last = int(os.environ.get("WORLD_SIZE", "1")) - 1
        if step == faults.get("refuse_at"):
            run_folder.append_text = refuse
        if os.environ.get("RANK", "0") == str(last):
            for name, number in (("stop_at", signal.SIGTERM), ("kill_at", signal.SIGKILL)):
                if step == faults.get(name):
                    os.kill(os.getpid(), number)

    def refuse(*_: object) -> None:
        raise DiskFullError("the disk is full")

    try:
        trainer.run(on_step=on_step, on_local_step=on_step)
    except TrainingInterrupted as stopped:
        print(stopped)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        run_commands(json.loads(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
