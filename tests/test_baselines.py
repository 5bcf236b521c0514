"""The explicit baselines: their sizes, shapes, and that they learn."""

from __future__ import annotations

import pytest
import torch

from mdeq.baselines import NarrowResNet18, ResNetConfig


@pytest.mark.parametrize(("width", "low", "high"), [(8, 165e3, 180e3), (64, 10e6, 12e6)])
def test_parameters_are_those_of_the_paper(width: int, low: float, high: float) -> None:
    network = NarrowResNet18(ResNetConfig(width), 10)
    assert low < sum(p.numel() for p in network.parameters()) < high


def test_any_image_size_and_no_equilibrium() -> None:
    network = NarrowResNet18(ResNetConfig(4), 7).eval()
    for size in ((32, 32), (45, 60)):
        prediction = network(torch.randn(2, 3, *size))
        assert prediction.logits.shape == (2, 7)
        assert prediction.equilibrium is None


def test_a_prediction_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    network = NarrowResNet18(ResNetConfig(4), 5).double().eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network(images).logits[:1], network(images[:1]).logits)


def test_it_fits_a_few_images() -> None:
    torch.manual_seed(0)
    network = NarrowResNet18(ResNetConfig(4), 4)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(network(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="width"):
        ResNetConfig(0)
