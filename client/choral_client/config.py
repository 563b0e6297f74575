"""The client's configuration: a file, flags, or both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from choral.address import Address
from choral.config import Settings
from pydantic import Field, model_validator

FilePath = Annotated[Path, Field(strict=False)]


class ClientConfig(Settings):
    """The whole file; each key is also a flag."""

    server: Address
    """host:port of the coordinator, as its certificate names it"""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")]
    """this client's name, unique in the federation: 1 to 64 letters, digits, dots, dashes and underscores"""
    task: str
    """module:attribute of the task installed here"""
    data: FilePath
    """this client's shard; the only data file that is opened"""
    state: FilePath | None = None
    """folder for the newest model, results on their way and what this client is doing; choral-NAME in the working directory, if not
    given"""
    guard: FilePath | None = None
    """file that says what this device refuses to do; guard.yaml in the state folder, if it is there and nothing is given; read anew
    whenever it changes, and if it is broken, or was there and is gone, everything is declined"""
    ca: FilePath | None = None
    """PEM file of the authority that signed the coordinator's certificate (its ca.pem)"""
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
        return self.state if self.state is not None else Path(f"choral-{self.name}")

    @model_validator(mode="after")
    def _protected(self) -> Self:
        if self.ca is None and not self.plaintext:
            raise ValueError("ca is missing: give the coordinator's ca.pem")
        if self.plaintext and self.ca is not None:
            raise ValueError("plaintext contradicts ca: remove one of them")
        if self.plaintext and not self.server.is_loopback:
            raise ValueError(f"plaintext is allowed on loopback only, not to {self.server.host}: give ca")
        return self
