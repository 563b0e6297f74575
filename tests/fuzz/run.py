"""Fuzz every target, each in a process of its own, one after the other, and then the slow ones again: `make fuzz`, or

    python tests/fuzz/run.py --seconds 600 [--target NAME]... [--engine atheris|chance]
    python tests/fuzz/run.py --replay out/fuzz/findings/FILE

With atheris (`pip install choral[fuzz]`: CPython 3.11 to 3.13 on Linux x86-64), coverage of our own packages guides it; what it
found worth keeping is kept in out/fuzz/corpus for the next time. Elsewhere inputs are made as in the tests, by chance.
Exit code 1: something was found. The input is in out/fuzz/findings, and the command that shows it again is told.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "out" / "fuzz"
LONGEST = 1 << 20  # bytes of an input
ENOUGH = 20  # different findings in one target: there is something to do first
SILENT_S = 120.0  # a target that reports nothing for so long hangs where no signal reaches it
OURS = ["choral", "choral_server", "choral_client", "choral_deploy"]


@dataclass
class Report:
    """What a process says of its target: executions, seconds, and each finding with the file of its input."""

    executions: int = 0
    seconds: float = 0.0
    findings: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Report:
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return cls()

    def write(self, path: Path) -> None:
        aside = path.with_suffix(".aside")
        aside.write_text(json.dumps(asdict(self)))
        aside.replace(path)


def main() -> None:
    arguments = _arguments()
    if arguments.replay is not None:
        _replay(arguments.replay)
    else:
        sys.exit(_all(arguments.target, arguments.seconds, arguments.engine))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="in all, shared by all targets")
    parser.add_argument("--target", action="append", default=[], help="part of a target's name; all, if not given")
    parser.add_argument("--engine", choices=["atheris", "chance"], default=_engine())
    parser.add_argument("--replay", type=Path, help="a file from out/fuzz/findings")
    return parser.parse_args()


def _engine() -> str:
    return "atheris" if importlib.util.find_spec("atheris") is not None else "chance"


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


# One target


def _fuzz(name: str, until: float, engine: str) -> NoReturn:
    """In the process of one target: until the time is over."""
    from fuzz.targets import TARGETS

    target = TARGETS[name]
    with ExitStack() as stack:
        one = _Execution(target, until, stack)
        if engine == "chance":
            _by_chance(target, one)
        _with_coverage(target, one)


def _load(engine: str) -> None:
    """Once for all: our own packages so that atheris sees which lines are reached, and nothing else; logs as in production."""
    if engine == "atheris":
        import atheris

        with _silence(), atheris.instrument_imports(include=OURS):
            import fuzz.targets  # noqa: F401
    import torch
    from choral import logs

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    logs.configure("json")


@contextmanager
def _silence() -> Iterator[None]:
    """Atheris names each module that it instruments on standard error."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)


class _Execution:
    """Runs one input after the other, keeps count, and ends the process when the time is over."""

    def __init__(self, target: Any, until: float, stack: ExitStack) -> None:
        self._target = target
        self._until = until
        self._began = self._told = time.monotonic()
        self._report, self._known = Report(), set[str]()
        self._path = OUT / "reports" / f"{_slug(target.name)}.json"
        self._input = stack.enter_context(_visible(_slug(target.name)))
        self._running = stack.enter_context(target.running())

    def __call__(self, data: bytes) -> None:
        from fuzz.watch import Finding

        self._input[8 : 8 + len(data)] = data
        self._input[:8] = len(data).to_bytes(8, "little")
        try:
            self._running(data)
        except Finding as finding:
            self._found(finding, data)
        self._report.executions += 1
        now = time.monotonic()
        if now - self._told > 0.5 or now > self._until:
            self._tell(now)
        if now > self._until or len(self._report.findings) >= ENOUGH:
            self.end()

    def end(self) -> NoReturn:
        self._tell(time.monotonic())
        self._input[:8] = bytes(8)
        os._exit(0)  # libFuzzer would, too

    def _found(self, finding: Any, data: bytes) -> None:
        key = f"{finding.kind} at {finding.place}"
        if key not in self._known:
            self._known.add(key)
            self._report.findings[str(finding)] = str(_keep(self._target.name, key, data))
            self._tell(time.monotonic())

    def _tell(self, now: float) -> None:
        self._told = now
        self._report.seconds = now - self._began
        self._report.write(self._path)


@contextmanager
def _visible(slug: str) -> Iterator[mmap.mmap]:
    """A file with the input that is being decoded, which outlives the process: its length in eight bytes, then itself."""
    path = OUT / "reports" / f"{slug}.input"
    path.write_bytes(bytes(8 + LONGEST))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        yield shared


def _keep(name: str, key: str, data: bytes) -> Path:
    """Save the input of a finding: the name says the target, and the same finding has the same name."""
    path = OUT / "findings" / f"{_slug(name)}.{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _by_chance(target: Any, one: _Execution) -> NoReturn:
    from fuzz.mutation import mutated

    seeds, chance = [*target.seeds(), *target.hostile()], random.Random()
    for seed in seeds:
        one(seed)
    while True:
        one(mutated(chance, seeds, target.dictionary))


def _with_coverage(target: Any, one: _Execution) -> NoReturn:
    import atheris

    corpus = OUT / "corpus" / _slug(target.name)
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in [*target.seeds(), *target.hostile()]:
        (corpus / f"seed-{hashlib.sha256(seed).hexdigest()[:12]}").write_bytes(seed)
    atheris.Setup(
        [
            sys.argv[0],
            str(corpus),
            f"-dict={_dictionary(target)}",
            f"-max_len={max(8 * max(map(len, [*target.seeds(), *target.hostile()])), 4096)}",
            f"-artifact_prefix={OUT / 'reports'}/",
            "-timeout=0",  # the watch has its own clocks and limits
            "-rss_limit_mb=0",
            "-handle_int=0",
            "-handle_term=0",
            "-verbosity=0",
        ],
        one,
    )
    atheris.Fuzz()
    one.end()


def _dictionary(target: Any) -> Path:
    from fuzz.mutation import WORDS

    path = OUT / "reports" / f"{_slug(target.name)}.dict"
    words = [*target.dictionary, *(word for word in WORDS if len(word) <= 64)]
    path.write_text("".join(f'"{"".join(f"{chr(92)}x{byte:02x}" for byte in word)}"\n' for word in words))
    return path


# All targets


def _all(wanted: list[str], seconds: float, engine: str) -> int:
    _load(engine)
    from fuzz.targets import TARGETS
    from rich.console import Console

    names = [name for name in TARGETS if not wanted or any(part in name for part in wanted)]
    console = Console()
    (OUT / "reports").mkdir(parents=True, exist_ok=True)
    guided = "atheris, guided by coverage" if engine == "atheris" else "chance: atheris is not installed here, or not asked for"
    console.print(f"{len(names)} targets, {seconds:g} s in all; inputs are made by {guided}")
    began, reports = time.monotonic(), dict[str, Report]()
    with _bar(console, seconds) as advance:
        for until, turn in ((seconds / 2, _equal), (seconds, _slow)):
            chosen = turn(names, reports)
            for place, name in enumerate(chosen):
                left_s = began + until - time.monotonic()
                own_s = max(left_s / (len(chosen) - place), 0.5)
                reports[name] = _supervise(name, own_s, engine, partial(advance, name, began), reports.get(name, Report()))
    _show(console, reports)
    return int(any(report.findings for report in reports.values()))


def _equal(names: list[str], reports: dict[str, Report]) -> list[str]:
    """Half of the time is for all alike."""
    return names


def _slow(names: list[str], reports: dict[str, Report]) -> list[str]:
    """The other half is for the slowest quarter, which hardly gets past its seeds in an equal share."""
    by_executions = sorted(names, key=lambda name: reports[name].executions)
    return [name for name in by_executions if len(reports[name].findings) < ENOUGH][: -(-len(names) // 4)]


@contextmanager
def _bar(console: Any, seconds: float) -> Iterator[Callable[[str, float], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description:32}"), BarColumn(), TimeRemainingColumn(), console=console, auto_refresh=False
    ) as progress:
        task = progress.add_task("", total=seconds)
        yield lambda name, began: progress.update(task, description=name, completed=time.monotonic() - began, refresh=True)


def _supervise(name: str, seconds: float, engine: str, advance: Callable[[], None], before: Report) -> Report:
    """Fuzz one target, which has been `before`; starts it again where an input killed it."""
    path, until = OUT / "reports" / f"{_slug(name)}.json", time.monotonic() + seconds
    while True:
        path.unlink(missing_ok=True)
        died = _process(name, until, engine, advance, path)
        report = Report.read(path)
        report = Report(
            before.executions + report.executions, before.seconds + report.seconds, {**report.findings, **before.findings}
        )
        report.findings = {told: file for file, told in {file: told for told, file in report.findings.items()}.items()}
        if died is not None:
            report.findings[died] = str(_keep(name, died, _last_input(name)))
        if died is None or time.monotonic() > until or len(report.findings) >= ENOUGH:
            return report
        before = report


def _process(name: str, until: float, engine: str, advance: Callable[[], None], report: Path) -> str | None:
    """One process, until it ends; what killed it, if anything did. It is forked: to load torch takes longer than its turn."""
    log = OUT / "reports" / f"{_slug(name)}.log"
    began = time.time()
    child = os.fork()
    if child == 0:
        _in_child(name, until, engine, log)
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        advance()
        time.sleep(0.1)
        heard = report.stat().st_mtime if report.exists() else began
        if time.time() - heard > SILENT_S:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"time: nothing heard for {SILENT_S:g} s"
    code = os.waitstatus_to_exitcode(ended[1])
    if code == 0:
        return None
    return f"crash: the process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'} (see {log})"


def _in_child(name: str, until: float, engine: str, log: Path) -> NoReturn:
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _fuzz(name, until, engine)
    except BaseException:  # noqa: BLE001
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(70)


def _last_input(name: str) -> bytes:
    content = (OUT / "reports" / f"{_slug(name)}.input").read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _show(console: Any, reports: dict[str, Report]) -> None:
    from rich.table import Table

    table = Table("target")
    for column in ("executions", "executions/s", "findings"):
        table.add_column(column, justify="right")
    for name, report in reports.items():
        rate = report.executions / report.seconds if report.seconds else 0.0
        table.add_row(name, f"{report.executions:,}", f"{rate:,.0f}", str(len(report.findings)))
    console.print(table)
    for name, report in reports.items():
        for told, path in report.findings.items():
            console.print(f"\n{name}: {told}", markup=False, style="red")
            console.print(f"  {sys.executable} {Path(__file__)} --replay {path}", markup=False, soft_wrap=True)


def _replay(path: Path) -> None:
    """Decode one input again, with the traceback of what it does."""
    from fuzz.targets import TARGETS

    target = next((target for target in TARGETS.values() if _slug(target.name) == path.name.partition(".")[0]), None)
    if target is None:
        sys.exit(f"{path}: a file in out/fuzz/findings begins with the name of its target")
    sys.dont_write_bytecode = True
    data = path.read_bytes()
    with target.running() as run:
        run(data)
    sys.stdout.write(f"{target.name}: nothing is found with {path}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    main()
