"""What `plan` reckons, against numbers by hand for a network small enough to count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.plan import GPUS, plan

PAPER = Path("params/paper.yaml")


def written(workspace: Path, **changes: object) -> Path:
    """params.yaml where classify.mdeq-small has one scale of 8 channels; 2,560 images are drawn."""
    params = YAML(typ="safe").load((workspace / "params.yaml").read_text())
    entry = params["classify"]["mdeq-small"]
    entry["model"] |= {"channels": [8], "expansion": 2, "groups": 4}
    entry["head"] |= {"channels": [4]}
    entry |= {"jacobian": None, "batch": 16, "epochs": 2, "warm_up": {"layers": 3, "steps": 40}} | changes
    path = workspace / "one.yaml"
    with path.open("w") as file:
        YAML(typ="safe").dump(params, file)
    return path


def test_operations_and_memory_of_one_scale_by_hand(workspace: Path) -> None:
    backward = {"kind": "implicit", "solver": {"kind": "gmres", "steps": 3}}
    made = plan(
        "classify", "mdeq-small", written(workspace, forward={"kind": "broyden", "steps": 5}, backward=backward)
    )
    batch, pixels, c = 16, 32 * 32, 8
    assert made.state == c * pixels
    assert made.updates == (40, 2 * 2560 // 16 - 40)
    assert made.evaluations == (5 + 1 + 1, 3 + 1)
    f = 2 * batch * pixels * (9 * c * 2 * c * 2 + c * c)  # two 3x3 convolutions C -> 2C -> C, one 1x1
    # an evaluation costs f, a product with J f, and the last product, which reaches the parameters too, 2 f
    unrolled, implicit = made.flops
    assert implicit - unrolled == (7 + 3 + 2 - 3 * (1 + 2)) * f
    state = 4 * batch * c * pixels
    assert made.memory["forward: solver"] == (5 + 4) * state and made.memory["backward: solver"] == (3 + 1 + 4) * state
    assert made.memory["optimiser"] == 2 * made.memory["weights"] == 8 * made.parameters  # Adam
    assert 6 * state < made.memory["tape of one f"] < 20 * state


def test_parts_of_a_batch_need_less_memory_and_the_same_operations(workspace: Path) -> None:
    whole = plan("classify", "mdeq-small", written(workspace))
    path = written(workspace, accumulate=2)
    halves = plan("classify", "mdeq-small", path)
    quarters = plan("classify", "mdeq-small", path, gpus=2)
    assert quarters.flops == pytest.approx(whole.flops) and halves.flops == pytest.approx(whole.flops)
    for part in ("forward: solver", "backward: solver"):
        assert whole.memory[part] == 2 * halves.memory[part] == 4 * quarters.memory[part]
    assert quarters.peak < halves.peak < whole.peak
    assert quarters.hours(GPUS["h100"], 2, 0.1) == pytest.approx(whole.hours(GPUS["h100"], 1, 0.1) / 2)


def test_an_explicit_model_costs_three_forward_passes(workspace: Path) -> None:
    """Less the gradient of its images, which nobody asks for."""
    made = plan("classify", "resnet18-small", PAPER)
    widths, size, macs = (8, 16, 32, 64), 32, 3 * 8 * 9 * 32**2
    first, inputs = macs, 8
    for stage, width in enumerate(widths):
        size = 32 // 2**stage
        macs += (inputs * width + 3 * width * width) * 9 * size**2 + (inputs != width) * inputs * width * size**2
        inputs = width
    macs += 64 * 10
    assert made.flops[0] == pytest.approx(2 * 128 * (3 * macs - first))
    assert made.updates == (50 * 391, 0) and made.state == 0


def test_the_count_of_images_is_that_of_the_prepared_folder(workspace: Path) -> None:
    assert sum(plan("classify", "mdeq-small", PAPER).updates) == 19_550  # CIFAR-10's 50,000, in batches of 128
    folder = Path("results/data/cifar10")
    folder.mkdir(parents=True)
    summary = {"source": "download", "images": {"train": 1280}, "classes": 10}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert sum(plan("classify", "mdeq-small", PAPER).updates) == 50 * 10


def test_the_table_names_its_assumptions_and_what_is_wrong(workspace: Path) -> None:
    result = CliRunner().invoke(app, ["plan", "classify", "mdeq-small", "--params", str(PAPER), "--gpu", "a100"])
    assert result.exit_code == 0, result.output
    assert "158,890" in result.stdout and "30,720" in result.stdout and "1 x a100 at 10%" in result.stdout
    assert "3,000 + 16,550" in result.stdout
    for line, message in {
        "classify mdeq-small --gpu abacus": "--gpu abacus: must be one of v100",
        "evaluate": "evaluate: does not train; must be one of classify",
        "classify other": "classify.other: is not there; there are: mdeq-small",
    }.items():
        result = CliRunner().invoke(app, ["plan", *line.split()])
        assert result.exit_code == 2 and message in result.stderr
