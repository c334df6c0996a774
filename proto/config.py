"""The configuration file `aiexport-edge.toml`, as every process of the product reads it.

Owns its sections (each has a module `config_NAME.py` with its keys and their defaults) and where the file and the state
directory are found. Knows nothing of what is done with the values: no torch, no HTTP, no weights. A file is read
strictly: an unknown key is an error that names the nearest right one. Secrets are never in it, only the names of files
that hold them.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiexport_edge.proto.config_adapters import AdaptersConfig, read_adapters
from aiexport_edge.proto.config_admin import AdminConfig, read_admin
from aiexport_edge.proto.config_batches import BatchesConfig, read_batches
from aiexport_edge.proto.config_engine import EngineConfig, read_engine
from aiexport_edge.proto.config_images import ImagesConfig, read_images
from aiexport_edge.proto.config_limits import LimitsConfig, PlanConfig, read_limits, read_plans
from aiexport_edge.proto.config_models import ModelSpec, WeightsSpec, read_models
from aiexport_edge.proto.config_shim import ShimConfig, read_shim
from aiexport_edge.proto.config_store import StoreConfig, read_store
from aiexport_edge.proto.config_table import ConfigError, Table
from aiexport_edge.proto.config_telemetry import TelemetryConfig, read_telemetry
from aiexport_edge.proto.config_tls import TlsConfig, read_tls
from aiexport_edge.proto.config_values import DEMO
from aiexport_edge.proto.config_webhooks import WebhooksConfig, read_webhooks
from aiexport_edge.proto.units import join_address

__all__ = (
    "Config",
    "ConfigError",
    "ModelSpec",
    "WeightsSpec",
    "check_sources",
    "default_state",
    "find_file",
    "load",
    "source_directory",
    "state_directory",
)

DEFAULT_FILE = "aiexport-edge.toml"


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


# ---------------------------------------------------------------------------------------------------- places


def find_file(path: Path | None) -> Path | None:
    """The file that `load` reads: `path`, else `./aiexport-edge.toml` if it is there. None: defaults only.

    Raises `ConfigError` where the working directory cannot be looked into.
    """
    try:
        if path is not None:
            return path.absolute()
        default = Path.cwd() / DEFAULT_FILE
        return default if default.is_file() else None
    except OSError as error:
        raise ConfigError(
            None,
            "",
            f"the working directory cannot be looked into for {DEFAULT_FILE} ({error.strerror}); change to another",
        ) from None


def default_state() -> Path:
    """The state directory of this user where none is named."""
    import platformdirs

    return Path(platformdirs.user_data_dir("aiexport-edge"))


def state_directory(state: Path | None) -> Path:
    """`state` or this user's own, as an absolute path. Raises `ConfigError`."""
    try:
        directory = (state or default_state()).expanduser().absolute()
    except RuntimeError:
        raise ConfigError(
            None, "", "this user has no home directory for the state; name a directory with --state"
        ) from None
    except OSError as error:
        raise ConfigError(
            None, "", f"the state directory {state} counts from the working one ({error.strerror}); name its whole path"
        ) from None
    if "?" in str(directory):  # it would begin the options of the store's URL
        raise ConfigError(None, "", f"the state directory {directory} has a ? in its path; name another with --state")
    return directory


def source_directory(source: str) -> Path:
    """The directory of a `source`, that of the demo model included."""
    if source == DEMO:
        return Path(__file__).resolve().parent.parent / "engine" / "demo" / "model"
    return Path(source)


# ---------------------------------------------------------------------------------------------------- reading


def load(path: Path | None = None, state: Path | None = None) -> Config:
    """Reads the file (`find_file`) and fills in the defaults. Raises `ConfigError`; touches nothing on disk."""
    file = find_file(path)
    raw: dict[str, Any] = {}
    if file is not None:
        try:
            raw = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise ConfigError(file, "", "there is no such file; name another with --config") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(file, "", f"cannot be read ({error}); make it a readable UTF-8 file") from None
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(file, "", f"is not valid TOML: {error}") from None
    return _read(Table(file, "", raw), file, state_directory(state))


def _read(root: Table, file: Path | None, state: Path) -> Config:
    base = file.parent if file is not None else Path.cwd()
    engine = read_engine(root.table("engine"), base)
    models, weights = read_models(root, base, engine.deterministic)
    shim = read_shim(root.table("shim"), base)
    plans = read_plans(root.table("plans"))
    limits = read_limits(root.table("limits"), base)
    store = read_store(root.table("store"), base, state)
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
        limits=limits,
        store=store,
        admin=admin,
        tls=tls,
        telemetry=telemetry,
        batches=batches,
        webhooks=webhooks,
        images=images,
        adapters=adapters,
    )


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
