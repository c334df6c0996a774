"""Who waits for gRPC's sockets, settled before gRPC is imported: the thread that hands messages to the event loop.

gRPC's own default has another thread wait, which wakes a third that does the work, which wakes the one that tells the
event loop: on the way of a request through shim and engine process, and of its first token back, 51 threads are woken,
with this 33 (`benchmarks/overhead`).
"""

from __future__ import annotations

import os

# Names of gRPC 1.85. A release that knows them no more says so on stderr at its import, and waits in its own way.
ENVIRONMENT = {"GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener,-pollset_alternative"}


def settle() -> None:
    """For this process. What the operator has set himself stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
