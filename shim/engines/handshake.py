"""Why a TLS connection to an engine fails, in words: gRPC says little more than "Socket closed".

Makes one connection of its own, with the same authorities, certificate and name, and says what went wrong.
"""

from __future__ import annotations

import socket
import ssl

from aiexport_edge.proto.units import split_address
from aiexport_edge.shim.engines.access import AccessError, Endpoint, EngineAccess

TIMEOUT_S = 5.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # RFC 9113, 3.4: and empty SETTINGS
# What an engine says of the client's certificate, as alerts of RFC 8446, section 6; OpenSSL's names for them.
_ALERTS = {
    "CERTIFICATE_REQUIRED": "asks for a client certificate; set engine_cert and engine_key in [shim]",
    "CERTIFICATE_EXPIRED": "says that engine_cert has expired; renew it",
    "UNKNOWN_CA": "does not know the authority of engine_cert; have it issued by the engine's client_ca",
    "BAD_CERTIFICATE": "does not take engine_cert; have it issued by the engine's client_ca, for clients",
    "CERTIFICATE_UNKNOWN": "does not take engine_cert; have it issued by the engine's client_ca, and look at its dates",
    "HANDSHAKE_FAILURE": "asks for a client certificate, or takes none of ours; see engine_cert in [shim]",
}


def why_refused(endpoint: Endpoint, access: EngineAccess) -> str | None:
    """A sentence without its subject's address; None where TLS is not what is wrong. Blocks for up to `TIMEOUT_S`."""
    if not access.encrypts(endpoint):
        return None
    try:
        context = access.context()
    except AccessError as error:
        return str(error)
    try:
        raw = socket.create_connection(split_address(endpoint.address), TIMEOUT_S)
    except (OSError, UnicodeError):
        return None  # nobody is there, or the way is blocked: gRPC's own words are right
    with raw:
        try:
            with context.wrap_socket(raw, server_hostname=endpoint.host) as secure:
                secure.sendall(_PREFACE)
                if not secure.recv(1):  # TLS 1.3 tells what it thinks of a client's certificate only here
                    return _of_client(access)
        except ssl.SSLCertVerificationError as error:
            return _of_engine(error, endpoint)
        except ssl.SSLError as error:
            return _of_alert(error.reason or "")
        except TimeoutError:
            return None
        except OSError:
            return _of_client(access)
    return None


def _of_engine(error: ssl.SSLCertVerificationError, endpoint: Endpoint) -> str:
    reason = error.verify_message.rstrip(".")
    if "expired" in reason or "not yet valid" in reason:
        return f"its certificate can't be trusted ({reason}); renew [engine] tls_cert there, or set the clock here"
    if "mismatch" in reason.lower() or "not valid for" in reason:
        return f"its certificate is for another name ({reason}); have one issued that names {endpoint.host}"
    return f"its certificate can't be trusted ({reason}); set [shim] engine_ca to the authority that issued it"


def _of_client(access: EngineAccess) -> str:
    if access.cert is None:
        return "it closes the connection: it may ask for a client certificate; set engine_cert and engine_key in [shim]"
    return "it closes the connection: it does not take engine_cert; look at its dates and who issued it"


def _of_alert(reason: str) -> str:
    for name, words in _ALERTS.items():
        if name in reason:
            return f"it {words}"
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return "it does not speak TLS there; set tls_cert and tls_key in its [engine]"
    return f"no TLS connection is made ({reason or 'no reason given'})"
