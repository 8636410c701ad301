"""The report of layouts that a person named: what the fastest takes, what else was near, and what it waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from autopar.cluster import ClusterSpec
from autopar.explaining.degrees import degree_table
from autopar.explaining.faster import Faster, priced_again
from autopar.explaining.measured import error_bars
from autopar.explaining.memory_line import memory_line
from autopar.explaining.neighbours import Neighbour, best_of_each_key, memory_worth, neighbour_line, neighbours
from autopar.explaining.page.write import write_page
from autopar.explaining.simulated import simulated_line
from autopar.explaining.spans import TimeLine
from autopar.explaining.stage_memory import stage_memory_rows
from autopar.explaining.text import error_bar_line, faster_line, fitted
from autopar.predicting.predict import Prediction, Predictor
from autopar.simulating.simulate import simulate_layout
from autopar.simulating.simulation import Simulation
from autopar.units import seconds_text

ASSUMPTIONS = (
    "times come from the cluster description alone (its rates, or its measured curves); nothing was measured here",
    "every rank of a stage does the same, at the same speed; stages are as unequal as their blocks make them",
)


@dataclass(frozen=True)
class PredictionReport:
    """Of one or several layouts of a model on a cluster; the first that is fastest and fits is what it is about.

    predictor: that priced them. model: its name, if it has one.
    """

    predictor: Predictor
    predictions: Sequence[Prediction]
    model: str | None = None

    @cached_property
    def best(self) -> Prediction:
        """The fastest that fits; of those that do not fit, the leanest."""
        fitting = [p for p in self.predictions if p.fits]
        if fitting:
            return min(fitting, key=lambda p: p.step_time_s)
        return min(self.predictions, key=lambda p: p.peak_bytes)

    @cached_property
    def neighbours(self) -> tuple[Neighbour, ...]:
        """Every layout that differs from the best in one key, priced with the same trace."""
        return tuple(neighbours(self.predictor, self.best))

    @cached_property
    def faster(self) -> tuple[Faster, ...]:
        """The best layout on clusters with one part 10 % faster."""

        def price_s(cluster: ClusterSpec) -> float:
            other = self.predictor.on(cluster)
            other.forget_prices()
            return other.price(self.best.layout).step_time_s

        return priced_again(self.predictor.cluster, self.best.step_time_s, price_s)

    @cached_property
    def simulation(self) -> Simulation:
        """The best layout's step, event by event."""
        return simulate_layout(self.predictor, self.best.layout)

    @cached_property
    def time_line(self) -> TimeLine:
        """The simulated step. Its length is not quite that of the prediction, which has a closed form."""
        line = simulated_line(self.simulation)
        simulated, predicted = seconds_text(self.simulation.step_time_s), seconds_text(self.best.step_time_s)
        return replace(
            line, note=f"{line.note} It takes {simulated}, by the closed form of the prediction {predicted}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything the page shows."""
        best, predictor = self.best, self.predictor
        cluster = predictor.cluster
        figures = best.to_dict()
        return {
            "kind": "prediction",
            "headline": self.headline(),
            "model": self.model,
            "cluster": cluster.name,
            "device": cluster.device.name,
            "devices": cluster.devices,
            "nodes": cluster.nodes,
            "global_batch": predictor.global_batch,
            "optimizer": predictor.optimizer.name,
            **figures,
            "memory_limit_bytes": predictor.limit_bytes,
            "error_bars": error_bars(cluster, best.step_time_s, best.peak_bytes),
            "degrees": degree_table(best.layout, cluster),
            "time_line": self.time_line.to_dict(),
            "memory_at_peak": stage_memory_rows(self.predictor, best.layout),
            "memory_line": memory_line(self.simulation),
            "next_best": [n.to_dict() for n in best_of_each_key(self.neighbours)],
            "memory": memory_worth(best, self.neighbours, predictor.limit_bytes),
            "faster": [f.to_dict() for f in self.faster],
            "others": [p.to_dict() for p in self.predictions if p is not best],
            "assumptions": list(ASSUMPTIONS),
        }

    def lines(self) -> list[str]:
        """What there is to say beyond the figures: how sure they are, what binds, what else is near."""
        best, predictor = self.best, self.predictor
        return [
            error_bar_line(error_bars(predictor.cluster, best.step_time_s, best.peak_bytes)),
            faster_line(self.faster),
            *map(fitted, memory_worth(best, self.neighbours, predictor.limit_bytes)["lines"]),
            f"one key of {'the' if len(self.predictions) == 1 else 'the best'} layout changed, the best of each",
            *(neighbour_line(n) for n in best_of_each_key(self.neighbours)),
        ]

    def headline(self) -> str:
        """The prediction in a line."""
        cluster, best = self.predictor.cluster, self.best
        return (
            f"prediction for {cluster.devices} x {cluster.device.name}, global batch {self.predictor.global_batch}: "
            f"{seconds_text(best.step_time_s)} a step, {best.tokens_per_s_per_gpu:,.0f} tokens/s per device"
        )

    def to_html(self, path: str | Path) -> None:
        """Write the report as one self-contained page."""
        write_page(path, self.to_dict())
