"""Dumped stages: what is written is the same program when it is read back, and reading runs nothing."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import autopar
from autopar import AutoparError, ClusterSpec, Plan, PlanError
from autopar.codegen.dump import read_program
from autopar.dumping.parse import parse_python, read_python
from autopar.dumping.problem import read_problem
from autopar.dumping.source import Remark, python_source
from autopar.sample import sample_values
from autopar.solver import solve
from autopar.trace import Trace, trace
from autopar.verification import Simulation, emit_for, run_reference, simulated_ranks
from tests.models import tiny_bert, tiny_llama, tiny_mlp
from tests.test_planning import cluster

FILES = [
    "01_trace.py",
    "02_problem.json",
    "03_plan.json",
    "04_program_rank0_backward.py",
    "04_program_rank0_forward.py",
]


class Dropping(nn.Module):
    """A random op in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.dropout(self.up(x), 0.5, training=self.training)).square().mean()


def dropping() -> Any:
    return Dropping().double(), ((torch.randn(8, 16, dtype=torch.float64),), {})


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "mlp": (tiny_mlp, {"dp": 2, "tp": 2, "recompute": "full"}),
    "dropout": (dropping, {"dp": 2, "tp": 2}),
    "llama": (lambda: tiny_llama(layers=1), {"dp": 2, "tp": 2, "zero": 3}),
    "bert": (lambda: tiny_bert(layers=1), {"tp": 4}),
}


@cache
def dumped(name: str, root: Path) -> tuple[nn.Module, Any, Plan, Trace, Path]:
    make, pin = CASES[name]
    model, call = make()
    folder = root / name
    plan = autopar.plan(model, cluster(4), example_inputs=call, pin=pin, time_limit_s=3, dump_dir=folder)
    return model, call, plan, trace(model, call), folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dumps")


each_case = pytest.mark.parametrize("name", ["mlp", "dropout", "llama", pytest.param("bert", marks=pytest.mark.slow)])


def shape_of(graph: fx.Graph) -> list[Any]:
    """Ops, targets and wiring, whatever the nodes are called."""
    number = {node: i for i, node in enumerate(graph.nodes)}

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", number[value])
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return repr(value)

    return [
        (n.op, None if n.op == "placeholder" else n.target, plain(n.args), {k: plain(v) for k, v in n.kwargs.items()})
        for n in graph.nodes
        if n.op != "placeholder"
    ]


@each_case
def test_the_program_read_back_computes_identical_numbers(name: str, root: Path) -> None:
    model, call, plan, traced, folder = dumped(name, root)
    emitted = emit_for(traced, plan)
    forward, backward = read_program(folder)
    assert shape_of(forward.graph) == shape_of(emitted.forward)
    assert shape_of(backward.graph) == shape_of(emitted.backward)
    again = replace(emitted, forward=forward.graph, backward=backward.graph)
    values = sample_values(traced, model, call, 0)
    with simulated_ranks(plan.mesh) as (groups, coordinates):
        results = []
        for program in (emitted, again):
            outputs, grads = Simulation(traced, plan.decisions, program, groups, coordinates).step(values)
            results.append({**outputs, **grads})
    assert results[0].keys() == results[1].keys() and len(results[0]) > len(traced.params)
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@each_case
def test_the_trace_read_back_computes_identical_numbers(name: str, root: Path) -> None:
    model, call, _, traced, folder = dumped(name, root)
    values = sample_values(traced, model, call, 0)
    torch.manual_seed(0)
    expected = run_reference(traced, values)
    graph = read_python(folder / "01_trace.py")
    inputs = [values[n.name] for n in traced.graph_module.graph.nodes if n.op == "placeholder"]
    torch.manual_seed(0)
    with torch.no_grad():
        found = graph(*inputs)
    assert len(found) == len(traced.results)
    assert all(torch.equal(a, expected[name]) for a, name in zip(found, traced.results, strict=True))


def test_the_files_are_python_that_runs(tmp_path: Path) -> None:
    """Imported as a module, the forward pass of one device gives the model's own loss."""
    model, call = tiny_mlp()
    program = autopar.compile(model, ClusterSpec.preset("cpu", gpus=1), example_inputs=call, dump_dir=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES
    spec = importlib.util.spec_from_file_location("dumped_forward", tmp_path / FILES[-1])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    traced = trace(model, call)
    values = sample_values(traced, model, call, 0)
    names = [n.name for n in emit_for(traced, program.plan).forward.nodes if n.op == "placeholder"]  # type: ignore[arg-type]
    with torch.no_grad():
        loss = module.forward(*(values[name] for name in names))[0]
    assert torch.equal(loss, model(*call[0], **call[1])["loss"].detach())


def test_later_shapes_are_dumped_beside_the_first(tmp_path: Path) -> None:
    model, call = tiny_mlp()
    program = autopar.compile(model, ClusterSpec.preset("cpu", gpus=1), example_inputs=call, dump_dir=tmp_path)
    half = {**call[1], "target": call[1]["target"][:4]}
    program(call[0][0][:4], **half)
    assert sorted(p.name for p in (tmp_path / "2").iterdir()) == FILES


@each_case
def test_plan_and_problem_are_read_back(name: str, root: Path) -> None:
    _, _, plan, _, folder = dumped(name, root)
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert Plan.load(folder / "03_plan.json").dumps() == plan.dumps()
    problem = read_problem(folder / "02_problem.json")
    assert problem.capacity_bytes == plan.options.memory_limit_bytes
    assert {f"param:{fqn}" for fqn in plan.decisions.params} <= {op.name for op in problem.ops}
    if name == "mlp":
        found = solve(problem)
        assert found.objective_s == pytest.approx(plan.objective_s, rel=2e-4)


def test_problem_files_that_are_none(tmp_path: Path, root: Path) -> None:
    text = (dumped("mlp", root)[4] / "02_problem.json").read_text()
    bad = tmp_path / "bad.json"
    for wrong in ("", "[]", "{}", text[:5000], text.replace('"autopar_problem": 1', '"autopar_problem": 9')):
        bad.write_text(wrong)
        with pytest.raises(PlanError, match=r"bad\.json") as error:
            read_problem(bad)
        assert "\n" not in str(error.value)


# -- what stands beside the ops ----------------------------------------------------------------


def test_placements_and_source_lines_stand_beside_the_ops(root: Path) -> None:
    _, _, plan, traced, folder = dumped("mlp", root)
    text = (folder / "04_program_rank0_forward.py").read_text()
    lines = text.splitlines()
    assert "    # up, tests/models.py:" in text and "torch.nn.functional.gelu(self.up(x * self.scale))" in text
    emitted = emit_for(traced, plan)
    placed = [n for n in emitted.forward.nodes if n.op == "call_function" and "version" in n.meta]
    assert len(placed) > 5
    for node in placed:
        line = next(row for row in lines if row.startswith(f"    {node.name} = "))
        assert line.endswith(f"  {', '.join(node.meta['version'][2])}")
    weight = next(row for row in lines if row.startswith("    p_up_weight,"))
    assert weight.endswith(", ".join(plan.decisions.params["up.weight"]))
    traced_text = (folder / "01_trace.py").read_text()
    assert "p_up_weight: parameter up.weight" in traced_text and "gradient of up.weight = " in traced_text
    backward = (folder / "04_program_rank0_backward.py").read_text()
    assert "    # backward of up, tests/models.py:" in backward and "gradient of down.bias" in backward


# -- graphs of every kind ------------------------------------------------------------------------


def plain(node: fx.Node) -> Remark:
    return Remark()


def test_arguments_of_every_kind() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.placeholder("math")  # hides a module that the file imports
    aten = torch.ops.aten
    full = graph.call_function(aten.full.default, ([2, 2], float("-inf")), {"dtype": torch.float64})
    clamped = graph.call_function(aten.clamp.default, (x, None, float("inf")))
    filled = graph.call_function(aten.full_like.default, (clamped, float("nan")))
    moved = graph.call_function(
        aten._to_copy.default,
        (filled,),
        {"device": torch.device("cpu"), "layout": torch.strided, "memory_format": torch.contiguous_format},
    )
    wave = graph.call_function(aten.mul.Scalar, (full, complex(0.0, 2.0)))
    tiny = graph.call_function(aten.add.Scalar, (clamped, -1e-300))
    graph.output((moved, [wave, (tiny,)], None, True, 'a "quoted" \\ text'))
    text = python_source(graph, "all kinds", plain)
    read = parse_python(text)
    assert shape_of(read.graph) == shape_of(graph)
    assert parse_python(python_source(read.graph, "again", plain)).code == read.code


def test_repeated_layers_are_functions_called_often() -> None:
    """A submodule that is called twice, with a submodule of its own, is written once and read back as one."""

    class Inner(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ops.aten.mul.Tensor(x, y), torch.ops.aten.add.Tensor(x, y)

    def layer() -> fx.GraphModule:
        graph = fx.Graph()
        x = graph.placeholder("x")
        both = graph.create_node("call_module", "inner", (x, x), {})
        first = graph.call_function(__import__("operator").getitem, (both, 0))
        graph.output(graph.call_function(torch.ops.aten.sin.default, (first,)))
        outer = nn.Module()
        outer.inner = fx.symbolic_trace(Inner())
        return fx.GraphModule(outer, graph)

    graph = fx.Graph()
    x = graph.placeholder("x")
    for _ in range(2):
        x = graph.create_node("call_module", "layers.block", (x,), {})
    graph.output((x,))
    block = layer()
    text = python_source(graph, "layers", plain, modules={"layers.block": block})
    assert text.count("def ") == 3 and text.count("layers_block(") == 3
    read = parse_python(text)
    value = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.equal(read(value)[0], block(block(value)))
    assert len([m for m in read.modules() if isinstance(m, fx.GraphModule)]) == 3


def test_what_python_cannot_say_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.nn.functional.relu, (x,)))
    with pytest.raises(AutoparError, match="cannot write node relu as Python"):
        python_source(graph, "", plain)
    graph = fx.Graph()
    graph.output(graph.create_node("call_module", "nowhere", (graph.placeholder("x"),), {}))
    with pytest.raises(AutoparError, match="nothing is known of its submodule 'nowhere'"):
        python_source(graph, "", plain)


# -- hostile files ----------------------------------------------------------------------------------

GOOD = '"""x"""\nimport torch\ndef forward(x):\n    y = torch.ops.aten.sin.default(x)\n    return (y,)\n'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0",
        "(" * 5000,
        "print(1)",
        "open('executed', 'w')",
        "from os import system\n" + GOOD,
        GOOD + "\nopen('executed', 'w')\n",
        GOOD.replace("def forward(x)", "def forward(x=open('executed', 'w'))"),
        GOOD.replace("def forward(x)", "def forward(*x)"),
        GOOD.replace("torch.ops.aten.sin.default(x)", "open('executed', 'w')"),
        GOOD.replace("torch.ops.aten.sin.default(x)", "torch.load('executed')"),
        GOOD.replace("torch.ops.aten.sin.default(x)", "torch.ops.load_library('executed')"),
        GOOD.replace("torch.ops.aten.sin.default(x)", "torch.ops.aten.sin.__class__(x)"),
        GOOD.replace("torch.ops.aten.sin.default(x)", "torch.ops.aten.no_such_op.default(x)"),
        GOOD.replace("torch.ops.aten.sin.default(x)", "operator.__class__(x)"),
        GOOD.replace("sin.default(x)", "sin.default(*x)"),
        GOOD.replace("sin.default(x)", "sin.default(**x)"),
        GOOD.replace("sin.default(x)", "sin.default(z)"),
        GOOD.replace("sin.default(x)", "sin.default([i for i in x])"),
        GOOD.replace("sin.default(x)", "sin.default(lambda: x)"),
        GOOD.replace("sin.default(x)", "sin.default(torch.nn)"),
        GOOD.replace("sin.default(x)", "sin.default(torch.device('nowhere'))"),
        GOOD.replace("y = torch", "x = torch"),
        GOOD.replace("y = torch", "x.y = torch"),
        GOOD.replace("    return (y,)\n", ""),
    ],
)
def test_other_code_is_refused_and_not_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(PlanError, match=r"bad\.py") as error:
        read_python("bad.py")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert [p.name for p in tmp_path.iterdir()] == ["bad.py"]


def test_damaged_dumps_are_read_or_refused(root: Path) -> None:
    text = (dumped("mlp", root)[4] / "04_program_rank0_forward.py").read_text()
    rng = random.Random(0)
    messages = []
    for _ in range(60):
        at, size = rng.randrange(len(text)), rng.randrange(1, 40)
        junk = "".join(rng.choice("()[]=,.xyz01'\"# \n") for _ in range(rng.randrange(4)))
        try:
            parse_python(text[:at] + junk + text[at + size :])
        except PlanError as error:
            messages.append(str(error))
    assert messages and not any("\n" in message for message in messages)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    model, call = tiny_mlp()
    (tmp_path / "file").write_text("")
    with pytest.raises(AutoparError, match="cannot write to dump_dir"):
        autopar.plan(model, cluster(1), example_inputs=call, dump_dir=tmp_path / "file")
