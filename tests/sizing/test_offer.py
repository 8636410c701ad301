"""Which clusters in which sizes, at which price."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autopar
from autopar.errors import AutoparError, ClusterSpecError
from autopar.sizing.offer import offers


@pytest.mark.parametrize(("most", "expected"), [(32, [1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32]), (5, [1, 2, 3, 4, 5])])
def test_sizes_are_parts_of_a_node_and_whole_nodes(most: int, expected: list[int]) -> None:
    (offer,) = offers(["h100-sxm"], dtype="bfloat16", max_gpus=most)
    assert [offer.devices(i) for i in range(offer.sizes)] == expected
    assert [offer.index(n) for n in expected] == list(range(offer.sizes))
    assert offer.index(0) == -1
    assert all(offer.devices(offer.index(n)) <= n for n in range(1, most + 1))
    assert offer.whole.part(offer.devices(offer.sizes - 1)) is offer.whole


def test_unless_named_all_with_a_price_that_compute_in_the_dtype() -> None:
    names = [offer.name for offer in offers([], dtype="bfloat16")]
    assert {"a100-80g", "h100-sxm", "h200", "b200"} <= set(names)
    assert not {"cpu", "v100-32g", "mi300x"} & set(names)
    assert "mi300x" in [offer.name for offer in offers([], dtype="bfloat16", prices={"mi300x": 2.0})]


def test_prices_can_be_set() -> None:
    found = {o.name: o.price_per_hour_usd for o in offers(["h100-sxm", "l40s"], dtype="bfloat16", prices={"l40s": 0.8})}
    assert found["l40s"] == 0.8
    assert found["h100-sxm"] == autopar.ClusterSpec.preset("h100-sxm").device.price_per_hour_usd


def test_a_file_is_taken_as_far_as_it_goes(tmp_path: Path) -> None:
    path = str(tmp_path / "mine.json")
    autopar.ClusterSpec.preset("a100-80g", gpus=32).save(path)
    assert offers([path], dtype="bfloat16")[0].whole.devices == 32
    assert offers([path], dtype="bfloat16", max_gpus=20)[0].whole.devices == 16
    assert offers([autopar.ClusterSpec.load(path)], dtype="bfloat16")[0].name == "a100-80g"


@pytest.mark.parametrize(
    ("clusters", "options", "error", "message"),
    [
        (["h100"], {}, ClusterSpecError, "unknown cluster preset 'h100', did you mean 'h100-sxm'?"),
        (["h200", "h200"], {}, ClusterSpecError, "h200 is named twice"),
        (["nowhere.json"], {}, ClusterSpecError, "cannot read the cluster file nowhere.json"),
        (["h200"], {"prices": {"b200": 2.0}}, AutoparError, "a price is given for b200, but the clusters are h200"),
        (["h200"], {"prices": {"h200": 0.0}}, ClusterSpecError, "the price of h200 is 0"),
        (["h200"], {"max_gpus": 0}, AutoparError, "max_gpus is 0"),
    ],
)
def test_what_is_refused(clusters: list[str], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        offers(clusters, dtype="bfloat16", **options)
    assert message in str(caught.value)
