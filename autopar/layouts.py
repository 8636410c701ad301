"""A layout that a person names: degrees, micro-batch, ZeRO stage and the rest, in the keys of the command line.

    parse_layout("tp=8,pp=8,vpp=3,recompute=selective", devices=64)
    parse_layout({"tp": 8, "zero": 1}, devices=64)

What a layout leaves out has the usual default; `dp` follows from the number of devices. Ranks are numbered as Megatron
numbers them, innermost first: tp, cp, ep, dp, pp. Expert parallel ranks are taken out of the dp * cp ranks that share
the weights of everything else, so `ep` is no factor of the number of devices.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autopar.errors import LayoutError
from autopar.layout_reading import read_string, written
from autopar.stage_shapes import Degrees, check_rows, is_shaped, stage_degrees, widest

RECOMPUTE = ("none", "selective", "full")
OFFLOAD = ("none", "optimizer")
SCHEDULES = ("none", "gpipe", "1f1b", "interleaved", "zero-bubble")
GRAD_DTYPES = ("float32", "bfloat16", "float16")
DEGREES = ("dp", "tp", "pp", "cp", "ep", "vpp")

_FOLLOWS: Any = None  # the default of a field that follows from the others


@dataclass(frozen=True)
class Layout:
    """One way to spread a training step over devices; a bad value raises LayoutError.

    dp, tp, pp, cp, ep: degrees of data, tensor, pipeline, context and expert parallelism. dp, tp and cp may be given
        for each stage, tp=(2, 1) or "2/1"; then they are those of the stage with most data ranks; `shapes` has all.
    vpp: stages that each pipeline rank holds (interleaved schedule).
    micro_batch: samples that go through the model at once on each data-parallel rank (where stages have unequally many:
        of the stage with most; on the others it is as many more).
    zero: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters in parts over the data-parallel ranks.
    sp: whether what lies between tensor-parallel products is cut along the sequence; default: if tp > 1.
    recompute: "selective" runs the core of attention again in the backward pass, "full" every block.
    recompute_blocks: with "full", how many blocks of each pipeline rank run again; None: all of them.
    schedule: of the pipeline; default "1f1b", with vpp > 1 "interleaved"; "none" without a pipeline.
    offload: "optimizer" keeps the optimizer's state, and a master copy of the parameters, on the host: fetched for the
        optimizer's step, a block at a time, and brought back.
    grad_dtype: in which gradients are kept and summed; None: that of the parameters.
    expert_load: with ep, how many times its even share of rows the busiest expert rank gets, at least 1; or how many
        rows go to each expert (a measured histogram, in any unit), of which the busiest rank's share follows. By
        default experts are loaded alike, which is what balancing aims at.
    cut: where the stages of a pipeline begin, the first excepted, by module paths ("decoder.block.0", for four stages
        "layers.2/layers.5/layers.7" or a tuple of them), or how many blocks each holds ("3/1"); None: balanced.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    vpp: int = 1
    micro_batch: int = 1
    zero: int = 0
    sp: bool = _FOLLOWS
    recompute: str = "none"
    schedule: str = _FOLLOWS
    grad_dtype: str | None = "float32"
    recompute_blocks: int | None = None
    offload: str = "none"
    expert_load: float | tuple[float, ...] = 1.0
    cut: str | None = None
    shapes: tuple[Degrees, ...] | None = None  # of stages that differ; follows from dp, tp and cp

    def __post_init__(self) -> None:
        for key in ("pp", "ep", "vpp", "micro_batch"):
            _check_integer(key, getattr(self, key), 1)
        self._shape_stages()
        for key in Degrees._fields:
            _check_integer(key, getattr(self, key), 1)
        _check_integer("zero", self.zero, 0, 3)
        _check_word("recompute", self.recompute, RECOMPUTE)
        _check_word("offload", self.offload, OFFLOAD)
        if self.recompute_blocks is not None:
            _check_integer("recompute_blocks", self.recompute_blocks, 1)
            if self.recompute != "full":
                raise LayoutError(
                    f"layout: recompute_blocks={self.recompute_blocks} goes with recompute=full, not with "
                    f"recompute={self.recompute}; leave one out"
                )
        if self.grad_dtype is not None:
            _check_word("grad_dtype", self.grad_dtype, GRAD_DTYPES)
        sp: Any = self.sp
        if sp is not _FOLLOWS and not isinstance(sp, bool):
            raise LayoutError(f"layout: sp={sp!r} is not true or false")
        if self.schedule is not _FOLLOWS:
            _check_word("schedule", self.schedule, SCHEDULES)
        most = self.tp if self.shapes is None else max(one.tp for one in self.shapes)
        object.__setattr__(self, "sp", most > 1 and sp is not False)  # one rank has nothing to share
        object.__setattr__(self, "schedule", self._schedule())
        object.__setattr__(self, "expert_load", _checked_load(self.expert_load, self.ep))
        object.__setattr__(self, "cut", self._cut())
        if (self.dp * self.cp) % self.ep:
            raise LayoutError(
                f"layout: ep={self.ep} does not divide dp * cp = {self.dp * self.cp}, from whose ranks those of the "
                "experts are taken; change ep or dp"
            )

    def _shape_stages(self) -> None:
        """Degrees for each stage, if any are given."""
        given = {key: getattr(self, key) for key in Degrees._fields}
        if self.shapes is None and not is_shaped(given):
            return
        shapes = self.shapes or stage_degrees(self.pp, given)
        wide = widest(shapes)
        if self.shapes is not None and wide != Degrees(**given):
            raise LayoutError("layout: stages differ in shape; give dp, tp and cp for each, such as tp=2/1, or for all")
        for key, degree in wide._asdict().items():
            object.__setattr__(self, key, degree)
        differ = len({*shapes}) > 1
        object.__setattr__(self, "shapes", shapes if differ else None)
        if differ:
            check_rows(shapes, self.micro_batch)
            if self.ep > 1:
                raise LayoutError(f"layout: ep={self.ep} does not go with stages of different shape; leave one out")

    def of_rank(self, rank: int) -> Layout:
        """With the degrees of one pipeline rank for all: itself, where stages are alike."""
        if self.shapes is None:
            return self
        one = self.shapes[rank]
        share = self.dp * self.micro_batch // one.dp
        return dataclasses.replace(self, **one._asdict(), shapes=None, micro_batch=share)

    def _schedule(self) -> str:
        """The schedule that was asked for, or the usual one; with one stage they are all the same: "none"."""
        if self.pp == 1:
            if self.vpp > 1:
                raise LayoutError(f"layout: vpp={self.vpp} needs a pipeline; give pp of at least 2, or leave vpp out")
            return "none"
        usual = "interleaved" if self.vpp > 1 else "1f1b"
        wanted = usual if self.schedule is _FOLLOWS else self.schedule
        if wanted == "none":
            raise LayoutError(f"layout: schedule=none goes with pp=1 only, found pp={self.pp}; try schedule={usual}")
        if (wanted == "interleaved") != (self.vpp > 1):
            remedy = "give vpp of at least 2" if self.vpp == 1 else "use schedule=interleaved, or leave vpp out"
            raise LayoutError(f"layout: schedule={wanted} does not go with vpp={self.vpp}; {remedy}")
        return wanted

    def _cut(self) -> str | None:
        """As text, whether it was given so or as a tuple of paths or numbers."""
        given: Any = self.cut
        if given is None:
            return None
        items = given.split("/") if isinstance(given, str) else given if isinstance(given, (tuple, list)) else [given]
        parts = [str(item).strip() for item in items]
        cut = "/".join(parts)
        if self.pp == 1:
            raise LayoutError(f"layout: cut={cut} needs a pipeline; give pp of at least 2, or leave cut out")
        if self.vpp > 1:
            raise LayoutError(
                f"layout: cut={cut} does not go with vpp={self.vpp}: chunks hold as many blocks each; leave one out"
            )
        counts = len(parts) == self.pp and all(part.isdigit() for part in parts)
        if not counts and (len(parts) != self.pp - 1 or not all(parts)):
            raise LayoutError(
                f"layout: cut={cut} does not make pp={self.pp} stages; name the {self.pp - 1} "
                f"module{'s' if self.pp > 2 else ''} at which stages begin, or give {self.pp} numbers of blocks"
            )
        return cut

    @property
    def devices(self) -> int:
        """How many devices the layout takes."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def busiest_share(self) -> float:
        """How many times its even share of rows the busiest expert rank works on; 1 without expert ranks."""
        load = self.expert_load
        if self.ep == 1:
            return 1.0
        if not isinstance(load, tuple):
            return load
        each = len(load) // self.ep
        return max(sum(load[at : at + each]) for at in range(0, len(load), each)) * self.ep / sum(load)

    def micro_batches(self, global_batch: int) -> int:
        """Micro-batches of a step on each data-parallel rank; LayoutError if the batch does not divide."""
        share = self.dp * self.micro_batch
        if global_batch % share or global_batch < 1:
            raise LayoutError(
                f"layout: global batch {global_batch} does not divide by dp * micro_batch = "
                f"{self.dp} * {self.micro_batch} = {share}; change micro_batch, dp or the batch"
            )
        return global_batch // share

    def to_dict(self) -> dict[str, Any]:
        """The layout in the keys of the command line."""
        load = self.expert_load
        found = {**dataclasses.asdict(self), "expert_load": list(load) if isinstance(load, tuple) else load}
        del found["shapes"]
        for at, key in enumerate(Degrees._fields if self.shapes else ()):
            column = [one[at] for one in self.shapes or ()]
            found[key] = column if len({*column}) > 1 else column[0]
        return found

    def __str__(self) -> str:
        """As the command line takes it."""
        return ",".join(f"{key}={written(value)}" for key, value in self.to_dict().items())


KEYS = tuple(field.name for field in dataclasses.fields(Layout) if field.name != "shapes")


def parse_layout(layout: str | Mapping[str, Any] | Layout, devices: int) -> Layout:
    """The layout that a string, a mapping or a Layout names, on so many devices.

    A mapping's None leaves a key out, except for grad_dtype, where it means the dtype of the parameters.
    Raises LayoutError for unknown keys, values that cannot be, and degrees that do not multiply to `devices`.
    """
    if isinstance(layout, Layout):
        return _check_product(layout, devices)
    if isinstance(layout, str):
        given = read_string(layout)
    elif isinstance(layout, Mapping):
        given = {key: value for key, value in layout.items() if value is not None or key == "grad_dtype"}
    else:
        raise LayoutError(f"layout: expected text such as tp=8,pp=2, a dict or a Layout, got {type(layout).__name__}")
    for key in given:
        if key not in KEYS:
            raise LayoutError(f"layout: unknown key {key!r}{_nearest(key)}; the keys are {', '.join(KEYS)}")
    if "dp" not in given:
        given["dp"] = _missing_dp(given, devices)
    return _check_product(Layout(**given), devices)


def check_layout(
    layout: Layout,
    *,
    global_batch: int,
    blocks: int,
    names: tuple[str, ...] = (),
    heads: int | None = None,
    kv_heads: int | None = None,
    seq: int | None = None,
    experts: int | None = None,
) -> None:
    """Refuse a layout that a model cannot be cut by; LayoutError names what to change.

    blocks, names: that the model may be cut between. heads, kv_heads: of attention, where known. seq: tokens in a
    sequence. experts: of a layer, 0 where none can be spread, None where that is not known.
    """
    if layout.shapes is not None:
        for rank in range(layout.pp):
            check_layout(
                layout.of_rank(rank), global_batch=global_batch, blocks=blocks, names=names, heads=heads,
                kv_heads=kv_heads, seq=seq, experts=experts,
            )  # fmt: skip
        return
    count = layout.micro_batches(global_batch)
    if layout.pp * layout.vpp > blocks:
        shown = f" ({names[0]} to {names[-1]})" if names else ""
        raise LayoutError(
            f"layout: pp * vpp = {layout.pp} * {layout.vpp} = {layout.pp * layout.vpp} stages, but the model has "
            f"{blocks} blocks{shown}; lower pp or vpp"
        )
    if layout.schedule == "interleaved" and count % layout.pp:
        raise LayoutError(
            f"layout: the interleaved schedule needs a multiple of pp={layout.pp} micro-batches, found {count}; change "
            "micro_batch or the batch, or leave vpp out"
        )
    if heads is not None and heads % layout.tp:
        raise LayoutError(f"layout: {heads} attention heads do not divide by tp={layout.tp}; change tp")
    if kv_heads is not None and kv_heads % layout.tp and layout.tp % kv_heads:
        raise LayoutError(
            f"layout: tp={layout.tp} neither divides the {kv_heads} key-value heads nor is a multiple of them; "
            "change tp"
        )
    if experts is not None and layout.ep > 1:
        _check_experts(layout, experts)
    parts = layout.cp * (layout.tp if layout.sp else 1)
    if seq is not None and seq % parts:
        degrees = "cp * tp (sp=true)" if layout.sp else "cp"
        raise LayoutError(f"layout: {seq} tokens do not divide by {degrees} = {parts}; change cp, or set sp=false")


def _check_experts(layout: Layout, experts: int) -> None:
    if not experts:
        raise LayoutError(
            f"layout: ep={layout.ep}, but the model has no grouped products over experts; leave ep out (a model of "
            'transformers has them with config._experts_implementation = "grouped_mm")'
        )
    if experts % layout.ep:
        raise LayoutError(
            f"layout: {experts} experts cannot be spread evenly over ep={layout.ep} ranks; choose a divisor of "
            f"{experts}"
        )
    load = layout.expert_load
    if isinstance(load, tuple) and len(load) != experts:
        raise LayoutError(
            f"layout: expert_load gives the rows of {len(load)} experts, but a layer has {experts}; give a number for "
            "each"
        )


def _checked_load(load: Any, ep: int) -> float | tuple[float, ...]:
    """A factor, or the rows of each expert."""
    if isinstance(load, Sequence) and not isinstance(load, str):
        rows = tuple(load)
        numbers = all(isinstance(r, (int, float)) and not isinstance(r, bool) and 0 <= r < float("inf") for r in rows)
        if not (numbers and any(rows)):
            raise LayoutError(f"layout: expert_load={load} must be rows of each expert, none negative and not all 0")
        if len(rows) % ep:
            raise LayoutError(f"layout: expert_load gives the rows of {len(rows)} experts, not a multiple of ep={ep}")
        return tuple(map(float, rows))
    if not isinstance(load, (int, float)) or isinstance(load, bool) or not 1 <= load < float("inf"):
        raise LayoutError(
            f"layout: expert_load={load} must be a factor of at least 1 (1.2), or the rows of each expert (90:110:...)"
        )
    return float(load)


def _check_product(layout: Layout, devices: int) -> Layout:
    if layout.devices != devices:
        raise LayoutError(
            f"layout: dp * tp * pp * cp = {layout.dp} * {layout.tp} * {layout.pp} * {layout.cp} = {layout.devices}, "
            f"but the cluster has {devices} devices; change a degree or the cluster, or leave dp out"
        )
    return layout


def _missing_dp(given: dict[str, Any], devices: int) -> int | tuple[int, ...]:
    """The dp that makes the other degrees fill the devices."""
    if is_shaped(given):
        return tuple(one.dp for one in stage_degrees(given.get("pp", 1), given, devices))
    degrees = [given.get(key, 1) for key in ("tp", "pp", "cp")]
    for key, degree in zip(("tp", "pp", "cp"), degrees, strict=True):
        _check_integer(key, degree, 1)
    tp, pp, cp = degrees
    if devices % (tp * pp * cp):
        raise LayoutError(
            f"layout: tp * pp * cp = {tp} * {pp} * {cp} = {tp * pp * cp} does not divide the {devices} devices of the "
            "cluster; change a degree or the cluster"
        )
    return devices // (tp * pp * cp)


def _check_integer(key: str, value: Any, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise LayoutError(f"layout: {key}={value} is not a whole number")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise LayoutError(f"layout: {key}={value} is out of range; give {bounds}")


def _check_word(key: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise LayoutError(f"layout: unknown {key}={value}{_nearest(value, known)}; give one of {', '.join(known)}")


def _nearest(name: Any, known: tuple[str, ...] = KEYS) -> str:
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
