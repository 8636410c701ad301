"""Depth for free: trace a model with three of its identical layers and unroll the graph to all of them.

The trace of three layers is cut into what belongs to the first, the middle and the last
layer and the rest; the middle one is then repeated. That this is what tracing all layers
would give is checked, not assumed: the same construction must turn the three-layer graph
into the two-layer one (equal hashes), or the model is traced layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from autopar._torch_compat import graph_module, pytree
from autopar.tracing.types import Trace

# (phase, position in the layer, layer): a node of a layer. Layers are counted in the unrolled graph.
Place = tuple[str, int, int]


@dataclass(frozen=True)
class Template:
    """A three-layer trace, cut into layers.

    prefix: path of the list of layers and a dot ("model.layers.").
    runs: per phase, the nodes of layers 0, 1 and 2, position by position; those of layer 1 are contiguous.
    """

    trace: Trace
    prefix: str
    runs: dict[str, tuple[tuple[fx.Node, ...], ...]]

    def places(self) -> dict[fx.Node, tuple[str, int, int]]:
        """(phase, position, layer of three) of each node of a layer, parameters and buffers included."""
        found = {
            node: (phase, position, layer)
            for phase, runs in self.runs.items()
            for layer, run in enumerate(runs)
            for position, node in enumerate(run)
        }
        nodes = {n.name: n for n in self.trace.graph_module.graph.nodes}
        for layer in range(3):
            start = f"{self.prefix}{layer}."
            everything: tuple[Any, ...] = (*self.trace.params, *self.trace.buffers)
            infos = [i for i in everything if i.fqn.startswith(start)]
            for position, info in enumerate(infos):
                found[nodes[info.node]] = ("placeholder", position, layer)
        return found


def make_template(trace: Trace, prefix: str) -> Template | None:
    """Cut a three-layer trace into layers; None where its layers are not alike."""
    nodes = [n for n in trace.graph_module.graph.nodes if n.op == "call_function"]
    runs: dict[str, tuple[tuple[fx.Node, ...], ...]] = {}
    for phase in ("forward", "backward"):
        order = (0, 1, 2) if phase == "forward" else (2, 1, 0)
        for cutter in (_up_to_next, _from_previous):
            found = _cut([n for n in nodes if n.meta["phase"] == phase], prefix, order, cutter)
            matched = found and _match(Template(trace, prefix, {**runs, phase: found}), phase, order)
            if matched:
                runs[phase] = matched
                break
        else:
            return None
    return Template(trace, prefix, runs)


_Runs = tuple[tuple[fx.Node, ...], ...]
_Cutter = Callable[[list[int], list[int], int], list[tuple[int, int]]]


def _cut(nodes: list[fx.Node], prefix: str, order: tuple[int, ...], cutter: _Cutter) -> _Runs | None:
    """The stretches of the three layers in one phase, by module path; what lies between goes where `cutter` says."""
    starts, ends = [], []
    for layer in order:
        inside = [i for i, n in enumerate(nodes) if _in_layer(n, prefix, layer)]
        if not inside:
            return None
        starts.append(inside[0])
        ends.append(inside[-1] + 1)
    if any(ends[i] > starts[i + 1] for i in range(2)):
        return None
    stretches = cutter(starts, ends, len(nodes))
    by_layer = dict(zip(order, (tuple(nodes[a:b]) for a, b in stretches), strict=True))
    return tuple(by_layer[layer] for layer in range(3))


def _up_to_next(starts: list[int], ends: list[int], total: int) -> list[tuple[int, int]]:
    """Nodes between two layers belong to the earlier; the last has as many as the middle one."""
    middle = starts[2] - starts[1]
    return [(starts[0], starts[1]), (starts[1], starts[2]), (starts[2], min(total, starts[2] + middle))]


def _from_previous(starts: list[int], ends: list[int], total: int) -> list[tuple[int, int]]:
    """Nodes between two layers belong to the later."""
    return [(starts[0], ends[0]), (ends[0], ends[1]), (ends[1], ends[2])]


def _in_layer(node: fx.Node, prefix: str, layer: int) -> bool:
    path = node.meta["module_path"] + "."
    return path.startswith(f"{prefix}{layer}.")


def _match(template: Template, phase: str, order: tuple[int, ...]) -> _Runs | None:
    """The same runs, position by position.

    The middle and the last in order must be equal; the first, which may also make what all layers share, is
    matched to them.
    """
    first, middle, last = order
    runs = template.runs[phase]
    if len(runs[middle]) != len(runs[last]):
        return None
    places = template.places()
    for node in runs[first]:
        places.pop(node, None)
    for a, b in zip(runs[middle], runs[last], strict=True):
        if _head(a) != _head(b):
            return None
    matched = _match_first(runs, order, places, phase)
    return None if matched is None else tuple(matched if i == first else run for i, run in enumerate(runs))


def _match_first(
    runs: _Runs, order: tuple[int, ...], places: dict[fx.Node, tuple[str, int, int]], phase: str
) -> tuple[fx.Node, ...] | None:
    """For each position of the middle layer, the node of the first layer (in order) that does the same."""
    first, middle, last = order
    free = list(runs[first])
    heads = {n: _head(n) for n in free}
    found: dict[fx.Node, fx.Node] = {}  # middle layer's node -> first layer's
    for a, b in zip(runs[middle], runs[last], strict=True):
        wanted = [_wanted(x, y, places, phase, order, found) for x, y in zip(_refs(a), _refs(b), strict=True)]
        head = _head(a)
        fits = [
            n
            for n in free
            if heads[n] == head
            and all(w is None or w == _seen(r, places) for w, r in zip(wanted, _refs(n), strict=True))
        ]
        if not fits:
            return None
        found[a] = fits[0]
        free.remove(fits[0])
    return tuple(found[a] for a in runs[middle])


def _wanted(
    x: fx.Node,
    y: fx.Node,
    places: dict[fx.Node, tuple[str, int, int]],
    phase: str,
    order: tuple[int, ...],
    found: dict[fx.Node, fx.Node],
) -> object:
    """What the first layer's node must refer to where the middle one has x and the last one y; None: anything."""
    first, middle, _ = order
    if x is y:
        return x
    place = places.get(x)
    if place is None:
        return None  # made by the first layer (in order) for the middle one: what the first one takes is not known
    if place[2] == middle:
        return found[x] if place[0] == phase else (place[0], place[1], first)
    return None


def _seen(node: fx.Node, places: dict[fx.Node, tuple[str, int, int]]) -> object:
    return places.get(node, node)


def _refs(node: fx.Node) -> list[fx.Node]:
    return [x for x in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, fx.Node)]


def _head(node: fx.Node) -> tuple[object, ...]:
    """Everything about a node but which nodes it refers to."""
    plain = pytree.tree_map(lambda x: "node" if isinstance(x, fx.Node) else x, (node.args, node.kwargs))
    shapes = pytree.tree_map(lambda v: (tuple(v.shape), v.dtype) if hasattr(v, "shape") else v, node.meta["val"])
    return (node.target, repr(plain), repr(shapes))


def unroll(template: Template, layers: int) -> Trace | None:
    """The trace of the model with `layers` (2 or more) of its layers; None where the template does not allow it."""
    try:
        return _Unroller(template, layers).run()
    except _NotUniform:
        return None


def two_layers(template: Template) -> tuple[Trace, dict[fx.Node, fx.Node]] | None:
    """`unroll` to two layers, and for every node of the template the node there that does the same.

    The middle layer's is that of the layer it was found to be equal to, see `_match`.
    """
    unroller = _Unroller(template, 2)
    try:
        made = unroller.run()
    except _NotUniform:
        return None
    stands_for = dict(unroller.rest)
    for node, (phase, position, layer) in unroller.places.items():
        equal = 0 if layer == 0 or (layer == 1 and phase == "backward") else 1
        stands_for[node] = unroller.at[phase, position, equal]
    return made, stands_for


def fx_output(graph: fx.Graph) -> fx.Node:
    """The output node of a graph."""
    return next(iter(graph.find_nodes(op="output")))


class _NotUniform(Exception):
    """A reference that has no meaning at another depth."""


class _Unroller:
    def __init__(self, template: Template, layers: int) -> None:
        self.template, self.layers = template, layers
        self.places = template.places()
        self.graph = fx.Graph()
        self.at: dict[Place, fx.Node] = {}
        self.rest: dict[fx.Node, fx.Node] = {}
        self.twins: dict[str, str] = {}

    def run(self) -> Trace:
        done: set[str] = set()
        for node in self.template.trace.graph_module.graph.nodes:
            if node.op == "output":
                continue  # its operands are listed anew, see `_trace`
            place = self.places.get(node)
            if place is None or place[2] != 1:
                self._copy(node, place, None if place is None else self._layer(place[2]))
            elif place[0] not in done:  # the first node of the middle layer: all middle layers come here
                done.add(place[0])
                self._repeat(place[0])
        return self._trace()

    def _layer(self, of_three: int) -> int:
        return self.layers - 1 if of_three == 2 else of_three

    def _repeat(self, phase: str) -> None:
        middle = [n for n, place in self.places.items() if place[0] == phase and place[2] == 1]
        middle.sort(key=lambda n: self.places[n][1])
        if phase == "placeholder":
            order = {n: i for i, n in enumerate(self.template.trace.graph_module.graph.nodes)}
            middle.sort(key=lambda n: order[n])
        layers = range(1, self.layers - 1)
        for layer in layers if phase != "backward" else reversed(layers):
            for node in middle:
                self._copy(node, self.places[node], layer)

    def _copy(self, node: fx.Node, place: tuple[str, int, int] | None, layer: int | None) -> None:
        def moved(ref: fx.Node) -> fx.Node:
            there = self.places.get(ref)
            if there is None:
                return self.rest[ref]
            if place is None or layer is None:
                if there[2] == 1:
                    raise _NotUniform
                return self.at[there[0], there[1], self._layer(there[2])]
            target = (there[0], there[1], layer + there[2] - place[2])
            if target not in self.at:
                raise _NotUniform
            return self.at[target]

        name = node.name if layer in (None, place[2] if place else None) else f"{node.name}_layer{layer}"
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), moved)
        copy = self.graph.create_node(node.op, node.target if node.op != "placeholder" else name, args, kwargs, name)
        copy.meta = dict(node.meta)
        if place is None or layer is None:
            self.rest[node] = copy
            return
        self.at[place[0], place[1], layer] = copy
        if "module_path" in copy.meta:
            copy.meta["module_path"] = self._renamed(copy.meta["module_path"], place[2], layer)

    def _renamed(self, name: str, of_three: int, layer: int) -> str:
        old, new = f"{self.template.prefix}{of_three}", f"{self.template.prefix}{layer}"
        return new + name[len(old) :] if (name + ".").startswith(old + ".") else name

    def _trace(self) -> Trace:
        old = self.template.trace
        nodes = {n.name: n for n in old.graph_module.graph.nodes}

        def new_name(name: str) -> str:
            return self._node_at(nodes[name], None, None)

        params = tuple(self._expanded(old.params))
        forward = sum(n.op == "call_function" and n.meta["phase"] == "forward" for n in self.graph.nodes)
        self._twin()
        trace = replace(
            old,
            params=params,
            buffers=tuple(self._expanded(old.buffers)),
            outputs=tuple(
                replace(o, node=o.node and new_name(o.node), tangent=o.tangent and new_name(o.tangent))
                for o in old.outputs
            ),
            loss=old.loss and new_name(old.loss),
            grads=self._by_fqn(old.grads),
            buffer_updates=self._by_fqn(old.buffer_updates),
            num_forward=forward,
            twins=self.twins,
        )
        made = {n.name: n for n in self.graph.nodes}
        output = self.graph.output(tuple(made[name] for name in trace.results))
        output.meta = {
            **fx_output(old.graph_module.graph).meta,
            "val": tuple(made[n].meta["val"] for n in trace.results),
        }
        return replace(trace, graph_module=graph_module(old.graph_module, self.graph, "JointGraph"))

    def _spread(self, fqn: str) -> list[tuple[int, int]] | None:
        """(layer of three, layer) of every copy of what bears this name; None for what is in no layer."""
        for of_three in range(3):
            if fqn.startswith(f"{self.template.prefix}{of_three}."):
                layers = range(1, self.layers - 1) if of_three == 1 else [self._layer(of_three)]
                return [(of_three, layer) for layer in layers]
        return None

    def _expanded(self, infos: tuple[Any, ...]) -> Iterator[Any]:
        nodes = {n.name: n for n in self.template.trace.graph_module.graph.nodes}
        group: list[Any] = []
        for info in (*infos, None):
            inside = info is not None and info.fqn.startswith(f"{self.template.prefix}1.")
            if inside:
                group.append(info)
                continue
            for layer in range(1, self.layers - 1) if group else ():
                for member in group:
                    yield self._moved_info(member, nodes[member.node], 1, layer)
            group = []
            if info is not None:
                spread = self._spread(info.fqn)
                yield self._moved_info(info, nodes[info.node], *(spread[0] if spread else (None, None)))

    def _moved_info(self, info: Any, node: fx.Node, of_three: int | None, layer: int | None) -> Any:
        if of_three is None or layer is None:
            return replace(info, node=self.rest[node].name)
        place = self.places[node]
        tied = tuple(self._renamed(name, of_three, layer) for name in info.tied)
        fqn = self._renamed(info.fqn, of_three, layer)
        return replace(info, fqn=fqn, node=self.at[place[0], place[1], layer].name, tied=tied)

    def _by_fqn(self, names: dict[str, str]) -> dict[str, str]:
        """Gradients or buffer updates of all layers: the middle layer's stand once for each layer, layer by layer."""
        nodes = {n.name: n for n in self.template.trace.graph_module.graph.nodes}
        spread: dict[str, str] = {}
        group: list[str] = []
        for fqn in (*names, ""):
            if fqn.startswith(f"{self.template.prefix}1."):
                group.append(fqn)
                continue
            for layer in range(1, self.layers - 1) if group else ():
                for member in group:
                    spread[self._renamed(member, 1, layer)] = self._node_at(nodes[names[member]], 1, layer)
            group = []
            if fqn:
                copies = self._spread(fqn)
                spread[self._renamed(fqn, *copies[0]) if copies else fqn] = self._node_at(
                    nodes[names[fqn]], *(copies[0] if copies else (None, None))
                )
        return spread

    def _node_at(self, node: fx.Node, of_three: int | None, layer: int | None) -> str:
        """The name of the copy of `node` in a layer; outside of layers, of its one copy."""
        place = self.places.get(node)
        if place is None:
            if layer is not None:
                raise _NotUniform
            return self.rest[node].name
        if (place[2] == 1 and layer is None) or (of_three is not None and place[2] != of_three):
            raise _NotUniform
        return self.at[place[0], place[1], self._layer(place[2]) if layer is None else layer].name

    def _twin(self) -> None:
        """Which nodes do the same in different layers: each is named after the one of layer 1."""
        for (phase, position, layer), node in self.at.items():
            self.twins[node.name] = self.at[phase, position, min(1, self.layers - 1)].name if layer >= 0 else node.name
