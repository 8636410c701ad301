"""What a sample trace and its placements say of each op and value: sizes, what is cut, what is kept.

The batch of the trace is a prime that divides no other size of the model: a dim that it divides is one that grows
with the batch.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from autopar.cost.compute import OpClass, op_class
from autopar.dataflow import Dataflow, is_backward, module_path, result_metas, value_name
from autopar.experts import ExpertSide
from autopar.placements import PARTIAL, Placement
from autopar.predicting.fusing import is_fusable
from autopar.predicting.segments import leaf_modules, parts
from autopar.predicting.sizes import ACT, EXPERT, FIXED, ROWS, Floats, share
from autopar.predicting.table import total
from autopar.predicting.tensor_axis import TensorAxis, is_cut
from autopar.trace import Sample

aten = torch.ops.aten


class Reading:
    """The trace, read for one way to fuse. batch: of the trace. tokens: of one sequence."""

    def __init__(self, sample: Sample, axis: TensorAxis, batch: int, tokens: int, fusion: str) -> None:
        self.sample, self.axis, self.batch, self.tokens, self.fusion = sample, axis, batch, tokens, fusion
        self.fuse = fusion != "none"
        self.trace = sample.trace
        self.flow = Dataflow.of(self.trace)
        self.parts = parts(sample)
        self.leaves = leaf_modules(self.flow)
        self.experts = ExpertSide.of(self.trace)
        self._used_by: dict[str, set[str]] = {}
        self._kept_known: dict[str, bool] = {}
        self.params = {p.node: p for p in self.trace.params}
        self.nodes = {n.name: n for n in self.trace.graph_module.graph.nodes}
        self.made_by = {value_name(n, i): n for n in self.flow.ops for i in range(len(result_metas(n)))}
        self.tensors = {
            value_name(n, i): t for n in self.flow.ops for i, t in enumerate(result_metas(n)) if t is not None
        }

    # -- sizes ---------------------------------------------------------------------------

    def _kind(self, grows: bool, cut: bool, seq: bool, experts: bool) -> int:
        """seq: whether sequence parallelism cuts it."""
        if not grows:
            return (EXPERT if experts else FIXED) + cut
        return (ROWS if experts else ACT) + (1 if cut else 2 if seq else 0)

    def _size(self, value: str, tensor: torch.Tensor, placement: Placement | None, seq: bool) -> Floats:
        """[10] bytes of a value, or a view of it, in a placement."""
        grows = self._grows(tensor)
        nbytes = tensor.numel() * tensor.element_size() / (self.batch if grows else 1)
        kind = self._kind(grows, is_cut(placement), seq and placement != PARTIAL, value in self.experts.values)
        return share(nbytes, kind)

    def _grows(self, tensor: torch.Tensor) -> bool:
        return any(int(d) % self.batch == 0 for d in tensor.shape if int(d))

    def _node_grows(self, node: fx.Node) -> bool:
        return any(self._grows(t) for t in result_metas(node) if t is not None)

    def _runs_by_sequence(self, node: fx.Node) -> bool:
        """Whether the op is one of those that sequence parallelism cuts: nothing it takes or makes is cut already."""
        rule = self.axis.rules[node.name]
        operands = self.flow.operands_of[node]
        taken = [p for o, p in zip(operands, rule.inputs, strict=True) if self._grows(o.tensor)]
        made = [p for t, p in zip(result_metas(node), rule.outputs, strict=True) if t is not None and self._grows(t)]
        plain = all(p == "R" for p in (*taken, *made))
        return plain and op_class(node.target) not in (OpClass.MATMUL, OpClass.ATTENTION, OpClass.CONVOLUTION)

    def _value_size(self, value: str) -> Floats:
        """[10] bytes of a base value as it is held: after its summands are summed."""
        placement = self.axis.made[value]
        return self._size(
            value, self.tensors[value], "R" if placement == PARTIAL else placement, self._is_held_by_sequence(value)
        )

    def _is_held_by_sequence(self, value: str) -> bool:
        node = self.made_by[value]
        return self.axis.made[value] == PARTIAL or self._runs_by_sequence(node)

    def _is_quadratic(self, value: str) -> bool:
        """Scores of all pairs of tokens: what grows with the square of the sequence."""
        return self._is_scores(self.tensors[value])

    def _has_pairs(self, tensor: torch.Tensor) -> bool:
        return tensor.dim() > 2 and self.tokens > 1 and tensor.shape[-1] == tensor.shape[-2] == self.tokens

    def _alike(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether both belong to one module without modules inside, or both work on scores of all pairs of tokens."""
        path = module_path(a)
        if path in self.leaves and path == module_path(b):
            return True
        return all(any(t is not None and self._is_scores(t) for t in result_metas(n)) for n in (a, b))

    def _is_scores(self, tensor: torch.Tensor) -> bool:
        return self._has_pairs(tensor) and math.prod(tensor.shape[:-2]) > self.batch

    # -- what lives how long ----------------------------------------------------------------

    def _is_remade(self, value: str, user: fx.Node) -> bool:
        """Whether a backward op gets a value by making it again on the way."""
        return self._is_remade_in_module(value, user) or self._is_remade_of_kept(value, user)

    def _is_remade_of_kept(self, value: str, user: fx.Node) -> bool:
        """Where everything is fused: what is elementwise and of nothing but what is kept anyway.

        So do torch.compile's partitioner and hand-written gated activations, which keep both factors' inputs only.
        """
        maker = self.made_by[value]
        if self.fusion != "all" or is_backward(maker) or not (is_backward(user) and is_fusable(user)):
            return False
        if op_class(maker.target) is not OpClass.ELEMENTWISE or not is_fusable(maker) or not self._grows_much(value):
            return False
        sources = {o.value for o in self.flow.operands_of[maker] if o.value in self.tensors}
        return all(self._is_kept(v) for v in sources if self._grows_much(v))

    def _is_remade_in_module(self, value: str, user: fx.Node) -> bool:
        """A value of a leaf module (a norm, an activation)."""
        maker = self.made_by[value]
        path = module_path(maker)
        if is_backward(maker) or not is_backward(user) or path not in self.leaves or not is_fusable(maker):
            return False
        if op_class(maker.target) is OpClass.RANDOM:
            return False  # the numbers drawn are gone
        users = [u.user for u in self.flow.uses.get(value, ())]
        return self.fuse and all(module_path(u) == path for u in users) and self._grows_much(value)

    def _grows_much(self, value: str) -> bool:
        """More than a number per token: statistics are kept."""
        tensor = self.tensors[value]
        return self._grows(tensor) and tensor.numel() > 4 * self.batch * self.tokens

    def _kept(self, ops: list[fx.Node]) -> dict[str, Floats]:
        """Forward values of these ops that the backward pass uses, in bytes; of wide ones, a narrow copy if made."""
        found: dict[str, Floats] = {}
        for node in ops:
            for index, tensor in enumerate(result_metas(node)):
                value = value_name(node, index)
                if tensor is not None and self._is_kept(value):
                    narrow = self._narrow_copy(value)
                    found[narrow or value] = self._value_size(narrow or value)
        return found

    def _gathered(self, kept: dict[str, Floats]) -> Floats:
        """[10] the copies that sequence parallelism gathers for the forward pass and wants again in the backward."""
        again = total([])
        for value in kept:
            users = [u for u in self.flow.uses.get(value, ()) if not self._runs_by_sequence(u.user)]
            wanted = {is_backward(u.user) for u in users}
            if wanted == {False, True} and self._is_held_by_sequence(value):
                again = again + self._size(value, self.tensors[value], "R", False)
        return again

    def _is_kept(self, value: str) -> bool:
        if value not in self._kept_known:
            self._kept_known[value] = self._must_be_kept(value)
        return self._kept_known[value]

    def _must_be_kept(self, value: str) -> bool:
        users = [u.user for u in self.flow.uses.get(value, ())]
        later = [u for u in users if is_backward(u)]
        if any(not self._is_remade(value, u) for u in later):
            return True
        # what a value that is made again is made of
        return any(self._feeds_remade(value, u) for u in users if not is_backward(u))

    def _feeds_remade(self, value: str, user: fx.Node) -> bool:
        path = module_path(user)
        if not self.fuse or path not in self.leaves or module_path(self.made_by[value]) == path or not is_fusable(user):
            return False
        if not self._grows_much(value):
            return False
        inside = [n for n in self.flow.ops if module_path(n) == path and not is_backward(n)]
        remade = (value_name(n, i) for n in inside for i in range(len(result_metas(n))))
        made = [(v, u.user) for v in remade if v in self.made_by for u in self.flow.uses.get(v, ())]
        return any(self._is_remade_in_module(v, u) for v, u in made)

    def _narrow_copy(self, value: str) -> str | None:
        """The cast of a value to a narrower dtype, if a fused kernel makes one: it can be kept instead."""
        maker = self.made_by[value]
        if not self.fuse or not is_fusable(maker) or not (self.fusion == "all" or self._is_quadratic(value)):
            return None
        for use in self.flow.uses.get(value, ()):
            if use.user.target is aten._to_copy.default and not is_backward(use.user):
                (made,) = result_metas(use.user)
                if made is not None and made.element_size() < use.operand.base_tensor.element_size():
                    return value_name(use.user)
        return None
