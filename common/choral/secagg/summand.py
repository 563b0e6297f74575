"""What a client adds to a round's sum: the update in one ring, and behind it a few numbers in a wide one, all of which is masked.

Nothing about one client goes beside it in the clear: weights, losses and metrics are among the numbers, so only their sums appear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from choral.metrics import Metric
from choral.plan import Kind, Plan
from choral.privacy.told import told_by
from choral.secagg import wide
from choral.secagg.fixed_point import Ring
from choral.secagg.masks import Mask
from choral.secagg.wide import Number, Wide

CLIENTS, CLIPPED, WEIGHT, COUNT = "clients", "clipped", "weight", "count"
"""one of each client; one of each whose update had to be clipped; its capped number of examples; its number of examples"""
LARGEST = 1e30  # magnitude of a feature's mean, or of a metric: the model keeps float32, which ends at 3e38
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Layout:
    """A payload: `size` elements of `ring_bits` bits (0: no update is sent), then the wide numbers `names`; little-endian."""

    size: int
    ring_bits: int
    names: tuple[str, ...]

    @property
    def payload_bytes(self) -> int:
        """Its length."""
        return self.size * self.ring_bits // 8 + len(self.names) * wide.BYTES

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of the elements."""
        return np.dtype(f"<u{self.ring_bits // 8}")

    def numbers(self, values: Mapping[str, Number]) -> Wide:
        """The numbers, 0 where none is given. Raises ValueError: one is too large, or undefined."""
        return wide.encode(values.get(name, 0.0) for name in self.names)

    def zero(self) -> Summand:
        """The sum of nothing."""
        return Summand(np.zeros(self.size, self.dtype), self.numbers({}))


def layout_of(plan: Plan, size: int, features: int | None, metrics: Sequence[str]) -> Layout:
    """Of a round's results: `size` averaged elements, statistics of `features`, and `metrics` measured; the plan must be secure."""
    assert plan.secure is not None, "only what is summed securely is laid out so"
    bits = plan.secure.ring_bits
    if plan.private is not None:  # all that is told has noise, and is behind the update
        return Layout(told_by(plan, size).size, bits, (CLIENTS,))
    if plan.kind is Kind.STATISTICS:
        sums = [name for number in range(features or 0) for name in feature_sums(number)]
        return Layout(0, bits, (CLIENTS, COUNT, *sums))
    measured = [name for metric in metrics for name in metric_sums(metric)] if plan.evaluate else []
    if plan.kind is Kind.EVALUATION:
        return Layout(0, bits, (CLIENTS, *measured))
    return Layout(size, bits, (CLIENTS, CLIPPED, WEIGHT, *measured))


def feature_sums(number: int) -> tuple[str, str]:
    """What is summed of one feature: its values, and their squares."""
    return f"feature {number}", f"feature {number} squared"


def metric_sums(name: str) -> tuple[str, str]:
    """What is summed of one metric: the examples it was measured on, and value · examples."""
    return f"{name} examples", f"{name} total"


def measured(metrics: Iterable[Metric], weight_cap: int) -> dict[str, Number]:
    """What a client adds to the sums for its metrics; no metric weighs more than `weight_cap` examples.

    One that is undefined or beyond `LARGEST` is left out: to say so would tell of this client alone.
    """
    values: dict[str, Number] = {}
    for metric in metrics:
        if not abs(metric.value) <= LARGEST:
            continue
        examples, total = metric_sums(metric.name)
        weight = min(metric.examples, weight_cap)
        values |= {examples: weight, total: metric.value * weight}
    return values


@dataclass(frozen=True)
class Summand:
    """One client's, or a sum of many: `vector` (size,) and `numbers` (n, 4). They are changed in place."""

    vector: Ring
    numbers: Wide

    def add_mask(self, mask: Mask) -> None:
        """Hide it, or take off what is left of the masks in a sum."""
        mask.add_to(self.vector)
        mask.add_to_wide(self.numbers)

    def add_file(self, path: Path) -> None:
        """Add what another has sent, block by block. The file has this layout's length."""
        with path.open("rb") as file:
            for start in range(0, self.vector.size, per_block := _READ_BYTES // self.vector.itemsize):
                into = self.vector[start : start + per_block]
                np.add(into, np.frombuffer(file.read(into.nbytes), self.vector.dtype), out=into)
            wide.add(self.numbers, np.frombuffer(file.read(), "<u8").reshape(self.numbers.shape))

    def pieces(self) -> Iterable[memoryview]:
        """Its bytes, in pieces."""
        whole = self.vector.data.cast("B") if self.vector.size else memoryview(b"")
        yield from (whole[start : start + _READ_BYTES] for start in range(0, len(whole), _READ_BYTES))
        yield memoryview(self.numbers.astype("<u8", copy=False).tobytes())
