"""From a sizing to a file: the template filled, with its style and its picture inside."""

from __future__ import annotations

from os import PathLike

from autopar.layout_text import short
from autopar.pages import save_page, templates
from autopar.sizing import text
from autopar.sizing.page.picture import picture_of
from autopar.sizing.types import Sizing
from autopar.units import span_text, usd_text


def write_page(sizing: Sizing, path: str | PathLike[str]) -> None:
    """Write the page; AutoparError where it cannot be written."""
    save_page(path, render(sizing), "sizing")


def render(sizing: Sizing) -> str:
    """The page as text."""
    environment = templates("autopar.sizing")
    environment.filters.update(span=span_text, usd=usd_text, short=short)
    return environment.get_template("page.html.j2").render(sizing=sizing, text=text, picture=picture_of(sizing.pareto))
