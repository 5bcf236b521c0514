"""What classify, pretrain and finetune share: one training per seed, its record and its results.

The resumable state lies in work/<stage>-<model>/<fingerprint>/, unknown to DVC; the results are
written at the end, each file whole, into results/<stage>/<model>/.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mdeq
from mdeq.losses import HardExamples, classification_loss, pixel_weight, segmentation_loss
from mdeq.saved import Architecture
from pipeline import figures, files, progress, tracking
from pipeline.data import readers
from pipeline.data.loading import Keys
from pipeline.data.manifest import read_summary
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.params import FinetuneParams, TrainParams, check_warm_up, plain
from pipeline.recipe import Debug
from pipeline.sets import BY_STAGE
from pipeline.train import checkpoints, debugging, distributed
from pipeline.train.checkpoints import MODEL, RunState, load_model, save_model
from pipeline.train.loop import Row, Run, Task
from pipeline.train.metrics import ConfusionMatrix, TopK

READ = ("loading", "manifest", "pictures", "readers")  # the sources of every data set
# of Cityscapes' train ids, published with the authors' configuration
CLASS_WEIGHTS = (
    0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023,
    0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507,
)  # fmt: skip


class Experiment:
    """One model of a training stage; with `debug` a debugging run, which leaves no results.

    Attributes:
        results: The folder of the results.
        work: The folder of the resumable states of this model, whatever their params.
        workers: Loader processes; CIFAR-10 lies in memory, which they could only copy.
        facts: What is known before the training, for facts.json and the model's file.
        identity: What a resumable state belongs to; how often it is saved is no part of it.
    """

    def __init__(
        self,
        stage: str,
        name: str,
        params: TrainParams,
        machine: Machine,
        debug: Debug | None = None,
    ) -> None:
        self.params, self.machine, self.debug = params, machine, debug
        self.title, self.key = f"{stage} {name}", f"{stage}.{name}"
        results = machine.root / "work/debug" if debug else Path("results")
        self.results = results / stage / name
        self.work = machine.root / "work" / f"{'debug-' if debug else ''}{stage}-{name}"
        self.dataset = BY_STAGE[stage].name
        self.workers = 0 if self.dataset == "cifar10" else machine.workers
        source = getattr(params, "backbone", None)
        self.backbone = Path("results/pretrain", source, MODEL) if source else None
        summary = read_summary(self.dataset)
        self.facts: dict[str, Any] = {
            **machine.describe(),
            "threads": torch.get_num_threads(),
            "stage": stage,
            "model": name,
            "dataset": self.dataset,
            "source": summary["source"],
            "digest": summary["manifest"],
            "params": plain(params),
            "seeds": list(params.seeds),
            "seed": params.seeds[0],  # of the model
        }
        self.identity = {f"params.{key}": value for key, value in plain(params).items()}
        del self.identity["params.seeds"], self.identity["params.checkpoint_minutes"]
        self.identity |= source_digests(stage, self.dataset)
        self.identity |= {"data": summary["manifest"], "torch": torch.__version__}
        self.identity["debug"] = debug and vars(debug)
        if self.backbone:
            self.facts["builds_on"] = load_model(self.backbone)[2].get("run") or "unknown"
            self.identity["backbone"] = files.file_digest(self.backbone)

    def architecture(self, classes: int) -> Architecture:
        """What rebuilds the model."""
        params = self.params
        return Architecture(params.model, params.head, classes, params.forward, params.backward)

    def begin(self, seed: int) -> tuple[Task, nn.Module]:
        """What is trained on, and the fresh model, for a seed.

        Raises:
            UserError: The data are missing or too few, or the model cannot be made.
        """
        params = self.params
        splits = readers.training_data(self.dataset, params, self.machine, seed)
        if self.debug:
            splits = debugging.fewer(*splits, params.batch, self.debug)
        train, validation = splits
        check_warm_up(self.key, params, len(train))
        torch.manual_seed(seed)
        model = self._model(train.classes)
        if not isinstance(params, FinetuneParams):
            loss = partial(classification_loss, label_smoothing=params.label_smoothing)
            return Task(train, validation, loss, partial(TopK, train.classes)), model
        hard = HardExamples() if params.loss.ohem else None
        weights = torch.tensor(CLASS_WEIGHTS, device=self.machine.device)
        weights = weights if params.loss.class_weights else None
        task = Task(
            train,
            validation,
            loss=partial(segmentation_loss, class_weights=weights, hard=hard),
            metric=partial(ConfusionMatrix, train.classes),
            validation_batch=1,
            weight=partial(pixel_weight, class_weights=weights),
        )
        return task, model

    def _model(self, classes: int) -> nn.Module:
        try:
            model = self.architecture(classes).build(fetch=True)
        except ImportError as error:
            why = f"{error}; run `pip install '.[explicit]'`"
            raise UserError(f"params.yaml: {self.key}.model.name: {why}") from error
        except (OSError, ValueError) as error:
            why = f"cannot be downloaded ({error}); set it to null, and epochs to train it"
            raise UserError(f"params.yaml: {self.key}.model.weights: {why}") from error
        if self.backbone:
            load_backbone(model, self.backbone)
        return model


def run(
    stage: str, name: str, params: TrainParams, machine: Machine, debug: Debug | None = None
) -> None:
    """Trains `<stage>.<name>`, once per seed, and writes results/<stage>/<name>/.

    A debugging run writes to work/debug/ alone.

    Raises:
        UserError: Data, params or machine do not allow it.
        Stopped: Ctrl-C or SIGTERM, after a save.
    """
    machine.use_threads()
    if debug:
        machine = replace(machine, tracking_uri=None)
    experiment = Experiment(stage, name, params, machine, debug)
    work, out = experiment.work / checkpoints.fingerprint(experiment.identity), experiment.results
    locks = machine.root / "work" / "locks"
    with distributed.joined(machine.device), checkpoints.claimed(work, out, locks):
        record = tracking.start(
            stage, name, plain(params), machine, work / tracking.NAME, resume=True, results=out
        )
        with record:
            _train_and_write(experiment, record)
        if distributed.rank() == 0:
            checkpoints.delete(work)


def _train_and_write(experiment: Experiment, record: tracking.Run) -> None:
    """Trains for each seed; the model is the first one's."""
    params, machine, first = experiment.params, experiment.machine, distributed.rank() == 0
    state = partial(RunState, experiment.work, experiment.identity, position=record.position)
    states = [state(name=f"seed-{seed}") for seed in params.seeds]
    if first:
        _begin_record(experiment, states, record)
    facts = experiment.facts | {"run": record.id}
    histories: dict[int, list[Row]] = {}
    for seed, state in zip(params.seeds, states, strict=True):
        task, model = experiment.begin(seed)
        with _observer(experiment, seed, record) as observer:
            device, workers = machine.device, experiment.workers
            run = Run(model, task, params, seed, device, workers, state, observer)
            histories[seed] = run.train()
        if first and seed == params.seeds[0]:
            facts["names"] = list(task.train.names)
            facts["seconds"] = histories[seed][-1].get("time/seconds")
            architecture = experiment.architecture(task.train.classes)
            save_model(experiment.results / MODEL, model, architecture, facts)
        if first and seed == params.seeds[-1]:
            image = task.validation[Keys(0, [0])][0].to(machine.device)
            size = sum(p.numel() for p in model.parameters())
            costs = {"parameters": float(size), "flops": flops(model, image)}
            _write_results(experiment, histories, costs, facts, record)


def _begin_record(experiment: Experiment, states: list[RunState], record: tracking.Run) -> None:
    """Cuts a resumed record back to the last save, or begins a fresh one."""
    saved = [state.load() for state in states]
    position = max(found["position"] if found else 0 for found in saved)
    record.cut(position)
    if position:
        return
    if changed := checkpoints.differences(states[0].work, experiment.identity):
        progress.say(
            f"{experiment.title}: starts afresh, because an interrupted training differs in "
            f"{', '.join(changed)}; its state stays in {experiment.work} until this one has saved "
            "twice"
        )
    facts = experiment.facts
    record.dataset(facts["dataset"], facts["digest"], facts["source"])
    if "builds_on" in facts:
        record.tag("builds_on", facts["builds_on"])


def _observer(experiment: Experiment, seed: int, record: tracking.Run) -> progress.Training:
    prefix = f"seed-{seed}/" if len(experiment.params.seeds) > 1 else ""

    def note(row: Row, step: int) -> None:
        record.metrics({prefix + name: value for name, value in row.items()}, step)

    title = f"{experiment.title} seed {seed}"
    shown = distributed.rank() == 0
    if experiment.debug and experiment.debug.profile:
        trace = experiment.results / "trace.json"
        return debugging.ProfiledTraining(title, note, shown=shown, trace=trace)
    return progress.Training(title, note, shown=shown)


def _write_results(
    experiment: Experiment,
    histories: dict[int, list[Row]],
    costs: Row,
    facts: dict[str, Any],
    record: tracking.Run,
) -> None:
    """The metrics are the last epoch's: means over the seeds, of several seeds <name>_std, too."""
    out = experiment.results
    rows = [{"seed": seed, **row} for seed, history in histories.items() for row in history]
    history = pd.DataFrame(rows)
    files.write_text(out / "history.csv", history.to_csv(index=False))
    figures.save(figures.training_curves(history, experiment.title), out / "curves.png")
    last = pd.DataFrame([history[-1] for history in histories.values()])
    last = last.drop(columns=["epoch", "step"])
    metrics = last.mean(skipna=False).to_dict()
    if len(last) > 1:
        metrics |= last.std(skipna=False).add_suffix("_std").to_dict()
    metrics |= costs | {"batch": experiment.params.batch, "epochs": experiment.params.epochs}
    files.write_json(out / "metrics.json", metrics)
    files.write_json(out / "facts.json", facts)
    record.metrics(metrics, step=max(int(row["step"]) for row in rows))
    record.model(out / MODEL)
    for name in ("metrics.json", "facts.json", "history.csv", "curves.png"):
        record.artifact(out / name)


def load_backbone(network: nn.Module, path: Path) -> None:
    """Gives `network` the backbone of the model at `path`; a UserError says if it does not fit."""
    backbone = load_model(path)[0].get_submodule("backbone")
    try:
        network.get_submodule("backbone").load_state_dict(backbone.state_dict())
    except RuntimeError as error:
        cure = "train it again with the same `model` section"
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: its backbone does not fit ({reason}); {cure}") from error


def source_digests(stage: str, dataset: str) -> dict[str, str]:
    """The digests of the sources that a training depends on, by path."""
    here, library = Path(__file__).parents[1], Path(str(mdeq.__file__)).parent
    names = ["recipe.py", f"stages/{stage}.py", *(f"data/{name}.py" for name in (*READ, dataset))]
    modules = [here / name for name in names]
    modules += [*(here / "train").glob("*.py"), *library.glob("*.py")]
    return {str(path.relative_to(here.parent)): files.file_digest(path) for path in sorted(modules)}


def flops(model: nn.Module, images: Tensor) -> float:
    """Floating-point operations of a prediction, the solver's included; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    return float(counter.get_total_flops())
