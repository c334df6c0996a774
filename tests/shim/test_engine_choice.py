"""Whatever states engines are in: who is chosen can serve and is fit, and a request is placed if any can take it."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.engines.engines import Engines
from aiexport_edge.shim.engines.generation import Generation
from aiexport_edge.shim.engines.outliers import MAX_FAILURES, Fitness
from aiexport_edge.shim.engines.routing import Policy
from aiexport_edge.shim.engines.session import EngineState, Session

TEXT = "The tide tables of a small harbour, for everyone who asks. " * 10


@dataclass(frozen=True)
class Drawn:
    """One engine's condition."""

    connected: bool
    draining: bool
    leaving: bool
    serving: bool
    ejected: bool
    full: bool
    ready: bool
    revision: str
    others: int

    @property
    def can(self) -> bool:
        return self.connected and self.serving and self.ready and not (self.draining or self.leaving)


MOSTLY = st.sampled_from([True, True, True, False])
RARELY = MOSTLY.map(lambda value: not value)
DRAWN = st.builds(
    Drawn,
    connected=MOSTLY,
    draining=RARELY,
    leaving=RARELY,
    serving=MOSTLY,
    ejected=st.booleans(),
    full=RARELY,
    ready=MOSTLY,
    revision=st.sampled_from(["r1", "r2"]),
    others=st.integers(0, 20),
)


def put(session: Session, drawn: Drawn, memory: int) -> None:
    session.connected, session.draining, session.leaving = drawn.connected, drawn.draining, drawn.leaving
    vitals = session.vitals
    vitals.serving, vitals.memory, vitals.others = drawn.serving, memory, drawn.others
    state = pb.MODEL_READY if drawn.ready else pb.MODEL_LOADING
    vitals.models = {"m": pb.ModelInfo(name="m", state=state, revision=drawn.revision)}
    if drawn.ejected:
        for _ in range(MAX_FAILURES):
            session.outlier.failed(on_trial=session.outlier.sent())
    if drawn.full:
        session.outlier.full(5.0)


def generation(number: int, priority: pb.Priority) -> Generation:
    message = pb.Message(role=pb.ROLE_USER, content=[pb.ContentBlock(text=f"{number} {TEXT}")])
    return Generation(pb.GenerateRequest(model="m", chat=pb.Chat(messages=[message]), priority=priority))


@given(
    st.lists(DRAWN, min_size=1, max_size=6),
    st.sampled_from(Policy),
    st.sampled_from([pb.PRIORITY_INTERACTIVE, pb.PRIORITY_BATCH]),
    st.sampled_from([None, "r1", "r2"]),
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
)
def test_who_is_chosen(
    conditions: list[Drawn], policy: Policy, priority: pb.Priority, revision: str | None, asked: list[int]
) -> None:
    engines = Engines([f"10.0.0.{index}:1" for index in range(len(conditions))], client="test", policy=policy)
    for number, (session, drawn) in enumerate(zip(engines.sessions, conditions, strict=True)):
        put(session, drawn, number)
    for number in asked:
        wanted = generation(number, priority)
        found = engines._trail(wanted)
        tried: set[Session] = set()
        able = {
            session
            for session, drawn in zip(engines.sessions, conditions, strict=True)
            if drawn.can and revision in (None, drawn.revision)
        }
        while (chosen := engines._pick(wanted, found, tried, revision)) is not None:
            left = able - tried
            assert chosen in left
            fit = {session for session in left if session.outlier.fitness is Fitness.HEALTHY}
            if fit:
                assert chosen in fit
            room = {session for session in fit if not session.outlier.is_full}
            if room:
                assert chosen in room
                assert chosen.state is EngineState.SERVING
            engines._router.placed(found, chosen.vitals.memory)
            tried.add(chosen)
        assert tried == able, "each that can is asked, once"
