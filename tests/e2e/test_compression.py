"""Updates in fewer bytes: real processes, clients of different abilities, and deaths between two residuals."""

from __future__ import annotations

import hashlib
import io
import signal
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from choral import codecs
from choral.flat import describe
from choral.forms import halved, patched, restored
from choral.v1 import federation_pb2
from choral.wire import manifest_to_pb
from choral_server import failpoints
from e2e import exact
from e2e.federation import Federation
from e2e.scripted import Scripted, hello, pieces, refusal
from e2e.zygote import Zygote
from safetensors.torch import load
from torch import nn

ROUNDS = 4
TOPK = {"compression": {"upload": "topk", "topk_share": 0.2, "zstd": True}}


def parts_of(federation: Federation) -> dict[str, Any]:
    return {part["client"]: part for part in federation.rows("rounds", "show", 0)}


@pytest.mark.parametrize(("name", "payload_bytes"), [("int8", 7), ("bf16", 6)])
def test_each_client_is_asked_for_what_it_can(quick: Federation, name: str, payload_bytes: int) -> None:
    """Bob is of a release that knows of no codec, and carol offers one; alice is a client as it is."""
    run = {"rounds": 1, "cohort_size": 3, "compression": {"upload": name, "zstd": True}}
    coordinator = quick.coordinator(run=run, evaluation={"clients": False}, exit_when_done=False)
    payload = codecs.parse(name).encode(np.array([1, 2, 3], np.float32), codecs.rng_of(0))
    with Scripted(quick, hello("bob")) as bob, Scripted(quick, hello("carol", codecs=[name, "of tomorrow"])) as carol:
        alice = quick.client("alice")
        to_bob, to_carol = bob.hear("assignment"), carol.hear("assignment")
        assert (to_bob.codec, to_carol.codec) == ("float32", name)
        assert bob.upload(bob.header(to_bob.id)).reason == ""
        header = carol.header(to_carol.id, codec=name, payload_bytes=payload_bytes)
        assert carol.upload(header, pieces(payload)).reason == ""
        coordinator.saw("round done")
    parts = parts_of(quick)
    told = {client: (part["codec"], part["payload_bytes"]) for client, part in parts.items()}
    assert told.pop("alice")[0] == f"{name}+zstd"
    assert told == {"bob": ("float32", "12"), "carol": (name, str(payload_bytes))}
    (listed,) = [row for row in quick.rows("rounds", "list") if row["kind"] == "ROUND_KIND_TRAINING"]
    assert sum(int(part["payload_bytes"]) for part in listed["parts"]) == sum(int(part["payload_bytes"]) for part in parts.values())
    assert "Traceback" not in coordinator.stderr + alice.stderr


def test_what_was_not_asked_for_is_refused(quick: Federation) -> None:
    run = {"rounds": 1, "cohort_size": 2, "quorum": 1, "start_with": 2, "compression": {"upload": "int8"}}
    quick.coordinator(run=run, evaluation={"clients": False}, exit_when_done=False)
    with Scripted(quick, hello("bob", codecs=["int8"])) as bob, Scripted(quick, hello("carol", codecs=["int8"])) as carol:
        to_bob, to_carol = bob.hear("assignment"), carol.hear("assignment")
        plain = bob.upload(bob.header(to_bob.id))
        assert plain.reason == "bob sends its result as float32; int8 was asked for"
        infinite = b"\x00\x00\x80\x7f\x01\x02\x03"
        refused = carol.upload(carol.header(to_carol.id, codec="int8", payload_bytes=7), pieces(infinite))
        assert refused.reason.startswith("carol sends no int8 update: a scale that is infinite, undefined or negative")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> dict[str, Any]:
    """What comes out of a run with error feedback when nobody dies."""
    with Federation(tmp_path_factory.mktemp("calm"), zygote=zygote) as federation:
        exact.configure(federation, ROUNDS, run=TOPK)
        everyone = [federation.start_coordinator(), *(exact.start_client(federation, name) for name in exact.CLIENTS)]
        assert [process.code() for process in everyone] == [0, 0, 0]
        assert (federation.folder / "alice" / "client" / "residual" / "current").exists()
        return exact.outcome(federation)


@pytest.mark.parametrize(
    "death", ["upload-spooled#5", "round-closed:after#3", "round-closed:before#3", "version-published:after#4"]
)
def test_the_coordinator_dies_and_no_residual_is_lost_or_sent_twice(quick: Federation, calm: dict[str, Any], death: str) -> None:
    exact.configure(quick, ROUNDS, run=TOPK)
    doomed = quick.start_coordinator(environment={failpoints.VARIABLE: death})
    clients = [exact.start_client(quick, name) for name in exact.CLIENTS]
    assert doomed.code() == -signal.SIGKILL
    again = quick.start_coordinator()
    assert [process.code() for process in (again, *clients)] == [0, 0, 0]
    assert exact.outcome(quick) == calm


@pytest.mark.parametrize("batches", [5, 8])
def test_a_client_dies_at_work_and_starts_again_from_the_same_residual(
    quick: Federation, calm: dict[str, Any], batches: int
) -> None:
    exact.configure(quick, ROUNDS, run=TOPK)
    exact.pace(quick)
    gate = quick.folder / "gate"
    gate.write_text(str(batches))
    coordinator = quick.start_coordinator()
    bob = exact.start_client(quick, "bob")
    doomed = exact.start_client(quick, "alice", gate=gate)
    doomed.saw("at the gate")
    doomed.kill()
    alice = exact.start_client(quick, "alice")
    assert [process.code() for process in (coordinator, alice, bob)] == [0, 0, 0]
    assert exact.outcome(quick) == calm


WIDE_TASK = """
from dataclasses import replace
from torch import nn
import small

task = replace(small.task, name="wide", model=lambda: nn.Sequential(nn.Linear(2, 800), nn.ReLU(), nn.Linear(800, 1)))
"""


def trained(federation: Federation, download: str) -> dict[str, Any]:
    """What comes out of three rounds."""
    task = federation.write_task(WIDE_TASK, "wide")
    run = {"rounds": 3, "training": {"learning_rate": 1e-5}, "compression": {"download": download}}
    coordinator = federation.coordinator(task=task, run=run, evaluation={"clients": False})
    clients = [federation.client(name, task=task) for name in ("alice", "bob")]
    assert [process.code() for process in (coordinator, *clients)] == [0, 0, 0]
    for client in clients:
        assert "fetched whole instead" not in client.stderr
    found = exact.outcome(federation)
    return found | {"files": {name: digest for name, digest in found["files"].items() if not name.endswith(".form")}}


@pytest.fixture
def model_of(quick: Federation) -> Callable[[str], bytes]:
    return lambda name: (quick.folder / name / "client" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> dict[str, Any]:
    """What comes out when versions are fetched as they are."""
    with Federation(tmp_path_factory.mktemp("whole"), zygote=zygote) as federation:
        return trained(federation, "none")


def test_a_delta_changes_no_bit(quick: Federation, whole: dict[str, Any], model_of: Callable[[str], bytes]) -> None:
    assert trained(quick, "delta") == whole
    assert model_of("alice") == model_of("bob") == quick.latest
    (form,) = quick.versions.glob(".*.form")
    assert form.name == ".000003.delta.form"
    assert form.stat().st_size < 0.9 * len(quick.latest)
    base = (quick.versions / "000002.safetensors").read_bytes()
    assert b"".join(patched(io.BytesIO(form.read_bytes()), io.BytesIO(base))) == quick.latest


def test_bf16_is_half_and_what_clients_then_have(
    quick: Federation, whole: dict[str, Any], model_of: Callable[[str], bytes]
) -> None:
    assert trained(quick, "bf16")["files"]["000000.safetensors"] == whole["files"]["000000.safetensors"]
    names = frozenset(load(quick.latest))
    rounded = b"".join(restored(io.BytesIO(b"".join(halved(io.BytesIO(quick.latest), names))), names))
    assert model_of("alice") == model_of("bob") == rounded != quick.latest
    (form,) = quick.versions.glob(".*.form")
    assert form.name == ".000003.bf16.form"
    assert form.stat().st_size < 0.6 * len(quick.latest)


def test_who_knows_of_no_form_fetches_the_version(quick: Federation) -> None:
    task = quick.write_task(WIDE_TASK, "wide")
    quick.coordinator(task=task, run={"compression": {"download": "bf16"}}, exit_when_done=False)
    manifest = manifest_to_pb(describe(nn.Sequential(nn.Linear(2, 800), nn.ReLU(), nn.Linear(800, 1))))
    with Scripted(quick, hello("bob", task="wide", manifest=manifest)) as bob:
        version = bob.hear("welcome").version
        content = b"".join(response.chunk.data for response in bob.download(version.number))
        assert hashlib.sha256(content).digest() == version.digest
        (form,) = version.forms
        assert (form.name, form.size_bytes < version.size_bytes) == ("bf16", True)
        request = federation_pb2.DownloadRequest(version=version.number, form="bf16")
        fetched = b"".join(response.chunk.data for response in bob.stub.Download(request))
        assert len(fetched) == form.size_bytes
        for name in ("delta", "../../../choral", "x" * 5000):
            request = federation_pb2.DownloadRequest(version=version.number, form=name)
            with pytest.raises(grpc.RpcError) as refused:
                list(bob.stub.Download(request))
            assert refusal(refused.value)[1] == "UnknownVersion"
