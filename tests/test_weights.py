"""Published files become models of the pipeline; the presets have the published code's sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import weights
from pipeline.checkpoints import CheckpointError, load_model
from pipeline.data.cifar10 import CLASSES
from pipeline.inference import Predictor
from pipeline.machine import Machine
from tests.test_checkpoints import Malicious

ROOT = Path(__file__).parents[1]
PRESETS = ROOT / "params" / "paper.yaml"
REFERENCE = np.load(Path(__file__).parent / "reference" / "cifar10_mdeq_small.npz")


def published() -> dict[str, torch.Tensor]:
    return {k.removeprefix("state/"): torch.from_numpy(REFERENCE[k]) for k in REFERENCE.files if k.startswith("state/")}


def test_every_preset_has_the_published_size():
    compared = [(count, size) for _, count, _, size in weights.sizes(PRESETS) if size]
    assert len(compared) == 8
    for count, size in compared:
        assert f"{count:,}" == size


def test_a_wrapped_published_file_becomes_a_model(tmp_path):
    content = {
        "epoch": 50,
        "best_perf": np.float64(87.1),
        "state_dict": {f"module.{k}": v for k, v in published().items()},
    }
    torch.save(content, tmp_path / "tiny.pkl")
    path = weights.import_weights(tmp_path / "tiny.pkl", "cifar10-mdeq-small", tmp_path / "model.pt", PRESETS)
    network, _, meta = load_model(path)
    with torch.no_grad():
        solved = network(torch.from_numpy(REFERENCE["input"]).float()).equilibrium.scales
    assert meta["names"][3] == "cat" and all(torch.isfinite(z).all() for z in solved)
    assert torch.equal(network.backbone.stem[0].weight, published()["downsample.0.weight"])
    photo = np.full((40, 60, 3), 90, np.uint8)
    best = (predictor := Predictor(path, Machine(tmp_path))).best(predictor(photo).value, 10)
    assert {name for name, _ in best} == set(CLASSES) and sum(p for _, p in best) == pytest.approx(1, abs=1e-5)


def test_what_does_not_fit_is_listed(tmp_path):
    state = published()
    del state["classifier.bias"]
    torch.save(state, tmp_path / "less.pkl")
    with pytest.raises(CheckpointError, match=r"head\.classifier\.bias"):
        weights.import_weights(tmp_path / "less.pkl", "cifar10-mdeq-small", tmp_path / "model.pt", PRESETS)
    torch.save(published() | {"mystery": torch.zeros(1)}, tmp_path / "more.pkl")
    with pytest.raises(CheckpointError, match="mystery"):
        weights.import_weights(tmp_path / "more.pkl", "cifar10-mdeq-small", tmp_path / "model.pt", PRESETS)
    with pytest.raises(CheckpointError, match="begin with the set"):
        weights.import_weights(tmp_path / "more.pkl", "mdeq-small", tmp_path / "model.pt", PRESETS)
    torch.save({"state_dict": Malicious(tmp_path / "ran")}, tmp_path / "evil.pkl")
    with pytest.raises(CheckpointError, match="evil.pkl: damaged"):
        weights.import_weights(tmp_path / "evil.pkl", "cifar10-mdeq-small", tmp_path / "model.pt", PRESETS)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "model.pt").exists()
