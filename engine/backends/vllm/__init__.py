"""vLLM as a backend: a worker process around its async engine, which speaks to the engine process as a core does.

    engine process                  worker, in vLLM's environment          vLLM's own processes
    launch.py → NativeBackend ⇄ process.py: worker.py, gate.py ⇄ engine.py ⇄ scheduler and model: sampling.py

Messages are those of `engine/core/protocol.py`. Only `engine.py`, `sampling.py` and `attention.py` import vllm, and
none of the three is imported by the engine process. What differs from the native backend: `engine/backends/VLLM.md`.
"""
