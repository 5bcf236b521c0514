"""One training step of an equilibrium model: this library beside its peers.

    python -m benchmarks.peers --weights model.safetensors --data FOLDER --out peers.json
    python -m benchmarks.peers --preset imagenet-mdeq-small --train-steps 6 --out peers.json

A step is a forward and a backward pass, without an optimizer. All columns have the same f, head,
weights, images and dropout masks; they differ in solver and gradient. They take turns, so that a
slower minute of the machine hits all. Times are CPU seconds of the process. A sample is clean if
other processes used less than 12 % of this process's CPUs during it: rounds are repeated until
every column has --rounds clean samples, at most --patience times. A column that then has fewer
counts all its samples. Residuals are recomputed alike for all (benchmarks/columns.py).

FOLDER holds cifar-10-batches-py/. torch and numpy suffice; torchdeq is in the extra `bench`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks import setting, timing
from benchmarks.columns import Column, Step, contestants


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes JSON."""
    parser = setting.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="clean samples per column")
    parser.add_argument("--patience", type=int, default=15, help="rounds at most")
    arguments = parser.parse_args(argv)
    there = setting.load(arguments)
    columns = contestants(there.preset.forward, there.preset.backward, arguments.only)
    step = Step(there.network, there.images, there.labels)
    probes = {column.name: step.probe(column) for column in columns}
    samples = take_turns(step, columns, arguments.rounds, arguments.patience)
    rows = []
    for column in columns:
        taken = samples[column.name]
        row = {
            "name": column.name,
            **timing.summary(taken, arguments.rounds),
            **vars(probes[column.name]),
        }
        if column.counterpart in samples:
            row["counterpart"] = column.counterpart
            row["times"] = _times(taken, samples[column.counterpart], arguments.rounds)
        rows.append(row)
    print(markdown(rows))
    there.write(arguments.out, {"rounds": arguments.rounds, "columns": rows})


def take_turns(
    step: Step, columns: list[Column], rounds: int, patience: int
) -> dict[str, list[timing.Sample]]:
    """Samples of every column, one per round."""
    samples: dict[str, list[timing.Sample]] = {column.name: [] for column in columns}
    for column in columns:
        step.run(column)  # warms up
    for _ in range(patience):
        for column in columns:
            samples[column.name].append(timing.measure(partial(step.run, column)))
        if all(sum(sample.clean for sample in taken) >= rounds for taken in samples.values()):
            break
    return samples


def _times(peer: list[timing.Sample], ours: list[timing.Sample], rounds: int) -> float:
    """How many times the seconds of our counterpart a peer takes: the median over the rounds."""
    both = set(timing.counted(peer, rounds)) & set(timing.counted(ours, rounds))
    return statistics.median(peer[i].cpu / ours[i].cpu for i in both)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/benchmarks.md."""
    lines = [
        "| step | CPU s, median (range) | evaluations / products | residual, forward / backward "
        "| times ours |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = f"{row['seconds']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
        backward = row["backward_residual"]
        backward = "none" if backward is None else f"{backward:.2g}"
        cells = (
            row["name"],
            seconds,
            f"{row['evaluations']} / {row['passes'] - 1}",
            f"{row['forward_residual']:.2g} / {backward}",
            f"{row['times']:.2f}" if "times" in row else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
