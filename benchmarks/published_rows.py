"""The rows of `benchmarks/data` as cases: a model, a machine, a layout, and what was measured.

A row becomes a `Case`, or a `Skipped` with the reason. What a row leaves open and its framework decides is in
`FRAMEWORKS`, with origins; nothing here belongs to a single row.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
GIB = 2**30

# The GPU's name in a row, by how it begins -> preset of autopar.
PRESETS = {
    "A100-SXM4-80GB": "a100-80g",
    "A100-SXM4-40GB": "a100-40g",
    "H100-SXM5-80GB": "h100-sxm",
    "H100-80GB": "h100-sxm",
    "H100-96GB-HBM2e": "h100-sxm",
}
# Until FlashAttention (Dao et al. 2022) came into frameworks, attention was products and a softmax.
FIRST_FUSED_ATTENTION = 2023


# FlashAttention of 2022 (its CUDA kernels until 1.0.9, and those in Triton) against FlashAttention-2, forward and
# backward. A100: about 2, as the FlashAttention-2 paper says; H100: fitted to every other row of llm-foundry.
FIRST_FLASH = {"a100-80g": 2.0, "a100-40g": 2.0, "h100-sxm": 1.65}
RATED_WATT = {"h100-sxm": 700.0, "a100-80g": 400.0, "a100-40g": 400.0}


@dataclass(frozen=True)
class Framework:
    """What a framework does where a row does not say.

    grad_dtype: of gradients. dropout: of GPTs. sp: sequence parallelism beside tensor parallelism.
    first_flash: whether its fused attention is the first FlashAttention. run: options of `autopar.predicting.run.Run`.
    """

    grad_dtype: str | None
    dropout: float = 0.0
    sp: bool | None = None
    first_flash: bool = False
    run: tuple[tuple[str, Any], ...] = ()


# By how the row's framework begins.
FRAMEWORKS = {
    # arXiv 2205.05198: 18 bytes a parameter, so gradients in float32; dropout 0.1 (its section 4.1 counts masks);
    # arguments.py: the layers divide by the stages
    "Megatron-LM": Framework("float32", 0.1, run=(("cut", "even"),)),
    # fp16 gradients of the ZeRO optimizer; bf16 with float32 (BLOOM chronicles: "fp32 gradient accumulation"), added up
    # after each micro-batch; its pipeline engine all-reduces them (runtime/pipe/engine.py, _exec_reduce_grads)
    "Megatron-DeepSpeed": Framework(None, 0.1, run=(("accumulates_apart", True), ("reduces_whole", True))),
    "DeepSpeed ZeRO-3": Framework(None, 0.1),
    # Composer: DEFAULT reduces in float32, PURE in the dtype of compute; FSDP reduces beside the backward pass
    "llm-foundry FSDP DEFAULT": Framework("float32", run=(("overlap", True),)),
    "llm-foundry FSDP PURE": Framework(None, run=(("overlap", True),)),
    # HybridZeroOptimizer (hybrid_zero_optim.py) all-reduces in the model's dtype, gives whole parameters to ranks
    # (_partition_param_list), which broadcast them (broadcast_params); configs/7B_sft.py: overlap_sync_grad,
    # reduce_bucket_size of 512 Mi numbers, tensor mode "mtp" (no sequence parallelism); install.md: flash-attention
    # 1.0.5
    "InternEvo": Framework(
        None,
        sp=False,
        first_flash=True,
        run=(("overlap", True), ("bucket_bytes", 1 << 30), ("reduces_whole", True), ("owners", True)),
    ),
    "torchtitan": Framework("float32", run=(("overlap", True),)),  # its mixed precision reduces in float32
    # scaling_benchmarks.py: ACCUMULATE_GRAD_IN_FP32 = True; models/base.py: build_model gives blocks to stages;
    # trainer.py: with ZeRO, sync_gradients_across_dp(reduce_scatter=False); pauses: autopar/predicting/pauses.py
    "nanotron": Framework("float32", run=(("cut", "threshold"), ("reduces_whole", True), ("pipeline_pause_s", 0.27))),
}


@dataclass(frozen=True)
class Dims:
    """A decoder by its sizes. attention: "eager" or "sdpa" (fused). dtype: of parameters, by name."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    seq: int
    gated: bool
    tied: bool
    attention: str
    alibi: bool
    dropout: float
    dtype: str


@dataclass(frozen=True)
class Machine:
    """preset: of autopar. gbit_per_s: between nodes, per device and direction; None: the preset's.

    memory_gib, memory_bytes_per_s: where the device is a variant of the preset's; None: the preset's.
    power_share: what the device may draw, of what the preset's is rated for.
    """

    preset: str
    gpus: int
    gbit_per_s: float | None
    memory_gib: float | None = None
    memory_bytes_per_s: float | None = None
    power_share: float = 1.0


@dataclass(frozen=True)
class Case:
    """One measured run. step_s, peak_bytes: None where not measured. ran: False for a failed run.

    run: options of `autopar.predicting.run.Run` that follow from the framework and the row.
    caveats: what is known to be different from what a prediction assumes.
    """

    id: str
    source: str
    dims: Dims
    machine: Machine
    layout: dict[str, Any]
    global_batch: int
    step_s: float | None
    peak_bytes: float | None = None
    ran: bool = True
    run: tuple[tuple[str, Any], ...] = ()
    caveats: tuple[str, ...] = ()
    expected: dict[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Skipped:
    """A row that is not compared, and why."""

    id: str
    reason: str


@cache
def rows() -> tuple[dict[str, Any], ...]:
    """All rows of runs.json."""
    return tuple(json.loads((DATA / "runs.json").read_text()))


@cache
def sweep_file() -> dict[str, Any]:
    """All of h100_sweep.json."""
    data: dict[str, Any] = json.loads((DATA / "h100_sweep.json").read_text())
    return data


def training_cases() -> tuple[list[Case], list[Skipped]]:
    """The training rows of dense models on A100 and H100, seen, with a complete layout; and the others."""
    cases, skipped = [], []
    for row in rows():
        if row["kind"] != "training":
            continue
        reason = why_not(row)
        if reason is None:
            cases.append(to_case(row))
        else:
            skipped.append(Skipped(row["id"], reason))
    return cases, skipped


def why_not(row: dict[str, Any]) -> str | None:
    """Why a training row cannot be compared; None if it can."""
    model, config = row["model"], row["config"]
    if row["verified"] != "seen":
        return "not seen in its source"
    if preset_of(row) is None:
        return f"not on A100 or H100, but on {row['cluster']['gpu']}"
    if model["experts"]:
        return "mixture of experts"
    sizes = [k for k in ("layers", "hidden", "heads", "ffn", "vocab", "seq", "gated") if model[k] is None]
    if sizes:
        return f"the model's {', '.join(sizes)} not given"
    degrees = [k for k in ("dp", "tp", "pp", "micro_batch", "global_batch") if config[k] is None]
    if config["zero_stage"] is None and config["dp"] != 1:
        degrees.append("zero_stage")
    if degrees:
        return f"layout incomplete: {', '.join(degrees)} not given"
    if "8" in config["precision"]:
        return f"products in {config['precision']}: there is no such precision in autopar yet"
    if measured_step_s(row) is None:
        return "no time measured (out of memory)" if (row.get("extra") or {}).get("oom") else "no time measured"
    return None


def preset_of(row: dict[str, Any]) -> str | None:
    """The preset of a row's GPU, or None."""
    gpu = row["cluster"]["gpu"] or ""
    return next((preset for name, preset in PRESETS.items() if gpu.startswith(name)), None)


def measured_step_s(row: dict[str, Any]) -> float | None:
    """Seconds of a step as printed, or from the tokens/s of a GPU, or as derived from TFLOP/s in `derived`."""
    measured, model, config = row["measured"], row["model"], row["config"]
    if measured["step_time_s"] is not None:
        return float(measured["step_time_s"])
    if measured["tokens_per_s_per_gpu"] is not None:
        tokens = config["global_batch"] * model["seq"]
        return float(tokens / (measured["tokens_per_s_per_gpu"] * row["cluster"]["n_gpus"]))
    derived: float | None = row["derived"].get("step_time_s")
    return derived


def to_case(row: dict[str, Any]) -> Case:
    """A complete training row as a case."""
    peak = row["measured"]["peak_mem_gb"]
    return Case(
        id=row["id"],
        source=row["source"]["title"],
        dims=dims_of(row),
        machine=machine_of(row["cluster"]),
        layout=layout_of(row["config"]),
        global_batch=row["config"]["global_batch"],
        step_s=measured_step_s(row),
        peak_bytes=None if peak is None else peak * GIB,
        run=run_of(row),
        caveats=caveats_of(row),
    )


def dims_of(row: dict[str, Any]) -> Dims:
    """The model of a row."""
    model = row["model"]
    text = model["attention"] or ""
    eager = "unfused" in text or row["source"]["year"] < FIRST_FUSED_ATTENTION
    return Dims(
        layers=model["layers"],
        hidden=model["hidden"],
        heads=model["heads"],
        kv_heads=model["kv_heads"],
        ffn=model["ffn"],
        vocab=model["vocab"],
        seq=model["seq"],
        gated=model["gated"],
        tied=bool(model["tied"]),
        attention="eager" if eager else "sdpa",
        alibi="ALiBi" in text,
        dropout=framework_of(row["config"]).dropout,
        dtype="float16" if row["config"]["precision"] == "fp16" else "bfloat16",
    )


def framework_of(config: dict[str, Any]) -> Framework:
    """What the row's framework does by default."""
    return next(f for name, f in FRAMEWORKS.items() if config["framework"].startswith(name))


def machine_of(cluster: dict[str, Any]) -> Machine:
    """The machine of a row. A name may end in what differs: "H100-96GB-HBM2e (500 W, 2.4 TB/s)"."""
    gpu = cluster["gpu"]
    preset = next(p for name, p in PRESETS.items() if gpu.startswith(name))
    limit = re.search(r"\((\d+) W", gpu)
    power = float(limit[1]) / RATED_WATT[preset] if limit else 1.0
    memory = (96.0, 2.4e12) if gpu.startswith("H100-96GB-HBM2e") else (None, None)
    return Machine(preset, cluster["n_gpus"], cluster["inter_gbps"], *memory, power)


def run_of(row: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """How the row's framework runs it, where that is not the usual way."""
    config, framework = row["config"], framework_of(row["config"])
    found = dict(framework.run)
    if framework.first_flash or "(Triton)" in (row["model"]["attention"] or ""):
        found["attention_factor"] = FIRST_FLASH[preset_of(row) or ""]
    if "op)" in (config["recompute"] or ""):
        found["selective"] = "products"
    if config["framework"].startswith("torchtitan"):  # its norms and rotations are plain PyTorch
        found |= {"fusion": "all", "eager": False} if is_compiled(row) else {"fusion": "none"}
    words = str(config["zero_stage"]).split()
    if len(words) > 2 and words[2].isdecimal():  # "1 over 8 ranks"
        found["zero_ranks"] = int(words[2])
    return tuple(found.items())


def is_compiled(row: dict[str, Any]) -> bool:
    """Whether torch.compile made the kernels; tensor parallelism of torchtitan was measured with it throughout."""
    framework = row["config"]["framework"]
    return "compile" in row["id"] or "compile" in framework or "TP" in framework


def layout_of(config: dict[str, Any]) -> dict[str, Any]:
    """The layout of a row in autopar's keys."""
    grads = framework_of(config).grad_dtype
    if config["framework"] == "Megatron-DeepSpeed" and config["precision"] == "bf16":
        grads = "float32"
    layout = {
        "dp": config["dp"],
        "tp": config["tp"],
        "pp": config["pp"],
        "cp": config["cp"],
        "ep": config["ep"],
        "vpp": config["vpp"],
        "micro_batch": config["micro_batch"],
        "zero": zero_of(config["zero_stage"]),
        "sp": framework_of(config).sp if config["sequence_parallel"] is None else config["sequence_parallel"],
        "recompute": recompute_of(config["recompute"]),
        "schedule": None if config["schedule"] is None else config["schedule"].lower().split()[0],
    }
    return {**{key: value for key, value in layout.items() if value is not None}, "grad_dtype": grads}


def zero_of(stage: int | str | None) -> int:
    """The ZeRO stage of "1 over 8 ranks"; with one data-parallel rank it may be left open."""
    return 0 if stage is None else int(str(stage)[0])


def recompute_of(text: str | None) -> str:
    """ "full (uniform, every layer)" -> full, "selective (attention core)" -> selective, None -> none."""
    word = (text or "none").split()[0]
    if word not in ("none", "selective", "full"):
        raise ValueError(f"recompute {text!r} is not known")
    return word


def caveats_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row says of itself that a prediction does not know."""
    config, note, cluster = row["config"], row["note"] or "", row["cluster"]
    known = {
        "collectives inside of products (async TP)": "async TP" in config["framework"],
        "network rate assumed": "400 assumed" in note and "H100" in cluster["gpu"] and cluster["n_gpus"] > 8,
        "sizes of the model from memory": "from memory" in note,
        "timed at the second step": "time at iteration 2" in note,
        "stages of unequal length": "Uneven stages" in note,
    }
    return tuple(caveat for caveat, holds in known.items() if holds)


# -- the sweep ------------------------------------------------------------------------------


def sweep_cases() -> tuple[list[Case], list[Skipped]]:
    """Every run of the sweep, finished or failed; runs of a model whose sizes the file does not give are skipped."""
    data = sweep_file()
    models = {model["name"]: model for model in data["common"]["models"].values()}
    cases, skipped = [], []
    for number, run in enumerate(data["runs"]):
        name = f"sweep-{number:03d}"
        if run["model"] not in models:
            skipped.append(Skipped(name, f"sizes of {run['model']} not given"))
        else:
            cases.append(_sweep_case(name, run, models[run["model"]]))
    return cases, skipped


def _sweep_case(name: str, run: dict[str, Any], model: dict[str, Any]) -> Case:
    sizes = {
        key: model[key] for key in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "gated", "tied")
    }
    ran = run["status"] == "ok"
    keys = ("dp", "tp", "pp", "micro_batch")
    return Case(
        id=name,
        source=f"{run['model']}, {run['nodes']} nodes",
        dims=Dims(**sizes, attention="sdpa", alibi=False, dropout=0.0, dtype="bfloat16"),
        machine=Machine(PRESETS[sweep_file()["common"]["gpu"]], run["n_gpus"], None),
        layout={**{key: run[key] for key in keys}, "zero": run["zero_stage"]},
        global_batch=run["global_batch"],
        step_s=run["global_batch"] * model["seq"] / run["tokens_per_s"] if ran else None,
        peak_bytes=run["peak_mem_gb"] * GIB if ran else None,
        ran=ran,
        run=FRAMEWORKS["nanotron"].run,
    )


# -- memory ---------------------------------------------------------------------------------


def memory_cases() -> list[Case]:
    """The analytic memory rows of arXiv 2205.05198: two variants each, without and with recomputation.

    expected: bytes of activations, and of parameters, gradients and optimizer state, on the first pipeline stage.
    """
    variants = {"no_recompute": ("none", False), "seqpar_selective": ("selective", True)}
    cases = []
    for row in rows():
        if not row["id"].startswith("korthikanti22-mem"):
            continue
        for variant, (recompute, sequence_parallel) in variants.items():
            config = {**row["config"], "recompute": recompute, "sequence_parallel": sequence_parallel}
            extra = row["extra"]
            expected = {
                "activations": extra[f"activation_gib_{variant}"] * GIB,
                "states": extra["param_and_optimizer_gib"] * GIB,
            }
            case = to_case({**row, "id": f"{row['id']}-{variant}", "config": config})
            cases.append(replace(case, expected=expected))
    return cases
