"""Messages between an engine process and its core: one each way a step, msgpack of array-like structs.

Owns the vocabulary on that socket and its framing. Knows no text, no tensors and nothing of gRPC.
Token ids travel as little-endian uint32 bytes (`pack_ids`, `unpack_ids`): 4 bytes a token and no object per token.
"""

from __future__ import annotations

import struct
from array import array
from enum import IntEnum

import msgspec


class Priority(IntEnum):
    """Class of service; a lower number is served first."""

    INTERACTIVE = 0
    BATCH = 1


class FinishReason(IntEnum):
    """Why the core ended a request. Stop sequences are text: the engine process ends those by `FinishRequest`."""

    END_TURN = 0
    MAX_TOKENS = 1
    ABORTED = 2
    FAULTY = 3  # the model's numbers are broken: there was nothing to draw from
    FAILED = 4  # another engine behind this protocol could not go on with it; its log says why


class CoreModel(msgspec.Struct, frozen=True, array_like=True):
    """One set of weights to serve: a Hugging Face directory. `revision` is a content hash and goes into prefix hashes.

    `dtype` is "float32", "bfloat16", "float16" or "auto": a float32 checkpoint stays so, a 16-bit one is bfloat16
    where the device multiplies it, else float32. `quantize` is what weights are rounded to while they are loaded:
    "none", "int8", "int4" or "fp8". `context_window` is in tokens, prompt and output together, and already resolved
    by the parent. `yarn_factor`, where it is not 0, and `yarn_original` are the operator's `Yarn`. `kv_cache_dtype`:
    "auto" is the model's dtype, or what its checkpoint is made for; "fp8" is one byte a number.
    """

    name: str
    path: str
    dtype: str
    context_window: int
    deterministic: bool
    revision: str
    quantize: str = "none"
    yarn_factor: float = 0.0
    yarn_original: int = 0
    kv_cache_dtype: str = "auto"


class CoreConfig(msgspec.Struct, frozen=True, array_like=True):
    """The first frame to a core. `page_bytes`, `pool_bytes` and `max_step_tokens` 0: chosen by the core; `num_threads`
    0: all cores. `memory_share` is the pool's part of what a card's memory has left, where `pool_bytes` is 0. Compiled
    kernels are kept in `kernel_cache`; "": where Triton does it by itself. Each model has `adapter_slots` places for
    adapters of at most `max_adapter_rank` on the device; others wait in `adapter_host_bytes` of memory, or on disk. 0:
    none on a card, some on a CPU, where they take no memory before there are adapters; what the device has room for.
    Pictures of more than `max_image_tokens` are not sent; 0: of more than their model's own bound. With `drafts`, ids
    are guessed and checked in one step (`drafts.py`).
    """

    models: list[CoreModel]
    device: str
    page_bytes: int
    pool_bytes: int
    max_num_running: int
    max_step_tokens: int
    num_threads: int
    batch_floor_share: float
    memory_share: float = 0.9
    kernel_cache: str = ""
    adapter_slots: int = 0
    max_adapter_rank: int = 0
    adapter_host_bytes: int = 0
    max_image_tokens: int = 0
    drafts: bool = False


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How ids are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1.0 are off; `seed` is any uint64."""

    temperature: float
    top_p: float
    top_k: int
    seed: int


class ImageInput(msgspec.Struct, frozen=True, array_like=True):
    """A picture in a prompt, already of the size that its model wants.

    `prompt_ids` hold the model's image token from index `start` on, once for each merged patch. `rows` and `columns`
    count patches and are multiples of the merge size. `pixels` is uint8 [rows * patch, columns * patch, 3], RGB.
    `digest` is 32 bytes, BLAKE2b over grid and pixels: pictures with the same are taken for the same picture.
    """

    start: int
    rows: int
    columns: int
    digest: bytes
    pixels: bytes


class AdapterRef(msgspec.Struct, frozen=True, array_like=True):
    """A low-rank adapter: the PEFT directory at `path`, whose content has this `digest` (`adapters.peft`)."""

    path: str
    digest: bytes


class AddRequest(msgspec.Struct, frozen=True, array_like=True, tag="add"):
    """A request for the core. `handle` is the parent's number for it, never used twice in a core's life.

    `output_ids` are ids that an earlier attempt produced: they count as output (budget, draw indices), are not sent
    back, and are computed like a prompt. `max_tokens` is the whole budget, those included; the parent has made sure
    that prompt and budget fit the context window. A request on `probation` was in the step that an earlier core died
    in: until it has produced a token it runs in steps of its own. With a `grammar` (`structured.packed`) the output is
    a document of it, of which the prompt holds `document_prefix`; the model's `AddVocabulary` has come before.
    `images` go by `start`; their tokens lie in the prompt.
    """

    handle: int
    model: int
    prompt_ids: bytes
    output_ids: bytes
    max_tokens: int
    stop_ids: list[int]
    sampling: Sampling
    tenant: str
    weight: float
    salt: bytes
    priority: int
    probation: bool = False
    grammar: bytes | None = None
    document_prefix: bytes = b""
    images: list[ImageInput] = []
    adapter: AdapterRef | None = None


class AddVocabulary(msgspec.Struct, frozen=True, array_like=True, tag="vocabulary"):
    """What the ids of a model spell, for grammars: once in a core's life, before the first request that has one.
    `stop_ids` end a turn.
    """

    model: int
    tokens: list[bytes]
    stop_ids: list[int]


class AbortRequest(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """The client has left: free its pages. Answered by a `Finished` with ABORTED unless it had ended."""

    handle: int


class FinishRequest(msgspec.Struct, frozen=True, array_like=True, tag="finish"):
    """The parent has seen the end (a stop sequence): free its pages. Not answered."""

    handle: int


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag="shutdown"):
    """End the process now; what runs is lost."""


ToCore = AddRequest | AddVocabulary | AbortRequest | FinishRequest | Shutdown


class Started(msgspec.Struct, frozen=True, array_like=True):
    """First scheduled (once per core life of a request). `cached_tokens` of its prompt came from the prefix cache."""

    handle: int
    cached_tokens: int


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """New output ids of one request in this step, in order; one or more."""

    handle: int
    ids: list[int]


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """The request has ended and its pages are released; after its last `Tokens`, in the same or a later message."""

    handle: int
    reason: int


class CoreStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges and counters of the core. Per-model lists are in the order of the core's models. Of `model_guessed_tokens`
    (drafts), `model_accepted_tokens` came true; empty where nothing can be guessed.
    """

    steps: int
    running: int
    waiting: int
    pages_total: int
    pages_used: int
    pages_cached: int
    pages_free: int
    page_bytes: int
    preemptions: int
    model_running: list[int]
    model_waiting: list[int]
    model_prompt_tokens: list[int]
    model_cached_tokens: list[int]
    model_output_tokens: list[int]
    model_guessed_tokens: list[int] = []
    model_accepted_tokens: list[int] = []


class ModelReady(msgspec.Struct, frozen=True, array_like=True):
    """One model's facts once it is loaded.

    `capacity_tokens` is what the whole page pool holds for this model: a request whose prompt and budget together are
    longer can never run, and the parent refuses it.
    """

    model: int
    tokens_per_page: int
    weight_bytes: int
    capacity_tokens: int = 0


class AdapterRoom(msgspec.Struct, frozen=True, array_like=True):
    """How many adapters each model has places for on the device, and of which rank at most."""

    slots: int = 0
    max_rank: int = 0


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """Sent once: every model is loaded and warm."""

    models: list[ModelReady]
    stats: CoreStats
    adapters: AdapterRoom = AdapterRoom()


class LoadFailed(msgspec.Struct, frozen=True, array_like=True, tag="load_failed"):
    """Sent instead of `Ready`: a sentence for the operator that says what to do. The core then exits."""

    message: str


class Loading(msgspec.Struct, frozen=True, array_like=True, tag="loading"):
    """Progress while starting: `done` of `total` bytes of weights of the model read."""

    model: int
    done: int
    total: int


class Warming(msgspec.Struct, frozen=True, array_like=True, tag="warming"):
    """Progress after the last `Loading`: `done` of `total` parts of the warm-up (kernels compiled, graphs captured)."""

    done: int
    total: int


class StepReport(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """What one step brought. `stats` comes at most every 100 ms, and when the core goes idle."""

    started: list[Started]
    tokens: list[Tokens]
    finished: list[Finished]
    stats: CoreStats | None = None


FromCore = Ready | LoadFailed | Loading | Warming | StepReport

HEADER = struct.Struct("<I")  # length of the msgpack body that follows


def pack_ids(ids: list[int]) -> bytes:
    """Token ids as little-endian uint32 bytes."""
    return array("I", ids).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of `pack_ids`."""
    ids = array("I")
    ids.frombytes(data)
    return ids.tolist()


_encoder = msgspec.msgpack.Encoder()
_to_core: msgspec.msgpack.Decoder[list[ToCore]] = msgspec.msgpack.Decoder(list[ToCore])
_from_core: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
_config = msgspec.msgpack.Decoder(CoreConfig)


def encode_config(config: msgspec.Struct) -> bytes:
    """The first frame to a core (`CoreConfig`) or to a child of another kind, header included."""
    body = _encoder.encode(config)
    return HEADER.pack(len(body)) + body


def decode_config(body: bytes) -> CoreConfig:
    """The body of the first frame to a core."""
    return _config.decode(body)


def encode_to_core(messages: list[ToCore]) -> bytes:
    """One frame, header included, with every message of a tick."""
    body = _encoder.encode(messages)
    return HEADER.pack(len(body)) + body


def decode_to_core(body: bytes) -> list[ToCore]:
    """The messages of one frame's body."""
    return _to_core.decode(body)


def encode_from_core(message: FromCore) -> bytes:
    """One frame, header included."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


def decode_from_core(body: bytes) -> FromCore:
    """The message of one frame's body."""
    return _from_core.decode(body)
