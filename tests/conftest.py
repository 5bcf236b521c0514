"""What tests share: the repository, and a copy of its pipeline files that a test may spoil."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.data.manifest import to_csv
from pipeline.settings import GeneratedCifar10, GeneratedCityscapes, GeneratedImageNet
from pipeline.stages import prepare

ROOT = Path(__file__).parents[1]
DRAWN: dict[str, Any] = {  # small sets, as `generated.ensure` draws them
    "cifar10": GeneratedCifar10(train=20, test=10),
    "imagenet": GeneratedImageNet(classes=2, train_per_class=2, val_per_class=1),
    "cityscapes": GeneratedCityscapes(train=2, val=1, height=32, width=64),
}


@pytest.fixture
def repository() -> Path:
    """The checkout; not to be written to."""
    return ROOT


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the params files; the environment sets nothing."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    for name in "DEVICE WORKERS THREADS DATA_CIFAR10 DATA_IMAGENET DATA_CITYSCAPES LAUNCH".split():
        monkeypatch.delenv(f"MDEQ_{name}", raising=False)
    for name in "DVC_ROOT DVC_STAGE MLFLOW_TRACKING_URI MLFLOW_EXPERIMENT_NAME RANK".split():
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def manifest_of(tmp_path: Path):  # noqa: ANN201
    """A function that writes the manifest of the set that a module reads in a folder."""

    def write(form: ModuleType, root: Path) -> Path:
        rows = [form.inspect(root, found) for found in form.find(root)]
        form.check(root, prepare.counts(form, rows))
        (tmp_path / "manifest.csv").write_bytes(to_csv(rows))
        return tmp_path / "manifest.csv"

    return write
