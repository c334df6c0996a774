"""A PostgreSQL of the tests' own: a cluster in a temporary folder, reached through a socket there, gone at the end."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg

# Not subprocess's own `user`: it forks, and where gRPC has threads the child may crash before it becomes anything.
_BECOME = """
import os, sys
user, group, *command = sys.argv[1:]
os.setgroups([])
os.setgid(int(group))
os.setuid(int(user))
os.execv(command[0], command)
"""
MISSING = "PostgreSQL's server is not installed: apt-get install postgresql"
_SETTINGS = {
    "listen_addresses": "''",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "shared_buffers": "16MB",
}


def find_program(name: str) -> Path | None:
    """In the path, or where Debian keeps each version's."""
    found = shutil.which(name)
    if found is not None:
        return Path(found)
    versions = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    return max(versions, key=lambda path: float(path.parent.parent.name), default=None)


class PostgresServer:
    """Running from the start of `running_server` to its end; `restart` breaks every connection."""

    def __init__(self, directory: Path, pg_ctl: Path, as_user: tuple[str, ...]) -> None:
        self.directory = directory
        self._pg_ctl = pg_ctl
        self._as_user = as_user
        self._made = 0

    def url(self, database: str, driver: str = "postgresql+asyncpg") -> str:
        return f"{driver}://tests@/{database}?host={self.directory}"

    def new_database(self, template: str = "template1") -> str:
        """Its name."""
        self._made += 1
        name = f"store_{self._made}"
        with psycopg.connect(f"host={self.directory} user=tests dbname=postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")  # type: ignore[arg-type,unused-ignore]
        return name

    def start(self) -> None:
        options = " ".join(f"-c {name}={value}" for name, value in _SETTINGS.items())
        self.control("start", "-o", f"{options} -k {self.directory}", "-l", str(self.directory / "log"))

    def stop(self) -> None:
        self.control("stop", "-m", "immediate")

    def control(self, *words: str) -> None:
        command = [*self._as_user, str(self._pg_ctl), "-w", "-D", str(self.directory / "data"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
        log = self.directory / "log"
        assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")


@contextlib.contextmanager
def running_server() -> Iterator[PostgresServer | None]:
    """None where there is no PostgreSQL here. It runs as another user where the tests run as root, which it refuses."""
    pg_ctl, initdb = find_program("pg_ctl"), find_program("initdb")
    if pg_ctl is None or initdb is None:
        yield None
        return
    directory = Path(tempfile.mkdtemp(prefix="edge-pg-"))
    as_user: tuple[str, ...] = ()
    if os.getuid() == 0:
        names = {entry.pw_name: entry for entry in pwd.getpwall()}
        entry = names.get("postgres") or names["nobody"]
        os.chown(directory, entry.pw_uid, entry.pw_gid)
        as_user = (sys.executable, "-c", _BECOME, str(entry.pw_uid), str(entry.pw_gid))
    directory.chmod(0o755)
    server = PostgresServer(directory, pg_ctl, as_user)
    command = [str(initdb), "-D", str(directory / "data"), "-U", "tests", "-A", "trust", "-E", "UTF8", "--locale=C"]
    try:
        subprocess.run([*as_user, *command, "--no-sync"], check=True, capture_output=True, cwd="/")
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
