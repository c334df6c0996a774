"""What is counted of engines and routing: from the sessions of this process into its metrics, now and then."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from prometheus_client import Counter

from aiexport_edge.shim import metrics
from aiexport_edge.shim.engines.engines import Engines
from aiexport_edge.shim.engines.session import EngineState, Session


class EngineMetrics:
    """Owns what has been counted so far of each number that only grows. `measure` again and again."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._counted: dict[str, int] = {}
        self._of_sessions: WeakKeyDictionary[Session, dict[str, int]] = WeakKeyDictionary()
        self._shown: set[str] = set()

    def measure(self) -> None:
        engines = self._engines
        metrics.ENGINES_CONNECTED.set(sum(session.connected for session in engines.sessions))
        _grow(metrics.RESUMED, engines.num_resumed, self._counted, "resumed")
        _grow(metrics.RETRIED, engines.num_retried, self._counted, "retried")
        for reason, number in engines.routed.items():
            _grow(metrics.ROUTED.labels(reason.value), number, self._counted, reason.value)
        shown = {session.address for session in engines.sessions}
        for address in self._shown - shown:  # no longer one of ours
            for state in EngineState:
                metrics.ENGINE_STATE.labels(address, state.value).set(0)
            metrics.ENGINE_REQUESTS.labels(address).set(0)
        self._shown = shown
        for session in engines.sessions:
            address = session.address
            for state in EngineState:
                metrics.ENGINE_STATE.labels(address, state.value).set(state is session.state)
            metrics.ENGINE_REQUESTS.labels(address).set(len(session.live))
            of_session = self._of_sessions.setdefault(session, {})
            for name, counter, number in (
                ("accepted", metrics.ENGINE_ACCEPTED.labels(address), session.num_accepted),
                ("ejections", metrics.ENGINE_EJECTIONS.labels(address), session.outlier.num_ejections),
                ("prompt", metrics.ENGINE_PROMPT_TOKENS.labels(address, "all"), session.prompt_tokens),
                ("cached", metrics.ENGINE_PROMPT_TOKENS.labels(address, "cached"), session.cached_tokens),
            ):
                _grow(counter, number, of_session, name)


def _grow(counter: Counter, number: int, counted: dict[str, int], name: str) -> None:
    counter.inc(number - counted.get(name, 0))
    counted[name] = number
