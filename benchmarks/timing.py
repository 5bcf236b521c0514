"""Seconds of a piece of work, and how much of its CPUs other processes used meanwhile."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
CLEAN = 0.12  # a sample is clean if others used less than this share of the CPUs


@dataclass(frozen=True)
class Sample:
    """One run of a piece of work.

    Attributes:
        wall: Seconds that passed.
        cpu: CPU seconds of this process.
        others: The share of the CPUs of this process that others used, NaN if it is not known.
    """

    wall: float
    cpu: float
    others: float

    @property
    def clean(self) -> bool:
        """Whether others left the CPUs alone."""
        return self.others < CLEAN


def measure(work: Callable[[], object]) -> Sample:
    """Runs `work` once."""
    cpus = os.sched_getaffinity(0)
    busy, cpu, wall = _busy_seconds(cpus), time.process_time(), time.perf_counter()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    others = (_busy_seconds(cpus) - busy - cpu) / (wall * len(cpus))
    return Sample(wall, cpu, max(0.0, others))


def counted(samples: Sequence[Sample], least: int) -> list[int]:
    """The indices of the clean samples; of all if fewer than `least` are clean."""
    clean = [i for i, sample in enumerate(samples) if sample.clean]
    return clean if len(clean) >= least else list(range(len(samples)))


def summary(samples: Sequence[Sample], least: int) -> dict[str, object]:
    """Median and spread of the CPU seconds of the `counted` samples, and every sample."""
    seconds = [samples[i].cpu for i in counted(samples, least)]
    return {
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "clean": sum(sample.clean for sample in samples),
        "samples": [[sample.wall, sample.cpu, sample.others] for sample in samples],
    }


def _busy_seconds(cpus: set[int]) -> float:
    """Seconds that these CPUs have worked since the machine started; NaN without /proc/stat."""
    try:
        lines = STAT.read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.nan
    names = {f"cpu{number}" for number in cpus}
    total = 0
    for name, *ticks in (line.split() for line in lines):
        if name in names:
            user, nice, system, _idle, _wait, irq, soft_irq, steal = map(int, ticks[:8])
            total += user + nice + system + irq + soft_irq + steal
    return total / os.sysconf("SC_CLK_TCK")
