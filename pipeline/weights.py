"""The authors' published weights as a model of this pipeline, and every preset's size beside the paper's."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdeq import MDEQConfig
from mdeq.published import rename, state_dict
from pipeline.checkpoints import Architecture, CheckpointError, save_model
from pipeline.data import cifar10, cityscapes
from pipeline.params import TRAINED_BY, instances, load
from pipeline.train_params import TrainParams

CLASSES = {"cifar10": 10, "imagenet": 1000, "cityscapes": 19}

# paper (Tables 1 to 3), published code
PUBLISHED_SIZES = {
    "cifar10-mdeq-small": ("170K", "158,890"),
    "cifar10-mdeq": ("10M", "11,097,438"),
    "imagenet-mdeq-small": ("18M", "16,808,936"),
    "imagenet-mdeq-large": ("63M", "67,063,624"),
    "imagenet-mdeq-xl": ("81M", "90,463,280"),
    "cityscapes-mdeq-small": ("7.8M", "8,968,467"),
    "cityscapes-mdeq-large": ("53.0M", "55,955,859"),
    "cityscapes-mdeq-xl": ("70.9M", "79,551,755"),
}

# what the published checkpoints hold besides tensors: a numpy scalar, under either name of its module
_SCALAR = np.float64(0).__reduce__()[0]
_SCALARS: list[Any] = [np.dtype, np.dtypes.Float64DType, _SCALAR, (_SCALAR, "numpy.core.multiarray.scalar")]


def import_weights(file: Path, model: str, out: Path | None = None, presets: Path = Path("params/paper.yaml")) -> Path:
    """Writes the published `file` as results/<stage>/<name>/model.pt, which evaluate and finetune take.

    Args:
        file: The authors' checkpoint, of either release.
        model: <set>-<name>, as imagenet-mdeq-small: the preset it belongs to.
        out: Where to write instead.
        presets: The params file with the preset.

    Raises:
        CheckpointError: if the file is no checkpoint or does not fit the preset; lists every name that does not.
    """
    dataset, _, name = model.partition("-")
    if dataset not in TRAINED_BY:
        raise CheckpointError(
            f"--model {model}: begin with the set: {', '.join(f'{s}-mdeq-small' for s in TRAINED_BY)}"
        )
    stage = TRAINED_BY[dataset]
    params = _preset(stage, name, presets)
    architecture = Architecture.of(params, CLASSES[dataset])
    network = architecture.build()
    try:
        network.load_state_dict(rename(state_dict(_open(file))))
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: does not fit {model}: {str(error).strip(chr(39))}") from error
    path = out or Path("results", stage, name, "model.pt")
    meta = {"stage": stage, "model": name, "names": _class_names(dataset), "run_id": None, "published": file.name}
    save_model(path, architecture, network, meta | {"params": params.model_dump(mode="json")})
    return path


def sizes(presets: Path = Path("params/paper.yaml")) -> list[tuple[str, int, str, str]]:
    """<set>-<name>, trainable parameters, and what the paper and the published code say, for every MDEQ preset."""
    rows = []
    for dataset, stage in TRAINED_BY.items():
        for name in instances(stage, presets):
            params = _preset(stage, name, presets)
            if isinstance(params.model, MDEQConfig):
                with torch.device("meta"):
                    network = Architecture.of(params, CLASSES[dataset]).build()
                count = sum(p.numel() for p in network.parameters())
                rows.append((f"{dataset}-{name}", count, *PUBLISHED_SIZES.get(f"{dataset}-{name}", ("", ""))))
    return rows


def _preset(stage: str, name: str, presets: Path) -> TrainParams:
    params = load(stage, name, presets)
    assert isinstance(params, TrainParams)
    return params


def _class_names(dataset: str) -> list[str]:
    if dataset == "imagenet":
        from torchvision.models import ResNet50_Weights

        return ResNet50_Weights.DEFAULT.meta["categories"]  # in the order of the sorted WordNet ids, as the labels
    return list(cifar10.CLASSES if dataset == "cifar10" else cityscapes.class_names())


def _open(file: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_SCALARS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        said = str(error).splitlines()[0].split(". ")[0]
        raise CheckpointError(f"{file}: damaged, or not a checkpoint ({said})") from error
