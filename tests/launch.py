"""Starts a script on several gloo processes and collects what each says and how it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_TORCHRUN = "torch.distributed.run"


@dataclass(frozen=True)
class Ended:
    """How one process ended. seconds: since all were started."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


def torchrun(script: Path, processes: int, *args: str, timeout_s: float = 300) -> Ended:
    """Run `script` under torchrun; the output of all ranks together."""
    command = [sys.executable, "-m", _TORCHRUN, "--standalone", f"--nproc-per-node={processes}", str(script), *args]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=_ROOT, env=_environment({}), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


def ranks(script: Path, processes: int, *args: str, out: Path, timeout_s: float = 120) -> list[Ended]:
    """Run `script` as ranks of one job without an agent that would end the others when one dies.

    out: a folder for the output files. A process that outlives the timeout is killed, and its code is negative.
    """
    port = _free_port()
    running, files = [], []
    began = time.monotonic()
    for rank in range(processes):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        files.append([(out / f"{rank}.{name}").open("w+") for name in ("out", "err")])
        running.append(
            subprocess.Popen(
                [sys.executable, str(script), *args],
                cwd=_ROOT, env=_environment({**env, **place}), stdout=files[-1][0], stderr=files[-1][1],
            )
        )  # fmt: skip
    return _collect(running, files, began, timeout_s)


def _collect(
    running: Sequence[subprocess.Popen[bytes]], files: Sequence[Any], began: float, timeout_s: float
) -> list[Ended]:
    seconds: dict[int, float] = {}
    while len(seconds) < len(running) and time.monotonic() - began < timeout_s:
        for rank, process in enumerate(running):
            if rank not in seconds and process.poll() is not None:
                seconds[rank] = time.monotonic() - began
        time.sleep(0.1)
    ended = []
    for rank, process in enumerate(running):
        if process.poll() is None:
            process.kill()
        process.wait()
        texts = []
        for file in files[rank]:
            file.seek(0)
            texts.append(file.read())
            file.close()
        ended.append(Ended(process.returncode, texts[0], texts[1], seconds.get(rank, timeout_s)))
    return ended


def _environment(extra: Mapping[str, Any]) -> dict[str, str]:
    """This environment for one more test process: one thread, the repository importable, no rank of its own."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in launched}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(_ROOT), env.get("PYTHONPATH", "")])}
    return env | {k: str(v) for k, v in extra.items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
