"""Writes the stages of a plan, the emitted program among them, to the folder that `dump_dir=` names."""

from __future__ import annotations

from pathlib import Path

from torch import fx

from autopar.codegen.emit import EmittedProgram, Version
from autopar.dumping.parse import read_python
from autopar.dumping.stages import DumpedPass, write_stages
from autopar.plans import Plan
from autopar.trace import Trace


def dump_stages(folder: str | Path, trace: Trace, plan: Plan, emitted: EmittedProgram) -> None:
    """Write all stages; raises AutoparError where the folder cannot be written."""
    coordinates = tuple(f"coord{axis}" for axis in range(len(emitted.mesh)))
    forward = DumpedPass(
        emitted.forward,
        (*coordinates, *emitted.forward_inputs),
        (*emitted.output_names, *(f"{_text(v)} for the backward pass" for v in emitted.saved)),
    )
    backward = DumpedPass(
        emitted.backward,
        (*coordinates, *map(_text, emitted.backward_inputs)),
        tuple(f"gradient of {fqn}" for fqn in emitted.grads),
    )
    write_stages(folder, trace, plan, {"forward": forward, "backward": backward})


def read_program(folder: str | Path) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graphs of the forward and the backward pass that lie in a dumped folder; raises PlanError.

    The files are parsed, not run. The graphs take what they say that they take, as positional arguments.
    """
    forward, backward = (read_python(Path(folder) / f"04_program_rank0_{name}.py") for name in ("forward", "backward"))
    return forward, backward


def _text(version: Version) -> str:
    name, state = version
    return f"{name} in ({', '.join(state)})" if state else name
