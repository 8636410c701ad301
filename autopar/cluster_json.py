"""Cluster descriptions as JSON: strict both ways, and files of older versions are still read.

What a version added has a default, which stands for it in a file of an earlier version.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from autopar.cost.checks import read_object, shown
from autopar.curves import MAX_CURVES, AttentionRate, CollectiveCurve, DeviceCurves, OpCurve
from autopar.errors import ClusterSpecError
from autopar.hardware import DeviceSpec, LinkSpec

SCHEMA_VERSION = 4
# 2 added what `autopar profile` measures; 3 products by shape, the host's share, levels of links and prices; 4 the link
# to the host.
_ADDED_IN_2 = ("view_overhead_s", "parameter_overhead_s", "measured")
_ADDED_IN_4 = ("host_link_bytes_per_s",)


def cluster_data(cluster: Any) -> dict[str, Any]:
    """A ClusterSpec as plain data, as in the JSON file."""
    data = dataclasses.asdict(cluster)
    data["device"]["peak_flops_per_s"] = dict(cluster.device.peak_flops_per_s)
    return {"schema_version": SCHEMA_VERSION, **_listed(data)}


def cluster_values(data: object, names: tuple[str, ...]) -> dict[str, Any]:
    """The fields `names` of a cluster out of `cluster_data`, of any version; ClusterSpecError for anything else."""
    version = data.get("schema_version", SCHEMA_VERSION) if isinstance(data, Mapping) else SCHEMA_VERSION
    if isinstance(version, bool) or version not in range(1, SCHEMA_VERSION + 1):
        raise ClusterSpecError(
            f"cluster.schema_version is {shown(version)}, this autopar reads 1 to {SCHEMA_VERSION}; "
            "write the file again with this version, or upgrade autopar"
        )
    top = read_object(data, ("schema_version", *names), "cluster", required=True)
    del top["schema_version"]
    top["device"] = _read_device(top["device"], version)
    top["links"] = tuple(
        _read_link(link, f"links[{i}]", version) for i, link in enumerate(_list(top["links"], "cluster.links"))
    )
    return top


def json_text(data: dict[str, Any]) -> str:
    """The JSON text of plain data; the same data give the same text. A point of a curve takes one line."""
    return _PAIR.sub(r"[\1, \2]", json.dumps(data, indent=2, allow_nan=False)) + "\n"


def json_data(text: str) -> object:
    """The plain data of a JSON text; ClusterSpecError if it is none."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ClusterSpecError(f"the cluster description is not valid JSON ({error}); correct it there") from None


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
    if version == SCHEMA_VERSION:
        return tuple(f.name for f in fields(cls))
    if version == 3:
        return tuple(f.name for f in fields(cls) if f.name not in _ADDED_IN_4)
    added = _ADDED_IN_2 if version == 2 else ()
    return tuple(f.name for f in fields(cls) if f.default is dataclasses.MISSING or f.name in added)


def _entries(cls: Any, data: object, where: str) -> tuple[Any, ...]:
    items = _list(data, where)
    if len(items) > MAX_CURVES:
        raise ClusterSpecError(f"{where} has {len(items)} entries; use at most {MAX_CURVES}")
    named = ((f"{where}[{i}]", item) for i, item in enumerate(items))
    keys = _keys(cls, SCHEMA_VERSION)
    return tuple(_placed(cls, read_object(item, keys, at, required=True), at) for at, item in named)


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
