"""The solver's problem as JSON, in the words of placements, and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autopar.errors import PlanError
from autopar.json_reader import Reader
from autopar.placements import State
from autopar.sharding import ShardingProblem
from autopar.solver import Choice, Op, Problem, Value

VERSION = 1


def problem_text(stated: ShardingProblem) -> str:
    """One line per table of conversions, value, offer of choices and op; what is alike is written once."""
    problem = stated.problem
    tables: dict[str, int] = {}
    offers: dict[str, int] = {}
    values = [
        {
            "name": value.name,
            "table": tables.setdefault(_line(_table(value, states)), len(tables)),
            "always_available": value.always_available,
            "live_out": value.live_out,
        }
        for value, states in zip(problem.values, stated.states, strict=True)
    ]
    ops = [_op(op, stated, offers) for op in problem.ops]
    parts = {"tables": list(tables), "offers": list(offers), "values": map(_line, values), "ops": map(_line, ops)}
    head = {
        "autopar_problem": VERSION,
        "mesh": list(stated.mesh),
        "forward_ops": problem.forward_ops,
        "capacity_bytes": problem.capacity_bytes,
        "constant_bytes": problem.constant_bytes,
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    for key, rows in parts.items():
        joined = ",\n  ".join(rows)
        lines.append(f' "{key}": [\n  {joined}\n ]{"" if key == "ops" else ","}')
    return "\n".join(["{", *lines, "}"]) + "\n"


def _line(data: Any) -> str:
    return json.dumps(data, allow_nan=False)


def _table(value: Value, states: Sequence[State]) -> dict[str, Any]:
    workspace = value.convert_workspace_bytes
    return {
        "states": [" ".join(state) for state in states],
        "bytes": list(value.state_bytes),
        "convert_s": [[float(s) if np.isfinite(s) else None for s in row] for row in value.convert_s],
        "workspace_bytes": None if workspace is None else workspace.tolist(),
    }


def _op(op: Op, stated: ShardingProblem, offers: dict[str, int]) -> dict[str, Any]:
    def words(values: Sequence[int], states: Sequence[int]) -> list[str]:
        return [" ".join(stated.states[v][s]) for v, s in zip(values, states, strict=True)]

    choices = [
        {
            "take": words(op.operands, choice.uses),
            "make": words(op.results, choice.makes),
            "cost_s": choice.cost_s,
            "workspace_bytes": choice.workspace_bytes,
            "persistent_bytes": choice.persistent_bytes,
        }
        for choice in op.choices
    ]
    names = stated.problem.values
    return {
        "name": op.name,
        "operands": [names[v].name for v in op.operands],
        "results": [names[v].name for v in op.results],
        "offer": offers.setdefault(_line(choices), len(offers)),
        "recompute_time": op.recompute_time,
        "must_rerun": op.must_rerun,
        "tied_to": op.tied_to,
        "twin_of": op.twin_of,
        "results_start_next": op.results_start_next,
    }


def read_problem(path: str | Path) -> Problem:
    """The problem in a dumped file; raises PlanError for a file that holds none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"cannot read problem {path}: {error}") from None
    try:
        return _decode(Reader(data, str(path)))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise PlanError(f"{path}: not a usable problem file ({error}); dump it again") from None


def _decode(reader: Reader) -> Problem:
    version = reader.get("autopar_problem", int)
    reader.check("autopar_problem", version == VERSION, f"this autopar reads version {VERSION}")
    tables, offers = reader.get("tables", list), reader.get("offers", list)
    values = [_value(row, tables[row["table"]]) for row in reader.get("values", list)]
    index = {value.name: i for i, value in enumerate(values)}
    states = [tables[row["table"]]["states"] for row in reader.get("values", list)]
    capacity = reader.data.get("capacity_bytes")
    return Problem(
        ops=tuple(_read_op(row, offers[row["offer"]], index, states) for row in reader.get("ops", list)),
        values=tuple(values),
        forward_ops=reader.get("forward_ops", int),
        capacity_bytes=None if capacity is None else int(capacity),
        constant_bytes=reader.get("constant_bytes", int),
    )


def _value(row: dict[str, Any], table: dict[str, Any]) -> Value:
    seconds = np.array([[np.inf if s is None else s for s in line] for line in table["convert_s"]], dtype=np.float64)
    workspace = table["workspace_bytes"]
    return Value(
        row["name"],
        tuple(table["bytes"]),
        seconds.reshape(len(table["bytes"]), len(table["bytes"])),
        row["always_available"],
        row["live_out"],
        None if workspace is None else np.array(workspace, dtype=np.int64),
    )


def _read_op(row: dict[str, Any], offer: list[dict[str, Any]], index: dict[str, int], states: list[list[str]]) -> Op:
    operands = tuple(index[name] for name in row["operands"])
    results = tuple(index[name] for name in row["results"])

    def numbers(values: tuple[int, ...], words: list[str]) -> tuple[int, ...]:
        return tuple(states[v].index(word) for v, word in zip(values, words, strict=True))

    return Op(
        name=row["name"],
        operands=operands,
        results=results,
        choices=tuple(
            Choice(
                choice["cost_s"],
                numbers(operands, choice["take"]),
                numbers(results, choice["make"]),
                choice["workspace_bytes"],
                choice["persistent_bytes"],
            )
            for choice in offer
        ),
        recompute_time=row["recompute_time"],
        results_start_next=row["results_start_next"],
        must_rerun=row["must_rerun"],
        tied_to=row["tied_to"],
        twin_of=row["twin_of"],
    )
