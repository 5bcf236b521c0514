"""The one training loop: unrolled warm-up, then implicit; cosine schedule; exact resume. Needs torch and numpy alone.

Everything random in a step is a function of (seed, step), everything random in a sample one of (seed, epoch, index):
a run that is interrupted and resumed ends with the very weights of one that was not. Several processes (torchrun) and
several micro-batches an update (`accumulate`) make the update of the whole batch; docs/scaling.md says what remains of
their number: batch statistics, dropout masks and Jacobian probes.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mdeq import Network, Prediction, Solution
from pipeline import processes
from pipeline.data.loading import BatchDataset, batches, order
from pipeline.processes import Share
from pipeline.recipe import Precision, Recipe, cosine, make_optimizer, set_lr

Row = dict[str, float]
Loss = Callable[[Tensor, Tensor], Tensor]
Piece = tuple[Tensor, Tensor, int]  # images, targets, how many of them count
NAMES = 8  # of files in a message
SMALLEST_SCALE = 2.0**-24  # of the loss in float16, its own smallest number: below it no gradient can be finite


class TrainingError(Exception):
    """Training that cannot go on; the message says at which step and what is left."""


@dataclass(frozen=True)
class Task:
    """What differs between data sets: the data, the loss, and a fresh metric for each validation.

    `weight` is the denominator of `loss`, a mean: it weighs the parts of a batch that are reckoned apart.
    `validation_batch` is how many samples are validated at once, None for as many as an update takes; no result depends
    on it, but whole street scenes need more room than the crops trained on. `names` are those of the classes.
    """

    train: BatchDataset
    validation: BatchDataset
    loss: Loss
    metric: Callable[[], Metric]
    validation_batch: int | None = None
    weight: Callable[[Tensor], float | Tensor] = len
    names: tuple[str, ...] = ()


class Metric(Protocol):
    """Accumulates over batches in `counts`, whole numbers; `compute` gives names such as eval/top1."""

    counts: Tensor

    def update(self, logits: Tensor, targets: Tensor) -> None: ...

    def compute(self) -> Row: ...


class Store(Protocol):
    """Where the resumable state lies."""

    def load(self) -> dict[str, Any] | None: ...

    def save(self, content: dict[str, Any]) -> None: ...


class Observer(Protocol):
    """Watches a run: `step` and `validating` for the eye; `saved` gets the log that a durable checkpoint covers."""

    def step(self, step: int, total: int, values: Row) -> None: ...

    def validating(self, done: int, total: int) -> None: ...

    def saved(self, log: list[tuple[int, Row]]) -> None: ...


@dataclass
class _State:
    """What, besides model and optimiser, a run consists of so far."""

    epoch: int = 0
    batch: int = 0  # of the epoch, the next one
    step: int = 0
    loss_sum: float = 0.0  # of the epoch
    seconds: float = 0.0  # of training, over all processes
    log: list[tuple[int, Row]] = field(default_factory=list)
    history: list[Row] = field(default_factory=list)


def train(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    seed: int,
    device: str,
    workers: int,
    store: Store,
    observer: Observer,
) -> list[Row]:
    """Trains `model` in place, going on from what `store` holds.

    Args:
        model: `Network`, or an explicit model that returns a `Prediction`.
        task: Data, loss and metric.
        recipe: How.
        seed: Of data order, augmentation, dropout and probes. The caller seeds the initial weights.
        device: Where; the model is moved there.
        workers: Processes that load data.
        store: Keeps the resumable state.
        observer: Sees every step.

    Returns:
        The history, a row an epoch.

    Raises:
        TrainingError: if a loss or gradient is not finite, or the memory does not suffice; no weight has changed since.
    """
    run = _Run(model.to(device), task, recipe, seed, device, workers, store, observer)
    if recipe.epochs == 0:  # weights that were made elsewhere
        return [{"epoch": 0, "step": 0, **run.validate()}]
    run.resume()
    while run.state.epoch < recipe.epochs:
        run.train_epoch()
        run.save()
        run.end_epoch()
        run.save()
    if run.averaged is not None:
        run.model.load_state_dict(run.averaged.module.state_dict())
    return run.state.history


@dataclass
class _Run:
    """A training as it goes on, its model on its device; the arguments are those of `train`."""

    model: nn.Module
    task: Task
    recipe: Recipe
    seed: int
    device: str
    workers: int
    store: Store
    observer: Observer
    state: _State = field(default_factory=_State)

    def __post_init__(self) -> None:
        self.share = Share(processes.rank(), processes.count(), self.recipe.accumulate)
        if self.share.processes > 1 and self.device.startswith("cuda"):
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.optimizer = make_optimizer(self.model, self.recipe.optimizer)
        half = self.recipe.precision == "float16"
        self.scaler = torch.amp.GradScaler(torch.device(self.device).type, enabled=half)
        self.updates = math.ceil(len(self.task.train) / self.recipe.batch)  # an epoch
        self.averaged: nn.Module | None = None
        if self.recipe.average:
            average = get_ema_multi_avg_fn(self.recipe.average)
            self.averaged = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.states = None
        if self.recipe.starts is not None and isinstance(self.model, Network):
            self.states = LastStates(self.store.path.parent / f"{self.store.path.stem}-states", len(self.task.train))

    def resume(self) -> None:
        """Goes back to what the store holds, if anything."""
        saved = processes.from_first(self.store.load() if self.share.rank == 0 else None)
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved.get("scaler", {}))
            if self.averaged is not None:
                self.averaged.load_state_dict(saved["averaged"])
            self.state = _State(**saved["state"])
            self.observer.saved(self.state.log)
        self.began = time.monotonic() - self.state.seconds

    def save(self) -> None:
        self.state.seconds = time.monotonic() - self.began
        if self.share.rank == 0:
            parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
            if self.averaged is not None:
                parts["averaged"] = self.averaged
            self.store.save({name: part.state_dict() for name, part in parts.items()} | {"state": vars(self.state)})
        self.observer.saved(self.state.log)

    def train_epoch(self) -> None:
        """What remains of the epoch, with saves on the way."""
        state, recipe, total = self.state, self.recipe, self.updates * self.recipe.epochs
        self.model.train()
        loader = batches(
            self.task.train, recipe.batch, seed=self.seed, epoch=state.epoch, shuffle=True, start=state.batch,
            share=self.share, workers=self.workers,
        )  # fmt: skip
        last_save = time.monotonic()
        sample_order = order(len(self.task.train), self.seed, state.epoch)
        if self.states is not None:
            self.states.begin(state.epoch)
        for pieces in zip(*[iter(loader)] * recipe.accumulate, strict=True):
            set_lr(self.optimizer, cosine(1.0, state.step, total, recipe.rise))
            samples = min(recipe.batch, len(self.task.train) - state.batch * recipe.batch)
            bounds = self.share.bounds(samples)
            batch = sample_order[state.batch * recipe.batch :]
            self.indices = [batch[a:b] if a < b else batch[:1] for a, b in bounds]
            with self.explained(bounds):
                moved = [(*_moved(piece, self.device), b - a) for piece, (a, b) in zip(pieces, bounds, strict=True)]
                values = self.update(moved)
            if self.averaged is not None:
                self.averaged.update_parameters(self.model)
            state.loss_sum += values["loss/train"]
            state.batch += 1
            state.step += 1
            if state.step % recipe.log_every == 0:
                state.log.append((state.step, values))
            self.observer.step(state.step, total, values)
            if time.monotonic() - last_save > 60 * recipe.checkpoint_minutes:
                self.save()
                last_save = time.monotonic()
        if self.states is not None:
            self.states.end()

    def end_epoch(self) -> None:
        """Validates, and notes what came of the epoch."""
        state, row = self.state, self.validate()
        seconds = time.monotonic() - self.began
        row |= {"loss/train_epoch": state.loss_sum / self.updates, "lr": self.optimizer.param_groups[0]["lr"]}
        row |= peak_memory(self.device)
        log = [*state.log, (state.step, row)]
        history = [*state.history, {"epoch": state.epoch + 1, "step": state.step, **row, "time/seconds": seconds}]
        self.state = _State(state.epoch + 1, step=state.step, seconds=seconds, log=log, history=history)

    def update(self, pieces: Sequence[Piece]) -> Row:
        """One update of the weights from a batch whose `pieces` are this process' part of it; its figures."""
        start, state, scaler, term = time.perf_counter(), self.state, self.scaler, self.recipe.jacobian
        _reseed(self.seed, state.step, part=0)
        unrolled = self.recipe.warm_up.steps if self.recipe.warm_up else 0
        weight = term.weight_at(state.step, state.epoch, unrolled) if term else 0.0
        probes = term.probes if term and weight > 0 and float(torch.rand(())) < term.probability else 0
        figures: dict[str, Tensor] = {}
        seen: list[tuple[Tensor, Tensor]] = []
        self.optimizer.zero_grad(set_to_none=True)
        for number, ((images, targets, _), share) in enumerate(zip(pieces, _shares(pieces, self.task), strict=True)):
            if part := processes.rank() * len(pieces) + number:
                _reseed(self.seed, state.step, part)
            logits, own = self.backward(images, targets, share, weight, probes, self.indices[number])
            seen.append((images, logits))
            figures = {name: figures.get(name, 0) + value for name, value in own.items()}
        sums = torch.stack(list(figures.values()))
        _add_up(self.model, sums)
        values = dict(zip(figures, sums.tolist(), strict=True))  # here a GPU is waited for
        _check_finite(values["loss/train"], [] if scaler.is_enabled() else list(self.model.parameters()), seen)
        scaler.step(self.optimizer)  # skipped, where the scale was too large for float16
        scaler.update()
        if scaler.is_enabled():
            values["loss/scale"] = scaler.get_scale()
            if values["loss/scale"] < SMALLEST_SCALE:
                raise _NotFinite("the gradient is not finite at any scale of the loss", [])
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        images = sum(n for *_, n in pieces) * processes.count()
        values["time/images_per_second"] = images / (time.perf_counter() - start)
        return values

    def backward(
        self, images: Tensor, targets: Tensor, share: Tensor, weight: float, probes: int, indices: np.ndarray
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds a piece's gradients to the weights': its logits and figures, which weigh `share` (2,) in the batch's.

        `weight` and `probes` are the Jacobian term's.
        """
        warm_up = self.recipe.warm_up if self.recipe.warm_up and self.state.step < self.recipe.warm_up.steps else None
        layers, softplus = (warm_up.layers, warm_up.softplus) if warm_up else (None, None)
        adjoint: list[Solution] = []
        if isinstance(self.model, Network):
            self.model.backbone.on_backward = adjoint.append
        z0 = self.states.read(indices).to(images.device) if self.states and self.states.known else None
        with _autocast(images.device, self.recipe.precision), self.started(z0 is not None) as single:
            prediction = predict(self.model, images, single or layers, probes, softplus, z0)
            loss = self.task.loss(prediction.logits, targets)
        if self.states is not None:
            self.states.write(indices, flat_state(prediction))
        objective = share[0] * loss
        figures = {"loss/train": objective.detach()}
        if probes and prediction.equilibrium and prediction.equilibrium.jacobian is not None:
            estimate = share[1] * prediction.equilibrium.jacobian
            objective = objective + weight * estimate
            figures["solver/jacobian"] = estimate.detach()
        self.scaler.scale(objective).backward()
        figures |= {name: share[1] * value for name, value in _solver_figures(prediction, adjoint).items()}
        return prediction.logits.detach(), figures

    @contextlib.contextmanager
    def started(self, warm: bool) -> Iterator[int | None]:
        """The solver's limit for a start at the last epoch's states; gives 1 where f is applied on the tape alone."""
        if not warm:
            yield None
            return
        backbone, steps = self.model.backbone, self.recipe.start_steps(self.state.epoch)
        kept = backbone.forward_solver
        if steps:
            backbone.forward_solver = replace(kept, steps=steps)
        try:
            yield None if steps else 1
        finally:
            backbone.forward_solver = kept

    def validate(self) -> Row:
        """Validation at the equilibrium; during the warm-up unrolled as well, under names that end in _unrolled."""
        task, recipe = self.task, self.recipe
        judge = partial(
            evaluate, self.averaged.module if self.averaged is not None else self.model, task.validation,
            batch=task.validation_batch or max(1, recipe.batch // (self.share.processes * recipe.accumulate)),
            device=self.device, workers=self.workers, precision=recipe.precision, on_batch=self.observer.validating,
        )  # fmt: skip
        row = judge(task.metric())
        if recipe.warm_up and self.state.step <= recipe.warm_up.steps:
            unrolled = judge(task.metric(), unroll_steps=recipe.warm_up.layers)
            row |= {f"{name}_unrolled": value for name, value in unrolled.items()}
        return row

    @contextlib.contextmanager
    def explained(self, bounds: list[tuple[int, int]]) -> Iterator[None]:
        """Says of what stops an update at which step it was, and which files made this part of the batch."""
        task, state, size = self.task, self.state, self.recipe.batch
        try:
            yield
        except (_NotFinite, MemoryError, RuntimeError) as error:
            if isinstance(error, _NotFinite):
                what, cure = str(error), "lower optimizer.lr or lengthen warm_up.steps"
            elif processes.out_of_memory(error):
                what, cure = "the memory does not suffice", "lower batch"
            else:
                raise
            batch = order(len(task.train), self.seed, state.epoch)[state.batch * size :][:size]
            indices = np.concatenate([batch[a:b] if a < b else batch[:1] for a, b in bounds])
            if blamed := getattr(error, "samples", None):
                indices = indices[blamed]
            named = [task.train.name(int(index)) for index in indices[:NAMES]] + ["..."] * (len(indices) > NAMES)
            where = f"epoch {state.epoch + 1}, {'of' if blamed else 'in a batch with'} {', '.join(named)}"
            raise TrainingError(
                f"{what} at step {state.step} ({where}); no weight has changed since the step before; {cure}"
            ) from error


def evaluate(
    model: nn.Module,
    dataset: BatchDataset,
    metric: Metric,
    *,
    batch: int,
    device: str,
    workers: int,
    precision: Precision = "float32",
    unroll_steps: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Row:
    """The metric over a data set in its own order, and the solver's means over its samples; in all processes alike.

    Args:
        unroll_steps: Apply f that many times instead of solving.
        on_batch: Called with batches done and in all.
    """
    model.eval()
    share = Share(processes.rank(), processes.count())
    batch *= share.processes
    loader = batches(dataset, batch, seed=0, epoch=0, shuffle=False, share=share, workers=workers)
    marks = [2**k for k in range(1, 6)]
    names = ["solver/relative_residual", "solver/nfe", "solver/converged"]
    names += [f"solver/residual_after_{mark}" for mark in marks]
    sums = torch.zeros(1 + len(names), dtype=torch.float64)  # the samples solved for, and over them those figures
    with torch.inference_mode():
        for done, piece in enumerate(loader, 1):
            [(first, end)] = share.bounds(min(batch, len(dataset) - (done - 1) * batch))
            if first < end:
                images, targets = _moved(piece, device)
                with _autocast(device, precision):
                    prediction = predict(model, images, unroll_steps)
                metric.update(prediction.logits.float(), targets)
                solution = prediction.equilibrium.solution if prediction.equilibrium else None
                if solution is not None:
                    evaluations = torch.full_like(solution.relative, solution.nfe)
                    rows = [torch.ones_like(evaluations), solution.relative, evaluations, solution.converged]
                    rows += [solution.trace[min(mark, solution.nfe) - 1] for mark in marks]
                    sums += torch.stack([row.sum() for row in rows]).cpu()
            on_batch(done, len(loader))
    processes.add_up([metric.counts])
    processes.add_up([sums])
    values = metric.compute()
    count, *totals = sums.tolist()
    if count:
        figures = {name: total / count for name, total in zip(names, totals, strict=True)}
        beyond = {f"solver/residual_after_{mark}" for mark in marks if mark > figures["solver/nfe"]}
        values |= {name: value for name, value in figures.items() if name not in beyond}
    return values


class LastStates:
    """The equilibrium of each training sample in the last epoch and in this one: two memory-mapped files in bfloat16.

    An epoch reads one and writes the other, so that a resumed epoch reads what the interrupted one did.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples, self.known = folder, samples, False
        self.last: Tensor | None = None
        self.now: Tensor | None = None

    def begin(self, epoch: int) -> None:
        self.epoch, self.known = epoch, epoch > 0 and self.complete(epoch - 1)
        self.last = self.now = None

    def end(self) -> None:
        self._mark().write_text(str(self.epoch))

    def complete(self, epoch: int) -> bool:
        return self._mark().is_file() and self._mark().read_text() == str(epoch)

    def read(self, indices: np.ndarray) -> Tensor:
        if self.last is None:
            self.last = self._map(self.epoch - 1)
        return self.last[torch.from_numpy(indices)].float()

    def write(self, indices: np.ndarray, state: Tensor) -> None:
        if self.now is None:
            self.now = self._map(self.epoch, state.shape[1])
        self.now[torch.from_numpy(indices)] = state.to("cpu", torch.bfloat16)

    def _mark(self) -> Path:
        return self.folder / "complete"

    def _map(self, epoch: int, width: int | None = None) -> Tensor:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{epoch % 2}.bin"
        width = width or file.stat().st_size // (2 * self.samples)
        size = self.samples * width
        flat = torch.from_file(str(file), shared=True, size=size, dtype=torch.bfloat16)
        return flat.view(self.samples, width)


def flat_state(prediction: Prediction) -> Tensor:
    """z* (B, D) of a prediction."""
    found = prediction.equilibrium
    assert found is not None
    return torch.cat([z.detach().permute(0, 2, 3, 1).flatten(1) for z in found.scales], dim=1)


def predict(
    model: nn.Module, images: Tensor, unroll_steps: int | None = None, probes: int = 0, softplus: float | None = None,
    z0: Tensor | None = None,
) -> Prediction:
    """The model's prediction, as `Network` explains; explicit models know nothing of unrolling."""
    if isinstance(model, Network):
        return model(images, z0=z0, unroll_steps=unroll_steps, softplus=softplus, jacobian_probes=probes)
    return model(images)


def peak_memory(device: str) -> Row:
    """Bytes at most in use so far: by the process, and by torch on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    row = {"memory/peak_process_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
    if device.startswith("cuda"):
        row["memory/peak_gpu_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return row


def _reseed(seed: int, step: int, part: int) -> None:
    """Makes what is drawn next a function of (seed, step, part of the batch)."""
    torch.manual_seed((seed * 2_147_483_659 + part * 1_000_003_631 + step) % 2**63)


def _shares(pieces: Sequence[Piece], task: Task) -> Tensor:
    """What each piece weighs in the means over the whole batch: of the loss, and over samples; (pieces, 2)."""
    weights = [[float(task.weight(targets)) if n else 0.0, float(n)] for _, targets, n in pieces]
    shares = torch.tensor(weights, device=pieces[0][0].device)
    total = shares.sum(0)
    processes.add_up([total])
    return shares / total.clamp(min=torch.finfo(total.dtype).tiny)


def _solver_figures(prediction: Prediction, adjoint: list[Solution]) -> dict[str, Tensor | float]:
    """Means over the samples of a piece."""
    figures: dict[str, Tensor | float] = {}
    solution = prediction.equilibrium.solution if prediction.equilibrium else None
    if solution is not None:
        figures["solver/forward_residual"] = solution.relative.mean()
        figures["solver/nfe"] = float(solution.nfe)
        figures["solver/converged"] = solution.converged.float().mean()
    if adjoint:
        figures["solver/backward_residual"] = adjoint[-1].relative.mean()  # Reversible: of the way back
        figures["solver/backward_nfe"] = float(adjoint[-1].nfe)
    return figures


def _add_up(model: nn.Module, sums: Tensor) -> None:
    """Adds up gradients and `sums` over the processes, and makes one of their running statistics: the mean."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    processes.add_up([*gradients, *statistics, sums])
    for buffer in statistics:
        buffer /= processes.count()


def _moved(piece: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
    images, targets = piece
    return images.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def _autocast(device: str | torch.device, precision: Precision) -> torch.autocast:
    dtype = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype, enabled=precision != "float32")


class _NotFinite(Exception):
    """What is not finite, and which of the batch's samples are to blame; none if it is not known."""

    def __init__(self, what: str, samples: list[int]) -> None:
        super().__init__(what)
        self.samples = samples


def _check_finite(loss: float, parameters: list[nn.Parameter], seen: list[tuple[Tensor, Tensor]]) -> None:
    """Stops an update before it spoils the weights; `seen` are the images and logits of this process."""
    norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"gradient's norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
    masks = [torch.cat([~torch.isfinite(piece[i]).flatten(1).all(1) for piece in seen]) for i in (0, 1)]
    blamed = next((mask for mask in masks if mask.any()), torch.zeros(0))
    raise _NotFinite(f"the {what}", blamed.nonzero()[:, 0].tolist())
