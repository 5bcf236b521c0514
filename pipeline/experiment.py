"""What classify, pretrain and finetune share: a training a seed, with exact resume, tracked, its results written.

The resumable state lies in work/<stage>-<model>/<fingerprint>/, which DVC does not know; the results are written at the
end, whole, into results/<stage>/<model>/.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mdeq
from pipeline import processes
from pipeline.checkpoints import Architecture, CheckpointError, RunState, checksum, load_model, save_model
from pipeline.data.loading import Keys
from pipeline.data.manifest import code_digest, read_summary
from pipeline.recipe import Recipe
from pipeline.training import Row, Task, TrainingError, train

if TYPE_CHECKING:
    from pipeline.machine import Machine
    from pipeline.train_params import TrainParams


def run(
    stage: str,
    name: str,
    params: TrainParams,
    machine: Machine,
    *,
    dataset: str,
    task: Callable[[int], Task],
    backbone: Path | None = None,
) -> None:
    """Trains one model of a stage, once a seed, and writes its results.

    Args:
        stage: classify, pretrain or finetune.
        name: Of the model.
        params: Its section.
        machine: Where it runs.
        dataset: The set trained on, whose summary names source and digest.
        task: The data, loss and metric for a seed.
        backbone: The model whose backbone a fresh model begins with; None for none.

    Raises:
        TrainingError: if the warm-up is not shorter than the run, or the loss is not finite.
    """
    from pipeline import tracking
    from pipeline.progress import Progress

    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    summary = read_summary(dataset)
    out = Path("results", stage, name)
    recipe = _recipe(params)
    first = task(params.seeds[0])
    check_warm_up(f"{stage}.{name}", params, len(first.train))
    work = machine.root / "work" / f"{stage}-{name}"
    identity = _identity(stage, dataset, params, summary["manifest"], backbone)
    states = {seed: RunState(work, identity, f"seed-{seed}") for seed in params.seeds}
    own = states[params.seeds[0]]
    architecture = Architecture.of(params, first.train.classes)

    histories: dict[int, list[Row]] = {}
    logs: dict[int, list[tuple[int, Row]]] = {}
    with processes.joined(machine.device), contextlib.ExitStack() as stack:
        first_process = processes.rank() == 0
        if first_process:
            own.claim()
        tracker = stack.enter_context(tracking.start(stage, name, params, machine, own.path.with_name("run")))
        if first_process and (differences := own.differences()):
            _tell(f"{stage} {name}", differences, work)
        tracker.dataset(dataset, summary["manifest"], summary["source"])
        for seed in params.seeds:
            model, builds_on = _fresh(architecture, f"{stage}.{name}", seed, backbone)
            if builds_on:
                tracker.tag("builds_on", builds_on)
            prefix = f"seed-{seed}/" if len(params.seeds) > 1 else ""
            shown = Progress(f"{stage} {name} seed {seed}", tracker, prefix, shown=first_process)
            with shown as progress, _named_state(states[seed]):
                histories[seed] = train(
                    model,
                    first if seed == params.seeds[0] else task(seed),
                    recipe,
                    seed=seed,
                    device=machine.device,
                    workers=machine.workers,
                    store=states[seed],
                    observer=progress,
                )
            logs[seed] = progress.log
            if first_process and seed == params.seeds[0]:
                facts = {"stage": stage, "model": name, "seed": seed, "names": list(first.names)}
                made = {"run_id": tracker.run_id, "params": params.model_dump(mode="json"), **machine.describe()}
                meta = {**facts, **made}
                save_model(out / "model.pt", architecture, model, meta)
        if not first_process:
            return
        metrics = _metrics(histories, sum(p.numel() for p in model.parameters()))
        metrics["flops"] = flops(model, first.validation[Keys(0, [0])][0].to(machine.device))
        facts = {"data/source": summary["source"], "data/digest": summary["manifest"], **machine.describe()}
        setting = {"seeds": params.seeds, "batch": params.batch, "epochs": params.epochs, "run": tracker.run_id}
        if builds_on:
            setting["builds_on"] = builds_on
        _write(out, histories, logs, {**metrics, **facts, **setting})
        last = max(row["step"] for rows in histories.values() for row in rows)
        tracker.metrics({k: v for k, v in metrics.items() if math.isfinite(v)}, step=int(last))
        for file in ("metrics.json", "history.csv", "curves.png"):
            tracker.artifact(out / file)
        tracker.model(out / "model.pt", segments=stage == "finetune")
    own.delete()


def _identity(stage: str, dataset: str, params: TrainParams, manifest: str, backbone: Path | None) -> dict[str, Any]:
    """What a resumable state belongs to."""
    return {
        "params": params.model_dump(mode="json", exclude={"seeds", "checkpoint_minutes"}),
        "data": manifest,
        "code": code(stage, dataset),
        "torch": torch.__version__,
        **({"backbone": checksum(backbone)} if backbone else {}),
    }


def _tell(title: str, differences: Collection[str], work: Path) -> None:
    print(
        f"{title}: starts afresh; its interrupted run differs in {', '.join(differences)}. "
        f"Its state stays in {work} until this run has a checkpoint",
        file=sys.stderr,
    )


def _fresh(architecture: Architecture, section: str, seed: int, backbone: Path | None) -> tuple[nn.Module, str]:
    """What the training of a seed begins with; and the run that made its backbone, if it has one."""
    torch.manual_seed(seed)
    model = _build(architecture, section)
    return model, (load_backbone(model, backbone) or "unknown") if backbone else ""


def load_backbone(network: nn.Module, path: Path) -> str | None:
    """Gives `network` the backbone of the model at `path`, the same MDEQ under another head (Sec. 3.2).

    Returns:
        The id of the tracked run that made that model.

    Raises:
        CheckpointError: if it does not fit.
    """
    pretrained, _, meta = load_model(path)
    try:
        network.get_submodule("backbone").load_state_dict(pretrained.get_submodule("backbone").state_dict())
    except (AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its backbone does not fit this model: {error}") from error
    return meta.get("run_id")


def code(stage: str, dataset: str) -> dict[str, str]:
    """The digests of the sources that a training depends on: those that dvc.yaml declares, to which a test holds it."""
    shared = "checkpoints experiment figures metrics processes progress recipe training".split()
    data = [f"data/{name}" for name in ("archives", "loading", "manifest", dataset)]
    here = Path(__file__).parent
    files = [here / f"{module}.py" for module in (*shared, *data, f"stages/{stage}")]
    files += Path(str(mdeq.__file__)).parent.glob("*.py")
    return {f"{file.relative_to(here.parent).as_posix()}": code_digest([str(file)]) for file in sorted(files)}


@contextlib.contextmanager
def _named_state(state: RunState) -> Iterator[None]:
    """Adds to a training's error where the last good checkpoint lies."""
    try:
        yield
    except TrainingError as error:
        kept = state.path if state.path.exists() else "none yet"
        raise TrainingError(f"{error}. Last good checkpoint: {kept}") from error.__cause__


def _recipe(params: TrainParams) -> Recipe:
    return Recipe(
        optimizer=params.optimizer,
        epochs=params.epochs,
        batch=params.batch,
        accumulate=params.accumulate,
        warm_up=params.warm_up,
        jacobian=params.jacobian,
        precision=params.precision,
        checkpoint_minutes=params.checkpoint_minutes,
        starts=params.starts,
        average=params.average,
        rise=params.rise,
    )


def _build(architecture: Architecture, section: str) -> nn.Module:
    try:
        return architecture.build(fetch=True)
    except ImportError as error:
        raise TrainingError(f"params.yaml: {section}.model.name: {error}; run `pip install '.[explicit]'`") from error
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"params.yaml: {section}.model.weights: cannot be fetched ({error}); set it to null, and epochs to train it"
        ) from error


def flops(model: nn.Module, images: Tensor) -> float:
    """Floating-point operations of a prediction, two for a multiplication with its addition, the solver's included."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    return float(counter.get_total_flops())


def check_warm_up(section: str, params: TrainParams, samples: int) -> None:
    """Raises a TrainingError if the warm-up is not shorter than the run."""
    total = math.ceil(samples / params.batch) * params.epochs
    if params.warm_up is not None and params.warm_up.steps >= total:
        raise TrainingError(
            f"params.yaml: {section}.warm_up.steps: {params.warm_up.steps} must be fewer than the run's {total} "
            f"updates ({samples} samples, batch {params.batch}, {params.epochs} epochs)"
        )


def _metrics(histories: dict[int, list[Row]], parameters: int) -> Row:
    """The last epoch's figures, their mean over the seeds; with several seeds their deviation too, as <name>_std."""
    last = pd.DataFrame([rows[-1] for rows in histories.values()]).drop(columns=["epoch", "step"])
    deviations = last.std(skipna=False).add_suffix("_std").to_dict() if len(last) > 1 else {}
    return {"parameters": float(parameters), **last.mean(skipna=False).to_dict(), **deviations}


def _write(
    out: Path, histories: dict[int, list[Row]], logs: dict[int, list[tuple[int, Row]]], metrics: dict[str, Any]
) -> None:
    from pipeline import figures

    history = pd.DataFrame([{"seed": seed, **row} for seed, rows in histories.items() for row in rows])
    history.to_csv(out / "history.csv", index=False)
    log = [{"seed": seed, "step": step, **row} for seed, rows in logs.items() for step, row in rows]
    pd.DataFrame(log).to_csv(out / "log.csv", index=False)
    figures.save(figures.training_curves(history, f"{out.parent.name} {out.name}"), out / "curves.png")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n", encoding="utf-8")
