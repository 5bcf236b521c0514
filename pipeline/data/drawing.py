"""The pictures of the generated sets: photos of ten kinds of objects, and labelled street scenes.

A network learns them in minutes, a linear model does not: kinds of objects differ in shape, while
colours, place, size and direction vary. Streets are seen through a pinhole camera.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from cityscapesscripts.helpers.labels import name2label

Array = np.ndarray
Rng = np.random.Generator
TEXT = Path(__file__).with_name("drawings.txt")
FINE = 2  # pictures are drawn this many times larger, then shrunk
ANGLES = np.linspace(0, 2 * np.pi, 24, endpoint=False)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)


# ---- drawings.txt


class Part(NamedTuple):
    """An outline (N, 2) to fill or, if `line` is not 0, a line that thick."""

    label: str
    paint: str
    points: Array
    line: float


def _read(text: str) -> tuple[dict[str, list[Array]], dict[str, list[Part]]]:
    """The colours of each paint, and the drawings, in the form that the text itself explains."""
    paints: dict[str, list[Array]] = {}
    drawings: dict[str, list[Part]] = {}
    name = label = ""
    for line in text.splitlines():
        if not line.startswith("    "):
            name, label = line, ""
            continue
        for words in line.split(";"):
            before, colon, rest = words.rpartition(":")
            label = before.strip() if colon else label
            first, *others = rest.split()
            if name == "paints":
                paints[first] = [np.array(list(bytes.fromhex(colour)), float) for colour in others]
            else:
                drawings.setdefault(name, []).extend(_parts(label, first, *others))
    return paints, drawings


def _parts(label: str, paint: str, shape: str, *pairs: str) -> list[Part]:
    points = np.array([pair.split(",") for pair in pairs]).astype(float)
    kind = shape.removesuffix("+")
    line = float(kind[4:]) if kind.startswith("line") else 0.0
    if kind == "blob":
        points = _smooth(points)
    elif kind == "box":
        points = np.stack([points[[0, 1, 1, 0], 0], points[[0, 0, 1, 1], 1]], 1)
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


PAINTS, DRAWINGS = _read(TEXT.read_text(encoding="utf-8"))


class Canvas:
    """What is drawn, from far to near: colours (H, W, 3), and Cityscapes' instance ids (H, W)."""

    def __init__(self, rng: Rng, height: int, width: int) -> None:
        self.rng = rng
        self.height, self.width = height * FINE, width * FINE
        self.colours = np.zeros((self.height, self.width, 3), np.uint8)
        self.ids = np.zeros((self.height, self.width), np.uint16)

    def put(self, points: Array, colour: Array, label: int | None = None, line: float = 0) -> None:
        """Fills an outline (N, 2) in pixels, or draws a line that thick; None keeps the label."""
        outline = [(points * 8).round().clip(-(2**18), 2**18).astype(np.int32)]
        layers: list[tuple[Array, Any]] = [(self.colours, colour.clip(0, 255).tolist())]
        if label is not None:
            layers.append((self.ids, label))
        for layer, value in layers:
            if line:
                thickness = max(1, round(line))
                cv2.polylines(layer, outline, False, value, thickness, cv2.LINE_8, 3)
            else:
                cv2.fillPoly(layer, outline, value, cv2.LINE_8, 3)

    def seen(self) -> Array:
        """The picture (H, W, 3) uint8 under light that varies, with the sensor's noise."""
        size = (self.width // FINE, self.height // FINE)
        picture = cv2.resize(self.colours, size, interpolation=cv2.INTER_AREA).astype(float)
        across = np.linspace(-1, 1, size[0])[:, None]
        light = self.rng.uniform(0.8, 1.15) * (1 + self.rng.uniform(-0.12, 0.12) * across)
        noise = self.rng.normal(0, 3, picture.shape)
        return (picture * light + noise).clip(0, 255).astype(np.uint8)


# ---- objects


def photo(rng: Rng, kind: str, height: int, width: int) -> Array:
    """A picture (height, width, 3) RGB uint8 of an object: dark on a light ground, or reversed."""
    canvas = Canvas(rng, height, width)
    size = np.array([canvas.width, canvas.height])
    pale, strong = ((0.05, 0.75), (0.3, 1.0)), ((0.4, 0.2), (0.9, 0.6))
    ground, thing = (pale, strong) if rng.random() < 0.5 else (strong, pale)
    far, near = _colour(rng, ground), _colour(rng, ground)
    canvas.colours[:] = far
    canvas.colours[int(canvas.height * rng.uniform(0.5, 0.9)) :] = near
    for _ in range(rng.integers(0, 3)):  # out of focus
        spot = CIRCLE * rng.uniform(0.03, 0.14, 2) + rng.uniform(0, 1, 2)
        canvas.put(spot * size, _colour(rng, ground))
    canvas.colours[:] = cv2.GaussianBlur(canvas.colours, (0, 0), min(size) / 60)
    coats = [_colour(rng, thing) for _ in range(5)]
    coat = max(coats, key=lambda own: min(np.abs(own - far).sum(), np.abs(own - near).sum()))
    paints = {"coat": coat, "second": _colour(rng, thing), "far": coat * 0.65, "dark": coat * 0.15}
    paints["glass"] = np.full(3, 235.0)
    scale = min(size) / 2 * rng.uniform(0.7, 0.9)
    centre = size / 2 * rng.uniform(0.75, 1.25, 2)
    turn, side = rng.uniform(-0.15, 0.15), rng.choice((-1, 1))
    right, down = np.array([np.cos(turn), np.sin(turn)]), (-np.sin(turn), np.cos(turn))
    frame = scale * np.array([side * right, down])
    for part in DRAWINGS[kind]:
        canvas.put(part.points @ frame + centre, paints[part.paint], line=part.line * scale)
    return canvas.seen()


def _colour(rng: Rng, ranges: tuple[tuple[float, float], tuple[float, float]]) -> Array:
    """Any hue, with saturation and value between two pairs of bounds."""
    saturation, value = rng.uniform(*ranges)
    return np.array(colorsys.hsv_to_rgb(rng.random(), saturation, value)) * 255


# ---- streets

VEHICLES = {"tram": (0.45,), "truck end": (0.5,), "bus": (0.45,), "car": (0.6, 0.6, 0.5)}
WHEELS = ("cyclist", "bicycle", "motorcycle", "motorcyclist")
POLES = ("sign", "triangle", "light", "lamp", "sign", "light", "bin")
FAR = 60.0  # metres
Place = tuple[Any, Any, Any]  # x metres to the right, y up, z ahead, of one point or several
Thing = tuple[float, Callable[..., None], tuple[Any, ...]]  # how far, what draws it, and of what


def street(rng: Rng, height: int, width: int) -> tuple[Array, Array]:
    """A scene (height, width, 3) RGB uint8, and its instance ids (height, width) uint16.

    They are Cityscapes': a label id, or 1000 times a label id plus the instance's number.
    """
    scene = Street(rng, height, width)
    scene.backdrop()
    things = [*scene.sides(), *scene.traffic(), *scene.pavement()]
    for _, draw, arguments in sorted(things, key=lambda thing: -thing[0]):
        draw(*arguments)
    scene.bonnet()
    return scene.seen(), np.ascontiguousarray(scene.ids[::FINE, ::FINE])


class Street(Canvas):
    """A canvas with its camera and plan.

    Road, parking, pavement and green end at `edges`, in metres on either side.
    """

    def __init__(self, rng: Rng, height: int, width: int) -> None:
        super().__init__(rng, height, width)
        self.focal, self.middle = self.width * rng.uniform((0.5, 0.42), (0.65, 0.58))
        self.horizon, self.eye = self.height * rng.uniform(0.36, 0.48), rng.uniform(1.4, 2.0)
        self.edges = np.cumsum(rng.uniform((3.6, 0.0, 2.0, 1.0), (5.0, 1.5, 3.2, 3.0)))
        self.instances = 0

    def choose(self, paint: str) -> Array:
        """A colour near one of a paint's."""
        colours = PAINTS[paint]
        return colours[self.rng.integers(len(colours))] + self.rng.normal(0, 8, 3)

    def area(
        self, label: str | None, colour: Array, at: Place, line: float = 0, instance: int = 0
    ) -> None:
        """Fills an outline of points x metres to the right, y up, z ahead, or draws a line."""
        x, y, z = np.broadcast_arrays(*at)
        scale = self.focal / z
        pixels = np.stack([self.middle + scale * x, self.horizon + scale * (self.eye - y)], -1)
        known = name2label.get(label)
        number = known and (known.id * 1000 + instance if known.hasInstances else known.id)
        self.put(pixels, colour, number, line * scale.max())

    def panel(self, label: str, colour: Array, x: Any, top: float, z: Any) -> None:
        """An upright rectangle on the ground from (x[0], z[0]) to (x[1], z[1])."""
        corners = [0, 1, 1, 0]
        self.area(label, colour, (np.array(x)[corners], (0, 0, top, top), np.array(z)[corners]))

    def figure(self, name: str, x: float, z: float, size: float = 1.0) -> None:
        """A thing that faces us; its labels are instances where Cityscapes counts them."""
        self.instances += 1
        paints: dict[str, Array] = {}
        across = size * self.rng.choice((-1, 1))
        for part in DRAWINGS[name]:
            colour = paints.setdefault(part.paint, self.choose(part.paint))
            at = (x + across * part.points[:, 0], size * part.points[:, 1], z)
            self.area(part.label, colour, at, part.line * size, self.instances)

    def backdrop(self) -> None:
        """Sky, a skyline of trees and houses, and the ground."""
        low = int(self.horizon) + 1
        ramp = np.linspace(0.8, 1.15, low)[:, None, None]
        self.colours[:low] = (self.choose("sky") * ramp).clip(0, 255)
        self.ids[:low] = name2label["sky"].id
        for x in np.arange(-FAR, FAR, 7.0):
            if self.rng.random() < 0.5:
                self.leaves(x, 1.5, FAR, 5.0)
            else:
                top = self.rng.uniform(3, 9)
                self.panel("building", self.choose("brick"), (x, x + 8), top, (FAR, FAR))
        self.colours[low:], self.ids[low:] = self.choose("grass"), name2label["terrain"].id
        asphalt, white = self.choose("asphalt"), self.choose("white")
        colours = (asphalt, asphalt * 1.2, self.choose("paving"))
        strips = zip(("road", "parking", "sidewalk"), self.edges, colours, strict=False)
        for label, reach, colour in reversed(list(strips)):
            at = ((-reach, reach, reach, -reach), 0, (1, 1, 3 * FAR, 3 * FAR))
            self.area(label, colour, at)
        for z in np.arange(2.0, FAR, 6.0):
            self.area(None, white, ((-0.1, 0.1, 0.1, -0.1), 0, (z, z, z + 3, z + 3)))

    def sides(self) -> Iterator[Thing]:
        """Houses, walls, fences and trees along both sides."""
        draws = (self.house, self.wall, self.fence, self.trees)
        for side in (-1, 1):
            z = 2.0
            while z < FAR:
                end = z + self.rng.uniform(5, 12)
                draw = draws[self.rng.choice(4, p=(0.4, 0.2, 0.2, 0.2))]
                yield end, draw, (side * self.edges[3], z, end)
                z = end

    def house(self, x: float, near: float, far: float) -> None:
        brick, pane, top = self.choose("brick"), self.choose("pane"), self.rng.uniform(6, 16)
        self.panel("building", brick * 0.8, (x, x + np.sign(x) * 12), top, (near, near))
        self.panel("building", brick, (x, x), top, (near, far))
        for low in np.arange(1.0, top - 1.5, 3.0):
            for z in np.arange(near + 0.6, far - 1.2, 2.2):
                up, ahead = (low, low, low + 1.6, low + 1.6), (z, z + 1.2, z + 1.2, z)
                self.area(None, pane, (x, up, ahead))

    def wall(self, x: float, near: float, far: float) -> None:
        stone, top = self.choose("stone"), self.rng.uniform(2.0, 3.2)
        self.panel("wall", stone * 0.85, (x, x + np.sign(x)), top, (near, near))
        self.panel("wall", stone, (x, x), top, (near, far))
        for y in np.arange(0.5, top, 0.5):
            self.area(None, stone * 0.75, (x, y, (near, far)), line=0.04)

    def fence(self, x: float, near: float, far: float) -> None:
        wood, top = self.choose("wood"), self.rng.uniform(1.4, 2.0)
        self.panel("fence", wood * 0.6, (x, x), top, (near, far))
        for z in np.arange(near, far, 0.7):
            self.area("fence", wood * 1.3, (x, (0, top), z), line=0.3)

    def trees(self, x: float, near: float, far: float) -> None:
        for z in np.arange(far, near, -2.5):
            self.area("vegetation", self.choose("bark"), (x, (0, 3), z), line=0.3)
            self.leaves(x, self.rng.uniform(2.5, 4.5), z, 2.2)
            self.leaves(x + np.sign(x) * 2, 1.0, z, 1.5)

    def leaves(self, x: float, y: float, z: float, size: float) -> None:
        green = self.choose("leaves")
        for dx, dy in self.rng.normal(0, 0.35 * size, (12, 2)):
            blob = CIRCLE * self.rng.uniform(0.25, 0.5) * size + (x + dx, y + dy)
            tone = green * (1 + 0.3 * dy / size)
            self.area("vegetation", tone, (blob[:, 0], blob[:, 1].clip(0), z))

    def traffic(self) -> Iterator[Thing]:
        """Vehicles on the two lanes, and what has two wheels beside them."""
        road = self.edges[0]
        free = self.rng.uniform(6, 9, 2)  # how far each lane is taken
        chances = [(name, chance) for name, own in VEHICLES.items() for chance in own]
        for i in self.rng.permutation(len(chances)):
            name, chance = chances[i]
            if self.rng.random() < chance:
                lane = self.rng.integers(2)
                x = (lane - 0.5) * road + self.rng.uniform(-0.3, 0.3)
                yield free[lane], self.figure, (name, x, free[lane])
                free[lane] += self.rng.uniform(5, 9)
        for name in WHEELS:
            if self.rng.random() < 0.6:
                x, z = self.rng.uniform((0.2, 4.5), (0.6, 12))
                yield z, self.figure, (name, self.rng.choice((-1, 1)) * (road - x), z, 1.15)

    def pavement(self) -> Iterator[Thing]:
        """Signs, lights, lamps and bins along the kerb, and people."""
        _, kerb, end, _ = self.edges
        for side in (-1, 1):
            for z in np.cumsum(self.rng.uniform(2.5, 6, 5)) + 2.5:
                yield z, self.figure, (self.rng.choice(POLES), side * (kerb + 0.4), z)
            for _ in range(self.rng.integers(1, 4)):
                x, z, size = self.rng.uniform((kerb + 0.8, 4, 0.9), (end, 14, 1.1))
                yield z, self.figure, ("walker", side * x, z, size)

    def bonnet(self) -> None:
        """Mostly, our own car along the lower edge, which no evaluation counts."""
        if self.rng.random() < 0.6:
            outline = (0.5, 1.02) + CIRCLE * (0.5, 0.07)
            size, label = (self.width, self.height), name2label["ego vehicle"].id
            self.put(outline * size, self.choose("coat"), label)
