"""The benchmarks: residuals against theory, fairness, each command at a tiny size, and the page.

torchdeq's columns are tested where it is installed (`pip install '.[bench]'`).
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import memory, peers, setting, timing
from benchmarks.columns import Column, Probe, Step, contestants, ours, probe
from benchmarks.published_broyden import PublishedBroyden
from mdeq import Architecture, Broyden, ClassificationHeadConfig, Implicit, MDEQConfig, Network
from mdeq.multiscale import Scales
from mdeq.saved import save
from mdeq.solvers import FixedPoint, Map
from pipeline.params import load

RADIUS, DIM = 0.7, 4
TORCHDEQ = importlib.util.find_spec("torchdeq") is not None
DOCS = Path(__file__).parents[1] / "docs"


def linear() -> tuple[Map, Tensor, Tensor]:
    """f(z) = A z + c with A = RADIUS times a rotation, so |A^n c| = RADIUS^n |c|; A, and c."""
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))
    c = torch.randn(3, DIM, generator=generator, dtype=torch.float64)
    weight = (RADIUS * rotation).requires_grad_()
    return lambda z: z @ weight.T + c, weight.detach(), c


def probed(column: Column) -> Probe:
    f, _, c = linear()
    return probe(column, f, torch.zeros_like(c), lambda z: z.square().sum())


@pytest.mark.parametrize(("k", "n"), [(5, 7), (3, 1)])
def test_recomputed_residuals_are_those_of_theory(k: int, n: int) -> None:
    """Iterating f: z_k = (1 + A + ... + A^(k-1)) c, so |f(z_k) - z_k| = |A^k c|; so the adjoint."""
    _, a, c = linear()
    column = ours("", FixedPoint(k, tolerance=0.0), Implicit(FixedPoint(n, tolerance=0.0)))  # type: ignore[arg-type]
    found = probed(column)
    limit = torch.linalg.solve(torch.eye(DIM, dtype=a.dtype) - a, c.T).T
    after = limit - limit @ torch.linalg.matrix_power(a, k + 1).T  # f(z_k) = z_(k+1)
    expected = (RADIUS**k * c.norm(dim=1) / after.norm(dim=1)).mean()
    assert found.forward_residual == pytest.approx(float(expected))
    assert found.backward_residual == pytest.approx(RADIUS**n)
    assert found.evaluations == k + 2  # updates, the last one's residual, the tape
    assert found.passes == n + 1


@pytest.mark.parametrize("column", contestants(3 * DIM, 3 * DIM), ids=lambda column: column.name)
def test_every_column_solves_a_linear_map(column: Column) -> None:
    """Broyden's method ends within 2 D updates of a linear system (Gay 1979), GMRES within D."""
    found = probed(column)
    assert found.forward_residual < 1e-4  # Anderson's regularised system is not exact
    assert (found.backward_residual is None) is not column.implicit
    assert found.backward_residual is None or found.backward_residual < 1e-4


def test_both_forms_of_broydens_method_are_one_method() -> None:
    weight = torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.zeros(1, 9, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight / 3 + 1)

    own, published = Broyden(8, tolerance=0.0)(f, start), PublishedBroyden(8)(f, start)
    assert torch.allclose(own.trace, published.trace, rtol=1e-8)
    assert torch.allclose(own.value, published.value, rtol=1e-8)


def contractive() -> Step:
    """A step whose f is so flat that every solver converges."""
    torch.manual_seed(0)
    model = MDEQConfig((4, 4), expansion=1, groups=2, dropout=0.5, post_fusion_affine=True)
    network = Network(model, ClassificationHeadConfig((2, 2), 4), 10).double()
    for name, parameter in network.backbone.f.post.named_parameters():
        if name.endswith("norm.bias"):
            torch.nn.init.normal_(parameter)
        if name.endswith("norm.weight"):
            torch.nn.init.constant_(parameter, 0.1)
    return Step(network, torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 2]))


def test_converged_columns_have_one_gradient() -> None:
    """Network, masks, batch and loss are the same for all that solve the adjoint."""
    step = contractive()
    columns = [column for column in contestants(20, 20) if column.implicit]
    gradients = []
    for column in columns:
        step.run(column)
        weights = step.network.parameters()
        gradients.append(torch.cat([p.grad.flatten() for p in weights if p.grad is not None]))
    assert len(columns) == (6 if TORCHDEQ else 4)
    for gradient in gradients:
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def test_presets_are_those_of_the_papers_params() -> None:
    places = {
        "mdeq-small": ("classify", "mdeq-small"),
        "mdeq-10m": ("classify", "mdeq"),
        "imagenet-mdeq-small": ("pretrain", "mdeq-small"),
    }
    for name, (stage, instance) in places.items():
        params = load(stage, instance, setting.ROOT / "params/paper.yaml")
        preset = setting.PRESETS[name]
        assert (preset.model, preset.head) == (params.model, params.head)
        assert preset.forward == params.forward.steps
        assert preset.backward == params.backward.solver.steps
        assert preset.optimizer.kind == params.optimizer.kind


def test_statistics_are_of_clean_samples_unless_too_few_are() -> None:
    pairs = [(1.0, 0.05), (9.0, 0.5), (2.0, 0.0), (7.0, float("nan"))]
    samples = [timing.Sample(100.0, cpu, others) for cpu, others in pairs]
    found = timing.summary(samples, least=2)
    assert (found["seconds"], found["least"], found["most"], found["clean"]) == (1.5, 1.0, 2.0, 2)
    found = timing.summary(samples, least=3)
    assert (found["seconds"], found["least"], found["most"], found["clean"]) == (4.5, 1.0, 9.0, 2)


def test_work_of_this_process_is_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 2 s of 2 CPUs, 3 CPU seconds of which 1 is ours: others used half of them."""
    monkeypatch.setattr(
        timing, "_busy_seconds", lambda cpus, values=iter((10.0, 13.0)): next(values)
    )
    monkeypatch.setattr(timing.time, "process_time", iter((5.0, 6.0)).__next__)
    monkeypatch.setattr(timing.time, "perf_counter", iter((7.0, 9.0)).__next__)
    monkeypatch.setattr(timing.os, "sched_getaffinity", lambda pid: {0, 1})
    assert timing.measure(lambda: None) == timing.Sample(2.0, 1.0, 0.5)


def test_busy_seconds_are_those_of_the_named_cpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stat = (
        "cpu 9 9 9 9 9 9 9 9 0 0\ncpu0 1 2 3 100 100 4 5 6 0 0\ncpu1 1 0 0 50 0 0 0 0 0 0\nintr 1\n"
    )
    (tmp_path / "stat").write_text(stat)
    monkeypatch.setattr(timing, "STAT", tmp_path / "stat")
    monkeypatch.setattr(timing.os, "sysconf", lambda name: 10)
    assert timing._busy_seconds({0}) == 2.1 and timing._busy_seconds({0, 1}) == 2.2


# ---- the commands


def test_they_import_torch_and_numpy_alone() -> None:
    heavy = "pandas cv2 pydantic mlflow dvc torchvision matplotlib typer PIL rich torchdeq".split()
    code = (
        f"import sys, benchmarks.peers, benchmarks.memory; print(set({heavy}) & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=setting.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model on noise."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    model = MDEQConfig(channels=(4, 4), expansion=1, groups=2)
    architecture = Architecture(model, ClassificationHeadConfig((2, 2), 4), 10)
    path.write_bytes(save(architecture.build(), architecture, {}))
    numbers = ["--batch", "2", "--size", "8", "--forward", "3", "--backward", "3"]
    return ["--weights", str(path), *numbers, "--threads", "1"]


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_peers(
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disturbed sample is taken again, and a ratio is of samples of one round."""
    shares = iter([0.9] + [0.0] * 1000)
    monkeypatch.setattr(
        timing, "measure", lambda run: timing.Sample(3.0, run() or 2.0, next(shares))
    )
    out = tmp_path / "peers.json"
    peers.main([*options, "--rounds", "2", "--out", str(out)])
    report = json.loads(out.read_text())
    rows = {row["name"]: row for row in report["columns"]}
    assert ("torchdeq, Broyden implicit" in rows) is TORCHDEQ
    assert all(len(row["samples"]) == 3 for row in rows.values())
    own, published = rows["ours, Broyden implicit"], rows["authors' form, Broyden implicit"]
    assert own["clean"] == 2 and published["clean"] == 3 and published["times"] == 1
    assert own["evaluations"] == published["evaluations"] == 5
    assert own["passes"] == published["passes"] == 4
    assert {row["counterpart"] for row in rows.values() if "counterpart" in row} <= set(rows)
    assert {"command", "date", "device", "torch", "commit", "threads"} < set(report)
    assert report["model"] == "tiny" and report["images"] == "noise"
    assert peers.markdown(report["columns"]) in capsys.readouterr().out


def test_a_preset_is_trained_briefly() -> None:
    arguments = ["--preset", "mdeq-small", "--train-steps", "2", "--batch", "2", "--size", "8"]
    given = setting.parser(None).parse_args([*arguments, "--threads", "1"])
    there = setting.load(given)
    torch.manual_seed(0)
    untrained = Network(there.preset.model, there.preset.head, 10)
    changed = [
        not torch.equal(a, b)
        for a, b in zip(there.network.parameters(), untrained.parameters(), strict=True)
    ]
    assert all(changed) and there.facts["loss"] > 0


def test_memory(options: list[str], tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    out = tmp_path / "memory.json"
    memory.main([*options, "--samples", "1", "--only", "one step", "--out", str(out)])
    report = json.loads(out.read_text())
    (row,) = report["columns"]
    assert [row["rise"]] == row["rises"] and row["rise"] > 0
    assert report["known"]["state"] * memory.MIB == 2 * 4 * (4 * 64 + 4 * 16)


def test_what_is_missing_is_said_in_one_line(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--weights: .*No such file"):
        peers.main(["--weights", str(tmp_path / "none.safetensors")])
    with pytest.raises(SystemExit, match=r"CIFAR-10 has 32 x 32 images"):
        peers.main([*options, "--data", str(tmp_path)])
    options = [*options[:4], "--threads", "1", "--data", str(tmp_path)]
    with pytest.raises(
        SystemExit, match=r"cifar-10-batches-py.*leave --data out, for noise"
    ) as raised:
        peers.main(options)
    assert "\n" not in str(raised.value)


# ---- docs/benchmarks.md


# ---- docs/benchmarks.md and docs/equilibrium.md


def measured(pattern: str) -> dict[str, dict[str, Any]]:
    """The records of docs/measured by model."""
    files = sorted((DOCS / "measured").glob(pattern))
    return {file.stem.partition("-")[2]: json.loads(file.read_text("utf-8")) for file in files}


def test_the_page_shows_what_was_measured() -> None:
    page = (DOCS / "benchmarks.md").read_text("utf-8")
    records = measured("peers-*.json")
    assert len(records) == 4 and "7 rounds" in page and "none is clean" in page
    for record in records.values():
        assert peers.markdown(record["columns"]) in page
        assert all(len(row["samples"]) == 7 and row["clean"] == 0 for row in record["columns"])
        assert record["threads"] == record["cpus"] == 1
    rises = {name: record["columns"] for name, record in measured("memory-*.json").items()}
    assert len(rises) == 2
    for columns in rises.values():
        assert memory.markdown(columns) in page


@pytest.mark.parametrize("page", ["docs/benchmarks.md", "README.md"])
def test_a_range_holds_for_every_setting(page: str) -> None:
    """Where a page says "A to B times", of a peer and solver: the worst and the best record."""
    text = (DOCS.parent / page).read_text("utf-8")
    found = re.findall(r"([\d.]+) to ([\d.]+) times \(([^)]+)\)", " ".join(text.split()))
    rows = [row for record in measured("peers-*.json").values() for row in record["columns"]]
    for low, high, name in found:
        times = [row["times"] for row in rows if row["name"] == name]
        assert (f"{min(times):.2f}", f"{max(times):.2f}") == (low, high), name
    assert found or page == "README.md"


def test_ours_reach_the_residuals_of_the_same_solver() -> None:
    """What makes the ratios fair; torchdeq's Broyden makes one product more."""
    for record in measured("peers-*.json").values():
        rows = {row["name"]: row for row in record["columns"]}
        for row in rows.values():
            if "counterpart" not in row:
                continue
            own = rows[row["counterpart"]]
            assert own["forward_residual"] <= 1.001 * row["forward_residual"]
            if row["backward_residual"] is not None:
                room = 1.2 if row["name"] == "torchdeq, Broyden implicit" else 1.001
                assert own["backward_residual"] <= room * row["backward_residual"]


def test_the_code_and_the_numbers_about_equilibria() -> None:
    page = (DOCS / "equilibrium.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), "docs/equilibrium.md", "exec"), {})
    size = sum(Scales.of((24, 24), 32, 32).lengths)
    text = " ".join(page.split())
    assert f"D is {size:,}" in text and f"takes {18 * 32 * size * 4 / 1e6:.0f} MB" in text
