"""Collectives: formulas against hand computation, and what must hold for any cluster."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster import ClusterSpec
from autopar.cost.collectives import COLLECTIVES, MeshAxis, Span, axis_span, collective_time_s, mesh_axes
from autopar.errors import ClusterSpecError

H100 = ClusterSpec.preset("h100-sxm", gpus=64)
INTRA, INTER = H100.intra_link, H100.inter_link
LAUNCH = H100.collective_launch_s

CLUSTERS = st.sampled_from(
    [ClusterSpec.preset(n, gpus=g) for n in ("v100-16g", "a100-80g", "h100-sxm", "b200") for g in (8, 16, 64)]
    + [ClusterSpec.preset("cpu", gpus=4)]
)
KINDS = st.sampled_from(COLLECTIVES)
BYTES = st.floats(0, 1e12)


@st.composite
def axes(draw):
    """A cluster and an axis of a mesh over it with sizes that are powers of two."""
    cluster = draw(CLUSTERS)
    log = int(math.log2(cluster.devices))
    size = draw(st.integers(0, log))
    stride = draw(st.integers(0, log - size))
    return cluster, MeshAxis(2**size, 2**stride)


def test_mesh_axes_are_row_major():
    assert mesh_axes(H100, (8, 8)) == (MeshAxis(8, 8), MeshAxis(8, 1))
    assert mesh_axes(H100, (2, 4, 8)) == (MeshAxis(2, 32), MeshAxis(4, 8), MeshAxis(8, 1))
    assert mesh_axes(ClusterSpec.preset("cpu", gpus=1), ()) == ()
    for shape in ((8,), (8, 16), (-8, -8), (0, 64)):
        with pytest.raises(ClusterSpecError, match="choose sizes whose product is 64"):
            mesh_axes(H100, shape)


@pytest.mark.parametrize(
    ("axis", "span"),
    [
        (MeshAxis(8, 1), Span(1, 8)),
        (MeshAxis(2, 4), Span(1, 2)),
        (MeshAxis(8, 8), Span(8, 1)),
        (MeshAxis(4, 16), Span(4, 1)),
        (MeshAxis(16, 1), Span(2, 8)),
        (MeshAxis(16, 4), Span(8, 2)),
        (MeshAxis(64, 1), Span(8, 8)),
    ],
)
def test_spans(axis, span):
    assert axis_span(axis, H100) == span


def test_the_worst_placed_group_counts():
    cluster = ClusterSpec.preset("h100-sxm", gpus=24)
    # Of the groups of six, 0-5 lies in a node; 6-11 has two members in one node and four in the next.
    assert axis_span(MeshAxis(6, 1), cluster) == Span(2, 2)
    # Of the groups of five, 5-9 lies three and two over its nodes, 15-19 one and four.
    assert axis_span(MeshAxis(5, 1), ClusterSpec.preset("h100-sxm", gpus=40)) == Span(2, 1)
    with pytest.raises(ClusterSpecError, match="does not fit"):
        axis_span(MeshAxis(32, 1), cluster)


# -- formulas ---------------------------------------------------------------------

NBYTES = float(1 << 30)


def seconds(kind, axis, nbytes=NBYTES):
    return collective_time_s(kind, nbytes, axis, H100) - LAUNCH


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
def test_ring_inside_a_node(kind):
    expected = 7 * INTRA.latency_s + 7 / 8 * NBYTES / INTRA.reached_bytes_per_s
    assert seconds(kind, MeshAxis(8, 1)) == pytest.approx(expected)


def test_ring_with_one_member_a_node():
    expected = 7 * INTER.latency_s + 7 / 8 * NBYTES / INTER.reached_bytes_per_s
    assert seconds("all_gather", MeshAxis(8, 8)) == pytest.approx(expected)


def test_ring_over_whole_nodes_uses_the_network_of_all_members():
    four = seconds("all_gather", MeshAxis(32, 2))  # four members in each of eight nodes
    expected = 24 * INTRA.latency_s + 7 * INTER.latency_s + 31 / 32 * NBYTES / (4 * INTER.reached_bytes_per_s)
    assert four == pytest.approx(expected)


def test_all_reduce_takes_the_faster_algorithm():
    big = seconds("all_reduce", MeshAxis(8, 1))
    assert big == pytest.approx(2 * seconds("all_gather", MeshAxis(8, 1)))
    small = seconds("all_reduce", MeshAxis(64, 1), 64.0)
    tree = 2 * (3 * INTRA.latency_s + 3 * INTER.latency_s + 64 / INTRA.reached_bytes_per_s)
    assert small == pytest.approx(tree, rel=1e-3)
    assert small < 2 * seconds("all_gather", MeshAxis(64, 1), 64.0)


def test_all_to_all_moves_local_bytes_and_crosses_nodes_for_the_rest():
    each = NBYTES / 16
    expected = 7 * INTRA.latency_s + 8 * INTER.latency_s + 8 * each / INTER.reached_bytes_per_s
    assert seconds("all_to_all", MeshAxis(16, 1)) == pytest.approx(expected)
    inside = 7 * INTRA.latency_s + 7 * (NBYTES / 8) / INTRA.reached_bytes_per_s
    assert seconds("all_to_all", MeshAxis(8, 1)) == pytest.approx(inside)


def test_all_to_all_is_not_an_all_gather():
    """Moving a tensor of n bytes from one sharding to another takes a 1/size of gathering it."""
    axis = MeshAxis(8, 8)
    local = NBYTES / 8
    assert seconds("all_to_all", axis, local) < 0.13 * seconds("all_gather", axis, NBYTES)


def test_permute_is_one_step():
    assert seconds("permute", MeshAxis(8, 1)) == pytest.approx(INTRA.latency_s + NBYTES / INTRA.reached_bytes_per_s)
    for axis in (MeshAxis(8, 8), MeshAxis(16, 1)):
        assert seconds("permute", axis) == pytest.approx(INTER.latency_s + NBYTES / INTER.reached_bytes_per_s)


def test_broadcast_takes_a_tree_for_little_and_a_ring_for_much():
    assert seconds("broadcast", MeshAxis(8, 1), 64.0) == pytest.approx(
        3 * (INTRA.latency_s + 64 / INTRA.reached_bytes_per_s)
    )
    assert seconds("broadcast", MeshAxis(8, 1)) == pytest.approx(
        7 * INTRA.latency_s + NBYTES / INTRA.reached_bytes_per_s
    )


def test_unknown_kinds_and_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="unknown collective 'gossip'; kinds are all_reduce"):
        collective_time_s("gossip", 1.0, MeshAxis(8, 1), H100)
    for nbytes in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="give a finite number"):
            collective_time_s("all_reduce", nbytes, MeshAxis(8, 1), H100)


# -- what holds for any cluster -----------------------------------------------------


@given(axes(), KINDS, BYTES, BYTES)
def test_more_bytes_never_take_less_time(where, kind, nbytes, more):
    cluster, axis = where
    assert collective_time_s(kind, nbytes + more, axis, cluster) >= collective_time_s(kind, nbytes, axis, cluster)


@given(axes(), KINDS, BYTES)
def test_launch_floor_and_nothing_alone(where, kind, nbytes):
    cluster, axis = where
    time = collective_time_s(kind, nbytes, axis, cluster)
    assert time == 0 if axis.size == 1 else time > cluster.collective_launch_s


@given(axes(), BYTES)
def test_all_reduce_is_a_reduce_scatter_and_an_all_gather(where, nbytes):
    cluster, axis = where
    both = sum(collective_time_s(kind, nbytes, axis, cluster) for kind in ("reduce_scatter", "all_gather"))
    reduce = collective_time_s("all_reduce", nbytes, axis, cluster)
    slowest_hop = max(link.latency_s for link in cluster.links)
    latency = cluster.collective_launch_s + 2 * axis.size * slowest_hop
    assert reduce <= both
    assert both - reduce <= latency


@given(KINDS, st.floats(1e3, 1e12), st.sampled_from([2, 4, 8]))
def test_slower_across_nodes_than_inside(kind, nbytes, size):
    inside = collective_time_s(kind, nbytes, MeshAxis(size, 1), H100)
    across = collective_time_s(kind, nbytes, MeshAxis(size, 8), H100)
    assert across > inside


@given(KINDS, BYTES, st.sampled_from([(2, 2, 2), (1, 2, 4), (2, 4), (8,)]))
def test_relabelling_ranks_inside_a_node_changes_nothing(kind, nbytes, shape):
    cluster = ClusterSpec.preset("a100-80g", gpus=8)
    times = {
        tuple(sorted((a.size, collective_time_s(kind, nbytes, a, cluster)) for a in mesh_axes(cluster, order)))
        for order in itertools.permutations(shape)
    }
    assert len(times) == 1


@given(KINDS, BYTES)
def test_axes_with_the_same_groups_cost_the_same(kind, nbytes):
    (first, _), (_, second, _) = mesh_axes(H100, (8, 8)), mesh_axes(H100, (1, 8, 8))
    assert collective_time_s(kind, nbytes, first, H100) == collective_time_s(kind, nbytes, second, H100)


@given(KINDS, st.floats(1e3, 1e12))
def test_a_slower_network_never_helps(kind, nbytes):
    slow = ClusterSpec.preset("h100-sxm", gpus=64, inter_node_gbit_per_s=50)
    for shape in ((64,), (8, 8), (4, 16)):
        for axis in mesh_axes(H100, shape):
            assert collective_time_s(kind, nbytes, axis, slow) >= collective_time_s(kind, nbytes, axis, H100)


def test_bus_bandwidth_as_measured():
    """All-reduce on 1 and 2 nodes of 8 H100, GB/s, The Ultra-Scale Playbook (2025): 436 and 362."""
    for gpus, measured in ((8, 435.97), (16, 361.75)):
        cluster = ClusterSpec.preset("h100-sxm", gpus=gpus)
        time = collective_time_s("all_reduce", NBYTES, MeshAxis(gpus, 1), cluster)
        assert 2 * (gpus - 1) / gpus * NBYTES / time / 1e9 == pytest.approx(measured, rel=0.25)
