"""Ours, built from a published configuration and loaded with published names, gives the published code's numbers.

`reference/*.npz` hold weights, inputs and float64 results of the authors' code: figures, not code.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mdeq import Broyden, ClassificationHeadConfig, MDEQConfig, Network, SegmentationHeadConfig
from mdeq.published import rename, state_dict

REFERENCE = Path(__file__).parent / "reference"


def relative_error(ours: torch.Tensor, theirs: np.ndarray) -> float:
    expected = torch.from_numpy(np.asarray(theirs))
    return float((ours - expected).norm() / expected.norm())


@pytest.fixture(params=["cifar10_mdeq_small", "segmentation_four_scales"])
def reference(request):
    data = np.load(REFERENCE / f"{request.param}.npz")
    settings = json.loads(str(data["config"]))
    config = MDEQConfig(
        channels=tuple(settings["channels"]),
        expansion=settings["expansion"],
        groups=settings["groups"],
        downsamplings=settings["downsamplings"],
        dropout=settings["dropout"],
        weight_norm=settings["weight_norm"],
        post_fusion_affine=settings["post_fusion_gn_affine"],
        upsampling=settings["upsample"],
    )
    if settings["head"] == "classification":
        head = ClassificationHeadConfig(tuple(settings["head_channels"]), settings["final_channels"])
    else:
        head = SegmentationHeadConfig()
    network = Network(config, head, settings["classes"], Broyden(steps=settings["broyden_steps"], tolerance=0))
    state = {k.removeprefix("state/"): torch.from_numpy(data[k]) for k in data.files if k.startswith("state/")}
    network.load_state_dict(rename(state))
    return data, network.double().eval()


def test_numbers_of_the_published_code(reference):
    data, network = reference
    image = torch.from_numpy(data["input"])
    n = len(network.backbone.config.channels)
    with torch.no_grad():
        assert relative_error(network.backbone.inject(image), data["injection"]) < 1e-6

        f, z0, scales = network.backbone.fixed_point_problem(image)
        z = scales.flatten([torch.from_numpy(data[f"z/{i}"]) for i in range(n)])
        for i, ours in enumerate(scales.split(f(z))):
            assert relative_error(ours, data[f"f_z/{i}"]) < 1e-6

        visited = []
        solution = network.backbone.forward_solver(lambda z: visited.append(z) or f(z), z0)
        assert solution.nfe == 19
        # the published residual adds 1e-9 to |f(z)|, and its iterate is the last, ours the best
        assert relative_error(solution.trace, data["broyden_relative_residual"]) < 1e-6
        last = scales.split(visited[-1])
        for i in range(n):
            assert relative_error(last[i], data[f"broyden/{i}"]) < 1e-6
        assert relative_error(network.head(last), data["logits"]) < 1e-6


def test_unknown_names_are_listed():
    with pytest.raises(KeyError, match=r"mystery\.weight, other\.bias"):
        rename({"stage0.0.weight": torch.zeros(1), "mystery.weight": torch.zeros(1), "other.bias": torch.zeros(1)})


def test_the_older_release_wrappers_and_repetitions(reference):
    data, network = reference
    state = {k.removeprefix("state/"): torch.from_numpy(data[k]) for k in data.files if k.startswith("state/")}
    inner = {k.removeprefix("fullstage."): v for k, v in state.items() if k.startswith("fullstage.")}
    older = dict(state)
    older |= {f"deq.func.{k}": v for k, v in inner.items()}
    older |= {f"{copy}.{k}": v + 1 for k, v in inner.items() for copy in ("fullstage_copy", "deq.func_copy")}
    wrapped = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in older.items()}, "optimizer": {}}
    expected = rename(state)
    found = rename(state_dict(wrapped))
    assert found.keys() == expected.keys() == network.state_dict().keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    spoilt = next(k for k in older if k.startswith("deq.func."))
    with pytest.raises(ValueError, match=spoilt):
        rename(older | {spoilt: older[spoilt] + 1})


def test_parameter_counts_of_the_published_code():
    def count(config, head, classes):
        return sum(p.numel() for p in Network(config, head, classes).parameters())

    small = ClassificationHeadConfig((8, 16), 200)
    assert count(MDEQConfig(channels=(24, 24)), small, 10) == 158_890
    imagenet = MDEQConfig(channels=(32, 64, 128, 256), downsamplings=2, post_fusion_affine=True)
    assert count(imagenet, ClassificationHeadConfig((24, 48, 96, 192), 2048), 1000) == 16_808_936
    assert count(imagenet, SegmentationHeadConfig(), 19) == 8_968_467
