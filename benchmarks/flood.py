"""What strangers and a hostile member can do to running rounds: a flood of connections, then malformed streams, while others train.

    python benchmarks/flood.py [--connections 10000] [--streams 1000] [--clients 2] [--rounds 200] [--train-ms 0] [--json]

A coordinator and its clients run rounds. From another process come, as fast as it can,

    connections  nobody's, without a certificate, half of them at the members' port and half where tokens are taken: some are
                 silent, some talk nonsense, some begin a TLS handshake and show nothing
    streams      malformed calls of one enrolled client: nonsense for messages, messages in the wrong order, too long a message, too
                 much metadata, streams that never say anything, frames that are not HTTP/2's

Printed are the medians of the rounds before and after, and while that went on; their ratio; and the coordinator's resident memory.
The attacker runs at the lowest priority (nice 19): in life it has a machine of its own, here it shares
these cores, and its own work is not what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from choral.address import HostPort
from choral.identity import read_identity
from choral.token import Token
from choral.v1 import admin_pb2 as pb
from choral_client.enrolment import enrol, tls
from federation import Federation, at_least, federation, progress, tidily

SETTLING = 5  # rounds that are not counted
AT_ONCE = 200  # connections that the attacker begins at a time
LEISURE_S = 30.0  # for as long the attacker keeps what it has opened, if it is not closed
NONSENSE = b"\xff\x00 this is no TLS \r\n\r\n" * 20


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds before, during and after both floods, in ms, and the coordinator's memory, in MB."""
    task, rows = ("slow_task:task", 10) if options.train_ms else ("empty_task:task", 2)
    settings = {"rounds": 10_000_000, "cohort_size": options.clients, "start_with": options.clients}
    found: dict[str, Any] = {}
    async with federation(task, settings, rows) as here, aclosing(here.rounds()) as rounds:
        await here.start_clients(options.clients)
        token = Token.parse(await here.operator.token("mallory"))
        member = await enrol(token, HostPort.parse(here.address), here.folder / "mallory")
        with progress("rounds and floods", 5) as advance:
            quiet = await series(rounds, options.rounds, advance)
            found["memory_before_mb"] = here.memory_mb()
            for kind, count in (("connections", options.connections), ("streams", options.streams)):
                arguments = [kind, str(count), here.address, str(token.port), str(member.folder)]
                found[kind], found[f"{kind}_done"], found[f"{kind}_memory_mb"] = await attacked(here, rounds, arguments)
                advance()
                quiet += await series(rounds, options.rounds, advance)
        found["quiet"] = quiet
        found["memory_after_mb"] = here.memory_mb()
        await end(here, rounds)
    return found


async def end(here: Federation, rounds: AsyncIterator[pb.Round]) -> None:
    """End the run between two rounds."""
    async with here.operator.stub() as admin:
        state = (await admin.PauseRun(pb.PauseRunRequest())).run.state
        while state != pb.RUN_STATE_PAUSED:
            await anext(rounds)
            state = (await admin.ListRuns(pb.ListRunsRequest())).runs[0].state
        await admin.StopRun(pb.StopRunRequest())
    async for _ in rounds:
        pass


async def series(rounds: AsyncIterator[pb.Round], count: int, advance: Callable[[], None]) -> list[float]:
    """The next so many rounds, once things have settled, in ms."""
    done = [await anext(rounds) for _ in range(SETTLING + count)][SETTLING:]
    advance()
    return [1000 * each.duration_s for each in done]


async def attacked(here: Federation, rounds: AsyncIterator[pb.Round], arguments: list[str]) -> tuple[list[float], str, float]:
    """The rounds that end while an attack goes on, what the attacker says of it, and the most memory that was seen."""
    attacker = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--attack", *arguments, stdout=asyncio.subprocess.PIPE
    )
    said = asyncio.create_task(attacker.communicate())
    times, memory_mb = list[float](), 0.0
    while not said.done():
        times.append(1000 * (await anext(rounds)).duration_s)
        memory_mb = max(memory_mb, here.memory_mb())
    output, _ = await said
    if attacker.returncode != 0:
        sys.exit("the attacker failed")
    return times, output.decode().strip(), memory_mb


# The attacker


def attack(kind: str, count: int, address: str, enrolment_port: int, folder: Path) -> None:
    """Do it, at the lowest priority, and say what came of it."""
    os.nice(19)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 20_000) if most > 0 else 20_000, most))
    doing = flood(count, address, enrolment_port) if kind == "connections" else misuse(count, address, folder)
    print(asyncio.run(doing))


async def flood(count: int, address: str, enrolment_port: int) -> str:
    """Open so many connections and keep them until they are closed."""
    where = HostPort.parse(address)
    ports = (where.port, enrolment_port)
    free = asyncio.Semaphore(AT_ONCE)
    kept: list[socket.socket] = []
    ended = {"connected": 0, "refused": 0}

    async def one(number: int) -> None:
        async with free:
            try:
                kept.append(await connection(where.host, ports[number % 2], number % 3))
                ended["connected"] += 1
            except OSError:
                ended["refused"] += 1

    await asyncio.gather(*(one(number) for number in range(count)))
    closed = await closed_by_the_other_side(kept)
    return (
        f"{count} connections: {ended['connected']} came about, {ended['refused']} did not; {closed} were closed by the coordinator"
    )


async def connection(host: str, port: int, manner: int) -> socket.socket:
    """One connection: 0 is silent, 1 talks nonsense, 2 begins with TLS and shows nothing."""
    loop = asyncio.get_running_loop()
    plain = socket.socket()
    plain.setblocking(False)
    try:
        await asyncio.wait_for(loop.sock_connect(plain, (host, port)), 10)
        if manner == 1:
            await loop.sock_sendall(plain, NONSENSE)
        if manner == 2:
            await loop.sock_sendall(plain, client_hello())
    except BaseException:
        plain.close()
        raise
    return plain


def client_hello() -> bytes:
    """The first flight of a TLS handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


async def closed_by_the_other_side(kept: list[socket.socket]) -> int:
    """How many of these are, within a while; then none is open."""
    loop = asyncio.get_running_loop()

    async def drained(link: socket.socket) -> bool:
        with suppress(OSError):
            while await loop.sock_recv(link, 65_536):
                pass
        return True

    reading = [asyncio.ensure_future(drained(link)) for link in kept]
    done, left = await asyncio.wait(reading, timeout=LEISURE_S) if reading else (set(), set())
    for each in left:
        each.cancel()
    for link in kept:
        link.close()
    return len(done)


async def misuse(count: int, address: str, folder: Path) -> str:
    """So many malformed streams of one member, some of them at once."""
    known = read_identity(folder)
    free, ended = asyncio.Semaphore(AT_ONCE), dict[str, int]()
    async with grpc.aio.secure_channel(address, tls(known.credentials)) as channel:

        async def one(number: int) -> None:
            async with free:
                word = await malformed(channel, number % 6)
                ended[word] = ended.get(word, 0) + 1

        await asyncio.gather(*(one(number) for number in range(count)))
    return f"{count} malformed streams: " + ", ".join(f"{times} ended with {word}" for word, times in sorted(ended.items()))


async def malformed(channel: grpc.aio.Channel, manner: int) -> str:
    """One malformed stream; what it ended with."""
    service = "/choral.v1.Federation"
    metadata: list[tuple[str, str]] = []
    match manner:
        case 0:
            call, words = channel.stream_stream(f"{service}/Attend"), [NONSENSE]
        case 1:
            call, words = channel.stream_unary(f"{service}/Upload"), [b"\x1a\x02\x08\x07"]  # a trailer, and nothing before it
        case 2:
            call, words = channel.stream_unary(f"{service}/Upload"), [b"\x0a" + b"\xff" * 9]
        case 3:
            call, words = channel.stream_stream(f"{service}/Attend"), [bytes(5_000_000)]
        case 4:
            call, words = channel.stream_stream(f"{service}/Attend"), []  # says nothing, and stays
        case _:
            call, words, metadata = channel.stream_stream(f"{service}/Attend"), [b""], [("x-much", "m" * 20_000)]
    stream = call(metadata=metadata)
    try:
        for word in words:
            await stream.write(word)
        if words:
            await stream.done_writing()
        return (await stream.code()).name
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return (await stream.code()).name


def main() -> None:
    """Read the command line, measure, print."""
    if sys.argv[1:2] == ["--attack"]:
        kind, count, address, port, folder = sys.argv[2:]
        attack(kind, int(count), address, int(port), Path(folder))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=at_least(1), default=10_000)
    parser.add_argument("--streams", type=at_least(1), default=1000)
    parser.add_argument("--clients", type=at_least(1), default=2)
    parser.add_argument("--rounds", type=at_least(10), default=200, help="in each of the three series without an attack")
    parser.add_argument("--train-ms", type=at_least(0), default=0, help="0: rounds are empty")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["CHORAL_TRAIN_S"] = str(options.train_ms / 1000)
    found = asyncio.run(measure(options))
    usual = float(np.median(found["quiet"]))
    kinds = ("connections", "streams")
    figures = {kind: float(np.median(found[kind])) for kind in kinds}
    if options.json:
        print(json.dumps({"quiet_ms": usual} | found | {f"{kind}_ratio": figures[kind] / usual for kind in kinds}))
        return
    print(f"rounds of {options.clients} clients, median of {len(found['quiet'])} without an attack: {usual:.1f} ms")
    for kind in kinds:
        print(f"{found[f'{kind}_done']}")
        rounds, ratio = len(found[kind]), figures[kind] / usual
        print(f"  median of the {rounds} rounds meanwhile: {figures[kind]:.1f} ms, {ratio:.2f} × the usual")
    before, after = found["memory_before_mb"], found["memory_after_mb"]
    print(f"coordinator's memory: {before:.0f} MB before, at most {most_of(found):.0f} MB, {after:.0f} MB after")


def most_of(found: dict[str, Any]) -> float:
    """The most memory that was seen."""
    return max(found["connections_memory_mb"], found["streams_memory_mb"])


if __name__ == "__main__":
    tidily(main)
