"""How a model wants its pictures: `preprocessor_config.json` of a Hugging Face directory, read strictly.

Owns the reading and its errors. Both forms of the bounds are taken: `size` with `shortest_edge` and `longest_edge`, and
`min_pixels` and `max_pixels`, which go first; and transformers 5's `processor_config.json`, which holds the same object
as `image_processor`. Imports neither torch nor Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiexport_edge.engine.images.patches import PatchConfig
from aiexport_edge.engine.models.config_values import ModelError, read_json
from aiexport_edge.engine.models.vision_config import VisionConfig

FILE = "preprocessor_config.json"
_NESTED_FILE = "processor_config.json"
_KINDS = (
    "Qwen2VLImageProcessor",
    "Qwen2VLImageProcessorFast",
    "Qwen2VLImageProcessorPil",
    "Qwen3VLImageProcessor",
    "Qwen3VLImageProcessorFast",
)
_BICUBIC = 3
# Where a file leaves them out: as `Qwen2VLImageProcessor` of transformers has them.
_MIN_PIXELS = 56 * 56
_MAX_PIXELS = 28 * 28 * 1280
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def load_patch_config(directory: Path | str, vision: VisionConfig | None = None) -> PatchConfig:
    """Reads `directory`. Raises ModelError naming the file and the key that is missing, not supported, or other than
    the model's `vision`.
    """
    directory = Path(directory)
    file = directory / FILE
    values = None
    if not file.exists() and (directory / _NESTED_FILE).exists():
        file = directory / _NESTED_FILE
        values = read_json(file).get("image_processor")
        if not isinstance(values, dict):
            raise ModelError(f"{file}: image_processor is missing; a model that sees needs it")
    config = _Reader(read_json(file) if values is None else values, file).patch_config()
    if vision is not None:
        for key in ("patch_size", "merge_size", "temporal_patch_size"):
            here, there = getattr(config, key), getattr(vision, key)
            if here != there:
                raise ModelError(f"{file}: {key} is {here}, but the vision tower of config.json has {there}")
    return config


class _Reader:
    """The image processor's object, with typed access."""

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        self._values = values
        self._file = file

    def patch_config(self) -> PatchConfig:
        """The whole of it."""
        kind = self._values.get("image_processor_type")
        if kind is not None and kind not in _KINDS:
            raise self._error("image_processor_type", f"is {kind!r}; supported are {', '.join(_KINDS)}")
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if self._values.get(key) not in (None, True):
                raise self._error(key, "is not true, which is not supported")
        if self._values.get("resample") not in (None, _BICUBIC):
            raise self._error("resample", f"is {self._values['resample']!r}; {_BICUBIC} (bicubic) is supported")
        factor = self._values.get("rescale_factor")
        if factor is not None and not (isinstance(factor, float) and abs(factor * 255 - 1) < 1e-6):
            raise self._error("rescale_factor", f"is {factor!r}; 1/255 is supported")
        size = self._values.get("size")
        if size is not None and not isinstance(size, dict):
            raise self._error("size", f"is {size!r}; an object with shortest_edge and longest_edge is needed")
        low = self._bound("min_pixels", "shortest_edge", size, _MIN_PIXELS)
        high = self._bound("max_pixels", "longest_edge", size, _MAX_PIXELS)
        patch_size = self._integer("patch_size", self._values.get("patch_size", 14))
        merge_size = self._integer("merge_size", self._values.get("merge_size", 2))
        if high < max(low, (patch_size * merge_size) ** 2):
            raise self._error(
                "max_pixels", f"(or size.longest_edge) is {high}, too few for the lower bound {low} or for one token"
            )
        return PatchConfig(
            patch_size=patch_size,
            temporal_patch_size=self._integer("temporal_patch_size", self._values.get("temporal_patch_size", 2)),
            merge_size=merge_size,
            min_pixels=low,
            max_pixels=high,
            mean=self._channels("image_mean", _MEAN, positive=False),
            std=self._channels("image_std", _STD, positive=True),
        )

    def _bound(self, key: str, edge: str, size: dict[str, Any] | None, default: int) -> int:
        value = self._values.get(key)
        if value is not None:
            return self._integer(key, value)
        if size is None:
            return default
        value = size.get(edge, size.get(key))
        return default if value is None else self._integer(f"size.{edge}", value)

    def _integer(self, key: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._error(key, f"is {value!r}; a positive integer is needed")
        return value

    def _channels(self, key: str, default: tuple[float, float, float], *, positive: bool) -> tuple[float, float, float]:
        value = self._values.get(key)
        if value is None:
            return default
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not all(isinstance(part, int | float) and not isinstance(part, bool) for part in value)
            or (positive and not all(part > 0 for part in value))
        ):
            raise self._error(key, f"is {value!r}; a list of three{' positive' if positive else ''} numbers is needed")
        red, green, blue = value
        return float(red), float(green), float(blue)

    def _error(self, key: str, complaint: str) -> ModelError:
        return ModelError(f"{self._file}: {key} {complaint}")
