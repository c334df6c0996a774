"""`aiexport-edge operator`: the login of the admin listener."""

from __future__ import annotations

import argparse
import getpass
import sys

from aiexport_edge.shim.cli.command import (
    CommandError,
    common_options,
    json_option,
    load_config,
    opened_store,
    print_json,
)

EPILOG = """\
example:
  aiexport-edge operator password
"""

PASSWORD_EPILOG = """\
example:
  aiexport-edge operator password                    asks for it twice
  aiexport-edge operator password < password-file    reads its first line
"""


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    password = actions.add_parser(
        "password",
        help="set the login of the admin listener",
        description=(
            "Sets the login of the admin listener: HTTP Basic, user operator. With it set, the listener asks for it "
            "everywhere; a listener that other machines can reach does not start without one."
        ),
        epilog=PASSWORD_EPILOG,
        parents=[common_options()],
    )
    password.add_argument("--remove", action="store_true", help="remove the login: loopback needs none")
    json_option(password)
    password.set_defaults(run=_password)


def _password(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.auth.operator import USER, hash_password
    from aiexport_edge.shim.store.operator_rows import OperatorLogin

    config = load_config(args)
    password = "" if args.remove else _read_password()
    with opened_store(config) as store:
        login = OperatorLogin(store.database)
        if args.remove:
            login.remove()
        else:
            login.set(hash_password(password))
    if args.json:
        print_json({"user": USER, "password_set": not args.remove})
    elif args.remove:
        print("the admin listener has no login any more; bound beyond loopback it answers nobody")
    else:
        print(f"the admin listener ({config.admin_listen}) asks for user {USER} and this password from now on")
    return 0


def _read_password() -> str:
    """From the terminal twice, else the first line of stdin."""
    from aiexport_edge.shim.auth.operator import MIN_PASSWORD_CHARS

    try:
        if sys.stdin.isatty():
            password = getpass.getpass("New password: ")
            if getpass.getpass("Again: ") != password:
                raise CommandError("the two are not the same; nothing was changed")
        else:
            password = sys.stdin.readline().rstrip("\r\n")
    except EOFError:
        raise CommandError("no password was entered; nothing was changed") from None
    except UnicodeDecodeError:
        raise CommandError("a password must be text in this terminal's encoding; nothing was changed") from None
    if len(password) < MIN_PASSWORD_CHARS:
        raise CommandError(f"a password needs at least {MIN_PASSWORD_CHARS} characters; nothing was changed")
    return password
