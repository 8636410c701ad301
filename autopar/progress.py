"""What takes long says how far it is, on stderr."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

LOG_EVERY_S = 10.0  # without a terminal: a line this often


class Progress:
    """One line that moves on a terminal (with rich), a line every LOG_EVERY_S elsewhere."""

    def __init__(self) -> None:
        self._status: Any = None
        self._context: AbstractContextManager[Any] = nullcontext()
        self._last_s = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            try:
                from rich.console import Console
            except ImportError:
                pass  # plain lines then
            else:
                self._context = Console(stderr=True).status("starting")
        self._status = self._context.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._context.__exit__(*exception)

    def show(self, event: object) -> None:
        """Show an event; its text is what a person reads."""
        if self._status is not None:
            self._status.update(str(event))
        elif time.monotonic() - self._last_s >= LOG_EVERY_S:
            self._last_s = time.monotonic()
            sys.stderr.write(f"autopar: {event}\n")
