"""What a check of `doctor` finds: a value."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `remedy` is empty where there is nothing to do."""

    name: str
    status: str
    detail: str
    remedy: str = ""
