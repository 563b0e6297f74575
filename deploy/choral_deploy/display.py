"""A federation as it trains, on the terminal: rounds, loss, and who is doing what."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from choral.v1 import admin_pb2 as pb
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_LINE_EVERY = 10  # rounds between two lines where the output is no terminal


class Display:
    """Shows changes of a coordinator as they come; on standard error, live on a terminal and as plain lines elsewhere."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._console = Console(file=sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console)
        self._bar = self._progress.add_task("starting", total=None)
        self._parts: dict[str, pb.Part] = {}
        self._values: list[float] = []
        self._told = 0
        self._live = Live(self._render(), console=self._console, refresh_per_second=8, transient=True, get_renderable=self._render)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, what: str) -> None:
        """Name the present step."""
        self._progress.update(self._bar, description=what, total=None)
        if not self._console.is_terminal:
            self._console.print(what)

    def show(self, change: pb.WatchResponse) -> None:
        """Take in one change."""
        match change.WhichOneof("change"):
            case "run":
                run = change.run
                what = "training" if run.rounds_done else run.reason or "measuring the features together"
                self._progress.update(self._bar, total=run.rounds_planned, completed=run.rounds_done, description=what)
                self._tell(run)
            case "round":
                self._parts |= {part.client: part for part in change.round.parts}
            case "version":
                self._values += [metric.value for metric in change.version.test if metric.name == self._metric][-1:]

    def _tell(self, run: pb.Run) -> None:
        if not self._console.is_terminal and run.rounds_done >= self._told + _LINE_EVERY:
            self._told = run.rounds_done
            value = f"{self._metric} on the test set {self._values[-1]:.2f}" if self._values else ""
            self._console.print(f"round {run.rounds_done}/{run.rounds_planned}  {value}")

    def _render(self) -> Group:
        table = Table("client", "is", "examples", "loss of its last epoch", box=None, pad_edge=False)
        for name, part in sorted(self._parts.items()):
            loss = next((f"{metric.value:.3f}" for metric in part.work if metric.name == "train_loss"), "")
            table.add_row(name, part.state, str(part.examples or ""), loss)
        value = f"{self._metric} on the test set: {self._values[-1]:.2f}" if self._values else ""
        return Group(self._progress, table, value)
