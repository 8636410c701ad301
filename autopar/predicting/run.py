"""How a framework runs a layout: what people call its settings."""

from __future__ import annotations

from dataclasses import dataclass

CUTS = ("balanced", "even", "threshold", "ends")
SELECTIVE = ("attention", "products")


@dataclass(frozen=True)
class Run:
    """Defaults are those of most published runs: eager PyTorch, norms and activations fused by hand.

    fusion: see `autopar.predicting.fusing`. eager: Python dispatches every kernel; else compiled code does.
    attention_factor: how many times longer fused attention takes than FlashAttention-2.
    cut: of the blocks into pipeline stages: "balanced" by time, "even" by count (Megatron-LM), "threshold" (nanotron),
        "ends": by count, where what comes before the blocks and after them counts as a block each (Llama 3,
        Megatron-Core's account_for_embedding_in_pipeline_split).
    selective: what `recompute=selective` runs again: the core of "attention" (Korthikanti et al. 2022), or all but
        attention and every other of the "products" (torchtitan's "op").
    overlap: gradient reductions run beside the last backward pass (with ZeRO stage 3 they always do).
    gathers_ahead: with ZeRO stage 1 and 2, parameters come back beside the next forward pass (FSDP, Megatron-Core).
    overlaps_sends: interleaved stages compute while activations are on their way, as in Megatron-Core; that of 2021 and
        2022 waited.
    reduces_whole: with ZeRO stage 1 and 2, gradients are all-reduced, not reduce-scattered.
    bucket_bytes: of gradients and of parameters that travel together.
    zero_ranks: among how many neighbouring data-parallel ranks ZeRO stage 1 shares the optimizer's state; None: all.
    owners: with ZeRO stage 1, a rank owns whole parameters, which it broadcasts by itself to the others.
    accumulates_apart: gradients are added to their sum by a kernel of its own, not by the product that makes them.
    pipeline_stall_s: where a pipeline spans nodes, what each collective of a tensor group costs the host on top, for
        each rank of the group. Observed, not explained: in the nanotron sweep on H100 (benchmarks/data/h100_sweep.json)
        such runs have a floor of 14, 25, 50 and 100 ms a layer and micro-batch with 4, 8, 16 and 32 ranks, whatever the
        width of the model and the micro-batch; on one node, and without a pipeline, it is 4.4 ms.
    far_tensor_s: where a tensor group spans nodes, what each of its collectives takes on top, for each rank of it.
        Observed on the same runs: a floor of 7 and 16 ms a layer and micro-batch with 16 and 32 ranks. In a pipeline
        the host waits for it, too.
    pipeline_pause_s: where a pipeline spans nodes, the pause in each send and each receive of the runs that have them
        (`pauses.py`). Observed, not explained.
    keeps_gathered: with sequence parallelism, the gathered inputs of products are kept for the backward pass.
    fragmentation: share of what is kept from forward to backward that the caching allocator takes on top, as its blocks
        are cut to the wrong size.
    holds_buffers: the allocator gets buffers of collectives back when the device is done with them (`memory.py`).
    """

    fusion: str = "modules"
    eager: bool = True
    attention_factor: float = 1.0
    cut: str = "balanced"
    selective: str = "attention"
    overlap: bool = False
    gathers_ahead: bool = False
    overlaps_sends: bool = True
    reduces_whole: bool = False
    bucket_bytes: int = 100 << 20
    zero_ranks: int | None = None
    owners: bool = False
    accumulates_apart: bool = True
    pipeline_stall_s: float = 2.2e-4
    far_tensor_s: float = 4e-5
    pipeline_pause_s: float = 0.0
    keeps_gathered: bool = False
    fragmentation: float = 0.08
    holds_buffers: bool = True

    @staticmethod
    def usual(keeps_scores: bool) -> Run:
        """That of published runs.

        keeps_scores: attention is written out and keeps a score for every pair of tokens, as in Megatron-LM of 2021
        and 2022, which has kernels of its own for all that is elementwise, and for the accumulation of gradients.
        """
        if not keeps_scores:
            return Run()
        return Run(
            fusion="all",
            overlaps_sends=False,
            accumulates_apart=False,
            pipeline_stall_s=0.0,
            far_tensor_s=0.0,
            holds_buffers=False,
        )
