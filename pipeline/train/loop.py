"""The one training loop and the one evaluation loop. Needs torch and numpy alone.

Everything random in a step is a function of (seed, step), everything random in a sample one of
(seed, epoch, index): a run that is interrupted and resumed ends with the same weights, bit for bit,
as one that was not. Several processes (torchrun) and several micro-batches per update make the
update of the whole batch; what depends on their number is in docs/scaling.md: batch statistics,
dropout masks and Jacobian probes.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mdeq import Network, Prediction, Solution
from pipeline.data.loading import BatchDataset, Share, batches
from pipeline.errors import Stopped, UserError
from pipeline.recipe import Precision, Recipe
from pipeline.train import distributed
from pipeline.train.checkpoints import RunState
from pipeline.train.metrics import Metric, SolverStatistics
from pipeline.train.optimizers import make_optimizer, schedule, set_learning_rate
from pipeline.train.warm_start import LastEquilibria

Row = dict[str, float]
Batch = tuple[Tensor, Tensor]
Predict = Callable[[nn.Module, Tensor], Prediction]
NAMES = 8  # of files in a message
SMALLEST_SCALE = 2.0**-24  # of the loss in float16: below it no gradient can be finite
# what Python, CUDA, torch on a CPU and cuBLAS say
OUT_OF_MEMORY = ("MemoryError", "OutOfMemory", "out of memory", "t allocate memory", "ALLOC_FAILED")


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


class Observer(Protocol):
    """Watches a run: every update, the batches of a validation, and the rows to record."""

    def step(self, step: int, total: int, values: Row) -> None: ...

    def validating(self, batches: Any) -> Iterable[Batch]: ...

    def record(self, step: int, row: Row) -> None: ...


@dataclass
class State:
    """What a run consists of so far, besides its model and optimizer."""

    epoch: int = 0
    batch: int = 0  # the next one of the epoch
    step: int = 0
    loss_sum: float = 0.0  # of the epoch
    seconds: float = 0.0  # of training, in this process and those before
    history: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """What one process computes at once: `count` samples, or one without weight if it is 0."""

    images: Tensor
    targets: Tensor
    indices: np.ndarray
    count: int


@dataclass
class Run:
    """A training of a `Network`, or of an explicit model that returns a `Prediction`.

    `seed` is that of data order, dropout and probes; the caller seeds the initial weights.
    """

    model: nn.Module
    task: Task
    recipe: Recipe
    seed: int
    device: str
    workers: int  # processes that load data
    store: RunState
    observer: Observer

    def __post_init__(self) -> None:
        recipe, samples = self.recipe, len(self.task.train)
        self.model = self.model.to(self.device)
        self.state, self.saved_step = State(), 0
        self.signals = Signals()
        self.share = Share(distributed.rank(), distributed.count(), recipe.accumulate)
        if self.share.processes > 1 and self.device.startswith("cuda"):
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.optimizer = make_optimizer(self.model, recipe.optimizer)
        kind, half = torch.device(self.device).type, recipe.precision == "float16"
        self.scaler = torch.amp.GradScaler(kind, enabled=half)
        self.updates = math.ceil(samples / recipe.batch)  # per epoch
        self.total = self.updates * recipe.epochs
        self.unrolled = recipe.warm_up.steps if recipe.warm_up else 0
        self.parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        self.parts["scaler"] = self.scaler
        self.validated = self.model
        if recipe.average:
            decay = get_ema_multi_avg_fn(recipe.average)
            averaged = AveragedModel(self.model, multi_avg_fn=decay, use_buffers=True)
            self.parts["averaged"] = averaged
            self.validated = averaged.module
        self.last: LastEquilibria | None = None
        if recipe.warm_start and isinstance(self.model, Network):
            self.last = LastEquilibria(self.store.folder, samples)
            self.parts["last"] = self.last
        self.began = time.monotonic()

    def train(self) -> list[Row]:
        """Trains the model in place, from the state in the store if it has one.

        Returns:
            The history, one row per epoch.

        Raises:
            UserError: A loss or gradient is not finite, or memory ran out, and no weight has
                changed since the last update; or the stored state is not of this run.
            Stopped: Ctrl-C or SIGTERM; the state was saved first.
        """
        if self.recipe.epochs == 0:  # weights that were made elsewhere
            return [{"epoch": 0, "step": 0, **self.validate()}]
        self.resume()
        with self.signals:
            try:
                while self.state.epoch < self.recipe.epochs:
                    self.train_epoch()
                    self.save()
                    self.end_epoch()
                    self.save()
            except RuntimeError as error:
                if self.signals.received and "DataLoader worker" in str(error):  # got it, too
                    raise self.stopped() from None
                raise
        if self.recipe.average:
            self.model.load_state_dict(self.validated.state_dict())
        if self.last and self.share.rank == 0:
            self.last.remove()
        return self.state.history

    def resume(self) -> None:
        """Restores what the store holds, if anything."""
        saved = distributed.from_first(self.store.load() if self.share.rank == 0 else None)
        if saved is None:
            return
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.state = State(**saved["state"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise self.store.damaged(f"not the state of this run: {error!r}") from error
        self.saved_step, self.began = self.state.step, self.began - self.state.seconds

    def save(self) -> None:
        """Saves the resumable state."""
        self.state.seconds = time.monotonic() - self.began
        if self.last:
            self.last.flush()
        if self.share.rank == 0:
            saved: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
            self.store.save(saved | {"state": vars(self.state)})
        self.saved_step = self.state.step

    def stopped(self) -> Stopped:
        """The end of a run that was asked to stop."""
        return Stopped(
            f"stopped; {self.saved_step:,} of {self.total:,} updates are saved: "
            "run the same command again to resume",
            128 + (self.signals.received or signal.SIGTERM),
        )

    def train_epoch(self) -> None:
        """Trains on what remains of the epoch."""
        state, recipe = self.state, self.recipe
        self.model.train()
        if self.last:
            self.last.begin(state.epoch, state.batch)
        last_save = time.monotonic()
        for pieces in self.remaining_batches():
            set_learning_rate(self.optimizer, schedule(state.step, self.total, recipe.lr_warm_up))
            try:
                values = self.update(pieces)
            except (MemoryError, RuntimeError, ValueError) as error:
                if any(sign in repr(error) for sign in OUT_OF_MEMORY):
                    cure = "lower batch, or raise accumulate"
                    raise self.failed("out of memory", cure, pieces) from error
                if "more than 1 value per channel" in str(error):
                    cure = "choose a batch or limit that leaves no rest of one image"
                    raise self.failed(
                        "batch norm cannot train on one image", cure, pieces
                    ) from error
                raise
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

    def remaining_batches(self) -> Iterator[list[Piece]]:
        """This process' pieces of each batch of the epoch, on its device, from the next one on."""
        data, size, next_batch = self.task.train, self.recipe.batch, self.state.batch
        loader = batches(
            data, size, seed=self.seed, epoch=self.state.epoch, shuffle=True,
            start=next_batch, share=self.share, workers=self.workers,
        )  # fmt: skip
        loaded = zip(loader.sampler, loader, strict=True)
        for first in range(next_batch * size, len(data), size):
            pieces = []
            for a, b in self.share.bounds(min(size, len(data) - first)):
                keys, (images, targets) = next(loaded)
                images = images.to(self.device, non_blocking=True)
                targets = targets.to(self.device, non_blocking=True)
                pieces.append(Piece(images, targets, np.array(keys.indices), b - a))
            yield pieces

    def end_epoch(self) -> None:
        """Validates, and records what the epoch came to."""
        state, row = self.state, self.validate() | peak_memory(self.device)
        row["loss/train_epoch"] = state.loss_sum / self.updates
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        self.observer.record(state.step, row)
        epoch, seconds = state.epoch + 1, time.monotonic() - self.began
        state.history.append({"epoch": epoch, "step": state.step, **row, "time/seconds": seconds})
        self.state = State(epoch, step=state.step, history=state.history)

    def validate(self) -> Row:
        """The validation split, by the weights that the run will end with.

        At the equilibrium, and until the warm-up ends unrolled (`..._unrolled`), too.
        """
        task, recipe, warm_up = self.task, self.recipe, self.recipe.warm_up
        parts = self.share.processes * recipe.accumulate
        evaluate = partial(
            evaluate_split, self.validated, task.validation,
            batch=task.validation_batch or max(1, recipe.batch // parts), device=self.device,
            workers=self.workers, precision=recipe.precision, watch=self.watch_validation,
        )  # fmt: skip
        row = evaluate(task.metric())
        if warm_up and self.state.step <= warm_up.steps:
            layers = warm_up.layers
            unrolled = evaluate(task.metric(), predict=lambda net, x: net(x, unroll_steps=layers))
            row |= {f"{name}_unrolled": value for name, value in unrolled.items()}
        return row

    def watch_validation(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, until a signal asks to stop; the state was saved before."""
        for batch in self.observer.validating(batches):
            yield batch
            if self.signals.received:
                raise self.stopped()

    def update(self, pieces: list[Piece]) -> Row:
        """One update of the weights from this process' part of a batch; its figures."""
        start, state, scaler = time.perf_counter(), self.state, self.scaler
        _reseed(self.seed, state.step, part=0)
        term, weight, probes = self.recipe.jacobian, 0.0, 0
        if term:
            weight = term.weight_at(state.step, state.epoch, self.unrolled)
            drawn = weight > 0 and float(torch.rand(())) < term.probability
            probes = term.probes if drawn else 0
        figures: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for number, share in enumerate(self.shares(pieces)):
            part = self.share.rank * len(pieces) + number
            if part:
                _reseed(self.seed, state.step, part)
            for name, value in self.backward(pieces[number], share, weight, probes).items():
                figures[name] = figures.get(name, 0) + value
        # all processes stop at the same step, even if the signal reached one of them alone
        figures["stop"] = torch.full_like(figures["loss/train"], float(self.signals.received))
        sums = torch.stack(list(figures.values()))
        self.add_up(sums)
        values = dict(zip(figures, sums.tolist(), strict=True))  # here a GPU is waited for
        self.check_finite(values["loss/train"], pieces)
        scaler.step(self.optimizer)  # skipped where the scale was too large for float16
        scaler.update()
        if scaler.is_enabled():
            values["loss/scale"] = scaler.get_scale()
        if self.recipe.average:
            self.parts["averaged"].update_parameters(self.model)
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        images = sum(piece.count for piece in pieces) * self.share.processes
        values["time/images_per_second"] = images / (time.perf_counter() - start)
        return values

    def shares(self, pieces: list[Piece]) -> Tensor:
        """What each piece weighs in the means over the batch: of the loss, of samples; (n, 2)."""
        weights = []
        for piece in pieces:
            loss = float(self.task.weight(piece.targets)) if piece.count else 0.0
            weights.append([loss, float(piece.count)])
        shares = torch.tensor(weights, device=self.device)
        total = shares.sum(0)
        distributed.add_up([total])
        return shares / total.clamp(min=torch.finfo(total.dtype).tiny)

    def backward(
        self, piece: Piece, share: Tensor, weight: float, probes: int
    ) -> dict[str, Tensor]:
        """Adds a piece's gradients to the weights'; its part of the figures of the batch."""
        adjoint: list[Solution] = []
        if isinstance(self.model, Network):
            self.model.backbone.on_backward = adjoint.append
        with _autocast(self.device, self.recipe.precision):
            prediction = self.predict(piece, probes)
            loss = self.task.loss(prediction.logits, piece.targets)
        equilibrium = prediction.equilibrium
        objective = share[0] * loss
        figures = {"loss/train": objective.detach()}
        if self.last and piece.count and equilibrium:
            self.last.write(piece.indices, equilibrium.scales)
        if equilibrium and equilibrium.jacobian is not None:
            estimate = share[1] * equilibrium.jacobian
            objective = objective + weight * estimate
            figures["solver/jacobian"] = estimate.detach()
        self.scaler.scale(objective).backward()
        means: dict[str, Tensor | float] = {}
        if equilibrium and equilibrium.solution:
            means["solver/forward_residual"] = equilibrium.solution.relative.mean()
            means["solver/converged"] = equilibrium.solution.converged.float().mean()
            means["solver/nfe"] = equilibrium.solution.nfe
        if adjoint:
            means["solver/backward_residual"] = adjoint[-1].relative.mean()
            means["solver/backward_nfe"] = adjoint[-1].nfe
        return figures | {name: share[1] * mean for name, mean in means.items()}

    def predict(self, piece: Piece, probes: int) -> Prediction:
        """The prediction to learn from: unrolled in the warm-up, else at the equilibrium."""
        model, recipe = self.model, self.recipe
        if not isinstance(model, Network):
            return model(piece.images)
        options: dict[str, Any] = {"jacobian_probes": probes}
        usual = model.backbone.forward_solver
        if recipe.warm_up and self.state.step < self.unrolled:
            options |= {"unroll_steps": recipe.warm_up.layers, "softplus": recipe.warm_up.softplus}
        elif recipe.warm_start and self.last and self.last.known:
            options["z0"] = self.last.read(piece.indices).to(next(model.parameters()))
            limit = recipe.warm_start.limit(self.state.epoch, recipe.epochs)
            if limit:
                model.backbone.forward_solver = replace(usual, steps=limit)
            else:
                options["unroll_steps"] = 1
        try:
            return model(piece.images, **options)
        finally:
            model.backbone.forward_solver = usual

    def add_up(self, sums: Tensor) -> None:
        """Adds up gradients and `sums` over the processes; running statistics become their mean."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        distributed.add_up([*gradients, *statistics, sums])
        for buffer in statistics:
            buffer /= self.share.processes

    def check_finite(self, loss: float, pieces: list[Piece]) -> None:
        """Stops an update before it spoils the weights; names the samples that are to blame."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        scaled = self.scaler.is_enabled()  # then the scaler skips what is not finite
        norm = 0.0 if scaled else float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(loss):
            what = f"the loss is {loss}"
        elif not math.isfinite(norm):
            what = f"the gradient's norm is {norm}"
        elif scaled and self.scaler.get_scale() < SMALLEST_SCALE:
            what = "the gradient is not finite at any scale of the loss"
        else:
            return
        broken = torch.cat([~piece.images.isfinite().flatten(1).all(1) for piece in pieces])
        blamed = broken.nonzero()[:, 0].tolist()
        raise self.failed(what, "lower optimizer.lr or raise warm_up.steps", pieces, blamed)

    def failed(
        self, what: str, cure: str, pieces: list[Piece], blamed: Sequence[int] = ()
    ) -> UserError:
        """Says at which step an update failed, and which files are to blame, or made the batch."""
        indices = np.concatenate([piece.indices for piece in pieces])
        indices = indices[blamed] if blamed else indices
        names = [self.task.train.name(int(index)) for index in indices[:NAMES]]
        names += ["..."] * (len(indices) > NAMES)
        where = "of" if blamed else "in a batch with"
        return UserError(
            f"{what} at step {self.state.step} (epoch {self.state.epoch + 1}, {where} "
            f"{', '.join(names)}); no weight has changed since the step before; {cure}"
        )


class Signals:
    """Inside, Ctrl-C and SIGTERM only set `received`; a second one acts as usual."""

    def __init__(self) -> None:
        self.received = 0
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._usual[number] = signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        while self._usual:
            signal.signal(*self._usual.popitem())

    def _note(self, number: int, _: object) -> None:
        self.received = number
        self.__exit__()


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
    on_batch: Callable[[Tensor, Tensor, Solution | None], None] | None = None,
    watch: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> Row:
    """The metric over a data set in its own order, and the `SolverStatistics` of its solves.

    Several processes each evaluate a part, `batch` samples at once, and get the same row.

    Args:
        model, dataset, metric, batch, device, workers, precision: As in a training.
        predict: Makes a prediction by the model of a batch of images; None for `model(images)`.
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


def peak_memory(device: str) -> Row:
    """The most bytes in use so far: by the process, and by torch on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"memory/peak_process_bytes": float(peak * unit)}
    if device.startswith("cuda"):
        row["memory/peak_gpu_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return row


def _reseed(seed: int, step: int, part: int) -> None:
    """Makes what is drawn next a function of (seed, step, part of the batch)."""
    torch.manual_seed((seed * 2_147_483_659 + part * 1_000_003_631 + step) % 2**63)


def _autocast(device: str, precision: Precision) -> torch.autocast:
    dtype = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype, enabled=precision != "float32")
