"""params.yaml, typed: a section per stage, an entry per instance.

The dataclasses of the library and of the recipe are the types of the values, and check them. A
stage gets its own section and sees nothing of the others; what belongs to the machine is not here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field

from mdeq import (
    Anderson,
    Broyden,
    ClassificationHeadConfig,
    FixedPoint,
    Implicit,
    MDEQConfig,
    Phantom,
    Reversible,
    SegmentationHeadConfig,
)
from mdeq.baselines import ExplicitConfig, NeuralODEConfig, ResNetConfig
from pipeline import settings
from pipeline.errors import UserError
from pipeline.recipe import Adam, Muon, Recipe, Sgd
from pipeline.sets import BY_STAGE
from pipeline.settings import (
    FILE,
    Count,
    GeneratedCifar10,
    GeneratedCityscapes,
    GeneratedImageNet,
    Name,
    PrepareCifar10,
    PrepareCityscapes,
    PrepareImageNet,
    PrepareParams,
    Problem,
    Seed,
)

__all__ = ["PrepareParams", "GeneratedCifar10", "GeneratedCityscapes", "GeneratedImageNet"]

Model = MDEQConfig | ResNetConfig | NeuralODEConfig | ExplicitConfig
Forward = Broyden | Anderson | FixedPoint
Backward = Implicit | Phantom | Reversible
Size = tuple[Count, Count]  # height, width


@dataclass(frozen=True, kw_only=True)
class TrainParams(Recipe):
    """A model and how it is trained."""

    model: Model
    head: ClassificationHeadConfig | SegmentationHeadConfig | None = None  # of an mdeq alone
    forward: Forward | None = None  # finds the equilibrium
    backward: Backward | None = None  # differentiates it
    augment: bool  # crop and mirror training images at random
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)  # the model is the first one's
    limit: Count | None = None  # training images; None for all

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parts(self)
        if self.seeds and len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: must differ from each other, not {list(self.seeds)}")
        if self.warm_start and self.augment:
            raise ValueError("warm_start: needs `augment: false`: the same image in every epoch")
        explicit = self.model if isinstance(self.model, ExplicitConfig) else None
        if self.epochs == 0 and not (explicit and explicit.weights and not explicit.segments):
            raise ValueError(
                "epochs: must be at least 1; 0 is for a classifier with `weights: default`"
            )
        if explicit and explicit.segments != isinstance(self, FinetuneParams):
            labels = "pixels" if explicit.segments else "images"
            raise ValueError(f"model.name: {explicit.name} labels {labels}")


@dataclass(frozen=True, kw_only=True)
class ClassifyParams(TrainParams):
    """Training on CIFAR-10 (Table 1)."""

    head: ClassificationHeadConfig | None = None


@dataclass(frozen=True, kw_only=True)
class PretrainParams(TrainParams):
    """Training on ImageNet (Table 2)."""

    head: ClassificationHeadConfig | None = None
    image: Annotated[int, Field(ge=8)]  # height and width of the crops


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backbone is not None and isinstance(self.model, ExplicitConfig):
            raise ValueError(
                "backbone: must be null; an explicit model's comes with `model.weights: default`"
            )


def check_parts(entry: TrainParams | BenchmarkModel) -> None:
    """Checks that an equilibrium model has all its parts, and another model none of them.

    Raises:
        ValueError: A part is missing, out of place, or does not fit.
    """
    model, head = entry.model, entry.head
    equilibrium = ["forward", "backward", "warm_up", "jacobian", "warm_start"]
    if not isinstance(model, MDEQConfig):
        kind, needed, unused = getattr(model, "kind", ""), [], ["head", *equilibrium]
    elif model.unrolled is not None:
        kind, needed, unused = "model with `unrolled`", ["head"], equilibrium
    else:
        kind, needed, unused = "mdeq", ["head", "forward", "backward"], []
    for name in needed:
        if getattr(entry, name) is None:
            raise ValueError(f"{name}: is missing; an mdeq needs it")
    for name in unused if model else ():
        if getattr(entry, name, None) is not None:
            raise ValueError(f"{name}: must be left out; a {kind} has no equilibrium to find")
    if isinstance(model, MDEQConfig) and isinstance(head, ClassificationHeadConfig):
        scales = len(model.channels)
        if len(head.channels) != scales:
            raise ValueError(f"head.channels: must have {scales} numbers, one per scale of model")


@dataclass(frozen=True, kw_only=True)
class EvaluateParams:
    """How trained models are evaluated."""

    batch: Count  # images at once; no prediction depends on its neighbours
    steps: Count | None = None  # the forward solver's limit; None for the one trained with
    limit: Count | None = None  # images of the split; None for all
    examples: Annotated[int, Field(ge=1, le=64)] = 8  # predictions that are drawn
    accuracy_up_to: Count | None = None  # also the accuracy by limits of 1, 2, ... solver steps
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=4)], ...], Field(min_length=1)] = (1.0,)
    flip: bool = False  # average with the mirrored image's probabilities, as with all `scales`


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
    image: Annotated[int, Field(ge=8)]  # height and width; 32 in the paper
    rounds: Count  # measured steps per model, interleaved; their median counts
    warm_up: Annotated[int, Field(ge=0)]  # steps per model before those
    seed: Seed = 0  # of weights and images

    def __post_init__(self) -> None:
        if self.reference not in self.models:
            raise ValueError(f"reference: must be one of models ({', '.join(self.models)})")


@dataclass(frozen=True, kw_only=True)
class _Prepare:
    cifar10: PrepareCifar10
    imagenet: PrepareImageNet
    cityscapes: PrepareCityscapes


@dataclass(frozen=True, kw_only=True)
class _Evaluate:
    cifar10: EvaluateParams
    imagenet: EvaluateParams
    cityscapes: EvaluateParams


@dataclass(frozen=True, kw_only=True)
class _Convergence:
    cifar10: ConvergenceParams
    imagenet: ConvergenceParams
    cityscapes: ConvergenceParams


@dataclass(frozen=True, kw_only=True)
class Params:
    """The file; its `scale` (demo, paper, ...) names the MLflow experiment, nothing more."""

    scale: Name
    prepare: _Prepare
    classify: dict[Name, ClassifyParams]
    pretrain: dict[Name, PretrainParams]
    finetune: dict[Name, FinetuneParams]
    evaluate: _Evaluate
    convergence: _Convergence
    benchmark: BenchmarkParams


def load(
    stage: str, instance: str | None = None, path: str | Path = FILE, changes: Sequence[str] = ()
) -> Any:
    """The section of a stage instance: `load("classify", "mdeq-small")`, `load("benchmark")`.

    Args:
        stage: The section.
        instance: Of the stage, if it has several.
        path: Of the params file.
        changes: Values that replace the file's, such as `optimizer.lr=3e-4`.

    Raises:
        UserError: The section is missing or wrong.
    """
    kind, keys = settings.hints(Params)[stage], (stage,)
    if instance is not None:
        keys = (stage, instance)
        kind = settings.hints(kind)[instance] if is_dataclass(kind) else get_args(kind)[1]
    return settings.load(kind, Path(path), keys, changes)


def check(path: str | Path = FILE) -> None:
    """Checks a whole file, and what its sections say of each other.

    Raises:
        UserError: One line per error of the file.
    """
    params = settings.load(Params, Path(path))
    settings.report(_wrong_backbones(params) + _wrong_convergence(params), Path(path))


def scale(path: str | Path = FILE) -> str:
    """The scale that a file names."""
    return str(settings.section(settings.read(Path(path)), ("scale",), Path(path)))


def instances(stage: str, path: str | Path = FILE) -> list[str]:
    """The names in a stage's section."""
    return list(settings.section(settings.read(Path(path)), (stage,), Path(path)))


def plain(section: Any) -> dict[str, Any]:
    """A section as JSON has it."""
    return json.loads(json.dumps(asdict(section)))


def _wrong_backbones(params: Params) -> list[Problem]:
    mdeqs = {name: entry.model for name, entry in params.pretrain.items() if entry.head}
    wrong: list[Problem] = []
    for name, entry in params.finetune.items():
        keys, backbone = ("finetune", name), entry.backbone
        if backbone is not None and backbone not in mdeqs:
            there = ", ".join(mdeqs) or "none"
            wrong.append(((*keys, "backbone"), f"no mdeq {backbone!r} in pretrain: {there}"))
        shape = (
            "channels",
            "expansion",
            "downsamplings",
            "weight_norm",
            "post_fusion_affine",
            "groups",
        )
        source = mdeqs.get(backbone or "")
        for key in shape if source else ():
            theirs = getattr(source, key)
            if getattr(entry.model, key) != theirs:
                what = f"must be that of its backbone, pretrain.{backbone}: {json.dumps(theirs)}"
                wrong.append(((*keys, "model", key), what))
    return wrong


def _wrong_convergence(params: Params) -> list[Problem]:
    wrong: list[Problem] = []
    for stage, dataset in BY_STAGE.items():
        model = getattr(params.convergence, dataset.name).model
        there = [name for name, entry in getattr(params, stage).items() if entry.forward]
        if model not in there:
            what = f"no mdeq {model!r} in {stage}; there are: {', '.join(there) or 'none'}"
            wrong.append((("convergence", dataset.name, "model"), what))
    return wrong


def check_counts(section: str, params: TrainParams, images: int, processes: int = 1) -> None:
    """Finds, before a training starts, what cannot be done with its number of images.

    Args:
        section: As `classify.mdeq-small`, for the message.
        params: Of the training.
        images: Training images that there are.
        processes: That share each batch.

    Raises:
        UserError: The warm-up is not shorter than the training, or a batch norm would meet a
            single value per channel.
    """
    images = min(images, params.limit or images)
    updates = math.ceil(images / params.batch) * params.epochs
    if params.warm_up and params.warm_up.steps >= updates:
        raise UserError(
            f"{FILE}: {section}.warm_up.steps: must be fewer than the {updates} updates of this "
            f"training ({images} images, batch {params.batch}, {params.epochs} epochs), "
            f"not {params.warm_up.steps}"
        )
    parts = processes * params.accumulate
    last = images % params.batch or params.batch
    for size in (min(params.batch, images), last):
        if size < 2 * parts and params.epochs and _normalises_one_pixel(params):
            shared = f", which {parts} parts share" if parts > 1 else ""
            raise UserError(
                f"{FILE}: {section}.batch: with {params.batch}, {images} images make a batch of "
                f"{size}{shared}, and this model's batch norm cannot train on one image alone; "
                f"set another batch, or `limit: {images - last}`"
            )


def _normalises_one_pixel(params: TrainParams) -> bool:
    """Whether some batch norm of the model sees maps of 1 x 1: one value per image and channel."""
    size = min(getattr(params, "crop", (getattr(params, "image", 32),)))
    model = params.model
    match model:
        case MDEQConfig():
            fine = isinstance(params.head, SegmentationHeadConfig)
            coarsest = 0 if fine else len(model.channels) - 1
            return size <= 2 ** (model.downsamplings + coarsest)
        case ResNetConfig():
            return size <= 8
        case ExplicitConfig() if model.name != "alexnet":
            pools = model.name.lower().startswith("deeplab")
            return pools or size <= (8 if model.small_input or model.segments else 32)
        case _:
            return False  # it has no batch norm
