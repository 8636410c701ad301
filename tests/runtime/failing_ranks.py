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
    """Trains on a mesh of two axes; one rank, which one of the others never talks to directly, is killed."""
    model, (args, kwargs) = tiny_mlp()
    program = autopar.compile(model, autopar.ClusterSpec.local(), pin={"dp": 2, "tp": 2})
    optimizer = torch.optim.SGD(program.parameters(), lr=1e-3)
    for number in range(STEPS):
        program.train_step(*args, **kwargs)
        optimizer.step()
        optimizer.zero_grad()
        if number == 2 and int(os.environ["RANK"]) == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)


def planning() -> None:
    """Only rank 0 plans: first it finds nothing that fits, then it ends with an error that is none of autopar's."""
    import autopar.api

    model, (args, kwargs) = tiny_mlp()
    try:
        autopar.compile(model, autopar.ClusterSpec.local(), memory_limit_bytes=1000)(*args, **kwargs)
    except AutoparError as error:
        say(error)

    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("a bug")

    autopar.api._plan_trace = broken  # type: ignore[assignment]
    autopar.compile(model, autopar.ClusterSpec.local())(*args, **kwargs)


def say(error: AutoparError) -> None:
    """One line for the test to read."""
    sys.stdout.write(f"{type(error).__name__}: {error}\n")


def main() -> None:
    """Run a scenario; an AutoparError is printed as "Name: message" and gives exit code 3."""
    torch.set_num_threads(1)
    scenario = {"dies": dies, "planning": planning}[sys.argv[1]]
    try:
        scenario(*(int(a) for a in sys.argv[2:]))
    except AutoparError as error:
        say(error)
        sys.exit(3)


if __name__ == "__main__":
    main()
