"""Several processes of one launch: a command or this file's training run under `accelerate launch`, on the CPU.

python launched.py FOLDER OPTIONS trains a random pair and adapters in float64 into a new folder, or resumes that run.
With the option stop_at, the last of the processes gets a signal after that step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LAUNCH = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
"""On a machine without a GPU, accelerate's --multi_gpu starts processes on the CPU; its --cpu starts a single one."""


def started(n: int, words: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """A Python command in n processes of one launch, which find each other at a free port; n = 1 is no launch."""
    head = [sys.executable]
    if n > 1:
        ports = ["--num_processes", str(n), "--main_process_port", "0"]
        head += ["-m", "accelerate.commands.launch", *LAUNCH, *ports]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [*head, *words], env={**os.environ, "PYTHONPATH": paths, **own}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], seconds: float = 180) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of what was started; it is killed after so many seconds."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"it did not end in {seconds} s:\n{err[-3000:]}") from None
    return process.returncode, out, err


def trained(n: int, folder: Path, **options: Any) -> None:
    """Train the run of this file in n processes, or resume it, to its end or to the step ``stop_at``."""
    code, out, err = ended(started(n, [__file__, str(folder), json.dumps(options)]))
    assert code == 0, err[-3000:]


def main(folder: Path, options: dict[str, Any]) -> None:
    import torch
    from helpers.random_models import random_model

    from tl_adapters.config import LocalConfig, TrainingConfig
    from tl_adapters.data.traces import Trace
    from tl_adapters.models.paired_model import PairedModel
    from tl_adapters.training.trainer import Trainer, TrainingInterrupted

    generator = torch.Generator().manual_seed(0)
    traces = [Trace(tuple(torch.randint(1, 61, (6 + i % 9,), generator=generator).tolist()), 2) for i in range(60)]
    stop_at = options.pop("stop_at", None)
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
        if step == stop_at and os.environ.get("RANK", "0") == str(last):
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        trainer.run(on_step=on_step, on_local_step=on_step)
    except TrainingInterrupted:
        assert stop_at is not None


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
