"""The params of the stages that solve for equilibria, and the whole params file: what needs torch.

The library's dataclasses are fields as they are, so a setting exists once; `Ranges` adds what their numbers
may be.
"""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field, model_validator

from mdeq import Anderson, Broyden, FixedPoint, Gmres, Implicit, MDEQConfig, Phantom, Reversible
from mdeq.baselines import ExplicitConfig, NeuralODEConfig, ResNetConfig
from mdeq.heads import ClassificationHeadConfig, SegmentationHeadConfig
from pipeline.params import (
    LAST_SEED,
    TRAINED_BY,
    EvaluateCityscapes,
    EvaluateParams,
    Name,
    PrepareCifar10,
    PrepareCityscapes,
    PrepareImageNet,
    Ranges,
    Section,
)
from pipeline.recipe import Adam, JacobianTerm, Muon, Precision, Sgd, Starts, WarmUp

Positive = Field(gt=0)
Natural = Field(ge=1)
_SOLVES = {"steps": Natural, "tolerance": Field(ge=0), "check_every": Natural}

BroydenParams = Annotated[Broyden, Ranges(**_SOLVES)]
AndersonParams = Annotated[Anderson, Ranges(**_SOLVES, memory=Natural, ridge=Field(ge=0), mixing=Field(gt=0, le=1))]
FixedPointParams = Annotated[FixedPoint, Ranges(**_SOLVES, damping=Field(gt=0, le=1))]
GmresParams = Annotated[Gmres, Ranges(**_SOLVES)]
ForwardParams = Annotated[BroydenParams | AndersonParams | FixedPointParams, Field(discriminator="kind")]
AdjointParams = Annotated[BroydenParams | AndersonParams | FixedPointParams | GmresParams, Field(discriminator="kind")]
ImplicitParams = Annotated[Implicit, Ranges(solver=AdjointParams)]
PhantomParams = Annotated[Phantom, Ranges(steps=Natural, damping=Field(gt=0, le=1))]
ReversibleParams = Annotated[Reversible, Ranges(steps=Natural, damping=Field(gt=0, lt=1))]
BackwardParams = Annotated[ImplicitParams | PhantomParams | ReversibleParams, Field(discriminator="kind")]

_Channels = Annotated[tuple[Annotated[int, Natural], ...], Field(min_length=1)]
_Architecture = {
    "channels": _Channels, "expansion": Natural, "groups": Field(ge=2, multiple_of=2), "unrolled": Natural,
    "downsamplings": Field(ge=0, le=2), "dropout": Field(ge=0, lt=1), "batch_norm_momentum": Field(gt=0, le=1),
}  # fmt: skip
MDEQParams = Annotated[MDEQConfig, Ranges(**_Architecture)]
ResNetParams = Annotated[ResNetConfig, Ranges(width=Natural)]
NeuralODEParams = Annotated[
    NeuralODEConfig, Ranges(filters=Natural, augmented=Field(ge=0), tolerance=Positive, image=Natural)
]
ExplicitParams = Annotated[ExplicitConfig, Ranges()]
ModelParams = Annotated[MDEQParams | ResNetParams | NeuralODEParams | ExplicitParams, Field(discriminator="kind")]
ClassificationHeadParams = Annotated[ClassificationHeadConfig, Ranges(channels=_Channels, final_channels=Natural)]
SegmentationHeadParams = Annotated[SegmentationHeadConfig, Ranges()]
_Decay = Field(ge=0)
OptimizerParams = Annotated[
    Annotated[Adam, Ranges(lr=Positive, weight_decay=_Decay)]
    | Annotated[Sgd, Ranges(lr=Positive, weight_decay=_Decay, momentum=Field(ge=0, lt=1))]
    | Annotated[Muon, Ranges(lr=Positive, weight_decay=_Decay)],
    Field(discriminator="kind"),
]
WarmUpParams = Annotated[WarmUp, Ranges(layers=Natural, steps=Field(ge=0), softplus=Positive)]
_Term = {
    "weight": _Decay, "probability": Field(ge=0, le=1), "probes": Natural, "warm_up_weight": _Decay,
    "increase": _Decay, "increase_every": Natural, "stop_epoch": Natural,
}  # fmt: skip
JacobianParams = Annotated[JacobianTerm, Ranges(**_Term)]
Size = Annotated[tuple[Annotated[int, Natural], Annotated[int, Natural]], Field(description="[height, width]")]


class Loss(Section):
    """Cross-entropy over the pixels."""

    class_weights: bool = Field(description="weigh the classes by the published list")
    ohem: bool = Field(default=False, description="online hard example mining")


def _check_parts(entry: TrainParams | BenchmarkModel) -> None:
    """An equilibrium model needs all its parts, and one without an equilibrium has no use for them."""
    solving = ("forward", "backward", "warm_up", "jacobian")
    mdeq = entry.model if isinstance(entry.model, MDEQConfig) else None
    needed, unused = ("head",) if mdeq else (), solving if mdeq else ("head", *solving)
    if mdeq and mdeq.unrolled is None:
        needed, unused = ("head", "forward", "backward"), ()
    for name in needed:
        if getattr(entry, name) is None:
            raise ValueError(f"{name}: must not be null; an mdeq needs it")
    for name in unused:
        if getattr(entry, name, None) is not None:
            kind = "model with `unrolled`" if mdeq else entry.model.kind
            raise ValueError(f"{name}: must be null; a {kind} has no equilibrium to find")
    if mdeq and isinstance(entry.head, ClassificationHeadConfig) and len(entry.head.channels) != len(mdeq.channels):
        raise ValueError(f"head.channels: must have {len(mdeq.channels)} numbers, one a scale of model.channels")


class TrainParams(Section):
    """What every training has."""

    model: ModelParams
    head: ClassificationHeadParams | SegmentationHeadParams | None = None
    forward: ForwardParams | None = Field(default=None, description="finds the equilibrium; of an mdeq alone")
    backward: BackwardParams | None = Field(default=None, description="differentiates it; of an mdeq alone")
    warm_up: WarmUpParams | None = None
    jacobian: JacobianParams | None = None
    optimizer: OptimizerParams
    batch: int = Field(ge=1, description="samples an update, over all devices")
    accumulate: int = Field(default=1, ge=1, description="micro-batches that make an update, one after the other")
    epochs: int = Field(ge=0, description="0: only validated, with a library's weights")
    seeds: Annotated[list[Annotated[int, Field(ge=0, le=LAST_SEED)]], Field(min_length=1)] = Field(
        default=[0],
        description="one training each; metrics are their mean and spread, the model is the first one's",
    )
    augment: bool
    starts: Annotated[Starts, Ranges()] | None = None
    average: float = Field(default=0.0, ge=0, lt=1)
    rise: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    precision: Precision = "float32"
    checkpoint_minutes: float = Field(default=5.0, gt=0, description="between two saves of the resumable state")

    @model_validator(mode="after")
    def _whole(self) -> TrainParams:
        _check_parts(self)
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: must differ from each other, not {self.seeds}")
        explicit = self.model if isinstance(self.model, ExplicitConfig) else None
        if self.epochs == 0 and (explicit is None or explicit.weights is None or explicit.segments):
            raise ValueError("epochs: must be at least 1; 0 is for a classifier with `weights: default`")
        if explicit and explicit.segments != isinstance(self, FinetuneParams):
            raise ValueError(f"model.name: {explicit.name} labels {'pixels' if explicit.segments else 'images'}")
        return self


class ClassifyParams(TrainParams):
    """CIFAR-10 (Table 1)."""

    head: ClassificationHeadParams | None = None


class PretrainParams(TrainParams):
    """ImageNet (Table 2)."""

    head: ClassificationHeadParams | None = None
    image: int = Field(ge=8, description="height and width of the crops")


class FinetuneParams(TrainParams):
    """Cityscapes (Table 3)."""

    model: MDEQParams | ExplicitParams = Field(discriminator="kind")
    head: SegmentationHeadParams | None = None
    loss: Loss
    crop: Size
    test_size: Size | None = Field(description="what images are resized to for evaluation; null: as they are")
    backbone: Name | None = Field(description="a model of `pretrain` to start from; null: from scratch")

    @model_validator(mode="after")
    def _own_backbone(self) -> FinetuneParams:
        if self.backbone is not None and isinstance(self.model, ExplicitConfig):
            raise ValueError("backbone: must be null; an explicit model's comes with `model.weights: default`")
        return self


class ConvergenceParams(Section):
    """Figure 5: how fast solvers find a trained model's equilibrium."""

    model: Name = Field(description="a model of the stage that trains on this set")
    batch: int = Field(ge=1, description="samples a batch")
    batches: int = Field(ge=2, description="random batches; mean and standard deviation are over them")
    steps: int = Field(ge=1, description="updates of each solver, whatever its own limit; one evaluation of f more")
    solvers: Annotated[tuple[ForwardParams, ...], Field(min_length=1)]
    seed: int = Field(default=0, ge=0, le=LAST_SEED, description="which batches")

    @model_validator(mode="after")
    def _one_of_a_kind(self) -> ConvergenceParams:
        kinds = [solver.kind for solver in self.solvers]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"solvers: must be of different kinds, not {', '.join(kinds)}")
        return self


class BenchmarkModel(Section):
    """A model to be measured, and how it is trained."""

    model: ModelParams
    head: ClassificationHeadParams | None = None
    forward: ForwardParams | None = None
    backward: BackwardParams | None = None
    optimizer: OptimizerParams

    @model_validator(mode="after")
    def _whole(self) -> BenchmarkModel:
        _check_parts(self)
        return self


class BenchmarkParams(Section):
    """Figure 4b: time and memory of a training step, relative to a reference model."""

    models: Annotated[dict[Name, BenchmarkModel], Field(min_length=1)]
    reference: Name = Field(description="the model of `models` that is 1")
    batch: int = Field(ge=1, description="images a step; the paper: 32")
    image: int = Field(ge=8, description="height and width of the images; the paper: 32")
    rounds: int = Field(ge=1, description="measured steps of each model, interleaved; their median counts")
    warm_up: int = Field(ge=0, description="steps of each before measuring")
    seed: int = Field(default=0, ge=0, le=LAST_SEED, description="of weights and images")

    @model_validator(mode="after")
    def _relative_to_something(self) -> BenchmarkParams:
        if self.reference not in self.models:
            raise ValueError(f"reference: must be one of models ({', '.join(self.models)}), not {self.reference!r}")
        return self


BY_STAGE: dict[str, type[Section]] = {
    "classify": ClassifyParams,
    "pretrain": PretrainParams,
    "finetune": FinetuneParams,
    "convergence": ConvergenceParams,
    "benchmark": BenchmarkParams,
}


class Prepare(Section):
    """The data."""

    cifar10: PrepareCifar10
    imagenet: PrepareImageNet
    cityscapes: PrepareCityscapes


class Evaluate(Section):
    """Evaluation on each set."""

    cifar10: EvaluateParams
    imagenet: EvaluateParams
    cityscapes: EvaluateCityscapes


class Convergence(Section):
    """Figure 5 on each set."""

    cifar10: ConvergenceParams
    imagenet: ConvergenceParams
    cityscapes: ConvergenceParams


class Params(Section):
    """params.yaml: one section a stage, one entry an instance."""

    scale: Name = Field(
        description="of the whole file: demo, paper, ...; names the MLflow experiment, changes no result"
    )
    prepare: Prepare
    classify: dict[Name, ClassifyParams]
    pretrain: dict[Name, PretrainParams]
    finetune: dict[Name, FinetuneParams]
    evaluate: Evaluate
    convergence: Convergence
    benchmark: BenchmarkParams


def across(params: Params) -> list[str]:
    """What one section says wrongly of another, as `dotted.key: what is wrong`."""
    wrong = []
    for name, entry in params.finetune.items():
        if entry.backbone is None:
            continue
        source = params.pretrain.get(entry.backbone)
        if source is None:
            there = ", ".join(params.pretrain) or "none"
            wrong.append(f"finetune.{name}.backbone: no model {entry.backbone!r} in pretrain; there are: {there}")
        elif not isinstance(source.model, MDEQConfig):
            wrong.append(f"finetune.{name}.backbone: {entry.backbone!r} is a {source.model.kind}; must be an mdeq")
        elif isinstance(entry.model, MDEQConfig):
            wrong += _differences(name, entry.backbone, entry.model, source.model)
    for data, stage in TRAINED_BY.items():
        model = getattr(params.convergence, data).model
        entries = getattr(params, stage)
        there = [name for name, entry in entries.items() if entry.forward is not None]
        if model not in there:
            listed = ", ".join(there) or "none"
            wrong.append(f"convergence.{data}.model: no mdeq {model!r} in {stage}; there are: {listed}")
    return wrong


def _differences(name: str, backbone: str, ours: MDEQConfig, theirs: MDEQConfig) -> list[str]:
    """Fields that decide the shape of a backbone's weights and must be those it was trained with."""
    shape = ("channels", "expansion", "downsamplings", "weight_norm", "post_fusion_affine", "groups")
    where = f"must be that of its backbone, pretrain.{backbone}"
    return [
        f"finetune.{name}.model.{key}: {where}: {json.dumps(getattr(theirs, key))}"
        for key in shape
        if getattr(ours, key) != getattr(theirs, key)
    ]
