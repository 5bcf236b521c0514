"""A training stage in a folder of its own: killed anywhere, it ends with the same results.

Each run is a forked process, which an audit hook kills before its n-th write, rename or removal.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from toys import ARCHITECTURE, Stripes, same, untimed

from mdeq import saved
from pipeline.data.loading import Keys
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.params import ClassifyParams
from pipeline.recipe import Debug, JacobianTerm, Muon, Sgd, WarmStart, WarmUp
from pipeline.train import experiment, rehearsal
from pipeline.train.checkpoints import save_model

PARAMS = ClassifyParams(
    model=ARCHITECTURE.model,
    head=ARCHITECTURE.head,
    forward=ARCHITECTURE.forward,
    backward=ARCHITECTURE.backward,
    optimizer=Muon(lr=0.01, rest=Sgd(lr=0.05)),
    epochs=2,
    batch=16,
    jacobian=JacobianTerm(weight=0.5, probability=0.5),
    warm_start=WarmStart((1,)),
    average=0.9,
    augment=False,
    checkpoint_minutes=1e-9,
    log_every=1,
)
TWO_SEEDS = replace(PARAMS, seeds=(3, 4), epochs=1)
FILES = "curves.png facts.json history.csv metrics.json model.safetensors run.jsonl"
RESULTS = set(FILES.split())
SUMMARY = {"set": "cifar10", "source": "generated", "manifest": "0" * 32}
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


@pytest.fixture(autouse=True)
def toy_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stripes stand for CIFAR-10, in an empty working directory."""
    monkeypatch.setattr(experiment, "read_summary", lambda name: SUMMARY)
    monkeypatch.setattr(experiment, "source_digests", lambda stage, dataset: {})
    data = Stripes(32), Stripes(8)
    monkeypatch.setattr(experiment.readers, "training_data", lambda *arguments: data)
    monkeypatch.chdir(tmp_path)


def machine() -> Machine:
    return Machine(root=Path.cwd(), threads=1)


def train(params: ClassifyParams = PARAMS, **options: Any) -> Path:
    experiment.run("classify", "toy", params, machine(), **options)
    return Path("results/classify/toy")


def forked(folder: Path, action: Callable[[], object], kill_before: float = math.inf) -> int:
    """Runs in `folder`, to be killed before the n-th change of a file; the changes made if not."""
    folder.mkdir(exist_ok=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        assert os.waitstatus_to_exitcode(status) == (0 if kill_before == math.inf else -9), said
        return int(said or 0)
    changes = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal changes
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        path = str(arguments[0]) if writes or event in CHANGES else "/elsewhere"
        if path.startswith("/") and not path.startswith(str(folder)):
            return
        changes += 1
        if changes == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        os.chdir(folder)
        torch.set_num_threads(1)
        sys.addaudithook(hook)
        action()
        os.write(writing, str(changes).encode())
        os._exit(0)
    except BaseException as error:
        os.write(writing, repr(error).encode())
        os._exit(1)


def rows(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "run.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def record(folder: Path) -> list[Any]:
    """A run file without times, the id and what it says of earlier attempts."""
    kept = [row for row in rows(folder) if row.get("status") != "RUNNING"]
    for row in kept:
        row |= {"time": 0, "run": "", "metrics": untimed(row.get("metrics", {}))}
    return kept


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return saved.read((folder / "model.safetensors").read_bytes()).state


def history(folder: Path) -> pd.DataFrame:
    table = pd.read_csv(folder / "history.csv")
    return table[list(untimed(dict.fromkeys(table.columns, 0.0)))]


def assert_same_results(one: Path, other: Path) -> None:
    assert {path.name for path in one.iterdir()} == RESULTS
    assert same(weights(one), weights(other))
    pd.testing.assert_frame_equal(history(one), history(other), check_exact=True)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, other)]
    assert untimed(metrics[0]) == untimed(metrics[1])
    assert record(one) == record(other)


def assert_nothing_left(folder: Path) -> None:
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    locks = {name for name in left if name.startswith("work/locks/")}
    assert left - locks == {f"results/classify/toy/{name}" for name in RESULTS}
    assert len(locks) == 1


def finished_runs(folder: Path) -> set[str]:
    """The ids of runs whose file says that they finished."""
    files = [rows(path.parent) for path in folder.rglob("run.jsonl")]
    return {lines[0]["run"] for lines in files if lines[-1].get("status") == "FINISHED"}


def check_kills(tmp_path: Path, params: ClassifyParams, numbers: slice) -> None:
    """Kills a run before each of some changes of files, then gives the same command again."""
    whole = tmp_path / "whole"
    changes = forked(whole, lambda: train(params))
    assert_nothing_left(whole)
    for number in range(1, changes + 1)[numbers]:
        folder = tmp_path / str(number)
        forked(folder, lambda: train(params), kill_before=number)
        finished = finished_runs(folder)
        resumable = [*folder.glob(f"work/classify-toy/{'[0-9a-f]' * 16}/run.jsonl")]
        forked(folder, lambda: train(params))
        assert_same_results(folder / "results/classify/toy", whole / "results/classify/toy")
        assert_nothing_left(folder)
        if resumable:
            assert finished <= finished_runs(folder), f"two finished runs, killed at {number}"
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("params", "numbers"), [(PARAMS, slice(10, None, 40)), (TWO_SEEDS, slice(-12, None, 5))]
)
def test_killed_at_a_change_of_a_file_the_same_command_gives_the_same(
    tmp_path: Path, params: ClassifyParams, numbers: slice
) -> None:
    check_kills(tmp_path, params, numbers)


@pytest.mark.slow
def test_killed_at_any_change_of_a_file_the_same_command_gives_the_same(tmp_path: Path) -> None:
    check_kills(tmp_path, PARAMS, slice(None))


def test_results_are_complete_and_typed(tmp_path: Path) -> None:
    out = train(replace(PARAMS, seeds=(3, 4)))
    metrics, facts = (
        json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "facts")
    )
    assert all(isinstance(value, int | float) for value in metrics.values())
    assert {"eval/top1", "eval/top1_std", "parameters", "flops"} <= metrics.keys()
    table = pd.read_csv(out / "history.csv")
    assert table[["seed", "epoch"]].to_numpy().tolist() == [[3, 1], [3, 2], [4, 1], [4, 2]]
    last = table[table["epoch"] == 2]
    assert metrics["eval/top1"] == pytest.approx(last["eval/top1"].mean())
    assert metrics["eval/top1_std"] == pytest.approx(last["eval/top1"].std())
    assert saved.load(out / "model.safetensors").facts == facts  # type: ignore[union-attr]
    expected = {"stage": "classify", "model": "toy", "dataset": "cifar10", "source": "generated"}
    expected |= {"seed": 3, "names": ["across", "down"], "threads": torch.get_num_threads()}
    assert expected.items() <= facts.items() and facts["run"] == rows(out)[0]["run"]
    assert facts["params"]["optimizer"]["kind"] == "muon"
    assert facts["seconds"] == pytest.approx(last["time/seconds"].iloc[0])
    named = [row.get("artifact") or row.get("model") for row in rows(out)]
    assert RESULTS - {"run.jsonl"} == set(filter(None, named))
    steps = [row["step"] for row in rows(out) if "seed-4/loss/train" in row.get("metrics", {})]
    assert steps == [1, 2, 3, 4]


def test_other_params_start_afresh_and_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forked(tmp_path, train, kill_before=30)
    train(replace(PARAMS, average=0.5, epochs=1, seeds=(7,)))
    said = capsys.readouterr().err
    assert "classify toy: starts afresh, because an interrupted training differs in" in said
    assert "params.average, params.epochs;" in said
    assert_nothing_left(tmp_path)


def test_a_fine_tuning_starts_from_its_backbone_and_another_is_refused(tmp_path: Path) -> None:
    pretrained = ARCHITECTURE.build()
    save_model(tmp_path / "model", pretrained, ARCHITECTURE, {"run": "abc"})
    model = replace(ARCHITECTURE, classes=7).build()
    experiment.load_backbone(model, tmp_path / "model")
    assert same(model.backbone.state_dict(), pretrained.backbone.state_dict())
    wider = replace(ARCHITECTURE, model=replace(ARCHITECTURE.model, channels=(8, 16)))
    with pytest.raises(UserError, match="its backbone does not fit"):
        experiment.load_backbone(wider.build(), tmp_path / "model")


def test_what_the_counts_forbid_is_said_before_the_training(tmp_path: Path) -> None:
    long = replace(PARAMS, warm_start=None, warm_up=WarmUp(layers=2, steps=4))
    with pytest.raises(UserError, match="classify.toy.warm_up.steps: must be fewer than the 4"):
        train(long)


def test_the_sources_of_a_training_are_part_of_its_identity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    found = set(experiment.source_digests("classify", "cifar10"))
    assert {"mdeq/model.py", "pipeline/train/loop.py", "pipeline/data/cifar10.py"} <= found
    assert {"pipeline/stages/classify.py", "pipeline/recipe.py"} <= found
    assert not {name for name in found if "imagenet" in name or "tracking" in name}


# debugging and rehearsal


def test_debugging_leaves_no_results_and_overfits_one_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    begin = experiment.Experiment.begin

    def spy(self, seed):  # noqa: ANN001, ANN202
        seen.append(begin(self, seed))
        return seen[-1]

    monkeypatch.setattr(experiment.Experiment, "begin", spy)
    train(debug=Debug(limit_batches=1))
    train(debug=Debug(overfit=1))
    train(debug=Debug(limit_batches=2, profile=True))
    assert not Path("results").exists()
    few, one = seen[0][0], seen[1][0]
    assert len(few.train) == 16 and len(few.validation) == 8
    assert len(one.train) == len(one.validation) == 16
    images = [one.train[Keys(epoch, [3])][0] for epoch in (0, 5)]
    assert torch.equal(*images)
    assert torch.equal(one.validation[Keys(0, [3])][0], images[0])
    assert len({few.train.name(index) for index in range(16)}) == 16
    trace = json.loads(Path("work/debug/classify/toy/trace.json").read_text())
    assert any("conv" in event.get("name", "") for event in trace["traceEvents"])


COLD = replace(PARAMS, warm_start=None, warm_up=WarmUp(layers=2, steps=3))


@pytest.mark.parametrize(
    ("params", "kinds"),
    [(PARAMS, ["2 implicit", "2 warm with 1 steps"]), (COLD, ["3 unrolled", "1 implicit"])],
)
def test_a_rehearsal_measures_and_writes_nothing(
    tmp_path: Path, params: ClassifyParams, kinds: list[str]
) -> None:
    lines = rehearsal.rehearse("classify", "toy", params, machine())
    said = dict(line.split(":", 1) for line in lines)
    assert all(f"{kind} at " in said["updates"] for kind in kinds)
    assert f"{sum(p.numel() for p in ARCHITECTURE.build().parameters()):,}" in said["model"]
    assert "on this machine" in said["in all"] and "GB" in said["memory"]
    assert ("disk" in said) == bool(params.warm_start)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["closed", "full", "none", "ascii"])
def test_a_line_that_cannot_be_printed_never_stops_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = Path("/dev/full") if kind == "full" else tmp_path / "said"
    said = path.open("w", encoding="ascii")
    if kind == "closed":
        said.close()
    monkeypatch.setattr(sys, "stderr", None if kind == "none" else said)
    monkeypatch.setattr(experiment.progress, "SECONDS_PER_LINE", 0.0)
    experiment.progress.say("Größe \x1b[31m")
    train(replace(PARAMS, epochs=1))
    monkeypatch.undo()
    with contextlib.suppress(OSError):
        said.close()
    if kind == "ascii":
        text = path.read_text(encoding="ascii")
        assert "Gr\\xf6\\xdfe \\x1b[31m" in text and "step 2/2  loss" in text


def test_a_trainings_duration_is_said_after_its_first_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(experiment.progress.time, "monotonic", lambda: clock[0])
    with experiment.progress.Training("classify x", lambda *row: None) as observer:
        for step in range(1, 80):
            clock[0] += 1.0 if step < 40 else 2.0
            observer.step(step, 3640, {"solver/nfe": 5.0} if step >= 40 else {})
    said = capsys.readouterr().err
    assert "classify x: about 60 minutes left on this machine, at 1 s per update" in said
    assert "about 2.0 hours left on this machine, at 2 s per update" in said
    assert said.count("left on this machine") == 2


def test_a_solver_that_finds_nothing_for_long_is_reported_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    patience = experiment.progress.PATIENCE
    with experiment.progress.Training("classify x", lambda *row: None) as observer:
        for step in range(1, 3 * patience):
            residual = 0.9 if step == 50 else 1.0
            observer.step(step, 1000, {"solver/forward_residual": residual})
    expected = f"step {50 + patience}: for {patience} updates the solver found nothing"
    assert capsys.readouterr().err.count(expected) == 1
