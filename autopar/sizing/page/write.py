"""From a sizing to a file: the template filled, with its style and its picture inside."""

from __future__ import annotations

from os import PathLike, fspath

from jinja2 import Environment, PackageLoader, StrictUndefined

from autopar.errors import AutoparError
from autopar.files import write_atomically
from autopar.layout_text import short
from autopar.sizing import text
from autopar.sizing.page.picture import picture_of
from autopar.sizing.types import Sizing
from autopar.units import bytes_text, seconds_text, span_text, usd_text


def write_page(sizing: Sizing, path: str | PathLike[str]) -> None:
    """Write the page; AutoparError where it cannot be written."""
    try:
        write_atomically(path, render(sizing))
    except OSError as error:
        raise AutoparError(f"cannot write {fspath(path)}: {error.strerror or error}; nothing was changed") from None


def render(sizing: Sizing) -> str:
    """The page as text. Everything is escaped; a name that is not there is an error, not an empty place."""
    environment = Environment(
        loader=PackageLoader("autopar.sizing", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(seconds=seconds_text, span=span_text, bytes=bytes_text, usd=usd_text, short=short)
    return environment.get_template("page.html.j2").render(sizing=sizing, text=text, picture=picture_of(sizing.pareto))
