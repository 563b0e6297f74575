"""What the coordinator knows of a task: told by the process that has the task's code, and torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from choral.manifest import Entry, EntryKind, Manifest
from choral.plan import Training


@dataclass(frozen=True)
class Blueprint:
    """A task and its model: name, version, names of the metrics, defaults of training, and the tensors.

    `keep` are the features that the model's Standardize layer, if it has one, passes unchanged; `ranges` what each feature can be.
    """

    task: str
    version: str
    metrics: tuple[str, ...]
    training: Training
    manifest: Manifest
    keep: tuple[int, ...] = ()
    ranges: tuple[tuple[float, float], ...] | None = None

    @property
    def statistics(self) -> tuple[Entry, Entry] | None:
        """The tensors that a statistics round fills, means and scales; None: the model wants none."""
        found = [entry for entry in self.manifest.entries if entry.kind is EntryKind.STATISTIC]
        return (found[0], found[1]) if found else None

    def to_json(self) -> dict[str, Any]:
        """As it is told."""
        entries = [asdict(entry) | {"kind": entry.kind.value} for entry in self.manifest.entries]
        return {
            "task": self.task,
            "version": self.version,
            "metrics": self.metrics,
            "training": self.training.model_dump(),
            "manifest": entries,
            "keep": self.keep,
            "ranges": self.ranges,
        }

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Blueprint:
        """The inverse."""
        entries = [one | {"kind": EntryKind(one["kind"]), "shape": tuple(one["shape"])} for one in told["manifest"]]
        return cls(
            task=told["task"],
            version=told["version"],
            metrics=tuple(told["metrics"]),
            training=Training(**told["training"]),
            manifest=Manifest(tuple(Entry(**entry) for entry in entries)),
            keep=tuple(told["keep"]),
            ranges=tuple((low, high) for low, high in told["ranges"]) if told["ranges"] is not None else None,
        )
