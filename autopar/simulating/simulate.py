"""`autopar.simulate`: one training step of a layout, event by event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from autopar.cluster import ClusterSpec
from autopar.errors import LayoutError
from autopar.layouts import Layout, parse_layout
from autopar.predicting.predict import Predictor
from autopar.simulating.pricing import step_cost
from autopar.simulating.simulation import Simulation, simulate_cost


def simulate(
    model: nn.Module,
    cluster: ClusterSpec,
    layout: str | Mapping[str, Any] | Layout,
    *,
    global_batch: int,
    **options: Any,
) -> Simulation:
    """Simulate one training step of a layout that a person names.

    options: those of `autopar.predict`. Raises LayoutError and TraceError as it does.
    """
    return simulate_layout(Predictor(model, cluster, global_batch=global_batch, **options), layout)


def simulate_layout(predictor: Predictor, layout: str | Mapping[str, Any] | Layout) -> Simulation:
    """The same of a model that was traced before; LayoutError where the layout cannot be."""
    found = parse_layout(layout, predictor.cluster.devices)
    predictor.check(found)
    if found.shapes is not None:
        raise LayoutError("layout: stages of different shape are priced, not simulated; give one degree for all stages")
    return simulate_cost(step_cost(predictor, found))
