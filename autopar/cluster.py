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
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from autopar.cost.checks import Bytes, Count, Fraction, Name, NonNegative, Positive, checked, read_object
from autopar.errors import ClusterSpecError, RuntimeFailure

SCHEMA_VERSION = 1
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

    def __post_init__(self) -> None:
        checked(self, "device")
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
    """

    name: Name
    bytes_per_s: Positive
    efficiency_fraction: Fraction
    latency_s: NonNegative

    def __post_init__(self) -> None:
        checked(self, "link")

    @property
    def reached_bytes_per_s(self) -> float:
        """What large collectives reach, per device, one direction."""
        return self.bytes_per_s * self.efficiency_fraction


@dataclass(frozen=True)
class ClusterSpec:
    """A cluster of equal nodes of equal devices.

    links: innermost first: inside a node, and (needed with several nodes) between nodes.
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
        if len(self.links) not in (1, 2):
            raise ClusterSpecError(
                f"cluster.links has {len(self.links)} entries; give one inside a node and, with several nodes, "
                "one between nodes"
            )
        if self.nodes > 1 and len(self.links) < 2:
            raise ClusterSpecError(f"cluster.links has no link between its {self.nodes} nodes; add a second entry")

    @property
    def devices(self) -> int:
        """All devices of the cluster."""
        return self.nodes * self.devices_per_node

    @property
    def intra_link(self) -> LinkSpec:
        """The link inside a node."""
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
        data["links"] = list(data["links"])
        return {"schema_version": SCHEMA_VERSION, **data}

    @classmethod
    def from_dict(cls, data: object) -> ClusterSpec:
        """The inverse of `to_dict`; ClusterSpecError for anything else."""
        if isinstance(data, Mapping) and data.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
            raise ClusterSpecError(
                f"cluster.schema_version is {data['schema_version']!r}, this autopar reads {SCHEMA_VERSION}; "
                "write the file again with this version, or upgrade autopar"
            )
        keys = ("schema_version", *(f.name for f in fields(cls)))
        top = read_object(data, keys, "cluster", required=True)
        del top["schema_version"]
        top["device"] = _build(DeviceSpec, top["device"], "device")
        if not isinstance(top["links"], list):
            raise ClusterSpecError(f"cluster.links is {top['links']!r}; use a list of links")
        top["links"] = tuple(_build(LinkSpec, link, f"links[{i}]") for i, link in enumerate(top["links"]))
        return cls(**top)

    def to_json(self) -> str:
        """The JSON text of the spec; the same spec gives the same text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ClusterSpec:
        """The spec in a JSON text; ClusterSpecError if it is not one."""
        try:
            data = json.loads(text, object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise ClusterSpecError(f"the cluster description is not valid JSON ({error}); correct it there") from None
        return cls.from_dict(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClusterSpec:
        """Read a JSON file; ClusterSpecError, naming the file, if that fails."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
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
    def local(cls) -> ClusterSpec:
        """The cluster that torchrun started this process on: its environment, and the devices of this node.

        RuntimeFailure outside torchrun, ClusterSpecError for a GPU that no preset knows.
        """
        from autopar.presets import find_preset, preset_of_device

        world, per_node = _torchrun_count("WORLD_SIZE"), _torchrun_count("LOCAL_WORLD_SIZE")
        if world % per_node:
            raise RuntimeFailure(
                f"WORLD_SIZE={world} is no multiple of LOCAL_WORLD_SIZE={per_node}: start the same number of "
                "processes on every node"
            )
        gpu_names = _local_gpu_names()
        if not gpu_names:
            return _share_host(find_preset("cpu").cluster(world // per_node, per_node), _host_memory_bytes())
        if per_node > len(gpu_names):
            raise RuntimeFailure(
                f"torchrun started {per_node} processes on a node with {len(gpu_names)} GPUs; use "
                f"--nproc-per-node {len(gpu_names)}, or CUDA_VISIBLE_DEVICES= to run on CPU"
            )
        spec = preset_of_device(gpu_names[0]).cluster(world // per_node, per_node)
        return dataclasses.replace(spec, host_memory_bytes=_host_memory_bytes())


def _share_host(spec: ClusterSpec, host_bytes: int) -> ClusterSpec:
    """The spec with the memory of its host split evenly among the ranks of a node."""
    device = dataclasses.replace(spec.device, memory_bytes=host_bytes // spec.devices_per_node)
    return dataclasses.replace(spec, device=device, host_memory_bytes=host_bytes)


def _build(cls: Any, data: object, where: str) -> Any:
    values = read_object(data, tuple(f.name for f in fields(cls)), where, required=True)
    try:
        return cls(**values)
    except ClusterSpecError as error:
        # The class knows its kind ("link"), the caller where in the file it stands ("links[1]").
        kind = cls.__name__.removesuffix("Spec").lower()
        raise ClusterSpecError(str(error).replace(f"{kind}.", f"{where}.", 1)) from None


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return data


def _torchrun_count(variable: str) -> int:
    text = os.environ.get(variable)
    if text is None:
        raise RuntimeFailure(
            f"ClusterSpec.local(): {variable} is not set, so this process was not started by torchrun; launch with "
            "`torchrun --nproc-per-node N script.py`, or ask for one process with ClusterSpec.preset('cpu', gpus=1)"
        )
    if not text.isdecimal() or int(text) < 1:
        raise RuntimeFailure(f"ClusterSpec.local(): {variable}={text!r} is not a positive number; launch with torchrun")
    return int(text)


def _local_gpu_names() -> list[str]:
    import torch  # only here: describing a cluster takes no torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _host_memory_bytes() -> int:
    """Memory of this host, or of the container (cgroup v2) where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdecimal() else total
