"""The installation that the whole-way tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.edge import Edge, start


@pytest.fixture(scope="session")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """The demo installation, as `make serve` starts it, shared by tests that leave it whole."""
    running = start(tmp_path_factory.mktemp("edge") / "state")
    yield running
    assert running.stop() == 0, "".join(running.stderr[-30:])
