"""What vLLM calls in every process that it starts (entry point `vllm.general_plugins`)."""

from __future__ import annotations

from aiexport_edge.engine.backends.vllm.descendants import bind_if_descendant


def register() -> None:
    """Binds the process to the worker that it belongs to."""
    bind_if_descendant()
