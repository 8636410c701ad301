"""A hundred small problems with pipelines, recomputation and the optimizer's state on the host: search and enumeration.

Each is a chain of six blocks, cut into stages on a few devices, with some of its degrees pinned and a memory limit
between what the leanest layout needs and what the fastest one wants.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from autopar.errors import Infeasible
from tests.choosing.test_search import choose, everything, predictor

CASES, STEP = 100, 10


def case(seed: int) -> tuple[int, int, dict[str, Any]]:
    """(devices, batch, pins): some pipeline in most of them."""
    rng = random.Random(seed)
    gpus, batch = rng.choice((2, 3, 4, 6)), rng.choice((4, 6, 12))
    pin: dict[str, Any] = {"cp": 1, "micro_batch": rng.choice((1, 2)), "offload": rng.choice(("none", "optimizer"))}
    if rng.random() < 0.5:
        pin["tp"] = rng.choice((1, 2)) if gpus % 2 == 0 else 1
    if rng.random() < 0.3:
        pin["zero"] = rng.choice((0, 1))
    if rng.random() < 0.3:
        pin["pp"] = 2
    return gpus, batch, pin


@pytest.mark.parametrize("first", range(0, CASES, STEP))
def test_equals_brute_force(first: int) -> None:
    pipelines = fitting = 0
    for seed in range(first, first + STEP):
        gpus, batch, pin = case(seed)
        of = predictor(gpus, batch=batch)
        prices = [part.price(layout) for part, layout in everything(of, **pin)]
        if not prices:
            continue
        least, most = min(p.peak_bytes for p in prices), min(prices, key=lambda p: p.step_time_s).peak_bytes
        rng = random.Random(seed)
        for limit in (least - 2, rng.randint(least + 2, max(least, most) + 4)):
            of.limit_bytes = limit
            fits = [p.step_time_s for p in prices if p.peak_bytes <= limit]
            if not fits:
                with pytest.raises(Infeasible):
                    choose(of, **pin)
                continue
            found = choose(of, **pin)
            assert found.best.step_time_s == pytest.approx(min(fits), rel=1e-12), (seed, limit)
            assert found.gap == 0
            fitting, pipelines = fitting + 1, pipelines + (found.best.layout.pp > 1)
    assert fitting > 3 and pipelines
