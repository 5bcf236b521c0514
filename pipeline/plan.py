"""What a training takes, reckoned from its params: no data are read, nothing is computed but shapes (torch's `meta`).

Operations are those of convolutions and matrix products, a multiply-add counted as two. Solvers go to their limits,
activations are float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mdeq import Anderson, Broyden, FixedPoint, Gmres, Implicit, Network, Phantom, Reversible, jacobian
from mdeq.losses import classification_loss, segmentation_loss
from pipeline.checkpoints import Architecture
from pipeline.params import TRAINED_ON, ParamsError, instances, load
from pipeline.recipe import Sgd
from pipeline.train_params import FinetuneParams, PretrainParams, TrainParams
from pipeline.training import predict

NUMBER = 4  # bytes of a float32
SIDE_BY_SIDE = 3  # models in a table
SIZES = {"cifar10": (50_000, 10), "imagenet": (1_281_167, 1000), "cityscapes": (2_975, 19)}  # training images, classes


@dataclass(frozen=True)
class Gpu:
    """Of the vendor's data sheet: dense peaks in TFLOP/s (float32: TF32 where there is one), GB/s and GB of memory."""

    float32: float
    half: float
    bandwidth: float
    memory: float


GPUS = {
    "v100": Gpu(15.7, 125, 900, 32),
    "a100": Gpu(156, 312, 2039, 80),
    "rtx4090": Gpu(82.6, 165, 1008, 24),
    "l40s": Gpu(183, 362, 864, 48),
    "h100": Gpu(495, 989, 3350, 80),
    "h200": Gpu(495, 989, 4800, 141),
}


@dataclass(frozen=True)
class Plan:
    """What training one model takes, once a seed.

    Attributes:
        parameters: That are trained.
        state: D, the numbers in z of one sample; 0 for an explicit model.
        memory: Bytes on each GPU by part; the parts are never all there at once.
        peak: Bytes at most at once.
        evaluations: Of f in an implicit update: forward with the one on tape, and vector-Jacobian products with the one
            that reaches the parameters.
        updates: In the warm-up (of an explicit model: all), and implicit ones.
        flops: An update of either kind, over all GPUs.
        traffic: Bytes of solver history read in an implicit update, over all GPUs.
        half: Whether convolutions are in half precision.
    """

    parameters: int
    state: int
    memory: dict[str, int]
    peak: int
    evaluations: tuple[int, int]
    updates: tuple[int, int]
    flops: tuple[float, float]
    traffic: float
    half: bool

    @property
    def total(self) -> float:
        """Operations of the whole training."""
        return sum(n * each for n, each in zip(self.updates, self.flops, strict=True))

    def hours(self, gpu: Gpu, count: int, utilisation: float) -> float:
        """On `count` GPUs that reach a part `utilisation` of their peak."""
        computing = self.total / (utilisation * 1e12 * (gpu.half if self.half else gpu.float32))
        reading = self.updates[1] * self.traffic / (1e9 * gpu.bandwidth)
        return (computing + reading) / count / 3600


@dataclass(frozen=True)
class _Part:
    """A part of the network: its result, operations forward and backward, and the bytes it keeps for the latter."""

    value: Tensor
    forward: float
    backward: float
    kept: int

    @property
    def flops(self) -> float:
        """Operations of both passes."""
        return self.forward + self.backward


@dataclass(frozen=True)
class _Cost:
    """Of a batch on one GPU: bytes by part, and at most beside what is always there; the rest as in `Plan`."""

    memory: dict[str, int]
    peak: int
    flops: tuple[float, float]
    state: int = 0
    evaluations: tuple[int, int] = (0, 0)
    traffic: float = 0.0


def plan(stage: str, name: str, path: Path, gpus: int = 1) -> Plan:
    """The plan of `<stage>.<name>` of the params file at `path`.

    Raises:
        ParamsError: if it is not there or wrong.
    """
    params = load(stage, name, path)
    assert isinstance(params, TrainParams)
    samples, classes = _set(TRAINED_ON[stage], path)
    batch = math.ceil(params.batch / (gpus * params.accumulate))
    segments = isinstance(params, FinetuneParams)
    with torch.device("meta"):
        model = Architecture.of(params, classes).build().train()
        images = torch.empty(batch, 3, *_image(params))
        targets = torch.empty((batch, *params.crop) if segments else (batch,), dtype=torch.int64)
        loss = segmentation_loss if segments else classification_loss
        cost = _cost(model, params, images, lambda logits: loss(logits, targets))
    parameters = sum(p.numel() for p in model.parameters())
    updates, scale = math.ceil(samples / params.batch) * params.epochs, params.batch / batch
    unrolled = min(params.warm_up.steps if params.warm_up else 0, updates) if cost.state else updates
    lasting = _lasting(NUMBER * parameters, params, gpus)
    first, second = cost.flops
    return Plan(
        parameters,
        cost.state,
        lasting | cost.memory,
        sum(lasting.values()) + cost.peak,
        cost.evaluations,
        (unrolled, updates - unrolled),
        (scale * first, scale * second),
        scale * cost.traffic,
        params.precision != "float32",
    )


def tables(stage: str | None, name: str | None, path: Path, gpu: str, gpus: int, utilisation: float) -> Iterator[Table]:
    """The models of each stage, some side by side in a table.

    Raises:
        ParamsError: if stage, model or GPU is unknown.
    """
    if gpu not in GPUS:
        raise ParamsError(f"--gpu {gpu}: must be one of {', '.join(GPUS)}")
    if stage is not None and stage not in TRAINED_ON:
        raise ParamsError(f"{stage}: does not train; must be one of {', '.join(TRAINED_ON)}")
    for each in [stage] if stage else TRAINED_ON:
        names = [name] if name else instances(each, path)
        caption = f"hours: {gpus} x {gpu} at {utilisation:.0%} of its peak, an assumption; one seed"
        for start in range(0, len(names), SIDE_BY_SIDE):
            shown = names[start : start + SIDE_BY_SIDE]
            columns = [_column(each, model, path, gpu, gpus, utilisation) for model in shown]
            table = Table("", *shown, title=each, caption=caption, min_width=80)
            for row in dict.fromkeys(row for column in columns for row in column):
                table.add_row(row, *(column.get(row, "") for column in columns))
            yield table


def _column(stage: str, name: str, path: Path, gpu: str, gpus: int, utilisation: float) -> dict[str, str]:
    try:
        made = plan(stage, name, path, gpus)
    except (ImportError, NotImplementedError, RuntimeError) as error:  # a library lacks; steps that only data decide
        return {"not reckoned": str(error).splitlines()[0][:60]}
    forward, products = made.evaluations
    hours = made.hours(GPUS[gpu], gpus, utilisation)
    room = "" if made.peak < 1e9 * GPUS[gpu].memory else " (too much)"
    (unrolled, implicit), (first, second) = made.updates, (f"{each / 1e12:.3g}" for each in made.flops)
    if made.state:
        own = {
            "state of a sample": f"{made.state:,}",
            "evaluations of f + products with J": f"{forward} + {products}",
            "updates: unrolled + implicit": f"{unrolled:,} + {implicit:,}",
            "TFLOP an unrolled update": first if unrolled else "",
            "TFLOP an implicit update": second,
        }
    else:
        own = {"updates": f"{unrolled:,}", "TFLOP an update": first}
    return {
        "parameters": f"{made.parameters:,}",
        **{part: _bytes(size) for part, size in made.memory.items() if size},
        "memory of a GPU at most": _bytes(made.peak) + room,
        **own,
        "EFLOP in all": f"{made.total / 1e18:.3g}",
        "hours": f"{hours:,.1f}" if hours >= 0.1 else f"{hours:.1g}",
    }


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _cost(model: nn.Module, params: TrainParams, images: Tensor, loss: Callable[[Tensor], Tensor]) -> _Cost:
    if isinstance(model, Network) and model.backbone.config.unrolled is None:
        return _implicit(model, params, images, loss)
    whole = _part(list(model.parameters()), lambda: loss(predict(model, images).logits))
    return _Cost({"activations": whole.kept}, whole.kept, (whole.flops, 0.0))


def _implicit(model: Network, params: TrainParams, images: Tensor, loss: Callable[[Tensor], Tensor]) -> _Cost:
    backbone, rule, term = model.backbone, params.backward, params.jacobian
    assert params.forward is not None and rule is not None
    inside, outside = list(backbone.f.parameters()), [*backbone.stem.parameters(), *backbone.stage0.parameters()]
    stem = _part(outside, lambda: backbone.inject(images))
    f, z0, scales = backbone.fixed_point_problem(images)
    z = z0.requires_grad_()
    one = _part([z, *inside], lambda: f(z))
    product = _flops(lambda: torch.autograd.grad(one.value, z, torch.empty_like(z), retain_graph=True))
    head = _part([z, *model.head.parameters()], lambda: loss(model.head(scales.split(z))))
    penalty = _part(inside, lambda: jacobian.frobenius(f(z), z, term.probes)) if term else None

    match rule:  # calls of f, products with J, products that reach the parameters too, evaluations on tape at once
        case Implicit():
            calls, products, whole, tapes = params.forward.steps + 2, rule.solver.steps, 1, 1
        case Phantom():
            calls, products, whole, tapes = params.forward.steps + 1 + rule.steps, 0, rule.steps, rule.steps
        case Reversible():  # two a step, as many on the way back
            calls, products, whole, tapes = 4 * rule.steps, 0, 2 * rule.steps, 1
    around, layers = stem.flops + head.flops, params.warm_up.layers if params.warm_up else 0
    implicit = around + calls * one.forward + products * product + whole * one.backward
    if term and penalty:
        implicit += term.probability * penalty.flops
    state, solvers = NUMBER * z.numel(), (params.forward, rule.solver if isinstance(rule, Implicit) else None)
    (forward, backward), reads = zip(*map(_history, solvers), strict=True)
    memory = {
        "stem": stem.kept,
        "tape of one f": one.kept,
        "head and loss": head.kept,
        "warm-up: tape": layers * one.kept,
        "forward: solver": state * forward,
        "backward: solver": state * backward,
        "Jacobian term": penalty.kept if penalty else 0,
    }
    peak = stem.kept + max(
        memory["forward: solver"],
        tapes * one.kept + head.kept + memory["backward: solver"] + memory["Jacobian term"],
        layers * one.kept + head.kept,
    )
    flops = around + layers * one.flops, implicit
    return _Cost(memory, peak, flops, z.shape[1], (calls, products + whole), state * sum(reads))


def _part(inputs: Sequence[Tensor], call: Callable[[], Tensor]) -> _Part:
    """Runs `call` and its backward pass to `inputs` on shapes; those themselves are not counted as kept."""
    own = {tensor.untyped_storage()._cdata for tensor in inputs}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    value: list[Tensor] = []
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward = _flops(lambda: value.append(call()))
    gradients = [torch.empty_like(value[0])]
    backward = _flops(lambda: torch.autograd.backward(value, gradients, retain_graph=True, inputs=list(inputs)))
    return _Part(value[0], forward, backward, sum(kept.values()))


def _flops(call: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def _lasting(weights: int, params: TrainParams, gpus: int) -> dict[str, int]:
    """Bytes that are there all the time, `weights` bytes of parameters among them."""
    slots = bool(params.optimizer.momentum) if isinstance(params.optimizer, Sgd) else 2
    parts = {"weights": weights, "gradients": weights, "optimiser": slots * weights}
    return parts | ({"message of the gradients": weights} if gpus > 1 else {})


def _history(solver: Broyden | Anderson | FixedPoint | Gmres | None) -> tuple[int, int]:
    """How many states (B, D) a solver holds at its limit, and how many of its history it reads up to there.

    It holds its history, and z, f(z), their difference, the best.
    """
    match solver:
        case Broyden(steps=n):  # two passes over the k steps so far
            return n + 4, n * n
        case Gmres(steps=n):  # orthogonalised twice, two passes each
            return n + 5, 2 * n * (n + 1) + n
        case Anderson(steps=n, memory=m):
            return 2 * m + 4, 2 * m * n
        case FixedPoint():
            return 4, 0
        case None:
            return 0, 0


def _image(params: TrainParams) -> Sequence[int]:
    if isinstance(params, FinetuneParams):
        return params.crop
    return (params.image, params.image) if isinstance(params, PretrainParams) else (32, 32)


def _set(dataset: str, path: Path) -> tuple[int, int]:
    """Images to train on and classes: as they will be drawn, else as `prepare` found them, else the real set's."""
    section: Any = load("prepare", dataset, path)
    drawn, (images, classes) = section.generated, SIZES[dataset]
    if section.source == "generated":
        if dataset == "imagenet":
            return drawn.classes * drawn.train_per_class, drawn.classes
        return drawn.train, classes
    found = Path("results/data", dataset, "summary.json")
    if found.is_file() and (summary := json.loads(found.read_text(encoding="utf-8")))["source"] == section.source:
        return summary["images"]["train"], summary["classes"]
    return images, classes
