"""What is read from disks: settings, shards, checkpoints, what is on its way, and backups."""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from choral import config
from choral.address import HostPort
from choral.errors import ConfigError, DataError, Declined, TaskError, TrustError
from choral.messages import Verdict
from choral.plan import Kind, Plan, Training
from choral.table import Table
from choral.wire import header_to_pb
from choral_client import diary
from choral_client.diary import Diary
from choral_client.outbox import _END, _MAGIC, Outbox, Parcel
from choral_client.residual import About, Residual
from choral_client.work import Work
from choral_deploy.client_commands import _config as client_config
from choral_server import history_key
from choral_server.aggregate import WeightedSum
from choral_server.backups.contents import CONTENTS
from choral_server.backups.reading import Backup
from choral_server.backups.restoring import restore
from choral_server.backups.taking import back_up
from choral_server.config import ServerConfig
from choral_server.config import load as load_server_config
from choral_server.database import Database
from choral_server.global_model import GlobalModel
from choral_server.lease import Lease
from choral_server.optimizer_state import OptimizerState
from choral_server.records import EventRecord, RunState
from choral_server.rounds import Part, PartState, Round
from choral_server.schedule import next_due
from choral_server.store import Store
from choral_server.strategies import ServerOptimizer, step
from choral_server.troubles import Troubles
from fuzz import network
from fuzz.house import CONFIG, NOON, TASK, loop
from fuzz.target import Decode, Make, Target, framed, in_file, in_memory, pieces_of
from pydantic import BaseModel
from safetensors.numpy import save as save_numpy
from safetensors.torch import save
from server.home import Here

# Settings


def server_config(path: Path) -> None:
    settings = load_server_config(path)
    _check_settings(settings)
    next_due(settings.run.schedule, NOON, NOON)
    next_due(settings.run.schedule, None, NOON)
    settings.database_url.encode()


def a_client_config(path: Path) -> None:
    settings = client_config(path, {})
    _check_settings(settings)
    settings.folder.exists()
    settings.data.exists()


def _check_settings(settings: BaseModel) -> None:
    """Numbers are such that one can sleep for, or count to, them."""
    for name, value in settings:
        if isinstance(value, BaseModel):
            _check_settings(value)
        elif isinstance(value, float):
            assert math.isfinite(value), f"{name} is {value}"
        elif isinstance(value, int):
            assert abs(value) < 2**63, f"{name} has {value.bit_length()} bits"


SERVER_CONFIG = b"""\
listen: 127.0.0.1:8470
plaintext: true
state: state
task: small:task
run:
  rounds: 20
  cohort_size: 3
  schedule: {cron: "0 3 * * *", time_zone: Europe/Berlin}
  strategy: {name: fedavgm, momentum: 0.9}
  objective: {metric: loss, mode: min}
  training: {learning_rate: 0.01}
evaluation: {test_set: test.csv}
heartbeat_s: 5.0
"""
INTERVAL_CONFIG = b"""\
listen: "[::]:8470"
tls: {certificate: server.pem, key: server.key}
state: /var/lib/choral
database: sqlite:///choral.db
artifacts: s3://bucket/prefix
task: small:task
run: {rounds: 1, cohort_size: 3, quorum: 2, schedule: {interval_s: 60.0}, deadline_s: 1.5, quarantine_after: null}
"""
CLIENT_CONFIG = b"""\
server: coordinator.example:8470
name: alice
task: small:task
data: shard.csv
ca: ca.pem
certificate: alice.pem
key: alice.key
guard: guard.yaml
first_contact_s: 5.0
holdout: 0.2
follow: false
threads: 2
"""
_SERVER = b"listen: 127.0.0.1:0\nplaintext: true\nstate: s\ntask: a:b\n"
_RUN = _SERVER + b"run: {rounds: 1, cohort_size: 1, schedule: {%s}}\n"
_LAUGHS = [b"a0: &a0 {x: 1, y: 2}", *(b"a%d: &a%d {<<: [%s]}" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12))]
CONFIG_HOSTILE = [
    b"run: " + b"[" * 30_000,
    b"run: " + b"{a: " * 10_000,
    b"".join(b" " * depth + b"a:\n" for depth in range(300)),
    b"\n".join(_LAUGHS),
    b"a: &x [*x]",
    b"? [a]\n: b",
    b"? {a: b}\n: b",
    b"run: {rounds: " + b"1" * 5000 + b"}",
    b"run: {rounds: 0x" + b"f" * 5000 + b"}",
    b"run: {rounds: 1" + b":59" * 5000 + b"}",
    *(b"run: " + value for value in (b"2001-99-99", b"!!int ''", b"!!float ''", b"!!timestamp x", b"!!bool x", b"!!binary a")),
    b'state: "\\ud800"',
    b'state: "a\\0b"',
    b"!!python/object/apply:os.system [true]",
    b"x" * 150_000,
    _RUN % b"cron: '0 0 31 2,4,6 *'",
    _RUN % b"cron: '*/999999999 * * * *'",
    _RUN % b"cron: '0 0 * * *', time_zone: ../../../../etc/passwd",
    _RUN % b"interval_s: 1.0e+300",
    _RUN.replace(b"rounds: 1", b"rounds: 99999999999999999999") % b"",
    _RUN % b"" + b"heartbeat_s: .nan\nlease_s: .inf\n",
]
YAML = (b"&a ", b"*a", b"<<: *a", b"!!binary ", b"!!timestamp ", b"!!int ", b"!!float ", b"!!python/object/apply:os.system ", b"? ")
YAML += (b".nan", b".inf", b"1:59:59", b"2001-99-99", b"0x_", b"---\n", b"- ", b"[", b"{", b": ", b"|\n ", b'"\\ud800"', b'"\\0"')


def address(data: bytes) -> None:
    read = HostPort.parse(data.decode())
    assert HostPort.parse(str(read)) == read
    assert isinstance(read.is_loopback, bool)


# Shards


def shard(path: Path) -> None:
    for kind in ("number", "class"):
        x, y = Table(["a", "b"], target="y", kind=kind)(path).tensors  # type: ignore[arg-type]
        assert x.shape == (len(y), 2)
        assert bool(x.isfinite().all())
        assert kind == "number" or int(y.min()) >= 0, f"class {int(y.min())}"


_FRAME = pd.DataFrame({"a": [0.5, 1.5, 2.0], "b": [1, 2, 3], "y": [0, 1, 1]})


def csv_seeds() -> list[bytes]:
    return [_FRAME.to_csv(index=False).encode(), b'"a", "b","y",c\n1,2,0,"x\ny"\n']


def parquet_seeds() -> list[bytes]:
    seeds = []
    for changes in ({}, {"compression": None}, {"compression": "gzip"}):
        buffer = io.BytesIO()
        _FRAME.to_parquet(buffer, **changes)  # type: ignore[call-overload]
        seeds.append(buffer.getvalue())
    return seeds


CSV_HOSTILE = [
    b"a,b,y\n1,2,1e30\n",
    b"a,b,y\n1,2," + b"9" * 5000 + b"\n",
    b"a,b,y\n" + b"1" * 150_000 + b",2,0\n",
    b"x" * 150_000 + b"\n1\n",
    b",".join([b"c"] * 50_000) + b"\n1\n",
    b"a,b,y\n1,\0,0\n",
    b"a,a,b,y\n1,2,3,0\n",
    b'a,b,y\n1,2,"0',
    b"\xff\xfea\0",
    b"a,b,y\ninf,nan,-1\n",
]


def parquet_hostile() -> list[bytes]:
    """Columns that are no numbers, of the same name, or much longer than the file."""
    frames = [
        pa.table({"a": [[1], [2]], "b": [1, 2], "y": [0, 1]}),
        pa.table({"a": [{"x": 1}, {"x": 2}], "b": [1, 2], "y": [0, 1]}),
        pa.table({"a": [b"1", b"2"], "b": [NOON, NOON], "y": ["0", "1"]}),
        pa.table([pa.array([1]), pa.array([1]), pa.array([1]), pa.array([0])], names=["a", "a", "b", "y"]),
        pa.table({"a": [1.0], "b": [1.0], "y": [1e30]}),
        pa.table({name: pa.array(np.zeros(2_000_000)) for name in "aby"}),
    ]
    metadata = {
        b"pandas": b'{"index_columns": [{"kind": "range", "name": null, "start": 0, "stop": 9e9, "step": 0}], "columns": []}'
    }
    frames.append(frames[4].replace_schema_metadata(metadata))
    seeds = []
    for frame in frames:
        buffer = io.BytesIO()
        pq.write_table(frame, buffer, compression="zstd")
        seeds.append(buffer.getvalue())
    return seeds


# Models


@contextmanager
def checkpoint(folder: Path) -> Iterator[Decode]:
    """A version is loaded, and the next one made from it."""
    model, path = GlobalModel(Here(TASK, 0).blueprint), folder / "version"

    def decode(data: bytes) -> None:
        path.write_bytes(data)
        model.load(path)
        model.write_trained(folder / "next", {}, lambda weights, _: weights)

    yield decode


def checkpoint_seeds() -> list[bytes]:
    state = TASK.initial_model(0).state_dict()
    return [save(state, {"choral": json.dumps({"run": "run", "version": 1})}), save(state)]


@contextmanager
def work(folder: Path) -> Iterator[Decode]:
    """A client starts from what it was given, and measures it."""
    from choral_client.data import load_shard

    path = folder / "shard.csv"
    path.write_text(_FRAME.to_csv(index=False))
    working = Work(TASK, load_shard(TASK, path, 0.4))
    plan = Plan(Kind.EVALUATION, TASK.name, TASK.version, Training(), 7, True)
    yield lambda data: _worked(working, plan, data)


def _worked(working: Work, plan: Plan, data: bytes) -> None:
    working.do(plan, io.BytesIO(data), threading.Event())


def _tensors(header: bytes, content: bytes = b"", size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header + content


SAFETENSORS_HOSTILE = [
    b"",
    _tensors(b"{}", size=2**63),
    _tensors(b"{}", size=100_000_001),
    _tensors(b"[" * 20_000),
    _tensors(b'{"x":' * 50_000),
    _tensors(b'{"0.mean":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)),
    _tensors(b'{"0.mean":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', bytes(4)),
    _tensors(b'{"0.mean":{"dtype":"F32","shape":[0,99999999999],"data_offsets":[0,0]}}'),
    _tensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
    _tensors(b'{"velocity":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    _tensors(b'{"velocity":{"dtype":"I64","shape":[5],"data_offsets":[0,40]}}', bytes(40)),
    *(_tensors(b'{"x":{"dtype":"%s","shape":[4],"data_offsets":[0,4]}}' % kind, bytes(4)) for kind in (b"F8_E5M2", b"F8_E8M0")),
    _tensors(b'{"x":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}', bytes(4)),
    _tensors(b'{"x":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}', bytes(4)),
]
SAFETENSORS = (b'"F32"', b'"BF16"', b'"F8_E5M2"', b'"U64"', b'"C64"', b'"F4"', b'"data_offsets":[0,', b'"shape":[', b"__metadata__")


def optimizer(path: Path) -> None:
    """The state behind a version, and the step that is made from it."""
    size = 5
    state = OptimizerState(path, size, "the state").part(0, size)
    zeros = np.zeros(size, np.float32)
    weights, after = step(ServerOptimizer(name="fedavgm"), zeros, zeros.astype(np.float64), state)
    assert weights.shape == after["velocity"].shape == (size,)


def optimizer_seeds() -> list[bytes]:
    return [save_numpy({"velocity": np.arange(5, dtype=np.float32)})]


# On its way


@contextmanager
def outbox(folder: Path) -> Iterator[Decode]:
    """A file in the outbox, whatever is in it; and one that is named as its header says."""
    kept = Outbox(folder / "outbox")

    def decode(data: bytes) -> None:
        for header in (data, _sealed(data)):
            path = kept._path(network.ASSIGNMENT)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(header)
            _look(kept)

    yield decode


def _look(kept: Outbox) -> None:
    for name in [*kept.assignments(), network.ASSIGNMENT]:
        if (loaded := kept.load(name)) is not None:
            parcel, payload = loaded
            assert len(payload) == parcel.header.payload_bytes
            header_to_pb(parcel.header)
            assert isinstance(parcel.round, int)
        kept.remove(name)


@contextmanager
def residual(folder: Path) -> Iterator[Decode]:
    """Either file of the residual, whatever is in it; and one of the right length, whose checksum is right."""
    kept, about = Residual(folder), About("scope", network.ASSIGNMENT, 5)

    def decode(data: bytes) -> None:
        head, body = data[: len(data) // 2], data[len(data) // 2 :]
        whole = b"choral-residual1" + len(head).to_bytes(4, "little") + head + body[:20].ljust(20, b"\0")
        for content in (data, whole + zlib.crc32(whole).to_bytes(4, "little")):
            for name in ("current", "pending"):
                (folder / "residual").mkdir(exist_ok=True)
                (folder / "residual" / name).write_bytes(content)
            kept.settle("another", Verdict.ACCEPTED)
            with kept.feedback(about) as feedback:
                assert sum(block.size for block in feedback.blocks()) == 5
                feedback.keep(np.zeros(5, np.float32))

    yield decode


def residual_seeds() -> list[bytes]:
    about = {"scope": "scope", "assignment": network.ASSIGNMENT, "size": 5}
    with tempfile.TemporaryDirectory() as name:
        kept = Residual(Path(name))
        with kept.feedback(About(**about)) as feedback:  # type: ignore[arg-type]
            feedback.keep(np.arange(5, dtype=np.float32))
        whole = (Path(name) / "residual" / "pending").read_bytes()
    changed = [{"size": 5.0}, {"size": "5"}, {"size": -5}, {"size": True}, {"size": 2**70}, {"scope": []}, {"more": 1}]
    heads = [json.dumps(about | change).encode() for change in ({}, *changed)]
    return [whole, *(head + bytes(len(head)) for head in heads), b"[" * 60_000 + bytes(60_000)]


def _sealed(data: bytes) -> bytes:
    """The header of a result with its right checksum, behind a good payload."""
    return network.payload(Kind.TRAINING) + data + _END.pack(hashlib.sha256(data).digest(), len(data), _MAGIC)


def outbox_seeds() -> list[bytes]:
    content = network.payload(Kind.TRAINING)
    with tempfile.TemporaryDirectory() as folder:
        kept = Outbox(Path(folder) / "outbox")
        kept.save(Parcel(network.header(Kind.TRAINING, content), 3), [content])
        whole = kept._path(network.ASSIGNMENT).read_bytes()
    return [whole, whole[len(content) : -_END.size]]


def outbox_hostile() -> list[bytes]:
    """Headers of other types, in which nothing else is wrong."""
    good = json.loads(outbox_seeds()[1])
    changes: list[dict[str, Any]] = [
        {"assignment": 5},
        {"assignment": "\ud800"},
        {"examples": "10"},
        {"examples": 2**70},
        {"offset": None},
        {"payload_bytes": 20.0},
        {"digest": "zz"},
        {"kind": []},
        {"held_out": [{"name": 1, "value": "x", "examples": None}]},
        {"held_out": [{"name": "loss", "value": 10**400, "examples": 1}]},
        {"more": 1},
    ]
    headers = [json.dumps(good | {"header": good["header"] | change}).encode() for change in changes]
    return [
        *headers,
        json.dumps(good | {"round": "3"}).encode(),
        b"[" * 100_000,
        b'{"header":' * 50_000,
        b"null",
        b"[]",
        b'{"header": []}',
    ]


@contextmanager
def assignment(folder: Path) -> Iterator[Decode]:
    """The name of an assignment, as a coordinator may choose it, becomes the name of a file."""
    kept = Outbox(folder / "outbox")
    content = network.payload(Kind.TRAINING)
    header = network.header(Kind.TRAINING, content)

    def decode(data: bytes) -> None:
        name = data.decode("utf-8", "ignore")  # protobuf lets no half character through
        kept.save(Parcel(replace(header, assignment=name), 3), [content])
        assert kept.assignments() == [name]
        assert kept.load(name) is not None
        kept.remove(name)

    yield decode


@contextmanager
def note(folder: Path) -> Iterator[Decode]:
    def decode(data: bytes) -> None:
        (folder / "status.json").write_bytes(data)
        read = diary.read(folder)
        assert math.isfinite(read["age_s"])
        assert isinstance(read["doing"], str)

    yield decode


def note_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        Diary(Path(folder)).write("attending", round=3)
        return [(Path(folder) / "status.json").read_bytes()]


NOTE_HOSTILE = [
    *(
        b'{"doing": "x", "at": ' + value + b"}"
        for value in (b"null", b'"x"', b"NaN", b"Infinity", b"9" * 4000, b"9" * 5000, b"true")
    ),
    *(b"[" * 100_000, b"{}", b"[]", b"7", b'"at"', b'{"doing": [], "at": 1}'),
]


def accumulated(path: Path) -> None:
    added = WeightedSum(5, 2**20)
    added.load(path)
    assert bool(np.isfinite(added.mean()).all())
    assert all(isinstance(name, str) for name in added.contained)


def accumulator_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "update"
        path.write_bytes(network.payload(Kind.TRAINING))
        added = WeightedSum(5, 2**20)
        added.fold(Part(network.ASSIGNMENT, "alice", examples=10), path)
        added.save(path)
        return [path.read_bytes()]


def accumulator_hostile() -> list[bytes]:
    line, _, content = accumulator_seeds()[0].partition(b"\n")
    good = json.loads(line)
    changes: list[dict[str, Any]] = [
        {"weight": 0},
        {"weight": -1},
        {"weight": "1"},
        {"weight": math.nan},
        {"weight": 10**300},
        {"contained": 1},
        {"contained": [[1]]},
        {"contained": "abc"},
        {"size": []},
    ]
    lines = [json.dumps(good | change).encode() for change in changes]
    lines += [json.dumps({name: value for name, value in good.items() if name != gone}).encode() for gone in good]
    return [*(one + b"\n" + content for one in lines), b'{"a":' * 100_000, b"", b"{}\n", line, line + b"\n"]


# Backups


def restoring(prepare: Callable[[bytes], bytes]) -> Make:
    """Restored into an empty state folder, from which nothing may come out."""

    @contextmanager
    def make(folder: Path) -> Iterator[Decode]:
        file, state = folder / "backup", folder / "state"
        settings = config.parse({**CONFIG, "state": str(state)}, ServerConfig, "server.yaml")
        with loop() as runner:

            def decode(data: bytes) -> None:
                file.write_bytes(prepare(data))
                with Backup.open(file, lambda done, total: None):
                    pass
                try:
                    runner.run(restore(settings, file, NOON))
                finally:
                    there = {path.name for path in folder.iterdir()}
                    shutil.rmtree(state, ignore_errors=True)
                assert there <= {"backup", "state"}, f"{there} beside the state folder"

            yield decode

    return make


@cache
def backup_seed() -> bytes:
    with tempfile.TemporaryDirectory() as folder, loop() as runner:
        return runner.run(_backed_up(Path(folder)))


async def _backed_up(folder: Path) -> bytes:
    from choral_server.artifacts import FolderArtifacts
    from choral_server.checkpoints import Checkpoints
    from choral_server.run import Runs

    settings = config.parse({**CONFIG, "state": str(folder)}, ServerConfig, "server.yaml")
    database, troubles = await Database.open(settings.database_url, Troubles()), Troubles()
    store = await Store.open(database, await Lease.take(database, "here", 60.0), history_key.made(folder))
    artifacts = FolderArtifacts(folder)
    run = await Runs(settings, Here(TASK, 0), store, lambda name: Checkpoints(artifacts, folder, name), troubles).open(NOON)
    part = Part("run/0/alice/0", "alice", PartState.ACCEPTED, examples=10, digest=bytes(32))
    opened = Round("run", 0, Kind.TRAINING, 0, 2, 1, {part.assignment: part, "b": Part("b", "bob")}, NOON)
    await run.save(others=(opened, EventRecord(NOON, "something", "happened", "run")), state=RunState.IN_ROUND)
    await database.close()
    await back_up(settings, folder / "backup", NOON)
    return (folder / "backup").read_bytes()


def backup_rows_seed() -> bytes:
    """The members of a backup, each as two pieces: its name, and what is in it."""
    with tarfile.open(fileobj=io.BytesIO(backup_seed())) as tar:
        members = [(member.name.encode(), tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    return framed([piece for member in members for piece in member])


def backup_of(data: bytes) -> bytes:
    """A tar of these members that agrees with its own list of contents."""
    pieces = pieces_of(data)
    members = [(name.decode("utf-8", "replace"), content) for name, content in zip(pieces[::2], pieces[1::2], strict=False)]
    members = [(name, content) for name, content in members if name != CONTENTS]
    files = {name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in members}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in [*members, (CONTENTS, json.dumps({"files": files, "notes": []}).encode())]:
            member = tarfile.TarInfo(name.replace("\0", ""))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def backup_hostile() -> list[bytes]:
    """Headers that promise what is not there, and members that are no files."""
    good = backup_seed()
    about = good[: 512 * (1 + -(-int(good[124:135], 8) // 512))]
    sparse = tarfile.TarInfo("contents.json")
    sparse.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.realsize": str(2**40),
        "GNU.sparse.name": CONTENTS,
    }
    sparse.size = 512
    mapped = sparse.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n0\n".ljust(512, b"\0")
    kinds = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE):
        member = tarfile.TarInfo(CONTENTS)
        member.type, member.linkname = kind, "/etc/passwd"
        kinds.append(about + member.tobuf())
    promises = []
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE):
        member = tarfile.TarInfo(CONTENTS)
        member.type, member.size = kind, 2**40
        promises += [about + member.tobuf(tarfile.GNU_FORMAT), member.tobuf(tarfile.GNU_FORMAT)]
    nested = tarfile.TarInfo("backup.json")
    nested.size = 100_000
    return [about + mapped, mapped, *kinds, *promises, nested.tobuf() + b"[" * 100_352]


def backup_rows_hostile() -> list[bytes]:
    """Rows that are not what they should be, in a backup that is whole."""
    pieces = pieces_of(backup_rows_seed())
    members = dict(zip(pieces[::2], pieces[1::2], strict=True))
    name = next(name for name in members if name.endswith(b".safetensors"))
    version = json.loads(members[b"tables/versions.jsonl"].splitlines()[0])
    out = "../../escaped"
    escaping = {
        f"runs/{out}/versions/000000.safetensors".encode(): members[name],
        b"tables/versions.jsonl": members[b"tables/versions.jsonl"] + json.dumps(version | {"run": out}).encode() + b"\n",
    }
    hostile: list[dict[bytes, bytes]] = [escaping, {b"tables/runs.jsonl": b"[" * 100_000}, {b"backup.json": b"[]"}]
    for table, column, value in (
        ("runs", "name", ".."),
        ("runs", "name", "x" * 5000),
        ("runs", "state", "none"),
        ("runs", "latest", "0"),
        ("runs", "latest", 2**70),
        ("runs", "started_at", "2025-01-01"),
        ("runs", "best_value", [1]),
        ("runs", "place", None),
        ("rounds", "state", "none"),
        ("rounds", "kind", "none"),
        ("rounds", "run", "another"),
        ("rounds", "duration_s", 10**400),
        ("assignments", "place", {}),
        ("assignments", "state", "none"),
        ("assignments", "round", 7),
        ("assignments", "held_out", [["x", "y", "z"]]),
        ("versions", "number", -1),
        ("versions", "number", True),
        ("versions", "digest", "00"),
        ("events", "id", 5),
    ):
        file = f"tables/{table}.jsonl".encode()
        rows = [json.loads(row) | {column: value} for row in members[file].splitlines()]
        hostile.append({file: b"".join(json.dumps(row).encode() + b"\n" for row in rows)})
    twice = {b"tables/rounds.jsonl": members[b"tables/rounds.jsonl"] * 2}
    return [framed([piece for member in (members | change).items() for piece in member]) for change in [*hostile, twice]]


ROWS: tuple[Any, ...] = (b'"run": "', b"../../../escaped", b'"run": "../../../escaped"', b"null", b"[]", b"{}", b"9" * 30, b'"1"')
TAR = (
    b"ustar\x0000",
    b"ustar  \0",
    b"GNU.sparse.map=0,1",
    b"GNU.sparse.realsize=99999999999",
    b"77777777777",
    b"\x80" + b"\xff" * 11,
)
TARGETS = [
    Target(
        "configuration of a coordinator",
        in_file("server.yaml", server_config),
        lambda: [SERVER_CONFIG, INTERVAL_CONFIG],
        (ConfigError,),
        YAML,
    ),
    Target(
        "configuration of a client",
        in_file("client.yaml", a_client_config),
        lambda: [CLIENT_CONFIG],
        (ConfigError,),
        YAML,
        hostile=lambda: CONFIG_HOSTILE,
    ),
    Target("address", in_memory(address), lambda: [b"10.0.0.5:8470", b"[::1]:8470", b"a.example:1"], (ValueError,)),
    Target(
        "CSV shard",
        in_file("shard.csv", shard),
        csv_seeds,
        (DataError,),
        (b'"', b",", b"\r\n", b"a,a"),
        told=100_000,
        hostile=lambda: CSV_HOSTILE,
    ),
    Target(
        "Parquet shard",
        in_file("shard.parquet", shard),
        parquet_seeds,
        (DataError,),
        told=100_000,
        hostile=parquet_hostile,
        memory_bytes=512 << 20,
    ),
    Target(
        "checkpoint at the coordinator",
        checkpoint,
        checkpoint_seeds,
        (ConfigError,),
        SAFETENSORS,
        hostile=lambda: SAFETENSORS_HOSTILE,
    ),
    Target(
        "checkpoint at a client", work, checkpoint_seeds, (Declined, TaskError), SAFETENSORS, hostile=lambda: SAFETENSORS_HOSTILE
    ),
    Target(
        "state of the optimizer",
        in_file("000001.optimizer.safetensors", optimizer),
        optimizer_seeds,
        (ConfigError,),
        SAFETENSORS,
        hostile=lambda: SAFETENSORS_HOSTILE,
    ),
    Target("file in the outbox", outbox, outbox_seeds, (), (b'"kind": "training"', b'"examples": '), hostile=outbox_hostile),
    Target("residual of a client", residual, residual_seeds, (), (b'"size": ',)),
    Target("name of an assignment", assignment, lambda: [network.ASSIGNMENT.encode(), b"../../x", b""], (Declined,)),
    Target("status of a client", note, note_seeds, (ConfigError,), (b"Infinity", b"NaN", b'"at": '), hostile=lambda: NOTE_HOSTILE),
    Target(
        "sum on the disk",
        in_file("sum", accumulated),
        accumulator_seeds,
        (ValueError,),
        (b'"weight": ', b'"contained": '),
        hostile=accumulator_hostile,
    ),
    Target(
        "backup", restoring(bytes), lambda: [backup_seed()], (ConfigError, TrustError), TAR, examples=25, hostile=backup_hostile
    ),
    Target(
        "rows of a backup",
        restoring(backup_of),
        lambda: [backup_rows_seed()],
        (ConfigError, TrustError),
        ROWS,
        examples=15,
        hostile=backup_rows_hostile,
    ),
]
