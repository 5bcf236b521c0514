"""What a training would do, without doing it: params, data and device are looked at, the rest is reckoned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline import experiment
from pipeline.data.manifest import DataError, data_root, read_summary
from pipeline.machine import Machine
from pipeline.params import TRAINED_ON
from pipeline.plan import plan
from pipeline.train_params import FinetuneParams, TrainParams
from pipeline.training import TrainingError


def lines(stage: str, model: str, params: TrainParams, machine: Machine, path: Path) -> Iterator[str]:
    """The training of `<stage>.<model>` of the params file at `path`, in words; nothing is written or recorded.

    Raises:
        DataError: if the data or the backbone are not there.
        TrainingError: if it could not begin.
    """
    dataset, section = TRAINED_ON[stage], f"{stage}.{model}"
    summary = read_summary(dataset)
    root, images = data_root(dataset, summary["source"], machine), summary["images"]
    if not root.is_dir():
        raise DataError(f"{root}: no such directory; run `python -m pipeline prepare {dataset}` first")
    if isinstance(params, FinetuneParams) and params.backbone is not None:
        weights = Path("results/pretrain", params.backbone, "model.pt")
        if not weights.is_file():
            raise DataError(f"{weights}: no such file; run `python -m pipeline pretrain {params.backbone}` first")
    experiment.check_warm_up(section, params, images["train"])
    try:
        made = plan(stage, model, path)
    except ImportError as error:
        raise TrainingError(f"{path}: {section}.model.name: {error}; run `pip install '.[explicit]'`") from error
    except (NotImplementedError, RuntimeError):  # an ODE's steps depend on its data
        made = None
    yield f"{path}: {section} is right"
    yield f"data:     {root}, {summary['source']}: {', '.join(f'{count:,} {split}' for split, count in images.items())}"
    launcher = os.environ.get("MDEQ_LAUNCH")
    yield f"device:   {machine.device}, {machine.workers} loader processes" + (f", by {launcher}" if launcher else "")
    seeds = "seed " + ", ".join(map(str, params.seeds))
    if made is None:
        yield f"training: {params.epochs} epochs, {seeds}; what they cost depends on the data"
    else:
        unrolled, implicit = made.updates
        kinds = f"{unrolled:,} unrolled + {implicit:,} implicit" if made.state else f"{unrolled:,}"
        state = f", {made.state:,} numbers in z of a sample" if made.state else ""
        yield f"model:    {made.parameters:,} parameters{state}, {made.peak / 1e9:.2g} GB at most"
        yield f"training: {params.epochs} epochs, {kinds} updates of {params.batch} samples, {seeds}"
        if made.state:
            yield "solver:   at most {} evaluations of f and {} products an update".format(*made.evaluations)
        yield f"cost:     {len(params.seeds) * made.total / 1e15:.3g} PFLOP in all"
    recorded = f"recorded in {machine.experiment}" if machine.tracking_uri else "recorded nowhere"
    yield f"results:  results/{stage}/{model}, {recorded}"
    if any((machine.root / "work" / f"{stage}-{model}").glob("*/seed-*")):
        yield "state:    an interrupted run's is there; with the same params, data and code it goes on from it"
