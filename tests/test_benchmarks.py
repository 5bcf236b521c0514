"""The benchmarks: recomputed residuals against theory on a linear map, and each command end to end at a tiny size.

torchdeq's columns are tested where it is installed (`pip install '.[bench]'`).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from benchmarks import budget, compiled, memory, peers, setting, sweep, timing, video
from benchmarks.columns import Column, Probe, contestants, ours, probe
from mdeq import Broyden, ClassificationHeadConfig, FixedPoint, Implicit, MDEQConfig, transformation
from mdeq.heads import SegmentationHeadConfig
from mdeq.solvers import Map
from pipeline.checkpoints import Architecture, save_model
from pipeline.data.generated import ensure
from pipeline.params import GeneratedCifar10, load
from pipeline.train_params import TrainParams

RADIUS, DIM = 0.7, 4
TORCHDEQ = importlib.util.find_spec("torchdeq") is not None


class Linear:
    """z -> A z + c, also for some rows alone."""

    def __init__(self, weight: Tensor, c: Tensor) -> None:
        self.weight, self.c = weight, c

    def __call__(self, z: Tensor) -> Tensor:
        return z @ self.weight.T + self.c

    def rows(self, rows: slice) -> Map:
        return Linear(self.weight, self.c[rows])


def linear() -> tuple[Linear, Tensor, Tensor]:
    """f(z) = A z + c with A = RADIUS times a rotation, so |A^n c| = RADIUS^n |c|; A and c (B, D)."""
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))
    c = torch.randn(3, DIM, generator=generator, dtype=torch.float64)
    weight = (RADIUS * rotation).requires_grad_()
    return Linear(weight, c), weight.detach(), c


def probed(column: Column) -> Probe:
    f, _, c = linear()
    return probe(column, f, torch.zeros_like(c), lambda z: z.square().sum())


def test_recomputed_residuals_are_those_of_theory() -> None:
    """Iterating f: z_k = (1 + A + ... + A^(k-1)) c, so |f(z_k) - z_k| = |A^k c|; the adjoint alike, with A^T."""
    _, a, c = linear()
    k, n = 5, 7
    column = ours("", FixedPoint(k, tolerance=0.0), Implicit(FixedPoint(n, tolerance=0.0)))
    found = probed(column)
    limit = torch.linalg.solve(torch.eye(DIM, dtype=a.dtype) - a, c.T).T
    after = limit - limit @ torch.linalg.matrix_power(a, k + 1).T  # f(z_k) = z_(k+1)
    assert found.forward_residual == pytest.approx(float((RADIUS**k * c.norm(dim=1) / after.norm(dim=1)).mean()))
    assert found.backward_residual == pytest.approx(RADIUS**n)
    assert found.evaluations == k + 2  # updates, the last one's residual, the tape
    assert found.passes == n + 1


@pytest.mark.parametrize("column", contestants(3 * DIM, 3 * DIM, 2), ids=lambda column: column.name)
def test_every_column_solves_a_linear_map(column: Column) -> None:
    """Broyden's method ends within 2 D updates of a linear system (Gay 1979), GMRES within D."""
    found = probed(column)
    assert found.forward_residual < 1e-4  # Anderson's regularised system is not exact
    if column.implicit:
        assert found.backward_residual is not None and found.backward_residual < 1e-4
    else:
        assert found.backward_residual is None


def test_a_half_solved_adjoint_shows() -> None:
    exact, rough = (probed(ours("", Broyden(3 * DIM), Implicit(FixedPoint(n, tolerance=0.0)))) for n in (60, 2))
    assert exact.backward_residual is not None and exact.backward_residual < 1e-8
    assert rough.backward_residual == pytest.approx(RADIUS**2)


def test_presets_are_those_of_the_papers_params() -> None:
    places = {
        "mdeq-small": ("classify", "mdeq-small"),
        "mdeq-10m": ("classify", "mdeq"),
        "imagenet-mdeq-small": ("pretrain", "mdeq-small"),
    }
    for name, (stage, instance) in places.items():
        params = load(stage, instance, Path(__file__).parents[1] / "params/paper.yaml")
        preset = setting.PRESETS[name]
        assert isinstance(params, TrainParams) and params.forward and isinstance(params.backward, Implicit)
        assert (preset.model, preset.head) == (params.model, params.head)
        assert (preset.forward, preset.backward) == (params.forward.steps, params.backward.solver.steps)
        assert preset.optimizer.kind == params.optimizer.kind


def test_medians_are_over_clean_samples() -> None:
    samples = [timing.Sample(wall, wall, others) for wall, others in ((1.0, 0.05), (9.0, 0.5), (2.0, 0.0))]
    found = timing.summary(samples)
    assert (found["wall"], found["wall_min"], found["clean"]) == (1.5, 1.0, 2)
    dirty = timing.summary([replace(sample, others=0.9) for sample in samples])
    assert (dirty["wall"], dirty["clean"]) == (2.0, 0)


def test_work_of_this_process_is_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 2 s of 2 CPUs, 3 CPU seconds of which 1 is ours: others used half of the machine."""
    monkeypatch.setattr(timing, "_busy_seconds", iter((10.0, 13.0)).__next__)
    monkeypatch.setattr(timing.time, "process_time", iter((5.0, 6.0)).__next__)
    monkeypatch.setattr(timing.time, "perf_counter", iter((7.0, 9.0)).__next__)
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    assert timing.measure(lambda: None) == timing.Sample(2.0, 1.0, 0.5)


# ---- the commands


def test_they_import_torch_and_numpy_alone() -> None:
    heavy = set("pandas cv2 pydantic mlflow dvc torchvision matplotlib typer PIL rich torchdeq".split())
    code = f"import sys, benchmarks.peers, benchmarks.memory, benchmarks.sweep; print({heavy} & set(sys.modules))"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model on noise."""
    path = tmp_path_factory.mktemp("model") / "model.pt"
    model = MDEQConfig(channels=(4, 4), expansion=1, groups=2)
    architecture = Architecture(model, ClassificationHeadConfig(channels=(2, 2), final_channels=4), 10)
    torch.manual_seed(0)
    save_model(path, architecture, architecture.build(), {})
    numbers = ["--batch", "2", "--size", "8", "--forward", "3", "--backward", "3", "--threads", "1"]
    return ["--weights", str(path), "--noise", *numbers]


@pytest.fixture(autouse=True)
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_peers(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "peers.json"
    peers.main([*options, "--rounds", "2", "--out", str(out)])
    report = json.loads(out.read_text())
    rows = {row["name"]: row for row in report["columns"]}
    assert report["images"] == "random noise" and all(len(row["samples"]) == 2 for row in rows.values())
    assert ("torchdeq, Broyden implicit" in rows) is TORCHDEQ
    published, broyden = rows["authors' form, (U, V) Broyden"], rows["ours, Broyden / Broyden"]
    assert published["evaluations"] == broyden["evaluations"] == 5 and published["passes"] == broyden["passes"] == 4
    for name, row in rows.items():
        for peer in (peer for peer in rows if f"at the residuals of {peer}" in name):
            assert row["forward_residual"] <= rows[peer]["forward_residual"]
            assert row["backward_residual"] <= rows[peer]["backward_residual"]
    assert "n/a" in capsys.readouterr().out


def test_memory(options: list[str], tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    out = tmp_path / "memory.json"
    memory.main([*options, "--samples", "1", "--only", "Broyden / one step", "--out", str(out)])
    report = json.loads(out.read_text())
    (row,) = report["columns"]
    assert row["rise"] == max(row["peak"].values()) > 0
    assert report["known"]["one state"] * memory.MIB == 2 * 4 * (4 * 64 + 4 * 16)


def test_sweep(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    numbers = ["--evaluations", "5", "--images", "4", "--gradient-batch", "2", "--exact", "60"]
    sweep.main([*options, *numbers, "--pictures", str(tmp_path), "--out", str(out)])
    report = json.loads(out.read_text())
    for curve in (*report["forward"].values(), *report["adjoint"].values()):
        assert len(curve["residual"]) == 5 and curve["residual"][1:] == sorted(curve["residual"][1:], reverse=True)
    gradients = report["gradients"]
    assert gradients["exact"]["adjoint_residual"] <= 1e-6
    assert gradients["converged"]["GMRES"]["cosine"][-1] <= 1 + 1e-9
    for name in ("solvers.svg", "solvers.png", "gradients.svg", "gradients.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_compiled(options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Map] = []
    monkeypatch.setattr(transformation, "_run", lambda: lambda f, state: (used.append(f), f(state))[1])  # no compiler
    compiled.main([*options, "--rounds", "1"])
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in table] == ["ms", "---", "eager", "compiled"] and used


@pytest.mark.parametrize("model", ["mdeq-small", "resnet18-small"])
def test_a_budget_is_kept_and_gone_on_with(model: str, tmp_path: Path) -> None:
    ensure(tmp_path, GeneratedCifar10(seed=0, train=40, test=10))
    given = ["train", "--data", str(tmp_path), "--model", model, "--batch", "16", "--test-images", "10"]
    given += ["--every", "0.2", "--steps", "2", "--out", str(tmp_path / "out")]
    rows: list[dict[str, float]] = []
    for budget_seconds in (0.3, 1.0):  # the second goes on from the first
        budget.main([*given, "--budget", str(budget_seconds)])
        [file] = (tmp_path / "out").glob("*.json")
        kept, rows = rows, json.loads(file.read_text())["rows"]
        assert (
            rows[: len(kept)] == kept
            and rows[-1]["seconds"] >= budget_seconds
            and rows[-1]["images"] % 40 in (0, 16, 32)
        )
        assert ("residual" in rows[-1]) == (model == "mdeq-small")


def test_video(tmp_path: Path) -> None:
    """A frame's labels are the last's, moved; each speed and tolerance has its row; the record says what made it."""
    frames = video.draw(tmp_path, seed=0, frames=2, speed=4)
    first, second = (cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in sorted((tmp_path / "labels").iterdir()))
    assert np.array_equal(first[:, 4:], second[:, :-4]) and len(list(frames.iterdir())) == 2
    model = MDEQConfig(channels=(4,), expansion=1, groups=2, downsamplings=2)
    architecture = Architecture(model, SegmentationHeadConfig(), 19, Broyden(steps=3))
    torch.manual_seed(0)
    about = {"stage": "finetune", "names": list(map(str, range(19))), "params": {"test_size": None}}
    save_model(tmp_path / "model.pt", architecture, architecture.build(), about)
    out = tmp_path / "video.json"
    video.main(["--weights", str(tmp_path / "model.pt"), "--videos", "1", "--frames", "2", "--out", str(out)])
    report = json.loads(out.read_text())
    assert [(row["pixels"], row["tolerance"]) for row in report["rows"]] == [(1, 1e-2), (1, 1e-3), (4, 1e-2), (4, 1e-3)]
    assert all(row["frames"] == 2 and row["before.evaluations"] >= 1 for row in report["rows"])
    assert {"command", "date", "device", "torch", "commit"} < set(report)


def test_missing_images_are_said_in_one_line(options: list[str], tmp_path: Path) -> None:
    given = [option for option in options if option != "--noise"]
    given[given.index("--size") + 1] = "32"
    with pytest.raises(SystemExit, match=r"data_batch_1: no such file.*or give --data, or --noise"):
        peers.main([*given, "--data", str(tmp_path)])


def test_the_docs_say_what_was_measured() -> None:
    docs = Path(__file__).parents[1] / "docs"
    page = (docs / "benchmarks.md").read_text(encoding="utf-8")
    files = sorted((docs / "measured").glob("peers-*.json"))
    assert len(files) == 4
    for file in files:
        assert peers.markdown(json.loads(file.read_text(encoding="utf-8"))["columns"]) in page
    readme = (docs.parent / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    rows = json.loads((docs / "measured/peers-mdeq-small.json").read_text(encoding="utf-8"))["columns"]
    seconds = {row["name"]: row["wall"] for row in rows}
    for peer, equal, same in (("torchdeq, Broyden implicit", 3.5, 1.8), ("authors' form, (U, V) Broyden", 3.6, 1.7)):
        [ours_at_equal] = [wall for name, wall in seconds.items() if name.endswith(f"at the residuals of {peer}")]
        assert round(seconds[peer] / ours_at_equal, 1) == equal
        assert round(seconds[peer] / seconds["ours, Broyden / Broyden"], 1) == same
        assert f"{equal} times" in readme and str(same) in readme
    trained = [docs / "measured/rule-phantom-0.3.json", *sorted((docs / "measured").glob("model-*.json"))]
    assert len(trained) == 4 and budget.markdown(trained) in page
    rules = sorted((docs / "measured").glob("rule-*.json"))
    assert len(rules) == 6 and budget.markdown(rules) in (docs / "equilibrium.md").read_text(encoding="utf-8")
    rows = json.loads((docs / "measured/compiled-mdeq-small.json").read_text(encoding="utf-8"))["columns"]
    assert compiled.markdown(rows) in (docs / "equilibrium.md").read_text(encoding="utf-8")
    for model in ("mdeq-small", "imagenet-mdeq-small"):
        for row in json.loads((docs / f"measured/memory-{model}.json").read_text(encoding="utf-8"))["columns"]:
            assert f" {row['rise']:.0f} |" in page


def test_the_hour_of_soak_is_told_as_it_was_recorded() -> None:
    """docs/measured/soak.csv is what `make soak` printed; its first round was not disturbed."""
    docs = Path(__file__).parents[1] / "docs"
    page = (docs / "faults.md").read_text(encoding="utf-8").replace("\n", " ")
    rows = pd.read_csv(docs / "measured/soak.csv")
    killed = rows[rows["round"] > 0]
    assert f"{len(killed)} trainings, killed {killed['kills'].sum():,} times" in page
    for stage, own in killed.groupby("stage"):
        late, files = own["mb_late"], own["files_late"]
        memory = f"{late.head(10).median():.0f} → {late.tail(10).median():.0f} MB"
        assert f"| {stage} | {memory} | {files.head(10).median():.0f} → {files.tail(10).median():.0f} |" in page
