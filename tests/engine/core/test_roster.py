"""A request's way through a core: it stands in one place at a time, and in its queue while it has prompt left."""

from __future__ import annotations

import pytest
from support.fake_core import add_request

from aiexport_edge.engine.core.ranking import Ranking
from aiexport_edge.engine.core.request import Request, Status, make_request
from aiexport_edge.engine.core.roster import Roster


def arrived(*, probation: bool = False) -> tuple[Ranking, Roster, Request]:
    ranking = Ranking(batch_floor_share=0.0, turn_cost=1.0)
    roster = Roster(ranking)
    request = make_request(add_request(1, list(range(9)), probation=probation), arrival=0)
    roster.add(request)
    return ranking, roster, request


def test_the_whole_way() -> None:
    ranking, roster, request = arrived()
    queue = ranking.queue(request)
    way = [
        (roster.admit, roster.running, True),
        (roster.keep_prefilling, roster.prefilling, True),
        (roster.look, roster.looking, False),
        (roster.resume, roster.prefilling, True),
        (roster.decode, roster.decoding, False),
        (roster.preempt, roster.requests, True),
        (roster.admit, roster.running, True),
        (roster.decode, roster.decoding, False),
        (roster.await_end, roster.ending, False),
    ]
    for move, place, is_queued in way:
        move(request)
        roster.check()
        assert request.handle in place
        assert (queue.head() is request) == is_queued
    roster.remove(request)
    roster.check()
    assert not roster.requests
    assert request.status is Status.FINISHED


@pytest.mark.parametrize(
    "moves", [(), ("admit",), ("admit", "keep_prefilling"), ("admit", "look"), ("admit", "decode")]
)
@pytest.mark.parametrize("probation", [False, True])
def test_a_request_ends_wherever_it_stands(moves: tuple[str, ...], probation: bool) -> None:
    ranking, roster, request = arrived(probation=probation)
    for move in moves:
        getattr(roster, move)(request)
        roster.check()
    roster.remove(request)
    roster.check()
    assert not roster.requests
    assert not roster.running
    assert ranking.queue(request).head() is None
