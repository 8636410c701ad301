"""Plan files: what is saved is what is loaded, and whatever else a file holds is one clear PlanError."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import autopar
from autopar import Plan, PlanError
from tests.models import tiny_mlp


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan of the small MLP that splits tensors on both axes and has kept values."""
    model, call = tiny_mlp()
    cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=4)
    return autopar.plan(model, cluster, example_inputs=call, pin={"dp": 2, "tp": 2})


def refused(text: str) -> str:
    """The one line with which a text is refused as a plan."""
    with pytest.raises(PlanError) as caught:
        Plan.loads(text, "some.json")
    message = str(caught.value)
    assert message.startswith("some.json") and "\n" not in message and len(message) < 600, message[:1000]
    return message


# -- what is saved is what is loaded ------------------------------------------------------


def test_round_trip(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan
    assert loaded.dumps() == plan.dumps() == path.read_text()
    assert loaded.decisions.params == plan.decisions.params and loaded.decisions.kept
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_times_are_not_part_of_the_file(plan: Plan) -> None:
    assert plan.timings["solve_s"] > 0
    assert plan.with_timings(solve_s=123.0).dumps() == plan.dumps()
    assert Plan.loads(plan.dumps()).timings == {}


# -- files that are no plans ----------------------------------------------------------------


def test_truncated_anywhere(plan: Plan) -> None:
    text = plan.dumps().rstrip()
    for end in [*range(0, len(text), 100), len(text) - 1]:
        assert "not a plan file" in refused(text[:end])


@pytest.mark.parametrize(
    "text",
    ["", "null", "3", '"plan"', "[]", "{}", "true", "NaN", '{"autopar_plan": 1}', '{"autopar_plan": null}', "\0\1\2"],
)
def test_no_plan_at_all(text: str) -> None:
    refused(text)


def test_newer_version(plan: Plan) -> None:
    data = json.loads(plan.dumps())
    data["autopar_plan"] = 99
    message = refused(json.dumps(data))
    assert "newer autopar" in message and "99" in message and "upgrade" in message


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, [1]])
def test_versions_that_never_were(plan: Plan, version: Any) -> None:
    data = json.loads(plan.dumps())
    data["autopar_plan"] = version
    refused(json.dumps(data))


@pytest.mark.parametrize("wrong", [None, 7, -1.5, "x", [], {}, True, [[]], {"a": {"b": []}}])
def test_every_field_with_a_wrong_value(plan: Plan, wrong: Any) -> None:
    """Each field of the file in turn is given another type: it is refused by name, or it was a free value."""
    original = json.loads(plan.dumps())
    for key, value in original.items():
        if type(value) is type(wrong):
            continue
        assert key in refused(json.dumps({**original, key: wrong})) or key in ("cluster", "unruled")
    for key in original:
        message = refused(json.dumps({k: v for k, v in original.items() if k != key}))
        assert repr(key) in message and "missing" in message


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d.update(mesh=[0, 4]), "mesh"),
        (lambda d: d.update(mesh=[4], roles=["dp"]), "rules"),
        (lambda d: d.update(mesh=[2, 4]), "mesh"),
        (lambda d: d.update(roles=["dp"]), "roles"),
        (lambda d: d["params"].update({"up.weight": "S(0) S(x)"}), "state"),
        (lambda d: d["params"].update({"up.weight": 5}), "state"),
        (lambda d: next(iter(d["nodes"].values())).update(rules=[10**6, 0]), "rule"),
        (lambda d: next(iter(d["nodes"].values())).update(rules=[-1, 0]), "rule"),
        (lambda d: next(iter(d["nodes"].values())).update(rules=[0]), "rule"),
        (lambda d: d["rules"][0].update(lowering=3), "lowering"),
        (lambda d: d["kept_copies"].append(["x"]), "kept_copies"),
        (lambda d: d["cluster"].update(surprise=1), "surprise"),
        (lambda d: d["options"].update(optimizer="rmsprop"), "optimizer"),
        (lambda d: d["inputs"][0].update(dtype="__class__"), "dtype"),
        (lambda d: d["inputs"][0].update(shape=[-1]), "shape"),
    ],
)
def test_plausible_but_impossible(plan: Plan, edit: Callable[[dict[str, Any]], object], says: str) -> None:
    data = json.loads(plan.dumps())
    edit(data)
    assert says in refused(json.dumps(data))


# -- hostile files ---------------------------------------------------------------------------


def test_nested_too_deep(plan: Plan) -> None:
    for opening in ("[", '{"a":'):
        refused(opening * 100_000)
        refused(plan.dumps().replace('"pin": {', f'"pin": {{"x": {"[" * 100_000}{"]" * 100_000}, ', 1))


def test_huge_numbers(plan: Plan) -> None:
    original = json.loads(plan.dumps())
    for number in ("1" + "0" * 10_000, "1e999", "-1e999", "NaN", "Infinity"):
        for field in ("objective_s", "bound_s", "gap"):
            data = {**original, "solver": {**original["solver"], field: "@@"}}
            refused(json.dumps(data).replace('"@@"', number))


def test_pickled_bytes_are_not_unpickled(tmp_path: Path) -> None:
    witness = tmp_path / "executed"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (witness,))

    path = tmp_path / "plan.json"
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(path)
    assert not witness.exists()


def test_unknown_lowering_is_not_looked_up_anywhere(plan: Plan) -> None:
    """The name of a lowering is only known to be wrong where code is written: there it is one clear error too."""
    data = json.loads(plan.dumps())
    for rule in data["rules"]:
        rule["lowering"] = "os.system"
    model, call = tiny_mlp()
    with pytest.raises(PlanError, match=r"no lowering is called 'os\.system'"):
        autopar.verify(model, Plan.loads(json.dumps(data)), example_inputs=call)


def test_names_are_never_paths_or_code(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may look like a path or like code: it stays a name, and saving writes where it is told."""
    monkeypatch.chdir(tmp_path)
    hostile = "../../../etc/passwd\0; __import__('os').system('touch executed')"
    data = json.loads(plan.dumps())
    data["params"][hostile] = "R R"
    data["outputs"][hostile] = "R R"
    data["kept"].append(hostile)
    data["options"]["model"] = hostile
    loaded = Plan.loads(json.dumps(data))
    loaded.save("out.json")
    str(loaded.explain())
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    model, _ = tiny_mlp()
    with pytest.raises(PlanError):
        autopar.verify(model, replace(loaded, graph_hash="0" * 64))


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["R R", "S(0) R", "S(99999999999999999999) R", "P P", "local", "../x", "__class__"]),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def mutated(data: Any, rng: random.Random, value: Any) -> None:
    """Replace, remove or add one thing somewhere in nested JSON data."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(data[key], (dict, list)) and rng.random() < 0.8:
            data = data[key]
            continue
        if rng.random() < 0.3:
            del data[key]
        else:
            data[key] = value
        return
    if isinstance(data, dict):
        data["new"] = value
    else:
        data.append(value)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(seed=st.integers(0, 2**32), values=st.lists(_VALUES, min_size=1, max_size=3))
def test_mutated_plans_load_or_are_refused(plan: Plan, seed: int, values: list[Any]) -> None:
    data, rng = json.loads(plan.dumps()), random.Random(seed)
    for value in values:
        mutated(data, rng, value)
    try:
        loaded = Plan.loads(json.dumps(data))
    except PlanError as error:
        message = str(error)
    else:
        message = ""
        assert Plan.loads(loaded.dumps()) == loaded
    assert "\n" not in message


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(at=st.floats(0, 1), junk=st.binary(min_size=1, max_size=6))
def test_damaged_bytes_load_or_are_refused(plan: Plan, tmp_path: Path, at: float, junk: bytes) -> None:
    raw = plan.dumps().encode()
    start = int(at * (len(raw) - 1))
    path = tmp_path / "plan.json"
    path.write_bytes(raw[:start] + junk + raw[start + len(junk) :])
    with contextlib.suppress(PlanError):
        assert Plan.load(path).devices == plan.devices


# -- disks -------------------------------------------------------------------------------------


def test_missing_file_and_folder(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"absent\.json"):
        Plan.load(tmp_path / "absent.json")
    with pytest.raises(PlanError, match=str(tmp_path)):
        Plan.load(tmp_path)
    with pytest.raises(PlanError, match="nothing was changed"):
        plan.save(tmp_path / "no" / "such" / "plan.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="nothing was changed"):
        plan.save(tmp_path / "file" / "plan.json")


def test_full_disk_keeps_the_old_file(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_text("the old plan")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PlanError, match="No space left on device; nothing was changed"):
        plan.save(path)
    assert path.read_text() == "the old plan"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_really_full_disk(plan: Plan, tmp_path: Path) -> None:
    """The scratch file is made to lie on a device that takes nothing."""
    path = tmp_path / "plan.json"
    path.write_text("the old plan")
    (tmp_path / "plan.json.partial").symlink_to("/dev/full")
    with pytest.raises(PlanError, match="nothing was changed"):
        plan.save(path)
    assert path.read_text() == "the old plan" and Path("/dev/full").exists()
