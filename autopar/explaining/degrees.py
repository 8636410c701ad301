"""Which ranks do what: the degrees of a layout, or the axes of a mesh, and the links that each spans."""

from __future__ import annotations

from typing import Any

from autopar.cluster import ClusterSpec
from autopar.cost.axes import MeshAxis, axis_crossings, axis_span, mesh_axes
from autopar.layouts import Layout
from autopar.plans import Plan

_DOES = {
    "tp": "cuts matrix products and heads",
    "cp": "cuts the sequence",
    "dp": "cuts the batch",
    "pp": "cuts the layers into stages",
}
_ROLES = {
    "dp": "cuts the batch; weights are used whole",
    "cp": "cuts the sequences; weights are used whole",
    "tp": "cuts matrix products; weights are used in parts",
    "none": "cuts no matrix product",
}


def degree_table(layout: Layout, cluster: ClusterSpec) -> list[dict[str, Any]]:
    """A row for each degree above 1, innermost first, as ranks are numbered: tp, cp, dp, pp."""
    found, apart = [], 1
    for key in ("tp", "cp", "dp", "pp"):
        size = getattr(layout, key)
        if size > 1:
            found.append(_row(key, MeshAxis(size, apart), cluster, _DOES[key]))
        apart *= size
    return found


def axis_table(plan: Plan) -> list[dict[str, Any]]:
    """A row for each axis of a plan's mesh, outermost first."""
    axes = mesh_axes(plan.cluster, plan.mesh)
    return [
        _row(f"axis {i}", axis, plan.cluster, _ROLES[role])
        for i, (axis, role) in enumerate(zip(axes, plan.roles, strict=True))
    ]


def _row(name: str, axis: MeshAxis, cluster: ClusterSpec, does: str) -> dict[str, Any]:
    """apart: the distance of neighbours in rank numbers. nodes: that a group touches. links: that it crosses."""
    crossed = axis_crossings(axis, cluster)
    return {
        "name": name,
        "size": axis.size,
        "apart": axis.stride,
        "nodes": axis_span(axis, cluster).nodes,
        "links": [cluster.links[crossing.level].name for crossing in crossed],
        "does": does,
    }
