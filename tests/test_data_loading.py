"""What training reads: the manifest's files, in an order and augmented as no worker changes."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DRAWN

from pipeline.data import generated, manifest
from pipeline.data.loading import BatchDataset, Keys, batches, spread
from pipeline.data.manifest import read_columns, read_summary
from pipeline.data.readers import evaluation_data, training_data
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.settings import PrepareParams
from pipeline.stages import prepare


@dataclass
class Params:
    """The part of a training's params that says what is read."""

    limit: int | None = None
    augment: bool = True
    image: int = 24
    crop: tuple[int, int] = (16, 24)
    test_size: tuple[int, int] | None = None


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    for name, params in DRAWN.items():
        generated.ensure(root / name, name, params)
        (root / name / generated.NOTE).unlink()
    return root


@pytest.fixture
def machine(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(drawn, tmp_path / "data")
    return Machine(root=tmp_path)


def prepared(name: str, machine: Machine) -> None:
    prepare.run(name, PrepareParams(source="folder"), machine)


def training(name: str, machine: Machine, **params: Any) -> BatchDataset:
    return training_data(name, Params(**params), machine, seed=3)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DRAWN)
def test_samples_depend_on_epoch_and_index_alone(machine: Machine, name: str) -> None:
    """Not on their batch, and not on the workers."""
    prepared(name, machine)
    dataset = training(name, machine)
    together, alone = dataset[Keys(4, [1, 0])], dataset[Keys(4, [0])]
    for whole, single in zip(together, alone, strict=True):
        assert torch.equal(whole[1], single[0])
    assert not torch.equal(alone[0], dataset[Keys(5, [0])][0])
    settings: dict[str, Any] = {"seed": 1, "epoch": 2, "shuffle": True}
    loaders = [batches(dataset, 1, workers=workers, **settings) for workers in (0, 2)]
    assert torch.equal(*(torch.cat([images for images, _ in loader]) for loader in loaders))


@pytest.mark.parametrize("name", DRAWN)
def test_a_byte_that_changes_is_noticed_and_prepare_helps(machine: Machine, name: str) -> None:
    """Even where size and time of the file are as they were; and a pipe never hangs training."""
    prepared(name, machine)
    first = read_columns(Path("results/data", name, "manifest.csv"), "train", "path")[0][0]
    path = machine.root / "data" / name / first
    content, times = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=f"{path.name}: not the file of the manifest.*prepare"):
        training(name, machine)[Keys(0, [0, 1])]
    if name != "cityscapes":  # a flipped bit breaks a PNG
        prepared(name, machine)
        training(name, machine)[Keys(0, [0, 1])]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{path.name}: not a regular file"):
        training(name, machine)[Keys(0, [0])]


def test_a_limit_keeps_some_of_every_class_and_leaves_validation_alone(machine: Machine) -> None:
    prepared("imagenet", machine)
    train, validation = training_data("imagenet", Params(limit=2), machine, seed=0)  # type: ignore[arg-type]
    assert train[Keys(0, [0, 1])][1].tolist() == [0, 1]
    assert (len(train), len(validation), train.classes) == (2, 2, 2)
    assert len(evaluation_data("imagenet", {"params": {"image": 24}}, machine, limit=1)) == 1
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, 9).tolist() == spread(3, None).tolist() == [0, 1, 2]


def test_the_manifest_is_refused_when_it_is_not_prepares(machine: Machine) -> None:
    prepared("imagenet", machine)
    assert read_summary("imagenet")["source"] == "folder"
    folder = Path("results/data/imagenet")
    whole = (folder / "manifest.csv").read_bytes()
    (folder / "manifest.csv").write_bytes(whole.replace(b'n01558993",', b'n01644373",', 1))
    with pytest.raises(
        UserError, match=r"manifest\.csv: not as prepare wrote it.*prepare imagenet"
    ):
        read_summary("imagenet")
    for content in (b"", b"[]", b"{", b"\xff"):
        (folder / "summary.json").write_bytes(content)
        with pytest.raises(UserError, match="prepare imagenet"):
            read_summary("imagenet")


@pytest.mark.parametrize("content", [None, "", "path,split\n", "path,split\na\n", '"a\n'])
def test_what_is_no_manifest_says_so(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "manifest.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"manifest\.csv.*prepare"):
        read_columns(path, "train", "path")


def test_a_manifest_carries_any_name(tmp_path: Path) -> None:
    names = [os.fsdecode(bytes([i])) for i in range(1, 256)] + ['"', "a,b\r\n'c'", "ü漢", " "]
    rows = [{"path": name, "split": "train", "bytes": 1} for name in names]
    (tmp_path / "manifest.csv").write_bytes(manifest.to_csv(rows))
    assert read_columns(tmp_path / "manifest.csv", "train", "path") == [names]
    with pytest.raises(UserError, match="no column 'width'.*prepare"):
        read_columns(tmp_path / "manifest.csv", "train", "path", "width")
