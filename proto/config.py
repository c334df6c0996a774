"""The configuration file `aiexport-edge.toml`, as every process of the product reads it.

Owns its keys, their defaults and what is wrong with a file. Knows nothing of what is done with the values: no torch,
no HTTP, no weights. A file is read strictly: an unknown key is an error that names the nearest right one. Secrets are
never in it, only the names of files that hold them.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from aiexport_edge.proto import config_limits as limits
from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.config_adapters import AdaptersConfig, read_adapters
from aiexport_edge.proto.config_admin import AdminConfig, read_admin
from aiexport_edge.proto.config_batches import BatchesConfig, read_batches
from aiexport_edge.proto.config_images import ImagesConfig, read_images
from aiexport_edge.proto.config_limits import PLAN_DEFAULTS, LimitsConfig, PlanConfig
from aiexport_edge.proto.config_rope import RopeScaling, rope_scaling
from aiexport_edge.proto.config_telemetry import TelemetryConfig, read_telemetry
from aiexport_edge.proto.config_tls import TlsConfig, read_tls
from aiexport_edge.proto.config_values import DEMO, FAMILIES
from aiexport_edge.proto.config_vllm import VllmConfig, read_backend, refuse_what_vllm_lacks
from aiexport_edge.proto.config_webhooks import WebhooksConfig, read_webhooks
from aiexport_edge.proto.units import join_address, parse_duration, parse_size

T = TypeVar("T")

DEFAULT_FILE = "aiexport-edge.toml"
ROUTINGS = ("prefix", "least-load", "round-robin")
PLANS = ("free", "pro", "enterprise")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "int4", "fp8")
KV_CACHE_DTYPES = ("auto", "fp8")


class ConfigError(Exception):
    """What is wrong with the configuration, where, and what to do: one sentence for a person."""

    def __init__(self, file: Path | None, key: str, problem: str) -> None:
        self.file = file
        self.key = key
        self.problem = problem
        where = str(file) if file is not None else "configuration"
        super().__init__(": ".join(part for part in (where, key, problem) if part))


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`[engine]`. Sizes in bytes, 0 where the engine chooses; `num_threads` 0: one per processor core.

    `max_step_tokens` 0 ("auto"): 512 on a processor, 2048 on a card. `memory_share` is what the page pool takes of a
    card's memory beside weights, graphs and activations where `pool_bytes` does not say. `step_timeout`: a core that
    is silent for so long while it has work is ended, and its requests are resumed in another. With `drafts`, tokens
    that a text seems to repeat are guessed, and checked in one step: the text is the same, the time shorter.
    """

    listen: str
    device: str
    max_num_running: int
    max_step_tokens: int
    page_bytes: int
    pool_bytes: int
    queue_size: int
    tenant_queue_share: float
    num_threads: int
    batch_floor_share: float
    memory_share: float
    step_timeout: timedelta
    deterministic: bool | None  # None: as each model's source has it
    drafts: bool
    tls_cert: Path | None
    tls_key: Path | None
    client_ca: Path | None  # clients must show a certificate of it
    token_file: Path | None
    drain: timedelta  # how long running requests may go on after SIGTERM


@dataclass(frozen=True, slots=True)
class WeightsSpec:
    """One loaded model. `name` is what the engine's gRPC calls it; `source` is "demo" or an absolute directory.

    `vllm` None: the native backend serves it.
    """

    name: str
    source: str
    dtype: str
    quantize: str  # what weights are rounded to while they are loaded
    context_window: int  # tokens; 0: the model's own
    deterministic: bool
    vllm: VllmConfig | None
    rope_scaling: RopeScaling | None  # in the place of the checkpoint's own
    kv_cache_dtype: str  # of keys and values; "auto": the model's, or what its checkpoint is made for


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One `[[models]]` entry: what clients see. The first of `ids` is the main one; `weights` names a `WeightsSpec`."""

    ids: tuple[str, ...]
    family: str
    display_name: str
    source: str
    dtype: str
    quantize: str
    context_window: int  # tokens; 0: the model's own
    max_output_tokens: int  # 0: the smaller of 8192 and the context window
    input_per_million: float  # US dollars
    output_per_million: float
    created_at: datetime  # in UTC
    deterministic: bool
    json_mode: bool  # whether `response_format` may ask for JSON
    vllm: VllmConfig | None  # None: the native backend serves it
    rope_scaling: RopeScaling | None
    weights: str

    @property
    def id(self) -> str:
        return self.ids[0]


@dataclass(frozen=True, slots=True)
class ShimConfig:
    """`[shim]`. `engines` are gRPC addresses (HOST:PORT, unix:PATH, or dns:///HOST:PORT for every address that the name
    has, looked up again every `engine_resolve`); CA, certificate, key and token are for those on other machines.
    `routing`: how one of them is chosen.
    """

    host: str
    port: int
    workers: int
    engines: tuple[str, ...]
    engine_ca: Path | None
    engine_cert: Path | None
    engine_key: Path | None
    engine_token_file: Path | None
    engine_resolve: timedelta
    routing: str
    max_body_bytes: int
    inflight_body_bytes: int
    max_connections: int  # of one worker process
    cors_origins: tuple[str, ...]  # web pages whose scripts may call; none by default
    drain: timedelta  # how long open streams may go on after SIGTERM


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """`[store]`. `url` is an SQLAlchemy URL; `retention`: how long prompts, results and single usage rows are kept."""

    url: str
    retention: timedelta


@dataclass(frozen=True, slots=True)
class Config:
    """Everything, defaults included. `path` is None where there is no file; `state` is an absolute directory."""

    path: Path | None
    state: Path
    engine: EngineConfig
    models: tuple[ModelSpec, ...]
    weights: tuple[WeightsSpec, ...]
    shim: ShimConfig
    plans: Mapping[str, PlanConfig]
    limits: LimitsConfig
    store: StoreConfig
    admin: AdminConfig
    tls: TlsConfig
    telemetry: TelemetryConfig
    batches: BatchesConfig
    webhooks: WebhooksConfig
    images: ImagesConfig
    adapters: AdaptersConfig

    @property
    def admin_listen(self) -> str:
        """Where the admin listener is, HOST:PORT."""
        return self.admin.listen or join_address("127.0.0.1", self.shim.port + 1)

    @property
    def kernel_cache(self) -> Path:
        """Where kernels that were compiled for a card are kept from one start to the next."""
        return Path(os.environ.get("TRITON_CACHE_DIR") or self.state / "kernels")

    @property
    def adapter_copies(self) -> Path:
        """Where adapters that lie in no root are copied to."""
        return self.state / "adapters"

    @property
    def adapter_roots(self) -> tuple[Path, ...]:
        """Below which an engine reads adapters."""
        return (self.adapter_copies, *self.adapters.roots)

    @property
    def engine_addresses(self) -> tuple[str, ...]:
        """The engines a shim connects to."""
        return self.shim.engines or (self.engine.listen,)


def find_file(path: Path | None) -> Path | None:
    """The file that `load` reads: `path`, else `./aiexport-edge.toml` if it is there. None: defaults only."""
    if path is not None:
        return path.absolute()
    default = Path.cwd() / DEFAULT_FILE
    return default if default.is_file() else None


def default_state() -> Path:
    """The state directory of this user where none is named."""
    import platformdirs

    return Path(platformdirs.user_data_dir("aiexport-edge"))


def load(path: Path | None = None, state: Path | None = None) -> Config:
    """Reads the file (`find_file`) and fills in the defaults. Raises `ConfigError`; touches nothing on disk."""
    file = find_file(path)
    raw: dict[str, Any] = {}
    if file is not None:
        try:
            raw = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(file, "", "there is no such file; name another with --config") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(file, "", f"cannot be read ({error}); make it a readable UTF-8 file") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(file, "", f"is not valid TOML: {error}") from None
    return _read(_Table(file, "", raw), file, (state or default_state()).expanduser().absolute())


def source_directory(source: str) -> Path:
    """The directory of a `source`, that of the demo model included."""
    if source == DEMO:
        return Path(__file__).resolve().parent.parent / "engine" / "demo" / "model"
    return Path(source)


def check_sources(config: Config) -> None:
    """Raises `ConfigError` unless every model's directory is there with a `config.json`, and so is its interpreter."""
    for index, model in enumerate(config.models):
        python = None if model.vllm is None else model.vllm.python
        if python is not None and not os.access(python, os.X_OK):
            raise ConfigError(
                config.path,
                f"models.{index}.vllm.python",
                f"there is no program {python}; name the python of the environment that vLLM is installed in",
            )
        directory = source_directory(model.source)
        key = f"models.{index}.source" if config.path is not None else ""
        if not directory.is_dir():
            raise ConfigError(
                config.path, key, f"there is no directory {directory}; download the model there, or correct the path"
            )
        if not (directory / "config.json").is_file():
            raise ConfigError(
                config.path,
                key,
                f"{directory} has no config.json; it must be a Hugging Face model directory "
                "(config.json, *.safetensors, tokenizer.json)",
            )


# ---------------------------------------------------------------------------------------------------- reading


# What two entries must agree in to be served by one set of weights: the fields of a `WeightsSpec` but its name.
_Shared = tuple[str, str, str, int, bool, VllmConfig | None, RopeScaling | None, str]


class _Table:
    """One TOML table while it is read: `take` each key that may be there, then `end`, which refuses all others."""

    def __init__(self, file: Path | None, path: str, raw: dict[str, Any]) -> None:
        self.file = file
        self.path = path
        self._raw = raw
        self._known: list[str] = []

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(self.file, f"{self.path}.{key}" if self.path else key, problem)

    def take(self, key: str, parse: Callable[[Any], T], default: T) -> T:
        self._known.append(key)
        if key not in self._raw:
            return default
        try:
            return parse(self._raw[key])
        except ValueError as problem:
            raise self.error(key, str(problem)) from None

    @property
    def is_empty(self) -> bool:
        return not self._raw

    def table(self, key: str) -> _Table:
        empty: dict[str, Any] = {}
        raw = self.take(key, values.table, empty)
        return _Table(self.file, f"{self.path}.{key}" if self.path else key, raw)

    def end(self) -> None:
        for key in self._raw:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, n=1, cutoff=0.5)
                known = f'did you mean "{near[0]}"?' if near else f"known here: {', '.join(self._known)}"
                raise self.error(key, f"unknown key; {known}")


def _read(root: _Table, file: Path | None, state: Path) -> Config:
    base = file.parent if file is not None else Path.cwd()
    engine = _engine(root.table("engine"), base)
    models, weights = _models(root, base, engine.deterministic)
    shim = _shim(root.table("shim"), base)
    plans = _plans(root.table("plans"))
    limits_config = _limits(root.table("limits"), base)
    store = root.table("store")
    url = store.take("url", values.text, "sqlite:///" + str(state / "store.db"))
    retention = store.take("retention", parse_duration, timedelta(days=29))
    store.end()
    tls = read_tls(root.table("tls"), base)
    admin = read_admin(root.table("admin"), tls)
    telemetry = read_telemetry(root.table("telemetry"))
    batches = read_batches(root.table("batches"))
    webhooks = read_webhooks(root.table("webhooks"), base)
    images = read_images(root.table("images"))
    adapters = read_adapters(root.table("adapters"), base)
    root.end()
    if not admin.listen and shim.port == 65535:
        raise ConfigError(file, "shim.port", "leaves no port + 1 for the admin listener; set admin.listen")
    return Config(
        path=file,
        state=state,
        engine=engine,
        models=models,
        weights=weights,
        shim=shim,
        plans=plans,
        limits=limits_config,
        store=StoreConfig(url, retention),
        admin=admin,
        tls=tls,
        telemetry=telemetry,
        batches=batches,
        webhooks=webhooks,
        images=images,
        adapters=adapters,
    )


def _engine(table: _Table, base: Path) -> EngineConfig:
    engine = EngineConfig(
        listen=table.take("listen", values.grpc_address, "127.0.0.1:50051"),
        device=table.take("device", values.device, "auto"),
        max_num_running=table.take("max_num_running", values.integer(1, 4096), 64),
        max_step_tokens=table.take("max_step_tokens", values.auto_integer(16, 1 << 20), 0),
        page_bytes=table.take("page_bytes", values.auto_size, 0),
        pool_bytes=table.take("pool_bytes", values.auto_size, 0),
        queue_size=table.take("queue_size", values.integer(1, 1 << 20), 1024),
        tenant_queue_share=table.take("tenant_queue_share", values.share, 0.5),
        num_threads=table.take("num_threads", values.integer(0, 1024), 0),
        batch_floor_share=table.take("batch_floor_share", values.floor_share, 0.05),
        memory_share=table.take("memory_share", values.share, 0.9),
        step_timeout=table.take("step_timeout", parse_duration, timedelta(minutes=5)),
        deterministic=table.take("deterministic", values.auto_boolean, None),
        drafts=table.take("drafts", values.boolean, True),
        tls_cert=table.take("tls_cert", values.path(base), None),
        tls_key=table.take("tls_key", values.path(base), None),
        client_ca=table.take("client_ca", values.path(base), None),
        token_file=table.take("token_file", values.path(base), None),
        drain=table.take("drain", parse_duration, timedelta(seconds=30)),
    )
    table.end()
    if (engine.tls_cert is None) != (engine.tls_key is None):
        missing = "tls_key" if engine.tls_key is None else "tls_cert"
        raise table.error(missing, "is missing; tls_cert and tls_key go together")
    if engine.client_ca is not None and engine.tls_cert is None:
        raise table.error("tls_cert", "is missing; client_ca is for clients that connect over TLS")
    return engine


def _models(
    root: _Table, base: Path, engine_deterministic: bool | None
) -> tuple[tuple[ModelSpec, ...], tuple[WeightsSpec, ...]]:
    entries = root.take("models", values.tables, list(_DEMO_MODELS))
    models: list[ModelSpec] = []
    weights: dict[_Shared, WeightsSpec] = {}
    seen: dict[str, int] = {}
    for index, raw in enumerate(entries):
        table = _Table(root.file, f"models.{index}", raw)
        model = _model(table, base, engine_deterministic, weights)
        for model_id in model.ids:
            if model_id in seen:
                raise table.error("ids", f'"{model_id}" is already an id of models.{seen[model_id]}; ids are unique')
            seen[model_id] = index
        models.append(model)
    return tuple(models), tuple(weights.values())


def _model(
    table: _Table,
    base: Path,
    engine_deterministic: bool | None,
    weights: dict[_Shared, WeightsSpec],
) -> ModelSpec:
    nothing: tuple[str, ...] = ()
    ids = table.take("ids", values.model_ids, nothing)
    family = table.take("family", values.one_of(FAMILIES), "")
    source = table.take("source", values.source(base), "")
    display_name = table.take("display_name", values.text, "")
    dtype = table.take("dtype", values.one_of(DTYPES), "auto")
    quantize = table.take("quantize", values.one_of(QUANTIZATIONS), "none")
    kv_cache_dtype = table.take("kv_cache_dtype", values.one_of(KV_CACHE_DTYPES), "auto")
    context_window = table.take("context_window", values.integer(0, 1 << 24), 0)
    max_output_tokens = table.take("max_output_tokens", values.integer(0, 1 << 24), 0)
    input_per_million = table.take("input_per_million", values.price, 0.0)
    output_per_million = table.take("output_per_million", values.price, 0.0)
    created_at = table.take("created_at", values.time, datetime(2025, 4, 1, tzinfo=UTC))
    scaling: RopeScaling | None = table.take("rope_scaling", rope_scaling, None)
    vllm = read_backend(table, base)
    default = engine_deterministic if engine_deterministic is not None else source == DEMO and vllm is None
    deterministic = table.take("deterministic", values.boolean, default)
    json_mode = table.take("json_mode", values.boolean, family != "haiku")
    table.end()
    if vllm is not None:
        refuse_what_vllm_lacks(table, deterministic=deterministic, quantize=quantize, kv_cache_dtype=kv_cache_dtype)
        if scaling is not None:
            raise table.error(
                "rope_scaling", "is of the native backend; for vLLM write it into the model's config.json"
            )
    for key, value in (("ids", ids), ("family", family), ("source", source)):
        if not value:
            raise table.error(key, f"is missing; {_MODEL_REMEDIES[key]}")
    if context_window and max_output_tokens > context_window:
        raise table.error("max_output_tokens", f"must be at most the context_window, {context_window}")
    shared = (source, dtype, quantize, context_window, deterministic, vllm, scaling, kv_cache_dtype)
    if shared not in weights:
        weights[shared] = WeightsSpec(_weights_name(source, weights.values()), *shared)
    return ModelSpec(
        ids=ids,
        family=family,
        display_name=display_name or ids[0],
        source=source,
        dtype=dtype,
        quantize=quantize,
        context_window=context_window,
        max_output_tokens=max_output_tokens,
        input_per_million=input_per_million,
        output_per_million=output_per_million,
        created_at=created_at,
        deterministic=deterministic,
        json_mode=json_mode,
        vllm=vllm,
        rope_scaling=scaling,
        weights=weights[shared].name,
    )


def _weights_name(source: str, others: Iterable[WeightsSpec]) -> str:
    """The directory's name, numbered where another model already has it."""
    taken = {other.name for other in others}
    name = base = source if source == DEMO else (Path(source).name or "model")
    number = 2
    while name in taken:
        name = f"{base}-{number}"
        number += 1
    return name


def _shim(table: _Table, base: Path) -> ShimConfig:
    nothing: tuple[str, ...] = ()
    shim = ShimConfig(
        host=table.take("host", values.host, "127.0.0.1"),
        port=table.take("port", values.integer(1, 65535), 8400),
        workers=table.take("workers", values.integer(1, 256), 1),
        engines=table.take("engines", values.grpc_targets, nothing),
        engine_ca=table.take("engine_ca", values.path(base), None),
        engine_cert=table.take("engine_cert", values.path(base), None),
        engine_key=table.take("engine_key", values.path(base), None),
        engine_token_file=table.take("engine_token_file", values.path(base), None),
        engine_resolve=table.take("engine_resolve", parse_duration, timedelta(seconds=10)),
        routing=table.take("routing", values.one_of(ROUTINGS), ROUTINGS[0]),
        max_body_bytes=table.take("max_body_bytes", parse_size, 32 << 20),
        inflight_body_bytes=table.take("inflight_body_bytes", parse_size, 256 << 20),
        max_connections=table.take("max_connections", values.integer(1, 1 << 20), 4096),
        cors_origins=table.take("cors_origins", values.origins, nothing),
        drain=table.take("drain", parse_duration, timedelta(seconds=30)),
    )
    table.end()
    if (shim.engine_cert is None) != (shim.engine_key is None):
        missing = "engine_key" if shim.engine_key is None else "engine_cert"
        raise table.error(missing, "is missing; engine_cert and engine_key go together")
    if shim.inflight_body_bytes < shim.max_body_bytes:
        raise table.error("inflight_body_bytes", "must be at least max_body_bytes, or a body of that size never fits")
    return shim


def _plans(table: _Table) -> dict[str, PlanConfig]:
    plans = {}
    for name in PLANS:
        plan, default = table.table(name), PLAN_DEFAULTS[name]
        requests = limits.limit(limits.MAX_REQUESTS_PER_MINUTE)
        plans[name] = PlanConfig(
            families=plan.take("families", values.families, default.families),
            weight=plan.take("weight", values.weight, default.weight),
            requests_per_minute=plan.take("requests_per_minute", requests, default.requests_per_minute),
            tokens_per_day=plan.take("tokens_per_day", limits.limit(limits.MAX_TOKENS_PER_DAY), default.tokens_per_day),
            batch_size=plan.take("batch_size", values.integer(1, limits.MAX_BATCH_SIZE), default.batch_size),
        )
        plan.end()
    table.end()
    return plans


def _limits(table: _Table, base: Path) -> LimitsConfig:
    config = LimitsConfig(
        redis_url=table.take("redis_url", limits.redis_url, ""),
        redis_password_file=table.take("redis_password_file", values.path(base), None),
        redis_timeout=table.take("redis_timeout", parse_duration, timedelta(seconds=1)),
    )
    table.end()
    if config.redis_password_file is not None and not config.redis_url:
        raise table.error("redis_url", "is missing; redis_password_file is for the server that it names")
    return config


# ---------------------------------------------------------------------------------------------------- defaults

_MODEL_REMEDIES = {
    "ids": 'list what clients call it, such as ["apex-haiku-4-20250401"]',
    "family": "say opus, sonnet or haiku",
    "source": 'name a Hugging Face model directory, or "demo"',
}


def _demo_model(model_id: str, family: str, name: str, prices: tuple[float, float], created: str) -> dict[str, Any]:
    return {
        "ids": [model_id],
        "family": family,
        "display_name": name,
        "source": DEMO,
        "input_per_million": prices[0],
        "output_per_million": prices[1],
        "created_at": created,
    }


_DEMO_MODELS = (
    _demo_model("apex-opus-3-20250401", "opus", "Apex Opus 3", (15.0, 75.0), "2025-04-01T00:00:00Z"),
    _demo_model("apex-sonnet-4-20250501", "sonnet", "Apex Sonnet 4", (3.0, 15.0), "2025-05-01T00:00:00Z"),
    _demo_model("apex-haiku-4-20250401", "haiku", "Apex Haiku 4", (0.25, 1.25), "2025-04-01T00:00:00Z"),
)
