"""How a framework runs a layout: what people call its settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """Defaults are those of most published runs: eager PyTorch, norms and activations fused by hand.

    fusion: see `autopar.predicting.fusing`. eager: Python dispatches every kernel; else compiled code does.
    overlap: gradient reductions run beside the last backward pass (with ZeRO stage 3 they always do).
    accumulates_apart: gradients are added to their sum by a kernel of its own, not by the product that makes them.
    pipeline_stall_s: where a pipeline spans nodes, what each collective of a tensor group costs the host on top, for
        each rank of the group. Observed, not explained: in the nanotron sweep on H100 (benchmarks/data/h100_sweep.json)
        such runs have a floor of 14, 25, 50 and 100 ms a layer and micro-batch with 4, 8, 16 and 32 ranks, whatever the
        width of the model and the micro-batch; on one node, and without a pipeline, it is 4.4 ms.
    keeps_gathered: with sequence parallelism, the gathered inputs of products are kept for the backward pass.
    """

    fusion: str = "modules"
    eager: bool = True
    overlap: bool = False
    accumulates_apart: bool = True
    keeps_gathered: bool = False
    pipeline_stall_s: float = 2.5e-4
    cut: str = "balanced"
    holds_buffers: bool = True

    @staticmethod
    def usual(keeps_scores: bool) -> Run:
        """That of published runs.

        keeps_scores: attention is written out and keeps a score for every pair of tokens, as in Megatron-LM of 2021
        and 2022, which has kernels of its own for all that is elementwise, and for the accumulation of gradients.
        """
        return Run(fusion="all", accumulates_apart=False, pipeline_stall_s=0.0, holds_buffers=False) if keeps_scores else Run()
