"""What work costs in bytes and operations, and how near the machine's limits it came."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The least that some work has to move and to compute.

    Attributes:
        bytes: of weights and cache, each read once.
        flops: a multiply-add is two.
    """

    bytes: float
    flops: float


@dataclass(frozen=True)
class Roof:
    """The limits, measured in the same run.

    Attributes:
        bytes_per_second: of a copy on the device, read and written bytes together.
        flops_per_second: of a large product in bfloat16.
    """

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, cost: Cost) -> float:
        """What the slower of the two would need."""
        return max(cost.bytes / self.bytes_per_second, cost.flops / self.flops_per_second)

    def share(self, cost: Cost, seconds: float) -> float:
        """1 where the work took no longer than its limit."""
        return self.seconds(cost) / seconds
