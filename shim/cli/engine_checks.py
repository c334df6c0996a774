"""`doctor` about engines: that of a `serve` which runs here, and those on other machines with their certificates."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aiexport_edge.proto.config import Config
from aiexport_edge.shim.cli.check import OK, PROBLEM, WARNING, Check
from aiexport_edge.shim.cli.listeners import find_engine_socket
from aiexport_edge.shim.cli.serve_lock import serving

SOON = timedelta(days=14)


def certificates(config: Config) -> Iterator[Check]:
    """Of `[engine]` and of `[shim]`, where there are any: whether they can be read, and for how long they are good."""
    engine, shim = config.engine, config.shim
    named = (
        ("engine certificate", engine.tls_cert, "[engine] tls_cert"),
        ("engine clients' authority", engine.client_ca, "[engine] client_ca"),
        ("engines' authority", shim.engine_ca, "[shim] engine_ca"),
        ("certificate for engines", shim.engine_cert, "[shim] engine_cert"),
    )
    for name, file, key in named:
        if file is not None:
            yield _certificate(name, file, key)


def engines(config: Config) -> Iterator[Check]:
    """That of `serve` where it runs, and those of `[shim] engines`: whether each answers, and whether all have the same
    weights under the same name.
    """
    shim = config.shim
    own = None if serving(config.state) is None else find_engine_socket(config.state)
    targets = (*([] if own is None else [f"unix:{own}"]), *shim.engines)
    if not targets:
        return
    from aiexport_edge.shim.engines.access import AccessError, EngineAccess
    from aiexport_edge.shim.engines.probe import look_at

    access = EngineAccess(shim.engine_ca, shim.engine_cert, shim.engine_key, shim.engine_token_file)
    try:
        access.check()
    except AccessError as error:
        yield Check("engines", PROBLEM, str(error), "correct [shim] in the configuration, or the files it names")
        return
    revisions: dict[str, dict[str, list[str]]] = {}
    for seen in look_at(targets, access):
        if seen.state == "away":
            yield Check(f"engine {seen.address}", PROBLEM, seen.reason, "see its log, then run doctor again")
            continue
        models = ", ".join(
            f"{model.name} {model.state}" + (f" ({model.message})" if model.message else "") for model in seen.models
        )
        status = OK if seen.state == "serving" else WARNING
        remedy = "" if status == OK else "it gets no work meanwhile; see its log"
        yield Check(f"engine {seen.address}", status, f"{seen.state}: {models}", remedy)
        for model in seen.models:
            revisions.setdefault(model.name, {}).setdefault(model.revision, []).append(seen.address)
    for name, found in revisions.items():
        if len(found) > 1:
            detail = "; ".join(f"{revision[:12]} at {', '.join(where)}" for revision, where in found.items())
            remedy = "replies can't go on from one to the other: give all engines the same files and quantization"
            yield Check(f"model {name}", WARNING, f"engines have different weights: {detail}", remedy)


def _certificate(name: str, file: Path, key: str) -> Check:
    from cryptography import x509

    try:
        ends = min(each.not_valid_after_utc for each in x509.load_pem_x509_certificates(file.read_bytes()))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds no certificate in PEM"
        return Check(name, PROBLEM, f"{key} {file} can't be used ({reason})", "correct the path, or the file")
    left = ends - datetime.now(UTC)
    status = PROBLEM if left < timedelta(0) else WARNING if left < SOON else OK
    detail = f"{file} {'has ended' if status == PROBLEM else 'is good until'} {ends:%Y-%m-%d}"
    return Check(name, status, detail, "" if status == OK else "renew it; no restart is needed")
