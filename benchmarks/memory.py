"""What three training steps need beyond the model: the rise of the process's peak memory, and in which part.

    python -m benchmarks.memory --preset mdeq-small --noise --out memory.json
    python -m benchmarks.memory --preset imagenet-mdeq-small --noise --only Broyden --samples 5 --out memory.json
    MALLOC_MMAP_THRESHOLD_=65536 python -m benchmarks.memory ...      # whether the allocator holds it

Every sample is a fresh process with network, images and optimiser in place; the columns take turns, medians are
printed. A step includes the optimiser's update. The peak of resident memory is reset (Linux: /proc/self/clear_refs) at
the start of each part of a step, so the table says where the whole peak lies:

    stem        images to the injection, and what is fixed during a solve
    solve       the forward solver and f's tape
    head        its tape and the loss
    head back   back-propagation through the head, until dl/dz* is known
    adjoint     until the first gradient of a weight of f
    gradients   the other weights' gradients
    update      the optimiser

Beside the table stands what is known beforehand: weights, their gradients, the optimiser's state, one state (B, D).
torch and numpy suffice; torchdeq's columns need `pip install '.[bench]'`.
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
from torch import Tensor, nn

from benchmarks import setting
from benchmarks.columns import Column, Step, contestants
from pipeline.recipe import make_optimizer

STEPS = 3
PARTS = ("stem", "solve", "head", "head back", "adjoint", "gradients", "update")
MIB = 1 << 20


class Peaks:
    """MiB of resident memory above that at the start: the peak within each part, and what stays at its end."""

    def __init__(self) -> None:
        self.peak: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.end: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        _reset_peak()
        self.start = _status("VmRSS")

    def close(self, part: str) -> None:
        """Ends `part`; the next begins."""
        self.peak[part] = max(self.peak[part], _status("VmHWM") - self.start)
        self.end[part] = _status("VmRSS") - self.start
        _reset_peak()


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes JSON."""
    parser = setting.parser(__doc__)
    parser.add_argument("--samples", type=int, default=5, help="processes of each column")
    parser.add_argument("--only", action="append", metavar="TEXT", help="columns whose name holds TEXT; repeatable")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the name of the column that this process measures
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    there = setting.load(arguments)
    at_once = Step(there.network, *there.batch()).at_once
    columns = contestants(there.preset.forward, there.preset.backward, at_once, arguments.only)
    if arguments.one:
        column = next(column for column in columns if column.name == arguments.one)
        print(json.dumps(_steps(column, there)))
        return
    taken: dict[str, list[dict[str, Any]]] = {column.name: [] for column in columns}
    for _ in range(arguments.samples):
        for name, samples in taken.items():
            samples.append(_in_fresh_process([*given, "--one", name]))
    rows = [_summary(name, samples) for name, samples in taken.items()]
    report: dict[str, Any] = {
        "steps": STEPS,
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "known": _known(there),
        "columns": rows,
    }
    _print(there.facts | report["malloc"], report["known"], rows)
    there.write(report)


def _steps(column: Column, there: setting.Setting) -> dict[str, Any]:
    """Peaks of three updates in this process."""
    optimizer = make_optimizer(there.network, there.preset.optimizer)
    step = _InParts(there, column)
    nn.Conv2d(3, 8, 3)(torch.zeros(1, 3, 8, 8)).sum().backward()  # loads libraries, which are no column's
    step.peaks = Peaks()
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        step.once()
        optimizer.step()
        step.peaks.close("update")
    return {"rise": max(step.peaks.peak.values()), "peak": step.peaks.peak, "end": step.peaks.end}


class _InParts:
    """A training step that tells `peaks` where its parts end; f itself is untouched."""

    peaks: Peaks

    def __init__(self, there: setting.Setting, column: Column) -> None:
        self.step, self.layer, self.adjoint_done = Step(there.network, *there.batch()), column.layer, False
        for parameter in there.network.backbone.f.parameters():
            parameter.register_post_accumulate_grad_hook(self._gradient)

    def once(self) -> None:
        self.adjoint_done = False
        f, z0, loss = self.step.problem()
        self.peaks.close("stem")
        z = self.layer(f, z0)
        self.peaks.close("solve")
        z.register_hook(lambda _: self.peaks.close("head back"))
        value = loss(z)
        self.peaks.close("head")
        value.backward()
        self.peaks.close("gradients")

    def _gradient(self, _: Tensor) -> None:
        if not self.adjoint_done:
            self.adjoint_done = True
            self.peaks.close("adjoint")


def _in_fresh_process(argv: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", *argv], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"benchmarks.memory {' '.join(argv)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _status(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _known(there: setting.Setting) -> dict[str, float]:
    """MiB of what every column holds, and of one state."""
    weights = sum(p.numel() * p.element_size() for p in there.network.parameters()) / MIB
    z0 = Step(there.network, *there.batch()).problem()[1]
    moments = 2 if there.preset.optimizer.kind == "adam" else 1
    return {
        "weights": weights,
        "gradients": weights,
        "optimiser": moments * weights,
        "one state": z0.numel() * z0.element_size() / MIB,
    }


def _summary(name: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "rise": median(sample["rise"] for sample in samples),
        "rises": [sample["rise"] for sample in samples],
        **{key: {part: median(s[key][part] for s in samples) for part in PARTS} for key in ("peak", "end")},
    }


def _print(facts: dict[str, Any], known: dict[str, float], rows: list[dict[str, Any]]) -> None:
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    print("MiB: " + ", ".join(f"{name} {size:.1f}" for name, size in known.items()))
    print(f"{'rise':>8} {'x 1st':>6} " + " ".join(f"{part:>10}" for part in PARTS) + "  column (peak within each part)")
    for row in rows:
        parts = " ".join(f"{row['peak'][part]:10.1f}" for part in PARTS)
        print(f"{row['rise']:8.1f} {row['rise'] / rows[0]['rise']:6.2f} {parts}  {row['name']}")


if __name__ == "__main__":
    main()
