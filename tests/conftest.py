"""What tests share: the repository, and a copy of its pipeline files that a test may spoil."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.data.manifest import to_csv

ROOT = Path(__file__).parents[1]


@pytest.fixture
def repository() -> Path:
    """The checkout; not to be written to."""
    return ROOT


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the params files, made the working directory; the user's machine settings are out."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    for name in ("DEVICE", "WORKERS", "THREADS", "DATA_CIFAR10", "DATA_IMAGENET", "DATA_CITYSCAPES"):
        monkeypatch.delenv(f"MDEQ_{name}", raising=False)
    for name in ("DVC_ROOT", "DVC_STAGE", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "RANK", "MDEQ_LAUNCH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def manifest_of(tmp_path: Path):  # noqa: ANN201
    """A function that writes the manifest of the set that a module reads in a folder."""

    def write(form: ModuleType, root: Path) -> Path:
        rows = [form.inspect(root, found) for found in form.find(root)]
        form.check(root, rows)
        (tmp_path / "manifest.csv").write_bytes(to_csv(rows))
        return tmp_path / "manifest.csv"

    return write
