"""Ten kinds of objects, drawn so that shape tells them apart, not colour, place, light or background.

An object is a list of parts in its own frame (x to the right, y down,
                                               about -1 to 1); `draw_object` places, colours,
lights and textures it. The ten are CIFAR-10's; the ImageNet stand-ins are larger pictures of the same.
"""
# fmt: off: outlines read as lists of points

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

Array = np.ndarray
Rng = np.random.Generator
Points = list[tuple[float, float]]

COAT, SECOND, DARK, GLASS, FAR = range(5)  # what a part is painted with; FAR: the coat, turned away


@dataclass(frozen=True)
class Part:
    """A filled outline (N, 2), or, where `width` is not 0, a line along the points that thick."""

    points: Array
    paint: int = COAT
    width: float = 0.0


class Jitter:
    """Draws proportions: `j(value)` is the value give or take 12 %, `j.between(a, b)` any in the range."""

    def __init__(self, rng: Rng) -> None:
        """Draw from `rng`."""
        self.rng = rng

    def __call__(self, value: float, share: float = 0.12) -> float:
        """Return `value` give or take `share` of it."""
        return value * float(self.rng.uniform(1 - share, 1 + share))

    def between(self, low: float, high: float) -> float:
        """Return a number of the range."""
        return float(self.rng.uniform(low, high))

    def often(self, probability: float) -> bool:
        """Return True with `probability`."""
        return bool(self.rng.random() < probability)


# ---- outlines


def blob(points: Points) -> Array:
    """Return a smooth closed curve through `points` (Catmull-Rom)."""
    p1 = np.array(points, np.float32)
    p0, p2, p3 = np.roll(p1, 1, 0), np.roll(p1, -1, 0), np.roll(p1, -2, 0)
    t = np.linspace(0, 1, 6, endpoint=False, dtype=np.float32)[None, :, None]
    p0, p1, p2, p3 = (p[:, None] for p in (p0, p1, p2, p3))
    square, cube = 2 * p0 - 5 * p1 + 4 * p2 - p3, 3 * p1 - p0 - 3 * p2 + p3
    return ((2 * p1 + (p2 - p0) * t + square * t**2 + cube * t**3) / 2).reshape(-1, 2)


def oval(x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> Array:
    """Return an ellipse around (x, y), turned by `turn` radians."""
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    circle = np.stack([rx * np.cos(angle), ry * np.sin(angle)], 1)
    c, s = np.cos(turn), np.sin(turn)
    return (circle @ np.array([[c, s], [-s, c]]) + (x, y)).astype(np.float32)


def corners(points: Points) -> Array:
    """Return a polygon."""
    return np.array(points, np.float32)


def box(left: float, top: float, right: float, bottom: float) -> Array:
    """Return an upright rectangle."""
    return corners([(left, top), (right, top), (right, bottom), (left, bottom)])


def wheel(x: float, y: float, r: float) -> list[Part]:
    """Return a tyre and its rim."""
    return [Part(oval(x, y, r, r), DARK), Part(oval(x, y, r * 0.45, r * 0.45), GLASS)]


# ---- the ten


def airplane(j: Jitter) -> list[Part]:
    """Seen from the side and a little from above: tube, swept wings, fin."""
    r, w = j(0.13), j(0.30)
    sweep, span = j.between(0.25, 0.5), j(0.72)
    tail, fin = j(0.34), j(0.42)
    return [
        Part(corners([(0.15, 0), (0.15 - w, 0), (-0.2 - sweep, -span), (-0.02 - sweep, -span)]), FAR),
        Part(corners([(-0.62, 0), (-0.85, 0), (-1.0, -tail), (-0.88, -tail)]), FAR),
        Part(
            blob(
                [
                    (1.0, 0.02),
                    (0.82, -r * 0.8),
                    (0.5, -r),
                    (-0.6, -r),
                    (-1.0, -r * 0.5),
                    (-1.0, -r * 0.1),
                    (-0.5, r * 0.8),
                    (0.5, r),
                    (0.85, r * 0.7),
                ]
            )
        ),
        Part(corners([(-0.6, -r * 0.8), (-0.85, -r - fin), (-1.05, -r - fin), (-0.98, -r * 0.3)]), SECOND),
        Part(corners([(0.2, r * 0.3), (0.2 - w, r * 0.3), (-0.2 - sweep, span), (0.0 - sweep, span)])),
        Part(corners([(-0.65, 0.02), (-0.85, 0.02), (-1.02, tail), (-0.9, tail)])),
        Part(corners([(0.95, -0.03), (0.8, -r * 0.75), (0.7, -r * 0.75), (0.76, -0.02)]), GLASS),
        Part(corners([(0.55, -r * 0.25), (-0.45, -r * 0.25)]), GLASS, 0.05),
    ]


def automobile(j: Jitter) -> list[Part]:
    """From the side: a low body, a rounded cabin, two wheels."""
    roof, belt, floor = -j(0.44), -j(0.08), j(0.28)
    front, back = j(0.26), j(0.62)
    r = j(0.21)
    return [
        Part(
            blob(
                [
                    (-0.95, floor),
                    (-1.0, belt + 0.1),
                    (-0.9, belt - 0.03),
                    (-back, belt - 0.02),
                    (-back + 0.22, roof),
                    (0.05, roof - 0.03),
                    (front, roof + 0.06),
                    (front + 0.24, belt),
                    (0.85, belt + 0.08),
                    (1.0, belt + 0.22),
                    (0.98, floor),
                ]
            )
        ),
        Part(corners([(-back + 0.1, belt), (-back + 0.26, roof + 0.08), (-0.06, roof + 0.06), (-0.06, belt)]), GLASS),
        Part(corners([(0.02, belt), (0.02, roof + 0.06), (front - 0.06, roof + 0.1), (front + 0.12, belt)]), GLASS),
        Part(corners([(-0.98, floor - 0.04), (0.98, floor - 0.04)]), SECOND, 0.07),
        *wheel(-j(0.6), floor + 0.02, r),
        *wheel(j(0.6), floor + 0.02, r),
    ]


def truck(j: Jitter) -> list[Part]:
    """From the side: a tall box behind a cab, three wheels."""
    top, floor, r = -j(0.62), j(0.3), j(0.17)
    cab, roof = j(0.42), -j(0.3)
    return [
        Part(box(-1.0, floor - 0.12, 1.0, floor + 0.05), DARK),
        Part(box(-1.0, top, cab - 0.02, floor - 0.06), COAT),
        Part(corners([(-1.0, (top + floor) / 2), (cab - 0.02, (top + floor) / 2)]), FAR, j(0.09)),
        Part(corners([(cab, floor), (cab, roof), (0.8, roof), (0.94, -0.02), (1.0, 0.04), (1.0, floor)]), SECOND),
        Part(corners([(cab + 0.14, -0.02), (cab + 0.14, roof + 0.07), (0.77, roof + 0.07), (0.88, -0.02)]), GLASS),
        *wheel(-0.75, floor + 0.06, r),
        *wheel(-j(0.36), floor + 0.06, r),
        *wheel(j(0.7, 0.06), floor + 0.06, r),
    ]


def ship(j: Jitter) -> list[Part]:
    """From the side: hull with a raised bow, decks, funnel, mast."""
    deck, keel = j(0.08), j(0.45)
    left, right, height = -j(0.62), j(0.3), j(0.2)
    return [
        Part(corners([(j.between(0.35, 0.5), deck), (j.between(0.35, 0.5), -j(0.75))]), DARK, 0.05),
        Part(box(left + 0.18, deck - 2 * height, right - 0.15, deck - height), SECOND),
        Part(
            corners(
                [
                    (left + 0.26, deck - 2 * height),
                    (left + 0.3, deck - 2 * height - j(0.34)),
                    (left + 0.54, deck - 2 * height - 0.34),
                    (left + 0.56, deck - 2 * height),
                ]
            ),
            COAT,
        ),
        Part(box(left, deck - height, right, deck + 0.05), SECOND),
        Part(corners([(left + 0.06, deck - height * 0.5), (right - 0.06, deck - height * 0.5)]), GLASS, 0.06),
        Part(corners([(-1.0, deck), (0.7, deck), (1.0, deck - j(0.16)), (j(0.72), keel), (-j(0.84), keel)]), COAT),
        Part(corners([(-0.84, keel - 0.05), (0.7, keel - 0.05)]), DARK, 0.1),
    ]


def bird(j: Jitter) -> list[Part]:
    """From the side, standing: round body, head with a beak, wing, tail, two thin legs."""
    hx, hy, r = j(0.5), -j(0.45), j(0.24)
    tail, beak = j(0.55), j(0.3)
    return [
        Part(corners([(-0.02, 0.3), (-0.06, 0.85), (0.12, 0.87)]), DARK, 0.06),
        Part(corners([(0.14, 0.3), (0.12, 0.85), (0.3, 0.87)]), DARK, 0.06),
        Part(corners([(-0.35, -0.02), (-0.5 - tail, 0.2), (-0.42 - tail, 0.42), (-0.25, 0.3)]), FAR),
        Part(corners([(hx + r * 0.7, hy - 0.1), (hx + r + beak, hy + 0.06), (hx + r * 0.7, hy + 0.13)]), SECOND),
        Part(
            blob(
                [
                    (-0.62, 0.12),
                    (-0.3, -0.22),
                    (0.2, -0.36),
                    (hx - r * 0.5, hy - r * 0.6),
                    (hx, hy - r),
                    (hx + r, hy),
                    (hx + r * 0.7, hy + r * 0.8),
                    (0.5, 0.15),
                    (0.15, 0.42),
                    (-0.3, 0.36),
                ]
            )
        ),
        Part(blob([(0.2, -0.12), (0.1, 0.16), (-0.25, 0.24), (-0.72, 0.16), (-0.3, -0.1)]), SECOND),
        Part(oval(hx + 0.06, hy - 0.04, 0.055, 0.055), DARK),
    ]


def cat(j: Jitter) -> list[Part]:
    """Sitting, seen from the front: round head, two pointed ears, a tail around."""
    r, hy, wide = j(0.34), -j(0.36), j(0.42)
    ear = j(0.36)
    side = 1 if j.often(0.5) else -1
    tail = [(side * wide * 0.7, 0.7), (side * 0.75, 0.72), (side * j(0.86), 0.35), (side * 0.72, j.between(-0.2, 0.1))]
    return [
        Part(corners(tail), COAT, j(0.13)),
        Part(
            blob(
                [
                    (0, -0.25),
                    (wide * 0.75, 0.05),
                    (wide, 0.6),
                    (wide * 0.7, 0.88),
                    (-wide * 0.7, 0.88),
                    (-wide, 0.6),
                    (-wide * 0.75, 0.05),
                ]
            )
        ),
        Part(corners([(-0.1, 0.3), (-0.1, 0.86)]), FAR, 0.05),
        Part(corners([(0.1, 0.3), (0.1, 0.86)]), FAR, 0.05),
        *[
            Part(
                corners(
                    [(s * r * 0.15, hy - r * 0.75), (s * r * 0.95, hy - r - ear * 0.6), (s * r * 0.98, hy - r * 0.1)]
                )
            )
            for s in (-1, 1)
        ],
        *[
            Part(
                corners(
                    [(s * r * 0.4, hy - r * 0.8), (s * r * 0.85, hy - r - ear * 0.3), (s * r * 0.85, hy - r * 0.5)]
                ),
                SECOND,
            )
            for s in (-1, 1)
        ],
        Part(oval(0, hy, r * 1.12, r)),
        *[Part(oval(s * r * 0.45, hy - r * 0.1, r * 0.17, r * 0.2), GLASS) for s in (-1, 1)],
        *[Part(oval(s * r * 0.45, hy - r * 0.1, r * 0.07, r * 0.17), DARK) for s in (-1, 1)],
        Part(corners([(-0.07, hy + r * 0.3), (0.07, hy + r * 0.3), (0, hy + r * 0.5)]), SECOND),
    ]


def frog(j: Jitter) -> list[Part]:
    """Squatting, seen from the front: wide, flat, bulging eyes, folded legs beside it."""
    wide, eye, up = j(0.58), j(0.17), j(0.36)
    parts: list[Part] = []
    for s in (-1, 1):
        knee = (s * j(0.9, 0.06), j.between(-0.1, 0.12))
        parts += [
            Part(corners([(s * 0.3, 0.3), knee, (s * 0.72, 0.55)]), FAR, j(0.22)),
            Part(corners([(s * 0.62, 0.56), (s * 1.0, 0.6)]), FAR, 0.1),
            Part(corners([(s * 0.26, 0.2), (s * 0.34, 0.58), (s * 0.5, 0.62)]), COAT, 0.11),
        ]
    parts += [
        Part(
            blob(
                [
                    (0, -up),
                    (wide * 0.75, -up * 0.75),
                    (wide, 0.1),
                    (wide * 0.6, 0.48),
                    (-wide * 0.6, 0.48),
                    (-wide, 0.1),
                    (-wide * 0.75, -up * 0.75),
                ]
            )
        ),
        Part(
            blob([(0, 0.12), (wide * 0.55, 0.2), (wide * 0.45, 0.46), (-wide * 0.45, 0.46), (-wide * 0.55, 0.2)]),
            SECOND,
        ),
        Part(corners([(-wide * 0.75, -0.02), (0, 0.08), (wide * 0.75, -0.02)]), DARK, 0.04),
    ]
    for s in (-1, 1):
        parts += [
            Part(oval(s * wide * 0.6, -up - 0.02, eye, eye)),
            Part(oval(s * wide * 0.6, -up - 0.03, eye * 0.62, eye * 0.62), GLASS),
            Part(oval(s * wide * 0.6, -up - 0.03, eye * 0.34, eye * 0.28), DARK),
        ]
    return parts


def _legs(j: Jitter, fore: float, hind: float, top: float, foot: float, width: float) -> tuple[list[Part], list[Part]]:
    """Return the far and the near pair of legs of a walker."""
    far, near = [], []
    for x in (fore, hind):
        for parts, paint in ((far, FAR), (near, COAT)):
            step, knee = j.between(-0.16, 0.16), j.between(-0.05, 0.05)
            line = [(x, top), (x + step * 0.4 + knee, (top + foot) / 2), (x + step, foot)]
            parts.append(Part(corners(line), paint, width))
    return far, near


def deer(j: Jitter) -> list[Part]:
    """From the side: slim, long thin legs, an upright neck, antlers, a stub of a tail."""
    far, near = _legs(j, 0.3, -0.42, 0.15, j(0.95, 0.05), 0.08)
    hx, hy = j(0.66), -j(0.46)
    antlers = []
    for lean in (-0.22, 0.12):
        tip = (hx - 0.08 + lean + j.between(-0.05, 0.05), hy - j(0.5))
        middle = ((hx - 0.06 + tip[0]) / 2 - 0.06, (hy + tip[1]) / 2)
        antlers += [
            Part(corners([(hx - 0.06, hy - 0.08), middle, tip]), SECOND, 0.06),
            Part(corners([middle, (middle[0] + 0.2, middle[1] - 0.16)]), SECOND, 0.05),
            Part(corners([middle, (middle[0] - 0.17, middle[1] - 0.2)]), SECOND, 0.05),
        ]
    return [
        *far,
        *antlers,
        Part(corners([(-0.5, 0.0), (-0.66, j.between(-0.12, 0.1))]), SECOND, 0.1),
        Part(blob([(-0.55, 0.05), (-0.4, -0.14), (0.1, -0.1), (0.4, -0.16), (0.42, 0.12), (0.1, 0.24), (-0.4, 0.26)])),
        Part(corners([(0.18, 0.05), (0.42, 0.16), (hx + 0.04, hy + 0.08), (hx - 0.14, hy - 0.06)])),
        Part(corners([(hx - 0.12, hy - 0.02), (hx - 0.3, hy - 0.14)]), COAT, 0.09),
        Part(
            blob(
                [
                    (hx - 0.14, hy - 0.08),
                    (hx + 0.05, hy - 0.11),
                    (hx + 0.3, hy + 0.06),
                    (hx + 0.28, hy + 0.14),
                    (hx - 0.04, hy + 0.12),
                ]
            )
        ),
        *near,
    ]


def horse(j: Jitter) -> list[Part]:
    """From the side: strong body, arched neck with a mane, long head held low, a long falling tail."""
    far, near = _legs(j, 0.36, -0.5, 0.2, j(0.92, 0.05), 0.13)
    hx, hy = j(0.74), -j(0.56)
    tail = [(-0.62, -0.1), (-0.84, 0.02), (-j(0.9), 0.5)]
    return [
        *far,
        Part(corners(tail), SECOND, j(0.16)),
        Part(blob([(-0.68, 0.02), (-0.5, -0.24), (-0.05, -0.16), (0.4, -0.24), (0.52, 0.1), (0.1, 0.32), (-0.4, 0.3)])),
        Part(corners([(0.08, -0.1), (0.52, 0.16), (hx + 0.08, hy + 0.12), (hx - 0.2, hy - 0.14)])),
        Part(corners([(0.06, -0.14), (0.3, hy * 0.8), (hx - 0.18, hy - 0.16)]), SECOND, j(0.16)),
        Part(
            blob(
                [
                    (hx - 0.2, hy - 0.14),
                    (hx, hy - 0.18),
                    (hx + 0.3, hy + 0.2),
                    (hx + 0.26, hy + 0.34),
                    (hx + 0.12, hy + 0.34),
                    (hx - 0.08, hy + 0.14),
                ]
            )
        ),
        Part(corners([(hx - 0.16, hy - 0.12), (hx - 0.14, hy - 0.34), (hx - 0.02, hy - 0.14)])),
        *near,
    ]


def dog(j: Jitter) -> list[Part]:
    """From the side: short legs, a square head with a muzzle and a hanging ear, the tail up."""
    far, near = _legs(j, 0.32, -0.44, 0.2, j(0.72, 0.06), 0.15)
    hx, hy, r = j(0.58), -j(0.3), j(0.25)
    tail = [(-0.55, 0.0), (-0.8, -0.22), (-j(0.78), -j(0.55))]
    return [
        *far,
        Part(corners(tail), COAT, j(0.11)),
        Part(blob([(-0.62, 0.1), (-0.5, -0.14), (0.05, -0.1), (0.45, -0.2), (0.56, 0.15), (0.2, 0.36), (-0.4, 0.32)])),
        Part(corners([(0.18, -0.05), (0.55, 0.2), (hx + 0.16, hy + 0.1), (hx - 0.2, hy - 0.06)])),
        Part(oval(hx, hy, r * 1.05, r * 0.95)),
        Part(blob([(hx + 0.1, hy - 0.06), (hx + 0.44, hy), (hx + 0.46, hy + 0.18), (hx + 0.08, hy + 0.24)])),
        Part(oval(hx + 0.45, hy + 0.03, 0.07, 0.06), DARK),
        Part(
            blob([(hx - 0.22, hy - 0.22), (hx - 0.02, hy - 0.16), (hx - 0.06, hy + 0.28), (hx - 0.26, hy + 0.3)]),
            SECOND,
        ),
        Part(oval(hx + 0.12, hy - 0.07, 0.045, 0.045), DARK),
        *near,
    ]


KINDS: dict[str, Callable[[Jitter], list[Part]]] = {
    "airplane": airplane,
    "automobile": automobile,
    "bird": bird,
    "cat": cat,
    "deer": deer,
    "dog": dog,
    "frog": frog,
    "horse": horse,
    "ship": ship,
    "truck": truck,
}


# ---- painting


def colour(rng: Rng, value: tuple[float, float] = (0.15, 0.95), saturation: float = 0.8) -> Array:
    """Return any RGB colour, 0 to 255."""
    hsv = rng.random(), saturation * rng.random(), rng.uniform(*value)
    return np.array(colorsys.hsv_to_rgb(*hsv), np.float32) * 255


def texture(rng: Rng, height: int, width: int, coarsest: int) -> Array:
    """Return smooth noise (height, width) around 0 with a spread of about 1: three octaves, any grain."""
    field = np.zeros((height, width), np.float32)
    for octave in range(3):
        cells = max(2, coarsest * 2**octave)
        grid = rng.standard_normal((cells, max(2, cells * width // height)), np.float32)
        field += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) * 0.6**octave
    return field


def background(rng: Rng, height: int, width: int) -> Array:
    """Return a float32 RGB ground (height, width, 3): two textured fields that meet, things lying about."""
    upper, lower = colour(rng), colour(rng)
    slope, level = rng.uniform(-0.25, 0.25), rng.uniform(0.3, 1.1)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j].astype(np.float32)
    below = np.clip((y + slope * (x - 0.5) - level) * rng.uniform(6, 60) + 0.5, 0, 1)[..., None]
    picture = upper * (1 - below) + lower * below
    grain = texture(rng, height, width, int(rng.integers(2, 7)))
    picture *= 1 + rng.uniform(0.05, 0.3) * grain[..., None]
    for _ in range(int(rng.integers(0, 6))):
        _clutter(rng, picture)
    return picture


def _clutter(rng: Rng, picture: Array) -> None:
    """Add something that is no object: a patch, a bar or a ring."""
    height, width = picture.shape[:2]
    centre = (int(rng.integers(width)), int(rng.integers(height)))
    size = int(max(height, width) * rng.uniform(0.04, 0.22))
    paint = tuple(float(c) for c in colour(rng))
    match int(rng.integers(3)):
        case 0:
            angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
            points = np.stack([np.cos(angles), np.sin(angles)], 1) * size + centre
            cv2.fillPoly(picture, [points.astype(np.int32)], paint)
        case 1:
            end = (int(centre[0] + 3 * size * rng.uniform(-1, 1)), int(centre[1] + 3 * size * rng.uniform(-1, 1)))
            cv2.line(picture, centre, end, paint, max(1, size // 5))
        case _:
            cv2.ellipse(
                picture,
                (centre, (size * 2, size * rng.uniform(0.6, 2)), rng.uniform(0, 180)),
                paint,
                -1 if rng.random() < 0.5 else max(1, size // 5),
            )


def draw_object(
    rng: Rng, picture: Array, kind: str, *, centre: tuple[float, float], radius: float, turn: float, flip: bool
) -> None:
    """Draw an object of `kind` into a float32 RGB picture, in place.

    Args:
        centre: Of the object in pixels.
        radius: Half its extent in pixels.
        turn: Its rotation in radians.
        flip: Whether it is mirrored.
    """
    height, width = picture.shape[:2]
    stretch = rng.uniform(0.85, 1.15)
    c, s = np.cos(turn), np.sin(turn)
    frame = np.array([[c, -s], [s, c]]) @ np.diag([radius * stretch * (-1 if flip else 1), radius / stretch])
    around = picture[int(np.clip(centre[1], 0, height - 1)), int(np.clip(centre[0], 0, width - 1))]
    coat = _apart_from(rng, around)
    paints = (
        coat,
        _apart_from(rng, coat, 40),
        coat * 0.15 + 15,
        np.array([175, 190, 205], np.float32) * rng.uniform(0.5, 1.2),
        coat * 0.62,
    )
    layer, mask = picture.copy(), np.zeros((height, width), np.uint8)
    for part in KINDS[kind](Jitter(rng)):
        points = np.round((part.points @ frame.T + centre) * 8).astype(np.int32)
        paint = tuple(float(v) for v in paints[part.paint])
        if part.width:
            thickness = max(1, round(part.width * radius))
            cv2.polylines(layer, [points], False, paint, thickness, shift=3)
            cv2.polylines(mask, [points], False, 255, thickness, shift=3)
        else:
            cv2.fillPoly(layer, [points], paint, shift=3)
            cv2.fillPoly(mask, [points], 255, shift=3)
    np.copyto(picture, layer * _lit(rng, mask, radius), where=mask[..., None] > 0)


def _apart_from(rng: Rng, other: Array, distance: float = 70) -> Array:
    """Return a colour that can be told from another."""
    for _ in range(20):
        candidate = colour(rng)
        if np.abs(candidate - other).mean() > distance:
            return candidate
    return 255 - other


def _lit(rng: Rng, mask: Array, radius: float) -> Array:
    """Return the light (H, W, 1) that falls on a rounded, grained thing of this outline, made small."""
    coarser = 1 + int(radius / 48)
    height, width = mask.shape
    size = (width // coarser, height // coarser)
    small = cv2.resize(mask, size, interpolation=cv2.INTER_AREA) if coarser > 1 else mask
    depth = cv2.GaussianBlur(small, (0, 0), max(1.0, radius * 0.12 / coarser)).astype(np.float32) / 255
    angle = rng.uniform(0, 2 * np.pi)
    slope = cv2.Sobel(depth, cv2.CV_32F, 1, 0) * np.cos(angle) + cv2.Sobel(depth, cv2.CV_32F, 0, 1) * np.sin(angle)
    grain = texture(rng, size[1], size[0], int(rng.integers(4, 12)))
    light = 1 + np.clip(slope * radius / coarser * 0.07, -0.4, 0.4) + rng.uniform(0, 0.12) * grain
    return cv2.resize(light.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)[..., None]


def finish(rng: Rng, picture: Array, noise: float) -> Array:
    """Return the photograph (uint8): exposure, colour of the light, gradient of brightness, noise."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    gradient = 1 + rng.uniform(-0.25, 0.25) * x + rng.uniform(-0.25, 0.25) * y
    cast = rng.uniform(0.65, 1.2) * rng.uniform(0.85, 1.15, 3)
    picture = picture * (gradient[..., None] * cast.astype(np.float32))
    picture += rng.standard_normal(picture.shape, np.float32) * noise
    return np.clip(picture, 0, 255).astype(np.uint8)


def small_picture(rng: Rng, kind: str) -> Array:
    """Return a CIFAR-10 like picture (32, 32, 3): the object not far from the middle."""
    side = 96
    picture = background(rng, side, side)
    radius = side * rng.uniform(0.4, 0.5)
    slack = (side / 2 - radius * 0.8) / 2
    centre = (side / 2 + slack * rng.uniform(-1, 1), side / 2 + slack * rng.uniform(-1, 1))
    draw_object(rng, picture, kind, centre=centre, radius=radius, turn=_turn(rng, kind), flip=bool(rng.integers(2)))
    picture = cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA)
    return finish(rng, picture, rng.uniform(1, 7))


def large_picture(rng: Rng, kind: str, height: int, width: int) -> Array:
    """Return a photo-like picture (height, width, 3): an object in sharp focus before a blurred ground."""
    side = min(height, width)
    picture = background(rng, height // 2, width // 2)
    for _ in range(int(rng.integers(1, 8))):
        _clutter(rng, picture)
    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.8))
    picture = cv2.resize(picture, (2 * width, 2 * height), interpolation=cv2.INTER_CUBIC)
    radius = 2 * side * rng.uniform(0.34, 0.5)
    slack_x, slack_y = 0.6 * max(0.0, width - radius * 0.85), 0.6 * max(0.0, height - radius * 0.85)
    centre = (width + slack_x * rng.uniform(-1, 1), height + slack_y * rng.uniform(-1, 1))
    draw_object(rng, picture, kind, centre=centre, radius=radius, turn=_turn(rng, kind), flip=bool(rng.integers(2)))
    picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return finish(rng, picture, rng.uniform(1, 6))


def _turn(rng: Rng, kind: str) -> float:
    """Return a rotation: aeroplanes bank, the others stand nearly upright."""
    return float(rng.uniform(-0.6, 0.6) if kind == "airplane" else rng.uniform(-0.2, 0.2))
