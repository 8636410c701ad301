"""One rank of tests/runtime/test_failures.py: `failing_ranks.py SCENARIO [RANK]`. Prints the error it ends with."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

import autopar
from autopar.errors import AutoparError
from tests.models import tiny_mlp

STEPS = 400  # far more than are reached


def dies(victim: int) -> None:
    """Trains; one rank is killed after three steps."""
    model, (args, kwargs) = tiny_mlp()
    program = autopar.compile(model, autopar.ClusterSpec.local(), pin={"zero": 3, "dp": int(os.environ["WORLD_SIZE"])})
    optimizer = torch.optim.SGD(program.parameters(), lr=1e-3)
    for number in range(STEPS):
        program.train_step(*args, **kwargs)
        optimizer.step()
        optimizer.zero_grad()
        if number == 2 and int(os.environ["RANK"]) == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)


def infeasible() -> None:
    """Planning fails, and only rank 0 plans."""
    model, (args, kwargs) = tiny_mlp()
    program = autopar.compile(model, autopar.ClusterSpec.local(), memory_limit_bytes=1000)
    program(*args, **kwargs)


def crashes() -> None:
    """Planning on rank 0 ends with an error that is none of autopar's."""
    import autopar.api

    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("a bug")

    autopar.api._plan_trace = broken  # type: ignore[assignment]
    model, (args, kwargs) = tiny_mlp()
    autopar.compile(model, autopar.ClusterSpec.local())(*args, **kwargs)


def main() -> None:
    """Run a scenario; an AutoparError is printed as "Name: message" and gives exit code 3."""
    torch.set_num_threads(1)
    scenario = {"dies": dies, "infeasible": infeasible, "crashes": crashes}[sys.argv[1]]
    try:
        scenario(*(int(a) for a in sys.argv[2:]))
    except AutoparError as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\n")
        sys.stdout.flush()
        os._exit(3)  # no waiting for ranks that are gone


if __name__ == "__main__":
    main()
