"""Writing a file so that a full disk, a crash or an interrupt never costs the old one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write the whole text or change nothing; raises OSError.

    The text goes to PATH.partial beside the file, is forced to the disk (where a disk is full, some file systems
    say so only then), and takes the file's place in one step.
    """
    target = Path(path)
    scratch = target.with_name(target.name + ".partial")
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
