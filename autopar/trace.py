"""From an nn.Module and example inputs to one joint forward and backward graph.

    model + arguments -> shadow (fake tensors) -> Dynamo -> AOTAutograd -> clean graph -> Trace

No value of a parameter is ever read: a model on the meta device, or of a size that no
machine holds, traces like any other. The model object is left exactly as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autopar._torch_compat import capture_environment, fake_tensor_mode, has_device, pytree
from autopar.errors import TraceError
from autopar.precision import MODEL, autocast_dtype, check_parameters
from autopar.tracing.assemble import assemble
from autopar.tracing.capture import capture, left_out_calls
from autopar.tracing.leaves import input_leaves
from autopar.tracing.recording import install_recording_hooks, wants_recording_hooks
from autopar.tracing.repeated import LayerRuns, layer_runs, repeated_layers, with_layers
from autopar.tracing.resized import resized
from autopar.tracing.shadow import check_tensor, fake_like, make_shadow
from autopar.tracing.types import (
    BufferInfo,
    ConstantInfo,
    FixedInput,
    InputInfo,
    OutputInfo,
    ParamInfo,
    Trace,
    graph_hash,
    is_backward,
)
from autopar.tracing.unroll import Template, make_template, unroll

__all__ = [
    "BufferInfo",
    "ConstantInfo",
    "FixedInput",
    "InputInfo",
    "OutputInfo",
    "ParamInfo",
    "Trace",
    "graph_hash",
    "input_leaves",
    "is_backward",
    "trace",
]


def trace(
    model: nn.Module,
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    device: str | None = None,
    unrolled: bool = True,
    precision: str = MODEL,
) -> Trace:
    """Capture `model(*args, **kwargs)` and its backward pass as one ATen graph.

    example_inputs: (args, kwargs), with real, meta or fake tensors; only shapes and dtypes are read.
        Non-tensor arguments become part of the graph, see `Trace.fixed_inputs`.
    device: where the traced tensors pretend to be, such as "cpu" or "cuda"; None: where the model and
        its inputs are, and "cpu" for those on meta.

    unrolled: trace three of many identical layers and unroll the graph where that is proven to be the same
        (see `autopar.tracing.unroll`); False traces every layer.
    precision: see `autopar.precision`.

    The model is traced in the mode it is in (train or eval). A scalar loss, alone, first in a tuple, or under the
    name "loss", is what is differentiated; of a model without one, every output that depends on a parameter is
    differentiable, and the caller makes a loss of them.
    Raises TraceError, with `source` set to the line of the model's code where that is known.
    """
    if unrolled:
        found = _trace_unrolled(model, example_inputs, device, precision)
        if found is not None:
            return found
    return _trace_flat(model, example_inputs, device, precision)


@dataclass(frozen=True)
class Sample:
    """A trace of a model with few of its layers, for figures that are wanted per layer.

    layers: path prefix of the list of layers ("model.layers."), "" where the whole model was traced.
    middle: the one that stands for the others, by its number in the trace. count: how many the model has.
    runs: of layers that are not all alike but in stretches, of which a few each were traced; layers is "" then.
    """

    trace: Trace
    layers: str
    middle: int
    count: int
    runs: LayerRuns | None = None


def trace_sample(
    model: nn.Module,
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    precision: str = MODEL,
    as_written: bool = False,
) -> Sample:
    """Trace `model` with the first, a middle and the last of its identical layers; all of it where it has none.

    as_written: attention that the model writes out stays so, as where others run it.
    Raises TraceError as `trace` does.
    """
    runs = layer_runs(model) if isinstance(model, nn.Module) else None
    if runs is None or len(runs.kept()) == runs.count:
        return Sample(_trace_flat(model, example_inputs, None, precision, as_written=as_written), "", 0, 0)
    sampled = with_layers(model, runs.path, list(runs.kept()))
    fewer = _trace_flat(sampled, example_inputs, None, precision, as_written=as_written)
    if len(runs.lengths) == 1:
        return Sample(fewer, f"{runs.path}.", 1, runs.count)
    return Sample(fewer, "", 0, 0, runs)


def trace_and_sample(
    model: nn.Module, example_inputs: Any, other_inputs: Any, *, precision: str = MODEL
) -> tuple[Trace, Sample | None]:
    """`trace`, and `trace_sample` for inputs of another batch, with one capture less: the two layers that prove the
    unrolling are traced with the other batch, and show what the three are there (`autopar.tracing.resized`).

    The sample is None where the model has no identical layers, or they do not say. Raises TraceError as `trace` does.
    """
    few = _few_layers(model, None, precision)
    template = few and few.template(example_inputs)
    two = few.two(other_inputs) if few and template else None
    other = template and two and resized(template, two)
    found = other and template and few and unroll(template, few.count)
    if few and other and found:
        return found, Sample(other, f"{few.path}.", 1, few.count)
    found = few and template and few.unrolled(template, example_inputs)
    return found or _trace_flat(model, example_inputs, None, precision), None


def _trace_unrolled(model: nn.Module, example_inputs: Any, device: str | None, precision: str) -> Trace | None:
    """The trace by way of three layers; None where the model has no such layers or they turn out to differ."""
    few = _few_layers(model, device, precision)
    template = few and few.template(example_inputs)
    return few.unrolled(template, example_inputs) if few and template else None


@dataclass(frozen=True)
class _FewLayers:
    """A model with only some of its `count` identical layers, which are in a list at `path`."""

    model: nn.Module
    path: str
    count: int
    device: str | None
    precision: str

    def template(self, example_inputs: Any) -> Template | None:
        """Three layers; None where they turn out to differ."""
        three = self._traced([0, self.count // 2, self.count - 1], example_inputs)
        return None if three is None else make_template(three, f"{self.path}.")

    def two(self, example_inputs: Any) -> Trace | None:
        """The first and the last."""
        return self._traced([0, self.count - 1], example_inputs)

    def unrolled(self, template: Template, example_inputs: Any) -> Trace | None:
        """All layers, if two are what three say that two are."""
        two = self.two(example_inputs)
        shorter = unroll(template, 2)
        same = two is not None and shorter is not None and graph_hash(shorter) == graph_hash(two)
        return unroll(template, self.count) if same else None

    def _traced(self, layers: list[int], example_inputs: Any) -> Trace | None:
        try:
            return _trace_flat(with_layers(self.model, self.path, layers), example_inputs, self.device, self.precision)
        except TraceError:
            return None  # the flat trace says what is wrong, or works where fewer layers don't


def _few_layers(model: nn.Module, device: str | None, precision: str) -> _FewLayers | None:
    repeated = repeated_layers(model) if isinstance(model, nn.Module) else None
    return None if repeated is None else _FewLayers(model, *repeated, device, precision)


def _trace_flat(
    model: nn.Module, example_inputs: Any, device: str | None, precision: str, as_written: bool = False
) -> Trace:
    args, kwargs = _checked(model, example_inputs)
    check_parameters(model, precision)
    if device is not None and not has_device(torch.device(device).type):
        raise TraceError(f"this build of torch cannot trace for device {device!r}; leave device out, or use 'cpu'")
    leaves = input_leaves(model.forward, args, kwargs)
    for path, leaf in leaves.items():
        if isinstance(leaf, torch.Tensor):
            check_tensor(leaf, f"input {path!r}")
            if leaf.requires_grad:
                raise TraceError(f"input {path!r} requires grad; gradients are for parameters only, pass it detached")
    with capture_environment(left_out_calls()):
        try:
            return _captured(model, (args, kwargs), leaves, device, (precision, as_written))
        except TraceError as error:
            if not wants_recording_hooks(error):
                raise
        return _captured(model, (args, kwargs), leaves, device, (precision, as_written), recording=True)


def _captured(
    model: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    leaves: dict[str, Any],
    device: str | None,
    how: tuple[str, bool],
    recording: bool = False,
) -> Trace:
    """Capture a copy of the model.

    how: precision, and whether attention stays as it is written. recording: with the hooks that transformers would
    install at its first call.
    """
    mode = fake_tensor_mode()
    shadow = make_shadow(model, mode, device)
    if recording:
        install_recording_hooks(shadow.module)
    # Every leaf gets a fake tensor of its own: one object passed twice must not become one input.
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: fake_like(t, mode, device), call)
    precision, as_written = how
    raw = capture(shadow.module, args, kwargs, mode, autocast_dtype(precision), as_written)
    return assemble(raw, model, shadow, leaves)


def _checked(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TraceError(f"the model is a {type(model).__name__}, not an nn.Module; wrap it in one")
    if not any(p.requires_grad for p in model.parameters()):
        raise TraceError("no parameter of the model requires grad; call requires_grad_() on those to be trained")
    pair = isinstance(example_inputs, (tuple, list)) and len(example_inputs) == 2
    if not pair or not isinstance(example_inputs[0], (tuple, list)) or not isinstance(example_inputs[1], dict):
        raise TraceError("example_inputs must be a pair (args, kwargs) of a tuple and a dict, such as ((), {'x': x})")
    return tuple(example_inputs[0]), dict(example_inputs[1])
