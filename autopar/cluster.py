"""The cluster a program is planned for: devices, links between them, and their rates.

A `ClusterSpec` is a frozen value that alone decides all costs: planning never looks at
the machine it runs on. Only `ClusterSpec.local()` looks at the machine, and returns an
ordinary spec. As JSON every key names its unit; unknown, missing and impossible entries
are refused with one line that says what is accepted.

Ranks count row-major over (nodes, devices_per_node), as torchrun numbers them.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from autopar.cluster_json import SCHEMA_VERSION, cluster_data, cluster_values, json_data, json_text
from autopar.cost.checks import Count, Name, NonNegative, checked
from autopar.errors import ClusterSpecError, RuntimeFailure
from autopar.files import write_atomically
from autopar.hardware import DTYPES, KINDS, DeviceSpec, LinkSpec
from autopar.machine import host_memory_bytes, local_counts, local_gpu_names

__all__ = ["DTYPES", "KINDS", "SCHEMA_VERSION", "ClusterSpec", "DeviceSpec", "LinkSpec"]


@dataclass(frozen=True)
class ClusterSpec:
    """A cluster of equal nodes of equal devices.

    links: innermost first: inside a node, and (needed with several nodes) between nodes, in one level or several. All
        but the outermost of these say how many devices one unit joins (a leaf switch, a rack). One device needs none.
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
        if not self.links and self.devices > 1:
            raise ClusterSpecError(
                "cluster.links has 0 entries; give one inside a node and, with several nodes, one between nodes"
            )
        if self.nodes > 1 and len(self.links) < 2:
            raise ClusterSpecError(f"cluster.links has no link between its {self.nodes} nodes; add a second entry")
        self._check_levels()

    def _check_levels(self) -> None:
        """Refuse levels whose units do not fill each other."""
        for i, link in enumerate(self.links):
            if link.devices is None and 0 < i < len(self.links) - 1:
                raise ClusterSpecError(
                    f"cluster.links[{i}].devices is null; say how many devices one unit of {link.name!r} joins"
                )
        if self.links and self.links[0].devices not in (None, self.devices_per_node):
            raise ClusterSpecError(
                f"cluster.links[0].devices is {self.links[0].devices}; the first level joins the devices of a node: "
                f"use {self.devices_per_node}, or null"
            )
        for i, (inner, outer) in enumerate(itertools.pairwise(self.level_devices)):
            given = self.links[i + 1].devices
            if given is not None and (outer < inner or outer % inner):
                raise ClusterSpecError(
                    f"cluster.links[{i + 1}].devices is {outer}; use a multiple of the {inner} of the level below"
                )
        if self.nodes > 1 and self.level_devices[-1] < self.devices:
            raise ClusterSpecError(
                f"cluster.links[{len(self.links) - 1}].devices is {self.level_devices[-1]}, which leaves some of the "
                f"{self.devices} devices unconnected; use {self.devices}, or null"
            )

    @property
    def level_devices(self) -> tuple[int, ...]:
        """How many devices one unit of each link joins, innermost first."""
        return tuple(
            self.devices_per_node if i == 0 else link.devices or self.devices for i, link in enumerate(self.links)
        )

    @property
    def price_per_hour_usd(self) -> float | None:
        """Of all devices; None where the price of one is unknown."""
        each = self.device.price_per_hour_usd
        return None if each is None else each * self.devices

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
        """The first link between nodes; ClusterSpecError where there is none."""
        if len(self.links) < 2:
            raise ClusterSpecError(f"cluster {self.name!r} has no link between nodes; add a second entry to links")
        return self.links[1]

    def part(self, devices: int) -> ClusterSpec:
        """The first so many devices: whole nodes, or fewer than one node has; ClusterSpecError for anything else."""
        if devices == self.devices:
            return self
        per_node = min(devices, self.devices_per_node)
        if not 1 <= devices < self.devices or devices % per_node:
            raise ClusterSpecError(
                f"cluster {self.name!r} has no part of {devices} devices; use whole nodes of {self.devices_per_node}"
            )
        links = self.links
        if devices < self.devices_per_node:
            links = tuple(dataclasses.replace(link, devices=None) for link in links[:1] if devices > 1)
        return dataclasses.replace(self, nodes=devices // per_node, devices_per_node=per_node, links=links)

    # -- JSON ----------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the JSON file."""
        return cluster_data(self)

    @classmethod
    def from_dict(cls, data: object) -> ClusterSpec:
        """The inverse of `to_dict`, also for files of earlier versions; ClusterSpecError for anything else."""
        return cls(**cluster_values(data, tuple(f.name for f in fields(cls))))

    def to_json(self) -> str:
        """The JSON text of the spec; the same spec gives the same text."""
        return json_text(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> ClusterSpec:
        """The spec in a JSON text; ClusterSpecError if it is not one."""
        return cls.from_dict(json_data(text))

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
        """A known cluster of `gpus` devices: full nodes (of 8, of 72 for "gb200-nvl72"), or one node of fewer ("cpu":
        one node of any size).

        inter_node_gbit_per_s: network per device, one direction, if it is not the usual one.
        """
        from autopar.presets import find_preset

        preset = find_preset(name)
        if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
            raise ClusterSpecError(f"gpus is {gpus!r}; use a whole number of at least 1")
        per_node = preset.devices_per_node
        if preset.device.kind == "cpu" or gpus <= per_node:
            return preset.cluster(1, gpus, inter_node_gbit_per_s)
        if gpus % per_node:
            below = gpus - gpus % per_node
            raise ClusterSpecError(
                f"gpus={gpus} does not fill nodes of {per_node}; use {below} or {below + per_node}, "
                "or describe the cluster in a JSON file"
            )
        return preset.cluster(gpus // per_node, per_node, inter_node_gbit_per_s)

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
