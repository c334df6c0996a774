"""How much of the vision towers' work a step does, and on whose pictures.

A prefill that comes to a picture which is not encoded looks at it: the vision tower works in units, each step does some
of them beside the prefills of others, and shares them among all that look. So no picture holds up a decode for longer
than a part of a step, and its tokens are cut into chunks like any others.

Owns that share. Which pictures there are, and what is done of each, is `pictures.py`'s; knows no pages and no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

from aiexport_edge.engine.core.fairness import INPUT_COST
from aiexport_edge.engine.core.pictures import Pictures
from aiexport_edge.engine.core.plan import Encode
from aiexport_edge.engine.core.ranking import Ranking
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.core.roster import Roster


class VisionWork:
    """Costs are in tokens of the decoder."""

    def __init__(self, pictures: Pictures, *, ranking: Ranking, roster: Roster) -> None:
        self._pictures = pictures
        self._ranking = ranking
        self._roster = roster

    def share(self, effort: float, encodes: list[Encode]) -> Iterator[Request]:
        """Plan work that costs about `effort` on the pictures of all that look, the same for each as far as units go,
        the most deserving first, into `encodes`.

        Yields each that has seen, for the caller to send on: one that comes to look again has the rest of its share.
        """
        looking = sorted(self._roster.looking.values(), key=self._ranking.rank)
        for index, request in enumerate(looking):
            share = effort / (len(looking) - index)
            while request.handle in self._roster.looking:
                has_seen, cost = self.look(request, share, encodes)
                share -= cost
                effort -= cost
                if not has_seen:
                    break
                self._roster.resume(request)
                yield request

    def look(self, request: Request, effort: float, encodes: list[Encode]) -> tuple[bool, float]:
        """Plan work on the picture that keeps the request waiting, as far as `effort` goes; one unit is always planned
        where a step has none yet. Returns whether it has been seen then, and what the work costs."""
        index, picture = request.looking_at, self._pictures.looked_at(request)
        if picture is None or picture.is_ready:
            return picture is not None, 0.0
        num_units = max(int(effort / picture.unit_cost), 0 if encodes else 1)
        if not num_units:
            return False, 0.0
        num_units = min(num_units, picture.num_units - picture.num_done)
        cost = num_units * picture.unit_cost
        if request.num_charged_tokens <= request.spans[index].start:
            self._ranking.charge(request, INPUT_COST * cost)
        encodes.append(Encode(request, index, picture.key, num_units))
        self._pictures.advance(picture, num_units)
        return picture.is_ready, cost
