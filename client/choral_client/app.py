"""The client's process: build everything, live, end."""

from __future__ import annotations

import asyncio
import random
import secrets
import signal
import threading
from pathlib import Path

import structlog
from choral import __version__
from choral.codecs import MASKED, abilities
from choral.errors import ConfigError
from choral.fingerprint import shown_fingerprint
from choral.messages import Hello
from choral.task import load_task
from choral.wire import PROTOCOL_VERSION

from choral_client.agent import Agent
from choral_client.config import ClientConfig
from choral_client.data import load_shard
from choral_client.guard import address_towards
from choral_client.guard_file import GuardFile
from choral_client.known_keys import KnownKeys
from choral_client.membership import belonging, keep
from choral_client.oversight import Oversight
from choral_client.signing_key import SigningKey
from choral_client.state_lock import alone_in
from choral_client.train import make_ready
from choral_client.transport import GrpcTransport
from choral_client.work import Work, set_threads

log = structlog.get_logger()


async def attend(config: ClientConfig) -> None:
    """Run one client until the run is over or SIGTERM comes.

    Raises ConfigError, TaskError, DataError, TrustError, Unreachable, or a Refused with the coordinator's reason.
    """
    _make(config.folder)
    with alone_in(config.folder):
        await _attend(config)


def _make(folder: Path) -> None:
    """Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"state: {folder} cannot be used ({error.strerror}): give a folder that this user may write") from error


async def _attend(config: ClientConfig) -> None:
    guard = GuardFile(config.folder, config.guard)  # first: a device that cannot say no does not enrol
    known = await belonging(config)
    signer = SigningKey.of(config.folder).signer(known.name)
    set_threads(config.threads)
    task = load_task(config.task)
    shard = load_shard(task, config.data, config.holdout)
    work = Work(task, shard)
    oversight = Oversight(guard, config.folder, lambda: address_towards(known.server), examples=shard.size)
    hello = Hello(
        protocol_version=PROTOCOL_VERSION,
        client=known.name,
        instance=secrets.token_hex(8),
        task=task.name,
        task_version=task.version,
        manifest=work.manifest,
        software=__version__,
        codecs=(*abilities(), MASKED),
    )
    transport = GrpcTransport(str(known.server), known.credentials, known.name)
    agent = Agent(
        transport,
        hello,
        work,
        config.folder,
        follow=config.follow,
        first_contact_s=config.first_contact_s,
        longest_pause_s=config.longest_pause_s,
        oversight=oversight,
        signer=lambda: SigningKey.of(config.folder).signer(known.name),  # anew for each sum: a renewal may bring a voucher
        vouch=KnownKeys(known.name, signer.key, guard, known.credentials.ca if known.credentials is not None else None).vouch,
    )
    life = asyncio.create_task(agent.live())
    threading.Thread(target=make_ready, args=(task,), daemon=True).start()  # while it connects and waits for its first round
    keeping = asyncio.create_task(keep(known.identity, transport, random.Random())) if known.identity is not None else None  # noqa: S311
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, life.cancel)
    told = {"name": known.name, "task": task.name, "examples": shard.size, "signing_key": shown_fingerprint(signer.key)}
    log.info("client starts", **told, server=str(known.server))
    try:
        await life
    except asyncio.CancelledError:
        log.info("client ends", reason="it was told to")
    finally:
        if keeping is not None:
            keeping.cancel()
        await transport.close()
