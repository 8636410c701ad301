"""When a rank dies, the others say which one.

Every rank writes a heartbeat to the job's store from a daemon thread. When a collective
fails on a surviving rank, the ranks whose heartbeat has stopped are the dead ones.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from autopar._torch_compat import default_store
from autopar.errors import RuntimeFailure

_BEAT_S = 0.5
_SILENT_S = 3.0
_REPORT = "autopar/dead"


class Heartbeat:
    """This rank's sign of life, and a view of everybody else's.

    The first survivor that notices a death reports it through the store, and stays long enough for all others to
    read it: afterwards it ends, and with it perhaps the store, and would pass for another dead rank.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.reported: list[int] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="autopar-heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the thread: one that is inside the store's C++ code while Python shuts down would abort the process."""
        self._ending.set()
        self._thread.join(_SILENT_S)

    def _beat(self) -> None:
        count = 0
        while not self._ending.wait(_BEAT_S if count else 0.0):
            count += 1
            try:
                self.store.set(self._key(self.rank), str(count))
                self._read_report()
            except RuntimeError:
                return  # the store is gone: so is the job

    @staticmethod
    def _key(rank: int) -> str:
        return f"autopar/heartbeat/{rank}"

    def dead_ranks(self) -> list[int]:
        """Ranks that died: as reported, or those that give no sign of life for a few seconds."""
        try:
            self._read_report()
            if not self.reported:
                before = self._counts()
                time.sleep(_SILENT_S)
                after = self._counts()
                self._read_report()
                self._report([r for r in range(self.world_size) if r != self.rank and before[r] == after[r]])
            return self.reported
        except RuntimeError:  # the store does not answer: the process that holds it is gone
            return self.reported or ([] if _agent_has_store() else [0])

    def _read_report(self) -> None:
        if not self.reported and self.store.check([_REPORT]):
            self.reported = [int(r) for r in self.store.get(_REPORT).decode().split(",")]

    def _report(self, dead: list[int]) -> None:
        if dead and not self.reported:
            self.reported = dead
            self.store.set(_REPORT, ",".join(map(str, dead)))
            time.sleep(3 * _BEAT_S)

    def _counts(self) -> list[bytes]:
        keys = [self._key(r) for r in range(self.world_size)]
        return [self.store.get(k) if self.store.check([k]) else b"" for k in keys]


def _agent_has_store() -> bool:
    """Whether torchrun's agent holds the job's store; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


_heartbeat: dict[int, Heartbeat] = {}


def start_heartbeat() -> None:
    """Start this process's heartbeat for the present process group, once."""
    store = default_store()
    if id(store) not in _heartbeat:
        for former in _heartbeat.values():
            former.stop()
        _heartbeat.clear()
        _heartbeat[id(store)] = Heartbeat(store.clone(), dist.get_rank(), dist.get_world_size())


@contextmanager
def naming_dead_ranks(mesh: object) -> Iterator[None]:
    """Turn the failure of a collective into an error that names the ranks that died. mesh: None on one device."""
    try:
        yield
    except RuntimeError as error:
        beats = list(_heartbeat.values())
        if mesh is None or not beats or not _is_connection_failure(error):
            raise
        dead = beats[0].dead_ranks()
        if not dead:
            raise
        names = ", ".join(str(r) for r in dead)
        raise RuntimeFailure(
            f"rank {names} died (no sign of life; seen from rank {beats[0].rank}): its own output says why. "
            "Start the job again from the last checkpoint"
        ) from error


def _is_connection_failure(error: RuntimeError) -> bool:
    text = str(error).lower()
    if isinstance(error, dist.DistError):
        return True
    return any(w in text for w in ("connection", "timed out", "timeout", "reset by peer", "broken pipe", "unreachable"))
