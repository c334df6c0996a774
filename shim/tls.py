"""The certificate of the REST listener: TLS 1.2 or newer, and a renewed certificate without a restart."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path
from typing import NoReturn

LOOK_S = 5.0  # between two looks at the files

log = logging.getLogger(__name__)


class CertificateError(Exception):
    """The certificate or key can't be used: a sentence for the operator."""


class Certificate:
    """Owns the context that connections are made with. `run` for as long as it is used."""

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert = cert
        self._key = key
        self._loaded = _versions(cert, key)
        self.context = _context(cert, key)

    async def run(self) -> None:
        """Takes a renewed certificate for new connections, until cancelled; one that can't be used is left alone."""
        while True:
            await asyncio.sleep(LOOK_S)
            found = _versions(self._cert, self._key)
            if found == self._loaded:
                continue
            self._loaded = found
            try:
                _context(self._cert, self._key)  # a pair that does not fit must not leave half of itself behind
                self.context.load_cert_chain(self._cert, self._key)
            except (CertificateError, OSError) as error:
                log.error("the old certificate stays in use: %s", error)
            else:
                log.info("the certificate has been renewed")


def _context(cert: Path, key: Path) -> ssl.SSLContext:
    """Raises `CertificateError`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except OSError as error:  # ssl.SSLError is one
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else error.strerror or error
        raise CertificateError(f"[tls] cert {cert} and key {key} can't be used ({reason}); correct them.") from None
    return context


def _no_password() -> NoReturn:
    raise CertificateError("[tls] key is encrypted; store it without a password, readable by this user alone.")


def _versions(*files: Path) -> list[tuple[int, int]]:
    """What changes when a file does; (0, 0) for one that is not there just now."""
    found = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            found.append((0, 0))
        else:
            found.append((status.st_mtime_ns, status.st_ino))
    return found
