"""Takes what looks like a credential out of a log line: a client may put one anywhere, in a path for one.

The last resort. Nothing here logs a credential on purpose.
"""

from __future__ import annotations

import re

_CREDENTIAL = re.compile(
    r"(?P<key>axp(?:_|%5[Ff])(?:live|test|secret)(?:_|%5[Ff])|whsec(?:_|%5[Ff]))[\w%+/=-]{8,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*",
    re.ASCII,
)
_MARKS = ("axp", "whsec", "eyJ")


def redacted(line: str) -> str:
    """`line` with each API key, secret and access token cut to its prefix."""
    if not any(mark in line for mark in _MARKS):  # nearly all: searching for these costs a fraction of the pattern
        return line
    return _CREDENTIAL.sub(lambda found: f"{found['key'] or 'eyJ'}…", line)
