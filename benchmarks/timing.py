"""Wall and CPU seconds of a piece of work, and how much of the machine others used meanwhile."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

CLEAN = 0.12  # a sample counts as clean when others used less than this share of the machine


@dataclass(frozen=True)
class Sample:
    """Seconds of wall time and of this process's CPUs; `others`: the share of all CPUs that others used, else nan."""

    wall: float
    cpu: float
    others: float


def measure(work: Callable[[], object]) -> Sample:
    """Runs `work` once."""
    busy, cpu, wall = _busy_seconds(), time.process_time(), time.perf_counter()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    others = (_busy_seconds() - busy - cpu) / (wall * (os.cpu_count() or 1))
    return Sample(wall, cpu, max(0.0, others))


def summary(samples: Sequence[Sample]) -> dict[str, object]:
    """Medians over the clean samples, over all where none is clean; minima over all; every sample."""
    clean = [sample for sample in samples if sample.others < CLEAN]
    counted = clean or samples
    return {
        "wall": statistics.median(sample.wall for sample in counted),
        "wall_min": min(sample.wall for sample in samples),
        "cpu": statistics.median(sample.cpu for sample in counted),
        "cpu_min": min(sample.cpu for sample in samples),
        "clean": len(clean),
        "samples": [[sample.wall, sample.cpu, sample.others] for sample in samples],
    }


def _busy_seconds() -> float:
    """CPU seconds that anyone on this machine has used since it started; nan where /proc/stat does not tell."""
    try:
        first = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0]
    except OSError:
        return math.nan
    user, nice, system, _idle, _wait, irq, soft_irq, steal, *_ = (int(ticks) for ticks in first.split()[1:])
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")
