"""Clients that hang, vanish, or lose their link with a result in hand, and what becomes of their part."""

from __future__ import annotations

import queue
import signal

import grpc
import pytest
from choral.v1 import federation_pb2 as pb
from e2e import exact
from e2e.federation import GATED_TASK, PATIENCE_S, Federation, until
from e2e.scripted import Scripted, delta, hello, refusal
from pieces import pieces
from proxy import Proxy


def test_a_round_waits_for_no_one_who_hangs_if_more_were_asked(quick: Federation) -> None:
    run = {"rounds": 5, "cohort_size": 2, "over_selection": 0.5, "start_with": 3}
    coordinator = quick.coordinator(run=run, evaluation={"clients": False}, heartbeat_s=600.0)
    clients = [quick.client(name) for name in ("alice", "bob")]
    with Scripted(quick, hello("carol")) as carol:  # attends, and does nothing ever
        part = carol.hear("assignment").id
        for number in range(5):
            assert coordinator.saw("round done", round=number)["accepted"] == 2
        assert [process.code() for process in (coordinator, *clients)] == [0, 0, 0]
        late = carol.hear("cancel")
        assert (late.assignment, late.reason) == (part, "round 0 closed: the goal was reached")
    assert not coordinator.events("round abandoned")


def test_a_process_that_is_frozen_is_replaced_by_another(quick: Federation) -> None:
    task = quick.write_task(GATED_TASK, "gated")
    run = {"rounds": 1, "cohort_size": 2, "start_with": 3, "absence_s": 0.1}
    coordinator = quick.coordinator(task=task, run=run, evaluation={"clients": False}, heartbeat_s=0.3)
    gate = {"GATE": quick.folder / "gate"}
    clients = {name: quick.client(name, task=task, environment=gate) for name in ("alice", "bob", "carol")}
    for name in clients:
        coordinator.saw("client attends", client=name)
    until(lambda: bool(quick.rows("rounds", "list")))
    asked = [name for name in clients if name in part_of(quick)]
    assert len(asked) == 2
    frozen, other = asked
    clients[frozen].saw("at the gate")
    clients[frozen].popen.send_signal(signal.SIGSTOP)
    coordinator.saw("client left", client=frozen)  # silent for three heartbeats
    (quick.folder / "gate").touch()
    (spare,) = set(clients) - set(asked)
    assert coordinator.saw("round done", round=0)["accepted"] == 2
    assert coordinator.code() == 0
    for name in (other, spare):
        clients[name].saw("sent", verdict="accepted")


def part_of(federation: Federation) -> set[str]:
    """Who is asked in the first round."""
    (first,) = federation.rows("rounds", "list")
    return {part["client"] for part in first["parts"]}


@pytest.mark.parametrize("how", ["the link breaks", "the client is killed too"])
def test_a_result_that_lost_its_link_is_kept_and_sent(quick: Federation, how: str) -> None:
    exact.configure(quick, rounds=2)
    exact.pace(quick)
    gate = quick.folder / "gate"
    gate.write_text("1")
    with Proxy(int(quick.address.rpartition(":")[2])) as proxy:
        coordinator = quick.start_coordinator()
        alice, bob = exact.start_client(quick, "alice", proxy.address, gate=gate), exact.start_client(quick, "bob")
        alice.saw("at the gate")
        number = alice.events("working")[-1]["round"]
        proxy.refuse()
        gate.unlink()
        alice.saw("upload failed")
        if how == "the client is killed too":
            alice.kill()
            alice = exact.start_client(quick, "alice", proxy.address)
            alice.saw("no link to the coordinator")
        proxy.allow()
        alice.saw("sent", round=number, verdict="accepted")
        assert len(alice.events("working", round=number)) == (1 if how == "the link breaks" else 0)  # not done again
        assert [process.code() for process in (coordinator, alice, bob)] == [0, 0, 0]
    assert not coordinator.events("round abandoned")


def test_a_result_whose_round_is_over_is_told_so(quick: Federation) -> None:
    exact.configure(quick, rounds=3, run={"quorum": 1, "start_with": 2, "deadline_s": 2}, exit_when_done=False)
    exact.pace(quick)
    gate = quick.folder / "gate"
    gate.write_text("1")
    with Proxy(int(quick.address.rpartition(":")[2])) as proxy:
        coordinator = quick.start_coordinator()
        alice = exact.start_client(quick, "alice", proxy.address, gate=gate)
        exact.start_client(quick, "bob")
        alice.saw("at the gate")
        number = alice.events("working")[-1]["round"]
        proxy.refuse()
        coordinator.saw("round done", round=number)
        gate.unlink()
        alice.saw("upload failed")
        proxy.allow()
        sent = alice.saw("sent", round=number)
    assert sent["verdict"] == "late"
    assert sent["reason"].startswith(f"this part was cancelled: round {number} closed")
    assert list((quick.folder / "alice" / "client" / "outbox").iterdir()) == []


def test_an_upload_that_stands_still_is_cut_off_and_goes_on(quick: Federation) -> None:
    run = {"rounds": 1, "cohort_size": 1, "stall_s": 0.2}
    coordinator = quick.coordinator(run=run, evaluation={"clients": False})
    with Scripted(quick, hello("alice")) as alice:
        header = alice.header(alice.hear("assignment").id)
        first, second = pieces(delta(1, 2, 3), 8)
        says: queue.SimpleQueue[pb.UploadRequest | None] = queue.SimpleQueue()
        says.put(pb.UploadRequest(header=header))
        says.put(pb.UploadRequest(chunk=first))
        with pytest.raises(grpc.RpcError) as cut_off:
            alice.stub.Upload(iter(says.get, None), timeout=PATIENCE_S)
        says.put(None)
        told = "nothing of the upload arrived for 0.2 s: send the rest"
        assert refusal(cut_off.value) == (grpc.StatusCode.UNAVAILABLE, "Unreachable", told)
        asked = pb.ResumeUploadRequest(header=header)
        header.offset = alice.stub.ResumeUpload(asked, timeout=PATIENCE_S).offset
        assert header.offset == 8
        rest = [pb.UploadRequest(chunk=second), pb.UploadRequest(trailer=pb.UploadTrailer(chunks=1))]
        assert alice.send([pb.UploadRequest(header=header), *rest]).verdict == pb.VERDICT_ACCEPTED
    assert coordinator.code() == 0
