"""prepare: the same bytes on every run, every change noticed, every damage repaired, no torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DRAWN
from PIL import Image

from pipeline.data import cifar10, generated, imagenet
from pipeline.data.loading import Keys
from pipeline.data.manifest import data_root, read_columns
from pipeline.data.readers import evaluation_data
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.settings import GeneratedCifar10, PrepareParams
from pipeline.stages import prepare

PARAMS = {
    name: PrepareParams(source="generated", generated=params) for name, params in DRAWN.items()
}
FOLDER = PrepareParams(source="folder")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.chdir(tmp_path)
    return Machine(root=tmp_path)


@pytest.fixture
def photos(machine: Machine) -> Path:
    """A user's own ImageNet."""
    root = machine.root / "data/imagenet"
    generated.ensure(root, "imagenet", PARAMS["imagenet"].generated)  # type: ignore[arg-type]
    (root / generated.NOTE).unlink()
    return root


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of ImageNet that are read."""
    paths: list[str] = []
    inspect = imagenet.inspect
    monkeypatch.setattr(
        imagenet, "inspect", lambda root, one: paths.append(one[0]) or inspect(root, one)
    )
    return paths


def outputs(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path("results/data", name).iterdir())}


def without_run(name: str) -> dict[str, bytes]:
    """All but the record of the run, whose id and times are its own."""
    return {file: content for file, content in outputs(name).items() if file != "run.jsonl"}


@pytest.mark.parametrize("name", PARAMS)
def test_outputs_and_the_same_bytes_again(
    name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare.run(name, PARAMS[name], machine)
    first, rest = outputs(name), without_run(name)
    assert set(first) == set(prepare.OUTPUTS)
    (paths,) = read_columns(Path("results/data", name, "manifest.csv"), "train", "path")
    root = data_root(name, "generated", machine)
    assert paths and all((root / path).is_file() for path in paths)
    summary = json.loads(first["summary.json"])
    assert (summary["set"], summary["source"]) == (name, "generated")
    assert sum(summary["images"].values()) == {"cifar10": 30, "imagenet": 6, "cityscapes": 3}[name]
    assert summary["classes"] == {"cifar10": 10, "imagenet": 2, "cityscapes": 19}[name]
    assert min(Image.open(f"results/data/{name}/contact_sheet.png").size) > 100
    rows = [json.loads(line) for line in first["run.jsonl"].splitlines()]
    assert rows[0]["stage"] == "prepare" and rows[-1]["status"] == "FINISHED"

    shutil.rmtree("results")  # as DVC does before a stage
    with monkeypatch.context() as patch:
        patch.setattr(prepare.FORMATS[name], "inspect", None)  # nothing may be read again
        prepare.run(name, PARAMS[name], machine)
    assert outputs(name) == first

    shutil.rmtree(machine.root / "work")  # and from scratch
    prepare.run(name, PARAMS[name], machine)
    assert without_run(name) == rest


def test_only_what_changed_is_read_again(machine: Machine, photos: Path, read: list[str]) -> None:
    """And outputs that DVC's cache links are replaced, never written through."""
    prepare.run("imagenet", FOLDER, machine)
    before = outputs("imagenet")
    for output in before:
        os.link(f"results/data/imagenet/{output}", f"cached-{output}")
    changed = next((photos / "train").rglob("*.JPEG"))
    Image.new("RGB", (50, 40), "red").save(changed, "JPEG")
    read.clear()
    prepare.run("imagenet", FOLDER, machine)
    assert read == [changed.relative_to(photos).as_posix()]
    after = outputs("imagenet")
    assert all(after[output] != before[output] for output in prepare.OUTPUTS)
    assert {output: Path(f"cached-{output}").read_bytes() for output in before} == before


def test_after_a_broken_file_is_repaired_the_rest_is_not_read_again(
    machine: Machine, photos: Path, read: list[str]
) -> None:
    last = max((photos / "val").rglob("*.JPEG"))
    whole = last.read_bytes()
    last.write_bytes(whole[:-400])
    with pytest.raises(UserError, match=last.name):
        prepare.run("imagenet", FOLDER, machine)
    assert not Path("results").exists()
    last.write_bytes(whole)
    read.clear()
    prepare.run("imagenet", FOLDER, machine)
    assert read == [last.relative_to(photos).as_posix()]


def test_a_manifest_does_not_depend_on_where_the_data_lie(machine: Machine, tmp_path: Path) -> None:
    prepare.run("cityscapes", PARAMS["cityscapes"], machine)
    before = outputs("cityscapes")["manifest.csv"]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(machine.root / "data/generated/cityscapes", elsewhere)
    moved = Machine(root=tmp_path / "other", data_roots={"cityscapes": elsewhere})
    prepare.run("cityscapes", FOLDER, moved)
    assert outputs("cityscapes")["manifest.csv"] == before


@pytest.mark.parametrize("name", PARAMS)
def test_missing_data_are_one_line_that_names_the_place(name: str, machine: Machine) -> None:
    source = {
        "cifar10": "tar.gz",
        "imagenet": "https://image-net",
        "cityscapes": "`csDownload left",
    }
    with pytest.raises(
        UserError, match=f"data/{name}/.*: no such folder; .*{source[name]}"
    ) as caught:
        prepare.run(name, FOLDER, machine)
    assert str(caught.value).isprintable()
    assert not Path("results").exists()


def test_files_and_classes_may_have_any_name(machine: Machine, photos: Path) -> None:
    odd = os.fsdecode(b"\xe9 $x_1$\n<b>,\"'\r")
    for split in ("train", "val"):
        folder = next(path for path in sorted((photos / split).iterdir()))
        next(folder.iterdir()).rename(folder / f"{odd}.JPEG")
        folder.rename(photos / split / odd)
    prepare.run("imagenet", FOLDER, machine)
    dataset = evaluation_data("imagenet", {"params": {"image": 24}}, machine)
    assert odd in dataset.names and dataset[Keys(0, [0, 1])][0].isfinite().all()
    assert odd in json.loads(outputs("imagenet")["summary.json"])["counts"]["train"]


# ---- damage


KEPT = "work/prepare-imagenet"
DAMAGED = [f"{KEPT}/{name}" for name in (*prepare.OUTPUTS, prepare.ROWS, prepare.PROOF)]
DAMAGED += [f"results/data/imagenet/{name}" for name in prepare.OUTPUTS]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("spoil", [flip, Path.unlink, dangle, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("damaged", DAMAGED)
def test_any_damage_is_repaired_by_the_same_command(
    machine: Machine, photos: Path, damaged: str, spoil: Callable[[Path], Any]
) -> None:
    prepare.run("imagenet", FOLDER, machine)
    first = without_run("imagenet")
    spoil(Path(damaged))
    prepare.run("imagenet", FOLDER, machine)
    assert without_run("imagenet") == first
    evaluation_data("imagenet", {"params": {"image": 24}}, machine)[Keys(0, [0, 1])]


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Whether a process that does `work` comes to its `number`th change of the disk, and dies."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
                count += 1
                if count == number:
                    os._exit(9)

        sys.addaudithook(watch)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def archive(machine: Machine) -> None:
    """CIFAR-10's official archive, not unpacked."""
    root = machine.root / "data/cifar10"
    generated.ensure(machine.root / "drawn", "cifar10", PARAMS["cifar10"].generated)  # type: ignore[arg-type]
    root.mkdir(parents=True)
    with tarfile.open(root / cifar10.ARCHIVE, "w:gz") as tar:
        tar.add(machine.root / "drawn" / cifar10.FOLDER, cifar10.FOLDER)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["archive", "generated anew"])
def test_killed_at_any_moment_the_same_command_gives_the_same(
    machine: Machine, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_sheet", lambda *_: b"a picture")  # in less time
    params = PARAMS["cifar10"]
    if source == "archive":
        archive(machine)
        params = FOLDER
    if source == "generated anew":
        other = GeneratedCifar10(train=10, test=10, seed=5)
        prepare.run("cifar10", PrepareParams(source="generated", generated=other), machine)
    start = tmp_path.with_name(f"{tmp_path.name}-start")
    shutil.copytree(tmp_path, start)
    prepare.run("cifar10", params, machine)
    first, files = without_run("cifar10"), tree(tmp_path)
    number = 1
    while True:
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        shutil.copytree(start, tmp_path, dirs_exist_ok=True)
        if not killed_at(number, lambda: prepare.run("cifar10", params, machine)):
            break
        killed_at(max(1, number - 1), lambda: prepare.run("cifar10", params, machine))  # and again
        prepare.run("cifar10", params, machine)
        assert without_run("cifar10") == first, number
        assert tree(tmp_path) == files, number
        number += 1
    assert number > 30


def test_the_stage_does_not_import_torch(machine: Machine, repository: Path) -> None:
    code = """
import sys
from pathlib import Path
from conftest import DRAWN
from pipeline.machine import Machine
from pipeline.settings import PrepareParams
from pipeline.stages import prepare
params = PrepareParams(source="generated", generated=DRAWN["cityscapes"])
prepare.run("cityscapes", params, Machine(root=Path.cwd()))
assert "torch" not in sys.modules
"""
    paths = f"{repository}{os.pathsep}{repository / 'tests'}"
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})
