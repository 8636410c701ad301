"""From torch's exceptions to TraceError: what is wrong, the user's line, what to change."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sysconfig
import textwrap
from typing import Any

import torch
from torch import fx, nn

from autopar import _torch_compat as compat
from autopar.errors import TraceError

_TORCH_DIR = os.path.dirname(torch.__file__)
_STDLIB_DIR = sysconfig.get_path("stdlib")
_OWN_DIR = os.path.dirname(__file__)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_FRAME_WITH_CODE = re.compile(r'File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]*)')

# (what torch's message contains in lower case, what is wrong, what to change); the first that matches is used.
_KNOWN: tuple[tuple[str, str, str], ...] = (
    ("user-inserted graph break", "the code breaks the graph on purpose", "remove torch._dynamo.graph_break()"),
    ("torch.compiler.disable", "a function called here is kept out of graphs by torch.compiler.disable",
     "remove that decorator, or move what it does out of forward"),
    ("data-dependent branching", "the code branches on the value of a tensor",
     "use torch.where, or decide on a plain Python value passed as an argument"),
    ("could not guard on data-dependent", "the code branches on the value of a tensor",
     "use torch.where, or decide on a plain Python value passed as an argument"),
    ("_local_scalar_dense", "the code reads the value of a tensor (.item(), float(), int())",
     "keep the value in a tensor, or pass it as a plain Python argument"),
    ("tolist()", "the code reads the values of a tensor (.tolist())",
     "keep the values in a tensor, or pass them as plain Python arguments"),
    ("builtin operator `print`", "the code calls print",
     "remove it, or guard it with `if not torch.compiler.is_compiling():`"),
    ("aten.nonzero", "the shape of a result depends on values (boolean mask, nonzero)",
     "use torch.where or multiply by the mask, so that shapes are fixed"),
    ("dynamic shape operator", "the shape of a result depends on values (nonzero, unique, masked_select)",
     "use operations whose shapes don't depend on values, such as torch.where"),
    ("dynamicoutputshape", "the shape of a result depends on values (nonzero, unique, masked_select)",
     "use operations whose shapes don't depend on values, such as torch.where"),
    ("logginglogger", "the code makes a logger", "make it once, outside of forward"),
    ("backend_input must not be none", "it computes nothing with tensors", "let forward return a scalar loss"),
    ("numpy", "the code calls a NumPy function that can't be traced",
     "use the torch function of the same name"),
)  # fmt: skip
_EXPERTS = (
    "the tokens of the experts of this mixture-of-experts model are chosen by value",
    'build it with experts_implementation="grouped_mm" or "batched_mm" instead of "eager"',
)


def located(error: Exception, node: fx.Node | None = None) -> TraceError:
    """A TraceError for an exception raised while capturing, or while running `node` of Dynamo's graph."""
    text = f"{error}\n{node.meta.get('stack_trace', '')}" if node else str(error)
    source = source_of(node) if node else None
    source = source or _from_exception(error)
    what, remedy = _explain(error, text)
    return TraceError(f"cannot capture the model: {what}{at(source)}; {remedy}", source)


def source_of(node: fx.Node) -> str | None:
    """The user's "file:line" of a node: the innermost frame of its stack trace that is not torch's."""
    return _innermost([(f, int(n)) for f, n in _FRAME.findall(node.meta.get("stack_trace") or "")])


def source_line(node: fx.Node) -> tuple[str, str]:
    """("file:line", the code there) of a node, as in `source_of`; ("", "") if unknown."""
    frames = _FRAME_WITH_CODE.findall(node.meta.get("stack_trace") or "")
    place = _innermost([(file, int(line)) for file, line, _ in frames])
    code = next((code for file, line, code in reversed(frames) if f"{file}:{line}" == place), "")
    return (place, code.strip()) if place else ("", "")


def rebound_buffer(model: nn.Module, messages: list[str]) -> None:
    """Raise TraceError if forward binds a buffer or parameter anew (`self.buf = ...`): such an update would be lost."""
    listed = [m for m in messages if "certain side effects happened" in m]
    places = [p for m in listed for p in re.findall(r"\"(L\['self'\][^\"]*)\"", m)]
    for place in places:
        if "_buffers" not in place and "_parameters" not in place:
            continue
        path = ".".join(re.findall(r"_modules\['(\w+)'\]", place)[1:])
        module = model.get_submodule(path)
        name, source = _assignment(module)
        owner = path or type(module).__name__
        called = f"{owner}.{name}" if name else f"a buffer of {owner}"
        remedy = f"write into it instead: self.{name or 'name'}.copy_(...)"
        raise TraceError(f"forward binds {called} to a new tensor{at(source)}; {remedy}", source)


def at(source: str | None) -> str:
    """ " at file:line", or nothing if the line is not known."""
    return f" at {source}" if source else ""


def definition_of(model: nn.Module) -> str | None:
    """Where the forward of a model is defined."""
    try:
        return f"{inspect.getsourcefile(model.forward)}:{inspect.getsourcelines(model.forward)[1]}"
    except (OSError, TypeError):
        return None


def _explain(error: Exception, text: str) -> tuple[str, str]:
    """What is wrong and what to change."""
    by_value = isinstance(error, (compat.DataDependentOutputException, compat.DynamicOutputShapeException))
    if (by_value or isinstance(error, compat.TorchDynamoException)) and re.search(r"in \w*experts\w*|/moe\.py", text):
        return _EXPERTS
    own_words = re.sub(r"^\s*Hint:.*$", "", text.split("from user code")[0], flags=re.MULTILINE)
    lowered = f"{type(error).__name__}: {own_words}".lower()
    for pattern, what, remedy in _KNOWN:
        if pattern in lowered:
            return what, remedy
    if isinstance(error, compat.UnsupportedOperatorException):
        return f"{error} has no fake implementation", "register one with torch.library.register_fake"
    raised = re.search(r"raised exception (.+)", own_words)
    if raised:
        return f"its code raises {raised.group(1).strip()}", "check that it runs with these example inputs"
    if isinstance(error, compat.TorchDynamoException):
        reason, its_own = _reason(own_words)
        runs = "check that this line runs on one device with these example inputs"
        return reason, runs if its_own else "rewrite this line with torch operations on fixed shapes"
    return f"{type(error).__name__}: {_first_line(text)}", "check that it runs on one device with these example inputs"


def _first_line(text: str) -> str:
    return next((line.strip().rstrip(".") for line in text.splitlines() if line.strip()), "no reason given")


def _reason(text: str) -> tuple[str, bool]:
    """The cause inside Dynamo's message: `got RuntimeError('...')`, else its explanation, else its first line.

    And whether it is an exception of the op itself, on shapes as the model gives them.
    """
    inner = re.search(r"got (\w+\((['\"]).*?\2\))", text, re.DOTALL)
    if inner:
        return inner.group(1), True
    explanation = re.search(r"Explanation: (.+?)(?:\n\s*\n|$)", text, re.DOTALL)
    return (" ".join(explanation.group(1).split()).rstrip(".") if explanation else _first_line(text)), False


def _from_exception(error: BaseException) -> str | None:
    """Dynamo's stack of user frames, else frames in the message, else the Python traceback."""
    stack: Any = getattr(error, "real_stack", None) or ()
    frames = [(f.filename, f.lineno or 0) for f in stack]
    frames = frames or [(f, int(n)) for f, n in _FRAME.findall(str(error))]
    return _innermost(frames)


def _innermost(frames: list[tuple[str, int]]) -> str | None:
    own = [f for f in frames if not f[0].startswith((_TORCH_DIR, _OWN_DIR, "<")) and not _in_standard_library(f[0])]
    return f"{own[-1][0]}:{own[-1][1]}" if own else None


def _in_standard_library(path: str) -> bool:
    return path.startswith(_STDLIB_DIR) and "-packages" not in path  # site-packages may lie inside


def _assignment(module: nn.Module) -> tuple[str | None, str | None]:
    """Which registered tensor of `module` its class assigns outside __init__, and where."""
    names = {*module._buffers, *module._parameters}
    methods: list[Any] = [m for _, m in inspect.getmembers(type(module), inspect.isfunction)]
    for method in methods:
        if method.__name__ == "__init__" or method.__module__.startswith("torch."):
            continue
        try:
            lines, start = inspect.getsourcelines(method)
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, SyntaxError):
            continue  # no source to look at: the message then names the module alone
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in names:
                return node.attr, f"{inspect.getsourcefile(method)}:{start + node.lineno - 1}"
    return None, None
