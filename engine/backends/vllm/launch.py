"""A backend for one model that vLLM serves, from the engine process's side: its interpreter, environment and start.

Everything after the start is the native backend's: the worker speaks the core's messages, is watched and restarted like
a core, and its requests are resumed in the next one.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from aiexport_edge.engine.backends.base import StartListener
from aiexport_edge.engine.backends.core_process import CoreProcess
from aiexport_edge.engine.backends.native import STEP_TIMEOUT_S, NativeBackend
from aiexport_edge.engine.backends.vllm.plugin import ADAPTERS, ATTENTION
from aiexport_edge.engine.backends.vllm.protocol import WorkerConfig
from aiexport_edge.proto.lifetime import PARENT_PID

WORKER_MODULE = "aiexport_edge.engine.backends.vllm.process"
PLUGIN = "aiexport_edge"
# Nothing is told to anybody, nothing is fetched: models are directories of this machine.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_PLUGINS": PLUGIN,
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the processor that draws is made for the runner before it
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
# Two event loops want the same cores: threads that are bound to cores, or spin at barriers, stand in their way.
_THREADS = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
_OWN = ("VLLM_LOGGING_LEVEL",)  # of these, what the operator's environment may say otherwise
_PACKAGE = Path(__file__).absolute().parents[3]  # the folder aiexport_edge
_METADATA = "Metadata-Version: 2.1\nName: aiexport-edge-plugin\nVersion: 0\n"
_ENTRY_POINTS = f"[vllm.general_plugins]\n{PLUGIN} = aiexport_edge.engine.backends.vllm.plugin:register\n"


class VllmBackend(NativeBackend):
    """One model. `python`: the interpreter of vLLM's environment; None: this process's own. `gpus` is empty where vLLM
    may see all cards. `command`, if given, takes the worker's place (tests)."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        python: Path | None = None,
        gpus: Sequence[int] = (),
        num_threads: int = 0,
        step_timeout_s: float = STEP_TIMEOUT_S,
        progress: StartListener | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        interpreter = str(python or sys.executable)
        worker = command or (interpreter, "-m", WORKER_MODULE)
        path = tempfile.mkdtemp(prefix="aiexport-edge-vllm-")
        weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
        _make_path(Path(path))
        is_split = config.tensor_parallel * config.pipeline_parallel * config.data_parallel > 1
        environment = worker_environment(path, Path(interpreter), gpus=gpus, num_threads=num_threads, is_split=is_split)
        if config.attention != "auto":
            environment[ATTENTION] = "1"
        if config.adapter_slots:
            environment[ADAPTERS] = "1"
        super().__init__(
            config,
            spawn=lambda: CoreProcess(worker, environment=environment),
            step_timeout_s=step_timeout_s,
            progress=progress,
        )


def worker_environment(
    path: str,
    python: Path,
    *,
    gpus: Sequence[int] = (),
    num_threads: int = 0,
    is_split: bool = False,
    inherited: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """What a worker finds in its environment. `path` holds this package alone, so that vLLM's environment keeps the
    versions it was installed with; our own environment is not looked into. `is_split`: the model has several parts,
    among which vLLM shares out a processor's cores itself."""
    environment = {**inherited, **_ENVIRONMENT, **{key: inherited[key] for key in _OWN if key in inherited}}
    environment["PYTHONPATH"] = path
    environment[PARENT_PID] = str(os.getpid())
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    if not is_split and "VLLM_CPU_OMP_THREADS_BIND" not in inherited:
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **_THREADS}
        if num_threads:
            environment["OMP_NUM_THREADS"] = str(num_threads)
    if preload := [library for library in _preloads(python) if library not in inherited.get("LD_PRELOAD", "")]:
        environment["LD_PRELOAD"] = ":".join([*preload, *filter(None, [inherited.get("LD_PRELOAD")])])
    return environment


def _make_path(path: Path) -> None:
    """A place on the worker's module path with this package in it and the entry point that vLLM looks for."""
    (path / "aiexport_edge").symlink_to(_PACKAGE)
    metadata = path / "aiexport_edge_plugin-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(_METADATA)
    (metadata / "entry_points.txt").write_text(_ENTRY_POINTS)


def _preloads(python: Path) -> list[str]:
    """What vLLM's guide for processors wants loaded first, where the environment has it."""
    library = python.absolute().parent.parent / "lib" / "libiomp5.so"
    found = [str(library)] if library.exists() else []
    for folder in (library.parent, Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"), Path("/usr/lib")):
        tcmalloc = folder / "libtcmalloc_minimal.so.4"
        if found and tcmalloc.exists():
            return [str(tcmalloc), *found]
    return found
