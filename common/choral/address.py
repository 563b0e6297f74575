"""Network addresses as people write them: host:port."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainValidator


@dataclass(frozen=True, slots=True)
class HostPort:
    """A host (name, IPv4 or IPv6 without brackets) and a TCP port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> HostPort:
        """Read host:port; IPv6 in brackets. Raises ValueError with the form that is expected."""
        match = re.fullmatch(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+)):(?P<port>\d{1,5})", text)
        if match is None or int(match["port"]) > 65535:
            raise ValueError(f"{text!r} is no address; write host:port, for example 10.0.0.5:8470 or [::1]:8470")
        return cls(match["v6"] or match["name"], int(match["port"]))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _validated(value: Any) -> HostPort:
    if isinstance(value, HostPort):
        return value
    if not isinstance(value, str):
        raise ValueError("write host:port as text, for example 10.0.0.5:8470")
    return HostPort.parse(value)


Address = Annotated[HostPort, PlainValidator(_validated)]
