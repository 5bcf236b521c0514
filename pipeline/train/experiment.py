"""What classify, pretrain and finetune share: one training per seed, its record and its results.

The resumable state lies in work/<stage>-<model>/<fingerprint>/, unknown to DVC; the results are
written at the end, each file whole, into results/<stage>/<model>/.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mdeq
from mdeq.saved import Architecture
from pipeline import figures, files, progress, tracking
from pipeline.data import readers
from pipeline.data.loading import BatchDataset, Keys
from pipeline.data.manifest import read_summary
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.params import TrainParams, check_warm_up, plain
from pipeline.recipe import Debug
from pipeline.sets import BY_STAGE
from pipeline.train import checkpoints, debugging, distributed
from pipeline.train.checkpoints import MODEL, RunState, load_model, save_model
from pipeline.train.loop import Row, Task, train
from pipeline.train.tasks import make_task

SOURCES = ("loading", "manifest", "pictures", "readers")  # of every data set


@dataclass(frozen=True)
class Experiment:
    """One model of a training stage.

    Attributes:
        stage: classify, pretrain or finetune.
        name: Of the model.
        params: Its section.
        machine: Where it runs.
        debug: For a debugging run, which leaves no results; None for a real one.
    """

    stage: str
    name: str
    params: TrainParams
    machine: Machine
    debug: Debug | None = None

    @cached_property
    def key(self) -> str:
        """The section of params.yaml, for messages."""
        return f"{self.stage}.{self.name}"

    @cached_property
    def dataset(self) -> str:
        """The data set trained on."""
        return BY_STAGE[self.stage].name

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What `prepare` wrote about the data."""
        return read_summary(self.dataset)

    @cached_property
    def results(self) -> Path:
        """Where the results go; those of a debugging run are kept from DVC and the report."""
        folder = Path("results") if self.debug is None else self.machine.root / "work" / "debug"
        return folder / self.stage / self.name

    @cached_property
    def work(self) -> Path:
        """The folder of the resumable states of this model, whatever their params."""
        debug = "" if self.debug is None else "debug-"
        return self.machine.root / "work" / f"{debug}{self.stage}-{self.name}"

    @cached_property
    def workers(self) -> int:
        """Loader processes; CIFAR-10 lies in memory, which they could only copy."""
        return 0 if self.dataset == "cifar10" else self.machine.workers

    @cached_property
    def backbone(self) -> Path | None:
        """The model whose backbone a fresh one begins with (Sec. 3.2)."""
        source = getattr(self.params, "backbone", None)
        return Path("results/pretrain", source, MODEL) if source else None

    @cached_property
    def builds_on(self) -> str:
        """The run that made the backbone; empty without one."""
        return str(load_model(self.backbone)[2].get("run") or "unknown") if self.backbone else ""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a resumable state belongs to; how often it is saved is no part of it."""
        params = plain(self.params)
        identity = {
            "params": {k: v for k, v in params.items() if k not in ("seeds", "checkpoint_minutes")},
            "data": self.summary["manifest"],
            "code": source_digests(self.stage, self.dataset),
            "torch": torch.__version__,
        }
        if self.backbone:
            identity["backbone"] = checkpoints.model_digest(self.backbone)
        if self.debug:
            identity["debug"] = dataclasses.asdict(self.debug)
        return identity

    def architecture(self, classes: int) -> Architecture:
        """What rebuilds the model."""
        params = self.params
        return Architecture(params.model, params.head, classes, params.forward, params.backward)

    def data(self, seed: int) -> tuple[BatchDataset, BatchDataset]:
        """The training and the validation split, with the augmentation of a seed."""
        train, validation = readers.training_data(self.dataset, self.params, self.machine, seed)
        return debugging.fewer(train, validation, self.params, self.debug)

    def begin(self, seed: int) -> tuple[Task, nn.Module]:
        """What is trained on, and the fresh model, for a seed.

        Raises:
            UserError: The params do not fit the number of samples, or see `model`.
        """
        train, validation = self.data(seed)
        check_warm_up(self.key, self.params, len(train))
        model = self.model(seed, train.classes)
        self._check_smallest_batch(model, train)
        return make_task(self.params, train, validation, self.machine.device), model

    def _check_smallest_batch(self, model: nn.Module, train: BatchDataset) -> None:
        """Batch norm cannot train on one value per channel, as a last batch of one may have."""
        samples, batch = len(train), self.params.batch
        parts = distributed.count() * self.params.accumulate
        smallest = min(samples, batch, samples % batch or batch)
        if self.params.epochs == 0 or smallest >= 2 * parts:
            return
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                copy.deepcopy(model).train()(train[Keys(0, [0])][0].to("cpu"))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            split = f" in {parts} parts" if parts > 1 else ""
            raise UserError(
                f"params.yaml: {self.key}.batch: {batch} of {samples:,} images leaves a batch of "
                f"{smallest}{split}, and batch norm cannot train on a single image; "
                f"choose another batch, or `limit: {samples - smallest or samples - 1}`"
            ) from error

    def model(self, seed: int, classes: int) -> nn.Module:
        """A fresh model, with the backbone's weights if there is one.

        Raises:
            UserError: The library that keeps the model is not installed, its weights cannot be
                downloaded, or the backbone does not fit.
        """
        torch.manual_seed(seed)
        try:
            model = self.architecture(classes).build(fetch=True)
        except ImportError as error:
            cure = "run `pip install '.[explicit]'`"
            raise UserError(f"params.yaml: {self.key}.model.name: {error}; {cure}") from error
        except (OSError, ValueError) as error:
            raise UserError(
                f"params.yaml: {self.key}.model.weights: cannot be downloaded ({error}); "
                "set it to null, and epochs to train it"
            ) from error
        if self.backbone:
            load_backbone(model, self.backbone)
        return model


def run(
    stage: str, name: str, params: TrainParams, machine: Machine, debug: Debug | None = None
) -> None:
    """Trains one model of a stage, once per seed, and writes its results.

    Args:
        stage: classify, pretrain or finetune.
        name: Of the model.
        params: Its section.
        machine: Where it runs.
        debug: For a debugging run, which writes to work/debug/ alone; None for a real one.

    Raises:
        UserError: Data, params or machine do not allow it.
        Stopped: Ctrl-C or SIGTERM, after a save.
    """
    machine.use_threads()
    if debug:
        machine = replace(machine, tracking_uri=None)
    experiment = Experiment(stage, name, params, machine, debug)
    work = experiment.work / checkpoints.fingerprint(experiment.identity)
    with distributed.joined(machine.device), contextlib.ExitStack() as stack:
        if distributed.rank() == 0:
            locks = machine.root / "work" / "locks"
            stack.enter_context(checkpoints.claimed(work, experiment.results, locks))
        record = tracking.start(
            stage,
            name,
            plain(params),
            machine,
            work / tracking.NAME,
            resume=True,
            results=experiment.results,
        )
        with record:
            states = _states(experiment, record)
            _begin_record(experiment, states, record)
            histories = {}
            for seed, state in states.items():
                histories[seed], model = _train(experiment, seed, state, record)
            if distributed.rank() == 0:
                _write_results(experiment, histories, model, record)
        if distributed.rank() == 0:
            checkpoints.delete(list(states.values()), tracking.NAME)


def _states(experiment: Experiment, record: tracking.Run) -> dict[int, RunState]:
    work, identity = experiment.work, experiment.identity
    return {
        seed: RunState(work, identity, f"seed-{seed}", record.position)
        for seed in experiment.params.seeds
    }


def _begin_record(
    experiment: Experiment, states: Mapping[int, RunState], record: tracking.Run
) -> None:
    """Cuts a resumed record back to the last save, or begins a fresh one."""
    if distributed.rank() != 0:
        return
    positions = [state.recorded() for state in states.values()]
    position = max((found for found in positions if found is not None), default=0)
    record.cut(position)
    if position:
        return
    summary, first = experiment.summary, next(iter(states.values()))
    changed = checkpoints.differences(first.work, experiment.identity)
    if changed:
        progress.say(
            f"{experiment.stage} {experiment.name}: starts afresh, because an interrupted training "
            f"differs in {', '.join(changed)}; its state stays in {experiment.work} "
            "until this one has saved twice"
        )
    record.dataset(experiment.dataset, summary["manifest"], summary["source"])
    if experiment.builds_on:
        record.tag("builds_on", experiment.builds_on)


def _train(
    experiment: Experiment, seed: int, state: RunState, record: tracking.Run
) -> tuple[list[Row], nn.Module]:
    """Trains for one seed: its history and its model."""
    machine, params = experiment.machine, experiment.params
    first = distributed.rank() == 0
    prefix = f"seed-{seed}/" if len(params.seeds) > 1 else ""

    def note(row: Row, step: int) -> None:
        record.metrics({prefix + name: value for name, value in row.items()}, step)

    task, model = experiment.begin(seed)
    title = f"{experiment.stage} {experiment.name} seed {seed}"
    with progress.Training(title, note, shown=first) as observer:
        with debugging.profiled(observer, experiment.debug, experiment.results) as watched:
            history = train(
                model,
                task,
                params,
                seed=seed,
                device=machine.device,
                workers=experiment.workers,
                store=state,
                observer=watched,
            )
    if first and seed == params.seeds[0]:
        facts = _facts(experiment, record) | {
            "seed": seed,
            "names": list(task.train.names),
            "params": plain(params),
        }
        path = experiment.results / MODEL
        save_model(path, model, experiment.architecture(task.train.classes), facts)
    return history, model


def _facts(experiment: Experiment, record: tracking.Run) -> dict[str, Any]:
    """What is not a number, of model.safetensors and facts.json."""
    facts = {
        "stage": experiment.stage,
        "model": experiment.name,
        "dataset": experiment.dataset,
        "source": experiment.summary["source"],
        "digest": experiment.summary["manifest"],
        "run": record.id,
        "seeds": list(experiment.params.seeds),
    }
    if experiment.builds_on:
        facts["builds_on"] = experiment.builds_on
    return facts | experiment.machine.describe()


def _write_results(
    experiment: Experiment,
    histories: Mapping[int, list[Row]],
    model: nn.Module,
    record: tracking.Run,
) -> None:
    out = experiment.results
    rows = [{"seed": seed, **row} for seed, history in histories.items() for row in history]
    history = pd.DataFrame(rows)
    files.write_text(out / "history.csv", history.to_csv(index=False))
    title = f"{experiment.stage} {experiment.name}"
    figures.save(figures.training_curves(history, title), out / "curves.png")
    image = experiment.data(experiment.params.seeds[0])[1][Keys(0, [0])][0]
    metrics = {
        **_last_epochs(histories),
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "flops": flops(model, image.to(experiment.machine.device)),
        "batch": experiment.params.batch,
        "epochs": experiment.params.epochs,
    }
    files.write_json(out / "metrics.json", metrics)
    files.write_json(out / "facts.json", _facts(experiment, record))
    record.metrics(metrics, step=int(max(row["step"] for row in rows)))
    record.model(out / MODEL)
    for name in ("metrics.json", "facts.json", "history.csv", "curves.png"):
        record.artifact(out / name)


def _last_epochs(histories: Mapping[int, list[Row]]) -> Row:
    """The last epoch's figures: their mean over the seeds, and of several seeds <name>_std, too."""
    last = pd.DataFrame([history[-1] for history in histories.values()])
    last = last.drop(columns=["epoch", "step"])
    figures = last.mean(skipna=False).to_dict()
    if len(last) > 1:
        figures |= last.std(skipna=False).add_suffix("_std").to_dict()
    return figures


def load_backbone(network: nn.Module, path: Path) -> None:
    """Gives `network` the backbone of the model at `path`, the same MDEQ under another head.

    Raises:
        UserError: It does not fit.
    """
    pretrained = load_model(path)[0]
    try:
        backbone = pretrained.get_submodule("backbone")
        network.get_submodule("backbone").load_state_dict(backbone.state_dict())
    except (AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: its backbone does not fit this model ({reason}); train it again with the "
            "same `model` section"
        ) from error


def source_digests(stage: str, dataset: str) -> dict[str, str]:
    """The digests of the sources that a training depends on, by path."""
    here = Path(__file__).parents[1]
    modules = [here / "recipe.py", here / "stages" / f"{stage}.py", *(here / "train").glob("*.py")]
    modules += [here / "data" / f"{module}.py" for module in (*SOURCES, dataset)]
    modules += Path(str(mdeq.__file__)).parent.glob("*.py")
    found = (path for path in sorted(modules) if path.is_file())
    return {path.relative_to(here.parent).as_posix(): files.file_digest(path) for path in found}


def flops(model: nn.Module, images: Tensor) -> float:
    """Floating-point operations of a prediction, the solver's included; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    return float(counter.get_total_flops())
