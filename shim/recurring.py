"""Work on the store that is done in the background again and again, whatever happens to it. Knows no work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

from sqlalchemy.exc import SQLAlchemyError

from aiexport_edge.shim.store.errors import remedy

_RETRY_S = 1.0

log = logging.getLogger(__name__)


async def forever(work: Callable[[], Awaitable[None]], *, pause_s: float, what: str) -> NoReturn:
    """`work` until cancelled, and `pause_s` after each time. `what` it is about, for the log: a store that fails is
    tried again, and named there once.
    """
    failing = False
    while True:
        try:
            await work()
        except SQLAlchemyError as error:
            if not failing:
                log.error("%s wait, the store does not answer: %s", what, remedy(error))
            failing = True
            await asyncio.sleep(_RETRY_S)
        except Exception:
            log.exception("work on %s failed and is tried again", what)
            await asyncio.sleep(_RETRY_S)
        else:
            failing = False
            await asyncio.sleep(pause_s)
