"""What a person sees of long work: a bar on a terminal, a line every half minute in a log.

A line that cannot be written (a closed or full stderr, an ASCII terminal) never stops the work.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

import rich.progress as rich
from rich.console import Console

from pipeline.errors import escaped

SECONDS_PER_LINE = 30.0
PATIENCE = 100  # updates whose solves all fail, before that is said
MEASURED_UPDATES, MEASURED_SECONDS = 20, 10.0  # before a training's duration is estimated
SHOWN = {
    "loss/train": "loss",
    "solver/forward_residual": "residual",
    "solver/backward_residual": "adjoint",
    "time/images_per_second": "images/s",
}

Item = TypeVar("Item")
Row = dict[str, float]


def say(text: str) -> None:
    """Writes a line to stderr; where that fails, this line and all later ones are dropped."""
    stream = sys.stderr
    if stream is None:  # closed before the start
        return
    encoding = stream.encoding or "ascii"
    line = escaped(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(line, file=stream, flush=True)
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def on_terminal() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def track(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """Passes on `items`, of which there are `total`, and shows how many are done."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    if on_terminal():
        yield from rich.track(items, title, total, console=Console(stderr=True), transient=True)
        return
    last = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > SECONDS_PER_LINE:
            last = time.monotonic()
            say(f"{title}: {number:,}" + (f" of {total:,}" if total else ""))


class Training(contextlib.AbstractContextManager["Training"]):
    """The observer of a training, see `pipeline.train.loop.Observer`; a context manager.

    Args:
        title: As "classify mdeq-small seed 0".
        record: Called with each row to record, and its step.
        shown: Whether to print at all: of several processes one does.
    """

    def __init__(
        self, title: str, record: Callable[[Row, int], None], *, shown: bool = True
    ) -> None:
        self._title, self._record, self._shown = title, record, shown
        self._bar: rich.Progress | None = None
        if shown and on_terminal():
            columns = (rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn())
            text = rich.TextColumn("{task.description}")
            self._bar = rich.Progress(*columns, text, console=Console(stderr=True))
            self._updates = self._bar.add_task(title, total=None)
            self._bar.start()
        self._last_line = self._since = time.monotonic()
        self._first_step: int | None = None  # of this phase, whose duration is measured
        self._estimated = self._solves = False
        self._failures = 0  # in a row

    def __exit__(self, *_: object) -> None:
        if self._bar:
            with contextlib.suppress(OSError, ValueError):  # the terminal was closed
                self._bar.stop()

    def step(self, step: int, total: int, values: Row) -> None:
        """Shows an update and its figures."""
        parts = [f"{label} {values[key]:.3g}" for key, label in SHOWN.items() if key in values]
        figures = "  ".join(parts)
        self._estimate(step, total, solves="solver/nfe" in values)
        self._watch_solver(step, values)
        if self._bar:
            text = f"{self._title}  {figures}"
            self._bar.update(self._updates, completed=step, total=total, description=text)
        elif step == total or time.monotonic() - self._last_line > SECONDS_PER_LINE:
            self._last_line = time.monotonic()
            self._say(f"step {step}/{total}  {figures}")

    def validating(self, batches: Collection[Any]) -> Iterable[Any]:
        """Passes on the batches of a validation and shows them."""
        if self._bar:
            yield from self._bar.track(batches, description="validation")
            self._bar.remove_task(self._bar.task_ids[-1])
        else:
            yield from track(batches, f"{self._title}: validation") if self._shown else batches

    def record(self, step: int, row: Row) -> None:
        """Records a row of the run."""
        self._record(row, step)

    def _say(self, text: str) -> None:
        if self._shown:
            say(f"{self._title}: {text}")

    def _estimate(self, step: int, total: int, solves: bool) -> None:
        """Says how long the training will take, once for unrolled and once for implicit updates."""
        now = time.monotonic()
        if self._first_step is None or solves != self._solves:
            self._first_step, self._since = step, now
            self._solves, self._estimated = solves, False
        updates, seconds = step - self._first_step, now - self._since
        if not self._estimated and updates >= MEASURED_UPDATES and seconds >= MEASURED_SECONDS:
            self._estimated = True
            left = duration(seconds / updates * (total - step))
            each = f"{seconds / updates:.2g} s per update"
            self._say(f"about {left} left on this machine, at {each}")

    def _watch_solver(self, step: int, values: Row) -> None:
        failed = values.get("solver/forward_residual", 0.0) >= 1
        self._failures = self._failures + 1 if failed else 0
        if self._failures == PATIENCE:
            self._say(
                f"step {step}: for {PATIENCE} updates the solver found nothing nearer to an "
                "equilibrium than its start; training continues with its best iterates. "
                "Raise forward.steps or warm_up.steps"
            )


def duration(seconds: float) -> str:
    """A duration in words, such as "6.2 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
