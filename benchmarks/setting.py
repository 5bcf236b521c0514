"""What every measurement needs: a network, images, and a record of what was measured where."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import mdeq
from mdeq import (
    Anderson,
    Architecture,
    ClassificationHeadConfig,
    Gmres,
    Implicit,
    MDEQConfig,
    Network,
)
from pipeline import files
from pipeline.data import cifar10
from pipeline.data.loading import normalised
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.recipe import Adam, Sgd
from pipeline.sets import SETS

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Preset:
    """A model of Tables 1 and 2 with the paper's solver limits; `batch` fits a small machine."""

    model: MDEQConfig
    head: ClassificationHeadConfig
    classes: int = 10
    size: int = 32
    batch: int = 32
    forward: int = 18
    backward: int = 20
    optimizer: Adam | Sgd = Adam(lr=1e-3)


PRESETS = {
    "mdeq-small": Preset(
        MDEQConfig(channels=(24, 24), dropout=0.25),
        ClassificationHeadConfig(channels=(8, 16), final_channels=200),
    ),
    "mdeq-10m": Preset(
        MDEQConfig(channels=(32, 64, 128, 256), dropout=0.3),
        ClassificationHeadConfig(channels=(14, 28, 56, 112), final_channels=1680),
        batch=8,
    ),
    "imagenet-mdeq-small": Preset(
        MDEQConfig(channels=(32, 64, 128, 256), downsamplings=2, post_fusion_affine=True),
        ClassificationHeadConfig(channels=(24, 48, 96, 192), final_channels=2048),
        classes=1000,
        size=224,
        batch=2,
        forward=26,
        backward=27,
        optimizer=Sgd(lr=0.05),
    ),
}


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command's parser with the options that every command has."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--weights", type=Path, help="a trained MDEQ classifier, .safetensors")
    model.add_argument("--preset", choices=PRESETS, help="a model of the paper, random weights")
    parser.add_argument("--train-steps", type=int, default=0, help="updates of a preset beforehand")
    parser.add_argument("--data", type=Path, help="holds cifar-10-batches-py/; without it: noise")
    parser.add_argument("--batch", type=int, help="images per step (32, or the preset's)")
    parser.add_argument("--size", type=int, help="height and width of noise (32, or the preset's)")
    parser.add_argument("--forward", type=int, help="updates forward (18, or the preset's)")
    parser.add_argument("--backward", type=int, help="updates backward (20, or the preset's)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="append", metavar="TEXT", help="columns so named")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


@dataclass(frozen=True)
class Setting:
    """A network in training mode and a batch for it.

    Attributes:
        preset: Its sizes are those in force.
        facts: How a record begins.
    """

    network: Network
    preset: Preset
    images: Tensor
    labels: Tensor
    facts: dict[str, Any]

    def write(self, path: Path | None, report: dict[str, Any]) -> None:
        """Prints the facts, and writes them and `report` if there is a path."""
        print("; ".join(f"{name} {value}" for name, value in self.facts.items()))
        if path:
            files.write_json(path, self.facts | report)


def load(arguments: argparse.Namespace) -> Setting:
    """The network, trained briefly if --train-steps says so, and the first test images.

    Raises:
        SystemExit: Weights or images cannot be had; one line says why.
    """
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    network, preset = _trained(arguments.weights) if arguments.weights else _random(arguments)
    names = ("batch", "size", "forward", "backward")
    given = {name: getattr(arguments, name) for name in names}
    preset = replace(preset, **{name: value for name, value in given.items() if value is not None})
    weights = "trained"
    if arguments.preset:
        weights = f"after {arguments.train_steps} updates" if arguments.train_steps else "random"
    facts = {
        "command": shlex.join(
            ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
        ),
        "date": date.today().isoformat(),
        **Machine(ROOT).describe(),
        "model": arguments.preset or arguments.weights.stem,
        "weights": weights,
        "images": "CIFAR-10" if arguments.data else "noise",
        "threads": arguments.threads,
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        **{name: getattr(preset, name) for name in names},
    }
    if arguments.preset and arguments.train_steps:
        pool = _images(arguments.data, preset, 16 * preset.batch, "train")
        facts["loss"] = train_briefly(network, *pool, preset.batch, arguments.train_steps)
    images, labels = _images(arguments.data, preset, preset.batch, "test")
    return Setting(network.train(), preset, images, labels, facts)


def _trained(path: Path) -> tuple[Network, Preset]:
    try:
        network = mdeq.load(path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--weights: {error}") from None
    if not isinstance(network, Network):
        raise SystemExit(f"{path}: not an MDEQ; give the model of a `classify` stage")
    architecture = cast(Architecture, network.architecture)
    if not isinstance(architecture.head, ClassificationHeadConfig):
        raise SystemExit(f"{path}: not a classifier; give the model of a `classify` stage")
    model = cast(MDEQConfig, architecture.model)
    return network, Preset(model, architecture.head, architecture.classes)


def _random(arguments: argparse.Namespace) -> tuple[Network, Preset]:
    preset = PRESETS[arguments.preset]
    return Network(preset.model, preset.head, preset.classes), preset


def train_briefly(
    network: Network, images: Tensor, labels: Tensor, batch: int, steps: int
) -> float:
    """Updates of Adam, the first half of them unrolled, so that weights are not random.

    Returns:
        The last loss.
    """
    backbone = network.train().backbone
    backbone.forward_solver, backbone.backward = Anderson(12), Implicit(Gmres(8))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    generator, loss = torch.Generator().manual_seed(0), torch.zeros(())
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        prediction = network(images[chosen], unroll_steps=5 if step < steps // 2 else None)
        loss = F.cross_entropy(prediction.logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def _images(data: Path | None, preset: Preset, count: int, split: str) -> tuple[Tensor, Tensor]:
    """The first images (N, 3, H, W) of a split, normalised, or noise; and labels (N,)."""
    if data is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 3, preset.size, preset.size, generator=generator)
        return images, torch.randint(preset.classes, (count,), generator=generator)
    if preset.size != 32:
        raise SystemExit(f"--data: CIFAR-10 has 32 x 32 images, not {preset.size}; leave it out")
    try:
        pixels, labels = cifar10.read_split(data, None, split)
    except UserError as error:
        raise SystemExit(f"{error}; or leave --data out, for noise") from None
    if len(pixels) < count:
        raise SystemExit(f"--batch: {data} has {len(pixels)} {split} images, not {count}")
    facts = SETS["cifar10"]
    images = normalised(torch.from_numpy(pixels[:count]), facts.mean, facts.std)
    return images, torch.from_numpy(labels[:count])
