"""Pictures drawn with OpenCV and written in the real formats of the three data sets, as a function of a seed.

They stand in for data that a user may not have: a network learns them in minutes, a linear model does not. Kinds of
objects differ in shape; colours, place, size and direction vary. Streets are seen through a pinhole camera and carry
Cityscapes' label and instance ids.
"""

from __future__ import annotations

import colorsys
import io
import json
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from cityscapesscripts.helpers.labels import name2label

from pipeline.data.archives import fresh, replace
from pipeline.data.cifar10 import BATCHES, CLASSES, FOLDER, META
from pipeline.data.manifest import fault
from pipeline.files import digest, file_digest
from pipeline.progress import track

if TYPE_CHECKING:
    from pipeline.settings import GeneratedCifar10, GeneratedCityscapes, GeneratedImageNet

Array = np.ndarray
Rng = np.random.Generator
File = tuple[str, bytes]  # its path, its content
Thing = tuple[Any, ...]  # how far off it is, what draws it, and the arguments
TEXT = Path(__file__).with_name("drawings.txt")
NOTE = ".generated.json"
WNIDS = {  # the ImageNet classes nearest to the ten objects
    "n01558993": "bird", "n01644373": "frog", "n02099601": "dog", "n02123045": "cat", "n02389026": "horse",
    "n02422106": "deer", "n02690373": "airplane", "n03095699": "ship", "n04285008": "automobile",
    "n04467665": "truck",
}  # fmt: skip
CITIES = {"train": ("aachen", "bremen", "jena", "ulm", "zurich"), "val": ("frankfurt", "lindau")}
FINE = 2  # pictures are drawn this many times larger, then shrunk
ANGLES = np.linspace(0, 2 * np.pi, 24, endpoint=False)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
PAINTS = {
    name: [np.array(list(bytes.fromhex(colour)), np.float64) for colour in colours.split()]
    for name, colours in {
        "asphalt": "56565a 626266 4a4a50", "paving": "b0a090 a89ca0 bcac98", "grass": "8a9a4c 7c9444 96a458",
        "sky": "8cb8e8 a8c8ec c4d8ec", "brick": "a05a46 b06a50 8c5446 c08a70", "stone": "d0c8b4 c4bca0 dcd4c4",
        "wood": "6e4a30 5c3e2a 7c5638", "leaves": "2e5a2a 3a6a30 264e2c", "bark": "4a3828", "pane": "3c4a60 50607a",
        "coat": "b22222 1e50a0 e8e8e4 2c2c34 d8b020 287850 d26428 8060a0", "second": "303848 5a4a3c 22304c",
        "skin": "e0b496 b08060 6e4c38", "hair": "3a2a1e 6a4a2a 1c1a1a", "helmet": "e8e8e0 d02828 e0c020",
        "frame": "d02828 28a0a0 d8d8d8", "tank": "38383c 7a1c1c 1c2c5c", "metal": "909498 a4a8ac 80848a",
        "rim": "c01e28 1e46b0", "face": "f0f0ea e8d048", "case": "202420", "bin": "44584a 505a60",
        "cargo": "dcdcd8 c8ccd4 e4e0cc", "bus": "e0a018 e8b428 d88c18", "tram": "b8283c 1c7c60 a82450",
        "glass": "343e4c 465262", "dark": "1a1a1c", "white": "e4e4dc", "lamp": "f0ecc8", "red": "f03228",
        "amber": "fabe32", "green": "3cdc78",
    }.items()
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """An outline to fill or, if `line` is not 0, a line that thick; what it is called on a street, and its paint."""

    label: str
    paint: str
    points: Array
    line: float


def _parts(text: str) -> dict[str, list[Part]]:
    """The drawings in a text of the form that drawings.txt explains."""
    drawings: dict[str, list[Part]] = {}
    name = label = ""
    for line in text.splitlines():
        if not line.startswith("    "):
            name, label = line, ""
            continue
        for words in line.split(";"):
            before, colon, rest = words.rpartition(":")
            label = before.strip() if colon else label
            drawings.setdefault(name, []).extend(_part(label, *rest.split()))
    return drawings


def _part(label: str, paint: str, shape: str, *pairs: str) -> list[Part]:
    points = np.array([pair.split(",") for pair in pairs]).astype(np.float64)
    kind = shape.removesuffix("+")
    line = float(kind[4:] or 0) if kind.startswith("line") else 0.0
    if kind == "blob":
        points = _smooth(points)
    elif kind == "box":
        points = box(*points[0], *points[1])
    elif kind == "disc":
        points = points[0] + points[1] * CIRCLE
    sides = (1, -1) if shape.endswith("+") else (1,)
    return [Part(label, paint, points * (side, 1), line) for side in sides]


def _smooth(points: Array) -> Array:
    """A closed Catmull-Rom curve through points."""
    p0, p1, p2, p3 = (np.roll(points, shift, 0)[:, None] for shift in (1, 0, -1, -2))
    t = np.linspace(0, 1, 6, endpoint=False)[:, None]
    square, cube = 2 * p0 - 5 * p1 + 4 * p2 - p3, 3 * p1 - p0 - 3 * p2 + p3
    return ((2 * p1 + (p2 - p0) * t + square * t**2 + cube * t**3) / 2).reshape(-1, 2)


def box(left: float, low: float, right: float, high: float) -> Array:
    return np.array([(left, low), (right, low), (right, high), (left, high)])


DRAWINGS = _parts(TEXT.read_text(encoding="utf-8"))


class Canvas:
    """What is drawn, from far to near: colours (H, W, 3) uint8, and Cityscapes' instance ids (H, W) uint16."""

    def __init__(self, rng: Rng, height: int, width: int) -> None:
        self.rng = rng
        self.height, self.width = height * FINE, width * FINE
        self.paint = np.zeros((self.height, self.width, 3), np.uint8)
        self.ids = np.zeros((self.height, self.width), np.uint16)

    def put(
        self, points: Array, colour: Array, label: int | None = None, line: float = 0.0
    ) -> None:
        """Fills an outline (N, 2) in pixels, or draws a line that thick; without a label the one below stays."""
        outline = [(points * 8).round().clip(-(2**18), 2**18).astype(np.int32)]
        for layer, value in ((self.paint, colour.clip(0, 255).tolist()), (self.ids, label)):
            if value is None:
                continue
            if line:
                cv2.polylines(layer, outline, False, value, max(1, round(line)), cv2.LINE_8, 3)
            else:
                cv2.fillPoly(layer, outline, value, cv2.LINE_8, 3)

    def choose(self, paint: str, spread: float = 8.0) -> Array:
        """A colour near one of a palette's."""
        colours = PAINTS[paint]
        return colours[self.rng.integers(len(colours))] + self.rng.normal(0, spread, 3)

    def seen(self) -> Array:
        """The picture (H, W, 3) uint8 under light that varies, with the sensor's noise."""
        size = (self.width // FINE, self.height // FINE)
        picture = cv2.resize(self.paint, size, interpolation=cv2.INTER_AREA).astype(np.float64)
        across = np.linspace(-1, 1, size[0])[:, None]
        light = self.rng.uniform(0.8, 1.15) * (1 + self.rng.uniform(-0.12, 0.12) * across)
        noise = self.rng.normal(0, 3, picture.shape)
        return (picture * light + noise).clip(0, 255).astype(np.uint8)


# ---- objects


def photo(rng: Rng, kind: str, height: int, width: int) -> Array:
    """A picture (height, width, 3), RGB uint8, of an object of `kind`: dark on a light ground, or light on a dark one."""
    canvas = Canvas(rng, height, width)
    short = min(canvas.height, canvas.width)
    pale, strong = ((0.05, 0.75), (0.3, 1.0)), ((0.4, 0.2), (0.9, 0.6))
    ground, thing = (pale, strong) if rng.random() < 0.5 else (strong, pale)
    far, near = _colour(rng, ground), _colour(rng, ground)
    canvas.paint[:] = far
    canvas.paint[int(canvas.height * rng.uniform(0.5, 0.9)) :] = near
    for _ in range(rng.integers(0, 3)):  # out of focus
        spot = CIRCLE * rng.uniform(0.03, 0.14, 2) + rng.uniform(0, 1, 2)
        canvas.put(spot * (canvas.width, canvas.height), _colour(rng, ground))
    canvas.paint[:] = cv2.GaussianBlur(canvas.paint, (0, 0), short / 60)
    coat, second = _apart(rng, thing, far, near), _colour(rng, thing)
    paints = {"coat": coat, "second": second, "far": coat * 0.65, "dark": coat * 0.15}
    paints["glass"] = np.full(3, 235.0)
    size = short / 2 * rng.uniform(0.7, 0.9)
    centre = np.array([canvas.width, canvas.height]) / 2 * rng.uniform(0.75, 1.25, 2)
    turn, side = rng.uniform(-0.15, 0.15), rng.choice((-1, 1))
    right, down = (np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))
    frame = size * np.array([np.multiply(side, right), down])
    for part in DRAWINGS[kind]:
        canvas.put(part.points @ frame + centre, paints[part.paint], None, part.line * size)
    return canvas.seen()


def _colour(rng: Rng, ranges: tuple[tuple[float, float], tuple[float, float]]) -> Array:
    """Any hue, with saturation and value between two pairs of bounds."""
    saturation, value = rng.uniform(*ranges)
    return np.array(colorsys.hsv_to_rgb(rng.random(), saturation, value)) * 255


def _apart(rng: Rng, ranges: tuple[Any, Any], *others: Array) -> Array:
    """Of a few colours the one farthest from the nearest of others."""
    colours = [_colour(rng, ranges) for _ in range(5)]
    return max(colours, key=lambda own: min(np.abs(own - other).sum() for other in others))


# ---- streets


IDS = {name: label.id for name, label in name2label.items()}
COUNTED = {label.id for label in name2label.values() if label.hasInstances}
VEHICLES = (
    ("tram", 0.3),
    ("truck end", 0.35),
    ("bus", 0.35),
    ("car", 0.6),
    ("car", 0.6),
    ("car", 0.5),
)
WHEELS = ("cyclist", "bicycle", "motorcycle", "motorcyclist")
POLES = ("sign", "triangle", "light", "lamp", "sign", "light", "bin")
FAR = 60.0  # metres


def street(rng: Rng, height: int, width: int) -> tuple[Array, Array]:
    """A street scene (height, width, 3) RGB uint8, and its instance ids (height, width) uint16 as Cityscapes has them.

    An instance id is a label id, or 1000 of them and the instance's number.
    """
    street = Street(rng, height, width)
    street.backdrop()
    things = [*street.sides(), *street.traffic(), *street.pavement()]
    for _, draw, *arguments in sorted(things, key=lambda thing: -thing[0]):
        draw(*arguments)
    street.bonnet()
    return street.seen(), np.ascontiguousarray(street.ids[::FINE, ::FINE])


class Street(Canvas):
    """A canvas with its camera and plan: road, parking, pavement and green end at `edges`, in metres on either side."""

    def __init__(self, rng: Rng, height: int, width: int) -> None:
        super().__init__(rng, height, width)
        self.focal = self.width * rng.uniform(0.5, 0.65)
        self.eye = rng.uniform(1.4, 2.0)
        self.middle = self.width * rng.uniform(0.42, 0.58)
        self.horizon = self.height * rng.uniform(0.36, 0.48)
        road, parking, pavement, green = rng.uniform((3.6, 0.0, 2.0, 1.0), (5.0, 1.5, 3.2, 3.0))
        self.edges = np.cumsum([road, parking, pavement, green])
        self.instances = 0

    def at(self, x: Array | float, y: Array | float, z: Array | float) -> Array:
        """The pixels (..., 2) of points x metres to the right, y up, z ahead."""
        u = self.middle + self.focal * np.asarray(x) / z
        v = self.horizon + self.focal * (self.eye - np.asarray(y)) / z
        return np.stack(np.broadcast_arrays(u, v), -1)

    def surface(
        self, label: str, paint: Array, x: Array, y: Array, z: Array, line: float = 0.0
    ) -> None:
        self.put(self.at(x, y, z), paint, IDS[label], line)

    def figure(self, name: str, x: float, z: float, scale: float = 1.0) -> None:
        """Draws a thing that faces us; each of its labels is an instance where Cityscapes counts them."""
        self.instances += 1
        paints: dict[str, Array] = {}
        mirror = self.rng.choice((-1, 1))
        for part in DRAWINGS[name]:
            if part.paint not in paints:
                paints[part.paint] = self.choose("coat" if part.paint == "far" else part.paint)
            label = IDS[part.label]
            number = label * 1000 + self.instances if label in COUNTED else label
            points = self.at(x + part.points[:, 0] * mirror * scale, part.points[:, 1] * scale, z)
            self.put(points, paints[part.paint], number, part.line * scale * self.focal / z)

    def backdrop(self) -> None:
        """Sky, a skyline of trees and houses, and the ground."""
        low = int(self.horizon) + 1
        ramp = np.linspace(0.8, 1.15, low)[:, None, None]
        self.paint[:low], self.ids[:low] = (self.choose("sky") * ramp).clip(0, 255), IDS["sky"]
        for x in np.arange(-FAR, FAR, 7.0):
            if self.rng.random() < 0.5:
                self.leaves(x, 1.5, FAR, 5.0)
            else:
                self.panel(
                    "building", self.choose("brick"), (x, x + 8), self.rng.uniform(3, 9), (FAR, FAR)
                )
        self.paint[low:], self.ids[low:] = self.choose("grass"), IDS["terrain"]
        asphalt = self.choose("asphalt")
        depths = np.geomspace(1.0, FAR * 3, 2)
        road, parking, pavement, _ = self.edges
        grounds = (
            ("sidewalk", pavement, self.choose("paving")),
            ("parking", parking, asphalt * 1.2),
            ("road", road, asphalt),
        )
        for label, reach, paint in grounds:
            x = np.array([-reach, reach, reach, -reach])
            self.surface(label, paint, x, np.zeros(4), depths[[0, 0, 1, 1]])
        white = self.choose("white")
        for z in np.arange(2.0, FAR, 6.0):
            self.put(
                self.at(np.array([-0.1, 0.1, 0.1, -0.1]), 0.0, np.array([z, z, z + 3, z + 3])),
                white,
            )

    def panel(
        self, label: str, paint: Array, x: tuple[float, float], top: float, z: tuple[float, float]
    ) -> None:
        """An upright rectangle on the ground from (x[0], z[0]) to (x[1], z[1])."""
        corners = np.array([0, 1, 1, 0])
        self.surface(
            label, paint, np.array(x)[corners], np.array([0, 0, top, top]), np.array(z)[corners]
        )

    def sides(self):
        """Houses, walls, fences and trees along both sides, from far to near."""
        for side in (-1, 1):
            z = 2.0
            while z < FAR:
                length = self.rng.uniform(5, 12)
                draw = self.rng.choice(
                    [self.house, self.wall, self.fence, self.trees], p=(0.4, 0.2, 0.2, 0.2)
                )
                yield z + length, draw, side * self.edges[3], z, z + length
                z += length

    def house(self, x: float, near: float, far: float) -> None:
        brick, pane, top = self.choose("brick"), self.choose("pane"), self.rng.uniform(6, 16)
        self.panel("building", brick * 0.8, (x, x + np.sign(x) * 12), top, (near, near))
        self.panel("building", brick, (x, x), top, (near, far))
        for low in np.arange(1.0, top - 1.5, 3.0):
            for z in np.arange(near + 0.6, far - 1.2, 2.2):
                corners = np.array([z, z + 1.2, z + 1.2, z])
                self.put(self.at(x, low + np.array([0, 0, 1.6, 1.6]), corners), pane)

    def wall(self, x: float, near: float, far: float) -> None:
        stone, top = self.choose("stone"), self.rng.uniform(2.0, 3.2)
        self.panel("wall", stone * 0.85, (x, x + np.sign(x) * 1), top, (near, near))
        self.panel("wall", stone, (x, x), top, (near, far))
        for y in np.arange(0.5, top, 0.5):
            self.put(
                self.at(x, y, np.array([near, far])), stone * 0.75, None, 0.04 * self.focal / near
            )

    def fence(self, x: float, near: float, far: float) -> None:
        wood, top = self.choose("wood"), self.rng.uniform(1.4, 2.0)
        self.panel("fence", wood * 0.6, (x, x), top, (near, far))
        for z in np.arange(near, far, 0.7):
            self.put(
                self.at(x, np.array([0.0, top]), z), wood * 1.3, IDS["fence"], 0.3 * self.focal / z
            )

    def trees(self, x: float, near: float, far: float) -> None:
        for z in np.arange(far, near, -2.5):
            self.surface(
                "vegetation", self.choose("bark"), x, np.array([0.0, 3.0]), z, 0.3 * self.focal / z
            )
            self.leaves(x, self.rng.uniform(2.5, 4.5), z, 2.2)
            self.leaves(x + np.sign(x) * 2, 1.0, z, 1.5)

    def leaves(self, x: float, y: float, z: float, size: float) -> None:
        """A crown of leaves, lighter above."""
        green = self.choose("leaves")
        for _ in range(12):
            dx, dy = self.rng.normal(0, 0.35 * size, 2)
            tone = green * (1.0 + 0.3 * dy / size)
            blob = CIRCLE * self.rng.uniform(0.25, 0.5) * size
            self.surface(
                "vegetation", tone, x + dx + blob[:, 0], np.maximum(0, y + dy + blob[:, 1]), z
            )

    def traffic(self):
        """Vehicles on the two lanes, and what has two wheels beside them."""
        road = self.edges[0]
        free = self.rng.uniform(6, 9, 2)
        for index in self.rng.permutation(len(VEHICLES)):
            name, chance = VEHICLES[index]
            if self.rng.random() < chance:
                lane = self.rng.integers(2)
                x = (lane - 0.5) * road + self.rng.uniform(-0.3, 0.3)
                yield free[lane], self.figure, name, x, free[lane]
                free[lane] += self.rng.uniform(5, 9)
        for name in WHEELS:
            if self.rng.random() < 0.6:
                x = self.rng.choice((-1, 1)) * (road - self.rng.uniform(0.2, 0.6))
                z = self.rng.uniform(4.5, 12)
                yield z, self.figure, name, x, z, 1.15

    def pavement(self):
        """People, signs, lights, lamps and bins."""
        _, parking, pavement, _ = self.edges
        for side in (-1, 1):
            for z in np.cumsum(self.rng.uniform(2.5, 6, 5)) + 2.5:
                yield z, self.figure, str(self.rng.choice(POLES)), side * (parking + 0.4), z
            for z in self.rng.uniform(4, 14, self.rng.integers(1, 4)):
                yield (
                    z,
                    self.figure,
                    "walker",
                    side * self.rng.uniform(parking + 0.8, pavement),
                    z,
                    self.rng.uniform(0.9, 1.1),
                )

    def bonnet(self) -> None:
        """Mostly, our own car along the lower edge, which is not evaluated."""
        if self.rng.random() < 0.6:
            outline = (0.5, 1.02) + CIRCLE * (0.5, 0.07)
            self.put(outline * (self.width, self.height), self.choose("coat"), IDS["ego vehicle"])


# ---- the three sets


def _cifar10(params: GeneratedCifar10) -> Iterator[File]:
    rng = np.random.default_rng((params.seed, 1))
    train, test = (rng.permutation(np.arange(count) % 10) for count in (params.train, params.test))
    parts = [*np.array_split(train, 5), test]
    first = 0
    for (name, split), labels in zip(BATCHES.items(), parts, strict=True):
        title = f"training batch {name[-1]} of 5" if split == "train" else "testing batch 1 of 1"
        kinds = [(i, CLASSES[label]) for i, label in enumerate(labels, first)]
        pictures = [
            photo(np.random.default_rng((params.seed, 0, i)), kind, 32, 32) for i, kind in kinds
        ]
        batch = {
            b"batch_label": title.encode(),
            b"labels": labels.tolist(),
            b"data": np.stack(pictures).transpose(0, 3, 1, 2).reshape(len(labels), -1),
            b"filenames": [f"{kind}_s_{i:06d}.png".encode() for i, kind in kinds],
        }
        yield f"{FOLDER}/{name}", python2_pickle(batch)
        first += len(labels)
    names = [name.encode() for name in CLASSES]
    meta = {b"num_cases_per_batch": len(parts[0]), b"label_names": names, b"num_vis": 3072}
    yield META, python2_pickle(meta)


def _imagenet(params: GeneratedImageNet) -> Iterator[File]:
    train, val = params.train_per_class, params.val_per_class
    for label, (wnid, kind) in enumerate(list(WNIDS.items())[: params.classes]):
        paths = [f"train/{wnid}/{wnid}_{i}.JPEG" for i in range(train)]
        paths += [f"val/{wnid}/ILSVRC2012_val_{label * val + i + 1:08d}.JPEG" for i in range(val)]
        for i, path in enumerate(paths):
            rng = np.random.default_rng((params.seed, label, i))
            height, width = rng.integers(96, 193, 2).tolist()
            picture = photo(rng, kind, height, width)
            code = cv2.COLOR_RGB2GRAY if rng.random() < 0.05 else cv2.COLOR_RGB2BGR
            yield path, cv2.imencode(".jpg", cv2.cvtColor(picture, code))[1].tobytes()


def _cityscapes(params: GeneratedCityscapes) -> Iterator[File]:
    index = 0
    for split, count in (("train", params.train), ("val", params.val)):
        cities = CITIES[split]
        for i in range(count):
            city = cities[i * len(cities) // count]
            stem = f"{split}/{city}/{city}_{i:06d}_000019"
            rng = np.random.default_rng((params.seed, index))
            picture, ids = street(rng, params.height, params.width)
            labels = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
            for path, image in (
                (f"leftImg8bit/{stem}_leftImg8bit.png", picture[..., ::-1]),
                (f"gtFine/{stem}_gtFine_labelIds.png", labels),
                (f"gtFine/{stem}_gtFine_instanceIds.png", ids),
            ):
                yield path, cv2.imencode(".png", image)[1].tobytes()
            index += 1


DRAWN: dict[str, Callable[[Any], Iterator[File]]] = {
    "cifar10": _cifar10,
    "imagenet": _imagenet,
    "cityscapes": _cityscapes,
}


def python2_pickle(value: object) -> bytes:
    """`value` pickled with its byte strings as Python 2's str, as CIFAR-10's files are."""
    file = io.BytesIO()
    _Python2(file, 2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.", 1)  # a module of NumPy 2


class _Python2(pickle._Pickler):
    def _save_str(self, value: bytes) -> None:
        self.write(b"T" + struct.pack("<i", len(value)) + value)  # type: ignore[attr-defined]

    dispatch = {**pickle._Pickler.dispatch, bytes: _save_str}  # type: ignore[assignment]


# ---- on disk


def ensure(
    root: Path, name: str, params: GeneratedCifar10 | GeneratedImageNet | GeneratedCityscapes
) -> None:
    """Draws the set `name` into the folder `root` unless it lies there whole and unchanged; never over other data.

    Raises:
        UserError: `root` holds files that were not drawn.
    """
    code = [file_digest(Path(__file__)), file_digest(TEXT)]  # other code, other pictures
    recipe = {"set": name, "params": asdict(params), "code": code}
    new = fresh(root)
    present = {
        path.relative_to(root).as_posix(): path for path in root.rglob("*") if not path.is_dir()
    }
    note = present.pop(NOTE, None)
    drawn = _read(note) if note else {}
    for path in sorted(present.keys() - drawn.get("files", {}).keys()):
        if note is None or drawn:
            raise fault(
                root / path,
                f"not drawn here; move it out of {root}, or set prepare.{name}.source to folder to use your own data",
            )
    if drawn.get("recipe") == recipe and drawn["files"] == {
        path: _stamp(file) for path, file in present.items()
    }:
        return
    stamps = {}
    for path, content in track(DRAWN[name](params), f"Drawing {name}"):
        file = new / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        stamps[path] = _stamp(file)
    body = json.dumps({"recipe": recipe, "files": stamps})
    (new / NOTE).write_text(digest(body.encode()) + body)
    replace(root)


def _read(note: Path) -> dict[str, Any]:
    """What was drawn; nothing if the note is damaged."""
    content = note.read_bytes()
    if digest(content[32:]).encode() != content[:32]:
        return {}
    return json.loads(content[32:])


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
