"""From torch's exceptions to TraceError: what is wrong, the user's line, what to change."""

from __future__ import annotations

import ast
import inspect
import os
import re
import textwrap
from typing import Any

import torch
from torch import fx, nn

from autopar import _torch_compat as compat
from autopar.errors import TraceError

_TORCH_DIR = os.path.dirname(torch.__file__)
_OWN_DIR = os.path.dirname(__file__)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')

# (what torch's message contains, what is wrong, what to change); the first that matches is used.
_KNOWN: tuple[tuple[str, str, str], ...] = (
    ("data-dependent branching", "the code branches on the value of a tensor",
     "use torch.where, or decide on a plain Python value passed as an argument"),
    ("_local_scalar_dense", "the code reads the value of a tensor (.item(), float(), int(), .tolist())",
     "keep the value in a tensor, or pass it as a plain Python argument"),
    ("`print`", "the code calls print",
     "remove it, or guard it with `if not torch.compiler.is_compiling():`"),
    ("builtin print", "the code calls print",
     "remove it, or guard it with `if not torch.compiler.is_compiling():`"),
    ("nonzero", "the shape of a result depends on values (boolean mask, nonzero)",
     "use torch.where or multiply by the mask, so that shapes are fixed"),
    ("dynamic shape operator", "the shape of a result depends on values (boolean mask, nonzero, unique)",
     "use torch.where or multiply by the mask, so that shapes are fixed"),
    ("numpy", "the code calls NumPy on tensors",
     "use the torch function of the same name"),
)  # fmt: skip


def located(error: Exception, source: str | None = None) -> TraceError:
    """A TraceError for an exception raised while capturing."""
    text = str(error)
    source = source or _from_exception(error)
    what, remedy = _explain(error, text, source)
    where = f" at {source}" if source else ""
    return TraceError(f"cannot capture the model: {what}{where}; {remedy}", source)


def source_of(node: fx.Node) -> str | None:
    """The user's "file:line" of a node: the innermost frame of its stack trace that is not torch's."""
    return _innermost([(f, int(n)) for f, n in _FRAME.findall(node.meta.get("stack_trace") or "")])


def rebound_buffer(model: nn.Module, messages: list[str]) -> None:
    """Raise TraceError if forward binds a buffer or parameter anew (`self.buf = ...`): such an update would be lost."""
    hits = [m for m in messages if "certain side effects happened" in m]
    places = [p for m in hits for p in re.findall(r"\"(L\['self'\][^\"]*)\"", m) if "_buffers" in p or "_parameters" in p]
    for place in places:
        path = ".".join(re.findall(r"_modules\['(\w+)'\]", place)[1:])
        module = model.get_submodule(path)
        name, source = _assignment(module)
        where = f" at {source}" if source else ""
        called = f"{path or type(module).__name__}.{name}" if name else f"a buffer of {path or type(module).__name__}"
        raise TraceError(
            f"forward binds {called} to a new tensor{where}; write into it instead: self.{name or 'name'}.copy_(...)", source
        )


def _explain(error: Exception, text: str, source: str | None) -> tuple[str, str]:
    if "experts" in (source or "") or re.search(r"experts|moe\.py", text.split("from user code")[-1][:2000]):
        if isinstance(error, compat.TorchDynamoException) or _is_value_dependent(error):
            return (
                "the experts of this mixture-of-experts model are chosen by value",
                'build it with experts_implementation="grouped_mm" or "batched_mm" (not "eager")',
            )
    lowered = text.lower()
    for pattern, what, remedy in _KNOWN:
        if pattern in lowered:
            return what, remedy
    if isinstance(error, compat.UnsupportedOperatorException):
        return f"{error} has no fake implementation", "register one with torch.library.register_fake"
    first = _first_line(text)
    if isinstance(error, compat.TorchDynamoException):
        return _reason(text) or first, "rewrite this line with torch operations on fixed shapes"
    return f"{type(error).__name__}: {first}", "check that the model runs on one device with these example inputs"


def _is_value_dependent(error: Exception) -> bool:
    return isinstance(error, (compat.DataDependentOutputException, compat.DynamicOutputShapeException))


def _first_line(text: str) -> str:
    return next((line.strip().rstrip(".") for line in text.splitlines() if line.strip()), "no reason given")


def _reason(text: str) -> str | None:
    """The cause inside Dynamo's message: `got RuntimeError('...')`, else its explanation."""
    inner = re.search(r"got (\w+\((['\"]).*?\2\))", text, re.DOTALL)
    if inner:
        return inner.group(1)
    explanation = re.search(r"Explanation: (.+?)(?:\n\s*\n|\n\s*Hint|$)", text, re.DOTALL)
    return " ".join(explanation.group(1).split()).rstrip(".") if explanation else None


def _from_exception(error: BaseException) -> str | None:
    """Dynamo's stack of user frames, else frames in the message, else the Python traceback."""
    stack: Any = getattr(error, "real_stack", None) or ()
    frames = [(f.filename, f.lineno or 0) for f in stack]
    frames = frames or [(f, int(n)) for f, n in _FRAME.findall(str(error))]
    return _innermost(frames)


def _innermost(frames: list[tuple[str, int]]) -> str | None:
    own = [f for f in frames if not f[0].startswith((_TORCH_DIR, _OWN_DIR, "<"))]
    return f"{own[-1][0]}:{own[-1][1]}" if own else None


def _assignment(module: nn.Module) -> tuple[str | None, str | None]:
    """Which registered tensor of `module` its code assigns in forward, and where."""
    names = {*module._buffers, *module._parameters}
    for method in (type(module).forward, *(m for _, m in inspect.getmembers(type(module), inspect.isfunction))):
        if method.__name__ == "__init__" or method.__module__.startswith("torch."):
            continue
        try:
            lines, start = inspect.getsourcelines(method)
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in names:
                return node.attr, f"{inspect.getsourcefile(method)}:{start + node.lineno - 1}"
    return None, None
