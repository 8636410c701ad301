"""`autopar.predict`: what a layout that a person names would take."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from autopar._torch_compat import pytree
from autopar.blocks import cut_counts
from autopar.cluster import ClusterSpec
from autopar.cost.optimizer import OptimizerSpec
from autopar.errors import AutoparError, LayoutError
from autopar.layouts import Layout, check_layout, parse_layout
from autopar.models import attention_heads
from autopar.models import example_inputs as inputs_for
from autopar.precision import MODEL
from autopar.predicting.build import build_table, keeps_scores
from autopar.predicting.job import Job
from autopar.predicting.memory import StageMemory, stage_memory
from autopar.predicting.precision import Precision
from autopar.predicting.run import Run
from autopar.predicting.sizes import Shape
from autopar.predicting.stages import Stage, split
from autopar.predicting.step import StepTime, step_time
from autopar.predicting.table import ModelTable
from autopar.predicting.tensor_axis import tensor_axis
from autopar.predicting.work import Pricer
from autopar.trace import Sample, trace_sample

if TYPE_CHECKING:
    from autopar.choosing.shortfall import Shortfall
    from autopar.fixes import Fix

_PRIMES = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47)


@dataclass(frozen=True)
class Prediction:
    """What one training step of a layout takes. MFU counts the model's FLOPs once, HFU recomputation too."""

    layout: Layout
    step_time_s: float
    tokens_per_s_per_gpu: float
    mfu: float
    hfu: float
    peak_bytes: int
    fits: bool
    breakdown: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """In the keys of the command line."""
        return {
            "step_time_s": self.step_time_s,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "layout": self.layout.to_dict(),
            "breakdown": self.breakdown,
        }


class Predictor:
    """Prices layouts of one model on one cluster; the model is traced once.

    sample: the trace, where the caller has it: of `call_to_sample`.
    as_written: attention that the model writes out is priced so, as where others run it; our own programs join it.
    """

    def __init__(
        self,
        model: nn.Module,
        cluster: ClusterSpec,
        *,
        example_inputs: Any = None,
        seq: int | None = None,
        global_batch: int,
        precision: str = MODEL,
        optimizer: str = "adamw",
        memory_limit_bytes: int | None = None,
        run: Run | None = None,
        sample: Sample | None = None,
        as_written: bool = True,
    ) -> None:
        self.cluster, self.global_batch = cluster, global_batch
        self.limit_bytes = checked_limit(memory_limit_bytes) or cluster.device.usable_bytes
        self.optimizer = OptimizerSpec(optimizer)
        self.heads, self.kv_heads = attention_heads(model)
        batch, call = call_to_sample(model, example_inputs, seq)
        self._retrace = _Retrace(weakref.ref(model), call, precision, as_written)
        self.sample = sample = sample or trace_sample(model, call, precision=precision, as_written=as_written)
        self._traced_batch = batch
        self.run = run or Run.usual(keeps_scores(sample, _tokens(sample.trace.inputs)))
        self._read()

    def _read(self) -> None:
        """What the trace comes to on this cluster's devices and links."""
        tokens = _tokens(self.sample.trace.inputs)
        self.axis = tensor_axis(self.sample.trace, self.cluster, tokens)
        shared = _kv_share(self.heads, self.kv_heads)
        self.table: ModelTable = build_table(
            self.sample, self.axis, self._traced_batch, tokens, fusion=self.run.fusion, kv_share=shared
        )
        self.pricer = Pricer(self.cluster, self.run)
        self._stages: dict[tuple[int, int, str | None, Shape], tuple[Stage, ...]] = {}

    def predict(self, layout: str | Mapping[str, Any] | Layout) -> Prediction:
        """Price one layout; LayoutError where it cannot be."""
        found = parse_layout(layout, self.cluster.devices)
        self.check(found)
        return self.price(found)

    def on(self, cluster: ClusterSpec) -> Predictor:
        """The same model and batch on a part of the cluster, with the same links."""
        made = copy.copy(self)
        made.cluster = cluster
        return made

    def elsewhere(self, cluster: ClusterSpec, memory_limit_bytes: int | None = None) -> Predictor:
        """The same model and batch, without another trace, on devices and links of another kind."""
        made = self.on(cluster)
        made.limit_bytes = checked_limit(memory_limit_bytes) or cluster.device.usable_bytes
        made._read()
        return made

    def with_tokens(self, tokens: int) -> Predictor | None:
        """The same model, batch and cluster for shorter sequences: traced again, once; None where the model is gone."""
        sample = self._retrace.sample(self.table.tokens, tokens)
        if sample is None:
            return None
        made = copy.copy(self)
        made.sample = sample
        made._read()
        return made

    def forget_prices(self) -> None:
        """Of a predictor whose cluster has other devices or links than the one it was made for."""
        self.pricer, self._stages = Pricer(self.cluster, self.run), {}

    def price(self, layout: Layout) -> Prediction:
        """Price a layout that is known to be possible."""
        jobs, stages = self.jobs(layout), self.stages(layout)
        return self._prediction(layout, step_time(layout, jobs, stages), stages, self._fullest(layout, jobs)[2])

    def step_time_s(self, layout: Layout) -> float:
        """What `price` says, without the memory."""
        return step_time(layout, self.jobs(layout), self.stages(layout)).total_s

    def memory(self, layout: Layout) -> StageMemory:
        """Of the fullest stage."""
        return self.fullest(layout)[2]

    def fullest(self, layout: Layout) -> tuple[int, Stage, StageMemory]:
        """The stage that needs most memory: the how many-th it is, what it holds, and its peak."""
        return self._fullest(layout, self.jobs(layout))

    def _fullest(self, layout: Layout, jobs: list[Job]) -> tuple[int, Stage, StageMemory]:
        first_of: dict[tuple[Stage, int], int] = {}  # later stages of the same kind hold fewer micro-batches
        for at, stage in enumerate(self.stages(layout)):
            first_of.setdefault((stage, id(jobs[at])), at)
        found = ((at, s, stage_memory(jobs[at], s, at)) for (s, _), at in first_of.items())
        return max(found, key=lambda one: one[2].total)

    def stage_memory(self, layout: Layout, stage: Stage, at: int) -> StageMemory:
        """Of one stage of a layout, the `at`-th."""
        return stage_memory(self.job(layout.of_rank(at)), stage, at)

    def jobs(self, layout: Layout) -> list[Job]:
        """`job`, as each stage has it: one, where they are alike."""
        if layout.shapes is None:
            return [self.job(layout)] * layout.pp
        return [self.job(layout.of_rank(at)) for at in range(layout.pp)]

    def job(self, layout: Layout) -> Job:
        """The layout with all that its time and memory depend on."""
        return Job(
            table=self.table,
            layout=layout,
            cluster=self.cluster,
            pricer=self.pricer,
            shape=self.shape(layout),
            micro_batches=self.global_batch // (layout.dp * layout.micro_batch),
            precision=Precision.of(self.table, layout, self.optimizer.states_per_param),
            run=self.run,
        )

    def shape(self, layout: Layout) -> Shape:
        """What the sizes of a layout depend on."""
        by_sequence, far = layout.sp and self.table.tokens > 1, layout.pp > 1 and self.cluster.nodes > 1
        return Shape(layout.micro_batch, layout.tp, layout.cp, by_sequence, far, layout.ep, layout.busiest_share)

    def stages(self, layout: Layout) -> tuple[Stage, ...]:
        """What each pipeline rank holds."""
        shape = self.shape(layout)
        key = (layout.pp, layout.vpp if self.table.own else layout.vpp > 1, layout.cut, shape)
        if key not in self._stages:
            self._stages[key] = tuple(split(self.table, layout, self.pricer, shape))
        return self._stages[key]

    def check(self, layout: Layout) -> None:
        """Refuse a layout that the model cannot be cut by; LayoutError."""
        check_layout(
            layout,
            global_batch=self.global_batch,
            blocks=max(1, self.table.blocks),
            names=self.table.names,
            heads=self.heads,
            kv_heads=self.kv_heads,
            seq=self.table.tokens if self.table.tokens > 1 else None,
            experts=self.table.experts,
        )
        if layout.cut is not None:
            cut_counts(layout, self.table.names)
        if not self.host_holds(layout):
            raise LayoutError(
                f"layout: offload={layout.offload} needs a link to the host (device.host_link_bytes_per_s) and memory "
                f"there, and a device of {self.cluster.name!r} has not enough; leave offload out, or raise zero"
            )

    def host_holds(self, layout: Layout) -> bool:
        """Whether a rank's share of its host has a link and room for what the layout keeps there."""
        if layout.offload == "none":
            return True
        room = self.cluster.host_memory_bytes / self.cluster.devices_per_node
        most = max(job.host_bytes(stage) for job, stage in zip(self.jobs(layout), self.stages(layout), strict=True))
        return self.cluster.device.host_link_bytes_per_s > 0 and most <= room

    def fixes(self, prediction: Prediction) -> tuple[Fix, ...]:
        """The smallest single changes each of which makes a layout fit, the cheapest first; () if it fits."""
        from autopar.choosing.fixes import fixes_of  # which builds on this module

        return fixes_of(self, prediction.layout)

    def shortfall(self, prediction: Prediction) -> Shortfall:
        """How many bytes a layout that does not fit is short by, and where."""
        from autopar.choosing.shortfall import shortfall

        return shortfall(self, prediction.layout)

    def _prediction(self, layout: Layout, time: StepTime, stages: tuple[Stage, ...], memory: StageMemory) -> Prediction:
        step, devices, device = time.total_s, self.cluster.devices, self.cluster.device
        samples = self.table.tokens if self.table.samples_are_tokens else 1
        flops = self.table.flops * self.global_batch / devices
        peak = device.peak_flops(self.table.compute_dtype)
        again = time.again_flops / max(time.flops, 1.0)
        return Prediction(
            layout=layout,
            step_time_s=step,
            tokens_per_s_per_gpu=self.global_batch * samples / step / devices,
            mfu=flops / step / peak,
            hfu=flops * (1 + again) / step / peak,
            peak_bytes=round(memory.total),
            fits=memory.total <= self.limit_bytes,
            breakdown={
                **{name: seconds for name, seconds in vars(time).items() if name.endswith("_s")},
                "memory_bytes": {k: round(v) for k, v in vars(memory).items()},
                "blocks_per_stage": [s.blocks for s in stages],
                **({"busiest_share": layout.busiest_share} if layout.ep > 1 else {}),
            },
        )


def predict(
    model: nn.Module,
    cluster: ClusterSpec,
    layout: str | Mapping[str, Any] | Layout | Sequence[str | Mapping[str, Any] | Layout],
    *,
    global_batch: int,
    **options: Any,
) -> Prediction | list[Prediction]:
    """Price a layout that a person names, or a list of them with one trace.

    options: of `Predictor`: example_inputs=(args, kwargs), or seq= for a transformers model; precision, optimizer,
        memory_limit_bytes (per device; what the device can give if left out).
    Raises LayoutError for a layout that cannot be, TraceError for a model that cannot be traced.
    """
    predictor = Predictor(model, cluster, global_batch=global_batch, **options)
    if isinstance(layout, (str, Mapping, Layout)):
        return predictor.predict(layout)
    return [predictor.predict(one) for one in layout]


@dataclass(frozen=True)
class _Retrace:
    """What it takes to trace a model for other sequences. known: samples by their tokens."""

    model: weakref.ref[nn.Module]
    call: Any
    precision: str
    as_written: bool
    known: dict[int, Sample] = field(default_factory=dict)

    def sample(self, before: int, tokens: int) -> Sample | None:
        """Of sequences of so many tokens, where they have `before` now."""
        model = self.model()
        if tokens not in self.known and model is not None:
            call = pytree.tree_map_only(torch.Tensor, lambda t: _cut(t, before, tokens), self.call)
            self.known[tokens] = trace_sample(model, call, precision=self.precision, as_written=self.as_written)
        return self.known.get(tokens)


def _cut(tensor: torch.Tensor, before: int, tokens: int) -> torch.Tensor:
    """All dims of one for each token, but for the batch."""
    for dim in range(1, tensor.dim()):
        if tensor.shape[dim] == before:
            tensor = tensor.narrow(dim, 0, tokens)
    return tensor


def checked_limit(limit_bytes: int | None) -> int | None:
    """AutoparError for a limit that cannot be."""
    if limit_bytes is not None and limit_bytes <= 0:
        raise AutoparError(f"memory_limit_bytes must be positive, got {limit_bytes}")
    return limit_bytes


def call_to_sample(model: nn.Module, example_inputs: Any = None, seq: int | None = None) -> tuple[int, Any]:
    """A batch, an odd prime, and inputs of it: those a predictor traces a model with, in place of some or of none."""
    batch = _prime_for(model, seq)
    return batch, _with_batch(example_inputs, batch) if example_inputs is not None else inputs_for(model, batch, seq)


def _prime_for(model: nn.Module, seq: int | None) -> int:
    """A batch by which no other size of the model divides."""
    sizes = {d for p in (*model.parameters(), *model.buffers()) for d in p.shape} | ({seq} if seq else set())
    config = getattr(model, "config", None)
    sizes |= {v for v in vars(config).values() if isinstance(v, int) and v > 0} if config is not None else set()
    found = next((p for p in _PRIMES if all(s % p for s in sizes)), None)
    if found is None:
        raise LayoutError(f"every batch of {_PRIMES} divides some size of the model; change the model's width a little")
    return found


def global_batch_of(call: Any) -> int:
    """Samples that a call holds: the first dim of its first tensor; LayoutError where there is none."""
    tensors = [t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor) and t.dim()]
    if not tensors:
        raise LayoutError("the example inputs hold no tensor with a batch dim; layouts are about batches")
    return int(tensors[0].shape[0])


def _with_batch(example_inputs: Any, batch: int) -> Any:
    """The same inputs with another batch, as meta tensors."""
    tensors = [t for t in pytree.tree_leaves(example_inputs) if isinstance(t, torch.Tensor) and t.dim()]
    size = tensors[0].shape[0] if tensors else 1

    def resized(t: torch.Tensor) -> torch.Tensor:
        if not t.dim() or t.shape[0] != size:
            return t
        return torch.zeros((batch, *t.shape[1:]), dtype=t.dtype, device="meta")

    return pytree.tree_map_only(torch.Tensor, resized, example_inputs)


def _kv_share(heads: int | None, kv_heads: int | None) -> float:
    return kv_heads / heads if heads and kv_heads else 1.0


def _tokens(inputs: Any) -> int:
    """Of one sequence: the second dim of integer inputs; images and the like have none."""
    first = next((i for i in inputs if i.batch_dim == 0), None)
    counted = first is not None and len(first.shape) > 1 and not first.dtype.is_floating_point
    return int(first.shape[1]) if first is not None and counted else 1
