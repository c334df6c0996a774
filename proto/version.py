"""The two versions: that of the REST API, which is the contract's, and that of this product."""

from __future__ import annotations

API_VERSION = "2.4"


def product_version() -> str:
    """The version of the installed package, as pyproject.toml has it."""
    from importlib.metadata import version

    return version("aiexport-edge")
