"""Dynamo, then AOTAutograd: from a shadow model and fake arguments to a raw joint graph.

Dynamo gives one graph of the forward pass. Around it stands `_LossAndDetached`, which is
run by AOTAutograd: it interprets that graph, picks the loss, and detaches everything
else, so that the joint graph has one tangent. A model that returns no loss keeps all its
outputs attached, each with a tangent of its own: the caller makes a loss of them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from autopar import _torch_compat as compat
from autopar._torch_compat import pytree
from autopar.errors import TraceError
from autopar.tracing.attention import widened
from autopar.tracing.diagnose import definition_of, located, rebound_buffer
from autopar.tracing.leaves import output_leaves
from autopar.tracing.written_attention import join_written_attention


@dataclass
class RawJoint:
    """AOTAutograd's graph, with descriptors, and what the model returned.

    leaves: (path, index among the graph's plain outputs or None, constant) per leaf of the result.
    loss_index: which plain output is the loss; None if none is.
    """

    graph_module: fx.GraphModule
    leaves: list[tuple[str, int | None, Any]]
    out_spec: pytree.TreeSpec
    loss_index: int | None


class _Root(nn.Module):
    """What Dynamo traces: one level above the model, so that the model's own hooks are traced with it.

    autocast: the dtype of products, None for no autocast.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast
        self.device_type = next(model.parameters()).device.type
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.autocast is None:
            return self.model(*args, **kwargs)
        with torch.autocast(self.device_type, dtype=self.autocast):
            return self.model(*args, **kwargs)


class _Interpreter(fx.Interpreter):
    """Runs Dynamo's graph and turns what can't be traced into an error with the user's line."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False  # it would add its own text to our errors

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except (
            compat.DataDependentOutputException,
            compat.DynamicOutputShapeException,
            compat.UnsupportedOperatorException,
            NotImplementedError,
        ) as error:
            raise located(error, n) from None

    def call_function(self, target: fx.node.Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert callable(target)
        return super().call_function(widened(target, args, kwargs), args, kwargs)


@dataclass(frozen=True)
class _Arguments:
    """A call's arguments: its tensors apart, all else fixed."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor))

    def filled(self, tensors: tuple[torch.Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with other tensors in place."""
        values = iter(tensors)
        leaves = [next(values) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


@dataclass
class _Result:
    leaves: list[tuple[str, int | None, Any]] = field(default_factory=list)
    out_spec: pytree.TreeSpec | None = None
    loss_index: int | None = None


class _LossAndDetached(nn.Module):
    """See the module. `source`: where the model's forward is defined, for errors."""

    def __init__(self, graph_module: fx.GraphModule, source: str | None, arguments: _Arguments) -> None:
        super().__init__()
        self.captured, self.source, self.arguments = graph_module, source, arguments
        self.result = _Result()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = self.arguments.filled(inputs)
        with compat.recorded_node_meta():
            value = _Interpreter(self.captured).run(*args, *kwargs.values())
        loss = find_loss(value, self.source)
        named, spec = output_leaves(value)
        tensors: list[torch.Tensor] = []
        leaves: list[tuple[str, int | None, Any]] = []
        loss_index: int | None = None
        for path, leaf in named:
            if not isinstance(leaf, torch.Tensor):
                leaves.append((path, None, _constant(path, leaf)))
                continue
            leaves.append((path, len(tensors), None))
            # Copies, so that no output is a view of another or of an input; cleaning drops them again.
            if leaf is loss and loss_index is None:
                loss_index = len(tensors)
                tensors.append(leaf.clone())
            else:
                tensors.append((leaf if loss is None else leaf.detach()).clone())
        self.result = _Result(leaves, spec, loss_index)
        return tuple(tensors)


def find_loss(value: Any, source: str | None = None) -> torch.Tensor | None:
    """The loss in what a model returns: "loss", else the value itself, else the first of a tuple.

    It must be a scalar floating-point tensor that requires grad. None if there is none but other tensors
    require grad: the caller makes the loss. Raises TraceError where nothing does.
    """
    named = value.get("loss") if isinstance(value, Mapping) else getattr(value, "loss", None)
    first = value[0] if isinstance(value, (tuple, list)) and value else None
    for candidate in (named, value, first):
        is_scalar = isinstance(candidate, torch.Tensor) and candidate.ndim == 0 and candidate.is_floating_point()
        if is_scalar and _trains(candidate):
            return candidate
    if any(_trains(leaf) for leaf in pytree.tree_leaves(value)):
        return None
    advice = "let it return a loss, or tensors to make one of, that are computed from its parameters"
    raise TraceError(
        f"nothing that the model returns ({_describe(value)}) depends on a parameter that requires grad; {advice}",
        source,
    )


def _trains(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with {', '.join(map(str, value)) or 'nothing in it'}"
    return f"a {type(value).__name__}"


def _constant(path: str, leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, (bool, int, float, str, complex, torch.dtype, torch.device, torch.Size)):
        return leaf
    kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
    raise TraceError(
        f"the model returns a {kind} (at {path!r}), which is neither a tensor nor a constant nor a registered pytree; "
        "return a tuple or dict, or register the class with torch.utils._pytree.register_pytree_node"
    )


def capture(
    shadow: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: compat.FakeTensorMode,
    autocast: torch.dtype | None = None,
    as_written: bool = False,
) -> RawJoint:
    """The raw joint graph of `shadow` called with fake arguments; raises TraceError with the user's line.

    autocast: the dtype of an autocast around the call, None for none.
    as_written: attention that is written out stays so; else it becomes one op.
    To be called in `capture_environment(left_out_calls())`.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    arguments = _Arguments(tuple(leaves), spec)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            graph_module = compat.capture_forward(_Root(shadow, autocast), args, kwargs)
            rebound_buffer(shadow, [str(w.message) for w in caught])
            if not as_written:
                join_written_attention(graph_module.graph)
            target = _LossAndDetached(graph_module, definition_of(shadow), arguments)
            joint = compat.export_joint(target, arguments.tensors, mode)
        except TraceError:
            raise
        except Exception as error:
            raise located(error) from error
    result = target.result
    assert result.out_spec is not None
    return RawJoint(joint, result.leaves, result.out_spec, result.loss_index)


def left_out_calls() -> set[Callable[..., Any]]:
    """Logging, warnings and checks of a tensor's values: no result depends on them, and the graph does without."""
    names = ("debug", "info", "warning", "error", "critical", "exception", "log", "warning_once", "info_once")
    calls: set[Callable[..., Any]] = {getattr(logging.Logger, n) for n in names if hasattr(logging.Logger, n)}
    return calls | {warnings.warn, compat.CHECK_OF_VALUES}
