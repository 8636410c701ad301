"""What can't be captured says what is wrong, on which line of the user's code, and what to change."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autopar.errors import TraceError
from autopar.trace import trace

stray = nn.Linear(4, 4)
log = logging.getLogger("model")


class Model(nn.Module):
    """Calls `body(self, x)`, which each test writes."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("state", torch.zeros(4))
        self.plain = torch.ones(4)
        self.body = body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


def branch(m, x):
    if x.sum() > 0:  # HERE
        return m.layer(x).sum()
    return x.sum()


def flag(m, x):
    found = (x > 0).any().item()
    return m.layer(x).sum() if found else x.sum()  # HERE


def item(m, x):
    return (m.layer(x) * x.sum().item()).sum()  # HERE


def to_float(m, x):
    return (m.layer(x) * float(x.sum())).sum()  # HERE


def to_list(m, x):
    return (m.layer(x) * x[0].tolist()[0]).sum()  # HERE


def prints(m, x):
    print(x.shape)  # noqa: T201  # HERE
    return m.layer(x).sum()


def mask(m, x):
    return m.layer(x[x > 0].reshape(-1, 4)).sum()  # HERE


def unique(m, x):
    return m.layer(x).sum() + torch.unique(x).sum()  # HERE


def numpy_call(m, x):
    return (m.layer(x) * np.random.default_rng(0).normal()).sum()  # HERE


def wrong_shape(m, x):
    return (m.layer(x) + torch.ones(3)).sum()  # HERE


def raises(m, x):
    raise ValueError("x is no good")  # HERE


def changes_input(m, x):
    x.add_(1)  # HERE
    return m.layer(x).sum()


def changes_parameter(m, x):
    with torch.no_grad():
        m.layer.weight.mul_(0.9)  # HERE
    return m.layer(x).sum()


def changes_attribute(m, x):
    m.plain.mul_(0.9)  # HERE
    return m.layer(x + m.plain).sum()


def makes_a_logger(m, x):
    logging.getLogger("model").info("here")  # HERE
    return m.layer(x).sum()


def closure(m, x):
    return stray(m.layer(x)).sum()  # HERE


def conditional(m, x):
    return torch.cond(x.sum() > 0, torch.sin, torch.cos, (m.layer(x),)).sum()  # HERE


def breaks(m, x):
    torch._dynamo.graph_break()  # HERE
    return m.layer(x).sum()


@torch.compiler.disable
def hidden(x):
    return 2 * x


def disabled(m, x):
    return m.layer(hidden(x)).sum()  # HERE


CASES: list[tuple[Callable[..., Any], str, str]] = [
    (branch, "branches on the value of a tensor", "torch.where"),
    (flag, "branches on the value of a tensor", "torch.where"),
    (breaks, "breaks the graph on purpose", "graph_break"),
    (disabled, "kept out of graphs by torch.compiler.disable", "remove that decorator"),
    (item, r"reads the value of a tensor \(\.item", "keep the value in a tensor"),
    (to_float, "reads the value of a tensor", "keep the value in a tensor"),
    (to_list, r"reads the values of a tensor \(\.tolist", "keep the values in a tensor"),
    (prints, "calls print", "is_compiling"),
    (mask, "shape of a result depends on values", "torch.where"),
    (unique, "shape of a result depends on values", "torch.where"),
    (numpy_call, "calls a NumPy function", "torch function of the same name"),
    (wrong_shape, "broadcast a dimension of length 3", "runs on one device with these example inputs"),
    (raises, r"its code raises ValueError\('x is no good'\)", "example inputs"),
    (changes_input, "changes its input 'x' in place", "clone it first"),
    (changes_parameter, "changes its parameter 'layer.weight' in place", "make it a buffer"),
    (changes_attribute, "changes plain in place", "register it as a buffer"),
    (makes_a_logger, "makes a logger", "outside of forward"),
    (closure, "reaches a parameter through a closure", "register it on the module"),
    (conditional, "control-flow operator", "write it without"),
]


def line_of(body: Callable[..., Any], mark: str = "# HERE") -> str:
    lines, start = inspect.getsourcelines(body)
    return f"{__file__}:{start + next(i for i, line in enumerate(lines) if mark in line)}"


@pytest.mark.parametrize(("body", "problem", "remedy"), CASES, ids=[c[0].__name__ for c in CASES])
def test_error_names_the_line_and_the_remedy(body: Callable[..., Any], problem: str, remedy: str) -> None:
    with pytest.raises(TraceError, match=problem) as caught:
        trace(Model(body), ((torch.ones(8, 4),), {}))
    assert caught.value.source == line_of(body)
    message = str(caught.value)
    assert remedy in message and line_of(body) in message and "\n" not in message
    assert "torch/_dynamo" not in message and "torch/_subclasses" not in message


class Rebinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.average = 0.9 * self.average + x.mean(0)  # HERE
        return self.inner(x).sum()


def test_a_rebound_buffer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Rebinds())
    with pytest.raises(TraceError, match=r"forward binds 1\.average to a new tensor .*self\.average\.copy_") as caught:
        trace(model, ((torch.ones(8, 4),), {}))
    assert caught.value.source == line_of(Rebinds)


def logs(m, x):
    log.warning("seen %s", x.shape)
    warnings.warn("look out", stacklevel=1)
    return m.layer(x).sum()


def test_logging_is_left_out_of_the_graph() -> None:
    assert trace(Model(logs), ((torch.ones(8, 4),), {})).num_forward > 0


def checks(m, x):
    torch._check_tensor_all(x > 0, lambda: "x must be positive")
    return m.layer(x).sum()


def test_a_check_of_values_is_left_out_of_the_graph() -> None:
    assert trace(Model(checks), ((torch.ones(8, 4),), {})).num_forward > 0


def attaches(m, x):
    y = m.layer(x)
    m.scale.copy_(y.mean())  # HERE
    return y.sum()


def test_a_buffer_that_keeps_the_graph_is_refused() -> None:
    model = Model(attaches)
    model.register_buffer("scale", torch.ones(()))
    with pytest.raises(TraceError, match=r"buffer 'scale' gets a value that requires grad .*\.detach\(\)") as caught:
        trace(model, ((torch.ones(8, 4),), {}))
    assert caught.value.source == line_of(attaches)


NOTHING_TO_TRAIN: list[tuple[Callable[..., Any], str]] = [
    (lambda m, x: x.sum(), r"\(a tensor of shape \(\) and dtype float32\)"),
    (lambda m, x: {"logits": m.layer(x).detach(), "x": x}, r"\(dict with logits, x\)"),
    (lambda m, x: [None, m.layer(x).argmax(-1)], r"\(a list\)"),
]


@pytest.mark.parametrize(("body", "what"), NOTHING_TO_TRAIN)
def test_results_that_depend_on_no_parameter(body: Callable[..., Any], what: str) -> None:
    says = rf"nothing that the model returns {what} depends on a parameter that requires grad; let it return"
    with pytest.raises(TraceError, match=says) as caught:
        trace(Model(body), ((torch.ones(8, 4),), {}))
    assert caught.value.source == line_of(Model.forward, "def forward")


def test_no_computation() -> None:
    with pytest.raises(TraceError, match="computes nothing with tensors; let forward return a scalar loss"):
        trace(Model(lambda m, x: None), ((torch.ones(8, 4),), {}))


def test_eager_experts_name_the_option() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=4, num_local_experts=4, use_cache=False, **sizes)
    config._experts_implementation = "eager"
    ids = torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(TraceError, match=r"mixture-of-experts .*experts_implementation=") as caught:
        trace(MixtralForCausalLM(config), ((), {"input_ids": ids, "labels": ids}))
    assert caught.value.source is not None and "/transformers/" in caught.value.source


class Unregistered:
    __slots__ = ("loss",)  # without a __dict__ nothing says what it holds

    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


def test_results_and_modules_that_cannot_be_taken_apart() -> None:
    x = ((torch.ones(8, 4),), {})
    with pytest.raises(TraceError, match=r"Unregistered .*neither a tensor nor a constant nor a registered pytree"):
        trace(Model(lambda m, x: Unregistered(m.layer(x).sum())), x)
    hidden = Model(lambda m, x: m.layer(m.more[0](x)).sum())
    hidden.more = [nn.Linear(4, 4)]
    with pytest.raises(TraceError, match=r"more\[0\] is a module that no module registers; use nn.ModuleList"):
        trace(hidden, x)
    loose = Model(lambda m, x: (m.layer(x) * m.more[0]).sum())
    loose.more = [nn.Parameter(torch.ones(4))]
    with pytest.raises(TraceError, match=r"more\[0\] holds a parameter that no module registers"):
        trace(loose, x)


def changed(name: str, tensor: torch.Tensor) -> nn.Module:
    model = Model(lambda m, x: m.layer(x).sum())
    trained = tensor.is_floating_point() or tensor.is_complex()
    model.register_parameter(name, nn.Parameter(tensor, requires_grad=trained))
    return model


def test_tensors_that_cannot_be_planned() -> None:
    x = ((torch.ones(8, 4),), {})
    with pytest.raises(TraceError, match="'w' is complex and requires grad"):
        trace(changed("w", torch.ones(2, dtype=torch.complex64)), x)
    with pytest.raises(TraceError, match=r"'w' has a dim of size 0 \(shape \(0, 4\)\)"):
        trace(changed("w", torch.ones(0, 4)), x)
    with pytest.raises(TraceError, match="'w' is not a plain dense tensor"):
        trace(changed("w", torch.eye(4).to_sparse()), x)
    plain = Model(lambda m, x: m.layer(x).sum())
    with pytest.raises(TraceError, match="input 'x' has a dim of size 0"):
        trace(plain, ((torch.ones(0, 4),), {}))
    with pytest.raises(TraceError, match="input 'x' requires grad"):
        trace(plain, ((torch.ones(8, 4, requires_grad=True),), {}))
    integers = trace(changed("w", torch.ones(2, dtype=torch.long)), x)
    assert {p.fqn: p.dtype for p in integers.params}["w"] == torch.long and "w" not in integers.grads


def test_wrong_calls() -> None:
    model = Model(lambda m, x: m.layer(x).sum())
    x = torch.ones(8, 4)
    with pytest.raises(TraceError, match="arguments don't fit the model's forward: missing a required argument: 'x'"):
        trace(model, ((), {}))
    with pytest.raises(TraceError, match="unexpected keyword argument 'y'"):
        trace(model, ((x,), {"y": x}))
    with pytest.raises(TraceError, match=r"must be a pair \(args, kwargs\)"):
        trace(model, {"x": x})  # type: ignore[arg-type]
    with pytest.raises(TraceError, match=r"not an nn\.Module"):
        trace(torch.sin, ((x,), {}))  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="no parameter of the model requires grad"):
        trace(Model(lambda m, x: x.sum()).requires_grad_(False), ((x,), {}))
    if not torch.backends.cuda.is_built():
        with pytest.raises(TraceError, match="cannot trace for device 'cuda'"):
            trace(model, ((x,), {}), device="cuda")


def test_an_error_leaves_nothing_behind() -> None:
    from torch._dynamo import config

    before, log = config.get_config_copy(), logging.getLogger("torch._subclasses.fake_tensor")
    with pytest.raises(TraceError):
        trace(Model(branch), ((torch.ones(8, 4),), {}))
    assert config.get_config_copy() == before and not log.disabled and torch.is_grad_enabled()
