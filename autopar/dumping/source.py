"""An fx graph as plain Python: a function per graph, a call per line, and beside it what is known of the result.

The file is code: whoever imports it runs it. `autopar.dumping.parse` reads it back without running anything.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar._torch_compat import OpOverload
from autopar.errors import AutoparError

IMPORTS = ("math", "operator", "torch")
_OWN_OPS = {"autopar": "autopar.codegen.draws"}  # namespace of ops -> what registers them
_RESERVED = {*IMPORTS, "autopar", "complex", "True", "False", "None"}
_CONSTANTS = (torch.dtype, torch.memory_format, torch.layout)
_SHORT = {
    "float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16",
    "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8", "bool": "b8",
}  # fmt: skip


@dataclass(frozen=True)
class Remark:
    """What stands beside a node: `place` (module and source line) on a line above, `result` at the end of the line."""

    place: str = ""
    result: str = ""


def python_source(
    graph: fx.Graph,
    docstring: str,
    remark: Callable[[fx.Node], Remark],
    *,
    modules: Mapping[str, fx.GraphModule] | None = None,
    name: str = "forward",
) -> str:
    """The module of a graph: its function `name`, after one function for each submodule that it calls.

    modules: the graphs behind call_module nodes, by target. Raises AutoparError for what Python cannot say.
    """
    writer = _Writer(remark, dict(modules or {}))
    writer.function(graph, name)
    body = "\n\n\n".join(writer.functions)
    modules_used = [*IMPORTS, *(home for space, home in _OWN_OPS.items() if f"torch.ops.{space}." in body)]
    head = [f'"""{docstring}"""', "", *(f"import {module}" for module in modules_used), "", ""]
    return "\n".join([*head, body]) + "\n"


def tensor_text(value: Any) -> str:
    """ "f32[8, 64]", of a fake tensor; "" for anything else."""
    if not isinstance(value, torch.Tensor):
        return ""
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{_SHORT.get(dtype, dtype)}{list(value.shape)}"


class _Writer:
    def __init__(self, remark: Callable[[fx.Node], Remark], modules: dict[str, fx.GraphModule]) -> None:
        self.remark, self.modules = remark, modules
        self.functions: list[str] = []
        self.function_of: dict[int, str] = {}  # by id of a submodule's graph
        self.taken: set[str] = set()

    def function(self, graph: fx.Graph, name: str) -> None:
        """Write the functions that a graph calls, then its own."""
        self.taken.add(name)
        for node in graph.nodes:
            if node.op == "call_module":
                self._submodule(node)
        names = _names(graph, self.taken)
        parameters = [n for n in graph.nodes if n.op == "placeholder"]
        lines = [f"def {name}(", *(self._parameter(n, names) for n in parameters), "):"]
        place = ""
        for node in graph.nodes:
            if node.op == "placeholder":
                continue
            remark = Remark() if node.op == "output" else self.remark(node)
            if remark.place and remark.place != place:
                lines += ["", f"    # {remark.place}"]
                place = remark.place
            lines.append(f"    {self._line(node, names)}{f'  # {remark.result}' if remark.result else ''}")
        self.functions.append("\n".join(lines))

    def _submodule(self, node: fx.Node) -> None:
        module = self.modules.get(str(node.target))
        if module is None:
            raise AutoparError(f"cannot write node {node.name}: nothing is known of its submodule {node.target!r}")
        if id(module.graph) in self.function_of:
            return
        name = re.sub(r"\W", "_", str(node.target))
        name = f"{name}_" if name in self.taken or name in _RESERVED or not name.isidentifier() else name
        self.function_of[id(module.graph)] = name
        inner = {f"{key}": m for key, m in module.named_modules() if key and isinstance(m, fx.GraphModule)}
        outer, self.modules = self.modules, {**self.modules, **inner}
        self.function(module.graph, name)
        self.modules = outer

    def _parameter(self, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
        remark = self.remark(node)
        known = "  ".join(text for text in (remark.result, remark.place) if text)
        return f"    {names[node]},{f'  # {known}' if known else ''}"

    def _line(self, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
        if node.op == "output":
            return f"return {self._value(node.args[0], names, node)}"
        if node.op == "call_module":
            function = self.function_of[id(self.modules[str(node.target)].graph)]
        elif node.op == "call_function":
            function = _function_text(node)
        else:
            raise AutoparError(f"cannot write node {node.name} as Python: it is a {node.op}")
        arguments = [self._value(a, names, node) for a in node.args]
        arguments += [f"{key}={self._value(v, names, node)}" for key, v in node.kwargs.items()]
        return f"{names[node]} = {function}({', '.join(arguments)})"

    def _value(self, value: Any, names: Mapping[fx.Node, str], at: fx.Node) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, list):
            return f"[{', '.join(self._value(v, names, at) for v in value)}]"
        if isinstance(value, tuple):
            inner = ", ".join(self._value(v, names, at) for v in value)
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        if isinstance(value, _CONSTANTS):
            return str(value)
        if isinstance(value, float) and not math.isfinite(value):
            return "math.nan" if math.isnan(value) else "math.inf" if value > 0 else "-math.inf"
        if value is None or isinstance(value, (bool, int, float, str)):
            return repr(value)
        if isinstance(value, complex):
            return f"complex({value.real!r}, {value.imag!r})"
        raise AutoparError(f"cannot write node {at.name} as Python: an argument is a {type(value).__name__}")


def _names(graph: fx.Graph, functions: set[str]) -> dict[fx.Node, str]:
    """A name per node that hides neither a function nor a module."""
    names: dict[fx.Node, str] = {}
    taken = {*_RESERVED, *functions}
    for node in graph.nodes:
        name = node.name
        while name in taken or keyword.iskeyword(name):
            name += "_"
        taken.add(name)
        names[node] = name
    return names


def _function_text(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, OpOverload):
        namespace, _, op = target._schema.name.partition("::")
        return f"torch.ops.{namespace}.{op}.{target._overloadname}"
    name = getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:
        return f"operator.{name}"
    raise AutoparError(f"cannot write node {node.name} as Python: {target} is neither a torch op nor of `operator`")


def docstring_of(lines: Sequence[str]) -> str:
    """Lines as the inside of a docstring."""
    return "\n".join(lines).replace("\\", "\\\\").replace('"""', "'''")
