"""params.yaml, typed: a section per stage, an entry per instance.

The dataclasses of the library and of the recipe are the types of the values, and check them. What
belongs to the machine is not here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

import mdeq
from mdeq import ClassificationHeadConfig, MDEQConfig, SegmentationHeadConfig
from mdeq.baselines import ExplicitConfig, NeuralODEConfig, ResNetConfig
from pipeline import settings
from pipeline.errors import UserError
from pipeline.recipe import Adam, Muon, Recipe, Sgd
from pipeline.sets import SETS, SetName
from pipeline.settings import FILE, Count, Name, Prepare, Seed, Side

Model = MDEQConfig | ResNetConfig | NeuralODEConfig | ExplicitConfig
Forward = mdeq.Broyden | mdeq.Anderson | mdeq.FixedPoint
Backward = mdeq.Implicit | mdeq.Phantom | mdeq.Reversible
Size = tuple[Count, Count]  # height, width
SHAPE = ("channels", "expansion", "downsamplings", "weight_norm", "post_fusion_affine", "groups")


@dataclass(frozen=True, kw_only=True)
class TrainParams(Recipe):
    """A model and how it is trained."""

    model: Model
    head: ClassificationHeadConfig | SegmentationHeadConfig | None = None  # of an mdeq alone
    forward: Forward | None = None  # finds the equilibrium
    backward: Backward | None = None  # differentiates it
    augment: bool  # crop and mirror training images at random
    seeds: tuple[Seed, ...] = (0,)  # the model is the first one's
    limit: Count | None = None  # training images; None for all

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parts(self)
        if len(set(self.seeds)) < max(1, len(self.seeds)):
            raise ValueError(f"seeds: must be one or more different numbers, not {[*self.seeds]}")
        if self.warm_start and self.augment:
            raise ValueError("warm_start: needs `augment: false`: the same image in every epoch")
        model, segments = self.model, isinstance(self, FinetuneParams)
        if isinstance(model, ExplicitConfig) and model.segments != segments:
            raise ValueError(f"model.name: {model.name} is for another stage")


@dataclass(frozen=True, kw_only=True)
class ClassifyParams(TrainParams):
    """Training on CIFAR-10 (Table 1)."""

    head: ClassificationHeadConfig | None = None


@dataclass(frozen=True, kw_only=True)
class PretrainParams(TrainParams):
    """Training on ImageNet (Table 2)."""

    head: ClassificationHeadConfig | None = None
    image: Side  # height and width of the crops


@dataclass(frozen=True)
class Loss:
    """Cross entropy over the pixels."""

    class_weights: bool  # as published
    ohem: bool = False  # online hard example mining


@dataclass(frozen=True, kw_only=True)
class FinetuneParams(TrainParams):
    """Training on Cityscapes (Table 3)."""

    model: MDEQConfig | ExplicitConfig
    head: SegmentationHeadConfig | None = None
    backbone: Name | None  # a model of `pretrain` to start from; None for none
    loss: Loss
    crop: Size  # of training images
    test_size: Size | None = None  # that images are resized to for evaluation; None for their own


@dataclass(frozen=True, kw_only=True)
class EvaluateParams:
    """How trained models are evaluated."""

    batch: Count  # images at once; no prediction depends on its neighbours
    steps: Count | None = None  # the forward solver's limit; None for the one trained with
    limit: Count | None = None  # images of the split; None for all
    examples: Annotated[int, Field(ge=1, le=64)] = 8  # predictions that are drawn
    accuracy_up_to: Count | None = None  # also the accuracy by limits of 1, 2, ... solver steps


@dataclass(frozen=True, kw_only=True)
class ConvergenceParams:
    """Figure 5: how fast solvers find the equilibria of a trained model."""

    model: Name  # of the stage that trains on this data set
    batch: Count
    batches: Annotated[int, Field(ge=2)]  # drawn at random; mean and deviation are over them
    steps: Count  # updates of each solver, whatever its own limit
    solvers: tuple[Forward, ...]
    seed: Seed = 0  # of the batches

    def __post_init__(self) -> None:
        kinds = [solver.kind for solver in self.solvers]
        if not kinds or len(set(kinds)) < len(kinds):
            raise ValueError(f"solvers: must be one or more of different kinds, not {kinds}")


@dataclass(frozen=True, kw_only=True)
class BenchmarkModel:
    """A model to measure, and how it is trained."""

    model: Model
    head: ClassificationHeadConfig | None = None
    forward: Forward | None = None
    backward: Backward | None = None
    optimizer: Adam | Sgd | Muon

    def __post_init__(self) -> None:
        check_parts(self)


@dataclass(frozen=True, kw_only=True)
class BenchmarkParams:
    """Figure 4b: time and memory of a training step, relative to a reference model."""

    models: dict[Name, BenchmarkModel]
    reference: Name  # the model that counts as 1
    batch: Count  # 32 in the paper
    image: Side  # height and width; 32 in the paper
    rounds: Count  # measured steps per model, interleaved; their median counts
    warm_up: Annotated[int, Field(ge=0)]  # steps per model before those
    seed: Seed = 0  # of weights and images

    def __post_init__(self) -> None:
        if self.reference not in self.models:
            raise ValueError(f"reference: must be one of models ({', '.join(self.models)})")


@dataclass(frozen=True, kw_only=True)
class Params:
    """The file; its `scale` (demo, paper, ...) names the MLflow experiment, nothing more."""

    scale: Name
    prepare: Prepare
    classify: dict[Name, ClassifyParams]
    pretrain: dict[Name, PretrainParams]
    finetune: dict[Name, FinetuneParams]
    evaluate: dict[SetName, EvaluateParams]
    convergence: dict[SetName, ConvergenceParams]
    benchmark: BenchmarkParams

    def __post_init__(self) -> None:
        for name, entry in self.finetune.items():
            if entry.backbone is None:
                continue
            source = self.pretrain.get(entry.backbone)
            if source is None or source.head is None:
                what = f"there is no mdeq {entry.backbone!r} in pretrain"
                raise ValueError(f"finetune.{name}.backbone: {what}")
            for key in SHAPE:
                theirs = getattr(source.model, key)
                if getattr(entry.model, key, None) != theirs:
                    what = f"must be that of pretrain.{entry.backbone}: {json.dumps(theirs)}"
                    raise ValueError(f"finetune.{name}.model.{key}: {what}")
        for name, entry in self.convergence.items():
            stage = SETS[name].stage
            trained = getattr(self, stage).get(entry.model)
            if trained is None or trained.forward is None:
                what = f"there is no mdeq {entry.model!r} in {stage}"
                raise ValueError(f"convergence.{name}.model: {what}")


def load(
    stage: str, instance: str | None = None, path: str | Path = FILE, changes: Sequence[str] = ()
) -> Any:
    """The section of a stage instance, in a valid file: `load("classify", "mdeq-small")`.

    Changes such as `optimizer.lr=3e-4` replace values of the section.

    Raises:
        UserError: The section is missing, or the file or a change is wrong; one line per error.
    """
    data = settings.read(Path(path))
    section = settings.section(data, (stage, instance) if instance else (stage,), Path(path))
    for setting in changes:
        settings.change(section, setting)
    source = f"{path} with --set {' '.join(changes)}" if changes else str(path)
    found = getattr(settings.build(Params, data, source), stage)
    if instance is None:
        return found
    return found[instance] if isinstance(found, dict) else getattr(found, instance)


def check(path: str | Path = FILE) -> None:
    """Checks a whole file; a UserError has one line per error."""
    settings.load(Params, Path(path))


def plain(section: Any) -> dict[str, Any]:
    """A section as JSON has it."""
    return json.loads(json.dumps(asdict(section)))


def check_parts(entry: TrainParams | BenchmarkModel) -> None:
    """Checks that an equilibrium model has all its parts, and another model none of them."""
    model, head = entry.model, entry.head
    multiscale = isinstance(model, MDEQConfig)
    solves = multiscale and model.unrolled is None
    needed = {"head": multiscale, "forward": solves, "backward": solves}
    for key in (*needed, "warm_up", "jacobian", "warm_start"):
        given = getattr(entry, key, None) is not None
        if needed.get(key) and not given:
            raise ValueError(f"{key}: is missing; an mdeq needs it")
        if given and not needed.get(key, solves):
            raise ValueError(f"{key}: must be left out; this model has no equilibrium to find")
    scales = len(model.channels) if multiscale else 0
    if isinstance(head, ClassificationHeadConfig) and len(head.channels) != scales:
        raise ValueError(f"head.channels: must have {scales} numbers, one per scale of the model")


def check_warm_up(section: str, params: TrainParams, images: int) -> None:
    """Checks that a section's warm-up is shorter than its training; a UserError says it is not."""
    images = min(images, params.limit or images)
    updates = math.ceil(images / params.batch) * params.epochs
    if params.warm_up and params.warm_up.steps >= updates:
        raise UserError(
            f"{FILE}: {section}.warm_up.steps: must be fewer than the {updates} updates of this "
            f"training ({images} images, batch {params.batch}, {params.epochs} epochs), "
            f"not {params.warm_up.steps}"
        )
