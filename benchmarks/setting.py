"""What the columns of a measurement share: a network, images, and the machine it runs on."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mdeq import Anderson, ClassificationHeadConfig, Gmres, Implicit, MDEQConfig, Network
from pipeline.checkpoints import load_model
from pipeline.data import cifar10, imagenet
from pipeline.data.loading import Keys, normalised
from pipeline.data.manifest import DataError
from pipeline.machine import Machine
from pipeline.recipe import Adam, Sgd

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class Preset:
    """A model of the paper (Tables 1 and 2), as its experiments trained it; `batch` is what fits a small machine."""

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
    """A command's parser with the options that every one has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--weights", type=Path, help="a trained MDEQ classifier, model.pt")
    model.add_argument("--preset", choices=PRESETS, help="a model of the paper at random weights")
    parser.add_argument("--train-steps", type=int, default=0, help="of a preset: so many updates before measuring")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", type=Path, default=Path("data/generated/cifar10"), help="folder that holds cifar-10-batches-py/"
    )
    source.add_argument("--photos", type=Path, help="folder of photos, for other sizes (needs pillow)")
    source.add_argument("--noise", action="store_true", help="random images and labels, and saying so")
    parser.add_argument("--batch", type=int, help="images a step (32, or the preset's)")
    parser.add_argument("--size", type=int, help="height and width of the images (32, or the preset's)")
    parser.add_argument("--forward", type=int, help="updates of the forward solver (18, or the preset's)")
    parser.add_argument("--backward", type=int, help="updates of the backward solver (20, or the preset's)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def made() -> dict[str, str | int]:
    """What every record says of itself: command, date, device, versions, commit."""
    command = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    return {"command": shlex.join(command), "date": date.today().isoformat(), **Machine(Path.cwd()).describe()}


@dataclass(frozen=True)
class Setting:
    """The network and where its images come from; `preset` holds the sizes in force."""

    network: Network
    preset: Preset
    arguments: argparse.Namespace
    facts: dict[str, Any]

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` images (N, 3, H, W), normalised, and their labels (N,)."""
        return _images(self.arguments, self.preset, count, "test")

    def batch(self) -> tuple[Tensor, Tensor]:
        """The batch that is measured."""
        return self.images(self.preset.batch)

    def write(self, report: dict[str, Any]) -> None:
        """Facts and `report` as JSON to --out, if that was given."""
        if self.arguments.out:
            self.arguments.out.parent.mkdir(parents=True, exist_ok=True)
            self.arguments.out.write_text(json.dumps(self.facts | report, indent=2) + "\n", encoding="utf-8")


def load(arguments: argparse.Namespace) -> Setting:
    """The network in training mode, briefly trained if --train-steps says so.

    Raises:
        SystemExit: with one line, where weights or images cannot be had.
    """
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.weights:
        network, architecture, _ = load_model(arguments.weights)
        if not isinstance(network, Network) or not isinstance(architecture.head, ClassificationHeadConfig):
            raise SystemExit(f"{arguments.weights}: not an MDEQ classifier; give the model.pt of a `classify` stage")
        assert isinstance(architecture.model, MDEQConfig)
        preset = Preset(architecture.model, architecture.head, architecture.classes)
    else:
        preset = PRESETS[arguments.preset]
        network = Network(preset.model, preset.head, preset.classes)
    given = {name: getattr(arguments, name) for name in ("batch", "size", "forward", "backward")}
    preset = replace(preset, **{name: value for name, value in given.items() if value is not None})
    facts = {
        **made(),
        "model": str(arguments.weights or arguments.preset),
        "weights": "trained" if arguments.weights else f"{arguments.train_steps} updates from random",
        "images": _source(arguments),
        "threads": arguments.threads,
        "load_before": os.getloadavg()[0],
        **{name: getattr(preset, name) for name in given},
    }
    if arguments.train_steps and arguments.preset:
        pool = _images(arguments, preset, 16 * preset.batch, "train")
        facts["loss_after_training"] = train_briefly(network, *pool, preset.batch, arguments.train_steps)
    return Setting(network.train(), preset, arguments, facts)


def train_briefly(network: Network, images: Tensor, targets: Tensor, batch: int, steps: int) -> float:
    """`steps` updates, the first half of them unrolled, so that the weights are not random; the last loss."""
    backbone = network.train().backbone
    kept = backbone.forward_solver, backbone.backward
    backbone.forward_solver, backbone.backward = Anderson(12), Implicit(Gmres(8))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    generator, loss = torch.Generator().manual_seed(0), torch.zeros(())
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        prediction = network(images[chosen], unroll_steps=5 if step < steps // 2 else None)
        loss = F.cross_entropy(prediction.logits, targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    backbone.forward_solver, backbone.backward = kept
    return float(loss)


def _source(arguments: argparse.Namespace) -> str:
    if arguments.noise:
        return "random noise"
    return f"photos of {arguments.photos}" if arguments.photos else f"CIFAR-10 batches of {arguments.data}"


def _images(arguments: argparse.Namespace, preset: Preset, count: int, split: str) -> tuple[Tensor, Tensor]:
    if arguments.noise:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 3, preset.size, preset.size, generator=generator)
        return images, torch.randint(preset.classes, (count,), generator=generator)
    if arguments.photos:
        return _photos(arguments.photos, preset, count)
    if preset.size != 32:
        raise SystemExit(f"--size {preset.size}: CIFAR-10 has 32; give --photos FOLDER, or --noise")
    try:
        dataset = cifar10.open_cifar10(arguments.data, None, split, limit=count)
    except DataError as error:
        raise SystemExit(f"{error}; or give --data, or --noise") from None
    if len(dataset) < count:
        raise SystemExit(f"{arguments.data}: {len(dataset)} {split} images, {count} are asked for; lower --batch")
    return dataset[Keys(0, list(range(count)))]


def _photos(folder: Path, preset: Preset, count: int) -> tuple[Tensor, Tensor]:
    """Central squares; a photo's label is its folder's place among the folders, modulo the classes."""
    import numpy as np
    from PIL import Image, ImageOps

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)
    if not files:
        raise SystemExit(f"{folder}: holds no .jpg, .jpeg or .png; give another --photos, or --noise")
    folders = sorted({path.parent for path in files})
    files = [files[i * len(files) // count % len(files)] for i in range(count)]  # from all folders, repeated if few
    pixels = [np.asarray(ImageOps.fit(Image.open(path).convert("RGB"), (preset.size, preset.size))) for path in files]
    labels = torch.tensor([folders.index(path.parent) % preset.classes for path in files])
    return normalised(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), imagenet.MEAN, imagenet.STD), labels
