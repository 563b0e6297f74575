"""Who calls: the member behind the call that is being answered."""

from __future__ import annotations

import enum
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime

from choral.errors import NotAllowed


class Role(enum.Enum):
    """What a member may do: take part, steer, or look."""

    DEVICE = "device"
    OPERATOR = "operator"
    VIEWER = "viewer"


@dataclass(frozen=True, slots=True)
class Caller:
    """A member, by its certificate; or, without one, whoever can reach the address: `name` is then empty, or for people to read."""

    name: str = ""
    role: Role | None = None
    certified: bool = False
    key: bytes = b""
    """SHA-256 of the public key of the certificate"""
    expires_at: datetime | None = None
    """when the certificate expires"""

    def must_be(self, name: str) -> None:
        """Raise NotAllowed if what is asked for is another member's."""
        if self.certified and name != self.name:
            raise NotAllowed(f"this is the certificate of {self.name}, which cannot act as {name[:80]!r}: each acts for itself")


NOBODY = Caller()
CALLER: ContextVar[Caller] = ContextVar("caller", default=NOBODY)


def acting() -> str:
    """The name of the operator who calls, if one does."""
    caller = CALLER.get()
    return caller.name if caller.role is Role.OPERATOR else ""
