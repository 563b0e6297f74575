"""The device's life against a coordinator in memory: the Transport protocol is the seam, nothing is patched."""

from __future__ import annotations

import asyncio
import hashlib
import io
import random
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from choral import Task, Training
from choral.codecs import decoded, parse
from choral.errors import (
    ChoralError,
    CorruptTransfer,
    NameTaken,
    OutOfSpace,
    ProtocolMismatch,
    TrustError,
    Unreachable,
    UpdateRefused,
)
from choral.messages import (
    Assignment,
    Cancel,
    ComeBack,
    Form,
    FromClient,
    FromCoordinator,
    Heartbeat,
    Hello,
    NewVersion,
    Phase,
    Receipt,
    Status,
    UploadHeader,
    Verdict,
    VersionRef,
    Welcome,
)
from choral.plan import ExamplePlan, Kind, Plan, PrivatePlan
from choral.wire import PROTOCOL_VERSION
from choral_client.agent import Agent
from choral_client.data import Shard
from choral_client.diary import read
from choral_client.transport import Payload
from choral_client.work import Work
from safetensors.torch import save
from structlog.testing import capture_logs
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

PATIENCE_S = 60.0
SHARD = Shard(TensorDataset(torch.ones(2, 1), torch.ones(2, 1)), None, 2)


class AtOnce(random.Random):
    """Leaves no pause between two attempts."""

    def uniform(self, a: float, b: float) -> float:
        return a


class Slowest(random.Random):
    """Would leave an hour between two attempts."""

    def uniform(self, a: float, b: float) -> float:
        return 3600.0


def model(value: float) -> bytes:
    return save({"weight": torch.full((1, 1), float(value)), "bias": torch.zeros(1)})


def version(number: int, content: bytes | None = None) -> VersionRef:
    content = model(number) if content is None else content
    return VersionRef(number, hashlib.sha256(content).digest(), len(content))


def assignment(round: int, number: int = 0, kind: Kind = Kind.TRAINING) -> Assignment:
    training = Training(epochs=1, batch_size=2, learning_rate=0.1)
    return Assignment(f"run/{round}/alice", round, version(number), Plan(kind, "small", "1", training, 0, evaluate=False))


WELCOME = Welcome("run", 3600.0, version(0))
OVER = ComeBack(None, "all rounds completed")


class Stream:
    """One attendance, from the coordinator's side: `tell` the client, and read what it says."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[FromClient] = asyncio.Queue()
        self.closed = asyncio.Event()
        self._outbox: asyncio.Queue[FromCoordinator | ChoralError | None] = asyncio.Queue()

    def tell(self, *messages: FromCoordinator | ChoralError | None) -> None:
        """Send messages; an error breaks the stream with it, None ends it."""
        for message in messages:
            self._outbox.put_nowait(message)

    async def declined(self) -> Status:
        """What the client says when it declines; steps on the way there are passed over."""
        while True:
            said = await self.said.get()
            assert isinstance(said, Status)
            if said.phase is Phase.DECLINED:
                return said

    # The client's side

    async def say(self, message: FromClient) -> None:
        if self.closed.is_set():
            raise Unreachable("the stream has ended")
        self.said.put_nowait(message)

    async def heard(self) -> AsyncIterator[FromCoordinator]:
        while (message := await self._outbox.get()) is not None:
            if isinstance(message, ChoralError):
                raise message
            yield message


class Coordinator:
    """A Transport whose other end is the test. `streams` are the attendances in order, `uploads` what arrived."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[Stream] = asyncio.Queue()
        self.uploads: asyncio.Queue[tuple[UploadHeader, bytes]] = asyncio.Queue()
        self.downloads: list[int] = []
        self.receipts: list[Receipt | ChoralError] = []
        self.resumed: asyncio.Queue[UploadHeader] = asyncio.Queue()
        self.resumptions: list[int | Receipt | ChoralError] = []
        self.attempts = 0
        self.unreachable_for = 0
        self.broken_downloads = 0
        self.unreachable_downloads = 0
        self.checkpoint: Callable[[int], bytes] = model
        self.slow: set[int] = set()  # versions whose download never ends
        self.downloading = asyncio.Event()

    @asynccontextmanager
    async def attend(self, hello: Hello) -> AsyncIterator[Stream]:
        self.attempts += 1
        if self.attempts <= self.unreachable_for:
            raise Unreachable("nobody is there")
        stream = Stream()
        self.streams.put_nowait(stream)
        try:
            yield stream
        finally:
            stream.closed.set()

    async def download(self, version: VersionRef, offset: int, form: Form | None = None) -> AsyncGenerator[bytes, None]:
        self.downloads.append(version.number)
        if self.broken_downloads > 0:
            self.broken_downloads -= 1
            raise CorruptTransfer("a bit fell over")
        if self.unreachable_downloads > 0:
            self.unreachable_downloads -= 1
            raise Unreachable("nobody is there")
        if version.number in self.slow:
            self.downloading.set()
            await asyncio.Event().wait()
        yield self.checkpoint(version.number)[offset:]

    async def upload(self, header: UploadHeader, payload: Payload) -> Receipt:
        self.uploads.put_nowait((header, bytes(payload[:])))
        receipt = self.receipts.pop(0) if self.receipts else Receipt(Verdict.ACCEPTED)
        if isinstance(receipt, ChoralError):
            raise receipt
        return receipt

    async def resume(self, header: UploadHeader) -> int | Receipt:
        self.resumed.put_nowait(header)
        answer = self.resumptions.pop(0) if self.resumptions else 0
        if isinstance(answer, ChoralError):
            raise answer
        return answer


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator()


def agent(coordinator: Coordinator, folder: Path, loss: Any = mse_loss, **options: Any) -> Agent:
    task = Task("small", lambda: nn.Linear(1, 1), loss, load=lambda path: TensorDataset())
    work = Work(task, SHARD)
    hello = Hello(PROTOCOL_VERSION, "alice", "this start", "small", "1", work.manifest, SHARD.size, "a test")
    return Agent(coordinator, hello, work, folder, **{"rng": AtOnce(), **options})


async def living(life: Coroutine[Any, Any, str], script: Callable[[], Coroutine[Any, Any, None]]) -> str:
    """What the agent's life returns, while the script plays the coordinator."""
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        playing = group.create_task(script())
        task = group.create_task(life)
    playing.result()
    return task.result()


async def test_a_life_of_one_round(coordinator: Coordinator, tmp_path: Path) -> None:
    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, assignment(0))
        header, payload = await coordinator.uploads.get()
        assert (header.assignment, header.client, header.examples, header.kind) == ("run/0/alice", "alice", 2, Kind.TRAINING)
        # From w = b = 0, x = y = 1: ∂w = ∂b = −2, the step is 0.2.
        assert payload == torch.tensor([0.2, 0.2]).numpy().tobytes()
        assert header.payload_bytes == 8
        phases = [said.phase for said in iter_now(stream.said) if isinstance(said, Status)]
        assert Phase.DECLINED not in phases
        stream.tell(NewVersion(version(1)), OVER)

    assert await living(agent(coordinator, tmp_path).live(), script) == "all rounds completed"
    assert (tmp_path / "model.safetensors").read_bytes() == model(1)
    assert read(tmp_path)["doing"] == "finished"
    assert coordinator.attempts == 1


def iter_now(queue: asyncio.Queue[FromClient]) -> list[FromClient]:
    return [queue.get_nowait() for _ in range(queue.qsize())]


async def test_it_comes_back_when_nobody_answers(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.unreachable_for = 5

    async def script() -> None:
        (await coordinator.streams.get()).tell(WELCOME, OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    assert coordinator.attempts == 6


@pytest.mark.parametrize("ending", [Unreachable("the link broke"), CorruptTransfer("damaged"), None])
async def test_it_comes_back_when_the_link_breaks(coordinator: Coordinator, tmp_path: Path, ending: ChoralError | None) -> None:
    async def script() -> None:
        (await coordinator.streams.get()).tell(WELCOME, ending)
        (await coordinator.streams.get()).tell(WELCOME, OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    assert coordinator.attempts == 2


async def test_it_comes_back_when_it_is_asked_to(coordinator: Coordinator, tmp_path: Path) -> None:
    async def script() -> None:
        (await coordinator.streams.get()).tell(WELCOME, ComeBack(0.0, "the coordinator restarts"))
        stream = await coordinator.streams.get()
        assert read(tmp_path)["doing"] == "waiting to come back"
        stream.tell(WELCOME, OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    assert coordinator.attempts == 2


async def test_it_waits_as_long_as_it_is_told(coordinator: Coordinator, tmp_path: Path) -> None:
    """The loop's own clock says that no attempt came before the time."""
    times = []

    async def script() -> None:
        (await coordinator.streams.get()).tell(WELCOME, ComeBack(0.25, "too many clients"))
        times.append(asyncio.get_running_loop().time())
        stream = await coordinator.streams.get()
        times.append(asyncio.get_running_loop().time())
        stream.tell(WELCOME, OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    assert times[1] - times[0] >= 0.24


@pytest.mark.parametrize("error", [ProtocolMismatch("the client speaks version 1"), TrustError("not that certificate")])
async def test_it_gives_up_at_once_when_trying_again_cannot_help(
    coordinator: Coordinator, tmp_path: Path, error: ChoralError
) -> None:
    async def script() -> None:
        (await coordinator.streams.get()).tell(error)

    with pytest.raises(ExceptionGroup) as raised:
        await living(agent(coordinator, tmp_path).live(), script)
    assert raised.value.exceptions == (error,)
    assert coordinator.attempts == 1


@pytest.mark.parametrize("error", [Unreachable("nobody is there"), NameTaken("a client named alice attends already")])
async def test_without_a_first_answer_it_gives_up_after_a_while(
    coordinator: Coordinator, tmp_path: Path, error: ChoralError
) -> None:
    async def script() -> None:
        (await coordinator.streams.get()).tell(error)

    with pytest.raises(ExceptionGroup) as raised:
        await living(agent(coordinator, tmp_path, first_contact_s=1e-9).live(), script)
    assert raised.value.exceptions == (error,)


async def test_no_pause_outlasts_the_time_for_a_first_answer(coordinator: Coordinator, tmp_path: Path) -> None:
    async def script() -> None:
        for _ in range(2):
            (await coordinator.streams.get()).tell(Unreachable("nobody is there"))

    with pytest.raises(ExceptionGroup):
        await living(agent(coordinator, tmp_path, first_contact_s=0.1, rng=Slowest()).live(), script)
    assert coordinator.attempts == 2


async def test_once_welcomed_it_tries_for_ever(coordinator: Coordinator, tmp_path: Path) -> None:
    async def script() -> None:
        (await coordinator.streams.get()).tell(WELCOME, None)
        for _ in range(20):
            (await coordinator.streams.get()).tell(NameTaken("its own broken stream is not known to be broken yet"))
        (await coordinator.streams.get()).tell(WELCOME, OVER)

    await living(agent(coordinator, tmp_path, first_contact_s=1e-9).live(), script)
    assert coordinator.attempts == 22


async def test_it_keeps_the_newest_model_from_the_welcome_on(coordinator: Coordinator, tmp_path: Path) -> None:
    async def script() -> None:
        (await coordinator.streams.get()).tell(Welcome("run", 3600.0, version(7)), ComeBack(0.0, "restart"))
        stream = await coordinator.streams.get()
        assert (tmp_path / "model.safetensors").read_bytes() == model(7)
        stream.tell(Welcome("run", 3600.0, version(7)), NewVersion(version(8)), NewVersion(version(9)), OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    assert (tmp_path / "model.safetensors").read_bytes() == model(9)
    assert coordinator.downloads.count(7) == 1  # it held that one already
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "status.json"]


async def test_a_version_that_is_outdated_is_not_fetched_to_the_end(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.slow = {0}

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME)
        await coordinator.downloading.wait()
        stream.tell(*(NewVersion(version(number)) for number in range(1, 9)), OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    assert (tmp_path / "model.safetensors").read_bytes() == model(8)
    assert coordinator.downloads == [0, 8]


async def test_if_it_does_not_follow_it_fetches_only_what_it_works_on(coordinator: Coordinator, tmp_path: Path) -> None:
    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, NewVersion(version(1)), assignment(1, number=2))
        await coordinator.uploads.get()
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path, follow=False).live(), script)
    assert coordinator.downloads == [2]


async def test_a_version_that_cannot_be_fetched_does_not_end_it(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.broken_downloads = 1

    async def script() -> None:
        (await coordinator.streams.get()).tell(WELCOME, ComeBack(0.0, "restart"))
        (await coordinator.streams.get()).tell(WELCOME, OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    assert (tmp_path / "model.safetensors").read_bytes() == model(0)


class Gate:
    """A loss that holds the work thread until it is opened; `begun` counts its batches."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.begun = threading.Semaphore(0)

    def __call__(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.begun.release()
        assert self.open.wait(PATIENCE_S)
        return mse_loss(prediction, target)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=PATIENCE_S)


async def test_work_that_is_withdrawn_sends_nothing(coordinator: Coordinator, tmp_path: Path) -> None:
    gate = Gate()

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, assignment(0))
        await gate.reached()
        stream.tell(Cancel("run/0/alice", "round 0 closed"), assignment(1))
        gate.open.set()
        header, _ = await coordinator.uploads.get()
        assert header.assignment == "run/1/alice"
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path, gate).live(), script)
    assert coordinator.uploads.empty()


async def test_only_the_work_that_is_named_is_withdrawn(coordinator: Coordinator, tmp_path: Path) -> None:
    gate = Gate()

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, assignment(1))
        await gate.reached()
        stream.tell(Cancel("run/0/alice", "round 0 closed"))
        gate.open.set()
        assert (await coordinator.uploads.get())[0].assignment == "run/1/alice"
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path, gate).live(), script)


async def test_work_and_its_end_heard_at_once(coordinator: Coordinator, tmp_path: Path) -> None:
    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME)
        for round in range(20):
            stream.tell(assignment(round), Cancel(f"run/{round}/alice", "closed"))
        stream.tell(assignment(20))
        while (await coordinator.uploads.get())[0].assignment != "run/20/alice":
            pass
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    assert coordinator.attempts == 1


async def test_new_work_takes_the_place_of_the_last(coordinator: Coordinator, tmp_path: Path) -> None:
    gate = Gate()

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, assignment(0))
        await gate.reached()
        stream.tell(assignment(1))
        await working_on(stream, "run/1/alice")
        gate.open.set()
        assert (await coordinator.uploads.get())[0].assignment == "run/1/alice"
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path, gate).live(), script)
    assert coordinator.uploads.empty()


async def working_on(stream: Stream, assignment: str) -> None:
    """Wait for the word that the client works on it."""
    while await stream.said.get() != Status(assignment, Phase.WORKING):
        pass


# Broken links


async def test_work_outlives_the_stream_and_its_result_needs_none(coordinator: Coordinator, tmp_path: Path) -> None:
    gate = Gate()

    async def script() -> None:
        (stream := await coordinator.streams.get()).tell(WELCOME, assignment(0))
        await gate.reached()
        stream.tell(Unreachable("the link broke"))
        again = await coordinator.streams.get()  # not welcomed yet
        gate.open.set()
        assert (await coordinator.uploads.get())[0].assignment == "run/0/alice"
        again.tell(WELCOME, OVER)

    await living(agent(coordinator, tmp_path, gate).live(), script)
    assert not gate.begun.acquire(blocking=False)
    assert coordinator.uploads.empty()


async def test_work_that_is_announced_again_goes_on(coordinator: Coordinator, tmp_path: Path) -> None:
    """A coordinator that has lost the stream, or was restarted, says again what it expects."""
    gate = Gate()

    async def script() -> None:
        (stream := await coordinator.streams.get()).tell(WELCOME, assignment(0))
        await gate.reached()
        stream.tell(Unreachable("the link broke"))
        again = await coordinator.streams.get()
        again.tell(WELCOME, assignment(0))
        await working_on(again, "run/0/alice")
        gate.open.set()
        assert (await coordinator.uploads.get())[0].assignment == "run/0/alice"
        again.tell(OVER)

    await living(agent(coordinator, tmp_path, gate).live(), script)
    assert not gate.begun.acquire(blocking=False)
    assert coordinator.uploads.empty()


async def test_work_withdrawn_and_announced_again_in_one_breath(coordinator: Coordinator, tmp_path: Path) -> None:
    gate = Gate()

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, assignment(0))
        await gate.reached()
        stream.tell(Cancel("run/0/alice", "a mistake"), assignment(0))
        gate.open.set()
        assert (await coordinator.uploads.get())[0].assignment == "run/0/alice"
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path, gate).live(), script)


async def test_work_waits_for_its_version_however_long_the_link_is_broken(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.unreachable_downloads = 20

    async def script() -> None:
        (stream := await coordinator.streams.get()).tell(WELCOME, assignment(0))
        await coordinator.uploads.get()
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path, follow=False).live(), script)
    assert coordinator.downloads == [0] * 21


async def test_the_end_of_the_run_ends_whatever_waits_for_the_link(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.unreachable_downloads = 1_000_000

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, assignment(0))
        assert (await stream.said.get()) == Status("run/0/alice", Phase.DOWNLOADING)
        stream.tell(OVER)

    assert await living(agent(coordinator, tmp_path).live(), script) == "all rounds completed"


# Restarts


UPDATE = torch.tensor([0.2, 0.2]).numpy().tobytes()  # of the first assignment: see the life of one round


async def trained_and_lost_the_link(coordinator: Coordinator, folder: Path) -> None:
    """A life that ends, as with SIGTERM, while its result waits for the link."""
    coordinator.receipts = [Unreachable("the link broke")]
    life = asyncio.create_task(agent(coordinator, folder, rng=Slowest()).live())
    (await coordinator.streams.get()).tell(WELCOME, assignment(0))
    assert await asyncio.wait_for(coordinator.uploads.get(), PATIENCE_S)
    life.cancel()
    with pytest.raises(asyncio.CancelledError):
        await life
    assert len(list((folder / "outbox").iterdir())) == 1


@pytest.mark.parametrize("announced_again", [False, True])
async def test_a_result_outlives_the_client(coordinator: Coordinator, tmp_path: Path, announced_again: bool) -> None:
    await trained_and_lost_the_link(coordinator, tmp_path)
    coordinator.resumptions = [3]

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, *[assignment(0)] * announced_again)
        header, payload = await coordinator.uploads.get()
        assert (header.assignment, header.offset, payload) == ("run/0/alice", 3, UPDATE)
        stream.tell(assignment(1))  # there is a time after that
        assert (await coordinator.uploads.get())[0].assignment == "run/1/alice"
        stream.tell(OVER)

    gate = Gate()
    gate.open.set()
    await living(agent(coordinator, tmp_path, gate).live(), script)
    assert coordinator.resumed.qsize() == 1
    assert gate.begun.acquire(blocking=False)  # by the second assignment
    assert not gate.begun.acquire(blocking=False)
    assert coordinator.downloads == [0]  # the model was still there as well
    assert list((tmp_path / "outbox").iterdir()) == []


@pytest.mark.parametrize("verdict", Verdict)
async def test_a_result_that_is_not_wanted_any_more_is_not_sent(coordinator: Coordinator, tmp_path: Path, verdict: Verdict) -> None:
    await trained_and_lost_the_link(coordinator, tmp_path)
    coordinator.resumptions = [Receipt(verdict, "it was closed meanwhile")]

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME)
        await coordinator.resumed.get()
        stream.tell(OVER)

    with capture_logs() as logs:
        await living(agent(coordinator, tmp_path).live(), script)
    assert coordinator.uploads.empty()
    assert list((tmp_path / "outbox").iterdir()) == []
    (told,) = [entry for entry in logs if entry["event"] == "sent"]
    assert (told["round"], told["verdict"], told["reason"]) == (0, verdict.value, "it was closed meanwhile")


async def test_a_damaged_result_is_worked_out_again_if_it_is_asked_for(coordinator: Coordinator, tmp_path: Path) -> None:
    await trained_and_lost_the_link(coordinator, tmp_path)
    (saved,) = (tmp_path / "outbox").iterdir()
    saved.write_bytes(saved.read_bytes()[:-1] + b"?")

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, assignment(0))
        assert (await coordinator.uploads.get())[1] == UPDATE
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    assert coordinator.resumed.empty()


async def test_a_result_that_is_withdrawn_is_forgotten(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.receipts = [Unreachable("the link broke")]

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, assignment(0))
        await coordinator.uploads.get()  # and now it waits for an hour
        stream.tell(Cancel("run/0/alice", "round 0 closed"), OVER)

    await living(agent(coordinator, tmp_path, rng=Slowest()).live(), script)
    assert list((tmp_path / "outbox").iterdir()) == []
    assert coordinator.resumed.empty()


# Disks


async def test_a_disk_that_takes_no_result_costs_the_round_and_not_the_client(coordinator: Coordinator, tmp_path: Path) -> None:
    (tmp_path / "outbox").write_text("in the way")

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, assignment(0))
        assert (await stream.declined()).reason.startswith(f"the result cannot be kept in {tmp_path / 'outbox'} (Not a directory)")
        (tmp_path / "outbox").unlink()
        stream.tell(assignment(1))
        assert (await coordinator.uploads.get())[0].assignment == "run/1/alice"
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path).live(), script)


async def test_a_disk_that_takes_no_model_costs_the_round_and_not_the_client(coordinator: Coordinator, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, assignment(0))
        assert (await stream.declined()).reason.startswith(f"version 0 cannot be kept in {tmp_path} (Is a directory)")
        (tmp_path / "model.safetensors").rmdir()
        stream.tell(assignment(1))
        assert (await coordinator.uploads.get())[0].assignment == "run/1/alice"
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path).live(), script)


async def test_a_life_that_is_cancelled_ends_whatever_the_work_thread_does(coordinator: Coordinator, tmp_path: Path) -> None:
    gate = Gate()
    life = asyncio.create_task(agent(coordinator, tmp_path, gate).live())
    stream = await coordinator.streams.get()
    stream.tell(WELCOME, assignment(0))
    await gate.reached()
    life.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(life, PATIENCE_S)
    assert stream.closed.is_set()
    gate.open.set()  # only now may the thread go on


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda prediction, target: mse_loss(prediction, target) * float("nan"), "the loss is nan in epoch 1 of 1"),
        (lambda prediction, target: 1 / 0, "task small: training raised ZeroDivisionError: division by zero"),
    ],
)
async def test_it_declines_with_the_reason_and_stays(coordinator: Coordinator, tmp_path: Path, loss: Any, reason: str) -> None:
    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME)
        for round in (0, 1):
            stream.tell(assignment(round))
            said = await stream.declined()
            assert said.assignment == f"run/{round}/alice"
            assert said.reason.startswith(reason)
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path, loss).live(), script)
    assert coordinator.uploads.empty()


async def test_a_checkpoint_of_another_model_is_declined(coordinator: Coordinator, tmp_path: Path) -> None:
    """Whatever goes wrong in the work, the coordinator hears of it."""
    other = save({"something": torch.zeros(3)})
    coordinator.checkpoint = lambda number: other

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, replace(assignment(0), version=version(0, other)))
        assert (await stream.declined()).reason == (
            "the version is of another model than the task installed here: tensor 'bias' is missing where F32 [1] is expected"
        )
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path).live(), script)


async def test_an_upload_that_breaks_is_sent_again(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.receipts = [Unreachable("the link broke"), CorruptTransfer("damaged"), Receipt(Verdict.DUPLICATE, "it had arrived")]

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, assignment(0))
        sent = [await coordinator.uploads.get() for _ in range(3)]
        assert sent[0] == sent[1] == sent[2]
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    assert coordinator.receipts == []


async def test_it_declines_when_the_result_is_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.receipts = [CorruptTransfer("damaged"), UpdateRefused("not that one")]

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, assignment(0))
        assert (await stream.declined()).reason == "not that one"
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    assert list((tmp_path / "outbox").iterdir()) == []


async def test_it_tries_to_send_for_as_long_as_it_lives(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.receipts = [CorruptTransfer("damaged"), Unreachable("gone"), OutOfSpace("the spool is full")] * 10

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, assignment(0))
        for _ in range(31):
            await coordinator.uploads.get()
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    assert coordinator.resumed.qsize() == 30


async def test_it_says_that_it_is_alive(coordinator: Coordinator, tmp_path: Path) -> None:
    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(Welcome("run", 0.01, version(0)))
        for _ in range(3):
            assert await stream.said.get() == Heartbeat()
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path).live(), script)


# Updates that leave something out

TOPK = "topk:0.5"  # one of the model's two elements


def sparse(round: int) -> Assignment:
    return replace(assignment(round), codec=TOPK)


def sent(payload: bytes) -> torch.Tensor:
    codec = parse(TOPK)
    return torch.from_numpy(np.concatenate(list(decoded(io.BytesIO(payload).read, codec, 2))).copy())


WHOLE = torch.tensor([0.2, 0.2])  # of each round's update: all of them start from w = b = 0


def left(folder: Path, name: str = "current") -> torch.Tensor:
    return torch.frombuffer(bytearray((folder / "residual" / name).read_bytes()[-12:-4]), dtype=torch.float32)


async def test_what_an_update_leaves_out_is_added_to_the_next_one_once_it_counts(coordinator: Coordinator, tmp_path: Path) -> None:
    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME)
        arrived = torch.zeros(2)
        for round in range(4):
            stream.tell(sparse(round))
            header, payload = await coordinator.uploads.get()
            assert (header.codec, header.payload_bytes) == (TOPK, len(payload))
            assert (sent(payload) != 0).sum() == 1
            arrived += sent(payload)
            await until(lambda: not (tmp_path / "residual" / "pending").exists())
            assert torch.allclose(arrived + left(tmp_path), (round + 1) * WHOLE)
        assert (arrived > 0).all()  # each of the two had its turn
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path).live(), script)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


@pytest.mark.parametrize("verdict", [Verdict.LATE, Verdict.REFUSED])
async def test_an_update_that_does_not_count_changes_no_residual_but_a_refused_one_ends_it(
    coordinator: Coordinator, tmp_path: Path, verdict: Verdict
) -> None:
    coordinator.receipts = [Receipt(Verdict.ACCEPTED), Receipt(verdict, "so"), Receipt(Verdict.ACCEPTED)]
    payloads = []

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME)
        for round in range(3):
            stream.tell(sparse(round))
            payloads.append((await coordinator.uploads.get())[1])
            await until(lambda: not (tmp_path / "residual" / "pending").exists())
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    first, second, third = payloads
    assert first != second
    assert third == (second if verdict is Verdict.LATE else first)  # from the same residual, or from none again


@pytest.mark.parametrize("saved", [True, False])
async def test_a_client_that_ends_before_the_receipt_sends_the_same_bits(
    coordinator: Coordinator, tmp_path: Path, saved: bool
) -> None:
    """The end comes when the result was saved, or just before: then what it leaves out was."""
    payloads, answering = [], coordinator.upload

    async def upload(header: UploadHeader, payload: memoryview) -> Receipt:
        receipt = await answering(header, payload)
        if header.assignment == "run/1/alice":
            await asyncio.Event().wait()
        return receipt

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, sparse(0))
        payloads.append((await coordinator.uploads.get())[1])
        await until(lambda: not (tmp_path / "residual" / "pending").exists())
        stream.tell(sparse(1))
        payloads.append((await coordinator.uploads.get())[1])
        stream.tell(OVER)

    coordinator.upload = upload  # type: ignore[method-assign]
    await living(agent(coordinator, tmp_path).live(), script)
    coordinator.upload = answering  # type: ignore[method-assign]
    pending = left(tmp_path, "pending")
    if not saved:
        for path in (tmp_path / "outbox").iterdir():
            path.unlink()

    async def again() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, sparse(1))
        payloads.append((await coordinator.uploads.get())[1])
        await until(lambda: not (tmp_path / "residual" / "pending").exists())
        assert torch.equal(left(tmp_path), pending)
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path).live(), again)
    assert payloads[1] == payloads[2] != payloads[0]


async def test_the_next_update_waits_until_it_is_known_what_became_of_the_last(coordinator: Coordinator, tmp_path: Path) -> None:
    """The coordinator has taken it, and the receipt is lost with the link."""
    coordinator.receipts = [Unreachable("the receipt is lost"), Receipt(Verdict.ACCEPTED)]
    coordinator.resumptions = [Receipt(Verdict.DUPLICATE, "this result was accepted before and counts once")]
    payloads = []

    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, sparse(0))
        payloads.append((await coordinator.uploads.get())[1])
        stream.tell(sparse(1))
        payloads.append((await coordinator.uploads.get())[1])
        await until(lambda: not (tmp_path / "residual" / "pending").exists())
        assert torch.allclose(sent(payloads[0]) + sent(payloads[1]) + left(tmp_path), 2 * WHOLE)
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    assert payloads[0] != payloads[1]


@pytest.mark.parametrize("codec", ["gzip", "topk", "int8+brotli"])
async def test_a_codec_that_this_release_does_not_know_is_declined(coordinator: Coordinator, tmp_path: Path, codec: str) -> None:
    async def script() -> None:
        stream = await coordinator.streams.get()
        stream.tell(WELCOME, replace(assignment(0), codec=codec))
        told = await stream.declined()
        assert told.reason == f"codec {codec!r} is unknown to this release: update Choral on this side"
        stream.tell(OVER)

    await living(agent(coordinator, tmp_path).live(), script)
    assert coordinator.uploads.empty()


@pytest.mark.parametrize("noise", [{"private": PrivatePlan(1.0, 1, 1.0)}, {"examples": ExamplePlan(1.0, 1.0, 8.0, 1e-5)}])
def test_what_updates_without_noise_left_out_is_not_sent_with_one_that_has_noise(tmp_path: Path, noise: dict[str, Any]) -> None:
    """Or the next update would carry it, unclipped and beside the noise."""
    made, sparse, plain = agent(Coordinator(), tmp_path), parse("topk:0.5"), assignment(1)
    with made._feedback(plain, sparse) as feedback:
        assert feedback is not None
    with made._feedback(replace(plain, plan=replace(plain.plan, **noise)), sparse) as feedback:
        assert feedback is None
