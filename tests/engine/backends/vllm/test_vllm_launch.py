"""What a worker of vLLM is given at its start, what it takes with it at its end, and who is served by what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from aiexport_edge.engine.backends.choice import make_backend, native_models
from aiexport_edge.engine.backends.composite import CompositeBackend
from aiexport_edge.engine.backends.native import NativeBackend
from aiexport_edge.engine.backends.vllm.launch import VllmBackend, worker_environment
from aiexport_edge.engine.backends.vllm.shape import Shape, load_shape
from aiexport_edge.engine.core.protocol import CoreConfig, CoreModel
from aiexport_edge.engine.models.config import ModelError
from aiexport_edge.engine.models.facts import ModelFacts
from aiexport_edge.engine.server.progress import StartProgress
from aiexport_edge.proto.config import load, source_directory

ENTRY = '[[models]]\nids = ["{0}"]\nfamily = "opus"\nsource = "demo"\n'


def test_a_workers_environment(tmp_path: Path) -> None:
    """This package alone on its path, nothing told to anybody, what the operator has set stays."""
    library = tmp_path / "venv" / "lib" / "libiomp5.so"
    library.parent.mkdir(parents=True)
    library.touch()
    python = tmp_path / "venv" / "bin" / "python"
    inherited = {"PATH": "/bin", "PYTHONPATH": "/ours", "VLLM_LOGGING_LEVEL": "DEBUG", "LD_PRELOAD": "/lib/x.so"}
    given = worker_environment("/place", python, gpus=[2, 3], num_threads=4, inherited=inherited)
    assert given["PATH"] == "/bin"
    assert given["PYTHONPATH"] == "/place"
    assert given["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert given["VLLM_NO_USAGE_STATS"] == given["HF_HUB_OFFLINE"] == "1"
    assert given["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert given["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert (given["OMP_NUM_THREADS"], given["OMP_WAIT_POLICY"]) == ("4", "passive")
    assert given["LD_PRELOAD"].split(":")[-2:] == [str(library), "/lib/x.so"]
    bare = worker_environment("/place", Path("/usr/bin/python3"), is_split=True, inherited={})
    assert not {"LD_PRELOAD", "CUDA_VISIBLE_DEVICES", "VLLM_CPU_OMP_THREADS_BIND"} & set(bare)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's word of a parent's death is Linux's")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_a_worker_has_started_ends_with_it(method: str, tmp_path: Path) -> None:
    """A worker that is killed, with a child that it has forked or spawned, and that child's own child."""
    script = f"""
import multiprocessing, os, sys, time
from aiexport_edge.engine.backends.vllm.descendants import bind_descendants
from aiexport_edge.engine.backends.vllm.plugin import register

def live(depth, pipe):
    register()
    if depth:
        start(depth - 1, pipe)
    pipe.send(os.getpid())
    time.sleep(600)

def start(depth, pipe):
    context = multiprocessing.get_context({method!r})
    context.Process(target=live, args=(depth, pipe)).start()

if __name__ == "__main__":
    bind_descendants()
    ours, theirs = multiprocessing.Pipe()
    start(1, theirs)
    print(ours.recv(), ours.recv(), flush=True)
    time.sleep(600)
"""
    file = tmp_path / "worker.py"  # a spawned child imports its parent's main module
    file.write_text(script)
    with subprocess.Popen([sys.executable, file], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        children = [psutil.Process(int(pid)) for pid in worker.stdout.readline().split()]
        assert len(children) == 2
        worker.kill()
    _, alive = psutil.wait_procs(children, 30)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)


def test_what_is_read_of_a_model_that_the_native_backend_does_not_know(tmp_path: Path) -> None:
    config = {"architectures": ["OtherForCausalLM"], "vocab_size": 7, "max_position_embeddings": 99, "eos_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_shape(tmp_path) == Shape(vocab_size=7, context_window=99, stop_ids=(5,))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4, 3]}')
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config, "vision_config": {}}))
    assert load_shape(tmp_path) == Shape(vocab_size=7, context_window=99, stop_ids=(3, 4))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="vocab_size is missing"):
        load_shape(tmp_path)


def backend_of(tmp_path: Path, text: str) -> object:
    file = tmp_path / "aiexport-edge.toml"
    file.write_text(text)
    config = load(file, tmp_path)
    facts = [
        ModelFacts(weights.name, source_directory("demo"), "r", 2048, 4096, 1024, False, ())
        for weights in config.weights
    ]
    own = native_models(config)
    assert own == [index for index, weights in enumerate(config.weights) if weights.vllm is None]
    core_config = CoreConfig(
        models=[CoreModel(f"m{index}", "", "auto", 4096, False, "r") for index in own],
        device="cpu",
        page_bytes=0,
        pool_bytes=0,
        max_num_running=1,
        max_step_tokens=1,
        num_threads=1,
        batch_floor_share=0.0,
    )
    return make_backend(config, facts, core_config, None, StartProgress([fact.name for fact in facts]))


def test_each_model_has_the_backend_that_it_asks_for(tmp_path: Path) -> None:
    vllm = ENTRY.format("b") + 'backend = "vllm"\n'
    assert type(backend_of(tmp_path, ENTRY.format("a"))) is NativeBackend
    assert type(backend_of(tmp_path, vllm)) is VllmBackend
    both = backend_of(tmp_path, ENTRY.format("a") + vllm)
    assert isinstance(both, CompositeBackend)
    assert len(both.statuses()) == 2


def test_the_engine_process_imports_no_vllm() -> None:
    """Nor do the parts of the worker that its tests run without it."""
    modules = ("choice", "vllm.launch", "vllm.process", "vllm.worker", "vllm.gate", "vllm.plugin", "vllm.shape")
    names = ", ".join(f"aiexport_edge.engine.backends.{module}" for module in modules)
    code = f"import sys, {names}; sys.exit(bool({{'vllm', 'torch'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
