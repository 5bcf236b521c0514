"""What reads z*: shapes, resizing as published, and which scales count."""

import pytest
import torch

from mdeq import ClassificationHeadConfig, SegmentationHeadConfig
from mdeq.heads import ClassificationHead, SegmentationHead, resize

SIZES = [(9, 13), (5, 7), (3, 4)]


def scales() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, c, *size) for c, size in zip((8, 8, 16), SIZES, strict=True)]


def test_a_class_per_image_from_all_scales():
    head = ClassificationHead(ClassificationHeadConfig((2, 4, 8), 24), (8, 8, 16), 5, 0.1).eval()
    z = [tensor.requires_grad_() for tensor in scales()]
    logits = head(z)
    logits.sum().backward()
    assert logits.shape == (2, 5) and all(tensor.grad.any() for tensor in z)


@pytest.mark.parametrize(("used", "count"), [("all", 3), ("highest", 1)])
def test_a_class_per_pixel_from_the_scales_in_use(used, count):
    head = SegmentationHead(SegmentationHeadConfig(used), (8, 8, 16), 5, 0.1).eval()
    z = [tensor.requires_grad_() for tensor in scales()]
    logits = head(z)
    logits.sum().backward()
    assert logits.shape == (2, 5, 9, 13)
    assert [tensor.grad is not None for tensor in z] == [i < count for i in range(3)]


def test_resizing_keeps_corners_and_is_linear_between():
    ramp = torch.arange(4.0)[None, None, None, :].expand(1, 1, 2, 4)
    expected = torch.linspace(0, 3, 7).expand(1, 1, 5, 7)
    torch.testing.assert_close(resize(ramp, (5, 7)), expected)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: ClassificationHeadConfig((4, 0), 16), "channels"),
        (lambda: ClassificationHeadConfig((4, 4), 0), "final_channels"),
        (lambda: SegmentationHeadConfig("lowest"), "scales"),
        (lambda: ClassificationHead(ClassificationHeadConfig((4,), 8), (8, 8), 5, 0.1), "head"),
    ],
)
def test_a_wrong_setting_is_an_error(make, key):
    with pytest.raises(ValueError, match=f"^{key}"):
        make()
