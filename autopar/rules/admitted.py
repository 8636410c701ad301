"""Which of DTensor's rules are taken over.

DTensor may run something else than the same op on the shards (its dispatcher adapts
arguments, masks rows, tracks random state), so a rule of its is taken over only for ops
where the plain op on shards was shown to be exact: views, elementwise ops, and those
listed here. tests/rules/test_soundness.py runs every one of them, and fails for an op in
the list that it does not run.
"""

from __future__ import annotations

from functools import cache

import torch

from autopar._torch_compat import OpOverload
from autopar.rules.schema import is_view

ADMITTED = frozenset(
    {
        # products
        "aten.mm", "aten.bmm", "aten.dot",
        # reductions
        "aten.sum", "aten.mean", "aten.amax", "aten.amin", "aten.all", "aten.any", "aten.prod", "aten.max", "aten.min",
        "aten.var", "aten.std", "aten.var_mean", "aten.linalg_vector_norm", "aten.logsumexp", "aten.argmax",
        "aten.argmin",
        # normalization
        "aten.native_layer_norm", "aten.native_layer_norm_backward", "aten._fused_rms_norm",
        "aten._fused_rms_norm_backward",
        # selection and layout
        "aten.index_select", "aten.topk", "aten.sort", "aten.roll", "aten.flip",
        "aten.repeat", "aten.clone", "aten._to_copy", "aten.native_dropout", "aten.native_dropout_backward",
    }
)  # fmt: skip


@cache
def is_admitted(op: OpOverload) -> bool:
    """Whether DTensor's rules for this op hold for running the same op on shards."""
    return is_view(op) or torch.Tag.pointwise in op.tags or str(op.overloadpacket) in ADMITTED
