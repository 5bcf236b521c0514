"""Finished models: where they lie, the zoo that comes with the project, and files of other formats.

The zoo is the folder weights/: of each model <name>.safetensors, its card <name>.json (params,
commit, data, device, core-hours, accuracy by evaluations of f, residuals, confusion) and its log
<name>.csv.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from mdeq import published, saved
from mdeq.saved import Architecture
from pipeline import files, settings
from pipeline.data import cifar10, cityscapes
from pipeline.data.loading import BatchDataset
from pipeline.data.manifest import read_summary
from pipeline.data.readers import evaluation_data
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.params import load as params_of
from pipeline.params import plain
from pipeline.progress import say
from pipeline.sets import BY_STAGE, SETS, DataSet
from pipeline.tracking import Run
from pipeline.train.checkpoints import MODEL, load_model, save_model
from pipeline.train.metrics import ConfusionMatrix, TopK

RESULTS = Path("results")
PRESETS = Path("params/paper.yaml")
_PACKAGED = Path(__file__).with_name("zoo")  # where a wheel has it
ZOO = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1] / "weights"
DEFAULT = "cifar10-"  # how the name of the zoo's model begins that `predict` uses

# what published checkpoints hold besides tensors: a numpy scalar, under either name of its module
_SCALAR = np.float64(0).__reduce__()[0]
_SCALARS: list[Any] = [
    np.dtype,
    np.dtypes.Float64DType,
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),
]


# ---- where models lie


def zoo() -> list[str]:
    """The names of the models that come with the project."""
    return sorted(path.stem for path in ZOO.glob("*.safetensors"))


def find(name: str | None, stage: str | None = None) -> Path:
    """The file of the model that a user names.

    Args:
        name: A model of `stage` in params.yaml, a name of the zoo, or a path; None for the zoo's
            model of CIFAR-10.
        stage: Whose models are looked at; None for none.

    Raises:
        UserError: There is no such model.
    """
    if name is None:
        name = next((known for known in zoo() if known.startswith(DEFAULT)), "")
    places = [RESULTS / stage / name / MODEL] if stage else []
    for path in (*places, ZOO / f"{name}.safetensors", Path(name)):
        if os.path.isfile(path):
            return path
    if not name:
        raise UserError("no model comes with this copy of the project; name a model file")
    known = f"; the project comes with: {', '.join(zoo())}" if zoo() else ""
    if stage is None:
        raise UserError(f"{name}: no such model file{known}")
    first = f"run `python -m pipeline {stage} {name}` first"
    raise UserError(f"{places[0]}: no such file; {first}{known}")


# ---- a model and the split that it is evaluated on


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode on its device, and its evaluation split.

    Attributes:
        name: Of the model; part of a folder's name.
        network: The model.
        split: The data.
        dataset: The facts of the data set.
        facts: What facts.json of a result begins with.
        built_on: The run that made the model; empty if it is not known.
    """

    name: str
    network: nn.Module
    split: BatchDataset
    dataset: DataSet
    facts: dict[str, Any]
    built_on: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return tuple(self.split.names)

    @property
    def segments(self) -> bool:
        """Whether pixels are classified, not images."""
        return self.dataset.measure == "eval/miou"

    @property
    def title(self) -> str:
        """For figures."""
        return f"{self.name}, {self.dataset.title} ({self.facts['source']} data)"

    def measure(self) -> TopK | ConfusionMatrix:
        """The metric of the paper, with nothing counted."""
        return (ConfusionMatrix if self.segments else TopK)(self.split.classes)

    @property
    def frames(self) -> tuple[tuple[str, int, int], ...]:
        """Of street scenes: the path, width and height of each photo."""
        return getattr(self.split, "frames", ())

    def picture(self, image: Tensor) -> np.ndarray:
        """The photo (H, W, 3) in 0..1 that the normalised `image` (3, H, W) was made from."""
        mean, std = np.array(self.dataset.mean), np.array(self.dataset.std)
        return np.clip(image.permute(1, 2, 0).cpu().numpy() * std + mean, 0, 1)

    def record(self, run: Run) -> None:
        """Tells a run what it builds on."""
        facts = self.facts
        run.dataset(self.dataset.name, facts["digest"], facts["source"], "evaluation")
        if self.built_on:
            run.tag("builds_on", self.built_on)


def load(dataset: str, model: str, machine: Machine, limit: int | None = None) -> Trained:
    """The model that `find` finds, and the split that it is evaluated on, as it was trained for.

    Args:
        dataset: Its name.
        model: As the user names it.
        machine: Where it runs.
        limit: On the samples, spread evenly over the split; None for all.

    Raises:
        UserError: Model or data are missing or damaged, or have other classes.
    """
    path = find(model, SETS[dataset].stage)
    network, architecture, own = load_model(path, machine.device)
    if own.get("dataset") != dataset:
        raise UserError(f"{path}: trained on {own.get('dataset')}, not on {dataset}")
    split = evaluation_data(dataset, own, machine, limit)
    if architecture.classes != split.classes:
        raise UserError(
            f"{path}: trained for {architecture.classes} classes, the data have {split.classes}; "
            f"train it again: `python -m pipeline {SETS[dataset].stage} {model}`"
        )
    summary = read_summary(dataset)
    facts = {
        "dataset": dataset,
        "model": _name(model, path),
        "model_digest": files.file_digest(path),
        "source": summary["source"],
        "digest": summary["manifest"],
        "samples": len(split),
        **machine.describe(),
    }
    return Trained(_name(model, path), network, split, SETS[dataset], facts, own.get("run") or "")


def _name(model: str, path: Path) -> str:
    """What results are called; a file named by its path gets its digest, so that none collide."""
    if path == ZOO / f"{model}.safetensors" or path.parts[-2:] == (model, MODEL):
        return model
    return f"{path.stem}-{files.file_digest(path)[:8]}"


# ---- models of other formats


def import_weights(
    file: Path, model: str | None = None, out: Path | None = None, presets: Path = PRESETS
) -> Path:
    """Writes a model of this project from a checkpoint of the authors or a model.pt of version 0.1.

    Args:
        file: Of either release of the authors, or of version 0.1.
        model: The preset that the authors' file belongs to: <set>-<name>, as imagenet-mdeq-small.
        out: The file to write; None for where its stage would. It must not exist.
        presets: The params file with the preset.

    Returns:
        The file that was written.

    Raises:
        UserError: The file is neither, or does not fit the preset (every name that does not is
            listed), or `out` exists.
    """
    content = _opened(file)
    try:
        if "architecture" in content:
            network, architecture, facts = _converted(content)
        else:
            network, architecture, facts = _published(content, file, model, presets)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error.args[0]) if error.args else type(error).__name__
        raise UserError(f"{file}: does not fit: {' '.join(reason.split())}") from None
    path = out or RESULTS / facts["stage"] / facts["model"] / MODEL
    if os.path.lexists(path):
        raise UserError(f"{path}: exists; name another file with --out, or move it away")
    save_model(path, network, architecture, facts)
    return path


def _opened(file: Path) -> dict[str, Any]:
    """The dictionary in a torch file, of which only tensors and plain values are unpickled."""
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file")
    try:
        with torch.serialization.safe_globals(_SCALARS):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a damaged file makes it meet
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else "it is cut off"
        raise UserError(f"{file}: damaged, or not a checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not the checkpoint of a model")
    return content


def _converted(content: dict[str, Any]) -> tuple[nn.Module, Architecture, dict[str, Any]]:
    """The model in a file of version 0.1."""
    if not isinstance(content.get("state"), dict):
        raise ValueError("state: must be a dictionary")
    for name, value in content["state"].items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"state: {str(name)[:80]!r} is not a tensor")
    old = saved.from_old(content)
    facts: Any = old.facts
    if not isinstance(facts, dict) or not isinstance(facts.get("model"), str):
        raise ValueError("meta: must name the model")
    if facts.get("stage") not in list(BY_STAGE):
        raise ValueError(f"meta: the stage must be one of {', '.join(BY_STAGE)}")
    facts = {name: value for name, value in facts.items() if name != "run_id"}
    facts |= {"dataset": BY_STAGE[facts["stage"]].name, "run": old.facts.get("run_id")}
    return old.build(), old.architecture, facts


def _published(
    content: dict[str, Any], file: Path, model: str | None, presets: Path
) -> tuple[nn.Module, Architecture, dict[str, Any]]:
    """The model in a file of the authors."""
    dataset, _, name = (model or "").partition("-")
    if dataset not in SETS:
        wanted = ", ".join(f"{known}-mdeq-small" for known in SETS)
        raise UserError(f"--model {model or ''}: must name the preset of this file: {wanted}, ...")
    stage, classes = SETS[dataset].stage, SETS[dataset].classes
    params = params_of(stage, name, presets)
    state, ignored = published.convert(content)
    architecture = Architecture(params.model, params.head, classes, params.forward, params.backward)
    network = architecture.build()
    network.load_state_dict(state)
    if ignored:
        more = f" and {len(ignored) - 5} more" if len(ignored) > 5 else ""
        say(f"{file}: not part of the model: {', '.join(ignored[:5])}{more}")
    names = _class_names(dataset)
    facts = {"stage": stage, "model": name, "dataset": dataset, "names": names}
    return network, architecture, facts | {"params": plain(params), "published": file.name}


def _class_names(dataset: str) -> list[str]:
    if dataset == "imagenet":
        from torchvision.models import ResNet50_Weights

        return list(ResNet50_Weights.DEFAULT.meta["categories"])  # in the order of the labels
    return list(cifar10.CLASSES if dataset == "cifar10" else cityscapes.class_names())


# ---- the zoo


def publish(stage: str, model: str, name: str, folder: Path = ZOO) -> Path:
    """Adds a model to the zoo, with a card and a log made from what training and evaluation wrote.

    Args:
        stage: That trained it.
        model: In params.yaml.
        name: In the zoo; its files must not exist.
        folder: The zoo.

    Returns:
        The model's file in the zoo.

    Raises:
        UserError: A result is missing or of another model, the data were generated, or a file
            exists.
    """
    dataset = BY_STAGE[stage].name
    trained, evaluated = RESULTS / stage / model, RESULTS / "evaluate" / f"{dataset}-{model}"
    try:
        settings.name(name)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    targets = [folder / f"{name}{end}" for end in (".json", ".csv", ".safetensors")]
    for target in targets:
        if os.path.lexists(target):
            raise UserError(f"{target}: exists; choose another name, or move it away")
    try:
        card = _card(trained, evaluated)
        log = (trained / "history.csv").read_bytes()
    except (KeyError, ValueError, OSError) as error:
        raise UserError(
            f"{trained}, {evaluated}: incomplete ({error}); rerun {stage} and evaluate"
        ) from None
    files.write_json(targets[0], {"name": name, "command": f"{stage} {model}", **card})
    files.write(targets[1], log)
    files.write(targets[2], (trained / MODEL).read_bytes())  # last: what is in the zoo has a card
    return targets[2]


def _card(trained: Path, evaluated: Path) -> dict[str, Any]:
    """What a model's card says, from the results of its training and its evaluation."""
    cure = "run `dvc repro`, or the stage that trains it and then evaluate"
    training, origin, measured, where = (
        files.read_json(folder / name, cure)
        for folder in (trained, evaluated)
        for name in ("metrics.json", "facts.json")
    )
    if where["source"] == "generated":
        raise UserError(f"{trained}: trained on generated pictures; the zoo takes real data alone")
    if where["model_digest"] != files.file_digest(trained / MODEL):
        raise UserError(f"{evaluated}: of another model; {cure}")
    own = load_model(trained / MODEL)[2]
    cores = origin.get("threads") or origin["cores"]
    return {
        "params": own["params"],
        "seed": own["seed"],
        "commit": own["commit"],
        "device": origin["device"],
        "core-hours": training["time/seconds"] * cores / 3600,
        "data": {key: where[key] for key in ("dataset", "source", "digest")},
        "parameters": training["parameters"],
        "measured": measured,
        "samples": where["samples"],
        "by evaluations of f": pd.read_csv(evaluated / "by_steps.csv").to_dict("records"),
        "confusion": pd.read_csv(evaluated / "confusion.csv").to_dict("list"),
    }
