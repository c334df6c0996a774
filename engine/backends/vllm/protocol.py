"""The first frame to a worker; every other message is one of the core's (`engine/core/protocol.py`).

Imports no vllm: the engine process writes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from aiexport_edge.engine.core.protocol import CoreModel


class WorkerConfig(msgspec.Struct, frozen=True, array_like=True):
    """One model and how vLLM runs it; `[models.vllm]` (`proto/config_vllm.py`) explains the settings.

    `max_step_tokens` and `kv_cache_bytes` 0: vLLM chooses. `max_num_running` is of each of the `data_parallel` copies.
    `adapter_slots` adapters of at most `max_adapter_rank` are in a step together. `max_pictures` of a request; 0: of a
    model that sees, the text alone is served.
    """

    model: CoreModel
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    distributed: str
    memory_share: float
    kv_cache_bytes: int
    quantization: str
    eager: bool | None
    attention: str
    max_num_running: int
    max_step_tokens: int
    batch_floor_share: float
    adapter_slots: int = 0
    max_adapter_rank: int = 0
    max_pictures: int = 0

    @property
    def models(self) -> Sequence[CoreModel]:
        """As a `CoreConfig` has them."""
        return (self.model,)


_config = msgspec.msgpack.Decoder(WorkerConfig)


def decode_worker_config(body: bytes) -> WorkerConfig:
    """The body of the first frame to a worker."""
    return _config.decode(body)
