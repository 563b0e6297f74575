"""Whether a task can be trained privately as the configuration says, looked at before anything is opened."""

from __future__ import annotations

from choral.errors import ConfigError
from choral.metrics import LOSS
from choral.plan import Kind
from choral.privacy.accounting import epsilon
from choral.privacy.told import scale_for, told_of

from choral_server.aggregate import entry_bound
from choral_server.blueprint import Blueprint
from choral_server.config import RunSettings
from choral_server.privacy import Privacy
from choral_server.private_rounds import private_plan


def check_privacy(privacy: Privacy, run: RunSettings, task: Blueprint) -> None:
    """Raises ConfigError: the library is missing, something that is told has no range, or one round is more than the budget."""
    one = epsilon({privacy.release(privacy.noise): 1}, privacy.delta, privacy.counted_by, amplified=False)
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
    if privacy.on_devices:
        _check_noise_on_devices(privacy, run, task)
    check_ranges(task)


def _check_noise_on_devices(privacy: Privacy, run: RunSettings, task: Blueprint) -> None:
    """Raises ConfigError: a sum of what clients send would be too coarse, or its entries larger than any that are accepted."""
    size, secure, ranges = task.manifest.size, run.secure_aggregation, tuple((privacy.metrics or {}).values())
    told = told_of(
        Kind.TRAINING, private_plan(run, Kind.TRAINING, run.cohort_size, privacy.clip, ranges), size, masked=secure is not None
    )
    if secure is not None:
        kinds = [(Kind.TRAINING, ranges, run.cohort_size)]
        kinds += [(Kind.STATISTICS, task.ranges or (), secure.largest_cohort)] if task.statistics is not None else []
        kinds += [(Kind.EVALUATION, ranges, secure.largest_cohort)] if ranges else []
        for kind, beside, most in kinds:
            plan = private_plan(run, kind, most, privacy.clip, beside)
            try:
                bits = secure.ring_bits if kind is Kind.TRAINING else 64
                scale_for(told_of(kind, plan, size, masked=True), most, plan.clients, bits)
            except ConfigError as error:
                raise ConfigError(f"run.privacy, in a {kind.value} round of {most} clients: {error}") from None
    elif (largest := told.largest(1, 1)) > (bound := entry_bound(run.cohort_size)):
        raise ConfigError(
            f"run.privacy: with noise {privacy.noise:g} and clip {privacy.clip:g} an entry of an update may be {largest:.3g}, and "
            f"with cohort_size {run.cohort_size} at most {bound:.3g} can be summed: lower one of the three"
        )


def check_past(unprotected: int) -> None:
    """Raises ConfigError: so many rounds in the database have told without noise what no budget can take back."""
    if unprotected:
        raise ConfigError(
            f"run.privacy: {unprotected} rounds in this database were done without noise, and no budget counts what they have "
            "told: give privacy a database and a state folder of its own, or go on without run.privacy"
        )


def check_ranges(task: Blueprint) -> None:
    """Raises ConfigError: the task standardises features, and does not say what they can be."""
    if task.statistics is None:
        return
    features = task.statistics[0].size
    if task.ranges is None:
        raise ConfigError(
            f"task {task.task} standardises its features by statistics of the clients, which with privacy need bounds that are "
            "known without the data: give the Task its `ranges`, (smallest, largest) of each feature"
        )
    if len(task.ranges) != features or not all(low < high for low, high in task.ranges):
        raise ConfigError(f"task {task.task} has {len(task.ranges)} ranges for {features} features; each is (smallest, largest)")
