"""What a frame saves that starts from the last frame's equilibrium, and what that changes.

    python -m benchmarks.video --weights results/finetune/mdeq-small/model.pt --out docs/measured/video.json

In each video a camera turns: a window of the size of the demo's scenes moves over a wide generated street, so many
pixels a frame, with the sensor's noise drawn anew in every frame. The figures are those of `predict --compare`, means
over the videos.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import pandas as pd

from benchmarks import setting
from pipeline import predict
from pipeline.data import cityscapes, scenes
from pipeline.inference import Predictor
from pipeline.machine import Machine

HEIGHT, WIDTH = 128, 256
NOISE = 2.0  # of 255
SPEEDS, TOLERANCES, STEPS = (1, 4), (1e-2, 1e-3), 60


def draw(folder: Path, seed: int, frames: int, speed: int) -> Path:
    """Write the frames of a video into a folder of their own, their label ids into `labels`; return the former."""
    rng = np.random.default_rng(seed)
    street, ids = scenes.street(rng, HEIGHT, WIDTH + speed * (frames - 1))
    own, labels = folder / f"street-{seed}", folder / "labels"
    own.mkdir(parents=True)
    labels.mkdir(exist_ok=True)
    for number in range(frames):
        seen, name = np.s_[:, number * speed : number * speed + WIDTH], f"{own.name}_{number:06}"
        noisy = (street[seen] + rng.normal(0, NOISE, (HEIGHT, WIDTH, 3))).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(own / f"{name}{cityscapes.IMAGE_END}"), noisy[..., ::-1])
        cv2.imwrite(str(labels / f"{name}{cityscapes.LABEL_END}"), ids[seen])
    return own


def measure(weights: Path, videos: int, frames: int, speed: int, tolerance: float) -> dict[str, float]:
    """The means of what `predict` says of each video."""
    predictor = Predictor(weights, Machine.from_environment(), steps=STEPS, tolerance=tolerance)
    with TemporaryDirectory() as name:
        drawn = [draw(Path(name), seed, frames, speed) for seed in range(videos)]
        answers, labels = Path(name, "answers"), Path(name, "labels")
        found = predict.run(predictor, drawn, answers, video=True, compare=True, labels=labels)
    means = pd.json_normalize(list(found.values())).mean().to_dict()
    return {"pixels": speed, "tolerance": tolerance, **means}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table; an arrow leads from what starts at zero to what starts at the frame before."""
    lines = ["| pixels a frame | tolerance | evaluations of f | pixels that differ | mIoU |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (
            str(row["pixels"]),
            f"{row['tolerance']:g}",
            f"{row['zero.evaluations']:.1f} → {row['before.evaluations']:.1f}",
            f"{100 * row['differing']:.2f} %",
            f"{row['zero.miou']:.2f} % → {row['before.miou']:.2f} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="a model.pt of `finetune`")
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--frames", type=int, default=12, help="of each video")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args(argv)
    rows = [measure(given.weights, given.videos, given.frames, s, t) for s in SPEEDS for t in TOLERANCES]
    given.out.write_text(json.dumps({**setting.made(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
