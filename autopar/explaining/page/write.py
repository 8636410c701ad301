"""From the dict of a report to a file: the template filled, with its style, its script and its data inside."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from autopar.explaining.page import pictures
from autopar.pages import save_page, templates
from autopar.units import signed_bytes, signed_seconds

# What a report may leave out, or not know: the page then says so, or has nothing there.
OPTIONAL = (
    *(
        "model",
        "precision",
        "pins",
        "solver",
        "error_bars",
        "degrees",
        "time_line",
        "memory_line",
        "memory",
        "faster",
        "resources_s",
    ),
    *(
        "next_best_how",
        "faster_how",
        "next_best",
        "baselines",
        "others",
        "shardings",
        "recomputed_ops",
        "offloaded",
        "replicated_for_want_of_a_rule",
        "joined_attention",
    ),
)


def write_page(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write the page of a report; AutoparError where it cannot be written."""
    save_page(path, render(data), "report")


def render(data: Mapping[str, Any]) -> str:
    """The page as text. The same report gives the same text."""
    environment = _environment()
    script = environment.get_template("page.js.j2").render()
    style = environment.get_template("page.css.j2").render()
    return environment.get_template("page.html.j2").render(
        data={**dict.fromkeys(OPTIONAL), **data},
        json=_json(data),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(style),
        pictures=pictures,
    )


def _environment() -> Environment:
    environment = templates("autopar.explaining")
    environment.filters.update(
        signed_seconds=signed_seconds,
        signed_bytes=signed_bytes,
        percent=lambda share: f"{share:.1%}",
        fine_percent=lambda share: f"{share:.2%}",
        signed_percent=lambda share: f"{share:+.1%}",
        words=_words,
    )
    return environment


def _json(data: Mapping[str, Any]) -> Markup:
    """JSON that can stand in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _words(key: str) -> str:
    """A key of a report for people: "tensor_messages_s" is "tensor messages"."""
    return key.removesuffix("_s").replace("_", " ")
