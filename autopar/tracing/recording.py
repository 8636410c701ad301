"""Hooks with which transformers records hidden states and router scores.

transformers puts them on a model when it is first called, under a lock, which Dynamo cannot
trace. On the copy that is traced they are put beforehand; the user's model is left alone.
"""

from __future__ import annotations

import sys

from torch import nn

_HOME = "transformers.utils.output_capturing"  # seen in transformers 5.17 and 5.24
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


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
