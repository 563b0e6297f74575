"""A device's private keys, each in a file of its own that only its user can read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from choral.durable import aside, sync_folder
from choral.errors import TrustError
from choral.identity import UNREADABLE
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key


def make_key(path: Path, key: Any) -> None:
    """Raises FileExistsError. A key that is there is whole: it is written aside first."""
    if path.exists():
        raise FileExistsError(path)
    beside = aside(path)
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    sync_folder(path.parent)


def private_key(path: Path) -> Any:
    """The key in a file. Raises TrustError."""
    try:
        return load_pem_private_key(path.read_bytes(), None)
    except (OSError, *UNREADABLE) as error:
        raise TrustError(f"{path} holds no private key: put it back; or remove the folder {path.parent} and enrol again") from error
