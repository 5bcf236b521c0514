"""Training killed at random moments for a long time: nothing may be lost, and neither memory nor open files may grow.

    make soak

Runs the training stages of a params.yaml in turn, in a folder of their own, each killed `--kills` times before it may
end, again and again, and prints a line a stage. Weights that differ from those of the first round end it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "work" / "soak"
STAGES = ("classify", "pretrain", "finetune")


def main() -> None:
    """Prints a CSV: round, stage, seconds, kills, peak memory in MB, most open files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=ROOT / "params.yaml")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=20.0, help="seconds until a kill, at most")
    parser.add_argument("--model", default="mdeq-small")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    shutil.copy(options.params, FOLDER / "params.yaml")
    for name in ("cifar10", "imagenet", "cityscapes"):
        if run(("prepare", name), None)[0]:
            sys.exit(f"prepare {name} failed")
    draw, until, first = random.Random(options.seed), time.monotonic() + 60 * options.minutes, {}
    print("round,stage,seconds,kills,memory_mb,open_files", flush=True)
    number = 0
    while time.monotonic() < until or not number:
        for stage in STAGES:
            began, kills, memory, files = time.monotonic(), 0, 0.0, 0
            while True:
                limit = draw.uniform(0, options.longest) if kills < options.kills else None
                code, used, opened = run((stage, options.model), limit)
                memory, files = max(memory, used), max(files, opened)
                if code == 0:
                    break
                if code != -signal.SIGKILL:
                    sys.exit(f"{stage}: exit code {code}")
                kills += 1
            print(f"{number},{stage},{time.monotonic() - began:.0f},{kills},{memory:.0f},{files}", flush=True)
            out = FOLDER / "results" / stage / options.model
            if first.setdefault(stage, found := weights(out / "model.pt")) != found:
                sys.exit(f"{stage}: other weights than in the first round")
        for stage in STAGES:
            shutil.rmtree(FOLDER / "results" / stage)
        number += 1


def run(command: tuple[str, ...], limit: float | None) -> tuple[int, float, int]:
    """A stage, killed after `limit` seconds; its exit code, peak memory in MB and most open files."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *command],
        cwd=FOLDER,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    began, memory, files = time.monotonic(), 0.0, 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory = max(
                memory, *(int(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith("VmHWM"))
            )
            files = max(files, len(os.listdir(f"/proc/{process.pid}/fd")))
        except (OSError, TypeError):
            pass  # it has just ended
        if limit is not None and time.monotonic() - began > limit:
            process.kill()
        time.sleep(0.1)
    return process.returncode, memory, files


def weights(path: Path) -> str:
    """A digest of a model's weights."""
    digest = hashlib.sha256()
    for name, value in torch.load(path, weights_only=True)["state"].items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
