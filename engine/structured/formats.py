"""The values of `format` that are held to: each as a `pattern` that all its strings match.

Narrower than the RFCs where that is simpler to read back, or where validators are stricter: no leap second, no quoted
mailbox or one at a top-level domain, no percent escape in a URI, no two hyphens in a row in a host's name.
"""

from __future__ import annotations

_DATE = (
    "[12][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = "[a-z0-9](?:-?[a-z0-9]){0,20}"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,4}}"
_DOMAIN = rf"{_LABEL}(?:\.{_LABEL}){{1,4}}"

FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "uuid": "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    "ipv4": rf"^{_BYTE}(?:\.{_BYTE}){{3}}$",
    "hostname": f"^{_HOST}$",
    "email": rf"^[A-Za-z0-9_+-]{{1,32}}(?:\.[A-Za-z0-9_+-]{{1,32}}){{0,3}}@{_DOMAIN}$",
    "uri": rf"^https?://{_HOST}(?:/[A-Za-z0-9._~-]{{0,32}}){{0,8}}(?:\?[A-Za-z0-9._~=&-]{{0,64}})?$",
}
