"""The yardsticks of the machine, and the timing of work between two readings of them."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gptx import _core

_TRIAL_STEPS = 25_000
_SETTLE_SECONDS = 0.1  # threads of a peer that spin after their work would slow down a yardstick


class Yardsticks:
    """What the machine can do right now: arithmetic peak and read bandwidth on all threads.

    Args:
        threads: as many as the work that is measured uses.
        arithmetic: the precision whose multiply-adds are the peak.
        quick: short readings of a buffer that a cache may hold; for trying the script out.
    """

    def __init__(self, threads: int, arithmetic: str = "float32", *, quick: bool = False) -> None:
        self._isa = os.environ.get("GPTX_CPU_ISA") or _core.usable_isas()[0]
        self._threads = threads
        self._arithmetic = arithmetic
        seconds = 0.005 if quick else 0.05
        # Written, hence really there; far larger than any cache.
        self._buffer = np.ones((64 if quick else 512) * 2**20 // 4, dtype=np.float32)
        self._steps = _TRIAL_STEPS
        trial = seconds_of(self.peak) - _SETTLE_SECONDS
        self._steps = max(_TRIAL_STEPS, int(_TRIAL_STEPS * seconds / trial))
        self._reads = 1
        self._reads = math.ceil(seconds * self.read() / self._buffer.nbytes)

    def peak(self) -> float:
        """Operations/s of the multiply-adds in registers, each of which is two."""
        time.sleep(_SETTLE_SECONDS)
        return _core.testing.probe_peak(self._isa, self._arithmetic, self._threads, self._steps)

    def read(self) -> float:
        """Bytes/s of reading memory in order, each thread its own part."""
        time.sleep(_SETTLE_SECONDS)
        return _core.testing.probe_read(self._isa, self._threads, self._buffer, self._reads)


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Spread:
    """The middle of some samples, and how far they lie apart."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(statistics.median(samples), min(samples), max(samples))

    def show(self, scale: float = 1.0, digits: int = 0) -> str:
        middle, low, high = (
            f"{value * scale:.{digits}f}" for value in (self.median, self.low, self.high)
        )
        return f"{middle} ({low}..{high})"
