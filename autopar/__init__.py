"""autopar: an auto-parallel compiler for PyTorch.

    cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=64)
    program = autopar.compile(model, cluster)
    loss = program(**batch); loss.backward(); optimizer.step()

The names below are looked up at first use, so that `import autopar` costs nothing and
`autopar.solver`, which knows no torch, can be used and tested without importing it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from autopar.errors import (
    AutoparError,
    ClusterSpecError,
    Infeasible,
    LayoutError,
    PinError,
    PlanError,
    PlanMismatch,
    RuntimeFailure,
    TraceError,
    VerifyError,
)

if TYPE_CHECKING:
    from autopar.api import compile, plan, verify
    from autopar.cluster import ClusterSpec
    from autopar.explain import Report
    from autopar.layouts import Layout
    from autopar.plans import Plan
    from autopar.predicting.predict import Prediction, predict
    from autopar.profiling.run import profile
    from autopar.runtime.program import Program
    from autopar.simulating.simulate import simulate
    from autopar.simulating.simulation import Simulation
    from autopar.sizing.size import size
    from autopar.sizing.types import Sizing

__version__ = "0.1.0"

# Public name -> the module that has it. No submodule may bear one of these names: importing
# it would replace the name by the module (tests/test_architecture.py sees to that).
_LAZY = {
    "ClusterSpec": "autopar.cluster",
    "Layout": "autopar.layouts",
    "Plan": "autopar.plans",
    "Prediction": "autopar.predicting.predict",
    "Program": "autopar.runtime.program",
    "Report": "autopar.explain",
    "Simulation": "autopar.simulating.simulation",
    "Sizing": "autopar.sizing.types",
    "compile": "autopar.api",
    "plan": "autopar.api",
    "predict": "autopar.predicting.predict",
    "profile": "autopar.profiling.run",
    "simulate": "autopar.simulating.simulate",
    "size": "autopar.sizing.size",
    "verify": "autopar.api",
}

__all__ = [
    "AutoparError",
    "ClusterSpec",
    "ClusterSpecError",
    "Infeasible",
    "Layout",
    "LayoutError",
    "PinError",
    "Plan",
    "PlanError",
    "PlanMismatch",
    "Prediction",
    "Program",
    "Report",
    "RuntimeFailure",
    "Simulation",
    "Sizing",
    "TraceError",
    "VerifyError",
    "__version__",
    "compile",
    "plan",
    "predict",
    "profile",
    "simulate",
    "size",
    "verify",
]


def __getattr__(name: str) -> object:
    """Look a public name up in its module, once."""
    if name not in _LAZY:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}; the public names are: {', '.join(__all__)}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
