"""What an attack found: a table, a picture, and a JSON object."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.table import Table

from choral_deploy.inversion import FirstLayer, Floats

_TICKS, _ENDS = (-5, -2, -1, 0, 1, 2, 5, 10), (-4, 10)  # of the picture, in standard deviations


@dataclass(frozen=True)
class Victim:
    """One client whose example the attacker is after: its features, and what was read from each thing that the attacker sees.

    All `(features,)` in their own units. `given_away` has the examples, of the victim and of others, that were found in the sum:
    as they are, and as they were found.
    """

    true: Floats
    plain: Floats
    masked: Floats
    summed: Floats
    given_away: Sequence[tuple[Floats, Floats]]


@dataclass(frozen=True)
class AttackReport:
    """The result of an attack. `…_error` are medians over the victims of `FirstLayer.error`: 0 is exact, 1 is a guess of the mean.

    `sum_found` is the share of all examples in the sums that were found in them. What is read from a sum is held against the
    victim's example.
    """

    plain_error: float
    masked_error: float
    sum_error: float
    sum_found: float
    victims: Sequence[Victim]
    layer: FirstLayer
    features: Sequence[str]
    clients: int
    seed: int
    picture: Path

    @classmethod
    def of(
        cls, victims: Sequence[Victim], layer: FirstLayer, features: Sequence[str], clients: int, seed: int, picture: Path
    ) -> Self:
        """The medians of what was found of these."""
        return cls(
            plain_error=_median(layer.error(one.plain, one.true) for one in victims),
            masked_error=_median(layer.error(one.masked, one.true) for one in victims),
            sum_error=_median(layer.error(one.summed, one.true) for one in victims),
            sum_found=sum(len(one.given_away) for one in victims) / (clients * len(victims)),
            victims=victims,
            layer=layer,
            features=features,
            clients=clients,
            seed=seed,
            picture=picture,
        )

    def to_json(self) -> str:
        """One line."""
        told: dict[str, Any] = {
            "plain_error": self.plain_error,
            "masked_error": self.masked_error,
            "sum_error": self.sum_error,
            "sum_found": self.sum_found,
            "victims": len(self.victims),
            "clients": self.clients,
            "seed": self.seed,
            "picture": str(self.picture),
        }
        return json.dumps(told)

    def print(self, console: Console) -> None:
        """Show one victim, the errors over all of them, and where the picture is."""
        console.print(self._one_victim())
        console.print(self._errors())
        lesson = "a sum of few hides little" if self.sum_found else "this way; it is not the only one"
        console.print(f"From the sums alone, {self.sum_found:.0%} of the {self._homes} homes in them were found: {lesson}.")
        console.print(f"picture {self.picture}", soft_wrap=True, highlight=False)

    @property
    def _homes(self) -> int:
        return self.clients * len(self.victims)

    def _one_victim(self) -> Table:
        victim = self.victims[0]
        table = Table(title="The one home on which alice has trained, as the coordinator reads it from …")
        for heading in ("feature", "true", "plain upload", "masked upload", f"sum of {self.clients}", "model's mean"):
            table.add_column(heading, justify="left" if heading == "feature" else "right")
        columns = (victim.true, victim.plain, victim.masked, victim.summed, self.layer.mean)
        for name, scale, *row in zip(self.features, self.layer.scale, *columns, strict=True):
            table.add_row(name, *(_rounded(value, scale) for value in row))
        return table

    def _errors(self) -> Table:
        table = Table(title=f"{len(self.victims)} victims, median error (1: a guess of the mean)")
        table.add_column("read from")
        table.add_column("error", justify="right")
        table.add_row("the plain upload", f"{self.plain_error:.1e}", style="bold red")
        table.add_row("the masked upload", f"{self.masked_error:.2f}", style="bold green")
        table.add_row(f"the sum of {self.clients}, which the coordinator gets", f"{self.sum_error:.2f}")
        return table

    def draw(self) -> None:
        """Save the picture as PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.6, 3.7), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 3, sharex=True, sharey=True)
        true, given_away = [one.true for one in self.victims], [pair for one in self.victims for pair in one.given_away]
        for axes, title, found, colour in zip(
            panels, self._titles(), self._found(), ("#b2182b", "#1b7837", "#2166ac"), strict=True
        ):
            axes.plot(_ENDS, _ENDS, color="grey", linewidth=0.8)
            axes.scatter(self._entered(true), self._entered(found), s=9, color=colour, alpha=0.55, linewidths=0)
            axes.set_title(title, fontsize=10)
        if given_away:
            as_is, as_found = zip(*given_away, strict=True)
            panels[2].scatter(self._entered(as_is), self._entered(as_found), s=9, color="#b2182b", linewidths=0)
        panels[0].set_xscale("symlog", linthresh=2)  # a few homes are far from all others
        panels[0].set_yscale("symlog", linthresh=2)
        panels[0].set(xticks=_TICKS, xticklabels=_TICKS, yticks=_TICKS, yticklabels=_TICKS, ylabel="what the coordinator reads")
        figure.supxlabel("true feature, in standard deviations from the mean (CHAS: 0 or 1)", fontsize=9)
        figure.suptitle(
            f"{len(self.victims)} homes, each a client's only example; what lies on the grey line is read exactly", fontsize=10
        )
        figure.savefig(self.picture, dpi=110)

    def _titles(self) -> tuple[str, str, str]:
        return (
            f"plain upload: error {self.plain_error:.0e}",
            f"masked upload: error {self.masked_error:.2f}",
            f"sum of {self.clients}: error {self.sum_error:.2f}, {self.sum_found:.0%} found (red)",
        )

    def _found(self) -> tuple[list[Floats], list[Floats], list[Floats]]:
        """What was read of the victims, from each."""
        return [v.plain for v in self.victims], [v.masked for v in self.victims], [v.summed for v in self.victims]

    def _entered(self, features: Sequence[Floats]) -> Floats:
        """All of them on one scale: as they enter the first layer."""
        entered: Floats = ((np.array(features) - self.layer.mean) / self.layer.scale).reshape(-1)
        return entered


def _rounded(value: float, scale: float) -> str:
    """To a thousandth of the feature's deviation, or finer."""
    digits = max(0, 3 - math.floor(math.log10(scale)))
    return f"{round(value, digits) + 0.0:.{digits}f}"  # adding nothing makes −0 a 0


def _median(values: Any) -> float:
    return float(np.median(list(values)))
