"""How many images a second each loader makes by itself, beside what a training step takes.

    python -m benchmarks.loaders pretrain mdeq-small --workers 0,1,2 --batches 20

Reads the data of a stage as its training does (params.yaml, results/data/<set>/, MDEQ_DATA_<SET>); the first batch of
each round, which starts the workers, is not counted. `--step` trains three updates of the model as well and times the
last two: a loader keeps up where it makes more images a second than the step takes.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import cast

import torch

from pipeline.checkpoints import Architecture
from pipeline.data.cifar10 import open_cifar10
from pipeline.data.cityscapes import Cityscapes
from pipeline.data.imagenet import ImageNet
from pipeline.data.loading import BatchDataset, batches
from pipeline.data.manifest import DataError, located
from pipeline.machine import Machine
from pipeline.params import FILE, TRAINED_ON, load
from pipeline.recipe import make_optimizer
from pipeline.train_params import FinetuneParams, PretrainParams, TrainParams
from pipeline.training import predict


def training_set(stage: str, params: TrainParams, machine: Machine) -> BatchDataset:
    """What the stage trains on, augmented as its params say."""
    root, manifest = located(TRAINED_ON[stage], machine)
    if isinstance(params, FinetuneParams):
        return Cityscapes(root, manifest, "train", crop=params.crop, augment=params.augment)
    if isinstance(params, PretrainParams):
        return ImageNet(root, manifest, "train", size=params.image, augment=params.augment)
    return open_cifar10(root, manifest, "train", augment=params.augment, device=machine.device)


def loader_rate(dataset: BatchDataset, batch: int, workers: int, count: int) -> float:
    """Images a second over `count` batches after the first."""
    epochs = (batches(dataset, batch, seed=0, epoch=n, shuffle=True, workers=workers) for n in itertools.count())
    read = (len(images) for images, _ in itertools.chain.from_iterable(epochs))
    next(read)
    start = time.perf_counter()
    return sum(itertools.islice(read, count)) / (time.perf_counter() - start)


def step_rate(dataset: BatchDataset, params: TrainParams, device: str) -> float:
    """Images a second of an implicit update, the solvers as far as they go at the weights of the start."""
    model = Architecture.of(params, dataset.classes).build().to(device).train()
    optimizer = make_optimizer(model, params.optimizer)
    images, _ = next(iter(batches(dataset, params.batch, seed=0, epoch=0, shuffle=True)))
    images, start = images.to(device), 0.0
    for number in range(3):
        if number == 1:
            start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        predict(model, images).logits.float().square().mean().backward()
        optimizer.step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    return 2 * len(images) / (time.perf_counter() - start)


def main() -> None:
    """Print the rates, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(TRAINED_ON))
    parser.add_argument("model")
    parser.add_argument("--workers", default="0,1,2", help="numbers of processes to try")
    parser.add_argument("--batches", type=int, default=20, help="counted batches of each round")
    parser.add_argument("--step", action="store_true", help="time the training step too")
    parser.add_argument("--params", type=Path, default=FILE)
    options = parser.parse_args()
    machine = Machine.from_environment()
    params = cast(TrainParams, load(options.stage, options.model, options.params))
    try:
        dataset = training_set(options.stage, params, machine)
    except DataError as error:
        raise SystemExit(str(error)) from None
    for workers in map(int, options.workers.split(",")):
        if workers == 0 or options.stage != "classify":  # CIFAR-10 lies on the device
            rate = loader_rate(dataset, params.batch, workers, options.batches)
            print(f"loader, {workers} workers: {rate:,.0f} images/s", flush=True)
    if options.step:
        print(f"step on {machine.describe()['device']}: {step_rate(dataset, params, machine.device):,.1f} images/s")


if __name__ == "__main__":
    main()
