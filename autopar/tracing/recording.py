"""Hooks with which transformers records hidden states and router scores.

transformers puts them on a model when it is first called, under a lock, which Dynamo cannot
trace. Where a capture ends there, they are put on the copy that is traced beforehand; the
user's model is left alone. Not always, as Dynamo cannot trace hooks that record nothing either.
"""

from __future__ import annotations

import sys

from torch import nn

from autopar.errors import TraceError

_HOME = "transformers.utils.output_capturing"  # seen in transformers 5.17 and 5.24
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def wants_recording_hooks(error: TraceError) -> bool:
    """Whether a capture ended where transformers installs its hooks."""
    return _HOME.replace(".", "/") in (error.source or "") and "lock" in str(error)


def install_recording_hooks(shadow: nn.Module) -> None:
    """Put the hooks on every model of transformers in `shadow`, a copy whose hook tables may be the original's."""
    install = getattr(sys.modules.get(_HOME), "maybe_install_capturing_hooks", None)
    models = [m for m in shadow.modules() if isinstance(getattr(m, "_can_record_outputs", None), dict)]
    if install is None or not models:
        return
    for module in shadow.modules():
        for name in _HOOKS:
            module.__dict__[name] = module.__dict__[name].copy()
    for model in models:
        install(model)
