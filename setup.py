"""The build file. Configuration of ruff, mypy and pytest is in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The version, read from the package without importing it."""
    match = re.search(r'^__version__ = "([^"]+)"', (ROOT / "autopar" / "__init__.py").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError('autopar/__init__.py has no line of the form __version__ = "1.2.3"')
    return match.group(1)


PLOTS = ["matplotlib>=3.8"]
HF = ["transformers>=5.17,<6"]
DEV = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "expecttest>=0.2", "mypy>=1.11", "ruff>=0.6"]

setup(
    name="autopar",
    version=version(),
    description="An auto-parallel compiler for PyTorch: a single-device model in, a proven parallel program out",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # autopar/solver and autopar/codegen are links to the folders of those names at the top:
    # they are packages of autopar, and nothing called "solver" lands in site-packages.
    packages=find_packages(include=["autopar", "autopar.*"]),
    package_data={"autopar": ["py.typed", "**/*.json", "**/*.j2"]},
    install_requires=[
        "torch>=2.13,<2.14",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=1.26",
        "networkx>=3.2",
        "pulp>=3.3,<4",
        "highspy>=1.10",
        "rich>=13",
        "jinja2>=3.1",
    ],
    extras_require={"plots": PLOTS, "hf": HF, "dev": DEV + HF + PLOTS},
    entry_points={"console_scripts": ["autopar=autopar.cli:run"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
