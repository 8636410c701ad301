"""What the offline pages of reports and sizings have in common: reading their templates, writing the file."""

from __future__ import annotations

from os import PathLike, fspath

from jinja2 import Environment, PackageLoader, StrictUndefined

from autopar.errors import AutoparError
from autopar.files import write_atomically
from autopar.units import bytes_text, seconds_text


def templates(package: str) -> Environment:
    """The templates in the folder `page` of a package.

    Everything is escaped; a name that is not there is an error, not an empty place.
    """
    environment = Environment(
        loader=PackageLoader(package, "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(seconds=seconds_text, bytes=bytes_text)
    return environment


def save_page(path: str | PathLike[str], page: str, what: str) -> None:
    """Write the page of `what` to a file, whole or not at all; AutoparError where it cannot be written."""
    try:
        write_atomically(path, page)
    except OSError as error:
        reason = error.strerror or error
        raise AutoparError(f"cannot write {what} {fspath(path)}: {reason}; nothing was changed") from error
