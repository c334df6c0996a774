"""The installation that the whole-way tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.edge import BACKENDS, Edge, start_on


@pytest.fixture(scope="session", params=BACKENDS)
def edge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """The demo installation, as `make serve` starts it, shared by tests that leave it whole; on vLLM too where
    AIEXPORT_TEST_VLLM_PYTHON names an interpreter that has it.
    """
    running = start_on(request.param, tmp_path_factory.mktemp("edge"))
    yield running
    assert running.stop() == 0, "".join(running.stderr[-30:])
