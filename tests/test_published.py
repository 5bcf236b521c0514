"""Ours, loaded with published weights, gives the published code's numbers.

`reference/*.npz` hold weights, inputs and float64 results of the authors' code: figures, not code.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mdeq import Broyden, ClassificationHeadConfig, MDEQConfig, Network, SegmentationHeadConfig
from mdeq.published import convert

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
        head = ClassificationHeadConfig(
            tuple(settings["head_channels"]), settings["final_channels"]
        )
    else:
        head = SegmentationHeadConfig()
    network = Network(
        config, head, settings["classes"], Broyden(steps=settings["broyden_steps"], tolerance=0)
    )
    network.load_state_dict(convert(state_of(data))[0])
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


def state_of(data) -> dict[str, torch.Tensor]:
    prefix = "state/"
    names = [name for name in data.files if name.startswith(prefix)]
    return {name.removeprefix(prefix): torch.from_numpy(data[name]) for name in names}


def older(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The older release's repetitions of f_theta, and the copies that lag a step behind."""
    repeated = dict(state)
    for name, value in state.items():
        if name.startswith("fullstage."):
            inner = name.removeprefix("fullstage.")
            repeated[f"deq.func.{inner}"] = value
            repeated[f"fullstage_copy.{inner}"] = repeated[f"deq.func_copy.{inner}"] = value + 1
    return repeated


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "model.module."])
@pytest.mark.parametrize("release", [dict, older])
def test_wrappers_and_repetitions_of_both_releases(reference, release, prefix):
    """What the authors' two trainers write: bare, in DataParallel, in FullModel with its loss."""
    data, network = reference
    state, expected = release(state_of(data)), convert(state_of(data))[0]
    content = {f"{prefix}{name}": value for name, value in state.items()}
    content["loss.criterion.weight"] = torch.ones(19)
    wrapped = {"epoch": 3, "best_mIoU": 0.8, "state_dict": content, "optimizer": {"state": {}}}
    copies = [name for name in content if "_copy." in name]
    for checkpoint, beside in [(content, []), (wrapped, ["epoch", "best_mIoU", "optimizer"])]:
        found, ignored = convert(checkpoint)
        assert found.keys() == expected.keys() == network.state_dict().keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert set(ignored) == {*beside, *copies, "loss.criterion.weight"}


def test_what_does_not_fit_is_an_error(reference):
    state = older(state_of(reference[0]))
    with pytest.raises(ValueError, match=r"mystery\.weight, model\.other\.bias"):
        convert(state | {"mystery.weight": torch.zeros(1), "model.other.bias": torch.zeros(1)})
    spoilt = next(name for name in state if name.startswith("deq.func."))
    with pytest.raises(ValueError, match=f"{spoilt}: differs"):
        convert(state | {spoilt: state[spoilt] + 1})
    with pytest.raises(ValueError, match=r"stage0\.0\.weight: must be a tensor, not int"):
        convert({"stage0.0.weight": 3})


def test_parameter_counts_of_the_published_code():
    def count(config, head, classes):
        return sum(p.numel() for p in Network(config, head, classes).parameters())

    small = ClassificationHeadConfig((8, 16), 200)
    assert count(MDEQConfig(channels=(24, 24)), small, 10) == 158_890
    imagenet = MDEQConfig(channels=(32, 64, 128, 256), downsamplings=2, post_fusion_affine=True)
    assert count(imagenet, ClassificationHeadConfig((24, 48, 96, 192), 2048), 1000) == 16_808_936
    assert count(imagenet, SegmentationHeadConfig(), 19) == 8_968_467
