"""prepare: a verified manifest, the same bytes on every run, every change noticed, no torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data import manifest
from pipeline.data.generated import GeneratedCifar10, GeneratedCityscapes, GeneratedImageNet
from pipeline.data.manifest import DataError, Manifest, data_root
from pipeline.machine import Machine
from pipeline.params import PrepareParams
from pipeline.stages import prepare

PARAMS = {
    "cifar10": PrepareParams(source="generated", generated=GeneratedCifar10(train=20, test=10)),
    "imagenet": PrepareParams(
        source="generated", generated=GeneratedImageNet(classes=2, train_per_class=2, val_per_class=1)
    ),
    "cityscapes": PrepareParams(source="generated", generated=GeneratedCityscapes(train=2, val=1, height=32, width=64)),
}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.chdir(tmp_path)
    return Machine(root=tmp_path)


def outputs(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path("results/data", name).iterdir())}


@pytest.mark.parametrize("name", PARAMS)
def test_outputs_and_the_same_bytes_again(name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare.run(name, PARAMS[name], machine)
    first = outputs(name)
    assert set(first) == set(prepare.OUTPUTS)
    manifest = Manifest.read(Path("results/data", name, "manifest.csv"))
    root = data_root(name, "generated", machine)
    assert all((root / path).is_file() for path in manifest["path"])
    summary = json.loads(first["summary.json"])
    assert (summary["set"], summary["source"]) == (name, "generated")
    assert sum(summary["images"].values()) == {"cifar10": 30, "imagenet": 6, "cityscapes": 3}[name]
    assert min(Image.open(f"results/data/{name}/contact_sheet.png").size) > 100

    shutil.rmtree("results")  # as DVC does before a stage
    monkeypatch.setattr(prepare.FORMATS[name], "inspect", None)  # nothing may be read again
    prepare.run(name, PARAMS[name], machine)
    assert outputs(name) == first

    monkeypatch.undo()
    shutil.rmtree(machine.root / "work")  # and from scratch
    os.chdir(machine.root)
    prepare.run(name, PARAMS[name], machine)
    assert outputs(name) == first


def test_only_what_changed_is_read_again(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare.run("imagenet", PARAMS["imagenet"], machine)
    machine.root.joinpath("data/generated/imagenet/generated.json").unlink()
    folder = PrepareParams(source="folder")
    shutil.move(machine.root / "data/generated/imagenet", machine.root / "data/imagenet")
    prepare.run("imagenet", folder, machine)
    before = outputs("imagenet")
    changed = next((machine.root / "data/imagenet/train").rglob("*.JPEG"))
    Image.new("RGB", (50, 40), "red").save(changed, "JPEG")
    read = []
    inspect = prepare.imagenet.inspect
    monkeypatch.setattr(prepare.imagenet, "inspect", lambda root, found: read.append(found) or inspect(root, found))
    prepare.run("imagenet", folder, machine)
    assert [root.files[0] for root in read] == [changed.relative_to(machine.root / "data/imagenet").as_posix()]
    assert outputs("imagenet")["manifest.csv"] != before["manifest.csv"]
    assert json.loads(outputs("imagenet")["summary.json"])["counts"] == json.loads(before["summary.json"])["counts"]


def test_after_a_broken_file_is_mended_the_rest_is_not_read_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare.run("imagenet", PARAMS["imagenet"], machine)
    shutil.move(machine.root / "data/generated/imagenet", machine.root / "data/imagenet")
    last = max((machine.root / "data/imagenet/val").rglob("*.JPEG"))
    whole = last.read_bytes()
    last.write_bytes(whole[:500])
    with pytest.raises(DataError, match=last.name):
        prepare.run("imagenet", PrepareParams(source="folder"), machine)
    last.write_bytes(whole)
    read = []
    inspect = prepare.imagenet.inspect
    monkeypatch.setattr(
        prepare.imagenet, "inspect", lambda root, found: read.append(found.files) or inspect(root, found)
    )
    prepare.run("imagenet", PrepareParams(source="folder"), machine)
    assert read == [(last.relative_to(machine.root / "data/imagenet").as_posix(),)]


def test_a_manifest_does_not_depend_on_where_the_data_lie(machine: Machine, tmp_path: Path) -> None:
    prepare.run("cityscapes", PARAMS["cityscapes"], machine)
    before = outputs("cityscapes")["manifest.csv"]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(machine.root / "data/generated/cityscapes", elsewhere)
    moved = Machine(root=tmp_path / "other", data_roots={"cityscapes": elsewhere})
    prepare.run("cityscapes", PrepareParams(source="folder"), moved)
    assert outputs("cityscapes")["manifest.csv"] == before


@pytest.mark.parametrize(
    ("name", "missing"), [("cifar10", "data_batch_1"), ("imagenet", "train"), ("cityscapes", "train")]
)
def test_missing_data_are_one_line_that_names_the_place(name: str, missing: str, machine: Machine) -> None:
    with pytest.raises(DataError, match=f"{missing}: no such") as caught:
        prepare.run(name, PrepareParams(source="folder"), machine)
    assert "\n" not in str(caught.value)
    assert not Path("results").exists()


def test_an_error_in_the_data_names_the_file_and_leaves_no_outputs(machine: Machine) -> None:
    prepare.run("imagenet", PARAMS["imagenet"], machine)
    shutil.move(machine.root / "data/generated/imagenet", machine.root / "data/imagenet")
    shutil.rmtree("results")
    broken = next((machine.root / "data/imagenet/val").rglob("*.JPEG"))
    broken.write_bytes(broken.read_bytes()[:-400])
    with pytest.raises(DataError, match=broken.name):
        prepare.run("imagenet", PrepareParams(source="folder"), machine)
    assert not Path("results").exists()


def test_a_manifest_that_is_none_says_so(tmp_path: Path) -> None:
    for content in (None, "", "path,split\n", "path,split\na\n"):
        path = tmp_path / "manifest.csv"
        if content is not None:
            path.write_text(content)
        with pytest.raises(DataError, match=r"manifest\.csv.*prepare"):
            Manifest.read(path)


def test_long_work_writes_plain_lines_into_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "SECONDS_A_LINE", 0.0)
    assert list(manifest.progress(range(2), "Reading the data", 1500)) == [0, 1]
    assert capsys.readouterr().err == "Reading the data: 1 of 1,500\nReading the data: 2 of 1,500\n"


def test_the_stage_does_not_import_torch(machine: Machine) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.stages import prepare; from pipeline.machine import Machine\n"
        "from pipeline.params import PrepareParams; from pipeline.data.generated import GeneratedCityscapes\n"
        "drawn = GeneratedCityscapes(train=1, val=1, height=32, width=64)\n"
        "p = PrepareParams(source='generated', generated=drawn)\n"
        "prepare.run('cityscapes', p, Machine(root=Path.cwd())); assert 'torch' not in sys.modules\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
