"""What a person sees of a training run: a bar with live solver figures on a terminal, plain lines in a log.

It also hands the tracker what a durable checkpoint covers, no step twice.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

import rich.progress as rich
from rich.console import Console

from pipeline.data.manifest import SECONDS_A_LINE
from pipeline.training import Row

if TYPE_CHECKING:
    from pipeline.tracking import Tracker

PATIENCE = 100


class Progress:
    """Observes one training run; a context manager.

    Args:
        title: Of the bar.
        tracker: Gets the metrics.
        prefix: Of their names, to tell the seeds of a stage apart.
        shown: Whether to print at all: of several processes one does.
    """

    def __init__(self, title: str, tracker: Tracker, prefix: str, *, shown: bool = True) -> None:
        self._tracker, self._prefix = tracker, prefix
        self.log: list[tuple[int, Row]] = []  # what the last checkpoint covers
        self._lost = 0  # updates in a row whose solver came no nearer to an equilibrium than its start
        self._title = title
        self._shown, self._terminal = shown, shown and sys.stderr.isatty()
        self._last_line = time.monotonic()
        columns = (
            rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(),
            rich.TimeRemainingColumn(), rich.TextColumn("{task.fields[figures]}"),
        )  # fmt: skip
        self._bar = rich.Progress(*columns, console=Console(stderr=True), disable=not self._terminal)
        self._steps = self._bar.add_task(title, total=None, figures="")
        self._validation = self._bar.add_task("validation", total=None, visible=False, figures="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, step: int, total: int, values: Row) -> None:
        """Shows an update and its figures."""
        text = _figures(values)
        self._lost = self._lost + 1 if values.get("solver/forward_residual", 0.0) >= 1 else 0
        if self._lost == PATIENCE:
            print(
                f"{self._title}: step {step}: for {PATIENCE} updates the solver found nothing nearer to an equilibrium "
                "than z = 0; training goes on with its best iterates. More forward.steps or a longer warm_up help",
                file=sys.stderr,
                flush=True,
            )
        self._bar.update(self._steps, completed=step, total=total, figures=text)
        due = step == total or time.monotonic() - self._last_line > SECONDS_A_LINE
        if due and self._shown and not self._terminal:
            self._last_line = time.monotonic()
            print(f"{self._title}: step {step}/{total} {text}", file=sys.stderr, flush=True)

    def validating(self, done: int, total: int) -> None:
        """Shows a validation batch."""
        self._bar.update(self._validation, completed=done, total=total, visible=done < total)

    def saved(self, log: list[tuple[int, Row]]) -> None:
        """Sends the rows that a checkpoint now covers."""
        for step, row in log[len(self.log) :]:
            self._tracker.metrics({self._prefix + name: value for name, value in row.items()}, step)
        self._tracker.flush()
        self.log = list(log)


def _figures(values: Row) -> str:
    shown = {
        "loss/train": "loss", "solver/forward_residual": "residual", "solver/backward_residual": "adjoint",
        "time/images_per_second": "images/s",
    }  # fmt: skip
    return "  ".join(f"{label} {values[name]:.3g}" for name, label in shown.items() if name in values)
