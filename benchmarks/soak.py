"""The chain of stages for an hour, its trainings killed at random moments: nothing lost, nothing growing.

    make soak

The first round runs undisturbed. In each later one every training is killed `--kills` times, at moments of its own CPU
time that are spread over all of it, and must end with the first round's weights and, as one run, with its recorded
history. Memory and open files are those of the longest leg, early and late in its training. What is wrong is said at
the end, exit code 1. Stages are forked from this process, which has imported all, so that kills hit their work.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from pathlib import Path
from statistics import median
from typing import NoReturn

import torch

from pipeline import cli

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "work" / "soak"
MODEL = "mdeq-small"
TRAINED = {"classify": "cifar10", "pretrain": "imagenet", "finetune": "cityscapes"}
BEFORE = [("prepare", name) for name in TRAINED.values()]
AFTER = [("evaluate", name, MODEL) for name in TRAINED.values()] + [("convergence", "cifar10"), ("report",), ("sync",)]
TICK = os.sysconf("SC_CLK_TCK")
SLOW = """matplotlib.pyplot mlflow.store.tracking.sqlalchemy_store mlflow.system_metrics.system_metrics_monitor
torch._dynamo pipeline.progress pipeline.tracking pipeline.train_params pipeline.stages.classify
pipeline.stages.convergence pipeline.stages.evaluate pipeline.stages.finetune pipeline.stages.pretrain
pipeline.stages.prepare pipeline.stages.report"""


@dataclass
class Leg:
    """One process of a stage: its exit code, CPU seconds in all and until it trained, and (MB, open files) then."""

    code: int = 0
    cpu: float = 0.0
    start: float = 0.0
    seen: list[tuple[float, int]] = field(default_factory=list)

    def early_and_late(self) -> tuple[list[float], list[float]]:
        """Medians of memory and open files over the first fifth of the training, and over the last."""
        part = max(1, len(self.seen) // 5)
        early, late = (
            [median(column) for column in zip(*rows, strict=True)] for rows in (self.seen[:part], self.seen[-part:])
        )
        return early, late


@dataclass
class Training:
    """A stage that trained to its end: kills on the way, seconds, its longest leg, and what it made."""

    kills: int
    seconds: float
    longest: Leg
    outcome: object = None  # digest of the weights, recorded history

    def line(self) -> str:
        """Its figures, as the head of the CSV names them."""
        (mb, files), (mb_late, files_late) = self.longest.early_and_late()
        memory = f"{mb:.0f},{mb_late:.0f},{files:.0f},{files_late:.0f}"
        return f"{self.seconds:.0f},{self.kills},{self.longest.cpu:.0f},{memory}"

    def wrong(self, undisturbed: Training) -> Iterator[str]:
        """What differs from the first, undisturbed one; many legs are too short to compare with themselves."""
        early, (mb_late, files_late) = self.longest.early_and_late()
        mb, files = early if self is undisturbed else undisturbed.longest.early_and_late()[1]
        if mb_late > 1.05 * mb + 10 or files_late > files + 4:
            yield "it grows"
        if self.outcome != undisturbed.outcome:
            yield "other weights or another history than undisturbed"


def main() -> None:
    """Prints a CSV, a line a training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=ROOT / "params/soak.yaml")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    shutil.copy(options.params, FOLDER / "params.yaml")
    sys.path.insert(0, str(ROOT))
    for module in SLOW.split():
        import_module(module)
    draw, until = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    undisturbed: dict[str, Training] = {}
    wrong: list[str] = []
    print("round,stage,seconds,kills,cpu_s,mb_early,mb_late,files_early,files_late", flush=True)
    for number in count():
        if number > 1 and time.monotonic() > until:
            break
        for stage, training in one_round(number, undisturbed, options.kills, draw).items():
            first = undisturbed.setdefault(stage, training)
            wrong += [f"round {number}, {stage}: {what}" for what in training.wrong(first)]
    sys.exit("\n".join(wrong) or 0)


def one_round(number: int, undisturbed: dict[str, Training], kills: int, draw: random.Random) -> dict[str, Training]:
    """One round, from the data to the report."""
    for command in BEFORE:
        whole(command)
    trained = {}
    for stage in TRAINED:
        trained[stage] = train(stage, undisturbed.get(stage), kills, draw)
        print(f"{number},{stage},{trained[stage].line()}", flush=True)
    for command in AFTER:
        whole(command)
    for stage, training in trained.items():
        training.outcome = weights(stage), history(stage, number + 1)
    shutil.rmtree(FOLDER / "results")
    return trained


def train(stage: str, undisturbed: Training | None, kills: int, draw: random.Random) -> Training:
    """Trains to the end, killed up to `kills` times at moments spread over what the undisturbed one took."""
    began, killed, longest = time.monotonic(), 0, Leg()
    while True:
        limit = None
        if undisturbed and killed < kills:
            leg = undisturbed.longest
            limit = draw.uniform(0, leg.start + 2 * (leg.cpu - leg.start) / kills)
        leg = run((stage, MODEL), limit)
        longest = max(leg, longest, key=lambda leg: len(leg.seen))
        if leg.code == 0:
            return Training(killed, time.monotonic() - began, longest)
        if leg.code != -signal.SIGKILL:
            sys.exit(f"{stage}: exit code {leg.code}")
        killed += 1


def whole(command: tuple[str, ...]) -> None:
    """A stage that nobody disturbs."""
    if code := run(command, None).code:
        sys.exit(f"{' '.join(command)}: exit code {code}")


def run(command: tuple[str, ...], limit: float | None) -> Leg:
    """A stage, killed after `limit` seconds of CPU time."""
    leg, state, results = Leg(), FOLDER / "work" / "-".join(command[:2]), FOLDER / "results" / Path(*command[:2])
    child = os.fork() or _become(command)
    proc, ended = Path("/proc", str(child)), 0
    try:
        while not ended:
            leg.cpu = sum(map(int, (proc / "stat").read_text().rpartition(")")[2].split()[11:13])) / TICK
            if list(state.glob("*/*.pt")) and not (results / "model.pt").exists():
                memory = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
                with contextlib.suppress(FileNotFoundError):  # it has just ended
                    leg.seen.append((memory, len(os.listdir(proc / "fd"))))
                    leg.start = leg.start or leg.cpu
            if limit is not None and leg.cpu > limit:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.05)
            ended, status = os.waitpid(child, os.WNOHANG)
    finally:
        if not ended:
            os.kill(child, signal.SIGKILL)
    leg.code = os.waitstatus_to_exitcode(status)
    return leg


def _become(command: tuple[str, ...]) -> NoReturn:
    """The child: runs the stage as the command line does."""
    os.setsid()
    os.chdir(FOLDER)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    sys.argv, code = ["pipeline", *command], 1
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def weights(stage: str) -> str:
    """A digest of a model's weights."""
    digest = hashlib.sha256()
    for name, value in torch.load(FOLDER / "results" / stage / MODEL / "model.pt", weights_only=True)["state"].items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def history(stage: str, rounds: int) -> list[tuple[str, int, float]]:
    """What the store has of the last of a stage's `rounds` finished runs, but for what the clock decides."""
    with sqlite3.connect(FOLDER / "mlflow.db") as store:
        runs = store.execute(
            "SELECT run_uuid FROM runs JOIN tags USING (run_uuid) WHERE key = 'stage' AND value = ? "
            "AND status = 'FINISHED' ORDER BY start_time",
            (stage,),
        ).fetchall()
        every = store.execute("SELECT count(*) FROM tags WHERE key = 'stage' AND value = ?", (stage,)).fetchone()
        assert len(runs) == every[0] == rounds, f"{stage}: {every[0]} runs, {len(runs)} of them finished, not {rounds}"
        return store.execute(
            "SELECT key, step, value FROM metrics WHERE run_uuid = ? AND key NOT LIKE 'time/%' "
            "AND key NOT LIKE 'memory/%' AND key NOT LIKE 'system/%' ORDER BY key, step",
            runs[-1],
        ).fetchall()


if __name__ == "__main__":
    main()
