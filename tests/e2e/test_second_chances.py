"""What must end nothing for good: suspended machines, coordinators that fail, answers that were lost, results of another run."""

from __future__ import annotations

import queue
import shutil
import signal
import sqlite3

import grpc
import pytest
from choral.v1 import admin_pb2
from choral.v1 import federation_pb2 as pb
from e2e import exact
from e2e.federation import GATED_TASK, PATIENCE_S, Federation, until
from e2e.scripted import Scripted, delta, hello
from pieces import pieces


@pytest.mark.parametrize("who", ["coordinator", "client"])
def test_a_machine_that_was_suspended(quick: Federation, who: str) -> None:
    coordinator = quick.coordinator(run={"rounds": 1, "cohort_size": 3}, heartbeat_s=0.2)
    alice, bob = quick.client("alice"), quick.client("bob")
    for name in ("alice", "bob"):
        coordinator.saw("client attends", client=name)
    quick.identity("somebody")  # while there is somebody to ask
    suspended = coordinator if who == "coordinator" else alice
    suspended.popen.send_signal(signal.SIGSTOP)
    if who == "client":
        coordinator.saw("client left", client="alice")
    else:
        with quick.secure_channel() as channel, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(1.0)  # longer than three heartbeats
    suspended.popen.send_signal(signal.SIGCONT)
    carol = quick.client("carol")
    assert [process.code() for process in (coordinator, alice, bob, carol)] == [0, 0, 0, 0]


def test_clients_of_a_coordinator_that_fails_wait_for_the_next(quick: Federation) -> None:
    exact.configure(quick, rounds=2, schedule=None, run={"schedule": {"interval_s": 3600}})
    coordinator = quick.start_coordinator()
    clients = [exact.start_client(quick, name) for name in exact.CLIENTS]
    coordinator.saw("round done", kind="training")
    with sqlite3.connect(quick.folder / "state" / "choral.db") as database:
        database.execute("CREATE TRIGGER fault BEFORE INSERT ON rounds BEGIN SELECT RAISE(ABORT, 'a fault'); END")
    assert quick.command("rounds", "trigger", "-c", quick.config).code() == 0
    assert coordinator.code() != 0
    assert "Traceback" not in coordinator.stderr
    for client in clients:
        client.saw("sent away", reason="the coordinator restarts")
    with sqlite3.connect(quick.folder / "state" / "choral.db") as database:
        database.execute("DROP TRIGGER fault")
    again = quick.start_coordinator()
    again.saw("coordinator ready")
    for client in exact.CLIENTS:
        again.saw("client attends", client=client)
    assert quick.command("rounds", "trigger", "-c", quick.config).code() == 0
    assert [process.code() for process in (again, *clients)] == [0, 0, 0]


def test_a_result_for_a_former_federation_of_the_same_names_is_not_taken(quick: Federation) -> None:
    task = quick.write_task(GATED_TASK, "gated")
    settings = {"listen": f"127.0.0.1:{exact.free_port()}", "task": task, "evaluation": {"clients": False}}
    first = quick.coordinator(**settings, run={"rounds": 1, "seed": 1})
    gate = quick.folder / "gate"
    alice = quick.client("alice", task=task, environment={"GATE": gate})
    with Scripted(quick, hello("bob", task="gated")) as bob:
        former = bob.hear("assignment").id
        alice.saw("at the gate")
        first.kill()
    gate.touch()
    alice.saw("upload failed")
    alice.kill()
    shutil.rmtree(quick.folder / "state")  # an operator begins anew
    quick.forget()
    coordinator = quick.coordinator(**settings, run={"rounds": 1, "seed": 2})
    with Scripted(quick, hello("bob", task="gated")) as bob, Scripted(quick, hello("alice", task="gated")) as stand_in:
        part = bob.hear("assignment").id
        assert part != former
        stale = bob.upload(bob.header(former))
        assert (stale.verdict, stale.reason) == (
            pb.VERDICT_REFUSED,
            f"assignment {former} is unknown: nobody named bob was asked for it",
        )
        stand_in.hear("assignment")  # so the round is open when alice comes with what she has kept
        stand_in.leave()
        coordinator.saw("client left", client="alice")
        alice = quick.client("alice", task=task)
        alice.saw("sent", verdict="refused")
        alice.saw("sent", verdict="accepted")
        assert len(alice.events("working")) == 1
        assert bob.upload(bob.header(part)).verdict == pb.VERDICT_ACCEPTED
        assert (coordinator.code(), alice.code()) == (0, 0)


def test_stopping_a_run_stops_it_whatever_it_is_about_to_do(quick: Federation) -> None:
    run = {"rounds": 100_000, "cohort_size": 1, "keep_versions": 1}
    coordinator = quick.coordinator(run=run, evaluation={"clients": False}, exit_when_done=False)
    quick.client("alice")
    with quick.admin() as admin:
        for number in range(1, 16):
            coordinator.saw("round done", number)
            stopped = admin.StopRun(admin_pb2.StopRunRequest(), timeout=PATIENCE_S).run
            assert stopped.state == admin_pb2.RUN_STATE_STOPPED
            coordinator.saw("run over", number, state="stopped", reason="stopped by an operator")
            admin.StartRun(admin_pb2.StartRunRequest(rounds=100_000), timeout=PATIENCE_S)


def test_a_whole_upload_whose_receipt_was_lost_is_not_sent_again(quick: Federation) -> None:
    run = {"rounds": 1, "cohort_size": 1}
    doomed = quick.coordinator(
        run=run, evaluation={"clients": False}, listen=f"127.0.0.1:{exact.free_port()}", exit_when_done=False
    )
    doomed.terminate()
    assert doomed.code() == 0
    doomed = quick.start_coordinator(environment={"CHORAL_FAILPOINT": "upload-spooled"})  # whole, and not accepted yet
    doomed.saw("coordinator ready")
    with Scripted(quick, hello("alice")) as alice:
        part = alice.hear("assignment").id
        with pytest.raises(grpc.RpcError):
            alice.upload(alice.header(part))
    assert doomed.code() == -signal.SIGKILL
    stray = quick.folder / "state" / "spool" / "run" / "99" / "alice.0123456789abcdef.upload"
    stray.parent.mkdir()
    stray.write_bytes(b"of a round that nobody goes on with")
    again = quick.start_coordinator()
    again.saw("coordinator ready")
    with Scripted(quick, hello("alice")) as alice:
        assert alice.hear("assignment").id == part
        assert not stray.parent.exists()
        header = alice.header(part)
        header.offset = alice.stub.ResumeUpload(pb.ResumeUploadRequest(header=header), timeout=PATIENCE_S).offset
        assert header.offset == 12  # all of it
        end = pb.UploadRequest(trailer=pb.UploadTrailer(chunks=0))
        assert alice.send([pb.UploadRequest(header=header), end]).verdict == pb.VERDICT_ACCEPTED
    again.saw("round done", accepted=1)


def test_a_version_that_is_damaged_is_not_gone_back_to(quick: Federation) -> None:
    run = {"rounds": 9, "cohort_size": 1, "schedule": {"interval_s": 3600}}
    coordinator = quick.coordinator(run=run, evaluation={"clients": False}, exit_when_done=False)
    quick.client("alice")
    coordinator.saw("round done", round=0)
    path = quick.versions / "000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    refused = quick.command("versions", "rollback", 0, "-c", quick.config)
    assert refused.code() == 2
    assert refused.stderr.startswith("choral: version 0 is damaged (")
    shutil.copy(quick.versions / "000001.safetensors", quick.versions / "000007.safetensors")  # of an attempt that died
    assert "has no version 7" in quick.command("versions", "rollback", 7, "-c", quick.config).stderr
    assert (quick.versions / "latest.safetensors").readlink().name == "000001.safetensors"


def test_a_rollback_that_was_promised_is_kept_though_the_coordinator_dies(quick: Federation) -> None:
    run = {"rounds": 3, "cohort_size": 1, "schedule": {"interval_s": 3600}}
    coordinator = quick.coordinator(run=run, evaluation={"clients": False}, exit_when_done=False)
    with Scripted(quick, hello("alice")) as alice:
        for number in range(2):
            if number:
                assert quick.command("rounds", "trigger", "-c", quick.config).code() == 0
            alice.upload(alice.header(alice.hear("assignment").id))
            coordinator.saw("round done", round=number)
    coordinator.terminate()
    assert coordinator.code() == 0
    doomed = quick.start_coordinator(environment={"CHORAL_FAILPOINT": "version-published:before"})
    doomed.saw("coordinator ready")
    quick.command("versions", "rollback", 0, "-c", quick.config)
    assert doomed.code() == -signal.SIGKILL
    again = quick.start_coordinator()
    again.saw("rolled back", to=0, version=3)
    assert [row["what"] for row in quick.rows("events", "--run", "run")] == [
        "rolled back",
        "rollback asked for",
        "round asked for",
    ]


def test_a_state_folder_that_goes_away_pauses_the_run(quick: Federation) -> None:
    run = {"rounds": 2, "cohort_size": 1, "schedule": {"interval_s": 3600}}
    coordinator = quick.coordinator(run=run, evaluation={"clients": False}, database=f"sqlite:///{quick.folder / 'choral.db'}")
    quick.client("alice")
    coordinator.saw("round done", round=0)
    state, elsewhere = quick.folder / "state", quick.folder / "elsewhere"
    with quick.admin() as admin:
        admin.ListRuns(admin_pb2.ListRunsRequest(), timeout=PATIENCE_S)  # the socket stays connected when its name goes
        state.rename(elsewhere)
        admin.TriggerRound(admin_pb2.TriggerRoundRequest(), timeout=PATIENCE_S)
        trouble = coordinator.saw("in trouble", subject="disk")
        assert trouble["reason"].startswith(f"{state} is gone, or not the folder that it was at the start: put it back")
        elsewhere.rename(state)
        coordinator.saw("trouble over", subject="disk")
    coordinator.saw("round done", round=1)
    assert coordinator.code() == 0


def test_what_strangers_say_is_shown_as_it_is(quick: Federation) -> None:
    coordinator = quick.coordinator(run={"rounds": 1, "cohort_size": 1, "max_abandoned": 1}, exit_when_done=False)
    words = "[/x] [red]\x1b[31m"
    with Scripted(quick, hello("alice", software=words)) as alice:
        part = alice.hear("assignment").id
        alice.say(pb.AttendRequest(status=pb.Status(assignment=part, phase=pb.PHASE_DECLINED, reason=words)))
        coordinator.saw("run over", state="failed")
        for command in (("clients", "list"), ("rounds", "list"), ("rounds", "show", 0), ("events",), ("runs", "list"), ("doctor",)):
            shown = quick.start("shown", *command, "-c", quick.config, environment={"COLUMNS": 400})
            assert shown.code() == (1 if command == ("doctor",) else 0), shown.stderr
            assert "[/x] [red]\ufffd[31m" in shown.stdout
            assert "\x1b" not in shown.stdout


def test_what_strangers_say_is_cut(quick: Federation) -> None:
    coordinator = quick.coordinator(run={"rounds": 1, "cohort_size": 1, "max_abandoned": 1}, evaluation={"clients": False})
    with Scripted(quick, hello("alice", software="s" * 100_000)) as alice:
        part = alice.hear("assignment").id
        alice.say(pb.AttendRequest(status=pb.Status(assignment=part, phase=pb.PHASE_DECLINED, reason="r" * 1_000_000)))
        abandoned = coordinator.saw("round abandoned")
    assert len(abandoned["reason"]) < 1000
    assert coordinator.code() == 1


def test_an_older_attempt_writes_nothing_any_more(quick: Federation) -> None:
    coordinator = quick.coordinator(run={"rounds": 1, "cohort_size": 1}, evaluation={"clients": False})
    with Scripted(quick, hello("alice")) as alice:
        header = alice.header(alice.hear("assignment").id)
        first, second = pieces(delta(1, 2, 3), 8)
        says: queue.SimpleQueue[pb.UploadRequest | None] = queue.SimpleQueue()
        other = pb.UploadHeader()
        other.CopyFrom(header)
        other.digest = bytes(32)  # of other bytes
        says.put(pb.UploadRequest(header=other))
        says.put(pb.UploadRequest(chunk=first))
        old = alice.stub.Upload.future(iter(says.get, None), timeout=PATIENCE_S)
        spool = quick.folder / "state" / "spool"
        until(lambda: any(spool.rglob("*.part")))
        assert alice.upload(header).verdict == pb.VERDICT_ACCEPTED
        says.put(pb.UploadRequest(chunk=second))
        says.put(None)
        assert old.exception(PATIENCE_S) is not None
    assert coordinator.code() == 0
    assert not list(spool.rglob("*"))
