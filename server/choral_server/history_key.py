"""The key that signs the history: a file in the state folder. It is a secret: whoever has it can write history.

A history goes on only with the key that signed its newest entry; or with a new one, if an operator says so, which is an entry.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TypeGuard

from choral.durable import sync_folder
from choral.errors import ConfigError, TrustError, WrongState
from choral.heads import fingerprint, is_genuine
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from choral_server.config import ServerConfig
from choral_server.database import Database
from choral_server.history import Entry
from choral_server.lease import Lease
from choral_server.state_folder import locked
from choral_server.store import Store, newest_entry
from choral_server.troubles import Troubles

NAME = "history.key"


def path_of(state: Path) -> Path:
    """Where a state folder has it."""
    return state / NAME


def public_part(key: Ed25519PrivateKey) -> bytes:
    """Its public key (32,)."""
    return key.public_key().public_bytes_raw()


async def key_for(state: Path, database: Database) -> Ed25519PrivateKey:
    """The key in the state folder, with which the database's history goes on; made, if there is no history yet.

    Raises ConfigError: it is gone, or did not sign the newest entry. Raises TrustError as `found`.
    """
    newest, key = await database.read(newest_entry), found(state)
    if newest is None:
        return key if key is not None else made(state)
    if fits(key, newest):
        return key
    what = "is gone" if key is None else f"did not sign entry {newest.sequence}, the newest, or that entry was changed"
    raise ConfigError(
        f"history: {path_of(state)} {what}: put the file back from where it was (a file by `choral backup` holds it; a "
        "coordinator that takes over on another machine needs a copy of it), or let "
        "the history go on with a new key (`choral audit renew-key`): clients will warn of it. `choral audit verify` says more"
    )


def fits(key: Ed25519PrivateKey | None, newest: Entry) -> TypeGuard[Ed25519PrivateKey]:
    """Whether this key signed the newest entry."""
    return key is not None and is_genuine(newest.head(public_part(key)))


async def renew(config: ServerConfig, clock: Callable[[], datetime]) -> str:
    """Let a history whose key is lost go on with a new one; that one's fingerprint.

    Raises WrongState: the key is there. Raises ConfigError: there is no history, or a coordinator uses it.
    """
    with locked(config.state):
        database = await Database.open(config.database_url, Troubles())
        try:
            lease = await Lease.take(database, f"renewing the key on {os.uname().nodename}", config.lease_s)
            try:
                return await _renew(config.state, database, lease, clock)
            finally:
                await lease.give_up()
        finally:
            await database.close()


async def _renew(state: Path, database: Database, lease: Lease, clock: Callable[[], datetime]) -> str:
    newest = await database.read(newest_entry)
    if newest is None:
        raise ConfigError(f"history: {database.name} has none yet: the next start of `choral server` begins it, and makes its key")
    if fits(found(state), newest):
        raise WrongState(f"{path_of(state)} is the key that signed entry {newest.sequence}, the newest: nothing is to be renewed")
    key = made(state)
    store = await Store.open(database, lease, key, clock)
    await store.replace_key()
    return fingerprint(public_part(key))


def found(state: Path) -> Ed25519PrivateKey | None:
    """The key in a state folder, if there is one. Raises TrustError: the file cannot be read, or is none."""
    path = path_of(state)
    try:
        return parsed(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrustError(f"{path} cannot be read ({error.strerror}): let the coordinator's user read it") from error


def made(state: Path) -> Ed25519PrivateKey:
    """A new key, written to a state folder, in place of one that is there."""
    key = Ed25519PrivateKey.generate()
    keep(state, key)
    return key


def keep(state: Path, key: Ed25519PrivateKey) -> None:
    """Write a key, with mode 0600 from its first byte on, and to stay."""
    aside = state / f".{NAME}.new"
    aside.unlink(missing_ok=True)
    os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with aside.open("r+b", buffering=0) as file:
        file.write(written(key))
        os.fsync(file.fileno())
    aside.replace(path_of(state))
    sync_folder(state)


def written(key: Ed25519PrivateKey) -> bytes:
    """As the file has it: PKCS #8 in PEM."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def parsed(content: bytes, where: str) -> Ed25519PrivateKey:
    """The key that was written. Raises TrustError: it is none."""
    try:
        key = load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise TrustError(f"{where} holds no key in PEM form: restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise TrustError(f"{where} holds a key of another kind than Ed25519: restore it from a backup")
    return key
