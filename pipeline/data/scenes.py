"""Street scenes with Cityscapes' label ids, built in metres on a plane and seen through a pinhole camera.

A scene is painted from far to near: sky, skyline, ground, then the sides of the street and the things on it.
What is drawn leaves its label with the same outline. Colours of a class vary from scene to scene and are
shared between classes (asphalt, paving, concrete and facades; cars of any colour), light and shadow vary too,
so that neither a pixel's colour nor its place tells its class.
"""
# fmt: off: outlines read as lists of points

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

Array = np.ndarray
Rng = np.random.Generator
Points = list[tuple[float, float]]
Mapper = Callable[[float, float], tuple[float, float]]  # metres along and above a surface -> pixels

UNLABELED, EGO, STATIC, DYNAMIC, PARKING = 0, 1, 4, 5, 9
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN = 7, 8, 11, 12, 13, 17, 19, 20
VEGETATION, TERRAIN, SKY, PERSON, RIDER = 21, 22, 23, 24, 25
CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = 26, 27, 28, 31, 32, 33

SUPERSAMPLING = 2
NEAR, FAR = 2.2, 160.0
DEPTHS = tuple(float(z) for z in np.geomspace(NEAR, FAR, 16))
GREY = ((88, 88, 92), (112, 110, 108), (140, 136, 130), (70, 72, 78), (165, 160, 152))
FACADE = (
    (150, 92, 74),
    (190, 170, 138),
    (205, 200, 190),
    (118, 112, 108),
    (168, 142, 112),
    (130, 138, 146),
    (98, 84, 76),
)
GREEN = ((62, 84, 44), (86, 104, 52), (48, 66, 40), (112, 110, 58), (128, 98, 52))
PAINT = (
    (178, 34, 34),
    (30, 60, 130),
    (225, 225, 222),
    (24, 25, 28),
    (150, 152, 156),
    (198, 160, 40),
    (40, 96, 66),
    (96, 62, 46),
    (90, 94, 100),
    (210, 100, 40),
)
SKIES = ((128, 168, 214), (186, 196, 206), (222, 224, 226), (226, 190, 160), (96, 120, 160), (150, 156, 166))
SKIN = ((224, 180, 150), (176, 128, 96), (110, 76, 56))


def rgb(red: float, green: float, blue: float) -> Array:
    """Return a colour, 0 to 255."""
    return np.array([red, green, blue], np.float32)


def street(rng: Rng, height: int, width: int) -> tuple[Array, Array]:
    """Return a picture (height, width, 3) RGB and its label ids (height, width), both uint8."""
    scene = Scene(rng, height * SUPERSAMPLING, width * SUPERSAMPLING)
    _sky(scene)
    layout = Layout.draw(scene)
    _ground(scene, layout)
    things: list[tuple[float, Callable[[], None]]] = []
    for side in (-1, 1):
        things += _side(scene, layout, side)
        things += _furniture(scene, layout, side)
        things += _walkers(scene, layout, side)
    things += _traffic(scene, layout)
    for _, paint in sorted(things, key=lambda thing: -thing[0]):
        paint()
    _bonnet(scene)
    return scene.photograph(), np.ascontiguousarray(scene.ids[::SUPERSAMPLING, ::SUPERSAMPLING])


class Scene:
    """The canvas, its camera and its light."""

    def __init__(self, rng: Rng, height: int, width: int) -> None:
        """Place the camera: height above the road, horizon, heading, and how the street bends."""
        self.rng, self.height, self.width = rng, height, width
        self.paint = np.zeros((height, width, 4), np.uint8)  # red, green, blue, and how grained
        self.ids = np.zeros((height, width), np.uint8)
        self.focal = width * rng.uniform(0.75, 1.15)
        self.horizon = height * rng.uniform(0.32, 0.52)
        self.heading = width * rng.uniform(0.25, 0.75)
        self.eye = rng.uniform(1.2, 1.9)
        self.bend = rng.normal(0, 0.0012)
        self.haze = np.array(SKIES[rng.integers(len(SKIES))], np.float32)
        self.mist = rng.uniform(60, 400)
        self.light = rng.uniform(0.5, 1.15) * rng.uniform(0.9, 1.1, 3)
        self.sun = int(rng.integers(-1, 2))  # the side whose flanks lie in shadow; 0: overcast

    def at(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Return the pixel of a point `x` metres to the right, `y` up, `z` ahead."""
        z = max(z, NEAR * 0.6)
        return (
            self.heading + self.focal * (x + self.bend * z * z) / z,
            self.horizon + self.focal * (self.eye - y) / z,
        )

    def choose(self, palette: tuple[tuple[int, int, int], ...], spread: float = 18) -> Array:
        """Return a colour near one of a palette."""
        base = np.array(palette[self.rng.integers(len(palette))], np.float32)
        return np.clip(base + self.rng.normal(0, spread) + self.rng.normal(0, spread / 3, 3), 8, 250)

    def fill(self, points: Points, label: int | None, colour: Array, *, grain: float = 0.1, z: float = 0.0) -> None:
        """Fill an outline in pixels at distance `z` (for the haze). Without a `label` the one below stays."""
        outline = [np.round(np.array(points) * 8).clip(-(2**18), 2**18).astype(np.int32)]
        if label is not None:
            cv2.fillPoly(self.ids, outline, label, shift=3)
        cv2.fillPoly(self.paint, outline, self._value(colour, grain, z), shift=3)

    def stroke(
        self,
        points: Points,
        label: int | None,
        colour: Array,
        width: float,
        *,
        grain: float = 0.05,
        z: float = 0.0,
    ) -> None:
        """Draw a line through points in pixels, `width` pixels thick."""
        line, thick = [np.round(np.array(points) * 8).astype(np.int32)], max(1, round(width))
        if label is not None:
            cv2.polylines(self.ids, line, False, label, thick, shift=3)
        cv2.polylines(self.paint, line, False, self._value(colour, grain, z), thick, shift=3)

    def mark(self, points: Points, label: int) -> None:
        """Label an outline in pixels without painting it."""
        cv2.fillPoly(self.ids, [np.round(np.array(points) * 8).astype(np.int32)], label, shift=3)

    def shade(self, points: Points, factor: float) -> None:
        """Darken an outline in pixels."""
        mask = np.zeros((self.height, self.width), np.uint8)
        cv2.fillPoly(mask, [np.round(np.array(points)).clip(-(2**15), 2**15).astype(np.int32)], 255)
        dark = mask > 0
        self.paint[dark, :3] = (self.paint[dark, :3] * factor).astype(np.uint8)

    def pixels(self, metres: float, z: float) -> float:
        """Return the size in pixels of something `metres` large at distance `z`."""
        return self.focal * metres / z

    def _value(self, colour: Array, grain: float, z: float) -> tuple[float, ...]:
        share = 1 - np.exp(-z / self.mist)
        seen = np.clip(colour * (1 - share) + self.haze * share, 0, 255)
        return (*(float(c) for c in seen), 255 * min(grain, 1.0))

    def photograph(self) -> Array:
        """Return the picture: grain of the surfaces, light, exposure, lens and sensor."""
        shape = (self.height, self.width)
        noise = self.rng.standard_normal(shape, np.float32)
        fine = cv2.GaussianBlur(noise, (0, 0), 1.0) * 2.2
        coarse = cv2.resize(noise[: self.height // 12, : self.width // 12], shape[::-1], interpolation=cv2.INTER_CUBIC)
        grain = self.paint[..., 3].astype(np.float32) / 255
        picture = self.paint[..., :3] * (1 + grain * (fine + 0.4 * coarse) * 0.6 + 0.025 * coarse)[..., None]
        across = np.linspace(-1, 1, self.width, dtype=np.float32) * self.rng.uniform(-0.2, 0.2)
        picture *= (1 + across[None, :, None]) * self.light.astype(np.float32)
        size = (self.width // SUPERSAMPLING, self.height // SUPERSAMPLING)
        picture = cv2.resize(picture.astype(np.float32), size, interpolation=cv2.INTER_AREA)
        picture += self.rng.standard_normal(picture.shape, np.float32) * self.rng.uniform(1, 5)
        return np.clip(picture, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Layout:
    """The cross-section of the street in metres from the camera, for the left (-1) and the right (1) side."""

    kerb: dict[int, float]  # where the road ends
    parking: dict[int, float]  # width of a parking strip beyond the kerb, not labelled as road
    walk: dict[int, float]  # width of the pavement
    green: dict[int, float]  # width of grass or earth beyond it
    crossing: tuple[float, float]  # a side street from here to here ahead; none where both are equal

    @classmethod
    def draw(cls, scene: Scene) -> Layout:
        """Draw one at random: we drive on the right of the middle."""
        rng = scene.rng
        left, right = rng.uniform(2.6, 7.5), rng.uniform(1.5, 4.5)
        start = rng.uniform(12, 45)
        crossing = (start, start + rng.uniform(7, 14)) if rng.random() < 0.4 else (0.0, 0.0)
        return cls(
            kerb={-1: left, 1: right},
            parking={s: rng.uniform(2.0, 2.6) if rng.random() < 0.15 else 0.0 for s in (-1, 1)},
            walk={s: rng.uniform(2.0, 6.0) if rng.random() < 0.88 else 0.0 for s in (-1, 1)},
            green={s: rng.uniform(1.5, 8.0) if rng.random() < 0.4 else 0.0 for s in (-1, 1)},
            crossing=crossing,
        )

    def pavement(self, side: int) -> float:
        """Return the distance of the pavement's near edge."""
        return self.kerb[side] + self.parking[side]

    def edge(self, side: int) -> float:
        """Return the distance of what bounds the street."""
        return self.pavement(side) + self.walk[side] + self.green[side]

    def is_open(self, z0: float, z1: float) -> bool:
        """Return whether a stretch of the side lies in the side street."""
        return self.crossing[0] < self.crossing[1] and z0 < self.crossing[1] and z1 > self.crossing[0]


# ---- what is far


def _sky(scene: Scene) -> None:
    """Paint sky, clouds and a skyline of houses and trees along the horizon."""
    rng, width = scene.rng, scene.width
    low = int(scene.horizon) + 2
    top = np.clip(scene.haze * rng.uniform(0.6, 1.0) + rng.normal(0, 8, 3), 0, 255)
    ramp = np.linspace(0, 1, low)[:, None, None]
    scene.paint[:low, :, :3] = np.clip(top * (1 - ramp) + scene.haze * ramp, 0, 255)
    scene.ids[:low] = SKY
    for _ in range(int(rng.integers(0, 9))):
        centre = rng.uniform(0, width), rng.uniform(0, low)
        size = rng.uniform(0.03, 0.2) * width, rng.uniform(0.01, 0.05) * width
        scene.fill(_oval(*centre, *size), None, np.clip(scene.haze * rng.uniform(0.85, 1.2), 0, 255), grain=0.08)
    x = -10.0
    while x < width:
        w, h = rng.uniform(0.03, 0.16) * width, rng.uniform(0.02, 0.14) * scene.height
        if rng.random() < 0.55:
            box = [(x, low), (x, low - h), (x + w, low - h), (x + w, low)]
            scene.fill(box, BUILDING, scene.choose(FACADE), z=90, grain=0.12)
        else:
            for _ in range(6):
                blob = _oval(x + rng.uniform(0, w), low - h * rng.uniform(0, 0.5), w * 0.3, h * 0.5)
                scene.fill(blob, VEGETATION, scene.choose(GREEN), z=90, grain=0.35)
        x += w * rng.uniform(0.6, 1.6)


def _oval(x: float, y: float, rx: float, ry: float, points: int = 16) -> Points:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return list(zip(x + rx * np.cos(angle), y + ry * np.sin(angle), strict=True))


# ---- the ground


def _ground(scene: Scene, layout: Layout) -> None:
    """Lay road, parking, pavement and green, stretch by stretch away from us, then markings and shadows."""
    rng = scene.rng
    asphalt, paving = scene.choose(GREY), scene.choose(GREY + FACADE[1:4])
    grass = scene.choose(GREEN + FACADE[4:5])
    far_side = 60.0
    for z0, z1 in zip(DEPTHS[-2::-1], DEPTHS[:0:-1], strict=True):
        for side in (-1, 1):
            road, park = layout.kerb[side], layout.pavement(side)
            walk = park + layout.walk[side]
            strips = (
                (walk, far_side, TERRAIN, grass, 0.3),
                (park, walk, SIDEWALK, paving, 0.12),
                (road, park, PARKING, asphalt * 1.1, 0.12),
                (0.0, road, ROAD, asphalt, 0.1),
            )
            for start, end, label, colour, grain in strips:
                if end > start:
                    _patch(scene, side * start, side * end, z0, z1, label, colour, grain)
            if layout.walk[side]:
                _patch(scene, side * (park - 0.12), side * (park + 0.1), z0, z1, SIDEWALK, paving * 0.75, 0.05)
    if layout.crossing[0] < layout.crossing[1]:
        _patch(scene, -80, 80, *layout.crossing, ROAD, asphalt, 0.1)
    _markings(scene, layout)
    for _ in range(int(rng.integers(0, 5))):
        z, side = rng.uniform(5, 50), rng.choice((-1, 1))
        reach = side * rng.uniform(-2, 8)
        length = rng.uniform(2, 15)
        shadow = [
            scene.at(side * 20, 0, z),
            scene.at(reach, 0, z + 1),
            scene.at(reach, 0, z + length),
            scene.at(side * 20, 0, z + length + 3),
        ]
        scene.shade(shadow, rng.uniform(0.45, 0.75))


def _patch(
    scene: Scene, x0: float, x1: float, z0: float, z1: float, label: int | None, colour: Array, grain: float
) -> None:
    """Fill a rectangle of the ground."""
    quad = [scene.at(x0, 0, z0), scene.at(x1, 0, z0), scene.at(x1, 0, z1), scene.at(x0, 0, z1)]
    scene.fill(quad, label, colour, grain=grain, z=z0)


def _markings(scene: Scene, layout: Layout) -> None:
    """Paint lane lines, sometimes a zebra crossing."""
    rng = scene.rng
    white = rgb(215, 215, 208) * rng.uniform(0.7, 1.1)
    middle = (layout.kerb[1] - layout.kerb[-1]) / 2 - 0.2
    if rng.random() < 0.75:
        for z in np.arange(NEAR, 70, 6):
            _patch(scene, middle - 0.08, middle + 0.08, z, z + rng.uniform(2.5, 3.5), None, white, 0.1)
    if rng.random() < 0.3:
        z = rng.uniform(6, 20)
        for x in np.arange(-layout.kerb[-1] + 0.3, layout.kerb[1] - 0.5, 1.0):
            _patch(scene, x, x + 0.5, z, z + 3, None, white, 0.1)


# ---- the sides of the street


def _side(scene: Scene, layout: Layout, side: int) -> list[tuple[float, Callable[[], None]]]:
    """Return the stretches that bound one side: houses, walls, fences, hedges and trees, or nothing."""
    rng = scene.rng
    moods = ((0.82, 0.05, 0.05, 0.08), (0.35, 0.15, 0.2, 0.3), (0.05, 0.15, 0.25, 0.55), (0.25, 0.4, 0.15, 0.2))
    weights = moods[rng.integers(len(moods))]
    makers = (_house, _wall, _fence, _trees)
    things, z = [], NEAR * 0.7
    while z < 130:
        length = rng.uniform(5, 16) * (1 + z / 60)
        maker = makers[rng.choice(4, p=weights)]
        if not layout.is_open(z, z + length) and rng.random() < 0.94:
            things.append(maker(scene, side, side * (layout.edge(side) + 0.2), z, z + length))
        z += length
    return things


def _flank(scene: Scene, x: float, z0: float) -> Mapper:
    """Return the mapper of an upright plane along the street, at `x`, starting at `z0`."""
    return lambda along, up: scene.at(x, up, z0 + along)


def _front(scene: Scene, x: float, z: float) -> Mapper:
    """Return the mapper of an upright plane across the street, at `z`, starting at `x`."""
    return lambda along, up: scene.at(x + along, up, z)


def _panel(to: Mapper, s0: float, s1: float, y0: float, y1: float) -> Points:
    """Return the corners of a rectangle on a surface."""
    return [to(s0, y0), to(s1, y0), to(s1, y1), to(s0, y1)]


def _house(scene: Scene, side: int, x: float, z0: float, z1: float) -> tuple[float, Callable[[], None]]:
    rng = scene.rng
    colour, height, storey = scene.choose(FACADE + GREY[2:3]), rng.uniform(4.5, 20), rng.uniform(2.8, 3.6)
    pane = scene.choose(((60, 70, 84), (150, 165, 180), (36, 38, 44), (200, 190, 150)))
    step, roof = rng.uniform(1.8, 3.5), scene.choose(((120, 60, 48), (70, 70, 74), (96, 84, 78)))
    pitched = rng.random() < 0.5
    in_shade = 0.62 if scene.sun == side else 0.9

    def paint() -> None:
        gable, facade = _front(scene, x, z0), _flank(scene, x, z0)
        depth = side * 14.0
        scene.fill(_panel(gable, 0, depth, -0.1, height), BUILDING, colour * 0.8, grain=0.12, z=z0)
        scene.fill(_panel(facade, 0, z1 - z0, -0.1, height), BUILDING, colour * in_shade, grain=0.12, z=z0)
        if pitched:
            ridge = [
                facade(0, height),
                facade(z1 - z0, height),
                scene.at(x + depth / 3, height + 2.5, z1),
                scene.at(x + depth / 3, height + 2.5, z0),
            ]
            scene.fill(ridge, BUILDING, roof, grain=0.15, z=z0)
        for y in np.arange(1.0, height - 1.2, storey):
            for s in np.arange(0.8, z1 - z0 - 1.2, step):
                scene.fill(_panel(facade, s, s + step * 0.5, y, y + 1.5), None, pane * in_shade, grain=0.05, z=z0 + s)
            for s in np.arange(1.0, 12, step * 1.2):
                scene.fill(_panel(gable, side * s, side * (s + step * 0.5), y, y + 1.5), None, pane * 0.8, z=z0)

    return z1, paint


def _wall(scene: Scene, side: int, x: float, z0: float, z1: float) -> tuple[float, Callable[[], None]]:
    rng = scene.rng
    colour, height, course = scene.choose(GREY + FACADE[:3]), rng.uniform(1.2, 3.6), rng.uniform(0.3, 0.7)
    in_shade = 0.7 if scene.sun == side else 0.95

    def paint() -> None:
        face = _flank(scene, x, z0)
        scene.fill(_panel(face, 0, z1 - z0, -0.05, height), WALL, colour * in_shade, grain=0.18, z=z0)
        scene.fill(_panel(_front(scene, x, z0), 0, side * 0.5, -0.05, height), WALL, colour * 0.8, grain=0.18, z=z0)
        for y in np.arange(course, height, course):
            scene.stroke([face(0, y), face(z1 - z0, y)], None, colour * 0.7, scene.pixels(0.04, z0 + 1), z=z0)
        for s in np.arange(0, z1 - z0, course * 3):
            scene.stroke([face(s, 0), face(s, height)], None, colour * 0.75, scene.pixels(0.03, z0 + s + 1), z=z0)
        scene.stroke([face(0, height), face(z1 - z0, height)], WALL, colour * 1.15, scene.pixels(0.14, z0 + 1), z=z0)

    return z1, paint


def _fence(scene: Scene, side: int, x: float, z0: float, z1: float) -> tuple[float, Callable[[], None]]:
    rng = scene.rng
    colour, height = scene.choose(GREY + PAINT[2:4] + FACADE[4:5] + GREEN[:1]), rng.uniform(0.9, 2.2)
    gap, bar = rng.uniform(0.18, 0.45), rng.uniform(0.05, 0.11)

    def paint() -> None:
        face = _flank(scene, x, z0)
        scene.mark(_panel(face, 0, z1 - z0, 0, height), FENCE)
        for s in np.arange(0, z1 - z0, gap * (1 + z0 / 25)):
            scene.stroke([face(s, 0), face(s, height)], FENCE, colour, scene.pixels(bar, z0 + s + 0.5), z=z0 + s)
        for y in (0.15 * height, 0.6 * height, 0.95 * height):
            scene.stroke([face(0, y), face(z1 - z0, y)], FENCE, colour * 0.9, scene.pixels(bar, z0 + 1.5), z=z0)

    return z1, paint


def _trees(scene: Scene, side: int, x: float, z0: float, z1: float) -> tuple[float, Callable[[], None]]:
    rng = scene.rng
    colour, low = scene.choose(GREEN), rng.random() < 0.4
    height = rng.uniform(1.0, 2.5) if low else rng.uniform(4, 12)
    seed = int(rng.integers(2**31))

    def paint() -> None:
        leaves = np.random.default_rng(seed)
        reach = z1 - z0
        hedge = _panel(_flank(scene, x, z0), 0, reach, 0, height * 0.55)
        scene.fill(hedge, VEGETATION, colour * 0.7, grain=0.4, z=z0)
        scene.fill(
            _panel(_front(scene, x, z0), 0, side * 10, 0, height * 0.55), VEGETATION, colour * 0.65, grain=0.4, z=z0
        )
        for _ in range(26):
            z, y = z0 + leaves.uniform(0, reach), height * leaves.uniform(0.3, 0.9)
            _leaf(scene, leaves, x + side * leaves.uniform(0, 5), y, z, height * 0.16, colour)

    return z1, paint


def _leaf(scene: Scene, rng: Rng, x: float, y: float, z: float, size: float, colour: Array) -> None:
    """Paint one clump of leaves, lighter the higher it hangs."""
    u, v = scene.at(x, y, z)
    r = scene.pixels(size * rng.uniform(0.7, 1.5), z)
    tone = colour * rng.uniform(0.7, 1.0) * (0.8 + 0.4 * min(1.0, y / 8))
    wobble = rng.uniform(0.75, 1.25, 12)
    outline = [
        (u + (a - u) * w, v + (b - v) * w) for (a, b), w in zip(_oval(u, v, r, r * 0.85, 12), wobble, strict=True)
    ]
    scene.fill(outline, VEGETATION, tone, grain=0.45, z=z)


# ---- things that stand


def _furniture(scene: Scene, layout: Layout, side: int) -> list[tuple[float, Callable[[], None]]]:
    """Return lamps, traffic lights, signs, street trees and bins along one pavement."""
    rng = scene.rng
    things: list[tuple[float, Callable[[], None]]] = []
    place = side * (layout.pavement(side) + 0.5)
    for z in np.cumsum(rng.uniform(3, 16, 7)) + 1:
        match int(rng.integers(6)):
            case 0 | 1:
                things.append((z, lambda z=z: _sign(scene, place, z)))
            case 2:
                things.append((z, lambda z=z: _lights(scene, place, z, side)))
            case 3:
                things.append((z, lambda z=z: _lamp(scene, place, z, side)))
            case 4:
                things.append((z, lambda z=z: _tree(scene, place + side * 0.4, z)))
            case _:
                things.append((z, lambda z=z: _bin(scene, place + side * rng.uniform(0.2, 1.5), z)))
    return things


def _pole(scene: Scene, x: float, z: float, height: float, width: float = 0.14) -> None:
    colour = scene.choose(GREY + PAINT[3:4] + GREEN[:1])
    scene.stroke([scene.at(x, 0, z), scene.at(x, height, z)], POLE, colour, scene.pixels(width, z), z=z)


def _sign(scene: Scene, x: float, z: float) -> None:
    """A pole with one or two plates: disc, triangle, square or name board."""
    rng = scene.rng
    height = rng.uniform(2.2, 3.4)
    _pole(scene, x, z, height, 0.1)
    for top in (height, height - 0.85)[: int(rng.integers(1, 3))]:
        u, v = scene.at(x, top - 0.4, z)
        r = scene.pixels(rng.uniform(0.32, 0.48), z)
        rim, face = (
            scene.choose(((190, 30, 36), (30, 70, 160), (40, 42, 46))),
            scene.choose(((225, 225, 220), (36, 80, 170), (225, 190, 40))),
        )
        match int(rng.integers(4)):
            case 0:
                outer, inner = _oval(u, v, r, r), _oval(u, v, r * 0.68, r * 0.68)
            case 1:
                outer = [(u - r, v + r * 0.8), (u, v - r), (u + r, v + r * 0.8)]
                inner = [(u - r * 0.55, v + r * 0.5), (u, v - r * 0.5), (u + r * 0.55, v + r * 0.5)]
            case 2:
                outer = [(u - r, v - r), (u + r, v - r), (u + r, v + r), (u - r, v + r)]
                inner = [
                    (u - r * 0.8, v - r * 0.8),
                    (u + r * 0.8, v - r * 0.8),
                    (u + r * 0.8, v + r * 0.8),
                    (u - r * 0.8, v + r * 0.8),
                ]
            case _:
                w = r * 1.9
                outer = [(u - w, v - r * 0.6), (u + w, v - r * 0.6), (u + w, v + r * 0.6), (u - w, v + r * 0.6)]
                inner = [
                    (u - w * 0.9, v - r * 0.4),
                    (u + w * 0.9, v - r * 0.4),
                    (u + w * 0.9, v + r * 0.4),
                    (u - w * 0.9, v + r * 0.4),
                ]
        scene.fill(outer, SIGN, rim, grain=0.02, z=z)
        scene.fill(inner, SIGN, face, grain=0.02, z=z)


def _lights(scene: Scene, x: float, z: float, side: int) -> None:
    """A pole with a traffic light on it, sometimes another on an arm over the road."""
    rng = scene.rng
    height = rng.uniform(2.9, 3.6)
    heads = [(x, height)]
    if rng.random() < 0.4:
        arm, over = rng.uniform(4.8, 5.6), x - side * rng.uniform(1.5, 3.5)
        heads.append((over, arm))
        _pole(scene, x, z, arm)
        scene.stroke(
            [scene.at(x, arm, z), scene.at(over, arm, z)], POLE, scene.choose(GREY), scene.pixels(0.12, z), z=z
        )
    else:
        _pole(scene, x, z, height)
    lit = int(rng.integers(3))
    for cx, top in heads:
        case = scene.choose(((28, 30, 30), (50, 60, 50), (190, 150, 40)), 8)
        to = _front(scene, cx, z)
        scene.fill(_panel(to, -0.22, 0.22, top - 1.05, top), LIGHT, case, grain=0.02, z=z)
        for i, glow in enumerate(((240, 50, 40), (250, 190, 50), (60, 220, 120))):
            u, v = to(0, top - 0.2 - 0.32 * i)
            r = scene.pixels(0.13, z)
            scene.fill(_oval(u, v, r, r), LIGHT, rgb(*glow) * (1.0 if i == lit else 0.25), grain=0.0, z=z)


def _lamp(scene: Scene, x: float, z: float, side: int) -> None:
    """A street lamp: a tall pole with an arm."""
    height = scene.rng.uniform(5, 8)
    _pole(scene, x, z, height, 0.16)
    arm = [scene.at(x, height, z), scene.at(x - side * 1.4, height + 0.3, z)]
    scene.stroke(arm, POLE, scene.choose(GREY), scene.pixels(0.12, z), z=z)


def _tree(scene: Scene, x: float, z: float) -> None:
    """A street tree; the trunk is vegetation too."""
    rng = scene.rng
    colour, crown, size = scene.choose(GREEN), rng.uniform(3.2, 6.5), rng.uniform(1.0, 2.2)
    trunk = [scene.at(x, 0, z), scene.at(x + rng.uniform(-0.2, 0.2), crown, z)]
    scene.stroke(trunk, VEGETATION, scene.choose(((84, 66, 50), (60, 52, 46))), scene.pixels(0.26, z), grain=0.3, z=z)
    for _ in range(18):
        angle, r = rng.uniform(0, 2 * np.pi), size * np.sqrt(rng.random())
        _leaf(scene, rng, x + r * np.cos(angle), crown + r * np.sin(angle) * 0.8, z, size * 0.35, colour)


def _bin(scene: Scene, x: float, z: float) -> None:
    """Something that stands about: a bin, a box, a hydrant; void to Cityscapes."""
    rng = scene.rng
    width, height = rng.uniform(0.3, 0.9), rng.uniform(0.6, 1.3)
    label = DYNAMIC if rng.random() < 0.2 else STATIC
    scene.fill(_panel(_front(scene, x, z), 0, width, 0, height), label, scene.choose(PAINT + GREEN), grain=0.1, z=z)
    scene.fill(_panel(_front(scene, x, z), 0, width, height * 0.85, height), label, scene.choose(GREY), z=z)


# ---- people and what they ride


def _walkers(scene: Scene, layout: Layout, side: int) -> list[tuple[float, Callable[[], None]]]:
    """Return people on one pavement and parked bicycles and motorcycles."""
    rng = scene.rng
    things: list[tuple[float, Callable[[], None]]] = []
    near, width = layout.pavement(side) + 0.6, max(0.5, layout.walk[side] - 0.8)
    for _ in range(int(rng.integers(0, 8))):
        x, z = side * (near + rng.uniform(0, width)), float(rng.uniform(4, 35))
        things.append((z, lambda x=x, z=z: _person(scene, x, z)))
    for _ in range(int(rng.integers(0, 3))):
        x, z = side * (near + rng.uniform(0, width)), float(rng.uniform(4.5, 25))
        wheels = _bicycle if rng.random() < 0.65 else _motorcycle
        things.append((z, lambda x=x, z=z, wheels=wheels: wheels(scene, x, z, rider=False)))
    return things


def _person(scene: Scene, x: float, z: float) -> None:
    """Someone standing or walking."""
    rng = scene.rng
    to, size = _front(scene, x, z), rng.uniform(0.85, 1.08)
    coat, legs, skin = scene.choose(PAINT + GREY), scene.choose(PAINT + GREY), scene.choose(SKIN)
    step, swing = rng.uniform(-0.32, 0.32), rng.uniform(-0.25, 0.25)

    def line(points: Points, colour: Array, width: float) -> None:
        scene.stroke([to(s * size, y * size) for s, y in points], PERSON, colour, scene.pixels(width * size, z), z=z)

    line([(0.07, 0.85), (0.05 + step / 2, 0.45), (step, 0.04)], legs, 0.17)
    line([(-0.07, 0.85), (-0.05 - step / 2, 0.45), (-step, 0.04)], legs * 0.8, 0.17)
    line([(0.2, 1.36), (0.24 + swing * 0.3, 1.08), (0.22 + swing, 0.85)], coat * 0.85, 0.11)
    line([(-0.2, 1.36), (-0.24 - swing * 0.3, 1.08), (-0.22 - swing, 0.85)], coat * 0.85, 0.11)
    torso = [(-0.2, 1.42), (0.2, 1.42), (0.18, 0.8), (-0.18, 0.8)]
    scene.fill([to(s * size, y * size) for s, y in torso], PERSON, coat, grain=0.1, z=z)
    _head(scene, to, 0.0, 1.6 * size, z, PERSON, skin)


def _head(scene: Scene, to: Mapper, s: float, y: float, z: float, label: int, skin: Array) -> None:
    """Paint a head with hair or a helmet."""
    u, v = to(s, y)
    r = scene.pixels(0.12, z)
    scene.fill(_oval(u, v, r, r * 1.2), label, skin, grain=0.02, z=z)
    cap = [p for p in _oval(u, v - r * 0.15, r * 1.08, r * 1.25) if p[1] <= v - r * 0.1]
    if len(cap) > 2:
        scene.fill(cap, label, scene.choose(PAINT), grain=0.05, z=z)


def _aslant(scene: Scene, x: float, z: float) -> Mapper:
    """Return the mapper of a plane turned by any angle that still shows its side."""
    angle = scene.rng.uniform(-1.0, 1.0) + (np.pi if scene.rng.random() < 0.5 else 0)
    return lambda along, up: scene.at(x + along * np.cos(angle), up, z + along * np.sin(angle) * 0.5)


def _disc(to: Mapper, s: float, y: float, r: float) -> Points:
    """Return a circle on a surface."""
    return [to(s + r * np.cos(a), y + r * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 18, endpoint=False)]


def _bicycle(scene: Scene, x: float, z: float, *, rider: bool) -> None:
    """A bicycle from the side; one sees through its wheels, which are labelled whole."""
    to, colour = _aslant(scene, x, z), scene.choose(PAINT)
    dark = rgb(30, 30, 32)
    for s in (-0.52, 0.52):
        rim = _disc(to, s, 0.34, 0.34)
        scene.mark(rim, BICYCLE)
        scene.stroke([*rim, rim[0]], BICYCLE, dark, scene.pixels(0.06, z), z=z)
        for a in (0.3, 1.3, 2.3):
            spoke = [to(s + 0.3 * np.cos(a), 0.34 + 0.3 * np.sin(a)), to(s - 0.3 * np.cos(a), 0.34 - 0.3 * np.sin(a))]
            scene.stroke(spoke, BICYCLE, dark * 2, 1, z=z)
    frame = [(-0.52, 0.34), (-0.12, 0.32), (0.36, 0.78), (-0.2, 0.8), (-0.52, 0.34)]
    scene.stroke([to(*p) for p in frame], BICYCLE, colour, scene.pixels(0.07, z), z=z)
    for part in (
        [(-0.12, 0.32), (-0.24, 0.95)],
        [(-0.36, 0.97), (-0.12, 0.97)],
        [(0.52, 0.34), (0.34, 1.0), (0.5, 1.06)],
    ):
        scene.stroke([to(*p) for p in part], BICYCLE, colour * 0.7, scene.pixels(0.06, z), z=z)
    if rider:
        _rider(scene, to, z, seat=0.95)


def _motorcycle(scene: Scene, x: float, z: float, *, rider: bool) -> None:
    """A motorcycle from the side: heavy wheels, tank, seat, lamp."""
    to, colour = _aslant(scene, x, z), scene.choose(PAINT)
    dark, chrome = rgb(26, 26, 28), rgb(165, 168, 172)
    body = [
        (-0.85, 0.72),
        (-0.75, 0.5),
        (-0.3, 0.25),
        (0.35, 0.25),
        (0.72, 0.4),
        (0.55, 0.86),
        (0.15, 0.98),
        (-0.2, 0.78),
    ]
    for s in (-0.68, 0.7):
        scene.fill(_disc(to, s, 0.33, 0.33), MOTORCYCLE, dark, grain=0.05, z=z)
        scene.fill(_disc(to, s, 0.33, 0.17), MOTORCYCLE, chrome * 0.7, grain=0.05, z=z)
    scene.fill([to(*p) for p in body], MOTORCYCLE, colour, grain=0.06, z=z)
    scene.fill([to(*p) for p in [(-0.35, 0.2), (0.3, 0.2), (0.3, 0.55), (-0.3, 0.55)]], MOTORCYCLE, chrome * 0.6, z=z)
    scene.stroke([to(-0.8, 0.8), to(-0.1, 0.82)], MOTORCYCLE, dark, scene.pixels(0.13, z), z=z)
    scene.stroke([to(0.7, 0.33), to(0.5, 1.0), to(0.38, 1.12)], MOTORCYCLE, chrome, scene.pixels(0.07, z), z=z)
    scene.fill(_disc(to, 0.58, 0.9, 0.1), MOTORCYCLE, rgb(235, 232, 210), grain=0.0, z=z)
    if rider:
        _rider(scene, to, z, seat=0.85)


def _rider(scene: Scene, to: Mapper, z: float, seat: float) -> None:
    """Someone on a saddle, hands at the bar."""
    coat, legs, skin = scene.choose(PAINT + GREY), scene.choose(PAINT + GREY), scene.choose(SKIN)
    for part, colour, width in (
        ([(-0.22, seat), (0.16, seat - 0.22), (0.0, seat - 0.62)], legs, 0.16),
        ([(0.1, seat + 0.5), (0.22, seat + 0.2), (0.42, seat + 0.12)], coat * 0.8, 0.11),
    ):
        scene.stroke([to(*p) for p in part], RIDER, colour, scene.pixels(width, z), z=z)
    torso = [(-0.36, seat - 0.05), (-0.06, seat - 0.05), (0.22, seat + 0.55), (-0.06, seat + 0.6)]
    scene.fill([to(*p) for p in torso], RIDER, coat, grain=0.1, z=z)
    _head(scene, to, 0.14, seat + 0.74, z, RIDER, skin)


# ---- vehicles


@dataclass(frozen=True)
class Vehicle:
    """Kinds of vehicles by label, width, length and height in metres."""

    label: int
    width: float
    length: float
    height: float


VEHICLES = {
    CAR: Vehicle(CAR, 1.8, 4.2, 1.5),
    TRUCK: Vehicle(TRUCK, 2.4, 7.5, 3.4),
    BUS: Vehicle(BUS, 2.5, 11.0, 3.1),
    TRAIN: Vehicle(TRAIN, 2.5, 22.0, 3.6),
}


def _traffic(scene: Scene, layout: Layout) -> list[tuple[float, Callable[[], None]]]:
    """Return what drives and parks: cars mostly; riders; now and then a truck, a bus, a tram."""
    rng = scene.rng
    things: list[tuple[float, Callable[[], None]]] = []
    middle = (layout.kerb[1] - layout.kerb[-1]) / 2 - 0.2
    lanes = ((middle + layout.kerb[1]) / 2, (middle - layout.kerb[-1]) / 2)
    free = [float(rng.uniform(7, 20)), float(rng.uniform(6, 20))]
    for label, chance in ((TRAIN, 0.25), (BUS, 0.3), (TRUCK, 0.32), *[(CAR, 0.55)] * 6):
        if rng.random() > chance:
            continue
        lane = 1 if label == TRAIN else int(rng.integers(2))
        kind = VEHICLES[label]
        z, x = free[lane] + float(rng.uniform(0, 8)), lanes[lane] + float(rng.uniform(-0.5, 0.5))
        free[lane] = z + kind.length + 1.5
        things.append((z, lambda kind=kind, x=x, z=z: _vehicle(scene, kind, x, z, across=False)))
    for side in (-1, 1):
        if rng.random() < 0.4:
            z = float(rng.uniform(4, 14))
            for _ in range(int(rng.integers(1, 6))):
                x = side * (layout.kerb[side] + (1.1 if layout.parking[side] else -0.6))
                if not layout.is_open(z, z + 5):
                    things.append((z, lambda x=x, z=z: _vehicle(scene, VEHICLES[CAR], x, z, across=False)))
                z += float(rng.uniform(4.8, 9))
    if layout.crossing[0] < layout.crossing[1] and rng.random() < 0.8:
        z = float(rng.uniform(layout.crossing[0] + 1, layout.crossing[1] - 3))
        label, x = (CAR, CAR, TRUCK, BUS, TRAIN)[rng.integers(5)], float(rng.uniform(-9, 9))
        things.append((z, lambda: _vehicle(scene, VEHICLES[label], x, z, across=True)))
    for _ in range(int(rng.integers(0, 3))):
        x = float(rng.uniform(-layout.kerb[-1] + 0.6, layout.kerb[1] - 0.6))
        z, wheels = float(rng.uniform(5, 25)), _bicycle if rng.random() < 0.55 else _motorcycle
        things.append((z, lambda x=x, z=z, wheels=wheels: wheels(scene, x, z, rider=True)))
    return things


def _vehicle(scene: Scene, kind: Vehicle, x: float, z: float, *, across: bool) -> None:
    """Paint a vehicle: its flank, then the end turned to us (or, across the street, its flank alone).

    Args:
        x: Its middle.
        z: Its near end.
        across: Whether it crosses our street.
    """
    body = scene.choose(PAINT)
    if across:
        _shadow(scene, x - kind.length / 2, x + kind.length / 2, z, z + kind.width)
        _long_side(scene, kind, _front(scene, x - kind.length / 2, z), body, z)
        return
    left, right = x - kind.width / 2, x + kind.width / 2
    _shadow(scene, left, right, z, z + kind.length)
    bend = scene.bend * z * z
    if right + bend < 0:
        _long_side(scene, kind, _flank(scene, right, z), body * 0.82, z)
    elif left + bend > 0:
        _long_side(scene, kind, _flank(scene, left, z), body * 0.82, z)
    _end(scene, kind, left, z, body)


def _shadow(scene: Scene, x0: float, x1: float, z0: float, z1: float) -> None:
    scene.shade(
        [
            scene.at(x0 - 0.2, 0, z0 - 0.2),
            scene.at(x1 + 0.2, 0, z0 - 0.2),
            scene.at(x1 + 0.2, 0, z1),
            scene.at(x0 - 0.2, 0, z1),
        ],
        0.5,
    )


def _long_side(scene: Scene, kind: Vehicle, to: Mapper, body: Array, z: float) -> None:
    """Paint the flank of a vehicle on the surface `to`, from its near end on."""
    rng, label, length, top = scene.rng, kind.label, kind.length, kind.height
    pane, dark = rgb(50, 58, 68) * rng.uniform(0.6, 1.8), rgb(24, 24, 26)
    wheels: tuple[float, ...] = (0.8, length - 0.9)

    def fill(points: Points, colour: Array, grain: float = 0.04) -> None:
        scene.fill([to(*p) for p in points], label, colour, grain=grain, z=z)

    if label == CAR:
        fill([(0, 0.25), (0, 0.85), (0.5, 0.95), (1.0, top), (2.6, top), (3.3, 0.95), (4.15, 0.8), (4.2, 0.25)], body)
        fill([(0.75, 0.95), (1.1, top - 0.1), (1.8, top - 0.1), (1.8, 0.95)], pane)
        fill([(1.9, 0.95), (1.9, top - 0.1), (2.55, top - 0.1), (3.05, 0.95)], pane)
    elif label == TRUCK:
        fill([(0, 0.7), (0, top), (length - 2.3, top), (length - 2.3, 0.7)], body)
        fill([(0, 0.45), (0, 0.75), (length, 0.75), (length, 0.45)], dark)
        cab = body if rng.random() < 0.3 else scene.choose(PAINT)
        fill([(length - 2.1, 0.4), (length - 2.1, 2.7), (length - 0.4, 2.7), (length, 1.5), (length, 0.4)], cab)
        fill([(length - 1.5, 1.5), (length - 1.5, 2.4), (length - 0.5, 2.4), (length - 0.2, 1.5)], pane)
        wheels = (0.9, 2.1, length - 1.1)
    elif label == BUS:
        fill([(0, 0.3), (0, top), (length, top), (length, 0.3)], body)
        for s in np.arange(0.3, length - 1.2, 1.5):
            fill([(s, 1.35), (s, 2.5), (s + 1.3, 2.5), (s + 1.3, 1.35)], pane)
        fill([(length - 1.4, 0.4), (length - 1.4, 2.5), (length - 0.5, 2.5), (length - 0.5, 0.4)], pane * 1.3)
        wheels = (2.4, length - 2.6)
    else:
        fill([(0.3, 0.25), (0, 1.2), (0.5, top), (length - 0.5, top), (length, 1.2), (length - 0.3, 0.25)], body)
        fill([(0.5, 1.6), (0.6, 2.7), (length - 0.6, 2.7), (length - 0.5, 1.6)], pane)
        fill([(0.2, 0.25), (0.1, 0.8), (length - 0.1, 0.8), (length - 0.2, 0.25)], body * 0.55)
        for s in np.arange(2.0, length, 3.0):
            fill([(s, 0.4), (s, 2.8), (s + 0.12, 2.8), (s + 0.12, 0.4)], body * 0.7)
        for s in (length * 0.33, length * 0.66):
            fill([(s, 0.3), (s, top - 0.1), (s + 0.3, top - 0.1), (s + 0.3, 0.3)], dark)
        _wires(scene, to, length / 2, top, label, z)
        wheels = ()
    radius = 0.34 if label == CAR else 0.5
    for s in wheels:
        fill([*_circle(s, radius, radius)], dark)
        fill([*_circle(s, radius, radius * 0.5)], rgb(140, 142, 146))


def _circle(s: float, y: float, r: float) -> Points:
    return [(s + r * np.cos(a), y + r * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 14, endpoint=False)]


def _wires(scene: Scene, to: Mapper, s: float, top: float, label: int, z: float) -> None:
    """Paint a tram's pantograph."""
    colour = rgb(40, 40, 44)
    scene.stroke(
        [to(s - 0.6, top), to(s, top + 0.6), to(s + 0.6, top + 1.1)], label, colour, scene.pixels(0.08, z), z=z
    )


def _end(scene: Scene, kind: Vehicle, left: float, z: float, body: Array) -> None:
    """Paint the near end of a vehicle: front or back."""
    rng, label, width, top = scene.rng, kind.label, kind.width, kind.height
    to = _front(scene, left, z)
    pane, dark = rgb(46, 54, 64) * rng.uniform(0.6, 1.8), rgb(24, 24, 26)
    lamp = rgb(190, 30, 30) if rng.random() < 0.5 else rgb(240, 236, 215)

    def fill(points: Points, colour: Array) -> None:
        scene.fill([to(*p) for p in points], label, colour, grain=0.04, z=z)

    for s in (0.08, width - 0.36):
        fill([(s, 0), (s, 0.4), (s + 0.28, 0.4), (s + 0.28, 0)], dark)
    if label == CAR:
        fill([(0.22, 0.8), (0.38, top), (width - 0.38, top), (width - 0.22, 0.8)], body * 0.9)
        fill([(0.32, 0.92), (0.44, top - 0.1), (width - 0.44, top - 0.1), (width - 0.32, 0.92)], pane)
        fill([(0.0, 0.25), (0.0, 0.75), (0.12, 0.92), (width - 0.12, 0.92), (width, 0.75), (width, 0.25)], body)
        fill([(0.6, 0.42), (0.6, 0.55), (width - 0.6, 0.55), (width - 0.6, 0.42)], rgb(215, 215, 205))
        for s in (0.05, width - 0.4):
            fill([(s, 0.62), (s, 0.8), (s + 0.35, 0.8), (s + 0.35, 0.62)], lamp)
        return
    fill([(0, 0.35), (0, top), (width, top), (width, 0.35)], body)
    if label == TRUCK:
        fill(
            [(width / 2, 0.8), (width / 2, top - 0.15), (width / 2 + 0.06, top - 0.15), (width / 2 + 0.06, 0.8)],
            body * 0.5,
        )
        fill([(0, 0.35), (0, 0.75), (width, 0.75), (width, 0.35)], dark)
    elif label == BUS:
        fill([(0.15, 1.3), (0.15, 2.55), (width - 0.15, 2.55), (width - 0.15, 1.3)], pane)
        fill(
            [(0.5, 2.65), (0.5, 2.95), (width - 0.5, 2.95), (width - 0.5, 2.65)],
            rgb(230, 160, 40) * rng.uniform(0.3, 1),
        )
    else:
        fill([(0.3, 1.4), (0.45, 2.8), (width - 0.45, 2.8), (width - 0.3, 1.4)], pane)
        fill([(0, 0.35), (0, 0.9), (width, 0.9), (width, 0.35)], body * 0.55)
        _wires(scene, to, width / 2, top, label, z)
    for s in (0.12, width - 0.45):
        fill([(s, 0.85), (s, 1.1), (s + 0.33, 1.1), (s + 0.33, 0.85)], lamp)


def _bonnet(scene: Scene) -> None:
    """Paint, mostly, the bonnet of our own car along the lower edge, and leave a frame without labels."""
    rng, width, height = scene.rng, scene.width, scene.height
    if rng.random() < 0.6:
        rise = rng.uniform(0.03, 0.11) * height
        bonnet = _oval(width * rng.uniform(0.42, 0.58), height + rise * 0.2, width * rng.uniform(0.45, 0.7), rise, 40)
        scene.fill(bonnet, EGO, scene.choose(PAINT[3:5] + GREY[:1]), grain=0.03)
    if rng.random() < 0.4:
        frame = int(rng.integers(1, 3)) * SUPERSAMPLING
        scene.ids[:, :frame] = scene.ids[:, -frame:] = UNLABELED
