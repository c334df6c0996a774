"""`aiexport-edge`: finds the command, runs it, and turns what went wrong into a sentence and an exit status.

Owns the list of commands. Each command's module is imported when it is asked for, so that `--version` and `--help`
answer at once and nothing but `serve`'s children ever loads what it does not need.

Exit status: 0 done, 1 failed (the reason on stderr), 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from aiexport_edge.shim.cli.command import CommandError, Parser, common_options

_FULL = (errno.ENOSPC, errno.EDQUOT)

# name: (module under aiexport_edge.shim.cli, help)
COMMANDS = {
    "serve": ("serve", "engine and shim on this machine, supervised"),
    "engine": ("processes", "the gRPC engine alone"),
    "shim": ("processes", "the REST front alone"),
    "workspaces": ("workspaces", "make, list and change workspaces"),
    "keys": ("keys", "make, list, rotate and revoke API keys"),
    "oauth-clients": ("oauth_clients", "programs that get OAuth tokens"),
    "signing-keys": ("crypto_keys", "the keys that sign OAuth tokens"),
    "master-key": ("crypto_keys", "the key that the store's secrets are encrypted under"),
    "operator": ("operator_login", "the login of the admin listener"),
    "adapters": ("adapters", "the workspaces' fine-tuned models: add, list, remove"),
    "models": ("models", "list the models, check that their files are complete, import one"),
    "usage": ("usage", "what workspaces have used, by model, key or day"),
    "batches": ("batches", "list, show, cancel and delete batches"),
    "webhooks": ("webhooks", "secrets and deliveries of webhooks"),
    "config": ("settings", "check the configuration file, show the settings that hold"),
    "bench": ("bench", "how fast this installation is, and what its machine can do"),
    "compare": ("compare", "replay requests at two servers and show where their replies differ in shape"),
    "status": ("status", "whether the service answers, and how each engine is"),
    "doctor": ("doctor", "what is wrong with this installation, and what to do"),
}

EPILOG = """\
example:
  aiexport-edge serve                  then paste the curl line that it prints
  aiexport-edge COMMAND --help         what a command takes, with an example
"""


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from aiexport_edge.proto.version import API_VERSION, product_version

        print(f"aiexport-edge {product_version()} (API {API_VERSION})")
        parser.exit()


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The whole parser, with the options of `command` alone filled in."""
    parser = Parser(
        prog="aiexport-edge",
        description="The AI Export v2 REST API, served from your own machines.",
        epilog=EPILOG,
        parents=[common_options()],
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="the product's version and the API's")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name, (module, help_text) in COMMANDS.items():
        sub = commands.add_parser(name, help=help_text, description=help_text, parents=[common_options()])
        if name == command:
            importlib.import_module(f"aiexport_edge.shim.cli.{module}").add_arguments(name, sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit status."""
    _open_standard_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(next((word for word in words if word in COMMANDS), None)).parse_args(words)
    try:
        status: int = args.run(args)
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
        return status
    except CommandError as error:
        return _fail(str(error))
    except BrokenPipeError:
        _drop_output()  # whoever read it has left
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        sentence = _user_error(error)
        if sentence is None:
            raise
        if isinstance(error, OSError) and error.errno in _FULL:
            _drop_output()
        return _fail(sentence)


def _open_standard_streams() -> None:
    """Where the caller has closed one, the next file to be opened would take its number, and be written to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one


def _drop_output() -> None:
    """What is still buffered for stdout must not raise again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _user_error(error: Exception) -> str | None:
    """The sentence for what a person can put right; None for a bug, which keeps its traceback."""
    from aiexport_edge.proto.config import ConfigError

    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: {error.strerror}; run as the user who owns it, or name another place"
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{error.filename or 'the output'} cannot be written: {error.strerror}; make room, or write elsewhere"
    return None


def _fail(sentence: str) -> int:
    print(f"aiexport-edge: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
