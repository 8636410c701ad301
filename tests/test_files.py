"""Saving is all or nothing: on a disk that is full the old file stays, and one error says so."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import autopar
from autopar.errors import AutoparError
from autopar.files import write_atomically
from autopar.simulating.simulation import simulate_cost
from tests.models import tiny_mlp
from tests.simulating.jobs import step


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """A limit of the operating system on every file that this process writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def savers() -> dict[str, Callable[[Path], object]]:
    model, call = tiny_mlp()
    cluster = autopar.ClusterSpec.preset("cpu", gpus=1)
    plan = autopar.plan(model, cluster, example_inputs=call)
    trace = simulate_cost(step("1f1b", [(1.0, 1.0, 1.0)] * 2, 4))
    return {"plan": plan.save, "cluster": cluster.save, "report": plan.explain().to_html, "trace": trace.save}


@pytest.mark.parametrize("what", ["plan", "cluster", "report", "trace"])
def test_a_full_disk_costs_nothing(savers: dict[str, Callable[[Path], object]], what: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("the old one")
    with (
        files_of_at_most(64),
        pytest.raises(AutoparError, match=rf"cannot write (the )?{what}.* {path}: .*nothing was changed"),
    ):
        savers[what](path)
    assert path.read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    savers[what](path)
    assert path.read_text() != "the old one"


def test_an_interrupt_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
