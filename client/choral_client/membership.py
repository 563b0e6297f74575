"""By what a client is known to its coordinator: where that comes from, and that it does not expire."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count

import structlog
from choral.address import HostPort
from choral.errors import ChoralError, ConfigError, LimitExceeded, TrustError, Unreachable
from choral.identity import Credentials, Identity, held, read_credentials
from choral.token import Token

from choral_client.backoff import full_jitter
from choral_client.config import ClientConfig
from choral_client.enrolment import enrol, renew
from choral_client.transport import GrpcTransport

log = structlog.get_logger()
_LEFT = 1 / 3  # of a certificate's life, at which it is renewed
_SELDOM_S = 1.0
_OFTEN_S = 3600.0  # an attempt that failed is repeated after this at the latest


@dataclass(frozen=True, slots=True)
class Belonging:
    """The coordinator, one's name there, and what is shown to it; None: nothing, in plain text."""

    server: HostPort
    name: str
    credentials: Credentials | None
    identity: Identity | None = None


async def belonging(config: ClientConfig) -> Belonging:
    """From the configuration, or from enrolment, now or earlier. Raises ConfigError, TrustError, Unreachable or TokenRefused."""
    if config.name is not None and config.server is not None:
        if config.plaintext:
            return Belonging(config.server, config.name, None)
        if config.ca is not None and config.certificate is not None and config.key is not None:
            return Belonging(config.server, config.name, read_credentials(config.ca, config.certificate, config.key))
    known = held(config.folder)
    if known is None and config.token is not None and config.server is not None:
        known = await _enrolled(config, _token(config), config.server)
    if known is None:
        raise TrustError(
            f"{config.folder}: this client has not enrolled: `choral client enrol TOKEN --server HOST:PORT`; the coordinator's "
            "operator has tokens"
        )
    if config.name is not None and config.name != known.name:
        raise ConfigError(f"name: {config.folder} holds the identity of {known.name}: give its name, or another folder")
    if known.role != "device":
        raise ConfigError(f"{config.folder} holds the identity of a {known.role}; only a device takes part: ask for another token")
    return Belonging(config.server or known.server, known.name, known.credentials, known)


async def keep(known: Identity, transport: GrpcTransport, rng: random.Random) -> None:
    """Renew the certificate whenever a third of its life is left, as long as the client runs."""
    failures = 0
    while True:
        credentials = known.credentials
        left_s = (credentials.expires_at - datetime.now(UTC)).total_seconds()
        early_s = credentials.lifetime_s * _LEFT
        if failures:
            await asyncio.sleep(1 + full_jitter(failures, rng, min(_OFTEN_S, early_s / 4)))
        else:
            await asyncio.sleep(max(_SELDOM_S, left_s - early_s * rng.uniform(0.8, 1)))
        try:
            known = await renew(known)
        except (ChoralError, OSError) as error:
            failures += 1
            log.warning("certificate not renewed", expires_at=credentials.expires_at.isoformat(), reason=str(error))
        else:
            failures = 0
            log.info("certificate renewed", expires_at=known.credentials.expires_at.isoformat())
            transport.show(known.credentials)


async def _enrolled(config: ClientConfig, token: Token, server: HostPort) -> Identity:
    """Enrol, as patiently as a first contact is tried. Raises as `enrol`."""
    began, rng = time.monotonic(), random.Random()  # noqa: S311 - spreads clients in time; nothing secret
    for attempt in count(1):
        try:
            known = await enrol(token, server, config.folder)
        except (Unreachable, LimitExceeded) as error:
            left_s = config.first_contact_s - (time.monotonic() - began)
            if left_s < 0:
                raise
            pause_s = min(full_jitter(attempt, rng, config.longest_pause_s), left_s)
            log.warning("not enrolled yet", reason=str(error), again_in_s=round(pause_s, 2))
            await asyncio.sleep(pause_s)
        else:
            log.info("enrolled", name=known.name, role=known.role, server=str(known.server))
            return known
    raise AssertionError("count never ends")


def _token(config: ClientConfig) -> Token:
    try:
        text = config.token.read_text(encoding="utf-8") if config.token is not None else ""
    except (OSError, UnicodeDecodeError) as error:
        raise TrustError(f"token: {config.token} cannot be read ({error}): give the file that holds the token") from error
    return Token.parse(text)
