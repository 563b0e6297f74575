"""The aggregate of a statistics round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from choral.statistics import Moments, merge_all

from choral_server.rounds import Part


class StatisticsSum:
    """Each client's moments; merged in the order of the clients' names, so that the order of arrival changes no bit."""

    def __init__(self) -> None:
        self._parts: dict[str, Moments] = {}

    def fold(self, part: Part, path: Path) -> None:
        """Add the statistics in the file at `path`, the accepted result of `part`."""
        self._parts[part.client] = Moments.from_vector(np.fromfile(path, dtype="<f8"))

    def moments(self) -> Moments:
        """Of all clients' examples together."""
        return merge_all(self._parts[client] for client in sorted(self._parts))
