"""Builds a `ModelTable` from a sample trace.

The batch of the trace is a prime that divides no other size of the model: a dim that it divides is one that grows
with the batch.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import torch
from torch import fx

from autopar.cost.compute import OpClass, op_class, op_name
from autopar.dataflow import Dataflow, is_backward, module_path, resolve, result_metas, value_name
from autopar.opcost import compute_dtype, op_flops_of
from autopar.placements import PARTIAL, Placement, shard_dim
from autopar.predicting.fusing import groups, is_fusable
from autopar.predicting.segments import AFTER, BEFORE, BLOCK, leaf_modules, parts
from autopar.predicting.sizes import ACT, ACT_CUT, ACT_SEQ, FIXED, FIXED_CUT, Floats, share
from autopar.predicting.table import Kernel, Message, ModelTable, Part, Pass, total
from autopar.predicting.tensor_axis import TensorAxis, is_cut
from autopar.trace import Sample

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2), aten.baddbmm.default: (1, 2)}


def build_table(sample: Sample, axis: TensorAxis, batch: int, tokens: int, *, fusion: str) -> ModelTable:
    """batch: of the trace. tokens: of one sequence. fusion: see `autopar.predicting.fusing`."""
    return _Builder(sample, axis, batch, tokens, fusion).table()


class _Builder:
    def __init__(self, sample: Sample, axis: TensorAxis, batch: int, tokens: int, fusion: str) -> None:
        self.sample, self.axis, self.batch, self.tokens, self.fusion = sample, axis, batch, tokens, fusion
        self.fuse = fusion != "none"
        self.trace = sample.trace
        self.flow = Dataflow.of(self.trace)
        self.parts = parts(sample)
        self.leaves = leaf_modules(self.flow)
        self.params = {p.node: p for p in self.trace.params}
        self.nodes = {n.name: n for n in self.trace.graph_module.graph.nodes}
        self.made_by = {value_name(n, i): n for n in self.flow.ops for i in range(len(result_metas(n)))}

    def table(self) -> ModelTable:
        trained = [p for p in self.trace.params if p.fqn in self.trace.grads]
        blocks = self.sample.count
        block = self._part(BLOCK) if blocks else None
        ends = [n for n in self.flow.ops if self.parts.part_of[n.name] in (BEFORE, AFTER)]
        middle = [n for n in self.flow.ops if self.parts.part_of[n.name] == BLOCK]
        flops = sum(map(op_flops_of, ends)) + blocks * sum(map(op_flops_of, middle))
        ids = next((i for i in self.trace.inputs if i.batch_dim == 0), None)
        dtype = trained[0].dtype
        return ModelTable(
            before=self._part(BEFORE),
            block=block,
            after=self._part(AFTER),
            blocks=blocks,
            tokens=self.tokens,
            samples_are_tokens=ids is not None and len(ids.shape) > 1 and not ids.dtype.is_floating_point,
            itemsize=dtype.itemsize,
            dtype=str(dtype).removeprefix("torch."),
            flops=flops / self.batch,
        )

    # -- sizes ---------------------------------------------------------------------------

    def _kind(self, grows: bool, placement: Placement | None, seq: bool) -> int:
        if not grows:
            return FIXED_CUT if is_cut(placement) else FIXED
        if is_cut(placement):
            return ACT_CUT
        return ACT_SEQ if seq and placement != PARTIAL else ACT

    def _size(self, tensor: torch.Tensor, placement: Placement | None, seq: bool) -> Floats:
        """[5] bytes of a tensor in a placement."""
        grows = self._grows(tensor)
        nbytes = tensor.numel() * tensor.element_size() / (self.batch if grows else 1)
        return share(nbytes, self._kind(grows, placement, seq))

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
        """[5] bytes of a base value as it is held: after its summands are summed."""
        node = self.made_by[value]
        tensor = result_metas(node)[int(value.rsplit("#", 1)[1]) if "#" in value else 0]
        assert tensor is not None
        placement = self.axis.made[value]
        return self._size(tensor, "R" if placement == PARTIAL else placement, self._is_held_by_sequence(value))

    def _is_held_by_sequence(self, value: str) -> bool:
        node = self.made_by[value]
        return self.axis.made[value] == PARTIAL or self._runs_by_sequence(node)

    # -- kernels --------------------------------------------------------------------------

    def _kernel(self, members: list[fx.Node]) -> Kernel:
        first = max(members, key=op_flops_of)
        inside = {value_name(n, i) for n in members for i in range(len(result_metas(n)))}
        looks_up = first.target is aten.embedding.default  # reads the rows it hands out, not the table
        read: dict[tuple[str, Placement], Floats] = {}
        for node in members:
            seq = self._runs_by_sequence(node)
            for operand, placement in zip(self.flow.operands_of[node], self.axis.rules[node.name].inputs, strict=True):
                if operand.value not in inside and not (looks_up and operand.node.name in self.params):
                    read[operand.value, placement] = self._size(operand.tensor, placement, seq)
        written = [
            self._size(t, p, self._runs_by_sequence(node))
            for node in members
            for i, (t, p) in enumerate(zip(result_metas(node), self.axis.rules[node.name].outputs, strict=True))
            if t is not None and not self._is_internal(value_name(node, i), members)
        ]
        flops = total([self._flops(n) for n in members])
        dtype = compute_dtype(first, self.flow.operands_of[first])
        kind = op_class(first.target)
        return Kernel(
            op_name(first.target), kind, dtype, self._dims(first), flops, total([*read.values(), *written]), len(members)
        )

    def _is_internal(self, value: str, members: list[fx.Node]) -> bool:
        users = [u.user for u in self.flow.uses.get(value, ())]
        if not users or not self.fuse or len(members) == 1:
            return False
        return all(u in members or self._is_remade(value, u) for u in users)

    def _flops(self, node: fx.Node) -> Floats:
        rule = self.axis.rules[node.name]
        cut = any(is_cut(p) for p in (*rule.inputs, *rule.outputs))
        grows = self._node_grows(node) or any(self._grows(o.tensor) for o in self.flow.operands_of[node])
        flops = op_flops_of(node) / (self.batch if grows else 1)
        return share(flops, (ACT_CUT if cut else ACT) if grows else (FIXED_CUT if cut else FIXED))

    def _dims(self, node: fx.Node) -> Floats | None:
        """[4, 5] batch, rows, columns, contracted dim."""
        slots = _PRODUCTS.get(node.target)
        if slots is None:
            return None
        operands, rule = self.flow.operands_of[node], self.axis.rules[node.name]
        # a bias that is no operand of its own shifts the slots
        left, right = operands[slots[0]].tensor, operands[slots[1]].tensor
        cut_left, cut_right = shard_dim(rule.inputs[slots[0]]), shard_dim(rule.inputs[slots[1]])
        at = left.dim() - 2
        return np.stack(
            [
                self._dim(left.shape[0], cut_left == 0) if at else share(1.0, FIXED),
                self._dim(left.shape[at], cut_left == at),
                self._dim(right.shape[at + 1], cut_right == at + 1),
                self._dim(left.shape[at + 1], cut_left == at + 1),
            ]
        )

    def _dim(self, size: int, cut: bool) -> Floats:
        grows = size % self.batch == 0
        amount = size / (self.batch if grows else 1)
        return share(amount, (ACT_CUT if cut else ACT) if grows else (FIXED_CUT if cut else FIXED))

    # -- messages ---------------------------------------------------------------------------

    def _messages(self, ops: list[fx.Node], *, backward: bool) -> tuple[Message, ...]:
        found: dict[tuple[str, str], Message] = {}
        for node in ops:
            seq = self._runs_by_sequence(node)
            for operand, taken in zip(self.flow.operands_of[node], self.axis.taken[node.name], strict=True):
                made = self.axis.made.get(operand.value, "R")
                maker = self.made_by.get(operand.value)
                if maker is None:
                    continue
                size = self._size(operand.base_tensor, "R", False)
                grows = self._grows(operand.base_tensor)
                if made == PARTIAL and taken == "R":
                    at_home = is_backward(maker) == backward
                    if at_home:
                        kind = "sum" if grows else "reduce"
                        found[operand.value, kind] = Message(kind, size)
                seen = operand.base_tensor
                if seen.dim() < 3 and not seen.is_floating_point():
                    continue  # token ids, positions: whole on every rank
                if grows and taken == "R" and not seq and self._is_held_by_sequence(operand.value) and not (
                    self._has_pairs(seen) and seen.shape[-3] == 1
                ):
                    kind = "gather" if is_backward(maker) == backward else "regather"
                    found[operand.value, kind] = Message(kind, size)
            found |= {(node.name, str(i)): m for i, m in enumerate(self._inner(node))}
        return tuple(found.values())

    def _inner(self, node: fx.Node) -> list[Message]:
        """The collectives inside of a lowering, as in a loss over a cut vocabulary."""
        found = []
        for inner in self.axis.rules[node.name].collectives:
            side, index = inner.tensor
            tensor = self.flow.operands_of[node][index].tensor if side == "in" else result_metas(node)[index]
            assert tensor is not None
            kept = [s for d, s in enumerate(tensor.shape) if d not in inner.reduced_dims]
            nbytes = math.prod(kept) * tensor.element_size() * inner.copies
            grows = any(int(s) % self.batch == 0 for s in kept)
            found.append(Message("reduce", share(nbytes / (self.batch if grows else 1), ACT if grows else FIXED)))
        return found

    # -- what lives how long ----------------------------------------------------------------

    def _is_remade(self, value: str, user: fx.Node) -> bool:
        """Whether a backward op gets a value of a leaf module (a norm, an activation) by making it again on the way."""
        maker = self.made_by[value]
        path = module_path(maker)
        if is_backward(maker) or not is_backward(user) or path not in self.leaves or not is_fusable(maker):
            return False
        users = [u.user for u in self.flow.uses.get(value, ())]
        return self.fuse and all(module_path(u) == path for u in users) and self._grows_much(value)

    def _grows_much(self, value: str) -> bool:
        """More than a number per token: statistics are kept."""
        maker = self.made_by[value]
        tensor = result_metas(maker)[int(value.rsplit("#", 1)[1]) if "#" in value else 0]
        return tensor is not None and self._grows(tensor) and tensor.numel() > 4 * self.batch * self.tokens

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
        """[5] the copies that sequence parallelism gathers for the forward pass and wants again in the backward."""
        again = total([])
        for value in kept:
            users = [u for u in self.flow.uses.get(value, ()) if not self._runs_by_sequence(u.user)]
            wanted = {is_backward(u.user) for u in users}
            if wanted == {False, True} and self._is_held_by_sequence(value):
                tensor = self.made_by[value].meta["val"]
                again = again + self._size(tensor[0] if isinstance(tensor, (tuple, list)) else tensor, "R", False)
        return again

    def _is_kept(self, value: str) -> bool:
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
        return any(
            self._is_remade(v, u.user) for v in remade if v in self.made_by for u in self.flow.uses.get(v, ())
        )

    def _narrow_copy(self, value: str) -> str | None:
        """The cast of a value to a narrower dtype, if a fused kernel makes one: it can be kept instead."""
        maker = self.made_by[value]
        if self.fusion != "all" or not is_fusable(maker):
            return None
        for use in self.flow.uses.get(value, ()):
            if use.user.target is aten._to_copy.default and not is_backward(use.user):
                (made,) = result_metas(use.user)
                if made is not None and made.element_size() < use.operand.base_tensor.element_size():
                    return value_name(use.user)
        return None

    def _alive(self, kernels: list[list[fx.Node]], kept: dict[str, Floats], *, backward: bool) -> Floats:
        """[kernels, 5]: what the pass made and still needs, while each kernel runs; backward also what was kept."""
        steps = np.zeros((len(kernels) + 1, 5))
        place = {n: i for i, kernel in enumerate(kernels) for n in kernel}
        last: dict[str, int] = defaultdict(int)
        for i, kernel in enumerate(kernels):
            for node in kernel:
                for operand in self.flow.operands_of[node]:
                    last[operand.value] = i
        gradients = {resolve(self.nodes[name]).value for name in self.trace.grads.values()}
        for i, kernel in enumerate(kernels):
            for node in kernel:
                for index, tensor in enumerate(result_metas(node)):
                    value = value_name(node, index)
                    if tensor is None or value in gradients or self._is_internal(value, kernel):
                        continue
                    users = [u.user for u in self.flow.uses.get(value, ())]
                    leaves = any(u not in place for u in users) and not backward and value not in kept
                    end = len(kernels) - 1 if value in kept and not backward else max(last[value], i)
                    steps[i] += self._value_size(value)
                    steps[len(kernels) if leaves else end + 1] -= self._value_size(value)
        if backward:
            for value, size in kept.items():
                steps[0] += size
                steps[min(last.get(value, 0), len(kernels) - 1) + 1] -= size
        return np.cumsum(steps, axis=0)[:-1] if len(kernels) else np.zeros((1, 5))

    # -- parts ------------------------------------------------------------------------------

    def _part(self, name: str) -> Part:
        forward = self.parts.ops(self.flow, name, backward=False)
        backward = self.parts.ops(self.flow, name, backward=True)
        kept = self._kept(forward)
        core = {v: s for v, s in kept.items() if self._is_quadratic(v)}
        used = self._parameters(forward + backward)
        others = {p for other in (BEFORE, BLOCK, AFTER) if other != name for p in self._used(other)}
        return Part(
            forward=self._pass(forward, kept, backward=False),
            backward=self._pass(backward, kept, backward=True),
            kept=total(list(kept.values())),
            kept_selective=total([s for v, s in kept.items() if v not in core]),
            gathered=self._gathered(kept),
            again=self._again(forward, set(core), set(kept) - set(core)),
            boundary=self._boundary(forward),
            parameters=total([self._numbers(p) for p in used]),
            tied=total([self._numbers(p) for p in used if p in others]),
            tensors=len(used),
        )

    def _pass(self, ops: list[fx.Node], kept: dict[str, Floats], *, backward: bool) -> Pass:
        kernels = groups(self.flow, ops, self._node_grows, self.fusion, self.leaves)
        return Pass(
            tuple(self._kernel(k) for k in kernels),
            self._messages(ops, backward=backward),
            self._alive(kernels, kept, backward=backward),
            self._host_ops(ops),
            backward,
        )

    def _is_quadratic(self, value: str) -> bool:
        """Scores of all pairs of tokens: what grows with the square of the sequence."""
        maker = self.made_by[value]
        tensor = result_metas(maker)[int(value.rsplit("#", 1)[1]) if "#" in value else 0]
        return tensor is not None and self._has_pairs(tensor) and math.prod(tensor.shape[:-2]) > self.batch

    def _has_pairs(self, tensor: torch.Tensor) -> bool:
        return tensor.dim() > 2 and self.tokens > 1 and tensor.shape[-1] == tensor.shape[-2] == self.tokens

    def _again(self, forward: list[fx.Node], wanted: set[str], there: set[str]) -> Pass:
        """The forward ops that make `wanted` from what is there."""
        inside = set(forward)
        stack, needed = [self.made_by[v] for v in wanted], set()
        while stack:
            node = stack.pop()
            if node in needed or node not in inside:
                continue
            needed.add(node)
            stack += [self.made_by[o.value] for o in self.flow.operands_of[node] if o.value not in there and o.value in self.made_by]
        ops = [n for n in forward if n in needed]
        kernels = groups(self.flow, ops, self._node_grows, self.fusion, self.leaves)
        return Pass(tuple(self._kernel(k) for k in kernels), (), np.zeros((1, 5)), self._host_ops(ops), False)

    def _host_ops(self, ops: list[fx.Node]) -> int:
        """Ops that eager execution dispatches: views too."""
        return len(ops) + len({v.node for n in ops for o in self.flow.operands_of[n] for v in o.views})

    def _boundary(self, forward: list[fx.Node]) -> Floats:
        inside = set(forward)
        found: dict[str, Floats] = {}
        for node in forward:
            for index, tensor in enumerate(result_metas(node)):
                value = value_name(node, index)
                users = [u.user for u in self.flow.uses.get(value, ())]
                if tensor is not None and self._grows_much(value) and any(u not in inside and not is_backward(u) for u in users):
                    found[value] = self._value_size(value)
        return total(list(found.values()))

    def _used(self, part: str) -> set[str]:
        return set(self._parameters([n for n in self.flow.ops if self.parts.part_of[n.name] == part]))

    def _parameters(self, ops: list[fx.Node]) -> list[str]:
        names = [o.node.name for n in ops for o in self.flow.operands_of[n] if o.node.name in self.params]
        return list(dict.fromkeys(names))

    def _numbers(self, node: str) -> Floats:
        param = self.params[node]
        return share(math.prod(param.shape), FIXED_CUT if is_cut(self.axis.params[param.fqn]) else FIXED)


