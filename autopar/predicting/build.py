"""Builds a `ModelTable` from a sample trace.

The batch of the trace is a prime that divides no other size of the model: a dim that it divides is one that grows
with the batch.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from autopar.cost.compute import OpClass, op_class, op_name
from autopar.dataflow import Dataflow, Operand, is_backward, resolve, result_metas, value_name
from autopar.grouping import FROM_GROUPS, TO_GROUPS
from autopar.opcost import compute_dtype, op_flops_of
from autopar.placements import PARTIAL, Placement, shard_dim
from autopar.predicting.fusing import groups, is_fusable
from autopar.predicting.reading import Reading
from autopar.predicting.segments import AFTER, BEFORE, BLOCK, OTHER, own_block
from autopar.predicting.sizes import ACT, FIXED, KINDS, Floats, share
from autopar.predicting.table import Kernel, Message, ModelTable, Part, Pass, total
from autopar.predicting.tensor_axis import TensorAxis, is_cut
from autopar.trace import Sample

aten = torch.ops.aten
_COUNT_BYTES = 8  # of how many rows of an expert come: an int64
_PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}


def build_table(
    sample: Sample, axis: TensorAxis, batch: int, tokens: int, *, fusion: str, kv_share: float = 1.0
) -> ModelTable:
    """batch: of the trace. tokens: of one sequence. fusion: see `autopar.predicting.fusing`. kv_share: key-value heads
    for each head of queries, where fused attention reads them repeated."""
    builder = _Builder(sample, axis, batch, tokens, fusion)
    builder.kv_share = kv_share
    return builder.table()


def keeps_scores(sample: Sample, tokens: int) -> bool:
    """Whether attention is written out, with a number for every pair of tokens and head."""
    nodes = Dataflow.of(sample.trace).ops
    made = [t for n in nodes if op_class(n.target) is OpClass.MATMUL for t in result_metas(n) if t is not None]
    return tokens > 1 and any(t.dim() > 2 and t.shape[-1] == t.shape[-2] == tokens for t in made)


class _Builder(Reading):
    kv_share = 1.0

    def table(self) -> ModelTable:
        trained = [p for p in self.trace.params if p.fqn in self.trace.grads]
        own = tuple(self._own())
        blocks = len(own) or self.sample.count
        block = self._part(BLOCK) if blocks and not own else None
        middle = [n for n in self.flow.ops if self.parts.part_of[n.name] == BLOCK]
        others = [n for n in self.flow.ops if self.parts.part_of[n.name] not in (BLOCK, OTHER)]
        times = Counter(own_block(traced) for _, traced in self.parts.blocks)
        flops = sum(op_flops_of(n) * times.get(self.parts.part_of[n.name], 1) for n in others)
        flops += blocks * sum(map(op_flops_of, middle))
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
            experts=self.experts.count,
            own=own,
            names=self.parts.paths or tuple(f"{self.sample.layers}{number}" for number in range(blocks)),
        )

    def _own(self) -> Iterator[Part]:
        """Blocks that are not all alike. Of a traced one that stands for others, these have parameters of their own."""
        made = [self._part(own_block(number)) for number in range(len(self.parts.own))]
        users = Counter(p for name in self.parts.names for p in self._used(name))
        seen: set[int] = set()
        for path, number in self.parts.blocks:
            part = made[number]
            if number in seen:
                numbers = {(n if users[n] > 1 else f"{path}: {n}"): size for n, size in part.numbers.items()}
                part = replace(part, numbers=numbers)
            seen.add(number)
            yield part

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
                    read[operand.value, placement] = self._size(operand.value, operand.tensor, placement, seq)
        written = [
            self._size(value_name(node, i), t, p, self._runs_by_sequence(node))
            for node in members
            for i, (t, p) in enumerate(zip(result_metas(node), self.axis.rules[node.name].outputs, strict=True))
            if t is not None and not self._is_internal(value_name(node, i), members)
        ]
        flops = total([self._flops(n) for n in members])
        dtype = compute_dtype(first, self.flow.operands_of[first])
        kind = op_class(first.target)
        return Kernel(
            op_name(first.target),
            kind,
            dtype,
            self._dims(first),
            flops,
            total([*read.values(), *written]),
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
        return share(flops, self._kind(grows, cut, False, value_name(node) in self.experts.values))

    def _dims(self, node: fx.Node) -> Floats | None:
        """[4, 10] batch, rows, columns, contracted dim."""
        target: Any = node.target
        slots = _PRODUCTS.get(target)
        if slots is None:
            return None
        operands, rule = self.flow.operands_of[node], self.axis.rules[node.name]
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
        return share(amount, self._kind(grows, cut, False, False))

    # -- messages ---------------------------------------------------------------------------

    def _messages(self, ops: list[fx.Node], *, backward: bool) -> tuple[Message, ...]:
        found: list[Message] = []
        for node in ops:
            found += [m for i in range(len(result_metas(node))) for m in self._summed(value_name(node, i), backward)]
            found += self._inner(node)
            found += self._exchanged(node)
        gathered = {o.value: o for n in ops for o in self._gathered_operands(n)}
        for value, operand in gathered.items():
            kind = "gather" if is_backward(self.made_by[value]) == backward else "regather"
            found.append(Message(kind, self._size(operand.value, operand.base_tensor, "R", False)))
        return tuple(found)

    def _summed(self, value: str, backward: bool) -> list[Message]:
        """The all-reduce of a value that is made in summands and used whole."""
        uses = self.flow.uses.get(value, ())
        if self.axis.made.get(value) != PARTIAL or not uses:
            return []
        if not any(self.axis.taken[u.user.name][u.slot] == "R" for u in uses):
            return []
        tensor = uses[0].operand.base_tensor
        return [Message("sum" if self._grows(tensor) else "reduce", self._size(value, tensor, "R", False))]

    def _gathered_operands(self, node: fx.Node) -> list[Operand]:
        """What sequence parallelism cuts and this op wants whole. Token ids and masks are whole everywhere."""
        if self._runs_by_sequence(node):
            return []
        found = []
        for operand, taken in zip(self.flow.operands_of[node], self.axis.taken[node.name], strict=True):
            tensor = operand.base_tensor
            mask = self._has_pairs(tensor) and tensor.shape[-3] == 1
            whole = operand.value not in self.made_by or taken != "R" or not self._grows(tensor) or mask
            if whole or not tensor.is_floating_point():
                continue
            if self._is_held_by_sequence(operand.value):
                found.append(operand)
        return found

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

    def _exchanged(self, node: fx.Node) -> list[Message]:
        """The rows on their way to experts or back; forward and there, first how many of them come."""
        if node.target not in (TO_GROUPS, FROM_GROUPS):
            return []
        operand, rule = self.flow.operands_of[node][0], self.axis.rules[node.name]
        seq = self._runs_by_sequence(node)
        if node.target is FROM_GROUPS:
            return [Message("exchange", self._size(operand.value, operand.tensor, rule.inputs[0], seq))]
        (made,) = result_metas(node)
        assert made is not None
        rows = Message("exchange", self._size(value_name(node), made, rule.outputs[0], seq))
        ends = self.flow.operands_of[node][2].tensor
        first = not is_backward(node) and made.dim() > 1
        return [Message("exchange", share(ends.numel() * _COUNT_BYTES, FIXED)), rows] if first else [rows]

    def _alive(self, kernels: list[list[fx.Node]], kept: dict[str, Floats], *, backward: bool) -> Floats:
        """[kernels, 10]: what the pass made and still needs, while each kernel runs; backward also what was kept."""
        steps = np.zeros((len(kernels) + 1, KINDS))
        place = {n: i for i, kernel in enumerate(kernels) for n in kernel}
        last: dict[str, int] = defaultdict(int)
        for i, kernel in enumerate(kernels):
            for node in kernel:
                for operand in self.flow.operands_of[node]:
                    last[operand.value] = i
        gradients = {resolve(self.nodes[name]).value for name in self.trace.grads.values()}
        for i, kernel in enumerate(kernels):
            room = self._dying(kernel, i, last) if backward else []
            for node in kernel:
                for index, tensor in enumerate(result_metas(node)):
                    value = value_name(node, index)
                    if tensor is None or value in gradients or self._is_internal(value, kernel):
                        continue
                    users = [u.user for u in self.flow.uses.get(value, ())]
                    leaves = any(u not in place for u in users) and not backward and value not in kept
                    end = len(kernels) - 1 if value in kept and not backward else max(last[value], i)
                    size = self._value_size(value)
                    over = next((at for at, other in enumerate(room) if np.array_equal(other, size)), None)
                    if over is None:
                        steps[i] += size
                    else:  # written over an operand, which is then no more
                        steps[i + 1] += room.pop(over)
                    steps[len(kernels) if leaves else end + 1] -= size
        if backward:
            for value, size in kept.items():
                steps[0] += size
                steps[min(last.get(value, 0), len(kernels) - 1) + 1] -= size
        return np.cumsum(steps, axis=0)[:-1] if len(kernels) else np.zeros((1, KINDS))

    def _dying(self, kernel: list[fx.Node], at: int, last: dict[str, int]) -> list[Floats]:
        """[10] each: operands that a kernel can write over: hand-written losses and activations do that backward."""
        if not self.fuse or not all(is_fusable(node) for node in kernel):
            return []
        values = {o.value for node in kernel for o in self.flow.operands_of[node] if o.value in self.tensors}
        return [self._value_size(v) for v in sorted(values) if last[v] == at and self.made_by[v] not in kernel]

    # -- parts ------------------------------------------------------------------------------

    def _part(self, name: str) -> Part:
        forward = self.parts.ops(self.flow, name, backward=False)
        backward = self.parts.ops(self.flow, name, backward=True)
        kept = self._kept(forward)
        core = {v: s for v, s in kept.items() if self._is_quadratic(v)}
        saved, shown = self._saved(forward), self._shown(forward)
        used = self._parameters(forward + backward)
        others = {p for other in self.parts.names if other != name for p in self._used(other)}
        return Part(
            forward=self._pass(forward, kept, shown, backward=False),
            backward=self._pass(backward, kept, shown, backward=True),
            kept=total(list(kept.values())),
            kept_selective=total([s for v, s in kept.items() if v not in core]),
            kept_products=total([s for v, s in kept.items() if v in saved]),
            gathered=self._gathered(kept),
            again=self._again(forward, set(core), set(kept) - set(core)),
            again_products=self._again(forward, set(kept) - saved, saved),
            boundary=self._boundary(forward),
            parameters=total([self._numbers(p) for p in used]),
            tied=total([self._numbers(p) for p in used if p in others]),
            tensors=len(used),
            numbers={p: self._numbers(p) for p in used},
        )

    def _pass(self, ops: list[fx.Node], kept: dict[str, Floats], shown: Floats, *, backward: bool) -> Pass:
        kernels = groups(self.flow, ops, self._node_grows, self.fusion, self._alike)
        return Pass(
            tuple(self._kernel(k) for k in kernels),
            self._messages(ops, backward=backward),
            self._alive(kernels, kept, backward=backward),
            self._views(ops),
            backward,
            shown,
        )

    def _saved(self, forward: list[fx.Node]) -> set[str]:
        """Values of attention and of every other product, and what comes from outside."""
        products = [n for n in forward if op_class(n.target) is OpClass.MATMUL]
        attention = [n for n in forward if op_class(n.target) is OpClass.ATTENTION]
        made = {value_name(n, i) for n in (*products[::2], *attention) for i in range(len(result_metas(n)))}
        return made | {o.value for n in forward for o in self.flow.operands_of[n] if o.node not in set(forward)}

    def _again(self, forward: list[fx.Node], wanted: set[str], there: set[str]) -> Pass:
        """The forward ops that make `wanted` from what is there."""
        inside = set(forward)
        stack, needed = [self.made_by[v] for v in wanted], set()
        while stack:
            node = stack.pop()
            if node in needed or node not in inside:
                continue
            needed.add(node)
            stack += [
                self.made_by[o.value]
                for o in self.flow.operands_of[node]
                if o.value not in there and o.value in self.made_by
            ]
        ops = [n for n in forward if n in needed]
        kernels = groups(self.flow, ops, self._node_grows, self.fusion, self._alike)
        return Pass(
            tuple(self._kernel(k) for k in kernels), (), np.zeros((1, KINDS)), self._views(ops), False, self._shown(ops)
        )

    def _shown(self, ops: list[fx.Node]) -> Floats:
        """[10] bytes of the keys and values that attention in these forward ops reads, each head of them once."""
        found = []
        for node in ops:
            operands, rule = self.flow.operands_of[node], self.axis.rules[node.name]
            for slot in self._key_slots(node):
                size = self._size(operands[slot].value, operands[slot].tensor, rule.inputs[slot], False)
                found.append(size * self.kv_share if op_class(node.target) is OpClass.ATTENTION else size)
        return total(found)

    def _key_slots(self, node: fx.Node) -> tuple[int, ...]:
        """Which operands of an op are keys or values."""
        if op_class(node.target) is OpClass.ATTENTION:
            return 1, 2
        target: Any = node.target
        slots = _PRODUCTS.get(target)
        if slots is None:
            return ()
        made = [t for t in result_metas(node) if t is not None]
        scores = any(map(self._is_scores, made)) or self._is_scores(self.flow.operands_of[node][slots[0]].tensor)
        return slots[1:] if scores else ()

    def _views(self, ops: list[fx.Node]) -> int:
        return len({v.node for n in ops for o in self.flow.operands_of[n] for v in o.views})

    def _boundary(self, forward: list[fx.Node]) -> Floats:
        inside = set(forward)
        found: dict[str, Floats] = {}
        for node in forward:
            for index, tensor in enumerate(result_metas(node)):
                value = value_name(node, index)
                users = [u.user for u in self.flow.uses.get(value, ())]
                if (
                    tensor is not None
                    and self._grows_much(value)
                    and any(u not in inside and not is_backward(u) for u in users)
                ):
                    found[value] = self._value_size(value)
        return total(list(found.values()))

    def _used(self, part: str) -> set[str]:
        if part not in self._used_by:
            ops = [n for n in self.flow.ops if self.parts.part_of[n.name] == part]
            self._used_by[part] = set(self._parameters(ops))
        return self._used_by[part]

    def _parameters(self, ops: list[fx.Node]) -> list[str]:
        names = [o.node.name for n in ops for o in self.flow.operands_of[n] if o.node.name in self.params]
        return list(dict.fromkeys(names))

    def _numbers(self, node: str) -> Floats:
        param = self.params[node]
        cut = is_cut(self.axis.params[param.fqn])
        return share(math.prod(param.shape), self._kind(False, cut, False, node in self.experts.values))
