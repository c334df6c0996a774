"""Pictures in the scheduler: encoded in units beside others, found again, never in excess, let go of at the end."""

from __future__ import annotations

import random
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_core import FakeCore, add_request, prompt_of

from aiexport_edge.engine.core.pictures import Eyes
from aiexport_edge.engine.core.protocol import AddRequest, ImageInput, Priority
from aiexport_edge.engine.models.vision_config import Grid, VisionConfig

IMAGE = 39

CONFIG = VisionConfig(
    num_layers=3,
    hidden_size=8,
    intermediate_size=16,
    num_heads=2,
    in_channels=3,
    patch_size=2,
    temporal_patch_size=2,
    merge_size=2,
    out_hidden_size=8,
    num_positions=16,
    deepstack_layers=(0,),
    rope_theta=10000.0,
    image_token_id=IMAGE,
    video_token_id=38,
    vision_start_id=37,
    vision_end_id=36,
)
TOKEN_BYTES = 4


def eyes_of(*, unit_tokens: float = 2.0, largest: Grid = (8, 8)) -> Eyes:
    """Blocks of 16 patches, of which one through a layer costs about `unit_tokens` tokens."""
    probe = Eyes(CONFIG, 16, 1.0, TOKEN_BYTES, largest[0] * largest[1])
    return Eyes(CONFIG, 16, probe.cost((4, 4))[1] / unit_tokens, TOKEN_BYTES, largest[0] * largest[1])


def test_what_a_unit_costs_besides_its_products_counts() -> None:
    small, large = (4, 4), (8, 8)
    for grid in (small, large):
        plain, slow = Eyes(CONFIG, 16, 10.0, 4, 64), Eyes(CONFIG, 16, 10.0, 4, 64, unit_operations=500.0)
        assert slow.cost(grid)[0] == plain.cost(grid)[0]
        assert slow.cost(grid)[1] == pytest.approx(plain.cost(grid)[1] + 50)


def add_pictured(
    handle: int, *parts: list[int] | tuple[int, Grid], max_tokens: int = 4, salt: bytes = b"", **options: object
) -> AddRequest:
    """A request of text and pictures (number of the picture, its grid)."""
    ids: list[int] = []
    images: list[ImageInput] = []
    for part in parts:
        if isinstance(part, tuple):
            number, grid = part
            digest = blake2b(b"%d %d %d" % (number, *grid), digest_size=32).digest()
            images.append(ImageInput(len(ids) + 1, *grid, digest, b""))
            ids += [37, *[IMAGE] * CONFIG.num_tokens(grid), 36]
        else:
            ids += part
    return add_request(handle, ids, max_tokens=max_tokens, salt=salt, images=images, **options)  # type: ignore[arg-type]


def core_of(*, capacity_tokens: int = 32, unit_tokens: float = 2.0, overlaps: bool = False, **options: int) -> FakeCore:
    return FakeCore(
        eyes=[eyes_of(unit_tokens=unit_tokens)],
        picture_bytes=capacity_tokens * TOKEN_BYTES,
        overlaps=overlaps,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("overlaps", [False, True])
def test_others_decode_while_a_picture_is_encoded(overlaps: bool) -> None:
    core = core_of(overlaps=overlaps, num_pages=100)
    core.add(add_request(1, [1, 2, 3], max_tokens=60))
    core.step()
    core.add(add_pictured(2, [1, 2], (5, (8, 8)), [3, 4]))
    num_steps = 0
    while not core.replies[2].ids:
        before = len(core.replies[1].ids)
        core.step()
        assert len(core.replies[1].ids) == before + 1 or overlaps
        effort = sum(encode.num_units for model in core.plan.models for encode in model.encodes) * 2.0
        assert effort <= 16 / 2 * 1.6  # half of a step; attention over the whole picture makes a unit dearer
        num_steps += effort > 0
    assert num_steps > 3
    core.run()
    core.check_outputs()


def test_a_picture_and_the_text_around_it_take_one_step_where_nobody_decodes() -> None:
    core = core_of(unit_tokens=0.1, max_step_tokens=64)
    core.add(add_pictured(1, [1, 2], (5, (4, 4)), [3], (6, (8, 4)), [3, 4]))
    core.step()
    assert len(core.replies[1].ids) == 1
    core.run()


def test_the_same_picture_is_encoded_once_and_found_in_the_prefix_cache() -> None:
    core = core_of(max_step_tokens=64)
    for handle in (1, 2):  # at once
        core.add(add_pictured(handle, [handle], (5, (8, 8)), [3]))
    core.run()
    assert set(core.runner.num_encoded.values()) == {1}
    core.add(add_pictured(3, [1], (5, (8, 8)), [3, 4, 5]))
    core.run()
    assert core.replies[3].cached_tokens >= 16  # every page that the picture fills, and nothing was encoded
    core.add(add_pictured(4, [1], (6, (8, 8)), [3, 4, 5]))  # another one of its size
    core.run()
    assert core.replies[4].cached_tokens == 0
    core.add(add_pictured(5, [1], (5, (8, 8)), [3, 4, 5], salt=b"another workspace"))
    core.run()
    assert core.replies[5].cached_tokens == 0
    assert sorted(core.runner.num_encoded.values()) == [1, 1, 1]
    core.check_outputs()


def test_what_is_not_done_goes_with_those_who_wanted_it() -> None:
    core = core_of(num_pages=100)
    core.add(add_request(1, [1], max_tokens=30))
    core.add(add_pictured(2, (5, (8, 8)), [3]))
    core.step()
    core.step()
    assert core.pictures is not None
    assert core.pictures.num_bytes > 0
    core.abort(2)
    assert core.pictures.num_bytes == 0
    core.run()
    assert not core.runner.encoded


def test_the_least_recently_held_picture_makes_room() -> None:
    core = core_of(capacity_tokens=20, max_step_tokens=64, num_pages=200)
    for handle, number in enumerate([1, 2, 3, 4, 5, 1, 6, 1]):  # four tokens each: five fit
        core.add(add_pictured(handle, [handle], (number, (4, 4)), [3]))
        core.run()
    assert core.pictures is not None
    assert core.pictures.num_bytes == 20 * TOKEN_BYTES
    assert set(core.runner.num_encoded.values()) == {1}
    core.add(add_pictured(20, [20], (2, (4, 4)), [3]))  # the one that made room for the sixth
    core.run()
    assert sorted(core.runner.num_encoded.values())[-1] == 2


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_pages=st.integers(12, 50),
    tokens_per_page=st.integers(1, 9),
    capacity_tokens=st.sampled_from([10, 16, 20, 40]),  # the largest picture takes 16
    unit_tokens=st.sampled_from([0.05, 1.0, 7.0, 40.0]),
    max_step_tokens=st.integers(1, 40),
    overlaps=st.booleans(),
    probation_rate=st.sampled_from([0.0, 0.3]),
    abort_rate=st.sampled_from([0.0, 0.05]),
)
def test_everybody_ends_and_the_books_balance(
    seed: int,
    num_pages: int,
    tokens_per_page: int,
    capacity_tokens: int,
    unit_tokens: float,
    max_step_tokens: int,
    overlaps: bool,
    probation_rate: float,
    abort_rate: float,
) -> None:
    rng = random.Random(seed)
    core = core_of(
        capacity_tokens=capacity_tokens,
        unit_tokens=unit_tokens,
        overlaps=overlaps,
        num_pages=num_pages,
        max_step_tokens=max_step_tokens,
        tokens_per_page=[tokens_per_page],  # type: ignore[arg-type]
        max_num_running=rng.randint(1, 8),
    )
    grids = [(2, 2), (4, 4), (2, 8), (8, 8), (6, 4)]
    room = (num_pages - 1) * tokens_per_page
    for handle in range(rng.randint(1, 20)):
        parts: list[list[int] | tuple[int, Grid]] = [prompt_of(rng, rng.randint(0, 6))]
        for _ in range(rng.randrange(4)):
            parts += [(rng.randrange(3), rng.choice(grids)), prompt_of(rng, rng.randint(0, 4))]
        message = add_pictured(
            handle,
            *parts,
            [1],
            max_tokens=rng.randint(1, 6),
            tenant=f"tenant {rng.randrange(3)}",
            salt=rng.choice([b"", b"", b"one"]),
            priority=rng.choice(list(Priority)),
            probation=rng.random() < probation_rate,
        )
        if len(message.prompt_ids) // 4 + message.max_tokens > room:
            continue
        core.add(message)
        for _ in range(rng.randrange(4)):
            if core.pipeline.busy:
                core.step()
            if core.scheduler.requests and rng.random() < abort_rate:
                core.abort(rng.choice(list(core.scheduler.requests)))
    core.run(max_steps=20_000)
    core.check_outputs()
    assert all(not request.pictures for request in core.scheduler.requests.values())
