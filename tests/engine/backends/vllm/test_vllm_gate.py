"""The order before vLLM: classes, tenants, places, suspects; by example and by property."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from aiexport_edge.engine.backends.vllm.gate import Gate, Move
from aiexport_edge.engine.core.protocol import AddRequest, Priority, Sampling, pack_ids
from aiexport_edge.engine.core.request import Request, make_request

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH


def make(
    handle: int, *, tenant: str = "t", priority: Priority = INTERACTIVE, probation: bool = False, weight: float = 1.0
) -> Request:
    message = AddRequest(
        handle=handle,
        model=0,
        prompt_ids=pack_ids([1] * 10),
        output_ids=b"",
        max_tokens=1000,
        stop_ids=[],
        sampling=Sampling(0.0, 1.0, 0, 0),
        tenant=tenant,
        weight=weight,
        salt=b"",
        priority=priority,
        probation=probation,
    )
    return make_request(message, arrival=handle)


def gate(*, places: int = 4, share: float = 0.05) -> Gate:
    return Gate(max_num_running=places, batch_floor_share=share)


def moves(of: Gate) -> list[Move]:
    made = []
    while (move := of.next()) is not None:
        made.append(move)
    return made


def handles(made: list[Move]) -> list[int]:
    assert not any(move.back for move in made)
    return [move.request.handle for move in made]


def test_no_more_than_there_are_places_and_the_first_come_first() -> None:
    queue = gate(places=2)
    requests = [make(handle) for handle in range(4)]
    for request in requests:
        queue.add(request)
    assert handles(moves(queue)) == [0, 1]
    assert queue.num_waiting == 2
    queue.remove(requests[0])
    assert handles(moves(queue)) == [2]
    queue.remove(requests[3])
    queue.remove(requests[1])
    assert moves(queue) == []
    assert (len(queue.running), queue.num_waiting) == (1, 0)


def test_tenants_take_turns_by_what_they_were_served() -> None:
    """A tenant that has sent a hundred requests does not keep another waiting that sends one."""
    queue = gate(places=1)
    many = [make(handle, tenant="many") for handle in range(100)]
    for request in many:
        queue.add(request)
    assert handles(moves(queue)) == [0]
    queue.charge(many[0], 50)
    queue.add(make(200, tenant="one"))
    queue.remove(many[0])
    first = handles(moves(queue))
    queue.charge(queue.running[first[0]], 50)
    queue.remove(queue.running[first[0]])
    assert 200 in first + handles(moves(queue))


def test_interactive_goes_first_and_takes_the_place_of_the_last_batch_request() -> None:
    queue = gate(places=2)
    for handle in (0, 1):
        queue.add(make(handle, priority=BATCH))
    assert handles(moves(queue)) == [0, 1]
    queue.add(make(2))
    assert [(move.request.handle, move.back) for move in moves(queue)] == [(1, True), (2, False)]
    assert set(queue.running) == {0, 2}
    assert queue.num_preemptions == 1
    queue.remove(queue.running[2])
    assert handles(moves(queue)) == [1]


def test_batch_keeps_a_share_while_interactive_requests_would_take_everything() -> None:
    queue = gate(places=2, share=0.1)
    batch = make(0, priority=BATCH)
    queue.add(batch)
    served: Counter[Priority] = Counter()
    next_handle = 1
    for _ in range(2000):
        while sum(request.priority is INTERACTIVE for request in queue.running.values()) + queue.num_waiting < 6:
            queue.add(make(next_handle))
            next_handle += 1
        moves(queue)
        for request in list(queue.running.values()):
            queue.charge(request, 20)
            served[request.priority] += 20
            if request is not batch:
                queue.remove(request)
    assert served[BATCH] / served.total() > 0.05


def test_suspects_are_handed_over_one_by_one_before_all_others() -> None:
    queue = gate(places=4)
    suspects = [make(1, probation=True), make(2, probation=True)]
    for request in (make(0), *suspects):
        queue.add(request)
    assert handles(moves(queue)) == [1]
    suspects[0].probation = False  # it has had a token
    assert handles(moves(queue)) == [2]
    queue.remove(suspects[1])
    assert handles(moves(queue)) == [0]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_comes_and_goes_the_books_balance_and_nobody_waits_for_ever(data: st.DataObject) -> None:
    places = data.draw(st.integers(1, 4))
    queue = gate(places=places)
    alive: dict[int, Request] = {}
    for handle in range(data.draw(st.integers(1, 25))):
        request = make(
            handle,
            tenant=data.draw(st.sampled_from("ab")),
            priority=data.draw(st.sampled_from(Priority)),
            probation=data.draw(st.booleans()),
            weight=data.draw(st.sampled_from([0.5, 1.0, 4.0])),
        )
        alive[handle] = request
        queue.add(request)
        moves(queue)
        if data.draw(st.booleans()):
            gone = alive.pop(data.draw(st.sampled_from(sorted(alive))))
            queue.remove(gone)
        assert len(queue.running) <= places
        assert len(queue.running) + queue.num_waiting == len(alive)
        assert set(queue.running) <= set(alive)
    for _ in range(2 * len(alive) + 2):
        moves(queue)
        assert queue.running or not alive, "there is a place, and somebody waits"
        for request in list(queue.running.values()):
            request.probation = False
            queue.charge(request, 5)
            queue.remove(request)
            del alive[request.handle]
    assert not alive
