"""docs/compatibility.md says what is so: a few rows are made again, all of them in the slow set."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.families import FAMILIES, NAMED, REMARKS

ROOT = Path(__file__).parent.parent
GENERATOR = runpy.run_path(str(ROOT / "docs" / "generate_compatibility.py"))
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
STALE = "docs/compatibility.md is stale: run `make docs`"


def test_every_family_has_a_row() -> None:
    rows = re.findall(r"^\| (\w+) \| [\d.]+% \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(FAMILIES), STALE
    promised = PAGE[PAGE.index("## Promised") : PAGE.index("## Others")]
    assert re.findall(r"^\| (\w+) \| [\d.]+% \|", promised, re.MULTILINE) == list(NAMED), STALE
    assert set(REMARKS) <= set(FAMILIES)


@pytest.mark.parametrize("name", ["mlp", "convnet1d", "mobilenet"])
def test_rows_are_fresh(name: str) -> None:
    assert f"\n{GENERATOR['row'](name)}\n" in PAGE, STALE


@pytest.mark.slow
def test_page_is_fresh() -> None:
    assert GENERATOR["render"]({name: GENERATOR["row"](name) for name in FAMILIES}) == PAGE, STALE
