"""The paper's tables and figures as data: what the report puts beside ours.

Bai, Koltun and Kolter, *Multiscale Deep Equilibrium Models*, NeurIPS 2020. Every row of Tables 1-3 is here,
with the numbers as printed. The bars of Figure 4b and the curves of Figures 4a and 5 are printed as pictures
only; of them the numbers that the text states are kept, with the sentence's section.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """A printed number, and its standard deviation where the paper prints one."""

    value: float
    std: float | None = None


@dataclass(frozen=True)
class Row:
    """One system of a table.

    ``model`` names the stage instance that reproduces the row, None where nothing here does: ``missing`` says why;
    ``cited`` is the system's place in the paper's references; ``differs`` says what of ours is not the cited system's.
    """

    system: str
    size: str
    values: tuple[Number, ...]
    group: str = ""
    backbone: str = ""
    cited: str = ""
    model: str | None = None
    missing: str = ""
    differs: str = ""
    implicit: bool = False


@dataclass(frozen=True)
class Table:
    """One table: its place, its measures (printed heading, metric key), the stage that trains, its rows."""

    number: int
    section: str
    title: str
    dataset: str
    stage: str
    measures: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    note: str = ""


@dataclass(frozen=True)
class Statement:
    """A number that the text gives for a figure, and where."""

    what: str
    value: float
    place: str


def _one(value: float, std: float | None = None) -> tuple[Number, ...]:
    return (Number(value, std),)


def _two(top1: float, top5: float) -> tuple[Number, ...]:
    return (Number(top1), Number(top5))


_PLAIN = "without data augmentation"
_AUGMENTED = "with data augmentation"
_NOT_KEPT = "no library that this project reads keeps an implementation of it"

TABLE_1 = Table(
    number=1,
    section="Sec. 4.1",
    title="Evaluation on CIFAR-10",
    dataset="cifar10",
    stage="classify",
    measures=(("accuracy, %", "eval/top1"),),
    note="standard deviations over 5 runs",
    rows=(
        Row("Neural ODEs", "172K", _one(53.7, 0.2), _PLAIN, cited="[18]", model="node", implicit=True),
        Row("Aug. Neural ODEs", "172K", _one(60.6, 0.4), _PLAIN, cited="[18]", model="anode", implicit=True),
        Row(
            "Single-stream DEQ",
            "170K",
            _one(82.2, 0.3),
            _PLAIN,
            cited="[5]",
            model="single-stream",
            implicit=True,
        ),
        Row("ResNet-18", "170K", _one(81.6, 0.3), _PLAIN, cited="[26]", model="resnet18-small"),
        Row("MDEQ-small", "170K", _one(87.1, 0.4), _PLAIN, model="mdeq-small", implicit=True),
        Row(
            "ResNet-18",
            "10M",
            _one(92.9, 0.2),
            _AUGMENTED,
            cited="[26]",
            model="resnet18",
        ),
        Row("MDEQ", "10M", _one(93.8, 0.3), _AUGMENTED, model="mdeq", implicit=True),
    ),
)

TABLE_2 = Table(
    number=2,
    section="Sec. 4.2",
    title="Evaluation on ImageNet classification",
    dataset="imagenet",
    stage="pretrain",
    measures=(("top-1, %", "eval/top1"), ("top-5, %", "eval/top5")),
    note="MDEQs were trained for 100 epochs",
    rows=(
        Row("AlexNet", "238M", _two(57.0, 80.3), cited="[32]", model="alexnet"),
        Row("ResNet-18", "13M", _two(70.2, 89.9), cited="[26]", model="resnet18"),
        Row("ResNet-34", "21M", _two(74.8, 91.1), cited="[26]", model="resnet34"),
        Row("Inception-V2", "12M", _two(74.8, 92.2), cited="[29]", missing=_NOT_KEPT),
        Row("ResNet-50", "26M", _two(75.1, 92.5), cited="[26]", model="resnet50"),
        Row("HRNet-W18-C", "21M", _two(76.8, 93.4), cited="[57]", model="hrnet-w18"),
        Row(
            "Single-stream DEQ + global pool",
            "18M",
            _two(72.9, 91.0),
            cited="[5]",
            model="single-stream",
            implicit=True,
        ),
        Row("MDEQ-small", "18M", _two(75.5, 92.7), model="mdeq-small", implicit=True),
        Row("ResNet-101", "52M", _two(77.1, 93.5), cited="[26]", model="resnet101"),
        Row("W-ResNet-50", "69M", _two(78.1, 93.9), cited="[63]", model="wide-resnet50"),
        Row("DenseNet-264", "74M", _two(79.7, 94.8), cited="[27]", model="densenet264"),
        Row("MDEQ-large", "63M", _two(77.5, 93.6), model="mdeq-large", implicit=True),
        Row(
            "Unrolled 5-layer MDEQ-large",
            "63M",
            _two(75.9, 93.0),
            model="mdeq-large-unrolled",
        ),
        Row("MDEQ-XL", "81M", _two(79.2, 94.5), model="mdeq-xl", implicit=True),
    ),
)

TABLE_3 = Table(
    number=3,
    section="Sec. 4.3",
    title="Evaluation on Cityscapes val semantic segmentation",
    dataset="cityscapes",
    stage="finetune",
    measures=(("mIoU, %", "eval/miou"),),
    note="single scale, no flipping; * marks the state of the art when the paper was written",
    rows=(
        Row("ResNet-18-A", "3.8M", _one(55.4), backbone="ResNet-18", cited="[40]", missing=_NOT_KEPT),
        Row("ResNet-18-B", "15.24M", _one(69.1), backbone="ResNet-18", cited="[40]", missing=_NOT_KEPT),
        Row(
            "MobileNetV2Plus",
            "8.3M",
            _one(74.5),
            backbone="MobileNetV2",
            cited="[48]",
            model="mobilenetv2",
            differs="ours: smp's DeepLabv3+ on MobileNetV2",
        ),
        Row("GSCNN", "–", _one(73.0), backbone="ResNet-50", cited="[55]", missing=_NOT_KEPT),
        Row("HRNetV2-W18-Small-v2*", "4.0M", _one(76.0), backbone="HRNet", cited="[57]", model="hrnet-w18"),
        Row("MDEQ-small", "7.8M", _one(75.1), backbone="MDEQ", model="mdeq-small", implicit=True),
        Row(
            "U-Net++",
            "59.5M",
            _one(75.5),
            backbone="ResNet-101",
            cited="[66]",
            model="unetplusplus",
            differs="ours: smp's",
        ),
        Row(
            "Dilated-ResNet",
            "52.1M",
            _one(75.7),
            backbone="D-ResNet-101",
            cited="[62]",
            model="dilated-resnet",
            differs="ours: torchvision's FCN on a dilated ResNet",
        ),
        Row(
            "PSPNet",
            "65.9M",
            _one(78.4),
            backbone="D-ResNet-101",
            cited="[64]",
            model="pspnet",
            differs="ours: smp's, its ResNet not dilated",
        ),
        Row(
            "DeepLabv3",
            "58.0M",
            _one(78.5),
            backbone="D-ResNet-101",
            cited="[9]",
            model="deeplabv3",
            differs="ours: torchvision's",
        ),
        Row("PSANet", "–", _one(78.6), backbone="ResNet-101", cited="[65]", missing=_NOT_KEPT),
        Row("HRNetV2-W48*", "65.9M", _one(81.1), backbone="HRNet", cited="[57]", model="hrnet-w48"),
        Row("MDEQ-large", "53.0M", _one(77.8), backbone="MDEQ", model="mdeq-large", implicit=True),
        Row("MDEQ-XL", "70.9M", _one(80.3), backbone="MDEQ", model="mdeq-xl", implicit=True),
    ),
)

TABLES = (TABLE_1, TABLE_2, TABLE_3)

FIGURE_4B = (
    Statement("time of a training step of MDEQ, relative to ResNet-101", 2.7, "Sec. 4.4"),
    Statement("memory of training MDEQ, relative to explicit models: at most", 0.4, "Sec. 4.4"),
    Statement("milliseconds of a ResNet-101 step (batch 32, one RTX 2080 Ti): about", 150.0, "Sec. 4.4"),
    Statement("GB of training a large MDEQ on ImageNet: about", 6.0, "Sec. 4.4"),
    Statement("speed of MDEQ-small, relative to an augmented neural ODE of its size", 3.0, "Sec. 4.4"),
)
"""What Sec. 4.4 states of Figure 4b ("saves more than 60%" of the memory is the 0.4)."""

FIGURE_4B_RELATIVE = {"mdeq": {"time": "2.7", "memory": "< 0.4"}, "resnet101": {"time": "1", "memory": "1"}}
"""Of those, what is relative to ResNet-101 and may stand beside ours, as printed."""

FIGURE_4A = "Figure 4a: test accuracy as a function of training epochs, CIFAR-10 (Sec. 4.1)"
FIGURE_5 = (
    "Figure 5: |z[k+1] - z[k]| / |z[k]| by the number of evaluations of f; Broyden (blue) against "
    "iterating f (yellow); standard deviation over 5 random batches (Sec. 4.5)"
)
FIGURE_5_SCALES = "Appendix B.2: the residual of each scale in Broyden's method, the highest resolution first"
FIGURE_5_TRAINING = (
    "Appendix B.2: how well the equilibria of the validation are found after 2, 4, 8, ... evaluations of f"
)

ABLATIONS = (
    (
        "Dropout in f, Sec. 3.3: the same mask at all evaluations of a solve",
        ("ablation-variational-dropout", "ablation-conventional-dropout", "ablation-no-dropout"),
    ),
    ("The equilibrium against one application of f", ("ablation-one-application",)),
    ("Length of the unrolled warm-up", ("ablation-no-warm-up", "ablation-long-warm-up")),
    ("Softplus for the last ReLUs during the warm-up, Sec. 3.3", ("ablation-softplus",)),
)
"""What the paper argues in words, and the models of ``classify`` that differ in it alone from ``ABLATED``."""

ABLATED = "mdeq-small"
