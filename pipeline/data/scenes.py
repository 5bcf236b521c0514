"""Street scenes with Cityscapes' label ids, built in metres on a plane and seen through a pinhole camera.

A scene is painted from far to near: sky, skyline, ground, then the sides of the street and the things on it.
What is drawn leaves its label with the same outline. Colours of a class vary from scene to scene and are
shared between classes (asphalt, paving, concrete and facades; cars of any colour), light and shadow vary too,
so that neither a pixel's colour nor its place tells its class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import cv2
import numpy as np
from cityscapesscripts.helpers.labels import labels

from pipeline.data.shapes import CIRCLE, DRAWINGS, Array, Canvas, Rng, photograph, rectangles, texture, varied

Thing = tuple[float, Callable[[], None]]  # how far off, and what paints it

IDS = {label.name.replace(" ", "-"): label.id for label in labels}
SUPERSAMPLING = 2
NEAR = 1.3  # metres from the camera
SIDEWAYS, ALONG = 0.0, np.pi / 2  # how upright planes lie: across the street, or with it
VEHICLES = {"train": (2.5, 22.0), "bus": (2.5, 11.0), "truck": (2.4, 7.5), "car": (1.8, 4.2)}  # width and length
FURNITURE = ("disc", "triangle", "square", "board", "light", "light", "arm", "lamp", "lamp", "bin", "bin", "cart")
SIDES = ((0.82, 0.05, 0.05, 0.08), (0.35, 0.15, 0.2, 0.3), (0.05, 0.15, 0.25, 0.55), (0.25, 0.4, 0.15, 0.2))
GREY, FACADE = "58585c 706e6c 8c8882 46484e a5a098", "965c4a beaa8a cdc8be 76706c a88e70 828a92 62544c"
COAT = f"b22222 1e3c82 e1e1de 18191c 96989c c6a028 286042 603e2e 5a5e64 d26428 {GREY}"
PALETTES = {
    name: [np.array(list(bytes.fromhex(colour)), np.float32) for colour in colours.split()]
    for name, colours in {
        "asphalt": GREY, "metal": GREY, "facade": f"{FACADE} {GREY}", "coat": COAT, "second": COAT, "hair": COAT,
        "green": "3e542c 566834 304228 706e3a 806234", "sky": "80a8d6 bac4ce dee0e2 e2bea0 6078a0 969ca6",
        "roof": "783c30 46464a 60544e", "pane": "3c4654 96a5b4 24262c c8be96", "glass": "262c34 323a44 464e58",
        "bark": "544232 3c342e", "skin": "e0b496 b08060 6e4c38", "rim": "be1e24 1e46a0 282a2e", "dark": "1a1a1c",
        "face": "e1e1dc 2450aa e1be28", "case": "1c1e1e 323c32 be9628", "white": "d7d7cd", "lamp": "be1e1e f0ecd7",
        "red": "f03228 3c0c0a", "amber": "fabe32 3e300c", "green-light": "3cdc78 0f371e",
    }.items()
}  # fmt: skip


def street(rng: Rng, height: int, width: int) -> tuple[Array, Array]:
    """Return a picture (height, width, 3) RGB and its label ids (height, width), both uint8."""
    scene = Scene(rng, height * SUPERSAMPLING, width * SUPERSAMPLING)
    _backdrop(scene)
    _ground(scene)
    things = [
        *_traffic(scene),
        *(thing for side in (-1, 1) for part in (_side, _pavement) for thing in part(scene, side)),
    ]
    for _, paint in sorted(things, key=lambda thing: -thing[0]):
        paint()
    _frame(scene)
    return scene.seen(), np.ascontiguousarray(scene.ids[::SUPERSAMPLING, ::SUPERSAMPLING])


class Scene(Canvas):
    """The canvas (red, green, blue, and how grained), its camera and light, and the plan of the street.

    `edges` are where road, parking, pavement and green end, in metres to the left (-1) and right (1) of the camera;
    `middle` is between the lanes; a side street lies from `crossing[0]` to `crossing[1]` ahead, if that is not 0.
    """

    def __init__(self, rng: Rng, height: int, width: int) -> None:
        """Draw at random: we drive on the right of the middle."""
        super().__init__(np.zeros((height, width, 4), np.uint8))
        self.rng, self.height, self.width = rng, height, width
        self.focal, self.heading = width * rng.uniform((0.75, 0.25), (1.15, 0.75))
        self.horizon = height * rng.uniform(0.32, 0.52)
        self.eye, self.bend = rng.uniform(1.2, 1.9), rng.normal(0, 0.0012)
        self.haze, self.mist = self.choose("sky", 0), rng.uniform(60, 400)
        self.shade: dict[int, float] = dict(zip((-1, 1), rng.permutation((0.62, 0.9)), strict=True))  # on either side
        self.edges: dict[int, list[float]] = {}
        for side, road in ((-1, rng.uniform(2.6, 7.5)), (1, rng.uniform(1.5, 4.5))):
            beyond = rng.uniform((2.0, 2.0, 1.5), (2.6, 6.0, 8.0)) * (rng.random(3) < (0.15, 0.88, 0.4))
            self.edges[side] = np.cumsum([road, *beyond]).tolist()
        self.middle = (self.edges[1][0] - self.edges[-1][0]) / 2 - 0.2
        self.crossing = np.cumsum(rng.uniform((12, 7), (45, 14))) * (rng.random() < 0.4)

    def at(self, x: Array | float, y: Array | float, z: Array | float) -> Array:
        """Return the pixels (..., 2) of points `x` metres to the right, `y` up, `z` ahead."""
        z = np.maximum(z, NEAR)
        u = self.heading + self.focal * (x + self.bend * z * z) / z
        v = self.horizon + self.focal * (self.eye - y) / z
        pixels = np.empty((*np.broadcast(u, v).shape, 2))
        pixels[..., 0], pixels[..., 1] = u, v
        return pixels

    def choose(self, palette: str, spread: float = 18) -> Array:
        """Return a colour near one of a palette."""
        colours, shift = PALETTES[palette], spread * self.rng.normal(0, (1, 0.3, 0.3, 0.3))
        return (colours[self.rng.integers(len(colours))] + shift[0] + shift[1:]).clip(8, 250)

    def fill(self, points: Array, label: str | None, colour: Array, z: float, grain: float, line: float = 0.0) -> None:
        """Fill outlines in pixels at distance `z` (for the haze), or draw lines `line` metres thick."""
        share = np.exp(-z / self.mist)
        seen = [*(colour * share + self.haze * (1 - share)).clip(0, 255).tolist(), 255 * grain]
        self.put(points, IDS[label] if label else None, seen, self.focal * line / max(z, NEAR))

    def panel(
        self, points: Array, label: str | None, colour: Array | None, x: float, z: float, turn: float,
        grain: float = 0.08, line: float = 0.0,
    ) -> None:  # fmt: skip
        """Fill outlines, or draw lines, on an upright plane that starts at (x, z); without a colour, label them."""
        if not len(points):
            return
        pixels = self.at(x + points[..., 0] * np.cos(turn), points[..., 1], z + points[..., 0] * np.sin(turn))
        if colour is None:
            self.put(pixels, IDS[label or ""], None)
        else:
            self.fill(pixels, label, colour, z, grain, line)

    def figure(
        self, name: str, x: float, z: float, turn: float = SIDEWAYS, *, size: tuple[float, float] = (1, 1),
        vary: float = 0.0, paints: dict[str, Array] | None = None, tone: float = 1.0,
    ) -> None:  # fmt: skip
        """Paint a drawing on an upright plane."""
        paints = Paints(self) if paints is None else paints
        for part in varied(self.rng, DRAWINGS[name], vary):
            colour = None if part.paint == "-" else paints[part.paint] * tone
            self.panel(part.points * size, part.label, colour, x, z, turn, line=part.width * size[1])

    def darken(self, points: Array, factor: float) -> None:
        """Let a shadow fall on an outline in pixels."""
        mask = np.zeros((self.height, self.width), np.uint8)
        cv2.fillPoly(mask, [points.clip(-(2**15), 2**15).astype(np.int32)], 1)
        cv2.copyTo(cv2.convertScaleAbs(self.paint, alpha=factor), mask, self.paint)

    def seen(self) -> Array:
        """Return the picture: grain of the surfaces, lens, light and sensor."""
        noise = texture(self.rng, self.height, self.width, self.height // 10)
        grain = self.paint[..., 3:].astype(np.float32) * (0.4 / 255) + 0.01
        picture = self.paint[..., :3] * (1 + grain * noise[..., None])
        size = (self.width // SUPERSAMPLING, self.height // SUPERSAMPLING)
        return photograph(self.rng, cv2.resize(picture, size, interpolation=cv2.INTER_AREA))


class Paints(dict[str, Array]):
    """What one thing is painted with, drawn when first asked for."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.scene = scene

    def __missing__(self, paint: str) -> Array:
        self[paint] = self["coat"] * 0.75 if paint == "far" else self.scene.choose(paint)
        return self[paint]


# ---- what is far, and the ground


def _backdrop(scene: Scene) -> None:
    """Paint sky, clouds and a skyline of houses and trees along the horizon."""
    rng, low, x = scene.rng, int(scene.horizon) + 2, -110.0
    top = scene.haze * rng.uniform(0.6, 1.0) + rng.normal(0, 8, 3)
    sky = top + (scene.haze - top) * np.linspace(0, 1, low)[:, None, None]
    cover = (texture(rng, low, scene.width, 2) + rng.uniform(-1, 1)).clip(0, 1)[..., None] * rng.uniform(0, 0.8)
    sky = sky + (scene.haze * rng.uniform(0.85, 1.2) - sky) * cover
    scene.paint[:low, :, :3], scene.ids[:low] = sky.clip(0, 255), IDS["sky"]
    while x < 110:
        width, height = rng.uniform((3, 2), (15, 9))
        if rng.random() < 0.55:
            house = rectangles(0, 0, width, height)
            scene.panel(house, "building", scene.choose("facade"), x, 90, SIDEWAYS, 0.12)
        else:
            _leaves(scene, rng.uniform((x, 1, 90), (x + width, 1 + height / 2, 91), (6, 3)).T, height * 0.4)
        x += width * rng.uniform(0.6, 1.6)


def _leaves(scene: Scene, places: Array, size: float, colour: Array | None = None) -> None:
    """Paint clumps of leaves at places (x, y, z; N each), lighter the higher they hang."""
    rng, (_, y, z), number = scene.rng, places, places.shape[1]
    colour = scene.choose("green") if colour is None else colour
    radius = scene.focal * size / z * rng.uniform(0.7, 1.5, number)
    ragged = CIRCLE * rng.uniform(0.75, 1.25, (number, len(CIRCLE), 1)) * radius[:, None, None]
    tones = colour * (rng.uniform(0.7, 1.0, number) * (0.8 + 0.4 * (y / 8).clip(0, 1)))[:, None]
    for outline, tone, depth in zip(scene.at(*places)[:, None] + ragged, tones, z, strict=True):
        scene.fill(outline, "vegetation", tone, depth, 0.45)


def _strip(scene: Scene, x0: float, x1: float, z0: float, z1: float, label: str | None, colour: Array) -> None:
    """Lay a strip of the ground; all of it is hazed at once, later."""
    depths = np.geomspace(max(z0, NEAR), z1, 12)
    scene.fill(np.concatenate([scene.at(x0, 0, depths), scene.at(x1, 0, depths[::-1])]), label, colour, 0, 0.1)


def _ground(scene: Scene) -> None:
    """Lay green, pavements, parking and road, then markings, haze and shadows."""
    rng, low = scene.rng, int(scene.horizon) + 2
    asphalt, paving, white = scene.choose("asphalt"), scene.choose("facade"), scene.choose("white")
    scene.paint[low:], scene.ids[low:] = [*scene.choose("green"), 75], IDS["terrain"]
    for side, (road, parking, pavement, _) in scene.edges.items():
        for reach, label, colour in (
            (pavement, "sidewalk", paving),
            (parking + 0.1, "sidewalk", paving * 0.75),
            (parking, "parking", asphalt * 1.1),
            (road, "road", asphalt),
        ):
            _strip(scene, 0, side * reach, NEAR, 300, label, colour)
    if scene.crossing[1]:
        _strip(scene, -80, 80, scene.crossing[0], scene.crossing[1], "road", asphalt)
    for z in np.arange(NEAR, 70, 6) if rng.random() < 0.75 else ():
        _strip(scene, scene.middle - 0.08, scene.middle + 0.08, z, z + 3, None, white)
    z = rng.uniform(6, 20)
    for x in np.arange(0.3 - scene.edges[-1][0], scene.edges[1][0] - 0.5, 1.0) if rng.random() < 0.3 else ():
        _strip(scene, x, x + 0.5, z, z + 3, None, white)
    depth = scene.focal * scene.eye / (np.arange(low, scene.height) - scene.horizon)
    share = np.exp(-depth / scene.mist)[:, None, None]
    scene.paint[low:, :, :3] = scene.paint[low:, :, :3] * share + scene.haze * (1 - share)
    for _ in range(rng.integers(5)):
        z, reach, length = rng.uniform((5, -2, 2), (50, 8, 15))
        corners = rng.choice((-1, 1)) * np.array([20, reach, reach, 20]), 0, z + np.array([0, 1, length, length + 3])
        scene.darken(scene.at(*corners), rng.uniform(0.45, 0.75))


# ---- the sides of the street


def _side(scene: Scene, side: int) -> Iterator[Thing]:
    """Yield the stretches that bound one side: houses, walls, fences, hedges and trees, or nothing."""
    rng, mood, z = scene.rng, SIDES[scene.rng.integers(len(SIDES))], NEAR
    while z < 130:
        length = rng.uniform(5, 16) * (1 + z / 60)
        paint = (_house, _wall, _fence, _trees)[rng.choice(4, p=mood)]
        is_open = z < scene.crossing[1] and z + length > scene.crossing[0]
        if not is_open and rng.random() < 0.94:
            yield z + length, partial(paint, scene, side, side * (scene.edges[side][3] + 0.2), z, length)
        z += length


def _faces(scene: Scene, side: int, length: float, depth: float) -> list[tuple[float, float, float]]:
    """Return turn, reach and tone of the two faces of a block beside the street: end and flank."""
    return [(SIDEWAYS, side * depth, 0.8), (ALONG, length, scene.shade[side])]


def _house(scene: Scene, side: int, x: float, z: float, length: float) -> None:
    rng, colour, pane = scene.rng, scene.choose("facade"), scene.choose("pane")
    height, storey, step, attic = rng.uniform((4.5, 2.8, 1.8, -2.5), (20, 3.6, 3.5, 2.5))
    roof = rectangles(0.2, height, length - 0.2, height + max(attic, 0))
    for turn, reach, tone in _faces(scene, side, length, 14):
        scene.panel(rectangles(0, -0.1, reach, height), "building", colour * tone, x, z, turn, 0.12)
        left, low = np.arange(0.8, abs(reach) - 1.2, step), np.arange(1.0, height - 1.2, storey)[:, None]
        panes = rectangles(left, low, left + step / 2, low + 1.5) * (np.sign(reach), 1)
        scene.panel(panes, None, pane * tone, x, z, turn, 0.05)
    scene.panel(roof, "building", scene.choose("roof"), x, z, ALONG, 0.15)


def _wall(scene: Scene, side: int, x: float, z: float, length: float) -> None:
    colour, (height, course) = scene.choose("facade"), scene.rng.uniform((1.2, 0.3), (3.6, 0.7))
    for turn, reach, tone in _faces(scene, side, length, 0.5):
        scene.panel(rectangles(0, -0.1, reach, height), "wall", colour * tone, x, z, turn, 0.18)
        left, low = np.arange(0, reach, 3 * course), np.arange(course, height, course)
        for joints in (rectangles(0, low, reach, low + 0.04), rectangles(left, 0, left + 0.03, height)):
            scene.panel(joints, None, colour * tone * 0.75, x, z, turn)
    scene.panel(rectangles(0, height, length, height + 0.14), "wall", colour * 1.1, x, z, ALONG)


def _fence(scene: Scene, side: int, x: float, z: float, length: float) -> None:
    height, gap, bar = scene.rng.uniform((0.9, 0.18, 0.05), (2.2, 0.45, 0.11))
    colour = scene.choose("coat") * scene.shade[side]
    left, low = np.arange(0, length, gap * (1 + z / 25)), np.array([0.15, 0.6, 0.95]) * height
    scene.panel(rectangles(0, 0, length, height), "fence", None, x, z, ALONG)
    scene.panel(rectangles(left, 0, left + bar, height), "fence", colour, x, z, ALONG)
    scene.panel(rectangles(0, low, length, low + bar), "fence", colour, x, z, ALONG)


def _trees(scene: Scene, side: int, x: float, z: float, length: float) -> None:
    rng, colour = scene.rng, scene.choose("green")
    height = rng.uniform(1.0, 2.5) if rng.random() < 0.4 else rng.uniform(4, 12)
    for turn, reach, _ in _faces(scene, side, length, 10):
        scene.panel(rectangles(0, 0, reach, height * 0.55), "vegetation", colour * 0.7, x, z, turn, 0.4)
    places = rng.uniform((0, 0.3, 0), (5, 0.9, length), (26, 3)) * (side, height, 1) + (x, 0, z)
    _leaves(scene, places.T, height * 0.16, colour)


# ---- things that stand, walk and drive


def _pavement(scene: Scene, side: int) -> Iterator[Thing]:
    """Yield one side's lamps, lights, signs, trees and bins, people, and bicycles and motorcycles that are parked."""
    rng, (_, kerb, end, _) = scene.rng, scene.edges[side]
    for z in np.cumsum(rng.uniform(3, 16, 7)) + 1:
        x, size = side * (kerb + 0.5), rng.uniform(0.85, 1.25)
        if rng.random() < 0.17:
            yield z, partial(_tree, scene, x + side * 0.4, z)
        else:
            yield z, partial(scene.figure, rng.choice(FURNITURE), x, z, size=(side * size, size))
    people = rng.integers(8)
    for number in range(people + rng.integers(3)):
        x, z, size = rng.uniform((kerb + 0.6, 4, 0.85), (max(kerb + 1.1, end - 0.2), 35, 1.08))
        if number < people:
            yield z, partial(scene.figure, "person", side * x, z, size=(size, size), vary=0.06)
        else:
            yield z, partial(_cycle, scene, side * x, z)


def _tree(scene: Scene, x: float, z: float) -> None:
    """A street tree; the trunk is vegetation too."""
    rng, (crown, size) = scene.rng, scene.rng.uniform((3.2, 1.0), (6.5, 2.2))
    scene.fill(scene.at(x, np.array([0, crown]), z), "vegetation", scene.choose("bark"), z, 0.3, line=0.26)
    angle, reach = rng.uniform(0, 2 * np.pi, 18), size * np.sqrt(rng.random(18))
    places = np.stack([x + reach * np.cos(angle), crown + reach * np.sin(angle) * 0.8, np.full(18, z)])
    _leaves(scene, places, size * 0.35)


def _cycle(scene: Scene, x: float, z: float, *riders: str) -> None:
    """A bicycle or motorcycle that shows its side, turned by any angle, and who sits on it."""
    turn, way = scene.rng.uniform(-0.6, 0.6), scene.rng.choice((-1, 1))
    for name in (scene.rng.choice(("bicycle", "motorcycle")), *riders):
        scene.figure(name, x, z, turn, size=(way, 1), vary=0.01)


def _traffic(scene: Scene) -> Iterator[Thing]:
    """Yield what drives and parks: cars mostly; riders; now and then a truck, a bus, a tram."""
    rng, ends = scene.rng, (-scene.edges[-1][0], scene.edges[1][0])
    free = rng.uniform(6, 20, 2)
    for kind, chance in (("train", 0.25), ("bus", 0.3), ("truck", 0.32), *[("car", 0.55)] * 6):
        if rng.random() < chance:
            lane = 0 if kind == "train" else rng.integers(2)
            z, x = free[lane] + rng.uniform(0, 8), (ends[lane] + scene.middle) / 2 + rng.uniform(-0.5, 0.5)
            free[lane] = z + VEHICLES[kind][1] + 1.5
            yield z, partial(_vehicle, scene, kind, x, z)
    for side, (road, parking, *_) in scene.edges.items():
        x = side * (road + (1.1 if parking > road else -0.6))
        for z in rng.uniform(0, 7) + np.cumsum(rng.uniform(4.8, 9, rng.integers(6) if rng.random() < 0.4 else 0)):
            if not (z < scene.crossing[1] and z + 5 > scene.crossing[0]):
                yield z, partial(_vehicle, scene, "car", x, z)
    if scene.crossing[1] and rng.random() < 0.8:
        z = rng.uniform(scene.crossing[0] + 1, scene.crossing[1] - 3)
        yield z, partial(_vehicle, scene, rng.choice((*VEHICLES, "car")), rng.uniform(-9, 9), z, across=True)
    for _ in range(rng.integers(3)):
        x, z = rng.uniform((ends[0] + 0.6, 5), (ends[1] - 0.6, 25))
        yield z, partial(_cycle, scene, x, z, "rider")


def _vehicle(scene: Scene, kind: str, x: float, z: float, across: bool = False) -> None:
    """Paint a vehicle whose near end's middle is (x, z): flank, then end; or, across the street, its flank alone."""
    (width, length), paints = VEHICLES[kind], Paints(scene)
    wide, long = (length, width) if across else (width, length)
    floor = x + np.array([-0.5, 0.5, 0.5, -0.5]) * (wide + 0.4), 0, z + np.array([-0.2, -0.2, long, long])
    scene.darken(scene.at(*floor), 0.5)
    if across:
        scene.figure(f"{kind} flank", x - length / 2, z)
        return
    from_us = x + scene.bend * z * z
    if abs(from_us) > width / 2:  # one flank is turned to us
        scene.figure(f"{kind} flank", x - np.sign(from_us) * width / 2, z, ALONG, paints=paints, tone=0.82)
    scene.figure(f"{kind} end", x, z, paints=paints)


def _frame(scene: Scene) -> None:
    """Paint, mostly, the bonnet of our own car along the lower edge; now and then leave a frame without labels."""
    rng, size = scene.rng, np.array([scene.width, scene.height])
    if rng.random() < 0.6:
        bonnet = (rng.uniform(0.42, 0.58), 1.01) + CIRCLE * rng.uniform((0.45, 0.03), (0.7, 0.11))
        scene.fill(bonnet * size, "ego-vehicle", scene.choose("coat"), 0, 0.03)
    if rng.random() < 0.4:
        frame = int(rng.integers(1, 3)) * SUPERSAMPLING
        scene.ids[:, :frame] = scene.ids[:, -frame:] = IDS["unlabeled"]
