"""A sizing as one HTML file."""

from autopar.sizing.page.write import write_page

__all__ = ["write_page"]
