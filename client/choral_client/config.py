"""The client's configuration: a file, flags, or both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from choral.address import Address
from choral.config import Settings
from choral.names import NAME
from pydantic import Field, model_validator

FilePath = Annotated[Path, Field(strict=False)]


class ClientConfig(Settings):
    """The whole file; each key is also a flag."""

    server: Address | None = None
    """host:port of the coordinator, as its certificate names it; that at which this client enrolled, if not given"""
    name: Annotated[str, Field(pattern=NAME)] | None = None
    """this client's name, unique in the federation: 1 to 64 letters, digits, dots, dashes and underscores; that under which it
    enrolled, if state is given"""
    task: str
    """module:attribute of the task installed here"""
    data: FilePath
    """this client's shard; the only data file that is opened"""
    state: FilePath | None = None
    """folder for the newest model, results on their way and what this client is doing; choral-NAME in the working directory, if not
    given"""
    token: FilePath | None = None
    """file with a token, with which this client enrols if it has not yet; `choral client enrol` does the same"""
    guard: FilePath | None = None
    """file that says what this device refuses to do; guard.yaml in the state folder, if it is there and nothing is given; read anew
    whenever it changes, and if it is broken, or was there and is gone, everything is declined"""
    ca: FilePath | None = None
    """PEM file of the authority that signed the coordinator's certificate; for a client with a certificate of yours"""
    certificate: FilePath | None = None
    """PEM file with this client's certificate, whose common name is its name; with ca and key"""
    key: FilePath | None = None
    """PEM file with the private key of that certificate"""
    plaintext: bool = False
    """connect without TLS; allowed to loopback addresses only"""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """share of the shard that is never trained on but measures each version"""
    follow: bool = True
    """fetch every version when it is published; if false, only those that this client is asked to work on"""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads for training; as many as torch likes, if not given"""
    first_contact_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """seconds to keep trying until the coordinator has answered once; after that it is tried for ever"""
    longest_pause_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = 60.0
    """longest pause between two attempts to reach the coordinator; pauses are random, and grow up to this"""

    @property
    def folder(self) -> Path:
        """The state folder in force."""
        return self.state if self.state is not None else folder_of(self.name or "")

    @model_validator(mode="after")
    def _protected(self) -> Self:
        if self.name is None and self.state is None:
            raise ValueError("name is missing: give the name under which this client enrolled, or state, the folder where it did")
        given = [name for name in ("ca", "certificate", "key") if getattr(self, name) is not None]
        if 0 < len(given) < 3:
            raise ValueError(f"{' and '.join(given)} alone will not do: give ca, certificate and key, or none of them and enrol")
        if self.plaintext and (given or self.token):
            raise ValueError(f"plaintext contradicts {(*given, 'token')[0]}: remove one of them")
        if self.token is not None and given:
            raise ValueError("token contradicts ca, certificate and key: remove one or the others")
        if (self.plaintext or given) and (self.name is None or self.server is None):
            raise ValueError("name and server are needed by a client that does not enrol")
        if self.token is not None and self.server is None:
            raise ValueError("server is missing: a token does not say where the coordinator is")
        if self.plaintext and self.server is not None and not self.server.is_loopback:
            raise ValueError(f"plaintext is allowed on loopback only, not to {self.server.host}: enrol")
        return self


def folder_of(name: str) -> Path:
    """The state folder of the client of that name, unless it is told another."""
    return Path(f"choral-{name}")
