"""Starts `choral` commands quickly: a process that has imported everything forks once for each.

A coordinator or client spends three seconds on importing torch, which tests that start hundreds of them cannot afford. A forked one
is a process of its own as any other: it gets its own command line, environment, folder and streams, and can be killed.
"""

from __future__ import annotations

import array
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_IMPORTED = (
    "torch",
    "pandas",
    "alembic.command",
    "sqlalchemy.ext.asyncio",
    "sqlalchemy.dialects.sqlite.aiosqlite",
    "sqlalchemy.dialects.postgresql.asyncpg",
    "aiosqlite",
    "asyncpg",
    "choral_server.app",
    "choral_server.task_host",
    "choral.evaluation",
    "choral.flat",
    "choral_client.app",
    "choral_deploy.server_commands",
    "choral_deploy.client_commands",
)


class Zygote:
    """The process that forks. `start` gives something with the interface of `subprocess.Popen` that a test needs."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            tests = str(Path(__file__).resolve().parent.parent)
            paths = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))  # a worktree's, before what is installed
            environment = os.environ | {"PYTHONPATH": paths}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "e2e.zygote", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd="/",
            )
        self._socket = ours
        self._asking = threading.Lock()
        self._ended = threading.Condition()
        self._codes: dict[int, int] = {}
        self._started: list[int] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], stdout: int, stderr: int) -> Forked:
        """Run `choral` with these arguments, with these descriptors as its output."""
        request = json.dumps({"arguments": arguments, "folder": str(folder), "environment": dict(environment)}).encode()
        with self._asking, self._ended:
            before = len(self._started)
            rights = array.array("i", [stdout, stderr])
            self._socket.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            self._ended.wait_for(lambda: len(self._started) > before or self._process.poll() is not None)
            return Forked(self, before, self._started[before])

    def code(self, number: int, timeout: float | None) -> int | None:
        """The exit code of the child that was started as this one, as Popen tells it; None: it still runs.

        Not by its process's id: in half an hour of tests the system begins with those anew.
        """
        with self._ended:
            self._ended.wait_for(lambda: number in self._codes, timeout)
            return self._codes.get(number)

    def end(self) -> None:
        """End it; children that still run stay."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        while message := _received(self._socket):
            told: dict[str, Any] = json.loads(message)
            with self._ended:
                if "started" in told:
                    self._started.append(told["started"])
                else:
                    self._codes[told["ended"]] = told["code"]
                self._ended.notify_all()


class Forked:
    """One process that the zygote started."""

    def __init__(self, zygote: Zygote, number: int, pid: int) -> None:
        self._zygote = zygote
        self._number = number
        self.pid = pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self._zygote.code(self._number, 0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises TimeoutExpired."""
        code = self._zygote.code(self._number, timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except OSError:
        return b""


def _serve(connection: socket.socket) -> None:
    for name in _IMPORTED:
        __import__(name)
    told = threading.Lock()

    def tell(**what: int) -> None:
        with told:
            connection.send(json.dumps(what).encode())

    def reap(pid: int, number: int) -> None:
        _, status = os.waitpid(pid, 0)
        tell(ended=number, code=os.waitstatus_to_exitcode(status))

    for number in itertools.count():
        request, rights, _, _ = socket.recv_fds(connection, 1 << 16, 2)
        if not request:
            os._exit(0)
        with told:  # no other thread may hold it in the child
            pid = os.fork()
        if pid == 0:
            connection.close()
            _become(json.loads(request), *rights)
        for descriptor in rights:
            os.close(descriptor)
        tell(started=pid)
        threading.Thread(target=reap, args=(pid, number), daemon=True).start()


def _become(request: dict[str, Any], stdout: int, stderr: int) -> None:
    """Be the command that was asked for, and end."""
    code = 70
    try:
        os.setsid()
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.close(stdout)
        os.close(stderr)
        sys.path.insert(0, request["folder"])
        sys.argv = ["choral", *request["arguments"]]
        _fork_for_the_task()
        from choral_deploy.cli import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Child:
    """A child of this process, with what its parent needs of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None
        self._waiting = threading.Lock()

    def poll(self) -> int | None:
        return self._ended(os.WNOHANG)

    def wait(self) -> int:
        code = self._ended(0)
        assert code is not None
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _ended(self, options: int) -> int | None:
        with self._waiting:
            if self._code is None:
                pid, status = os.waitpid(self.pid, options)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
            return self._code


def _fork_for_the_task() -> None:
    """Let a coordinator's process for the task's code be forked too: the first, which it starts before it has any threads."""
    from choral_server import task_host, task_process

    really = task_process.launch

    def launch(descriptor: int) -> Any:
        task_process.launch = really
        if (pid := os.fork()) != 0:
            return _Child(pid)
        os.closerange(3, descriptor)  # the coordinator's end is among them
        os.closerange(descriptor + 1, 1 << 12)
        try:
            task_host.main(descriptor)
        except SystemExit as error:
            os._exit(error.code if isinstance(error.code, int) else 1)
        finally:
            os._exit(70)

    task_process.launch = launch


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
