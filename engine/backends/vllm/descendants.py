"""vLLM's own processes end with the worker that they belong to, whatever way that ends.

vLLM forks or spawns an engine core and its workers, and leaves them to themselves when the process that began them is
killed. A forked one is bound where it begins; a spawned one where it loads vLLM's plugins (`plugin.py`). Linux only.
"""

from __future__ import annotations

import os

from aiexport_edge.proto.lifetime import end_with

MARK = "AIEXPORT_EDGE_VLLM_WORKER"  # process id of the worker, in the environment of all that it starts
_forking_pid = 0


def bind_descendants() -> None:
    """Called by the worker before it starts vLLM."""
    os.environ[MARK] = str(os.getpid())
    _bind_forks()


def bind_if_descendant() -> None:
    """Called in any process that loads vLLM's plugins; does nothing where no worker of ours began it."""
    mark = os.environ.get(MARK)
    if mark is None or mark == str(os.getpid()) or os.environ.get(f"{MARK}_BOUND") == str(os.getpid()):
        return
    os.environ[f"{MARK}_BOUND"] = str(os.getpid())
    end_with(os.getppid())
    _bind_forks()


def _bind_forks() -> None:
    os.register_at_fork(before=_note_parent, after_in_child=_bind_fork)


def _note_parent() -> None:
    global _forking_pid
    _forking_pid = os.getpid()


def _bind_fork() -> None:
    os.environ[f"{MARK}_BOUND"] = str(os.getpid())
    end_with(_forking_pid)
