"""Everything that is decoded from the network or the disk. A new decoder is one more entry: see `Target`."""

from __future__ import annotations

from fuzz import files, members, network, past, payloads
from fuzz.target import Target

TARGETS: dict[str, Target] = {
    target.name: target for target in [*network.TARGETS, *members.TARGETS, *past.TARGETS, *payloads.TARGETS, *files.TARGETS]
}
