"""Writes docs/cli.md from the parser itself: `make docs`. tests/test_docs.py fails when the page is stale."""

from __future__ import annotations

import argparse
from pathlib import Path

from autopar.cli import build_parser

PAGE = Path(__file__).parent / "cli.md"


def render() -> str:
    """The page: the help of the command and of every subcommand."""
    parser = build_parser()
    parts = ["# The command line", "", "Made by `make docs` from `autopar --help`; do not edit.", ""]
    parts += ["## autopar", "", "```text", parser.format_help().rstrip(), "```", ""]
    for name, command in subcommands(parser).items():
        parts += [f"## autopar {name}", "", "```text", command.format_help().rstrip(), "```", ""]
    return "\n".join(parts)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the subcommands, by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise LookupError("the parser has no subcommands")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"Written: {PAGE}")
