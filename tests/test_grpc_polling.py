"""Processes that speak gRPC settle who waits for its sockets before it is imported; an operator's setting stays."""

from __future__ import annotations

import os

import pytest

from aiexport_edge.proto import grpc_polling

NAME = "GRPC_EXPERIMENTS"


def test_it_is_settled_unless_the_operator_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NAME, raising=False)
    grpc_polling.settle()

    assert os.environ[NAME] == grpc_polling.ENVIRONMENT[NAME]
    monkeypatch.setenv(NAME, "his own")
    grpc_polling.settle()
    assert os.environ[NAME] == "his own"
