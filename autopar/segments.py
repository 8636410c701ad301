"""When a forward op may run again in the backward pass.

The forward pass is cut into segments. A segment's ops run again, if the solver wants,
right before the first backward op of the same block that needs any value of the segment; values
that other blocks need before that are kept. Segments are the repeated blocks
of the model (by module path, e.g. "model.layers.3"); a model without such blocks is cut
into about sqrt(n) runs of consecutive ops (Chen et al. 2016, "Training Deep Nets with
Sublinear Memory Cost").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container

from torch import fx

from autopar._torch_compat import OpOverload
from autopar.dataflow import Dataflow, is_backward, module_path, result_metas, value_name
from autopar.rules import is_random, may_be_random
from autopar.rules.schema import op_call

_MIN_BLOCK_OPS = 6


def block_of(path: str) -> str:
    """The repeated block a module path lies in: up to its first number ("model.layers.3.mlp" -> "model.layers.3")."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ""


def segments(flow: Dataflow) -> list[list[fx.Node]]:
    """The forward ops in consecutive runs."""
    forward = [n for n in flow.ops if not is_backward(n)]
    runs: list[list[fx.Node]] = []
    last: str | None = None
    for node in forward:
        block = block_of(module_path(node))
        if not runs or block != last:
            runs.append([])
        runs[-1].append(node)
        last = block
    if runs and max(len(run) for run in runs) >= _MIN_BLOCK_OPS:
        return runs
    size = max(1, math.ceil(math.sqrt(len(forward))))
    return [forward[i : i + size] for i in range(0, len(forward), size)]


def is_deterministic(node: fx.Node) -> bool:
    """Whether running a node twice gives the same result."""
    return isinstance(node.target, OpOverload) and not (may_be_random(node.target) and is_random(op_call(node)))


def recompute_times(
    flow: Dataflow,
    op_index: dict[str, int],
    pinned: Callable[[fx.Node], str | None] | None = None,
    updated: Container[str] = (),
) -> dict[str, int]:
    """For each op that may run twice, the op index before which it would run again.

    updated: buffers that the step gives a new value (as batch norm does): by the backward pass the old one is gone,
    so nothing that reads them may run again.
    """
    times: dict[str, int] = {}
    for segment in segments(flow):
        needed_at = _first_need(flow, segment, op_index)
        if needed_at is None:
            continue
        for node in segment:
            wanted = pinned(node) if pinned else None
            stale = any(operand.value in updated for operand in flow.operands_of[node])
            if is_deterministic(node) and not stale and wanted not in ("keep", "offload"):
                times[node.name] = needed_at
    return times


def _first_need(flow: Dataflow, segment: list[fx.Node], op_index: dict[str, int]) -> int | None:
    """The first backward op of the segment's own block that needs one of its values; of any block if there is none.

    A value that other blocks share (an attention mask, a skip connection, the residual stream) is kept for them: it
    must not make the whole block run again while others are in their backward pass.
    """
    uses = [
        use.user
        for node in segment
        for index in range(len(result_metas(node)))
        for use in flow.uses.get(value_name(node, index), ())
        if is_backward(use.user)
    ]
    block = block_of(module_path(segment[0]))
    own = [user for user in uses if block and block_of(module_path(user)) == block]
    return min((op_index[user.name] for user in own or uses), default=None)


def must_rerun(flow: Dataflow, times: dict[str, int], pinned: Callable[[fx.Node], str | None]) -> set[str]:
    """Of the ops in `times`, those that are pinned to run again and whose results the backward pass wants.

    It wants them for a backward op, or for another op of the same segment that runs again.
    """
    found: set[str] = set()
    for node in reversed(flow.ops):
        if node.name not in times or pinned(node) != "recompute":
            continue
        users = [u.user for i in range(len(result_metas(node))) for u in flow.uses.get(value_name(node, i), ())]
        again = (u for u in users if u.name in found and times[u.name] == times[node.name])
        if any(is_backward(u) for u in users) or any(again):
            found.add(node.name)
    return found
