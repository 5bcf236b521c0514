"""The baselines: their sizes, shapes, that they learn, and a neural ODE whose solution is known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mdeq.baselines import (
    ExplicitConfig,
    NarrowResNet18,
    NeuralODE,
    NeuralODEConfig,
    ResNetConfig,
    build,
    published_accuracy,
)


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


@pytest.mark.parametrize(
    ("filters", "augmented", "published"), [(125, 0, 172_358), (64, 10, 171_799)]
)
def test_neural_odes_have_the_published_sizes(filters: int, augmented: int, published: int) -> None:
    network = NeuralODE(NeuralODEConfig(filters, augmented), 10)
    assert (
        sum(p.numel() for p in network.parameters()) == published
    )  # Dupont et al. (2019), Sec. 5.2


def test_a_linear_neural_ode_is_the_matrix_exponential() -> None:
    """dz/dt = A z has z(1) = exp(A) z(0), and a gradient in A that autograd knows."""
    torch.manual_seed(0)
    network = NeuralODE(
        NeuralODEConfig(filters=3, augmented=1, tolerance=1e-9, image=4), 2
    ).double()
    matrix = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    layer = torch.nn.Conv2d(4, 4, 1, bias=False, dtype=torch.float64)
    layer.weight.data = matrix.detach()[:, :, None, None].clone()
    network.dynamics.layers = torch.nn.Sequential(layer)
    image = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    state = torch.cat([image, torch.zeros(2, 1, 4, 4, dtype=torch.float64)], 1)
    expected = network.linear(
        torch.einsum("ij,bjhw->bihw", torch.linalg.matrix_exp(matrix), state).flatten(1)
    )
    logits = network(image).logits
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    logits[:, 0].sum().backward()
    (gradient,) = torch.autograd.grad(expected[:, 0].sum(), matrix)
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad[:, :, 0, 0], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_small_input_keeps_the_images_resolution(name: str) -> None:
    """The stem no longer divides by four: a 32 x 32 image ends as 4 x 4, not 1 x 1."""
    for small_input, side in ((True, 4), (False, 1)):
        network = build(ExplicitConfig(name, small_input=small_input), 10).eval()
        last = network.get_submodule(
            "network.features" if name == "densenet121" else "network.layer4"
        )
        sizes: list[tuple[int, ...]] = []
        last.register_forward_hook(
            lambda module, args, out, sizes=sizes: sizes.append(tuple(out.shape[2:]))
        )
        assert network(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 10)
        assert sizes == [(side, side)]


def test_other_libraries_models_have_their_published_sizes() -> None:
    """torchvision's own counts, and HRNetV2-W48's 65.9M of Table 3."""
    with torch.device("meta"):
        assert _parameters("resnet101", 1000) == 44_549_160
        assert _parameters("alexnet", 1000) == 61_100_840
        assert _parameters("wide_resnet50_2", 1000) == 68_883_240
    pytest.importorskip("timm")
    assert _parameters("hrnet_w48", 19) / 1e6 == pytest.approx(65.9, abs=0.05)


def test_a_segmentation_model_labels_pixels_and_foreign_weights_need_their_classes() -> None:
    network = build(ExplicitConfig("fcn_resnet50"), 5).eval()
    assert network(torch.zeros(1, 3, 32, 64)).logits.shape == (1, 5, 32, 64)
    with pytest.raises(ValueError, match="1000 classes, the data have 10"):
        build(ExplicitConfig("alexnet", weights="default"), 10, fetch=True)


def test_a_librarys_weights_are_taken_as_its_own_cache_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torchvision finds them under the name of their address, with nothing left to fetch."""
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = models.resnet18().state_dict()
    kept = tmp_path / "hub" / "checkpoints" / Path(models.ResNet18_Weights.IMAGENET1K_V1.url).name
    kept.parent.mkdir(parents=True)
    torch.save(theirs, kept)
    network = build(ExplicitConfig("resnet18", weights="default"), 1000, fetch=True)
    ours = network.get_submodule("network").state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_default_weights_are_those_of_the_paper_s_time() -> None:
    """The paper's rows of Table 2, not torchvision's newer recipe, four points above them."""
    pytest.importorskip("torchvision")
    paper = {"resnet50": 75.1, "resnet101": 77.1, "wide_resnet50_2": 78.1}
    for name, top1 in paper.items():
        stated = published_accuracy(ExplicitConfig(name, "default"))
        assert stated is not None and abs(stated["top1"] - top1) < 1.6
        assert stated["top5"] > stated["top1"]
    assert published_accuracy(ExplicitConfig("resnet50")) is None
    assert published_accuracy(ExplicitConfig("fcn_resnet50", "default")) is None
    assert published_accuracy(ResNetConfig()) is None


def test_a_segmentation_model_begins_with_the_older_backbone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = pytest.importorskip("torchvision.models")
    asked: list[str] = []

    def state(weights: Any, *args: Any, **options: Any) -> Any:
        asked.append(weights.name)
        return models.resnet50().state_dict()

    monkeypatch.setattr(models.ResNet50_Weights, "get_state_dict", state)
    build(ExplicitConfig("fcn_resnet50", "default"), 5, fetch=True)
    assert asked == ["IMAGENET1K_V1"]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: ResNetConfig(0), "width"),
        (lambda: NeuralODEConfig(filters=0), "filters"),
        (lambda: NeuralODEConfig(augmented=-1), "augmented"),
        (lambda: NeuralODEConfig(tolerance=0.0), "tolerance"),
        (lambda: NeuralODEConfig(image=0), "image"),
        (lambda: ExplicitConfig("vgg"), "name: must be one of 'alexnet', .*, not 'vgg'"),
        (lambda: ExplicitConfig("alexnet", "v2"), "weights"),
        (lambda: ExplicitConfig("alexnet", small_input=True), "small_input"),
    ],
)
def test_a_wrong_setting_is_an_error(make: Any, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}"):
        make()


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="timm"):
        build(ExplicitConfig("hrnet_w18"), 1000)


def _parameters(name: str, classes: int) -> int:
    return sum(p.numel() for p in build(ExplicitConfig(name), classes).parameters())
