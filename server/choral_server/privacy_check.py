"""Whether a task can be trained privately as the configuration says, looked at before anything is opened."""

from __future__ import annotations

from choral.errors import ConfigError
from choral.metrics import LOSS
from choral.privacy.accounting import Release, epsilon

from choral_server.blueprint import Blueprint
from choral_server.privacy import Privacy


def check_privacy(privacy: Privacy, task: Blueprint) -> None:
    """Raises ConfigError: the library is missing, something that is told has no range, or one round is more than the budget."""
    one = epsilon({Release(privacy.noise): 1}, privacy.delta, privacy.counted_by, amplified=False)
    if privacy.sampling == "none" and one > privacy.epsilon:
        raise ConfigError(
            f"run.privacy: one round with noise {privacy.noise:g} costs ε {one:.4g}, and epsilon allows {privacy.epsilon:g}: "
            "more noise, or more ε; `choral privacy plan` says how much"
        )
    if (reason := privacy.too_large(task.manifest.size)) is not None:
        raise ConfigError(reason)
    measured = {LOSS, *task.metrics}
    if privacy.metrics is not None and privacy.metrics.keys() != measured:
        raise ConfigError(
            f"run.privacy.metrics gives ranges of {', '.join(sorted(privacy.metrics))}; clients of task {task.task} measure "
            f"{', '.join(sorted(measured))}: give one for each"
        )
    if task.statistics is not None:
        _check_ranges(task)


def check_past(unprotected: int) -> None:
    """Raises ConfigError: so many rounds in the database have told without noise what no budget can take back."""
    if unprotected:
        raise ConfigError(
            f"run.privacy: {unprotected} rounds in this database were done without noise, and no budget counts what they have "
            "told: give privacy a database and a state folder of its own, or go on without run.privacy"
        )


def _check_ranges(task: Blueprint) -> None:
    features = task.statistics[0].size if task.statistics is not None else 0
    if task.ranges is None:
        raise ConfigError(
            f"task {task.task} standardises its features by statistics of the clients, which under run.privacy need bounds that "
            "are known without the data: give the Task its `ranges`, (smallest, largest) of each feature"
        )
    if len(task.ranges) != features or not all(low < high for low, high in task.ranges):
        raise ConfigError(f"task {task.task} has {len(task.ranges)} ranges for {features} features; each is (smallest, largest)")
