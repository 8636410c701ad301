"""The report as a page, opened in a real browser: it says what the plan says, fits its window, and asks nobody."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import autopar
from autopar import Plan
from autopar.explaining.page.write import render
from autopar.units import bytes_text, seconds_text
from tests.browser import Browser, Page, browser, chromium
from tests.explaining.reports import by_degrees, predicted, report
from tests.test_planning import free

WIDTHS = (360, 768, 1600)
NASTY = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
SECTIONS = ["layout", "time", "memory", "binds", "why-not", "shardings", "sure"]

needs_browser = pytest.mark.skipif(chromium() is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    command = chromium()
    assert command is not None
    with browser(command, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module", params=["plan", "prediction", "loaded", "degrees", "loaded degrees"])
def opened(
    request: pytest.FixtureRequest, chrome: Browser, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Page, Any]:
    """A page, and the dict that it was made from."""
    path = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    made = {
        "plan": report,
        "prediction": predicted,
        "loaded": Plan.loads(free("mlp").dumps()).explain,
        "degrees": by_degrees,
        "loaded degrees": Plan.loads(by_degrees().plan.dumps()).explain,
    }[request.param]()
    made.to_html(path)
    return chrome.open(path), made.to_dict()


# -- in the browser -----------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_its_window_without_errors_or_requests(opened: tuple[Page, Any], width: int, scheme: str) -> None:
    page = opened[0]
    page.size(width)
    page.media(scheme=scheme)
    page.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.run("document.querySelector('h1').getBoundingClientRect().height") > 0
    background = page.run("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", background)[:3])) > 3 * 128
    assert light == (scheme == "light")
    assert page.errors == [] and page.requests == []


@needs_browser
def test_headings_and_figures_are_those_of_the_report(opened: tuple[Page, Any]) -> None:
    page, data = opened
    sections = page.run("[...document.querySelectorAll('main > section')].map(s => s.id)")
    assert sections == [s for s in SECTIONS if s != "shardings" or data.get("shardings")]
    assert page.run("[...document.querySelectorAll('section')].every(s => s.querySelector('h2').textContent)")
    assert seconds_text(data["step_time_s"]) in page.run("document.querySelector('h1').textContent")
    shown = {float(v) for v in page.run("[...document.querySelectorAll('data')].map(d => d.value)")}
    figures = [data[key] for key in ("step_time_s", "tokens_per_s_per_gpu", "mfu", "peak_bytes")]
    figures += [v for k, v in data["breakdown"].items() if k.endswith("_s") and isinstance(v, float) and v]
    figures += [n for row in data["memory_at_peak"] for n in row["bytes"].values() if n]
    figures += [f["step_time_s"] for f in data["faster"] or ()]
    figures += [a["step_time_s"] for a in data["next_best"] or () if a["step_time_s"] is not None]
    figures += [p["step_time_s"] for p in data.get("others", ())]
    figures += [b["step_time_s"] for b in data.get("baselines") or () if b["step_time_s"] is not None]
    assert [f for f in figures if f not in shown] == []
    facts = page.run("document.querySelector('.facts').textContent")
    assert bytes_text(data["peak_bytes"]) in facts and f"{data['mfu']:.1%}" in facts
    if "solver" in data:
        assert f"{data['solver']['gap']:.2%}" in facts
    assert json.loads(page.run("document.getElementById('report').textContent")) == json.loads(json.dumps(data))


@needs_browser
def test_pictures_and_tables_say_what_they_are(opened: tuple[Page, Any]) -> None:
    page = opened[0]
    assert (
        page.run(
            "[...document.querySelectorAll('svg')].filter(s => s.getAttribute('aria-hidden') !== 'true' && "
            "!(s.getAttribute('role') === 'img' && s.getAttribute('aria-label').trim())).length"
        )
        == 0
    )
    assert (
        page.run("[...document.querySelectorAll('table')].filter(t => !t.querySelector('th[scope=col]')).length") == 0
    )
    assert (
        page.run("[...document.querySelectorAll('tbody tr')].filter(r => !r.querySelector('th[scope=row]')).length")
        == 0
    )
    assert page.run("[...document.querySelectorAll('.wide')].every(w => w.tabIndex === 0 && w.ariaLabel)")
    levels = page.run("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))


@needs_browser
def test_the_time_line_answers_the_keyboard(chrome: Browser, tmp_path: Path) -> None:
    report().to_html(tmp_path / "plan.html")
    page = chrome.open(tmp_path / "plan.html")
    line = report().time_line
    said = "document.getElementById('time-line-said').textContent"
    last = "[...document.querySelectorAll('.tick')].at(-1).textContent"
    page.run("document.querySelector('.strips').focus()")
    compute = [s for s in line.spans if s.track == "compute"]
    page.press("ArrowRight")
    assert page.run(said).startswith(f"compute: {compute[0].kind}, {compute[0].name}, ")
    page.press("ArrowRight")
    assert page.run(said).startswith(f"compute: {compute[1].kind}, {compute[1].name}, ")
    whole = page.run(last)
    page.press("+")
    assert page.run(last) != whole
    page.press("0")
    assert page.run(last) == whole
    page.press("ArrowDown")
    assert page.run(said).startswith(line.to_dict()["tracks"][1])
    assert page.run("document.querySelector('.controls').hidden") is False
    assert page.errors == []


@needs_browser
def test_memory_along_the_step_is_drawn_as_simulated(opened: tuple[Page, Any]) -> None:
    page, data = opened
    line = data.get("memory_line")
    drawn = "[...document.querySelectorAll('#memory-line .course')]"
    if line is None:
        assert page.run(f"{drawn}.length") == 0
        return
    labels = page.run(f"{drawn}.map(s => s.getAttribute('aria-label'))")
    assert len(labels) == len(line["tracks"])
    assert all(bytes_text(t["peak_bytes"]) in said for t, said in zip(line["tracks"], labels, strict=True))
    shown = {float(v) for v in page.run("[...document.querySelectorAll('data')].map(d => d.value)")}
    assert {float(t["peak_bytes"]) for t in line["tracks"]} <= shown
    # the area of each stage is as high as its highest point, all on one scale, and as long as the step
    box = "(s => [...s.querySelectorAll('path')].map(p => p.getBBox()))"
    tops = page.run(f"{drawn}.map(s => 1000 - Math.min(...{box}(s).map(b => b.y)))")
    peaks = [t["peak_bytes"] for t in line["tracks"]]
    assert [top / max(tops) for top in tops] == pytest.approx([peak / max(peaks) for peak in peaks], abs=1e-3)
    widths = page.run(f"{drawn}.map(s => Math.max(...{box}(s).map(b => b.width)))")
    assert widths == pytest.approx([1000] * len(widths), abs=0.1)
    assert page.run("document.querySelectorAll('#memory-line .tick').length") == 5


@needs_browser
def test_on_paper_it_is_light_and_complete(opened: tuple[Page, Any]) -> None:
    page = opened[0]
    page.size(794)  # A4 at 96 dots an inch
    page.media(scheme="dark", medium="print")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.send("Page.printToPDF")["data"]
    page.media()


@needs_browser
def test_names_of_a_plan_file_are_text(chrome: Browser, tmp_path: Path) -> None:
    """A plan file comes from anywhere: nothing that it names becomes a part of the page."""
    text = free("mlp").dumps()
    data = json.loads(text)
    data["cluster"]["name"] = data["cluster"]["device"]["name"] = NASTY
    data["options"]["model"] = NASTY
    data["options"]["pin"] = {NASTY: NASTY, "</script>": "]]>"}
    data["unruled"] = [NASTY]
    data["params"] = {f"{NASTY}.{name}": state for name, state in data["params"].items()}
    data["layout"] |= {NASTY: NASTY}
    breakdown = data["predicted"]["breakdown"]
    breakdown["peak_at"] = NASTY
    breakdown["memory_bytes"] |= {NASTY: 1, '"><script>': 2}
    breakdown["communication_by_kind_s"] = {NASTY: 1e-3}
    data["solver"]["status"] = NASTY
    nasty = Plan.loads(json.dumps(data)).explain()
    nasty.to_html(tmp_path / "nasty.html")
    page = chrome.open(tmp_path / "nasty.html")
    assert page.run("document.title") == f"autopar: {nasty.to_dict()['headline']}"
    assert page.run("document.scripts.length") == 2 and page.run("document.images.length") == 0
    assert NASTY in page.run("document.querySelector('.about').textContent")
    assert page.run("document.body.textContent").count(NASTY) > 8
    assert page.errors == [] and page.requests == []


@needs_browser
def test_the_policy_of_the_page_stops_what_would_be_let_in(chrome: Browser, tmp_path: Path) -> None:
    page_text = render(predicted().to_dict())
    (tmp_path / "open.html").write_text(page_text.replace("</main>", "<script>document.title='owned'</script></main>"))
    page = chrome.open(tmp_path / "open.html")
    assert page.run("document.title") != "owned"
    assert any("Content Security Policy" in error for error in page.errors)


# -- without a browser --------------------------------------------------------------------------------


def test_the_page_is_one_file_and_always_the_same(tmp_path: Path) -> None:
    report().to_html(tmp_path / "a.html")
    report().to_html(tmp_path / "b.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.html").read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]
    assert not re.search(r"(src|href)=[\"']?(https?:|//|file:)", text) and "@import" not in text and "url(" not in text
    assert text.startswith("<!doctype html>")


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(autopar.AutoparError, match=r"cannot write report .*; nothing was changed"):
        report().to_html(tmp_path / "no-such-folder" / "plan.html")


def test_a_report_that_does_not_solve_says_so() -> None:
    hasty = replace(free("mlp").explain(), solves=False)
    data = hasty.to_dict()
    assert data["next_best"] is None and data["memory"] is None and data["time_line"] is not None
    assert "not done for this page" in render(data)
    assert "--again" in str(hasty)
