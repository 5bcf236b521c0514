"""Models of other formats become models of this project; finished ones join the zoo, weights/.

The zoo has three files per model: <name>.safetensors, its card <name>.json (params, commit, data,
device, core-hours, measures, accuracy and residual by evaluations of f, confusion) and its log
<name>.csv.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mdeq import published, saved
from mdeq.saved import Architecture, Saved
from pipeline import files, settings
from pipeline.data import cifar10, cityscapes
from pipeline.errors import UserError
from pipeline.params import load as params_of
from pipeline.params import plain
from pipeline.predict import imagenet_names
from pipeline.progress import say
from pipeline.sets import BY_STAGE, SETS
from pipeline.train.checkpoints import MODEL, load_model, save_model
from pipeline.weights import RESULTS, ZOO

PRESETS = Path("params/paper.yaml")

# published checkpoints also hold a numpy scalar, under either name of its module
_SCALAR = np.float64(0).__reduce__()[0]
_OLDER = (_SCALAR, "numpy.core.multiarray.scalar")
_SAFE: list[Any] = [np.dtype, np.dtypes.Float64DType, _SCALAR, _OLDER]


def import_weights(
    file: Path, model: str | None = None, out: Path | None = None, presets: Path = PRESETS
) -> Path:
    """Writes a model of this project from a checkpoint of the authors or a model.pt of version 0.1.

    `model` names the preset in `presets` that the authors' file belongs to: imagenet-mdeq-small.
    The new file, `out` or where its stage would write it, is returned. Nothing in the old one is
    executed. Raises UserError if it does not fit, or the new one exists.
    """
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file")
    try:
        with torch.serialization.safe_globals(_SAFE):
            content = torch.load(file, map_location="cpu", weights_only=True)
        old = "architecture" in content
        found = _old(content) if old else _published(content, file, model, presets)
        network = found.build()
        stage, name = found.facts["stage"], settings.name(found.facts["model"])
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or foreign file makes torch or us meet
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise UserError(f"{file}: damaged, or not a checkpoint that fits ({reason})") from None
    path = out or RESULTS / stage / name / MODEL
    if os.path.lexists(path):
        raise UserError(f"{path}: exists; name another file with --out, or move it away")
    save_model(path, network, found.architecture, found.facts)
    return path


def _old(content: dict[str, Any]) -> Saved:
    """The model in a file of version 0.1."""
    found = saved.from_old(content)
    run, dataset = found.facts.pop("run_id", None), BY_STAGE[found.facts["stage"]].name
    return Saved(found.architecture, found.facts | {"dataset": dataset, "run": run}, found.state)


def _published(content: dict[str, Any], file: Path, model: str | None, presets: Path) -> Saved:
    """The model in a file of the authors."""
    dataset, _, name = (model or "").partition("-")
    if dataset not in SETS:
        wanted = ", ".join(f"{known}-mdeq-small" for known in SETS)
        raise UserError(f"--model {model or ''}: must name the preset of this file: {wanted}, ...")
    stage, classes = SETS[dataset].stage, SETS[dataset].classes
    params = params_of(stage, name, presets)
    state, ignored = published.convert(content)
    if ignored:
        more = f" and {len(ignored) - 5} more" if len(ignored) > 5 else ""
        say(f"{file}: not part of the model: {', '.join(ignored[:5])}{more}")
    names = {"cifar10": cifar10.CLASSES, "cityscapes": cityscapes.class_names()}
    facts = {
        "stage": stage,
        "model": name,
        "dataset": dataset,
        "names": list(names.get(dataset) or imagenet_names()),
        "params": plain(params),
        "published": file.name,
    }
    architecture = Architecture(params.model, params.head, classes, params.forward, params.backward)
    return Saved(architecture, facts, state)


def publish(stage: str, model: str, name: str, folder: Path = ZOO) -> Path:
    """Adds a model to the zoo, with a card and a log made from what training and evaluation wrote.

    The model of a stage in params.yaml gets a new `name`; its file in the zoo is returned. Raises
    UserError if a result is missing or of another model, the data were generated, or a file exists.
    """
    if not re.fullmatch(r"\w[\w-]*", name):
        raise UserError(f"{name}: must be a name of letters, digits, - and _")
    trained = RESULTS / stage / model
    evaluated = RESULTS / "evaluate" / f"{BY_STAGE[stage].name}-{model}"
    for end in (".json", ".csv", ".safetensors"):
        if os.path.lexists(folder / f"{name}{end}"):
            raise UserError(f"{folder / name}{end}: exists; choose another name, or move it away")
    try:
        card = {"name": name, "command": f"{stage} {model}", **_card(trained, evaluated)}
        log = (trained / "history.csv").read_bytes()
    except (KeyError, ValueError, OSError) as error:
        cure = f"rerun {stage} and evaluate"
        raise UserError(f"{trained}, {evaluated}: incomplete ({error}); {cure}") from None
    path = folder / f"{name}.safetensors"  # written last: what is in the zoo has a card
    files.write_json(path.with_suffix(".json"), card)
    files.write(path.with_suffix(".csv"), log)
    files.write(path, (trained / MODEL).read_bytes())
    return path


def _card(trained: Path, evaluated: Path) -> dict[str, Any]:
    """What a model's card says, from the results of its training and its evaluation."""
    cure = "run `dvc repro`, or the stage that trains it and then evaluate"
    training = files.read_json(trained / "metrics.json", cure)
    origin = files.read_json(trained / "facts.json", cure)
    measured = files.read_json(evaluated / "metrics.json", cure)
    where = files.read_json(evaluated / "facts.json", cure)
    if where["source"] == "generated":
        raise UserError(f"{trained}: trained on generated pictures; the zoo takes real data alone")
    if where["model_digest"] != files.file_digest(trained / MODEL):
        raise UserError(f"{evaluated}: of another model; {cure}")
    own = load_model(trained / MODEL)[2]
    cores = origin["threads"] * origin["processes"]
    return {
        "params": own["params"],
        "seed": own["seed"],
        "commit": own["commit"],
        "device": origin["device"],
        "core-hours": cores * training["time/seconds"] / 3600,
        "data": {key: where[key] for key in ("dataset", "source", "digest")},
        "parameters": training["parameters"],
        "measured": measured,
        "samples": where["samples"],
        "by evaluations of f": pd.read_csv(evaluated / "by_steps.csv").to_dict("records"),
        "confusion": pd.read_csv(evaluated / "confusion.csv").to_dict("list"),
    }
