"""What vLLM calls in every process that it starts (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import os

from aiexport_edge.engine.backends.vllm.descendants import bind_if_descendant

ATTENTION = "AIEXPORT_EDGE_VLLM_ATTENTION"  # set where our attention is to take the place of vLLM's
ADAPTERS = "AIEXPORT_EDGE_VLLM_ADAPTERS"  # set where there are adapters


def register() -> None:
    """Binds the process to the worker that it belongs to; brings in our attention and the mend of adapters where they
    are wanted.
    """
    bind_if_descendant()
    if os.environ.get(ADAPTERS):
        from aiexport_edge.engine.backends.vllm.adapters import mend_adapters

        mend_adapters()
    if os.environ.get(ATTENTION):
        from aiexport_edge.engine.backends.vllm.attention import register_attention

        register_attention()
