"""The one training loop and the one evaluation loop. Needs torch and numpy alone.

Everything random in a step is a function of (seed, step), everything random in a sample one of
(seed, epoch, index): a run that is interrupted and resumed ends with the same weights, bit for bit,
as one that was not. Several processes (torchrun) and several micro-batches per update make the
update of the whole batch; what depends on their number is in docs/scaling.md: batch statistics,
dropout masks and Jacobian probes.
"""

from __future__ import annotations

import contextlib
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mdeq import Network, Prediction, Solution
from pipeline.data.loading import BatchDataset, Share, batches, order
from pipeline.errors import Stopped, UserError
from pipeline.recipe import Precision, Recipe
from pipeline.train import distributed
from pipeline.train.metrics import SolverStatistics
from pipeline.train.optimizers import make_optimizer, schedule, set_learning_rate
from pipeline.train.warm_start import LastEquilibria

Row = dict[str, float]
Batch = tuple[Tensor, Tensor]
Predict = Callable[[nn.Module, Tensor], Prediction]
OnBatch = Callable[[Tensor, Tensor, Solution | None], None]
NAMES = 8  # of files in a message
SMALLEST_SCALE = 2.0**-24  # of the loss in float16: below it no gradient can be finite


@dataclass(frozen=True)
class Task:
    """What differs between data sets: the data, the loss, and a fresh metric for each validation.

    `weight` is the denominator of `loss`, which is a mean: it weighs the parts of a batch that are
    computed separately. `validation_batch` is how many samples are validated at once, None for as
    many as a process trains on at once; whole scenes need more memory than the crops trained on.
    """

    train: BatchDataset
    validation: BatchDataset
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[], Metric]
    validation_batch: int | None = None
    weight: Callable[[Tensor], float | Tensor] = len


class Metric(Protocol):
    """Accumulates over batches in `counts`, whole numbers; `compute` names them as in eval/top1."""

    counts: Tensor

    def update(self, logits: Tensor, targets: Tensor) -> None: ...

    def compute(self) -> Row: ...


class Store(Protocol):
    """Keeps the resumable state, and in `folder` what goes with it; `damaged` makes an error."""

    folder: Path

    def load(self) -> dict[str, Any] | None: ...

    def save(self, state: dict[str, Any]) -> None: ...

    def damaged(self, reason: str) -> UserError: ...


class Observer(Protocol):
    """Watches a run: every update, the batches of a validation, and the rows to record."""

    def step(self, step: int, total: int, values: Row) -> None: ...

    def validating(self, batches: Iterable[Batch]) -> Iterable[Batch]: ...

    def record(self, step: int, row: Row) -> None: ...


@dataclass
class _State:
    """What a run consists of so far, besides its model and optimizer."""

    epoch: int = 0
    batch: int = 0  # the next one of the epoch
    step: int = 0
    loss_sum: float = 0.0  # of the epoch
    seconds: float = 0.0  # of training, over all processes
    history: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class _Piece:
    """What one process computes at once: `count` samples, or one that has no weight if it is 0."""

    images: Tensor
    targets: Tensor
    indices: np.ndarray
    count: int

    def to(self, device: str) -> _Piece:
        images = self.images.to(device, non_blocking=True)
        return replace(self, images=images, targets=self.targets.to(device, non_blocking=True))


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
    """Trains `model` in place, from the state in `store` if it has one.

    Args:
        model: A `Network`, or an explicit model that returns a `Prediction`.
        task: Data, loss and metric.
        recipe: How.
        seed: Of data order, augmentation, dropout and probes. The caller seeds the initial weights.
        device: Where; the model is moved there.
        workers: Processes that load data.
        store: Keeps the resumable state.
        observer: Sees every step.

    Returns:
        The history, one row per epoch.

    Raises:
        UserError: A loss or gradient is not finite, or memory ran out, and no weight has changed
            since the last update; or the stored state is not of this run.
        Stopped: Ctrl-C or SIGTERM; the state was saved first.
    """
    run = _Run(model.to(device), task, recipe, seed, device, workers, store, observer)
    if recipe.epochs == 0:  # weights that were made elsewhere
        return [{"epoch": 0, "step": 0, **run.validate()}]
    run.resume()
    with run.signals.noted():
        try:
            while run.state.epoch < recipe.epochs:
                run.train_epoch()
                run.save()
                run.end_epoch()
                run.save()
        except RuntimeError as error:
            if run.signals.received and "DataLoader worker" in str(error):  # it got the signal, too
                raise run.stopped() from None
            raise
    run.finish()
    return run.state.history


@dataclass
class _Run:
    """A training, its model on its device; the arguments are those of `train`."""

    model: nn.Module
    task: Task
    recipe: Recipe
    seed: int
    device: str
    workers: int
    store: Store
    observer: Observer

    def __post_init__(self) -> None:
        recipe, samples = self.recipe, len(self.task.train)
        self.state = _State()
        self.saved_step = 0
        self.signals = StopSignals()
        self.share = Share(distributed.rank(), distributed.count(), recipe.accumulate)
        if self.share.processes > 1 and self.device.startswith("cuda"):
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.optimizer = make_optimizer(self.model, recipe.optimizer)
        half = recipe.precision == "float16"
        self.scaler = torch.amp.GradScaler(torch.device(self.device).type, enabled=half)
        self.updates = math.ceil(samples / recipe.batch)  # per epoch
        self.total = self.updates * recipe.epochs
        self.parts: dict[str, Any] = {
            "model": self.model, "optimizer": self.optimizer, "scaler": self.scaler,
        }  # fmt: skip
        self.validated = self.model
        if recipe.average:
            decay = get_ema_multi_avg_fn(recipe.average)
            self.averaged = AveragedModel(self.model, multi_avg_fn=decay, use_buffers=True)
            self.parts["averaged"] = self.averaged
            self.validated = self.averaged.module
        self.last: LastEquilibria | None = None
        if recipe.warm_start and isinstance(self.model, Network):
            self.last = LastEquilibria(self.store.folder, samples)
        self.began = time.monotonic()

    def resume(self) -> None:
        """Restores what the store holds, if anything."""
        saved = distributed.from_first(self.store.load() if self.share.rank == 0 else None)
        if saved is None:
            return
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.state = _State(**saved["state"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise self.store.damaged(f"not the state of this run: {error!r}") from error
        self.saved_step = self.state.step
        self.began -= self.state.seconds

    def save(self) -> None:
        """Saves the resumable state."""
        self.state.seconds = time.monotonic() - self.began
        if self.last:
            self.last.flush()
        if self.share.rank == 0:
            saved: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
            self.store.save(saved | {"state": vars(self.state)})
        self.saved_step = self.state.step

    def finish(self) -> None:
        """Leaves the weights to be used in the model, and nothing that only training needs."""
        if self.validated is not self.model:
            self.model.load_state_dict(self.validated.state_dict())
        if self.last and self.share.rank == 0:
            self.last.remove()

    def train_epoch(self) -> None:
        """Trains on what remains of the epoch."""
        state, recipe = self.state, self.recipe
        self.model.train()
        if self.last:
            self.last.begin(state.epoch, state.batch)
        last_save = time.monotonic()
        for pieces in self.remaining_batches():
            set_learning_rate(self.optimizer, schedule(state.step, self.total, recipe.lr_warm_up))
            with self.explained(pieces):
                values = self.update(pieces)
            stop = values.pop("stop") > 0
            state.loss_sum += values["loss/train"]
            state.batch += 1
            state.step += 1
            if state.step % recipe.log_every == 0:
                self.observer.record(state.step, values)
            self.observer.step(state.step, self.total, values)
            if stop or time.monotonic() - last_save > 60 * recipe.checkpoint_minutes:
                self.save()
                last_save = time.monotonic()
            if stop:
                raise self.stopped()
        if self.last:
            self.last.end()

    def remaining_batches(self) -> Iterator[list[_Piece]]:
        """This process' pieces of each batch of the epoch, from the next one on."""
        state, size = self.state, self.recipe.batch
        samples = order(len(self.task.train), self.seed, state.epoch)
        loader = batches(
            self.task.train,
            size,
            seed=self.seed,
            epoch=state.epoch,
            shuffle=True,
            start=state.batch,
            share=self.share,
            workers=self.workers,
        )
        loaded = iter(loader)
        for first in range(state.batch * size, len(samples), size):
            batch = samples[first : first + size]
            pieces = []
            for a, b in self.share.bounds(len(batch)):
                images, targets = next(loaded)
                pieces.append(_Piece(images, targets, batch[a:b] if a < b else batch[:1], b - a))
            yield pieces

    def update(self, pieces: list[_Piece]) -> Row:
        """One update of the weights from this process' part of a batch; its figures."""
        start, state, scaler = time.perf_counter(), self.state, self.scaler
        pieces = [piece.to(self.device) for piece in pieces]
        _reseed(self.seed, state.step, part=0)
        weight, probes = self.jacobian_term()
        figures: dict[str, Tensor] = {}
        logits: list[Tensor] = []
        self.optimizer.zero_grad(set_to_none=True)
        for number, (piece, share) in enumerate(
            zip(pieces, _shares(pieces, self.task), strict=True)
        ):
            part = self.share.rank * len(pieces) + number
            if part:
                _reseed(self.seed, state.step, part)
            answer, own = self.backward(piece, share, weight, probes)
            logits.append(answer)
            figures = {name: figures.get(name, 0) + value for name, value in own.items()}
        # all processes stop at the same step, even if the signal reached one of them alone
        figures["stop"] = torch.full_like(figures["loss/train"], float(self.signals.received or 0))
        sums = torch.stack(list(figures.values()))
        _add_up(self.model, sums)
        values = dict(zip(figures, sums.tolist(), strict=True))  # here a GPU is waited for
        gradients = [] if scaler.is_enabled() else [p.grad for p in self.model.parameters()]
        _check_finite(values["loss/train"], gradients, pieces, logits)
        scaler.step(self.optimizer)  # skipped where the scale was too large for float16
        scaler.update()
        if scaler.is_enabled():
            values["loss/scale"] = scaler.get_scale()
            if values["loss/scale"] < SMALLEST_SCALE:
                raise _NotFiniteError("the gradient is not finite at any scale of the loss", [])
        if self.validated is not self.model:
            self.averaged.update_parameters(self.model)
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        images = sum(piece.count for piece in pieces) * self.share.processes
        values["time/images_per_second"] = images / (time.perf_counter() - start)
        return values

    @property
    def warming_up(self) -> bool:
        """Whether the next update is one of the unrolled ones at the start."""
        return self.recipe.warm_up is not None and self.state.step < self.recipe.warm_up.steps

    def jacobian_term(self) -> tuple[float, int]:
        """The weight and the probes of the Jacobian term in this update."""
        term, warm_up = self.recipe.jacobian, self.recipe.warm_up
        if term is None:
            return 0.0, 0
        unrolled = warm_up.steps if warm_up else 0
        weight = term.weight_at(self.state.step, self.state.epoch, unrolled)
        drawn = weight > 0 and float(torch.rand(())) < term.probability
        return weight, term.probes if drawn else 0

    def backward(
        self, piece: _Piece, share: Tensor, weight: float, probes: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds a piece's gradients to the weights'; its logits and figures.

        `share` (2,) is what it weighs in the batch: in the loss, and in means over samples.
        """
        adjoint: list[Solution] = []
        if isinstance(self.model, Network):
            self.model.backbone.on_backward = adjoint.append
        with _autocast(self.device, self.recipe.precision):
            prediction = self.predict(piece, probes)
            loss = self.task.loss(prediction.logits, piece.targets)
        if self.last and piece.count:
            self.last.write(piece.indices, prediction)
        objective = share[0] * loss
        figures = {"loss/train": objective.detach()}
        equilibrium = prediction.equilibrium
        if probes and equilibrium and equilibrium.jacobian is not None:
            estimate = share[1] * equilibrium.jacobian
            objective = objective + weight * estimate
            figures["solver/jacobian"] = estimate.detach()
        self.scaler.scale(objective).backward()
        for name, value in _solver_figures(prediction, adjoint).items():
            figures[name] = share[1] * value
        return prediction.logits.detach(), figures

    def predict(self, piece: _Piece, probes: int) -> Prediction:
        """The prediction to learn from: unrolled in the warm-up, else at the equilibrium."""
        model, recipe = self.model, self.recipe
        if not isinstance(model, Network):
            return model(piece.images)
        if self.warming_up:
            warm_up = recipe.warm_up
            assert warm_up is not None
            layers, softplus = warm_up.layers, warm_up.softplus
            return model(
                piece.images, unroll_steps=layers, softplus=softplus, jacobian_probes=probes
            )
        if self.last is None or not self.last.known:
            return model(piece.images, jacobian_probes=probes)
        assert recipe.warm_start is not None
        z0 = self.last.read(piece.indices).to(next(model.parameters()))
        limit = recipe.warm_start.limit(self.state.epoch, recipe.epochs)
        with _limited(model, limit):
            once = None if limit else 1
            return model(piece.images, z0=z0, unroll_steps=once, jacobian_probes=probes)

    def end_epoch(self) -> None:
        """Validates, and records what the epoch came to."""
        state, row = self.state, self.validate()
        seconds = time.monotonic() - self.began
        row["loss/train_epoch"] = state.loss_sum / self.updates
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row |= peak_memory(self.device)
        self.observer.record(state.step, row)
        ended = {"epoch": state.epoch + 1, "step": state.step, **row, "time/seconds": seconds}
        history = [*state.history, ended]
        self.state = _State(state.epoch + 1, step=state.step, seconds=seconds, history=history)

    def validate(self) -> Row:
        """Validation at the equilibrium, and unrolled (`..._unrolled`) until the warm-up ends."""
        task, warm_up = self.task, self.recipe.warm_up
        row = self.evaluate(task.metric())
        if warm_up and self.state.step <= warm_up.steps:
            unrolled = self.evaluate(task.metric(), unroll_steps=warm_up.layers)
            row |= {f"{name}_unrolled": value for name, value in unrolled.items()}
        return row

    def evaluate(self, metric: Metric, unroll_steps: int | None = None) -> Row:
        """The validation split, by the weights that the run will end with."""
        pieces = self.share.processes * self.recipe.accumulate
        return evaluate_split(
            self.validated,
            self.task.validation,
            metric,
            batch=self.task.validation_batch or max(1, self.recipe.batch // pieces),
            device=self.device,
            workers=self.workers,
            precision=self.recipe.precision,
            predict=lambda model, images: predict(model, images, unroll_steps),
            watch=self.watch_validation,
        )

    def watch_validation(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, until a signal asks to stop; the state was saved before the validation."""
        for batch in self.observer.validating(batches):
            yield batch
            if self.signals.received:
                raise self.stopped()

    def stopped(self) -> Stopped:
        """The end of a run that was asked to stop."""
        number = self.signals.received or signal.SIGTERM
        return Stopped(
            f"stopped; {self.saved_step:,} of {self.total:,} updates are saved: "
            "run the same command again to resume",
            128 + number,
        )

    @contextlib.contextmanager
    def explained(self, pieces: list[_Piece]) -> Iterator[None]:
        """Says at which step an update failed, and which files made this part of the batch."""
        try:
            yield
        except (_NotFiniteError, MemoryError, RuntimeError) as error:
            indices = np.concatenate([piece.indices for piece in pieces])
            blamed = error.samples if isinstance(error, _NotFiniteError) else []
            if isinstance(error, _NotFiniteError):
                what, cure = str(error), "lower optimizer.lr or raise warm_up.steps"
            elif distributed.out_of_memory(error):
                what, cure = "out of memory", "lower batch, or raise accumulate"
            else:
                raise
            if blamed:
                indices = indices[blamed]
            names = [self.task.train.name(int(index)) for index in indices[:NAMES]]
            names += ["..."] * (len(indices) > NAMES)
            where = f"epoch {self.state.epoch + 1}, {'of' if blamed else 'in a batch with'}"
            raise UserError(
                f"{what} at step {self.state.step} ({where} {', '.join(names)}); "
                f"no weight has changed since the step before; {cure}"
            ) from error


class StopSignals:
    """Inside `noted`, Ctrl-C and SIGTERM only set `received`; a second one acts as usual."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._usual: dict[int, Any] = {}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Takes the two signals over; does nothing outside of the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._usual[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._usual:
            signal.signal(*self._usual.popitem())


def evaluate_split(
    model: nn.Module,
    dataset: BatchDataset,
    metric: Metric,
    *,
    batch: int,
    device: str,
    workers: int = 0,
    precision: Precision = "float32",
    predict: Predict | None = None,
    on_batch: OnBatch | None = None,
    watch: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> Row:
    """The metric over a data set in its own order, and the `SolverStatistics` of its solves.

    Several processes each evaluate a part and get the same row.

    Args:
        model: On `device`.
        dataset: The split.
        metric: Updated by each batch.
        batch: Samples at once, per process.
        device: Where the model is.
        workers: Processes that load data.
        precision: Of convolutions and matrix products.
        predict: Makes a prediction of a batch of images; None for `model(images)`.
        on_batch: Called with each batch's logits (float32), targets and solution.
        watch: Passes on the batches, for a progress bar.
    """
    model.eval()
    share = Share(distributed.rank(), distributed.count())
    whole = batch * share.processes
    statistics = SolverStatistics()
    loader = batches(dataset, whole, seed=0, epoch=0, shuffle=False, share=share, workers=workers)
    with torch.inference_mode():
        for number, (images, targets) in enumerate(watch(loader)):
            [(first, end)] = share.bounds(min(whole, len(dataset) - number * whole))
            if first == end:  # a sample of another process
                continue
            images, targets = images.to(device), targets.to(device)
            with _autocast(device, precision):
                prediction = predict(model, images) if predict else model(images)
            logits = prediction.logits.float()
            solution = prediction.equilibrium.solution if prediction.equilibrium else None
            metric.update(logits, targets)
            if solution is not None:
                statistics.update(solution)
            if on_batch is not None:
                on_batch(logits, targets, solution)
    metric.counts = metric.counts.to(device).clone()  # no longer an inference tensor
    distributed.add_up([metric.counts])
    statistics.samples = torch.cat(distributed.from_all(statistics.samples))
    return metric.compute() | statistics.compute()


def predict(model: nn.Module, images: Tensor, unroll_steps: int | None = None) -> Prediction:
    """The prediction at the equilibrium, or after `unroll_steps` applications of an MDEQ's f."""
    if unroll_steps and isinstance(model, Network):
        return model(images, unroll_steps=unroll_steps)
    return model(images)


def peak_memory(device: str) -> Row:
    """The most bytes in use so far: by the process, and by torch on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"memory/peak_process_bytes": float(peak * unit)}
    if device.startswith("cuda"):
        row["memory/peak_gpu_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return row


@contextlib.contextmanager
def _limited(model: Network, steps: int) -> Iterator[None]:
    """Inside, the forward solver makes at most `steps` updates; 0 leaves it as it is."""
    backbone, usual = model.backbone, model.backbone.forward_solver
    if steps:
        backbone.forward_solver = replace(usual, steps=steps)
    try:
        yield
    finally:
        backbone.forward_solver = usual


def _reseed(seed: int, step: int, part: int) -> None:
    """Makes what is drawn next a function of (seed, step, part of the batch)."""
    torch.manual_seed((seed * 2_147_483_659 + part * 1_000_003_631 + step) % 2**63)


def _shares(pieces: list[_Piece], task: Task) -> Tensor:
    """What each piece weighs in the means over the batch: of the loss, of samples; (pieces, 2)."""
    weights = []
    for piece in pieces:
        loss = float(task.weight(piece.targets)) if piece.count else 0.0
        weights.append([loss, float(piece.count)])
    shares = torch.tensor(weights, device=pieces[0].images.device)
    total = shares.sum(0)
    distributed.add_up([total])
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
        figures["solver/backward_residual"] = adjoint[-1].relative.mean()
        figures["solver/backward_nfe"] = float(adjoint[-1].nfe)
    return figures


def _add_up(model: nn.Module, sums: Tensor) -> None:
    """Adds up gradients and `sums` over the processes; running statistics become their mean."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    distributed.add_up([*gradients, *statistics, sums])
    for buffer in statistics:
        buffer /= distributed.count()


def _autocast(device: str, precision: Precision) -> torch.autocast:
    dtype = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype, enabled=precision != "float32")


class _NotFiniteError(Exception):
    """What is not finite, and which samples of the batch cause it, if that is known."""

    def __init__(self, what: str, samples: list[int]) -> None:
        super().__init__(what)
        self.samples = samples


def _check_finite(
    loss: float, gradients: list[Tensor | None], pieces: list[_Piece], logits: list[Tensor]
) -> None:
    """Stops an update before it spoils the weights."""
    norm = float(nn.utils.get_total_norm([g for g in gradients if g is not None]))
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    for tensors in ([piece.images for piece in pieces], logits):
        broken = torch.cat([~tensor.isfinite().flatten(1).all(1) for tensor in tensors])
        if broken.any():
            raise _NotFiniteError(what, broken.nonzero()[:, 0].tolist())
    raise _NotFiniteError(what, [])
