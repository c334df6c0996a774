"""A request inside the core: its ids, how far it is computed, and the pages it holds.

Owns no policy: the scheduler decides, the page pool hands out pages, commit appends tokens. Imports no torch.

    token_ids            |<---- prompt ---->|<---- output (forced ids first) ---->|
    num_computed_tokens  |<--- KV in pages --->|<-- still to compute -->|

There are no phases: a request has tokens and computed tokens, and a plan gives it n more. Decode is n = 1, prefill
n > 1; a prefix hit, a resume and a recompute after preemption are `num_computed_tokens` jumping.

What a plan computes counts as computed, and what it draws as a token, from when it is planned: until the step is
committed, the id is PENDING_ID. So the next step can be planned while this one runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from aiexport_edge.engine.core.constraint import Constraint
from aiexport_edge.engine.core.protocol import AdapterRef, AddRequest, ImageInput, Priority, Sampling, unpack_ids
from aiexport_edge.engine.images.positions import ImageSpan, Positions, prompt_positions

if TYPE_CHECKING:
    from aiexport_edge.engine.core.drafts import Drafter
    from aiexport_edge.engine.core.pictures import Picture


class Status(IntEnum):
    """Where a request stands with the scheduler."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2  # waiting again; was running before, its pages are released
    FINISHED = 3


@dataclass(slots=True, eq=False)
class Request:
    """Filled from `AddRequest`. Status, pages and computed tokens belong to the scheduler; commit puts ids in.

    With a `constraint`, each id is drawn under its mask.
    """

    handle: int
    model: int
    token_ids: list[int]
    num_prompt_tokens: int
    max_tokens: int
    stop_ids: frozenset[int]
    sampling: Sampling
    tenant: str
    weight: float
    salt: bytes
    priority: Priority
    arrival: int  # order of arrival, unique
    probation: bool = False
    constraint: Constraint | None = None
    images: tuple[ImageInput, ...] = ()
    spans: tuple[ImageSpan, ...] = ()  # of the images, in the prompt
    positions: Positions | None = None  # of a prompt with images
    adapter: AdapterRef | None = None

    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    drafter: Drafter | None = None  # where its ids may be guessed
    is_drafted: bool = False  # a step in flight has guesses of it: how many ids that brings is not known
    num_in_flight: int = 0  # steps that it is in, planned and not yet committed: its pages are not given away meanwhile
    num_cached_tokens: int = 0  # prompt tokens that the prefix cache gave at first scheduling
    started: bool = False
    pages: list[int] = field(default_factory=list)
    adapter_slot: int = -1  # where its adapter lies on the device, while it holds pages
    page_hashes: list[bytes] = field(default_factory=list)  # of the full pages of token_ids hashed so far
    num_published_pages: int = 0  # of `pages`, those that the prefix cache knows or knew already
    looking_at: int = -1  # the image that it waits for, or has waited for
    pictures: dict[int, Picture] = field(default_factory=dict)  # by index in `images`, those that it holds
    num_charged_tokens: int = 0  # of token_ids, those that the tenant has been charged for: a recompute is free

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far, ids on their way included."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far, forced ids and ids on their way included."""
        return len(self.token_ids) - self.num_prompt_tokens


def make_request(message: AddRequest, *, arrival: int, merge_size: int = 1) -> Request:
    """The request that `message` asks for. `merge_size`: patches on a side of what becomes one image token."""
    prompt_ids = unpack_ids(message.prompt_ids)
    spans = tuple(
        ImageSpan(image.start, image.rows // merge_size, image.columns // merge_size) for image in message.images
    )
    return Request(
        handle=message.handle,
        model=message.model,
        token_ids=prompt_ids + unpack_ids(message.output_ids),
        num_prompt_tokens=len(prompt_ids),
        max_tokens=message.max_tokens,
        stop_ids=frozenset(message.stop_ids),
        sampling=message.sampling,
        tenant=message.tenant,
        weight=message.weight,
        salt=message.salt,
        priority=Priority(message.priority),
        arrival=arrival,
        probation=message.probation,
        images=tuple(message.images),
        spans=spans,
        positions=prompt_positions(len(prompt_ids), spans) if spans else None,
        adapter=message.adapter,
    )
