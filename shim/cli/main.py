"""`aiexport-edge`: finds the command, runs it, and turns what went wrong into a sentence and an exit status.

Owns the list of commands. Each command's module is imported when it is asked for, so that `--version` and `--help`
answer at once and nothing but `serve`'s children ever loads what it does not need.

Exit status: 0 done, 1 failed (the reason on stderr), 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from aiexport_edge.shim.cli.command import CommandError, Parser, common_options
from aiexport_edge.shim.cli.ownership import state_keeps_its_owner

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


class _Command(Parser):
    """A command's parser, which gets its options when the command is the one that is run."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fill: Callable[[], None] | None = None

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        fill, self.fill = self.fill, None
        if fill is not None:
            fill()
        return super().parse_known_args(*args, **kwargs)


def build_parser() -> argparse.ArgumentParser:
    """The whole parser. Each command's options are added when it is parsed."""
    parser = Parser(
        prog="aiexport-edge",
        description="The AI Export v2 REST API, served from your own machines.",
        epilog=EPILOG,
        parents=[common_options()],
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="the product's version and the API's")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Command)
    for name, (module, help_text) in COMMANDS.items():
        common: list[Any] = [common_options()]
        sub = commands.add_parser(name, help=help_text, description=help_text, parents=common)
        sub.fill = partial(_add_arguments, module, name, sub)
    return parser


def _add_arguments(module: str, name: str, parser: argparse.ArgumentParser) -> None:
    importlib.import_module(f"aiexport_edge.shim.cli.{module}").add_arguments(name, parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit status. Without `argv` it is the program's own."""
    try:
        _open_standard_streams()
        if argv is None:
            _keep_the_working_directory_out()
        args = build_parser().parse_args(argv)
        with state_keeps_its_owner(args):
            status: int = args.run(args)
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
    """Where the caller has closed one, the next file to be opened would take its number, and be written to; and Python
    has None for it, which `print` takes for stdout. What a terminal's encoding lacks is written as an escape.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(number, True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _keep_the_working_directory_out() -> None:
    """The processes that this one starts as `python -m …` would look for their modules in the working directory first,
    where a user's `queue.py` may lie. Where this one itself was found there (a checkout without an installation) they
    are to look there too.
    """
    with contextlib.suppress(FileNotFoundError):  # a directory that is gone holds nothing
        if sys.path[0] not in ("", os.getcwd()):
            os.environ["PYTHONSAFEPATH"] = "1"


def _drop_output() -> None:
    """What is still buffered for stdout must not raise again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _user_error(error: Exception) -> str | None:
    """The sentence for what a person can put right; None for a bug, which keeps its traceback."""
    from aiexport_edge.proto.config import ConfigError

    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's, of a path with ~
        return "a path begins with a home directory that is not there; write the whole path"
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
