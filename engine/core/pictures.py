"""Which pictures are encoded, which are being encoded, which are kept: bounded, the least recently used goes first.

Owns the accounting of the vision towers' output; the tensors are `encoder.py`'s, which is told what to drop. Knows no
policy: the scheduler says who may go on. Imports no torch.

    held      some request has tokens of it still to compute; never dropped
    kept      in nobody's hands, found again by its key; the least recently held goes first
    partial   its units are not all planned; dropped when nobody holds it

A picture is found under the same salt only: a workspace never learns by timing what another one has sent.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.models.vision_config import Grid, VisionConfig, encoding_work

Key = tuple[int, bytes, bytes, int, int]  # model, salt, digest, rows, columns
SMALL_PATCHES = 4096  # what may be half done beside the largest picture


@dataclass(frozen=True, slots=True)
class Eyes:
    """What there is to know of a model's vision tower without a tensor.

    `block_patches` go through a layer in one unit of work, which takes as long as `unit_operations` besides its own,
    however few they are. `token_operations` are the decoder's for one token, `token_bytes` those of one token's
    features; `largest_patches` is the size of the largest picture.
    """

    config: VisionConfig
    block_patches: int
    token_operations: float
    token_bytes: int
    largest_patches: int
    unit_operations: float = 0.0

    def cost(self, grid: Grid) -> tuple[int, float]:
        """Units of work that a picture takes, and what one of them costs in tokens of the decoder."""
        work = encoding_work(self.config, grid, self.block_patches)
        return work.num_units, (work.unit_operations + self.unit_operations) / self.token_operations

    def num_bytes(self, grid: Grid) -> int:
        """Bytes of a picture's features."""
        return self.config.num_tokens(grid) * self.token_bytes


@dataclass(slots=True, eq=False)
class Picture:
    """One picture of one workspace and what is done of it; `num_done` counts units that are planned."""

    key: Key
    num_patches: int
    num_bytes: int
    num_units: int
    unit_cost: float
    num_done: int = 0
    num_holders: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether its features are there for what is planned from now on."""
        return self.num_done == self.num_units


class Pictures:
    """Pictures of all models of a core. `eyes` is by model; a model without has no pictures."""

    def __init__(self, eyes: Sequence[Eyes | None], *, capacity_bytes: int) -> None:
        self._eyes = eyes
        self._capacity_bytes = capacity_bytes
        self._most_partial = max([each.largest_patches for each in eyes if each is not None], default=0) + SMALL_PATCHES
        self._pictures: dict[Key, Picture] = {}
        self._kept: OrderedDict[Key, None] = OrderedDict()  # least recently held first
        self._num_bytes = 0
        self._num_partial_patches = 0
        self._dropped: list[Key] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of all features, those in the making included."""
        return self._num_bytes

    def merge_size(self, model: int) -> int:
        """Patches on a side of what becomes one image token."""
        eyes = self._eyes[model]
        assert eyes is not None, "a picture for a model that sees none"
        return eyes.config.merge_size

    def num_clear(self, request: Request, start: int, num_tokens: int) -> int:
        """How many of `num_tokens` from `start` on can be computed before a picture comes that is not encoded.

        The request then holds the pictures whose tokens are among them, and looks at the one that comes after.
        """
        for index, span in enumerate(request.spans):
            if span.end <= start or (index in request.pictures and request.pictures[index].is_ready):
                continue
            if span.start >= start + num_tokens:
                break
            picture = self._pictures.get(key_of(request, index))
            if picture is None or not picture.is_ready:
                request.looking_at = index
                return max(span.start - start, 0)
            if index not in request.pictures:
                self._hold(request, index, picture)
        return num_tokens

    def looked_at(self, request: Request) -> Picture | None:
        """The picture that keeps the request waiting, held from now on; None: there is no room for its features yet."""
        index = request.looking_at
        picture = request.pictures.get(index)
        if picture is None:
            picture = self._pictures.get(key_of(request, index)) or self._make(request, index)
            if picture is not None:
                self._hold(request, index, picture)
        return picture

    def advance(self, picture: Picture, num_units: int) -> None:
        """So many more of its units are planned."""
        picture.num_done += num_units
        assert picture.num_done <= picture.num_units
        if picture.is_ready:
            self._num_partial_patches -= picture.num_patches

    def release(self, request: Request, num_computed_tokens: int) -> None:
        """The request needs no picture that ends within its first `num_computed_tokens`."""
        for index in [index for index in request.pictures if request.spans[index].end <= num_computed_tokens]:
            picture = request.pictures.pop(index)
            picture.num_holders -= 1
            if picture.num_holders:
                continue
            if picture.is_ready:
                self._kept[picture.key] = None
            else:
                self._num_partial_patches -= picture.num_patches
                self._drop(picture)

    def take_dropped(self) -> list[Key]:
        """What has been dropped since this was asked last; before anything else of the plan is run."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def check(self) -> None:
        """Assert that the books balance; for tests."""
        pictures = self._pictures.values()
        assert self._num_bytes == sum(picture.num_bytes for picture in pictures)
        assert self._num_bytes <= self._capacity_bytes or len(pictures) == 1
        partial = [picture for picture in pictures if not picture.is_ready]
        assert self._num_partial_patches == sum(picture.num_patches for picture in partial)
        assert self._num_partial_patches <= self._most_partial or len(partial) == 1
        assert all(picture.num_holders for picture in partial)
        assert self._kept.keys() == {picture.key for picture in pictures if not picture.num_holders}

    def _make(self, request: Request, index: int) -> Picture | None:
        eyes, image = self._eyes[request.model], request.images[index]
        assert eyes is not None, "a picture for a model that sees none"
        grid = image.rows, image.columns
        num_bytes, num_patches = eyes.num_bytes(grid), image.rows * image.columns
        # One that goes beyond a bound by itself (a long strip can, since its sides are rounded up) has it for itself.
        if self._num_partial_patches and self._num_partial_patches + num_patches > self._most_partial:
            return None
        num_held_bytes = self._num_bytes - sum([self._pictures[key].num_bytes for key in self._kept])
        if num_held_bytes and num_held_bytes + num_bytes > self._capacity_bytes:
            return None
        while self._kept and self._num_bytes + num_bytes > self._capacity_bytes:
            self._drop(self._pictures[self._kept.popitem(last=False)[0]])
        num_units, unit_cost = eyes.cost(grid)
        picture = Picture(key_of(request, index), num_patches, num_bytes, num_units, unit_cost)
        self._pictures[picture.key] = picture
        self._num_bytes += num_bytes
        self._num_partial_patches += num_patches
        return picture

    def _hold(self, request: Request, index: int, picture: Picture) -> None:
        request.pictures[index] = picture
        picture.num_holders += 1
        self._kept.pop(picture.key, None)

    def _drop(self, picture: Picture) -> None:
        del self._pictures[picture.key]
        self._num_bytes -= picture.num_bytes
        if picture.num_done:
            self._dropped.append(picture.key)


def key_of(request: Request, index: int) -> Key:
    """What the picture `index` of a request is known by."""
    image = request.images[index]
    return request.model, request.salt, image.digest, image.rows, image.columns
