"""Cluster descriptions: round trip, refusals with their message, presets, the local cluster."""

import copy
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autopar import cluster as cluster_module
from autopar.cluster import ClusterSpec, DeviceSpec, LinkSpec
from autopar.errors import ClusterSpecError, RuntimeFailure
from autopar.presets import PRESETS

GIB = 1024**3


def device(**changes):
    values = {
        "name": "chip",
        "kind": "cuda",
        "memory_bytes": 8 * GIB,
        "reserved_bytes": GIB,
        "memory_bytes_per_s": 1e12,
        "memory_efficiency_fraction": 0.9,
        "peak_flops_per_s": {"float32": 1e13, "bfloat16": 1e14},
        "matmul_efficiency_fraction": 0.8,
        "matmul_ramp_s": 1e-5,
        "attention_efficiency_fraction": 0.5,
        "launch_overhead_s": 4e-6,
    }
    return DeviceSpec(**{**values, **changes})


def small_cluster(**changes):
    values = {
        "name": "two nodes",
        "nodes": 2,
        "devices_per_node": 4,
        "host_memory_bytes": 64 * GIB,
        "collective_launch_s": 1e-5,
        "device": device(),
        "links": (LinkSpec("inside", 2e11, 0.8, 2e-6), LinkSpec("between", 1e10, 0.9, 5e-6)),
    }
    return ClusterSpec(**{**values, **changes})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name):
    spec = ClusterSpec.preset(name, gpus=8)
    again = ClusterSpec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.to_json() == spec.to_json()
    assert spec.device.usable_bytes == spec.device.memory_bytes - spec.device.reserved_bytes > 0


@given(
    nodes=st.integers(1, 1000),
    memory=st.integers(2, 10**13),
    rate=st.floats(1e-3, 1e18),
    latency=st.floats(0, 1),
    share=st.floats(1e-6, 1),
)
def test_any_legal_description_survives_json(nodes, memory, rate, latency, share):
    link = LinkSpec("l", rate, share, latency)
    spec = small_cluster(nodes=nodes, device=device(memory_bytes=memory, reserved_bytes=1), links=(link, link))
    assert ClusterSpec.from_json(spec.to_json()) == spec


def test_file_round_trip_and_its_errors(tmp_path):
    path = tmp_path / "cluster.json"
    small_cluster().save(path)
    assert ClusterSpec.load(path) == small_cluster()
    path.write_text(path.read_text()[:100])
    with pytest.raises(ClusterSpecError, match=r"cluster\.json: the cluster description is not valid JSON"):
        ClusterSpec.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ClusterSpecError, match=r"cannot read the cluster file .*cluster\.json"):
        ClusterSpec.load(path)
    with pytest.raises(ClusterSpecError, match=r"cannot read the cluster file .*none\.json"):
        ClusterSpec.load(tmp_path / "none.json")


def put(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("nodes",), 0, "cluster.nodes"),
        (("nodes",), 1.5, "cluster.nodes"),
        (("nodes",), True, "cluster.nodes"),
        (("devices_per_node",), "8", "cluster.devices_per_node"),
        (("name",), "", "cluster.name"),
        (("collective_launch_s",), -1e-6, "cluster.collective_launch_s"),
        (("device", "memory_bytes"), -1, "device.memory_bytes"),
        (("device", "memory_bytes"), 10**400, "device.memory_bytes"),
        (("device", "memory_bytes_per_s"), 0, "device.memory_bytes_per_s"),
        (("device", "memory_bytes_per_s"), math.nan, "device.memory_bytes_per_s"),
        (("device", "memory_bytes_per_s"), math.inf, "device.memory_bytes_per_s"),
        (("device", "matmul_efficiency_fraction"), 1.01, "device.matmul_efficiency_fraction"),
        (("device", "launch_overhead_s"), None, "device.launch_overhead_s"),
        (("device", "kind"), "tpu", "device.kind"),
        (("device", "reserved_bytes"), 8 * GIB, "device.reserved_bytes"),
        (("device", "peak_flops_per_s"), {}, "device.peak_flops_per_s"),
        (("device", "peak_flops_per_s"), 3, "device.peak_flops_per_s"),
        (("device", "peak_flops_per_s", "float32"), 0, "device.peak_flops_per_s.float32"),
        (("device",), [], "device is"),
        (("links",), {}, "cluster.links"),
        (("links",), [], "cluster.links"),
        (("links", 1, "bytes_per_s"), -5, "links[1].bytes_per_s"),
        (("links", 0, "latency_s"), [0], "links[0].latency_s"),
        (("links", 0), "fast", "links[0]"),
        (("schema_version",), 5, "cluster.schema_version is 5"),
    ],
)
def test_impossible_values_are_refused_where_they_stand(path, value, where):
    data = small_cluster().to_dict()
    put(data, path, value)
    with pytest.raises(ClusterSpecError) as error:
        ClusterSpec.from_json(json.dumps(data))
    assert where in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("path", [(), ("device",), ("links", 1)])
def test_unknown_and_missing_keys_are_refused_with_the_accepted_ones(path):
    base = small_cluster().to_dict()
    for key in base if not path else base[path[0]] if path[0] == "device" else base["links"][1]:
        data = copy.deepcopy(base)
        at = data
        for step in path:
            at = at[step]
        value = at.pop(key)
        with pytest.raises(ClusterSpecError, match=rf"lacks {key}; add it \(accepted: .*{key}"):
            ClusterSpec.from_dict(data)
        at[key + "x"] = value
        with pytest.raises(ClusterSpecError, match=rf"unknown key '{key}x', did you mean '{key}'\?.*accepted: .*{key}"):
            ClusterSpec.from_dict(data)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"x"', "{}", "[" * 100_000, '{"a": 1, "a": 2}'])
def test_other_json_is_refused(text):
    with pytest.raises(ClusterSpecError):
        ClusterSpec.from_json(text)


def test_a_key_that_stands_twice_is_named():
    with pytest.raises(ClusterSpecError, match="the key 'nodes' stands twice"):
        ClusterSpec.from_json('{"nodes": 1, "nodes": 2}')


def test_several_nodes_need_a_network():
    one_link = small_cluster().links[:1]
    assert small_cluster(nodes=1, links=one_link).devices == 4
    with pytest.raises(ClusterSpecError, match="no link between its 2 nodes"):
        small_cluster(links=one_link)
    with pytest.raises(ClusterSpecError, match="has no link between nodes"):
        _ = small_cluster(nodes=1, links=one_link).inter_link


# -- presets ----------------------------------------------------------------------


def test_preset_shapes():
    assert [ClusterSpec.preset("h100-sxm", gpus=n).nodes for n in (1, 4, 8, 16, 64)] == [1, 1, 1, 2, 8]
    assert ClusterSpec.preset("h100-sxm", gpus=4).devices_per_node == 4
    assert ClusterSpec.preset("h100-sxm").devices == 8
    assert (ClusterSpec.preset("cpu", gpus=12).nodes, ClusterSpec.preset("cpu", gpus=12).devices) == (1, 12)


def test_preset_network():
    usual = ClusterSpec.preset("h100-sxm", gpus=16)
    slow = ClusterSpec.preset("h100-sxm", gpus=16, inter_node_gbit_per_s=100)
    assert usual.inter_link.bytes_per_s == 50e9
    assert slow.inter_link.bytes_per_s == 12.5e9
    assert slow.intra_link == usual.intra_link
    with pytest.raises(ClusterSpecError, match="inter_node_gbit_per_s is -1; use a finite number above 0"):
        ClusterSpec.preset("h100-sxm", gpus=16, inter_node_gbit_per_s=-1)


def test_preset_errors():
    with pytest.raises(
        ClusterSpecError, match=r"unknown cluster preset 'a100-80', did you mean 'a100-80g'\? presets:.*cpu"
    ):
        ClusterSpec.preset("a100-80")
    for name, meant in (("h100", "h100-sxm"), ("A100", "a100-80g"), ("H200", "h200"), ("h20", "h200")):
        with pytest.raises(ClusterSpecError, match=f"did you mean '{meant}'"):
            ClusterSpec.preset(name)
    for name in ("", "tpu-v5", 8, ["x"]):
        with pytest.raises(ClusterSpecError, match="; presets: v100-16g"):
            ClusterSpec.preset(name)
    with pytest.raises(ClusterSpecError, match=r"gpus=12 does not fill nodes of 8; use 8 or 16"):
        ClusterSpec.preset("b200", gpus=12)
    for gpus in (0, -8, 2.0, True, "8"):
        with pytest.raises(ClusterSpecError, match="gpus is"):
            ClusterSpec.preset("b200", gpus=gpus)


def test_newer_devices_are_faster():
    order = [ClusterSpec.preset(n) for n in ("v100-32g", "a100-80g", "h100-sxm", "b200")]
    for older, newer in itertools.pairwise(order):
        assert newer.device.peak_flops("float16") > older.device.peak_flops("float16")
        assert newer.device.memory_bytes_per_s > older.device.memory_bytes_per_s
        assert newer.intra_link.bytes_per_s > older.intra_link.bytes_per_s


def test_peak_by_dtype():
    spec = device()
    assert spec.peak_flops("bfloat16") == 1e14
    assert spec.peak_flops("complex64") == 1e13
    assert spec.peak_flops("int64") == 1e13 == spec.peak_flops("bool")
    with pytest.raises(ClusterSpecError, match="'chip' has no rate for float64; it has bfloat16, float32"):
        spec.peak_flops("float64")


# -- local ------------------------------------------------------------------------


@pytest.fixture
def torchrun(monkeypatch):
    """Pretend that torchrun started this process, on a host with 16 GiB and these GPUs."""

    def start(world, local, gpus=()):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        monkeypatch.setattr(cluster_module, "host_memory_bytes", lambda: 16 * GIB)
        fake = SimpleNamespace(
            is_available=lambda: bool(gpus), device_count=lambda: len(gpus), get_device_name=lambda i: gpus[i]
        )
        monkeypatch.setattr(torch, "cuda", fake)

    return start


def test_local_on_cpu_splits_the_host(torchrun):
    torchrun(4, 4)
    spec = ClusterSpec.local()
    assert (spec.nodes, spec.devices_per_node, spec.device.kind) == (1, 4, "cpu")
    assert spec.device.memory_bytes == 4 * GIB
    assert spec.host_memory_bytes == 16 * GIB


def test_local_over_nodes(torchrun):
    torchrun(16, 8, ["NVIDIA H100 80GB HBM3"] * 8)
    spec = ClusterSpec.local()
    assert (spec.name, spec.nodes, spec.devices_per_node) == ("h100-sxm", 2, 8)
    assert spec.device == ClusterSpec.preset("h100-sxm").device


@pytest.mark.parametrize(
    ("cuda_name", "preset"),
    [
        ("Tesla V100-SXM2-16GB", "v100-16g"),
        ("Tesla V100-SXM2-32GB", "v100-32g"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200-nvl72"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_local_gpu_names(torchrun, cuda_name, preset):
    torchrun(2, 2, [cuda_name] * 2)
    assert ClusterSpec.local().name == preset


def test_local_unknown_gpu(torchrun):
    torchrun(1, 1, ["Radeon 9000"])
    with pytest.raises(
        ClusterSpecError, match="no preset describes the GPU 'Radeon 9000'; measure it with `autopar profile"
    ):
        ClusterSpec.local()


def test_local_errors(torchrun, monkeypatch):
    torchrun(6, 4)
    with pytest.raises(RuntimeFailure, match="WORLD_SIZE=6 is no multiple of LOCAL_WORLD_SIZE=4"):
        ClusterSpec.local()
    torchrun(4, 4, ["NVIDIA H200"] * 2)
    with pytest.raises(RuntimeFailure, match="4 processes on a node with 2 GPUs; use --nproc-per-node 2"):
        ClusterSpec.local()
    torchrun("four", 4)
    with pytest.raises(RuntimeFailure, match="WORLD_SIZE='four' is not a positive number"):
        ClusterSpec.local()
    for variable in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        torchrun(4, 4)
        monkeypatch.delenv(variable)
        with pytest.raises(
            RuntimeFailure, match=rf"{variable} is not set.*launch with `torchrun.*preset\('cpu', gpus=1\)"
        ):
            ClusterSpec.local()


def test_host_memory_is_that_of_the_machine():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < cluster_module.host_memory_bytes() <= total


def test_describing_a_cluster_imports_no_torch():
    code = "import sys; from autopar.cluster import ClusterSpec; ClusterSpec.preset('h200', gpus=16).to_json(); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- older files ------------------------------------------------------------------

NEW_IN_2 = {"device": {"view_overhead_s", "parameter_overhead_s", "measured"}, "link": {"measured"}}


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_older_versions_are_read_and_written_anew(version):
    """What a version added is not in its predecessors' files, and stands for its default."""
    spec = small_cluster()
    data = spec.to_dict()
    data["schema_version"] = version
    for kind, cls, entries in (("device", DeviceSpec, [data["device"]]), ("link", LinkSpec, data["links"])):
        added = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
        for entry in entries:
            for name in added - (NEW_IN_2[kind] if version == 2 else set()):
                del entry[name]
    assert ClusterSpec.from_dict(data) == spec
    data["device"]["multiprocessors"] = 8
    with pytest.raises(ClusterSpecError, match="device has an unknown key 'multiprocessors'"):
        ClusterSpec.from_dict(data)


# -- levels of links --------------------------------------------------------------


def level(name, **changes):
    return LinkSpec(name, 1e10, 0.9, 5e-6, **changes)


def test_levels_join_what_the_levels_below_join():
    spec = small_cluster(nodes=16, links=(level("node"), level("leaf", devices=16), level("spine", oversubscription=2)))
    assert spec.level_devices == (4, 16, 64)
    assert spec.inter_link.name == "leaf" and spec.links[2].reached_bytes_per_s == 1e10 * 0.9 / 2
    assert ClusterSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ((level("node"), level("leaf"), level("spine")), r"links\[1\]\.devices is null; say how many devices one unit"),
        ((level("node", devices=8), level("net")), r"links\[0\]\.devices is 8; .* use 4, or null"),
        (
            (level("node"), level("leaf", devices=6), level("spine")),
            r"links\[1\]\.devices is 6; use a multiple of the 4",
        ),
        ((level("node"), level("leaf", devices=16)), r"links\[1\]\.devices is 16, which leaves some of the 64 devices"),
    ],
)
def test_levels_that_do_not_fit_are_refused(links, message):
    with pytest.raises(ClusterSpecError, match=message):
        small_cluster(nodes=16, links=links)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"oversubscription": 0.5}, "link.oversubscription is 0.5; use a finite number of at least 1"),
        ({"devices": 0}, "link.devices is 0; use a whole number of at least 1, or null"),
        ({"rails": -1}, "link.rails is -1; use a whole number of at least 1, or null"),
        ({"reduces": "yes"}, "link.reduces is 'yes'; use true or false"),
    ],
)
def test_impossible_links_are_refused(change, message):
    with pytest.raises(ClusterSpecError, match=message):
        level("net", **change)


# -- what presets say ---------------------------------------------------------------


def test_a_rack_is_one_node_of_72():
    rack, two = ClusterSpec.preset("gb200-nvl72", gpus=64), ClusterSpec.preset("gb200-nvl72", gpus=144)
    assert (rack.nodes, rack.devices_per_node, two.nodes, two.devices_per_node) == (1, 64, 2, 72)
    assert two.intra_link.reduces and not two.inter_link.reduces
    with pytest.raises(ClusterSpecError, match=r"gpus=128 does not fill nodes of 72; use 72 or 144"):
        ClusterSpec.preset("gb200-nvl72", gpus=128)


def test_nodes_without_nvlink():
    for name in ("a100-pcie", "l40s"):
        spec = ClusterSpec.preset(name, gpus=16)
        assert spec.intra_link.name == "PCIe 4" and spec.intra_link.bytes_per_s == 32e9
        assert spec.inter_link.rails is not None and spec.inter_link.rails < spec.devices_per_node


def test_prices_are_per_device_and_a_users_own():
    spec = ClusterSpec.preset("h100-sxm", gpus=16)
    assert spec.device.price_per_hour_usd == 2.95 and spec.price_per_hour_usd == pytest.approx(16 * 2.95)
    own = dataclasses.replace(spec, device=dataclasses.replace(spec.device, price_per_hour_usd=2))
    assert ClusterSpec.from_json(own.to_json()).price_per_hour_usd == 32
    assert ClusterSpec.preset("l40s").price_per_hour_usd is None
    with pytest.raises(
        ClusterSpecError, match=r"device\.price_per_hour_usd is -1; use a finite number of at least 0, or"
    ):
        dataclasses.replace(spec.device, price_per_hour_usd=-1)
