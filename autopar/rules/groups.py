"""Rules of rows in groups: what experts work on, cut by tokens ("L") or by experts ("E").

What can be cut anywhere along its rows can be cut by what the rows are: any rule that runs
an op on equal parts ("S") of rows holds for these. Beside them: a rank that sorts its own
tokens has its own order, and counts its own share of the groups ("P"); moves to and from
the groups exchange rows where tokens and experts are cut by one axis.
"""

from __future__ import annotations

from collections.abc import Iterable

from autopar.placements import PARTIAL, REPLICATE, Placement, experts, own, shard, shard_dim
from autopar.rules.schema import OpCall
from autopar.rules.types import AxisRule, InnerCollective

# Ops that make as many rows as an argument says.
_SIZED = ("full", "zeros", "ones", "empty", "new_", "arange", "expand", "_like")


def to_groups(call: OpCall) -> list[AxisRule]:
    """(x, source, ends): from tokens to groups.

    A rank's tokens to a rank's groups is an exchange; where every rank has all tokens it takes its groups' rows; where
    no groups are cut it keeps its own. Any columns; any equal part of the rows that are taken.
    """
    moved = (InnerCollective("all_to_all", ("out", 0)),)
    rules = [
        _move(shard(0), own(0), PARTIAL, own(0), "to_groups"),
        _move(shard(0), own(0), PARTIAL, experts(0), "to_groups", moved),
        _move(REPLICATE, REPLICATE, REPLICATE, experts(0), "to_groups"),
        _move(REPLICATE, shard(0), REPLICATE, shard(0), "to_groups"),
    ]
    if call.out.is_floating_point():
        rules.append(_move(PARTIAL, REPLICATE, REPLICATE, PARTIAL, "to_groups"))
    columns = [shard(d) for d in range(1, call.out.dim())]
    return rules + [_move(c, REPLICATE, REPLICATE, c, "to_groups") for c in columns]


def from_groups(call: OpCall) -> list[AxisRule]:
    """(rows, target, ends): back, the other way round."""
    moved = (InnerCollective("all_to_all", ("in", 0)),)
    rules = [
        _move(own(0), own(0), PARTIAL, shard(0), "from_groups"),
        _move(experts(0), own(0), PARTIAL, shard(0), "from_groups", moved),
        _move(experts(0), REPLICATE, REPLICATE, PARTIAL, "from_groups"),
        _move(shard(0), shard(0), REPLICATE, PARTIAL, "from_groups"),
    ]
    if call.out.is_floating_point():
        rules.append(_move(PARTIAL, REPLICATE, REPLICATE, PARTIAL, "from_groups"))
    columns = [shard(d) for d in range(1, call.out.dim())]
    return rules + [_move(c, REPLICATE, REPLICATE, c, "from_groups") for c in columns]


def _move(
    rows: Placement,
    index: Placement,
    ends: Placement,
    made: Placement,
    lowering: str,
    moved: tuple[InnerCollective, ...] = (),
) -> AxisRule:
    return AxisRule((rows, index, ends), (made,), lowering, moved)


def grouped_rules(call: OpCall, known: Iterable[AxisRule]) -> list[AxisRule]:
    """What holds for rows in groups beside the rules that are known of an op on equal parts."""
    special = _SPECIAL.get(call.name)
    found = special(call) if special else []
    stem = call.name.removeprefix("aten.")
    if not any(part in stem for part in _SIZED):
        for rule in known:
            found += [_renamed(rule, letter) for letter in "LE" if _by_rows(rule, call)]
    return found


def _by_rows(rule: AxisRule, call: OpCall) -> bool:
    """Whether a rule cuts the same rows everywhere, and runs the op itself on them."""
    pairs = [*zip(call.inputs, rule.inputs, strict=True), *zip(call.outputs, rule.outputs, strict=True)]
    cut = [t.shape[shard_dim(p) or 0] for t, p in pairs if t is not None and p is not None and p[0] == "S"]
    taken = any(p[0] == "S" for p in rule.inputs) and shard(0) in (*rule.inputs, *rule.outputs)
    return rule.lowering == "local" and taken and len(set(cut)) == 1 and PARTIAL not in rule.inputs


def _renamed(rule: AxisRule, letter: str) -> AxisRule:
    def name(placement: Placement | None) -> Placement | None:
        return letter + placement[1:] if placement and placement[0] == "S" else placement

    return AxisRule(tuple(name(p) or REPLICATE for p in rule.inputs), tuple(map(name, rule.outputs)))


def _sort(call: OpCall) -> list[AxisRule]:
    """A rank sorts its own tokens' pairs."""
    if call.inputs[0].dim() != 1:
        return []
    return [AxisRule((shard(0),), (own(0), own(0)))]


def _running_sum(call: OpCall) -> list[AxisRule]:
    """Ends of a rank's own part of each group, from its counts: together they are the ends of all."""
    return [AxisRule((PARTIAL,), (PARTIAL,))]


def _product(call: OpCall) -> list[AxisRule]:
    """A rank multiplies its own rows by all matrices, or its groups' rows by its groups' matrices."""
    left, right = call.inputs[:2]
    if call.tensor("bias") is not None or call.tensor("offs") is None:
        return []
    if left.dim() == 2 and right.dim() == 3:
        own_rows, own_groups = (own(0), REPLICATE), (experts(0), shard(0))
        made = (own(0), experts(0))
    elif left.dim() == right.dim() == 2:
        own_rows, own_groups = (own(1), own(0)), (experts(1), experts(0))
        made = (PARTIAL, shard(0))
    else:
        return []
    return [
        AxisRule((*own_rows, PARTIAL), (made[0],)),
        AxisRule((*own_groups, PARTIAL), (made[1],), "expert_rows"),
        AxisRule((*own_groups, REPLICATE), (made[1],), "expert_rows"),
    ]


def _product_backward(call: OpCall) -> list[AxisRule]:
    """(input, weight, offs, grad_output) -> gradients of input and weight."""
    rows = experts(0)
    return [
        AxisRule((own(0), REPLICATE, PARTIAL, own(0)), (own(0), PARTIAL)),
        AxisRule((rows, shard(0), PARTIAL, rows), (rows, shard(0)), "expert_rows"),
        AxisRule((rows, shard(0), REPLICATE, rows), (rows, shard(0)), "expert_rows"),
    ]


_SPECIAL = {
    "aten.sort": _sort,
    "aten.cumsum": _running_sum,
    "aten._grouped_mm": _product,
    "transformers.grouped_mm_fallback": _product,
    "transformers.grouped_mm_fallback_backward": _product_backward,
}

GROUPS = {"autopar.to_groups": to_groups, "autopar.from_groups": from_groups}
