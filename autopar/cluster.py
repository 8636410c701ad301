"""The cluster a program is planned for: devices, links between them, and their rates.

A `ClusterSpec` is a frozen value that alone decides all costs: planning never looks at
the machine it runs on. Only `ClusterSpec.local()` looks at the machine, and returns an
ordinary spec. As JSON every key names its unit; unknown, missing and impossible entries
are refused with one line that says what is accepted.

Ranks count row-major over (nodes, devices_per_node), as torchrun numbers them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from autopar.cost.checks import Bytes, Count, Fraction, Name, NonNegative, Positive, checked, read_object, shown
from autopar.curves import MAX_CURVES, NOTHING_MEASURED, AttentionRate, CollectiveCurve, DeviceCurves, OpCurve, once
from autopar.errors import ClusterSpecError, RuntimeFailure
from autopar.files import write_atomically
from autopar.machine import host_memory_bytes, local_counts, local_gpu_names

SCHEMA_VERSION = 2  # 2 added what `autopar profile` measures; files of version 1 are read as before
DTYPES = ("float64", "float32", "tf32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
KINDS = ("cuda", "cpu")
DEVICES_PER_NODE = 8  # of every GPU preset


@dataclass(frozen=True)
class DeviceSpec:
    """One device.

    peak_flops_per_s: (dtype, dense FLOP/s) pairs, sorted; a mapping is accepted. "tf32" is
        what float32 matmuls reach where TF32 is switched on.
    reserved_bytes: of memory_bytes, what a program cannot have (context, communication
        buffers, allocator).
    *_efficiency_fraction: share of the peak rate that large kernels of this class reach.
    matmul_ramp_s: time constant of the rise to that efficiency, see `autopar.cost.compute`.
    launch_overhead_s: what every op costs however small.
    view_overhead_s: what a view (a transpose, a slice) costs; nothing where views are made ahead of the device.
    parameter_overhead_s: what a step spends on each trained parameter around its ops (binding it, handing over its
        gradient).
    measured: curves of `autopar profile`; where there is one, it goes before the rates above.
    """

    name: Name
    kind: Name
    memory_bytes: Count
    reserved_bytes: Bytes
    memory_bytes_per_s: Positive
    memory_efficiency_fraction: Fraction
    peak_flops_per_s: tuple[tuple[str, float], ...]
    matmul_efficiency_fraction: Fraction
    matmul_ramp_s: NonNegative
    attention_efficiency_fraction: Fraction
    launch_overhead_s: NonNegative
    view_overhead_s: NonNegative = 0.0
    parameter_overhead_s: NonNegative = 0.0
    measured: DeviceCurves = NOTHING_MEASURED

    def __post_init__(self) -> None:
        checked(self, "device")
        if not isinstance(self.measured, DeviceCurves):
            raise ClusterSpecError(f"device.measured is a {type(self.measured).__name__}; use DeviceCurves")
        if self.kind not in KINDS:
            raise ClusterSpecError(f"device.kind is {self.kind!r}; use one of {', '.join(KINDS)}")
        if self.reserved_bytes >= self.memory_bytes:
            raise ClusterSpecError(
                f"device.reserved_bytes ({self.reserved_bytes}) must be less than device.memory_bytes "
                f"({self.memory_bytes}); lower it"
            )
        rates = read_object(self.peak_flops_per_s, DTYPES, "device.peak_flops_per_s", "positive")
        object.__setattr__(self, "peak_flops_per_s", tuple(sorted(rates.items())))

    @property
    def usable_bytes(self) -> int:
        """Memory that a program can have."""
        return self.memory_bytes - self.reserved_bytes

    def peak_flops(self, dtype: str) -> float:
        """Dense peak in FLOP/s for a torch dtype name without "torch."; ClusterSpecError if the device has none.

        Complex types go by their real type. Integers have no matrix units in torch and go
        by the device's slowest rate.
        """
        rates = dict(self.peak_flops_per_s)
        real = {"complex64": "float32", "complex128": "float64"}.get(dtype, dtype)
        if real in rates:
            return rates[real]
        if real.removeprefix("u").startswith("int") or real == "bool":
            return min(rates.values())
        raise ClusterSpecError(
            f"device {self.name!r} has no rate for {dtype}; it has {', '.join(rates)}: use one of these as "
            "precision, or add the rate to device.peak_flops_per_s"
        )


@dataclass(frozen=True)
class LinkSpec:
    """One level of the network.

    bytes_per_s: per device, one direction, as the maker states it.
    efficiency_fraction: share of it that large collectives reach.
    latency_s: of one hop, software included.
    measured: collectives as `autopar profile` found them; where there is one, it goes before the figures above.
    """

    name: Name
    bytes_per_s: Positive
    efficiency_fraction: Fraction
    latency_s: NonNegative
    measured: tuple[CollectiveCurve, ...] = ()

    def __post_init__(self) -> None:
        checked(self, "link")
        object.__setattr__(self, "measured", tuple(self.measured))
        if len(self.measured) > MAX_CURVES or not all(isinstance(c, CollectiveCurve) for c in self.measured):
            raise ClusterSpecError(f"link.measured must hold at most {MAX_CURVES} CollectiveCurves")
        once(((c.kind, c.ranks) for c in self.measured), "link.measured")

    @property
    def reached_bytes_per_s(self) -> float:
        """What large collectives reach, per device, one direction."""
        return self.bytes_per_s * self.efficiency_fraction


@dataclass(frozen=True)
class ClusterSpec:
    """A cluster of equal nodes of equal devices.

    links: innermost first: inside a node, and (needed with several nodes) between nodes. A single device needs none.
    host_memory_bytes: per node.
    collective_launch_s: what every collective costs before the first byte moves.
    """

    name: Name
    nodes: Count
    devices_per_node: Count
    host_memory_bytes: Count
    collective_launch_s: NonNegative
    device: DeviceSpec
    links: tuple[LinkSpec, ...]

    def __post_init__(self) -> None:
        checked(self, "cluster")
        if not isinstance(self.device, DeviceSpec):
            raise ClusterSpecError(f"cluster.device is {self.device!r}; use a DeviceSpec")
        object.__setattr__(self, "links", tuple(self.links))
        if not all(isinstance(link, LinkSpec) for link in self.links):
            raise ClusterSpecError("cluster.links holds something else; use LinkSpecs only")
        if len(self.links) > 2 or (not self.links and self.devices > 1):
            raise ClusterSpecError(
                f"cluster.links has {len(self.links)} entries; give one inside a node and, with several nodes, "
                "one between nodes"
            )
        if self.nodes > 1 and len(self.links) < 2:
            raise ClusterSpecError(f"cluster.links has no link between its {self.nodes} nodes; add a second entry")

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    def __hash__(self) -> int:
        """Computed once: clusters are keys of caches that are asked thousands of times."""
        return self._hash

    @property
    def devices(self) -> int:
        """All devices of the cluster."""
        return self.nodes * self.devices_per_node

    @property
    def intra_link(self) -> LinkSpec:
        """The link inside a node; ClusterSpecError where none is known."""
        if not self.links:
            raise ClusterSpecError(f"cluster {self.name!r} has no link inside a node; add a first entry to links")
        return self.links[0]

    @property
    def inter_link(self) -> LinkSpec:
        """The link between nodes; ClusterSpecError where there is none."""
        if len(self.links) < 2:
            raise ClusterSpecError(f"cluster {self.name!r} has no link between nodes; add a second entry to links")
        return self.links[1]

    # -- JSON ----------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the JSON file."""
        data = dataclasses.asdict(self)
        data["device"]["peak_flops_per_s"] = dict(self.device.peak_flops_per_s)
        return {"schema_version": SCHEMA_VERSION, **_listed(data)}

    @classmethod
    def from_dict(cls, data: object) -> ClusterSpec:
        """The inverse of `to_dict`, also for files of version 1; ClusterSpecError for anything else."""
        version = data.get("schema_version", SCHEMA_VERSION) if isinstance(data, Mapping) else SCHEMA_VERSION
        if isinstance(version, bool) or version not in (1, SCHEMA_VERSION):
            raise ClusterSpecError(
                f"cluster.schema_version is {shown(version)}, this autopar reads 1 and {SCHEMA_VERSION}; "
                "write the file again with this version, or upgrade autopar"
            )
        keys = ("schema_version", *(f.name for f in fields(cls)))
        top = read_object(data, keys, "cluster", required=True)
        del top["schema_version"]
        top["device"] = _read_device(top["device"], version)
        top["links"] = tuple(
            _read_link(link, f"links[{i}]", version) for i, link in enumerate(_list(top["links"], "cluster.links"))
        )
        return cls(**top)

    def to_json(self) -> str:
        """The JSON text of the spec; the same spec gives the same text. A point of a curve takes one line."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        return _PAIR.sub(r"[\1, \2]", text) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ClusterSpec:
        """The spec in a JSON text; ClusterSpecError if it is not one."""
        try:
            data = json.loads(text, object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise ClusterSpecError(f"the cluster description is not valid JSON ({error}); correct it there") from None
        return cls.from_dict(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file, the whole of it or nothing; ClusterSpecError if that fails."""
        try:
            write_atomically(path, self.to_json())
        except OSError as error:
            raise ClusterSpecError(
                f"cannot write the cluster file {os.fspath(path)}: {error.strerror or error}; nothing was changed"
            ) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClusterSpec:
        """Read a JSON file; ClusterSpecError, naming the file, if that fails."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # ValueError: not text, or no path at all
            raise ClusterSpecError(f"cannot read the cluster file {os.fspath(path)}: {error}") from None
        except ClusterSpecError as error:
            raise ClusterSpecError(f"{os.fspath(path)}: {error}") from None

    # -- known and local clusters ----------------------------------------------------

    @classmethod
    def preset(cls, name: str, gpus: int = 8, inter_node_gbit_per_s: float | None = None) -> ClusterSpec:
        """A known cluster of `gpus` devices: full nodes of 8, or one node of fewer ("cpu": one node of any size).

        inter_node_gbit_per_s: network per device, one direction, if it is not the usual one.
        """
        from autopar.presets import find_preset

        preset = find_preset(name)
        if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
            raise ClusterSpecError(f"gpus is {gpus!r}; use a whole number of at least 1")
        if preset.device.kind == "cpu" or gpus <= DEVICES_PER_NODE:
            return preset.cluster(1, gpus, inter_node_gbit_per_s)
        if gpus % DEVICES_PER_NODE:
            below = gpus - gpus % DEVICES_PER_NODE
            raise ClusterSpecError(
                f"gpus={gpus} does not fill nodes of {DEVICES_PER_NODE}; use {below} or {below + DEVICES_PER_NODE}, "
                "or describe the cluster in a JSON file"
            )
        return preset.cluster(gpus // DEVICES_PER_NODE, DEVICES_PER_NODE, inter_node_gbit_per_s)

    @classmethod
    def local(cls, profile: str | os.PathLike[str] | None = None) -> ClusterSpec:
        """The cluster that torchrun started this process on: its environment, and the devices of this node.

        profile: a file of `autopar profile` on such devices, to be priced by; without it, by the nearest preset.
        RuntimeFailure outside torchrun, ClusterSpecError for a GPU that no preset knows or a profile of another kind.
        """
        from autopar.presets import find_preset, preset_of_device

        world, per_node = local_counts()
        gpu_names = local_gpu_names()
        if profile is not None:
            return _profiled(cls.load(profile), os.fspath(profile), world // per_node, per_node, gpu_names)
        if not gpu_names:
            return _share_host(find_preset("cpu").cluster(world // per_node, per_node), host_memory_bytes())
        if per_node > len(gpu_names):
            raise RuntimeFailure(
                f"torchrun started {per_node} processes on a node with {len(gpu_names)} GPUs; use "
                f"--nproc-per-node {len(gpu_names)}, or CUDA_VISIBLE_DEVICES= to run on CPU"
            )
        spec = preset_of_device(gpu_names[0]).cluster(world // per_node, per_node)
        return dataclasses.replace(spec, host_memory_bytes=host_memory_bytes())


def _profiled(spec: ClusterSpec, where: str, nodes: int, per_node: int, gpu_names: list[str]) -> ClusterSpec:
    """A profile with the counts of what runs now."""
    here = gpu_names[0] if gpu_names else "a CPU"
    if (spec.device.kind == "cuda") != bool(gpu_names) or (gpu_names and spec.device.name != here):
        raise ClusterSpecError(f"{where} describes {spec.device.name}, this node has {here}; profile this machine")
    if len(spec.links) < (2 if nodes > 1 else 1 if per_node > 1 else 0):
        raise ClusterSpecError(
            f"{where} has {len(spec.links)} links, not enough for {nodes} nodes of {per_node}; profile under torchrun "
            "with as many processes"
        )
    placed = dataclasses.replace(spec, nodes=nodes, devices_per_node=per_node)
    return placed if gpu_names else _share_host(placed, host_memory_bytes())


def _share_host(spec: ClusterSpec, host_bytes: int) -> ClusterSpec:
    """The spec with the memory of its host split evenly among the ranks of a node."""
    device = dataclasses.replace(spec.device, memory_bytes=host_bytes // spec.devices_per_node)
    return dataclasses.replace(spec, device=device, host_memory_bytes=host_bytes)


_PAIR = re.compile(r"\[\s+([-+.\w]+),\s+([-+.\w]+)\s+\]")


def _listed(value: Any) -> Any:
    """Plain data with lists for tuples, as JSON has them."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read_device(data: object, version: int) -> DeviceSpec:
    keys = _keys(DeviceSpec, version)
    values = read_object(data, keys, "device", required=True)
    if version > 1:
        lists = read_object(values["measured"], ("ops", "attention"), "device.measured", required=True)
        values["measured"] = DeviceCurves(
            _entries(OpCurve, lists["ops"], "device.measured.ops"),
            _entries(AttentionRate, lists["attention"], "device.measured.attention"),
        )
    return _placed(DeviceSpec, values, "device")


def _read_link(data: object, where: str, version: int) -> LinkSpec:
    values = read_object(data, _keys(LinkSpec, version), where, required=True)
    if version > 1:
        values["measured"] = _entries(CollectiveCurve, values["measured"], f"{where}.measured")
    return _placed(LinkSpec, values, where)


def _keys(cls: Any, version: int) -> tuple[str, ...]:
    """The keys of a file of this version: all that came later have defaults."""
    return tuple(f.name for f in fields(cls) if version > 1 or f.default is dataclasses.MISSING)


def _entries(cls: Any, data: object, where: str) -> tuple[Any, ...]:
    items = _list(data, where)
    if len(items) > MAX_CURVES:
        raise ClusterSpecError(f"{where} has {len(items)} entries; use at most {MAX_CURVES}")
    named = ((f"{where}[{i}]", item) for i, item in enumerate(items))
    return tuple(_placed(cls, read_object(item, _keys(cls, 2), at, required=True), at) for at, item in named)


def _list(data: object, where: str) -> list[object]:
    if not isinstance(data, list):
        raise ClusterSpecError(f"{where} is {shown(data)}; use a list")
    return data


def _placed(cls: Any, values: dict[str, Any], where: str) -> Any:
    """Build `cls`; an error names where in the file it stands ("links[1]") instead of the kind of thing ("link")."""
    try:
        return cls(**values)
    except ClusterSpecError as error:
        kind, dot, rest = str(error).partition(".")
        raise ClusterSpecError(f"{where}{dot}{rest}" if kind in _KINDS_OF_ENTRY else str(error)) from None


_KINDS_OF_ENTRY = ("device", "link", "curve", "attention")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return data
