"""Real databases for tests: a PostgreSQL server of our own, and a fresh database of each kind."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

_numbers = count()
_PATIENCE_S = 120
_ROOM_BYTES = 4 << 30


class Postgres:
    """A PostgreSQL server in a temporary folder, on a port of its own: started on entering, ended and deleted on leaving.

    If it need not be `durable`, it is in memory where there is room, since a database is some hundreds of files and there are
    hundreds of databases, and does not sync: what crashes in tests are processes, and not the machine.
    """

    def __init__(self, durable: bool = True) -> None:
        self._bin = _binaries()
        if self._bin is None:
            raise FileNotFoundError("PostgreSQL's initdb is neither on PATH nor in /usr/lib/postgresql: apt-get install postgresql")
        # short, for the path of its socket, and reachable for another user, which pytest's folders are not
        shared = Path("/dev/shm")
        in_memory = not durable and shared.is_dir() and shutil.disk_usage(shared).free > _ROOM_BYTES
        self._folder = Path(tempfile.mkdtemp(prefix="choral-pg-", dir=shared if in_memory else "/tmp"))
        self._durable = durable
        self._data = self._folder / "data"
        self._port = _free_port()

    def __enter__(self) -> Self:
        try:
            if os.geteuid() == 0:
                shutil.chown(self._folder, _user())
            self._run("initdb", "--auth=trust", "--username=choral", "--encoding=UTF8", "--no-sync", "--locale=C", self._data)
            self.start()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self.running:
                self.stop()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def running(self) -> bool:
        """Whether it has been started, and not been stopped since."""
        return (self._data / "postmaster.pid").exists()

    def start(self) -> None:
        """Start it; returns once it answers."""
        sync = "on" if self._durable else "off"
        options = f"-p {self._port} -k {self._folder} -h 127.0.0.1 -c max_connections=200 -c fsync={sync}"
        log = self._folder / "log"
        try:
            self._control("start", "-l", log, "-o", options)
        except subprocess.CalledProcessError as error:
            error.add_note(log.read_text(encoding="utf-8"))
            raise

    def stop(self, mode: str = "fast") -> None:
        """Stop it: `fast` ends all connections, `immediate` is a crash."""
        self._control("stop", "-m", mode)

    def restart(self) -> None:
        """Stop and start it."""
        self.stop()
        self.start()

    def new_database(self) -> str:
        """The URL of a database in which there is nothing yet."""
        name = f"choral_{os.getpid()}_{next(_numbers)}"
        self._run("createdb", "-h", self._folder, "-p", str(self._port), "-U", "choral", name)
        return f"postgresql://choral@127.0.0.1:{self._port}/{name}"

    def drop(self, url: str) -> None:
        """Delete a database, with whoever is still connected to it."""
        self._run("dropdb", "--force", "-h", self._folder, "-p", str(self._port), "-U", "choral", url.rpartition("/")[2])

    def _control(self, *arguments: str | Path) -> None:
        self._run("pg_ctl", "-D", self._data, "-w", "-t", str(_PATIENCE_S), *arguments)

    def _run(self, program: str, *arguments: str | Path) -> None:
        assert self._bin is not None
        command = [*_as_other_user(), str(self._bin / program), *map(str, arguments)]
        # a file, not a pipe, which the server would inherit and keep open
        with tempfile.TemporaryFile("w+", encoding="utf-8") as told:
            done = subprocess.run(
                command, cwd="/", stdin=subprocess.DEVNULL, stdout=told, stderr=told, timeout=2 * _PATIENCE_S, check=False
            )
            if done.returncode != 0:
                told.seek(0)
                error = subprocess.CalledProcessError(done.returncode, command)
                error.add_note(told.read())
                raise error


@cache
def _binaries() -> Path | None:
    """The folder with initdb and pg_ctl; the newest, if there are several."""
    on_path = shutil.which("initdb")
    if on_path is not None:
        return Path(on_path).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return installed[-1].parent if installed else None


def _user() -> str:
    """Who runs the server in place of root, as whom it refuses to."""
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in known)


def _as_other_user() -> list[str]:
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv"):
        return ["setpriv", f"--reuid={_user()}", f"--regid={_group()}", "--clear-groups"]
    return ["runuser", "-u", _user(), "--"]


def _group() -> int:
    return pwd.getpwnam(_user()).pw_gid


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running server, for the whole session; who stops it starts it again."""
    if _binaries() is None and os.environ.get("CHORAL_REQUIRE_ALL") != "1":
        pytest.skip("PostgreSQL is not installed: no initdb on PATH or in /usr/lib/postgresql")
    with Postgres(durable=False) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database in which there is nothing yet, one of each kind in turn."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'choral.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    url = server.new_database()
    yield url
    server.drop(url)
