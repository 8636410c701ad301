"""`ModelTable`: what the kernels of a model do, part by part, as sizes that a layout's degrees scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.cost.compute import OpClass
from autopar.predicting.sizes import ACT, KINDS, Floats


@dataclass(frozen=True)
class Kernel:
    """One kernel of one pass.

    dims: [4, 10] batch, rows, columns and contracted dim of a matrix product, None for others.
    flops, bytes: [10] per sequence.
    """

    name: str
    kind: OpClass
    dtype: str
    dims: Floats | None
    flops: Floats
    bytes: Floats

    @property
    def sums_over_batch(self) -> bool:
        """A product whose contracted dim grows with the batch, and whose result does not."""
        if self.dims is None:
            return False
        grows = [bool(row[ACT:].any()) for row in self.dims]
        return grows[3] and not any(grows[:3])


@dataclass(frozen=True)
class Message:
    """One collective on the tensor axis, or that of experts. size: [10] bytes of the whole tensor on a rank.

    kind: "sum" (all-reduce; reduce-scatter with sequence parallelism), "gather" (with sequence parallelism only),
        "regather" (the same of what was kept for the backward pass, which can overlap), "reduce" (always all-reduce);
        or, on the expert axis, "exchange" (all-to-all).
    """

    kind: str
    size: Floats


@dataclass(frozen=True)
class Pass:
    """Forward or backward pass of one part. alive: [kernels, 10] bytes that exist while each kernel runs, of what the
    pass makes itself, and (backward) of what was kept for it. views: that eager execution makes. shown: [10] bytes of
    keys and values, which every rank of the context axis has to see.
    """

    kernels: tuple[Kernel, ...]
    messages: tuple[Message, ...]
    alive: Floats
    views: int
    backward: bool
    shown: Floats

    @cached_property
    def weight_gradients(self) -> Pass:
        """Of a backward pass: the products that nothing before it waits for, as they sum over the batch."""
        products = tuple(k for k in self.kernels if k.sums_over_batch)
        return Pass(products, (), self.alive, 0, self.backward, np.zeros(KINDS))

    @cached_property
    def input_gradients(self) -> Pass:
        """Of a backward pass: all the rest."""
        rest = tuple(k for k in self.kernels if not k.sums_over_batch)
        return Pass(rest, self.messages, self.alive, self.views, self.backward, self.shown)


@dataclass(frozen=True)
class Part:
    """Before the blocks, a block, or after them. Sizes are vectors of ten shares (`autopar.predicting.sizes`).

    kept: bytes from forward to backward. kept_selective: without what only the attention core needs, which `again`
        makes once more. kept_products: only what attention and every other product made; `again_products` makes the
        rest. gathered: copies that sequence parallelism gathers and that may be kept, too.
    boundary: bytes that go on to the next part, all that full recomputation keeps of a block.
    parameters: how many numbers; tied: those among them that another part uses as well. tensors: how many of these.
    numbers: of each parameter, by placeholder.
    """

    forward: Pass
    backward: Pass
    kept: Floats
    kept_selective: Floats
    kept_products: Floats
    gathered: Floats
    again: Pass
    again_products: Pass
    boundary: Floats
    parameters: Floats
    tied: Floats
    tensors: int
    numbers: Mapping[str, Floats]


@dataclass(frozen=True)
class ModelTable:
    """Everything `predict` knows of a model. tokens: of one sequence. itemsize, dtype: of a parameter.

    block: one of `blocks` that are alike; own: instead of it, blocks of different kinds, first to last. names: of the
    modules that the blocks are. flops: of one sequence, forward and backward, each counted once. experts: of a layer,
    in grouped products.
    """

    before: Part
    block: Part | None
    after: Part
    blocks: int
    tokens: int
    samples_are_tokens: bool
    itemsize: int
    dtype: str
    flops: float
    experts: int = 0
    own: tuple[Part, ...] = ()
    names: tuple[str, ...] = ()

    @cached_property
    def kinds(self) -> tuple[Part, ...]:
        """The blocks, of those that are alike one."""
        return tuple(map(self.block_at, self.firsts))

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """Of each kind of block the number of the first; those that stand for one traced block have its passes."""
        if not self.own:
            return (0,) if self.block is not None else ()
        numbers = {id(part.forward): number for number, part in reversed([*enumerate(self.own)])}
        return tuple(sorted(numbers.values()))

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, first to last, of blocks that are alike one."""
        return (self.before, *self.kinds, self.after)

    def block_at(self, number: int) -> Part:
        """A block by its number."""
        if self.own:
            return self.own[number]
        assert self.block is not None
        return self.block

    def is_block(self, part: Part) -> bool:
        """Whether a part is a block, rather than what comes before or after them."""
        return part is not self.before and part is not self.after

    @cached_property
    def boundary(self) -> Floats:
        """[10] bytes that go from one block to the next, at most."""
        found: list[Floats] = [kind.boundary for kind in self.kinds] or [self.before.boundary]
        return max(found, key=lambda one: float(one.sum()))

    @cached_property
    def compute_dtype(self) -> str:
        """In which most of the FLOPs are done; that of the parameters, unless the model runs under autocast."""
        by_dtype: dict[str, float] = defaultdict(float)
        for kernel in (k for part in self.parts for one in (part.forward, part.backward) for k in one.kernels):
            by_dtype[kernel.dtype] += float(kernel.flops.sum())
        return max(by_dtype, key=lambda dtype: by_dtype[dtype], default=self.dtype)


def total(vectors: list[Floats]) -> Floats:
    """[10] their sum."""
    return np.sum(vectors, axis=0) if vectors else np.zeros(KINDS)
