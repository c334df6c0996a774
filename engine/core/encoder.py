"""The vision towers of a core at work: pictures in the making, and the features of those that are done.

Owns these tensors. Which picture is worked on, how far, and when its features go is in the plan (`pictures.py`). Knows
no requests' state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aiexport_edge.engine.core.accelerator import Accelerator
from aiexport_edge.engine.core.pictures import Eyes, Key
from aiexport_edge.engine.core.plan import Encode
from aiexport_edge.engine.core.protocol import ImageInput
from aiexport_edge.engine.models.cost import layer_weights
from aiexport_edge.engine.models.loader import LoadedModel
from aiexport_edge.engine.models.vision import Encoding, Features, VisionTower

SPARE_BYTES = 256 << 20  # at most, for the features of pictures beside the largest one
# A unit of a tiny tower takes 0.3 ms of a processor's time, in which it could compute so much. A card launches units
# beside decodes.
UNIT_OPERATIONS_CPU = 3e7


def eyes_of(model: LoadedModel, max_image_tokens: int) -> Eyes | None:
    """What the scheduler has to know of a model's tower. `max_image_tokens` 0: the model's own bound."""
    tower = model.tower
    if tower is None:
        return None
    config = tower.config
    square = config.merge_size**2
    return Eyes(
        config=config,
        block_patches=tower.block_patches,
        token_operations=sum(
            2 * layer_weights(model.config, layer, active=True) for layer in range(model.config.num_layers)
        ),
        token_bytes=(1 + len(config.deepstack_layers)) * config.out_hidden_size * model.dtype.itemsize,
        largest_patches=min(
            model.largest_image_patches, square * min(max_image_tokens or model.context_window, model.context_window)
        ),
        unit_operations=UNIT_OPERATIONS_CPU if tower.device.type == "cpu" else 0.0,
    )


def picture_bytes(eyes: Sequence[Eyes | None]) -> int:
    """What is kept of features, over all models: the largest picture and some more."""
    largest = [
        each.largest_patches // each.config.merge_size**2 * each.token_bytes for each in eyes if each is not None
    ]
    return max(largest) + min(max(largest), SPARE_BYTES) if largest else 0


def encoding_bytes(models: Sequence[LoadedModel], all_eyes: Sequence[Eyes | None]) -> int:
    """What the largest picture of all models takes while it goes through the tower: pixels and patches, hidden states,
    two sets of queries, keys and values."""
    sizes = [0]
    for model, eyes in zip(models, all_eyes, strict=True):
        if eyes is not None:
            pixels, width = 3 * eyes.config.patch_size**2, eyes.config.hidden_size
            sizes.append(eyes.largest_patches * (3 * pixels + 7 * width * model.dtype.itemsize))
    return max(sizes)


class Encoder:
    """By model, a tower or None. Features are there from when their last unit was launched until they are dropped."""

    def __init__(self, towers: Sequence[VisionTower | None], accelerator: Accelerator | None) -> None:
        self._towers = towers
        self._accelerator = accelerator
        self._encodings: dict[Key, Encoding] = {}
        self._features: dict[Key, Features] = {}

    def drop(self, keys: Sequence[Key]) -> None:
        """These are not needed any more, whether they are done or not."""
        for key in keys:
            self._encodings.pop(key, None)
            self._features.pop(key, None)

    def advance(self, encode: Encode) -> None:
        """Launch some of the work on a picture."""
        key = encode.key
        encoding = self._encodings.get(key)
        if encoding is None:
            encoding = self._encodings[key] = self._begin(key[0], encode.request.images[encode.index])
        encoding.advance(encode.num_units)
        if encoding.is_done:
            self._features[key] = encoding.features
            del self._encodings[key]

    def features(self, key: Key) -> Features:
        """What became of a picture."""
        return self._features[key]

    def _begin(self, model: int, image: ImageInput) -> Encoding:
        tower = self._towers[model]
        assert tower is not None, "a picture for a model that sees none"
        size = tower.config.patch_size
        pixels = self._upload(image.pixels).view(image.rows * size, image.columns * size, 3)
        try:
            return tower.begin(pixels)
        except torch.OutOfMemoryError:
            if self._accelerator is None:
                raise
        self._accelerator.reclaim()
        return tower.begin(pixels)

    def _upload(self, pixels: bytes) -> Tensor:
        if self._accelerator is None:
            return torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
        staging = self._accelerator.staging(len(pixels))
        staging.numpy()[:] = np.frombuffer(pixels, dtype=np.uint8)
        return staging.to(self._accelerator.device, non_blocking=True)
