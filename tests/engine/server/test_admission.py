"""Places in the queue."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiexport_edge.engine.server.admission import Admission
from aiexport_edge.engine.server.errors import RequestError
from aiexport_edge.proto import engine_pb2 as pb


@given(
    size=st.integers(1, 8),
    share=st.floats(0.01, 1.0),
    events=st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60),
)
def test_never_more_than_the_bounds_and_no_place_is_lost(
    size: int, share: float, events: list[tuple[str, bool]]
) -> None:
    admission, inside = Admission(size, share), {"a": 0, "b": 0, "c": 0}
    places = max(1, int(size * share))
    for tenant, enters in events:
        if enters:
            if inside[tenant] < places and sum(inside.values()) < size:
                admission.enter(tenant)
                inside[tenant] += 1
                continue
            with pytest.raises(RequestError) as raised:
                admission.enter(tenant)
            full = inside[tenant] >= places
            assert raised.value.detail.code == (pb.ERROR_TENANT_QUEUE_FULL if full else pb.ERROR_QUEUE_FULL)
        elif inside[tenant]:
            admission.leave(tenant)
            inside[tenant] -= 1
    for tenant, count in inside.items():
        for _ in range(count):
            admission.leave(tenant)
    for _ in range(min(size, places)):
        admission.enter("a")
    with pytest.raises(RequestError):
        admission.enter("a")


def test_a_tiny_share_is_one_place() -> None:
    admission = Admission(1024, 0.0001)
    admission.enter("a")
    with pytest.raises(RequestError, match="your share"):
        admission.enter("a")
    admission.enter("b")
