"""Whether the coordinator's memory grows with its clients: its peak with 2, 16 and 64 of them, one table and one picture.

    python benchmarks/memory.py [--clients 2 16 64] [--params 25000000] [--rounds 2] [--plot FILE.png] [--json]

The coordinator is a real one, with SQLite and mutual TLS, and every client fetches the model and sends an update in each round. The
clients are light ones (light.py), because 64 real ones with torch and 100 MB do not fit on one small machine. The peak is the
kernel's own (VmHWM), from the coordinator's start to the end of the last round; what it has when it is ready is told beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from contextlib import aclosing
from pathlib import Path
from typing import Any

from federation import ENDLESS, OWN_AUTHORITY, at_least, certify, progress, tidily, unstarted
from rounds import TASK, mb
from usage import usage

PER_PROCESS = 32


async def measure(clients: int, rounds: int) -> dict[str, float]:
    """The coordinator's memory with so many clients."""
    run = {"rounds": ENDLESS, "cohort_size": clients, "deadline_s": 3600.0}
    async with unstarted(TASK, run, tls=OWN_AUTHORITY, heartbeat_s=3600.0) as here:
        certify(here.folder, clients)
        await here.start_coordinator()
        ready = usage(here.server_pid)
        for first in range(0, clients, PER_PROCESS):
            await here.start_light(first, min(PER_PROCESS, clients - first))
        async with aclosing(here.rounds()) as done:
            with progress(f"rounds of {clients} clients", rounds) as advance:
                for _ in range(rounds):
                    await anext(done)
                    advance()
            await here.rest(done)
            peak = usage(here.server_pid)
            await here.stop()
            async for _ in done:
                pass
    return {"clients": clients, "server_ready_bytes": ready.resident_bytes, "server_peak_bytes": peak.peak_bytes}


def draw(found: list[dict[str, float]], model_bytes: int, path: Path) -> None:
    """Save the picture as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    clients = [each["clients"] for each in found]
    first = found[0]["server_peak_bytes"] / 1e6
    axes.axhspan(0.9 * first, 1.1 * first, color="#2166ac", alpha=0.12, label="within 10 % of the first")
    axes.plot(clients, [each["server_peak_bytes"] / 1e6 for each in found], "o-", color="#1b7837", linewidth=2.2, label="peak")
    axes.plot(clients, [each["server_ready_bytes"] / 1e6 for each in found], "o:", color="#777777", label="when it is ready")
    axes.set(
        xlabel="clients",
        ylabel="the coordinator's memory, MB",
        ylim=(0, 1.2 * max(each["server_peak_bytes"] for each in found) / 1e6),
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(clients, [f"{count:.0f}" for count in clients])
    axes.set_title(f"A model of {mb(model_bytes)}")
    axes.grid(alpha=0.25)
    axes.legend(loc="best")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=at_least(1), nargs="+", default=[2, 16, 64])
    parser.add_argument("--params", type=at_least(1), default=25_000_000)
    parser.add_argument("--rounds", type=at_least(1), default=2)
    parser.add_argument("--plot", type=Path, help="where the picture goes; there is none, if not given")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["CHORAL_EMPTY_PARAMS"] = str(options.params)
    found = [asyncio.run(measure(clients, options.rounds)) for clients in options.clients]
    for each in found:
        each["to_first"] = each["server_peak_bytes"] / found[0]["server_peak_bytes"]
    if options.plot is not None:
        draw(found, 4 * options.params, options.plot)
    tell({"params": options.params, "rounds": options.rounds, "found": found}, options.json)


def tell(told: dict[str, Any], as_json: bool) -> None:
    """Print the figures."""
    if as_json:
        print(json.dumps(told))
        return
    print(
        f"{told['params']} parameters ({mb(4 * told['params'])}), {told['rounds']} rounds, TLS, a real coordinator, light clients"
    )
    for each in told["found"]:
        print(f"{each['clients']:5} clients   server peak {mb(each['server_peak_bytes'])}", end="")
        print(f"   {mb(each['server_ready_bytes'])} when it is ready   {each['to_first']:.3f} of the first line's")


if __name__ == "__main__":
    tidily(main)
