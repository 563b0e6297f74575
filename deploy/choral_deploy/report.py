"""What a demo found: a table, a plot, and a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Report:
    """The result of a demo. `…_mse` are means of squared errors on the test set, `…_s` seconds; `history` is test_mse by round.

    With differential privacy `epsilon` is what was spent by round, of `dp_budget`; `dp_noise` in what one client can move.
    """

    rounds: int
    clients: list[str]
    seed: int
    test_mse: float
    best_mse: float
    alone_mse: dict[str, float]
    pooled_mse: float
    round_s_p50: float
    round_s_p95: float
    federated_s: float
    wall_s: float
    checkpoint: str
    plot: str
    history: list[float]
    secure: bool = False
    dp_budget: float | None = None
    dp_delta: float | None = None
    dp_noise: float | None = None
    epsilon: list[float] = field(default_factory=list)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    def print(self, console: Console) -> None:
        """Show the table, and where the files are."""
        table = Table(title=f"Boston housing, 102 homes that nobody trained on, after {self.rounds} rounds")
        table.add_column("trained on")
        table.add_column("mean squared error", justify="right")
        table.add_column("typical error", justify="right")
        rows = [(f"{name} alone, its own shard", mse) for name, mse in self.alone_mse.items()]
        rows.append(("all data pooled, as nobody may", self.pooled_mse))
        for what, mse in rows:
            table.add_row(what, f"{mse:.2f}", _dollars(mse))
        table.add_row("federated: data stays where it is", f"{self.test_mse:.2f}", _dollars(self.test_mse), style="bold green")
        console.print(table)
        console.print(
            f"{self.rounds} rounds in {self.federated_s:.1f} s, {1000 * self.round_s_p50:.0f} ms each (median, training included)."
        )
        if self.secure:
            console.print(self._hidden(), soft_wrap=True, highlight=False)
        if self.dp_budget is not None:
            console.print(self._private(), soft_wrap=True, highlight=False)
        console.print(f"model   {self.checkpoint}\nplot    {self.plot}", soft_wrap=True, highlight=False)

    def _hidden(self) -> str:
        """What the coordinator has seen, and whom secure aggregation hides from whom."""
        seen = (
            "Secure aggregation: the coordinator has seen sums over the clients, and no update, loss or number of examples of one."
        )
        if len(self.clients) == 2:
            two = "With two clients each of them can take its own part off the sum, and has the other's: use 3 or more."
            return f"{seen}\n[yellow]{two}"
        return seen

    def _private(self) -> str:
        """What is promised, and what it costs with so few clients."""
        assert self.dp_noise is not None, "it goes with the budget"
        spent = self.epsilon[-1] if self.epsilon else 0.0
        clients, share = len(self.clients), self.dp_noise / len(self.clients)
        promise = (
            f"Differential privacy: ε = {spent:.3g} of {self.dp_budget:g} spent at δ = {self.dp_delta:g}, for each client with "
            "all its homes, towards whoever gets the models. The coordinator is trusted: it sees the updates."
        )
        cost = (
            f"What it costs: each number of the model gets, in each round, noise of {share:.2g} times the longest update, over "
            f"{clients} clients. The fewer they are, the less can be learned that hides each of them: try --clients 20."
        )
        return f"{promise}\n[yellow]{cost}"

    def draw(self, path: Path) -> None:
        """Save the plot as PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot(
            range(1, len(self.history) + 1), self.history, color="#1b7837", linewidth=2.2, label=f"federated: {self.test_mse:.1f}"
        )
        colours = ["#d6604d", "#f4a582", "#b2182b", "#fddbc7", "#67001f"]
        for index, (name, mse) in enumerate(self.alone_mse.items()):
            axes.axhline(mse, color=colours[index % len(colours)], linestyle="--", label=f"{name} alone: {mse:.1f}")
        axes.axhline(self.pooled_mse, color="#2166ac", linestyle=":", linewidth=2, label=f"all data pooled: {self.pooled_mse:.1f}")
        top = 1.5 * max(self.test_mse, self.pooled_mse, *self.alone_mse.values())  # the first rounds may lie far above
        axes.set(xlabel="round", ylabel="mean squared error on the test set", ylim=(0, top))
        axes.set_title("Together, without showing their data")
        axes.grid(alpha=0.25)
        axes.legend(loc="upper right", ncols=2)
        if self.epsilon:
            spent = axes.twinx()
            spent.plot(range(1, len(self.epsilon) + 1), self.epsilon, color="#762a83", linewidth=1.4, label="ε spent")
            spent.set(ylabel=f"ε spent, at δ = {self.dp_delta:g}", ylim=(0, 1.05 * max(*self.epsilon, self.dp_budget or 0.0)))
            spent.legend(loc="lower right")
        figure.savefig(path, dpi=130)


def _dollars(mse: float) -> str:
    return f"± ${1000 * mse**0.5:,.0f}"
