"""A plan whose stages are laid out by degrees: pipeline, context, data and tensor ranks, rather than op by op.

It says what every rank holds and when it does what; what it takes was predicted from the same trace (`predicting/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from autopar.errors import AutoparError, PlanError
from autopar.json_reader import Reader
from autopar.layouts import Layout, parse_layout
from autopar.plans import Plan
from autopar.stage_shapes import common_mesh

if TYPE_CHECKING:
    from autopar.choosing.report import LayoutReport
    from autopar.predicting.predict import Predictor

ROLES = ("dp", "cp", "ep", "tp")  # of the axes of a stage; without expert ranks there is no axis for them
TO_RUN = "autopar.compile(model, cluster, plan=plan) under torchrun, then program.train_step(**batch) on every rank"


def stage_axes(layout: Layout) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The mesh of one stage and what its axes are for. Expert ranks are the context ranks, or some of the data ranks.

    Where they are some of both, no mesh has axes for both: they are left out. Where stages differ in shape it is
    one mesh for all of them, and an axis has as many roles, "dp/tp".
    """
    if layout.shapes is not None:
        sizes, roles = common_mesh(layout.shapes)
        return sizes, tuple("/".join(of_axis) for of_axis in zip(*roles, strict=True))
    if layout.ep == 1 or experts_on_context(layout) or layout.dp % layout.ep:
        return (layout.dp, layout.cp, layout.tp), tuple(role for role in ROLES if role != "ep")
    return (layout.dp // layout.ep, layout.cp, layout.ep, layout.tp), ROLES


def experts_on_context(layout: Layout) -> bool:
    """Whether the ranks that share a sequence are those that share the experts."""
    return layout.ep > 1 and layout.ep == layout.cp


@dataclass(frozen=True)
class OtherLayout:
    """A layout that was not chosen, as the search priced it."""

    layout: Mapping[str, Any]
    step_time_s: float
    peak_bytes: int


@dataclass(frozen=True)
class StagedPlan(Plan):
    """A plan by degrees. The mesh is that of one stage, see `stage_axes`.

    blocks: repeated layers that each pipeline rank holds. others: the best layouts on other degrees, fastest first.
    counts: how many sets of degrees there are, how many could not be ruled out by their bound, and how many layouts
        were priced in these.
    predictor: what it takes to choose again, while the trace is at hand; not saved.
    """

    blocks: tuple[int, ...] = ()
    others: tuple[OtherLayout, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    predictor: Predictor | None = field(default=None, compare=False, repr=False)

    @property
    def named(self) -> Layout:
        """The layout."""
        return Layout(**self.layout_keys)

    @property
    def not_yet(self) -> str:
        """What of the plan no program can do yet; "" where one can be made."""
        layout = self.named
        if layout.ep > 1 and not experts_on_context(layout) and layout.dp % layout.ep:
            return (
                f"a plan whose expert ranks are some of its context and some of its data ranks (ep={layout.ep}, "
                f"cp={layout.cp}, dp={layout.dp}) cannot be run yet, only priced; pin ep={layout.cp}, a divisor of "
                "dp, or 1"
            )
        if layout.devices != self.cluster.devices:
            return (
                f"the plan uses {layout.devices} of {self.cluster.devices} devices, and ranks without work cannot be "
                f"run yet; plan for a cluster of {layout.devices} devices"
            )
        return ""

    @property
    def micro_batches(self) -> int:
        """That each data rank runs in a step."""
        return self.named.micro_batches(self.options.global_batch)

    def explain(  # type: ignore[override]
        self,
        model: nn.Module | None = None,
        *,
        example_inputs: Any = None,
        time_limit_s: float | None = None,
    ) -> LayoutReport:
        """Why this plan; arguments as of `Plan.explain`."""
        from autopar.choosing.report import DEFAULT_REPORT_S, LayoutReport

        predictor = self.predictor
        if model is not None:  # upwards: only what made the plan can make it again
            predictor = import_module("autopar.choosing.plan").reopen(self, model, example_inputs)
        return LayoutReport(self, predictor, DEFAULT_REPORT_S if time_limit_s is None else time_limit_s)

    def staged_data(self) -> dict[str, Any]:
        """What its file holds beside the fields of every plan."""
        return {
            "blocks": list(self.blocks),
            "others": [{**o.__dict__, "layout": dict(o.layout)} for o in self.others],
            "counts": dict(self.counts),
        }


def staged(plan: Plan, reader: Reader) -> StagedPlan:
    """A plan with what its file says of stages; PlanError where that cannot be."""
    layout = _layout(plan.layout_keys, reader)
    sizes, roles = stage_axes(layout)
    reader.check("blocks", len(reader.ints("blocks")) == layout.pp, f"expected one count for each of {layout.pp} ranks")
    reader.check("blocks", all(n >= 0 for n in reader.ints("blocks")), "counts must not be negative")
    layout.micro_batches(plan.options.global_batch)
    if plan.mesh != sizes or plan.roles != roles or layout.devices > plan.cluster.devices:
        raise PlanError(f"{reader.where}: the mesh {plan.mesh} is not that of the layout {layout}")
    counts = reader.get("counts", dict)
    reader.check("counts", all(isinstance(v, int) for v in counts.values()), "expected whole numbers")
    return StagedPlan(
        **{name: getattr(plan, name) for name in plan.__dataclass_fields__},
        blocks=reader.ints("blocks"),
        others=tuple(_other(r) for r in reader.subs("others")),
        counts=counts,
    )


def _other(reader: Reader) -> OtherLayout:
    keys = reader.get("layout", dict)
    _layout(keys, reader)
    return OtherLayout(keys, reader.number("step_time_s"), reader.get("peak_bytes", int))


def _layout(keys: Mapping[str, Any], reader: Reader) -> Layout:
    try:
        given = {k: v for k, v in keys.items() if v is not None or k == "grad_dtype"}
        return parse_layout(given, Layout(**given).devices)
    except (AutoparError, TypeError) as error:
        raise PlanError(f"{reader.where}: not a layout ({error})") from None
