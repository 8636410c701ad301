"""Plan and cluster files that were damaged in every way: an AutoparError of one line, or a valid object, in no time.

Nothing in a file is ever executed: while one is read, Python's own audit events are watched.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import autopar
from autopar.curves import AttentionRate, CollectiveCurve, DeviceCurves, OpCurve
from autopar.errors import AutoparError
from autopar.plan_check import check_decisions
from autopar.trace import Trace, trace
from autopar.verification import emit_for
from tests.models import tiny_mlp

QUICK, SLOW = 250, 3000
LONGEST_S = 5.0  # a file of a few hundred KB; milliseconds, on a machine that is not busy

# What reading a file may not do.
FORBIDDEN = ("exec", "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "pickle.find_class",
             "marshal.loads", "socket.connect", "ctypes.dlopen", "os.remove", "os.rename", "os.mkdir")  # fmt: skip
_watched: list[str] | None = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    written = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if event in FORBIDDEN or written:
        _watched.append(f"{event} {args!r}"[:200])


sys.addaudithook(_audit)  # cannot be taken away again; idle unless `_watched` is a list


@contextmanager
def nothing_executed() -> Iterator[None]:
    """Fails if anything in FORBIDDEN happens inside."""
    global _watched
    _watched = []
    try:
        yield
        assert _watched == []
    finally:
        _watched = None


@pytest.fixture(scope="module")
def plan_text() -> str:
    model, call = tiny_mlp()
    return autopar.plan(model, autopar.ClusterSpec.preset("cpu", gpus=2), example_inputs=call, pin={"tp": 2}).dumps()


@pytest.fixture(scope="module")
def cluster_text() -> str:
    """A cluster of two nodes with something measured of everything."""
    spec = autopar.ClusterSpec.preset("h100-sxm", gpus=16)
    points = ((1e3, 1e-5), (1e6, 2e-5), (1e9, 1e-2))
    curves = DeviceCurves(
        (OpCurve("matmul", "bfloat16", points), OpCurve("gelu", "float32", points)),
        (AttentionRate("forward", "bfloat16", 1e-5, 1e14, 1e12),),
    )
    links = tuple(replace(link, measured=(CollectiveCurve("all_reduce", 2, points),)) for link in spec.links)
    return replace(spec, device=replace(spec.device, measured=curves), links=links).to_json()


# -- mutations --------------------------------------------------------------------------------

_DEEP = "@deep@"  # stands in the data for what json.dumps would not write
_RAW = {
    "@nan@": "NaN", "@inf@": "-Infinity", "@huge@": "9" * 5000, "@exp@": "1e99999", "@tiny@": "1e-320",
    _DEEP: "[" * 20_000 + "]" * 20_000, "@deepdict@": '{"a":' * 20_000 + "1" + "}" * 20_000,
}  # fmt: skip
_VALUES: tuple[Any, ...] = (
    *_RAW, None, True, False, 0, -1, 1, 2, 10**18, 2**63, -(2**70), 0.5, -0.0, 1e308, "", "x", "R", "S(0)", "S(99) R",
    "S(-1)", "P P P", "S(0) S(0)", "P", "no_such_node", "__import__('os').system('true')", "../../etc/passwd",
    "\x00", "\ud800",
    [], {}, [[]], [None], [0], ["R"], {"a": 1}, {"__class__": "os"}, [[1.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]],
)  # fmt: skip


def containers(data: Any) -> list[Any]:
    """All objects and lists in nested data that are not empty, the outermost first."""
    found, queue = [], [data]
    while queue:
        at = queue.pop()
        if isinstance(at, (dict, list)) and at:
            found.append(at)
            queue.extend(at.values() if isinstance(at, dict) else at)
    return found


def mutate(data: Any, rng: random.Random) -> None:
    """Drop, replace, rename, swap, copy or repeat one thing."""
    every = containers(data)
    at = rng.choice(every)
    keys = list(at) if isinstance(at, dict) else list(range(len(at)))
    key, other = rng.choice(keys), rng.choice(keys)
    kind = rng.randrange(7)
    if kind == 0:
        del at[key]
    elif kind <= 2:
        at[key] = rng.choice(_VALUES)
    elif kind == 3 and isinstance(at, dict):
        at[rng.choice([key.upper(), key + "_", "", "schema_version", "autopar_plan", "nodes", other])] = at.pop(key)
    elif kind == 4:
        at[key], at[other] = at[other], at[key]
    elif kind == 5:
        at[key] = copy.deepcopy(rng.choice(every))
    elif isinstance(at, list):
        at.extend(copy.deepcopy(at) * rng.choice([1, 1, 100]))
    else:
        at[f"{key}2"] = copy.deepcopy(at[key])


def damaged(text: str, seed: int) -> bytes:
    """A file that was once `text`."""
    rng = random.Random(seed)
    data = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        mutate(data, rng)
    written = json.dumps(data)
    for mark, raw in _RAW.items():
        written = written.replace(f'"{mark}"', raw)
    raw_bytes = bytearray(written.encode("utf-8", "surrogatepass"))
    kind = rng.randrange(12)
    if kind == 0:
        del raw_bytes[rng.randrange(len(raw_bytes)) :]
    elif kind == 1:
        where = rng.randrange(len(raw_bytes))
        raw_bytes[where : where + 1] = rng.choice([b"\xff", b"\xc3", b"\x00", b"\xed\xa0\x80", b"\xf5\x80"])
    elif kind == 2:
        raw_bytes[:0] = rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x80\x04", b"#!/bin/sh\n"])
    elif kind == 3:
        raw_bytes += rng.choice([b"}", b"\n{}", b"\x00", bytes(raw_bytes)])
    return bytes(raw_bytes)


def read(load: Callable[[Path], Any], path: Path, raw: bytes) -> Any:
    """What a file holds, None if it is refused; a refusal is one line, and neither takes long."""
    path.write_bytes(raw)
    began = time.thread_time()
    loaded = None
    with nothing_executed():
        try:
            loaded = load(path)
        except AutoparError as error:
            message = str(error)
            assert "\n" not in message and path.name in message and len(message) < 1500, message[:3000]
            message.encode()  # can be printed
    assert time.thread_time() - began < LONGEST_S
    return loaded


def check_cluster(text: str, folder: Path, seed: int) -> None:
    spec = read(autopar.ClusterSpec.load, folder / "cluster.json", damaged(text, seed))
    if spec is not None:
        assert autopar.ClusterSpec.from_json(spec.to_json()) == spec
        assert spec.devices >= 1 and hash(spec) == hash(replace(spec))


def check_plan(text: str, folder: Path, seed: int) -> None:
    plan = read(autopar.Plan.load, folder / "plan.json", damaged(text, seed))
    if plan is not None:
        assert autopar.Plan.loads(plan.dumps()) == plan


def fuzzed(examples: int) -> Callable[[Any], Any]:
    """Run a test for this many seeds, always the same."""
    quiet = list(HealthCheck)
    chosen = settings(max_examples=examples, deadline=None, suppress_health_check=quiet, derandomize=True)
    return lambda test: chosen(given(seed=st.integers(0, 2**48))(test))


@fuzzed(QUICK)
def test_damaged_clusters(cluster_text: str, tmp_path: Path, seed: int) -> None:
    check_cluster(cluster_text, tmp_path, seed)


@fuzzed(QUICK)
def test_damaged_plans(plan_text: str, tmp_path: Path, seed: int) -> None:
    check_plan(plan_text, tmp_path, seed)


@pytest.mark.slow
@fuzzed(SLOW)
def test_many_damaged_clusters(cluster_text: str, tmp_path: Path, seed: int) -> None:
    check_cluster(cluster_text, tmp_path, seed)


@pytest.mark.slow
@fuzzed(SLOW)
def test_many_damaged_plans(plan_text: str, tmp_path: Path, seed: int) -> None:
    check_plan(plan_text, tmp_path, seed)


def test_an_error_does_not_quote_the_whole_file(plan_text: str, tmp_path: Path) -> None:
    for key in ("rules", "params"):
        data = json.loads(plan_text)
        for holder in data["rules"] if key == "rules" else [data["params"]]:
            for name in holder:
                holder[name] = [data["nodes"]] if key == "rules" else data["nodes"]
        assert read(autopar.Plan.load, tmp_path / "plan.json", json.dumps(data).encode()) is None


def test_the_fuzzer_damages_and_spares(cluster_text: str, plan_text: str, tmp_path: Path) -> None:
    """Of its files some are refused and some are good: else the tests above would say nothing."""
    for text, load in ((cluster_text, autopar.ClusterSpec.load), (plan_text, autopar.Plan.load)):
        good = [read(load, tmp_path / "file.json", damaged(text, seed)) is not None for seed in range(100)]
        assert 3 <= sum(good) <= 97


# -- decisions that load but do not fit ---------------------------------------------------------


def shuffled(text: str, seed: int) -> autopar.Plan:
    """A plan whose decisions were exchanged among each other: every state and rule of it is a legal one."""
    rng, data = random.Random(seed), json.loads(text)
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.randrange(6)
        if kind <= 1:
            node = data["nodes"][rng.choice(sorted(data["nodes"]))]
            states = rng.choice([node["take"], node["make"]]) or node["make"]
            states[rng.randrange(len(states))] = rng.choice(["R", "P", "S(0)", "S(1)", "S(7)", None])
        elif kind == 2:
            names = sorted(data["params"])
            data["params"][rng.choice(names)] = rng.choice(["R", "P", "S(0)", "S(1)", "S(2)"])
        elif kind == 3:
            data["kept"] = rng.sample(data["kept"], rng.randrange(len(data["kept"]) + 1))
        elif kind == 4:
            rule = rng.choice(data["rules"])
            rule["lowering"] = rng.choice([r["lowering"] for r in data["rules"]] + ["os.system"])
        else:
            one, two = (data["nodes"][rng.choice(sorted(data["nodes"]))] for _ in range(2))
            one["recompute"], two["rules"] = not one["recompute"], two["rules"]
    return autopar.Plan.loads(json.dumps(data))


@fuzzed(60)
def test_decisions_that_do_not_go_together(plan_text: str, traced: Trace, seed: int) -> None:
    """Whatever was exchanged, writing the program works or is one error."""
    message = ""
    try:
        plan = shuffled(plan_text, seed)
        check_decisions(traced, plan.decisions, plan.mesh)
        emit_for(traced, plan)
    except AutoparError as error:
        message = str(error)
    assert "\n" not in message


@pytest.fixture(scope="module")
def traced() -> Trace:
    return trace(*tiny_mlp())


def test_decisions_about_nodes_that_do_not_exist(plan_text: str, tmp_path: Path) -> None:
    """Names can only be checked against a model: there, too, it is one error, and nothing is executed."""
    model, call = tiny_mlp()
    data = json.loads(plan_text)
    first = sorted(data["nodes"])[0]
    for edit in ("renamed node", "no parameters", "no output", "kept nothing"):
        changed = copy.deepcopy(data)
        if edit == "renamed node":
            changed["nodes"]["no_such_node"] = changed["nodes"].pop(first)
        elif edit == "no parameters":
            changed["params"] = {"no.such.weight": next(iter(changed["params"].values()))}
        elif edit == "no output":
            changed["outputs"] = {}
        else:
            changed["kept"], changed["kept_copies"] = ["no_such_value"], []
        plan = autopar.Plan.loads(json.dumps(changed))
        with pytest.raises(AutoparError) as caught:
            autopar.verify(model, plan, example_inputs=call)
        assert "\n" not in str(caught.value)
