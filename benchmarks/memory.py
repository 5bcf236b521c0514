"""How much the peak memory of a process rises in three training updates, per column.

    python -m benchmarks.memory --preset mdeq-small --out memory.json
    python -m benchmarks.memory --preset imagenet-mdeq-small --only Broyden --samples 3

Every sample is a fresh process with network, images and optimizer in place; the columns take turns.
The peak of resident memory is reset before the first update (Linux: /proc/self/clear_refs).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks import setting
from benchmarks.columns import Column, Step, contestants
from pipeline.train.optimizers import make_optimizer

UPDATES = 3
MIB = 1 << 20


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes JSON."""
    parser = setting.parser(__doc__)
    parser.add_argument("--samples", type=int, default=5, help="processes per column")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the column that this process measures
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    there = setting.load(arguments)
    columns = contestants(there.preset.forward, there.preset.backward, arguments.only)
    if arguments.one:
        print(_rise(there, next(column for column in columns if column.name == arguments.one)))
        return
    rises: dict[str, list[float]] = {column.name: [] for column in columns}
    for _ in range(arguments.samples):
        for name, found in rises.items():
            found.append(_in_fresh_process([*given, "--one", name]))
    rows = [{"name": name, "rise": median(found), "rises": found} for name, found in rises.items()]
    print(markdown(rows))
    there.write(arguments.out, {"updates": UPDATES, "known": _known(there), "columns": rows})


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = ["| step | MiB, median (range) |", "|---|---|"]
    for row in rows:
        spread = f"({min(row['rises']):.0f} to {max(row['rises']):.0f})"
        lines.append(f"| {row['name']} | {row['rise']:.0f} {spread} |")
    return "\n".join(lines)


def _rise(there: setting.Setting, column: Column) -> float:
    """MiB by which the peak of this process rises in the updates."""
    optimizer = make_optimizer(there.network, there.preset.optimizer)
    step = Step(there.network, there.images, there.labels)
    nn.Conv2d(3, 8, 3)(torch.zeros(1, 3, 8, 8)).sum().backward()  # loads libraries beforehand
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    start = _status("VmRSS")
    for _ in range(UPDATES):
        step.run(column)
        optimizer.step()
    return _status("VmHWM") - start


def _status(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def _in_fresh_process(arguments: list[str]) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    path = os.pathsep.join([str(setting.ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _known(there: setting.Setting) -> dict[str, float]:
    """MiB of what every column holds: the weights, and one state."""
    weights = sum(p.numel() * p.element_size() for p in there.network.parameters())
    _, z0, _ = Step(there.network, there.images, there.labels).problem()
    return {"weights": weights / MIB, "state": z0.numel() * z0.element_size() / MIB}


if __name__ == "__main__":
    main()
