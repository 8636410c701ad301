"""Which pipeline stage every op of a joint graph belongs to.

A model says where it may be cut by its repeated blocks, or a person by module paths. What lies in no block goes where
the data flow wants it: an embedding to the stage that first needs it, norm, head and loss behind the last block. Data
flows to later stages in the forward pass and to earlier ones in the backward pass: an op whose operands come from
beyond its stage moves there. What depends on inputs alone (masks, positions, rotary tables) belongs to no stage: each
stage computes what it needs of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import fx

from autopar._torch_compat import OpOverload
from autopar.blocks import BlockIndex, traced_blocks
from autopar.dataflow import is_backward, is_view_node, module_path
from autopar.errors import LayoutError
from autopar.rules import is_random, may_be_random
from autopar.rules.schema import op_call
from autopar.trace import Trace

_COPIES = frozenset({"aten._to_copy", "aten.clone", "prims.convert_element_type"})


@dataclass(frozen=True)
class StageNodes:
    """The stage of every node of a joint graph.

    count: how many stages there are. of: by node name; None for what every stage computes that needs it (and for
        placeholders). modules: the stages of the forward ops in each module, by path.
    """

    count: int
    of: Mapping[str, int | None]
    modules: Mapping[str, AbstractSet[int]]

    def of_module(self, path: str, default: int) -> int:
        """The first stage in which a module runs."""
        return min(self.modules.get(path, ()), default=default)


def stages_by_blocks(trace: Trace, blocks: Sequence[int], names: Sequence[str] | None = None) -> StageNodes:
    """Stages of so many blocks each, first to last; LayoutError if the model has not as many.

    names: the module paths of all blocks, first to last; those that the trace shows if not given.
    """
    names = traced_blocks(trace) if names is None else names
    if sum(blocks) != len(names) or min(blocks, default=0) < 0 or not blocks:
        listed = f" ({names[0]} to {names[-1]})" if names else ""
        raise LayoutError(
            f"stages of {', '.join(map(str, blocks)) or 'no'} blocks don't add up to the model's {len(names)}{listed}; "
            "give stages whose blocks do, or cut by module paths"
        )
    ends = [stage for stage, count in enumerate(blocks) for _ in range(count)]
    index = BlockIndex(names)
    number = {n.name: index.of(module_path(n)) for n in _ops(trace)}
    wanted = {name: None if at is None else ends[at] for name, at in number.items()}
    outer = {0: 0, len(names) - 1: len(blocks) - 1}
    beside = {name: outer[at] for name, at in number.items() if at in outer}
    return stages_near(trace, wanted, len(blocks), beside)


def stages_by_cuts(trace: Trace, cuts: Sequence[str]) -> StageNodes:
    """Stages that begin at these modules ("layer2.0"), the first of all excepted; LayoutError for unknown modules."""
    stage, found = 0, set()
    wanted: dict[str, int | None] = {}
    for node in _ops(trace):
        if is_backward(node):
            wanted[node.name] = None  # where its module's forward ops are
            continue
        path = module_path(node)
        begins = [k for k, cut in enumerate(cuts) if path == cut or path.startswith(f"{cut}.")]
        found.update(begins)
        wanted[node.name] = stage = max([stage, *(k + 1 for k in begins)])
    for k, cut in enumerate(cuts):
        if k not in found:
            raise LayoutError(
                f"no op runs in a module {cut!r}, at which a stage should begin; see model.named_modules()"
            )
    return stages_near(trace, wanted, len(cuts) + 1)


def _ops(trace: Trace) -> list[fx.Node]:
    return [n for n in trace.graph_module.graph.nodes if n.op == "call_function"]


def stages_near(
    trace: Trace, wanted: Mapping[str, int | None], count: int, beside: Mapping[str, int] | None = None
) -> StageNodes:
    """`count` stages along the data flow, as near to the wanted ones (by node name) as it allows.

    beside: the stage of what has no wish and lies beside these nodes: stages may hold no block but what comes before
        the first or after the last.
    """
    beside = beside or {}
    ops = _ops(trace)
    of: dict[str, int | None] = dict.fromkeys(n.name for n in trace.graph_module.graph.nodes)
    everywhere = _everywhere(trace)
    early = _before_blocks([n for n in ops if not is_backward(n)], wanted, everywhere, count, beside)
    within: dict[str, set[int]] = {}  # the stages of the forward ops in a module
    for node in ops:
        if node.name in everywhere:
            continue
        wish = wanted[node.name]
        if is_backward(node):
            stages = within.get(module_path(node), set())
            if wish is None and len(stages) == 1:
                (wish,) = stages
            of[node.name] = _backward_stage(node, wish, of, count, trace.tangents)
            continue
        above = [s for i in node.all_input_nodes if (s := of[i.name]) is not None]
        if wish is None:  # behind what it needs, or before what needs it
            above += [beside[i.name] for i in node.all_input_nodes if beside.get(i.name)]
            wish = max(above) if above else early.get(node.name, 0)
        of[node.name] = stage = max([wish, *above])
        path = module_path(node)
        while path:
            within.setdefault(path, set()).add(stage)
            path = path.rpartition(".")[0]
    return StageNodes(count, of, within)


def _backward_stage(
    node: fx.Node, wish: int | None, of: Mapping[str, int | None], count: int, tangents: Sequence[str]
) -> int | None:
    """No later than the gradients it takes; without gradients, where the values are that it takes."""
    behind = [s for i in node.all_input_nodes if is_backward(i) and (s := of[i.name]) is not None]
    behind += [count - 1 for i in node.all_input_nodes if i.name in tangents]
    if behind:
        return min([*behind, *([] if wish is None else [wish])])
    values = [s for i in node.all_input_nodes if (s := of[i.name]) is not None]
    return wish if wish is not None else max(values, default=None)


def _before_blocks(
    ops: Sequence[fx.Node],
    wanted: Mapping[str, int | None],
    everywhere: set[str],
    count: int,
    beside: Mapping[str, int],
) -> dict[str, int]:
    """For ops without a wish, the first stage that needs their result."""
    found: dict[str, int] = {}
    for node in reversed(ops):
        wish = wanted[node.name]
        if wish is not None:
            found[node.name] = min(wish, beside.get(node.name, wish))
        else:
            users = [found[u.name] for u in node.users if u.name in found and u.name not in everywhere]
            found[node.name] = min(users, default=count - 1)
    return found


def _everywhere(trace: Trace) -> set[str]:
    """Ops that depend on inputs, buffers and constants alone, and views and casts of parameters."""
    params = {p.node for p in trace.params}
    given = {n.name for n in trace.graph_module.graph.nodes if n.op == "placeholder"} - params - {*trace.tangents}
    found: set[str] = set()
    copies: set[str] = set()
    for node in _ops(trace):
        operands = {i.name for i in node.all_input_nodes}
        if isinstance(node.target, OpOverload) and may_be_random(node.target) and is_random(op_call(node)):
            continue
        if operands <= (given | found) - (copies if operands else set()):
            found.add(node.name)
        elif operands <= params | copies and (is_view_node(node) or _is_copy(node)):
            copies.add(node.name)
            found.add(node.name)
    return found


def _is_copy(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and str(node.target.overloadpacket) in _COPIES
