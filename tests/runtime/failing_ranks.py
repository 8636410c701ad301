"""One rank of tests/runtime/test_failures.py: `failing_ranks.py SCENARIO [RANK]`. Prints the error it ends with."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import autopar
from autopar.errors import AutoparError
from autopar.runtime.failure import naming_dead_ranks
from autopar.runtime.rank_pipeline import Place, RankPipeline
from autopar.runtime.world import join_world
from autopar.simulating.schedules import schedule_orders
from tests.models import tiny_llama, tiny_mlp
from tests.runtime.chain import ROWS, WIDTH, chain

STEPS = 400  # far more than are reached
CHAIN = 3  # stages, one a rank


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


def stage_dies(victim: int) -> None:
    """A pipeline of three stages written by hand, of which one is killed between two steps."""
    join_world(CHAIN, "cpu")
    place = Place(dist.group.WORLD, (), (), torch.device("cpu"))  # type: ignore[arg-type]
    program = chain(CHAIN)
    pipeline = RankPipeline(program, schedule_orders("1f1b", CHAIN, 4), {n: n for n in program.owners}, place)
    mine = {n: torch.ones(WIDTH, dtype=torch.float64) for n in program.owners if pipeline.owns(n)}
    one = torch.ones((), dtype=torch.float64)
    batches = [{"x": torch.ones(ROWS, WIDTH, dtype=torch.float64), "t": one}] * 4
    for number in range(STEPS):
        with naming_dead_ranks(place):
            pipeline.step(mine, batches)
            pipeline.results("loss", one)
        if number == 2 and place.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)


def program_stage_dies(victim: int) -> None:
    """The same through the public face."""
    model, (args, kwargs) = tiny_llama(layers=4)
    program = autopar.compile(model, autopar.ClusterSpec.local(), pin={"pp": 2, "micro_batch": 2})
    for number in range(STEPS):
        program.train_step(*args, **kwargs)
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


SCENARIOS = {"dies": dies, "stage": stage_dies, "program stage": program_stage_dies, "planning": planning}


def main() -> None:
    """Run a scenario; an AutoparError is printed as "Name: message" and gives exit code 3."""
    torch.set_num_threads(1)
    scenario = SCENARIOS[sys.argv[1]]
    try:
        scenario(*(int(a) for a in sys.argv[2:]))
    except AutoparError as error:
        say(error)
        sys.exit(3)


if __name__ == "__main__":
    main()
