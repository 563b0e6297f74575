"""What a bad link costs one upload: a real client reaches a real coordinator through a TCP proxy that cuts the connection.

    python benchmarks/uploads.py [--params 25000000] [--cuts 20] [--json]

Three rounds of one client: the first is not counted, and the second is the baseline. During the upload of the third the link is cut
`--cuts` times, each time with a reset on both sides, at evenly spaced numbers of bytes sent up.

Bytes are those that the proxy took from the client between the beginning of its work and the acceptance of its result, of whatever
kind: besides the payload there are TLS handshakes, headers, checksums, statuses and HTTP/2's own, some of them anew with each
connection. So a little less of the payload is sent again with a cut than is printed. Seconds are from "uploading" to "accepted", as
the coordinator tells them: with the pauses before a client tries again, and with the check of the whole.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from choral.errors import ChoralError, ConfigError
from choral.v1 import admin_pb2 as pb
from choral.wire import CHUNK_BYTES
from federation import at_least, federation, progress, tidily
from proxy import Proxy


@dataclass(frozen=True)
class Upload:
    """One upload: `sent_bytes` is all that the client sent meanwhile, `results` what the round accepted."""

    sent_bytes: int
    seconds: float
    cuts: int
    results: int


@dataclass(frozen=True)
class Mark:
    """The proxy's counts at a time."""

    up: int
    connections: int
    at_s: float


async def measure(payload_bytes: int, cuts: int) -> tuple[Upload, Upload]:
    """The upload over a link that holds, and over one that is cut."""
    cut_at = [payload_bytes * number // (cuts + 1) for number in range(1, cuts + 1)]
    with Proxy() as link:
        async with federation("empty_task:task", {"rounds": 3, "cohort_size": 1}) as here:
            link.target = int(here.address.rpartition(":")[2])
            await here.start_clients(1, link.address)
            with progress("uploads", 3) as advance:
                async with aclosing(here.changes()) as changes:
                    found = []
                    for cuts_at in ((), (), cut_at):
                        found.append(await follow(changes, link, cuts_at))
                        advance()
    return found[1], found[2]


async def follow(changes: AsyncIterator[pb.Round], link: Proxy, cut_at: Sequence[int] = ()) -> Upload:
    """Watch one round to its end; the link is cut after so many bytes. Raises ChoralError: that was not to be seen."""
    marks: dict[str, Mark] = {}
    async for changed in changes:
        (part,) = changed.parts
        if part.state not in marks:
            marks[part.state] = Mark(link.up, link.connections, time.perf_counter())
            if part.state == "working":  # the model has been fetched, and next comes the upload
                link.cut_at(up=[link.up + offset for offset in cut_at])
        if changed.state == pb.ROUND_STATE_DONE:
            break
    if missing := {"working", "uploading", "accepted"} - marks.keys():
        raise ChoralError(f"nobody told when the client was {' or '.join(sorted(missing))}: give more --params")
    before, begun, ended = marks["working"], marks["uploading"], marks["accepted"]
    cuts = ended.connections - before.connections
    if cuts < len(cut_at):
        raise ChoralError(f"the upload was over after {cuts} of {len(cut_at)} cuts: give fewer --cuts")
    return Upload(ended.up - before.up, ended.at_s - begun.at_s, cuts, sum(part.state == "accepted" for part in changed.parts))


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=at_least(1), default=25_000_000)
    parser.add_argument("--cuts", type=at_least(1), default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    payload_bytes = 4 * options.params
    if payload_bytes < 2 * CHUNK_BYTES * (options.cuts + 1):
        raise ConfigError(f"--cuts {options.cuts}: fewer than two chunks of {payload_bytes} bytes are left between two cuts")
    os.environ["CHORAL_EMPTY_PARAMS"] = str(options.params)
    uncut, cut = asyncio.run(measure(payload_bytes, options.cuts))
    again_bytes = cut.sent_bytes - uncut.sent_bytes
    found = {
        "payload_bytes": payload_bytes,
        "cuts": options.cuts,
        "uncut_sent_to_payload": uncut.sent_bytes / payload_bytes,
        "cut_sent_to_payload": cut.sent_bytes / payload_bytes,
        "sent_again_bytes": again_bytes,
        "sent_again_per_cut_bytes": again_bytes / cut.cuts,
        "sent_again_per_cut_in_chunks": again_bytes / cut.cuts / CHUNK_BYTES,
        "uncut_s": uncut.seconds,
        "cut_s": cut.seconds,
        "cut_to_uncut_seconds": cut.seconds / uncut.seconds,
        "added_per_cut_s": (cut.seconds - uncut.seconds) / cut.cuts,
        "uncut_results": uncut.results,
        "cut_results": cut.results,
    }
    tell(found, options.json)


def tell(found: dict[str, float], as_json: bool) -> None:
    """Print the figures."""
    if as_json:
        print(json.dumps(found))
        return
    print(f"an update of {found['payload_bytes'] / 1e6:.1f} MB, one client, TLS, real processes, a proxy on loopback between them")
    for kind, told in (("uncut", "uncut"), ("cut", f"cut {found['cuts']} times")):
        sent, seconds, results = (found[f"{kind}_{what}"] for what in ("sent_to_payload", "s", "results"))
        print(f"{told:14} sent {sent:.4f} of the payload in {seconds:6.2f} s, results accepted: {results}")
    print(f"sent again     {found['sent_again_per_cut_in_chunks']:.3f} of a chunk ({CHUNK_BYTES >> 10} KiB) per cut, ", end="")
    print(f"{found['sent_again_per_cut_bytes']:.0f} bytes on average, handshakes included")
    print(f"time           {found['cut_to_uncut_seconds']:.1f} times as long, {found['added_per_cut_s']:.2f} s more per cut")


if __name__ == "__main__":
    tidily(main)
