"""Reads dumped Python back to an fx graph. The file is parsed, never run.

Only what `autopar.dumping.source` writes is understood: functions of assignments, each one call of an op
(`torch.ops....`), of `operator`, or of a function further up in the file, which becomes a submodule.
"""

from __future__ import annotations

import ast
import math
import operator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from autopar._torch_compat import OpOverload
from autopar.errors import PlanError

_CONSTANTS = (torch.dtype, torch.memory_format, torch.layout)


def read_python(path: str | Path) -> fx.GraphModule:
    """The graph of the last function in a dumped file; raises PlanError for anything else than a dump."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read {path}: {error}") from None
    return parse_python(text, str(path))


def parse_python(text: str, where: str = "dump") -> fx.GraphModule:
    """The same of text."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PlanError(f"{where}: not a dumped graph (not Python: {error}); dump it again") from None
    modules: dict[str, fx.GraphModule] = {}
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            modules[statement.name] = _Function(where, modules).read(statement)
        elif not isinstance(statement, ast.Import) and not _is_docstring(statement):
            raise _refusal(where, statement)
    if not modules:
        raise PlanError(f"{where}: not a dumped graph (no function in it); dump it again")
    return list(modules.values())[-1]


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _refusal(where: str, at: ast.AST) -> PlanError:
    line = getattr(at, "lineno", 0)
    return PlanError(f"{where}:{line}: not a line that a dump has ({type(at).__name__}); dump the graph again")


class _Function:
    """One function, as a graph."""

    def __init__(self, where: str, modules: dict[str, fx.GraphModule]) -> None:
        self.where, self.modules = where, modules
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.known: dict[str, fx.Node] = {}

    def read(self, function: ast.FunctionDef) -> fx.GraphModule:
        arguments = function.args
        if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.defaults or arguments.posonlyargs:
            raise _refusal(self.where, function)
        for argument in arguments.args:
            node = self.graph.placeholder(argument.arg)
            self.known[argument.arg] = node
        for statement in function.body:
            self._statement(statement)
        if not isinstance(function.body[-1], ast.Return):
            raise _refusal(self.where, function.body[-1])
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)

    def _statement(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Return) and statement.value is not None:
            self.graph.output(self._value(statement.value))
            return
        if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
            raise _refusal(self.where, statement)
        target, call = statement.targets[0], statement.value
        if not (isinstance(target, ast.Name) and isinstance(call, ast.Call)) or target.id in self.known:
            raise _refusal(self.where, statement)
        if any(keyword.arg is None for keyword in call.keywords):
            raise _refusal(self.where, call)
        args = tuple(self._value(a) for a in call.args)
        kwargs = {str(keyword.arg): self._value(keyword.value) for keyword in call.keywords}
        op, function = self._target(call.func)
        self.known[target.id] = self.graph.create_node(op, function, args, kwargs, name=target.id)

    def _target(self, function: ast.expr) -> tuple[str, Any]:
        """("call_function", an op) or ("call_module", the name of a function further up)."""
        if isinstance(function, ast.Name) and function.id in self.modules:
            if not hasattr(self.root, function.id):
                self.root.add_module(function.id, self.modules[function.id])
            return "call_module", function.id
        parts = _dotted(function)
        if len(parts) == 2 and parts[0] == "operator" and not parts[1].startswith("_"):
            found: Any = getattr(operator, parts[1], None)
            if callable(found):
                return "call_function", found
        if len(parts) == 5 and parts[:2] == ["torch", "ops"]:
            try:
                found = getattr(getattr(getattr(torch.ops, parts[2]), parts[3]), parts[4])
            except (AttributeError, RuntimeError):
                found = None
            if isinstance(found, OpOverload):
                return "call_function", found
            raise PlanError(
                f"{self.where}:{function.lineno}: torch has no op {'.'.join(parts[2:])} here; import what registers it"
            )
        raise _refusal(self.where, function)

    def _value(self, value: ast.expr) -> Any:
        if isinstance(value, ast.Constant) and isinstance(value.value, (bool, int, float, str, type(None))):
            return value.value
        if isinstance(value, ast.Name) and value.id in self.known:
            return self.known[value.id]
        if isinstance(value, ast.List):
            return [self._value(v) for v in value.elts]
        if isinstance(value, ast.Tuple):
            return tuple(self._value(v) for v in value.elts)
        if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub):
            inner = self._value(value.operand)
            if isinstance(inner, (int, float)) and not isinstance(inner, bool):
                return -inner
        if isinstance(value, ast.Attribute):
            return self._constant(value)
        if isinstance(value, ast.Call):
            return self._built(value)
        raise _refusal(self.where, value)

    def _constant(self, value: ast.Attribute) -> Any:
        match _dotted(value):
            case ["math", "inf"]:
                return math.inf
            case ["math", "nan"]:
                return math.nan
            case ["torch", name] if isinstance(getattr(torch, name, None), _CONSTANTS):
                return getattr(torch, name)
        raise _refusal(self.where, value)

    def _built(self, value: ast.Call) -> Any:
        """`torch.device("cpu")` and `complex(1.0, 2.0)`."""
        args = [self._value(a) for a in value.args]
        if not value.keywords and _dotted(value.func) == ["torch", "device"] and len(args) == 1:
            try:
                return torch.device(args[0])
            except (RuntimeError, TypeError):
                raise _refusal(self.where, value) from None
        numbers = all(isinstance(a, (int, float)) for a in args)
        if not value.keywords and _dotted(value.func) == ["complex"] and len(args) == 2 and numbers:
            return complex(*args)
        raise _refusal(self.where, value)


def _dotted(node: ast.expr) -> list[str]:
    """["torch", "ops", "aten"] of torch.ops.aten; [] for anything that is no chain of names."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []
